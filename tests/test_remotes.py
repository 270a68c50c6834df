"""A colleague pulls what was pushed to an SSH server, or to S3, and has nothing left to run: `make test-remotes`, servers on loopback."""

import os
import shutil
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import pytest
from project import change, copy_project, run
from servers import Program, free_port

SSHD = shutil.which("sshd") or shutil.which("sshd", path="/usr/sbin:/usr/local/sbin")
pytestmark = [pytest.mark.slow, pytest.mark.pipeline]
GIT = ("git", "-c", "user.name=a", "-c", "user.email=a@b")


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """A small run under git, as one has it before one pushes."""
    folder = copy_project(tmp_path_factory.mktemp("remotes") / "origin", "smoke")
    change(folder, "policies", {"rl": [], "preference": ["dpo"], "imitation": [], "best_of_n": [4]})
    project = Path(__file__).parent / "project.py"
    run(folder, sys.executable, project, str(folder), PYTHONPATH=str(project.parent))
    run(folder, *GIT, "init", "-q")
    run(folder, *GIT, "add", "-A")
    run(folder, *GIT, "commit", "-q", "-m", "x")
    return folder


@contextmanager
def ssh(folder: Path):
    """OpenSSH's server with keys of its own; yields the address of a remote and its settings."""
    pytest.importorskip("dvc_ssh")
    if SSHD is None:
        pytest.skip("needs OpenSSH's server (Debian: openssh-server)")
    for name in ("host", "user"):
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", folder / name], check=True)
    folder.chmod(0o700)
    port, store = free_port(), folder / "store"
    if os.getuid() == 0:
        Path("/run/sshd").mkdir(exist_ok=True)
    options = {
        "Port": port, "ListenAddress": "127.0.0.1", "HostKey": folder / "host", "AuthorizedKeysFile": folder / "user.pub",
        "StrictModes": "no", "UsePAM": "no", "PidFile": folder / "pid", "Subsystem": "sftp internal-sftp", "PasswordAuthentication": "no",
    }  # fmt: skip
    (folder / "sshd_config").write_text("".join(f"{key} {value}\n" for key, value in options.items()))
    server = Program([SSHD, "-D", "-f", str(folder / "sshd_config")], port)
    server.start()
    try:
        settings = {"port": str(port), "keyfile": str(folder / "user"), "user": Path.home().owner()}
        yield f"ssh://127.0.0.1{store}", settings, {}
    finally:
        server.kill()


@contextmanager
def s3(folder: Path):
    """A stand-in for S3, with a bucket."""
    pytest.importorskip("dvc_s3")
    pytest.importorskip("moto")
    import boto3

    port = free_port()
    server = Program([str(Path(sys.executable).parent / "moto_server"), "-H", "127.0.0.1", "-p", str(port)], port)
    server.start()
    time.sleep(1)
    keys = {"AWS_ACCESS_KEY_ID": "x", "AWS_SECRET_ACCESS_KEY": "x", "AWS_DEFAULT_REGION": "us-east-1"}
    url = f"http://127.0.0.1:{port}"
    try:
        client = boto3.client(
            "s3", endpoint_url=url, region_name="us-east-1", aws_access_key_id="x", aws_secret_access_key="x"
        )
        client.create_bucket(Bucket="team")
        yield "s3://team/rlhf-vs-dpo", {"endpointurl": url}, keys
        assert client.list_objects_v2(Bucket="team")["KeyCount"] > 20
    finally:
        server.kill()


@pytest.mark.parametrize("remote", [ssh, s3], ids=["ssh", "s3"])
def test_a_colleague_pulls_what_was_pushed_and_runs_nothing(made, remote, tmp_path):
    clone = tmp_path / "clone"
    (tmp_path / "server").mkdir()
    with remote(tmp_path / "server") as (address, settings, env):

        def connect(folder: Path) -> None:
            run(folder, "dvc", "remote", "add", "--local", "--force", "--default", "store", address)
            for key, value in settings.items():
                run(folder, "dvc", "remote", "modify", "--local", "store", key, value)

        connect(made)
        run(made, "dvc", "push", **env)
        run(tmp_path, *GIT, "clone", "-q", str(made), str(clone))
        assert not (clone / "models").exists() and not (clone / ".dvc" / "cache").exists()
        connect(clone)
        run(clone, "dvc", "pull", **env)
        said = run(clone, sys.executable, "-m", "rlhf_vs_dpo.run.cells", PYTHONPATH=str(clone / "src"), **env)
        assert "Everything is up to date" in said
    weights = Path("models") / "dpo-0" / "model.safetensors"
    assert (clone / weights).read_bytes() == (made / weights).read_bytes()
