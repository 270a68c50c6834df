"""Prompts read once, and then token after token: logits of what comes next, from a cache of keys and values.

Three ways to one interface: a Llama by hand, its cache written in place and the last layer read at the last token of a prompt only; the same
on a GPU, a step as one CUDA graph; any other model as it comes. `logits` are those of the next token of each row; rows are prompts first, then
whatever `select` makes of them. What else can sample (a server) has the same three: `logits`, `step`, `select`.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn

from rlhf_vs_dpo.language.llama import Rows, attend, heads, is_llama, rest, turns
from rlhf_vs_dpo.language.models import in_float32, in_half


def continuation(model: nn.Module, prompts: Sequence[Sequence[int]], most: int, pad: int) -> "OfLlama | AsItComes":
    """Read prompts (token ids, none empty), each of which gets `most` tokens at the most."""
    if not is_llama(model.base_model):
        return AsItComes(model, prompts, pad)
    by_hand = InOneGraph if next(model.parameters()).device.type == "cuda" and _of_one_shape(model) else OfLlama
    return by_hand(model, prompts, most)


def _of_one_shape(model: nn.Module) -> bool:
    """Whether a step asks the device for no number: turns that grow with the longest text do."""
    rope = getattr(model.config.get_text_config(), "rope_parameters", None) or {}
    return rope.get("rope_type") not in ("dynamic", "longrope")


def cache_of(model: nn.Module, rows: int, length: int) -> int:
    """Bytes of the keys and values of `rows` texts of `length` tokens."""
    config = model.config.get_text_config()
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    size = 2 if in_half(next(model.parameters()).device) else 4
    return 2 * rows * length * config.num_hidden_layers * heads * width * size


class OfLlama:
    """Keys and values of each layer, (rows, longest prompt + `most`, heads, head width): prompts first, responses right behind them."""

    def __init__(self, model: nn.Module, prompts: Sequence[Sequence[int]], most: int):
        self.model, self.body = model, model.base_model
        *below, top = self.body.layers
        device = self.body.embed_tokens.weight.device
        lengths = torch.tensor([len(ids) for ids in prompts], device=device)
        rows = Rows.of(lengths)
        self.room = int(lengths.max()) + most
        self.place = lengths - 1  # of the last token of each row
        flat = self.body.embed_tokens(torch.tensor([token for ids in prompts for token in ids], device=device))
        turn = turns(
            self.body, flat, torch.arange(rows.tokens.shape[1], device=device).expand_as(rows.tokens)[rows.filled]
        )
        self.cache: list[tuple[Tensor, Tensor]] = []
        for layer in below:
            queries, keys, values = heads(layer, flat, turn, "qkv")
            keys, values = self._keep(rows.pad(keys), rows.pad(values))
            flat = rest(layer, flat, rows.unpad(attend(layer, rows.pad(queries), keys, values, None)))
        keys, values = self._keep(*(rows.pad(of) for of in heads(top, flat, turn, "kv")))
        ends = lengths.cumsum(0) - 1
        read = flat[ends]
        (queries,) = heads(top, read, turn[ends], "q")
        self.logits = self._logits(top, read, queries, keys, values, rows.filled)

    def _keep(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Room for the responses behind what is known of the prompts; returns what it was given."""
        shape = keys.shape[0], self.room, keys.shape[1], keys.shape[3]
        kept = keys.new_zeros(shape), values.new_zeros(shape)  # what is not filled has no weight, and must be finite
        for room, known in zip(kept, (keys, values), strict=True):
            room[:, : known.shape[2]] = known.transpose(1, 2)
        self.cache.append(kept)
        return keys, values

    def _after(
        self, layer: nn.Module, flat: Tensor, queries: Tensor, keys: Tensor, values: Tensor, seen: Tensor
    ) -> Tensor:
        """A layer at one token a row: (rows, d)."""
        attended = attend(layer, queries[:, :, None], keys, values, seen[:, None, None])
        return rest(layer, flat, attended.flatten(1))

    def _logits(self, top: nn.Module, *last) -> Tensor:
        return in_float32(self.model.get_output_embeddings(), self.body.norm(self._after(top, *last)))

    def step(self, tokens: Tensor) -> None:
        """Append a token to each row, (rows,) int64."""
        self.place = self.place + 1
        width = int(self.place.max()) + 1
        seen = torch.arange(width, device=tokens.device) <= self.place[:, None]
        number = torch.arange(len(tokens), device=tokens.device)
        flat = self.body.embed_tokens(tokens)
        turn = turns(self.body, flat, self.place)
        for layer, (keys, values) in zip(self.body.layers, self.cache, strict=True):
            queries, key, value = heads(layer, flat, turn, "qkv")
            keys[number, self.place], values[number, self.place] = key, value
            last = flat, queries, *(of[:, :width].transpose(1, 2) for of in (keys, values)), seen
            if layer is self.body.layers[-1]:
                self.logits = self._logits(layer, *last)
            else:
                flat = self._after(layer, *last)

    def select(self, rows: Tensor) -> None:
        """Go on with these rows, (n,) int64, some of them several times or not at all."""
        self.place, self.logits = self.place[rows], self.logits[rows]
        # One layer after another: two caches at once would not fit.
        for number, (keys, values) in enumerate(self.cache):
            self.cache[number] = keys.index_select(0, rows), values.index_select(0, rows)


class InOneGraph(OfLlama):
    """`OfLlama` with steps of one shape: over all of the room, whatever is filled of it, so that a CUDA graph can hold a step.

    A step of a small model is a few hundred operations, and a GPU waits for each to be started; a graph starts them all at once. Where there
    is no GPU the same operations run one by one.
    """

    def __init__(self, model: nn.Module, prompts: Sequence[Sequence[int]], most: int):
        super().__init__(model, prompts, most)
        self.graph: torch.cuda.CUDAGraph | None = None
        self.said = torch.zeros(0, dtype=torch.int64)  # tokens of a step, where the graph reads them

    def step(self, tokens: Tensor) -> None:
        """Append a token to each row, (rows,) int64."""
        if tokens.device.type != "cuda":
            self.said = tokens
            self._advance()
            return
        if self.graph is None:
            self._record(tokens)
        self.said.copy_(tokens)
        assert self.graph is not None
        self.graph.replay()

    def _advance(self) -> None:
        """One step from `said`, written over `place` and `logits`."""
        self.place.add_(1)
        seen = torch.arange(self.room, device=self.place.device) <= self.place[:, None]
        number = torch.arange(len(self.place), device=self.place.device)
        flat = self.body.embed_tokens(self.said)
        turn = turns(self.body, flat, self.place)
        top = self.body.layers[-1]
        for layer, (keys, values) in zip(self.body.layers, self.cache, strict=True):
            queries, key, value = heads(layer, flat, turn, "qkv")
            keys[number, self.place], values[number, self.place] = key.to(keys.dtype), value.to(values.dtype)
            last = flat, queries, keys.transpose(1, 2), values.transpose(1, 2), seen
            if layer is top:
                self.logits.copy_(self._logits(top, *last))
            else:
                flat = self._after(layer, *last)

    def _record(self, tokens: Tensor) -> None:
        """Record a step of this many rows; what the trial runs write is put back."""
        self.said, self.place, self.logits = tokens.clone(), self.place.clone(), self.logits.clone()
        place, logits = self.place.clone(), self.logits.clone()
        beside = torch.cuda.Stream()
        beside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(beside):  # libraries allocate what they need before anything is recorded
            for _ in range(2):
                self.place.copy_(place)
                self._advance()
        torch.cuda.current_stream().wait_stream(beside)
        self.place.copy_(place)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self._advance()
        self.place.copy_(place)
        self.logits.copy_(logits)

    def select(self, rows: Tensor) -> None:
        """Go on with these rows, (n,) int64; their number is another one, and so is the graph."""
        self.graph = None
        super().select(rows)


class AsItComes:
    """Any model, by transformers' own cache, prompts padded on the left."""

    def __init__(self, model: nn.Module, prompts: Sequence[Sequence[int]], pad: int):
        from transformers import DynamicCache

        self.model, self.cache = model, DynamicCache(config=model.config)
        width = max(map(len, prompts))
        ids = np.full((len(prompts), width), pad, dtype=np.int64)
        mask = np.zeros((len(prompts), width), dtype=np.int64)
        for row, prompt in enumerate(prompts):
            ids[row, width - len(prompt) :] = prompt
            mask[row, width - len(prompt) :] = 1
        device = next(model.parameters()).device
        self.mask = torch.from_numpy(mask).to(device)
        self._read(torch.from_numpy(ids).to(device), (self.mask.cumsum(-1) - 1).clamp_min(0))

    def _read(self, ids: Tensor, place: Tensor) -> None:
        read = self.model.base_model(
            input_ids=ids, attention_mask=self.mask, position_ids=place, past_key_values=self.cache, use_cache=True
        )
        self.logits = in_float32(self.model.get_output_embeddings(), read.last_hidden_state[:, -1:])[:, 0]
        self.place = place[:, -1:]

    def step(self, tokens: Tensor) -> None:
        """Append a token to each row, (rows,) int64."""
        self.mask = torch.cat([self.mask, torch.ones_like(self.mask[:, :1])], dim=1)
        self._read(tokens[:, None], self.place + 1)

    def select(self, rows: Tensor) -> None:
        """Go on with these rows, (n,) int64, some of them several times or not at all."""
        self.cache.batch_select_indices(rows)
        self.mask, self.place, self.logits = self.mask[rows], self.place[rows], self.logits[rows]
