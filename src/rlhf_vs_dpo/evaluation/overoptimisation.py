r"""Laws of over-optimisation (Gao, Schulman and Hilton 2023, arXiv:2210.10760, section 3.1, equations for R_bon and R_RL).

With d = sqrt(KL(policy || SFT)) and R the reward gained over the SFT policy,

    best of n    R(d) = d (alpha - beta d)         peak at d = alpha / (2 beta)
    RL           R(d) = d (alpha - beta log d)     peak at d = exp(alpha / beta - 1)

Both are linear in alpha and beta: least squares has a closed form. The second is fitted to the DPO family and to imitation
too, as Rafailov et al. 2024 (arXiv:2406.02900) do; whether it holds there is what the residual says. d itself is measured,
not set, so that its noise pulls alpha towards zero a little; every resample has its own.
"""

from typing import NamedTuple

import numpy as np

from rlhf_vs_dpo.evaluation.paths import Path
from rlhf_vs_dpo.evaluation.statistics import Estimate

AT_SFT = 0.01  # nats: a path that starts no further away starts at the SFT policy
FORMS = {"best_of_n": lambda d: d, "rl": np.log}


class Law(NamedTuple):
    """alpha and beta of a form, also in each resample."""

    form: str
    alpha: float
    beta: float
    alphas: np.ndarray
    betas: np.ndarray

    def at(self, d: np.ndarray) -> np.ndarray:
        """R(d)."""
        return gain(d, self.alpha, self.beta, self.form)

    def band(self, path: Path, metric: str, d: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Ends of the 95 % interval of R at each d."""
        draws = gain(d[None], self.alphas[:, None], self.betas[:, None], self.form)
        ends = [_interval(path, value, draws[:, i], metric) for i, value in enumerate(self.at(d))]
        return np.array([low for _, low, _ in ends]), np.array([high for _, _, high in ends])


def _interval(path: Path, value: float, draws: np.ndarray, metric: str) -> tuple[float, float, float]:
    """A number made of the whole path, with its interval over prompts and lines.

    Lines have the share of its variance that they have of the metric's at the end of the path (of what of it was measured).
    """
    end = [point for point in path.points[metric] if np.isfinite(point.value)][-1]
    variance = float(np.nanvar(end.draws, ddof=1))
    share = end.line_variance / variance if variance > 0 else 0.0
    found = Estimate(float(value), draws, share * float(np.nanvar(draws, ddof=1)), end.lines, end.units).interval()
    return found["mean"], found["low"], found["high"]


def gain(d, alpha, beta, form: str):
    """d (alpha - beta d) or d (alpha - beta log d); 0 at d = 0."""
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(np.asarray(d) > 0, d * (alpha - beta * FORMS[form](np.maximum(d, 1e-12))), 0.0)


def peak(alpha, beta, form: str, reach: float):
    """d in [0, reach] at which R is largest: 0 where it falls from the start, `reach` where it rises to the end."""
    alpha, beta = np.asarray(alpha, float), np.asarray(beta, float)
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        inside = alpha / (2 * beta) if form == "best_of_n" else np.exp(alpha / beta - 1)
    inside = np.where((beta > 0) & np.isfinite(inside), np.clip(inside, 0.0, reach), 0.0)
    places = np.stack([np.zeros_like(inside), inside, np.full_like(inside, reach)])
    worth = np.stack([gain(place, alpha, beta, form) for place in places])
    return np.take_along_axis(places, worth.argmax(0)[None], 0)[0]


def least_squares(d: np.ndarray, r: np.ndarray, form: str) -> tuple[np.ndarray, np.ndarray]:
    """alpha and beta of the best fit, for points along the last axis; points at d = 0 say nothing."""
    d, r = np.asarray(d, float), np.asarray(r, float)
    usable = (d > 0) & np.isfinite(r)
    safe = np.where(usable, d, 1.0)
    x = np.stack([safe, -safe * FORMS[form](safe)], axis=-1) * usable[..., None]
    fitted = np.linalg.pinv(x) @ np.where(usable, r, 0.0)[..., None]
    return fitted[..., 0, 0], fitted[..., 1, 0]


def fit(path: Path, metric: str, form: str) -> Law | None:
    """The law of a path; None where it has fewer than three points away from the SFT policy, or did not start there.

    (A policy with new control tokens starts far from it, and comes closer.)
    """
    if abs(path.values("kl")[0]) > AT_SFT:
        return None
    d, r = _gained(path.values("kl"), path.values(metric))
    if ((d > 0) & np.isfinite(r)).sum() < 3:
        return None
    alpha, beta = least_squares(d, r, form)
    alphas, betas = least_squares(*_gained(path.draws("kl"), path.draws(metric)), form)
    return Law(form, float(alpha), float(beta), alphas, betas)


def _gained(kl: np.ndarray, reward: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """sqrt(KL), and the reward over that of the first point, which is the SFT policy: its KL is 0 but for rounding, and it is no point of a fit."""
    d = np.sqrt(np.maximum(kl, 0.0))
    d[..., 0] = 0.0
    return d, reward - reward[..., :1]


def summary(path: Path, metric: str, law: Law) -> dict[str, float | str | None]:
    """alpha, beta, how well they fit, where R peaks, and what going on to the end of the path cost.

    `peak_kl` is null where the law rises to the furthest KL that was reached: beyond, it would be a guess. Its interval is
    of the percentiles of the resamples; an end at the reach is null, and `peaks` is the share of them that peak before it.
    `lost` is R(peak) - R(end), by the law.
    """
    d, r = _gained(path.values("kl"), path.values(metric))
    reach, end = float(np.nanmax(d)), d[-1]
    where, drawn = float(peak(law.alpha, law.beta, law.form, reach)), peak(law.alphas, law.betas, law.form, reach)
    low, high = np.nanpercentile(drawn, [2.5, 97.5])
    residual = r - law.at(d)
    spread = float(np.nansum((r[d > 0] - np.nanmean(r[d > 0])) ** 2))
    told: dict[str, float | str | None] = {
        "form": law.form,
        "reached_kl": reach**2,
        "peaks": float(np.mean(drawn < reach)),
    }
    for name, value, draws in (("alpha", law.alpha, law.alphas), ("beta", law.beta, law.betas)):
        told |= dict(zip((name, f"{name}_low", f"{name}_high"), _interval(path, value, draws, metric), strict=True))
    told["r_squared"] = 1 - float(np.nansum(residual[d > 0] ** 2)) / spread if spread > 0 else None
    told |= dict.fromkeys(("lost", "lost_low", "lost_high", "peak_kl", "peak_kl_low", "peak_kl_high"))
    if where < reach:
        fell = gain(drawn, law.alphas, law.betas, law.form) - gain(end, law.alphas, law.betas, law.form)
        lost = float(law.at(np.array(where)) - law.at(np.array(end)))
        told |= dict(zip(("lost", "lost_low", "lost_high"), _interval(path, lost, fell, metric), strict=True))
        told |= {
            "peak_kl": where**2,
            "peak_kl_low": float(low) ** 2,
            "peak_kl_high": float(high) ** 2 if high < reach else None,
        }
    return told
