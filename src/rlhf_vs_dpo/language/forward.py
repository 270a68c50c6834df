"""Forward passes without a gradient: log-probabilities and scores of a whole table."""

from collections.abc import Callable, Sequence

import torch

from rlhf_vs_dpo.language import sharding
from rlhf_vs_dpo.language.heads import Scorer
from rlhf_vs_dpo.language.logprobs import Policy
from rlhf_vs_dpo.language.models import Network, autocast
from rlhf_vs_dpo.language.states import last
from rlhf_vs_dpo.language.text import Tokens, collate, micro_batches
from rlhf_vs_dpo.run.progress import bar


def measure(
    network: Network,
    examples: Sequence[Tokens],
    read: Callable,
    what: str | None = None,
    done: list[list] | None = None,
) -> list:
    """`read(network, batch)` -> a list with one value per row, over all examples, in their order.

    `what` names the progress bar (none if it is None). `done` holds the values of the first batches, read before; those of the others
    are appended.
    """
    done = [] if done is None else done
    parts = sharding.sharded(network.model)
    device = next(network.parameters()).device
    places: dict[tuple, list[int]] = {}
    for i, example in enumerate(examples):
        places.setdefault(_text(example), []).append(i)
    distinct = [examples[same[0]] for same in places.values()]
    where = list(places.values())
    values: list = [None] * len(examples)
    with (
        bar(len(distinct), what or "", "text", visible=what is not None) as progress,
        torch.no_grad() if parts else torch.inference_mode(),  # FSDP reuses what it has gathered
        autocast(device),
    ):
        # Responses of one length together, whatever their prompts: little padding, and many share a prompt, which is read once.
        longest = max((len(example.prompt) for example in distinct), default=0)
        groups = micro_batches(
            [longest + len(example.response) for example in distinct], network.budget, made=[*map(len, done)]
        )
        if parts and groups:  # each pass is work of all processes
            groups += groups[:1] * (sharding.most(len(groups)) - len(groups))
        for number, group in enumerate(groups):
            if number == len(done):
                done.append(read(network, collate([distinct[i] for i in group], network.pad).to(device)))
            for i, value in zip(group, done[number], strict=True):
                for place in where[i]:
                    values[place] = value
            progress.update(len(group))
    return values


def tokens_read(examples: Sequence[Tokens]) -> int:
    """How many tokens a `measure` of them runs through the model."""
    return sum(len(example) for example in {_text(example): example for example in examples}.values())


def _text(example: Tokens) -> tuple:
    """What makes two examples one: a short response is often sampled again, and each text is read once."""
    return tuple(example.prompt), tuple(example.response)


def log_likelihoods(
    policy: Policy, examples: Sequence[Tokens], what: str | None = None, done: list[list] | None = None
) -> list[float]:
    """log pi(y|x) of each example, natural log."""
    return measure(policy, examples, lambda policy, batch: policy(batch).sums().tolist(), what, done)


def scores(
    scorer: Scorer, examples: Sequence[Tokens], what: str | None = None, done: list[list] | None = None
) -> list[float]:
    """Normalised reward of each example, read at its last token."""
    read = lambda scorer, batch: scorer(batch, last(batch.response_mask)).tolist()  # noqa: E731
    return measure(scorer, examples, read, what, done)
