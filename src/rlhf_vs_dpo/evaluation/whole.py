"""The whole comparison: from the tables of all policies to everything that the report says, in one dictionary."""

from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import pandas as pd

from rlhf_vs_dpo.config import FAMILIES, Evaluate, Preferences, families, folders
from rlhf_vs_dpo.evaluation import comparisons, cost, failures, measure, overoptimisation, paths, questions
from rlhf_vs_dpo.evaluation.best_of_n import as_samples
from rlhf_vs_dpo.evaluation.bounds import of_best_of_n, of_imitation
from rlhf_vs_dpo.evaluation.statistics import Estimate, Resamples, win_share
from rlhf_vs_dpo.run.progress import bar

LENGTH_BINS = 5  # of responses, by the SFT policy's quantiles
# What the labels asked for, and what they should have asked for. Without either, the RM reward takes their place.
AXES = ("preferred", "gold")


@dataclass(frozen=True)
class Inputs:
    """What the stages before have left behind; tables are those of `tables`, keys are folders under models/.

    seeds           the lines; what follows has an entry for each of them, by its seed, where a line has its own
    settings        method -> its section of params.yaml; none for the SFT policy
    preferences     who made the pairs, and how
    judged          folder -> wins of its policy, by prompt_id, by the judge that takes the place of an annotator (the SFT
                    policy's are 1/2); empty where there is an annotator, or no such judge
    demonstrations  scored held-out demonstrations, with `gold`, by seed: every line has a reward model of its own
    pool            scored samples of the SFT policy, by seed
    runs            content of runs/<stage or folder>.json: what each stage cost
    pairs           metrics of the preferences stage, by seed
    pool_metrics    metrics of the pool stage, by seed
    """

    policies: Any
    seeds: list[int]
    settings: dict[str, Any]
    preferences: Preferences
    reward_settings: Any
    samples: dict[str, pd.DataFrame]
    retention: dict[str, pd.DataFrame]
    watched: dict[str, pd.DataFrame]
    pair_rewards: dict[str, pd.DataFrame]
    judged: dict[str, pd.Series]
    demonstrations: dict[int, pd.DataFrame]
    pool: dict[int, pd.DataFrame]
    runs: dict[str, dict[str, Any]]
    pairs: dict[int, dict[str, Any]]
    pool_metrics: dict[int, dict[str, Any]]

    @property
    def members(self) -> dict[str, list[str]]:
        """Method -> its folders, one for each line."""
        return folders(self.policies, self.seeds)

    @property
    def sft(self) -> list[pd.DataFrame]:
        """Samples of the SFT policy of each line."""
        return [self.samples[folder] for folder in self.members["sft"]]

    def asked(self, settings: Evaluate) -> measure.Asked:
        """What the labels asked for, as far as it is known."""
        simulated = self.preferences.source == "annotator" and self.sft[0]["utility"].notna().any()
        return measure.Asked(self.preferences.annotator.temperature if simulated else None, settings.price)

    def lines(self, settings: Evaluate) -> list[measure.Line]:
        """What the policies of each line are measured against."""
        asked = self.asked(settings)
        return [measure.Line(sft, self.demonstrations[s], asked) for sft, s in zip(self.sft, self.seeds, strict=True)]

    def drawn(self, split: str) -> list[pd.DataFrame]:
        """The part of each line's pool that is of a split, on the prompts that policies are sampled on there (test) or watched on (validation)."""
        parts = [self.pool[seed] for seed in self.seeds]
        parts = [pool[pool["split"] == split] for pool in parts]
        others = self.sft if split == "test" else [*self.watched.values()][:1] * len(parts)
        return (
            [p[p["prompt_id"].isin(other["prompt_id"])] for p, other in zip(parts, others, strict=True)]
            if others
            else parts
        )


@dataclass(frozen=True)
class Row:
    """A row of the comparison: a method (or one way to prompt or sample it), and what was measured of it in each line."""

    name: str
    method: str
    tables: list[pd.DataFrame]
    measured: list[measure.Measured]
    folders: list[str]
    trained: bool = True


def compare(inputs: Inputs, settings: Evaluate, seed: int) -> dict[str, Any]:
    """Measure, compare, fit and add up; see the keys below. Numbers are means with 95 % intervals unless they say else."""
    resamples = Resamples(settings.resamples, seed)
    judge, asked = measure.judged_by(inputs.sft[0]), inputs.asked(settings)
    rows = _rows(inputs, inputs.lines(settings))
    estimates = {row.name: measure.row(row.measured, resamples) for row in rows}
    methods = {name: measure.intervals(row) for name, row in estimates.items()}
    axes = [axis for axis in AXES if methods["sft"][axis]["mean"] is not None] or ["reward"]
    members, of_family = inputs.members, families(inputs.policies)
    rivals = [pool[["prompt_id", "utility"]] for pool in inputs.drawn("validation")]
    watched = {
        folder: measure.watched(inputs.watched[folder], other, asked)
        for method, of in members.items()
        if method != "sft"
        for folder, other in zip(of, rivals, strict=True)
    }
    walked = {
        method: paths.of_training(method, [watched[folder] for folder in of], resamples)
        for method, of in members.items()
        if method != "sft"
    }
    costs = _costs(inputs, rows, methods)
    best, deep_path, wide, curve = _best_of_n(inputs, inputs.lines(settings), resamples)
    frontiers = _frontiers(settings, estimates)
    # Where a judge stands in for an annotator, it was not asked along training.
    watched_axes = [axis for axis in axes if any(np.isfinite(path.values(axis)).any() for path in walked.values())] or [
        judge
    ]
    criterion = watched_axes[0]
    return {
        "axes": axes,
        "judge": judge,
        "asked": {
            "temperature": asked.temperature,
            "price": asked.price,
            "judge": settings.preferred_by if inputs.judged else None,
            "tastes": asked.temperature is not None and inputs.preferences.annotator.tastes,
        },
        "seeds": inputs.seeds,
        "answers": len(inputs.seeds) >= questions.LINES,
        "prompts": int(inputs.sft[0]["prompt_id"].nunique()),
        "prompts_of": {row.name: int(row.tables[0]["prompt_id"].nunique()) for row in rows},
        "method_of": {row.name: row.method for row in rows},
        "families": {row.name: of_family[row.method] if row.trained else "best_of_n" for row in rows},
        "methods": methods,
        "runs": {row.name: _runs(row) for row in rows},
        "spread": {row.name: _spread(row, rows[0], judge, axes, settings) for row in rows},
        "questions": {
            axis: questions.answered(
                settings.questions, {name: row[axis] for name, row in estimates.items()}, resamples
            )
            for axis in axes
        },
        "differences": _differences(rows, estimates, axes, judge, resamples),
        "paths": {method: _points(path) for method, path in walked.items()},
        "best_of_n_path": _points(best),
        "overoptimisation": _laws(walked, best),
        "failures": _failures(walked, deep_path, resamples, seed),
        "frontiers": {method: _points(path) for method, path in frontiers.items()},
        "equal_kl": {
            axis: {
                method: {f"{kl:g}": _at_kl(frontiers.get(method), path, axis, kl) for kl in settings.equal_kl}
                for method, path in ({**walked, "best of n": best}).items()
            }
            for axis in watched_axes
        },
        "equal_compute": _equal_compute(walked, costs, watched_axes, settings),
        "own_best": {
            axis: _own_best(walked, axis, resamples, seed)
            | _own_n(inputs, inputs.lines(settings), best, resamples, axis)
            for axis in watched_axes
        },
        "cost": costs,
        "biases": _biases(methods, list(inputs.pairs.values())),
        "length": _by_length(rows, judge)
        | {
            "over_sft": {
                name: resamples.difference(row["tokens"], estimates["sft"]["tokens"]).interval()
                for name, row in estimates.items()
            }
        },
        "bounds": _bounds(inputs, methods, curve),
        "best_of_n": curve,
        "best_of_n_wide": wide,
        "deep_prompts": _deep(inputs)[0]["prompt_id"].nunique(),
        "criterion": criterion,
        "validation": {
            folder: float(table.loc[table["step"] == table["step"].max(), criterion].mean())
            for folder, table in watched.items()
        },
    }


def _interval(estimate: Estimate | None) -> dict[str, float | None] | None:
    return None if estimate is None else estimate.interval()


def _at_kl(frontier: paths.Path | None, path: paths.Path, metric: str, kl: float) -> dict[str, Any] | None:
    """Read from several settings of the method where there are any, else along one run of training (a path)."""
    for kind, of in (("settings", frontier), ("path", path)):
        if of is not None and metric in of.points and (read := comparisons.at_kl(of, metric, kl)) is not None:
            return read.interval() | {"between": comparisons.seen_around(of, kl), "read": kind}
    return None


def _frontiers(settings: Evaluate, estimates: dict) -> dict[str, paths.Path]:
    """method -> its settings in the order of their KL, of those methods of which several were run."""
    found = {}
    for method, names in settings.settings_of.items():
        known = [
            estimates[name]
            for name in names
            if name in estimates and estimates[name]["kl"].interval()["mean"] is not None
        ]
        if len(known) > 1:
            found[method] = paths.of_settings(method, [estimates["sft"], *known])
    return found


def _failures(walked: dict[str, paths.Path], deep: paths.Path, resamples: Resamples, seed: int) -> dict[str, Any]:
    """Bias amplified and reward model exploited: of each method over training, and of best-of-n up to some n."""
    found = {method: failures.of_path(path, resamples, seed) for method, path in walked.items()}
    for points, n in enumerate(deep.share, 1):
        if points > 2:
            found[f"best of {n:g}"] = failures.of_path(deep, resamples, seed, points)
    return {name: entry for name, entry in found.items() if entry is not None}


def _rows(inputs: Inputs, lines: list[measure.Line]) -> list[Row]:
    """Every method, and the ways to use one: another control token, best-of-n without training."""
    rows = []
    with bar(sum(map(len, inputs.members.values())), "measure", "policy") as progress:
        for method, of in inputs.members.items():
            # The first suffix is how the policy is meant to be prompted; others are rows of their own.
            for number, suffix in enumerate(dict.fromkeys(inputs.samples[of[0]]["suffix"])):
                tables = [inputs.samples[f][inputs.samples[f]["suffix"] == suffix].reset_index(drop=True) for f in of]
                measured = [
                    measure.policy(
                        table,
                        line,
                        inputs.retention[f],
                        inputs.pair_rewards.get(f),
                        None if number else inputs.judged.get(f),
                    )
                    for f, table, line in zip(of, tables, lines, strict=True)
                ]
                rows.append(Row(method if number == 0 else f"{method} {suffix}", method, tables, measured, of))
            progress.update(len(of))
    for n in inputs.policies.best_of_n:
        name, tables = f"best_of_{n}", [as_samples(drawn, n) for drawn in inputs.drawn("test")]
        measured = [measure.policy(table, line) for table, line in zip(tables, lines, strict=True)]
        rows.append(Row(name, name, tables, measured, [f"{name}-{seed}" for seed in inputs.seeds], trained=False))
    return rows


def _runs(row: Row) -> dict[str, dict[str, float]]:
    """Means of each policy of a row, by folder."""
    found: dict[str, dict[str, float]] = {}
    for folder, measured in zip(row.folders, row.measured, strict=True):
        values = {}
        for name, sums in measured.sums.items():
            if sums.denominator.sum() > 0:
                values[name] = float(sums.transform(sums.numerator.sum() / sums.denominator.sum()))
        if measured.equal_length is not None:
            values["length_controlled_win_rate"] = measured.equal_length.win_rate
        found[folder] = values
    return found


def _spread(row: Row, sft: Row, judge: str, axes: list[str], settings: Evaluate) -> dict[str, Any]:
    """How the lines of a method differ on each axis, and in which of them it collapsed, measured against the SFT policy of the line."""
    runs, starts = list(_runs(row).values()), list(_runs(sft).values())
    collapsed = [
        measure.collapsed(run["finished"], run.get(judge, -np.inf), start.get(judge, np.inf), settings.collapse)
        for run, start in zip(runs, starts, strict=True)
    ]
    spread = {}
    for axis in axes:
        values = [run[axis] for run in runs if axis in run]
        spread[axis] = {
            "standard_deviation": float(np.std(values, ddof=1)) if len(values) > 1 else None,
            "lowest": min(values, default=None),
            "highest": max(values, default=None),
        }
    return spread | {
        "lines": len(runs),
        "collapsed": float(np.mean(collapsed)) if row.name != "sft" else 0.0,
    }


def _differences(
    rows: list[Row], estimates: dict, axes: list[str], judge: str, resamples: Resamples
) -> list[dict[str, Any]]:
    """Every two rows: a - b on each axis, within each line, and how often a response of a's wins by the judge, line by line.

    Exploratory: of so many pairs some differ by chance, and nothing here is a p-value.
    """
    answers = [[_answers(table, judge) for table in row.tables] for row in rows]
    found = []
    with bar(len(rows) * (len(rows) - 1) // 2, "pairs of policies", "pair") as progress:
        for i, a in enumerate(rows):
            for j in range(i + 1, len(rows)):
                b = rows[j]
                shares = [
                    np.divide(*win_share(ours, weight, *theirs[prompt]))
                    for mine, theirs in zip(answers[i], answers[j], strict=True)
                    for prompt, (ours, weight) in mine.items()
                    if prompt in theirs
                ]
                gaps = {}
                for axis in axes:
                    one, other = estimates[a.name][axis], estimates[b.name][axis]
                    none = one is None or other is None
                    gaps[axis] = dict(measure.NOTHING) if none else resamples.difference(one, other).interval()
                wins = float(np.mean(shares)) if shares else None
                found.append({"a": a.name, "b": b.name, "wins": wins} | gaps)
                progress.update()
    return found


def _answers(samples: pd.DataFrame, judge: str) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """prompt_id -> (rewards of a policy's responses, how much each counts)."""
    weights = samples.get("weight", pd.Series(1.0, index=samples.index))
    groups = samples.assign(weight=weights).groupby("prompt_id")
    return {prompt: (group[judge].to_numpy(float), group["weight"].to_numpy()) for prompt, group in groups}


def _points(path: paths.Path) -> list[dict[str, Any]]:
    return [
        {"share": float(share)} | {metric: points[k].interval() for metric, points in path.points.items()}
        for k, share in enumerate(path.share)
    ]


def _laws(walked: dict[str, paths.Path], best: paths.Path) -> dict[str, Any]:
    """Gao's laws of gold and RM reward, of every path that has them, with a band to draw."""
    found: dict[str, Any] = {}
    for method, path in {**walked, "best of n": best}.items():
        form = "best_of_n" if method == "best of n" else "rl"
        for metric in ("gold", "utility", "reward"):
            law = overoptimisation.fit(path, metric, form)
            if law is None:
                continue
            d = np.linspace(0, float(np.sqrt(max(np.nanmax(path.values("kl")), 0.0))), 25)
            low, high = law.band(path, metric, d)
            found.setdefault(method, {"form": form})[metric] = overoptimisation.summary(path, metric, law) | {
                "band": {"d": d.tolist(), "gain": law.at(d).tolist(), "low": low.tolist(), "high": high.tolist()}
            }
    return found


def _equal_compute(walked: dict, costs: dict, axes: list[str], settings: Evaluate) -> dict[str, Any]:
    most = max((costs[method]["total"]["flops"] for method in walked), default=0.0)
    return {
        "flops": {f"{share:g}": share * most for share in settings.equal_compute},
        "axes": {
            axis: {
                method: {
                    f"{share:g}": _interval(
                        comparisons.at_compute(
                            path, axis, costs[method]["upstream"]["flops"], costs[method]["own"]["flops"], share * most
                        )
                    )
                    for share in settings.equal_compute
                }
                for method, path in walked.items()
            }
            for axis in axes
        },
    }


def _own_best(walked: dict[str, paths.Path], axis: str, resamples: Resamples, seed: int) -> dict[str, Any]:
    found = {}
    for method, path in walked.items():
        best = comparisons.own_best(path, axis, resamples, seed)
        if best is not None:
            value, gained, share = best
            found[method] = {"value": value.interval(), "gained": gained.interval(), "at": share, "on": "validation"}
    return found


def _own_n(
    inputs: Inputs, lines: list[measure.Line], best: paths.Path, resamples: Resamples, axis: str
) -> dict[str, Any]:
    """Best-of-n with the n that is best on validation prompts, and what it is worth on test prompts."""
    drawn = inputs.drawn("test")
    most = min(int(pool.groupby("prompt_id").size().min()) for pool in drawn)
    allowed = best.share <= most
    values = best.values(axis)[allowed]
    if not np.isfinite(values).any():
        return {}
    n = int(best.share[allowed][int(np.nanargmax(values))])
    value = measure.row(_measured(drawn, lines, n), resamples)[axis]
    return {"best of n": {"value": value.interval(), "gained": None, "at": n, "on": "test"}}


def _measured(drawn: list[pd.DataFrame], lines: list[measure.Line], n: int) -> list[measure.Measured]:
    """Best of n of each line's pool."""
    return [
        measure.policy(
            as_samples(pool, n), line._replace(demonstrations=line.demonstrations.head(0)), control_length=False
        )
        for pool, line in zip(drawn, lines, strict=True)
    ]


def _deep(inputs: Inputs) -> list[pd.DataFrame]:
    """The test prompts of each line's pool that have the most samples."""
    parts = []
    for drawn in inputs.drawn("test"):
        size = drawn.groupby("prompt_id")["sample"].transform("size")
        parts.append(drawn[size == size.max()])
    return parts


def _best_of_n(
    inputs: Inputs, lines: list[measure.Line], resamples: Resamples
) -> tuple[paths.Path, paths.Path, list[dict], list[dict]]:
    """Best-of-n over n: its path on validation prompts, to compare and to fit; that as deep as the pool goes, on the test prompts
    that go so deep; and curves of all metrics, on all test prompts as far as all have samples, and on those that go deep."""
    held, wide, deep = inputs.drawn("validation"), inputs.drawn("test"), _deep(inputs)
    # On validation prompts the SFT policy's other samples are those of the pool: the first of each prompt is beaten, and not chosen from.
    like = [
        line._replace(sft=pool[pool["sample"] == 0].assign(suffix="")) for pool, line in zip(held, lines, strict=True)
    ]
    held = [pool[pool["sample"] != 0] for pool in held]
    plan = [
        (pools, others, n) for pools, others in ((held, like), (wide, lines), (deep, lines)) for n in _powers(pools[0])
    ]
    measured = []
    with bar(len(plan), "best of n", "n") as progress:
        for pools, others, n in plan:
            measured.append(_measured(pools, others, n))
            progress.update()
    ends = np.cumsum([0, *(len(_powers(pools[0])) for pools in (held, wide, deep))])
    parts = [
        [(n, of) for (_, _, n), of in zip(plan[start:end], measured[start:end], strict=True)]
        for start, end in pairwise(ends)
    ]

    def path(part: list, kind: str) -> paths.Path:
        return paths.of_best_of_n({n: [line.sums for line in of] for n, of in part}, resamples, kind)

    def curve(part: list) -> list[dict]:
        return [{"n": n} | measure.intervals(measure.row(of, resamples)) for n, of in part]

    return path(parts[0], "validation prompt of the pool"), path(parts[2], "prompt"), curve(parts[1]), curve(parts[2])


def _powers(pool: pd.DataFrame) -> list[int]:
    """1, 2, 4 ... as far as every prompt of a pool has samples."""
    return [2**k for k in range(int(pool.groupby("prompt_id").size().min()).bit_length())]


def lines_of(inputs: Inputs, method: str, trained: bool = True) -> list[cost.Line]:
    """What a method did in each line, and what it needed there; `trained` is False for best-of-n at inference."""
    kind = getattr(inputs.settings[method], FAMILIES[families(inputs.policies)[method]]) if trained else ""
    needed = cost.needs(families(inputs.policies)[method] if trained else "best_of_n", kind)
    lines = []
    for number, seed in enumerate(inputs.seeds):
        pool = inputs.pool_metrics[seed]
        spent = sum(split["tokens"] + split["tokens_read"] for split in pool.values())
        lines.append(
            cost.Line(
                # Without training, policy and reward model are held at each answer.
                inputs.runs[inputs.members[method][number]] if trained else {"models_held": 2},
                {stage: inputs.runs[f"{stage}-{seed}"] for stage in needed},
                {"pool": (pool["train"]["tokens"] + pool["train"]["tokens_read"]) / spent},
            )
        )
    return lines


def _costs(inputs: Inputs, rows: list[Row], methods: dict) -> dict[str, Any]:
    """What each method costs, with what it needs before it starts."""
    found = {}
    judge_keys = cost.hyperparameters(inputs.reward_settings, "")  # of the reward model: who needs it chooses them too
    for row in rows:
        if row.name == "sft" or row.name != row.method:  # another control token is no other training
            continue
        entry = cost.of_method(lines_of(inputs, row.method, row.trained))
        settings = inputs.settings[row.method] if row.trained else None
        own = cost.hyperparameters(settings, FAMILIES[families(inputs.policies)[row.method]]) if row.trained else 1
        needed = entry["needs"]
        found[row.name] = entry | {
            "hyperparameters": own,
            "hyperparameters_upstream": judge_keys * ("reward" in needed) + len(cost.POOL_KEYS) * ("pool" in needed),
            "tokens_per_answer": methods[row.name]["sampled_tokens"]["mean"] / methods["sft"]["tokens"]["mean"],
        }
    return found


def _biases(methods: dict, pairs: list[dict[str, Any]]) -> dict[str, Any]:
    """Filler and length of each policy beside those of the preference data: what was liked a little, and became of it."""
    known = [name for name in ("filler", "tokens") if all((p.get(name) or {}).get("chosen") is not None for p in pairs)]
    if not known:
        return {}
    data = {
        name: {side: float(np.mean([p[name][side] for p in pairs])) for side in ("chosen", "rejected")}
        for name in known
    }
    return {
        "pairs": data,
        "methods": {
            name: {
                bias: None if row[bias]["mean"] is None else row[bias]["mean"] - data[bias]["chosen"] for bias in data
            }
            for name, row in methods.items()
        },
    }


def _by_length(rows: list[Row], judge: str) -> dict[str, Any]:
    """Mean reward of responses by their length, in bins that hold equal shares of the SFT policies' responses."""
    lengths = pd.concat([table["tokens"] for table in rows[0].tables])
    inner = np.unique(np.quantile(lengths, np.linspace(0, 1, LENGTH_BINS + 1))[1:-1].round())
    found: dict[str, Any] = {"edges": inner.tolist(), "methods": {}}
    for row in rows:
        whole = pd.concat([t.assign(weight=t.get("weight", pd.Series(1.0, index=t.index))) for t in row.tables])
        whole = whole[whole[judge].notna()]
        place = np.digitize(whole["tokens"], inner, right=True)
        bins = []
        for number in range(len(inner) + 1):
            part = whole[place == number]
            weight = float(part["weight"].sum())
            mean = float((part[judge] * part["weight"]).sum() / weight) if len(part) >= 20 else None
            bins.append({"share": weight / float(whole["weight"].sum()) if len(whole) else None, "mean": mean})
        found["methods"][row.name] = bins
    return found


def _bounds(inputs: Inputs, methods: dict, curve: list[dict]) -> dict[str, Any]:
    """What theory allows, beside what was measured."""
    pool, lines = inputs.pool[inputs.seeds[0]], len(inputs.seeds)
    learned = pool.loc[pool["split"] == "train", "sample"]
    samples_each = int(learned.max()) + 1 if len(learned) else 1
    compared = sum(len(sft) for sft in inputs.sft)
    deep = lines * int(inputs.sft[0]["prompt_id"].isin(_deep(inputs)[0]["prompt_id"]).sum())
    parts = [
        of_imitation(
            name, methods[name], inputs.settings[name], inputs.preferences.source == "dataset", samples_each, compared
        )
        for name in inputs.policies.imitation
    ]
    parts += [of_best_of_n(f"best_of_{n}", methods[f"best_of_{n}"], n, compared) for n in inputs.policies.best_of_n]
    parts += [of_best_of_n(f"best of {row['n']} (curve)", row, row["n"], deep) for row in curve if row["n"] > 1]
    return {name: entry for part in parts for name, entry in part.items()}
