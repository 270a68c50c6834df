"""Stages as real processes that start in a moment: forked from a process that has imported everything and computed nothing."""

import multiprocessing
import os
import sys
from pathlib import Path

from conftest import ROOT
from project import command

ROOMS = ["language.heads", "preferences.labelling", "preferences.judges", "training.imitation", "training.policy_gradient", "training.preference"]  # fmt: skip
CONTEXT = multiprocessing.get_context("forkserver")
LAZY = ["mlflow.tracking", "pandera.pandas", "datasets", "transformers.models.llama.modeling_llama", "transformers.models.auto.modeling_auto", "transformers.tokenization_utils_tokenizers"]  # fmt: skip
CONTEXT.set_forkserver_preload(["forked", *(f"rlhf_vs_dpo.{room}" for room in ROOMS), "rlhf_vs_dpo.run.frame", *LAZY])


def start(folder: Path, words: list[str], env: dict[str, str]) -> multiprocessing.Process:
    """A stage in a process group of its own; it says nothing."""
    os.environ["PYTHONPATH"] = f"{ROOT / 'src'}:{ROOT / 'tests'}"  # where the first process looks for what it imports
    process = CONTEXT.Process(target=_stage, args=(folder, words, env))
    process.start()
    return process


def _stage(folder: Path, words: list[str], env: dict[str, str]) -> None:
    os.setsid()
    os.environ.clear()
    os.environ.update(env)
    os.chdir(folder)
    nothing = os.open(os.devnull, os.O_RDWR)
    for stream in (0, 1, 2):
        os.dup2(nothing, stream)
    sys.exit(command(words))
