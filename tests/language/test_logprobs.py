"""log pi(y|x) against brute force; padding, micro-batches and order change nothing."""

import subprocess
import sys

import pytest
import torch
from conftest import small_model

from rlhf_vs_dpo.errors import ModelError
from rlhf_vs_dpo.language import logprobs
from rlhf_vs_dpo.language.forward import log_likelihoods
from rlhf_vs_dpo.language.heads import Scorer
from rlhf_vs_dpo.language.logprobs import Policy, check_projection
from rlhf_vs_dpo.language.states import last
from rlhf_vs_dpo.language.text import Tokens, collate


def brute_force(model, example: Tokens, temperature: float) -> float:
    """One token at a time, no batch, no padding, no mask: the definition."""
    ids, total = list(example.prompt), 0.0
    for token in example.response:
        logits = model(torch.tensor([ids])).logits[0, -1].double() / temperature
        total += torch.log_softmax(logits, -1)[token].item()
        ids.append(token)
    return total


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_against_brute_force(model, examples, temperature):
    with torch.no_grad():
        expected = [brute_force(model, example, temperature) for example in examples]
    measured = log_likelihoods(Policy(model, temperature), examples)
    assert measured == pytest.approx(expected, abs=1e-4)
    assert max(expected) - min(expected) > 5  # the model is no uniform distribution


def test_padding_and_batch_order_change_nothing(model, examples, tokenizer):
    policy = Policy(model, 1.0)
    with torch.no_grad():
        alone = [policy(collate([example], tokenizer.pad_token_id)).sums().item() for example in examples]
        together = policy(collate(examples[::-1], tokenizer.pad_token_id)).sums().tolist()[::-1]
    assert together == pytest.approx(alone, abs=1e-4)


def test_values_that_another_device_read_are_taken_as_they_are(model, examples, monkeypatch):
    """A run that goes on may find micro-batches of other sizes than it would make."""
    texts, done = examples * 2, []
    monkeypatch.setattr(Policy, "budget", 40)
    whole = log_likelihoods(Policy(model, 1.0), texts, done=done)
    assert len(done) > 1
    monkeypatch.setattr(Policy, "budget", 4096)
    marked = [[value + 1 for value in done[0]]]
    found = log_likelihoods(Policy(model, 1.0), texts, done=marked)
    moved = sum(abs(a - b - 1) < 1e-4 for a, b in zip(found, whole, strict=True))
    still = sum(abs(a - b) < 1e-4 for a, b in zip(found, whole, strict=True))
    assert len(marked) == 2 and moved > 0 and still > 0 and moved + still == len(texts)


def test_nothing_outside_the_response(model, examples, tokenizer):
    output = Policy(model, 1.0)(collate(examples, tokenizer.pad_token_id), entropy=True)
    assert torch.all(output.logp[~output.mask] == 0) and torch.all(output.entropy[~output.mask] == 0)
    assert torch.all(output.logp[output.mask] < 0)
    assert output.lengths().tolist() == [len(example.response) for example in examples]


def test_the_vocabulary_projection_runs_at_response_tokens_only(model, examples, tokenizer):
    policy, seen = Policy(model, 1.0), []
    model.lm_head.register_forward_hook(lambda module, inputs, output: seen.append(inputs[0].shape))
    policy(collate(examples, tokenizer.pad_token_id))
    assert [shape[0] for shape in seen] == [sum(len(example.response) for example in examples)]


def test_entropy_is_of_the_tempered_distribution(model, examples, tokenizer):
    example = examples[0]
    output = Policy(model, 0.5)(collate([example], tokenizer.pad_token_id), entropy=True)
    with torch.no_grad():
        logits = model(torch.tensor([[*example.prompt, *example.response]])).logits[0].double() / 0.5
    p = torch.softmax(logits, -1)[len(example.prompt) - 1 : -1]
    assert output.entropy[output.mask].tolist() == pytest.approx((-(p * p.log()).sum(-1)).tolist(), abs=1e-4)


def test_gradient_at_padding_and_prompt_positions_is_zero(tokenizer, examples):
    """The loss of one row does not move when another row's padding would."""
    model = small_model(tokenizer)
    policy = Policy(model, 1.0)
    short, long = min(examples, key=len), max(examples, key=len)

    def gradient(batch_of):
        model.zero_grad()
        policy(collate(batch_of, tokenizer.pad_token_id)).sums()[0].backward()
        return torch.cat([p.grad.flatten() for p in model.parameters()])

    assert torch.allclose(gradient([short]), gradient([short, long]), atol=1e-5)


def test_a_model_with_scaled_logits_is_refused(model, examples, tokenizer):
    batch = collate(examples[:2], tokenizer.pad_token_id)
    check_projection(Policy(model, 1.0), batch)
    plain = model.forward

    def capped(*args, **kwargs):
        output = plain(*args, **kwargs)
        output.logits = 2.0 * torch.tanh(output.logits / 2.0)
        return output

    model.forward = capped
    with pytest.raises(ModelError, match="not a plain projection"):
        check_projection(Policy(model, 1.0), batch)


def test_scores_do_not_depend_on_padding(tokenizer, examples):
    from transformers import LlamaConfig, LlamaForSequenceClassification

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_labels=1,
    )
    config.reward_shift, config.reward_scale = 0.25, 2.0
    scorer = Scorer(LlamaForSequenceClassification(config).eval())
    with torch.no_grad():
        alone = [
            scorer(batch := collate([example], tokenizer.pad_token_id), last(batch.response_mask)).item()
            for example in examples
        ]
        batch = collate(examples, tokenizer.pad_token_id)
        assert scorer(batch, last(batch.response_mask)).tolist() == pytest.approx(alone, abs=1e-5)
        hidden = scorer.model.base_model(
            torch.tensor([[*examples[0].prompt, *examples[0].response]])
        ).last_hidden_state[0, -1]
        raw = scorer.model.score(hidden).item()
    assert alone[0] == pytest.approx((raw - 0.25) / 2.0, abs=1e-5)


@pytest.mark.parametrize("entropy", [False, True])
def test_logits_of_some_tokens_at_a_time_change_nothing(model, examples, tokenizer, entropy, monkeypatch):
    """Values, entropies and gradients of a large vocabulary's way are those of the plain one."""
    batch, policy = collate(examples, tokenizer.pad_token_id), Policy(model, 0.7)
    weights = torch.linspace(-1, 1, batch.response_mask.numel()).view(batch.response_mask.shape)

    def measured():
        policy.zero_grad()
        output = policy(batch, entropy=entropy)
        (output.logp * weights).sum().backward()
        gradient = torch.cat([p.grad.flatten() for p in policy.parameters()])
        return output.logp.detach(), output.entropy, gradient

    plain, passes = measured(), []
    monkeypatch.setattr(logprobs, "AT_ONCE", 5 * policy.vocabulary)
    original = Policy._read
    monkeypatch.setattr(
        Policy, "_read", lambda self, hidden, *rest: passes.append(len(hidden)) or original(self, hidden, *rest)
    )
    parts = measured()
    tokens = sum(len(example.response) for example in examples)
    assert max(passes) == 5 and sum(passes) == 2 * tokens  # once forward, once again for backward
    for ours, theirs in zip(parts, plain, strict=True):
        assert (ours is None and theirs is None) or torch.allclose(ours, theirs, atol=1e-4, rtol=1e-4)


PEAK = """
import resource, sys
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM
from rlhf_vs_dpo.language import logprobs
from rlhf_vs_dpo.language.text import Tokens, collate
logprobs.AT_ONCE = int(sys.argv[1])
torch.manual_seed(0)
shape = dict(hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1, tie_word_embeddings=True)
policy = logprobs.Policy(LlamaForCausalLM(LlamaConfig(vocab_size=152_000, **shape)).eval(), 1.0)
batch = collate([Tokens([1, 2], list(range(3, 260))) for _ in range(8)], 0)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
policy(batch, entropy=True).sums().sum().backward()
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 2**10, sum(p.grad.double().abs().sum().item() for p in policy.parameters()))
"""


@pytest.mark.slow
def test_a_vocabulary_of_152000_fits(tmp_path):
    """Peak memory (MiB) of 2,056 tokens forward and backward: the whole logits are 1,192 MiB, and are there several times over."""
    found = {}
    for at_once in (2**40, 2**25):
        done = subprocess.run([sys.executable, "-c", PEAK, str(at_once)], capture_output=True, text=True, check=True)
        found[at_once] = [float(word) for word in done.stdout.split()]
    (plain, gradient), (parts, other) = found.values()
    assert plain > 2 * 1192 and parts < 1192, found
    assert other == pytest.approx(gradient, rel=1e-5)
