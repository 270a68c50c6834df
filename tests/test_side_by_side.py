"""`make repro` on the real graph: the bytes of one process, of DVC alone, and of cells side by side; lines; what is killed."""

import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from project import ENV, alive, change, copy_project, inside, lock, planned, ran, run

from rlhf_vs_dpo.run import cells

pytestmark = pytest.mark.pipeline
OF_THE_RUN = re.compile(r"runs(/.*)?|evaluation/machine\.json|report/run\.(html|md)")  # seconds, memory, run ids


def small(folder: Path) -> Path:
    """The smoke graph with one method: enough for waves, for its trunk has cells side by side, and for a comparison."""
    copy_project(folder, "smoke")
    change(folder, "policies", {"rl": [], "preference": ["dpo"], "imitation": [], "best_of_n": [4]})
    return folder


def bytes_of(folder: Path) -> dict[str, str]:
    """Hashes of all that stages read and wrote, without what is of the run."""
    return {
        path["path"]: path["md5"]
        for stage in lock(folder).values()
        for path in [*stage.get("deps", []), *stage.get("outs", [])]
        if not OF_THE_RUN.fullmatch(path["path"])
    }


def side_by_side(folder: Path, **env: str) -> str:
    return run(folder, sys.executable, "-m", "rlhf_vs_dpo.run.cells", **env)


def started(output: str) -> set[str]:
    return {line.split()[2] for line in output.splitlines() if line.endswith(" starts")} | set(ran(output))


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    folder = small(tmp_path_factory.mktemp("small") / "project")
    side_by_side(folder, JOBS="2")
    return folder


def test_cells_side_by_side_run_all_and_leave_dvc_nothing_to_do(made):
    assert len(bytes_of(made)) > 50 and ran(run(made, "dvc", "repro")) == []
    assert not list(made.rglob("*.tmp"))


@pytest.mark.slow
def test_cells_side_by_side_give_the_bytes_of_one_process(made, tmp_path):
    alone = small(tmp_path / "alone")
    run(alone, sys.executable, Path(__file__).parent / "project.py", str(alone), PYTHONPATH=str(Path(__file__).parent))
    assert bytes_of(made) == bytes_of(alone)


def test_a_second_seed_is_a_line_of_its_own(made):
    before = (made / "params.yaml").read_text()
    change(made, "seeds", [0, 1])
    with inside(made, **ENV):
        assert cells.checked() == 0
        new = planned()
        (made / "params.yaml").write_text(before)
        assert cells.checked() == 0 and not planned()
    line = {"sft@1", "preferences@1", "reward@1", "reference@1", "pool@1", "sample_sft@1"}
    assert new == line | {"preference@dpo-1", "sample_preference@dpo-1", "judge", "evaluate", "report"}


@pytest.mark.slow
def test_dvc_alone_on_one_core_gives_the_bytes_of_cells_side_by_side(made, tmp_path):
    alone = small(tmp_path / "alone")
    asked = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "3", "ATEN_CPU_CAPABILITY": "default", "MKL_CBWR": "COMPATIBLE"}
    run(alone, "taskset", "-c", str(min(os.sched_getaffinity(0))), "dvc", "repro", **asked)
    assert bytes_of(alone) == bytes_of(made)


@pytest.mark.slow
def test_fifty_reruns_of_a_training_stage_under_changing_load_give_one_hash(made):
    before = bytes_of(made)
    rng = random.Random(0)
    for _ in range(50):
        loads = [
            subprocess.Popen(
                [sys.executable, "-c", "import time\nend = time.time() + 60\nwhile time.time() < end: pass"]
            )
            for _ in range(rng.randrange(4))
        ]
        try:
            run(made, "dvc", "repro", "--single-item", "--force", "--no-run-cache", "reward@0")
        finally:
            for load in loads:
                load.kill()
                load.wait()
        assert bytes_of(made) == before


@pytest.mark.slow
def test_whatever_is_killed_the_next_run_ends_with_the_same_bytes(made, tmp_path):
    """SIGINT to all, SIGKILL to make, to a DVC, to a stage, after random times from the first second on; then to the end."""
    folder = small(tmp_path / "killed")
    rng = random.Random(int(os.environ.get("RLHF_TEST_SEED", 0)))

    for number, victim in enumerate(["make", "Ctrl-C", "dvc", "stage"] * 3):
        process = subprocess.Popen(
            [sys.executable, "-m", "rlhf_vs_dpo.run.cells"], cwd=folder, env=ENV | {"JOBS": "2"}, start_new_session=True,
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        time.sleep(rng.uniform(0.5, 5.0) if number < 4 else rng.uniform(5.0, 25.0))
        words = {"dvc": "dvc --wait-for-lock", "stage": "stages/"}.get(victim)
        if victim == "Ctrl-C":
            os.killpg(process.pid, signal.SIGINT)
        elif words is None:
            process.kill()
        else:
            for one in alive(folder):
                try:
                    if words in " ".join(one.cmdline()):
                        one.kill()
                        break
                except psutil.NoSuchProcess:
                    continue
        if victim in ("make", "Ctrl-C"):
            process.wait(60)
        else:
            process.wait(900)  # where nothing was there to be killed, it runs to its end
        end = time.monotonic() + 30
        while alive(folder):
            assert time.monotonic() < end, [p.cmdline() for p in alive(folder)]
            time.sleep(0.2)
    side_by_side(folder, JOBS="2")
    assert bytes_of(folder) == bytes_of(made)
    side_by_side(folder, JOBS="2")
    assert not [path for path in folder.rglob("*.tmp") if ".dvc" not in path.parts]
