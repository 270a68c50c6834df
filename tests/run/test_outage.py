"""A real tracking server on PostgreSQL that goes away in the middle of training and at its end, and comes back."""

import os
import pwd
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
from servers import Program, free_port

POSTGRES = next(iter(sorted(Path("/usr/lib/postgresql").glob("*/bin"), reverse=True)), None)
AWAY = float(os.environ.get("RLHF_AWAY", "60"))  # seconds
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        POSTGRES is None and shutil.which("initdb") is None, reason="needs PostgreSQL's server (Debian: postgresql)"
    ),
]

STAGE = """
import sys, time
from rlhf_vs_dpo.run.recorder import Recorder
steps, seconds, wait_for = int(sys.argv[1]), float(sys.argv[2]), sys.argv[3]
recorder = Recorder()
recorder.tell(create="rl@ppo-0", tags={"policy": "ppo-0", "family": "rl"}, params={"beta": 0.1})
for step in range(steps):
    recorder.tell(metrics={"loss": 1 / (step + 1), "reward": float(step)}, step=step)
    time.sleep(seconds / steps)
print("trained", flush=True)
if wait_for:
    sys.stdin.readline()
print(recorder.end("FINISHED"))
"""


@pytest.fixture
def servers(tmp_path):
    """(PostgreSQL, the tracking server), running."""
    pytest.importorskip("psycopg")
    user = pwd.getpwnam("postgres") if os.getuid() == 0 else pwd.getpwuid(os.getuid())  # PostgreSQL refuses root
    as_user = {"user": user.pw_uid, "group": user.pw_gid} if os.getuid() == 0 else {}
    for parent in [tmp_path, *tmp_path.parents][:3]:
        parent.chmod(0o755)
    data = tmp_path / "database"
    data.mkdir()
    if as_user:
        os.chown(data, user.pw_uid, user.pw_gid)
    found = POSTGRES or Path(shutil.which("initdb")).parent
    subprocess.run(
        [found / "initdb", "-D", data, "-U", "mlflow", "-A", "trust"],
        check=True,
        capture_output=True,
        cwd=data,
        **as_user,
    )
    of_database, of_server = free_port(), free_port()
    options = ["-D", str(data), "-h", "127.0.0.1", "-p", str(of_database), "-k", str(data)]
    database = Program([str(found / "postgres"), *options], of_database, cwd=data, **as_user)
    database.start()
    mlflow = [
        str(Path(sys.executable).parent / "mlflow"), "server", "--backend-store-uri", f"postgresql://mlflow@127.0.0.1:{of_database}/postgres",
        "--artifacts-destination", str(tmp_path / "artifacts"), "--host", "127.0.0.1", "--port", str(of_server), "--workers", "1",
    ]  # fmt: skip
    server = Program(mlflow, of_server)
    time.sleep(1)
    server.start()
    try:
        yield database, server
    finally:
        server.kill()
        database.kill()


def stage(folder: Path, uri: str, steps: int, seconds: float, held: bool) -> subprocess.Popen:
    environment = os.environ | {
        "MLFLOW_TRACKING_URI": uri, "DVC_ROOT": str(folder), "PYTHONPATH": os.pathsep.join(sys.path),
    }  # fmt: skip
    environment.pop("DVC_STAGE", None)
    return subprocess.Popen(
        [sys.executable, "-c", STAGE, str(steps), str(seconds), "x" if held else ""], cwd=folder, env=environment, text=True,
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip


@pytest.mark.parametrize("victim", ["tracking server", "database"])
@pytest.mark.parametrize("when", ["in the middle", "at the end"])
def test_nothing_is_lost_twice_or_out_of_order(tmp_path, servers, victim, when):
    from mlflow.tracking import MlflowClient

    database, server = servers
    program = server if victim == "tracking server" else database
    folder = tmp_path / "project"
    folder.mkdir()
    (folder / "params.yaml").write_text("seed: 0\n")
    uri = f"http://127.0.0.1:{server.port}"
    steps, seconds = (400, AWAY + 40) if when == "in the middle" else (50, 10)
    training = stage(folder, uri, steps, seconds, held=when == "at the end")
    if when == "at the end":
        assert training.stdout.readline() == "trained\n"
    else:
        time.sleep(20)
    program.kill()
    if when == "at the end":
        training.stdin.write("\n")
        training.stdin.flush()
    away = time.monotonic()
    time.sleep(AWAY)
    program.start()
    said, complaints = training.communicate(timeout=300)
    run_id = said.split()[-1]
    assert training.returncode == 0, complaints
    client = MlflowClient(tracking_uri=uri)
    (run,) = client.search_runs([client.get_experiment_by_name("rlhf-vs-dpo").experiment_id])
    assert run.info.run_id == run_id and run.info.status == "FINISHED"
    for name, value in (("loss", lambda step: 1 / (step + 1)), ("reward", float)):
        history = client.get_metric_history(run_id, name)
        assert [(p.step, p.value) for p in history] == [(s, pytest.approx(value(s))) for s in range(steps)]
        assert [p.timestamp for p in history] == sorted(p.timestamp for p in history)
        print(f"{victim} away {time.monotonic() - away:.0f} s {when}: {name} sent {steps}, stored {len(history)}")
    assert "does not answer" in complaints and "answers again" in complaints
    assert not list((folder / ".dvc" / "tmp" / "rlhf" / "mlflow").glob("*.jsonl"))
