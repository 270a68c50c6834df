"""A project as a user has it, in a folder of its own: copied, changed, run through DVC, or stage by stage in one process."""

import io
import os
import re
import runpy
import shutil
import subprocess
import sys
from contextlib import contextmanager, redirect_stderr
from pathlib import Path
from typing import Any

import psutil
import pytest
from conftest import ROOT
from ruamel.yaml import YAML

from rlhf_vs_dpo.run import arithmetic, cells, frame, journal, recorder

BIN = Path(sys.executable).parent
ENV = {key: value for key, value in arithmetic.fixed_environment(dict(os.environ)).items() if not key.startswith("MLFLOW_")} | {
    "PATH": f"{BIN}:{os.environ['PATH']}",
    "DVC_NO_ANALYTICS": "1",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "HF_HUB_OFFLINE": "1",
}  # fmt: skip


def copy_project(to: Path, profile: str) -> Path:
    """The tracked files as they are now, without git and without results, with a profile laid over params.yaml."""
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False)
    names = listed.stdout.split("\n") if listed.returncode == 0 and listed.stdout else None
    if names is None:  # an unpacked archive
        ignored = (".venv", "models", "samples", "heldout", "runs", "mlartifacts", "cache", "tmp", "mlflow.db*", "logs")
        shutil.copytree(ROOT, to, ignore=shutil.ignore_patterns(*ignored))
    else:
        for name in filter(None, names):
            if (ROOT / name).exists() and not name.startswith(
                ("metrics/", "plots/", "report/", "theory/", "dvc.lock", "tuning/dvc.lock", "tuning/trials/")
            ):
                (to / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(ROOT / name, to / name)
    shutil.copy2(to / "profiles" / "default.yaml", to / "params.yaml")
    run(to, "dvc", "config", "--local", "core.no_scm", "true")
    run(to, sys.executable, "-m", "rlhf_vs_dpo.run.profiles", profile)
    return to


def run(folder: Path, *command: str, expect: int | None = 0, **env: str) -> str:
    """What a command printed, both streams; fails where it exits otherwise than expected."""
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, env=ENV | env, check=False)
    output = done.stdout + done.stderr
    assert expect is None or done.returncode == expect, (
        f"{' '.join(map(str, command))} exited {done.returncode}:\n{output[-4000:]}"
    )
    return output


def ran(output: str) -> list[str]:
    """Stages that really ran in the output of `dvc repro`."""
    return [line.split("'")[1] for line in output.splitlines() if line.startswith("Running stage")]


def change(folder: Path, path: str, value: Any) -> None:
    """Set a key of the project's params.yaml."""
    yaml = YAML()
    yaml.preserve_quotes = True
    params = yaml.load((folder / "params.yaml").read_text())
    *parents, key = path.split(".")
    target = params
    for parent in parents:
        target = target[parent]
    target[key] = value
    with open(folder / "params.yaml", "w") as file:
        yaml.dump(params, file)


def planned() -> set[str]:
    """Stages that `make repro` would bring up to date in this folder."""
    waves, tail, _ = cells.plan()
    return {name for wave in waves for lane in wave for name in lane} | set(tail)


def lock(folder: Path) -> dict[str, Any]:
    """The stages of dvc.lock."""
    return YAML(typ="safe").load((folder / "dvc.lock").read_text())["stages"]


def alive(folder: Path) -> list[psutil.Process]:
    """Processes that work in the folder, zombies apart."""
    found = []
    for process in psutil.process_iter():
        try:
            if process.cwd() == str(folder) and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            continue
    return found


# ---- in one process --------------------------------------------------------------------------------------------------


class Inline:
    """`Recorder` without the process beside the stage: what it is told is sent at once."""

    def __init__(self) -> None:
        self.sender: journal.Sender | None = None

    def tell(self, **message: Any) -> None:
        if "create" in message:
            self.sender = journal.Sender(journal.Journal(message["journals"][-1]), print)
        if "reads" in message:
            message["of_dvc"] = False  # no other process writes dvc.lock: what is not in it will not come
        self.sender.send(self.sender.journal.add(recorder.written(message)))

    def end(self, status: str) -> str | None:
        if self.sender is None:
            return None
        self.tell(end=status)
        return self.sender.run_id

    def begun(self) -> str | None:
        return self.sender.run_id


@contextmanager
def inside(folder: Path, **env: str | None):
    """The folder as working directory, with these environment variables (None: without), and `Inline` as recorder."""
    before, here, arguments, original = dict(os.environ), Path.cwd(), sys.argv, frame.Recorder
    os.environ.update({name: value for name, value in env.items() if value is not None})
    for name, value in env.items():
        if value is None:
            os.environ.pop(name, None)
    frame.Recorder = Inline
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(here)
        os.environ.clear()
        os.environ.update(before)
        sys.argv, frame.Recorder = arguments, original


def command(words: list[str]) -> int:
    """Run a stage script in this process; its exit status."""
    sys.argv = words
    try:
        runpy.run_path(words[0], run_name="__main__")
    except SystemExit as end:
        return int(end.code or 0)
    return 0


def by_hand(folder: Path, stage: str, *options: str, **env: str) -> int:
    """A stage outside DVC, in this process, with an MLflow store of its own; its exit status."""
    store = f"sqlite:///{folder}/by-hand.db"
    with inside(folder, MLFLOW_TRACKING_URI=store, DVC_STAGE=None, DVC_ROOT=None, **env):
        return command([f"stages/{stage}.py", *options])


def stages(folder: Path, file: str = "dvc.yaml") -> dict[str, tuple[list[str], list[str]]]:
    """Script and options of each stage, and its outputs, in an order that DVC would run them in."""
    import networkx
    from dvc.repo import Repo

    with inside(folder), Repo() as repo:
        ordered = networkx.topological_sort(repo.index.graph.reverse())
        return {
            stage.addressing: (stage.cmd.partition("python ")[2].split(), [out.def_path for out in stage.outs])
            for stage in ordered
            if stage.path_in_repo == file
        }


def reproduce(folder: Path, only: re.Pattern[str] | None = None, file: str = "dvc.yaml") -> None:
    """Every stage of a file in one process, in an order that DVC would run them in; `dvc commit` locks each.

    only    stages to run; they are then not locked
    """
    from dvc.repo import Repo

    todo = stages(folder, file)
    with Repo(folder) as repo:
        for name, (words, _) in todo.items():
            if only is None or only.fullmatch(name):
                with inside(folder, DVC_STAGE=name, DVC_ROOT=str(folder), MLFLOW_TRACKING_URI=None):
                    assert command(words) == 0, name
                    if only is None:
                        repo.commit(name, force=True)


def fails(folder: Path, target: str, *needles: str) -> None:
    """The stage ends with status 1 and these words, without a traceback."""
    said = io.StringIO()
    with pytest.raises(AssertionError, match=target), redirect_stderr(said):
        reproduce(folder, re.compile(re.escape(target)))
    output = said.getvalue()
    assert "Traceback" not in output, output[-3000:]
    for needle in needles:
        assert needle in output, f"{needle!r} not in:\n{output[-3000:]}"


if __name__ == "__main__":  # a process of its own: what one stage leaves behind in it is part of the test
    reproduce(Path(sys.argv[1]))
