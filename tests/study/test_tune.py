"""The study on the smoke graph: a trial is the production cell, no test prompt is seen, what diverges is a row, what is killed goes on."""

import json
import os
import re
import shutil
import subprocess

import pandas as pd
import pytest
from conftest import ROOT
from project import ENV, by_hand, change, command, copy_project, inside, lock, planned, reproduce
from ruamel.yaml import YAML

from rlhf_vs_dpo import config
from rlhf_vs_dpo.run import cells

pytestmark = pytest.mark.pipeline
METHODS = {
    "ppo": {"learning_rate": [1.0e-4, 3.0e-3], "clip": [0.1, 0.3]},
    "dpo": {"learning_rate": [1.0e-4, 1.0e-3], "beta": [0.1, 0.5]},
    "expert_iteration": {"learning_rate": [1.0e-4, 3.0e-3]},
}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """The tuning line of a smoke project, and two trials of a method of each family."""
    folder = copy_project(tmp_path_factory.mktemp("study") / "project", "smoke")
    change(folder, "tuning.spaces", METHODS)
    reproduce(folder, re.compile("check|data|base|usable"))
    shutil.copy(folder / "tuning" / "study.yaml", folder / "tuning" / "dvc.yaml")  # as `make tune` does
    reproduce(folder, file="tuning/dvc.yaml")
    return folder


def trials(folder, method: str) -> pd.DataFrame:
    return pd.read_csv(folder / "tuning" / "trials" / f"{method}.csv")


def test_every_method_has_its_trials_and_the_study_its_figures(made):
    for method in METHODS:
        table = trials(made, method)
        assert list(table["trial"]) == [1, 2] and (table["outcome"] != "diverged").all()
        assert table[["preferred", "gold", "utility", "kl", "seconds", "flops"]].notna().all(axis=None)
        assert table["settings"].nunique() == 2
    said = json.loads((made / "tuning" / "study.json").read_text())
    assert list(said["methods"]) == list(METHODS) and said["start"]["preferred"] == 0.5
    assert len(list((made / "tuning" / "figures").glob("*.png"))) == 4


@pytest.mark.parametrize("method", METHODS)
def test_a_trial_is_the_production_cell(made, method, tmp_path):
    """The same settings, typed into params.yaml: the same samples at the end, hence the same row."""
    params, row = (made / "params.yaml").read_text(), trials(made, method).iloc[1]
    family = config.family_of(config.read_params(made / "params.yaml"), method)
    line, out = "tuning/line", tmp_path
    try:
        for key, value in json.loads(row["settings"]).items():
            change(made, f"{family}.{method}.{key}", value)
        change(made, "monitor", {"points": 1, "prompts": 2})
        more = {
            "rl": ["--reward", f"{line}/reward", "--demonstrations", f"{line}/data/demonstrations.parquet", "--corpus", "data/corpus.parquet"],
            "preference": ["--pairs", f"{line}/pairs.parquet", "--reference", f"{line}/reference.parquet", "--pair-rewards", f"{out}/p.parquet"],
            "imitation": ["--reward", f"{line}/reward", "--pairs", f"{line}/pairs.parquet", "--pool", f"{line}/pool.parquet"],
        }  # fmt: skip
        status = by_hand(
            made, family, "--method", method, "--seed", "100", "--sft", f"{line}/sft", "--prompts", f"{line}/data/prompts.parquet",
            "--world", "data/world", "--out", f"{out}/policy", "--heldout", f"{out}/h.parquet", "--metrics", f"{out}/m.json",
            "--curves", f"{out}/c.csv", "--run", f"{out}/r.json", *more[family],
        )  # fmt: skip
    finally:
        (made / "params.yaml").write_text(params)
    assert status == 0
    heldout = pd.read_parquet(out / "h.parquet")
    last = heldout[heldout["step"] == heldout["step"].max()]
    assert row["gold"] == pytest.approx(last["gold"].mean(), rel=1e-5)
    assert row["kl"] == pytest.approx((last["logp"] - last["reference_logp"]).mean(), rel=1e-4, abs=1e-6)
    assert row["tokens"] == pytest.approx(last["response_ids"].map(len).mean(), rel=1e-5)
    spent = json.loads((out / "r.json").read_text())
    assert row["flops"] == pytest.approx(
        spent["parameters"] * (6 * spent["tokens_trained"] + 2 * (spent["tokens_generated"] + spent["tokens_read"])),
        rel=1e-5,
    )


def test_git_does_not_ignore_the_study_for_then_dvc_would():
    asked = ["git", "check-ignore", "--no-index", "tuning/dvc.yaml"]
    assert subprocess.run(asked, cwd=ROOT, capture_output=True, check=False).returncode != 0


def test_no_stage_of_the_study_sees_a_test_prompt(made):
    stages = YAML(typ="safe").load((ROOT / "tuning" / "study.yaml").read_text())["stages"]
    for name, stage in stages.items():
        words = json.dumps(stage)
        for table in ("data/prompts.parquet", "data/demonstrations.parquet"):
            assert name == "study_data" or not re.search(rf"(?<!line/){table}", words), name
        assert "samples/" not in words and "models/" not in words.replace("models/base", "")
    for path in (made / "tuning" / "line").rglob("*.parquet"):
        table = pd.read_parquet(path)
        if "split" in table:
            assert not (table["split"] == "test").any(), path
    test = pd.read_parquet(made / "data" / "prompts.parquet").query("split == 'test'")
    pool = pd.read_parquet(made / "tuning" / "line" / "pool.parquet")
    assert len(test) and not pool["prompt_id"].isin(test["prompt_id"]).any()


def tune(folder, method: str) -> int:
    words = next(stage["cmd"] for name, stage in lock(folder / "tuning").items() if name == f"tune@{method}")
    with inside(folder, **ENV, DVC_STAGE=f"tuning/dvc.yaml:tune@{method}", DVC_ROOT=str(folder)):
        return command(words.partition("python ")[2].split())


def test_a_search_that_breaks_off_goes_on_with_the_next_trial(made, monkeypatch, capsys):
    from rlhf_vs_dpo.study import trial

    whole = trials(made, "dpo")
    original, calls = trial.Ruler.measure, []

    def breaks_off(*given):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return original(*given)

    monkeypatch.setattr(trial.Ruler, "measure", breaks_off)
    assert tune(made, "dpo") != 0
    kept = made / ".dvc" / "tmp" / "rlhf" / "checkpoints" / "tuning-dvc.yaml-tune@dpo"
    assert len(list(kept.rglob("pieces/trials/*.json"))) == 1
    monkeypatch.setattr(trial.Ruler, "measure", original)
    capsys.readouterr()
    assert tune(made, "dpo") == 0 and not kept.exists()
    said = capsys.readouterr().out
    assert "1 of 2 trials are done" in said and "trial 1 of 2" not in said
    again = trials(made, "dpo")
    pd.testing.assert_frame_equal(again.drop(columns="seconds"), whole.drop(columns="seconds"))


def test_trials_at_other_settings_of_what_is_not_searched_are_not_gone_on_with(made, monkeypatch, capsys):
    from rlhf_vs_dpo.study import trial

    def breaks_off(*given):
        raise KeyboardInterrupt

    untuned = made / "tuning" / "line" / "untuned" / "dpo.json"
    before, original = untuned.read_text(), trial.Ruler.measure
    calls: list[int] = []
    try:
        monkeypatch.setattr(
            trial.Ruler,
            "measure",
            lambda *given: calls.append(1) or (original if len(calls) == 1 else breaks_off)(*given),
        )
        assert tune(made, "dpo") != 0
        monkeypatch.setattr(trial.Ruler, "measure", original)
        untuned.unlink()  # a hard link into DVC's cache
        untuned.write_text(before.replace('"epochs": 1.0', '"epochs": 0.5'))
        assert untuned.read_text() != before
        capsys.readouterr()
        assert tune(made, "dpo") == 0
    finally:
        untuned.write_text(before)
    said = capsys.readouterr()
    assert "trials are done" not in said.out and "it is of other inputs (tuning/line/untuned/dpo.json)" in said.err


def test_settings_at_which_a_method_diverges_are_rows_that_say_so(made):
    before = (made / "params.yaml").read_text()
    try:
        change(made, "tuning.spaces.dpo", {"learning_rate": [1.0e30, 1.0e31]})
        assert tune(made, "dpo") == 0
    finally:
        (made / "params.yaml").write_text(before)
    table = trials(made, "dpo")
    assert set(table["outcome"]) == {"diverged"} and table["said"].str.len().min() > 10 and table["gold"].isna().all()


def test_trials_are_runs_of_mlflow_under_the_search_that_made_them(made):
    import mlflow

    client = mlflow.MlflowClient(f"sqlite:///{made}/mlflow.db")
    (place,) = [e.experiment_id for e in client.search_experiments() if e.name == "rlhf-vs-dpo study"]
    runs = client.search_runs([place], "tags.study = 'ppo'")
    (search,) = [run for run in runs if "mlflow.parentRunId" not in run.data.tags]
    tried = {run.data.tags["trial"]: run for run in runs if run is not search}
    assert tried.keys() == {"1", "2"} and {r.data.tags["mlflow.parentRunId"] for r in tried.values()} == {
        search.info.run_id
    }
    table = trials(made, "ppo")
    for number, run in tried.items():
        row = table[table["trial"] == int(number)].iloc[0]
        assert run.data.metrics["trial/gold"] == pytest.approx(row["gold"], rel=1e-5)
        assert run.data.params["rl.ppo.learning_rate"] == str(json.loads(row["settings"])["learning_rate"])
    assert not [
        e for e in client.search_experiments() if e.name == "rlhf-vs-dpo" and client.search_runs([e.experiment_id])
    ]


def test_the_comparison_and_the_study_leave_each_other_alone(made):
    with inside(made, **ENV):
        waves, tail, _ = cells.plan("tuning/dvc.yaml")
        study = {name for wave in waves for lane in wave for name in lane} | set(tail)
        comparison = planned()
    assert not any(name.startswith("tuning/") for name in comparison)
    assert {name for name in study if not name.startswith("tuning/")} <= {"check", "data", "base", "usable"}
    assert {f"tuning/dvc.yaml:tune@{method}" for method in METHODS} <= study
    assert os.environ.get("DVC_STAGE") is None
