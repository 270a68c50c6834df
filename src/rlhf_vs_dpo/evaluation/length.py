r"""Win rate at equal length: what is left of it when longer responses are not allowed to win by being longer.

A logistic regression of wins on the difference in length, and its prediction where there is none (Dubois et al. 2024,
arXiv:2404.04475, the form of AlpacaEval 2):

    P(policy beats opponent | y, y') = sigmoid( theta + phi * tanh( (|y| - |y'|) / std(|y| - |y'|) ) )

    length-controlled win rate = sigmoid(theta)

Where we differ: lengths are in tokens; every response is compared with every response of the opponent to the same prompt;
and the term for how hard an instruction is left out, for it needs the same judge on many models. Equal quality at
different lengths gives 1/2, whatever the judge's taste for length, as far as the tanh has its shape.
"""

from typing import NamedTuple

import numpy as np
import statsmodels.api as sm
from statsmodels.tools.sm_exceptions import PerfectSeparationError, PerfectSeparationWarning

LARGEST = 15.0  # log-odds of a comparison beyond which a fit has run off to infinity
SUPPORT = 0.05  # share of comparisons that must be on either side of equal length: else what is said of it is a guess


class Fit(NamedTuple):
    """theta, and what each prompt adds to it: theta of a resample is theta + weights @ influence, to first order."""

    theta: float
    influence: np.ndarray

    @property
    def win_rate(self) -> float:
        return float(sigmoid(self.theta))

    def resampled(self, weights: np.ndarray) -> np.ndarray:
        """Length-controlled win rate in each resample of prompts; weights (B, units) count how often each is drawn."""
        return sigmoid(self.theta + weights @ self.influence)


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def compare(
    ours: tuple[np.ndarray, np.ndarray, np.ndarray], theirs: tuple[np.ndarray, np.ndarray]
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(wins, differences in length, weights) of every response against every one of the opponent's, to one prompt.

    ours: scores, lengths, weights; theirs: scores, lengths. A tie is half a win; NaN (never ended) loses against a score.
    """
    a, b = np.nan_to_num(ours[0], nan=-np.inf)[:, None], np.nan_to_num(theirs[0], nan=-np.inf)[None, :]
    wins = (a > b) + 0.5 * (a == b)
    longer = ours[1][:, None] - theirs[1][None, :]
    return wins.ravel(), longer.ravel(), np.repeat(ours[2], len(theirs[0]))


def fit(wins: np.ndarray, longer: np.ndarray, weights: np.ndarray, prompt: np.ndarray, units: int) -> Fit | None:
    """Fit the regression to comparisons; `prompt` numbers the prompt of each. None where there is no finite optimum, or where
    nearly all responses are longer, or nearly all shorter, so that nothing was seen at equal length.

    wins in [0, 1], longer in tokens, all (comparisons,). Where every comparison went the same way there is nothing to
    regress: the win rate is 0, 1/2 or 1, whatever the length.
    """
    import warnings

    if wins.min() == wins.max():
        theta = {0.0: -np.inf, 0.5: 0.0, 1.0: np.inf}[float(wins[0])]
        return Fit(theta, np.zeros(units))
    nowhere_longer, nowhere_shorter = weights[longer <= 0].sum(), weights[longer >= 0].sum()
    if min(nowhere_longer, nowhere_shorter) < SUPPORT * weights.sum():
        return None  # what length does and what quality does cannot be told apart
    spread = float(np.sqrt(np.cov(longer, aweights=weights))) if len(longer) > 1 else 0.0
    x = np.ones((len(wins), 1))
    if spread > 0:
        x = np.stack([x[:, 0], np.tanh(longer / spread)], axis=1)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", PerfectSeparationWarning)
            fitted = sm.GLM(wins, x, family=sm.families.Binomial(), var_weights=weights).fit()
    except (PerfectSeparationError, PerfectSeparationWarning):
        return None
    if not fitted.converged or np.abs(x @ fitted.params).max() > LARGEST:
        return None
    p = fitted.fittedvalues
    information = (x * (weights * p * (1 - p))[:, None]).T @ x
    scores = x * (weights * (wins - p))[:, None]
    moved = scores @ np.linalg.inv(information)[0]
    return Fit(float(fitted.params[0]), np.bincount(prompt, weights=moved, minlength=units))
