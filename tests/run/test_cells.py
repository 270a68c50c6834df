"""Cells side by side, on a toy graph: order, failures, Ctrl-C, kill -9, GPUs; and what a killed DVC leaves is set aside."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from project import ENV, alive, inside, lock, run

from rlhf_vs_dpo.errors import ParamsError
from rlhf_vs_dpo.run import cells

STAGE = """
import os, sys, time
from pathlib import Path
from rlhf_vs_dpo.run import launch

def main(out: Path, seconds: float, status: int = 0) -> None:
    print("working on", out, flush=True)
    time.sleep(seconds)
    if status:
        sys.exit(f"{out} went wrong")
    out.write_text(f"{out} {os.environ.get('CUDA_VISIBLE_DEVICES')}")

if __name__ == "__main__":
    launch.command(main)
"""


def toy(folder: Path, seconds: float = 0.3, failing: str | None = None, between: str = "ab") -> Path:
    """start -> a, b, ... -> end, each of which takes some seconds."""
    folder.mkdir()
    (folder / "stage.py").write_text(STAGE)
    stages = {}
    for name, deps in {"start": [], **{name: ["start"] for name in between}, "end": list(between)}.items():
        status = 3 if name == failing else 0
        wait = 0.0 if name == failing else seconds
        stages[name] = {
            "cmd": f"exec {sys.executable} stage.py {name}.out {wait} --status {status}".removesuffix(" --status 0"),
            "deps": ["stage.py", *(f"{dep}.out" for dep in deps)],
            "outs": [f"{name}.out"],
        }
    (folder / "dvc.yaml").write_text(json.dumps({"stages": stages}))
    run(folder, "dvc", "init", "--no-scm", "--quiet")
    return folder


def start(folder: Path, **env: str) -> subprocess.Popen:
    """`make repro`, as on a machine with one GPU: there is no waiting for a process with libraries that no stage here needs."""
    env = {"CUDA_VISIBLE_DEVICES": "0"} | env
    return subprocess.Popen(
        [sys.executable, "-m", "rlhf_vs_dpo.run.cells"], cwd=folder, text=True, start_new_session=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=ENV | {"JOBS": "2"} | env,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),  # of a shell's background it is deaf
    )  # fmt: skip


def all_of(folder: Path, **env: str) -> tuple[int, str]:
    process = start(folder, **env)
    output, _ = process.communicate(timeout=120)
    return process.returncode, output


def until(what, seconds: float = 60.0) -> None:
    end = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.1)


def test_the_graph_in_waves_two_at_once_with_a_log_each(tmp_path):
    folder = toy(tmp_path / "toy", seconds=1.0, between="abcd")
    status, output = all_of(folder)
    assert status == 0 and "5 cells, 2 at once" in output, output
    lines = [line.split(maxsplit=2)[2] for line in output.splitlines() if "/5" in line]
    assert lines[:2] == ["start starts", lines[1]] and lines[1].startswith("start done, ")
    assert {lines[2], lines[3]} == {"a starts", "b starts"} and all(
        any(line.startswith(f"{n} done") for line in lines) for n in "abcd"
    )
    assert "working on a.out" in (folder / "logs" / "a.log").read_text() and "Running stage 'end'" in output
    assert "Everything is up to date" in all_of(folder)[1]
    (folder / "c.out").unlink()
    (folder / "d.out").unlink()
    output = all_of(folder)[1]
    assert "c brought back from the cache" in output and "a starts" not in output


def test_one_stage_after_another_is_a_lane_and_what_stands_alone_runs_beside_it(tmp_path):
    folder = toy(tmp_path / "toy")
    graph = json.loads((folder / "dvc.yaml").read_text())["stages"]
    add = {"before": [], "alone": [], "middle": ["end"], "last": ["middle"]}
    for name, deps in add.items():
        graph[name] = graph["a"] | {
            "deps": [f"{dep}.out" for dep in deps],
            "outs": [f"{name}.out"],
            "cmd": f"touch {name}.out",
        }
    graph["start"]["deps"].append("before.out")
    (folder / "dvc.yaml").write_text(json.dumps({"stages": graph}))
    with inside(folder):
        waves, tail, needs = cells.plan()
        assert waves == [[["before", "start"], ["alone"]], [["a"], ["b"]]]
        assert tail == ["end", "middle", "last"]
        assert needs["a"] == {"start", "before"} and needs["alone"] == set() and len(needs["last"]) == 6
    status, output = all_of(folder)
    assert status == 0 and "5 cells, 2 at once" in output, output
    with inside(folder):
        assert cells.plan() == ([], [], {})
        (folder / "alone.out").unlink()
        assert cells.plan()[:2] == ([], ["alone"])  # a single stage runs before one's eyes
        (folder / "last.out").unlink()
        assert cells.plan()[:2] == ([[["alone"], ["last"]]], [])


def test_a_stage_starts_when_what_it_needs_is_done_and_first_what_most_wait_for(tmp_path):
    """start -> quick, slow; quick -> after, other; after -> last, more: none of them waits for slow, and `after` comes before `other`."""
    folder = toy(tmp_path / "toy")
    like = json.loads((folder / "dvc.yaml").read_text())["stages"]["a"]
    seconds = {"start": 0.0, "slow": 15.0}
    deps = {"start": [], "quick": ["start"], "slow": ["start"], "other": ["quick"], "after": ["quick"], "last": ["after"], "more": ["after"]}  # fmt: skip
    deps["end"] = ["slow", "other", "last", "more"]
    stages = {
        name: like
        | {"cmd": f"exec {sys.executable} stage.py {name}.out {seconds.get(name, 0.1)}"}
        | {"deps": ["stage.py", *(f"{dep}.out" for dep in needed)], "outs": [f"{name}.out"]}
        for name, needed in deps.items()
    }
    (folder / "dvc.yaml").write_text(json.dumps({"stages": stages}))
    status, output = all_of(folder)
    assert status == 0, output
    began = [line.split()[2] for line in output.splitlines() if line.endswith(" starts")]
    assert began[0] == "start" and set(began[1:3]) == {"quick", "slow"}
    assert began[3:] == ["after", "other", "last", "more"]
    assert output.index("more done") < output.index("slow done")
    assert [line.split()[1] for line in output.splitlines() if line.endswith(" starts")] == [
        f"{n}/7" for n in range(1, 8)
    ]


def test_a_failure_starts_nothing_new_finishes_what_runs_and_is_shown_last(tmp_path):
    folder = toy(tmp_path / "toy", seconds=4.0, failing="a", between="abcd")
    status, output = all_of(folder)
    assert status not in (0, None)
    assert "a FAILED" in output and "b done" in output and "c starts" not in output and "d starts" not in output
    assert (
        output.rindex("The end of logs/a.log") > output.rindex("b done")
        and "a.out went wrong" in output.split("The end of")[1]
    )
    toy_again = json.loads((folder / "dvc.yaml").read_text())
    toy_again["stages"]["a"]["cmd"] = toy_again["stages"]["a"]["cmd"].removesuffix(" --status 3")
    (folder / "dvc.yaml").write_text(json.dumps(toy_again))
    status, output = all_of(folder)
    assert status == 0 and "b starts" not in output and (folder / "end.out").exists()


@pytest.mark.parametrize(
    "victim", ["Ctrl-C", "stage", *(pytest.param(of, marks=pytest.mark.slow) for of in ("main", "make", "dvc"))]
)
def test_nothing_runs_on_and_nothing_is_lost_when_something_is_killed(tmp_path, victim):
    folder = toy(tmp_path / "toy", seconds=4.0)
    for name in ("start", "b"):
        (folder / "dvc.yaml").write_text(
            (folder / "dvc.yaml").read_text().replace(f"{name}.out 4.0", f"{name}.out 0.1")
        )
    (folder / "Makefile").write_text(f"repro:\n\t@{sys.executable} -m rlhf_vs_dpo.run.cells\n")
    process = subprocess.Popen(
        ["make"] if victim == "make" else [sys.executable, "-m", "rlhf_vs_dpo.run.cells"], cwd=folder, text=True,
        start_new_session=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        env=ENV | {"JOBS": "2", "SHELL": "/bin/sh"},  # which stays, as a parent of the stage, unless told to `exec`
    )  # fmt: skip
    until(lambda: (folder / "logs" / "a.log").exists() and "working on" in (folder / "logs" / "a.log").read_text())

    def of(words: str) -> int:
        return next(
            p.pid
            for p in alive(folder)
            if words in " ".join(p.cmdline()) and "rlhf_vs_dpo.run.cells" not in " ".join(p.cmdline())
        )

    match victim:
        case "Ctrl-C":
            os.killpg(process.pid, signal.SIGINT)
        case "main" | "make":
            os.kill(process.pid, signal.SIGKILL)
        case "dvc":
            os.kill(of("--single-item a"), signal.SIGKILL)
        case "stage":
            os.kill(of("stage.py a.out"), signal.SIGKILL)
    said, _ = process.communicate(timeout=60)
    assert process.returncode != 0
    if victim == "Ctrl-C":  # nothing failed
        assert "a interrupted after" in said and "FAILED" not in said and "`make repro` goes on from here" in said
    until(lambda: not alive(folder), 20)
    assert not (folder / "a.out").exists() and not (folder / "end.out").exists()
    status, output = all_of(folder)
    assert status == 0 and (folder / "end.out").exists(), output
    assert "start starts" not in output


def test_after_an_early_ctrl_c_nothing_starts(tmp_path):
    process = start(toy(tmp_path / "toy", seconds=5.0))
    assert "3 cells" in process.stdout.readline()
    os.killpg(process.pid, signal.SIGINT)
    said, _ = process.communicate(timeout=60)
    assert process.returncode == 130 and " done" not in said and "a starts" not in said, said
    until(lambda: not alive(tmp_path / "toy"), 20)


def test_when_nobody_reads_any_more_it_ends(tmp_path):
    process = start(toy(tmp_path / "toy"))
    process.stdout.readline()
    process.stdout.close()  # `make repro | head -1`
    assert process.wait(60) != 0
    until(lambda: not alive(tmp_path / "toy"), 20)


def test_with_several_gpus_each_cell_has_one(tmp_path):
    folder = toy(tmp_path / "toy")
    assert all_of(folder, CUDA_VISIBLE_DEVICES="4,5")[0] == 0
    seen = {name: (folder / f"{name}.out").read_text().split()[1] for name in ("start", "a", "b")}
    assert {seen["a"], seen["b"]} == {"4", "5"} and seen["start"] == "4,5"
    other = toy(tmp_path / "other")
    assert all_of(other, CUDA_VISIBLE_DEVICES="4,5", RLHF_PROCESSES="2")[0] == 0
    assert {(other / f"{name}.out").read_text().split()[1] for name in "ab"} == {"4,5"}


@pytest.mark.parametrize(
    ("processes", "expected"),
    [(None, ["a", "b", "c", "d", "e"]), ("1", ["a", "b", "c", "d", "e"]), ("2", ["a,b", "c,d"]), ("8", ["a,b,c,d,e"])],
)
def test_a_cell_has_as_many_gpus_as_processes(processes, expected, monkeypatch):
    monkeypatch.delenv("RLHF_PROCESSES", raising=False)
    if processes is not None:
        monkeypatch.setenv("RLHF_PROCESSES", processes)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "a,b,c,d,e")
    monkeypatch.delenv("JOBS", raising=False)
    assert cells.shares(cells.gpus()) == expected and cells.how_many() == len(expected)
    assert cells.shares([]) == []
    monkeypatch.setenv("RLHF_LAUNCH", "a launcher of its own")
    assert cells.shares(cells.gpus()) == ["a,b,c,d,e"]
    monkeypatch.delenv("RLHF_LAUNCH")
    monkeypatch.setenv("RLHF_PROCESSES", "two")
    with pytest.raises(ParamsError, match="RLHF_PROCESSES is 'two'"):
        cells.how_many()


def test_two_processes_of_each_of_two_cells_share_no_gpu(tmp_path):
    folder = toy(tmp_path / "toy")
    assert all_of(folder, CUDA_VISIBLE_DEVICES="4,5,6,7", RLHF_PROCESSES="2")[0] == 0
    assert {(folder / f"{name}.out").read_text().split()[1] for name in "ab"} == {"4,5", "6,7"}


def test_what_stands_alone_takes_no_gpu_from_the_stages_before_the_first_wave(tmp_path, monkeypatch):
    folder = toy(tmp_path / "toy")
    graph = json.loads((folder / "dvc.yaml").read_text())["stages"]
    graph["alone"] = graph["a"] | {"deps": [], "outs": ["alone.out"], "cmd": "touch alone.out"}
    (folder / "dvc.yaml").write_text(json.dumps({"stages": graph}))
    for visible, waves in (
        ("4,5", [[["start"]], [["a"], ["b"], ["alone"]]]),
        ("4", [[["start"], ["alone"]], [["a"], ["b"]]]),
    ):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
        with inside(folder):
            assert cells.plan()[:2] == (waves, ["end"])
    assert all_of(folder, CUDA_VISIBLE_DEVICES="4,5")[0] == 0
    assert (folder / "start.out").read_text().split()[1] == "4,5"


def test_how_many_at_once(monkeypatch):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.delenv("RLHF_PROCESSES", raising=False)
    monkeypatch.setattr(cells, "gpus", lambda: [])
    monkeypatch.setenv("JOBS", "7")
    assert cells.how_many() == 7
    for wrong in ("0", "two", "-1"):
        monkeypatch.setenv("JOBS", wrong)
        with pytest.raises(ParamsError, match="JOBS"):
            cells.how_many()
    monkeypatch.delenv("JOBS")
    assert 1 <= cells.how_many() <= len(os.sched_getaffinity(0))
    monkeypatch.setattr(cells, "gpus", lambda: ["0", "1", "2"])
    assert cells.how_many() == 3


def test_gpus_are_those_that_may_be_seen(monkeypatch):
    for given, expected in (("4,5", ["4", "5"]), ("", []), ("-1", []), ("GPU-8f3a, 1", ["GPU-8f3a", "1"])):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", given)
        assert cells.gpus() == expected


def test_a_machine_without_a_driver_has_no_gpus(monkeypatch):
    import pynvml

    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(pynvml, "nvmlInit", lambda: None)
    monkeypatch.setattr(pynvml, "nvmlDeviceGetCount", lambda: 3)
    assert cells.gpus() == ["0", "1", "2"]

    def none():
        raise pynvml.NVMLError(pynvml.NVML_ERROR_LIBRARY_NOT_FOUND)

    monkeypatch.setattr(pynvml, "nvmlInit", none)
    assert cells.gpus() == []


def test_a_lock_of_somebody_who_may_be_at_work_elsewhere_is_left_to_dvc(tmp_path, monkeypatch):
    """Of another node of a cluster, say. DVC forgets a process that it does not find; a zombie it would wait for."""
    monkeypatch.chdir(tmp_path)
    busy = tmp_path / ".dvc" / "tmp" / "rwlock"
    busy.parent.mkdir(parents=True)
    child = subprocess.Popen([sys.executable, "-c", ""])
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)  # it has ended, and nobody has buried it
    (tmp_path / "tuning").mkdir()
    for holder, left in ((os.getpid(), True), (2**22 + 1, True), (child.pid, False)):
        busy.write_text(json.dumps({"write": {"models/a": {"pid": holder, "cmd": "dvc"}}}))
        cells.repair()
        assert busy.exists() == left, holder
    child.wait()
    for name in ("dvc.lock", "tuning/dvc.lock"):
        (tmp_path / name).write_text("stages:\n  - {")
    cells.repair()
    assert {path.name for path in tmp_path.glob("**/*damaged")} == {"dvc.lock.damaged"}
    assert (tmp_path / "tuning" / "dvc.lock.damaged").exists() and not (tmp_path / "tuning" / "dvc.lock").exists()


def test_what_was_cut_off_is_set_aside(tmp_path):
    folder = toy(tmp_path / "toy")
    assert all_of(folder)[0] == 0
    before = lock(folder)
    text = (folder / "dvc.lock").read_text()
    (folder / "dvc.lock").write_text(text[: len(text) // 2] + "\n  - {")
    (folder / ".dvc" / "tmp" / "rwlock").write_text('{"write": {')
    status, output = all_of(folder)
    assert status == 0 and "dvc.lock.damaged" in output and "brought back from the cache" in output
    assert lock(folder) == before
