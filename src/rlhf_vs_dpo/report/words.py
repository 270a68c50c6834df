"""Sentences made of the numbers: the verdict, and what it cannot claim. Nothing here knows the name of a method."""

from typing import Any

import numpy as np

from rlhf_vs_dpo.report.figures import NAMES

ALPHA = 0.05


def number(entry: dict[str, float | None], digits: int = 2) -> str:
    """`1.81 (1.75 to 1.87)`, or a dash."""
    if entry["mean"] is None:
        return "–"
    return f"{entry['mean']:.{digits}f} ({entry['low']:.{digits}f} to {entry['high']:.{digits}f})"


def pair(found: dict[str, Any], a: str, b: str) -> dict[str, Any]:
    """The difference a - b, whichever way round it is stored."""
    for entry in found["differences"]:
        if (entry["a"], entry["b"]) == (a, b):
            return entry
        if (entry["a"], entry["b"]) == (b, a):
            turned = {key: None if entry[key] is None else -entry[key] for key in ("mean", "low", "high")}
            wins = None if entry["wins"] is None else 1 - entry["wins"]
            return entry | {
                "a": a,
                "b": b,
                "mean": turned["mean"],
                "low": turned["high"],
                "high": turned["low"],
                "wins": wins,
            }
    raise KeyError((a, b))


def best_of_family(found: dict[str, Any], family: str) -> str | None:
    """The method of a family that is best on validation prompts; test prompts choose nothing."""
    scored = {}
    for method, its in found["families"].items():
        if its == family and method in found["paths"]:
            values = [found["validation"].get(folder) for folder in found["runs"][method]]
            if values and None not in values:  # a method of which one run says nothing that ends is not the best
                scored[method] = float(np.mean(values))
    return max(scored, key=scored.__getitem__) if scored else None


def verdict(found: dict[str, Any]) -> list[str]:
    """Three sentences: who leads, RL against the DPO family, and at what price and how surely."""
    judge = found["judge"]
    measured = {
        row: m[judge]
        for row, m in found["methods"].items()
        if m[judge]["mean"] is not None and all(judge in run for run in found["runs"][row].values())
    }
    if "sft" not in measured or len(measured) < 2:
        return ["Too few policies finished a response to be compared."]
    leader = max(measured, key=lambda row: measured[row]["mean"])
    equals = [row for row in measured if row != leader and (pair(found, leader, row)["p_holm"] or 0.0) >= ALPHA]
    lines = len(found["seeds"])
    first = (
        f"On {found['prompts']} test prompts {leader} has the highest {NAMES[judge]}, {number(measured[leader])}, against "
        f"{number(measured['sft'])} of the SFT policy; "
    )
    if leader == "sft":
        first = f"On {found['prompts']} test prompts no policy has a higher {NAMES[judge]} than the SFT policy, {number(measured['sft'])}; "
    first += (
        f"after Holm's correction over all pairs it cannot be told from {_listed(['the SFT policy' if e == 'sft' else e for e in equals])}."
        if equals
        else "after Holm's correction over all pairs it differs from every other row."
    )
    rl, preference = best_of_family(found, "rl"), best_of_family(found, "preference")
    if rl and preference:
        gap = pair(found, rl, preference)
        clear = gap["p_holm"] is not None and gap["p_holm"] < ALPHA
        ahead, behind = (rl, preference) if (gap["mean"] or 0) > 0 else (preference, rl)
        second = (
            f"Of the methods that are best of their family on validation prompts, {rl} (RL) and {preference} (DPO family), "
            + (
                f"{ahead} is ahead by {number(pair(found, ahead, behind))}"
                if clear
                else f"neither is clearly ahead: the difference, {rl} minus {preference}, is {number(gap)}"
            )
            + f" in {NAMES[judge]}, p {p_value(gap['p'], sign='=')} alone and {p_value(gap['p_holm'], sign='=')} after correction, and {rl} wins "
            f"{gap['wins']:.0%} of direct comparisons."
        )
        a, b = found["cost"][rl], found["cost"][preference]
        third = (
            f"With all that it needs before it starts, {rl} takes {a['total']['flops'] / b['total']['flops']:.1f} times the "
            f"FLOPs of {preference}, and holds "
            f"{a['models_held']} model{'s' if a['models_held'] != 1 else ''} at once against {b['models_held']}; "
        )
    else:
        trained = [m for m in found["paths"]]
        silent = [
            name
            for name, family in (("RL", "rl"), ("DPO", "preference"))
            if family in [found["families"][m] for m in trained] and not best_of_family(found, family)
        ]
        second = (
            f"Of the {_listed(silent)} family no method could be chosen: in each, a run ended none of its responses to validation "
            "prompts, so that RL is not compared with the DPO family."
            if silent
            else f"The run trained {_listed(trained) or 'no policy'}, not a method of both families, so that it compares no RL with the DPO family."
        )
        third = ""
    if lines == 1:
        third += "one line was run, so that none of this says how another run of the whole pipeline would have ended."
    else:
        trained = {row: s for row, s in found["spread"].items() if row in found["paths"]}
        spread = {row: s["standard_deviation"] for row, s in trained.items() if s["standard_deviation"] is not None}
        collapsed = sum(round(s["collapsed"] * s["lines"]) for s in trained.values())
        runs = sum(s["lines"] for s in trained.values())
        widest = max(spread, key=spread.__getitem__) if spread else None
        third += f"over {lines} lines, {collapsed} of {runs} runs collapsed"
        third += (
            f", and the widest spread between lines is that of {widest} (standard deviation {spread[widest]:.2f})."
            if widest
            else "."
        )
    return [first, second, third[:1].upper() + third[1:]]


def limits(found: dict[str, Any]) -> list[str]:
    """What the numbers cannot say."""
    lines = len(found["seeds"])
    said = [
        "Intervals are 95 %, from a bootstrap over test prompts"
        + (
            "; one line was run (one SFT policy, one draw of pairs, one reward model, one run of each method), so that they say nothing of how "
            "another run of the pipeline would have ended, and p-values compare these policies, not their methods."
            if lines == 1
            else f" and over {lines} lines together, widened for how few there are. A line is a run of the whole pipeline from its own "
            "seed: its own SFT policy, pairs and reward model. Each policy is compared with the SFT policy of its line, and differences between "
            "methods are taken within each line before they are averaged. Where a fit peaks, the interval is of plain percentiles."
        ),
        "Each method was run at one setting (params.yaml): the order of methods is an order of settings, too.",
        "RM reward is the mean over responses that ended, for there is no EOS to score the others at."
        + (
            " Every line has a reward model of its own, and these are not on one scale: what is averaged over lines is each policy's "
            "reward by its own line's model, 0 being the average demonstration there."
            if lines > 1
            else ""
        )
        + (
            ""
            if found["judge"] == "gold"
            else " Wins are judged by the reward model, for want of a gold reward: what was trained on it is judged by its own measure."
        ),
    ]
    return said


def p_value(p: float | None, sign: str = "") -> str:
    """A p-value as people write it, behind a sign in running text: `= 0.03`, `< 0.001`."""
    if p is None:
        return "–"
    return "< 0.001" if p < 0.001 else f"{sign} {p:.3f}".strip() if p < 0.1 else f"{sign} {p:.2f}".strip()


def _listed(names: list[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}" if names else ""
