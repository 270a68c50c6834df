"""The figures of the report. Every policy has a colour of its family and a marker of its own, so that none hangs on colour."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

# Okabe and Ito 2008, told apart in all common kinds of colour-blindness.
FAMILY_COLOURS = {
    "sft": "#000000",
    "rl": "#0072B2",
    "preference": "#D55E00",
    "imitation": "#009E73",
    "best_of_n": "#CC79A7",
}
FAMILY_NAMES = {
    "sft": "SFT",
    "rl": "RL",
    "preference": "DPO family",
    "imitation": "imitation",
    "best_of_n": "best of n",
}
MARKERS = "osD^vP*Xh<>"
LINES = ["-", "--", "-.", ":", (0, (5, 1)), (0, (3, 1, 1, 1, 1, 1))]
NAMES = {
    "preferred": "share preferred to SFT",
    "gold": "gold reward",
    "utility": "utility",
    "objective": "objective",
    "reward": "RM reward",
}


class Figure(NamedTuple):
    """A drawn figure: what it shows in a sentence, and what a reader who cannot see it should know."""

    name: str
    caption: str
    alt: str
    drawn: Any


class Style:
    """Colour, marker and line of every row."""

    def __init__(self, found: dict[str, Any]):
        self.families = found["families"]
        count: dict[str, int] = {}
        self.number = {}
        for row, family in self.families.items():
            self.number[row] = count.get(family, 0)
            count[family] = self.number[row] + 1

    def colour(self, row: str) -> str:
        return FAMILY_COLOURS[self.families.get(row, "best_of_n")]

    def marker(self, row: str) -> str:
        return MARKERS[self.number.get(row, 0) % len(MARKERS)]

    def line(self, row: str):
        return LINES[self.number.get(row, 0) % len(LINES)]

    def of(self, family: str) -> list[str]:
        return [row for row, its in self.families.items() if its == family]


def draw(found: dict[str, Any], learning: pd.DataFrame) -> list[Figure]:
    """All figures that the results can fill."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    plt.rcParams.update(
        {
            "figure.dpi": 110, "axes.grid": True, "grid.alpha": 0.3, "axes.spines.top": False, "axes.spines.right": False,
            "svg.hashsalt": "rlhf-vs-dpo", "svg.fonttype": "none", "figure.max_open_warning": 0, "font.size": 9, "legend.fontsize": 7.5,
        }
    )  # fmt: skip
    style = Style(found)
    makers: list[Callable] = [
        comparison, two_axes, frontier, overoptimisation, compute, cost, length, forgetting, diversity, best_of_n,
    ]  # fmt: skip
    figures = [figure for maker in makers if (figure := maker(plt, found, style)) is not None]
    if (trained := training(plt, learning, style)) is not None:
        figures.append(trained)
    return figures


def save(figures: list[Figure], folder: Path) -> list[Path]:
    """Write each as PNG, for Markdown and MLflow; figures stay open."""
    folder.mkdir()
    paths = []
    for figure in figures:
        path = folder / f"{figure.name}.png"
        figure.drawn.savefig(path, metadata={"Software": None})
        paths.append(path)
    return paths


def _points(
    axis, rows: list[tuple[str, dict]], style: Style, metric: str, offset: float = 0.0, hollow: bool = False
) -> None:
    for place, (row, metrics) in enumerate(rows):
        entry = metrics[metric]
        if entry["mean"] is None:  # a policy of which no response ever ended has no reward
            continue
        axis.errorbar(
            entry["mean"], place + offset, xerr=_error(entry),
            fmt=style.marker(row), markersize=5, color=style.colour(row), capsize=2,
            markerfacecolor="white" if hollow else style.colour(row),
        )  # fmt: skip


def _rows(found: dict[str, Any]) -> list[tuple[str, dict]]:
    """Rows from the highest to the lowest on the first axis."""
    first = found["axes"][0]
    rows = list(found["methods"].items())
    return sorted(
        rows, key=lambda item: -np.inf if item[1][first]["mean"] is None else item[1][first]["mean"], reverse=True
    )


def _error(entry: dict[str, float]) -> list[list[float]]:
    """Distances of an interval's ends from its mean, as `errorbar` wants them."""
    return [[max(entry["mean"] - entry["low"], 0)], [max(entry["high"] - entry["mean"], 0)]]


def _name_rows(axis, rows: list) -> None:
    axis.set_yticks(range(len(rows)), [row for row, _ in rows])
    axis.invert_yaxis()


def _has(found: dict[str, Any], metric: str) -> bool:
    return any(row[metric]["mean"] is not None for row in found["methods"].values())


def _spoken(found: dict[str, Any], metric: str, digits: int = 2) -> str:
    """The numbers of a metric, in the order of the rows, for those who cannot see them."""
    parts = [
        f"{row} {metrics[metric]['mean']:.{digits}f}"
        for row, metrics in _rows(found)
        if metrics[metric]["mean"] is not None
    ]
    return ", ".join(parts) + "."


def comparison(plt, found: dict[str, Any], style: Style) -> Figure:
    rows = _rows(found)
    shown = [m for m in ("preferred", "gold", "reward", "win_rate_vs_sft") if _has(found, m)]
    figure, axes = plt.subplots(
        1,
        len(shown),
        figsize=(2.9 * len(shown) + 1, 0.27 * len(rows) + 1.3),
        sharey=True,
        squeeze=False,
        layout="constrained",
    )
    for axis, metric in zip(axes[0], shown, strict=True):
        if metric in found["axes"]:
            for place, (row, _) in enumerate(rows):
                values = [run[metric] for run in found["runs"][row].values() if metric in run]
                if len(values) > 1:
                    axis.plot(values, [place + 0.28] * len(values), "|", color="grey", markersize=5)
        _points(axis, rows, style, metric)
        axis.set_xlabel(NAMES.get(metric, f"wins against SFT by {found['judge']}"))
        if metric == "preferred":
            axis.axvline(0.5, color="grey", linewidth=0.8)
    if "win_rate_vs_sft" in shown:
        _points(axes[0][-1], rows, style, "length_controlled_win_rate", offset=0.28, hollow=True)
        axes[0][-1].axvline(0.5, color="grey", linewidth=0.8)
    _name_rows(axes[0][0], rows)
    several = len(found["seeds"]) > 1
    return Figure(
        "comparison",
        "Every policy on test prompts with 95 % intervals; hollow: win rate at equal length"
        + ("; grey ticks: each line" if several else ""),
        f"Policies from the highest to the lowest {NAMES[found['axes'][0]]}: {_spoken(found, found['axes'][0])}",
        figure,
    )


def two_axes(plt, found: dict[str, Any], style: Style) -> Figure | None:
    """What the labels asked for against what they should have asked for."""
    if len(found["axes"]) < 2:
        return None
    across, up = reversed(found["axes"])
    figure, axis = plt.subplots(figsize=(7.2, 4.8), layout="constrained")
    curve = found["best_of_n_wide"]
    axis.plot([r[across]["mean"] for r in curve], [r[up]["mean"] for r in curve], ":", color=FAMILY_COLOURS["best_of_n"],
              label="best of n, over n")  # fmt: skip
    for row, metrics in _rows(found):
        x, y = metrics[across], metrics[up]
        if x["mean"] is not None and y["mean"] is not None:
            axis.errorbar(
                x["mean"], y["mean"], xerr=_error(x), yerr=_error(y), fmt=style.marker(row), color=style.colour(row), markersize=6,
                elinewidth=0.8, label=row,
            )  # fmt: skip
    axis.set_xlabel(f"{NAMES[across]}: what they should have asked for")
    axis.set_ylabel(f"{NAMES[up]}: what the labels asked for")
    axis.legend(loc="center left", bbox_to_anchor=(1.0, 0.5))
    return Figure(
        "two_axes",
        "Two truths: what the labels asked for, and what they should have asked for, on test prompts with 95 % intervals",
        f"Scatter of {NAMES[up]} against {NAMES[across]}. {NAMES[across].capitalize()}: {_spoken(found, across)}",
        figure,
    )


def frontier(plt, found: dict[str, Any], style: Style) -> Figure:
    axes_shown = found["axes"]
    figure, axes = plt.subplots(
        1, len(axes_shown), figsize=(4.4 * len(axes_shown) + 1.8, 4.4), squeeze=False, layout="constrained"
    )
    curve = found["best_of_n_wide"]
    for axis, metric in zip(axes[0], axes_shown, strict=True):
        known = [r for r in curve if r[metric]["mean"] is not None]
        if known:
            axis.plot([r["kl"]["mean"] for r in known], [r[metric]["mean"] for r in known], ":",
                      color=FAMILY_COLOURS["best_of_n"], label="best of n, over n")  # fmt: skip
        for method, points in found["frontiers"].items():
            axis.plot([p["kl"]["mean"] for p in points], [p[metric]["mean"] for p in points], linewidth=0.9,
                      color=style.colour(method), linestyle=style.line(method), label=f"settings of {method}")  # fmt: skip
        for row, metrics in _rows(found):
            x, y = metrics["kl"], metrics[metric]
            if x["mean"] is None or y["mean"] is None:
                continue
            axis.errorbar(
                x["mean"], y["mean"], xerr=_error(x), yerr=_error(y), fmt=style.marker(row), color=style.colour(row), markersize=6,
                elinewidth=0.8, label=row,
            )  # fmt: skip
        axis.set_xlabel("KL(policy, SFT) in nats per response")
        axis.set_ylabel(NAMES[metric])
    axes[0][-1].legend(loc="center left", bbox_to_anchor=(1.0, 0.5))
    return Figure(
        "frontier",
        "Reward against the distance from the SFT policy, on test prompts, each policy at its end; dotted: best of n, up to n = "
        f"{curve[-1]['n']}"
        + (
            "; lines join several settings of one method"
            if found["frontiers"]
            else "; of each method one setting was run"
        ),
        f"Scatter of {NAMES[axes_shown[0]]} against KL. KL: {_spoken(found, 'kl')}",
        figure,
    )


def overoptimisation(plt, found: dict[str, Any], style: Style) -> Figure | None:
    families = [f for f in ("rl", "preference", "imitation") if any(m in found["paths"] for m in style.of(f))]
    metrics = [m for m in ("reward", "utility", "gold") if _has(found, m)]
    if not families:
        return None
    panels = [*families, "best_of_n"]
    figure, axes = plt.subplots(
        len(metrics),
        len(panels),
        figsize=(3.1 * len(panels), 2.9 * len(metrics)),
        sharey="row",
        squeeze=False,
        layout="constrained",
    )
    laws = found["overoptimisation"]
    # Every path starts at the SFT policy, but for one whose new control tokens mean nothing yet.
    starts = [points[0] for points in found["paths"].values() if abs(points[0]["kl"]["mean"] or 0.0) < 0.01]
    base = {metric: starts[0][metric]["mean"] if starts else None for metric in metrics}
    for row, metric in enumerate(metrics):
        for column, family in enumerate(panels):
            axis = axes[row][column]
            walked = {m: found["paths"][m] for m in style.of(family) if m in found["paths"]}
            if family == "best_of_n":
                walked = {"best of n": found["best_of_n_path"]}
            for method, points in walked.items():
                x = [np.sqrt(max(p["kl"]["mean"] or 0.0, 0.0)) for p in points]
                start = base[metric] if family != "best_of_n" else points[0][metric]["mean"]  # other prompts
                y = [np.nan if p[metric]["mean"] is None else p[metric]["mean"] - (start or 0.0) for p in points]
                axis.plot(x, y, style.marker(method), color=style.colour(method), markersize=3.5, label=method)
                law = laws.get(method, {}).get(metric)
                if law is not None:
                    band = law["band"]
                    axis.plot(
                        band["d"], band["gain"], color=style.colour(method), linestyle=style.line(method), linewidth=1
                    )
                    axis.fill_between(
                        band["d"], band["low"], band["high"], color=style.colour(method), alpha=0.1, linewidth=0
                    )
                    if law["peak_kl"] is not None:
                        axis.axvline(np.sqrt(law["peak_kl"]), color=style.colour(method), linewidth=0.5, alpha=0.6)
            if row == 0:
                axis.set_title(FAMILY_NAMES[family])
                if axis.get_legend_handles_labels()[0]:
                    axis.legend()
            axis.set_xlabel("√KL(policy, SFT)")
        axes[row][0].set_ylabel(f"{NAMES[metric]} gained")
    peaks = [
        f"{m} at KL {law['gold']['peak_kl']:.2f}"
        for m, law in laws.items()
        if law.get("gold", {}).get("peak_kl") is not None
    ]
    return Figure(
        "overoptimisation",
        "Three rewards along each path, on validation prompts: the reward model's, which was optimised; utility, which labels were drawn "
        "from; and gold. Dots are the watched points of one run of training (best of n: n), lines the fits of Gao et al. (2023) with 95 % bands, thin "
        "verticals where a fit peaks",
        "Gain in RM reward, utility and gold against the square root of KL. Gold peaks within reach: "
        + (", ".join(peaks) or "none")
        + ".",
        figure,
    )


def compute(plt, found: dict[str, Any], style: Style) -> Figure | None:
    judge = found["criterion"]
    if not found["paths"]:
        return None
    figure, axis = plt.subplots(figsize=(7.2, 4.2), layout="constrained")
    for method, points in found["paths"].items():
        spent = found["cost"][method]
        x = [spent["upstream"]["flops"] + p["share"] * spent["own"]["flops"] for p in points]
        axis.plot(x, [p[judge]["mean"] for p in points], linestyle=style.line(method), marker=style.marker(method),
                  markersize=3, color=style.colour(method), linewidth=1, label=method)  # fmt: skip
    for value in found["equal_compute"]["flops"].values():
        axis.axvline(value, color="grey", linewidth=0.6)
    axis.set_xlabel("FLOPs spent, with all that the method needs before it starts")
    axis.set_ylabel(f"{NAMES[judge]} on validation prompts")
    axis.legend(loc="center left", bbox_to_anchor=(1.0, 0.5))
    return Figure(
        "compute",
        "What compute buys: every method starts where its pairs, reward model and pool are paid for; grey: budgets of the tables",
        f"{NAMES[judge].capitalize()} over training against estimated floating-point operations, one line per method.",
        figure,
    )


def cost(plt, found: dict[str, Any], style: Style) -> Figure:
    judge = found["axes"][0]
    figure, axis = plt.subplots(figsize=(6.4, 4.2), layout="constrained")
    for row, spent in found["cost"].items():
        entry = found["methods"][row][judge]
        if entry["mean"] is None:
            continue
        axis.errorbar(
            spent["total"]["flops"], entry["mean"], yerr=_error(entry),
            fmt=style.marker(row), color=style.colour(row), markersize=6, elinewidth=0.8, label=row,
        )  # fmt: skip
    axis.set_xscale("log")
    axis.set_xlabel("FLOPs, upstream included")
    axis.set_ylabel(NAMES[judge])
    axis.legend(loc="center left", bbox_to_anchor=(1.0, 0.5))
    parts = ", ".join(f"{row} {spent['total']['flops']:.2g}" for row, spent in found["cost"].items())
    return Figure(
        "cost",
        "Cost of training against quality on test prompts (best of n pays at every answer besides)",
        f"Total FLOPs: {parts}.",
        figure,
    )


def length(plt, found: dict[str, Any], style: Style) -> Figure:
    rows = _rows(found)
    figure, axes = plt.subplots(1, 2, figsize=(9.6, 0.24 * len(rows) + 1.4), layout="constrained")
    _points(axes[0], rows, style, "tokens")
    _name_rows(axes[0], rows)
    axes[0].set_xlabel("tokens per response")
    if "tokens" in found["biases"].get("pairs", {}):
        for side, line in (("chosen", "-"), ("rejected", ":")):
            axes[0].axvline(
                found["biases"]["pairs"]["tokens"][side],
                color="grey",
                linestyle=line,
                linewidth=1,
                label=f"{side} in the pairs",
            )
        axes[0].legend()
    edges = found["length"]["edges"]
    names = [f"≤ {edge:g}" for edge in edges] + ([f"> {edges[-1]:g}"] if edges else ["all"])
    for row, bins in found["length"]["methods"].items():
        means = [np.nan if b["mean"] is None else b["mean"] for b in bins]
        axes[1].plot(range(len(bins)), means, linestyle=style.line(row), marker=style.marker(row), markersize=3.5,
                     linewidth=1, color=style.colour(row))  # fmt: skip
    axes[1].set_xticks(range(len(names)), names)
    axes[1].set_xlabel("tokens of the response")
    axes[1].set_ylabel(NAMES[found["judge"]])
    return Figure(
        "length",
        "Length: tokens per response"
        + (", beside those of the preference data," if "tokens" in found["biases"].get("pairs", {}) else "")
        + " and reward by length (markers as on the left; bins with fewer than 20 responses are left out)",
        f"Tokens per response: {_spoken(found, 'tokens', 1)}",
        figure,
    )


def forgetting(plt, found: dict[str, Any], style: Style) -> Figure | None:
    shown = [m for m in ("corpus_perplexity", "fact_recall") if _has(found, m)]
    if not shown:
        return None
    rows = [(row, metrics) for row, metrics in _rows(found) if metrics["corpus_perplexity"]["mean"] is not None]
    figure, axes = plt.subplots(1, len(shown), figsize=(4.2 * len(shown) + 1, 0.25 * len(rows) + 1.3), sharey=True, squeeze=False,
                                layout="constrained")  # fmt: skip
    for axis, metric in zip(axes[0], shown, strict=True):
        _points(axis, rows, style, metric)
        axis.set_xlabel(metric.replace("_", " "))
        axis.axvline(found["methods"]["sft"][metric]["mean"], color="grey", linewidth=0.8)
        if metric == "corpus_perplexity":
            axis.set_xscale("log")
    _name_rows(axes[0][0], rows)
    return Figure(
        "forgetting",
        "What is forgotten of pretraining: perplexity of held-out corpus, and facts recalled; grey: the SFT policy",
        " ".join(f"{metric.replace('_', ' ').capitalize()}: {_spoken(found, metric)}" for metric in shown),
        figure,
    )


def diversity(plt, found: dict[str, Any], style: Style) -> Figure:
    rows = [(row, metrics) for row, metrics in _rows(found) if metrics["distinct_2"]["mean"] is not None]
    shown = [m for m in ("entropy", "distinct_2", "self_similarity", "filler") if _has(found, m)]
    names = {"entropy": "entropy, nats per response", "distinct_2": "distinct bigrams", "self_similarity": "self-similarity",
             "filler": "share with filler"}  # fmt: skip
    figure, axes = plt.subplots(1, len(shown), figsize=(2.7 * len(shown) + 1, 0.25 * len(rows) + 1.3), sharey=True, squeeze=False,
                                layout="constrained")  # fmt: skip
    for axis, metric in zip(axes[0], shown, strict=True):
        _points(axis, rows, style, metric)
        axis.set_xlabel(names[metric])
        if metric == "filler" and "filler" in found["biases"].get("pairs", {}):
            for side, line in (("chosen", "-"), ("rejected", ":")):
                axis.axvline(found["biases"]["pairs"]["filler"][side], color="grey", linestyle=line, linewidth=1)
    _name_rows(axes[0][0], rows)
    return Figure(
        "diversity",
        "How varied answers to one prompt are"
        + (
            ", and how the annotator's taste for filler is amplified (grey line: share among chosen responses, dotted: among "
            "rejected ones)"
            if "filler" in found["biases"].get("pairs", {})
            else ""
        ),
        f"Distinct bigrams: {_spoken(found, 'distinct_2')}"
        + (f" Share with filler: {_spoken(found, 'filler')}" if "filler" in shown else ""),
        figure,
    )


def best_of_n(plt, found: dict[str, Any], style: Style) -> Figure:
    curve = found["best_of_n"]
    n = np.array([row["n"] for row in curve])
    wins = next(
        axis
        for axis in ("preferred", "win_rate_vs_sft")
        if axis == "win_rate_vs_sft" or curve[0][axis]["mean"] is not None
    )
    bound = {wins: n / (n + 1), "kl": np.log(n) - (n - 1) / n}
    figure, axes = plt.subplots(1, 3, figsize=(9.6, 3.4), layout="constrained")
    for metric, line, colour in (("reward", "-", "#CC79A7"), ("utility", "--", "#0072B2"), ("gold", ":", "#000000")):
        if (known := [row for row in curve if row[metric]["mean"] is not None]) and known[0]["n"] == 1:
            gained = np.array([row[metric]["mean"] for row in known]) - known[0][metric]["mean"]
            low, high = (
                np.array([row[metric][end] for row in known]) - known[0][metric]["mean"] for end in ("low", "high")
            )
            axes[0].fill_between([row["n"] for row in known], low, high, alpha=0.12, color=colour, linewidth=0)
            axes[0].plot(
                [row["n"] for row in known], gained, line, marker="o", markersize=3, color=colour, label=NAMES[metric]
            )
    axes[0].set_title("gained over n = 1")
    axes[0].legend()
    titles = {wins: NAMES.get(wins, "wins against SFT"), "kl": "KL to SFT, nats"}
    for axis, metric in zip(axes[1:], (wins, "kl"), strict=True):
        known = [i for i, row in enumerate(curve) if row[metric]["mean"] is not None]
        low, mean, high = (np.array([curve[i][metric][key] for i in known]) for key in ("low", "mean", "high"))
        axis.fill_between(n[known], low, high, alpha=0.25, color=FAMILY_COLOURS["best_of_n"])
        axis.plot(n[known], mean, marker="o", markersize=3, color=FAMILY_COLOURS["best_of_n"])
        axis.plot(n, bound[metric], "k--", label="bound")
        axis.legend()
        axis.set_title(titles[metric])
    for axis in axes:
        axis.set_xscale("log", base=2)
        axis.set_xlabel("n")
    first = found["axes"][0]
    values = ", ".join(f"n = {row['n']}: {row[first]['mean']:.2f}" for row in curve if row[first]["mean"] is not None)
    return Figure("best_of_n", f"Best of n without training, from one pool (unbiased order-statistic estimate), on the {found['deep_prompts']} test prompts "
        "that have the most samples: three rewards, how often it is chosen over SFT, and its KL",
                  f"{NAMES[first].capitalize()}: {values}.", figure)  # fmt: skip


def training(plt, learning: pd.DataFrame, style: Style) -> Figure | None:
    panels = [
        ("accuracy", "implicit-reward accuracy"), ("margin", "implicit-reward margin"),
        ("chosen_logp", "log π: chosen (marked), rejected (thin)"), ("score", "RM score of episodes"),
        ("entropy", "entropy per token of episodes"), ("kl_old_new", "KL(old, new) of an iteration"),
    ]  # fmt: skip
    if not len(learning):
        return None
    figure, axes = plt.subplots(2, 3, figsize=(10.5, 5.8), layout="constrained")
    for axis, (metric, title) in zip(axes.flat, panels, strict=True):
        for policy, curve in learning.groupby("policy", sort=False):
            if curve[metric].notna().any():
                every = max(len(curve) // 8, 1)
                smooth = curve[metric].rolling(3, center=True, min_periods=1).mean()
                axis.plot(curve["share"], smooth, color=style.colour(policy), linestyle=style.line(policy), linewidth=1,
                          marker=style.marker(policy), markevery=every, markersize=3.5, label=policy)  # fmt: skip
                if metric == "chosen_logp":
                    axis.plot(curve["share"], curve["rejected_logp"].rolling(3, center=True, min_periods=1).mean(),
                              color=style.colour(policy), linestyle=style.line(policy), linewidth=0.6)  # fmt: skip
        axis.set_title(title)
        axis.set_xlabel("share of training")
        if axis.lines:
            axis.legend()
    return Figure(
        "training",
        "Training curves (means, where there are several seeds): the DPO family above (and the log-probabilities of chosen and rejected responses), "
        "the RL family below",
        "Six panels of training curves: accuracy and margin of implicit rewards, log-probabilities of chosen and rejected "
        "responses, RM score, entropy and policy change per iteration.",
        figure,
    )
