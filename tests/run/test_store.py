"""The MLflow store: made whole or not at all, by many at once; a damaged one is named, with what to do."""

import json
import os
import sqlite3
import subprocess
import sys
import threading
import time
from contextlib import nullcontext

import pytest
from mlflow.tracking import MlflowClient

from rlhf_vs_dpo.errors import DataError
from rlhf_vs_dpo.run import recorder, store
from rlhf_vs_dpo.run.frame import Run
from rlhf_vs_dpo.run.recorder import Recorder


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DVC_ROOT", str(tmp_path))
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.delenv("DVC_STAGE", raising=False)
    (tmp_path / "params.yaml").write_text("seed: 0\n")
    return tmp_path


def runs(folder, name=store.STAGES):
    client = MlflowClient(tracking_uri=f"sqlite:///{folder}/mlflow.db")
    return client.search_runs([client.get_experiment_by_name(name).experiment_id])


def test_a_recorder_tells_mlflow_all_that_a_stage_says(here):
    (here / "note.txt").write_text("x")
    teller = Recorder()
    teller.tell(
        create="rl@x-0", tags={"policy": "x-0", "family": "rl", "seed": "0"}, params={"rl": {"x": {"beta": 0.1}}}
    )
    run = Run({}, teller)
    for step in range(30):
        run.log({"loss": 1.0 / (step + 1), "broken": float("nan")}, step)
    run.warn("negative_kl", "a KL below 0")
    run.artifact(here / "note.txt")
    run.finish({"nested": {"value": 2.0}, "loss": 9.0}, here / "m.json", 30)
    run_id = teller.end("FINISHED")
    (row,) = runs(here, store.EXPERIMENT)
    assert row.info.run_id == run_id and row.info.status == "FINISHED" and row.info.run_name == "x-0"
    assert row.data.params == {"rl.x.beta": "0.1"} and row.data.tags["warning.negative_kl"] == "a KL below 0"
    client = MlflowClient(tracking_uri=f"sqlite:///{here}/mlflow.db")
    history = client.get_metric_history(run_id, "loss")
    assert [p.step for p in history] == list(range(30))  # what a step logged is not said again at the end
    assert row.data.metrics["nested/value"] == 2.0 and "broken" not in row.data.metrics
    assert [a.path for a in client.list_artifacts(run_id)] == ["note.txt"]
    assert json.loads((here / "m.json").read_text()) == {"nested": {"value": 2.0}, "loss": 9.0}


@pytest.fixture(params=["alone", "together"])
def process(request, here):
    """A process for each stage, or one that all share, as under `make repro`."""
    with recorder.shared(here / "mlflow.log") if request.param == "together" else nullcontext():
        yield request.param


def test_stages_share_a_process_only_where_there_is_one(here, process):
    first, second = Recorder(), Recorder()
    assert (first.process is None) == (second.process is None) == (process == "together")
    for number, teller in enumerate((first, second)):
        teller.tell(create=f"stage-{number}", tags={}, params={})
        teller.tell(metrics={"a": float(number)}, step=1)
    assert first.end("FINISHED") and second.end("FAILED")
    assert {(row.info.run_name, row.info.status, row.data.metrics["a"]) for row in runs(here)} == {
        ("stage-0", "FINISHED", 0.0), ("stage-1", "FAILED", 1.0),
    }  # fmt: skip


def test_nobody_is_told_of_a_run(here):
    """MLflow would tell its makers, over the network."""
    script = (
        "from rlhf_vs_dpo.run.recorder import Recorder; r = Recorder(); r.tell(create='x', tags={}, params={}); r.end('FINISHED')\n"
        "from rlhf_vs_dpo.run import store; store.client()\n"
        "from mlflow.telemetry.utils import is_telemetry_disabled; print(is_telemetry_disabled())"
    )
    asked = {"MLFLOW_DISABLE_TELEMETRY", "DO_NOT_TRACK", "CI", "PYTEST_CURRENT_TEST"}
    environment = {key: value for key, value in os.environ.items() if key not in asked}
    environment["PYTHONPATH"] = os.pathsep.join(sys.path)
    said = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=True)
    assert said.stdout.split()[-1] == "True"


def test_a_shared_process_that_is_killed_before_it_has_read_all_is_an_error_and_no_wait(here, monkeypatch):
    """Linux then says ECONNRESET to whoever listens."""
    import socket

    place = here / "recorder"
    server = socket.socket(socket.AF_UNIX)
    server.bind(str(place))
    server.listen()
    monkeypatch.setenv(recorder.SHARED, str(place))
    teller = Recorder()
    line, _ = server.accept()
    teller.tell(create="x", tags={}, params={})
    line.close()  # unread
    assert teller.ended.wait(30)
    with pytest.raises(DataError, match="the process that tells MLflow has ended"):
        for step in range(100):
            teller.tell(metrics={"a": 1.0}, step=step)
    server.close()


def test_a_process_that_has_ended_is_replaced(here, monkeypatch):
    monkeypatch.setenv(recorder.SHARED, str(here / "gone"))
    teller = Recorder()
    teller.tell(create="x", tags={}, params={})
    assert teller.end("FINISHED") == runs(here)[0].info.run_id


def test_where_a_socket_cannot_be_each_stage_has_a_process(here, monkeypatch):
    long = here / ("x" * 120)
    long.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(long))
    with recorder.shared(here / "mlflow.log"):
        teller = Recorder()
        assert teller.process is not None
        teller.tell(create="x", tags={}, params={})
        assert teller.end("FINISHED")


def test_a_shared_process_hears_a_stage_to_its_end(here):
    """`make repro` may be killed first: what it shared stays until every stage has hung up."""
    with recorder.shared(here / "mlflow.log"):
        teller = Recorder()
        teller.tell(create="x", tags={}, params={})
        threading.Timer(3.0, lambda: teller.end("FINISHED")).start()
    assert runs(here)[0].info.status == "FINISHED"


def test_the_run_of_a_stage_that_is_killed_says_so(here, process):
    script = "import time; from rlhf_vs_dpo.run.recorder import Recorder; r = Recorder(); r.tell(create='x', tags={}, params={}); r.tell(metrics={'a': 1.0}, step=3); time.sleep(99)"
    victim = subprocess.Popen(
        [sys.executable, "-c", script], env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    )
    end = time.monotonic() + 60
    while not ((here / "mlflow.db").exists() and runs(here)):
        assert time.monotonic() < end
        time.sleep(0.5)
    victim.kill()
    victim.wait()
    while runs(here)[0].info.status == "RUNNING":
        assert time.monotonic() < end
        time.sleep(0.5)
    assert runs(here)[0].info.status == "FAILED" and runs(here)[0].data.metrics["a"] == 1.0


def test_four_first_starts_at_once_make_one_store(here, process):
    tellers = [Recorder() for _ in range(4)]
    for number, teller in enumerate(tellers):
        teller.tell(create=f"stage-{number}", tags={}, params={})
    assert len({teller.end("FINISHED") for teller in tellers}) == 4
    assert {row.info.run_name for row in runs(here)} == {f"stage-{n}" for n in range(4)}


def test_a_store_is_made_aside(here):
    """Killed while MLflow makes its tables: nothing by the store's name, and the next start makes it anew."""
    store._make()
    (here / "mlflow.db").rename(here / ".mlflow.db.1.tmp")  # what a process that was killed would leave
    with sqlite3.connect(here / ".mlflow.db.1.tmp") as half:
        half.execute("CREATE TABLE _alembic_tmp_endpoints (x)")
        half.execute("UPDATE alembic_version SET version_num = 'nonsense'")
    assert store.experiment(store.STAGES) and (here / "mlflow.db").exists()
    assert not list(here.glob(".mlflow.db*.tmp"))


@pytest.mark.parametrize(
    "damage", ["half", *(pytest.param(of, marks=pytest.mark.slow) for of in ("noise", "a table too many"))]
)
def test_a_damaged_store_is_named_with_the_command_that_sets_it_aside(here, damage):
    store.experiment(store.STAGES)
    file = here / "mlflow.db"
    if damage == "noise":
        file.write_bytes(os.urandom(5000))
    elif damage == "half":
        file.write_bytes(file.read_bytes()[: file.stat().st_size // 3])
    else:
        with sqlite3.connect(file) as database:
            database.execute("CREATE TABLE _alembic_tmp_endpoints (x)")
            database.execute("DROP TABLE experiments")
    teller = Recorder()  # a process of its own: MLflow keeps what it has opened
    teller.tell(create="x", tags={}, params={})
    with pytest.raises(DataError, match=r"cannot open its store") as error:
        teller.end("FINISHED")
    assert f"mv {file} {file}.damaged" in str(error.value) and len(str(error.value)) < 1000
    file.rename(f"{file}.damaged")
    again = Recorder()
    again.tell(create="x", tags={}, params={})
    assert again.end("FINISHED")


def test_a_deleted_experiment_is_named(here):
    client = store.client
    identifier = store.experiment(store.STAGES)
    client().delete_experiment(identifier)
    with pytest.raises(DataError, match=rf"has been deleted: `mlflow experiments restore -x {identifier}`"):
        store.experiment(store.STAGES)


def test_a_server_that_is_not_there_is_named(here, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    with pytest.raises(DataError, match=r"MLflow at http://127\.0\.0\.1:9 cannot be used"):
        store.experiment(store.STAGES)


def test_what_dvc_lock_does_not_know_yet_is_looked_for_again(here, monkeypatch):
    whole = {"stages": {"x": {"outs": [{"path": "a", "md5": "1"}, {"path": "b", "md5": "2"}]}}}
    halves = ["stages: {", json.dumps({"stages": {"x": {"outs": whole["stages"]["x"]["outs"][:1]}}}), json.dumps(whole)]

    def write_next(_):
        (here / "dvc.lock").write_text(halves.pop(0))

    write_next(None)
    monkeypatch.setattr(recorder.time, "sleep", write_next)
    assert recorder.hashes(["a", "b"], of_dvc=True) == {"a": "1", "b": "2"}
