"""Files and folders that are written whole or not at all."""

import json
import math
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


@contextmanager
def writing(path: Path) -> Iterator[Path]:
    """A temporary place beside `path`, a file or a folder of the body's making, renamed to `path` when the body succeeded.

    Nothing is left of it when the body failed. What an earlier process was killed over is removed first: a path has one
    writer at a time.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    for left in path.parent.glob(f".{path.name}.*.tmp"):
        _remove(left)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        if temporary.is_dir():
            _remove(path)
        temporary.replace(path)
    finally:
        _remove(temporary)


@contextmanager
def folder(path: Path) -> Iterator[Path]:
    """`writing`, of a folder that is there already."""
    with writing(path) as temporary:
        temporary.mkdir()
        yield temporary


def write_json(content: dict[str, Any], path: Path) -> None:
    """With six significant digits, and null for what is not finite: what git shows as a change is one."""
    with writing(path) as temporary:
        temporary.write_text(json.dumps(_rounded(content), indent=2) + "\n")


def write_csv(table, path: Path) -> None:
    """A data frame with six significant digits."""
    with writing(path) as temporary:
        table.to_csv(temporary, index=False, float_format="%.6g")


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def _rounded(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _rounded(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_rounded(item) for item in value]
    if isinstance(value, float):
        return float(f"{value:.6g}") if math.isfinite(value) else None
    return value
