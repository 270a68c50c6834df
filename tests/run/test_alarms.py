"""A run that goes wrong says why: each alarm sounds at its fault, once, and is silent without it."""

import pytest

from rlhf_vs_dpo.run.alarms import ALARMS, Listening

FINE = {
    "rollout/kl": 0.5,
    "rollout/kl_standard_error": 0.1,
    "rollout/finished": 1.0,
    "rollout/entropy": 1.0,
    "rollout/explained_variance": 0.5,
    "rollout/score_out_of_range": 0.0,
    "update/ratio_std": 0.1,
    "update/clip_fraction": 0.05,
}
FAULTS = {
    "negative_kl": {"rollout/kl": -0.4},
    "sampler_gap": {"rollout/sampler_gap": 0.2, "rollout/sampler_gap_largest": 1.5},
    "ratio_spread": {"update/ratio_std": 0.9},
    "clip_fraction": {"update/clip_fraction": 0.5},
    "explained_variance": {"rollout/explained_variance": -0.5},
    "unfinished": {"rollout/finished": 0.6},
    "entropy": {"rollout/entropy": 0.05},
    "score_out_of_range": {"rollout/score_out_of_range": 0.2},
}


def hear(*rows, iterations=10):
    warned, logged = [], []
    ear = Listening(lambda m, s: logged.append((s, m)), lambda name, text: warned.append((name, text)), iterations)
    for step, row in enumerate(rows, 1):
        ear(row, step)
    assert [row for _, row in logged] == list(rows)  # everything is passed on as it is
    return warned


def test_a_good_run_is_silent():
    assert hear(*[FINE] * 10) == []
    assert hear({"heldout/kl": -9.0}) == []  # not of the training


@pytest.mark.parametrize("name", ALARMS)
def test_each_alarm_sounds_once_at_its_fault(name):
    bad = FINE | FAULTS[name]
    warned = hear(FINE, FINE, FINE, bad, bad)
    assert [entry for entry, _ in warned] == [name]
    assert warned[0][1].startswith("iteration 4: ") and "{" not in warned[0][1]


def test_every_alarm_has_a_fault():
    assert FAULTS.keys() == ALARMS.keys()


def test_noise_and_beginnings_are_no_faults():
    assert hear(FINE, FINE | {"rollout/kl": -0.25}) == []  # within three standard errors
    assert hear(FINE | {"rollout/explained_variance": -3.0}) == []  # a value network that has not begun to learn
    assert (
        hear(FINE | {"rollout/finished": 0.5}, FINE | {"rollout/finished": 0.48}) == []
    )  # the SFT policy is no better


def test_methods_without_a_value_network_are_heard_too():
    lean = {k: v for k, v in FINE.items() if k.startswith("rollout") and "variance" not in k}
    assert [name for name, _ in hear(lean, lean | FAULTS["negative_kl"])] == ["negative_kl"]


def test_a_warning_is_in_the_log_and_a_tag(capsys, tmp_path, monkeypatch):
    from rlhf_vs_dpo.run import store
    from rlhf_vs_dpo.run.frame import Run
    from rlhf_vs_dpo.run.recorder import Recorder

    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/x.db")
    monkeypatch.setenv("DVC_ROOT", str(tmp_path))
    recorder = Recorder()
    recorder.tell(create="x", tags={}, params={})
    Run({}, recorder).warn("negative_kl", "iteration 3: why")
    run_id = recorder.end("FINISHED")
    assert "warning [negative_kl]: iteration 3: why" in capsys.readouterr().err
    assert store.client().get_run(run_id).data.tags["warning.negative_kl"] == "iteration 3: why"
