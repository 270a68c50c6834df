r"""The law of best-of-n, estimated for every n from N >= n samples of a prompt.

Drawing n of the N samples without replacement and keeping the best picks the i-th smallest (by RM reward) with probability

    w_i = C(i-1, n-1) / C(N, n),      i = n ... N

so that sum_i w_i f_(i) is the unbiased, lowest-variance estimate of E[f(best of n)] (order statistics; used for pass@k by
Chen et al. 2021, arXiv:2107.03374, and for best-of-n by Nakano et al. 2021, arXiv:2112.09332, appendix I).

The law of the best of n gives y the probability F(y)^n - F_-(y)^n, where F(y) is the probability that a sample of ref
scores no higher than y and F_-(y) that it scores lower. Hence

    KL(best of n || ref) = E[ log( (F^n - F_-^n) / ref(y) ) ]  <=  log n - (n-1)/n

with equality where no response has weight of its own (Beirami et al. 2024, arXiv:2401.01879). Responses of equal reward share
a level, whose weight takes the place of ref(y). It is known exactly; F_- is estimated from the ranks of the others, such that log F_- is unbiased in the continuous case (digamma), where
the estimate is the bound itself. For a best response with weight of its own it is low by at most n/N nats.
"""

import numpy as np
from scipy.special import digamma, gammaln


def order_weights(total: int, n: int) -> np.ndarray:
    """Probability that the best of n out of `total` is the i-th smallest, i = 1 ... total. Needs n <= total."""
    if not 1 <= n <= total:
        raise ValueError(f"best of {n} cannot be estimated from {total} samples")
    i = np.arange(1, total + 1)
    with np.errstate(invalid="ignore"):
        log_weights = (
            gammaln(i) - gammaln(n) - gammaln(np.maximum(i - n, 0) + 1)
            - (gammaln(total + 1) - gammaln(n + 1) - gammaln(total - n + 1))
        )  # fmt: skip
    return np.where(i >= n, np.exp(log_weights), 0.0)


def tied_weights(rewards: np.ndarray, n: int) -> np.ndarray:
    """`order_weights` in the order of `rewards`; equal rewards share theirs. Unfinished responses (NaN) are worst."""
    ranked = np.nan_to_num(rewards, nan=-np.inf)
    _, level, count = np.unique(ranked, return_inverse=True, return_counts=True)
    ordered = order_weights(len(ranked), n)
    ends = np.cumsum(count)
    shared = np.diff(np.concatenate([[0.0], np.cumsum(ordered)])[np.concatenate([[0], ends])]) / count
    return shared[level]


def log_ratio(rewards: np.ndarray, logp: np.ndarray, responses: np.ndarray, n: int) -> np.ndarray:
    """log( P(best of n is y) / ref(y) ) of each sample of one prompt, estimated as above; 0 for n = 1.

    Responses of one reward share a level, and the ratio. Those that never ended (NaN) are the lowest: there are more of
    them than were sampled, so that the weight of their level is their share.
    """
    ranked = np.nan_to_num(rewards, nan=-np.inf)
    levels, level, count = np.unique(ranked, return_inverse=True, return_counts=True)
    _, first = np.unique(responses, return_index=True)  # each response once
    mass = np.bincount(level[first], weights=np.exp(np.minimum(logp[first], -1e-12)), minlength=len(levels))
    mass = np.where(np.isfinite(levels), np.clip(mass, 1e-300, 1 - 1e-12), count / len(ranked))
    lower = np.cumsum(count) - count  # samples that score lower
    others = len(ranked) - count  # samples of other levels
    below = (1 - mass) * np.exp(digamma(lower + 1) - digamma(others + 2))
    below = np.where(np.isfinite(levels), below, 0.0)
    whole = below + mass
    with np.errstate(divide="ignore"):  # the lowest level: log1p(-1)
        gained = n * np.log(whole) + np.log(-np.expm1(n * np.log1p(-np.minimum(mass / whole, 1.0))))
    return (gained - np.log(mass))[level]


def kl_bound(n: int) -> float:
    """log n - (n-1)/n: no best-of-n policy is further from its reference, in nats."""
    return float(np.log(n) - (n - 1) / n)


def win_rate_bound(n: int) -> float:
    """n/(n+1): no best-of-n policy wins more often against its reference, whoever judges."""
    return n / (n + 1)
