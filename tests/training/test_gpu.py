"""The same loops on a GPU in bf16: `pytest -m gpu`."""

import math

import pytest
import torch
from conftest import small_model
from test_training import NoWatch, halves, rl_settings, scorer, variant

from rlhf_vs_dpo.language.logprobs import Policy
from rlhf_vs_dpo.language.text import Prompts
from rlhf_vs_dpo.training import policy_gradient, preference
from rlhf_vs_dpo.training.learner import Networks
from rlhf_vs_dpo.training.monitor import Record

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")]


@pytest.mark.parametrize("method", ["ppo", "trpo", "rloo", "reinforce"])
def test_rl_runs_and_its_invariants_hold(tokenizer, method):
    rows = []
    policy, reference = (Policy(small_model(tokenizer, scale=2.0).cuda(), 1.0) for _ in range(2))
    ids = [[tokenizer.bos_token_id, 5], [tokenizer.bos_token_id, 6, 7]] * 8
    policy_gradient.train(
        Networks(policy, reference, scorer(tokenizer).cuda()), Prompts(ids, [f"p{i}" for i in range(16)]), [],
        rl_settings(method), 6, 0, Record(NoWatch(), lambda m, s: rows.append(m), "x"),
    )  # fmt: skip
    assert len(rows) == 2 and all(math.isfinite(value) for row in rows for value in row.values())


def test_simpo_runs(tokenizer, examples):
    rows = []
    policy = Policy(small_model(tokenizer).cuda(), 1.0)
    preference.train(
        policy, halves(examples), None, variant("simpo"), 1, 0, Record(NoWatch(), lambda m, s: rows.append(m), "x")
    )
    assert math.isfinite(rows[0]["loss"])
