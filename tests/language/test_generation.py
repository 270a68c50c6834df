"""Sampling: the right distribution, the same response in any batch, an end at EOS."""

import numpy as np
import pytest
import torch
from conftest import small_model

from rlhf_vs_dpo.errors import DataError, ModelError
from rlhf_vs_dpo.language.forward import log_likelihoods
from rlhf_vs_dpo.language.generation import generate, inverse_cdf, stream
from rlhf_vs_dpo.language.logprobs import Policy
from rlhf_vs_dpo.language.text import Prompts, encode_prompts

LONGEST = 8
PROMPTS = ["the cat sat on the mat and the dog ran .", "a dog", "the rug , a cat and a dog sat", "the"]


def draw(policy, tokenizer, rows, copies=8, seed=0, order=None, max_new_tokens=LONGEST):
    encoded = encode_prompts(tokenizer, PROMPTS)
    names = [f"p{i}" for i in range(len(PROMPTS)) for _ in range(copies)]
    samples = [s for _ in PROMPTS for s in range(copies)]
    prompts = [ids for ids in encoded for _ in range(copies)]
    order = order if order is not None else range(len(names))
    picked = Prompts([prompts[i] for i in order], [names[i] for i in order])
    return generate(policy, picked, [samples[i] for i in order], max_new_tokens, seed, rows=rows)


def test_batch_size_and_order_change_nothing(tokenizer):
    policy = Policy(small_model(tokenizer, scale=2.0), 1.0)
    whole = draw(policy, tokenizer, rows=256)
    assert draw(policy, tokenizer, rows=1)[:2] == whole[:2]
    assert draw(policy, tokenizer, rows=5)[:2] == whole[:2]
    order = np.random.default_rng(0).permutation(32)
    shuffled = draw(policy, tokenizer, rows=7, order=order)
    assert [shuffled.tokens[list(order).index(i)] for i in range(32)] == whole.tokens
    assert draw(policy, tokenizer, rows=256, seed=1)[:2] != whole[:2]
    assert len({tuple(tokens.response) for tokens in whole.tokens}) > 20


def test_the_distribution_is_the_policy(tokenizer):
    """Frequencies of whole responses match exp(log pi) from the training forward pass, temperature included."""
    policy = Policy(small_model(tokenizer, scale=4.0), 0.8)
    drawn = draw(policy, tokenizer, rows=4096, copies=4000, max_new_tokens=2)
    first = drawn.tokens[:4000]
    counts: dict[tuple, int] = {}
    for tokens in first:
        counts[tuple(tokens.response)] = counts.get(tuple(tokens.response), 0) + 1
    common = sorted(counts, key=counts.get, reverse=True)[:6]
    by_response = {tuple(tokens.response): tokens for tokens in first}
    logp = log_likelihoods(policy, [by_response[r] for r in common])
    for response, value in zip(common, logp, strict=True):
        p = np.exp(value)
        assert abs(counts[response] / 4000 - p) < 4 * np.sqrt(p * (1 - p) / 4000)


def test_a_response_ends_at_its_first_eos(tokenizer):
    drawn = draw(Policy(small_model(tokenizer, scale=2.0), 1.0), tokenizer, rows=64, copies=16)
    for tokens, finished in zip(drawn.tokens, drawn.finished, strict=True):
        assert (tokens.response[-1] == tokenizer.eos_token_id) == finished
        assert tokenizer.eos_token_id not in tokens.response[:-1]
        assert finished or len(tokens.response) == LONGEST
    assert 0 < sum(drawn.finished) < len(drawn.finished)


def test_inverse_cdf():
    logits = torch.log(torch.tensor([[0.2, 0.3, 0.5]])).expand(4, 3)
    uniform = torch.tensor([0.0, 0.19, 0.21, 0.99], dtype=torch.float64)
    assert inverse_cdf(logits, uniform, 1.0).tolist() == [0, 0, 1, 2]
    with pytest.raises(ModelError, match="not finite"):
        inverse_cdf(torch.tensor([[float("nan"), 0.0]]), uniform[:1], 1.0)


def test_streams_are_reproducible_and_differ():
    a = stream(0, "p1", 0, 4)
    assert (a == stream(0, "p1", 0, 4)).all()
    assert not any(
        (a == other).any() for other in (stream(1, "p1", 0, 4), stream(0, "p2", 0, 4), stream(0, "p1", 1, 4))
    )
    assert (stream(0, "p1", 0, 2) == a[:2]).all()  # a longer budget only appends


def test_a_prompt_that_leaves_no_room_is_refused(tokenizer, model):
    with pytest.raises(DataError, match=r"p0.*longer than the model's context of 64"):
        generate(Policy(model, 1.0), Prompts(encode_prompts(tokenizer, ["the " * 60]), ["p0"]), [0], LONGEST, 0)
