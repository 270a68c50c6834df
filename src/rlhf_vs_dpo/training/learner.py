"""Who takes part in reinforcement learning, and what a learner carries from one iteration to the next."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from accelerate import Accelerator
from torch import nn

from rlhf_vs_dpo.config import Rl
from rlhf_vs_dpo.language.heads import Scorer
from rlhf_vs_dpo.language.logprobs import Policy
from rlhf_vs_dpo.language.text import Tokens
from rlhf_vs_dpo.training.optimise import Memory, Optimiser


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
    memory          how many tokens a micro-batch has, the same from the first iteration to the last unless they do not fit
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
    memory: Memory
    minibatch_rng: np.random.Generator
    ptx_rng: np.random.Generator
    train_policy: bool = True  # False while the value network warms up
    trust: float = 1.0
    trained: int = 0
    read: int = 0

    def state_dict(self) -> dict[str, Any]:
        """All that an iteration hands to the next, but the policy itself: of the networks, optimisers, random generators, counters."""
        return {
            "actor": None if self.actor is None else self.actor.state_dict(),
            "critic": None if self.critic is None else self.critic.state_dict(),
            "value": None if self.critic is None else self.critic.network.state_dict(),
            "minibatches": self.minibatch_rng.bit_generator.state,
            "ptx": self.ptx_rng.bit_generator.state,
            "trained": self.trained,
            "read": self.read,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if self.actor is not None:
            self.actor.load_state_dict(state["actor"])
        if self.critic is not None:
            self.critic.load_state_dict(state["critic"])
            self.critic.network.load_state_dict(state["value"])
        self.minibatch_rng.bit_generator.state = state["minibatches"]
        self.ptx_rng.bit_generator.state = state["ptx"]
        self.trained, self.read = state["trained"], state["read"]

    @property
    def acting(self) -> nn.Module:
        """The policy as it is trained: wrapped, where several processes share the work."""
        return self.networks.policy if self.actor is None else self.actor.module

    @property
    def criticising(self) -> nn.Module | None:
        """The value network as it is trained; None where the method has none."""
        return None if self.critic is None else self.critic.module

    @property
    def sharded(self) -> bool:
        """Whether networks are held in parts, so that all processes must make equally many passes."""
        return self.actor is not None and self.actor.sharded

    @property
    def pad(self) -> int:
        """Id of the padding token, one for all networks."""
        return self.networks.policy.pad
