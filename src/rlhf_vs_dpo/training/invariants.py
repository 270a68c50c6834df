"""What must hold before the first step. A breach stops the run: it would train, and mean nothing."""

from rlhf_vs_dpo.errors import TrainingError


def hold(name: str, value: float, expected: float, tolerance: float, causes: str) -> None:
    """Raises TrainingError naming the invariant, the measured value and what usually breaks it."""
    if not abs(value - expected) <= tolerance:
        raise TrainingError(
            f"step-0 invariant broken: {name} is {value:.6g}, expected {expected:.6g} (tolerance {tolerance:.1g}). "
            f"Likely causes: {causes}"
        )
