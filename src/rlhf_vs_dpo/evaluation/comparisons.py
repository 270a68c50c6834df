"""Three comparisons, each fair in one respect: at equal KL, at equal compute, each method at its own best.

None is fair in all. KL is what the RL objective pays for, and says nothing of where it went; compute says nothing of who
must be asked; and one's own best is chosen by a judge that real life does not have. All are read off the paths of
training, on validation prompts: a test prompt chooses nothing. (Where several settings of a method were run, equal KL is read between
them, on test prompts; and what best-of-n is worth at the n that validation prompts chose, `whole` measures on test prompts.)
"""

import numpy as np

from rlhf_vs_dpo.evaluation.paths import Path
from rlhf_vs_dpo.evaluation.statistics import Estimate, Resamples


def at_kl(path: Path, metric: str, kl: float) -> Estimate | None:
    """The metric where the path first rises to a KL, linear in sqrt(KL) between its points; None if it never does.

    Its interval is of the resamples that reach that KL.
    """
    where = _crossing(np.sqrt(np.maximum(path.values("kl"), 0.0))[None], kl**0.5)
    if not np.isfinite(where[0]):
        return None
    places = _crossing(np.sqrt(np.maximum(path.draws("kl"), 0.0)), kl**0.5)
    value = _between(path.values(metric)[None], where)[0]
    return path.estimate(float(value), _between(path.draws(metric), places), metric, float(where[0]))


def seen_around(path: Path, kl: float) -> tuple[float, float]:
    """KLs of the two watched points between which `at_kl` reads; the further apart, the less was seen of what it says."""
    values = path.values("kl")
    place = float(_crossing(np.sqrt(np.maximum(values, 0.0))[None], kl**0.5)[0])
    low = min(int(place), len(values) - 2)
    return float(values[low]), float(values[low + 1])


def _crossing(x: np.ndarray, level: float) -> np.ndarray:
    """Where along each row x first rises to `level`, as a fraction of points; NaN where it does not."""
    risen = (x >= level) & np.pad(x[:, :-1] < level, ((0, 0), (1, 0)))
    first = risen.argmax(axis=1)
    rows = np.arange(len(x))
    x0, x1 = x[rows, np.maximum(first - 1, 0)], x[rows, first]
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.where(risen.any(axis=1), first - 1 + (level - x0) / (x1 - x0), np.nan)


def _between(y: np.ndarray, places: np.ndarray) -> np.ndarray:
    """y of each row at a fraction of points, linear between them; NaN at NaN."""
    known = np.nan_to_num(places)
    low = np.clip(np.floor(known).astype(int), 0, y.shape[1] - 1)
    high = np.minimum(low + 1, y.shape[1] - 1)
    rows = np.arange(len(y))
    value = y[rows, low] + (known - low) * (y[rows, high] - y[rows, low])
    return np.where(np.isnan(places), np.nan, value)


def at_compute(path: Path, metric: str, upstream: float, own: float, budget: float) -> Estimate | None:
    """The metric when `budget` FLOPs are spent: `upstream` before training begins, then `own` along it.

    A method that is done by then stays where it ended; one that has not begun is None.
    """
    if budget < upstream:
        return None
    share = min((budget - upstream) / own, 1.0) if own > 0 else 1.0
    place = float(np.interp(share, path.share, np.arange(len(path.share))))
    draws = path.draws(metric)
    value = _between(path.values(metric)[None], np.array([place]))[0]
    return path.estimate(float(value), _between(draws, np.full(len(draws), place)), metric, place)


def own_best(path: Path, metric: str, resamples: Resamples, seed: int) -> tuple[Estimate, Estimate, float] | None:
    """Each run stopped at its best watched point: (metric there, what that gains over its end, share of training).

    Cross-fitted: half of the validation prompts choose the point, the other half say what it is worth, and the other way
    round. Choosing and measuring on the same prompts would reward noise. None where there is nothing to choose by.
    """
    top, bottom = path.sums[metric]  # (lines, K, prompts)
    lines, _points, prompts = top.shape
    if prompts < 4 or not bottom.sum():
        return None
    half = np.zeros(prompts, dtype=bool)
    half[np.random.default_rng(seed).permutation(prompts)[: prompts // 2]] = True
    weights = np.concatenate([np.ones((1, prompts)), resamples.units(path.kind, prompts)])  # the first is the estimate
    best = np.zeros((len(weights), lines))
    last = np.zeros((len(weights), lines))
    where = []
    for chooses in (half, ~half):
        curves = {}
        for name, part in (("choose", chooses), ("measure", ~chooses)):
            w = weights * part
            with np.errstate(invalid="ignore", divide="ignore"):
                curves[name] = np.einsum("bp,skp->bsk", w, top) / np.einsum("bp,skp->bsk", w, bottom)
        chosen = np.where(np.isfinite(curves["choose"]), curves["choose"], -np.inf).argmax(-1)  # (resamples, lines)
        best += 0.5 * np.take_along_axis(curves["measure"], chosen[..., None], -1)[..., 0]
        last += 0.5 * curves["measure"][..., -1]
        where.append(path.share[chosen[0]])
    value = resamples.combine(best[0], best[1:], prompts)
    gained = resamples.combine(best[0] - last[0], best[1:] - last[1:], prompts)
    return value, gained, float(np.mean(where))
