"""What must hold before the first step. A breach stops the run: it would train, and mean nothing."""

from collections.abc import Sequence

import numpy as np
import torch

from rlhf_vs_dpo.errors import TrainingError
from rlhf_vs_dpo.language.forward import scores
from rlhf_vs_dpo.language.heads import Scorer
from rlhf_vs_dpo.language.text import Tokens

PER_TOKEN = {
    "cpu": 1e-3,
    "cuda": 0.3,
}  # log-probability of a token: float32, and bf16 (2403.17031 measured 0.11 for bf16)


def tolerance(device: torch.device, tokens: float) -> float:
    """What rounding may add up to over `tokens` log-probabilities: errors of tokens are independent, so their sum grows with the root."""
    return PER_TOKEN[device.type] * max(tokens, 1.0) ** 0.5


def hold(name: str, value: float, expected: float, tolerance: float, causes: str) -> None:
    """Raises TrainingError naming the invariant, the measured value and what usually breaks it."""
    if not abs(value - expected) <= tolerance:
        raise TrainingError(
            f"step-0 invariant broken: {name} is {value:.6g}, expected {expected:.6g} (tolerance {tolerance:.1g}). "
            f"Likely causes: {causes}"
        )


def check_normalised(reward: Scorer, demonstrations: Sequence[Tokens]) -> None:
    """A reward model scores demonstrations 0 on average; on a few of them, to within five standard errors."""
    scored = np.array(scores(reward, demonstrations))
    hold(
        f"the mean RM score of {len(scored)} demonstrations",
        float(scored.mean()),
        0.0,
        1e-3 + 5 * float(scored.std()) / len(scored) ** 0.5,
        "the reward model lost its reward_shift, or was normalised on other demonstrations",
    )
