"""From samples to numbers: the same for every policy, blind to the method that made it.

A row of the comparison is a method, with a policy in each line, measured against the SFT policy and the reward model of that line. Everything is first summed per prompt (or
document, or fact) for each policy, then averaged and resampled by `statistics`.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from rlhf_vs_dpo.config import Collapse
from rlhf_vs_dpo.evaluation import length
from rlhf_vs_dpo.evaluation.diversity import distinct, self_similarity
from rlhf_vs_dpo.evaluation.statistics import NOTHING, Estimate, Resamples, same, win_share
from rlhf_vs_dpo.preferences import annotator
from rlhf_vs_dpo.preferences.gold import PARTS

# What is measured, in the order of the tables; null where the source, or the policy, cannot tell.
METRICS = (
    "preferred",  # how often the annotators who made the pairs would choose it over the SFT policy's
    "gold",  # gold reward: what they should have chosen by
    "utility",  # the annotator's: what they did choose by
    "objective",  # E[utility] / T - price KL: what RLHF and DPO both maximise
    "reward",  # RM reward of responses that ended
    "win_rate_vs_sft",  # by the gold reward where the source has one, else by the reward model
    "length_controlled_win_rate",  # the same at equal length (length.py)
    "win_rate_vs_sft_by_rm",
    "win_rate_vs_demonstration",
    "kl",  # KL(policy, SFT), nats per response
    "tokens",  # per response
    "sampled_tokens",  # per response, those thrown away by best-of-n among them
    "finished",  # share of responses that ended
    "filler",  # share with a filler phrase
    "entropy",  # nats per response
    "distinct_1",  # of the responses to a prompt (diversity.py)
    "distinct_2",
    "self_similarity",
    "corpus_perplexity",  # of held-out pretraining text
    "fact_recall",  # of pretraining, greedy
    "pair_accuracy",  # of the implicit reward on held-out pairs
    *(f"gold_{part}" for part in PARTS),
)

Interval = dict[str, float | None]


class Sums(NamedTuple):
    """Sums of a metric and of what it is a mean of, per unit of a kind: two arrays (units,). A `share` lies in [0, 1].

    `names` are those of the units, where they differ between lines; None where all lines have the same.
    """

    kind: str
    numerator: np.ndarray
    denominator: np.ndarray
    transform: Callable = same
    share: bool = False
    names: list[str] | None = None


class Asked(NamedTuple):
    """What the labels asked for: the annotator's `temperature` (None where nobody simulated made the pairs), and the `price` of a
    nat of KL in the objective."""

    temperature: float | None
    price: float

    def objective(self, utility: pd.Series, kl: pd.Series) -> pd.Series:
        """u / T - price log(pi / ref) of each response; its mean is what RLHF and DPO both maximise. Null without an annotator."""
        return utility / (self.temperature or 1.0) - self.price * kl

    def preferred(self, ours: np.ndarray, theirs: np.ndarray) -> np.ndarray:
        """P that an annotator chooses each of our responses over each of theirs, from utilities: (A,), (B,) -> (A, B)."""
        return annotator.probability(ours[:, None], theirs[None, :], self.temperature or 1.0)


class Line(NamedTuple):
    """What the policies of a line are measured against: `sft`, samples of its SFT policy; `demonstrations`, one row per
    prompt_id with `gold` and `reward`; and what its labels asked for."""

    sft: pd.DataFrame
    demonstrations: pd.DataFrame
    asked: Asked


class Measured(NamedTuple):
    """One policy: sums per unit, and the fit of its length-controlled win rate (None where it has none)."""

    sums: dict[str, Sums]
    equal_length: length.Fit | None


def judged_by(samples: pd.DataFrame) -> str:
    """The column that decides wins: gold where the source has it, else the RM reward."""
    return "gold" if samples["gold"].notna().any() else "reward"


def collapsed(finished: float, reward: float, start: float, settings: Collapse) -> bool:
    """Whether a run has collapsed: too few of its responses end, or its mean reward gained too little on the SFT policy's."""
    return bool(finished < settings.finished_below or reward - start < settings.gain_below)


def policy(
    samples: pd.DataFrame,
    line: Line,
    retention: pd.DataFrame | None = None,
    pair_rewards: pd.DataFrame | None = None,
    judged: pd.Series | None = None,
    control_length: bool = True,
) -> Measured:
    """Everything that is measured of one policy.

    samples          `samples` table of the policy, on the prompts of the line's SFT policy; a column `weight`, if there is one,
                     says how much each sample counts (best-of-n without training), and `sampled_tokens` how many tokens were
                     sampled for it; else its own
    retention        `retention` table of the policy; None where there is no model that could have forgotten anything
    pair_rewards     rewards that the policy, as a reward model, gives to pairs; None where it is none
    judged           prompt_id -> win (0, 1/2, 1) by the judge that takes the place of an annotator; None where there is neither
    control_length   False leaves the regression on length out
    """
    sft, demonstrations, asked = line
    prompts = sorted(sft["prompt_id"].unique())
    weighted = "weight" in samples  # a law, not a set of answers: nothing to count n-grams in
    judge = judged_by(samples)
    ours = by_prompt(samples if weighted else samples.assign(weight=1.0))
    unit = pd.Index(prompts).get_indexer(samples["prompt_id"])
    weight = samples["weight"].to_numpy(float) if weighted else np.ones(len(samples))

    def mean_of(values: pd.Series, share: bool = False) -> Sums:
        array = values.to_numpy(float)
        counted = np.isfinite(array) & (unit >= 0)
        at, w = unit[counted], weight[counted]
        top, bottom = (np.bincount(at, x, len(prompts)) for x in (array[counted] * w, w))
        return Sums("prompt", top, bottom, share=share)

    def per_prompt(value: Callable[[list[str]], float]) -> Sums:
        values = np.array([value(list(ours[p]["response"])) if p in ours else np.nan for p in prompts])
        return Sums("prompt", np.nan_to_num(values), np.isfinite(values).astype(float), share=True)

    def wins(theirs: pd.DataFrame, by: str) -> Sums:
        other, none = by_prompt(theirs[["prompt_id", by]]), (0.0, 0.0)
        shares = np.array(
            [
                win_share(ours[p][by], ours[p]["weight"], other[p][by]) if p in other and p in ours else none
                for p in prompts
            ]
        )
        return Sums("prompt", shares[:, 0], shares[:, 1], share=True)

    def preferred() -> Sums:
        if asked.temperature is None:
            values = np.full(len(prompts), np.nan) if judged is None else judged.reindex(prompts).to_numpy(float)
            return Sums("prompt", np.nan_to_num(values), np.isfinite(values).astype(float), share=True)
        other = by_prompt(sft[["prompt_id", "utility"]])
        top, bottom = np.zeros(len(prompts)), np.zeros(len(prompts))
        for number, p in enumerate(prompts):
            if p in ours:
                chosen = asked.preferred(ours[p]["utility"], other[p]["utility"])
                top[number], bottom[number] = ours[p]["weight"] @ chosen.mean(1), ours[p]["weight"].sum()
        return Sums("prompt", top, bottom, share=True)

    kl = samples["logp"] - samples["reference_logp"]
    sums = {
        "preferred": preferred(),
        "gold": mean_of(samples["gold"]),
        "utility": mean_of(samples["utility"]),
        "objective": mean_of(asked.objective(samples["utility"], kl)),
        "reward": mean_of(samples["reward"]),
        "win_rate_vs_sft": wins(sft, judge),
        "win_rate_vs_sft_by_rm": wins(sft, "reward"),
        "win_rate_vs_demonstration": wins(demonstrations, judge),
        "kl": mean_of(kl),
        "tokens": mean_of(samples["tokens"].astype(float)),
        "sampled_tokens": mean_of(samples.get("sampled_tokens", samples["tokens"]).astype(float)),
        "finished": mean_of(samples["finished"].astype(float), share=True),
        "filler": mean_of(samples["filler"], share=True),
        "entropy": mean_of(-samples["logp"]),
    } | {f"gold_{part}": mean_of(samples[f"gold_{part}"]) for part in PARTS}
    if not weighted:
        sums["distinct_1"] = per_prompt(lambda responses: distinct(responses, 1))
        sums["distinct_2"] = per_prompt(lambda responses: distinct(responses, 2))
        sums["self_similarity"] = per_prompt(self_similarity)
    if retention is not None:
        corpus, facts = (retention[retention["kind"] == kind] for kind in ("corpus", "fact"))
        sums["corpus_perplexity"] = Sums(
            "document", -corpus["logp"].to_numpy(), corpus["tokens"].to_numpy(float), np.exp
        )
        if len(facts):
            sums["fact_recall"] = Sums("fact", facts["correct"].to_numpy(float), np.ones(len(facts)), share=True)
    if pair_rewards is not None:
        sums["pair_accuracy"] = pair_accuracy(pair_rewards)
    equal_length = None
    if control_length:
        parts = []
        theirs = by_prompt(sft[["prompt_id", judge, "tokens"]])
        for number, p in enumerate(prompts):
            if p in ours:
                mine = tuple(ours[p][column] for column in (judge, "tokens", "weight"))
                compared = length.compare(mine, (theirs[p][judge], theirs[p]["tokens"]))
                parts.append((*compared, np.full(len(compared[0]), number)))
        equal_length = length.fit(*map(np.concatenate, zip(*parts, strict=True)), len(prompts))
    return Measured(sums, equal_length)


def by_prompt(table: pd.DataFrame) -> dict[str, dict[str, np.ndarray]]:
    """prompt_id -> column -> its values there, in the order of the table; numbers as float64."""
    codes, names = pd.factorize(table["prompt_id"])
    order = np.argsort(codes, kind="stable")
    ends = np.cumsum(np.bincount(codes, minlength=len(names)))[:-1]
    columns = {}
    for column in table.columns.drop("prompt_id"):
        values = table[column].to_numpy()
        numbers = values.astype(float) if values.dtype.kind in "bif" else values
        columns[column] = np.split(numbers[order], ends)
    return {name: {column: parts[i] for column, parts in columns.items()} for i, name in enumerate(names)}


def watched(table: pd.DataFrame, rivals: pd.DataFrame, asked: Asked) -> pd.DataFrame:
    """A `watched` table with `kl`, `objective`, and `preferred` against `rivals`: other samples of the line's SFT policy on these
    prompts (null where there are none)."""
    kl = table["logp"] - table["reference_logp"]
    preferred = pd.Series(np.nan, index=table.index)
    if asked.temperature is not None:
        other = by_prompt(rivals[["prompt_id", "utility"]])
        rows = by_prompt(table[["prompt_id", "utility"]].assign(row=np.arange(len(table))))
        values = np.full(len(table), np.nan)
        for prompt, mine in rows.items():
            if prompt in other:
                values[mine["row"].astype(int)] = asked.preferred(mine["utility"], other[prompt]["utility"]).mean(1)
        preferred = pd.Series(values, index=table.index)
    return table.assign(kl=kl, preferred=preferred, objective=asked.objective(table["utility"], kl))


def pair_accuracy(pairs: pd.DataFrame) -> Sums:
    """How often the chosen response has the higher reward, per prompt; a tie is half right."""
    right = (pairs["chosen"] > pairs["rejected"]) + 0.5 * (pairs["chosen"] == pairs["rejected"])
    sums = pd.DataFrame({"right": right, "count": 1.0}).groupby(pairs["prompt_id"]).sum()
    return Sums(
        "prompt with a pair", sums["right"].to_numpy(), sums["count"].to_numpy(), share=True, names=list(sums.index)
    )


def row(policies: list[Measured], resamples: Resamples) -> dict[str, Estimate | None]:
    """The metrics of a method, over its policies, one for each line; None where nothing was measured."""
    estimates: dict[str, Estimate | None] = dict.fromkeys(METRICS)
    for name, first in policies[0].sums.items():
        top, bottom = _aligned([p.sums[name] for p in policies])
        estimates[name] = resamples.ratio(first.kind, top, bottom, first.transform, first.share)
    fits = [p.equal_length for p in policies]
    if all(found is not None for found in fits):
        units = len(fits[0].influence)
        weights = resamples.units("prompt", units)
        each = np.array([found.win_rate for found in fits])
        drawn = np.stack([found.resampled(weights) for found in fits], axis=1)
        estimates["length_controlled_win_rate"] = resamples.combine(each, drawn, units, limits=(0.0, 1.0))
    return estimates


def _aligned(sums: list[Sums]) -> tuple[np.ndarray, np.ndarray]:
    """Numerators and denominators of all lines, (lines, units): a unit that a line lacks counts nothing there."""
    if sums[0].names is None:
        return np.stack([s.numerator for s in sums]), np.stack([s.denominator for s in sums])
    names = sorted(set().union(*(s.names for s in sums)))
    return tuple(
        np.stack([pd.Series(values, s.names).reindex(names, fill_value=0.0) for s, values in pairs])
        for pairs in ([(s, s.numerator) for s in sums], [(s, s.denominator) for s in sums])
    )


def intervals(estimates: dict[str, Estimate | None]) -> dict[str, Interval]:
    """Rows of estimates as what is written: mean, low and high of every metric, null where there is none."""
    return {name: dict(NOTHING) if found is None else found.interval() for name, found in estimates.items()}


def flat(entry: dict[str, Any]) -> dict[str, Any]:
    """A row of intervals as columns: `gold`, `gold_low`, `gold_high`; other entries as they are."""
    columns = {}
    for name, value in entry.items():
        if isinstance(value, dict):
            columns |= {name: value["mean"], f"{name}_low": value["low"], f"{name}_high": value["high"]}
        else:
            columns[name] = value
    return columns
