"""Tokenise, join prompt and response, mask, collate: the only room that knows what a response token is.

A prompt and its response are tokenised apart and their ids joined, so that the boundary never depends on what a
tokenizer would merge across it. One BOS (where the tokenizer has one) opens the prompt; EOS closes the response and is
part of it. Masks come from lengths, never from comparing ids with PAD or EOS.
"""

from collections.abc import Sequence
from itertools import chain
from typing import NamedTuple

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from rlhf_vs_dpo.errors import DataError

SPECIAL = {"unk_token": "<unk>", "bos_token": "<bos>", "eos_token": "<eos>", "pad_token": "<pad>"}


class Tokens(NamedTuple):
    """One example as ids: `prompt` with its BOS, `response` with its EOS (unless it never ended)."""

    prompt: list[int]
    response: list[int]

    def __len__(self) -> int:  # type: ignore[override]
        return len(self.prompt) + len(self.response)


class Examples(NamedTuple):
    """Texts to learn from or to measure, and their ids for errors."""

    tokens: list[Tokens]
    names: list[str]


class Pairs(NamedTuple):
    """Two responses to each prompt, the first preferred; the ids of the pairs, for errors."""

    chosen: list[Tokens]
    rejected: list[Tokens]
    names: list[str]

    def both(self, group: Sequence[int]) -> list[Tokens]:
        """The chosen, then the rejected responses of some pairs: what one forward pass reads of them."""
        return [self.chosen[i] for i in group] + [self.rejected[i] for i in group]


class Prompts(NamedTuple):
    """Prompts as ids with their BOS, and the names that key their random streams and appear in errors."""

    ids: list[list[int]]
    names: list[str]


class Batch(NamedTuple):
    """Examples padded on the right to one length T.

    input_ids      (B, T) int64
    attention_mask (B, T) int64, 1 at real tokens
    response_mask  (B, T) bool, True at response tokens (EOS among them)
    first          (P,) int64, a row of each distinct prompt: what rows share need be read once
    owner          (B,) int64, which of these P prompts each row has
    """

    input_ids: Tensor
    attention_mask: Tensor
    response_mask: Tensor
    first: Tensor
    owner: Tensor

    def to(self, device: torch.device | str) -> "Batch":
        return Batch(*(tensor.to(device, non_blocking=True) for tensor in self))


def word_tokenizer(words: Sequence[str]):
    """A tokenizer in which each word of a closed vocabulary is a token; text is split at white space."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    vocabulary = {token: i for i, token in enumerate([*SPECIAL.values(), *words])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=SPECIAL["unk_token"]))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return _wrap(tokenizer)


def bpe_tokenizer(texts: Sequence[str], size: int):
    """A byte-level BPE tokenizer trained on the corpus: for text of one's own and a model from scratch."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=list(SPECIAL.values()),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return _wrap(tokenizer)


def _wrap(tokenizer):
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, clean_up_tokenization_spaces=False, **SPECIAL)


def encode_prompts(tokenizer, prompts: Sequence[str], suffix: str = "") -> list[list[int]]:
    """Ids of each prompt, opened by exactly one BOS where the tokenizer has one, closed by those of `suffix`."""
    if not len(prompts):
        return []
    bos = tokenizer.bos_token_id
    encoded = tokenizer(list(prompts), add_special_tokens=False)["input_ids"]
    if bos is None and not all(encoded):
        raise DataError(
            f"prompt {list(map(bool, encoded)).index(False)}: tokenises to nothing, and this tokenizer has no BOS"
        )
    end = tokenizer(suffix, add_special_tokens=False)["input_ids"] if suffix else []
    # A chat template may have written the BOS into the text already.
    return [[*ids, *end] if bos is None or ids[:1] == [bos] else [bos, *ids, *end] for ids in encoded]


def prompts_of(tokenizer, table: pd.DataFrame) -> Prompts:
    """The rows of a table with `prompt_id` and `prompt`, as ids named by prompt_id."""
    return Prompts(encode_prompts(tokenizer, list(table["prompt"])), list(table["prompt_id"]))


def encode_responses(tokenizer, responses: Sequence[str], names: Sequence[str]) -> list[list[int]]:
    """Ids of each response, closed by EOS.

    Raises DataError for a response that tokenises to nothing, or that spells a control token and would end early.
    """
    if not len(responses):
        return []
    encoded = tokenizer(list(responses), add_special_tokens=False)["input_ids"]
    nothing = [name for name, ids in zip(names, encoded, strict=True) if not ids]
    if nothing:
        raise DataError(
            f"{_some(nothing)}: the response tokenises to nothing with this model's tokenizer; remove the row"
        )
    control = {tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id}
    inside = [name for name, ids in zip(names, encoded, strict=True) if control & set(ids)]
    if inside:
        raise DataError(
            f"{_some(inside)}: the response holds a control token of this model (BOS, EOS or PAD) as text; remove it"
        )
    return [[*ids, tokenizer.eos_token_id] for ids in encoded]


def encode(
    tokenizer, prompts: pd.Series, responses: pd.Series, names: pd.Series, context: int, suffix: str = ""
) -> list[Tokens]:
    """Tokenise a table of prompts (with `suffix` behind them) and responses; `names` (row ids) appear in errors.

    Raises DataError for a response that tokenises to nothing and for rows longer than the model's `context`.
    """
    encoded = [
        Tokens(prompt, response)
        for prompt, response in zip(
            encode_prompts(tokenizer, list(prompts), suffix),
            encode_responses(tokenizer, list(responses), list(names)),
            strict=True,
        )
    ]
    check_context([len(tokens) for tokens in encoded], names, context, "prompt and response together")
    return encoded


def encode_pairs(tokenizer, pairs: pd.DataFrame, context: int, suffix: str = "") -> Pairs:
    """A `pairs` table as tokens, `suffix` behind its prompts: responses that were sampled as they were sampled, others tokenised.

    Raises DataError as `encode` does. (A text may be spelled by several sequences of tokens: its tokenisation may be another than the one
    that was sampled, which no policy need ever say.)
    """
    names = pairs["pair_id"]
    if pairs["chosen_ids"].isna().any():
        sides = [
            encode(tokenizer, pairs["prompt"], pairs[side], names, context, suffix) for side in ("chosen", "rejected")
        ]
        return Pairs(*sides, list(names))
    prompts = encode_prompts(tokenizer, list(pairs["prompt"]), suffix)
    sides = [
        [Tokens(prompt, list(ids)) for prompt, ids in zip(prompts, pairs[f"{side}_ids"], strict=True)]
        for side in ("chosen", "rejected")
    ]
    for side in sides:
        check_context([len(tokens) for tokens in side], names, context, "prompt and response together")
    return Pairs(*sides, list(names))


def documents(tokenizer, texts: pd.Series, context: int, most: int | None = None) -> list[Tokens]:
    """A corpus for language modelling: BOS alone is the prompt, so that every token of the text is predicted.

    Documents longer than the context, or than `most` tokens, are cut there: a corpus is running text, and its head is as good as its tail.
    A BOS or PAD that a text spells (chat templates write a BOS) is left out: no policy ever says one, so that it has probability 0.
    """
    context = min(context, most or context)
    if not len(texts):
        return []
    bos, eos, pad = tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id
    head, unsaid = [eos if bos is None else bos], {bos, pad} - {eos}
    encoded = tokenizer(list(texts), add_special_tokens=False)["input_ids"]
    return [Tokens(head, [*(i for i in ids if i not in unsaid), eos][: context - 1]) for ids in encoded]


def check_context(lengths: Sequence[int], names: Sequence[str], context: int, what: str) -> None:
    """Refuse rows that do not fit: cutting them silently would cut the EOS, or the question."""
    long = [f"{name} ({n} tokens)" for name, n in zip(names, lengths, strict=True) if n > context]
    if long:
        raise DataError(
            f"{_some(long)}: {what} longer than the model's context of {context} tokens; shorten or remove these "
            "rows, lower `sampling.max_new_tokens`, or choose a model with a longer context"
        )


def _some(names: Sequence[str]) -> str:
    return ", ".join(str(name) for name in names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


def check_distinct(pairs: Pairs) -> None:
    """Two texts can be one to a tokenizer (unknown words): nothing can be learned from such a pair."""
    same = [name for a, b, name in zip(*pairs, strict=True) if a.response == b.response]
    if same:
        raise DataError(
            f"{_some(same)}: chosen and rejected are the same tokens to this model's tokenizer; remove the row"
        )


def collate(examples: Sequence[Tokens], pad: int) -> Batch:
    """Pad examples on the right to one length: what is causal never sees the padding."""
    starts = np.array([len(example.prompt) for example in examples])
    ends = starts + np.array([len(example.response) for example in examples])
    place = np.arange(ends.max())
    attended = place < ends[:, None]
    ids = np.full(attended.shape, pad, dtype=np.int64)
    ids[attended] = np.fromiter(chain.from_iterable(chain.from_iterable(examples)), np.int64, ends.sum())
    response = attended & (place >= starts[:, None])
    seen: dict[tuple[int, ...], int] = {}  # prompt -> the first row that has it
    rows = [seen.setdefault(tuple(example.prompt), row) for row, example in enumerate(examples)]
    first, owner = np.unique(np.array(rows, dtype=np.int64), return_inverse=True)
    return Batch(*map(torch.from_numpy, (ids, attended.astype(np.int64), response, first, owner)))


def micro_batches(
    lengths: Sequence[int], max_tokens: int, at_least: int = 1, made: Sequence[int] = ()
) -> list[list[int]]:
    """Split a batch into micro-batches of similar length whose padded size stays within `max_tokens`.

    Returns lists of indices into `lengths` (longest first, so that memory peaks at once), at least `at_least` of
    them: with several processes each must run as many backward passes as the others. One example is never split.

    made    how many examples the first micro-batches have, where they are done already: by a device of another size they may be larger
    """
    order = np.argsort(-np.asarray(lengths, dtype=np.int64), kind="stable").tolist()
    groups: list[list[int]] = []
    while order:
        done = len(groups) < len(made)
        count = made[len(groups)] if done else max(1, max_tokens // max(lengths[order[0]], 1))
        groups.append(order[:count])
        order = order[count:]
    while groups and len(groups) < at_least:
        widest = max(range(len(groups)), key=lambda g: len(groups[g]))
        group = groups[widest]
        groups[widest : widest + 1] = [group[: len(group) // 2], group[len(group) // 2 :]]
    return groups


def batches(
    lengths: Sequence[int], batch: int, steps: int, rng: np.random.Generator, neighbours: int = 16
) -> list[np.ndarray]:
    """`steps` global batches of indices: shuffled epochs, in which batches hold examples of similar length.

    Each epoch is shuffled, cut into runs of `neighbours` batches, each run sorted by length and its batches shuffled:
    little padding, and no example twice in an epoch. A last batch that would be short is left out of its epoch.
    """
    sizes = np.asarray(lengths)
    if len(sizes) < batch:
        raise DataError(
            f"a batch of {batch} is larger than the {len(sizes)} examples there are; lower `batch` in params.yaml"
        )
    chosen: list[np.ndarray] = []
    while len(chosen) < steps:
        order = rng.permutation(len(sizes))[: len(sizes) // batch * batch]
        epoch = []
        for start in range(0, len(order), neighbours * batch):
            run = order[start : start + neighbours * batch]
            run = run[np.argsort(sizes[run], kind="stable")]
            epoch += np.split(run, len(run) // batch)
        chosen += [epoch[i] for i in rng.permutation(len(epoch))]
    return chosen[:steps]
