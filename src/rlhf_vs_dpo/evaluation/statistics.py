"""Intervals by bootstrap over prompts (Efron and Tibshirani 1993, chapter 13: percentile intervals).

Responses to one prompt are not independent, so that prompts are resampled, never responses. All policies share one set of
resamples: a difference between two policies is then paired over prompts.
"""

import numpy as np


def resample_weights(units: int, resamples: int, seed: int) -> np.ndarray:
    """How often each unit (a prompt, a document) is drawn in each bootstrap sample: (resamples, units) int64."""
    return np.random.default_rng(seed).multinomial(units, np.full(units, 1 / units), size=resamples)


def interval(
    numerator: np.ndarray, denominator: np.ndarray, weights: np.ndarray, transform=lambda ratio: ratio
) -> dict[str, float | None]:
    """Mean and 95 % percentile interval of transform(sum of numerator / sum of denominator) over units.

    numerator, denominator: (units,) sums of a metric and of its responses per prompt, so that prompts with more usable
    responses weigh more. All null where nothing was measured.
    """
    if denominator.sum() == 0:
        return {"mean": None, "low": None, "high": None}
    drawn = weights @ np.stack([numerator, denominator], axis=1)  # (resamples, 2)
    drawn = drawn[drawn[:, 1] > 0]
    low, high = np.percentile(transform(drawn[:, 0] / drawn[:, 1]), [2.5, 97.5])
    return {"mean": float(transform(numerator.sum() / denominator.sum())), "low": float(low), "high": float(high)}


def win_share(ours: np.ndarray, weights: np.ndarray, theirs: np.ndarray) -> tuple[float, float]:
    """(wins, comparisons) of every response of one policy against every response of another to the same prompt; a tie is
    half a win. Each of ours counts as often as its weight says. Responses without a value (NaN: they never ended) lose
    against those with one, and tie among themselves."""
    a, b = np.nan_to_num(ours, nan=-np.inf)[:, None], np.nan_to_num(theirs, nan=-np.inf)[None, :]
    return float((weights[:, None] * ((a > b) + 0.5 * (a == b))).sum()), float(weights.sum() * b.size)
