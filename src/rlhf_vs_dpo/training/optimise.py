"""One optimiser step over a global batch, on any number of processes: what all loops share.

The gradient is that of the loss over the *global* batch, divided once by the global number of units (tokens or pairs),
so that padding, micro-batching and the number of processes change nothing but rounding.
"""

import math
import sys
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any, TypeVar

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor

from rlhf_vs_dpo.config import Training
from rlhf_vs_dpo.errors import OutOfMemory, TrainingError
from rlhf_vs_dpo.language import sharding
from rlhf_vs_dpo.language.models import Network, device, in_half
from rlhf_vs_dpo.language.text import micro_batches

T = TypeVar("T")


def accelerator() -> Accelerator:
    """Accelerate on the GPU of this process in bf16 where it has it, on the CPU in float32."""
    return Accelerator(cpu=not torch.cuda.is_available(), mixed_precision="bf16" if in_half(device()) else "no")


def scheduled(kind: str, step: int, steps: int, warmup: float) -> float:
    """Factor on the learning rate at `step` of `steps`: linear warm-up over a share of them, then the schedule."""
    rise = warmup * steps
    if step < rise:
        return (step + 1) / (rise + 1)
    left = (steps - step) / max(steps - rise, 1)  # 1 at the end of the warm-up, 0 at the end
    return {"constant": 1.0, "linear": left, "cosine": 0.5 * (1 - math.cos(math.pi * left))}[kind]


def round_seed(seed: int, number: int) -> int:
    """Seed of what is sampled in a later round: another for each line (`seed`) and each round, and no other stage's."""
    return int(np.random.SeedSequence([seed, 3, number]).generate_state(1)[0])


class Memory:
    """What goes through the networks at once: padded tokens of a micro-batch, of a network that is `network.budget` wide.

    Where that turns out to be more than the device holds, it is halved, once, and the batch is begun again: micro-batches divide a
    batch and do not define it, so that nothing changes but rounding.
    """

    def __init__(self, tokens: int, accelerate: Accelerator):
        self.tokens, self.accelerate = tokens, accelerate
        self.halved = False

    def within(self, passes: Callable[[int], T], optimiser: "Optimiser") -> T:
        """`passes(tokens)`: forward and backward passes of one batch, from cleared gradients.

        Raises OutOfMemory where half is too much, too, or several processes would have to agree on it.
        """
        try:
            return passes(self.tokens)
        except torch.OutOfMemoryError as error:
            if self.halved or self.accelerate.num_processes > 1:
                raise OutOfMemory(
                    f"{_first_line(error)}\nA micro-batch of {self.tokens:,} tokens does not fit on this device: set the environment "
                    f"variable RLHF_MICRO_TOKENS to {self.tokens // 2}, or lower `sampling.max_new_tokens`, `data.max_prompt_tokens` or "
                    "`data.max_document_tokens` in params.yaml"
                ) from None
        self.halved, self.tokens = True, self.tokens // 2
        optimiser.adamw.zero_grad(set_to_none=True)
        torch.cuda.empty_cache()
        print(
            f"\nout of memory: micro-batches are halved, to {self.tokens:,} tokens; that changes nothing but rounding",
            file=sys.stderr,
        )
        return self.within(passes, optimiser)


def _first_line(error: BaseException) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]


class Optimiser:
    """AdamW over one network, in steps over global batches.

    After construction `module` is the prepared one (wrapped by DistributedDataParallel, or held in parts): pass it batches, also for
    measuring.
    """

    def __init__(self, accelerate: Accelerator, network: Network, settings: Training):
        self.accelerate, self.network, self.settings = accelerate, network, settings
        self.taken = 0
        self.sharded = sharding.asked(network)
        module = sharding.shard(network) if self.sharded else network
        self.parameters = [p for p in module.parameters() if p.requires_grad]
        adamw = torch.optim.AdamW(
            self.parameters,
            lr=settings.learning_rate,
            eps=settings.adam_epsilon,
            weight_decay=settings.weight_decay,
            fused=True,
        )
        self.module, self.adamw = (module, adamw) if self.sharded else accelerate.prepare(module, adamw)

    def state_dict(self) -> dict[str, Any]:
        """Steps taken, and AdamW's moments of each parameter, in order."""
        return {"taken": self.taken, "moments": list(self.adamw.state_dict()["state"].values())}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.taken = state["taken"]
        self.adamw.load_state_dict(self.adamw.state_dict() | {"state": dict(enumerate(state["moments"]))})

    @property
    def learning_rate(self) -> float:
        given = self.settings
        return given.learning_rate * scheduled(given.schedule, self.taken, given.steps, given.warmup)

    def share(self, indices: Sequence[int], lengths: Sequence[int], max_tokens: int) -> list[list[int]]:
        """This process's micro-batches of a global batch, as lists of the given indices.

        Every process takes every n-th example by length, and as many micro-batches as the process that needs most.
        """
        world = self.accelerate.num_processes
        if len(indices) < world:
            raise TrainingError(
                f"a batch of {len(indices)} cannot be divided among {world} processes; raise `batch` (of PPO-ptx: `ptx_batch`)"
            )
        if self.sharded and len(indices) % world:
            raise TrainingError(
                f"with `memory.sharding`, a batch of {len(indices)} must be a multiple of the {world} processes: change `batch` or `ptx_batch`"
            )
        ordered = sorted(indices, key=lambda i: -lengths[i])
        parts = [ordered[rank::world] for rank in range(world)]
        split = [micro_batches([lengths[i] for i in part], max_tokens) for part in parts]
        count = max(map(len, split))
        part = parts[self.accelerate.process_index]
        mine = micro_batches([lengths[i] for i in part], max_tokens, at_least=min(count, len(part)))
        return [[part[i] for i in group] for group in mine]

    def accumulate(self, micro: Sequence[Any], loss: Callable[[Any], Tensor], units: float) -> float:
        """Backward over micro-batches; `loss(group)` is the *sum* over its units, `units` their global number.

        Gradients of several processes are brought together at the last micro-batch. Returns the global mean loss.
        """
        total = torch.zeros((), device=self.accelerate.device)
        world = self.accelerate.num_processes  # DistributedDataParallel averages gradients; the loss wants their sum
        for number, group in enumerate(micro):
            final = number == len(micro) - 1
            with nullcontext() if final or self.sharded else self.accelerate.no_sync(self.module):
                value = loss(group)
                self.accelerate.backward(value * (world / units))
            total += value.detach()
        return self.accelerate.reduce(total).item() / units

    def step(self, loss: float, names: Sequence[str]) -> float:
        """Clip, check, step and clear; returns the gradient norm before clipping.

        Raises TrainingError where loss or gradient is not finite, with the step, the learning rate and the ids of the
        batch (`names`): nothing of a diverged run is ever saved.
        """
        norm = sharding.number(torch.nn.utils.clip_grad_norm_(self.parameters, self.settings.max_grad_norm))
        rate = self.learning_rate
        if not (math.isfinite(loss) and math.isfinite(norm)):
            raise TrainingError(
                f"step {self.taken}: loss {loss}, gradient norm {norm} at learning rate {rate:.3g}; batch: {_some(names)}. "
                "Lower the learning rate or `max_grad_norm`, or look at these rows"
            )
        for group in self.adamw.param_groups:
            group["lr"] = rate
        self.adamw.step()
        self.adamw.zero_grad(set_to_none=True)
        self.taken += 1
        return norm


def check_finite(values: Tensor, optimiser: Optimiser, names: Sequence[str]) -> None:
    """After the last update of a run or an iteration: what the model now says must be numbers, or nothing is saved."""
    if not torch.isfinite(values).all():
        raise TrainingError(
            f"step {optimiser.taken}: the updated model gives values that are not finite, after a peak learning rate of "
            f"{optimiser.settings.learning_rate:.3g}; last batch: {_some(names)}. Lower the learning rate or `max_grad_norm`"
        )


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")


class Averages:
    """Means of metrics since they were last read, so that a curve has a few hundred points and no step is lost."""

    def __init__(self) -> None:
        self.sums: dict[str, float] = {}
        self.count = 0

    def add(self, metrics: dict[str, float]) -> None:
        for name, value in metrics.items():
            self.sums[name] = self.sums.get(name, 0.0) + value
        self.count += 1

    def state_dict(self) -> dict[str, Any]:
        return {"sums": self.sums, "count": self.count}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.sums, self.count = state["sums"], state["count"]

    def read(self) -> dict[str, float]:
        means = {name: value / self.count for name, value in self.sums.items()}
        self.sums, self.count = {}, 0
        return means
