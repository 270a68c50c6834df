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

    def band(self, d: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """2.5 and 97.5 % of R(d) over the resamples."""
        draws = gain(d[None], self.alphas[:, None], self.betas[:, None], self.form)
        low, high = np.nanpercentile(draws, [2.5, 97.5], axis=0)
        return low, high


def gain(d, alpha, beta, form: str):
    """d (alpha - beta d) or d (alpha - beta log d); 0 at d = 0."""
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(np.asarray(d) > 0, d * (alpha - beta * FORMS[form](np.maximum(d, 1e-12))), 0.0)


def peak(alpha, beta, form: str):
    """d at which R is largest; infinite where it only rises (beta <= 0), 0 where it only falls."""
    alpha, beta = np.asarray(alpha, float), np.asarray(beta, float)
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        inside = alpha / (2 * beta) if form == "best_of_n" else np.exp(alpha / beta - 1)
    return np.where(beta > 0, np.maximum(inside, 0.0), np.inf)


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
    """sqrt(KL), and the reward over that of the first point, which is the SFT policy."""
    return np.sqrt(np.maximum(kl, 0.0)), reward - reward[..., :1]


def summary(path: Path, metric: str, law: Law) -> dict[str, float | bool | None]:
    """alpha, beta, how well they fit, where R peaks, and what going on to the end of the path cost.

    `peak_kl` is null where the law has no peak within the KL that was reached: beyond, it would be a guess. Its interval
    is of the resamples; an end beyond the reach is null. `lost` is R(peak) - R(end), by the law.
    """
    d, r = _gained(path.values("kl"), path.values(metric))
    reach = float(np.nanmax(d))
    where = float(peak(law.alpha, law.beta, law.form))
    drawn = peak(law.alphas, law.betas, law.form)
    low, high = np.percentile(np.where(np.isfinite(drawn), drawn, 1e6), [2.5, 97.5])
    reached = where < reach
    residual = r - law.at(d)
    spread = float(np.nansum((r[d > 0] - np.nanmean(r[d > 0])) ** 2))
    lost = law.at(np.array([where]))[0] - law.at(d[-1:])[0] if reached and d[-1] > where else 0.0
    return {
        "alpha": law.alpha,
        "alpha_low": float(np.nanpercentile(law.alphas, 2.5)),
        "alpha_high": float(np.nanpercentile(law.alphas, 97.5)),
        "beta": law.beta,
        "beta_low": float(np.nanpercentile(law.betas, 2.5)),
        "beta_high": float(np.nanpercentile(law.betas, 97.5)),
        "r_squared": 1 - float(np.nansum(residual[d > 0] ** 2)) / spread if spread > 0 else None,
        "reached_kl": reach**2,
        "peak_kl": where**2 if reached else None,
        "peak_kl_low": float(low) ** 2 if reached and low < reach else None,
        "peak_kl_high": float(high) ** 2 if reached and high < reach else None,
        "peaks": float(np.mean(drawn < reach)),  # share of resamples with a peak within reach
        "lost": float(lost) if reached else None,
    }
