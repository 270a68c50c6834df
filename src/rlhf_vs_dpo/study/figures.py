"""The four figures of the study. Families have a panel each, so that a handful of lines share one."""

from pathlib import Path
from typing import Any

import altair as alt
import numpy as np
import pandas as pd

from rlhf_vs_dpo.config import FAMILIES
from rlhf_vs_dpo.report.charts import (
    FAMILY_NAMES,
    Figure,
    Style,
    axis,
    data,
    faded,
    labels,
    rule,
    save,
    span,
    tooltip,
    unchecked,
)  # fmt: skip
from rlhf_vs_dpo.report.words import NAMES
from rlhf_vs_dpo.study import search

# What a trial is plotted as, by how it ended: one that diverged has no place of its own and lies at the start.
OUTCOMES = {"finished": "circle", "collapsed": "cross", "diverged": "triangle-down"}
SIZE = (190, 240)


def draw(
    trials: pd.DataFrame,
    families: dict[str, str],
    start: dict[str, float],
    criterion: str,
    upstream: dict[str, float],
    folder: Path,
) -> list[Path]:
    """Write all figures (see `made`) as PNG."""
    charts = made(trials, families, start, criterion, upstream)
    return save([Figure(name, "", "", chart) for name, chart in charts.items()], folder)


def made(
    trials: pd.DataFrame, families: dict[str, str], start: dict[str, float], criterion: str, upstream: dict[str, float]
) -> dict[str, Any]:
    """All figures by name, as charts of altair.

    trials      of all methods, a `trials` table
    families    method -> its family
    start       what the SFT policy of the line is worth, by metric
    upstream    method -> FLOPs of the stages that it needs before its first trial
    """
    study = _Study(trials, families, start, criterion, upstream)
    with unchecked():
        return {
            "expected_best": study.expected_best(),
            "trials": study.strips(),
            "frontier": study.frontier(),
            "compute": study.compute(),
        }


class _Study:
    def __init__(self, trials, families, start, criterion, upstream):
        self.trials, self.start, self.criterion, self.upstream = trials, start, criterion, upstream
        self.most = int(trials.groupby("method")["trial"].max().min())
        known = list(dict.fromkeys(trials["method"]))
        self.families = {family: [method for method in known if families[method] == family] for family in FAMILIES}
        self.families = {family: methods for family, methods in self.families.items() if methods}
        self.style = Style({method: family for family, of in self.families.items() for method in of})

    def of(self, method: str) -> pd.DataFrame:
        return self.trials[self.trials["method"] == method]

    def values(self, method: str) -> np.ndarray:
        return search.values(self.of(method), self.criterion, self.start[self.criterion])

    def flops(self, method: str) -> float:
        """Of a trial. A run that diverged says nothing of them: where all did, the others of the family speak for it."""
        of_family = next(of for of in self.families.values() if method in of)
        for methods in ([method], of_family, self.style.rows):
            known = self.trials.loc[self.trials["method"].isin(methods), "flops"]
            if known.notna().any():
                return float(known.mean())
        return 0.0

    def best_of(self, method: str) -> list[dict[str, Any]]:
        """Rows `policy, k, y, low, high, flops`: what the best of k trials is to be expected to be worth, and what they cost."""
        values = self.values(method)
        low, high = search.interval(values, self.most, self.style.rows.index(method))
        each = self.flops(method)
        return [
            {"policy": method, "k": k + 1, "y": float(y), "low": float(low[k]), "high": float(high[k]), "flops": self.upstream[method] + (k + 1) * each}
            for k, y in enumerate(search.expected_best(values, self.most))
        ]  # fmt: skip

    def lines(self, field: str, across: dict[str, alt.X], band: bool) -> Any:
        """The expected best of each method over `field`, a panel for each family, on one scale."""
        rows = {family: [row for method in of for row in self.best_of(method)] for family, of in self.families.items()}
        keys = ("low", "high") if band else ("y",)
        domain = span([row[key] for of in rows.values() for row in of for key in keys])
        panels = []
        for family, of in rows.items():
            x, y = across[family], axis("y", f"{NAMES[self.criterion]}, expected best", domain, alt.Y)
            base = alt.Chart(data(of)).encode(x=x, color=self.style.colours, opacity=faded())
            shown = tooltip(policy="method", k="trials", y="expected best")
            layers = [
                base.mark_line(strokeWidth=1.4).encode(y=y, strokeDash=self.style.dashes),
                base.mark_point(filled=True, size=22).encode(y=y, shape=self.style.shapes, tooltip=shown),
            ]
            if band:
                layers.insert(0, base.mark_area().encode(y=alt.Y("low:Q"), y2="high:Q", opacity=faded(0.1)))
            ends = {row["policy"]: {"policy": row["policy"], "x": row[field], "y": row["y"]} for row in of}
            layers += labels(list(ends.values()), x, y, SIZE, self.style.colours, leaders=False)
            panels.append(alt.layer(*layers).properties(width=SIZE[0], height=SIZE[1], title=FAMILY_NAMES[family]))
        return alt.hconcat(*panels, spacing=8)

    def expected_best(self) -> Any:
        """What the best of k trials is to be expected to be worth."""
        x = alt.X("k:Q", title="trials", scale=alt.Scale(type="log", base=2, domain=[1, self.most], nice=False), axis=alt.Axis(format="d"))  # fmt: skip
        return self.lines("k", dict.fromkeys(self.families, x), band=True)

    def compute(self) -> Any:
        """What a good policy costs with its search."""
        across = {}
        for family, methods in self.families.items():
            spent = [row["flops"] for method in methods for row in self.best_of(method)]
            across[family] = axis("flops", "FLOPs, search included", span(spent, "log"), large=True, scale="log")
        return self.lines("flops", across, band=False)

    def strips(self) -> Any:
        """Every trial: the spread is the sensitivity."""
        begin = self.start[self.criterion]
        rows, names = [], {}
        for method in self.style.rows:
            table = self.of(method)
            gone = int((table["outcome"] != "finished").sum())
            names[method] = f"{method} ({gone} of {len(table)} lost)" if gone else method
            rows += [
                {"policy": method, "name": names[method], "x": begin if pd.isna(trial[self.criterion]) else trial[self.criterion],
                 "outcome": trial["outcome"], "settings": trial["settings"]}
                for trial in table[["outcome", "settings", self.criterion]].to_dict("records")
            ]  # fmt: skip
        order = list(names.values())
        domain = span([begin, *(row["x"] for row in rows)])
        looks = alt.Shape("outcome:N", legend=None, scale=alt.Scale(domain=list(OUTCOMES), range=list(OUTCOMES.values())))  # fmt: skip
        y = alt.Y("name:N", sort=order, title=None, scale=alt.Scale(domain=order), axis=alt.Axis(ticks=False, domain=False, grid=True, labelLimit=260))  # fmt: skip
        points = alt.Chart(data(rows)).mark_point(size=40, strokeWidth=1.3).encode(
            x=axis("x", f"{NAMES[self.criterion]} of each trial (cross: collapsed, triangle: diverged); grey: the SFT policy", domain),
            y=y, color=self.style.colours, shape=looks, opacity=faded(0.8),
            tooltip=tooltip(policy="method", x=NAMES[self.criterion], outcome="outcome", settings="settings"),
        )  # fmt: skip
        return alt.layer(rule([begin]), points).properties(width=560, height=22 * len(order))

    def frontier(self) -> Any:
        """All trials over KL, with the hull of each method."""
        metrics = [m for m in ("preferred", "utility", "gold") if self.trials[m].notna().any()] or [self.criterion]
        lines: list[Any] = []
        for metric in metrics:
            up = span([self.start[metric], *self.trials[metric].dropna()])
            panels = []
            for family, methods in self.families.items():
                rows, hulls, ends = [], [], []
                for method in methods:
                    table = self.of(method)
                    table = table[table["outcome"] != "diverged"]
                    kl = np.concatenate([[0.0], table["kl"]])
                    value = np.concatenate([[self.start[metric]], table[metric]])
                    rows += [
                        {"policy": method, "x": float(a), "y": float(b), "settings": of}
                        for a, b, of in zip(kl[1:], value[1:], table["settings"], strict=True)
                    ]
                    found = search.hull(kl, value)
                    hulls += [{"policy": method, "x": float(kl[i]), "y": float(value[i]), "at": n} for n, i in enumerate(found)]  # fmt: skip
                    ends.append({"policy": method, "x": float(kl[found[-1]]), "y": float(value[found[-1]])})
                most = max([1.0, *(row["x"] for row in rows)])
                x = axis("x", "KL from the SFT policy, nats per response", [-0.02, most * 1.1], scale="symlog")  # fmt: skip
                y = axis("y", NAMES[metric], up, alt.Y)
                chart = alt.layer(
                    alt.Chart(data(hulls)).mark_line(strokeWidth=1.4).encode(x=x, y=y, color=self.style.colours, order="at:Q", opacity=faded()),
                    alt.Chart(data(rows)).mark_point(filled=True, size=22).encode(
                        x=x, y=y, color=self.style.colours, shape=self.style.shapes, opacity=faded(0.6),
                        tooltip=tooltip(policy="method", x="KL", y=NAMES[metric], settings="settings"),
                    ),
                    *labels(ends, x, y, SIZE, self.style.colours),
                )  # fmt: skip
                title = FAMILY_NAMES[family] if not lines else ""
                panels.append(chart.properties(width=SIZE[0], height=SIZE[1], title=title))
            lines.append(alt.hconcat(*panels, spacing=8))
        return alt.vconcat(*lines, spacing=8)
