"""Stages as forks of a process that has their libraries: they are what they would be by themselves, to the bit, and end as those end."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from project import ENV, ROOT

from rlhf_vs_dpo.run import preloaded

HEAD = """
import sys
forked = "torch" in sys.modules  # before anything is imported here
own = [name for name in sys.modules if name.startswith("rlhf_vs_dpo")]
import os, signal, time
from pathlib import Path
from rlhf_vs_dpo.run import launch
"""


@pytest.fixture(scope="module")
def there(tmp_path_factory):
    """The environment of a stage that finds the libraries."""
    if not preloaded.possible():
        pytest.skip("stages import for themselves here")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        with preloaded.shared(tmp_path_factory.mktemp("log") / "preloaded.log"):
            place = os.environ[preloaded.PLACE]
            until(Path(place).exists)
            yield ENV | {preloaded.PLACE: place}


def until(what, seconds: float = 60.0) -> None:
    end = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.05)


def gone(process: psutil.Process) -> bool:
    try:
        return process.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def script(folder: Path, body: str) -> Path:
    path = folder / "stage.py"
    lines = "".join(f"    {line}\n" for line in body.strip().splitlines())
    path.write_text(
        f"{HEAD}\ndef main(word: str = '') -> None:\n{lines}\nif __name__ == '__main__':\n    launch.command(main)\n"
    )
    return path


def start(path: Path, env: dict[str, str], *words: str) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, path.name, *words], cwd=path.parent, env=env, text=True, start_new_session=True, umask=0o027,
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip


def test_a_fork_is_what_the_stage_would_be(there, tmp_path):
    path = script(
        tmp_path,
        """
print(word, sys.argv[1:], sys.orig_argv[1:], os.getcwd(), sys.path[0], __name__, __file__)
print(sorted((k, v) for k, v in os.environ.items() if k != "RLHF_PRELOADED"), signal.getsignal(signal.SIGTERM))
print("said", file=sys.stderr)
print(oct(os.umask(0)), sys.path[1:])
Path("own.txt").write_text(f"{forked} {own}")
""",
    )
    env = there | {"RLHF_SOMETHING": "ä", "OMP_NUM_THREADS": "7"}
    said = []
    for place in (True, False):
        stage = start(path, env if place else {k: v for k, v in env.items() if k != preloaded.PLACE}, "--word", "hello")
        said.append((*stage.communicate(timeout=60), stage.returncode))
        assert (tmp_path / "own.txt").read_text() == f"{place} []"  # nothing of this project was there before
    assert (
        said[0][0].split() == said[1][0].split()
        and said[0] == said[1]
        and said[0][2] == 0
        and "hello" in said[0][0]
        and said[0][1] == "said\n"
    )


@pytest.mark.parametrize(
    ("body", "status", "needle"),
    [
        ("sys.exit(3)", 3, ""),
        ("raise ValueError('so it goes')", 1, "ValueError: so it goes"),
        ("os.kill(os.getpid(), signal.SIGKILL)", -signal.SIGKILL, ""),
        ("os.kill(os.getpid(), signal.SIGSEGV)", -signal.SIGSEGV, ""),
        ("os.execvp(sys.executable, [sys.executable, '-c', 'raise SystemExit(5)'])", 5, ""),  # as a launcher does
    ],
)
def test_the_stage_ends_as_its_fork_ends(body, status, needle, there, tmp_path):
    stage = start(script(tmp_path, body), there)
    _, said = stage.communicate(timeout=60)
    assert stage.returncode == status and needle in said, said


def test_a_fork_computes_the_same_bits(there, tmp_path):
    """Sums of lengths that no vector divides, by MKL, OpenBLAS, Arrow and PyTorch's own loops."""
    path = script(
        tmp_path,
        """
import hashlib, numpy, pyarrow, pyarrow.compute, torch
torch.manual_seed(0)
a = torch.randn(1501, 773, requires_grad=True)
b = torch.nn.functional.scaled_dot_product_attention(*(a[:1499, :767].reshape(13, -1, 59) for _ in range(3)))
(torch.nn.functional.silu(a @ a.T).logsumexp(-1).sum() + b.square().sum()).backward()
n = numpy.random.default_rng(0).standard_normal((601, 433))
found = [a.grad.numpy().tobytes(), numpy.linalg.inv(n @ n.T + numpy.eye(601)).tobytes(), numpy.exp(n).sum().tobytes()]
found.append(repr(pyarrow.compute.variance(pyarrow.array(n.ravel())).as_py()).encode())
print([hashlib.md5(of).hexdigest() for of in found], torch.get_num_threads(), torch.backends.cpu.get_cpu_capability())
print(forked, file=sys.stderr)
""",
    )
    said = []
    for env in (there, ENV):
        stage = start(path, env)
        said.append(stage.communicate(timeout=120))
        assert stage.returncode == 0, said
    assert said[0][0] == said[1][0] and (said[0][1], said[1][1]) == ("True\n", "False\n")


WAITS = """
def heard(*_):
    Path("heard").touch()
    sys.exit(143)
signal.signal(signal.SIGTERM, heard)
print(forked, os.getpid(), os.getppid(), flush=True)
time.sleep(60)
"""


def begun(folder: Path, env: dict[str, str]) -> tuple[subprocess.Popen, psutil.Process, psutil.Process]:
    """A stage that waits: as it was started, its fork, and the fork's keeper."""
    stage = start(script(folder, WAITS), env)
    forked, fork, keeper = stage.stdout.readline().split()
    assert forked == "True"
    return stage, psutil.Process(int(fork)), psutil.Process(int(keeper))


@pytest.mark.parametrize("how", ["SIGTERM", "killed", "keeper killed", "Ctrl-C"])
def test_a_fork_never_outlives_its_stage(how, there, tmp_path):
    stage, fork, keeper = begun(tmp_path, there)
    match how:
        case "SIGTERM":
            stage.terminate()
        case "killed":
            stage.kill()
        case "keeper killed":
            keeper.kill()
        case "Ctrl-C":  # the terminal tells all of the group; the fork is of that of `make repro`
            os.killpg(stage.pid, signal.SIGINT)
            fork.send_signal(signal.SIGINT)
    _, said = stage.communicate(timeout=30)
    until(lambda: gone(fork))
    expected = {"SIGTERM": 143, "killed": -signal.SIGKILL, "keeper killed": -signal.SIGTERM, "Ctrl-C": 130}
    assert stage.returncode == expected[how], said
    assert (tmp_path / "heard").exists() == (how != "Ctrl-C")
    until(lambda: gone(keeper))


@pytest.mark.parametrize("how", ["told to end", "gone"])
def test_what_a_stage_is_told_before_its_fork_listens_is_not_lost(how, there, tmp_path):
    path = script(tmp_path, "Path('began').touch()\ntime.sleep(2)\nPath('written').touch()")
    environment = {k: v for k, v in there.items() if k != preloaded.PLACE}
    asked = {"words": [str(path)], "environment": environment, "folder": str(tmp_path), "python": sys.prefix, "path": [str(ROOT / "src"), *sys.path], "umask": 0o022}  # fmt: skip
    with open(os.devnull, "r+") as nothing:
        for _ in range(5):
            line = socket.socket(socket.AF_UNIX)
            line.connect(there[preloaded.PLACE])
            socket.send_fds(line, [b"\n"], [nothing.fileno()] * 3)
            line.sendall(json.dumps(asked).encode() + b"\n")
            answers = line.makefile("r")
            assert answers.readline() == "begun\n"
            if how == "gone":
                answers.close()
                line.close()
            else:
                line.sendall(b"\n")
                assert answers.readline() == f"{-signal.SIGTERM}\n"
                line.close()
    time.sleep(4)
    assert not (tmp_path / "written").exists()


def test_a_stage_whose_input_is_closed_is_no_fork(there, tmp_path):
    path = script(tmp_path, "print(forked)")
    command = f"exec {sys.executable} {path.name} <&-"
    done = subprocess.run(["bash", "-c", command], cwd=tmp_path, env=there, text=True, capture_output=True, check=True)
    assert done.stdout == "False\n"


def test_a_stage_of_another_python_imports_its_own_libraries(there, tmp_path):
    path = script(tmp_path, "print(forked)")
    path.write_text("import sys\nsys.prefix = 'another one'\n" + path.read_text())
    stage = start(path, there | {"RLHF_NATIVE": "1"})  # which does not replace itself
    assert stage.communicate(timeout=60)[0] == "False\n" and stage.returncode == 0


def test_without_such_a_process_a_stage_imports_for_itself(tmp_path):
    path = script(tmp_path, "print(forked)")
    stage = start(path, ENV | {preloaded.PLACE: str(tmp_path / "gone")})
    assert stage.communicate(timeout=60)[0] == "False\n" and stage.returncode == 0


def test_it_ends_with_make_repro_and_what_runs_goes_on(tmp_path, monkeypatch):
    if not preloaded.possible():
        pytest.skip("stages import for themselves here")
    monkeypatch.chdir(ROOT)
    with preloaded.shared(tmp_path / "log"):
        place = os.environ[preloaded.PLACE]
        until(Path(place).exists)
        stage, fork, _ = begun(tmp_path, ENV | {preloaded.PLACE: place})
    assert preloaded.PLACE not in os.environ and not Path(place).exists()
    assert not gone(fork) and stage.poll() is None
    stage.terminate()
    assert stage.wait(30) == 143


def test_no_forks_where_there_are_gpus(monkeypatch, tmp_path):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    monkeypatch.delenv(preloaded.PLACE, raising=False)
    assert not preloaded.possible()
    with preloaded.shared(tmp_path / "log"):
        assert preloaded.PLACE not in os.environ
