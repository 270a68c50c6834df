"""Judges: who says which of two responses is better. One interface for the gold reward, a reward model and an LLM.

A judge that scores has no order to be misled by. A language model does: it is asked twice, each response shown first
once. What it prefers both times wins; what it prefers only in one order is a tie, and counts as a disagreement with
itself (Zheng et al. 2023, arXiv:2306.05685, section 3.4).
"""

import hashlib
import json
import os
import re
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Protocol

import numpy as np
import pandas as pd

from rlhf_vs_dpo.config import GoldJudge, LanguageModelJudge, LexiconJudge, RewardModelJudge
from rlhf_vs_dpo.errors import DataError, JudgeError, ModelError
from rlhf_vs_dpo.preferences import gold
from rlhf_vs_dpo.run.progress import bar

VERDICTS = ("win", "consistent", "first")


class Judge(Protocol):
    """Prefers one of two responses."""

    def compare(self, asked: pd.DataFrame) -> pd.DataFrame:
        """A verdict for each row of `prompt, facts, a, b`:

        win         1 where a is better, 0 where b is, 1/2 for a tie; NaN where the judge gave no usable answer
        consistent  1 where both orders agree, 0 where they do not; NaN for judges that see no order
        first       share of its answers that named the response shown first; NaN likewise
        """
        ...


def load(
    settings: GoldJudge | RewardModelJudge | LanguageModelJudge,
    world: Path,
    cache: Path,
    seed: int,
    done: Callable[[str], list] = lambda what: [],
) -> Judge | None:
    """The judge that an entry of `judging.judges` describes; None for the gold reward of a source that has none.

    `cache` is the file in which a language model's answers are kept; `seed` names the line that is judged, which has a
    reward model of its own (`models/reward-{seed}`). `done(what)` is the list in which a reward model finds, and leaves, the scores of
    its batches.
    """
    match settings:
        case GoldJudge():
            judge = gold.load(world)
            return None if judge is None else ByGold(judge)
        case RewardModelJudge():
            of_line = settings.model_copy(update={"model": settings.model.replace("{seed}", str(seed))})
            return ByRewardModel(of_line, done)
        case LexiconJudge():
            return ByLexicon()
        case LanguageModelJudge():
            return ByLanguageModel(settings, cache)


def by_score(a: np.ndarray, b: np.ndarray) -> pd.DataFrame:
    """Verdicts of a judge that scores."""
    blind = np.full(len(a), np.nan)
    return pd.DataFrame({"win": (a > b) + 0.5 * (a == b), "consistent": blind, "first": blind})


class ByGold:
    """The gold reward of the source."""

    def __init__(self, judge: gold.Gold):
        self.judge = judge

    def compare(self, asked: pd.DataFrame) -> pd.DataFrame:
        sides = [gold.columns(self.judge, asked["prompt"], asked["facts"], asked[side])["gold"] for side in ("a", "b")]
        return by_score(*(side.to_numpy() for side in sides))


class ByLexicon:
    """VADER (Hutto and Gilbert 2014): how positive a text is, by a lexicon that people rated and rules for what stands around a word.

    It has learned nothing from the reviews that the gold reward was trained on.
    """

    def __init__(self) -> None:
        try:
            from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer
        except ImportError:
            raise JudgeError("the judge `vader` needs the package vaderSentiment: `pip install -e '.[real]'`") from None
        self.analyser = SentimentIntensityAnalyzer()

    def compare(self, asked: pd.DataFrame) -> pd.DataFrame:
        def scores(side: str) -> np.ndarray:
            texts = asked["prompt"] + asked[side]
            return np.array([self.analyser.polarity_scores(text)["compound"] for text in texts])

        return by_score(scores("a"), scores("b"))


class ByRewardModel:
    """Another reward model: a folder, or a Hub id at a revision; sequence classification with one label.

    One of this project's (its config has a `reward_shift`) reads ids joined as in training. Any other reads text: prompt
    and response by its own chat template where it has one, else as its tokenizer joins two texts.
    """

    def __init__(self, settings: RewardModelJudge, done: Callable[[str], list] = lambda what: []):
        from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer

        from rlhf_vs_dpo.language.heads import load_scorer
        from rlhf_vs_dpo.language.models import device, quiet

        self.own, self.name, self.done = None, settings.model, done
        where = {"revision": settings.revision} if settings.revision else {}
        try:
            self.tokenizer = AutoTokenizer.from_pretrained(settings.model, **where)
            if getattr(AutoConfig.from_pretrained(settings.model, **where), "reward_shift", None) is not None:
                self.own = load_scorer(Path(settings.model))
                return
            model = AutoModelForSequenceClassification.from_pretrained(settings.model, **where)
        except (OSError, ValueError) as error:
            raise ModelError(
                f"params.yaml: the judge's model {settings.model!r} cannot be loaded ({error}); it must be a folder or a "
                "Hub id of a sequence-classification model"
            ) from None
        if model.config.num_labels != 1:
            raise ModelError(f"{settings.model}: has {model.config.num_labels} labels; a reward model has one")
        self.model, self.batch = quiet(model).to(device()), settings.batch
        self.tokenizer.padding_side = "right"
        if (
            self.tokenizer.pad_token_id is None
        ):  # PAD must not be EOS: the score is read at the last token that is no PAD
            self.tokenizer.add_special_tokens({"pad_token": "<|pad|>"})
            self.model.resize_token_embeddings(len(self.tokenizer))
        self.model.config.pad_token_id = self.tokenizer.pad_token_id

    def scores(self, prompts: list[str], responses: list[str], what: str) -> np.ndarray:
        """A score for each response, float32. Raises DataError where a prompt and a response do not fit the model."""
        import torch

        if self.own is not None:
            from rlhf_vs_dpo.language import forward
            from rlhf_vs_dpo.language.text import Tokens, encode_prompts

            ids = self.tokenizer(responses, add_special_tokens=False)["input_ids"]
            examples = [
                Tokens(asked, [*said, self.tokenizer.eos_token_id])
                for asked, said in zip(encode_prompts(self.tokenizer, prompts), ids, strict=True)
            ]
            return np.array(forward.scores(self.own, examples, what, self.done(what)))
        pairs = list(zip(prompts, responses, strict=True))
        distinct = sorted(dict.fromkeys(pairs), key=lambda pair: len(pair[0]) + len(pair[1]))
        found: dict[tuple[str, str], float] = {}
        done = self.done(what)
        with bar(len(distinct), what, "text") as progress, torch.inference_mode():
            for number, start in enumerate(range(0, len(distinct), self.batch)):
                some = distinct[start : start + self.batch]
                if number == len(done):
                    done.append(self._scores(some))
                found |= dict(zip(some, done[number], strict=True))
                progress.update(len(some))
        return np.array([found[pair] for pair in pairs])

    def _scores(self, pairs: list[tuple[str, str]]) -> list[float]:
        batch = self._encoded(pairs)
        longest = getattr(self.model.config, "max_position_embeddings", None)
        if longest and batch["input_ids"].shape[1] > longest:
            raise DataError(
                f"{self.name}: prompt and response together are up to {batch['input_ids'].shape[1]} tokens, and it "
                f"reads {longest}; to cut them would be to judge something else. Choose a judge with a longer context"
            )
        return self.model(**batch.to(self.model.device)).logits[:, 0].float().tolist()

    def _encoded(self, pairs: list[tuple[str, str]]):
        """By the model's own chat template where it has one, else as its tokenizer joins two texts."""
        if getattr(self.tokenizer, "chat_template", None):
            turns = [[{"role": "user", "content": p}, {"role": "assistant", "content": r}] for p, r in pairs]
            texts = [self.tokenizer.apply_chat_template(turn, tokenize=False) for turn in turns]
            return self.tokenizer(texts, padding=True, add_special_tokens=False, return_tensors="pt")
        return self.tokenizer(*map(list, zip(*pairs, strict=True)), padding=True, return_tensors="pt")

    def compare(self, asked: pd.DataFrame) -> pd.DataFrame:
        prompts = list(asked["prompt"])
        return by_score(
            self.scores(prompts, list(asked["a"]), "judge: ours"),
            self.scores(prompts, list(asked["b"]), "judge: theirs"),
        )


class ByLanguageModel:
    """A language model behind an OpenAI-compatible endpoint, asked in both orders.

    Its answers are kept in `cache`, one JSON line each, as they come: a run that breaks off, or is repeated, asks only for
    what it does not have. An answer is keyed by everything that was sent, and by where.
    """

    def __init__(self, settings: LanguageModelJudge, cache: Path):
        try:
            import openai
        except ImportError:
            raise JudgeError(
                "a language model as judge needs the package openai: `pip install -e '.[judge]'`"
            ) from None
        key = "none"
        if settings.key_variable is not None:
            key = os.environ.get(settings.key_variable, "")
            if not key:
                raise JudgeError(f"the environment variable {settings.key_variable}, the judge's API key, is not set")
        self.settings, self.cache = settings, cache
        self.client = openai.OpenAI(
            base_url=settings.endpoint, api_key=key, max_retries=settings.retries, timeout=settings.timeout
        )
        self.known: dict[str, str] = {}
        self.lock = threading.Lock()
        if cache.exists():
            self._read(cache.read_text())

    def _read(self, text: str) -> None:
        whole, _, rest = text.rpartition("\n")  # a line without an end was cut off while it was written
        if rest:
            self.cache.write_text(whole + "\n" if whole else "")
        for number, line in enumerate(whole.splitlines(), 1):
            try:
                entry = json.loads(line)
                if not isinstance(entry["answer"], str):
                    raise TypeError
                self.known[entry["key"]] = entry["answer"]
            except (json.JSONDecodeError, KeyError, TypeError):
                raise DataError(f"{self.cache}: line {number} is not an answer; remove the line") from None

    def compare(self, asked: pd.DataFrame) -> pd.DataFrame:
        same = (asked["a"] == asked["b"]).to_numpy()  # nothing to ask
        verdicts = pd.DataFrame({name: np.nan for name in VERDICTS}, index=range(len(asked)))
        verdicts.loc[same, "win"] = 0.5
        verdicts.loc[~same] = self._compare(asked[~same]).to_numpy()
        return verdicts

    def _compare(self, asked: pd.DataFrame) -> pd.DataFrame:
        rows = list(asked.itertuples(index=False))
        questions = [
            self._question({"{prompt}": row.prompt, "{first}": first, "{second}": second})
            for row in rows
            for first, second in ((row.a, row.b), (row.b, row.a))
        ]
        answers = self._answers(questions)
        picked = [read_choice(answer) for answer in answers]  # "first", "second" or None
        verdicts = []
        for one, two in zip(picked[::2], picked[1::2], strict=True):
            given = [choice for choice in (one, two) if choice is not None]
            shown_first = np.mean([choice == "first" for choice in given]) if given else np.nan
            if len(given) < 2:
                verdicts.append((np.nan, np.nan, shown_first))
                continue
            a, b = one == "first", two == "second"  # whether a was chosen, in either order
            verdicts.append(((a + b) / 2, float(a == b), shown_first))
        return pd.DataFrame(verdicts, columns=list(VERDICTS), dtype=float)

    def _question(self, values: dict[str, str]) -> str:
        """The question with all its places filled at once: a text that holds `{first}` is left as it is."""
        return re.sub(r"\{(?:prompt|first|second)\}", lambda place: values[place.group()], self.settings.question)

    def _answers(self, questions: list[str]) -> list[str]:
        keys = [self._key(question) for question in questions]
        wanted = {key: question for key, question in zip(keys, questions, strict=True) if key not in self.known}
        with bar(len(wanted), "judge", "question") as progress, ThreadPoolExecutor(self.settings.workers) as pool:
            futures = {pool.submit(self._ask, question): key for key, question in wanted.items()}
            try:
                for future in as_completed(futures):
                    self._keep(futures[future], future.result())
                    progress.update()
            except BaseException:
                pool.shutdown(cancel_futures=True)
                for future, key in futures.items():
                    if key not in self.known and not future.cancelled() and future.exception() is None:
                        self._keep(key, future.result())
                raise
        return [self.known[key] for key in keys]

    def _key(self, question: str) -> str:
        settings = self.settings
        sent = [settings.endpoint, settings.model, settings.max_tokens, question]
        return hashlib.sha256(json.dumps(sent).encode()).hexdigest()

    def _ask(self, question: str) -> str:
        import openai

        try:
            answer = self.client.chat.completions.create(
                model=self.settings.model,
                messages=[{"role": "user", "content": question}],
                temperature=0.0,
                max_tokens=self.settings.max_tokens,
            )
            said = answer.choices[0].message.content or ""
            if not isinstance(said, str):
                raise TypeError(f"an answer of type {type(said).__name__}")
            return said
        except openai.OpenAIError as error:
            raise JudgeError(
                f"{self.settings.endpoint}: {type(error).__name__}: {error} (after {self.settings.retries} retries); is the "
                "server up, and does it serve this model? What was answered so far is kept: run again to go on"
            ) from None
        except (ValueError, TypeError, AttributeError, IndexError) as error:
            raise JudgeError(
                f"{self.settings.endpoint}: answered, but not as an OpenAI-compatible endpoint does ({error}); does the address end "
                "where its API begins (mostly in /v1)? What was answered so far is kept: run again to go on"
            ) from None

    def _keep(self, key: str, answer: str) -> None:
        with self.lock:
            self.known[key] = answer
            self.cache.parent.mkdir(parents=True, exist_ok=True)
            with self.cache.open("a") as file:
                file.write(json.dumps({"key": key, "answer": answer}) + "\n")


BEFORE = r"(?i:summary|option|response|answer|choice|choose|prefer|pick|is|with|for)\W+"
AFTER = r"is\b|and\b|or\b|because\b|has\b|wins\b"


def read_choice(answer: str) -> str | None:
    """Which response an answer names: the letter A or B that stands alone in it; None where there is none, or both.

    A letter before a word in small letters may be an article ("A good summary ...") and names nothing by itself, unless what
    stands before it, or the verb behind it, says that it is a name. Both letters are read alike, for B would win otherwise.
    """
    letters = {found.group() for found in re.finditer(r"(?<![A-Za-z])[AB](?![A-Za-z'])", answer)}
    if len(letters) != 1:
        return None
    letter = letters.pop()
    named = rf"(?<![A-Za-z])(?:{BEFORE})?{letter}(?![A-Za-z'])(?! +(?!{AFTER})[a-z])|(?<![A-Za-z]){BEFORE}{letter}(?![A-Za-z'])"
    return {"A": "first", "B": "second"}[letter] if re.search(named, answer) else None
