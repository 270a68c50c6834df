"""What a run will hold in a device's memory, counted before it starts: one that cannot fit is refused at once.

Weights, gradients and AdamW's moments are counted. What a token leaves behind for the backward pass is measured in one forward pass of
the longest example: no formula knows all models.
"""

import os
import sys
from collections.abc import Callable, Collection, Iterable, Mapping
from functools import partial
from typing import NamedTuple

import psutil
import torch
from accelerate import Accelerator
from torch import Tensor, nn

from rlhf_vs_dpo.errors import OutOfMemory
from rlhf_vs_dpo.language import sharding
from rlhf_vs_dpo.language.logprobs import AT_ONCE
from rlhf_vs_dpo.language.models import autocast, recomputing

LAYER = 1.4  # what a layer holds that computes its activations again: they, and gradients of some of them
FILLED = (
    0.6  # of a GPU's free memory with activations: a plan may be a fifth too small, and memory is handed out in pieces
)
MOST = 2**17  # tokens of a micro-batch, beyond which a GPU gets no faster
SAID_FROM = 0.1  # of the device's memory: a plan of less is not worth a line


class Plan(NamedTuple):
    """Bytes on one device.

    weights      of all networks that are held, each once
    gradients    of what learns
    optimiser    AdamW's two moments of what learns
    activations  what a micro-batch keeps for the backward pass, and what its head holds at the start of that
    cache        keys, values and the sampler's copy of the policy, while responses are sampled
    smallest     activations of the longest example alone: a micro-batch cannot be less
    longest      padded tokens of that example
    tokens       padded tokens that `activations` are of, as many or more
    batch        padded tokens of a process's share of a batch, as many as those or more
    held         what is there before the first step: weights, and the copy of gradients that several processes exchange
    curvature    what TRPO needs for its products with the Fisher matrix
    """

    weights: int
    gradients: int
    optimiser: int
    activations: int
    cache: int
    smallest: int
    longest: int
    tokens: int
    batch: int
    held: int
    curvature: int = 0

    @property
    def always(self) -> int:
        """Held from the first step to the last."""
        return self.weights + self.gradients + self.optimiser

    @property
    def total(self) -> int:
        """At the worst moment: sampling, backward passes and products with the Fisher matrix take turns."""
        return self.always + max(self.activations, self.cache, self.curvature)

    @property
    def of_token(self) -> float:
        """Bytes of activations for each token beyond those of the longest example; some of what that one needs is there but once."""
        if self.tokens == self.longest:
            return self.smallest / self.longest
        return (self.activations - self.smallest) / (self.tokens - self.longest)

    def fitting(self, room: float) -> int:
        """How many padded tokens have activations of so many bytes."""
        return int(self.longest + (room - self.smallest) / max(self.of_token, 1e-9))

    def of(self, tokens: int) -> "Plan":
        """The plan with micro-batches of so many padded tokens, of which a batch may have fewer."""
        more = self.of_token * (min(tokens, self.batch) - self.longest)
        return self._replace(activations=self.smallest + max(round(more), 0), tokens=max(tokens, self.longest))

    def __str__(self) -> str:
        parts = {
            name: getattr(self, name)
            for name in ("weights", "gradients", "optimiser", "activations", "cache", "curvature")
        }
        return ", ".join(f"{name} {readable(value)}" for name, value in parts.items() if value)


def readable(size: float) -> str:
    """Bytes as a person reads them, in powers of 1024."""
    unit = 0
    while size >= 1024 and unit < 4:
        size, unit = size / 1024, unit + 1
    return f"{size:.3g} {('B', 'KiB', 'MiB', 'GiB', 'TiB')[unit]}"


def plan(
    learning: Mapping[nn.Module, Callable[[int], Tensor]],
    longest: int,
    tokens: int,
    rows: int,
    held: Iterable[nn.Module] = (),
    cache: int = 0,
    processes: int = 1,
) -> Plan:
    """Count and measure.

    learning    networks that learn, one after another, with the loss of their 1 or 2 longest examples, of `longest` padded tokens
    tokens      padded tokens of a micro-batch
    rows        examples that a process has of a batch
    held        the other networks on the device, which may share weights with those that learn
    cache       bytes that are held while responses are sampled, at other times than activations
    processes   that share the work: DistributedDataParallel holds every gradient twice; of what is held in parts, this one's is counted
    """
    parts = [sharding.local(p) for network in (*learning, *held) for p in network.parameters()]
    weights = {part.data_ptr(): part.nbytes for part in parts}
    learned = sum(sharding.local(p).nbytes for network in learning for p in network.parameters() if p.requires_grad)
    if any(hasattr(p, "to_local") for network in learning for p in network.parameters()):
        processes = 1
    batch = rows * longest
    tokens = min(max(tokens, longest), batch)
    activations, smallest = 0, 0
    for network, loss in learning.items():
        first, more = _at_worst(network, loss, weights.keys())
        activations = max(activations, round(first + (tokens / longest - 1) * more) + _of_head(network, tokens))
        smallest = max(smallest, first + _of_head(network, longest))
    exchanged = learned if processes > 1 else 0
    return Plan(
        weights=sum(weights.values()), gradients=learned + exchanged, optimiser=2 * learned, activations=activations, cache=cache,
        smallest=smallest, longest=longest, tokens=tokens, batch=batch, held=sum(weights.values()) + exchanged,
    )  # fmt: skip


def _of_head(network: nn.Module, tokens: int) -> int:
    """Bytes of a vocabulary's head at its worst: log-probabilities, their gradient and that of the logits; where it computes them
    again, some tokens at a time, the logits twice besides."""
    logits = tokens * getattr(network, "vocabulary", 0)
    return 4 * (3 * logits if logits <= AT_ONCE else 5 * AT_ONCE)


def _at_worst(network: nn.Module, loss: Callable[[int], Tensor], weights: Collection[int]) -> tuple[int, int]:
    """Bytes of activations at the worst moment, apart from a vocabulary's head: of one example, and how many more of each other one.

    Where layers compute theirs again, that of one layer are there besides what is kept, and their gradients.
    """
    device = next(network.parameters()).device
    again = recomputing(network)
    network.again = True  # the head of a Policy then keeps nothing
    sizes = [kept(partial(loss, count), device, weights) for count in (1, 2)]
    if again:
        for layer in again:
            layer.gradient_checkpointing = False
        whole = [kept(partial(loss, count), device, weights) for count in (1, 2)]
        for layer in again:
            layer.gradient_checkpointing = True
        sizes = [size + round(LAYER * (all_ - size) / len(again)) for size, all_ in zip(sizes, whole, strict=True)]
    network.again = False
    return sizes[0], sizes[1] - sizes[0]


def kept(forward: Callable[[], Tensor], device: torch.device, weights: Collection[int] = ()) -> int:
    """Bytes that a forward pass in the precision of training keeps for its backward pass, apart from `weights` (where they lie)."""
    sizes: dict[int, int] = {}
    held: list[Tensor] = []  # until all are counted: a place that is given back would be given to another tensor

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        sizes[storage.data_ptr()] = storage.nbytes()
        held.append(tensor)
        return tensor

    with torch.enable_grad(), autocast(device), torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = forward()
    del result
    return sum(size for place, size in sizes.items() if place not in weights)


def check(planned: Plan, tokens: int, accelerate: Accelerator, what: str, most: int = MOST) -> int:
    """Say what is planned where it is a good part of the device's memory; returns tokens of a micro-batch.

    On a GPU as many as fill it, `most` at the most, and no more than RLHF_MICRO_TOKENS where that is set. On a CPU they stay as they are: what fits there
    depends on what else runs, and the order of sums on them. Raises OutOfMemory, with what to change, where even the longest example
    alone does not fit.
    """
    room = _room(accelerate.device, planned)
    least = planned.always + max(planned.smallest, planned.cache, planned.curvature)
    if least > room:
        doing, first = "for one example at a time", "set `memory.gradient_checkpointing: true`"
        if planned.curvature > max(planned.smallest, planned.cache):
            doing, first = "for its products with the Fisher matrix", f"lower `rl.{what}.fisher_share`"
        elif planned.cache > planned.smallest:
            doing, first = "to sample", "lower `monitor.prompts` and, of a method of `rl`, `rl.defaults.episodes`"
        raise OutOfMemory(
            f"{what} needs {readable(least)} {doing}, and this device has {readable(room)} ({planned}). In params.yaml, "
            f"{first}, train an `adapter`, or lower `sampling.max_new_tokens`, `data.max_prompt_tokens` or `data.max_document_tokens`; "
            "or take a smaller model, or a device with more memory"
        )
    if accelerate.device.type == "cuda":
        fitting = max(1, min(most, planned.fitting(FILLED * (room - planned.always))))
        tokens = sharding.least(min(fitting, tokens) if "RLHF_MICRO_TOKENS" in os.environ else fitting)
        planned = planned.of(tokens)
    if accelerate.is_main_process and planned.total > SAID_FROM * room:
        print(
            f"{what}, memory: {planned}; {readable(planned.total)} of {readable(room)} at once, {tokens:,} tokens in a micro-batch",
            file=sys.stderr,
        )
    return tokens


def _room(device: torch.device, planned: Plan) -> int:
    """Bytes of the device that are free, with those that the plan counts and that are held already."""
    if device.type == "cuda":
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return int(torch.cuda.mem_get_info(device)[0] + cached + planned.held)
    return int(psutil.virtual_memory().available) + planned.held
