"""Intervals and win rates: checked by simulation where the truth is known, by hand where it is short."""

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from rlhf_vs_dpo.evaluation import measure
from rlhf_vs_dpo.evaluation.measure import METRICS
from rlhf_vs_dpo.evaluation.statistics import NOTHING, Resamples, difference, holm, win_share

EXPERIMENTS = 2000  # a coverage of 95 % is then known to less than half a percentage point


def test_one_prompt_says_nothing_of_another():
    resamples = Resamples(100, 0)
    one, other = (
        resamples.ratio(name, "prompt", np.array([[x]]), np.ones((1, 1))) for name, x in (("a", 2.0), ("b", 1.9))
    )
    assert one.interval() == NOTHING and difference(one, other) == NOTHING | {"p": None}


def test_win_share_counts_ties_half_and_responses_that_never_ended_as_lost():
    one, both = np.ones(1), np.ones(2)
    assert win_share(np.array([1.0, 2.0]), both, np.array([1.0, 0.0])) == (3.5, 4)
    assert win_share(np.array([1.0, 2.0]), np.array([0.25, 0.75]), np.array([1.0, 0.0])) == (0.25 * 1.5 + 0.75 * 2, 2)
    assert win_share(np.array([np.nan]), one, np.array([-9.0])) == (0.0, 1)
    assert win_share(np.array([np.nan]), one, np.array([np.nan])) == (0.5, 1)


def covered(simulate, truth, seeds, prompts, read) -> float:
    """Share of experiments whose interval holds the truth."""
    resamples = Resamples(400, 1)
    hits = 0
    for number in range(EXPERIMENTS):
        found = read(resamples, simulate(np.random.default_rng([number, seeds, prompts])))
        hits += found["low"] <= truth <= found["high"]
    return hits / EXPERIMENTS


def nested(rng, prompts, seeds, prompt_sd, seed_sd, noise_sd=0.5, answers=4, mean=0.7):
    """Sums over the answers to each prompt, (seeds, prompts): a mean, what prompts and seeds add, and noise."""
    value = mean + prompt_sd * rng.normal(size=prompts) + seed_sd * rng.normal(size=(seeds, 1))
    return answers * value + noise_sd * answers**0.5 * rng.normal(size=(seeds, prompts))


# Variance of the mean that prompts bring, of that which prompts and seeds bring together: none, most, even, little.
CASES = [(1, 150, 1.0, 0.0), (8, 60, 0.5, 0.5)] + [
    (seeds, 150, share**0.5, ((1 - share) * seeds / 150) ** 0.5)
    for seeds, shares in ((3, (1.0, 0.5, 0.05)), (4, (1.0, 0.75, 0.5, 0.25, 0.05)))
    for share in shares
]


@pytest.mark.parametrize(("seeds", "prompts", "prompt_sd", "seed_sd"), CASES)
def test_an_interval_covers_the_truth_in_95_of_100_experiments(seeds, prompts, prompt_sd, seed_sd):
    share = covered(
        lambda rng: nested(rng, prompts, seeds, prompt_sd, seed_sd, noise_sd=0.2),
        0.7, seeds, prompts,
        lambda resamples, sums: resamples.ratio("m", "prompt", sums, np.full(sums.shape, 4.0)).interval(),
    )  # fmt: skip
    assert 0.93 <= share <= 0.97


@pytest.mark.parametrize("share", [1.0, 0.5, 0.05])
def test_two_seeds_are_few_and_the_interval_knows(share):
    """One degree of freedom: between 92 and 98 %, whichever level brings the variance."""
    found = covered(
        lambda rng: nested(rng, 150, 2, share**0.5, ((1 - share) * 2 / 150) ** 0.5, noise_sd=0.2),
        0.7, 2, 150,
        lambda resamples, sums: resamples.ratio("m", "prompt", sums, np.full(sums.shape, 4.0)).interval(),
    )  # fmt: skip
    assert 0.91 <= found <= 0.985


@pytest.mark.parametrize(("way", "low", "high"), [("satterthwaite", 0.91, 0.94), ("root of squares", 0.96, 0.98)])
def test_the_two_ways_to_add_up_levels_err_on_either_side(way, low, high):
    """Three seeds; seeds bring three quarters of the variance for the first, half of it for the second."""
    rng = np.random.default_rng(0)
    share = 0.75 if way == "satterthwaite" else 0.5
    error = rng.normal(size=40_000)
    seeds, prompts = share * rng.chisquare(2, size=40_000) / 2, 1 - share
    if way == "satterthwaite":
        freedom = (seeds + prompts) ** 2 / (seeds**2 / 2 + prompts**2 / 499)
        half = stats.t.ppf(0.975, freedom) * (seeds + prompts) ** 0.5
    else:
        half = (stats.t.ppf(0.975, 2) ** 2 * seeds + stats.t.ppf(0.975, 499) ** 2 * prompts) ** 0.5
    assert low <= np.mean(abs(error) <= half) <= high


def test_an_interval_of_a_share_covers_it_too():
    """Wins are 0 or 1, and prompts differ in how easily they are won."""

    def simulate(rng):
        return rng.binomial(4, rng.beta(4, 2, size=200))[None].astype(float)

    def read(resamples, wins):
        return resamples.ratio("m", "prompt", wins, np.full(wins.shape, 4.0), share=True).interval()

    assert 0.93 <= covered(simulate, 2 / 3, 1, 200, read) <= 0.97


@pytest.mark.parametrize("seeds", [1, 4])
def test_a_paired_difference_covers_the_truth_and_p_is_uniform_where_there_is_none(seeds):
    """Two methods answer the same prompts; only what prompts do to one of them, and seeds, can tell them apart."""
    resamples, hits, ps = Resamples(400, 1), 0, []
    for number in range(EXPERIMENTS):
        rng = np.random.default_rng([number, seeds, 7])
        shared = 2.0 * rng.normal(size=150)
        sums = [
            shared + 0.5 * rng.normal(size=(seeds, 150)) + (seeds > 1) * 0.1 * rng.normal(size=(seeds, 1)) for _ in "ab"
        ]
        a, b = (resamples.ratio(m, "prompt", s, np.ones(s.shape)) for m, s in zip("ab", sums, strict=True))
        found = difference(a, b)
        hits += found["low"] <= 0 <= found["high"]
        ps.append(found["p"])
        assert found["high"] - found["low"] < 0.7 * (a.interval()["high"] - a.interval()["low"]) or seeds > 1
    assert 0.93 <= hits / EXPERIMENTS <= 0.97
    assert 0.025 <= np.mean(np.array(ps) < 0.05) <= 0.07
    assert seeds > 1 or stats.kstest(ps, "uniform").statistic < 0.04  # with few seeds, levels add up on the safe side


def test_without_resampling_seeds_the_interval_would_be_far_too_narrow():
    """What pooling the answers of four seeds would do: the check above can fail."""
    share = covered(
        lambda rng: nested(rng, 150, 4, 0.3, 0.2),
        0.7, 4, 150,
        lambda resamples, sums: resamples.ratio("m", "prompt", sums.sum(0)[None], np.full((1, 150), 16.0)).interval(),
    )  # fmt: skip
    assert share < 0.6


def test_interval_by_hand():
    """Three prompts drawn three times: all 27 resamples are equally likely, and their quantiles are known."""
    resamples = Resamples(20000, 0)
    found = resamples.ratio("m", "prompt", np.array([[2.0, 4.0, 9.0]]), np.ones((1, 3)))
    every = np.array([np.mean([a, b, c]) for a in (2, 4, 9) for b in (2, 4, 9) for c in (2, 4, 9)])
    assert found.value == 5.0 and found.draws.var() == pytest.approx(every.var(), rel=0.03)
    # One resample in 27 is all of one prompt, so that 2 and 9 are the percentiles; stretched by t_2 / z about 5.
    stretch = stats.t.ppf(0.975, 2) / stats.norm.ppf(0.975)
    assert found.interval() == pytest.approx({"mean": 5.0, "low": 5 - 3 * stretch, "high": 5 + 4 * stretch})
    assert (
        resamples.ratio("m", "prompt", np.array([[0.0, 0.0, 1.0]]), np.ones((1, 3)), share=True).interval()["high"]
        == 1.0
    )
    nothing = resamples.ratio("m", "prompt", np.zeros((1, 2)), np.zeros((1, 2)))
    assert nothing.interval() == {"mean": None, "low": None, "high": None}


def test_four_seeds_that_differ_alone_give_students_interval():
    """Every prompt says the same, so that only seeds vary: mean +- t_3 s / sqrt(4)."""
    values = np.array([1.0, 1.2, 1.5, 1.9])
    sums = np.repeat(values[:, None], 50, axis=1)
    found = Resamples(40000, 0).ratio("m", "prompt", sums, np.ones((4, 50)))
    error = values.std(ddof=1) / 2
    assert found.standard_error == pytest.approx(error, rel=0.01)
    end = values.mean() + stats.t.ppf(0.975, 3) * error
    assert found.interval()["high"] == pytest.approx(end, rel=0.01)
    other = Resamples(40000, 0).ratio("n", "prompt", 0 * sums, np.ones((4, 50)))
    p = difference(found, other)["p"]
    assert p == pytest.approx(2 * stats.t.sf(values.mean() / error, 3), rel=0.05)


def test_holm_by_hand():
    assert holm([0.01, None, 0.04, 0.03]) == pytest.approx([0.03, None, 0.06, 0.06])
    assert holm([None]) == [None]


def test_methods_share_prompts_and_not_seeds():
    resamples = Resamples(500, 0)
    assert (resamples.units("prompt", 9) == resamples.units("prompt", 9)).all()
    assert (resamples.units("prompt", 9) != resamples.units("fact", 9)).any()
    assert (resamples.seeds("a", 4) != resamples.seeds("b", 4)).any()
    assert resamples.seeds("a", 4).sum(1) == pytest.approx(1.0)


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
            "kind": ["corpus", "corpus", "fact", "fact"],
            "item_id": ["d", "e", "f", "g"],
            "tokens": [3, 1, 1, 1],
            "logp": [-2 * np.log(2), -2 * np.log(2), -1.0, -1.0],  # 4 tokens of log 2 on average, not 2 documents
            "correct": [np.nan, np.nan, 1.0, 0.0],
        }
    )
    return samples, retention


def row(*args):
    """Intervals of a method with one seed."""
    return measure.intervals(measure.row("m", [measure.policy(*args)], Resamples(200, 0)))


def test_metrics_of_a_policy_by_hand():
    ours, kept = tables([1.0, 3.0, 2.0, 2.0])
    sft, _ = tables([2.0, 2.0, 1.0, 3.0])
    demos = pd.DataFrame({"prompt_id": ["p0", "p1"], "gold": [0.0, 5.0], "reward": 0.0})
    result = row(ours, kept, sft, demos)
    means = {metric: result[metric]["mean"] for metric in METRICS}
    assert means.pop("pair_accuracy") is None
    assert means == pytest.approx(
        {
            "gold": 2.0,
            "reward": 1.0,
            "win_rate_vs_sft": 0.5,
            "length_controlled_win_rate": 0.5,
            "win_rate_vs_sft_by_rm": 0.5,
            "win_rate_vs_demonstration": 0.5,
            "kl": 0.5,
            "tokens": 3.0,
            "sampled_tokens": 3.0,
            "finished": 1.0,
            "filler": 0.0,
            "entropy": 1.0,
            "distinct_1": 0.5,
            "distinct_2": 0.5,
            "self_similarity": 1.0,
            "corpus_perplexity": 2.0,
            "fact_recall": 0.5,
            **{f"gold_{part}": 0.0 for part in ("coverage", "faithfulness", "redundancy", "filler", "form")},
        }
    )
    assert all(result[m]["low"] <= result[m]["mean"] <= result[m]["high"] for m in means)


def test_sft_against_itself_is_a_draw():
    sft, kept = tables([2.0, 2.5, 1.0, 3.0])
    demos = pd.DataFrame({"prompt_id": ["p0", "p1"], "gold": [0.0, 5.0], "reward": 0.0})
    assert row(sft, kept, sft, demos)["win_rate_vs_sft"] == {
        "mean": 0.5,
        "low": 0.5,
        "high": 0.5,
    }


def test_the_better_policy_wins():
    better, kept = tables([3.0, 3.0, 3.0, 3.0])
    sft, _ = tables([1.0, 1.0, 3.0, 1.0])
    demos = pd.DataFrame({"prompt_id": ["p0", "p1"], "gold": [2.0, 5.0], "reward": 0.0})
    result = row(better, kept, sft, demos)
    assert result["win_rate_vs_sft"]["mean"] == 0.875 and result["win_rate_vs_demonstration"]["mean"] == 0.5


def test_without_gold_the_reward_model_judges_and_the_rest_is_null():
    ours, kept = tables([np.nan] * 4)
    demos = pd.DataFrame({"prompt_id": ["p0", "p1"], "gold": np.nan, "reward": [0.0, 2.0]})
    result = row(ours, kept, ours, demos)
    assert result["gold"] == {"mean": None, "low": None, "high": None}
    assert result["win_rate_vs_demonstration"]["mean"] == 0.5


def test_weights_count_samples_and_pairs_count_as_a_reward_model():
    ours, _kept = tables([1.0, 3.0, 2.0, 2.0])
    sft, _ = tables([2.0, 2.0, 1.0, 3.0])
    demos = pd.DataFrame({"prompt_id": ["p0", "p1"], "gold": [0.0, 5.0], "reward": 0.0})
    weighted = ours.assign(weight=[0.0, 1.0, 0.5, 0.5], sampled_tokens=8.0)
    pairs = pd.DataFrame({"prompt_id": ["a", "a", "b"], "chosen": [1.0, 0.0, 2.0], "rejected": [0.0, 1.0, 2.0]})
    result = row(weighted, None, sft, demos, pairs)
    assert result["gold"]["mean"] == pytest.approx(2.5)  # (3 + 2) / 2
    assert result["win_rate_vs_sft"]["mean"] == pytest.approx(0.75)  # 3 beats 2 and 2; 2 beats 1 and loses to 3
    assert result["sampled_tokens"]["mean"] == 8.0 and result["corpus_perplexity"]["mean"] is None
    assert result["pair_accuracy"]["mean"] == pytest.approx(0.5)
