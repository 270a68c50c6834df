"""Last hidden states, at the places where somebody reads them.

Of a prompt and a response only the states at response tokens are read (before each, for log-probabilities and values; the
last one, for a reward), and most of a text is prompt. In the last layer a place that nobody reads is needed as key and value
alone: its query, attention and feed-forward are left out. What is read is the same, to rounding.
"""

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

    Trimmed for models laid out as a Llama is; any other model runs whole.
    """
    body = model.base_model
    if _is_llama(body):
        return _trimmed(body, batch, where)
    whole = body(input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False)
    return whole.last_hidden_state[where]


def _is_llama(body: nn.Module) -> bool:
    from transformers import LlamaModel

    return type(body) is LlamaModel and body.config._attn_implementation == "sdpa"


def _trimmed(body: nn.Module, batch: Batch, where: Tensor) -> Tensor:
    """`states` of a Llama. Texts are padded on the right, so that what is causal never sees padding."""
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb, repeat_kv

    *below, top = body.layers
    hidden = body.embed_tokens(batch.input_ids)  # (B, T, d)
    cos, sin = body.rotary_emb(hidden, torch.arange(hidden.shape[1], device=hidden.device)[None])  # (1, T, head width)
    for layer in below:
        hidden = layer(hidden, attention_mask=None, position_embeddings=(cos, sin))

    read = hidden[where]  # (N, d)
    column = where.nonzero()[:, 1]
    counts = where.sum(-1)
    slots = torch.arange(int(counts.max()), device=where.device)  # R: the most places read of one text
    filled = slots < counts[:, None]  # (B, R)
    places = torch.zeros_like(filled, dtype=torch.int64).masked_scatter(filled, column)

    attention = top.self_attn
    normed = top.input_layernorm(hidden)
    heads = (*normed.shape[:-1], -1, attention.head_dim)
    keys, values = (of(normed).view(heads).transpose(1, 2) for of in (attention.k_proj, attention.v_proj))
    flat = attention.q_proj(top.input_layernorm(read))  # (N, heads x head width)
    queries = flat.new_zeros(*filled.shape, flat.shape[-1]).masked_scatter(filled[..., None], flat)
    queries = queries.view(*filled.shape, -1, attention.head_dim).transpose(1, 2)
    queries = apply_rotary_pos_emb(queries, queries, cos[0, places], sin[0, places])[0]
    keys = apply_rotary_pos_emb(keys, keys, cos, sin)[0]
    seen = torch.arange(hidden.shape[1], device=where.device) <= places[..., None]  # (B, R, T)
    groups = attention.num_key_value_groups
    attended = nn.functional.scaled_dot_product_attention(
        queries, repeat_kv(keys, groups), repeat_kv(values, groups), attn_mask=seen[:, None], scale=attention.scaling
    ).transpose(1, 2)
    read = read + attention.o_proj(attended[filled].flatten(-2))
    return body.norm(read + top.mlp(top.post_attention_layernorm(read)))
