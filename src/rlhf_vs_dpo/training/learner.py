"""Who takes part in reinforcement learning, and what a learner carries from one iteration to the next."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from accelerate import Accelerator
from torch import nn

from rlhf_vs_dpo.config import Rl
from rlhf_vs_dpo.language.heads import Scorer
from rlhf_vs_dpo.language.logprobs import Policy
from rlhf_vs_dpo.language.text import Tokens
from rlhf_vs_dpo.training.optimise import Optimiser


class Networks(NamedTuple):
    """The policy that learns, the reference that it stays close to, and the reward model that pays it."""

    policy: Policy
    reference: Policy
    reward: Scorer


@dataclass
class Learner:
    """The networks, the policy's optimiser (TRPO needs none), and a value network where the method has one.

    max_new_tokens  of a response
    corpus          what PPO-ptx must not forget
    budget          padded tokens of a micro-batch, the same from the first iteration to the last
    trust           TRPO's delta as a share of `max_kl`, by the schedule
    trained, read   tokens, on all processes: once for each network that learns from them; and run forward only, while the
                    policy is improved
    """

    networks: Networks
    accelerate: Accelerator
    settings: Rl
    max_new_tokens: int
    actor: Optimiser | None
    critic: Optimiser | None
    corpus: Sequence[Tokens]
    budget: int
    minibatch_rng: np.random.Generator
    ptx_rng: np.random.Generator
    train_policy: bool = True  # False while the value network warms up
    trust: float = 1.0
    trained: int = 0
    read: int = 0

    @property
    def acting(self) -> nn.Module:
        """The policy as it is trained: wrapped, where several processes share the work."""
        return self.networks.policy if self.actor is None else self.actor.module

    @property
    def criticising(self) -> nn.Module | None:
        """The value network as it is trained; None where the method has none."""
        return None if self.critic is None else self.critic.module

    @property
    def pad(self) -> int:
        """Id of the padding token, one for all networks."""
        return self.networks.policy.pad
