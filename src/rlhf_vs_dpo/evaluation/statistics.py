r"""Intervals by bootstrap over prompts, and over lines together with them (Efron and Tibshirani 1993).

A line is a run of the whole pipeline from one seed: its own SFT policy, pairs, reward model and policies. Responses to one
prompt are not independent, so that prompts are resampled, never responses; and all that comes of one line shares its SFT
policy, pairs and reward model, so that lines are resampled whole. Every policy of every line sees the same resampled
prompts. A difference between two methods is taken within each line first: what the line gives to both cancels.

Where there are several lines, each resample draws S - 1 of S of them (Rao and Wu 1988: drawing all S would understate the
variance of a mean by (S-1)/S). A resample is then

    value + (effect of its prompts) + c (effect of its lines),      c^2 = max(V(lines) - V(noise), 0) / V(lines)

for the noise of single answers varies with prompts and with lines, and would count twice (Owen 2007, The pigeonhole
bootstrap). It counts as the lines': how well S means are known, S - 1 degrees of freedom say, whatever it is that they differ by.

One line: percentile intervals, their distance from the estimate stretched by t / z with units - 1 degrees of freedom (after
Hesterberg 2015, arXiv:1411.5279, section 5.3); they say nothing of another line. Several: percentiles of four lines are but
a handful of numbers, and Student's t has to say how little four tell. With variances V_i of the two levels, prompts and
lines, that have t_i, there are two ways to add up,

    t(Satterthwaite's degrees of freedom) * sqrt(V_1 + V_2)         covers 87 to 95 % with two lines, 93 to 95 % with three
    sqrt(t_1^2 V_1 + t_2^2 V_2)         (Zou and Donner 2008)       covers 95 to 99 % with two lines, 95 to 98 % with three

and the half width used is their mean: it covers 94 to 98 % with three lines or more, and up to 99 % where lines differ by the noise
of single answers alone (tests/evaluation/test_statistics.py).

A p-value is of the second way alone: corrected for twelve questions it has to hold far out in the tails, where the first is too short
(tests/evaluation/test_questions.py).
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from zlib import crc32

import numpy as np
from scipy import optimize, special
from statsmodels.stats.multitest import multipletests

Z = float(special.ndtri(0.975))
NOTHING = {"mean": None, "low": None, "high": None}


def same(values):
    return values


@dataclass(frozen=True)
class Estimate:
    """A number and how it varies: its value in each bootstrap resample, and how much of the variance lines have.

    value           the estimate, a mean over lines, before `transform`
    draws           (B,) the same in each resample; NaN where a resample had nothing to measure
    line_variance   the part of the draws' variance by which the means of lines differ; 0 for one line
    lines, units    how many there are of each
    limits          what the number cannot exceed: 0 and 1, for a share
    transform       monotone, applied to what is shown (exp for a perplexity)
    each, drawn     (S,) and (B, S): the estimate of each line, NaN where it has none, and that in each resample of the
                    units alone; what differences are made of. None for numbers that are read off others
    kind, sums      of `Resamples.ratio`: what the units are, and numerators and denominators, each (S, units)
    """

    value: float
    draws: np.ndarray
    line_variance: float = 0.0
    lines: int = 1
    units: int = 2
    limits: tuple[float, float] = (-np.inf, np.inf)
    transform: Callable = field(default=same, compare=False)
    each: np.ndarray | None = None
    drawn: np.ndarray | None = None
    kind: str = ""
    sums: tuple[np.ndarray, np.ndarray] | None = None

    def interval(self) -> dict[str, float | None]:
        """`mean` and the 95 % interval `low`, `high`; all null where nothing was measured, or on a single unit, which says
        nothing of another."""
        if self.units < 2 or not np.isfinite(self.value) or np.isnan(self.draws).all():
            return dict(NOTHING)
        ends = sorted(float(self.transform(np.clip(end, *self.limits))) for end in self._ends())
        return {"mean": float(self.transform(self.value)), "low": ends[0], "high": ends[1]}

    def p_value(self) -> float | None:
        """Of a true value of 0: the smallest alpha whose interval leaves 0 out; None where there is no interval.

        That interval is of the bootstrap's variances and Student's t: a share of resamples could not be smaller than one in
        their number, which is too coarse to be corrected for many comparisons. It is the wider of the two ways to add up (see above), and
        with one line that shown is of percentiles: near the edge, p and the interval shown may disagree.
        """
        if self.interval() == NOTHING:
            return None

        parts = self._parts()

        def beyond(log_alpha: float) -> float:
            return _wide(parts, float(np.exp(log_alpha))) - abs(self.value)

        smallest = np.log(1e-12)
        if np.nanvar(self.draws) == 0 or beyond(0.0) > 0:  # a half width of 0 at alpha = 1
            return float(self.value == 0)
        if beyond(smallest) < 0:
            return 1e-12
        return float(np.exp(optimize.brentq(beyond, smallest, 0.0)))

    def _ends(self) -> tuple[float, float]:
        """The ends of a 95 % interval, as the head of this file says."""
        if self.lines > 1:
            half = _half_width(self._parts(), 0.05)
            return self.value - half, self.value + half
        stretch = _student(0.025, max(self.units - 1, 1)) / Z
        low, high = self.value + stretch * (np.nanpercentile(self.draws, [2.5, 97.5]) - self.value)
        return float(low), float(high)

    def _parts(self) -> list[tuple[float, float]]:
        """(variance, degrees of freedom) of each level that varies: prompts, and lines."""
        rest = max(float(np.nanvar(self.draws, ddof=1)) - self.line_variance, 0.0)
        parts = [(rest, float(max(self.units - 1, 1)))]
        if self.line_variance > 0:
            parts.append((self.line_variance, float(self.lines - 1)))
        return parts


def _half_width(parts: list[tuple[float, float]], alpha: float) -> float:
    """Half the width of a 1 - alpha interval of a number with these (variance, degrees of freedom), as the head of this file says."""
    total = sum(variance for variance, _ in parts)
    if not total > 0:
        return 0.0
    together = total**2 / sum(variance**2 / count for variance, count in parts)
    return (total**0.5 * _student(alpha / 2, together) + _wide(parts, alpha)) / 2


def _wide(parts: list[tuple[float, float]], alpha: float) -> float:
    """Half the width of the wider of the two intervals (Zou and Donner 2008)."""
    return sum(variance * _student(alpha / 2, count) ** 2 for variance, count in parts) ** 0.5


def _student(tail: float, freedom: float) -> float:
    """The value that Student's t exceeds with this probability, at most 1/2."""
    return -float(special.stdtrit(freedom, tail))


class Resamples:
    """The resamples that everything shares: of the units of each kind, and of lines."""

    def __init__(self, count: int, seed: int):
        self.count, self.seed = count, seed
        self._units: dict[tuple[str, int], np.ndarray] = {}

    def units(self, kind: str, units: int) -> np.ndarray:
        """(count, units) float64: how often each prompt (or document, or fact) is drawn; the same whenever it is asked for."""
        key = kind, units
        if key not in self._units:
            drawn = self._stream(kind).multinomial(units, np.full(units, 1 / units), size=self.count)
            self._units[key] = drawn.astype(np.float64)  # once, or each product with floats would do it again
        return self._units[key]

    def lines(self, lines: int) -> np.ndarray:
        """(count, lines) weights that sum to 1: S - 1 of S lines drawn, with replacement; all of it for one line."""
        if lines == 1:
            return np.ones((self.count, 1))
        drawn = self._stream("lines").multinomial(lines - 1, np.full(lines, 1 / lines), size=self.count)
        return drawn / (lines - 1)

    def _stream(self, name: str) -> np.random.Generator:
        return np.random.default_rng([self.seed, crc32(name.encode())])

    def ratio(
        self, kind: str, numerator: np.ndarray, denominator: np.ndarray, transform: Callable = same, share: bool = False
    ) -> Estimate:
        """The mean over lines of sum(numerator) / sum(denominator) over units.

        numerator, denominator: (lines, units) sums of a metric and of its responses per prompt, so that prompts with
        more usable responses weigh more. `transform` acts on the mean; a `share` lies between 0 and 1. Lines without any
        usable response have no say.
        """
        sums = numerator, denominator
        if not (denominator.sum(1) > 0).any():
            nothing = np.full(len(denominator), np.nan), np.full((self.count, len(denominator)), np.nan)
            return Estimate(
                float("nan"), np.full(self.count, np.nan), each=nothing[0], drawn=nothing[1], kind=kind, sums=sums
            )
        with np.errstate(invalid="ignore", divide="ignore"):
            each = numerator.sum(1) / denominator.sum(1)  # (lines,)
            weights = self.units(kind, numerator.shape[1])
            drawn = (weights @ numerator.T) / (weights @ denominator.T)  # (count, lines)
        limits = (0.0, 1.0) if share else (-np.inf, np.inf)
        counted = int((denominator.sum(0) > 0).sum())
        return replace(self.combine(each, drawn, counted, transform, limits), kind=kind, sums=sums)

    def combine(
        self, each: np.ndarray, drawn: np.ndarray, units: int, transform: Callable = same,
        limits: tuple[float, float] = (-np.inf, np.inf),
    ) -> Estimate:  # fmt: skip
        """An estimate from those of each line, (lines,), and those of each line in each resample of units, (count, lines)."""
        usable = np.isfinite(each)
        if not usable.any():
            return Estimate(float("nan"), np.full(self.count, np.nan), each=each, drawn=drawn)
        of, moving = each[usable], drawn[:, usable]
        value = float(of.mean())
        draws = np.full(len(moving), np.nan)
        some = np.isfinite(moving).any(1)  # resamples that had anything to measure
        draws[some] = np.nanmean(moving[some], axis=1)
        variance = 0.0
        if len(of) > 1:
            moved = self.lines(len(of)) @ of - value
            variance = float(np.var(moved, ddof=1))
            whole = np.isfinite(moving).all(1)  # resamples in which every line has something to measure
            noise = float(np.var((moving - of)[whole], axis=1, ddof=1).mean()) / len(of) if whole.any() else 0.0
            draws = draws + (moved * (max(variance - noise, 0.0) / variance) ** 0.5 if variance > 0 else 0.0)
        return Estimate(value, draws, variance, len(of), units, limits, transform, each, drawn)

    def difference(self, a: Estimate, b: Estimate) -> Estimate:
        """a - b, taken within each line and paired over what both resampled; of the lines, and of the units, in which both were
        measured."""
        if a.sums is not None and b.sums is not None and a.kind == b.kind:
            (_, of_a), (_, of_b) = a.sums, b.sums
            if ((of_a > 0) != (of_b > 0)).any():
                both = (of_a > 0) & (of_b > 0)
                a, b = (self.ratio(of.kind, *(part * both for part in of.sums)) for of in (a, b))
        return self.combine(a.each - b.each, a.drawn - b.drawn, min(a.units, b.units))


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
    a, b = (np.where(np.isnan(values), -np.inf, values) for values in (ours[:, None], theirs[None, :]))
    others = np.ones(len(theirs)) if their_weights is None else their_weights
    return float(weights @ ((a > b) + 0.5 * (a == b)) @ others), float(weights.sum() * others.sum())
