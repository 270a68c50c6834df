"""Which settings a method is tried at, and what is measured of each."""

from zlib import crc32

import numpy as np
from scipy.stats import qmc

from rlhf_vs_dpo.config import Tuning

MEASURED = ("preferred", "utility", "objective", "gold", "reward", "kl", "tokens", "finished")


def settings(tuning: Tuning, method: str) -> list[dict[str, float]]:
    """The settings of a method's trials: a scrambled Sobol sequence of its own (Owen 1998), four significant digits.

    The first k of them are what a search of k trials would have tried: they fill the space evenly for any k, best for powers of two.
    """
    space = tuning.spaces[method]
    rng = np.random.default_rng([tuning.seed, crc32(method.encode())])
    drawn = qmc.Sobol(len(space), rng=rng).random(1 << (tuning.trials - 1).bit_length())[: tuning.trials]
    return [
        {key: _between(*ends, share) for (key, ends), share in zip(space.items(), point, strict=True)}
        for point in drawn
    ]


def _between(low: float, high: float, share: float) -> float:
    """The place at `share` of the way: on a logarithmic scale, or on a plain one from 0."""
    value = high * share if low == 0 else low * (high / low) ** share
    return float(f"{value:.4g}")
