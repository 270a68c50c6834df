"""Sampling: the right distribution, the same response in any batch, an end at EOS."""

import numpy as np
import pytest
import torch
from conftest import gpt2, small_model

from rlhf_vs_dpo.errors import DataError, ModelError
from rlhf_vs_dpo.language import continuation
from rlhf_vs_dpo.language.forward import log_likelihoods
from rlhf_vs_dpo.language.generation import generate, inverse_cdf, stream
from rlhf_vs_dpo.language.logprobs import Policy
from rlhf_vs_dpo.language.text import Prompts, encode_prompts

LONGEST = 8
PROMPTS = ["the cat sat on the mat and the dog ran .", "a dog", "the rug , a cat and a dog sat", "the"]


def draw(policy, tokenizer, rows, copies=8, seed=0, order=None, max_new_tokens=LONGEST, done=None):
    encoded = encode_prompts(tokenizer, PROMPTS)
    names = [f"p{i}" for i in range(len(PROMPTS)) for _ in range(copies)]
    samples = [s for _ in PROMPTS for s in range(copies)]
    prompts = [ids for ids in encoded for _ in range(copies)]
    order = order if order is not None else range(len(names))
    picked = Prompts([prompts[i] for i in order], [names[i] for i in order])
    return generate(policy, picked, [samples[i] for i in order], max_new_tokens, seed, rows=rows, done=done)


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


def test_batches_that_another_device_sampled_are_taken_as_they_are(tokenizer):
    """A run that goes on may find batches of other sizes than it would make."""
    policy, done = Policy(small_model(tokenizer, scale=2.0), 1.0), []
    whole = draw(policy, tokenizer, rows=5, done=done)
    first, read = done[:3], list(map(list, done[:3]))
    assert draw(policy, tokenizer, rows=8, done=first)[:2] == whole[:2]
    assert first[:3] == read and [len(batch) for batch in first] == [5, 5, 5, 8, 8, 1]


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
    token, share = inverse_cdf(logits, uniform, 1.0)
    assert token.tolist() == [0, 0, 1, 2] and share.tolist() == pytest.approx([0.2, 0.2, 0.3, 0.5])
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


@pytest.mark.parametrize("rows", [3, 256])
def test_a_llama_by_hand_says_what_the_model_as_it_comes_says(tokenizer, monkeypatch, rows):
    """The cache written in place, prompts read once for all their responses, rows cleared: the same tokens."""
    from rlhf_vs_dpo.language import continuation

    policy = Policy(small_model(tokenizer, scale=2.0), 1.0)
    by_hand = draw(policy, tokenizer, rows=rows)
    monkeypatch.setattr(continuation, "is_llama", lambda body: False)
    assert draw(policy, tokenizer, rows=rows) == by_hand
    assert len({len(tokens.response) for tokens in by_hand.tokens}) > 3


@pytest.mark.parametrize("key_value_heads", [4, 2])
@pytest.mark.parametrize("small", [0, 2**18], ids=["one by one", "in one product"])
def test_logits_after_each_token_are_those_of_the_whole_text(key_value_heads, small, monkeypatch):
    from test_states import llama

    monkeypatch.setattr("rlhf_vs_dpo.language.llama.SMALL", small)

    from rlhf_vs_dpo.language.continuation import AsItComes, OfLlama

    model = llama(3, key_value_heads)
    prompts, said = [[4, 5, 6, 7, 8], [9], [10, 11]], [[12, 13, 14], [15, 16, 17], [18, 19, 20], [21, 22, 23]]
    expand = torch.tensor([0, 2, 2, 1])  # one prompt twice, in another order
    with torch.inference_mode():
        for reading in (OfLlama(model, prompts, 3), AsItComes(model, prompts, pad=3)):
            texts = [list(prompt) for prompt in prompts]
            for row, text in enumerate(texts):
                assert torch.allclose(reading.logits[row], model(torch.tensor([text])).logits[0, -1], atol=1e-4)
            reading.select(expand)
            texts = [texts[row] + tokens for row, tokens in zip(expand.tolist(), said, strict=True)]
            for step in (2, 1):
                reading.step(torch.tensor([tokens[2 - step] for tokens in said]))
                for row, text in enumerate(texts):
                    assert torch.allclose(
                        reading.logits[row], model(torch.tensor([text[:-step]])).logits[0, -1], atol=1e-4
                    )
            reading.select(torch.tensor([3, 0]))
            reading.step(torch.tensor([23, 14]))
            for row, text in enumerate((texts[3], texts[0])):
                assert torch.allclose(reading.logits[row], model(torch.tensor([text])).logits[0, -1], atol=1e-4)


def test_any_other_model_samples_too(tokenizer):
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=len(tokenizer), n_embd=32, n_layer=2, n_head=2, n_positions=64, initializer_range=0.3,
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    policy = Policy(GPT2LMHeadModel(config).eval(), 1.0)
    alone, together = draw(policy, tokenizer, rows=1), draw(policy, tokenizer, rows=256)
    assert alone[:2] == together[:2] and len({tuple(tokens.response) for tokens in alone.tokens}) > 20


@pytest.mark.parametrize("temperature", [0.7, 1.0])
def test_steps_of_one_shape_say_the_same(model, tokenizer, temperature, monkeypatch):
    """As a GPU runs them: over all of the room, whatever of it is filled."""
    prompts = Prompts([[1, 5], [1, 6, 7, 8], [1, 9, 4], [1, 5]] * 16, [f"p{i}" for i in range(64)])
    policy = Policy(model, temperature)
    expected = generate(policy, prompts, list(range(64)), 20, 0)
    steps = []

    class Counted(continuation.InOneGraph):
        def step(self, tokens):
            steps.append(len(tokens))
            super().step(tokens)

    monkeypatch.setattr(continuation, "OfLlama", Counted)
    assert generate(policy, prompts, list(range(64)), 20, 0) == expected
    assert len(steps) > 5 and min(steps) < 64  # rows that had ended were cleared


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_the_vocabulary_is_read_in_float32_while_a_response_is_sampled(kind, tokenizer):
    """In bf16 a token's logit steps by 1/8 between 16 and 32, and samples come from another distribution than is trained."""
    model = small_model(tokenizer) if kind == "llama" else gpt2(tokenizer)
    with torch.inference_mode(), torch.autocast("cpu", dtype=torch.bfloat16):
        going_on = continuation.continuation(model, [[1, 5, 6], [1, 7]], 4, tokenizer.pad_token_id)
        assert going_on.logits.dtype is torch.float32
        going_on.step(torch.tensor([5, 6]))
        assert going_on.logits.dtype is torch.float32 and going_on.logits.shape == (2, len(tokenizer))
        assert not torch.equal(going_on.logits, going_on.logits.bfloat16().float())


def test_turns_that_grow_with_the_longest_text_are_no_step_of_one_shape(tokenizer):
    """Which step they need is asked of the device, and a CUDA graph can ask nothing."""
    model = small_model(tokenizer)
    assert continuation._of_one_shape(model)
    model.config.rope_parameters = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}
    assert not continuation._of_one_shape(model)
