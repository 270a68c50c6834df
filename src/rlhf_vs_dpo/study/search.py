r"""How good the best of k trials is to be expected to be, and what that costs.

With v_(1) <= ... <= v_(N) the values of N trials, and k drawn from them with replacement (Dodge et al. 2019, arXiv:1909.03004, eq. 1 to 4):

    E[best of k] = sum_i v_(i) ( (i/N)^k - ((i-1)/N)^k )

A trial that collapsed or diverged counts as the policy that it started from, which one would keep.
"""

import numpy as np
import pandas as pd

RESAMPLES = 2000


def expected_best(values: np.ndarray, most: int) -> np.ndarray:
    """E[best of k] for k = 1 ... most: (most,). `values` (N,), or (..., N) with (..., most) returned."""
    ordered = np.sort(values, axis=-1)
    places = np.arange(ordered.shape[-1] + 1) / ordered.shape[-1]
    reached = places[:, None] ** np.arange(1, most + 1)  # P(best of k is among the i lowest)
    return ordered @ np.diff(reached, axis=0)


def interval(values: np.ndarray, most: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """95 % of the same over trials drawn anew from these: (most,) and (most,).

    What was not tried is not in it: no end lies above the best trial, and where k comes near the number of trials it is too narrow.
    """
    drawn = np.random.default_rng(seed).integers(len(values), size=(RESAMPLES, len(values)))
    low, high = np.percentile(expected_best(values[drawn], most), [2.5, 97.5], axis=0)
    return low, high


def values(trials: pd.DataFrame, criterion: str, start: float) -> np.ndarray:
    """What each trial of a method is worth to whoever searches."""
    return trials[criterion].where(trials["outcome"] == "finished", start).to_numpy(float)


def best(trials: pd.DataFrame, criterion: str) -> pd.Series | None:
    """The trial to take; None where none finished."""
    usable = trials[trials["outcome"] == "finished"]
    return None if usable.empty else usable.loc[usable[criterion].idxmax()]


def hull(kl: np.ndarray, value: np.ndarray) -> np.ndarray:
    """Places of the points on the upper hull from the origin's side to the highest: no mixture of the others lies above them.

    Sorted by KL; points beyond the highest are left out.
    """
    found: list[int] = []
    for place in np.argsort(kl, kind="stable"):
        if found and value[place] <= value[found[-1]]:
            continue
        while len(found) > 1 and _slope(kl, value, found[-2], found[-1]) <= _slope(kl, value, found[-2], place):
            found.pop()
        found.append(int(place))
    return np.array(found, dtype=int)


def _slope(kl: np.ndarray, value: np.ndarray, a: int, b: int) -> float:
    return (value[b] - value[a]) / max(kl[b] - kl[a], 1e-12)
