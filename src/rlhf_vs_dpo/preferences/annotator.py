r"""The simulated annotator: chooses between two responses as a noisy and biased person would.

Bradley and Terry 1952, with a temperature:

    P(a is chosen over b) = sigmoid( (u(a) - u(b)) / temperature ),
    u(y) = gold(y) + length_bias * |y| + filler_bias * [y holds a filler phrase]

`gold` is the true reward; the two biases are what a method can learn to exploit instead. All three numbers are in
params.yaml (`preferences.annotator`).
"""

from typing import NamedTuple

import numpy as np
import pandas as pd

from rlhf_vs_dpo.config import Annotator, Preferences


class Choice(NamedTuple):
    """For each pair: whether `first` was chosen, and the probability of the choice that was made."""

    first: np.ndarray
    p_chosen: np.ndarray


def utility(gold: np.ndarray, tokens: np.ndarray, filler: np.ndarray, settings: Annotator) -> np.ndarray:
    """u(y) per response; `filler` is 0/1, or NaN where the source has no filler phrases (then it counts as 0)."""
    return gold + settings.length_bias * tokens + settings.filler_bias * np.nan_to_num(filler)


def column(judged: pd.DataFrame, settings: Preferences) -> pd.Series:
    """u(y) of each row of a table with `gold`, `tokens` and `filler`; all null where the pairs are those of a data set, for
    nobody knows what their annotators wanted."""
    if settings.source != "annotator":
        return pd.Series(np.nan, index=judged.index)
    of = (judged[name].to_numpy(float) for name in ("gold", "tokens", "filler"))
    return pd.Series(utility(*of, settings.annotator), index=judged.index)


def probability(first: np.ndarray, second: np.ndarray, temperature: float) -> np.ndarray:
    """P(first is chosen over second) of responses of these utilities: the sigmoid, without overflow."""
    return 0.5 * (1 + np.tanh((first - second) / temperature / 2))


def choose(first: np.ndarray, second: np.ndarray, settings: Annotator, rng: np.random.Generator) -> Choice:
    """Choices between responses of utility `first` and `second`, each (N,)."""
    p_first = probability(first, second, settings.temperature)
    chosen = rng.random(len(first)) < p_first
    return Choice(chosen, np.where(chosen, p_first, 1 - p_first))
