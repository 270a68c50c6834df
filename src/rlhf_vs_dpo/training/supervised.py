"""The supervised loop (base, sft, reward, preference, imitation), and maximum likelihood on it (base, sft, imitation)."""

import math
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor, nn

from rlhf_vs_dpo.config import Passes, Training
from rlhf_vs_dpo.language.logprobs import Policy
from rlhf_vs_dpo.losses.sft import nll
from rlhf_vs_dpo.language.models import token_budget
from rlhf_vs_dpo.run.progress import bar
from rlhf_vs_dpo.language.text import Tokens, batches, collate
from rlhf_vs_dpo.training.optimise import Averages, Log, Optimiser, accelerator, check_finite

POINTS = 200  # of a training curve


def fit(
    module: nn.Module,
    settings: Training,
    lengths: Sequence[int],
    units: Sequence[int],
    tokens: Sequence[int],
    loss: Callable[[nn.Module, list[int]], tuple[Tensor, dict[str, float]]],
    names: Sequence[str],
    seed: int,
    log: Log,
    what: str,
    before_step: Callable[[int], None] = lambda step: None,
) -> int:
    """Train `module` for `settings.steps` global batches; returns the number of real tokens trained on.

    lengths[i]  padded size of example i (for batching by length)
    tokens[i]   its real tokens (for the cost)
    units[i]    what its loss is a sum over: response tokens, or 1 for a pair
    loss(module, group)  the summed loss of a micro-batch (a list of example numbers), and sums of metrics over it
    names[i]    id of example i, for the error of a run that diverges
    """
    accelerate = accelerator()
    optimiser = Optimiser(
        accelerate,
        module,
        settings.learning_rate,
        settings.adam_epsilon,
        settings.max_grad_norm,
        settings.weight_decay,
        settings.schedule,
        settings.warmup,
        settings.steps,
    )
    budget = token_budget(accelerate.unwrap_model(optimiser.module).model)
    plan = batches(lengths, settings.batch, settings.steps, np.random.default_rng(seed)) if settings.steps else []
    every = max(1, settings.steps // POINTS)
    averages = Averages()
    with bar(settings.steps, what, visible=accelerate.is_main_process) as progress:
        for step, batch in enumerate(plan):
            before_step(step)
            sums: dict[str, float] = {}

            def micro_loss(group: list[int], sums: dict[str, float] = sums) -> Tensor:
                value, metrics = loss(optimiser.module, group)
                for name, total in metrics.items():
                    sums[name] = sums.get(name, 0.0) + total
                return value

            total_units = sum(units[i] for i in batch)
            rate = optimiser.learning_rate
            mean = optimiser.accumulate(optimiser.share(list(batch), lengths, budget), micro_loss, total_units)
            norm = optimiser.step(mean, [names[i] for i in batch])
            if sums:
                values = torch.tensor(list(sums.values()), device=accelerate.device, dtype=torch.float64)
                sums = dict(zip(sums, (accelerate.reduce(values) / len(batch)).tolist(), strict=True))
            averages.add({"loss": mean, "gradient_norm": norm, "learning_rate": rate} | sums)
            if (step + 1) % every == 0 or step + 1 == settings.steps:
                means = averages.read()
                progress.set_postfix(loss=f"{means['loss']:.3f}", refresh=False)
                log(means, step + 1)
            progress.update()
    if len(plan):
        with torch.no_grad():
            last, _ = loss(optimiser.module, [int(plan[-1][0])])
        check_finite(last, optimiser, [names[i] for i in plan[-1]])
    before_step(settings.steps)
    return int(sum(tokens[i] for batch in plan for i in batch))


def likelihood(
    policy: Policy,
    examples: Sequence[Tokens],
    names: Sequence[str],
    pad: int,
    settings: Training,
    seed: int,
    log: Log,
    what: str,
    before_step: Callable[[int], None] = lambda step: None,
) -> int:
    """Maximum likelihood of the responses, per token: SFT, or pretraining where the prompt is BOS alone."""

    def loss(module: nn.Module, group: list[int]) -> tuple[Tensor, dict[str, float]]:
        batch = collate([examples[i] for i in group], pad).to(next(module.parameters()).device)
        return nll(module(batch).sums()).sum(), {}

    lengths = [len(example) for example in examples]
    units = [len(example.response) for example in examples]
    return fit(policy, settings, lengths, units, lengths, loss, names, seed, log, what, before_step)


def as_training(settings: Passes, steps: int) -> Training:
    """What `fit` needs of a method's settings, for a number of steps."""
    return Training(steps=steps, **{name: getattr(settings, name) for name in Training.model_fields if name != "steps"})


def steps_over(settings: Passes, examples: int) -> int:
    """Epochs over examples as a number of batches."""
    return max(1, math.floor(settings.epochs * examples / settings.batch))
