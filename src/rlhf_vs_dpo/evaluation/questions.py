"""The questions that were planned (`evaluate.questions`) before the lines that answer them were run, and how surely each is answered.

A question is a pair of rows: is there a difference between them on an axis? It is answered from three lines on. Fewer say
nothing of another run of the pipeline, and a p-value over prompts would be one of these policies, not of their methods. On each axis, p-values
are corrected by Holm (1979) over the questions: the chance that any question without a difference is answered
"differs" is at most 5 %. All other pairs are exploratory: no p-value, no answer.
"""

from typing import Any

from rlhf_vs_dpo.evaluation.statistics import Estimate, Resamples, holm

ALPHA = 0.05
LINES = 3  # fewer answer nothing


def answered(
    questions: list[tuple[str, str]], estimates: dict[str, Estimate | None], resamples: Resamples
) -> list[dict[str, Any]]:
    """An entry for each question: `a`, `b`, the difference a - b with its 95 % interval, `p`, `p_holm`, and the `answer`.

    estimates   of one metric, by row: a question about a row that was not run is left out

    `answer` is "a" or "b", whichever is higher, "open", or null where too few lines were run. A row that has no value in some line
    (a run that says nothing that ends) is not compared: the lines that are left do not speak for the method.
    """
    found = []
    for a, b in questions:
        if a not in estimates or b not in estimates:
            continue
        one, other = estimates[a], estimates[b]
        if one is None or other is None:
            found.append({"a": a, "b": b, "mean": None, "low": None, "high": None, "p": None})
            continue
        gap = resamples.difference(one, other)
        lines = len(one.each)
        usable = lines >= LINES and gap.lines == lines
        found.append({"a": a, "b": b} | gap.interval() | {"p": gap.p_value() if usable else None})
    for entry, corrected in zip(found, holm([entry["p"] for entry in found]), strict=True):
        entry["p_holm"] = corrected
        entry["answer"] = _answer(entry)
    return found


def _answer(entry: dict[str, Any]) -> str | None:
    if entry["p_holm"] is None:
        return None
    if entry["p_holm"] >= ALPHA:
        return "open"
    return "a" if entry["mean"] > 0 else "b"
