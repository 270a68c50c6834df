"""What a stage has finished of its work, kept where DVC does not remove it before the stage runs again.

A stage that was killed goes on behind it. It is kept under a key of all that can change it: parameters, code and inputs.
"""

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rlhf_vs_dpo.run import atomic
from rlhf_vs_dpo.run.pipeline import root


class Finished:
    """Rows of a stage's work, a line of JSON each, written as they are made."""

    def __init__(self, stage: str, params: dict[str, Any], inputs: list[Path]):
        self.folder = root() / ".dvc" / "tmp" / "rlhf" / stage
        self.path = self.folder / f"{_key(params, inputs)}.jsonl"
        known = self.path.read_text().splitlines() if self.path.exists() else []
        self.rows: list[dict[str, Any]] = [json.loads(line) for line in known]

    def add(self, row: dict[str, Any]) -> None:
        self.rows.append(row)
        with atomic.writing(self.path) as temporary:
            temporary.write_text("".join(json.dumps(row) + "\n" for row in self.rows))

    def remove(self) -> None:
        """The stage is done; what was left of other parameters or code goes with it."""
        for path in self.folder.glob("*"):
            path.unlink()


def _key(params: dict[str, Any], inputs: list[Path]) -> str:
    """A hash of parameters, of this project's code, and of the content of inputs (files, or folders)."""
    said = hashlib.sha256(json.dumps(params, sort_keys=True).encode())
    for path in _files([*inputs, Path("src/rlhf_vs_dpo"), Path("stages")]):
        said.update(f"{path}\0{path.stat().st_size}\0".encode())
        said.update(path.read_bytes())
    return said.hexdigest()[:16]


def _files(paths: list[Path]) -> Iterator[Path]:
    for path in paths:
        if path.is_dir():
            yield from sorted(p for p in path.rglob("*") if p.is_file() and p.suffix != ".pyc")
        elif path.exists():
            yield path
