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
NAMES = {"gold": "gold reward", "reward": "RM reward"}


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
        comparison, frontier, overoptimisation, compute, cost, length, forgetting, diversity, best_of_n,
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
            entry["mean"], place + offset, xerr=[[max(entry["mean"] - entry["low"], 0)], [max(entry["high"] - entry["mean"], 0)]],
            fmt=style.marker(row), markersize=5, color=style.colour(row), capsize=2,
            markerfacecolor="white" if hollow else style.colour(row),
        )  # fmt: skip


def _rows(found: dict[str, Any]) -> list[tuple[str, dict]]:
    """Rows from best to worst by the judge."""
    judge = found["judge"]
    rows = list(found["methods"].items())
    return sorted(
        rows, key=lambda item: -np.inf if item[1][judge]["mean"] is None else item[1][judge]["mean"], reverse=True
    )


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
    shown = [m for m in ("gold", "reward", "win_rate_vs_sft") if _has(found, m)]
    figure, axes = plt.subplots(
        1,
        len(shown),
        figsize=(3.6 * len(shown) + 1, 0.27 * len(rows) + 1.3),
        sharey=True,
        squeeze=False,
        layout="constrained",
    )
    for axis, metric in zip(axes[0], shown, strict=True):
        if metric == found["judge"]:
            for place, (row, _) in enumerate(rows):
                values = [run[metric] for run in found["runs"][row].values() if metric in run]
                if len(values) > 1:
                    axis.plot(values, [place + 0.28] * len(values), "|", color="grey", markersize=5)
        _points(axis, rows, style, metric)
        axis.set_xlabel(NAMES.get(metric, "win rate against SFT"))
    if "win_rate_vs_sft" in shown:
        _points(axes[0][-1], rows, style, "length_controlled_win_rate", offset=0.28, hollow=True)
        axes[0][-1].axvline(0.5, color="grey", linewidth=0.8)
    _name_rows(axes[0][0], rows)
    several = len(found["seeds"]) > 1
    return Figure(
        "comparison",
        "Every policy on test prompts with 95 % intervals; hollow: win rate at equal length"
        + ("; grey ticks: each seed" if several else ""),
        f"Policies from best to worst by {NAMES[found['judge']]}: {_spoken(found, found['judge'])}",
        figure,
    )


def frontier(plt, found: dict[str, Any], style: Style) -> Figure:
    judge = found["judge"]
    figure, axis = plt.subplots(figsize=(7.2, 4.8), layout="constrained")
    curve = found["best_of_n_wide"]
    axis.plot([r["kl"]["mean"] for r in curve], [r[judge]["mean"] for r in curve], ":", color=FAMILY_COLOURS["best_of_n"],
              label="best of n, over n")  # fmt: skip
    for row, metrics in _rows(found):
        x, y = metrics["kl"], metrics[judge]
        if x["mean"] is None or y["mean"] is None:
            continue
        axis.errorbar(
            x["mean"], y["mean"],
            xerr=[[max(x["mean"] - x["low"], 0)], [max(x["high"] - x["mean"], 0)]],
            yerr=[[max(y["mean"] - y["low"], 0)], [max(y["high"] - y["mean"], 0)]],
            fmt=style.marker(row), color=style.colour(row), markersize=6, elinewidth=0.8, label=row,
        )  # fmt: skip
    axis.set_xlabel("KL(policy, SFT) in nats per response")
    axis.set_ylabel(NAMES[judge])
    axis.legend(loc="center left", bbox_to_anchor=(1.0, 0.5))
    return Figure(
        "frontier",
        f"{NAMES[judge].capitalize()} against the distance from the SFT policy, on test prompts; dotted: best of n, up to n = "
        f"{curve[-1]['n']}. KL is what the RL objective pays for, not a fair axis: see the three comparisons",
        f"Scatter of {NAMES[judge]} against KL. KL: {_spoken(found, 'kl')}",
        figure,
    )


def overoptimisation(plt, found: dict[str, Any], style: Style) -> Figure | None:
    families = [f for f in ("rl", "preference", "imitation") if any(m in found["paths"] for m in style.of(f))]
    metrics = [m for m in ("gold", "reward") if _has(found, m)]
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
        "Over-optimisation on validation prompts: dots are the watched points of training, lines the fits of Gao et al. "
        "(2023) with 95 % bands, thin verticals where a fit peaks",
        "Gain in gold and in RM reward against the square root of KL. Gold peaks within reach: "
        + (", ".join(peaks) or "none")
        + ".",
        figure,
    )


def compute(plt, found: dict[str, Any], style: Style) -> Figure | None:
    judge = found["judge"]
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
        "What compute buys: every method starts where its pairs, reward model and pool are paid for; grey: budgets of the table",
        f"{NAMES[judge].capitalize()} over training against estimated floating-point operations, one line per method.",
        figure,
    )


def cost(plt, found: dict[str, Any], style: Style) -> Figure:
    judge = found["judge"]
    figure, axis = plt.subplots(figsize=(6.4, 4.2), layout="constrained")
    for row, spent in found["cost"].items():
        entry = found["methods"][row][judge]
        if entry["mean"] is None:
            continue
        axis.errorbar(
            spent["total"]["flops"], entry["mean"], yerr=[[max(entry["mean"] - entry["low"], 0)], [max(entry["high"] - entry["mean"], 0)]],
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
    judge = found["judge"]
    n = np.array([row["n"] for row in curve])
    panels = [
        (judge, f"{NAMES[judge]} of the best of n"),
        ("win_rate_vs_sft", "win rate against SFT"),
        ("kl", "KL to SFT, nats"),
    ]
    limits = {"win_rate_vs_sft": n / (n + 1), "kl": np.log(n) - (n - 1) / n}
    figure, axes = plt.subplots(1, 3, figsize=(9.6, 3.2), layout="constrained")
    colour = FAMILY_COLOURS["best_of_n"]
    for axis, (metric, title) in zip(axes, panels, strict=True):
        known = [i for i, row in enumerate(curve) if row[metric]["mean"] is not None]
        low, mean, high = (np.array([curve[i][metric][key] for i in known]) for key in ("low", "mean", "high"))
        axis.fill_between(n[known], low, high, alpha=0.25, color=colour)
        axis.plot(n[known], mean, marker="o", markersize=3, color=colour)
        if metric in limits:
            axis.plot(n, limits[metric], "k--", label="bound")
            axis.legend()
        axis.set_xscale("log", base=2)
        axis.set_xlabel("n")
        axis.set_title(title)
    values = ", ".join(f"n = {row['n']}: {row[judge]['mean']:.2f}" for row in curve if row[judge]["mean"] is not None)
    return Figure("best_of_n", f"Best of n without training, from one pool (unbiased order-statistic estimate), on the {found['deep_prompts']} test prompts "
        "that have the most samples",
                  f"{NAMES[judge].capitalize()}: {values}.", figure)  # fmt: skip


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
