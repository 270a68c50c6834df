r"""Closed forms: what each method converges to where every response can be enumerated.

Distributions, rewards and references are arrays over outcomes, (O,), or over prompts and outcomes, (P, O), float64; the last
axis is the outcomes. Every function is plain arithmetic: nothing here is trained.
"""

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


def sigmoid(x: Array) -> Array:
    return 0.5 * (1 + np.tanh(x / 2))


def kl(p: Array, q: Array) -> Array:
    """KL(p || q) in nats over the last axis; 0 log 0 = 0."""
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(p > 0, p * (np.log(p) - np.log(q)), 0.0).sum(-1)


def total_variation(p: Array, q: Array) -> Array:
    """Half the L1 distance over the last axis."""
    return 0.5 * np.abs(p - q).sum(-1)


def gibbs(ref: Array, reward: Array, beta: float) -> tuple[Array, Array]:
    """(pi*, log Z): the policy that maximises E[r] - beta KL(pi || ref), ref exp(r/beta) / Z (arXiv:2305.18290, eq. 4)."""
    logits = np.log(ref) + reward / beta
    top = logits.max(-1, keepdims=True)
    log_z = top + np.log(np.exp(logits - top).sum(-1, keepdims=True))
    return np.exp(logits - log_z), log_z[..., 0]


def objective(pi: Array, ref: Array, reward: Array, beta: float) -> Array:
    """J(pi) = E_pi[r] - beta KL(pi || ref); its maximum is beta log Z."""
    return (pi * reward).sum(-1) - beta * kl(pi, ref)


def win_rate(p: Array, q: Array, reward: Array) -> float:
    """Probability that a response of p has a higher reward than one of q; a tie is half a win. One prompt: (O,)."""
    beats = (reward[:, None] > reward[None, :]) + 0.5 * (reward[:, None] == reward[None, :])
    return float(p @ beats @ q)


def chosen_law(ref: Array, reward: Array, deterministic: bool = False) -> Array:
    """Law of the chosen one of two responses of ref: 2 ref(y) E_{y' ~ ref}[P(y beats y')]; one prompt, (O,).

    P is Bradley-Terry, sigmoid(r - r'), or the higher reward for certain.
    """
    gap = reward[:, None] - reward[None, :]
    beats = (gap > 0) + 0.5 * (gap == 0) if deterministic else sigmoid(gap)
    return 2 * ref * (beats @ ref)


def best_of_n_law(ref: Array, reward: Array, n: int) -> Array:
    """Law of the best of n responses of ref, ties broken at random: ref(y) (F^n - F_-^n) / (F - F_-); one prompt, (O,).

    F is the probability of a reward no higher than that of y, F_- of a lower one.
    """
    levels, which = np.unique(reward, return_inverse=True)
    mass = np.bincount(which, weights=ref, minlength=len(levels))
    upper = np.cumsum(mass)
    share = np.divide(mass, upper, out=np.zeros_like(mass), where=mass > 0)
    with np.errstate(divide="ignore"):  # the lowest level: log1p(-1)
        gained = upper**n * -np.expm1(n * np.log1p(-share))  # F^n - F_-^n, exact for levels of tiny mass too
    ratio = np.divide(gained, mass, out=np.zeros_like(mass), where=mass > 0)
    law = ref * ratio[which]
    return law / law.sum()


def threshold_law(ref: Array, reward: Array, threshold: float) -> Array:
    """ref conditioned on a reward above the threshold; its KL to ref is -log P(r > threshold)."""
    kept = ref * (reward > threshold)
    return kept / kept.sum(-1, keepdims=True)


def gibbs_at_kl(ref: Array, reward: Array, target: float) -> Array:
    """The Gibbs policy whose KL to ref is `target` nats (bisection over 1/beta); one prompt, (O,)."""
    low, high = 0.0, 1.0
    while kl(gibbs(ref, reward, 1 / high)[0], ref) < target and high < 1e6:
        high *= 2
    for _ in range(200):
        middle = (low + high) / 2
        if kl(gibbs(ref, reward, 1 / middle)[0], ref) < target:
            low = middle
        else:
            high = middle
    return gibbs(ref, reward, 1 / high)[0]


def ipo_two_outcomes(preference: float, tau: float) -> float:
    """pi(first) at IPO's optimum with two outcomes and a uniform reference: sigmoid((2p - 1) / (2 tau))."""
    return float(sigmoid(np.float64((2 * preference - 1) / (2 * tau))))
