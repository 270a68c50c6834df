"""Intervals and win rates."""

import numpy as np
import pandas as pd
import pytest

from rlhf_vs_dpo.evaluation.measure import METRICS, Bootstrap, policy
from rlhf_vs_dpo.evaluation.statistics import interval, resample_weights, win_share


def test_win_share_counts_ties_half_and_responses_that_never_ended_as_lost():
    one, both = np.ones(1), np.ones(2)
    assert win_share(np.array([1.0, 2.0]), both, np.array([1.0, 0.0])) == (3.5, 4)
    assert win_share(np.array([1.0, 2.0]), np.array([0.25, 0.75]), np.array([1.0, 0.0])) == (0.25 * 1.5 + 0.75 * 2, 2)
    assert win_share(np.array([np.nan]), one, np.array([-9.0])) == (0.0, 1)
    assert win_share(np.array([np.nan]), one, np.array([np.nan])) == (0.5, 1)


def test_interval_covers_the_truth_about_as_often_as_it_says():
    """300 experiments with clustered responses of known mean 0: a bootstrap over responses would cover far less."""
    rng, covered = np.random.default_rng(0), 0
    weights = resample_weights(80, 500, 1)
    for _ in range(300):
        prompts = rng.normal(size=80)[:, None] + 0.1 * rng.normal(size=(80, 4))
        result = interval(prompts.sum(1), np.full(80, 4.0), weights)
        covered += result["low"] <= 0 <= result["high"]
    assert 0.90 <= covered / 300 <= 0.985


def test_interval_by_hand():
    result = interval(np.array([2.0, 4.0]), np.array([1.0, 1.0]), np.array([[2, 0], [1, 1], [0, 2]]))
    assert result["mean"] == 3.0 and result["low"] == pytest.approx(2.05) and result["high"] == pytest.approx(3.95)
    assert interval(np.zeros(2), np.zeros(2), np.ones((3, 2)))["mean"] is None


def tables(gold, finished=True):
    n = len(gold)
    samples = pd.DataFrame(
        {
            "prompt_id": [f"p{i // 2}" for i in range(n)],
            "sample": [i % 2 for i in range(n)],
            "response": "x",
            "tokens": 3,
            "finished": finished,
            "logp": -1.0,
            "reference_logp": -1.5,
            "reward": [1.0] * (n - 1) + [np.nan],
            "gold": gold,
            "filler": 0.0,
            **{f"gold_{part}": 0.0 for part in ("coverage", "faithfulness", "redundancy", "filler", "form")},
        }
    )
    retention = pd.DataFrame(
        {
            "kind": ["corpus", "fact", "fact"],
            "item_id": ["d", "f", "g"],
            "tokens": [4, 1, 1],
            "logp": [-4 * np.log(2), -1.0, -1.0],
            "correct": [np.nan, 1.0, 0.0],
        }
    )
    return samples, retention


def test_metrics_of_a_policy_by_hand():
    ours, kept = tables([1.0, 3.0, 2.0, 2.0])
    sft, _ = tables([2.0, 2.0, 1.0, 3.0])
    demos = pd.DataFrame({"prompt_id": ["p0", "p1"], "gold": [0.0, 5.0], "reward": 0.0})
    result = policy(ours, kept, sft, demos, Bootstrap.of(sft, kept, 200, 0))
    means = {metric: result[metric]["mean"] for metric in METRICS}
    assert means.pop("pair_accuracy") is None
    assert means == pytest.approx(
        {
            "gold": 2.0,
            "reward": 1.0,
            "win_rate_vs_sft": 0.5,
            "win_rate_vs_sft_by_rm": 0.5,
            "win_rate_vs_demonstration": 0.5,
            "kl": 0.5,
            "tokens": 3.0,
            "sampled_tokens": 3.0,
            "finished": 1.0,
            "filler": 0.0,
            "corpus_perplexity": 2.0,
            "fact_recall": 0.5,
        }
    )
    assert all(result[m]["low"] <= result[m]["mean"] <= result[m]["high"] for m in means)


def test_sft_against_itself_is_a_draw():
    sft, kept = tables([2.0, 2.5, 1.0, 3.0])
    demos = pd.DataFrame({"prompt_id": ["p0", "p1"], "gold": [0.0, 5.0], "reward": 0.0})
    assert policy(sft, kept, sft, demos, Bootstrap.of(sft, kept, 200, 0))["win_rate_vs_sft"] == {
        "mean": 0.5,
        "low": 0.5,
        "high": 0.5,
    }


def test_the_better_policy_wins():
    better, kept = tables([3.0, 3.0, 3.0, 3.0])
    sft, _ = tables([1.0, 1.0, 3.0, 1.0])
    demos = pd.DataFrame({"prompt_id": ["p0", "p1"], "gold": [2.0, 5.0], "reward": 0.0})
    result = policy(better, kept, sft, demos, Bootstrap.of(sft, kept, 200, 0))
    assert result["win_rate_vs_sft"]["mean"] == 0.875 and result["win_rate_vs_demonstration"]["mean"] == 0.5


def test_without_gold_the_reward_model_judges_and_the_rest_is_null():
    ours, kept = tables([np.nan] * 4)
    demos = pd.DataFrame({"prompt_id": ["p0", "p1"], "gold": np.nan, "reward": [0.0, 2.0]})
    result = policy(ours, kept, ours, demos, Bootstrap.of(ours, kept, 200, 0))
    assert result["gold"] == {"mean": None, "low": None, "high": None}
    assert result["win_rate_vs_demonstration"]["mean"] == 0.5


def test_weights_count_samples_and_pairs_count_as_a_reward_model():
    ours, kept = tables([1.0, 3.0, 2.0, 2.0])
    sft, _ = tables([2.0, 2.0, 1.0, 3.0])
    demos = pd.DataFrame({"prompt_id": ["p0", "p1"], "gold": [0.0, 5.0], "reward": 0.0})
    weighted = ours.assign(weight=[0.0, 1.0, 0.5, 0.5], sampled_tokens=8.0)
    pairs = pd.DataFrame({"prompt_id": ["a", "a", "b"], "chosen": [1.0, 0.0, 2.0], "rejected": [0.0, 1.0, 2.0]})
    result = policy(weighted, None, sft, demos, Bootstrap.of(sft, kept, 200, 0), pairs)
    assert result["gold"]["mean"] == pytest.approx(2.5)  # (3 + 2) / 2
    assert result["win_rate_vs_sft"]["mean"] == pytest.approx(0.75)  # 3 beats 2 and 2; 2 beats 1 and loses to 3
    assert result["sampled_tokens"]["mean"] == 8.0 and result["corpus_perplexity"]["mean"] is None
    assert result["pair_accuracy"]["mean"] == pytest.approx(0.5)
