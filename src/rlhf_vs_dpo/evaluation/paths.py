"""What a method went through: its metrics at the watched points of training, on validation prompts, over all lines.

The three comparisons that are fair in one respect each are read off these paths (`comparisons`), and so are the laws of
over-optimisation (`overoptimisation`). Nothing here has seen a test prompt.
"""

from dataclasses import dataclass

import numpy as np
import pandas as pd

from rlhf_vs_dpo.evaluation.statistics import Estimate, Resamples

WATCHED = ("preferred", "gold", "utility", "objective", "reward", "kl", "tokens", "filler", "finished")
SHARES = ("preferred", "filler", "finished")


@dataclass(frozen=True)
class Path:
    """Points along training: `share` (K,) of it, 0 to 1, and per metric one estimate for each point.

    sums            per metric, numerators and denominators (lines, K, prompts), for choices that each run makes for itself
    kind            what is resampled: the prompts that were watched
    """

    method: str
    share: np.ndarray
    points: dict[str, list[Estimate]]
    sums: dict[str, tuple[np.ndarray, np.ndarray]]
    kind: str

    def values(self, metric: str) -> np.ndarray:
        return np.array([point.value for point in self.points[metric]])

    def draws(self, metric: str) -> np.ndarray:
        """(resamples, K)"""
        return np.stack([point.draws for point in self.points[metric]], axis=1)

    def estimate(self, value: float, draws: np.ndarray, metric: str, place: float) -> Estimate:
        """What was read off this path at point `place` (2.5: halfway between the third and the fourth), in each resample.

        Lines have the part of the variance that they have there; resamples in which there was nothing to read are left out.
        """
        points = self.points[metric]
        between = float(np.interp(place, np.arange(len(points)), [point.line_variance for point in points]))
        variance = float(np.nanvar(draws, ddof=1)) if np.isfinite(draws).sum() > 1 else 0.0
        around = points[int(np.floor(place))], points[int(np.ceil(place))]
        lines, units = min(point.lines for point in around), min(point.units for point in around)
        return Estimate(value, draws, min(between, variance), lines, units)


def of_training(method: str, tables: list[pd.DataFrame], resamples: Resamples) -> Path:
    """The path of a method from the `watched` tables of its lines, with what `measure.watched` adds.

    Lines have their own numbers of steps, for they have their own pairs: points are the same where the same share of training is done.
    A line is read at its point that is nearest to each share of the line with the fewest points.
    """
    watched = [np.array(sorted(table["step"].unique())) for table in tables]
    shares = [steps / max(steps[-1], 1) for steps in watched]
    share = min(shares, key=len)
    steps = [of[np.abs(own[None] - share[:, None]).argmin(1)] for of, own in zip(watched, shares, strict=True)]
    prompts = sorted(tables[0]["prompt_id"].unique())

    def sums(metric: str) -> tuple[np.ndarray, np.ndarray]:
        tops, bottoms = [], []
        for table, at in zip(tables, steps, strict=True):
            wide = table.pivot(index="step", columns="prompt_id", values=metric).reindex(index=at, columns=prompts)
            values = wide.to_numpy(float)
            tops.append(np.nan_to_num(values))
            bottoms.append(np.isfinite(values).astype(float))
        return np.stack(tops), np.stack(bottoms)  # (lines, K, prompts)

    return _path(method, share, {m: sums(m) for m in WATCHED}, "validation prompt", resamples)


def _path(method: str, share: np.ndarray, sums: dict, kind: str, resamples: Resamples) -> Path:
    points = {
        metric: [resamples.ratio(kind, top[:, k], bottom[:, k], share=metric in SHARES) for k in range(len(share))]
        for metric, (top, bottom) in sums.items()
    }
    return Path(method, share, points, sums, kind)


def of_settings(method: str, rows: list[dict[str, Estimate | None]]) -> Path:
    """The frontier of a method: its settings in the order of their KL, as measured on test prompts, the SFT policy before them.

    rows    estimates by metric (`measure.row`) of the SFT policy and of each setting, none of whose KL is unknown
    """
    ordered = sorted(rows, key=lambda row: row["kl"].value)
    known = [metric for metric in WATCHED if all(row[metric] is not None for row in ordered)]
    points = {metric: [row[metric] for row in ordered] for metric in known}
    return Path(method, np.linspace(0, 1, len(ordered)), points, {}, "prompt")


def of_best_of_n(rows: dict[int, list[dict]], resamples: Resamples, kind: str) -> Path:
    """The path of best-of-n over n: {n: sums of `measure.policy` of each line}; `share` is n itself."""
    sums = {
        metric: tuple(
            np.stack([[getattr(line[metric], part) for line in lines] for lines in rows.values()], axis=1)
            for part in ("numerator", "denominator")
        )
        for metric in WATCHED
    }
    return _path("best of n", np.array(list(rows), dtype=float), sums, kind, resamples)
