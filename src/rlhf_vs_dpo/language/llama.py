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


class Way(NamedTuple):
    """From which row of one list each row of another one is taken.

    source  (n,) int64, the row that is taken
    empty   (m,) int64, rows that are zero in its place
    more    rows (k,) int64 to which others (k,) are added, one group after another; no row stands in a group twice
    """

    source: Tensor
    empty: Tensor | None = None
    more: tuple[tuple[Tensor, Tensor], ...] = ()

    def of(self, rows: Tensor) -> Tensor:
        """(rows, ...) -> (n, ...)."""
        taken = rows.index_select(0, self.source)
        if self.empty is not None:
            taken = taken.index_fill_(0, self.empty, 0.0)
        for to, others in self.more:
            taken = taken.index_copy_(0, to, taken.index_select(0, to) + rows.index_select(0, others))
        return taken


class _Moved(torch.autograd.Function):
    """Rows taken by one way; their gradients come by the other, its transpose: PyTorch's own would add them up one by one."""

    @staticmethod
    def forward(ctx, rows: Tensor, there: Way, back: Way) -> Tensor:
        ctx.there, ctx.back = there, back
        return there.of(rows)

    @staticmethod
    def backward(ctx, slope: Tensor) -> tuple[Tensor, None, None]:
        return _Moved.apply(slope, ctx.back, ctx.there), None, None


class Rows(NamedTuple):
    """Rows of tokens of a flat list, as attention wants them.

    tokens  (count, width) int64, the place in the list of the token of each slot; some other token's where there is none
    filled  (count, width) bool, slots that have a token
    there   the way from the list to the slots, of which those without a token are zero
    back    its transpose: from the slots to the list, where a token that stands in several rows is the sum of its slots
    """

    tokens: Tensor
    filled: Tensor
    there: Way
    back: Way

    @staticmethod
    def of(lengths: Tensor) -> "Rows":
        """Rows of these many tokens, which stand one behind the other in the list."""
        return Rows.at(torch.arange(int(lengths.max()), device=lengths.device) < lengths[:, None])

    @staticmethod
    def at(filled: Tensor) -> "Rows":
        """Rows of which these slots, (count, width) bool, hold the tokens of the list, in their order."""
        tokens = (filled.flatten().cumsum(0) - 1).clamp_min(0)
        return Rows(tokens.view_as(filled), filled, Way(tokens, _true(~filled)), Way(_true(filled)))

    @staticmethod
    def side_by_side(left: "Rows", owner: Tensor, right: "Rows") -> "Rows":
        """Row `owner[i]` of `left` and row i of `right` in one; in the list all tokens of `left` come first, then those of `right`."""
        first = int(left.filled.sum())
        tokens = torch.cat([left.tokens[owner], first + right.tokens], dim=1)
        filled = torch.cat([left.filled[owner], right.filled], dim=1)
        slots = _true(filled)
        taken, order = tokens.flatten()[slots].sort(stable=True)
        slots = slots[order]
        number = torch.arange(len(taken), device=taken.device) - torch.searchsorted(taken, taken)  # of a token's slots
        more = [number == copy for copy in range(1, int(number.max()) + 1)]
        back = Way(slots[number == 0], None, tuple((taken[of], slots[of]) for of in more))
        return Rows(tokens, filled, Way(tokens.flatten(), _true(~filled)), back)

    def pad(self, flat: Tensor) -> Tensor:
        """(n, heads, head width) -> (count, heads, width, head width)."""
        return _Moved.apply(flat, self.there, self.back).unflatten(0, self.tokens.shape).transpose(1, 2)

    def unpad(self, padded: Tensor) -> Tensor:
        """The reverse, heads side by side: (tokens of these rows, heads x head width)."""
        return self.pick(padded.transpose(1, 2).flatten(-2).flatten(0, 1))

    def pick(self, slots: Tensor) -> Tensor:
        """What stands in the slots, (count x width, ...), as a list, (n, ...)."""
        return _Moved.apply(slots, self.back, self.there)


def _true(mask: Tensor) -> Tensor:
    """Places of a flattened mask that are True, (k,) int64."""
    return mask.flatten().nonzero()[:, 0]


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
    product = _in_one_product(layer.input_layernorm, flat, asked, [half] * turning)
    still = sum(counts) - moving
    together, values = product.unflatten(-1, (-1, width)).split([moving, still], dim=1)
    turned = torch.view_as_complex(together.float().unflatten(-1, (half, 2))) * turn
    queries_and_keys = torch.view_as_real(turned).flatten(-2).to(together.dtype)
    return *queries_and_keys.split(counts[:turning], dim=1), *([values] if still else [])


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
        both = _in_one_product(norm, flat, asked)
        if mlp.config.hidden_act == "silu":
            return flat + mlp.down_proj(_Gated.apply(both)[0])
        gate, up = both.chunk(2, dim=-1)
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


def _in_one_product(norm: nn.Module, flat: Tensor, asked: Sequence[nn.Linear], halves: Sequence[int] = ()) -> Tensor:
    """Projections of normalised states in one product: (n, d) -> (n, sum of widths).

    The norm's weight is multiplied into the projections', which are smaller than what they project. In the first ones, those with a
    half, coordinates i and i + half of a head are put side by side.
    """
    if flat.is_cuda:
        normalised = nn.functional.rms_norm(flat, flat.shape[-1:], eps=norm.variance_epsilon)
    else:
        normalised = _Normalised.apply(flat, norm.variance_epsilon)[0]

    def together(parts: Sequence[Tensor]) -> Tensor:
        turned, others = parts[: len(halves)], parts[len(halves) :]
        split = [of.unflatten(0, (-1, 2, half)) for of, half in zip(turned, halves, strict=True)]
        return torch.cat([*(of.transpose(1, 2).flatten(0, 2) for of in split), *others])

    weight = together([projection.weight for projection in asked])
    bias = None if asked[0].bias is None else together([projection.bias for projection in asked])
    return nn.functional.linear(normalised, weight * norm.weight, bias)


class _Gated(torch.autograd.Function):
    """silu(gate) up of gate and up side by side (Shazeer 2020, arXiv:2002.05202, SwiGLU): (n, 2 f) -> (n, f); slopes side by side, too.

    The second output, silu(gate), only serves to differentiate again.
    """

    @staticmethod
    def forward(ctx, both: Tensor) -> tuple[Tensor, Tensor]:
        gate, up = both.chunk(2, dim=-1)
        opened = nn.functional.silu(gate)
        ctx.save_for_backward(both, opened)
        ctx.set_materialize_grads(False)
        return opened * up, opened

    @staticmethod
    def backward(ctx, slope: Tensor | None, of_opened: Tensor | None) -> Tensor:
        both, opened = ctx.saved_tensors
        gate, up = both.chunk(2, dim=-1)
        slope = torch.zeros_like(opened) if slope is None else slope
        at_gate = slope * up if of_opened is None else slope * up + of_opened
        if torch.is_grad_enabled():  # slopes that are differentiated again
            share = torch.sigmoid(gate)
            return torch.cat([at_gate * share * (1 + gate * (1 - share)), slope * opened], dim=-1)
        slopes = torch.empty_like(both)
        of_gate, of_up = slopes.chunk(2, dim=-1)
        torch.ops.aten.silu_backward.grad_input(at_gate, gate, grad_input=of_gate)
        torch.mul(slope, opened, out=of_up)
        return slopes


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
