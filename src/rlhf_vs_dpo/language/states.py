"""Last hidden states, at the places where somebody reads them.

Of a prompt and a response only the states from the last token of the prompt on are read: before each response token, for
log-probabilities and values; at the last one, for a reward. A Llama is therefore run by hand here:

- a prompt that several responses share is read once: tokens of prompts and tokens of responses are two kinds of rows, and a response
  attends to the keys and values of its prompt;
- in the last layer a place that nobody reads is a key and a value alone: its query, attention and feed-forward are left out;
- what is no attention works on a flat list of tokens, without padding.

What is read is the same, to rounding (a test holds values and gradients against the model as it comes). Any other model runs as it comes.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn

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
    if _is_llama(body):
        return _of_llama(body, batch, where)
    whole = body(input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False)
    return whole.last_hidden_state[where]


def _is_llama(body: nn.Module) -> bool:
    from transformers import LlamaModel

    return type(body) is LlamaModel and body.config._attn_implementation == "sdpa"


class Rows(NamedTuple):
    """Where the tokens of a flat list stand among padded rows.

    slots   (n,) int64, place of each token among the `count` x `width` slots of the rows
    filled  (count, width) bool, slots that hold a token
    """

    slots: Tensor
    filled: Tensor

    @staticmethod
    def of(lengths: Tensor) -> "Rows":
        """Rows of these many tokens, each from its first slot on."""
        filled = torch.arange(int(lengths.max()), device=lengths.device) < lengths[:, None]
        return Rows(filled.flatten().nonzero()[:, 0], filled)

    def pad(self, flat: Tensor) -> Tensor:
        """(n, heads, width of a head) -> (count, heads, width, width of a head), 0 where there is no token."""
        padded = _Pad.apply(flat, self.slots, self.filled.numel())
        return padded.view(*self.filled.shape, *flat.shape[1:]).transpose(1, 2)

    def unpad(self, padded: Tensor) -> Tensor:
        """The reverse of `pad`, heads side by side: (n, heads x width of a head)."""
        return _Unpad.apply(padded.transpose(1, 2).flatten(-2).flatten(0, 1), self.slots)


def _of_llama(body: nn.Module, batch: Batch, where: Tensor) -> Tensor:
    *below, top = body.layers
    ends = batch.attention_mask.sum(-1)
    starts = ends - batch.response_mask.sum(-1) - 1  # the last token of the prompt: from here on states are read
    place = torch.arange(batch.input_ids.shape[1], device=where.device)
    shared = place < starts[batch.first][:, None]  # (P, T) tokens of distinct prompts
    own = (place >= starts[:, None]) & (place < ends[:, None])  # (B, T) tokens of each response
    prompts = Rows.of(starts[batch.first]) if shared.any() else None
    responses = Rows.of(ends - starts)
    count = int(shared.sum())

    ids = torch.cat([batch.input_ids[batch.first][shared], batch.input_ids[own]])
    positions = torch.cat([place.expand_as(shared)[shared], place.expand_as(own)[own]])
    flat = body.embed_tokens(ids)  # (n, d): tokens of prompts, then tokens of responses
    turn = tuple(of[0, :, None] for of in body.rotary_emb(flat[None], positions[None]))  # cos, sin: (n, 1, head width)

    order = torch.arange(responses.filled.shape[1], device=where.device).expand_as(responses.filled)
    for layer in below:
        keys, values = _keys_and_values(layer, flat, turn)
        queries = _queries(layer, flat, turn)
        attended = []
        if prompts is not None:
            q, k, v = (prompts.pad(of[:count]) for of in (queries, keys, values))
            attended.append(prompts.unpad(_attention(layer, q, k, v, None)))
        attended.append(
            responses.unpad(
                _of_responses(
                    layer, responses.pad(queries[count:]), order, keys, values, prompts, responses, batch.owner
                )
            )
        )
        flat = _rest(layer, flat, torch.cat(attended))

    keys, values = _keys_and_values(top, flat, turn)
    wanted = where[own].nonzero()[:, 0]  # which tokens of responses are read
    read = _Unpad.apply(flat, count + wanted)
    slots = Rows.of(where.sum(-1))
    at = torch.zeros_like(slots.filled, dtype=torch.int64).masked_scatter(
        slots.filled, order[responses.filled][wanted]
    )  # in its response, the place of each that is read
    queries = slots.pad(_queries(top, read, tuple(of[count + wanted] for of in turn)))
    attended = _of_responses(top, queries, at, keys, values, prompts, responses, batch.owner)
    return body.norm(_rest(top, read, slots.unpad(attended)))


def _queries(layer: nn.Module, flat: Tensor, turn: tuple[Tensor, Tensor]) -> Tensor:
    """Queries of tokens, (n, heads, head width), turned by their positions."""
    queries = layer.self_attn.q_proj(layer.input_layernorm(flat))
    return _turned(queries.unflatten(-1, (-1, layer.self_attn.head_dim)), turn)


def _keys_and_values(layer: nn.Module, flat: Tensor, turn: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Keys, turned, and values of tokens, each (n, key-value heads, head width)."""
    attention, normed = layer.self_attn, layer.input_layernorm(flat)
    heads = (-1, attention.head_dim)
    return _turned(attention.k_proj(normed).unflatten(-1, heads), turn), attention.v_proj(normed).unflatten(-1, heads)


def _of_responses(layer, queries, at, keys, values, prompts, responses, owner) -> Tensor:
    """What queries of responses (B, heads, S, width), at places `at` (B, S) of their responses, attend to: their prompt, and
    their response so far."""
    count = 0 if prompts is None else len(prompts.slots)
    k, v = responses.pad(keys[count:]), responses.pad(values[count:])
    seen = (torch.arange(k.shape[2], device=at.device) <= at[..., None])[:, None]  # (B, 1, S, response)
    if prompts is not None:
        k = torch.cat([prompts.pad(keys[:count])[owner], k], dim=2)
        v = torch.cat([prompts.pad(values[:count])[owner], v], dim=2)
        of_prompt = prompts.filled[owner][:, None, None].expand(-1, 1, at.shape[1], -1)
        seen = torch.cat([of_prompt, seen], dim=-1)
    return _attention(layer, queries, k, v, seen)


def _attention(layer: nn.Module, queries: Tensor, keys: Tensor, values: Tensor, seen: Tensor | None) -> Tensor:
    """Attention to what is `seen`; causal where that is None."""
    from transformers.models.llama.modeling_llama import repeat_kv

    groups, scale = layer.self_attn.num_key_value_groups, layer.self_attn.scaling
    keys, values = repeat_kv(keys, groups), repeat_kv(values, groups)
    return nn.functional.scaled_dot_product_attention(
        queries, keys, values, attn_mask=seen, is_causal=seen is None, scale=scale
    )


def _rest(layer: nn.Module, flat: Tensor, attended: Tensor) -> Tensor:
    """What a layer does behind its attention."""
    flat = flat + layer.self_attn.o_proj(attended)
    return flat + layer.mlp(layer.post_attention_layernorm(flat))


def _turned(heads: Tensor, turn: tuple[Tensor, Tensor]) -> Tensor:
    """Rotary position embedding (Su et al. 2021, arXiv:2104.09864, eq. 34, halves instead of neighbours): (n, heads, width)."""
    cos, sin = turn
    one, other = heads.chunk(2, dim=-1)
    return heads * cos + torch.cat((-other, one), dim=-1) * sin


class _Pad(torch.autograd.Function):
    """Rows of a list into slots of a longer one, 0 elsewhere. Its gradient is `_Unpad`: nothing is ever added up."""

    @staticmethod
    def forward(ctx, flat: Tensor, slots: Tensor, count: int) -> Tensor:
        ctx.save_for_backward(slots)
        return flat.new_zeros(count, *flat.shape[1:]).index_copy_(0, slots, flat)

    @staticmethod
    def backward(ctx, gradient: Tensor):
        return _Unpad.apply(gradient, *ctx.saved_tensors), None, None


class _Unpad(torch.autograd.Function):
    """The slots of a list, each at most once. Its gradient is `_Pad`."""

    @staticmethod
    def forward(ctx, padded: Tensor, slots: Tensor) -> Tensor:
        ctx.save_for_backward(slots)
        ctx.count = len(padded)
        return padded.index_select(0, slots)

    @staticmethod
    def backward(ctx, gradient: Tensor):
        return _Pad.apply(gradient, *ctx.saved_tensors, ctx.count), None
