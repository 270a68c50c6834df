"""A run that goes wrong says why: named warnings about reinforcement learning, in the log and as MLflow tags.

An alarm looks at what an iteration logged and changes nothing. Each is raised once a run, at its first iteration; the
bounds below are rules of thumb, and each message names the usual causes.
"""

from collections.abc import Callable
from typing import Any, NamedTuple


class Alarm(NamedTuple):
    """When to warn, of what, and what usually causes it; `sounds` gets metrics, the first ones, and the share done."""

    sounds: Callable[[dict[str, float], dict[str, float], float], bool]
    message: str


ALARMS = {
    "negative_kl": Alarm(
        lambda m, first, done: m.get("rollout/kl", 0.0) < -3 * m.get("rollout/kl_standard_error", 0.0) - 1e-3,
        "KL(policy, reference) is estimated at {rollout/kl:.3f} nats, below 0 by more than three standard errors "
        "({rollout/kl_standard_error:.3f}). A KL is never negative: responses are sampled from another distribution than the one "
        "log-probabilities are taken under (temperature, top-k, top-p, a minimum length), padding is counted, dropout is "
        "on, or the reference is another model.",
    ),
    "sampler_gap": Alarm(
        lambda m, first, done: m.get("rollout/sampler_gap", 0.0) > 0.05,
        "the sampler's log-probabilities lie {rollout/sampler_gap:.3f} nats per token from those of training (at most "
        "{rollout/sampler_gap_largest:.2f}): responses come from another distribution than the one that is trained. bf16 explains about 0.01; "
        "more says that the copy which is sampled from is not the policy, or that the model needs float32.",
    ),
    "ratio_spread": Alarm(
        lambda m, first, done: m.get("update/ratio_std", 0.0) > 0.5,
        "ratios of new to old probability have a standard deviation of {update/ratio_std:.2f}. Steps are too large for the "
        "episodes they reuse: lower `learning_rate` or `epochs`.",
    ),
    "clip_fraction": Alarm(
        lambda m, first, done: m.get("update/clip_fraction", 0.0) > 0.3,
        "{update/clip_fraction:.0%} of ratios are beyond the clip, and such tokens teach nothing. Lower `learning_rate` or "
        "`epochs`, or raise `clip`.",
    ),
    "explained_variance": Alarm(
        lambda m, first, done: done > 0.2 and m.get("rollout/explained_variance", 1.0) < 0.0,
        "the value network predicts returns worse than their mean (explained variance {rollout/explained_variance:.2f}). "
        "Advantages are noise: raise `value_learning_rate`, `epochs` or `value_warmup`, or look at the scale of the reward.",
    ),
    "unfinished": Alarm(
        lambda m, first, done: m.get("rollout/finished", 1.0) < min(0.8, first.get("rollout/finished", 1.0) - 0.05),
        "only {rollout/finished:.0%} of responses end. The reward model may pay for length: lower `unfinished_reward`, or "
        "raise `sampling.max_new_tokens` if the SFT policy is cut short too.",
    ),
    "entropy": Alarm(
        lambda m, first, done: m.get("rollout/entropy", 1.0) < 0.1 * first.get("rollout/entropy", 0.0),
        "the policy's entropy has fallen to {rollout/entropy:.3f} nats per token, a tenth of where it started: it says "
        "nearly the same every time. Raise `kl_coefficient`, or lower `learning_rate`.",
    ),
    "score_out_of_range": Alarm(
        lambda m, first, done: m.get("rollout/score_out_of_range", 0.0) > 0.05,
        "{rollout/score_out_of_range:.0%} of responses score outside the range of all pairs that the reward model was "
        "trained on. It extrapolates there, and what it says may mean nothing: raise `kl_coefficient`, or stop earlier.",
    ),
}  # fmt: skip


class Listening:
    """`log`, with an ear: calls `warn(name, message)` at the first iteration at which each alarm sounds."""

    def __init__(self, log: Callable[[dict[str, float], int], None], warn: Callable[[str, str], None], iterations: int):
        self.log, self.warn, self.iterations = log, warn, iterations
        self.first: dict[str, float] = {}
        self.raised: set[str] = set()

    def __call__(self, metrics: dict[str, float], step: int) -> None:
        self.log(metrics, step)
        if not any(name.startswith("rollout/") for name in metrics):
            return
        self.first |= {name: value for name, value in metrics.items() if name not in self.first}
        for name, alarm in ALARMS.items():
            if name not in self.raised and alarm.sounds(metrics, self.first, step / self.iterations):
                self.raised.add(name)
                self.warn(name, f"iteration {step}: " + alarm.message.format(**metrics))

    def state_dict(self) -> dict[str, Any]:
        return {"first": self.first, "raised": sorted(self.raised)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.first, self.raised = state["first"], set(state["raised"])
