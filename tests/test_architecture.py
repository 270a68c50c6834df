"""What the house has promised: one-way imports, exact dependencies, losses beside their equations, a README that is true."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from closure import closure, imported
from conftest import ROOT
from ruamel.yaml import YAML

from rlhf_vs_dpo import config

SOURCE = ROOT / "src" / "rlhf_vs_dpo"
STAGES = sorted((ROOT / "stages").glob("*.py"))
# These check, log and start: no number depends on them, so that no stage does (dvc.yaml says so too).
WITHOUT_NUMBERS = {
    f"src/rlhf_vs_dpo/{name}.py"
    for name in ("config", "schemas", "errors", "tracking", "launch", "progress", "alarms", "profiles", "atomic")
}
# Ranks: a module imports only from ranks below its own.
RANKS = {
    "errors": 0, "progress": 0, "losses": 0, "atomic": 0,
    "config": 1,
    "schemas": 2, "answers": 0, "text": 2, "launch": 2, "profiles": 2,
    "models": 3, "gold": 3, "annotator": 3,
    "logprobs": 4, "sources": 4,
    "generation": 5, "labelling": 6, "evaluation": 6, "training": 7, "theory": 8,
    "report": 8, "tracking": 8, "judges": 8, "alarms": 8,
}  # fmt: skip


def room(path: Path) -> str:
    return path.relative_to(SOURCE).parts[0].removesuffix(".py")


@pytest.mark.parametrize(
    "path", [p for p in SOURCE.rglob("*.py") if p != SOURCE / "__init__.py"], ids=lambda p: str(p.relative_to(SOURCE))
)
def test_imports_go_one_way(path):
    names = imported(path)
    tops = {name.split(".")[0] for name in names}
    assert "stages" not in tops
    if room(path) != "tracking":
        assert not tops & {"mlflow", "dvc"}, "MLflow and DVC are imported in tracking.py alone"
    if room(path) == "losses":
        assert all(
            n.split(".")[0] in ("torch", "typing", "collections") or n.startswith("rlhf_vs_dpo.losses") for n in names
        )
    for name in names:
        parts = name.split(".")
        if parts[0] == "rlhf_vs_dpo" and len(parts) > 1 and parts[1] != room(path):
            assert RANKS[parts[1]] < RANKS[room(path)], f"{path.name} imports {name}"


def test_tracking_imports_mlflow_and_dvc_lazily():
    code = "import sys; sys.path.insert(0, 'src'); import rlhf_vs_dpo.run.tracking; assert not {'mlflow', 'dvc', 'torch'} & sys.modules.keys()"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


def dvc_yaml() -> dict:
    return YAML(typ="safe").load((ROOT / "dvc.yaml").read_text())["stages"]


def script_of(stage: dict) -> Path:
    return ROOT / re.search(r"stages/\w+\.py", stage["cmd"]).group()


@pytest.mark.parametrize("name", dvc_yaml())
def test_deps_are_what_a_stage_imports(name):
    stage = dvc_yaml()[name]
    script = script_of(stage)
    needed = {str(path.relative_to(ROOT)) for path in closure(script)} - WITHOUT_NUMBERS | {
        str(script.relative_to(ROOT))
    }
    listed = {dep for dep in stage["deps"] if dep.endswith(".py") or dep.startswith("src/")}
    folders = {dep for dep in listed if not dep.endswith(".py")}
    covered = listed - folders | {path for path in needed if any(path.startswith(f + "/") for f in folders)}
    assert covered == needed, f"missing {sorted(needed - covered)}, superfluous {sorted(covered - needed)}"


@pytest.mark.parametrize("name", dvc_yaml())
def test_commands_hold_paths_and_no_hyper_parameters(name):
    stage = dvc_yaml()[name]
    assert stage["desc"]
    words = stage["cmd"].replace("PYTHONPATH=src python ", "").split()[1:]
    for option, value in zip(words[::2], words[1::2], strict=True):
        assert option.startswith("--")
        assert (
            option in ("--method", "--seed")
            or "/" in value
            or value in ("data", "samples", "heldout", "curves", "runs", "report", "plots")
        )


def test_every_stage_is_a_command_and_reads_its_params_from_dvc():
    assert {script_of(stage) for stage in dvc_yaml().values()} == set(STAGES)
    for stage in dvc_yaml().values():
        names = [param.split(".")[0] for param in stage.get("params", [])]
        assert set(names) <= config.SECTIONS.keys()
        read = set(re.findall(r'section\("(\w+)"', script_of(stage).read_text()))
        read |= {"seed"} if "run.seed" in script_of(stage).read_text() else set()
        assert read <= set(names), f"reads {read - set(names)} without tracking it"


@pytest.mark.parametrize("path", sorted((SOURCE / "losses").glob("[a-z]*.py")), ids=lambda p: p.stem)
def test_losses_cite_paper_and_equation(path):
    doc = path.read_text().split('"""')[1]
    assert "arXiv:" in doc and re.search(r"\beq\.", doc) and "Where we differ" in doc


def test_no_number_of_the_readme_was_left_out():
    assert "@@" not in (ROOT / "README.md").read_text()


def test_the_readme_graph_is_the_graph():
    drawn = subprocess.run(
        [Path(sys.executable).parent / "dvc", "dag", "--mermaid"], cwd=ROOT, capture_output=True, text=True, check=True,
        env=os.environ | {"COLUMNS": "200"},
    ).stdout  # fmt: skip
    readme = (ROOT / "README.md").read_text()
    shown = re.search(r"```mermaid\n(.*?)```", readme, re.DOTALL).group(1)
    assert [line.strip() for line in shown.strip().splitlines()] == [
        line.strip() for line in drawn.strip().splitlines()
    ]


@pytest.mark.skipif(
    not os.environ.get("CI"), reason="a user's params.yaml may differ from the default; the one in git may not"
)
def test_the_committed_params_are_the_default_profile():
    assert (ROOT / "params.yaml").read_text() == (ROOT / "profiles" / "default.yaml").read_text()


def test_no_model_is_loaded_with_remote_code_or_pickle():
    for path in [*SOURCE.rglob("*.py"), *STAGES]:
        text = path.read_text()
        assert (
            "trust_remote_code=True" not in text
            and "import pickle" not in text
            and "torch.save" not in text
            and "torch.load" not in text
        )
