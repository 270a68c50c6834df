"""Files and folders that are written whole or not at all."""

import errno
import json
import math
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rlhf_vs_dpo.errors import DiskError

FULL = (errno.ENOSPC, errno.EDQUOT)


@contextmanager
def writing(path: Path) -> Iterator[Path]:
    """A temporary place beside `path`, a file or a folder of the body's making, renamed to `path` when the body succeeded.

    Nothing is left of it when the body failed. What an earlier process was killed over is removed first: a path has one
    writer at a time. Raises DiskError where the disk is full.
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
    except Exception as error:
        if "No space left on device" not in str(error) and getattr(error, "errno", None) not in FULL:
            raise
        written, free = _size(temporary), shutil.disk_usage(path.parent).free
        raise DiskError(
            f"{path}: the disk is full: it needs more than {written + free:,} bytes, of which {written:,} were written; make room and run "
            "again. Nothing is half-written"
        ) from error
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


def _size(path: Path) -> int:
    """Bytes of a file, or of all files in a folder."""
    files = [path, *path.rglob("*")] if path.is_dir() else [path]
    return sum(file.stat().st_size for file in files if file.is_file())


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
