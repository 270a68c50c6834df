"""Killed anywhere, a stage goes on and ends with the same bytes: every kind of stage of the smoke graph, killed again and again.

Here a kill is an exception behind a random checkpoint, in one process. Real processes that are killed by `kill -9` are slow (`make test-slow`).
"""

import hashlib
import multiprocessing
import os
import re
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import forked
import numpy as np
import pytest
from mlflow import MlflowClient
from project import ENV, change, command, copy_project, inside, reproduce, stages

from rlhf_vs_dpo.run import recorder
from rlhf_vs_dpo.run.checkpoint import OnDisk

pytestmark = pytest.mark.pipeline
TRAINING = [
    "base", "sft@0", "reward@0",
    "rl@reinforce-0", "rl@rloo-0", "rl@trpo-0", "rl@ppo-0", "rl@ppo_ptx-0",
    "preference@dpo-0", "preference@simpo-0", "preference@dpo_online-0",
    "imitation@control_tokens-0", "imitation@expert_iteration-0",
]  # fmt: skip
SAMPLING = ["preferences@0", "reference@0", "pool@0", "sample_rl@ppo-0", "sample_imitation@control_tokens-0", "judge"]
POLICIES = {
    "rl": ["reinforce", "rloo", "trpo", "ppo", "ppo_ptx"], "preference": ["dpo", "simpo", "dpo_online"],
    "imitation": ["control_tokens", "expert_iteration"], "best_of_n": [],
}  # fmt: skip


class Killed(BaseException):
    """What a stage cannot catch."""


# Of each kind of loop and of sampling one: what `make test` tries.
FEW = [
    "sft@0",
    "reward@0",
    "rl@trpo-0",
    "rl@ppo_ptx-0",
    "preference@dpo_online-0",
    "imitation@expert_iteration-0",
    "pool@0",
    "judge",
]


@pytest.fixture(scope="module")
def made(tmp_path_factory, request):
    """A smoke project without evaluation and report, made without a kill; a checkpoint at every step."""
    folder = copy_project(tmp_path_factory.mktemp("going-on") / "project", "smoke")
    asked = {item.callspec.params["stage"] for item in request.session.items if item.path == request.path}
    named = {stage.partition("@")[2].removesuffix("-0") for stage in asked}
    wanted = {family: [m for m in methods if m in named] for family, methods in POLICIES.items()}
    change(folder, "policies", wanted if any(wanted.values()) else wanted | {"preference": ["dpo"]})
    change(folder, "rl.defaults.iterations", 5)
    change(folder, "rl.trpo.iterations", 5)
    change(folder, "checkpoint.minutes", 0.0)
    reproduce(folder, re.compile("(?!theory|evaluate|report).*"))
    return folder


def outputs(folder: Path, stage: str) -> dict[str, str]:
    """Hash of each file that a stage makes; but for what it cost, which is another one each time."""
    places = [folder / out for out in stages(folder)[stage][1] if not out.startswith("runs/")]
    files = [path for place in places for path in ([place] if place.is_file() else sorted(place.rglob("*")))]
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def remove(folder: Path, stage: str) -> None:
    """As DVC does, before a stage runs."""
    for out in stages(folder)[stage][1]:
        path = folder / out
        for file in [path] if path.is_file() else path.rglob("*"):
            file.unlink()


def environment(folder: Path, stage: str) -> dict[str, str]:
    return {"DVC_STAGE": stage, "DVC_ROOT": str(folder), "MLFLOW_TRACKING_URI": f"sqlite:///{folder}/killed.db"}


@pytest.mark.parametrize(
    "stage", [stage if stage in FEW else pytest.param(stage, marks=pytest.mark.slow) for stage in TRAINING + SAMPLING]
)
def test_a_stage_that_is_killed_again_and_again_ends_with_the_same_bytes(made, stage, monkeypatch, capfd):
    whole, words = outputs(made, stage), stages(made)[stage][0]
    assert whole
    rng, left, kills = np.random.default_rng(len(stage)), [0], 0
    offer = OnDisk.offer

    def dies(self):
        offer(self)
        left[0] -= 1
        if left[0] == 0:
            raise Killed

    monkeypatch.setattr(OnDisk, "offer", dies)
    remove(made, stage)
    while True:
        left[0] = int(rng.integers(1, 2 if kills == 0 else 12))
        with inside(made, **environment(made, stage)):
            try:
                assert command(words) == 0
                break
            except Killed:
                kills += 1
    assert kills >= 1 and outputs(made, stage) == whole
    assert capfd.readouterr().err.count("going on from") == kills
    assert not folder_of(made, stage).exists()
    check_run(made, stage, kills)


def folder_of(made: Path, stage: str) -> Path:
    return made / ".dvc" / "tmp" / "rlhf" / "checkpoints" / stage


def runs(made: Path, stage: str, file: str) -> list:
    client = MlflowClient(f"sqlite:///{made}/{file}")
    places = [e.experiment_id for e in client.search_experiments()]
    return client.search_runs(places, f"tags.`dvc.stage` = '{stage}'")


def check_run(made: Path, stage: str, kills: int) -> None:
    """On MLflow it is one run, with the steps of the one that was not killed, each once."""
    (whole,), (again,) = runs(made, stage, "mlflow.db"), runs(made, stage, "killed.db")
    assert again.info.status == "FINISHED" and again.data.tags["attempts"] == str(kills + 1)
    assert "attempts" not in whole.data.tags
    histories = []
    for run, file in ((whole, "mlflow.db"), (again, "killed.db")):
        client = MlflowClient(f"sqlite:///{made}/{file}")
        histories.append(
            {
                name: [(point.step, point.value) for point in client.get_metric_history(run.info.run_id, name)]
                for name in run.data.metrics
                if not name.startswith(("cost/", "system/"))
            }
        )
    assert histories[0] == histories[1]


def attempt(folder: Path, stage: str, processes: int) -> multiprocessing.Process | subprocess.Popen:
    """A stage in a process group of its own; several processes through the launcher, as DVC starts it."""
    env = ENV | environment(folder, stage) | {"PYTHONPATH": "src", "RLHF_PROCESSES": str(processes)}
    env[recorder.SHARED] = os.environ[recorder.SHARED]  # one for all attempts, as under `make repro`
    words = stages(folder)[stage][0]
    if processes == 1:
        return forked.start(folder, words, env)
    return subprocess.Popen(
        [sys.executable, *words], cwd=folder, env=env, start_new_session=True,
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip


def ended(process: multiprocessing.Process | subprocess.Popen, seconds: float) -> bool:
    """Whether a process ends within that time, by itself and well."""
    if isinstance(process, subprocess.Popen):
        with suppress(subprocess.TimeoutExpired):
            process.wait(seconds)
        status = process.returncode
    else:
        process.join(seconds)
        status = process.exitcode
    assert status in (None, 0)
    return status == 0


@pytest.mark.slow
@pytest.mark.parametrize(
    ("stage", "processes"), [*((stage, 1) for stage in TRAINING + SAMPLING), ("rl@ppo-0", 2), ("preference@dpo-0", 2)]
)
def test_twenty_times_kill_9(made, stage, processes):
    """Each at a random moment behind a new checkpoint, or in the middle of writing the next; outputs of two processes are those of two."""
    with inside(made, **environment(made, stage)), recorder.shared(made / "killed.log"):
        if processes == 1:
            whole = outputs(made, stage)
        else:
            remove(made, stage)
            assert ended(attempt(made, stage, processes), 600)
            whole = outputs(made, stage)
        rng = np.random.default_rng(len(stage) + processes)
        remove(made, stage)
        kills = 0
        while kills < 20:
            process, known = attempt(made, stage, processes), written(made, stage)
            while written(made, stage) <= known and not ended(process, 0.005):
                pass
            if ended(process, float(rng.exponential(0.1))):  # it was faster: from the start again
                assert outputs(made, stage) == whole
                remove(made, stage)
            else:
                os.killpg(process.pid, signal.SIGKILL)
                process.join() if processes == 1 else process.wait()
                kills += 1
        assert ended(attempt(made, stage, processes), 600)
        assert outputs(made, stage) == whole and not folder_of(made, stage).exists()
        ends = [(run.info.status, run.data.tags.get("attempts")) for run in runs(made, stage, "killed.db")]
        assert {status for status, _ in ends} == {"FINISHED"}, ends


def written(folder: Path, stage: str) -> int:
    """Number of the last checkpoint of a stage; 0: there is none."""
    return max((int(path.name) for path in folder_of(folder, stage).glob("*/[0-9]*") if path.name.isdigit()), default=0)
