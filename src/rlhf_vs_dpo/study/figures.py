"""The four figures of the study. Families have a panel each, so that a handful of lines share one; methods are told apart by marker, too."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pandas as pd

from rlhf_vs_dpo.config import FAMILIES
from rlhf_vs_dpo.report.figures import FAMILY_COLOURS, FAMILY_NAMES, MARKERS, NAMES
from rlhf_vs_dpo.study import search

# What a trial is plotted as, by how it ended: one that diverged has no place of its own and lies at the start.
OUTCOMES = {"finished": "o", "collapsed": "x", "diverged": "v"}


def draw(
    trials: pd.DataFrame,
    families: dict[str, str],
    start: dict[str, float],
    criterion: str,
    upstream: dict[str, float],
    folder: Path,
) -> list[Path]:
    """Write all figures as PNG.

    trials      of all methods, a `trials` table
    families    method -> its family
    start       what the SFT policy of the line is worth, by metric
    upstream    method -> FLOPs of the stages that it needs before its first trial
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    study = _Study(plt, trials, families, start, criterion, upstream)
    made = {
        "expected_best": study.expected_best,
        "trials": study.strips,
        "frontier": study.frontier,
        "compute": study.compute,
    }
    paths = []
    for name, make in made.items():
        figure = make()
        paths.append(folder / f"{name}.png")
        figure.savefig(paths[-1], dpi=110, bbox_inches="tight", metadata={"Software": None})
        plt.close(figure)
    return paths


class _Study:
    def __init__(self, plt, trials, families, start, criterion, upstream):
        self.plt, self.trials, self.start, self.criterion, self.upstream = plt, trials, start, criterion, upstream
        self.most = int(trials.groupby("method")["trial"].max().min())
        known = list(dict.fromkeys(trials["method"]))
        self.families = {family: [method for method in known if families[method] == family] for family in FAMILIES}
        self.families = {family: methods for family, methods in self.families.items() if methods}

    def of(self, method: str) -> pd.DataFrame:
        return self.trials[self.trials["method"] == method]

    def values(self, method: str) -> np.ndarray:
        return search.values(self.of(method), self.criterion, self.start[self.criterion])

    def panels(self):
        """A figure with a panel for each family: (figure, [(axis, methods with their looks)])."""
        figure, axes = self.plt.subplots(
            1, len(self.families), figsize=(4.2 * len(self.families), 3.6), sharey=True, squeeze=False, layout="constrained"
        )  # fmt: skip
        for axis, family in zip(axes[0], self.families, strict=True):
            axis.set_title(FAMILY_NAMES[family], color=FAMILY_COLOURS[family])
            axis.grid(alpha=0.3)
            axis.spines[["top", "right"]].set_visible(False)
        axes[0][0].set_ylabel(f"{NAMES[self.criterion]}, expected best")
        return figure, [(axis, self.looks(*item)) for axis, item in zip(axes[0], self.families.items(), strict=True)]

    def looks(self, family: str, methods: list[str]) -> Iterator[tuple[str, str, str]]:
        return zip(methods, shades(FAMILY_COLOURS[family], len(methods)), MARKERS, strict=False)

    def expected_best(self):
        """What the best of k trials is to be expected to be worth."""
        k = np.arange(1, self.most + 1)
        figure, panels = self.panels()
        for axis, methods in panels:
            ends = []
            for number, (method, colour, marker) in enumerate(methods):
                values = self.values(method)
                low, high = search.interval(values, self.most, number)
                line = search.expected_best(values, self.most)
                axis.fill_between(k, low, high, color=colour, alpha=0.1, linewidth=0)
                axis.plot(k, line, color=colour, marker=marker, markersize=4)
                ends.append((line[-1], method, colour))
            label_ends(axis, k[-1], ends)
            axis.set_xscale("log", base=2)
            axis.set_xticks(powers(self.most), [str(n) for n in powers(self.most)])
            axis.set_xlabel("trials")
        return figure

    def strips(self):
        """Every trial: the spread is the sensitivity."""
        methods = [method for of in self.families.values() for method in of]
        figure, axis = self.plt.subplots(figsize=(8.4, 0.34 * len(methods) + 1.2), layout="constrained")
        colour = {m: FAMILY_COLOURS[family] for family, of in self.families.items() for m in of}
        names = []
        for place, method in enumerate(methods):
            table = self.of(method)
            for outcome, marker in OUTCOMES.items():
                shown = table[table["outcome"] == outcome]
                axis.scatter(
                    shown[self.criterion].fillna(self.start[self.criterion]), np.full(len(shown), place), marker=marker, s=22,
                    color=colour[method], alpha=0.7, linewidths=1.2,
                )  # fmt: skip
            gone = int((table["outcome"] != "finished").sum())
            names.append(f"{method} ({gone} of {len(table)} lost)" if gone else method)
        axis.axvline(self.start[self.criterion], color="black", linestyle=":", linewidth=1)
        axis.text(self.start[self.criterion], -0.8, "SFT", ha="center", fontsize=8)
        axis.set_yticks(range(len(methods)), names)
        axis.invert_yaxis()
        axis.set_xlabel(f"{NAMES[self.criterion]} of each trial (x: collapsed, triangle: diverged)")
        axis.grid(axis="x", alpha=0.3)
        axis.spines[["top", "right"]].set_visible(False)
        return figure

    def frontier(self):
        """All trials over KL, with the hull of each method."""
        shown = [m for m in ("preferred", "utility", "gold") if self.trials[m].notna().any()] or [self.criterion]
        figure, axes = self.plt.subplots(
            len(shown), len(self.families), figsize=(4.2 * len(self.families), 2.9 * len(shown)), sharex=True, sharey="row",
            squeeze=False, layout="constrained",
        )  # fmt: skip
        for column, (family, methods) in enumerate(self.families.items()):
            axes[0][column].set_title(FAMILY_NAMES[family], color=FAMILY_COLOURS[family])
            for method, colour, marker in self.looks(family, methods):
                table = self.of(method)
                table = table[table["outcome"] != "diverged"]
                for line, metric in enumerate(shown):
                    axis = axes[line][column]
                    kl = np.concatenate([[0.0], table["kl"]])
                    value = np.concatenate([[self.start[metric]], table[metric]])
                    axis.scatter(
                        kl[1:],
                        value[1:],
                        color=colour,
                        marker=marker,
                        s=16,
                        alpha=0.6,
                        label=method if line == 0 else None,
                    )
                    hull = search.hull(kl, value)
                    axis.plot(kl[hull], value[hull], color=colour, linewidth=1.4)
            axes[-1][column].set_xlabel("KL from the SFT policy, nats per response")
            axes[0][column].legend(fontsize=7, loc="lower right", framealpha=0.6)
        for line, metric in enumerate(shown):
            axes[line][0].set_ylabel(NAMES[metric])
            for axis in axes[line]:
                axis.grid(alpha=0.3)
                axis.set_xscale("symlog", linthresh=0.5)
                axis.spines[["top", "right"]].set_visible(False)
        return figure

    def compute(self):
        """What a good policy costs with its search."""
        k = np.arange(1, self.most + 1)
        figure, panels = self.panels()
        for axis, methods in panels:
            for method, colour, marker in methods:
                line = search.expected_best(self.values(method), self.most)
                spent = (self.upstream[method] + k * self.of(method)["flops"].mean()) / 1e12
                axis.plot(spent, line, color=colour, marker=marker, markersize=4)
                axis.annotate(
                    method,
                    (spent[-1], line[-1]),
                    xytext=(4, 0),
                    textcoords="offset points",
                    fontsize=7,
                    color=colour,
                    va="center",
                )
            axis.set_xscale("log")
            axis.set_xlabel("10¹² floating-point operations, search included")
        return figure


def shades(colour: str, count: int) -> list[tuple[float, ...]]:
    """From a dark tone of a colour to a light one."""
    from matplotlib.colors import to_rgb

    tones = np.linspace(-0.45, 0.45, count) if count > 1 else [0.0]
    full = np.array(to_rgb(colour))
    return [tuple(full * (1 + tone) if tone < 0 else full + (1 - full) * tone) for tone in tones]


def powers(most: int) -> list[int]:
    """1, 2, 4 ... up to `most`."""
    return [1 << n for n in range(most.bit_length()) if 1 << n <= most]


def label_ends(axis, place: float, ends: list[tuple[float, str, str]]) -> None:
    """The name of each line where it ends, pushed apart so that none covers another."""
    low, high = axis.get_ylim()
    gap, last = 0.045 * (high - low), -np.inf
    for value, method, colour in sorted(ends):
        last = max(value, last + gap)
        axis.annotate(
            method,
            (place, value),
            xytext=(place * 1.08, last),
            fontsize=7,
            color=colour,
            va="center",
            annotation_clip=False,
        )
