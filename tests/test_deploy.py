"""deploy/ with stand-ins for Slurm on one machine: two nodes train one cell, an array of cells ends in one dvc.lock."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT
from project import ENV, change, copy_project, lock, run
from ruamel.yaml import YAML

from rlhf_vs_dpo.run import cells

SLURM = ROOT / "deploy" / "slurm"

SBATCH = r"""#!/usr/bin/env python3
import os, re, subprocess, sys
options, rest = {}, sys.argv[1:]
while rest[0].startswith("--"):
    name, _, value = rest.pop(0)[2:].partition("=")
    options[name] = value
script, *arguments = rest
for line in open(script):
    if found := re.match(r"#SBATCH --([\w-]+)=?(.*)", line):
        options.setdefault(found[1], found[2])
job = int(open("jobs").read()) + 1 if os.path.exists("jobs") else 41
open("jobs", "w").write(str(job))
if "dependency" in options:  # what came before has ended: here sbatch returns when its job has
    kind, _, before = options["dependency"].partition(":")
    assert kind == "afterok" and os.path.exists(f"done-{before}"), options
low, _, high = options.get("array", "0-0").partition("-")
running = []
for index in range(int(low), int(high or low) + 1):
    of = {"SLURM_JOB_ID": str(job), "SLURM_ARRAY_TASK_ID": str(index), "SLURM_NNODES": options.get("nodes", "1"), "SLURM_JOB_NODELIST": "here"}
    log = open(f"logs/slurm-{job}-{index}.log", "w")
    running.append(subprocess.Popen(["bash", script, *arguments], env=os.environ | of, stdout=log, stderr=log))
status = max(process.wait() for process in running)
if status == 0:
    open(f"done-{job}", "w").close()
print(job if "parsable" in options else f"Submitted batch job {job}")
sys.exit(status)
"""
SRUN = r"""#!/usr/bin/env python3
import os, subprocess, sys
rest, nodes = sys.argv[1:], int(os.environ["SLURM_NNODES"])
while rest[0].startswith("--"):
    if rest.pop(0) == "--ntasks=1":
        nodes = 1
running = [subprocess.Popen(rest, env=os.environ | {"SLURM_NODEID": str(node), "SLURM_PROCID": str(node)}) for node in range(nodes)]
sys.exit(max(process.wait() for process in running))
"""
SCONTROL = "#!/bin/bash\n[ \"$1 $2\" = 'show hostnames' ] && echo 127.0.0.1\n"


@pytest.fixture
def slurm(tmp_path) -> dict[str, str]:
    """The environment of a machine with Slurm."""
    folder = tmp_path / "bin"
    folder.mkdir()
    for name, text in {"sbatch": SBATCH, "srun": SRUN, "scontrol": SCONTROL}.items():
        (folder / name).write_text(text)
        (folder / name).chmod(0o755)
    return {"PATH": f"{folder}:{ENV['PATH']}", "PYTHONPATH": "src"}


@pytest.fixture(scope="module")
def ready(tmp_path_factory) -> Path:
    """A smoke project, its trunk made and locked."""
    folder = copy_project(tmp_path_factory.mktemp("deploy") / "project", "smoke")
    change(
        folder, "policies", {"rl": ["ppo", "rloo"], "preference": ["dpo", "simpo"], "imitation": [], "best_of_n": [4]}
    )
    run(folder, "dvc", "repro", "pool@0", "reference@0", "usable")
    (folder / "logs").mkdir(exist_ok=True)
    return folder


def test_scripts_are_shell_and_yaml():
    for path in [*SLURM.glob("*.sbatch"), SLURM / "repro"]:
        subprocess.run(["bash", "-n", path], check=True)
        assert os.access(path, os.X_OK) or path.suffix == ".sbatch"
    task = YAML(typ="safe").load((ROOT / "deploy" / "skypilot" / "cell.yaml").read_text())
    assert {"resources", "setup", "run", "envs"} <= task.keys() and "--run-cache" in task["run"]


def test_waves_are_printed_for_other_schedulers(monkeypatch, capsys):
    monkeypatch.setattr(cells, "repair", lambda: None)
    monkeypatch.setattr(cells, "checked", lambda: 0)
    monkeypatch.setattr(cells, "plan", lambda: cells.Plan([[["a", "b"], ["alone"]], [["c"], ["d"]]], ["e", "f"], {}))
    cells.show_waves()
    assert capsys.readouterr().out == "a,b alone\nc d\ne,f\n"


ENDING = {  # what Slurm signals before the end of the time is the task of the step, not what the task has started
    "srun": """#!/usr/bin/env python3
import os, signal, subprocess, sys, time
task = subprocess.Popen([word for word in sys.argv[1:] if not word.startswith("--ntasks")])
while not os.path.exists("ready"):
    time.sleep(0.01)
task.send_signal(signal.SIGTERM)
sys.exit(task.wait() & 0xFF)
""",
    "dvc": """#!/usr/bin/env python3
import subprocess, sys
status = subprocess.run([sys.executable, "stage.py"]).returncode
open("locked", "w").close()
sys.exit(status)
""",
}
STAGE = """
import os, signal, sys, time
def heard(*_):
    time.sleep(0.3)
    open("checkpoint", "w").close()
    os._exit(143)
signal.signal(signal.SIGTERM, heard)
open("ready", "w").close()
time.sleep(60)
"""


def test_at_the_end_of_the_time_the_stage_keeps_a_checkpoint_and_dvc_sees_it_end(tmp_path):
    folder = tmp_path / "bin"
    folder.mkdir()
    for name, text in ENDING.items():
        (folder / name).write_text(text)
        (folder / name).chmod(0o755)
    (tmp_path / "stage.py").write_text(STAGE)
    ended = subprocess.run(
        ["bash", SLURM / "cells.sbatch", "rl@ppo-0"], cwd=tmp_path, timeout=60, check=False,
        env=ENV | {"PATH": f"{folder}:{ENV['PATH']}", "SLURM_ARRAY_TASK_ID": "0"},
    )  # fmt: skip
    assert ended.returncode == 143 and (tmp_path / "checkpoint").exists() and (tmp_path / "locked").exists()


@pytest.mark.slow
@pytest.mark.pipeline
def test_two_nodes_train_one_cell(ready, slurm, tmp_path):
    """Started by torchrun on each of them; the policy is that of one process, but for rounding."""
    from safetensors.torch import load_file

    folder = tmp_path / "nodes"
    shutil.copytree(ready, folder)
    submit = ["sbatch", "--nodes=2", str(SLURM.relative_to(ROOT) / "stage.sbatch"), "preference@dpo-0"]
    run(folder, *submit, RLHF_PROCESSES="1", **slurm)
    two = load_file(folder / "models" / "dpo-0" / "model.safetensors")
    assert lock(folder)["preference@dpo-0"] and "processes" not in str(list(folder.glob("*.tmp")))
    run(folder, "dvc", "repro", "--single-item", "--force", "--no-run-cache", "preference@dpo-0")
    one = load_file(folder / "models" / "dpo-0" / "model.safetensors")
    assert all((one[name] - two[name]).abs().max() < 1e-3 for name in one)


@pytest.mark.slow
@pytest.mark.pipeline
def test_an_array_of_four_cells_ends_in_one_lock(ready, slurm, tmp_path):
    four = ["rl@ppo-0", "rl@rloo-0", "preference@dpo-0", "preference@simpo-0"]
    folder = tmp_path / "array"
    shutil.copytree(ready, folder)
    run(folder, "sbatch", "--array=0-3", str(SLURM.relative_to(ROOT) / "cells.sbatch"), *four, **slurm)
    assert set(four) <= lock(folder).keys()
    said = run(folder, str(SLURM.relative_to(ROOT) / "repro"), "--partition=x", **slurm)  # the rest of the graph
    assert "sample_rl@ppo-0" in said and "rl@ppo-0 " not in said.replace("sample_rl@ppo-0", "")
    assert "Everything is up to date" in run(folder, sys.executable, "-m", "rlhf_vs_dpo.run.cells", PYTHONPATH="src")
