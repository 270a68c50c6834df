"""Sample responses from a policy, with a key-value cache, until every response of the batch has ended.

Each response draws its random numbers from a stream of its own, keyed by what it is (seed, prompt, sample), and is
sampled by inverse CDF from the full distribution: no top-k, no top-p, so that the log-probabilities taken later are
those of the very distribution that was sampled from. The batch a response is in changes nothing.
"""

from collections.abc import Sequence
from typing import NamedTuple
from zlib import crc32

import numpy as np
import torch
from torch import Tensor, nn

from rlhf_vs_dpo.errors import ModelError
from rlhf_vs_dpo.language.continuation import cache_of, continuation
from rlhf_vs_dpo.language.logprobs import Policy, suppress
from rlhf_vs_dpo.language.models import autocast, sampler, size_of_sampler
from rlhf_vs_dpo.language.text import Prompts, Tokens, check_context
from rlhf_vs_dpo.run.progress import bar

ROWS = 256  # responses generated together on a CPU


class Responses(NamedTuple):
    """tokens[i].response ends with EOS exactly where finished[i]; `tokens_read` of prompts went through the model.

    logp    of each token of each response, as the sampler had it; empty where the sampler is the policy itself, not a copy
    """

    tokens: list[Tokens]
    finished: list[bool]
    tokens_read: int
    logp: Sequence[list[float]] = ()

    @property
    def tokens_generated(self) -> int:
        return sum(len(tokens.response) for tokens in self.tokens)


def stream(seed: int, name: str, sample: int, length: int) -> np.ndarray:
    """`length` uniforms in [0, 1) that belong to one response, whatever batch it is generated in."""
    return np.random.Generator(np.random.Philox(np.random.SeedSequence([seed, crc32(name.encode()), sample]))).random(
        length
    )


def bytes_of_row(model: nn.Module, length: int) -> int:
    """Bytes that a response of `length` tokens, prompt included, takes while it is sampled: keys, values, a distribution in double precision."""
    return cache_of(model, 1, length) + 4 * 8 * model.config.get_text_config().vocab_size


def rows_together(model: nn.Module, length: int, most: int | None = None) -> int:
    """How many responses are generated together, each of `length` tokens with its prompt; `most`, where it is given, or fewer.

    On a GPU as many as an eighth of its memory holds, by powers of two from 16 to 2,048.
    """
    if (device := next(model.parameters()).device).type != "cuda":
        return most or ROWS
    fitting = torch.cuda.get_device_properties(device).total_memory // (8 * bytes_of_row(model, length))
    return min(most or 2048, max(16, 2 ** (int(fitting).bit_length() - 1)))


def bytes_to_sample(model: nn.Module, responses: int, length: int) -> int:
    """Bytes that sampling `responses`, each of `length` tokens with its prompt, takes at its worst: the rows that are generated together,
    and the sampler's copy of the model."""
    if not responses:
        return 0
    return min(rows_together(model, length), responses) * bytes_of_row(model, length) + size_of_sampler(model)


def generate(
    policy: Policy,
    prompts: Prompts,
    samples: Sequence[int],
    max_new_tokens: int,
    seed: int,
    what: str | None = None,
    rows: int | None = None,
    done: list[list[list[int]]] | None = None,
) -> Responses:
    """Sample one response for each prompt.

    The names of the prompts and `samples[i]`, with the seed, key the random stream of response i. `what` names the
    progress bar (none if it is None). `rows` are generated together, or fewer on a GPU that does not hold so many; `done` holds the
    responses of the first such batches, sampled before; those of the others are appended.

    Raises DataError where a prompt and a response of `max_new_tokens` do not fit the model's context.
    """
    done = [] if done is None else done
    check_context(
        [len(ids) + max_new_tokens for ids in prompts.ids], prompts.names, policy.context, "prompt and new tokens"
    )
    # Equal lengths together: little padding. Equal prompts together: each is read once for all its responses.
    order = sorted(range(len(prompts.ids)), key=lambda i: (len(prompts.ids[i]), prompts.names[i]))
    responses: list[list[int]] = [[] for _ in prompts.ids]
    model = sampler(policy.model)
    copied = model is not policy.model
    policy, likely = Policy(model, policy.temperature), [[] for _ in prompts.ids]
    device = next(policy.parameters()).device
    rows = rows_together(model, max(map(len, prompts.ids), default=0) + max_new_tokens, rows)
    read = start = number = 0
    with (
        bar(len(prompts.ids), what or "", "response", visible=what is not None) as progress,
        torch.inference_mode(),
        autocast(device),
    ):
        while start < len(order):  # batches that are done are as large as the device made them that did
            chunk = order[start : start + (len(done[number]) if number < len(done) else rows)]
            if number == len(done):
                uniforms = np.stack([stream(seed, prompts.names[i], samples[i], max_new_tokens) for i in chunk])
                drawn, logp = _generate_batch(
                    policy, [prompts.ids[i] for i in chunk], torch.from_numpy(uniforms).to(device)
                )
                done.append(drawn)
                for i, row in zip(chunk, logp, strict=True):
                    likely[i] = row
            for i, ids in zip(chunk, done[number], strict=True):
                responses[i] = ids
            read += sum(len(prompt) for prompt in {tuple(prompts.ids[i]) for i in chunk})
            start, number = start + len(chunk), number + 1
            progress.update(len(chunk))
    return Responses(
        [Tokens(prompt, response) for prompt, response in zip(prompts.ids, responses, strict=True)],
        [response[-1] == policy.eos for response in responses],
        read,
        likely if copied else (),
    )


def generate_together(
    policy: Policy,
    prompts: Prompts,
    samples: Sequence[int],
    max_new_tokens: int,
    seed: int,
    what: str | None = None,
    done: list[list[list[int]]] | None = None,
) -> Responses:
    """`generate`, its work shared among the processes of a distributed run, each of which gets all responses (and `done` stays as it is)."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return generate(policy, prompts, samples, max_new_tokens, seed, what, done=done)
    rank, world = torch.distributed.get_rank(), torch.distributed.get_world_size()
    count = len(prompts.ids)
    mine = Prompts(prompts.ids[rank::world], prompts.names[rank::world])
    drawn = generate(policy, mine, samples[rank::world], max_new_tokens, seed, what if rank == 0 else None)
    parts: list = [None] * world
    torch.distributed.all_gather_object(parts, drawn)
    whole = [(parts[i % world].tokens[i // world], parts[i % world].finished[i // world]) for i in range(count)]
    return Responses([t for t, _ in whole], [ended for _, ended in whole], sum(part.tokens_read for part in parts))


def from_main(values: list[float]) -> list[float]:
    """What the first process measured, on all: a choice by them must be the same everywhere, to the last bit."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        shared = [values]
        torch.distributed.broadcast_object_list(shared, src=0)
        return shared[0]
    return values


def _generate_batch(
    policy: Policy, prompts: list[list[int]], uniforms: Tensor
) -> tuple[list[list[int]], list[list[float]]]:
    """Responses to prompts, each of which is read once, and log-probabilities of their tokens; `uniforms` is (B, most tokens)."""
    model, eos, most = policy.model, policy.eos, uniforms.shape[1]
    distinct = {tuple(prompt): number for number, prompt in enumerate(dict.fromkeys(map(tuple, prompts)))}
    expand = torch.tensor([distinct[tuple(prompt)] for prompt in prompts], device=uniforms.device)
    reading = continuation(model, list(distinct), most, policy.pad)
    if len(distinct) < len(prompts):
        reading.select(expand)
    drawn = torch.full((len(prompts), most), eos, device=uniforms.device)
    likely = torch.zeros(drawn.shape, dtype=torch.float64, device=uniforms.device)
    rows = torch.arange(len(prompts), device=uniforms.device)  # which row of `drawn` is read on in each row
    ended = torch.zeros(len(prompts), dtype=torch.bool, device=uniforms.device)
    for step in range(most):
        logits = suppress(reading.logits.float(), model)
        # A row that has ended is carried along until the next clearing; all it draws is EOS.
        token, share = inverse_cdf(logits, uniforms[rows, step], policy.temperature)
        token = torch.where(ended, eos, token)
        drawn[rows, step], likely[rows, step] = token, share
        ended = ended | (token == eos)
        living = int((~ended).sum())
        if not living or step == most - 1:
            break
        if living <= 0.75 * len(rows):  # clear what has ended: copying the cache costs less than carrying the dead
            keep = (~ended).nonzero()[:, 0]
            reading.select(keep)
            rows, ended, token = rows[keep], ended[keep], token[keep]
        reading.step(token)
    responses = [ids[: ids.index(eos) + 1] if eos in ids else ids for ids in drawn.tolist()]
    logp = likely.log().tolist()
    return responses, [row[: len(ids)] for row, ids in zip(logp, responses, strict=True)]


def inverse_cdf(logits: Tensor, uniform: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """Token whose interval of the cumulative distribution holds `uniform`, and how wide it is: (B, V), (B,) -> (B,) int64, (B,) float64.

    Double precision, or a cumulative sum over a large vocabulary would move probability between tokens.
    """
    if not torch.isfinite(logits).all():
        raise ModelError("generation met logits that are not finite: the policy has diverged, or its folder is damaged")
    cumulative = (logits.double() / temperature).softmax(-1).cumsum(-1)
    target = uniform.double() * cumulative[:, -1]
    token = torch.searchsorted(cumulative, target[:, None], right=True)[:, 0].clamp_max(logits.shape[-1] - 1)
    upper, lower = (cumulative.gather(-1, (token - less).clamp_min(0)[:, None])[:, 0] for less in (0, 1))
    return token, (upper - torch.where(token > 0, lower, 0.0)) / cumulative[:, -1]


def decode(tokenizer, responses: Sequence[Tokens]) -> list[str]:
    """Text of responses, special tokens (EOS) left out."""
    return tokenizer.batch_decode([tokens.response for tokens in responses], skip_special_tokens=True)
