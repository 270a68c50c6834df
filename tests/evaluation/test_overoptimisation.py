"""Paths, laws of over-optimisation and the three fair comparisons recover what was planted."""

import numpy as np
import pandas as pd
import pytest

from rlhf_vs_dpo.evaluation import comparisons, overoptimisation, paths
from rlhf_vs_dpo.evaluation.overoptimisation import gain, least_squares, peak
from rlhf_vs_dpo.evaluation.statistics import Resamples


@pytest.mark.parametrize("form", ["best_of_n", "rl"])
def test_least_squares_recovers_planted_parameters(form):
    d = np.linspace(0.0, 3.0, 12)
    alpha, beta = least_squares(d, gain(d, 1.7, 0.4, form), form)
    assert (alpha, beta) == pytest.approx((1.7, 0.4), abs=1e-9)
    many = least_squares(np.stack([d, 2 * d]), np.stack([gain(d, 1.0, 0.2, form), gain(2 * d, 0.5, 0.3, form)]), form)
    assert np.allclose(many, [[1.0, 0.5], [0.2, 0.3]], atol=1e-9)


def test_the_forms_are_those_of_the_paper():
    assert gain(2.0, 1.0, 0.25, "best_of_n") == pytest.approx(2 * (1 - 0.5))
    assert gain(2.0, 1.0, 0.25, "rl") == pytest.approx(2 * (1 - 0.25 * np.log(2)))
    assert gain(0.0, 1.0, 0.25, "rl") == 0.0


@pytest.mark.parametrize("form", ["best_of_n", "rl"])
def test_the_peak_is_where_nothing_near_is_better(form):
    alpha, beta = 1.1, 0.4
    d = float(peak(alpha, beta, form, 9.0))
    near = gain(np.array([d - 1e-3, d, d + 1e-3]), alpha, beta, form)
    assert near[1] > near[0] and near[1] > near[2]
    assert peak(1.0, -0.1, form, 9.0) == 9.0  # rises to the end
    assert peak(-1.0, 0.5, "best_of_n", 9.0) == 0.0 and peak(-1.0, -0.01, "rl", 9.0) == 0.0  # falls from the start
    assert peak(alpha, beta, form, 0.1) == 0.1  # the peak is beyond what was reached


OTHERS = {"filler": 0.0, "tokens": 9, "finished": True, "preferred": 0.5, "objective": 0.0}


def watched(seed, prompts=200, seeds=3, alpha=1.5, beta=0.6, seed_sd=0.0, most=2.5, noise=0.5):
    """`watched` tables of a method whose gold reward over training follows the law of RL, with noise."""
    rng = np.random.default_rng(seed)
    d = np.linspace(0.0, most, 10)
    tables = []
    for _ in range(seeds):
        shift, rows = seed_sd * rng.normal(), []
        for step, point in enumerate(d):
            gold = 1.0 + gain(point, alpha, beta, "rl") + shift * (point > 0) + noise * rng.normal(size=prompts)
            kl = point**2 + (0.3 * rng.normal(size=prompts) if point > 0 else 0.0)
            frame = {"step": step, "prompt_id": [f"p{i}" for i in range(prompts)], "kl": kl, **OTHERS}
            rows.append(pd.DataFrame(frame | {"gold": gold, "reward": gold, "utility": gold}))
        tables.append(pd.concat(rows, ignore_index=True))
    return tables


@pytest.mark.parametrize("form", ["best_of_n", "rl"])
def test_the_sft_policy_is_no_point_of_a_fit_whichever_way_its_kl_is_rounded(form):
    tables = watched(2, prompts=80, noise=2.0)
    found = []
    for rounding in (-1e-17, 0.0, 1e-17):
        moved = [table.assign(kl=table["kl"] + rounding * (table["step"] == 0)) for table in tables]
        path = paths.of_training("m", moved, Resamples(100, 0))
        found.append(overoptimisation.summary(path, "gold", overoptimisation.fit(path, "gold", form)))
    for name in ("alpha", "beta", "r_squared"):
        assert found[0][name] == pytest.approx(found[1][name], rel=1e-9) == found[2][name]


def test_a_path_measures_each_point_over_prompts_and_seeds():
    tables = watched(0, prompts=30, seeds=2)
    path = paths.of_training("m", tables, Resamples(200, 0))
    assert path.share.tolist() == pytest.approx(np.linspace(0, 1, 10).tolist())
    third = [table[table["step"] == 3]["gold"].mean() for table in tables]
    assert path.values("gold")[3] == pytest.approx(np.mean(third))
    assert path.values("kl")[9] == pytest.approx(2.5**2, abs=0.2) and path.draws("kl").shape == (200, 10)
    unfinished = [table.assign(reward=table["reward"].where(table["step"] != 9)) for table in tables]
    assert np.isnan(paths.of_training("m", unfinished, Resamples(200, 0)).values("reward")[9])


def test_the_law_of_a_path_recovers_what_was_planted_and_its_band_covers_it():
    path = paths.of_training("m", watched(1), Resamples(500, 0))
    law = overoptimisation.fit(path, "gold", "rl")
    told = overoptimisation.summary(path, "gold", law)
    assert told["alpha_low"] < 1.5 < told["alpha_high"] and told["beta_low"] < 0.6 < told["beta_high"]
    assert told["r_squared"] > 0.9
    truth = float(np.exp(1.5 / 0.6 - 1)) ** 2  # 20: beyond reach
    assert truth > 6.25 and told["peak_kl"] is None and told["lost"] is None and told["peaks"] < 0.5


def test_a_peak_within_reach_is_found_with_what_going_on_costs():
    alpha, beta, most = 0.6, 0.9, 2.5  # peak at d = exp(0.6 / 0.9 - 1) = 0.72
    path = paths.of_training("m", watched(2, alpha=alpha, beta=beta, most=most), Resamples(500, 0))
    told = overoptimisation.summary(path, "gold", overoptimisation.fit(path, "gold", "rl"))
    d = float(np.exp(alpha / beta - 1))
    lost = float(gain(d, alpha, beta, "rl") - gain(most, alpha, beta, "rl"))
    assert told["peak_kl"] == pytest.approx(d**2, abs=0.12) and told["peak_kl_low"] < d**2 < told["peak_kl_high"]
    assert told["lost"] == pytest.approx(lost, abs=0.15) and told["lost_low"] < lost < told["lost_high"]
    assert told["peaks"] > 0.95


def test_laws_over_seeds_that_differ_cover_what_was_planted():
    """What a seed adds to every point moves alpha: intervals must know that four seeds are few."""
    hits = 0
    for number in range(100):
        path = paths.of_training("m", watched(number, prompts=40, seeds=4, seed_sd=0.5), Resamples(200, number))
        told = overoptimisation.summary(path, "gold", overoptimisation.fit(path, "gold", "rl"))
        # A shift s of every point but the first is, in the mean of many runs, none: alpha is 1.5.
        hits += told["alpha_low"] < 1.5 < told["alpha_high"]
    assert hits >= 88


def test_a_law_needs_points_away_from_the_start():
    still = [table.assign(kl=0.0) for table in watched(0)]  # never leaves the SFT policy
    assert overoptimisation.fit(paths.of_training("m", still, Resamples(100, 0)), "gold", "rl") is None
    away = [table[table["step"] > 2] for table in watched(0)]  # did not start there
    assert overoptimisation.fit(paths.of_training("m", away, Resamples(100, 0)), "gold", "rl") is None
    tables = [table[table["step"] < 3] for table in watched(0)]
    assert overoptimisation.fit(paths.of_training("m", tables, Resamples(100, 0)), "gold", "rl") is None


def test_equal_kl_reads_the_path_between_its_points():
    path = paths.of_training("m", watched(3), Resamples(400, 0))
    found = comparisons.at_kl(path, "gold", 2.0)
    truth = 1.0 + float(gain(2.0**0.5, 1.5, 0.6, "rl"))
    assert found.interval()["low"] < truth < found.interval()["high"] and found.value == pytest.approx(truth, abs=0.1)
    assert comparisons.at_kl(path, "gold", 100.0) is None


def test_what_is_read_off_a_path_varies_with_lines_as_its_points_do():
    path = paths.of_training("m", watched(3, seed_sd=1.0), Resamples(400, 0))
    points, place = path.points["gold"], 6
    budget = float(path.share[place])
    for read in (
        comparisons.at_kl(path, "gold", float(path.values("kl")[place])),
        comparisons.at_compute(path, "gold", 0.0, 1.0, budget),
    ):
        assert read.value == pytest.approx(points[place].value)
        assert read.line_variance == pytest.approx(points[place].line_variance, rel=0.05) and read.line_variance > 0.01
        ends, whole = read.interval(), points[place].interval()
        assert ends["high"] - ends["low"] == pytest.approx(whole["high"] - whole["low"], rel=0.1)


def test_equal_kl_is_linear_in_the_root_of_kl_and_rises_through_it():
    def table(kl, gold):
        rows = {"prompt_id": [f"p{i}" for i in range(4)], **OTHERS}
        parts = [
            pd.DataFrame(rows | {"step": i, "kl": k, "gold": g, "reward": g, "utility": g})
            for i, (k, g) in enumerate(zip(kl, gold, strict=True))
        ]
        return pd.concat(parts, ignore_index=True)

    path = paths.of_training("m", [table([0.0, 4.0], [0.0, 1.0])], Resamples(50, 0))
    assert comparisons.at_kl(path, "gold", 1.0).value == pytest.approx(0.5)  # halfway in sqrt(KL), a quarter in KL
    assert comparisons.seen_around(path, 1.0) == pytest.approx((0.0, 4.0))
    falling = paths.of_training("m", [table([9.0, 1.0, 0.1], [0.0, 1.0, 2.0])], Resamples(50, 0))
    assert comparisons.at_kl(falling, "gold", 0.5) is None  # it comes from afar: there it has never been at that price


def test_equal_compute_is_linear_between_points_and_knows_who_has_not_begun():
    path = paths.of_training("m", watched(4), Resamples(200, 0))
    gold = path.values("gold")
    assert comparisons.at_compute(path, "gold", 100.0, 900.0, 99.0) is None
    assert comparisons.at_compute(path, "gold", 100.0, 900.0, 100.0).value == pytest.approx(gold[0])
    assert comparisons.at_compute(path, "gold", 100.0, 900.0, 1e6).value == pytest.approx(gold[-1])
    halfway = comparisons.at_compute(
        path, "gold", 100.0, 900.0, 100 + 900 * 0.5
    )  # share 0.5: between points 4 and 5 of 9
    assert halfway.value == pytest.approx((gold[4] + gold[5]) / 2)
    assert np.allclose(halfway.draws, path.draws("gold")[:, 4:6].mean(1))


def test_ones_own_best_is_not_paid_for_luck():
    """Where all points are equally good, the best of ten on the same prompts looks better than it is; cross-fitting does not."""
    naive, fitted = [], []
    for number in range(60):
        tables = watched(number, prompts=40, seeds=1, alpha=0.0, beta=0.0, noise=1.0)
        path = paths.of_training("m", tables, Resamples(100, 0))
        naive.append(path.values("gold").max() - 1.0)
        fitted.append(comparisons.own_best(path, "gold", Resamples(100, 0), number)[0].value - 1.0)
    assert np.mean(naive) > 0.15 and abs(np.mean(fitted)) < 3 * np.std(fitted) / 60**0.5


def test_ones_own_best_finds_the_peak():
    path = paths.of_training("m", watched(5, alpha=0.6, beta=0.9, noise=0.2), Resamples(200, 0))
    value, gained, share = comparisons.own_best(path, "gold", Resamples(200, 0), 0)
    truth = max(float(gain(d, 0.6, 0.9, "rl")) for d in np.linspace(0, 2.5, 10))
    assert value.value == pytest.approx(1.0 + truth, abs=0.05) and 0.1 < share < 0.5
    assert gained.interval()["low"] > 0 and gained.value == pytest.approx(
        truth - float(gain(2.5, 0.6, 0.9, "rl")), abs=0.06
    )
