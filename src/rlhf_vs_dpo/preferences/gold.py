"""Gold rewards: what a response is really worth, where a source can tell.

The annotator chooses by it, curves and evaluation report it, and no method trains on it. `load` reads the folder that
the `data` stage wrote (`gold.json`, and `classifier.parquet` for sentiment), so that scoring needs nothing else.
"""

import json
import math
import re
from collections import Counter
from itertools import pairwise
from pathlib import Path
from typing import Protocol

import pandas as pd

from rlhf_vs_dpo.errors import DataError

PARTS = ("coverage", "faithfulness", "redundancy", "filler", "form")


class Gold(Protocol):
    """A reward that knows the truth."""

    def score(self, prompt: str, facts: str | None, response: str) -> dict[str, float]:
        """The reward of a response as `gold`, and what it is made of (`gold_<part>`) where it has parts."""
        ...

    def has_filler(self, response: str) -> bool | None:
        """Whether the response holds a phrase that says nothing; None where the source has no such phrases."""
        ...


class MiniTldrGold:
    """Parses a summary into clauses and counts facts; the weights come from data/mini_tldr/world.yaml.

    coverage      sum of the weights of the post's facts that the summary states (each once)
    faithfulness  cost of each stated fact that the post does not hold
    redundancy    cost of each distraction and of each clause that states a fact for the second time
    filler        cost of each filler phrase
    form          cost of each clause that cannot be parsed, and of a summary that does not end in " ."
    """

    def __init__(self, spec: dict):
        self.weights = spec["weights"]
        self.fillers = frozenset(spec["fillers"])
        self.clauses = spec["clauses"]

    def score(self, prompt: str, facts: str | None, response: str) -> dict[str, float]:
        truth = json.loads(facts)
        weights = self.weights
        parts = dict.fromkeys(PARTS, 0.0)
        body, ended, rest = response.partition(" .")
        if not ended or rest.strip():
            parts["form"] += weights["broken"]
        stated: set[str] = set()
        for clause in (part.strip() for part in body.split(" , ")):
            if clause in self.fillers:
                parts["filler"] += weights["filler"]
                continue
            said = self.clauses.get(clause)
            if said is None:
                parts["form"] += weights["broken"]
                continue
            if not said or stated & said.keys():
                parts["redundancy"] += weights["redundant"]
            for slot, value in said.items():
                if value != truth[slot]:
                    parts["faithfulness"] += weights["invented"]
                elif slot not in stated:
                    parts["coverage"] += weights["coverage"][slot]
            stated |= said.keys()
        return {"gold": sum(parts.values())} | {f"gold_{name}": value for name, value in parts.items()}

    def has_filler(self, response: str) -> bool:
        body = response.partition(" .")[0]
        return any(part.strip() in self.fillers for part in body.split(" , "))


class SentimentGold:
    """Log-odds that a review is positive, by a TF-IDF and logistic regression fitted on reviews that nobody else sees.

    The classifier was fitted with scikit-learn (`sources/imdb.py`) and is stored as a table `term, idf, weight`, so that
    no pickle is read; `terms` repeats scikit-learn's tokenisation (word 1- and 2-grams, sublinear tf, l2 norm), and a
    test holds the two equal.
    """

    def __init__(self, spec: dict, classifier: pd.DataFrame):
        self.intercept = float(spec["intercept"])
        rows = zip(classifier["term"], classifier["idf"], classifier["weight"], strict=True)
        self.table = {term: (idf, weight) for term, idf, weight in rows}

    @staticmethod
    def terms(text: str) -> Counter:
        words = re.findall(r"(?u)\b\w\w+\b", text.lower())
        return Counter(words) + Counter(f"{a} {b}" for a, b in pairwise(words))

    def score(self, prompt: str, facts: str | None, response: str) -> dict[str, float]:
        norm = total = 0.0
        for term, count in self.terms(prompt + response).items():
            if term in self.table:
                idf, weight = self.table[term]
                value = (1 + math.log(count)) * idf
                norm += value * value
                total += value * weight
        return {"gold": self.intercept + (total / math.sqrt(norm) if norm else 0.0)}

    def has_filler(self, response: str) -> None:
        return None


def load(folder: Path) -> Gold | None:
    """The gold reward that the `data` stage described in `folder`, or None where the source has none."""
    path = Path(folder) / "gold.json"
    try:
        spec = json.loads(path.read_text())
    except (FileNotFoundError, json.JSONDecodeError) as error:
        raise DataError(f"{path}: cannot be read ({error}); run `dvc repro data`") from error
    if spec["kind"] == "mini_tldr":
        return MiniTldrGold(spec)
    if spec["kind"] == "sentiment":
        return SentimentGold(spec, pd.read_parquet(Path(folder) / "classifier.parquet"))
    return None


def columns(gold: Gold | None, prompts: pd.Series, facts: pd.Series, responses: pd.Series) -> pd.DataFrame:
    """Gold reward, its parts and `filler` for a table of responses; all null where there is no gold reward."""
    names = ["gold", *(f"gold_{part}" for part in PARTS), "filler"]
    rows = []
    if gold is not None:
        for prompt, fact, response in zip(prompts, facts, responses, strict=True):
            filler = gold.has_filler(response)
            rows.append(gold.score(prompt, fact, response) | {"filler": None if filler is None else float(filler)})
    frame = pd.DataFrame(rows, index=responses.index, columns=names)
    return frame.astype("float64")
