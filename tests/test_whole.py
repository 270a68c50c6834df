"""The whole comparison on a run whose truth is known."""

import math

import numpy as np
import pytest
import synthetic

from rlhf_vs_dpo.evaluation import tables, whole


@pytest.fixture(scope="module")
def found():
    return synthetic.found()


def test_rows_are_methods_and_best_of_n(found):
    assert list(found["methods"]) == ["sft", "ppo", "dpo", "chosen_sft", "best_of_4"]
    assert found["families"]["best_of_4"] == "best_of_n" and found["judge"] == "gold"
    for method, (_, gain, kl) in synthetic.METHODS.items():
        gold, sft = found["methods"][method]["gold"], found["methods"]["sft"]["gold"]
        assert gold["mean"] - sft["mean"] == pytest.approx(gain, abs=0.1) and gold["low"] < gold["mean"] < gold["high"]
        assert found["methods"][method]["kl"]["mean"] == pytest.approx(kl, abs=0.03)
    assert found["methods"]["best_of_4"]["corpus_perplexity"]["mean"] is None


def test_a_mean_over_seeds_is_that_of_its_runs(found):
    runs = [run["gold"] for run in found["runs"]["ppo"].values()]
    assert found["methods"]["ppo"]["gold"]["mean"] == pytest.approx(np.mean(runs))
    assert found["spread"]["ppo"]["standard_deviation"] == pytest.approx(np.std(runs, ddof=1))
    assert found["spread"]["sft"]["standard_deviation"] is None


def test_differences_are_of_every_two_rows_and_corrected(found):
    assert len(found["differences"]) == 10
    by_pair = {(e["a"], e["b"]): e for e in found["differences"]}
    gap = by_pair["ppo", "dpo"]
    assert gap["low"] < 0.5 < gap["high"] and gap["p"] < 0.01 and gap["p_holm"] >= gap["p"]
    smallest = min(found["differences"], key=lambda e: e["p"])
    assert smallest["p_holm"] == pytest.approx(min(1.0, 10 * smallest["p"]))
    # Two normal responses with noise 0.5 each, 0.5 apart
    assert gap["wins"] == pytest.approx(0.5 * (1 + math.erf(0.5 / math.sqrt(2) / 0.5 / math.sqrt(2))), abs=0.05)


def test_a_collapsed_seed_is_counted_by_the_definition_in_params():
    results = synthetic.found(collapsed=("dpo-1",))
    assert (
        results["spread"]["dpo"]["collapsed"] == pytest.approx(1 / 3) and results["spread"]["ppo"]["collapsed"] == 0.0
    )
    strict = synthetic.settings(collapse=synthetic.settings().collapse.model_copy(update={"gain_below": 0.3}))
    assert whole.compare(synthetic.inputs(), strict, 0)["spread"]["chosen_sft"]["collapsed"] == 1.0


def test_paths_and_what_is_read_off_them(found):
    points = found["paths"]["ppo"]
    assert (
        len(points) == 6
        and points[0]["kl"]["mean"] == 0.0
        and points[-1]["gold"]["mean"] == pytest.approx(2.0, abs=0.1)
    )
    # gold = 1 + gain sqrt(KL / 2) of ppo: at KL 0.5 half the gain
    assert found["equal_kl"]["ppo"]["0.5"]["mean"] == pytest.approx(1.5, abs=0.12)
    assert found["equal_kl"]["chosen_sft"]["2"] is None
    compute = found["equal_compute"]
    assert compute["flops"]["1"] == pytest.approx(max(c["total"]["flops"] for c in found["cost"].values()))
    assert compute["methods"]["ppo"]["1"]["mean"] == pytest.approx(points[-1]["gold"]["mean"])
    assert found["own_best"]["ppo"]["at"] > 0.7 and found["own_best"]["best of n"]["on"] == "test"
    assert set(found["overoptimisation"]) == {"ppo", "dpo", "chosen_sft", "best of n"}


def test_costs_follow_what_is_needed(found):
    ppo, dpo, best = (found["cost"][m] for m in ("ppo", "dpo", "best_of_4"))
    assert ppo["needs"] == ["preferences", "reward"] and dpo["needs"] == ["preferences", "reference"]
    assert ppo["own"]["flops"] == 1000 * 6 * 5000 and ppo["upstream"]["flops"] == 2 * 1000 * 2 * 600
    assert best["own"]["flops"] == 0 and best["tokens_per_answer"] == pytest.approx(4, rel=0.1)
    assert ppo["hyperparameters"] > dpo["hyperparameters"] and dpo["hyperparameters_upstream"] == 0


def test_tables_for_dvc_and_mlflow(found):
    rows = tables.of_methods(found)
    assert set(rows) == {"sft", "ppo", "dpo", "chosen_sft", "best_of_4"}
    assert rows["ppo"]["gold_low"] < rows["ppo"]["gold"] < rows["ppo"]["gold_high"] and len(rows["ppo"]) < 20
    assert tables.file_name("control_tokens [BAD]") == "control_tokens_BAD"
    assert list(tables.comparison(found)["policy"]) == list(found["methods"])
    assert len(tables.paths(found)) == 18
    entries = tables.for_tracking(found, synthetic.inputs())
    assert [e["folder"] for e in entries] == [
        "sft",
        *(f"{m}-{s}" for m in synthetic.METHODS for s in range(3)),
        "best_of_4",
    ]
    ppo = entries[1]
    assert ppo["settings"]["algorithm"] == "ppo" and ppo["metrics"]["validation/gold"] == found["validation"]["ppo-0"]
    assert [step for step, _ in ppo["steps"]] == [0, 1, 2, 3, 4, 5] and len(ppo["samples"]) == 50
    names = [
        {n for n in e["metrics"] if n.startswith("evaluation/")} - {"evaluation/pair_accuracy"} for e in entries[:10]
    ]
    assert all(n == names[0] for n in names)


def test_training_curves_are_put_side_by_side(tmp_path):
    (tmp_path / "dpo-0.csv").write_text("step,loss,pairs/margin\n" + "".join(f"{s},{s},1\n" for s in range(1, 81)))
    (tmp_path / "dpo-1.csv").write_text("step,loss,pairs/margin\n" + "".join(f"{s},{s + 2},3\n" for s in range(1, 81)))
    shown = tables.learning(tmp_path, {"sft": ["sft"], "dpo": ["dpo-0", "dpo-1"], "ppo": ["ppo-0"]})
    assert set(shown["policy"]) == {"dpo"} and len(shown) == 40 and (shown["margin"] == 2.0).all()
    assert shown["loss"].iloc[0] == pytest.approx(2.5) and shown["share"].iloc[-1] == 1.0
