"""log pi(y|x) against brute force; padding, micro-batches and order change nothing."""

import pytest
import torch
from conftest import small_model

from rlhf_vs_dpo.errors import ModelError
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
