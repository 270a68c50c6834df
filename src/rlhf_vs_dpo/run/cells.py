"""`make repro`: the whole graph, with cells that do not depend on each other side by side.

DVC says what depends on what and what has changed; its locks let several `dvc repro` work in one folder. A stage starts as soon as what it
needs is done, and first come those on which most others wait. A line says when a cell starts and ends; what it prints goes to
logs/<cell>.log. After a failure, or Ctrl-C, nothing new starts; after a failure what runs is finished, and the first failure is shown
last. `dvc repro` alone does the same work one stage after another, and gives the same bytes.

    JOBS                    cells at once: by default as many as there are cores (of the container, of the affinity), or GPUs for them
    CUDA_VISIBLE_DEVICES    with several GPUs each cell gets one of them, or RLHF_PROCESSES of them; with RLHF_LAUNCH, all
"""

import contextlib
import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from rlhf_vs_dpo.errors import ParamsError, UserError
from rlhf_vs_dpo.run import preloaded, recorder, shortage
from rlhf_vs_dpo.run.launch import end_with_parent, gpus

LOGS = Path("logs")
SHOWN = 30  # lines of a failed cell's log
LOOK_SECONDS = 0.05  # between two looks at who has ended


def main(file: str = "dvc.yaml") -> int:
    """Bring all stages of a file up to date, and what they need; returns the exit status of the first cell that failed, or 0."""
    end_with_parent()
    repair()
    jobs, devices = how_many(), gpus()
    if status := checked():
        return status
    todo = plan(file)  # before anything is removed: it refuses where another run is at work
    if not todo.waves and not todo.tail:
        print("Everything is up to date.")
        return 0
    shutil.rmtree(LOGS, ignore_errors=True)
    LOGS.mkdir()
    libraries = preloaded.shared(LOGS / "preloaded.log") if len(todo.needs) > 1 else contextlib.nullcontext()
    with recorder.shared(LOGS / "mlflow.log"), libraries:
        return run(todo, jobs, devices)


def run(todo: "Plan", jobs: int, devices: list[str]) -> int:
    """Run stages, then the tail; returns the exit status of the first that failed, or 0."""
    number = itertools.count(1)
    total = sum(len(lane) for wave in todo.waves for lane in wave)
    if total:
        print(f"{total} cells, {jobs} at once; what each prints goes to {LOGS}/", flush=True)
    # A stage that has no other beside it takes all GPUs.
    first = [wave for wave in todo.waves[:1] if len(devices) > 1 and (len(wave) == 1 or max(map(len, wave)) > 1)]
    for waves in (first, todo.waves[len(first) :]):
        lanes = list(itertools.chain(*waves))
        places = shares(devices) if len(devices) > 1 and len(lanes) > 1 else []
        cells = list(itertools.chain(*lanes))
        if status := side_by_side(cells, todo.needs, jobs, places, lambda: f"{next(number)}/{total}"):
            return status
    if not todo.tail:
        return 0
    command = ["dvc", "--wait-for-lock", "repro", "--single-item", *todo.tail]
    return subprocess.run(command, check=False, preexec_fn=end_with_parent).returncode


class Cell:
    """A cell that runs, its output into its log."""

    def __init__(self, name: str, number: str, slot: int, places: list[str]):
        self.name, self.number, self.slot, self.log = name, number, slot, _log(name)
        self.started, self.killed_before = time.monotonic(), shortage.kills()
        environment = dict(os.environ)
        if places:
            environment["CUDA_VISIBLE_DEVICES"] = places[slot % len(places)]
        _say(f"{number:>7}  {name} starts")
        self.log.parent.mkdir(parents=True, exist_ok=True)
        with self.log.open("w") as output:
            self.process = subprocess.Popen(
                ["dvc", "--wait-for-lock", "repro", "--single-item", name],
                stdin=subprocess.DEVNULL, stdout=output, stderr=output, env=environment, preexec_fn=end_with_parent,
            )  # fmt: skip

    def said(self) -> str:
        """What it has printed so far."""
        return self.log.read_text(errors="replace") if self.log.exists() else ""

    def ended(self, interrupted: bool) -> int | None:
        """Exit status, said in a line; None while it runs."""
        status = self.process.poll()
        if status is None:
            return None
        took = _duration(time.monotonic() - self.started)
        if status == 0:
            said = self.said()
            cached = "brought back from the cache" if "is cached" in said else "unchanged"
            how = "done" if "Running stage" in said else cached
            _say(f"{self.number:>7}  {self.name} {how}, {took}")
            return 0
        _say(f"{self.number:>7}  {self.name} {'interrupted' if interrupted else 'FAILED'} after {took}")
        return status if 0 < status < 256 else 1

    def show(self) -> None:
        """The end of what a cell that failed has printed."""
        said = self.said()
        lines = (f"  {line}" for line in said.replace("\r", "\n").splitlines()[-SHOWN:])
        print(f"\n{self.name} failed. The end of {self.log}:\n", *lines, sep="\n", file=sys.stderr)
        if "exited with -9" in said and shortage.kills() > self.killed_before:
            print(f"\nThe kernel has killed a process because memory ran out; {shortage.ADVICE}.", file=sys.stderr)
        print("\n`make repro` goes on from here.", file=sys.stderr)


def side_by_side(
    cells: list[str], needs: dict[str, set[str]], jobs: int, places: list[str], number: Callable[[], str]
) -> int:
    """Run cells, `jobs` at once, each when what it needs of the others is done, and first those on which most others wait.

    places    GPUs of the cells that run at once; none: each has those that are there
    number    what is said before a cell

    Returns 0, or the exit status of the first that failed, having shown it: nothing new starts then, and what runs is finished.
    """
    undone = set(cells)
    waiting_for = {cell: sum(cell in below for below in needs.values()) for cell in cells}
    waiting = sorted(cells, key=lambda cell: -waiting_for[cell])  # those of one number stay in the order of dvc.yaml
    running: list[Cell] = []
    failure: tuple[Cell, int] | None = None
    interrupted: list[bool] = []
    before = signal.signal(signal.SIGINT, lambda *_: interrupted.append(True))  # it reaches DVC and stages, too
    try:
        while running or (waiting and not failure and not interrupted):
            if not failure and not interrupted:
                ready = [cell for cell in waiting if not needs[cell] & undone][: jobs - len(running)]
                for cell in ready:
                    waiting.remove(cell)
                    slot = min({*range(jobs)} - {other.slot for other in running})
                    running.append(Cell(cell, number(), slot, places))
                    if interrupted:  # while it was started: it may not have heard
                        running[-1].process.send_signal(signal.SIGINT)
                        break
            time.sleep(LOOK_SECONDS)
            for each in list(running):
                status = each.ended(bool(interrupted))
                if status is None:
                    continue
                running.remove(each)
                undone.discard(each.name)
                if status and failure is None:
                    failure = each, status
    finally:
        signal.signal(signal.SIGINT, before)
        for each in running:  # this process has met an error
            each.process.terminate()
    if interrupted:
        print("\ninterrupted; `make repro` goes on from here", file=sys.stderr)
        return 128 + signal.SIGINT
    if failure is None:
        return 0
    failure[0].show()
    return failure[1]


def _log(name: str) -> Path:
    """Where a cell's output goes; `tuning/dvc.yaml:tune@ppo` is named by its last part."""
    return LOGS / f"{name.rpartition(':')[2]}.log"


def checked() -> int:
    """Run the stage `check`, if there is one and params.yaml has changed: all that depends on it would look out of date otherwise."""
    from ruamel.yaml import YAML

    if "check" not in YAML(typ="safe").load(Path("dvc.yaml").read_text())["stages"]:
        return 0
    check = ["dvc", "--wait-for-lock", "repro", "--quiet", "--single-item", "check"]
    return subprocess.run(check, check=False, preexec_fn=end_with_parent).returncode


class Plan(NamedTuple):
    """What is to be run: names of stages that are not up to date, and of all that follow from them.

    waves   each of lanes that can run side by side when the waves before it are done; a lane is stages one after another
    tail    a lane that runs last, and before one's eyes
    needs   of each of these stages all those of them that must be done before it
    """

    waves: list[list[list[str]]]
    tail: list[str]
    needs: dict[str, set[str]]


def plan(file: str = "dvc.yaml") -> Plan:
    """What has to be run of the stages of `file`, and of what they need."""
    import networkx
    from dvc.lock import LockError
    from dvc.repo import Repo

    with Repo() as repo:
        graph = repo.index.graph  # from each stage to what it depends on
        try:
            changed = set(repo.status())
        except LockError as error:
            raise UserError(f"DVC works in this folder already; wait for it, or end it\n{error}") from None
        asked = {stage for stage in graph if stage.path_in_repo == file}
        asked |= {below for stage in asked for below in networkx.descendants(graph, stage)}
        stale = {stage for stage in asked if stage.addressing in changed}
        stale |= {above for stage in stale for above in networkx.ancestors(graph, stage)} & asked
        order = {stage: number for number, stage in enumerate(repo.index.stages)}  # that of dvc.yaml
        waiting = graph.subgraph(stale)
        alone = sorted((stage for stage in stale if not waiting.degree(stage)), key=order.__getitem__)
        waves = [
            [stage.addressing for stage in sorted(wave, key=order.__getitem__)]
            for wave in networkx.topological_generations(waiting.subgraph(stale - set(alone)).reverse())
        ]
        tail: list[str] = []
        while waves and len(waves[-1]) == 1:
            tail = waves.pop() + tail
        trunk = [cell for wave in itertools.takewhile(lambda wave: len(wave) == 1, waves) for cell in wave]
        lanes = [[[cell] for cell in wave] for wave in waves[len(trunk) :]]
        if trunk:
            lanes.insert(0, [trunk])
        if alone:
            beside = 1 if trunk and len(gpus()) > 1 else 0  # a training stage that runs by itself takes all GPUs
            while len(lanes) <= beside:
                lanes.append([])
            lanes[beside] += [[stage.addressing] for stage in alone]
        if sum(map(len, lanes)) == 1:
            tail = lanes.pop()[0] + tail
        needs = {stage.addressing: {of.addressing for of in networkx.descendants(waiting, stage)} for stage in stale}
        return Plan(lanes, tail, needs)


def show_waves() -> None:
    """What is to be run, for other schedulers (deploy/slurm/repro): a wave in each line, its lanes in words, the cells of a lane by commas."""
    repair()
    if status := checked():
        sys.exit(status)
    waves, tail, _ = plan()
    for wave in [*waves, [tail]] if tail else waves:
        print(*(",".join(lane) for lane in wave))


def how_many() -> int:
    """Cells at once: JOBS, or one for each GPU, or one for each core that this process may use."""
    given = os.environ.get("JOBS", "")
    if given and not (given.isdigit() and int(given) > 0):
        raise ParamsError(f"JOBS is {given!r}; give the number of cells to run at once, 1 or more")
    if given:
        return int(given)
    import joblib

    return len(shares(gpus())) or joblib.cpu_count()  # which knows affinity and the limits of containers


def shares(devices: list[str]) -> list[str]:
    """GPUs of the cells that run at once, each as CUDA_VISIBLE_DEVICES has them: as many as a stage starts processes (`launch`)."""
    if not devices:
        return []
    given = os.environ.get("RLHF_PROCESSES", "1")
    if not (given.isdigit() and int(given) > 0):
        raise ParamsError(f"RLHF_PROCESSES is {given!r}; give the number of processes of a stage, 1 or more")
    each = len(devices) if "RLHF_LAUNCH" in os.environ else min(int(given), len(devices))
    return [",".join(devices[first : first + each]) for first in range(0, len(devices) - each + 1, each)]


def repair() -> None:
    """Set aside what a DVC that was killed in the middle of a word left behind: it would refuse to start."""
    from ruamel.yaml import YAML
    from ruamel.yaml.error import YAMLError

    for lock in (Path("dvc.lock"), Path("tuning/dvc.lock")):
        try:
            whole = not lock.exists() or isinstance(YAML(typ="safe").load(lock.read_text()), dict)
        except YAMLError:
            whole = False
        if not whole:
            lock.replace(f"{lock}.damaged")
            print(
                f"{lock} was cut off and is now {lock}.damaged; what was finished comes back from DVC's cache",
                file=sys.stderr,
            )
    busy = Path(".dvc/tmp/rwlock")
    if not busy.exists():
        return
    try:
        said = json.loads(busy.read_text())
        readers = [reader for several in said.get("read", {}).values() for reader in several]
        holders = [holder["pid"] for holder in (*said.get("write", {}).values(), *readers)]
    except (json.JSONDecodeError, KeyError, TypeError, AttributeError):
        busy.unlink()
        return
    # Whom it does not find, DVC forgets by itself; a zombie it waits for, and containers may not bury them.
    if any(_is_zombie(pid) for pid in holders) and not any(_works(pid) for pid in holders):
        busy.unlink()


def _works(pid: int) -> bool:
    """Whether a process is there, and no zombie."""
    import psutil

    return psutil.pid_exists(pid) and not _is_zombie(pid)


def _is_zombie(pid: int) -> bool:
    import psutil

    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def _say(what: Any) -> None:
    os.write(1, f"{time.strftime('%H:%M:%S')} {what}\n".encode())  # whole: others speak at the same time


def _duration(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 60 else f"{seconds // 60:.0f} min {seconds % 60:.0f} s"


if __name__ == "__main__":
    try:
        match sys.argv[1:]:
            case [file] if file.endswith(".yaml"):
                sys.exit(main(file))
            case ["waves"]:
                show_waves()
            case _:
                sys.exit(main())
    except UserError as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:  # while it looks at the graph, or in the tail
        print("\ninterrupted; `make repro` goes on from here", file=sys.stderr)
        sys.exit(128 + signal.SIGINT)
