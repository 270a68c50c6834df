"""The method that CONTRIBUTING.md adds, added."""

import subprocess
import sys

import pytest
from conftest import ROOT
from project import copy_project, run

from rlhf_vs_dpo import config

pytestmark = pytest.mark.pipeline


@pytest.fixture
def folder(tmp_path):
    """A copy of the project with the method added."""
    folder = copy_project(tmp_path / "project", "default")
    subprocess.run(["git", "apply", ROOT / "docs" / "add-a-method.diff"], cwd=folder, check=True)
    return folder


def test_the_method_that_contributing_adds_is_a_right_one(folder):
    assert "slic" in config.read_params(folder / "params.yaml")["policies"]["preference"]
    run(folder, sys.executable, "-m", "rlhf_vs_dpo.config", PYTHONPATH="src")


@pytest.mark.slow
def test_it_passes_the_tests_of_methods(folder):
    checks = [
        "tests/losses/test_slic.py",
        "tests/study/test_search.py",
        "tests/test_architecture.py::test_losses_cite_paper_and_equation",
    ]
    said = run(
        folder,
        sys.executable,
        "-m",
        "pytest",
        *checks,
        "tests/test_architecture.py::test_deps_are_what_a_stage_imports",
        PYTHONPATH="src",
    )
    assert "failed" not in said
    assert "preference@slic-0" in run(folder, "dvc", "stage", "list")
