"""The whole comparison: from the tables of all policies to everything that the report says, in one dictionary."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from rlhf_vs_dpo.config import FAMILIES, Evaluate, families, folders
from rlhf_vs_dpo.evaluation import comparisons, cost, measure, overoptimisation, paths
from rlhf_vs_dpo.evaluation.best_of_n import as_samples
from rlhf_vs_dpo.evaluation.bounds import of_best_of_n, of_imitation
from rlhf_vs_dpo.evaluation.statistics import Estimate, Resamples, difference, holm, win_share
from rlhf_vs_dpo.run.progress import bar

LENGTH_BINS = 5  # of responses, by the SFT policy's quantiles


@dataclass(frozen=True)
class Inputs:
    """What the stages before have left behind; tables are those of `schemas`, keys are folders under models/.

    settings        method -> its section of params.yaml; none for the SFT policy
    demonstrations  scored held-out demonstrations, with `gold`
    runs            content of runs/<stage or folder>.json: what each stage cost
    pairs           metrics of the preferences stage
    pool_metrics    metrics of the pool stage
    """

    policies: Any
    seeds: list[int]
    settings: dict[str, Any]
    own_pairs: bool
    reward_settings: Any
    samples: dict[str, pd.DataFrame]
    retention: dict[str, pd.DataFrame]
    watched: dict[str, pd.DataFrame]
    pair_rewards: dict[str, pd.DataFrame]
    demonstrations: pd.DataFrame
    pool: pd.DataFrame
    runs: dict[str, dict[str, Any]]
    pairs: dict[str, Any]
    pool_metrics: dict[str, Any]


@dataclass(frozen=True)
class Row:
    """A row of the comparison: a method (or one way to prompt or sample it), and what was measured of each seed."""

    name: str
    method: str
    tables: list[pd.DataFrame]
    measured: list[measure.Measured]
    folders: list[str]
    trained: bool = True


def compare(inputs: Inputs, settings: Evaluate, seed: int) -> dict[str, Any]:
    """Measure, compare, fit and add up; see the keys below. Numbers are means with 95 % intervals unless they say else."""
    resamples = Resamples(settings.resamples, seed)
    sft = inputs.samples["sft"]
    judge = measure.judged_by(sft)
    rows = _rows(inputs, sft)
    estimates = {row.name: measure.row(row.name, row.measured, resamples) for row in rows}
    methods = {name: measure.intervals(row) for name, row in estimates.items()}
    members, of_family = folders(inputs.policies, inputs.seeds), families(inputs.policies)
    walked = {
        method: paths.of_training(method, [inputs.watched[folder] for folder in of], resamples)
        for method, of in members.items()
        if method != "sft"
    }
    costs = _costs(inputs, members, rows, methods)
    best, wide, curve = _best_of_n(inputs, sft, resamples)
    return {
        "judge": judge,
        "seeds": inputs.seeds,
        "prompts": int(sft["prompt_id"].nunique()),
        "method_of": {row.name: row.method for row in rows},
        "families": {row.name: of_family[row.method] if row.trained else "best_of_n" for row in rows},
        "methods": methods,
        "runs": {row.name: _runs(row) for row in rows},
        "spread": {row.name: _spread(row, estimates["sft"][judge], judge, settings) for row in rows},
        "differences": _differences(rows, estimates, judge),
        "paths": {method: _points(path) for method, path in walked.items()},
        "best_of_n_path": _points(best),
        "overoptimisation": _laws(walked, best),
        "equal_kl": {
            method: {f"{kl:g}": _at_kl(path, judge, kl) for kl in settings.equal_kl}
            for method, path in ({**walked, "best of n": best}).items()
        },
        "equal_compute": _equal_compute(walked, costs, judge, settings),
        "own_best": _own_best(walked, judge, resamples, seed) | _own_n(inputs, sft, best, resamples, judge),
        "cost": costs,
        "biases": _biases(methods, inputs.pairs),
        "length": _by_length(rows, judge)
        | {
            "over_sft": {name: difference(row["tokens"], estimates["sft"]["tokens"]) for name, row in estimates.items()}
        },
        "bounds": _bounds(inputs, members, methods, curve, sft),
        "best_of_n": curve,
        "best_of_n_wide": wide,
        "deep_prompts": _deep(inputs, sft)["prompt_id"].nunique(),
        "validation": {
            folder: float(table.loc[table["step"] == table["step"].max(), judge].mean())
            for folder, table in inputs.watched.items()
        },
    }


def _interval(estimate: Estimate | None) -> dict[str, float | None] | None:
    return None if estimate is None else estimate.interval()


def _at_kl(path: paths.Path, judge: str, kl: float) -> dict[str, Any] | None:
    read = comparisons.at_kl(path, judge, kl)
    return None if read is None else read.interval() | {"between": comparisons.seen_around(path, kl)}


def _rows(inputs: Inputs, sft: pd.DataFrame) -> list[Row]:
    """Every method, and the ways to use one: another control token, best-of-n without training."""
    rows = []
    members = folders(inputs.policies, inputs.seeds)
    with bar(sum(map(len, members.values())), "measure", "policy") as progress:
        for method, of in members.items():
            # The first suffix is how the policy is meant to be prompted; others are rows of their own.
            for number, suffix in enumerate(dict.fromkeys(inputs.samples[of[0]]["suffix"])):
                tables = [inputs.samples[f][inputs.samples[f]["suffix"] == suffix].reset_index(drop=True) for f in of]
                measured = [
                    measure.policy(table, inputs.retention[f], sft, inputs.demonstrations, inputs.pair_rewards.get(f))
                    for f, table in zip(of, tables, strict=True)
                ]
                rows.append(Row(method if number == 0 else f"{method} {suffix}", method, tables, measured, of))
            progress.update(len(of))
    drawn = _drawn(inputs, "test", sft)
    for n in inputs.policies.best_of_n:
        table = as_samples(drawn, n)
        measured = measure.policy(table, None, sft, inputs.demonstrations)
        rows.append(Row(f"best_of_{n}", f"best_of_{n}", [table], [measured], ["pool"], trained=False))
    return rows


def _drawn(inputs: Inputs, split: str, like: pd.DataFrame | None = None) -> pd.DataFrame:
    pool = inputs.pool[inputs.pool["split"] == split]
    return pool if like is None else pool[pool["prompt_id"].isin(like["prompt_id"])]


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


def _spread(row: Row, sft: Estimate, judge: str, settings: Evaluate) -> dict[str, Any]:
    """How the seeds of a method differ, and which of them collapsed."""
    runs = list(_runs(row).values())
    values = [run[judge] for run in runs if judge in run]
    collapsed = [
        run["finished"] < settings.collapse.finished_below
        or run.get(judge, -np.inf) - sft.value < settings.collapse.gain_below
        for run in runs
    ]
    return {
        "seeds": len(runs),
        "standard_deviation": float(np.std(values, ddof=1)) if len(values) > 1 else None,
        "lowest": min(values, default=None),
        "highest": max(values, default=None),
        "collapsed": float(np.mean(collapsed)) if row.name != "sft" else 0.0,
    }


def _differences(rows: list[Row], estimates: dict, judge: str) -> list[dict[str, Any]]:
    """Every two rows: a - b in the judge's reward with Holm's correction over all of them, and who wins how often."""
    answers = []
    whole = {row.name: all(judge in run for run in _runs(row).values()) for row in rows}
    for row in rows:
        together = pd.concat([t.assign(weight=t.get("weight", pd.Series(1.0, index=t.index))) for t in row.tables])
        groups = {p: (g[judge].to_numpy(float), g["weight"].to_numpy()) for p, g in together.groupby("prompt_id")}
        answers.append(groups)
    found = []
    with bar(len(rows) * (len(rows) - 1) // 2, "pairs of policies", "pair") as progress:
        for i, a in enumerate(rows):
            for j in range(i + 1, len(rows)):
                b = rows[j]
                shares = []
                for prompt, (ours, weight) in answers[i].items():
                    theirs, other = answers[j].get(prompt, (None, None))
                    if theirs is not None:
                        shares.append(np.divide(*win_share(ours, weight, theirs, other)))
                entry = difference(estimates[a.name][judge], estimates[b.name][judge])
                if not (whole[a.name] and whole[b.name]):  # the runs that are left do not speak for the method
                    entry["p"] = None
                found.append({"a": a.name, "b": b.name} | entry | {"wins": float(np.mean(shares)) if shares else None})
                progress.update()
    for entry, corrected in zip(found, holm([entry["p"] for entry in found]), strict=True):
        entry["p_holm"] = corrected
    return found


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
        for metric in ("gold", "reward"):
            law = overoptimisation.fit(path, metric, form)
            if law is None:
                continue
            d = np.linspace(0, float(np.sqrt(max(np.nanmax(path.values("kl")), 0.0))), 25)
            low, high = law.band(path, metric, d)
            found.setdefault(method, {"form": form})[metric] = overoptimisation.summary(path, metric, law) | {
                "band": {"d": d.tolist(), "gain": law.at(d).tolist(), "low": low.tolist(), "high": high.tolist()}
            }
    return found


def _equal_compute(walked: dict, costs: dict, judge: str, settings: Evaluate) -> dict[str, Any]:
    most = max((costs[method]["total"]["flops"] for method in walked), default=0.0)
    return {
        "flops": {f"{share:g}": share * most for share in settings.equal_compute},
        "methods": {
            method: {
                f"{share:g}": _interval(
                    comparisons.at_compute(
                        path, judge, costs[method]["upstream"]["flops"], costs[method]["own"]["flops"], share * most
                    )
                )
                for share in settings.equal_compute
            }
            for method, path in walked.items()
        },
    }


def _own_best(walked: dict[str, paths.Path], judge: str, resamples: Resamples, seed: int) -> dict[str, Any]:
    found = {}
    for method, path in walked.items():
        best = comparisons.own_best(path, judge, resamples, seed)
        if best is not None:
            value, gained, share = best
            found[method] = {"value": value.interval(), "gained": gained.interval(), "at": share, "on": "validation"}
    return found


def _own_n(inputs: Inputs, sft: pd.DataFrame, best: paths.Path, resamples: Resamples, judge: str) -> dict[str, Any]:
    """Best-of-n with the n that is best on validation prompts, and what it is worth on test prompts."""
    drawn = _drawn(inputs, "test", sft)
    most = int(drawn.groupby("prompt_id").size().min())
    allowed = best.share <= most
    values = best.values(judge)[allowed]
    if not np.isfinite(values).any():
        return {}
    n = int(best.share[allowed][int(np.nanargmax(values))])
    measured = measure.policy(as_samples(drawn, n), None, sft, inputs.demonstrations, control_length=False)
    value = resamples.ratio("best of n", *_stacked(measured.sums[judge]))
    return {"best of n": {"value": value.interval(), "gained": None, "at": n, "on": "test"}}


def _stacked(sums: measure.Sums) -> tuple:
    return sums.kind, sums.numerator[None], sums.denominator[None]


def _deep(inputs: Inputs, sft: pd.DataFrame) -> pd.DataFrame:
    """The test prompts of the pool that have the most samples."""
    drawn = _drawn(inputs, "test", sft)
    size = drawn.groupby("prompt_id")["sample"].transform("size")
    return drawn[size == size.max()]


def _best_of_n(inputs: Inputs, sft: pd.DataFrame, resamples: Resamples) -> tuple[paths.Path, list[dict], list[dict]]:
    """Best-of-n over n, three times: its path on validation prompts, to compare and to fit; on all test prompts, as far as
    all have samples; and as deep as the pool goes, on the prompts that go so deep."""
    held, wide, deep = _drawn(inputs, "validation"), _drawn(inputs, "test", sft), _deep(inputs, sft)
    like = held.drop_duplicates("prompt_id").assign(suffix="")
    plan = [(held, like, n) for n in _powers(held)] + [(t, sft, n) for t in (wide, deep) for n in _powers(t)]
    measured = []
    with bar(len(plan), "best of n", "n") as progress:
        for table, others, n in plan:
            measured.append(
                measure.policy(as_samples(table, n), None, others, inputs.demonstrations.head(0), control_length=False)
            )
            progress.update()
    first, second = len(_powers(held)), len(_powers(held)) + len(_powers(wide))
    rows = {n: found.sums for (_, _, n), found in zip(plan[:first], measured[:first], strict=True)}
    curves = [
        [
            {"n": n} | measure.intervals(measure.row("best of n", [found], resamples))
            for (_, _, n), found in zip(plan[start:end], measured[start:end], strict=True)
        ]
        for start, end in ((first, second), (second, len(plan)))
    ]
    return paths.of_best_of_n(rows, resamples, "validation prompt of the pool"), *curves


def _powers(pool: pd.DataFrame) -> list[int]:
    """1, 2, 4 ... as far as every prompt of a pool has samples."""
    return [2**k for k in range(int(pool.groupby("prompt_id").size().min()).bit_length())]


def _costs(inputs: Inputs, members: dict[str, list[str]], rows: list[Row], methods: dict) -> dict[str, Any]:
    """What each method costs, with what it needs before it starts."""
    pool = inputs.pool_metrics
    spent = sum(split["tokens"] + split["tokens_read"] for split in pool.values())
    shares = {"pool": (pool["train"]["tokens"] + pool["train"]["tokens_read"]) / spent}
    of_family = families(inputs.policies)
    found = {}
    judge_keys = cost.hyperparameters(inputs.reward_settings, "")  # of the reward model: who needs it chooses them too
    for method, of in members.items():
        if method == "sft":
            continue
        family, settings = of_family[method], inputs.settings[method]
        needed = cost.needs(family, getattr(settings, FAMILIES[family]))
        entry = cost.of_method([inputs.runs[f] for f in of], {s: inputs.runs[s] for s in needed}, shares)
        own = cost.hyperparameters(settings, FAMILIES[family])
        found[method] = entry | {
            "hyperparameters": own,
            "hyperparameters_upstream": judge_keys * ("reward" in needed) + len(cost.POOL_KEYS) * ("pool" in needed),
        }
    for row in rows:
        if not row.trained:
            # Nothing is trained; policy and reward model are held at each answer.
            nothing = {"device": inputs.runs["pool"]["device"], "models_held": 2}
            needed = cost.needs("best_of_n", "")
            entry = cost.of_method([nothing], {s: inputs.runs[s] for s in needed}, shares)
            found[row.name] = entry | {"hyperparameters": 1, "hyperparameters_upstream": judge_keys}
    for name, entry in found.items():
        entry["tokens_per_answer"] = methods[name]["sampled_tokens"]["mean"] / methods["sft"]["tokens"]["mean"]
    return found


def _biases(methods: dict, pairs: dict[str, Any]) -> dict[str, Any]:
    """Filler and length of each policy beside those of the preference data: what was liked a little, and became of it."""
    known = [name for name in ("filler", "tokens") if (pairs.get(name) or {}).get("chosen") is not None]
    if not known:
        return {}
    data = {name: {side: pairs[name][side] for side in ("chosen", "rejected")} for name in known}
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
    """Mean reward of responses by their length, in bins that hold equal shares of the SFT policy's responses."""
    lengths = next(row for row in rows if row.name == "sft").tables[0]["tokens"]
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


def _bounds(inputs: Inputs, members: dict, methods: dict, curve: list[dict], sft: pd.DataFrame) -> dict[str, Any]:
    """What theory allows, beside what was measured."""
    learned = inputs.pool.loc[inputs.pool["split"] == "train", "sample"]
    samples_each = int(learned.max()) + 1 if len(learned) else 1
    deep = inputs.pool[inputs.pool["split"] == "test"].groupby("prompt_id").size()
    compared = int(sft["prompt_id"].isin(deep.index[deep == deep.max()]).sum())
    parts = [
        of_imitation(
            name, methods[name], inputs.settings[name], inputs.own_pairs, samples_each, len(sft) * len(members[name])
        )
        for name in inputs.policies.imitation
    ]
    parts += [of_best_of_n(f"best_of_{n}", methods[f"best_of_{n}"], n, len(sft)) for n in inputs.policies.best_of_n]
    parts += [of_best_of_n(f"best of {row['n']} (curve)", row, row["n"], compared) for row in curve if row["n"] > 1]
    return {name: entry for part in parts for name, entry in part.items()}
