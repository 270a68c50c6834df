"""The study's mathematics: expected best of k trials by enumeration, hulls, spaces; figures from trials that are made up."""

from itertools import product

import numpy as np
import pandas as pd
import pytest

from rlhf_vs_dpo import config
from rlhf_vs_dpo.errors import DataError
from rlhf_vs_dpo.study import __main__ as printed
from rlhf_vs_dpo.study import figures, search, space, summary

PARAMS = config.read_params()


def test_the_expected_best_of_k_is_the_mean_over_all_ways_to_draw_k():
    values = np.array([0.3, 0.1, 0.7, 0.7, 0.2])
    for k in (1, 2, 3, 4):
        by_hand = np.mean([max(drawn) for drawn in product(values, repeat=k)])
        assert search.expected_best(values, 4)[k - 1] == pytest.approx(by_hand)
    several = np.stack([values, values[::-1] + 1])
    assert np.allclose(search.expected_best(several, 4), [search.expected_best(v, 4) for v in several])


def test_its_interval_covers_what_other_searches_find():
    rng = np.random.default_rng(0)
    truth = np.mean([max(rng.normal(size=4)) for _ in range(20000)])
    inside = 0
    for seed in range(200):
        low, high = search.interval(rng.normal(size=64), 4, seed)
        inside += low[3] <= truth <= high[3]
    assert 180 <= inside <= 200


def test_a_lost_trial_counts_as_the_policy_it_started_from_and_is_never_chosen():
    trials = made_up("ppo", [0.6, 0.9, np.nan], ["finished", "collapsed", "diverged"])
    assert search.values(trials, "preferred", 0.5).tolist() == [0.6, 0.5, 0.5]
    assert search.best(trials, "preferred")["trial"] == 1
    assert search.best(trials.iloc[1:], "preferred") is None


def test_nothing_lies_above_a_hull_and_it_bends_one_way():
    rng = np.random.default_rng(1)
    kl, value = rng.gamma(2.0, size=60), rng.normal(size=60)
    kl[0], value[0] = 0.0, -0.5
    found = search.hull(kl, value)
    assert value[found[-1]] == value.max() and (np.diff(kl[found]) > 0).all() and (np.diff(value[found]) > 0).all()
    assert (np.diff(np.diff(value[found]) / np.diff(kl[found])) <= 1e-9).all()
    under = kl <= kl[found[-1]]
    assert (value[under] <= np.interp(kl[under], kl[found], value[found]) + 1e-9).all()


def test_every_method_of_the_comparison_has_a_space_within_which_its_settings_are_valid():
    tuning, policies = config.section(PARAMS, "tuning"), config.section(PARAMS, "policies")
    methods = [method for family in config.FAMILIES for method in getattr(policies, family)]
    assert set(tuning.spaces) == set(methods)
    for method, ends in tuning.spaces.items():
        tried = space.settings(tuning, method)
        assert len(tried) == tuning.trials and tried == space.settings(tuning, method)
        for settings in tried:
            assert settings.keys() == ends.keys()
            assert all(low <= settings[key] <= high for key, (low, high) in ends.items())
            family = config.family_of(PARAMS, method)
            config.section(config.with_settings(PARAMS, method, settings), family, method)
    rates = {family: set() for family in config.FAMILIES}
    for method, ends in tuning.spaces.items():
        if "learning_rate" in ends:
            rates[config.family_of(PARAMS, method)].add(tuple(ends["learning_rate"]))
    assert all(len(ranges) == 1 for ranges in rates.values()), "one range of learning rates in a family"


def test_settings_fill_their_space_evenly_on_the_scale_that_was_said():
    tuning = config.section(PARAMS, "tuning").model_copy(
        update={"trials": 64, "spaces": {"simpo": {"beta": [0.01, 100.0], "gamma": [0, 2.0]}}}
    )
    tried = pd.DataFrame(space.settings(tuning, "simpo"))
    for share in (0.25, 0.5, 0.75):
        assert (np.log10(tried["beta"]) < -2 + 4 * share).mean() == pytest.approx(share, abs=0.02)
        assert (tried["gamma"] < 2 * share).mean() == pytest.approx(share, abs=0.02)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"spaces": {"ppo": {"clip": [0.3, 0.1]}}}, "the lower end comes first"),
        ({"spaces": {"pppo": {"clip": [0.1, 0.3]}}}, "'pppo', which is no method"),
        ({"spaces": {"dpo": {"clip": [0.1, 0.3]}}}, "unknown key `preference.dpo.clip`"),
        ({"spaces": {"ipo": {"tau": [0, 1.0]}}}, "preference.ipo.tau"),
        ({"seed": 0}, "a line that no result uses"),
        ({"criterion": "kl"}, "tuning.criterion"),
    ],
)
def test_a_study_that_cannot_be_run_is_refused_before_it_starts(change, said):
    with pytest.raises(config.ParamsError, match=r"params\.yaml") as refused:
        config.check(PARAMS | {"tuning": PARAMS["tuning"] | change})
    assert said in str(refused.value)


def test_a_study_of_rounds_that_nobody_can_label_is_refused_before_it_starts():
    """Pairs of one's own, and online DPO still among what is searched: the comparison runs, the study does not."""
    import copy

    params = copy.deepcopy(PARAMS)
    config.check_study(params)
    params["preferences"]["source"], params["data"]["source"] = "dataset", "files"
    params["data"]["files"]["preferences"] = "mine.jsonl"
    params["policies"]["preference"].remove("dpo_online")
    params["evaluate"]["questions"] = [["ppo", "dpo"]]
    config.check(params)
    with pytest.raises(config.ParamsError, match=r"take `dpo_online` out of `tuning.spaces`"):
        config.check_study(params)
    del params["tuning"]["spaces"]["dpo_online"]
    config.check_study(params)  # expert iteration asks the reward model, not the annotator


def made_up(method: str, preferred: list[float], outcomes: list[str]) -> pd.DataFrame:
    count = len(preferred)
    kl = np.linspace(0.3, 4.0, count)
    return pd.DataFrame(
        {
            "method": method, "trial": range(1, count + 1), "settings": '{"learning_rate": 0.001}', "outcome": outcomes, "said": "",
            "preferred": preferred, "utility": preferred, "objective": preferred, "gold": preferred, "reward": preferred, "kl": kl,
            "tokens": 20.0, "finished": 1.0, "seconds": 1.0, "flops": [np.nan if said == "diverged" else 1e12 for said in outcomes],
        }
    )  # fmt: skip


def test_figures_and_summary_of_any_mixture_of_outcomes(tmp_path):
    rng = np.random.default_rng(0)
    start = dict.fromkeys(("utility", "gold", "reward", "objective"), 0.4) | {"preferred": 0.5, "kl": 0.0}
    trials = pd.concat(
        [
            made_up("ppo", [*rng.uniform(0.5, 0.8, 3), np.nan], ["finished", "finished", "collapsed", "diverged"]),
            made_up("dpo", [*rng.uniform(0.5, 0.8, 4)], ["finished"] * 4),
            made_up("simpo", [np.nan] * 4, ["diverged"] * 4),
        ]
    )
    families = {"ppo": "rl", "dpo": "preference", "simpo": "preference"}
    drawn = figures.made(trials, families, start, "preferred", dict.fromkeys(families, 1e12))
    for chart in drawn.values():
        chart.to_dict(validate=True)
    written = figures.draw(trials, families, start, "preferred", dict.fromkeys(families, 1e12), tmp_path)
    assert [path.name for path in written] == ["expected_best.png", "trials.png", "frontier.png", "compute.png"]
    assert all(path.stat().st_size > 5000 for path in written)
    said = {
        method: summary.of_method(trials[trials["method"] == method], "preferred", start, 1e12, 0)
        for method in families
    }
    assert said["simpo"]["best"] is None and said["simpo"]["expected_best"][-1]["mean"] == 0.5
    assert said["ppo"]["collapsed"] == said["ppo"]["diverged"] == 1
    ends = [point["mean"] for point in said["dpo"]["expected_best"]]
    assert ends == sorted(ends) and said["dpo"]["best"]["preferred"] >= ends[-1]
    study = {"criterion": "preferred", "methods": said}
    head, *shown = printed.rows(study)
    assert head[:7] == list(printed.HEAD) and head[7:] == ["after 1", "after 4", "setting"]
    order = sorted(said, key=lambda method: -said[method]["expected_best"][-1]["mean"])
    assert [row[0] for row in shown] == order and {row[0]: row[6] for row in shown} == {
        "ppo": "2/4",
        "dpo": "0/4",
        "simpo": "4/4",
    }
    assert next(row for row in shown if row[0] == "simpo")[1] == "-"
    (tmp_path / "ppo.json").write_text('{"preferred": 0.61, "preferred_low": 0.6, "preferred_high": 0.62}')
    head, *shown = printed.rows(study, tmp_path)
    assert head[9:] == ["test", "setting"] and {row[0]: row[9] for row in shown} == {
        "ppo": "0.61 (0.60 to 0.62)", "dpo": "-", "simpo": "-"
    }  # fmt: skip


def test_a_criterion_that_nobody_can_tell_is_refused_before_any_trial():
    from rlhf_vs_dpo.study.trial import check_criterion

    pool = pd.DataFrame({"utility": [None, None], "gold": [float("nan")] * 2, "reward": [0.1, None]}, dtype=float)
    check_criterion("reward", pool)
    for criterion, needed in (("preferred", "utility"), ("objective", "utility"), ("gold", "gold")):
        with pytest.raises(DataError, match=f"`tuning.criterion` is {criterion}, and this source has no {needed}"):
            check_criterion(criterion, pool)
