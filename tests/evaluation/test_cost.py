"""What methods cost, how varied they are, and what judges said: by hand."""

import numpy as np
import pandas as pd
import pytest

from rlhf_vs_dpo import config
from rlhf_vs_dpo.evaluation import cost, diversity, verdicts
from rlhf_vs_dpo.evaluation.statistics import Resamples


def test_flops_by_hand():
    assert cost.flops({"parameters": 10, "tokens_trained": 7, "tokens_generated": 5, "tokens_read": 3}) == 10 * (
        42 + 16
    )
    # Gradients of weights that do not learn are not computed: 2 of the 6 of each token that is trained on.
    assert cost.flops({"parameters": 10, "frozen": 4, "tokens_trained": 7, "tokens_read": 3}) == 10 * (42 + 6) - 4 * 14
    assert cost.flops({"seconds": 3.0}) == 0.0


def test_a_method_costs_itself_and_what_it_needs():
    run = {
        "parameters": 10,
        "tokens_trained": 10,
        "seconds": 4.0,
        "peak_memory_mib": 5.0,
        "models_held": 4,
        "device": "CPU",
    }
    pool = {"parameters": 10, "tokens_generated": 100, "seconds": 50.0, "peak_memory_mib": 9.0, "models_held": 2}
    lines = [
        cost.Line(run, {"pool": pool}, {"pool": 0.25}),
        cost.Line(
            run | {"seconds": 6.0, "tokens_trained": 30}, {"pool": pool | {"tokens_generated": 300}}, {"pool": 0.5}
        ),
    ]
    found, took = cost.of_method(lines), cost.of_machine(lines)
    assert found["own"]["flops"] == (600 + 1800) / 2
    assert found["upstream"]["flops"] == (0.25 * 2 * 10 * 100 + 0.5 * 2 * 10 * 300) / 2
    assert found["total"]["flops"] == found["own"]["flops"] + found["upstream"]["flops"]
    assert found["models_held"] == 4 and found["needs"] == ["pool"]
    assert took == {"own_seconds": 5.0, "total_seconds": 5.0 + (12.5 + 25.0) / 2, "peak_memory_mib": 9.0}
    assert not {"seconds", "peak_memory_mib", "device"} & {*found, *found["own"]}  # what differs between machines


def test_needs_are_those_of_the_training_stages():
    """Stated once for the report, and once where each loss and recipe opens its files: they must not part."""
    from rlhf_vs_dpo.training.imitation import NEEDS
    from rlhf_vs_dpo.training.preference import NEEDS_REFERENCE

    for loss, needed in NEEDS_REFERENCE.items():
        assert ("reference" in cost.needs("preference", loss)) == needed
    for recipe, table in NEEDS.items():
        assert ("pool" in cost.needs("imitation", recipe)) == (table == "pool")
    assert cost.needs("rl", "ppo") == ["preferences", "reward"]


def test_hyperparameters_are_the_keys_one_must_set():
    params = config.read_params()
    ppo, dpo = config.section(params, "rl", "ppo"), config.section(params, "preference", "dpo")
    assert cost.hyperparameters(dpo, "loss") == len(type(dpo).model_fields) - 1
    assert cost.hyperparameters(ppo, "algorithm") == len(type(ppo).model_fields) - 1 > cost.hyperparameters(dpo, "loss")
    reward = config.section(params, "reward")
    assert cost.hyperparameters(reward, "") == len(type(reward.training).model_fields) + 1


def test_diversity_by_hand():
    assert diversity.distinct(["a b a", "a b"], 1) == pytest.approx(2 / 5)
    assert diversity.distinct(["a b a", "a b"], 2) == pytest.approx(2 / 3)  # ab, ba, ab
    assert diversity.self_similarity(["a b c", "a b d", "a b c"]) == pytest.approx((1 / 3 + 1 + 1 / 3) / 3)
    assert diversity.self_similarity(["", ""]) == 1.0 and np.isnan(diversity.self_similarity(["a"]))
    assert diversity.ngrams("a", 2) == [("a",)]


def test_verdicts_by_hand():
    said = pd.DataFrame(
        [
            ("g", "ppo-0", "p0", 1.0, np.nan, np.nan), ("g", "ppo-0", "p1", 0.0, np.nan, np.nan),
            ("g", "ppo-1", "p0", 1.0, np.nan, np.nan), ("g", "ppo-1", "p1", 1.0, np.nan, np.nan),
            ("l", "ppo-0", "p0", 1.0, 1.0, 0.5), ("l", "ppo-0", "p1", 1.0, 1.0, 0.5),
            ("l", "ppo-1", "p0", 0.5, 0.0, 1.0), ("l", "ppo-1", "p1", np.nan, np.nan, 1.0),
        ],
        columns=["judge", "policy", "prompt_id", "win", "consistent", "first"],
    )  # fmt: skip
    found = verdicts.summary(said, {"sft": ["sft-0", "sft-1"], "ppo": ["ppo-0", "ppo-1"]}, Resamples(200, 0))
    assert found["g"]["methods"]["ppo"]["mean"] == 0.75 and found["g"]["inconsistent"] is None
    assert found["l"]["methods"]["ppo"]["mean"] == pytest.approx((1.0 + 0.5) / 2)  # a mean over lines
    assert found["l"]["unanswered"] == 0.25 and found["l"]["inconsistent"] == pytest.approx(1 / 3)
    assert found["l"]["shown_first"] == 0.75
    assert found["g"]["agreement"] == {"l": 0.5} == {"l": found["l"]["agreement"]["g"]}  # the tie is left out
    assert verdicts.summary(said.head(0), {"sft": ["sft-0", "sft-1"], "ppo": ["ppo-0"]}, Resamples(100, 0)) == {}
