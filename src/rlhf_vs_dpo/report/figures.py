"""The figures of the report."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import altair as alt
import pandas as pd

from rlhf_vs_dpo.report.charts import (
    FAMILY_COLOURS,
    FAMILY_NAMES,
    GREY,
    Figure,
    Scale,
    Style,
    axis,
    data,
    faded,
    labels,
    rule,
    span,
    spoken,
    tooltip,
    unchecked,
)  # fmt: skip
from rlhf_vs_dpo.report.words import NAMES, Entry, signed

Rows = list[dict[str, Any]]
ROW_HEIGHT = 19
WIDE = 820  # pixels that the panels of a figure share
CURVE = 40  # points of a line that are drawn


def draw(found: dict[str, Any], learning: pd.DataFrame) -> list[Figure]:
    """All figures that the results can fill, in the order in which the report shows them."""
    style = Style(found["families"])
    makers: list[Callable[[dict[str, Any], Style], Figure | None]] = [
        questions, comparison, two_axes, frontier, overoptimisation, compute, cost, length, forgetting, diversity, best_of_n,
    ]  # fmt: skip
    with unchecked():
        figures = [figure for maker in makers if (figure := maker(found, style)) is not None]
        trained = training(learning, style)
    return [*figures, trained] if trained else figures


def _ranked(found: dict[str, Any]) -> list[str]:
    """Rows from the highest to the lowest on the first axis."""
    first = found["axes"][0]
    worth = {row: m[first]["mean"] for row, m in found["methods"].items()}
    return sorted(worth, key=lambda row: -math.inf if worth[row] is None else worth[row], reverse=True)


def _known(found: dict[str, Any], metrics: tuple[str, ...]) -> list[str]:
    return [m for m in metrics if any(row[m]["mean"] is not None for row in found["methods"].values())]


def _said(found: dict[str, Any], metric: str, digits: int = 2) -> str:
    """The numbers of a metric, in the order of the rows, for those who cannot see them."""
    means = {row: found["methods"][row][metric]["mean"] for row in _ranked(found)}
    return ", ".join(f"{row} {mean:.{digits}f}" for row, mean in means.items() if mean is not None) + "."


def _entry(row: str, entry: Entry, metric: str = "x") -> dict[str, Any]:
    """A mean with its interval as fields `x, x_low, x_high, x_said`."""
    return {
        "policy": row, metric: entry["mean"], f"{metric}_low": entry["low"], f"{metric}_high": entry["high"],
        f"{metric}_said": spoken(entry),
    }  # fmt: skip


def _dots(
    found: dict[str, Any], style: Style, metrics: dict[str, str], marks: dict[str, list[tuple[float, str]]] | None = None,
    log: tuple[str, ...] = (), beside: dict[str, tuple[str, str]] | None = None,
) -> Any:  # fmt: skip
    """A panel for each metric, a row for each policy: its mean and interval.

    metrics    metric -> title
    marks      metric -> values with a thin line, each `line` or `dots`
    log        metrics on a logarithmic scale
    beside     metric -> (another metric shown hollow below it, its name)
    """
    order = [row for row in _ranked(found) if any(found["methods"][row][m]["mean"] is not None for m in metrics)]
    panels = []
    for number, (metric, title) in enumerate(metrics.items()):
        shown = [(row, found["methods"][row][metric]) for row in order]
        rows = [_entry(row, entry) for row, entry in shown if entry["mean"] is not None]
        every = [row[key] for row in rows for key in ("x_low", "x_high")]
        y = alt.Y(
            "policy:N",
            sort=order,
            title=None,
            scale=alt.Scale(domain=order),
            axis=alt.Axis(labels=number == 0, ticks=False, domain=False, grid=True, labelLimit=200, labelFontSize=11),
        )
        base = alt.Chart(data(rows)).encode(y=y, color=style.colours, opacity=faded())
        said = tooltip(policy="policy", x_said=title)
        layers = []
        for value, kind in (marks or {}).get(metric, []):
            every.append(value)
            layers.append(rule([value], dash=[2, 2] if kind == "dots" else None))
        if beside and metric in beside:
            other, name = beside[metric]
            hollow = [
                _entry(row, found["methods"][row][other])
                for row in order
                if found["methods"][row][other]["mean"] is not None
            ]
            every += [row["x"] for row in hollow]
            layers.append(
                alt.Chart(data(hollow))
                .mark_point(size=26, filled=False, yOffset=6)
                .encode(x="x:Q", y=y, color=style.colours, shape=style.shapes, opacity=faded(), tooltip=tooltip(policy="policy", x_said=name))
            )  # fmt: skip
        runs = [
            {"policy": row, "x": run[metric]}
            for row in order
            if len(found["runs"].get(row, {})) > 1
            for run in found["runs"][row].values()
            if run.get(metric) is not None
        ]
        of: Scale = "log" if metric in log else "linear"
        if runs and metric in found["axes"]:
            every += [run["x"] for run in runs]
            layers.append(
                alt.Chart(data(runs)).mark_tick(color=GREY, thickness=1, size=5, yOffset=7).encode(x="x:Q", y=y, opacity=faded(0.9))
            )  # fmt: skip
        layers += [
            base.mark_rule().encode(
                x=axis("x_low", title, span(every, of), scale=of),
                x2="x_high:Q",
            ),
            base.mark_point(size=42, filled=True).encode(x="x:Q", shape=style.shapes, tooltip=said),
        ]
        panels.append(alt.layer(*layers).properties(width=(WIDE - 120) / len(metrics), height=ROW_HEIGHT * len(order)))
    return alt.hconcat(*panels, spacing=10)


def questions(found: dict[str, Any], style: Style) -> Figure | None:
    """The planned questions, once they are answered: each difference with its interval."""
    if not found["answers"] or not found["questions"][found["axes"][0]]:
        return None
    panels, said = [], []
    asked = [f"{q['a']} − {q['b']}" for q in found["questions"][found["axes"][0]]]
    for number, name in enumerate(found["axes"]):
        rows = [
            {
                "question": f"{q['a']} − {q['b']}", "x": q["mean"], "low": q["low"], "high": q["high"], "policy": None,
                "said": signed(q), "answer": "answered" if q["answer"] in ("a", "b") else "open",
            }
            for q in found["questions"][name]
            if q["answer"] is not None
        ]  # fmt: skip
        y = alt.Y("question:N", sort=asked, title=None, scale=alt.Scale(domain=asked),
                  axis=alt.Axis(labels=number == 0, ticks=False, domain=False, grid=True, labelLimit=260, labelFontSize=11))  # fmt: skip
        base = alt.Chart(data(rows)).encode(y=y)
        domain = span([0.0, *(row[end] for row in rows for end in ("low", "high"))])
        filled = alt.Fill(
            "answer:N", legend=None, scale=alt.Scale(domain=["answered", "open"], range=["#000000", "#ffffff"])
        )
        panels.append(
            alt.layer(
                rule([0.0]),
                base.mark_rule().encode(x=axis("low", f"difference in {NAMES[name]}", domain), x2="high:Q"),
                base.mark_point(size=55, stroke="#000000", strokeWidth=1.2, opacity=1).encode(
                    x="x:Q", fill=filled, tooltip=tooltip(question="question", said="difference", answer="")
                ),
            ).properties(width=(WIDE - 160) / len(found["axes"]), height=24 * len(asked))
        )
        said.append(f"{NAMES[name]}: " + ", ".join(f"{row['question']} {row['said']}" for row in rows) + ".")
    return Figure(
        "questions",
        "The planned questions: differences with 95 % intervals over lines and prompts. Filled: answered, after Holm over the questions; hollow: open",
        "Differences. " + " ".join(said),
        alt.hconcat(*panels, spacing=10),
    )


def comparison(found: dict[str, Any], style: Style) -> Figure:
    shown = _known(found, ("preferred", "gold", "reward", "win_rate_vs_sft"))
    titles = {m: NAMES.get(m, f"wins against SFT by {found['judge']}") for m in shown}
    half = {m: [(0.5, "line")] for m in ("preferred", "win_rate_vs_sft")}
    beside = {"win_rate_vs_sft": ("length_controlled_win_rate", "at equal length")}
    return Figure(
        "comparison",
        "Every policy on test prompts with 95 % intervals; hollow: win rate at equal length"
        + ("; grey ticks: each line" if len(found["seeds"]) > 1 else ""),
        f"Policies from the highest to the lowest {NAMES[found['axes'][0]]}: {_said(found, found['axes'][0])}",
        _dots(found, style, titles, half, beside=beside),
    )


def _scatter(
    style: Style, places: dict[str, tuple[Entry, Entry]], titles: tuple[str, str],
    size: tuple[int, int], under: Sequence[Rows] = (), scale: Scale = "linear",
) -> Any:  # fmt: skip
    """Policies in a plane, with intervals both ways and names at the right.

    places    policy -> (x, y), each a mean with its interval
    under     lines below the points: rows `policy, x, y`
    scale     of x
    """
    rows = [_entry(row, x, "x") | _entry(row, y, "y") for row, (x, y) in places.items()]
    drawn = [point for line in under for point in line]
    across = span(
        [row[k] for row in rows for k in ("x_low", "x_high")] + [point["x"] for point in drawn],
        scale,
    )
    up = span([row[k] for row in rows for k in ("y_low", "y_high")] + [point["y"] for point in drawn])
    x = axis("x", titles[0], across, large=scale == "log", scale=scale)
    y = axis("y", titles[1], up, alt.Y)
    base = alt.Chart(data(rows)).encode(color=style.colours, opacity=faded())
    layers = [
        alt.Chart(data(line)).mark_line(strokeWidth=1.2, strokeDash=[2, 3] if line[0]["policy"] is None else [1, 0])
        .encode(x=x, y=y, order="at:Q", color=alt.value(FAMILY_COLOURS["best_of_n"]) if line[0]["policy"] is None else style.colours, opacity=faded())
        for line in under
    ]  # fmt: skip
    layers += [
        base.mark_rule(strokeWidth=0.8).encode(x=x, x2="x_high:Q", y=y).transform_calculate(x="datum.x_low"),
        base.mark_rule(strokeWidth=0.8).encode(x=x, y=y, y2="y_high:Q").transform_calculate(y="datum.y_low"),
        base.mark_point(filled=True, size=60).encode(
            x=x, y=y, shape=style.shapes, tooltip=tooltip(policy="policy", x_said=titles[0], y_said=titles[1])
        ),
        *labels([{key: row[key] for key in ("policy", "x", "y")} for row in rows], x, y, size, style.colours),
    ]
    return alt.layer(*layers).properties(width=size[0], height=size[1])


def _thinned(points: list) -> list:
    """Some `CURVE` of a line's points, the last among them."""
    return [points[i] for i in sorted({*range(0, len(points), max(len(points) // CURVE, 1)), len(points) - 1})]


def _of_n(found: dict[str, Any], x: str, y: str) -> list[Rows]:
    """The curve of best-of-n over n as a line below the points of a scatter."""
    known = [r for r in found["best_of_n_wide"] if r[x]["mean"] is not None and r[y]["mean"] is not None]
    return [[{"policy": None, "x": r[x]["mean"], "y": r[y]["mean"], "at": r["n"]} for r in known]] if known else []


def _pairs(found: dict[str, Any], x: str, y: str) -> dict[str, tuple[Entry, Entry]]:
    both = {row: (m[x], m[y]) for row, m in found["methods"].items()}
    return {row: (a, b) for row, (a, b) in both.items() if a["mean"] is not None and b["mean"] is not None}


def two_axes(found: dict[str, Any], style: Style) -> Figure | None:
    """What the labels asked for against what they should have asked for."""
    if len(found["axes"]) < 2 or (found["asked"]["temperature"] is not None and not found["asked"]["tastes"]):
        return None  # one axis, or two of the same thing
    up, across = found["axes"]
    titles = (f"{NAMES[across]}: what they should have asked for", f"{NAMES[up]}: what the labels asked for")
    return Figure(
        "two_axes",
        "Two truths: what the labels asked for, and what they should have asked for, on test prompts with 95 % intervals; dotted: best of n, over n",
        f"Scatter of {NAMES[up]} against {NAMES[across]}. {NAMES[across].capitalize()}: {_said(found, across)}",
        _scatter(style, _pairs(found, across, up), titles, (620, 380), _of_n(found, across, up)),
    )


def frontier(found: dict[str, Any], style: Style) -> Figure:
    panels = []
    size = (315, 340) if len(found["axes"]) > 1 else (620, 380)
    for metric in found["axes"]:
        of_settings = [
            [{"policy": method, "x": p["kl"]["mean"], "y": p[metric]["mean"], "at": i} for i, p in enumerate(points)]
            for method, points in found["frontiers"].items()
        ]
        titles = ("KL(policy, SFT), nats per response, on a square-root scale", NAMES[metric])
        under = _of_n(found, "kl", metric) + of_settings
        panels.append(_scatter(style, _pairs(found, "kl", metric), titles, size, under, "sqrt"))
    return Figure(
        "frontier",
        "Reward against the distance from the SFT policy, on test prompts, each policy at its end; dotted: best of n, up to n = "
        f"{found['best_of_n_wide'][-1]['n']}"
        + (
            "; lines join several settings of one method"
            if found["frontiers"]
            else "; of each method one setting was run"
        ),
        f"Scatter of {NAMES[found['axes'][0]]} against KL. KL: {_said(found, 'kl')}",
        alt.hconcat(*panels, spacing=20),
    )


def overoptimisation(found: dict[str, Any], style: Style) -> Figure | None:
    """Rewards gained along each path, with the fitted laws: a row of panels for each family."""
    families = [f for f in ("rl", "preference", "imitation") if any(m in found["paths"] for m in style.of(f))]
    metrics = _known(found, ("reward", "utility", "gold"))
    if not families:
        return None
    # Every path starts at the SFT policy, but for one whose new control tokens mean nothing yet.
    starts = [points[0] for points in found["paths"].values() if abs(points[0]["kl"]["mean"] or 0.0) < 0.01]
    base = {metric: (starts[0][metric]["mean"] if starts else None) or 0.0 for metric in metrics}
    laws, lines = found["overoptimisation"], []
    for family in [*families, "best_of_n"]:
        paths = {m: found["paths"][m] for m in style.of(family) if m in found["paths"]}
        if family == "best_of_n":
            paths = {"best of n": found["best_of_n_path"]}
        panels: list[Any] = []
        for metric in metrics:
            points: Rows = []
            for method, path in paths.items():
                start = path[0][metric]["mean"] or 0.0 if family == "best_of_n" else base[metric]  # other prompts
                points += [
                    {"policy": None if family == "best_of_n" else method, "x": math.sqrt(max(p["kl"]["mean"] or 0.0, 0.0)), "y": p[metric]["mean"] - start}
                    for p in path if p[metric]["mean"] is not None
                ]  # fmt: skip
            known = {m: law for m in paths if (law := laws.get(m, {}).get(metric)) is not None}
            fitted = [
                {"policy": None if family == "best_of_n" else method, "x": d, "y": gain, "low": low, "high": high, "order": i}
                for method, law in known.items()
                for i, (d, gain, low, high) in enumerate(zip(*(_thinned(law["band"][key]) for key in ("d", "gain", "low", "high")), strict=True))
            ]  # fmt: skip
            domain = span([point["y"] for point in points])
            x, y = (
                axis("x", "√KL(policy, SFT)", span([p["x"] for p in points])),
                axis("y", f"{NAMES[metric]} gained", domain, alt.Y),
            )
            one = family == "best_of_n"
            colour = alt.value(FAMILY_COLOURS["best_of_n"]) if one else style.colours
            looks = {"color": colour, "opacity": faded()} | ({} if one else {"shape": style.shapes})
            layers = [
                alt.Chart(data(fitted)).mark_area(clip=True).encode(x=x, y=alt.Y("low:Q"), y2="high:Q", color=colour, detail="policy:N", opacity=faded(0.1)),
                alt.Chart(data(fitted)).mark_line(strokeWidth=1.2, clip=True).encode(
                    x=x, y=y, color=colour, opacity=faded(), detail="policy:N", order="order:Q", **({} if one else {"strokeDash": style.dashes})
                ),
                alt.Chart(data(points)).mark_point(filled=True, size=18).encode(x=x, y=y, tooltip=tooltip(policy="policy", x="√KL", y="gained"), **looks),
            ]  # fmt: skip
            if not one:
                ends = {point["policy"]: point for point in points}  # the last of each
                layers += labels(list(ends.values()), x, y, (182, 170), style.colours)
            panels.append(
                alt.layer(*layers).properties(width=182, height=170, title=FAMILY_NAMES[family] if not panels else "")
            )
        lines.append(alt.hconcat(*panels, spacing=8))
    meant = {
        "reward": "the reward model's, which was optimised",
        "utility": "utility, which labels were drawn from",
        "gold": "gold",
    }
    dots = "the watched points of training" + (", means over lines" if len(found["seeds"]) > 1 else "")
    peaks = [f"{m} at KL {law['gold']['peak_kl']:.2f}" for m, law in laws.items() if law.get("gold", {}).get("peak_kl") is not None]  # fmt: skip
    return Figure(
        "overoptimisation",
        f"What was gained along each path, on validation prompts: {'; '.join(meant[m] for m in metrics)}. Dots are {dots} (best of n: n), lines "
        "the fits of Gao et al. (2023) with 95 % bands, where there are three points to fit",
        f"Gain in {', '.join(NAMES[m] for m in metrics)} against the square root of KL."
        + (f" Gold peaks within reach: {', '.join(peaks) or 'none'}." if "gold" in metrics else ""),
        alt.vconcat(*lines, spacing=10),
    )


def compute(found: dict[str, Any], style: Style) -> Figure | None:
    judge = found["criterion"]
    if not found["paths"]:
        return None
    rows: Rows = []
    for method, points in found["paths"].items():
        spent = found["cost"][method]
        rows += [
            {
                "policy": method, "x": spent["upstream"]["flops"] + p["share"] * spent["own"]["flops"], "y": p[judge]["mean"], "at": p["share"],
                "said": spoken(p[judge]),
            }
            for p in points if p[judge]["mean"] is not None
        ]  # fmt: skip
    budgets = list(found["equal_compute"]["flops"].values())
    up = span([row["y"] for row in rows])
    x = axis(
        "x",
        "FLOPs spent, with all that the method needs before it starts",
        span([row["x"] for row in rows]),
        large=True,
    )
    y = axis("y", f"{NAMES[judge]} on validation prompts", up, alt.Y)
    base = alt.Chart(data(rows)).encode(x=x, y=y, color=style.colours, opacity=faded())
    ends = {row["policy"]: {key: row[key] for key in ("policy", "x", "y")} for row in rows}
    chart = alt.layer(
        rule(budgets),
        base.mark_line(strokeWidth=1.2).encode(strokeDash=style.dashes, order="at:Q"),
        base.mark_point(filled=True, size=22).encode(
            shape=style.shapes, tooltip=tooltip(policy="policy", x="FLOPs", said=NAMES[judge])
        ),
        *labels(list(ends.values()), x, y, (620, 380), style.colours),
    ).properties(width=620, height=380)
    return Figure(
        "compute",
        "What compute buys: every method starts where its pairs, reward model and pool are paid for; grey: budgets of the tables",
        f"{NAMES[judge].capitalize()} over training against estimated floating-point operations, one line per method.",
        chart,
    )


def cost(found: dict[str, Any], style: Style) -> Figure:
    judge = found["axes"][0]
    spent = {row: of["total"]["flops"] for row, of in found["cost"].items()}
    places: dict[str, tuple[Entry, Entry]] = {
        row: ({"mean": flops, "low": flops, "high": flops}, found["methods"][row][judge])
        for row, flops in spent.items()
        if found["methods"][row][judge]["mean"] is not None and flops > 0
    }
    return Figure(
        "cost",
        "Cost of training against quality on test prompts (best of n pays at every answer besides)",
        f"Total FLOPs: {', '.join(f'{row} {flops:.2g}' for row, flops in spent.items())}.",
        _scatter(style, places, ("FLOPs, upstream included", NAMES[judge]), (560, 340), scale="log"),
    )


def length(found: dict[str, Any], style: Style) -> Figure:
    pairs = found["biases"].get("pairs", {}).get("tokens")
    marks = {"tokens": [(pairs["chosen"], "line"), (pairs["rejected"], "dots")]} if pairs else None
    edges = found["length"]["edges"]
    names = [f"≤ {edge:g}" for edge in edges] + ([f"> {edges[-1]:g}"] if edges else ["all"])
    rows = [
        {"policy": row, "x": names[i], "at": i, "y": of["mean"]}
        for row, bins in found["length"]["methods"].items()
        for i, of in enumerate(bins)
        if of["mean"] is not None
    ]
    up = span([row["y"] for row in rows])
    x = alt.X(
        "x:N", sort=names, scale=alt.Scale(domain=names), title="tokens of the response", axis=alt.Axis(labelAngle=0)
    )
    y = axis("y", NAMES[found["judge"]], up, alt.Y)
    base = alt.Chart(data(rows)).encode(x=x, y=y, color=style.colours, opacity=faded(), order="at:Q")
    height = ROW_HEIGHT * len(found["methods"])
    ends = {row["policy"]: {"policy": row["policy"], "x": row["x"], "y": row["y"]} for row in rows}
    by_length = alt.layer(
        base.mark_line(strokeWidth=1).encode(strokeDash=style.dashes),
        base.mark_point(filled=True, size=22).encode(
            shape=style.shapes, tooltip=tooltip(policy="policy", x="tokens", y=NAMES[found["judge"]])
        ),
        *labels(list(ends.values()), x, y, (300, height), style.colours, leaders=False),
    ).properties(width=300, height=height)
    tokens = _dots(found, style, {"tokens": "tokens per response"}, marks).hconcat[0].properties(width=240)
    return Figure(
        "length",
        "Length: tokens per response"
        + (" (grey line: of chosen responses in the pairs, dotted: of rejected ones)" if pairs else "")
        + ", and reward by length (bins with fewer than 20 responses are left out)",
        f"Tokens per response: {_said(found, 'tokens', 1)}",
        alt.hconcat(tokens, by_length, spacing=20),
    )


def forgetting(found: dict[str, Any], style: Style) -> Figure | None:
    shown = _known(found, ("corpus_perplexity", "fact_recall"))
    if not shown:
        return None
    said = {"corpus_perplexity": "perplexity of held-out documents of the corpus", "fact_recall": "facts recalled"}
    titles = {metric: metric.replace("_", " ") for metric in shown}
    marks = {metric: [(found["methods"]["sft"][metric]["mean"], "line")] for metric in shown}
    return Figure(
        "forgetting",
        f"What is forgotten: {' and '.join(said[metric] for metric in shown)}; grey: the SFT policy",
        " ".join(f"{title.capitalize()}: {_said(found, metric)}" for metric, title in titles.items()),
        _dots(found, style, titles, marks, log=("corpus_perplexity",)),
    )


def diversity(found: dict[str, Any], style: Style) -> Figure:
    titles = {"entropy": "entropy, nats per response", "distinct_2": "distinct bigrams", "self_similarity": "self-similarity",
              "filler": "share with filler"}  # fmt: skip
    shown = {metric: titles[metric] for metric in _known(found, tuple(titles))}
    pairs = found["biases"].get("pairs", {}).get("filler")
    marks = {"filler": [(pairs["chosen"], "line"), (pairs["rejected"], "dots")]} if pairs else None
    return Figure(
        "diversity",
        "How varied responses are"
        + (
            ", and how the annotator's taste for filler is amplified (grey line: share among chosen responses, dotted: among rejected ones)"
            if pairs
            else ""
        ),
        f"Distinct bigrams: {_said(found, 'distinct_2')}"
        + (f" Share with filler: {_said(found, 'filler')}" if "filler" in shown else ""),
        _dots(found, style, shown, marks),
    )


def best_of_n(found: dict[str, Any], style: Style) -> Figure:
    curve = found["best_of_n"]
    wins = "preferred" if curve[0]["preferred"]["mean"] is not None else "win_rate_vs_sft"
    over_n = alt.X(
        "n:Q",
        title="n",
        scale=alt.Scale(type="log", base=2, nice=False),
        axis=alt.Axis(format="d", values=[row["n"] for row in curve], labelOverlap=True),
    )
    width, height = 190, 220
    looks = {"reward": ("#CC79A7", [1, 0]), "utility": ("#0072B2", [6, 3]), "gold": ("#000000", [2, 2])}
    gained = [
        {"name": NAMES[metric], "n": row["n"], "y": row[metric]["mean"] - curve[0][metric]["mean"], "said": spoken(row[metric]),
         "low": row[metric]["low"] - curve[0][metric]["mean"], "high": row[metric]["high"] - curve[0][metric]["mean"]}
        for metric in looks if curve[0]["n"] == 1 and curve[0][metric]["mean"] is not None
        for row in curve if row[metric]["mean"] is not None
    ]  # fmt: skip

    def panel(rows: Rows, title: str, colour, dash, bound: Sequence[dict[str, Any]] = ()) -> Any:
        domain = span([row[key] for row in rows for key in ("low", "high")] + [row["y"] for row in bound])
        base = alt.Chart(data(rows)).encode(x=over_n, color=colour)
        up = axis("y", title, domain, alt.Y)
        layers = [
            base.mark_area(opacity=0.15).encode(y=alt.Y("low:Q"), y2="high:Q", detail="name:N"),
            base.mark_line(strokeWidth=1.3).encode(y=up, strokeDash=dash, detail="name:N"),
            base.mark_point(filled=True, size=18).encode(y=up, tooltip=tooltip(name="", n="n", said=title)),
        ]
        if bound:
            under = alt.Chart(data(bound)).encode(x=over_n, y=up)
            layers.append(under.mark_line(strokeDash=[5, 3], strokeWidth=1, color="#000000"))
        ends = {
            row["name"]: {"policy": None, "name": row["name"], "x": row["n"], "y": row["y"]} for row in [*rows, *bound]
        }
        layers += labels(list(ends.values()), over_n, up, (width, height), alt.value("#404040"), leaders=False)
        return alt.layer(*layers).properties(width=width, height=height)

    colour = alt.Color("name:N", legend=None, scale=alt.Scale(domain=[NAMES[m] for m in looks], range=[c for c, _ in looks.values()]))  # fmt: skip
    dash = alt.StrokeDash("name:N", legend=None, scale=alt.Scale(domain=[NAMES[m] for m in looks], range=[d for _, d in looks.values()]))  # fmt: skip
    panels = [panel(gained, "gained over n = 1", colour, dash)] if gained else []
    titles = {wins: NAMES.get(wins, "wins against SFT"), "kl": "KL to SFT, nats"}
    bounds = {wins: lambda n: n / (n + 1), "kl": lambda n: math.log(n) - (n - 1) / n}
    for metric, title in titles.items():
        rows = [
            {"name": "best of n", "n": r["n"], "y": r[metric]["mean"], "low": r[metric]["low"], "high": r[metric]["high"], "said": spoken(r[metric])}
            for r in curve if r[metric]["mean"] is not None
        ]  # fmt: skip
        most = [{"name": "bound", "n": r["n"], "y": bounds[metric](r["n"])} for r in curve]
        panels.append(panel(rows, title, alt.value(FAMILY_COLOURS["best_of_n"]), alt.value([1, 0]), most))
    first = found["axes"][0]
    values = ", ".join(f"n = {row['n']}: {row[first]['mean']:.2f}" for row in curve if row[first]["mean"] is not None)
    return Figure(
        "best_of_n",
        f"Best of n without training, from one pool (unbiased order-statistic estimate), on the {found['deep_prompts']} test prompts "
        "that have the most samples: what it gains, how often it is chosen over SFT, and its KL",
        f"{NAMES[first].capitalize()}: {values}.",
        alt.hconcat(*panels, spacing=24),
    )


def training(learning: pd.DataFrame, style: Style) -> Figure | None:
    panels = [
        [("accuracy", "implicit-reward accuracy"), ("margin", "implicit-reward margin"), ("chosen_logp", "log π: chosen, and rejected (thin)")],
        [("score", "RM score of episodes"), ("entropy", "entropy per token"), ("kl_old_new", "KL(old, new) of an iteration")],
    ]  # fmt: skip
    if not len(learning):
        return None
    lines = [
        alt.hconcat(*(drawn for metric, title in row if (drawn := _learned(learning, metric, title, style)) is not None), spacing=8)
        for row in panels
        if any(learning[metric].notna().any() for metric, _ in row)
    ]  # fmt: skip
    if not lines:
        return None
    return Figure(
        "training",
        "Training curves (means, where there are several seeds): of methods that learn from preferences, accuracy, margin and log-probabilities of chosen "
        "and rejected responses; of RL, score, entropy and policy change",
        "Panels of training curves: for methods that learn from preferences, accuracy and margin of implicit rewards and log-probabilities of chosen and "
        "rejected responses; for RL, RM score, entropy and policy change per iteration.",
        alt.vconcat(*lines, spacing=10),
    )


def _learned(learning: pd.DataFrame, metric: str, title: str, style: Style) -> Any:
    """One metric over training, a line for each policy that has it."""
    rows: Rows = []
    thin: Rows = []
    ends: Rows = []
    for policy, curve in learning.groupby("policy", sort=False):
        if curve[metric].isna().all():
            continue
        of = [(metric, rows)] + ([("rejected_logp", thin)] if metric == "chosen_logp" else [])
        for name, into in of:
            smooth = pd.DataFrame(
                {"x": curve["share"], "y": curve[name].rolling(3, center=True, min_periods=1).mean()}
            ).dropna()
            into += [
                {"policy": policy, "x": float(x), "y": float(y)} for x, y in _thinned([*smooth.itertuples(index=False)])
            ]
        ends.append(rows[-1])
    if not rows:
        return None
    up = span([row["y"] for row in [*rows, *thin]])
    x, y = axis("x", "share of training", [0.0, 1.0]), axis("y", None, up, alt.Y)
    base = alt.Chart(data(rows)).encode(x=x, y=y, color=style.colours, opacity=faded())
    layers = [
        base.mark_line(strokeWidth=1.2).encode(
            strokeDash=style.dashes, tooltip=tooltip(policy="policy", x="share of training", y=title)
        )
    ]
    if thin:
        layers.append(
            alt.Chart(data(thin))
            .mark_line(strokeWidth=0.6)
            .encode(x=x, y=y, color=style.colours, strokeDash=style.dashes, opacity=faded())
        )
    return alt.layer(*layers, *labels(ends, x, y, (190, 190), style.colours)).properties(
        width=190, height=190, title=title
    )
