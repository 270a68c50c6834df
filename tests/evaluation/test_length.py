"""The length-controlled win rate removes a pure effect of length, keeps a pure effect of quality, and covers the truth."""

import numpy as np
import pytest
import statsmodels.api as sm

from rlhf_vs_dpo.evaluation import length
from rlhf_vs_dpo.evaluation.statistics import Resamples


def simulate(rng, prompts, quality, taste, longer, answers=3):
    """Comparisons of a policy whose answers are `longer` tokens longer, by a judge with a taste for length.

    P(win) = sigmoid(quality + taste * tanh(difference / 5) + something of each prompt)
    """
    ours = 20 + longer + rng.normal(size=(prompts, answers)) * 3
    theirs = 20 + rng.normal(size=(prompts, answers)) * 3
    gap = ours[:, :, None] - theirs[:, None, :]
    odds = quality + taste * np.tanh(gap / 5) + 0.2 * rng.normal(size=(prompts, 1, 1))
    wins = (rng.random(gap.shape) < length.sigmoid(odds)).astype(float)
    prompt = np.broadcast_to(np.arange(prompts)[:, None, None], gap.shape)
    return wins.ravel(), gap.ravel(), np.ones(gap.size), prompt.ravel()


def test_a_pure_effect_of_length_is_removed():
    data = simulate(np.random.default_rng(0), 2000, quality=0.0, taste=2.0, longer=4.0)
    assert data[0].mean() > 0.7  # the plain win rate is taken in
    assert length.fit(*data, 2000).win_rate == pytest.approx(0.5, abs=0.03)


def test_a_pure_effect_of_quality_is_kept():
    data = simulate(np.random.default_rng(0), 2000, quality=1.0, taste=0.0, longer=4.0)
    truth = length.sigmoid(1.0)
    assert data[0].mean() == pytest.approx(truth, abs=0.03)
    assert length.fit(*data, 2000).win_rate == pytest.approx(truth, abs=0.03)


def test_quality_is_told_from_length_where_both_pull():
    """Shorter and better: the plain win rate says a draw, at equal length it wins."""
    data = simulate(np.random.default_rng(1), 3000, quality=1.0, taste=2.0, longer=-3.0)
    assert data[0].mean() < 0.6
    assert length.fit(*data, 3000).win_rate == pytest.approx(length.sigmoid(1.0), abs=0.04)


def test_the_interval_covers_the_truth():
    """The truth is what an endless number of prompts gives; 1,500 experiments of 150 prompts."""
    truth = length.fit(*simulate(np.random.default_rng(99), 60000, 0.5, 1.0, 2.0), 60000).win_rate
    resamples, hits = Resamples(600, 0), 0
    weights = resamples.units("prompt", 150)
    for number in range(1500):
        found = length.fit(*simulate(np.random.default_rng([number, 3]), 150, 0.5, 1.0, 2.0), 150)
        interval = resamples.combine(np.array([found.win_rate]), found.resampled(weights)[:, None], 150).interval()
        hits += interval["low"] <= truth <= interval["high"]
    assert 0.93 <= hits / 1500 <= 0.97


def test_influence_is_that_of_statsmodels_clustered_covariance():
    """The variance of the resamples is the sandwich of Liang and Zeger, prompts being the clusters."""
    wins, gap, weights, prompt = simulate(np.random.default_rng(2), 300, 0.5, 1.0, 2.0)
    found = length.fit(wins, gap, weights, prompt, 300)
    x = np.stack([np.ones_like(gap), np.tanh(gap / gap.std(ddof=1))], axis=1)
    fitted = sm.GLM(wins, x, family=sm.families.Binomial()).fit(
        cov_type="cluster", cov_kwds={"groups": prompt, "use_correction": False}
    )
    assert found.theta == pytest.approx(fitted.params[0], abs=1e-3)
    assert np.sqrt((found.influence**2).sum()) == pytest.approx(fitted.bse[0], rel=0.01)
    again = length.fit(*(part[prompt < 299] for part in (wins, gap, weights, prompt)), 300)  # one prompt left out
    assert found.theta - again.theta == pytest.approx(found.influence[299], rel=0.1, abs=2e-4)


def test_what_cannot_be_regressed():
    one = np.ones(8)
    assert length.fit(one, np.arange(8.0), one, np.arange(8), 8).win_rate == 1.0
    assert length.fit(0 * one, np.arange(8.0), one, np.arange(8), 8).win_rate == 0.0
    assert length.fit(0.5 * one, np.arange(8.0), one, np.arange(8), 8).win_rate == 0.5
    always = np.array([1.0, 0.0, 1.0, 1.0]), np.full(4, 3.0), np.ones(4), np.arange(4)
    assert length.fit(*always, 4) is None  # always three tokens longer: is it better, or longer?
    far = np.array([30.0] * 50 + [31.0] * 50)
    assert (
        length.fit(np.tile([1.0, 0.0], 50), far, np.ones(100), np.arange(100), 100) is None
    )  # the tanh cannot tell 30 from 31
    same = length.fit(np.array([1.0, 0.0, 1.0, 1.0]), np.zeros(4), np.ones(4), np.arange(4), 4)
    assert same.win_rate == pytest.approx(0.75, abs=1e-6)  # all of one length: the plain win rate
    split = np.array([0.0] * 4 + [1.0] * 4)
    assert length.fit(split, np.arange(8.0) - 3.5, one, np.arange(8), 8) is None  # length says it all


def test_nothing_is_said_of_lengths_that_were_not_seen():
    """Nearly every response is longer: a curve drawn back to equal length would be a guess."""
    wins, gap, weights, prompt = simulate(np.random.default_rng(4), 300, 0.0, 1.0, 0.0)
    assert length.fit(wins, gap, weights, prompt, 300) is not None
    shifted = gap - np.quantile(gap, 0.02)
    assert (shifted < 0).mean() < 0.05
    assert length.fit(wins, shifted, weights, prompt, 300) is None
    assert length.fit(wins, -shifted, weights, prompt, 300) is None


def test_comparisons_by_hand():
    wins, gap, weights = length.compare(
        (np.array([1.0, np.nan]), np.array([5.0, 9.0]), np.array([0.25, 0.75])),
        (np.array([1.0, 0.0]), np.array([4.0, 6.0])),
    )
    assert wins.tolist() == [0.5, 1.0, 0.0, 0.0] and gap.tolist() == [1.0, -1.0, 5.0, 3.0]
    assert weights.tolist() == [0.25, 0.25, 0.75, 0.75]
