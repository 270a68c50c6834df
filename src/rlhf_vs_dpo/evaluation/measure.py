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
    "win_rate_vs_sft_by_rm",
    "win_rate_vs_demonstration",
    "kl",
    "tokens",
    "sampled_tokens",
    "finished",
    "filler",
    "corpus_perplexity",
    "fact_recall",
    "pair_accuracy",
)
NOTHING = {"mean": None, "low": None, "high": None}

Interval = dict[str, float | None]


@dataclass
class Bootstrap:
    """The resamples that all policies share, one set for each kind of unit."""

    prompts: list[str]
    weights: np.ndarray
    documents: np.ndarray
    facts: np.ndarray
    seed: int

    @classmethod
    def of(cls, samples: pd.DataFrame, retention: pd.DataFrame, resamples: int, seed: int) -> "Bootstrap":
        prompts = sorted(samples["prompt_id"].unique())
        count = retention["kind"].value_counts()
        return cls(
            prompts,
            resample_weights(len(prompts), resamples, seed),
            resample_weights(max(int(count.get("corpus", 0)), 1), resamples, seed),
            resample_weights(max(int(count.get("fact", 0)), 1), resamples, seed),
            seed,
        )


def judged_by(samples: pd.DataFrame) -> str:
    """The column that decides wins: gold where the source has it, else the RM reward."""
    return "gold" if samples["gold"].notna().any() else "reward"


def policy(
    samples: pd.DataFrame,
    retention: pd.DataFrame | None,
    sft: pd.DataFrame,
    demonstrations: pd.DataFrame,
    bootstrap: Bootstrap,
    pair_rewards: pd.DataFrame | None = None,
) -> dict[str, Interval]:
    """All metrics of one policy, each with its 95 % interval; null where the source, or the policy, cannot tell.

    samples, sft     `samples` tables of the policy and of the SFT policy, on the same prompts; a column `weight` of
                     the policy's, if there is one, says how much each sample counts (best-of-n without training), and
                     `sampled_tokens` how many tokens were sampled for it; else its own
    retention        `retention` table of the policy; None where there is no model that could have forgotten anything
    demonstrations   one row per prompt_id with `gold` and `reward`
    pair_rewards     rewards that the policy, as a reward model, gives to pairs; None where it is none
    """
    weight = samples.get("weight", pd.Series(1.0, index=samples.index))

    def mean_of(values: pd.Series) -> Interval:
        known = values.notna()
        sums = pd.DataFrame({"sum": (values * weight).where(known, 0.0), "count": weight.where(known, 0.0)})
        frame = sums.groupby(samples["prompt_id"]).sum().reindex(bootstrap.prompts, fill_value=0.0)
        return interval(frame["sum"].to_numpy(), frame["count"].to_numpy(), bootstrap.weights)

    def win_rate(theirs: pd.DataFrame, judge: str) -> Interval:
        other = {prompt: values.to_numpy(float) for prompt, values in theirs.groupby("prompt_id")[judge]}
        ours = {
            prompt: (group[judge].to_numpy(float), weight[group.index].to_numpy())
            for prompt, group in samples.groupby("prompt_id")
        }
        counted = [p in other and p in ours for p in bootstrap.prompts]
        pairs = np.array(
            [
                win_share(*ours[p], other[p]) if both else (0.0, 0.0)
                for p, both in zip(bootstrap.prompts, counted, strict=True)
            ]
        )
        return interval(pairs[:, 0], pairs[:, 1], bootstrap.weights)

    judge = judged_by(samples)
    result = {
        "gold": mean_of(samples["gold"]),
        "reward": mean_of(samples["reward"]),
        "win_rate_vs_sft": win_rate(sft, judge),
        "win_rate_vs_sft_by_rm": win_rate(sft, "reward"),
        "win_rate_vs_demonstration": win_rate(demonstrations, judge),
        "kl": mean_of(samples["logp"] - samples["reference_logp"]),
        "tokens": mean_of(samples["tokens"].astype(float)),
        "sampled_tokens": mean_of(samples.get("sampled_tokens", samples["tokens"]).astype(float)),
        "finished": mean_of(samples["finished"].astype(float)),
        "filler": mean_of(samples["filler"]),
        "corpus_perplexity": NOTHING,
        "fact_recall": NOTHING,
        "pair_accuracy": NOTHING,
    } | {f"gold_{part}": mean_of(samples[f"gold_{part}"]) for part in PARTS}
    if retention is not None:
        corpus, facts = (retention[retention["kind"] == kind] for kind in ("corpus", "fact"))
        result["corpus_perplexity"] = interval(
            -corpus["logp"].to_numpy(), corpus["tokens"].to_numpy(), bootstrap.documents, np.exp
        )
        if len(facts):
            result["fact_recall"] = interval(facts["correct"].to_numpy(float), np.ones(len(facts)), bootstrap.facts)
    if pair_rewards is not None:
        result["pair_accuracy"] = pair_accuracy(pair_rewards, bootstrap)
    return result


def pair_accuracy(pairs: pd.DataFrame, bootstrap: Bootstrap) -> Interval:
    """How often the chosen response has the higher reward; a tie is half right. Resampled over prompts."""
    right = (pairs["chosen"] > pairs["rejected"]) + 0.5 * (pairs["chosen"] == pairs["rejected"])
    sums = pd.DataFrame({"right": right, "count": 1.0}).groupby(pairs["prompt_id"]).sum()
    weights = resample_weights(len(sums), len(bootstrap.weights), bootstrap.seed)
    return interval(sums["right"].to_numpy(), sums["count"].to_numpy(), weights)


def flat(row: dict) -> dict[str, float | None]:
    """A row of intervals as columns: `gold`, `gold_low`, `gold_high`; other entries as they are."""
    columns = {}
    for name, entry in row.items():
        if isinstance(entry, dict):
            columns |= {name: entry["mean"], f"{name}_low": entry["low"], f"{name}_high": entry["high"]}
        else:
            columns[name] = entry
    return columns
