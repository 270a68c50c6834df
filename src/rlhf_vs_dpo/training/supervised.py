"""The supervised loop (base, sft, reward, preference, imitation), and maximum likelihood on it (base, sft, imitation)."""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from rlhf_vs_dpo.config import Passes, Training
from rlhf_vs_dpo.language import sharding
from rlhf_vs_dpo.language.generation import bytes_to_sample
from rlhf_vs_dpo.language.logprobs import Policy
from rlhf_vs_dpo.language.models import Network
from rlhf_vs_dpo.language.text import Examples, Pairs, batches, collate
from rlhf_vs_dpo.losses.sft import nll
from rlhf_vs_dpo.run.checkpoint import Values
from rlhf_vs_dpo.run.progress import Record, bar
from rlhf_vs_dpo.training import plan as memory_plan
from rlhf_vs_dpo.training.optimise import Averages, Memory, Optimiser, accelerator, check_finite

POINTS = 200  # of a training curve


class Work(NamedTuple):
    """What `fit` must know of each example, or pair, to batch, divide and count it.

    lengths[i]  padded size of example i, for batching by length
    units[i]    what its loss is a sum over: response tokens, or 1 for a pair
    tokens[i]   its real tokens, for the cost
    names[i]    its id, for the error of a run that diverges
    """

    lengths: Sequence[int]
    units: Sequence[int]
    tokens: Sequence[int]
    names: Sequence[str]


def work_of_examples(examples: Examples) -> Work:
    """For a loss that is a sum over response tokens."""
    lengths = [len(tokens) for tokens in examples.tokens]
    return Work(lengths, [len(tokens.response) for tokens in examples.tokens], lengths, examples.names)


def work_of_pairs(pairs: Pairs) -> Work:
    """For a loss of a pair, both responses of which go through in one forward pass."""
    sizes = [(len(a), len(b)) for a, b in zip(pairs.chosen, pairs.rejected, strict=True)]
    return Work([2 * max(size) for size in sizes], [1] * len(sizes), [sum(size) for size in sizes], pairs.names)


def fit(
    network: Network,
    settings: Training,
    work: Work,
    loss: Callable[[nn.Module, list[int]], tuple[Tensor, dict[str, float]]],
    seed: int,
    record: Record,
) -> int:
    """Train `network` for `settings.steps` global batches; returns the number of real tokens trained on.

    `loss(module, group)` is the summed loss of a micro-batch (a list of example numbers), and sums of metrics over it; `module` is the
    network as it is trained: wrapped, where several processes share the work. Where it was held in parts, `network.model` is another one
    afterwards, and whole.
    """
    accelerate = accelerator()
    optimiser = Optimiser(accelerate, network, settings)
    plan = batches(work.lengths, settings.batch, settings.steps, np.random.default_rng(seed)) if settings.steps else []
    memory = Memory(network.budget, accelerate)
    if settings.steps:
        longest = np.argsort(work.lengths, kind="stable")[::-1].tolist()
        learning = {network: lambda count: loss(network, longest[:count])[0]}
        watch = record.heldout
        planned = memory_plan.plan(
            learning, work.lengths[longest[0]], memory.tokens, -(-settings.batch // accelerate.num_processes),
            cache=0 if watch is None else bytes_to_sample(network.model, watch.asked, watch.longest),
            processes=accelerate.num_processes,
        )  # fmt: skip
        memory.tokens = memory_plan.check(planned, memory.tokens, accelerate, record.what)
    every = max(1, settings.steps // POINTS)
    averages, at = Averages(), Values(step=0)
    with (
        record.checkpoint.during(fit=at, optimiser=optimiser, averages=averages),
        bar(settings.steps, record.what, visible=accelerate.is_main_process, done=at.step) as progress,
    ):
        for step, batch in list(enumerate(plan))[at.step :]:
            record.watch(network, step)
            units = sum(work.units[i] for i in batch)

            def passes(tokens: int, batch=batch, units=units) -> tuple[float, dict[str, float]]:
                sums: dict[str, float] = {}

                def micro_loss(group: list[int]) -> Tensor:
                    value, metrics = loss(optimiser.module, group)
                    for name, total in metrics.items():
                        sums[name] = sums.get(name, 0.0) + total
                    return value

                return optimiser.accumulate(optimiser.share(list(batch), work.lengths, tokens), micro_loss, units), sums

            rate = optimiser.learning_rate
            mean, sums = memory.within(passes, optimiser)
            norm = optimiser.step(mean, [work.names[i] for i in batch])
            if sums:
                values = torch.tensor(list(sums.values()), device=accelerate.device, dtype=torch.float64)
                sums = dict(zip(sums, (accelerate.reduce(values) / len(batch)).tolist(), strict=True))
            averages.add({"loss": mean, "gradient_norm": norm, "learning_rate": rate} | sums)
            if (step + 1) % every == 0 or step + 1 == settings.steps:
                means = averages.read()
                progress.set_postfix(loss=f"{means['loss']:.3f}", refresh=False)
                record.add(means, step + 1)
            progress.update()
            at.step = step + 1
            record.checkpoint.offer()
    if len(plan):
        with torch.no_grad():
            last, _ = loss(optimiser.module, [int(plan[-1][0])])
        check_finite(last, optimiser, [work.names[i] for i in plan[-1]])
    record.watch(network, settings.steps)
    sharding.gather(network)
    return int(sum(work.tokens[i] for batch in plan for i in batch))


def likelihood(policy: Policy, examples: Examples, settings: Training, seed: int, record: Record) -> int:
    """Maximum likelihood of the responses, per token: SFT, or pretraining where the prompt is BOS alone."""

    def loss(module: nn.Module, group: list[int]) -> tuple[Tensor, dict[str, float]]:
        batch = collate([examples.tokens[i] for i in group], policy.pad).to(next(policy.parameters()).device)
        return nll(module(batch).sums()).sum(), {}

    return fit(policy, settings, work_of_examples(examples), loss, seed, record)


def as_training(settings: Passes, steps: int) -> Training:
    """What `fit` needs of a method's settings, for a number of steps."""
    return Training(steps=steps, **{name: getattr(settings, name) for name in Training.model_fields if name != "steps"})


def steps_over(settings: Passes, examples: int) -> int:
    """Epochs over examples as a number of batches."""
    return max(1, math.floor(settings.epochs * examples / settings.batch))
