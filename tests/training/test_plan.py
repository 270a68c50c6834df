"""A plan of memory is what is then measured, to within 20 %, and what cannot fit is refused before the first step."""

import pytest
import torch
from conftest import gpt2, small_model
from torch.profiler import ProfilerActivity, profile

from rlhf_vs_dpo.config import Adapter, Memory, Scratch, Training
from rlhf_vs_dpo.errors import OutOfMemory
from rlhf_vs_dpo.language import adapters, models
from rlhf_vs_dpo.language.logprobs import Policy
from rlhf_vs_dpo.language.text import Examples, Tokens
from rlhf_vs_dpo.training import plan, supervised
from rlhf_vs_dpo.training.optimise import Optimiser, accelerator

ONCE = Training(
    steps=1, batch=8, learning_rate=1e-3, schedule="constant", warmup=0.0, weight_decay=0.0, max_grad_norm=1.0, adam_epsilon=1e-8
)  # fmt: skip
TEXTS = [Tokens([1, 5, 6, 7 + i], [8] * 43 + [2]) for i in range(8)]  # eight rows of 48


def network(tokenizer, kind: str) -> Policy:
    if kind == "gpt2":
        return Policy(gpt2(tokenizer, layers=4), 1.0)
    torch.manual_seed(0)
    size = Scratch(layers=4, width=64, heads=2, feed_forward=160, context=64, bpe_vocabulary=300)
    return Policy(models.from_scratch(size, tokenizer), 1.0)


def at_most(body) -> int:
    """Bytes that are held at once on the CPU while `body` runs, beyond those held before."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        body()
    now = most = 0
    for event in sorted(seen.profiler.kineto_results.events(), key=lambda event: event.start_ns()):
        if event.name() == "[memory]":
            now += event.nbytes()
            most = max(most, now)
    return most


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@pytest.mark.parametrize("adapted", [False, True])
@pytest.mark.parametrize("again", [False, True])
def test_a_plan_is_what_is_then_measured(kind, adapted, again, tokenizer):
    policy = network(tokenizer, kind)
    models.to_learn(
        policy.model,
        Adapter(rank=8, alpha=16.0, targets="all", merge=False) if adapted else None,
        Memory(gradient_checkpointing=again, sharding=False),
    )
    examples = Examples(TEXTS, [str(i) for i in range(8)])
    losses = {}

    def record(module, examples=examples):
        from rlhf_vs_dpo.language.text import collate

        return -module(collate(examples.tokens, policy.pad)).sums().sum()

    planned = plan.plan({policy: lambda count: record(policy, Examples(TEXTS[:count], []))}, 48, 8 * 48, 8)
    weights = sum(p.nbytes for p in policy.parameters())
    assert planned.weights == weights and planned.gradients * 2 == planned.optimiser
    optimiser = Optimiser(accelerator(), policy, ONCE)
    found = at_most(lambda: losses.update(loss=optimiser.accumulate([0], lambda group: record(policy), 8)))
    optimiser.step(losses["loss"], ["all"])
    moments = sum(m.nbytes for state in optimiser.adamw.state.values() for m in state.values() if m.ndim)
    assert moments == planned.optimiser
    assert found == pytest.approx(planned.gradients + planned.activations, rel=0.2)


def test_what_cannot_fit_is_refused_before_the_first_step(tokenizer, monkeypatch):
    policy = Policy(small_model(tokenizer), 1.0)
    examples = Examples(TEXTS, [str(i) for i in range(8)])
    before = policy.state_dict()["model.model.embed_tokens.weight"].clone()
    monkeypatch.setattr(plan, "_room", lambda device, planned: 10_000)
    with pytest.raises(OutOfMemory, match=r"sft needs .* for one example at a time") as error:
        supervised.likelihood(policy, examples, ONCE, 0, lambda *_: None, "sft")
    for key in ("memory.gradient_checkpointing", "adapter", "sampling.max_new_tokens", "data.max_prompt_tokens"):
        assert key in str(error.value)
    assert torch.equal(policy.state_dict()["model.model.embed_tokens.weight"], before)


def test_it_is_said_where_it_is_a_good_part_of_the_device(tokenizer, monkeypatch, capsys):
    policy = Policy(small_model(tokenizer), 1.0)
    supervised.likelihood(policy, Examples(TEXTS, list("abcdefgh")), ONCE, 0, lambda *_: None, "sft")
    assert "memory" not in capsys.readouterr().err
    monkeypatch.setattr(plan, "_room", lambda device, planned: 10_000_000)
    supervised.likelihood(policy, Examples(TEXTS, list("abcdefgh")), ONCE, 0, lambda *_: None, "sft")
    assert "sft, memory: weights" in capsys.readouterr().err


def test_networks_of_one_base_are_counted_once(tokenizer):
    model = adapters.attach(small_model(tokenizer), Adapter(rank=2, alpha=4.0, targets="all", merge=False))
    policy, base = Policy(model, 1.0), Policy(adapters.switched_off(model), 1.0)
    batch_free = lambda count: next(p for p in policy.parameters() if p.requires_grad).sum()  # noqa: E731
    alone = plan.plan({policy: batch_free}, 1, 1, 1)
    together = plan.plan({policy: batch_free}, 1, 1, 1, held=(base,))
    added = sum(p.nbytes for name, p in model.named_parameters() if "lora_" in name)
    assert together.weights == alone.weights + added
    assert alone.gradients == added
