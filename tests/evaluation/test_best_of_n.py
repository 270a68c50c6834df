"""Best-of-n from a pool: the estimator against enumeration and simulation, and the bounds."""

import itertools
import math

import numpy as np
import pandas as pd
import pytest

from rlhf_vs_dpo import config
from rlhf_vs_dpo.evaluation.best_of_n import as_samples
from rlhf_vs_dpo.evaluation.bounds import of_best_of_n, of_imitation
from rlhf_vs_dpo.evaluation.order_statistics import (
    kl_bound,
    log_ratio,
    order_weights,
    tied_weights,
    win_rate_bound,
)
from rlhf_vs_dpo.theory import laws


@pytest.mark.parametrize("n", [1, 2, 3, 5, 6])
def test_weights_are_those_of_all_subsets(n):
    """Best of every subset of n out of 6, counted."""
    counts = np.zeros(6)
    for subset in itertools.combinations(range(6), n):
        counts[max(subset)] += 1
    assert order_weights(6, n) == pytest.approx(counts / counts.sum())


def test_weights_of_large_pools_add_up_to_1():
    for n in (1, 2, 512, 1024):
        assert order_weights(1024, n).sum() == pytest.approx(1.0, abs=1e-9)
    with pytest.raises(ValueError, match="best of 5 cannot be estimated from 4 samples"):
        order_weights(4, 5)


def test_equal_rewards_share_their_weight_and_unfinished_responses_are_worst():
    rewards = np.array([2.0, np.nan, 1.0, 2.0, 0.0])
    counts = np.zeros(5)
    for subset in itertools.combinations(range(5), 2):
        ranked = [(-np.inf if math.isnan(rewards[i]) else rewards[i]) for i in subset]
        best = [i for i, r in zip(subset, ranked, strict=True) if r == max(ranked)]
        for i in best:
            counts[i] += 1 / len(best)
    assert tied_weights(rewards, 2) == pytest.approx(counts / 10)
    assert tied_weights(rewards, 5)[1] == 0.0


def pool(ref, reward, size, seed):
    rng = np.random.default_rng(seed)
    drawn = rng.choice(len(ref), size=size, p=ref)
    return pd.DataFrame(
        {
            "prompt_id": "p",
            "response": drawn.astype(str),
            "tokens": 3,
            "reward": reward[drawn],
            "logp": np.log(ref[drawn]),
            "reference_logp": np.log(ref[drawn]),
        }
    )


@pytest.mark.parametrize("n", [1, 2, 8, 64])
def test_reward_and_kl_against_the_exact_law(n):
    """40 responses with weight of their own: means over pools of 1024 against the exact law of the best of n."""
    rng = np.random.default_rng(3)
    ref = rng.dirichlet(np.ones(40))
    reward = rng.normal(size=40)
    law = laws.best_of_n_law(ref, reward, n)
    gained, kl = [], []
    for seed in range(30):
        table = as_samples(pool(ref, reward, 1024, seed), n)
        assert table["weight"].sum() == pytest.approx(1.0)
        gained.append((table["weight"] * table["reward"]).sum())
        kl.append((table["weight"] * (table["logp"] - table["reference_logp"])).sum())
    assert np.mean(gained) == pytest.approx(float(law @ reward), abs=4 * np.std(gained) / 30**0.5 + 1e-9)
    assert np.mean(kl) == pytest.approx(float(laws.kl(law, ref)), abs=0.08)
    assert np.mean(kl) <= kl_bound(n) + 1e-6
    assert table["sampled_tokens"].iloc[0] == 3 * n


def test_without_atoms_the_kl_is_the_bound():
    ranks = np.arange(512.0)
    for n in (2, 100, 512):
        ratio = log_ratio(ranks, np.full(512, -60.0), ranks.astype(str), n)
        assert order_weights(512, n) @ ratio == pytest.approx(kl_bound(n), abs=1e-9)


def test_bounds_name_what_breaks_them():
    row = {
        "kl": {"mean": 0.15, "low": 0.1, "high": 0.2},
        "win_rate_vs_sft": {"mean": 0.7, "low": 0.68, "high": 0.72},
        "win_rate_vs_sft_by_rm": {"mean": None, "low": None, "high": None},
    }
    checked = of_best_of_n("x", row, 2, 100)
    assert checked["x: kl"]["holds"] and checked["x: kl"]["bound"] == pytest.approx(math.log(2) - 0.5)
    assert not checked["x: win_rate_vs_sft"]["holds"] and len(checked) == 2
    assert win_rate_bound(2) == pytest.approx(2 / 3)
    passes = {
        "epochs": 1.0, "rounds": 3, "batch": 1, "learning_rate": 1.0, "schedule": "linear", "warmup": 0.0,
        "weight_decay": 0.0, "max_grad_norm": 1.0, "adam_epsilon": 1.0,
    }  # fmt: skip
    rounds = config.BestOfN(recipe="best_of_n", n=4, **passes)
    assert of_imitation("x", row, rounds, False, 16, 10**6)["x: kl"]["bound"] == pytest.approx(kl_bound(64))
    share = config.RmFiltered(recipe="rm_filtered", share=0.25, **(passes | {"rounds": 1}))
    assert of_imitation("x", row, share, False, 16, 100)["x: kl"]["bound"] == pytest.approx(math.log(4))
    assert of_imitation("x", row, share, False, 5, 100)["x: kl"]["bound"] == pytest.approx(math.log(5))  # one of five
    again = config.RmFiltered(recipe="rm_filtered", share=0.25, **(passes | {"rounds": 2}))
    checked = of_imitation("x", row, again, False, 16, 10**6)
    assert checked["x: kl"]["bound"] == pytest.approx(2 * math.log(4))
    assert checked["x: win_rate_vs_sft"]["bound"] == pytest.approx(1 - 0.25**2 / 2)
    chosen = config.ChosenSft(recipe="chosen_sft", **(passes | {"rounds": 1}))
    assert of_imitation("x", row, chosen, False, 16, 100)["x: kl"]["bound"] == pytest.approx(kl_bound(2))
    assert of_imitation("x", row, chosen, True, 16, 100) == {}  # pairs of a data set are no samples of ref
    assert list(of_best_of_n("x", row, 1024, 256)) == ["x: kl"]  # too few losses to be expected


def test_equal_rewards_share_a_level_and_the_endless_are_the_lowest():
    """Ratios against the exact law where many responses tie, and one half never ends."""
    ref = np.array([0.3, 0.2, 0.1, 0.4])
    levels = np.array([1.0, 1.0, 2.0, np.nan])
    known = np.array([1.0, 1.0, 2.0, -9.0])
    draws = np.random.default_rng(0).choice(4, size=4000, p=ref)
    for n in (1, 2, 8):
        law = laws.best_of_n_law(ref, known, n)
        ratio = log_ratio(levels[draws], np.log(ref[draws]), draws.astype(str), n)
        for y in range(4):
            assert np.unique(ratio[draws == y]) == pytest.approx(np.log(law[y] / ref[y]), abs=0.05 * n)
    endless = log_ratio(np.full(50, np.nan), np.full(50, -3.0), np.arange(50).astype(str), 16)
    assert endless == pytest.approx(np.zeros(50), abs=1e-9)  # none ends: nothing is selected
