"""From samples to `metrics/evaluation.json`: the same numbers for every policy, blind to the method that made it."""

from dataclasses import dataclass

import numpy as np
import pandas as pd

from rlhf_vs_dpo.evaluation.statistics import interval, resample_weights, win_share
from rlhf_vs_dpo.gold import PARTS

METRICS = (
    "gold",
    "reward",
    "win_rate_vs_sft",
    "win_rate_vs_demonstration",
    "kl",
    "tokens",
    "finished",
    "filler",
    "corpus_perplexity",
    "fact_recall",
)

Interval = dict[str, float | None]


@dataclass
class Bootstrap:
    """The resamples that all policies share, one set for each kind of unit."""

    prompts: list[str]
    weights: np.ndarray
    documents: np.ndarray
    facts: np.ndarray

    @classmethod
    def of(cls, samples: pd.DataFrame, retention: pd.DataFrame, resamples: int, seed: int) -> "Bootstrap":
        prompts = sorted(samples["prompt_id"].unique())
        count = retention["kind"].value_counts()
        return cls(
            prompts,
            resample_weights(len(prompts), resamples, seed),
            resample_weights(max(int(count.get("corpus", 0)), 1), resamples, seed),
            resample_weights(max(int(count.get("fact", 0)), 1), resamples, seed),
        )


def judged_by(samples: pd.DataFrame) -> str:
    """The column that decides wins: gold where the source has it, else the RM reward."""
    return "gold" if samples["gold"].notna().any() else "reward"


def policy(
    samples: pd.DataFrame,
    retention: pd.DataFrame,
    sft: pd.DataFrame,
    demonstrations: pd.DataFrame,
    bootstrap: Bootstrap,
) -> dict[str, Interval]:
    """All metrics of one policy, each with its 95 % interval; null where the source cannot tell.

    samples, sft     `samples` tables of the policy and of the SFT policy, on the same prompts
    retention        `retention` table of the policy
    demonstrations   one row per prompt_id with `gold` and `reward`
    """
    grouped = samples.set_index("prompt_id")
    per_prompt = grouped.groupby(level=0)

    def mean_of(values: pd.Series) -> Interval:
        frame = pd.DataFrame({"sum": values.fillna(0.0), "count": values.notna().astype(float)}).groupby(level=0).sum()
        frame = frame.reindex(bootstrap.prompts, fill_value=0.0)
        return interval(frame["sum"].to_numpy(), frame["count"].to_numpy(), bootstrap.weights)

    judge = judged_by(samples)
    ours = {prompt: values.to_numpy() for prompt, values in per_prompt[judge]}

    def win_rate(theirs: dict[str, np.ndarray]) -> Interval:
        pairs = np.array([win_share(ours[p], theirs[p]) if p in theirs else (0.0, 0) for p in bootstrap.prompts])
        return interval(pairs[:, 0], pairs[:, 1], bootstrap.weights)

    corpus, facts = retention[retention["kind"] == "corpus"], retention[retention["kind"] == "fact"]
    return {
        "gold": mean_of(grouped["gold"]),
        "reward": mean_of(grouped["reward"]),
        "win_rate_vs_sft": win_rate({prompt: v.to_numpy() for prompt, v in sft.groupby("prompt_id")[judge]}),
        "win_rate_vs_demonstration": win_rate({p: v.to_numpy() for p, v in demonstrations.groupby("prompt_id")[judge]}),
        "kl": mean_of(grouped["logp"] - grouped["reference_logp"]),
        "tokens": mean_of(grouped["tokens"].astype(float)),
        "finished": mean_of(grouped["finished"].astype(float)),
        "filler": mean_of(grouped["filler"]),
        "corpus_perplexity": interval(
            -corpus["logp"].to_numpy(), corpus["tokens"].to_numpy(), bootstrap.documents, np.exp
        ),
        "fact_recall": interval(facts["correct"].to_numpy(float), np.ones(len(facts)), bootstrap.facts)
        if len(facts)
        else {"mean": None, "low": None, "high": None},
    } | {f"gold_{part}": mean_of(grouped[f"gold_{part}"]) for part in PARTS}
