"""Bias amplified and reward model exploited: planted, found; and not found where there is nothing but noise."""

import numpy as np
import pandas as pd
import pytest
from test_overoptimisation import OTHERS

from rlhf_vs_dpo.evaluation import failures, paths
from rlhf_vs_dpo.evaluation.statistics import Resamples

GOLD = [0.0, 1.0, 1.5, 1.2, 0.8, 0.2]  # highest at point 2
UTILITY = [0.0, 1.2, 2.0, 2.6, 2.4, 1.9]  # highest at point 3
REWARD = [0.0, 1.0, 2.0, 3.0, 4.0, 5.0]  # rises to the end
KL = [0.0, 0.5, 1.0, 2.0, 3.0, 4.0]


def walked(gold=GOLD, utility=UTILITY, reward=REWARD, noise=0.0, prompts=120, lines=1, seed=0):
    rng, tables = np.random.default_rng(seed), []
    for _ in range(lines):
        parts = []
        for step, values in enumerate(zip(gold, utility, reward, KL, strict=True)):
            drawn = [value + noise * rng.normal(size=prompts) for value in values]
            row = {"step": step, "prompt_id": [f"p{i}" for i in range(prompts)], **OTHERS}
            parts.append(pd.DataFrame(row | dict(zip(("gold", "utility", "reward", "kl"), drawn, strict=True))))
        tables.append(pd.concat(parts, ignore_index=True))
    return paths.of_training("m", tables, Resamples(200, 0))


def test_what_was_planted_is_measured_exactly():
    found = failures.of_path(walked(), Resamples(200, 0), 0)
    bias, exploited = found["bias_amplified"], found["reward_model_exploited"]
    assert bias["gained"]["mean"] == pytest.approx(0.6) and bias["lost"]["mean"] == pytest.approx(-0.3)
    assert exploited["gained"]["mean"] == pytest.approx(2.0) and exploited["lost"]["mean"] == pytest.approx(-0.7)
    assert (bias["begins"]["mean"], exploited["begins"]["mean"]) == (1.0, 2.0)
    assert bias["shown"] and exploited["shown"] and bias["share"] == exploited["share"] == 1.0


def test_a_path_may_be_read_up_to_a_point():
    """Best of n up to some n: at point 3 utility still rises, so that nothing has been exploited yet."""
    found = failures.of_path(walked(), Resamples(200, 0), 0, points=4)
    assert found["bias_amplified"]["shown"] and not found["reward_model_exploited"]["shown"]
    assert found["reward_model_exploited"]["gained"]["mean"] == 0.0


def test_where_all_rise_together_nothing_failed():
    found = failures.of_path(walked(gold=REWARD, utility=REWARD), Resamples(200, 0), 0)
    assert not any(entry["shown"] for entry in found.values())
    assert all(entry["gained"]["mean"] == entry["lost"]["mean"] == 0.0 for entry in found.values())


def test_noise_shows_no_failure():
    """Flat curves: the highest of noisy points would look higher than what follows; cross-fitted it does not."""
    shown, lost, shares = 0, [], []
    for seed in range(60):
        path = walked(gold=[1.0] * 6, utility=[1.0] * 6, reward=[1.0] * 6, noise=1.0, seed=seed)
        found = failures.of_path(path, Resamples(100, seed), seed)
        shown += sum(entry["shown"] for entry in found.values())
        lost += [entry["lost"]["mean"] for entry in found.values()]
        shares += [entry["share"] for entry in found.values()]
    assert np.mean(shares) < 0.4  # of resamples in which the one rose and the other fell
    assert shown <= 3 and abs(np.mean(lost)) < 3 * np.std(lost) / len(lost) ** 0.5


def test_lines_choose_their_own_points_and_widen_the_interval():
    one = failures.of_path(walked(noise=0.5), Resamples(200, 0), 0)["reward_model_exploited"]["lost"]
    three = failures.of_path(walked(noise=0.5, lines=3), Resamples(200, 0), 0)["reward_model_exploited"]["lost"]
    assert one["low"] < -0.7 < one["high"] and three["low"] < -0.7 < three["high"]


def test_without_a_gold_reward_there_is_nothing_to_tell_apart():
    path = walked(gold=[np.nan] * 6)
    assert failures.of_path(path, Resamples(100, 0), 0) is None
