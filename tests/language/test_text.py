"""Tokens: joins, masks, padding, batches."""

import numpy as np
import pandas as pd
import pytest
import torch

from rlhf_vs_dpo.errors import DataError
from rlhf_vs_dpo.language.text import (
    Tokens,
    batches,
    bpe_tokenizer,
    collate,
    documents,
    encode,
    encode_pairs,
    encode_prompts,
    micro_batches,
)

TRICKY = [
    "the cat",
    "the cat sat on the mat .",
    "  two  spaces, tab\tnewline\n end ",
    "don't 'quote' \"double\" —dash…",
    "emoji 🙂👩‍👩‍👧 and CJK 漢字かな",
    "éèê vs e\u0301 (combining)",
    "1234567890 3.14e-10 x_y-z",
    "<eos> <|im_end|> [PAD] </s>",
    "\u200bzero width\u00a0nbsp",
]


def series(*values):
    return pd.Series(values)


def test_prompt_and_response_are_joined_as_ids(tokenizer):
    (tokens,) = encode(tokenizer, series("the dog sat tl;dr :"), series("a dog sat ."), series("row-1"), 64)
    assert tokens.prompt[0] == tokenizer.bos_token_id and tokens.prompt.count(tokenizer.bos_token_id) == 1
    assert tokens.response[-1] == tokenizer.eos_token_id and tokens.response.count(tokenizer.eos_token_id) == 1
    assert tokenizer.decode(tokens.prompt[1:]) == "the dog sat tl;dr :"
    assert tokenizer.decode(tokens.response[:-1]) == "a dog sat ."


def test_the_four_special_tokens_differ(tokenizer):
    ids = [tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.bos_token_id, tokenizer.unk_token_id]
    assert len(set(ids)) == 4


def test_a_bos_that_the_text_brings_is_not_doubled(tokenizer):
    plain, rendered = encode_prompts(tokenizer, ["the cat", "<bos> the cat"])
    assert plain == rendered


@pytest.mark.parametrize("prompt", TRICKY)
@pytest.mark.parametrize("response", TRICKY)
def test_tokens_of_a_response_do_not_depend_on_its_prompt(prompt, response):
    """Byte-level BPE: whatever meets at the boundary, the text comes back and the response's ids stay its own."""
    bpe = _bpe()
    if "<eos>" in response:
        with pytest.raises(DataError, match="r: the response holds a control token"):
            encode(bpe, series(prompt), series(response), series("r"), 4096)
        return
    (tokens,) = encode(bpe, series(prompt), series(response), series("r"), 4096)
    (alone,) = encode(bpe, series("the"), series(response), series("r"), 4096)
    assert tokens.response == alone.response
    ordinary = "<eos>" not in prompt + response
    if ordinary:
        assert bpe.decode([*tokens.prompt[1:], *tokens.response[:-1]]) == prompt + response


def _bpe(cache={}):  # noqa: B006 - trained once for all cases
    if not cache:
        cache["bpe"] = bpe_tokenizer(["the cat sat on the mat . the dog ran ."] * 50, 300)
    return cache["bpe"]


def test_a_response_without_tokens_is_refused():
    with pytest.raises(DataError, match=r"row-2.*tokenises to nothing"):
        encode(_bpe(), series("the", "the"), series("cat", ""), series("row-1", "row-2"), 64)


def test_a_row_longer_than_the_context_is_refused(tokenizer):
    with pytest.raises(DataError, match=r"row-1 \(9 tokens\).*context of 8"):
        encode(tokenizer, series("the dog sat on"), series("a dog sat"), series("row-1"), 8)


def test_documents_can_be_cut_below_the_context(tokenizer):
    (cut,) = documents(tokenizer, series("the dog sat on the mat ."), 64, most=4)
    assert len(cut) == 4
    assert documents(tokenizer, series("a cat"), 64, most=None) == documents(tokenizer, series("a cat"), 64)


def test_what_no_policy_says_is_left_out_of_documents(tokenizer):
    """A chat template writes BOS into the text: a second one, which has probability 0, would make perplexity infinite."""
    plain, rendered, cut = documents(
        tokenizer, series("the cat sat", "<bos> the cat <pad> sat", "<bos> <bos> the cat sat on the mat ."), 6
    )
    assert plain == rendered and tokenizer.bos_token_id not in cut.response
    assert len(cut) == 6  # cut after they are left out
    (turns,) = documents(tokenizer, series("the cat <eos> sat"), 64)
    assert turns.response.count(tokenizer.eos_token_id) == 2  # an end of turn is said


def test_sampled_pairs_are_trained_on_as_they_were_sampled():
    """Under BPE a text has several spellings; the one that was sampled is kept, whatever the tokenizer would make of its text."""
    bpe = bpe_tokenizer(["the cat sat"] * 20, 300)
    whole = bpe("the", add_special_tokens=False)["input_ids"]
    letters = [bpe.convert_tokens_to_ids(c) for c in "the"]
    assert len(whole) == 1 and bpe.decode(letters) == bpe.decode(whole) == "the"
    eos = bpe.eos_token_id
    row = {"pair_id": ["a"], "prompt": ["the cat"], "chosen": ["the"], "rejected": ["sat"]}
    sampled = pd.DataFrame(row | {"chosen_ids": [[*letters, eos]], "rejected_ids": [[*whole, eos]]})
    kept = encode_pairs(bpe, sampled, 64)
    assert kept.chosen[0].response == [*letters, eos] and kept.rejected[0].response == [*whole, eos]
    given = encode_pairs(bpe, sampled.assign(chosen_ids=None, rejected_ids=None), 64)
    assert given.chosen[0].response == [*whole, eos] and given.chosen[0].prompt == kept.chosen[0].prompt
    with pytest.raises(DataError, match="longer than the model's context of 4"):
        encode_pairs(bpe, sampled, 4)


def test_documents_predict_every_token_and_are_cut_at_the_context(tokenizer):
    long, short = documents(tokenizer, series("the dog sat on the mat .", "a cat"), 6)
    assert len(long) == 6 and long.prompt == [tokenizer.bos_token_id]
    assert short.response[-1] == tokenizer.eos_token_id and len(short.response) == 3


def test_collate_masks_by_length_not_by_id():
    """PAD and EOS inside a text are tokens like others: the masks know where they are."""
    batch = collate([Tokens([1, 3], [3, 2, 2]), Tokens([1], [2])], pad=3)
    assert batch.attention_mask.sum(-1).tolist() == [5, 2]
    assert batch.response_mask.sum(-1).tolist() == [3, 1]
    assert batch.input_ids[batch.response_mask].tolist() == [3, 2, 2, 2]
    assert batch.input_ids.tolist() == [[1, 3, 3, 2, 2], [1, 2, 3, 3, 3]]


def test_micro_batches_cover_everything_once_within_budget():
    rng = np.random.default_rng(0)
    lengths = rng.integers(1, 50, 200).tolist()
    groups = micro_batches(lengths, 128)
    assert sorted(i for group in groups for i in group) == list(range(200))
    assert all(max(lengths[i] for i in group) * len(group) <= 128 for group in groups)
    assert len(micro_batches([5] * 8, 10_000, at_least=3)) == 3


def test_micro_batches_that_are_done_stay_as_they_are():
    lengths = np.random.default_rng(0).integers(1, 50, 200).tolist()
    wide, narrow = micro_batches(lengths, 512), micro_batches(lengths, 128)
    assert micro_batches(lengths, 128, made=[len(group) for group in narrow[:5]]) == narrow
    rest = micro_batches(lengths, 128, made=[len(group) for group in wide[:3]])
    assert rest[:3] == wide[:3] and rest[3:] != wide[3:]
    assert sorted(i for group in rest for i in group) == list(range(200))
    assert all(max(lengths[i] for i in group) * len(group) <= 128 for group in rest[3:])


def test_batches_hold_every_example_once_an_epoch_and_little_padding():
    rng = np.random.default_rng(0)
    lengths = rng.integers(5, 100, 640).tolist()
    plan = batches(lengths, 16, 80, np.random.default_rng(1))
    for epoch in (plan[:40], plan[40:]):
        assert sorted(np.concatenate(epoch).tolist()) == list(range(640))
    padded = sum(max(lengths[i] for i in batch) * 16 for batch in plan)
    assert padded / (2 * sum(lengths)) < 1.15  # random batches of these lengths waste about 80 %
    again = batches(lengths, 16, 80, np.random.default_rng(1))
    assert all((a == b).all() for a, b in zip(plan, again, strict=True))


def test_a_batch_larger_than_the_table_is_refused():
    with pytest.raises(DataError, match="batch of 8 is larger than the 3 examples"):
        batches([1, 2, 3], 8, 1, np.random.default_rng(0))


def test_collate_puts_nothing_outside_the_masks(examples, tokenizer):
    batch = collate(examples, tokenizer.pad_token_id)
    assert torch.all(batch.input_ids[batch.attention_mask == 0] == tokenizer.pad_token_id)
    assert not torch.any(batch.response_mask & (batch.attention_mask == 0))
