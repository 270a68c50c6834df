"""`make repro`: the whole graph, with cells that do not depend on each other side by side.

DVC says what depends on what and what has changed; its locks let several `dvc repro` work in one folder; `xargs -P` starts
them. A stage starts as soon as what it needs is done, and first come those on which most others wait; the first stages, which have no
other beside them, are one lane, and what stands alone runs beside it. A line says when a cell starts and ends; what it prints goes
to logs/<cell>.log. After a failure nothing new starts, what runs is finished, and the first failure is shown last. `dvc repro` alone
does the same work one stage after another, and gives the same bytes.

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
FIRST_FAILURE = Path(".dvc/tmp/rlhf-first-failure.json")
SHOWN = 30  # lines of a failed cell's log
ENDED = "RLHF_ENDED"  # where a lane says that it has ended: the number of an open file


def main(file: str = "dvc.yaml") -> int:
    """Bring all stages of a file up to date, and what they need; returns the exit status of the first cell that failed, or 0."""
    end_with_parent()
    repair()
    jobs, devices = how_many(), gpus()
    if status := checked():
        return status
    todo = plan(file)  # before anything is removed: it refuses where another run is at work
    FIRST_FAILURE.parent.mkdir(parents=True, exist_ok=True)
    FIRST_FAILURE.unlink(missing_ok=True)
    shutil.rmtree(LOGS, ignore_errors=True)
    LOGS.mkdir()
    if not todo.waves and not todo.tail:
        print("Everything is up to date.")
        return 0
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
    for lanes in (first, todo.waves[len(first) :]):
        if status := side_by_side(
            list(itertools.chain(*lanes)), todo.needs, jobs, devices, lambda: f"{next(number)}/{total}"
        ):
            return status
    if not todo.tail:
        return 0
    command = ["dvc", "--wait-for-lock", "repro", "--single-item", *todo.tail]
    return subprocess.run(command, check=False, preexec_fn=end_with_parent).returncode


def side_by_side(
    lanes: list[list[str]], needs: dict[str, set[str]], jobs: int, devices: list[str], number: Callable[[], str]
) -> int:
    """Run lanes of cells, `jobs` at once, each when what its cells need of other lanes is done, and first those on which most others wait.

    `number` is said before a cell. Returns 0, or the exit status of the first that failed, having shown it.
    """
    if not lanes:
        return 0
    command = ["xargs", "-P", str(jobs), "-I", "{}"]
    environment = dict(os.environ)
    if len(devices) > 1 and len(lanes) > 1:
        command.append("--process-slot-var=RLHF_SLOT")  # which of the `jobs` a cell is: 0, 1, ...
        environment["RLHF_GPUS"] = " ".join(shares(devices))
    here = set(itertools.chain(*lanes))
    waiting_for = {lane[-1]: sum(lane[-1] in below for below in needs.values()) for lane in lanes}
    lanes = sorted(lanes, key=lambda lane: -waiting_for[lane[-1]])  # those of one number stay in the order of dvc.yaml
    interrupted = []
    # Ctrl-C reaches every process. The cells end by it; xargs, and this, wait for them.
    before = signal.signal(signal.SIGINT, lambda *_: interrupted.append(True))
    hear, tell = os.pipe()  # a lane that has ended says so
    environment[ENDED] = str(tell)
    try:
        running = subprocess.Popen(
            [*command, sys.executable, "-m", "rlhf_vs_dpo.run.cells", "{}"],
            stdin=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment, pass_fds=[tell],
            preexec_fn=_deaf_and_tied,
        )  # fmt: skip
        os.close(tell)
        assert running.stdin is not None  # a pipe
        with open(hear) as ended:
            with contextlib.suppress(BrokenPipeError):  # xargs ends when a cell is killed
                free = jobs
                while lanes:
                    ready = [lane for lane in lanes if not any(needs[cell] & here - {*lane} for cell in lane)][:free]
                    for lane in ready:
                        lanes.remove(lane)
                        print(*(f"{number()} {cell}" for cell in lane), file=running.stdin, flush=True)
                    free -= len(ready)
                    status, *cells = ended.readline().split() or ["killed"]
                    if status != "0":
                        break
                    here -= {*cells}
                    free += 1
            _, complaint = running.communicate()
    finally:
        signal.signal(signal.SIGINT, before)
    if interrupted:
        print("\ninterrupted; `make repro` goes on from here", file=sys.stderr)
        return 128 + signal.SIGINT
    if running.returncode == 0:
        return 0
    if not FIRST_FAILURE.exists():
        print(f"{complaint}\nerror: the cells were killed; `make repro` goes on from here", file=sys.stderr)
        return 1
    failure = json.loads(FIRST_FAILURE.read_text())
    log = _log(failure["cell"])
    tail = log.read_text(errors="replace").replace("\r", "\n").splitlines()[-SHOWN:]
    print(
        f"\n{failure['cell']} failed. The end of {log}:\n", *(f"  {line}" for line in tail), sep="\n", file=sys.stderr
    )
    if failure["starved"]:
        print(f"\nThe kernel has killed a process because memory ran out; {shortage.ADVICE}.", file=sys.stderr)
    print("\n`make repro` goes on from here.", file=sys.stderr)
    return failure["status"]


def one_after_another(cells: str) -> int:
    """Run cells one after another; called by xargs with `1/40 data 2/40 base`."""
    end_with_parent()
    told, words = os.environ.pop(ENDED, None), cells.split()
    status = next((1 for number, name in zip(words[::2], words[1::2], strict=True) if one(number, name)), 0)
    if told is not None:
        os.write(int(told), " ".join([str(status), *words[1::2]]).encode() + b"\n")
    return status


def one(number: str, name: str) -> int:
    """Run one cell, its output into its log."""
    if FIRST_FAILURE.exists():  # nothing new is started
        return 1
    environment = dict(os.environ)
    if "RLHF_GPUS" in environment and "RLHF_SLOT" in environment:
        of = environment["RLHF_GPUS"].split()
        environment["CUDA_VISIBLE_DEVICES"] = of[int(environment["RLHF_SLOT"]) % len(of)]
    log, started, killed_before = _log(name), time.monotonic(), shortage.kills()
    interrupted: list[bool] = []
    signal.signal(signal.SIGINT, lambda *_: interrupted.append(True))  # Ctrl-C ends DVC; this waits for it, and says so
    _say(f"{number:>7}  {name} starts")
    with log.open("w") as output:
        status = subprocess.run(
            ["dvc", "--wait-for-lock", "repro", "--single-item", name],
            stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT, env=environment, check=False,
            preexec_fn=_listening_and_tied,
        ).returncode  # fmt: skip
    took = _duration(time.monotonic() - started)
    if status == 0:
        said = log.read_text(errors="replace")
        how = (
            "done" if "Running stage" in said else "brought back from the cache" if "is cached" in said else "unchanged"
        )
        _say(f"{number:>7}  {name} {how}, {took}")
        return 0
    _say(f"{number:>7}  {name} {'interrupted' if interrupted else 'FAILED'} after {took}")
    try:
        with FIRST_FAILURE.open("x") as file:
            starved = "exited with -9" in log.read_text(errors="replace") and shortage.kills() > killed_before
            json.dump({"cell": name, "status": status if 0 < status < 256 else 1, "starved": starved}, file)
    except FileExistsError:
        pass
    return 1


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


def _deaf_and_tied() -> None:
    """Before xargs starts: it must outlive Ctrl-C, and end with this process."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    end_with_parent()


def _listening_and_tied() -> None:
    """Before DVC starts: it hears Ctrl-C again, and ends with this process."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    end_with_parent()


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
            case [cells]:
                sys.exit(one_after_another(cells))
            case _:
                sys.exit(main())
    except UserError as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:  # while it looks at the graph, or in the tail
        print("\ninterrupted; `make repro` goes on from here", file=sys.stderr)
        sys.exit(128 + signal.SIGINT)
