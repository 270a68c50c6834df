"""A Llama run by hand, piece by piece, for whoever needs less of it than a whole batch at every place.

What is no attention works on a flat list of tokens, without padding; small projections of the same tokens are one product. Each piece is
what transformers' Llama computes, to rounding (tests hold values, gradients and samples against the model as it comes).
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

SMALL = 2**18  # weights: 1 MiB of float32, which stays in a core's cache


def is_llama(body: nn.Module) -> bool:
    """Whether `body` (`model.base_model`) can be run by hand; any other model runs as it comes, and one whose layers are held in parts."""
    from transformers import LlamaModel
    from transformers.models.llama.modeling_llama import LlamaDecoderLayer

    return (
        type(body) is LlamaModel
        and body.config._attn_implementation == "sdpa"
        and type(body.layers[0]) is LlamaDecoderLayer
    )


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
        earlier = (filled.flatten().cumsum(0) - 1).clamp_min(0)
        return Rows(start + earlier.view_as(filled), filled)

    def pad(self, flat: Tensor) -> Tensor:
        """(n, heads, head width) -> (count, heads, width, head width)."""
        return flat.index_select(0, self.tokens.flatten()).unflatten(0, self.tokens.shape).transpose(1, 2)

    def unpad(self, padded: Tensor) -> Tensor:
        """The reverse, heads side by side: (tokens of these rows, heads x head width)."""
        return padded.transpose(1, 2).flatten(-2).flatten(0, 1).index_select(0, self.filled.flatten().nonzero()[:, 0])


def turns(body: nn.Module, flat: Tensor, positions: Tensor) -> Tensor:
    """By how much the heads of tokens at `positions` (n,) are turned: (n, 1, head width / 2), complex."""
    cos, sin = (of[0, :, None, : of.shape[-1] // 2] for of in body.rotary_emb(flat[None], positions[None]))
    return torch.complex(cos.float(), sin.float())


def heads(layer: nn.Module, flat: Tensor, turn: Tensor, which: str) -> tuple[Tensor, ...]:
    """Queries, keys and values of tokens, those of "q", "k" and "v" that are asked for: each (n, heads, head width).

    Queries and keys are turned by their positions (rotary embedding, Su et al. 2021, arXiv:2104.09864, eq. 34): coordinates i and
    i + width / 2 of a head are one complex number. They are put side by side in both alike, which leaves their products as they are.
    """
    attention = layer.self_attn
    width, half = attention.head_dim, attention.head_dim // 2
    asked = [getattr(attention, f"{name}_proj") for name in which]
    turning = len(which.rstrip("v"))
    if not _small(layer.input_layernorm, asked):
        normalised = _normalised(layer.input_layernorm, flat)
        found = [projection(normalised).unflatten(-1, (-1, width)) for projection in asked]
        pairs = (torch.complex(*(of.float() for of in head.split(half, dim=-1))) for head in found[:turning])
        return *(torch.view_as_real(pair * turn).flatten(-2).to(found[0].dtype) for pair in pairs), *found[turning:]
    counts = [projection.out_features // width for projection in asked]
    moving = sum(counts[:turning])
    side_by_side = torch.arange(width, device=flat.device).view(2, half).T.flatten()
    within = [side_by_side if head < moving else side_by_side.sort().values for head in range(sum(counts))]
    order = torch.cat([head * width + places for head, places in enumerate(within)])
    together = _in_one_product(layer.input_layernorm, flat, asked, order).unflatten(-1, (-1, width))
    turned = torch.view_as_complex(together[:, :moving].float().unflatten(-1, (half, 2))) * turn
    queries_and_keys = torch.view_as_real(turned).flatten(-2).to(together.dtype)
    return *queries_and_keys.split(counts[:turning], dim=1), *([together[:, moving:]] if which.endswith("v") else [])


def attend(layer: nn.Module, queries: Tensor, keys: Tensor, values: Tensor, seen: Tensor | None) -> Tensor:
    """Attention of (B, heads, places, head width) to what is `seen`, (B, 1, places of queries, of keys) bool; causal where that is None."""
    from transformers.models.llama.modeling_llama import repeat_kv

    groups, scale = layer.self_attn.num_key_value_groups, layer.self_attn.scaling
    keys, values = repeat_kv(keys, groups), repeat_kv(values, groups)
    return nn.functional.scaled_dot_product_attention(
        queries, keys, values, attn_mask=seen, is_causal=seen is None, scale=scale
    )


def rest(layer: nn.Module, flat: Tensor, attended: Tensor) -> Tensor:
    """What a layer does behind its attention, (n, d)."""
    flat = flat + layer.self_attn.o_proj(attended)
    mlp, norm = layer.mlp, layer.post_attention_layernorm
    asked = [mlp.gate_proj, mlp.up_proj]
    if _small(norm, asked):
        gate, up = _in_one_product(norm, flat, asked).chunk(2, dim=-1)
    else:
        normalised = _normalised(norm, flat)
        gate, up = (projection(normalised) for projection in asked)
    return flat + mlp.down_proj(mlp.act_fn(gate) * up)


def _small(norm: nn.Module, asked: Sequence[nn.Linear]) -> bool:
    """Whether preparing the weights of projections (see `_in_one_product`) costs less than what it saves: not where they are large.

    Projections with adapters, or held in bf16, are each multiplied by itself, too.
    """
    plain = all(type(of) is nn.Linear and of.weight.dtype == norm.weight.dtype for of in asked)
    return plain and sum(of.weight.numel() for of in asked) <= SMALL


def _normalised(norm: nn.Module, flat: Tensor) -> Tensor:
    """A layer's norm (Zhang and Sennrich 2019, arXiv:1910.07467) of states, (n, d)."""
    if flat.is_cuda:  # in one kernel
        return nn.functional.rms_norm(flat, flat.shape[-1:], norm.weight, norm.variance_epsilon)
    return _Normalised.apply(flat, norm.variance_epsilon)[0] * norm.weight


def _in_one_product(norm: nn.Module, flat: Tensor, asked: Sequence[nn.Linear], order: Tensor | None = None) -> Tensor:
    """Projections of normalised states in one product: (n, d) -> (n, sum of widths), in `order` where one is given.

    The norm's weight is multiplied into the projections', which are smaller than what they project.
    """
    if flat.is_cuda:
        normalised = nn.functional.rms_norm(flat, flat.shape[-1:], eps=norm.variance_epsilon)
    else:
        normalised = _Normalised.apply(flat, norm.variance_epsilon)[0]
    weight = torch.cat([projection.weight for projection in asked])
    bias = None if asked[0].bias is None else torch.cat([projection.bias for projection in asked])
    if order is not None:
        weight, bias = weight.index_select(0, order), None if bias is None else bias[order]
    return nn.functional.linear(normalised, weight * norm.weight, bias)


class _Normalised(torch.autograd.Function):
    """x / rms(x) of each row (Zhang and Sennrich 2019, arXiv:1910.07467): (x / rms, 1 / rms); a backward pass of few sweeps.

    With u = 1 / rms: dx = u g - x (g . x) u^3 / d. The second output only serves to differentiate again.
    """

    @staticmethod
    def forward(ctx, flat: Tensor, epsilon: float) -> tuple[Tensor, Tensor]:
        inverse = (flat.square().mean(-1, keepdim=True) + epsilon).rsqrt()
        ctx.save_for_backward(flat, inverse)
        ctx.set_materialize_grads(False)
        return flat * inverse, inverse

    @staticmethod
    def backward(ctx, slope: Tensor, of_inverse: Tensor | None) -> tuple[Tensor, None]:
        flat, inverse = ctx.saved_tensors
        along = (slope * flat).sum(-1, keepdim=True)
        if of_inverse is not None:
            along = along + of_inverse
        return torch.addcmul(slope * inverse, flat, along * inverse**3 / -flat.shape[-1]), None
