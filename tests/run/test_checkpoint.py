"""Checkpoints by themselves: what counts as the same work, what is damaged, SIGTERM, and what of PyTorch's state comes back."""

import json
import os
import signal
import subprocess
import sys
import threading
import time

import numpy as np
import pandas as pd
import pytest
import torch

from rlhf_vs_dpo.run import checkpoint
from rlhf_vs_dpo.run.checkpoint import OnDisk, Values, of_stage


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("DVC_ROOT", raising=False)
    monkeypatch.delenv("DVC_STAGE", raising=False)
    monkeypatch.setattr(checkpoint, "PATIENCE", 0.2)
    for path, text in {"src/rlhf_vs_dpo/a.py": "1", "stages/x.py": "1", "given": "1"}.items():
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text(text)
    return tmp_path


def opened(params=None, **kwargs) -> OnDisk:
    given = {
        "stage": "x",
        "params": params or {"rl": {"lr": 1.0}},
        "inputs": ["given"],
        "minutes": 0.0,
        "run": "b",
        "trial": None,
    }
    from pathlib import Path

    given |= kwargs
    return of_stage(**(given | {"inputs": [Path(name) for name in given["inputs"]]}))


def counted(steps: int, params=None, **kwargs) -> Values:
    """A loop of so many steps more, broken off; what it has counted."""
    kept, at = opened(params, **kwargs), Values(step=0)
    kept.keep(at=at)
    for _ in range(steps):
        at.step += 1
        kept.offer()
    kept.close()
    return at


def test_a_loop_goes_on_where_it_was(here):
    assert counted(3).step == 3 and counted(2).step == 5 and counted(0).step == 5
    kept = opened()
    (own,) = kept.folder.parent.glob("*/")
    assert len([path for path in own.iterdir() if path.name.isdigit()]) == 2  # the last two
    assert kept.runs == ["b"] * 4  # of three attempts before, each of which said so in its checkpoints, and this one
    kept.done()
    assert not checkpoint.folder().joinpath("x").exists() and counted(1).step == 1


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda here: {"params": {"rl": {"lr": 2.0}}}, "it is of other parameters (rl.lr)"),
        (lambda here: (here / "given").write_text("2") and {}, "it is of other inputs (given)"),
        (lambda here: (here / "src/rlhf_vs_dpo/a.py").write_text("2") and {}, "it is of other code (src/rlhf_vs_dpo/a.py)"),
    ],
)  # fmt: skip
def test_what_is_of_other_work_is_set_aside_with_the_reason(here, change, said, capfd):
    counted(3)
    other = change(here) or {}
    assert counted(1, **other).step == 1
    err = capfd.readouterr().err
    assert err.count("\n") == 2 and said in err, err
    (here / "given").write_text("1")
    (here / "src/rlhf_vs_dpo/a.py").write_text("1")
    assert counted(1).step == 4  # back again, it is still there
    opened().done()
    assert not checkpoint.folder().joinpath("x").exists()


def test_what_two_processes_made_one_refuses(here, monkeypatch, capfd):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setattr(checkpoint, "_of_the_first", lambda own: own)
    counted(2)
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setattr(checkpoint, "_of_the_first", lambda own: "000002" if "WORLD_SIZE" in os.environ else own)
    assert counted(0).step == 2 and counted(3).step == 5 and counted(0).step == 2  # it reads, and does not write
    monkeypatch.delenv("WORLD_SIZE")
    monkeypatch.delenv("RANK")
    assert counted(0).step == 0
    assert "it was made with processes 2, and this is 1" in capfd.readouterr().err


def test_what_another_kind_of_device_made_is_set_aside(here, monkeypatch, capfd):
    counted(2)
    monkeypatch.setattr(checkpoint, "device", lambda: "a GPU")
    assert counted(1).step == 1
    assert "it was made with device CPU, and this is a GPU" in capfd.readouterr().err


TWO = """
import os, shutil, sys, torch
from pathlib import Path
sys.path.insert(0, {tests!r})
from test_checkpoint import opened
from rlhf_vs_dpo.run import checkpoint
from rlhf_vs_dpo.run.checkpoint import Values
checkpoint.PATIENCE = 0.2
if os.environ["RANK"] == "0":  # the other looks later, when a process that was asked to end has written one more
    find = checkpoint.OnDisk._find
    def early(self):
        found = find(self)
        shutil.copytree(found[0], found[0].with_name("000004"))
        return found
    checkpoint.OnDisk._find = early
kept, at = opened(), Values(step=0)
kept.keep(at=at)
Path("said-" + os.environ["RANK"]).write_text(f"step {{at.step}}")  # two processes that print to one place mix their lines
torch.distributed.barrier()
torch.distributed.destroy_process_group()
"""


@pytest.mark.parametrize("held", [False, True])
def test_two_processes_go_on_from_what_the_first_chose(here, held, monkeypatch):
    """Whatever each would find by itself: a process that was asked to end may write one more, or hold the lock until it has ended."""
    from pathlib import Path

    for name, value in {"WORLD_SIZE": "2", "RANK": "0"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(checkpoint, "_of_the_first", lambda own: own)
    counted(3)
    holding = opened() if held else None
    script = here / "two.py"
    script.write_text(TWO.format(tests=str(Path(__file__).parent)))
    env = {name: value for name, value in os.environ.items() if name not in ("WORLD_SIZE", "RANK")}
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--standalone", "--local-addr=127.0.0.1", str(script)],
        cwd=here, env=env | {"PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    assert [here.joinpath(f"said-{rank}").read_text() for rank in range(2)] == ["step 0" if held else "step 3"] * 2
    reason = "another process keeps its checkpoints there" if held else f"going on from {checkpoint.folder()}/x/"
    assert reason in done.stderr and "000004" not in done.stderr
    if holding is not None:
        holding.close()


def last(kept: OnDisk):
    return sorted(path for path in kept.folder.iterdir() if path.name.isdigit())[-1]


@pytest.mark.parametrize("name", ["state.json", "tensors.safetensors"])
@pytest.mark.parametrize("how", ["cut", "flipped", "gone", "empty"])
def test_a_damaged_checkpoint_is_set_aside_and_the_one_before_is_used(here, name, how, capfd):
    counted(5)
    path = last(opened()) / name
    whole = path.read_bytes()
    match how:
        case "cut":
            path.write_bytes(whole[: len(whole) // 2])
        case "flipped":
            path.write_bytes(whole[:-9] + bytes([whole[-9] ^ 1]) + whole[-8:])
        case "gone":
            path.unlink()
        case "empty":
            path.write_bytes(b"")
    capfd.readouterr()
    assert counted(1).step == 5  # the fourth, and one more
    assert "a checkpoint is set aside: it is damaged" in capfd.readouterr().err


def test_a_damaged_piece_makes_its_checkpoint_damaged(here, capfd):
    kept = opened()
    pieces = kept.pieces("some work")
    pieces.append([[1, 2], [3]])
    pieces.append({"a": float("nan"), "b": [0.1]})
    kept.close()
    again = opened()
    assert len(again.pieces("some work")) == 2 and again.pieces("some work")[0] == [[1, 2], [3]]
    assert [entry["b"] for entry in list(again.pieces("some work"))[1:]] == [[0.1]]
    again.close()
    (file,) = again.folder.rglob("some work/000001.json")
    file.write_text(file.read_text()[:-1])
    third = opened()
    assert len(third.pieces("some work")) == 1  # that of the checkpoint before
    assert "piece 1 of some work is not what was written" in capfd.readouterr().err


def test_values_tables_and_tensors_come_back_as_they_were(here):
    shared = torch.randn(3, 4)
    table = pd.DataFrame(
        {
            "text": ["a", "b\u2028\U0001f600"], "ids": [[1, 2], []], "number": [1, 2], "share": [0.1, float("nan")], "flag": [True, False],
            "nothing": [None, None],
        }
    )  # fmt: skip
    rng = np.random.default_rng(3)
    rng.random(5)
    state = {
        "weights": {"a.b": shared, "tied": shared, "half": torch.randn(2).to(torch.bfloat16), "none": torch.empty(0)},
        "tables": [table], "rng": rng.bit_generator.state, "float": 0.1 + 0.2, "numpy": np.float32(0.1), "count": np.int64(7), "none": None,
        "view": torch.arange(12.0).view(3, 4).T,
    }  # fmt: skip
    kept = opened()
    kept.keep(part=Values(**state))
    kept.save()
    kept.close()
    found = Values()
    opened().keep(part=found)
    for name, tensor in state["weights"].items():
        assert torch.equal(found.weights[name], tensor) and found.weights[name].dtype == tensor.dtype
    assert torch.equal(found.view, state["view"])
    pd.testing.assert_frame_equal(found.tables[0], table)
    again = np.random.default_rng()
    again.bit_generator.state = found.rng
    assert again.random() == rng.random()
    assert found.float == 0.1 + 0.2 and found.numpy == np.float32(0.1) and found.count == 7 and found.none is None


def test_nothing_is_kept_where_minutes_is_null_and_nothing_is_written_before_its_time(here):
    counted(3, minutes=None)
    assert not checkpoint.folder().exists()
    counted(3, minutes=1.0)
    assert not list(checkpoint.folder().rglob("state.json")) and counted(0).step == 0


def test_of_two_that_do_the_same_work_at_once_one_keeps_checkpoints(here, capfd):
    first = opened()
    second, at = opened(), Values(step=0)
    second.keep(at=at)
    second.offer()
    second.save()  # as a search does behind each trial
    assert not list(checkpoint.folder().rglob("state.json"))
    assert "another process keeps its checkpoints there" in capfd.readouterr().err
    second.done()
    first.save()
    assert first.folder.exists()
    first.done()
    assert not checkpoint.folder().joinpath("x").exists()


def test_a_disk_that_is_full_keeps_the_checkpoint_before(here, monkeypatch):
    from rlhf_vs_dpo.errors import DiskError

    counted(2)
    kept, at = opened(), Values(step=0)
    kept.keep(at=at)

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("safetensors.torch.save_file", full)
    at.step = 9
    with pytest.raises(DiskError, match="the disk is full"):
        kept.offer()
    kept.close()
    assert counted(0).step == 2 and not list(checkpoint.folder().rglob("*.tmp"))


LOOP = """
import sys, time
from pathlib import Path
from rlhf_vs_dpo.run.checkpoint import Values, of_stage
kept, at = of_stage("x", {}, [], 60.0, "a", None), Values(step=0)
with kept.listening():
    with kept.during(at=at):
        print("ready", at.step, flush=True)
        for step in range(at.step, 1000):
            for _ in range(20):
                time.sleep(0.01)  # the step: what is asked for in the middle of it waits for its end
            at.step = step + 1
            print(at.step, flush=True)
            kept.offer()
"""


@pytest.mark.parametrize("told", [1, 2])  # by whoever ends it, and once more by the end of DVC
def test_sigterm_ends_a_loop_behind_its_step_with_a_checkpoint(here, told):
    def start():
        process = subprocess.Popen(
            [sys.executable, "-c", LOOP], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=os.environ
        )
        return process, process.stdout.readline().split()

    process, said = start()
    assert said == ["ready", "0"]
    for _ in range(3):
        steps = int(process.stdout.readline())
    for _ in range(told):
        process.send_signal(signal.SIGTERM)
        time.sleep(0.02)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGTERM and "ended by SIGTERM" in err, err
    steps = int(out.split()[-1]) if out.split() else steps
    process, said = start()
    assert said == ["ready", str(steps)]  # no step is lost, and none is done twice
    process.kill()
    process.communicate()


def test_json_of_a_state_is_plain(here):
    """No pickle: what is not a tensor is JSON, and what cannot be told is refused."""
    kept = opened()
    kept.keep(part=Values(a=1, t=torch.zeros(2)))
    kept.save()
    lines = (last(kept) / "state.json").read_text().splitlines()
    assert len(lines) == 3 and json.loads(lines[2])["parts"]["part"] == {"a": 1, "t": {"$tensor": "0"}}
    assert {path.name for path in last(kept).iterdir()} == {"state.json", "tensors.safetensors"}
    kept.keep(part=Values(a=object()))
    with pytest.raises(TypeError, match="cannot hold a object"):
        kept.save()


def test_who_waits_for_another_is_not_disturbed_when_that_one_is_done(here, monkeypatch):
    """Two workers of a queue that were given the same work: the first removes its folder while the second waits, and looks."""
    monkeypatch.setattr(checkpoint, "PATIENCE", 20.0)
    first, second = opened(), []
    first.save()
    waiting = threading.Thread(target=lambda: second.append(opened()))
    waiting.start()
    time.sleep(0.5)
    assert not second
    first.done()
    waiting.join()
    assert second[0].writes and not second[0].found
    third = []
    waiting = threading.Thread(target=lambda: third.append(opened()))
    waiting.start()
    second[0].save()
    second[0].done()
    waiting.join()
    assert third[0].writes
    third[0].save()
    third[0].done()
    assert not checkpoint.folder().joinpath("x").exists()
