"""Last hidden states, at the places where somebody reads them.

Of a prompt and a response only the states from the last token of the prompt on are read: before each response token, for
log-probabilities and values; at the last one, for a reward. A Llama is therefore run by hand here:

- a prompt that several responses share is read once: tokens of prompts and tokens of responses are two kinds of rows, and a response
  attends to the keys and values of its prompt;
- in the last layer a place that nobody reads is a key and a value alone: its query, attention and feed-forward are left out;
- what is no attention works on a flat list of tokens, without padding, and small projections of the same tokens are one product.

What is read is the same, to rounding (a test holds values and gradients against the model as it comes). Any other model runs as it comes.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from rlhf_vs_dpo.language.llama import Rows, attend, heads, is_llama, rest, turns
from rlhf_vs_dpo.language.text import Batch


def before(mask: Tensor) -> Tensor:
    """Mask of the places whose state predicts a token of `mask`: one to the left, (B, T) bool."""
    return torch.cat([mask[:, 1:], torch.zeros_like(mask[:, :1])], dim=1)


def last(mask: Tensor) -> Tensor:
    """Mask of the last True of each row, where a response is scored, (B, T) bool."""
    return mask & (mask.flip(-1).cumsum(-1).flip(-1) == 1)


def states(model: nn.Module, batch: Batch, where: Tensor) -> Tensor:
    """Last hidden states of a Hugging Face model, (N, d), at the N True places of `where` (B, T), in their order.

    No place may lie before the last token of a prompt.
    """
    body = model.base_model
    if is_llama(body):
        return _of_llama(body, batch, where)
    with _forgetting(body):
        whole = body(input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False)
    return whole.last_hidden_state[where]


@contextmanager
def _forgetting(body: nn.Module) -> Iterator[None]:
    """Layers compute their activations again in the backward pass, if the model was told to (`models.recompute`).

    transformers does so in training mode alone, in which the rest of the model is never: its dropout is off for good.
    """
    told = [layer for layer in body.modules() if getattr(layer, "gradient_checkpointing", False)]
    for layer in told:
        layer.training = torch.is_grad_enabled()
    try:
        yield
    finally:
        for layer in told:
            layer.training = False


def _of_llama(body: nn.Module, batch: Batch, where: Tensor) -> Tensor:
    *below, top = body.layers
    ends = batch.attention_mask.sum(-1)
    starts = ends - batch.response_mask.sum(-1) - 1  # the last token of the prompt: from here on states are read
    place = torch.arange(batch.input_ids.shape[1], device=where.device)
    shared = place < starts[batch.first][:, None]  # (P, T) tokens of distinct prompts
    own = (place >= starts[:, None]) & (place < ends[:, None])  # (B, T) tokens of each response
    count = int(shared.sum())
    prompts, responses = Rows.of(starts[batch.first]), Rows.of(ends - starts)
    whole = Rows.side_by_side(prompts, batch.owner, responses)

    ids = torch.cat([batch.input_ids[batch.first][shared], batch.input_ids[own]])
    positions = torch.cat([place.expand_as(shared)[shared], place.expand_as(own)[own]])
    flat = body.embed_tokens(ids)  # (n, d): tokens of prompts, then tokens of responses
    turn = turns(body, flat, positions)

    order = place[: responses.filled.shape[1]].expand_as(responses.filled)  # place of each token in its response
    seen = _seen(order, prompts.filled[batch.owner])

    def through(layer: nn.Module, flat: Tensor) -> Tensor:
        queries, keys, values = heads(layer, flat, turn, "qkv")
        wide = whole.pad(keys), whole.pad(values)
        if not count:
            return rest(layer, flat, responses.unpad(attend(layer, responses.pad(queries), *wide, seen)))
        asking, answering = queries.tensor_split([count])
        of_prompts = attend(layer, *(prompts.pad(of) for of in (asking, keys[:count], values[:count])), None)
        of_responses = attend(layer, responses.pad(answering), *wide, seen)
        return rest(layer, flat, torch.cat([prompts.unpad(of_prompts), responses.unpad(of_responses)]))

    def at_top(flat: Tensor) -> Tensor:
        keys, values = heads(top, flat, turn, "kv")
        wanted = where[own]  # which tokens of responses are read
        reading = Rows.at(nn.functional.pad(wanted, (count, 0))[None])
        read = reading.pick(flat)
        (queries,) = heads(top, read, reading.pick(turn), "q")
        slots = Rows.of(where.sum(-1))
        at = order[responses.filled][wanted].index_select(0, slots.tokens.flatten()).view_as(slots.tokens)
        seen = _seen(at, prompts.filled[batch.owner], responses.filled.shape[1])
        attended = slots.unpad(attend(top, slots.pad(queries), whole.pad(keys), whole.pad(values), seen))
        return rest(top, read, attended)

    for step in (*(partial(through, layer) for layer in below), at_top):
        if top.gradient_checkpointing and torch.is_grad_enabled():
            flat = checkpoint(step, flat, use_reentrant=False, preserve_rng_state=False)
        else:
            flat = step(flat)
    return body.norm(flat)


def _seen(at: Tensor, prompt: Tensor, width: int | None = None) -> Tensor:
    """What queries at places `at` (B, S) of their responses may attend to: their prompt (B, W), and their response so far.

    (B, 1, S, W + width) bool; `width` is that of the responses, S where it is not given.
    """
    so_far = torch.arange(width or at.shape[1], device=at.device) <= at[..., None]
    return torch.cat([prompt[:, None].expand(-1, at.shape[1], -1), so_far], dim=-1)[:, None]
