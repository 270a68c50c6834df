"""The same loops on a GPU in bf16: `pytest -m gpu`."""

import math

import pytest
import torch
from conftest import small_model
from test_training import halves, rl_settings, scorer, variant

from rlhf_vs_dpo.language.logprobs import Policy
from rlhf_vs_dpo.language.text import Prompts
from rlhf_vs_dpo.run.progress import Record
from rlhf_vs_dpo.training import policy_gradient, preference
from rlhf_vs_dpo.training.learner import Networks

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")]


@pytest.mark.parametrize("method", ["ppo", "trpo", "rloo", "reinforce"])
def test_rl_runs_and_its_invariants_hold(tokenizer, method):
    rows = []
    policy, reference = (Policy(small_model(tokenizer, scale=2.0).cuda(), 1.0) for _ in range(2))
    ids = [[tokenizer.bos_token_id, 5], [tokenizer.bos_token_id, 6, 7]] * 8
    policy_gradient.train(
        Networks(policy, reference, scorer(tokenizer).cuda()), Prompts(ids, [f"p{i}" for i in range(16)]), [],
        rl_settings(method).model_copy(update={"iterations": 2}), 6, 0, Record(lambda m, s: rows.append(m), "x"),
    )  # fmt: skip
    assert len(rows) == 2 and all(math.isfinite(value) for row in rows for value in row.values())


@pytest.mark.parametrize("method", ["ppo", "trpo"])
def test_rl_with_adapters_runs(tokenizer, method):
    """Frozen matrices are held in bf16, but not for TRPO, which reads them in float32."""
    from rlhf_vs_dpo.config import Adapter
    from rlhf_vs_dpo.language import adapters, models

    rows = []
    adapter = Adapter(rank=4, alpha=8.0, targets="all", merge=False)
    model = models.to_learn(small_model(tokenizer, scale=2.0), adapter, None, half=method != "trpo").cuda()
    assert any(p.dtype == torch.bfloat16 for p in model.parameters()) == (method != "trpo")
    ids = [[tokenizer.bos_token_id, 5], [tokenizer.bos_token_id, 6, 7]] * 8
    policy_gradient.train(
        Networks(Policy(model, 1.0), Policy(adapters.switched_off(model), 1.0), scorer(tokenizer).cuda()),
        Prompts(ids, [f"p{i}" for i in range(16)]), [], rl_settings(method).model_copy(update={"iterations": 2}), 6, 0,
        Record(lambda m, s: rows.append(m), "x"),
    )  # fmt: skip
    assert len(rows) == 2 and all(math.isfinite(value) for row in rows for value in row.values())


def test_simpo_runs(tokenizer, examples):
    rows = []
    policy = Policy(small_model(tokenizer).cuda(), 1.0)
    preference.train(policy, halves(examples), None, variant("simpo"), 1, 0, Record(lambda m, s: rows.append(m), "x"))
    assert math.isfinite(rows[0]["loss"])


def test_a_step_as_one_graph_says_what_steps_say_one_by_one(tokenizer, monkeypatch):
    from rlhf_vs_dpo.language import continuation
    from rlhf_vs_dpo.language.generation import generate

    policy = Policy(small_model(tokenizer).cuda(), 1.0)
    prompts = Prompts([[1, 5], [1, 6, 7, 8], [1, 9, 4], [1, 5]] * 16, [f"p{i}" for i in range(64)])
    ours = generate(policy, prompts, list(range(64)), 20, 0)
    monkeypatch.setattr(continuation, "InOneGraph", continuation.OfLlama)
    theirs = generate(policy, prompts, list(range(64)), 20, 0)
    same = sum(a.response == b.response for a, b in zip(ours.tokens, theirs.tokens, strict=True))
    assert same > 0.8 * 64  # in bf16 a sum over another shape may round otherwise


def test_a_plan_of_memory_is_what_the_device_then_holds(tokenizer):
    from rlhf_vs_dpo.config import Scratch, Training
    from rlhf_vs_dpo.language import models
    from rlhf_vs_dpo.language.text import Tokens, collate
    from rlhf_vs_dpo.training import plan
    from rlhf_vs_dpo.training.optimise import Optimiser, accelerator

    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()  # what other tests have left behind
    size = Scratch(layers=4, width=512, heads=8, feed_forward=1408, context=256, bpe_vocabulary=300)
    policy = Policy(models.from_scratch(size, tokenizer).cuda(), 1.0)
    texts = [Tokens([1, 5, 6, 7 + i], [8] * 251 + [2]) for i in range(8)]

    def loss(count):
        return -policy(collate(texts[:count], policy.pad).to("cuda")).sums().sum()

    planned = plan.plan({policy: loss}, 256, 8 * 256, 8)
    settings = Training(
        steps=2, batch=8, learning_rate=1e-3, schedule="constant", warmup=0.0, weight_decay=0.0, max_grad_norm=1.0, adam_epsilon=1e-8
    )  # fmt: skip
    optimiser = Optimiser(accelerator(), policy, settings)
    torch.cuda.reset_peak_memory_stats()
    for _ in range(2):
        value = optimiser.accumulate([8], lambda count: loss(count), 8)
        optimiser.step(value, ["all"])
    assert torch.cuda.max_memory_allocated() - before == pytest.approx(planned.total, rel=0.2)
