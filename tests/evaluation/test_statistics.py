"""Intervals and win rates: checked by simulation where the truth is known, by hand where it is short."""

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from rlhf_vs_dpo.evaluation import measure, statistics
from rlhf_vs_dpo.evaluation.measure import METRICS
from rlhf_vs_dpo.evaluation.statistics import NOTHING, Resamples, holm, win_share

EXPERIMENTS = 2000  # a coverage of 95 % is then known to less than half a percentage point


def test_one_prompt_says_nothing_of_another():
    resamples = Resamples(100, 0)
    one, other = (resamples.ratio("prompt", np.array([[x]]), np.ones((1, 1))) for x in (2.0, 1.9))
    gap = resamples.difference(one, other)
    assert one.interval() == NOTHING and gap.interval() == NOTHING and gap.p_value() is None


def test_win_share_counts_ties_half_and_responses_that_never_ended_as_lost():
    one, both = np.ones(1), np.ones(2)
    assert win_share(np.array([1.0, 2.0]), both, np.array([1.0, 0.0])) == (3.5, 4)
    assert win_share(np.array([1.0, 2.0]), np.array([0.25, 0.75]), np.array([1.0, 0.0])) == (0.25 * 1.5 + 0.75 * 2, 2)
    assert win_share(np.array([np.nan]), one, np.array([-9.0])) == (0.0, 1)
    assert win_share(np.array([np.nan]), one, np.array([np.nan])) == (0.5, 1)


def covered(simulate, truth, lines, prompts, read) -> float:
    """Share of experiments whose interval holds the truth."""
    resamples = Resamples(400, 1)
    hits = 0
    for number in range(EXPERIMENTS):
        found = read(resamples, simulate(np.random.default_rng([number, lines, prompts])))
        hits += found["low"] <= truth <= found["high"]
    return hits / EXPERIMENTS


def nested(rng, prompts, lines, prompt_sd, line_sd, noise_sd=0.5, answers=4, mean=0.7):
    """Sums over the answers to each prompt, (lines, prompts): a mean, what prompts and lines add, and noise."""
    value = mean + prompt_sd * rng.normal(size=prompts) + line_sd * rng.normal(size=(lines, 1))
    return answers * value + noise_sd * answers**0.5 * rng.normal(size=(lines, prompts))


# Variance of the mean that prompts bring, of that which prompts and lines bring together: none, most, even, little.
CASES = [(1, 150, 1.0, 0.0), (8, 60, 0.5, 0.5)] + [
    (lines, 150, share**0.5, ((1 - share) * lines / 150) ** 0.5)
    for lines, shares in ((3, (1.0, 0.5, 0.05)), (4, (1.0, 0.75, 0.5, 0.25, 0.05)))
    for share in shares
]


@pytest.mark.parametrize(("lines", "prompts", "prompt_sd", "line_sd"), CASES)
def test_an_interval_covers_the_truth_in_95_of_100_experiments(lines, prompts, prompt_sd, line_sd):
    share = covered(
        lambda rng: nested(rng, prompts, lines, prompt_sd, line_sd, noise_sd=0.2),
        0.7, lines, prompts,
        lambda resamples, sums: resamples.ratio("prompt", sums, np.full(sums.shape, 4.0)).interval(),
    )  # fmt: skip
    assert 0.93 <= share <= 0.98


@pytest.mark.parametrize("share", [1.0, 0.5, 0.05])
def test_two_lines_are_few_and_the_interval_knows(share):
    """One degree of freedom: between 92 and 98 %, whichever level brings the variance."""
    found = covered(
        lambda rng: nested(rng, 150, 2, share**0.5, ((1 - share) * 2 / 150) ** 0.5, noise_sd=0.2),
        0.7, 2, 150,
        lambda resamples, sums: resamples.ratio("prompt", sums, np.full(sums.shape, 4.0)).interval(),
    )  # fmt: skip
    assert 0.91 <= found <= 0.985


@pytest.mark.parametrize(("way", "low", "high"), [("satterthwaite", 0.91, 0.94), ("root of squares", 0.96, 0.98)])
def test_the_two_ways_to_add_up_levels_err_on_either_side(way, low, high):
    """Three lines; lines bring three quarters of the variance for the first, half of it for the second."""
    rng, experiments = np.random.default_rng(0), 20_000
    share = 0.75 if way == "satterthwaite" else 0.5
    error = rng.normal(size=experiments)
    lines, prompts = share * rng.chisquare(2, size=experiments) / 2, 1 - share
    parts = [[(prompts, 499.0), (of, 2.0)] for of in lines]
    half = np.array([statistics._wide(of, 0.05) for of in parts])
    if way == "satterthwaite":
        half = 2 * np.array([statistics._half_width(of, 0.05) for of in parts]) - half
        freedom = (lines + prompts) ** 2 / (lines**2 / 2 + prompts**2 / 499)
        assert half == pytest.approx(stats.t.ppf(0.975, freedom) * (lines + prompts) ** 0.5, rel=1e-6)
    assert low <= np.mean(abs(error) <= half) <= high


@pytest.mark.parametrize("excess", [1.0, 4.0])
def test_the_noise_of_answers_counts_once(excess):
    """Lines whose means vary as much as that noise alone makes them: all their variance is noise; four times as much: three quarters are not."""
    resamples, lines = Resamples(4000, 0), 5
    each = np.random.default_rng(1).normal(size=lines)
    drawn = np.random.default_rng(2).normal(size=(4000, lines))
    noise = drawn.var(axis=1, ddof=1).mean() / lines
    each *= (excess * noise / np.var(resamples.lines(lines) @ each - each.mean(), ddof=1)) ** 0.5
    found = resamples.combine(each, each + drawn, 100)
    assert found.line_variance == pytest.approx(excess * noise)
    moved = (resamples.lines(lines) @ each - each.mean()) * (1 - 1 / excess) ** 0.5
    assert found.draws == pytest.approx(each.mean() + drawn.mean(1) + moved)


def test_a_p_value_is_of_the_wider_way_to_add_up():
    """Prompts bring a variance of 0.5 with 99 degrees of freedom, three lines one of 1 with 2."""
    draws = np.array([-1.0, 1.0]) * 1.5**0.5 * (1999 / 2000) ** 0.5
    found = statistics.Estimate(4.0, 4.0 + np.tile(draws, 1000), 1.0, 3, 100)
    p = found.p_value()
    wide = (0.5 * stats.t.ppf(1 - p / 2, 99) ** 2 + 1.0 * stats.t.ppf(1 - p / 2, 2) ** 2) ** 0.5
    assert wide == pytest.approx(4.0, rel=1e-6) and 0.05 < p < 0.1


def test_an_interval_of_a_share_covers_it_too():
    """Wins are 0 or 1, and prompts differ in how easily they are won."""

    def simulate(rng):
        return rng.binomial(4, rng.beta(4, 2, size=200))[None].astype(float)

    def read(resamples, wins):
        return resamples.ratio("prompt", wins, np.full(wins.shape, 4.0), share=True).interval()

    assert 0.93 <= covered(simulate, 2 / 3, 1, 200, read) <= 0.97


def two_methods(rng, lines, prompts=150, gap=0.0, line_sd=0.4, own_sd=0.1):
    """Sums of two methods, (lines, prompts) each: what a prompt adds to both; what the SFT policy, pairs and reward model of a
    line add to both; what training adds to each; and noise."""
    shared = 2.0 * rng.normal(size=prompts) + (lines > 1) * line_sd * rng.normal(size=(lines, 1))
    own = [(lines > 1) * own_sd * rng.normal(size=(lines, 1)) + 0.5 * rng.normal(size=(lines, prompts)) for _ in "ab"]
    return shared + own[0] + gap, shared + own[1]


@pytest.mark.parametrize("lines", [1, 3, 5])
def test_a_paired_difference_covers_the_truth_and_p_is_uniform_where_there_is_none(lines):
    """Two methods answer the same prompts in the same lines; only what each adds of its own can tell them apart."""
    resamples, hits, ps, errors = Resamples(400, 1), 0, [], []
    for number in range(EXPERIMENTS):
        sums = two_methods(np.random.default_rng([number, lines, 7]), lines)
        a, b = (resamples.ratio("prompt", s, np.ones(s.shape)) for s in sums)
        gap = resamples.difference(a, b)
        found = gap.interval()
        hits += found["low"] <= 0 <= found["high"]
        ps.append(gap.p_value())
        errors.append((gap.draws.std(ddof=1), a.draws.std(ddof=1)))
    paired, alone = np.mean(errors, axis=0)
    assert paired < 0.6 * alone  # what the line and the prompts give to both cancels
    assert 0.93 <= hits / EXPERIMENTS <= 0.97
    assert 0.02 <= np.mean(np.array(ps) < 0.05) <= 0.07
    assert lines > 1 or stats.kstest(ps, "uniform").statistic < 0.04  # with few lines, levels add up on the safe side


def test_differences_that_are_not_taken_within_lines_would_be_far_too_wide():
    """Lines drawn apart for each method, as if they had nothing in common: the check above can fail."""
    resamples, paired, apart = Resamples(400, 1), [], []
    for number in range(50):
        sums = two_methods(np.random.default_rng([number, 5, 7]), 5)
        a, b = (resamples.ratio("prompt", s, np.ones(s.shape)) for s in sums)
        paired.append(resamples.difference(a, b).draws.std(ddof=1))
        apart.append((a.line_variance + b.line_variance) ** 0.5)
    assert np.mean(paired) < 0.5 * np.mean(apart)


def test_a_line_without_an_answer_has_no_say_and_takes_its_pair_along():
    resamples = Resamples(200, 0)
    whole = np.array([[1.0, 2.0, 3.0], [2.0, 3.0, 4.0], [9.0, 9.0, 9.0]])
    silent = resamples.ratio("prompt", whole * [[1], [1], [0]], np.ones((3, 3)) * [[1], [1], [0]])
    assert silent.value == pytest.approx(2.5) and silent.lines == 2 and np.isnan(silent.each[2])
    gap = resamples.difference(resamples.ratio("prompt", whole + 1, np.ones((3, 3))), silent)
    assert gap.value == pytest.approx(1.0) and gap.lines == 2


def test_without_resampling_lines_the_interval_would_be_far_too_narrow():
    """What pooling the answers of four lines would do: the check above can fail."""
    share = covered(
        lambda rng: nested(rng, 150, 4, 0.3, 0.2),
        0.7, 4, 150,
        lambda resamples, sums: resamples.ratio("prompt", sums.sum(0)[None], np.full((1, 150), 16.0)).interval(),
    )  # fmt: skip
    assert share < 0.6


def test_interval_by_hand():
    """Three prompts drawn three times: all 27 resamples are equally likely, and their quantiles are known."""
    resamples = Resamples(20000, 0)
    found = resamples.ratio("prompt", np.array([[2.0, 4.0, 9.0]]), np.ones((1, 3)))
    every = np.array([np.mean([a, b, c]) for a in (2, 4, 9) for b in (2, 4, 9) for c in (2, 4, 9)])
    assert found.value == 5.0 and found.draws.var() == pytest.approx(every.var(), rel=0.03)
    # One resample in 27 is all of one prompt, so that 2 and 9 are the percentiles; stretched by t_2 / z about 5.
    stretch = stats.t.ppf(0.975, 2) / stats.norm.ppf(0.975)
    assert found.interval() == pytest.approx({"mean": 5.0, "low": 5 - 3 * stretch, "high": 5 + 4 * stretch})
    assert resamples.ratio("prompt", np.array([[0.0, 0.0, 1.0]]), np.ones((1, 3)), share=True).interval()["high"] == 1.0
    nothing = resamples.ratio("prompt", np.zeros((1, 2)), np.zeros((1, 2)))
    assert nothing.interval() == {"mean": None, "low": None, "high": None}


def test_four_lines_that_differ_alone_give_students_interval():
    """Every prompt says the same, so that only lines vary: mean +- t_3 s / sqrt(4)."""
    values = np.array([1.0, 1.2, 1.5, 1.9])
    sums = np.repeat(values[:, None], 50, axis=1)
    found = Resamples(40000, 0).ratio("prompt", sums, np.ones((4, 50)))
    error = values.std(ddof=1) / 2
    assert found.draws.std(ddof=1) == pytest.approx(error, rel=0.01)
    end = values.mean() + stats.t.ppf(0.975, 3) * error
    assert found.interval()["high"] == pytest.approx(end, rel=0.01)
    other = Resamples(40000, 0).ratio("prompt", 0 * sums, np.ones((4, 50)))
    p = Resamples(40000, 0).difference(found, other).p_value()
    assert p == pytest.approx(2 * stats.t.sf(values.mean() / error, 3), rel=0.05)


def test_holm_by_hand():
    assert holm([0.01, None, 0.04, 0.03]) == pytest.approx([0.03, None, 0.06, 0.06])
    assert holm([None]) == [None]


def test_everything_shares_prompts_and_lines():
    resamples = Resamples(500, 0)
    assert (resamples.units("prompt", 9) == resamples.units("prompt", 9)).all()
    assert (resamples.units("prompt", 9) != resamples.units("fact", 9)).any()
    assert (resamples.lines(4) == resamples.lines(4)).all()
    assert resamples.lines(4).sum(1) == pytest.approx(1.0) and resamples.lines(4).max() <= 1.0


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
            "utility": 2 * np.array(gold),
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


ASKED = measure.Asked(temperature=0.5, price=0.1)


def row(ours, kept, sft, demos, pairs=None, **others):
    """Intervals of a method with one line."""
    line = measure.Line(sft, demos, others.pop("asked", ASKED))
    return measure.intervals(measure.row([measure.policy(ours, line, kept, pairs, **others)], Resamples(200, 0)))


def test_metrics_of_a_policy_by_hand():
    ours, kept = tables([1.0, 3.0, 2.0, 2.0])
    sft, _ = tables([2.0, 2.0, 1.0, 3.0])
    demos = pd.DataFrame({"prompt_id": ["p0", "p1"], "gold": [0.0, 5.0], "reward": 0.0})
    result = row(ours, kept, sft, demos)
    means = {metric: result[metric]["mean"] for metric in METRICS}
    assert means.pop("pair_accuracy") is None
    assert means == pytest.approx(
        {
            "preferred": 0.5,  # utilities, twice the gold reward, are 2, 6, 4, 4 against 4, 4, 2, 6
            "gold": 2.0,
            "utility": 4.0,
            "objective": 4.0 / 0.5 - 0.1 * 0.5,
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


def test_pairs_of_lines_differ_and_are_put_side_by_side():
    """Each line has its own pairs: a prompt without a pair in a line counts nothing there."""
    ours, _ = tables([1.0, 3.0, 2.0, 2.0])
    demos = pd.DataFrame({"prompt_id": ["p0", "p1"], "gold": [0.0, 5.0], "reward": 0.0})
    first = pd.DataFrame({"prompt_id": ["a", "b"], "chosen": [1.0, 1.0], "rejected": [0.0, 0.0]})
    second = pd.DataFrame({"prompt_id": ["b", "c", "c"], "chosen": [0.0, 0.0, 1.0], "rejected": [1.0, 1.0, 0.0]})
    line = measure.Line(ours, demos, ASKED)
    measured = [measure.policy(ours, line, pair_rewards=pairs) for pairs in (first, second)]
    found = measure.row(measured, Resamples(200, 0))["pair_accuracy"]
    assert found.each.tolist() == pytest.approx([1.0, 1 / 3]) and found.units == 3


def test_a_difference_is_of_the_units_that_both_were_measured_on():
    """Two rows that are equal on every prompt, one measured on a quarter of them: no other prompts may stand between them."""
    rng = np.random.default_rng(0)
    resamples = Resamples(400, 0)
    prompts = rng.normal(size=200) * 2.0
    both = np.stack([prompts + 0.1 * rng.normal(size=200) for _ in range(3)])
    some = np.zeros((3, 200))
    some[:, :48] = 1.0
    whole = resamples.ratio("prompt", both, np.ones((3, 200)))
    part = resamples.ratio("prompt", (both + 0.25) * some, some)
    gap = resamples.difference(part, whole)
    assert gap.value == pytest.approx(0.25) and gap.units == 48
    assert gap.interval()["low"] == pytest.approx(0.25) and gap.interval()["high"] == pytest.approx(0.25)
    assert abs(part.value - whole.value - 0.25) > 0.05  # what the means of different prompts would have said
    alike = resamples.difference(whole, resamples.ratio("prompt", both - 1.0, np.ones((3, 200))))
    assert alike.value == pytest.approx(1.0) and alike.units == 200
