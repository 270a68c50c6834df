"""Last hidden states, at the places where somebody reads them.

Of a prompt and a response only the states from the last token of the prompt on are read: before each response token, for
log-probabilities and values; at the last one, for a reward. A Llama is therefore run by hand here:

- a prompt that several responses share is read once: tokens of prompts and tokens of responses are two kinds of rows, and a response
  attends to the keys and values of its prompt;
- in the last layer a place that nobody reads is a key and a value alone: its query, attention and feed-forward are left out;
- what is no attention works on a flat list of tokens, without padding, and projections of the same tokens are one product.

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
    """Rows of tokens of a flat list, as attention wants them.

    tokens  (count, width) int64, the place in the list of the token of each slot; some other token's where there is none
    filled  (count, width) bool, slots that have a token
    """

    tokens: Tensor
    filled: Tensor

    @staticmethod
    def of(lengths: Tensor, start: int) -> "Rows":
        """Rows of these many tokens, one behind the other in the list from `start` on."""
        filled = torch.arange(int(lengths.max()), device=lengths.device) < lengths[:, None]
        before = (filled.flatten().cumsum(0) - 1).clamp_min(0)
        return Rows(start + before.view_as(filled), filled)

    def pad(self, flat: Tensor) -> Tensor:
        """(n, heads, head width) -> (count, heads, width, head width)."""
        return flat.index_select(0, self.tokens.flatten()).unflatten(0, self.tokens.shape).transpose(1, 2)

    def unpad(self, padded: Tensor) -> Tensor:
        """The reverse, heads side by side: (tokens of these rows, heads x head width)."""
        return padded.transpose(1, 2).flatten(-2).flatten(0, 1).index_select(0, self.filled.flatten().nonzero()[:, 0])


def _of_llama(body: nn.Module, batch: Batch, where: Tensor) -> Tensor:
    *below, top = body.layers
    ends = batch.attention_mask.sum(-1)
    starts = ends - batch.response_mask.sum(-1) - 1  # the last token of the prompt: from here on states are read
    place = torch.arange(batch.input_ids.shape[1], device=where.device)
    shared = place < starts[batch.first][:, None]  # (P, T) tokens of distinct prompts
    own = (place >= starts[:, None]) & (place < ends[:, None])  # (B, T) tokens of each response
    count = int(shared.sum())
    prompts, responses = Rows.of(starts[batch.first], 0), Rows.of(ends - starts, count)
    whole = Rows(*(torch.cat([one[batch.owner], other], dim=1) for one, other in zip(prompts, responses, strict=True)))

    ids = torch.cat([batch.input_ids[batch.first][shared], batch.input_ids[own]])
    positions = torch.cat([place.expand_as(shared)[shared], place.expand_as(own)[own]])
    flat = body.embed_tokens(ids)  # (n, d): tokens of prompts, then tokens of responses
    cos, sin = (of[0, :, None] for of in body.rotary_emb(flat[None], positions[None]))  # (n, 1, head width)
    half = sin.shape[-1] // 2
    turn = cos, torch.cat([-sin[..., :half], sin[..., half:]], dim=-1)

    order = place[: responses.filled.shape[1]].expand_as(responses.filled)  # place of each token in its response
    seen = _seen(order, prompts.filled[batch.owner])
    for layer in below:
        queries, keys, values = _heads(layer, flat, turn, "qkv")
        of_responses = _attention(layer, responses.pad(queries), whole.pad(keys), whole.pad(values), seen)
        attended = [responses.unpad(of_responses)]
        if count:
            of_prompts = _attention(layer, prompts.pad(queries), prompts.pad(keys), prompts.pad(values), None)
            attended.insert(0, prompts.unpad(of_prompts))
        flat = _rest(layer, flat, torch.cat(attended))

    keys, values = _heads(top, flat, turn, "kv")
    wanted = where[own].nonzero()[:, 0]  # which tokens of responses are read
    read, turned = flat.index_select(0, count + wanted), tuple(of.index_select(0, count + wanted) for of in turn)
    (queries,) = _heads(top, read, turned, "q")
    slots = Rows.of(where.sum(-1), 0)
    at = order[responses.filled][wanted].index_select(0, slots.tokens.flatten()).view_as(slots.tokens)
    seen = _seen(at, prompts.filled[batch.owner], responses.filled.shape[1])
    attended = slots.unpad(_attention(top, slots.pad(queries), whole.pad(keys), whole.pad(values), seen))
    return body.norm(_rest(top, read, attended))


def _heads(layer: nn.Module, flat: Tensor, turn: tuple[Tensor, Tensor], which: str) -> tuple[Tensor, ...]:
    """Queries, keys and values of tokens, those of "q", "k" and "v" that are asked for, in one product: each (n, heads, head width).

    Queries and keys are turned by their positions.
    """
    attention = layer.self_attn
    asked = [getattr(attention, f"{name}_proj") for name in which]
    bias = None if asked[0].bias is None else torch.cat([projection.bias for projection in asked])
    weight = torch.cat([projection.weight for projection in asked])
    heads = nn.functional.linear(layer.input_layernorm(flat), weight, bias).unflatten(-1, (-1, attention.head_dim))
    counts = [projection.out_features // attention.head_dim for projection in asked]
    turned = len(which.rstrip("v"))
    moving, *values = heads.split([sum(counts[:turned]), *counts[turned:]], dim=1)
    return *_turned(moving, turn).split(counts[:turned], dim=1), *values


def _seen(at: Tensor, prompt: Tensor, width: int | None = None) -> Tensor:
    """What queries at places `at` (B, S) of their responses may attend to: their prompt (B, W), and their response so far.

    (B, 1, S, W + width) bool; `width` is that of the responses, S where it is not given.
    """
    so_far = torch.arange(width or at.shape[1], device=at.device) <= at[..., None]
    return torch.cat([prompt[:, None].expand(-1, at.shape[1], -1), so_far], dim=-1)[:, None]


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
    """Rotary position embedding (Su et al. 2021, arXiv:2104.09864, eq. 34, halves instead of neighbours): (n, heads, width).

    The two halves change places, and the sine of the first half is negative in `turn`.
    """
    cos, sin = turn
    return torch.addcmul(heads * cos, heads.roll(heads.shape[-1] // 2, dims=-1), sin)
