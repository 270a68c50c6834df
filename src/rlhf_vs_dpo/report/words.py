"""Sentences made of the numbers: what was found, and what it cannot say. Nothing here knows the name of a method.

One line, or two, are described: no sentence draws a conclusion about methods, for another line could take it back. From
three on, the planned questions are answered (`evaluation.questions`).
"""

from collections.abc import Mapping
from itertools import groupby
from typing import Any

import numpy as np
from scipy import stats

Entry = Mapping[str, Any]  # `mean`, `low`, `high`: numbers, or None where a metric is not known

NAMES = {
    "preferred": "share preferred to SFT",
    "gold": "gold reward",
    "utility": "utility",
    "objective": "objective",
    "reward": "RM reward",
}


def number(entry: Entry, digits: int = 2) -> str:
    """`1.81 (1.75 to 1.87)`, or a dash."""
    if entry["mean"] is None:
        return "–"
    return f"{entry['mean']:.{digits}f} ({entry['low']:.{digits}f} to {entry['high']:.{digits}f})"


def signed(entry: Entry, digits: int = 2) -> str:
    """`+0.12 (+0.05 to +0.19)`, or a dash."""
    if entry["mean"] is None:
        return "–"
    return f"{entry['mean']:+.{digits}f} ({entry['low']:+.{digits}f} to {entry['high']:+.{digits}f})"


def pair(found: dict[str, Any], a: str, b: str) -> dict[str, Any]:
    """The entry of two rows, a - b, whichever way round it is stored."""
    for entry in found["differences"]:
        if (entry["a"], entry["b"]) == (a, b):
            return entry
        if (entry["a"], entry["b"]) == (b, a):
            turned = {axis: _turned(entry[axis]) for axis in found["axes"]}
            return {"a": a, "b": b, "wins": None if entry["wins"] is None else 1 - entry["wins"]} | turned
    raise KeyError((a, b))


def _turned(entry: Entry) -> Entry:
    if entry["mean"] is None:
        return entry
    return {"mean": -entry["mean"], "low": -entry["high"], "high": -entry["low"]}


def axes_explained(found: dict[str, Any]) -> str:
    """What is measured, in a few sentences: every symbol where it first stands."""
    asked, said = found["asked"], []
    if asked["temperature"] is not None:
        worth = (
            "the gold reward (what it is really worth) and their own tastes"
            if asked["tastes"]
            else "the gold reward alone (what it is really worth)"
        )
        said.append(
            f"Labels come from simulated annotators, who value a response by their utility u: {worth}. "
            "`preferred` is what they asked for: how often they would choose a policy's response over the SFT "
            f"policy's, E σ((u − u_sft)/T), T = {asked['temperature']:g}. "
            + ("`gold` is what they should have asked for. " if asked["tastes"] else "")
            + "`objective` is "
            f"E[u]/T − {asked['price']:g} · KL, which RLHF and DPO both maximise; KL is the distance from the SFT policy, in nats per response."
        )
    elif "preferred" in found["axes"]:
        said.append(
            f"Nobody simulated made these pairs, so `preferred` is how often the judge {asked['judge']} chooses a policy's response over the SFT "
            "policy's; the annotators' utility is not known, and nothing here depends on it."
        )
    else:
        said.append(
            "Nobody simulated made these pairs and no judge stands in their place (`evaluate.preferred_by`): what the labels asked "
            "for is not measured."
        )
    if "gold" not in found["axes"]:
        said.append("This source has no gold reward.")
    if found["axes"] == ["reward"]:
        said.append("Rows are ordered by the reward model's own score, which was trained on.")
    said.append("± is half a 95 % interval.")
    return " ".join(said)


def verdict(found: dict[str, Any]) -> list[str]:
    """What was found: a description of one line or two, or answers to the planned questions from three on."""
    measured = {row for row, m in found["methods"].items() if m[found["axes"][0]]["mean"] is not None}
    if "sft" not in measured or len(measured) < 2:
        return [
            f"Too few policies can be compared: `{found['axes'][0]}` is known for fewer than two of them, or not for SFT."
        ]
    lines = len(found["seeds"])
    said = _answered(found, lines) if found["answers"] else _described(found, lines)
    failed = _failed(found)
    return said + ([failed] if failed else [])


def _described(found: dict[str, Any], lines: int) -> list[str]:
    ranges = []
    for axis in found["axes"]:
        values = {row: m[axis] for row, m in found["methods"].items() if m[axis]["mean"] is not None}
        low, high = (choose(values, key=lambda row: values[row]["mean"]) for choose in (min, max))
        ranges.append(f"{NAMES[axis]} from {number(values[low])} ({low}) to {number(values[high])} ({high})")
    said = f"On {found['prompts']} test prompts these policies range in {'; in '.join(ranges)}"
    if len(found["axes"]) == 2:
        means = [[m[axis]["mean"] for axis in found["axes"]] for m in found["methods"].values()]
        both = np.array([pair for pair in means if None not in pair], dtype=float)
        rank = float(stats.spearmanr(both[:, 0], both[:, 1]).statistic) if len(both) > 2 else float("nan")
        if np.isfinite(rank):
            said += f". The two orders of rows correlate by {rank:.2f} (Spearman: 1 is the same order, 0 no relation, −1 the reverse)"
    few = "One line was run" if lines == 1 else "Two lines were run"
    missing = len({*range(5)} - {*found["seeds"]})
    return [
        said + ".",
        f"{few} (a line is a run of the whole pipeline from one seed: its own SFT policy, pairs, reward model, and one run of each method). "
        "That describes these policies; another line can order them otherwise, so no conclusion about methods is drawn. "
        f"`make profile NAME=seeds && make repro` runs lines 0 to 4. What is done is kept; {missing} lines are missing, and each takes about as long as one of "
        "this run (run.html and run.md have its seconds). From three lines on, the planned questions are answered.",
    ]


def _answered(found: dict[str, Any], lines: int) -> list[str]:
    said = []
    for axis in found["axes"]:
        asked = [q for q in found["questions"][axis] if q["answer"] is not None]
        without = len(found["questions"][axis]) - len(asked)
        lost = (
            f" {_questions(without)} could not be answered: a row has no value in some line, or two rows share too few prompts."
            if without
            else ""
        )
        if not asked:
            said.append(
                f"In {NAMES[axis]}, {lost.strip()}"
                if lost
                else f"In {NAMES[axis]}, no question was asked (`evaluate.questions`)."
            )
            continue
        known = [q for q in asked if q["answer"] in ("a", "b")]
        told = "; ".join(
            f"{q['a']} over {q['b']} by {number(q)}"
            if q["answer"] == "a"
            else f"{q['b']} over {q['a']} by {number(_turned(q))}"
            for q in known
        )
        said.append(
            f"In {NAMES[axis]}, {len(known)} of {len(asked)} planned questions are answered (Holm over them, 5 %): {told}.{lost}"
            if told
            else f"In {NAMES[axis]}, none of {_questions(len(asked), 'planned ')} is answered: no difference is sure at 5 % after Holm over them.{lost}"
        )
    if any(q["answer"] == "open" for axis in found["axes"] for q in found["questions"][axis]):
        said.append(
            "A question that is open is no sign that two methods are equal: few lines find large differences only. More of `seeds` find smaller "
            "ones (docs/statistics.md says how large they were in the built-in world with 3, 4, 5 and 8 lines)."
        )
    trained = {row: s for row, s in found["spread"].items() if row in found["paths"]}
    collapsed = sum(round(s["collapsed"] * s["lines"]) for s in trained.values())
    runs = sum(s["lines"] for s in trained.values())
    said.append(
        f"{lines} lines were run, each a run of the whole pipeline from its own seed; {collapsed} of {runs} trained policies collapsed (too few of their responses end, "
        "or they gain too little over the SFT policy: `evaluate.collapse`). All pairs that were not planned are exploratory."
    )
    return said


def _questions(count: int, kind: str = "") -> str:
    return f"{count} {kind}question{'s' if count > 1 else ''}"


def _failed(found: dict[str, Any]) -> str | None:
    """Which policies of this run show which failure, by their intervals."""
    names = {"reward_model_exploited": "reward model exploited (its score rose, utility fell)"}
    if found["asked"]["tastes"]:
        names = {"bias_amplified": "bias amplified (utility rose, gold fell)"} | names
    told = []
    for kind, words in names.items():
        seen = {name: both[kind]["shown"] for name, both in found["failures"].items()}
        of = [name for name, shows in seen.items() if shows and not name.startswith("best of")]
        over_n = [name for name in seen if name.startswith("best of")]
        for shows, of_n in groupby(over_n, seen.__getitem__):  # n one after another that show it
            if shows:
                run = [*of_n]
                until = " and more" if run[-1] == over_n[-1] else f" to {run[-1].removeprefix('best of ')}"
                of.append(run[0] + (until if len(run) > 1 else ""))
        told.append(f"{words}: {listed(of) or 'none'}")
    return (
        f"{'Two ways' if len(names) > 1 else 'One way'} to go wrong, as far as the intervals of this run tell: {'; '.join(told)}."
        if found["failures"]
        else None
    )


def limits(found: dict[str, Any]) -> list[str]:
    """What the numbers cannot say."""
    lines = len(found["seeds"])
    said = [
        "Intervals are 95 %, from a bootstrap over test prompts"
        + (
            ": they tell how another draw of prompts would have measured these policies, and say nothing of another line."
            if lines == 1
            else f" and over {lines} lines together, widened for how few there are. Each policy is compared with the SFT policy of its line, "
            "and differences between methods are taken within each line before they are averaged."
        ),
        "Each row was run at one setting (params.yaml): the order of rows is an order of settings, too.",
        *_fewer_prompts(found),
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


def _fewer_prompts(found: dict[str, Any]) -> list[str]:
    """Rows that were measured on a part of the test prompts: their numbers in a table are of other prompts than the rest."""
    fewer = {row: prompts for row, prompts in found["prompts_of"].items() if prompts < found["prompts"]}
    told = [f"{row} was sampled on {prompts} of the {found['prompts']} test prompts" for row, prompts in fewer.items()]
    return (
        [f"{'; '.join(told)}: its means are of those, and differences are of the prompts that both rows have."]
        if told
        else []
    )


def p_value(p: float | None) -> str:
    """A p-value as people write it: 0.03, < 0.001."""
    if p is None:
        return "–"
    return "< 0.001" if p < 0.001 else f"{p:.3f}" if p < 0.1 else f"{p:.2f}"


def listed(names: list[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}" if names else ""
