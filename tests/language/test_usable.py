"""What a model cannot use is refused, or left out and listed, with the reason of each row."""

import pandas as pd
import pytest

from rlhf_vs_dpo.errors import DataError
from rlhf_vs_dpo.language import usable

LIMIT = usable.limits(context=16, max_new_tokens=6, max_prompt_tokens=None)


def tables(prompts, demonstrations=(), pairs=()):
    ids = {prompt: f"p{i}" for i, prompt in enumerate(prompts)}
    return {
        "prompts": pd.DataFrame({"prompt_id": list(ids.values()), "split": "train", "prompt": list(prompts)}),
        "demonstrations": pd.DataFrame(
            [(ids[p], "train", p, r) for p, r in demonstrations], columns=["prompt_id", "split", "prompt", "response"]
        ),
        "dataset_pairs": pd.DataFrame(
            [(f"pair-{i}", ids[p], "train", p, c, r) for i, (p, c, r) in enumerate(pairs)],
            columns=["pair_id", "prompt_id", "split", "prompt", "chosen", "rejected"],
        ),
    }


GOOD = "the cat"
LONG = "the cat sat on the mat and the dog ran"  # 10 tokens and BOS
GIVEN = tables(
    [GOOD, LONG],
    [(GOOD, "a dog"), (LONG, "a dog"), (GOOD, "a cat <eos> ran"), (GOOD, "a dog sat on the mat and ran")],
    [
        (GOOD, "a dog", "a cat"), (GOOD, "unknown", "word"), (LONG, "a dog", "a cat"), (GOOD, "a <pad> dog", "a cat"),
        (GOOD, "a dog sat on the mat and a cat sat on the rug", "a cat"),
    ],
)  # fmt: skip


def test_drop_leaves_out_and_lists_every_row_with_its_reason(tokenizer):
    found = usable.sort(tokenizer, GIVEN, LIMIT, drop=True)
    assert found.tables["prompts"]["prompt"].tolist() == [GOOD]
    assert found.tables["demonstrations"]["response"].tolist() == ["a dog"]
    assert found.tables["dataset_pairs"]["pair_id"].tolist() == ["pair-0"]
    listed = {(row.table, row.row): row.reason for row in found.unusable.itertuples()}
    assert listed == {
        ("prompts", 1): "a prompt of 11 tokens, more than the 9 that fit",
        ("demonstrations", 1): "a prompt of 11 tokens, more than the 9 that fit",
        ("demonstrations", 2): "response spells a control token of this model: <eos>",
        ("demonstrations", 3): "a response of 9 tokens, more than `sampling.max_new_tokens` (6)",
        ("dataset_pairs", 1): "chosen and rejected are the same tokens to this model",
        ("dataset_pairs", 2): "a prompt of 11 tokens, more than the 9 that fit",
        ("dataset_pairs", 3): "chosen spells a control token of this model: <pad>",
        (
            "dataset_pairs",
            4,
        ): "prompt and chosen have 17 tokens, more than the 15 that fit (one token of the context stays free)",
    }
    assert found.unusable.loc[1, "id"] == "p1" and found.unusable.loc[4, "id"] == "pair-1"
    assert sum(map(len, found.tables.values())) + len(found.unusable) == sum(map(len, GIVEN.values()))


def test_refuse_names_the_rows_and_the_key(tokenizer):
    clean = tables([GOOD], [(GOOD, "a dog")] * 200 + [(GOOD, "a <eos>")])
    with pytest.raises(DataError, match=r"demonstrations, row 200 \(p0\): response spells a control.*") as error:
        usable.sort(tokenizer, clean, LIMIT, drop=False)
    assert "data.unusable: drop" in str(error.value)
    fine = tables([GOOD], [(GOOD, "a dog")], [(GOOD, "a dog", "a cat")])
    found = usable.sort(tokenizer, fine, LIMIT, drop=False)
    assert not len(found.unusable) and found.tables["prompts"].equals(fine["prompts"])


@pytest.mark.parametrize(("long", "refused"), [(2, False), (3, True)])
def test_more_than_one_percent_of_demonstrations_too_long_to_be_sampled_is_an_error(tokenizer, long, refused):
    """A policy that learned them would never end; of 200, two are 1 %."""
    over = "a dog sat on the mat"  # 6 tokens and EOS
    rows = tables([GOOD], [(GOOD, "a dog")] * (200 - long) + [(GOOD, over)] * long)
    if refused:
        with pytest.raises(
            DataError, match=r"3 of 200 demonstrations.*`sampling.max_new_tokens` \(6\).*99 % fit into 7"
        ):
            usable.sort(tokenizer, rows, LIMIT, drop=False)
    else:
        assert len(usable.sort(tokenizer, rows, LIMIT, drop=False).tables["demonstrations"]) == 200
    assert len(usable.sort(tokenizer, rows, LIMIT, drop=True).tables["demonstrations"]) == 200 - long


def test_everything_that_is_refused_is_said_at_once(tokenizer):
    rows = tables([GOOD], [(GOOD, "a dog")] * 90 + [(GOOD, "a dog sat on the mat")] * 10 + [(GOOD, "")])
    with pytest.raises(DataError) as error:
        usable.sort(tokenizer, rows, LIMIT, drop=False)
    assert "10 of 101 demonstrations" in str(error.value) and "1 row(s) that this model cannot use" in str(error.value)


def test_a_cap_on_prompts_below_the_context(tokenizer):
    assert usable.limits(16, 6, None).prompt == 9 and usable.limits(16, 6, 4).prompt == 4
    capped = usable.sort(tokenizer, tables([GOOD, "the cat sat on"]), usable.limits(16, 6, 4), drop=True)
    assert capped.tables["prompts"]["prompt"].tolist() == [GOOD]
