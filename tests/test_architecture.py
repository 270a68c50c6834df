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
WITHOUT_NUMBERS = {f"src/rlhf_vs_dpo/{name}.py" for name in ("config", "errors", "tables")} | {
    str(path.relative_to(ROOT)) for path in (SOURCE / "run").glob("*.py")
}
# Ranks of rooms: a module imports only from its own room and from rooms below it.
RANKS = {
    "errors": 0, "losses": 0,
    "config": 1,
    "run": 2,
    "tables": 3, "language": 3,
    "sources": 4, "preferences": 4,
    "training": 5, "evaluation": 5,
    "theory": 6, "report": 6,
    "study": 7,
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
    if room(path) != "run":
        assert not tops & {"mlflow", "dvc"}, "MLflow and DVC are imported in run/ alone"
    if room(path) == "losses":
        assert all(
            n.split(".")[0] in ("torch", "typing", "collections") or n.startswith("rlhf_vs_dpo.losses") for n in names
        )
    for name in names:
        parts = name.split(".")
        if parts[0] == "rlhf_vs_dpo" and len(parts) > 1 and parts[1] != room(path):
            assert RANKS[parts[1]] < RANKS[room(path)], f"{path.name} imports {name}"


def test_a_stage_starts_light():
    """What is imported before the work is known: nothing that takes a second, and nothing that reads the arithmetic."""
    heavy = {"mlflow", "dvc", "torch", "numpy", "pandas", "transformers", "sqlalchemy", "pydantic", "ruamel"}
    for script in STAGES:
        code = f"import sys, runpy; runpy.run_path({str(script)!r}, run_name='x'); print(*{heavy} & sys.modules.keys())"
        environment = os.environ | {"PYTHONPATH": "src"}
        done = subprocess.run(
            [sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True, check=True
        )
        assert done.stdout.strip() == "", script.name
        assert script.read_text().rstrip().endswith("launch.command(main)"), "only so is its arithmetic fixed"


def test_the_parameters_of_a_stage_are_those_that_dvc_tracks():
    import dvc.api

    from rlhf_vs_dpo.run import pipeline

    whole = config.read_params(ROOT / "params.yaml")
    for stage, item in {
        "data": {}, "sft@0": {"seed": "0"}, "rl@ppo-0": {"method": "ppo", "seed": "0"}, "evaluate": {},
        "preference@dpo-0": {"method": "dpo", "seed": "0"}, "sample_imitation@best_of_n-0": {"method": "best_of_n", "seed": "0"},
    }.items():  # fmt: skip
        assert pipeline.tracked(whole, stage, **item) == dvc.api.params_show(stages=stage, repo=str(ROOT)), stage
    assert pipeline.tracked(whole, None) is whole


SAMPLING = {"sample_sft", "sample_rl", "sample_preference", "sample_imitation"}


def dvc_yaml() -> dict:
    return YAML(typ="safe").load((ROOT / "dvc.yaml").read_text())["stages"]


def all_stages() -> dict:
    """Those of the study, too, as `study <name>`."""
    study = YAML(typ="safe").load((ROOT / "tuning" / "study.yaml").read_text())["stages"]
    return dvc_yaml() | {f"study {name}": stage.get("do", stage) for name, stage in study.items()}


def script_of(stage: dict) -> Path:
    return ROOT / re.search(r"stages/\w+\.py", stage["cmd"]).group()


@pytest.mark.parametrize("name", all_stages())
def test_deps_are_what_a_stage_imports(name):
    stage = all_stages()[name]
    script = script_of(stage)
    scripts = {script, *(ROOT / dep for dep in stage["deps"] if dep.startswith("stages/"))}  # `tune` calls other stages
    needed = {str(path.relative_to(ROOT)) for of in scripts for path in closure(of)} - WITHOUT_NUMBERS
    needed |= {str(path.relative_to(ROOT)) for path in scripts}
    listed = {dep for dep in stage["deps"] if dep.endswith(".py") or dep.startswith("src/")}
    folders = {dep for dep in listed if not dep.endswith(".py")}
    assert all(any(path.startswith(f + "/") for path in needed) for f in folders)
    covered = listed - folders | {path for path in needed if any(path.startswith(f + "/") for f in folders)}
    assert covered == needed, f"missing {sorted(needed - covered)}, superfluous {sorted(covered - needed)}"


@pytest.mark.parametrize(
    ("path", "stages"),
    [
        ("losses/dpo.py", {"preference"}),
        ("training/preference.py", {"preference"}),
        ("losses/ppo.py", {"rl"}),
        ("training/imitation.py", {"imitation"}),
        ("preferences/judges.py", {"judge"}),
        ("evaluation/statistics.py", {"evaluate"}),
        ("preferences/annotator.py", {"preferences", "preference", "pool", "evaluate"} | SAMPLING),
        ("report/words.py", {"report"}),
        ("run/frame.py", set()),
    ],
)
def test_methods_do_not_disturb_each_other(path, stages):
    """Who runs again when a file is edited (`theory`, which tries all methods, apart)."""
    touched = {
        name
        for name, stage in dvc_yaml().items()
        for dep in stage["deps"]
        if f"src/rlhf_vs_dpo/{path}/".startswith(f"{dep}/")
    }
    assert touched - {"theory"} == stages


def test_theory_runs_again_for_what_it_tries_alone():
    deps = dvc_yaml()["theory"]["deps"]
    assert [dep for dep in deps if dep.startswith("src/rlhf_vs_dpo/evaluation")] == [
        "src/rlhf_vs_dpo/evaluation/order_statistics.py"
    ]


def test_everything_depends_on_the_check_of_params():
    """By its output, which never changes: nothing runs, and nothing loses its outputs, before params.yaml is known to be right."""
    import networkx
    from dvc.repo import Repo

    with Repo(str(ROOT)) as repo:
        graph = repo.index.graph
        (check,) = [stage for stage in graph if stage.addressing == "check"]
        assert networkx.ancestors(graph, check) == set(graph) - {check}


@pytest.mark.parametrize("name", all_stages())
def test_commands_hold_paths_and_no_hyper_parameters(name):
    stage = all_stages()[name]
    assert stage["desc"]
    words = stage["cmd"].replace("PYTHONPATH=src exec python ", "").split()[1:]
    for option, value in zip(words[::2], words[1::2], strict=True):
        assert option.startswith("--")
        assert (
            option in ("--method", "--seed")
            or "/" in value
            or value in ("data", "samples", "heldout", "curves", "runs", "report", "plots")
        )


def test_every_stage_is_a_command_and_reads_its_params_from_dvc():
    assert {script_of(stage) for stage in all_stages().values()} == set(STAGES)
    for stage in all_stages().values():
        names = [
            param.split(".")[0] for param in stage.get("params", []) if isinstance(param, str)
        ]  # `check` has the whole file
        assert set(names) <= config.SECTIONS.keys()
        read = set(re.findall(r'section\("(\w+)"', script_of(stage).read_text())) - {
            "memory"
        }  # no number depends on it
        assert read <= set(names), f"reads {read - set(names)} without tracking it"


@pytest.mark.parametrize("path", sorted((SOURCE / "losses").glob("[a-z]*.py")), ids=lambda p: p.stem)
def test_losses_cite_paper_and_equation(path):
    doc = path.read_text().split('"""')[1]
    assert "arXiv:" in doc and re.search(r"\beq\.", doc) and "Where we differ" in doc


def test_no_number_of_the_readme_was_left_out():
    assert "@@" not in (ROOT / "README.md").read_text()


@pytest.mark.skipif((ROOT / "tuning" / "dvc.yaml").exists(), reason="`make tune` has added the study to the graph")
def test_the_drawn_graph_is_the_graph():
    drawn = subprocess.run(
        [Path(sys.executable).parent / "dvc", "dag", "--mermaid"], cwd=ROOT, capture_output=True, text=True, check=True,
        env=os.environ | {"COLUMNS": "200"},
    ).stdout  # fmt: skip
    page = (ROOT / "docs" / "graph.md").read_text()
    shown = re.search(r"```mermaid\n(.*?)```", page, re.DOTALL).group(1)
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
