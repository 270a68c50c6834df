r"""The two ways in which optimising goes wrong, told apart along a path (of training, or of best-of-n over n).

    bias amplified           utility u goes on rising while gold g falls: the labels are obeyed, and were wrong. Between the point
                             at which g is highest and that at which u is highest: u gained for g lost.
    reward model exploited   RM reward r goes on rising while u falls: the reward model is wrong there. Between the point at which u
                             is highest and the end: r gained for u lost; it begins at the KL of that point.

The highest of several noisy points looks higher than it is. So one half of the prompts chooses the points and the other half says
what happened between them, then the other way round (as `comparisons.own_best`); each line chooses for itself. Where
the order of the points is the other way round, nothing of that kind was seen, and what is gained and lost is 0.
"""

from typing import Any

import numpy as np

from rlhf_vs_dpo.evaluation.paths import Path
from rlhf_vs_dpo.evaluation.statistics import Resamples

# name -> (the metric that falls, from its peak on; the metric that rises, to its own peak or to the end of the path)
KINDS = {"bias_amplified": ("gold", "utility"), "reward_model_exploited": ("utility", "reward")}
TOLD = ("gained", "lost", "begins")


def of_path(path: Path, resamples: Resamples, seed: int, points: int | None = None) -> dict[str, Any] | None:
    """Both failures on the first `points` points of a path (all, if None); None where gold, utility or reward is not known.

    Each has `gained` of the metric that rises, `lost` of the one that falls (negative: it fell) and `begins`, the KL of the point
    where it begins, with 95 % intervals; `share`, in how many resamples of the prompts (means over lines) the one rose and the
    other fell; and `shown`, whether the intervals leave no doubt of it.
    """
    usable = _usable(path)
    if usable is None or len(usable) < 4:
        return None
    top = {m: path.sums[m][0][:, :points][..., usable] for m in ("gold", "utility", "reward", "kl")}
    bottom = {m: path.sums[m][1][:, :points][..., usable] for m in top}
    if not all(bottom[m].any() for m in ("gold", "utility", "reward")):
        return None
    prompts = path.sums["gold"][0].shape[-1]
    half = np.zeros(len(usable), dtype=bool)
    half[np.random.default_rng(seed).permutation(len(usable))[: len(usable) // 2]] = True
    weights = np.concatenate([np.ones((1, prompts)), resamples.units(path.kind, prompts)])[:, usable]
    sums = {kind: dict.fromkeys(TOLD, 0.0) for kind in KINDS}
    for chooses in (half, ~half):
        chosen = {m: _means(top[m], bottom[m], weights * chooses) for m in ("gold", "utility")}
        told = {m: _means(top[m], bottom[m], weights * ~chooses) for m in top}
        peak = {m: np.where(np.isfinite(values), values, -np.inf).argmax(-1) for m, values in chosen.items()}
        end = np.full_like(peak["gold"], top["gold"].shape[1] - 1)
        for kind, (falls, rises) in KINDS.items():
            start = peak[falls]
            stop = peak["utility"] if rises == "utility" else end
            seen = start < stop
            sums[kind]["gained"] += 0.5 * np.where(seen, _at(told[rises], stop) - _at(told[rises], start), 0.0)
            sums[kind]["lost"] += 0.5 * np.where(seen, _at(told[falls], stop) - _at(told[falls], start), 0.0)
            sums[kind]["begins"] += 0.5 * _at(told["kl"], start)
    told = {}
    for kind, found in sums.items():
        entry = {name: resamples.combine(found[name][0], found[name][1:], len(usable)).interval() for name in TOLD}
        known = np.isfinite(found["gained"][0])
        gained, lost = (found[name][1:, known].sum(1) for name in ("gained", "lost"))
        entry["share"] = float(((gained > 0) & (lost < 0)).mean())
        entry["shown"] = entry["gained"]["mean"] is not None and entry["gained"]["low"] > 0 > entry["lost"]["high"]
        told[kind] = entry
    return told


def _usable(path: Path) -> np.ndarray | None:
    """Numbers of the prompts that were measured at any point, in any line."""
    if not {"gold", "utility", "reward", "kl"} <= path.sums.keys():
        return None
    return np.flatnonzero(path.sums["gold"][1].any((0, 1)))


def _means(top: np.ndarray, bottom: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """(lines, K, prompts), (resamples, prompts) -> (resamples, lines, K)"""
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.einsum("bp,skp->bsk", weights, top) / np.einsum("bp,skp->bsk", weights, bottom)


def _at(values: np.ndarray, place: np.ndarray) -> np.ndarray:
    return np.take_along_axis(values, place[..., None], -1)[..., 0]
