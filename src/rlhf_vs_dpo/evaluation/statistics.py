r"""Intervals by bootstrap over prompts, and over seeds together with them (Efron and Tibshirani 1993).

Responses to one prompt are not independent, so that prompts are resampled, never responses. All policies share one set of
resampled prompts: a difference between two of them is paired over prompts. Where a method ran with several seeds, each
resample draws seeds too, S - 1 of S of them (Rao and Wu 1988: drawing all S would understate the variance of a mean by
(S-1)/S); seeds of two methods are drawn apart, as if they had nothing in common. A resample is then

    value + (effect of its prompts) + c (effect of its seeds),      c^2 = max(V(seeds) - V(noise), 0) / V(seeds)

for the noise of single answers varies with prompts and with seeds, and would count twice (Owen 2007, The pigeonhole
bootstrap).

One seed: percentile intervals, their distance from the estimate stretched by t / z with units - 1 degrees of freedom (after
Hesterberg 2015, arXiv:1411.5279, section 5.3). Several: percentiles of four seeds are but a handful of numbers, and Student's
t has to say how little four tell. With variances V_i of levels that have t_i (prompts; seeds, by Welch's degrees of freedom
where two methods differ), there are two ways to add up,

    t(Satterthwaite's degrees of freedom) * sqrt(V_1 + V_2)         covers 87 to 95 % with two seeds, 93 to 95 % with three
    sqrt(t_1^2 V_1 + t_2^2 V_2)         (Zou and Donner 2008)       covers 95 to 99 % with two seeds, 95 to 98 % with three

and the half width used is their mean, which covers 94 to 97 % with three seeds or more (tests/test_statistics.py).
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from zlib import crc32

import numpy as np
from scipy import optimize, stats
from statsmodels.stats.multitest import multipletests

Z = float(stats.norm.ppf(0.975))
NOTHING = {"mean": None, "low": None, "high": None}


def same(values):
    return values


@dataclass(frozen=True)
class Estimate:
    """A number and how it varies: its value in each bootstrap resample, and how much of the variance each level has.

    value           the estimate, before `transform`
    draws           (B,) the same in each resample; NaN where a resample had nothing to measure
    seed_variance   the part of the draws' variance that is between seeds; 0 for one seed
    seeds, units    how many there are of each
    limits          what the number cannot exceed: 0 and 1, for a share
    transform       monotone, applied to what is shown (exp for a perplexity)
    """

    value: float
    draws: np.ndarray
    seed_variance: float = 0.0
    seeds: int = 1
    units: int = 2
    limits: tuple[float, float] = (-np.inf, np.inf)
    transform: Callable = field(default=same, compare=False)

    @property
    def standard_error(self) -> float:
        return float(np.nanstd(self.draws, ddof=1))

    @property
    def levels(self) -> list[tuple[float, int]]:
        """(variance, degrees of freedom) of each level above the prompts."""
        return [(self.seed_variance, self.seeds - 1)] if self.seeds > 1 else []

    def interval(self) -> dict[str, float | None]:
        """`mean` and the 95 % interval `low`, `high`; all null where nothing was measured, or on a single unit, which says
        nothing of another."""
        if self.units < 2 or not np.isfinite(self.value) or np.isnan(self.draws).all():
            return dict(NOTHING)
        low, high = _ends(self.value, self.draws, self.levels, self.units - 1)
        ends = sorted(float(self.transform(np.clip(end, *self.limits))) for end in (low, high))
        return {"mean": float(self.transform(self.value)), "low": ends[0], "high": ends[1]}


def _ends(value: float, draws: np.ndarray, levels: list[tuple[float, int]], freedom: int) -> tuple[float, float]:
    """The ends of a 95 % interval, as the head of this file says."""
    if levels:
        half = _half_width(0.05, draws, levels, freedom)
        return value - half, value + half
    stretch = float(stats.t.ppf(0.975, max(freedom, 1))) / Z
    low, high = value + stretch * (np.nanpercentile(draws, [2.5, 97.5]) - value)
    return float(low), float(high)


def _half_width(alpha: float, draws: np.ndarray, levels: list[tuple[float, int]], freedom: int) -> float:
    """Half the width of a 1 - alpha interval, as the head of this file says."""
    above = sum(variance for variance, _ in levels)
    rest = max(float(np.nanvar(draws, ddof=1)) - above, 0.0)
    parts = [(rest, float(max(freedom, 1)))]
    if above > 0:
        parts.append((above, above**2 / sum(variance**2 / count for variance, count in levels)))
    total = sum(variance for variance, _ in parts)
    if not total > 0:
        return 0.0
    together = total**2 / sum(variance**2 / count for variance, count in parts)
    narrow = total**0.5 * float(stats.t.isf(alpha / 2, together))
    wide = sum(variance * float(stats.t.isf(alpha / 2, count)) ** 2 for variance, count in parts) ** 0.5
    return (narrow + wide) / 2


class Resamples:
    """The resamples that everything shares: of the units of each kind, and of the seeds of each method."""

    def __init__(self, count: int, seed: int):
        self.count, self.seed = count, seed
        self._units: dict[tuple[str, int], np.ndarray] = {}

    def units(self, kind: str, units: int) -> np.ndarray:
        """(count, units) how often each prompt (or document, or fact) is drawn; the same whenever it is asked for."""
        key = kind, units
        if key not in self._units:
            self._units[key] = self._stream(kind).multinomial(units, np.full(units, 1 / units), size=self.count)
        return self._units[key]

    def seeds(self, method: str, seeds: int) -> np.ndarray:
        """(count, seeds) weights that sum to 1: S - 1 of S seeds drawn, with replacement; all of it for one seed."""
        if seeds == 1:
            return np.ones((self.count, 1))
        drawn = self._stream(f"seeds of {method}").multinomial(seeds - 1, np.full(seeds, 1 / seeds), size=self.count)
        return drawn / (seeds - 1)

    def _stream(self, name: str) -> np.random.Generator:
        return np.random.default_rng([self.seed, crc32(name.encode())])

    def ratio(
        self, method: str, kind: str, numerator: np.ndarray, denominator: np.ndarray, transform: Callable = same,
        share: bool = False,
    ) -> Estimate:  # fmt: skip
        """The mean over seeds of sum(numerator) / sum(denominator) over units, for a method.

        numerator, denominator: (seeds, units) sums of a metric and of its responses per prompt, so that prompts with
        more usable responses weigh more. `transform` acts on the mean; a `share` lies between 0 and 1. Seeds without any
        usable response have no say.
        """
        usable = denominator.sum(1) > 0
        if not usable.any():
            return Estimate(float("nan"), np.full(self.count, np.nan))
        top, bottom = numerator[usable], denominator[usable]
        units = top.shape[1]
        with np.errstate(invalid="ignore", divide="ignore"):
            each = top.sum(1) / bottom.sum(1)  # (seeds,)
            weights = self.units(kind, units)
            drawn = (weights @ top.T) / (weights @ bottom.T)  # (count, seeds)
        limits = (0.0, 1.0) if share else (-np.inf, np.inf)
        counted = int((bottom.sum(0) > 0).sum())
        return self.combine(method, each, drawn, counted, transform, limits)

    def combine(
        self, method: str, each: np.ndarray, drawn: np.ndarray, units: int, transform: Callable = same,
        limits: tuple[float, float] = (-np.inf, np.inf),
    ) -> Estimate:  # fmt: skip
        """An estimate from those of each seed, (seeds,), and those of each seed in each resample of units, (count, seeds)."""
        value = float(each.mean())
        with np.errstate(invalid="ignore"):
            draws = np.nanmean(drawn, axis=1) if np.isnan(drawn).any() else drawn.mean(1)
        between = 0.0
        if len(each) > 1:
            moved = self.seeds(method, len(each)) @ each - value
            variance = float(np.var(moved, ddof=1))
            whole = np.isfinite(drawn).all(1)  # resamples in which every seed has something to measure
            noise = float(np.var((drawn - each)[whole], axis=1, ddof=1).mean()) / len(each) if whole.any() else 0.0
            between = max(variance - noise, 0.0)
            draws = draws + (moved * (between / variance) ** 0.5 if variance > 0 else 0.0)
        return Estimate(value, draws, between, len(each), units, limits, transform)


def difference(a: Estimate, b: Estimate) -> dict[str, float | None]:
    """a - b with its 95 % interval, paired over what both resampled, and the p-value of no difference.

    p is the smallest alpha whose interval leaves 0 out, that interval being of the bootstrap's variances and Student's t: a
    share of resamples could not be smaller than one in their number, which is too coarse to be corrected for many
    comparisons. (With one seed the interval shown is of percentiles, and may disagree with p near the edge.)
    """
    draws = a.draws - b.draws
    if min(a.units, b.units) < 2 or not np.isfinite(a.value - b.value) or np.isnan(draws).all():
        return dict(NOTHING) | {"p": None}
    value, levels, freedom = a.value - b.value, a.levels + b.levels, min(a.units, b.units) - 1
    low, high = _ends(value, draws, levels, freedom)
    return {"mean": value, "low": low, "high": high, "p": _p_value(value, draws, levels, freedom)}


def _p_value(value: float, draws: np.ndarray, levels: list[tuple[float, int]], freedom: int) -> float:
    def beyond(log_alpha: float) -> float:
        return _half_width(float(np.exp(log_alpha)), draws, levels, freedom) - abs(value)

    smallest = np.log(1e-12)
    if np.nanvar(draws) == 0 or beyond(0.0) > 0:  # a half width of 0 at alpha = 1
        return float(value == 0)
    if beyond(smallest) < 0:
        return 1e-12
    return float(np.exp(optimize.brentq(beyond, smallest, 0.0)))


def holm(p_values: list[float | None]) -> list[float | None]:
    """Holm's correction (1979) of all p-values together; what has none keeps none."""
    known = [p for p in p_values if p is not None]
    corrected = iter(multipletests(known, method="holm")[1].tolist() if known else [])
    return [None if p is None else next(corrected) for p in p_values]


def win_share(
    ours: np.ndarray, weights: np.ndarray, theirs: np.ndarray, their_weights: np.ndarray | None = None
) -> tuple[float, float]:
    """(wins, comparisons) of every response of one policy against every response of another to the same prompt; a tie is
    half a win. Each response counts as often as its weight says (theirs once each, where none are given). Responses without
    a value (NaN: they never ended) lose against those with one, and tie among themselves."""
    a, b = np.nan_to_num(ours, nan=-np.inf)[:, None], np.nan_to_num(theirs, nan=-np.inf)[None, :]
    others = np.ones(len(theirs)) if their_weights is None else their_weights
    return float(weights @ ((a > b) + 0.5 * (a == b)) @ others), float(weights.sum() * others.sum())
