"""Under `make repro`, stages are forks of one process that has imported their libraries already.

Importing torch, transformers, pandas and pandera takes 3 to 4 s of a core, in each of some forty stages of which most take less than 20 s.
A stage that finds such a process (PLACE, in its environment) hands its command over: words, environment, folder and open files go there,
and it ends as the fork ends. A stage by itself (`dvc repro`, or by hand) imports what it needs. Both compute the same: the libraries are
loaded with the same fixed arithmetic (`arithmetic`), and nothing is computed before the fork. The modules of this project are
imported after it, so that what runs is what DVC has just hashed.

    stage, as DVC starts it      passes SIGTERM on, and waits; when it is killed, the fork is told SIGTERM
    the process with libraries   forks, for each stage that comes, a keeper; ends when `make repro` has ended
    keeper                       forks the stage, tells it what was passed on, and says how it ended
    fork                         runs the command; it hears Ctrl-C itself, and ends with its keeper

A fork has the stage's umask, paths and environment. It does not have its limits, niceness and processors: they are those of `make repro`.

Linux without a GPU only: elsewhere fork after import is not safe, and a process that has looked at CUDA can have no forks that use it.
"""

import contextlib
import gc
import importlib
import io
import json
import os
import runpy
import select
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rlhf_vs_dpo.run import arithmetic

TOLD = (signal.SIGINT, signal.SIGTERM)  # signals that end a stage
PLACE = "RLHF_PRELOADED"  # the socket of the process with the libraries
LIBRARIES = (
    "typer",
    "filelock",
    "ruamel.yaml",
    "pydantic",
    "torch",
    "pandas",
    "pyarrow.dataset",
    "pyarrow.parquet",
    "pandera.pandas",
    "scipy.stats",
    "safetensors.torch",
    "transformers.models.auto.modeling_auto",
    "transformers.models.auto.tokenization_auto",
    "transformers.models.llama.modeling_llama",
    "transformers.tokenization_utils_tokenizers",
)


# ---- the stage -------------------------------------------------------------------------------------------------------


def hand_over() -> None:
    """Let a fork run this command, and end as it ends. Returns where nobody is there to do so."""
    place = os.environ.pop(PLACE, None)  # whatever this process starts is a process of its own
    if not place:
        return
    files = [0, 1, 2]
    try:
        for file in files:
            os.fstat(file)
    except OSError:  # one is closed: a fork would take another file for it
        return
    environment = dict(os.environ)
    if not arithmetic.native():
        environment = arithmetic.fixed_environment(environment)
    os.umask(umask := os.umask(0o077))
    asked = {
        "words": sys.argv,
        "environment": environment,
        "folder": os.getcwd(),
        "python": sys.prefix,
        "path": sys.path,
        "umask": umask,
    }
    line = socket.socket(socket.AF_UNIX)
    try:
        line.connect(place)
        socket.send_fds(line, [b"\n"], files)
        line.sendall(json.dumps(asked).encode() + b"\n")
        answers = line.makefile("r")
        begun = answers.readline()
    except OSError:  # it is not there yet, or no more
        begun = ""
    if not begun:
        line.close()
        return
    signal.signal(signal.SIGINT, signal.SIG_IGN)

    def pass_on(*_: object) -> None:
        with contextlib.suppress(OSError):
            line.send(b"\n")

    signal.signal(signal.SIGTERM, pass_on)
    ended = answers.readline()
    status = int(ended) if ended else -signal.SIGTERM  # its keeper was killed
    if status < 0:  # a signal ended it
        if status != -signal.SIGKILL:
            signal.signal(-status, signal.SIG_DFL)
        os.kill(os.getpid(), -status)
    sys.exit(status)


@contextmanager
def shared(log: Path) -> Iterator[None]:
    """One process with the libraries for all stages that are started meanwhile; what it prints goes to `log`."""
    if not possible():
        yield
        return
    with tempfile.TemporaryDirectory(prefix="rlhf-") as folder:
        place = str(Path(folder) / "preloaded")  # the path of a socket must be short
        path = os.pathsep.join(["src", *filter(None, [os.environ.get("PYTHONPATH")])])  # as dvc.yaml starts stages
        # Of the same group of processes: Ctrl-C reaches the forks. It ends when its input has ended, also where this is killed.
        with log.open("w") as output:
            process = subprocess.Popen(
                [sys.executable, "-m", "rlhf_vs_dpo.run.preloaded", place],
                stdin=subprocess.PIPE, stdout=output, stderr=output, env=os.environ | {"PYTHONPATH": path},
            )  # fmt: skip
        os.environ[PLACE] = place
        try:
            yield
        finally:
            os.environ.pop(PLACE, None)
            process.kill()  # keepers and stages that still run stay
            process.communicate()


def possible() -> bool:
    """Whether forks can take over what this machine's stages do."""
    from rlhf_vs_dpo.run.launch import gpus

    if not sys.platform.startswith("linux") or gpus():
        return False
    try:
        os.close(os.pidfd_open(os.getpid()))
    except OSError:  # Linux before 5.3
        return False
    return True


# ---- the other end ---------------------------------------------------------------------------------------------------


def serve(door: socket.socket) -> bool:
    """Fork for whoever comes, until the standard input ends. Returns False then; and True in a fork that is to run `sys.argv`."""
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for keepers
    while True:
        ready, _, _ = select.select([door, sys.stdin], [], [])
        if sys.stdin in ready:
            return False
        line, _ = door.accept()
        if os.fork() == 0:
            door.close()
            return keep(line)
        line.close()


def keep(line: socket.socket) -> bool:
    """A keeper: fork a stage, and attend to it until it ends. Does not return; True in the fork."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    try:
        _, files, _, _ = socket.recv_fds(line, 1, 3)
        asked = json.loads(line.makefile("r").readline())
        if asked["python"] != sys.prefix:  # whose libraries are others
            os._exit(0)
    except (OSError, ValueError):  # whoever asked was killed
        os._exit(1)
    keeper = os.getpid()
    signal.pthread_sigmask(signal.SIG_BLOCK, TOLD)  # what the stage is told before it listens comes when it listens
    stage = os.fork()  # where memory is short it may fail: nothing has begun then
    if stage == 0:
        line.close()
        become(asked, files, keeper)
        return True
    signal.pthread_sigmask(signal.SIG_UNBLOCK, TOLD)
    with contextlib.suppress(OSError):
        line.sendall(b"begun\n")
    for file in files:
        os.close(file)
    watched: list[int | socket.socket] = [os.pidfd_open(stage), line]
    while True:
        ready, _, _ = select.select(watched, [], [])
        if line in ready:
            with contextlib.suppress(OSError):
                if not line.recv(64):
                    watched.remove(line)  # whoever asked was killed
            os.kill(stage, signal.SIGTERM)
        if watched[0] in ready:
            break
    _, status = os.waitpid(stage, 0)
    with contextlib.suppress(OSError):
        line.sendall(f"{os.waitstatus_to_exitcode(status)}\n".encode())
    os._exit(0)


def become(asked: dict[str, Any], files: list[int], keeper: int) -> None:
    """Be the process that was asked for, but for what is imported; end with the keeper."""
    from rlhf_vs_dpo.run.launch import end_with_parent

    for place, file in enumerate(files):
        os.dup2(file, place)
        os.close(file)
    os.environ.clear()
    os.environ.update(asked["environment"])
    time.tzset()
    tempfile.tempdir = None
    os.umask(asked["umask"])
    os.chdir(asked["folder"])
    sys.argv, sys.orig_argv, sys.path[:] = asked["words"], [sys.executable, *asked["words"]], asked["path"]
    assert isinstance(sys.stdout, io.TextIOWrapper)  # of a log
    sys.stdout.reconfigure(line_buffering=os.isatty(1))
    # Here since before the fork, they would be those of then; all others of this project are imported by the stage.
    for name in [name for name in sys.modules if name.startswith("rlhf_vs_dpo")]:
        del sys.modules[name]
    # Without this, all forks would draw the same from generators that nobody has seeded. No number of this project comes from these.
    sys.modules["numpy"].random.seed()
    sys.modules["torch"].default_generator.seed()
    end_with_parent()
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, TOLD)
    if os.getppid() != keeper:  # it was killed in between
        sys.exit(128 + signal.SIGTERM)


def load() -> None:
    """Import the libraries, and what pandera imports when it first sees a table."""
    for library in LIBRARIES:
        importlib.import_module(library)
    import pandas as pd
    import pandera.pandas as pa

    pa.DataFrameSchema({"seed": pa.Column(int)}).validate(pd.DataFrame({"seed": [0]}))


def main() -> bool:
    """Import, then serve at the place that is given: stages that start meanwhile import for themselves. True in a fork that is to run `sys.argv`."""
    arithmetic.fix()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    load()
    gc.collect()
    gc.freeze()  # so that forks share what is there
    with socket.socket(socket.AF_UNIX) as door:
        door.bind(sys.argv[1])
        door.listen(64)
        return serve(door)


if __name__ == "__main__" and main():
    runpy.run_path(str(Path(sys.argv[0]).absolute()), run_name="__main__")
