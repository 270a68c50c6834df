"""A disk that is full, at each kind of write: one error that names the path and what it needs, and nothing half-written."""

import os
import subprocess

import numpy as np
import pandas as pd
import pytest

from rlhf_vs_dpo import tables
from rlhf_vs_dpo.config import Scratch
from rlhf_vs_dpo.errors import DiskError
from rlhf_vs_dpo.language import models
from rlhf_vs_dpo.report import charts
from rlhf_vs_dpo.run import atomic


@pytest.fixture
def small_disk(tmp_path):
    """A disk of 64 KiB, and a function that makes it a larger one."""
    place = tmp_path / "disk"
    place.mkdir()
    if subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", place], capture_output=True, check=False
    ).returncode:
        pytest.skip("needs the right to mount a disk of its own")
    try:
        yield place, lambda: subprocess.run(["mount", "-o", "remount,size=16m", place], check=True)
    finally:
        subprocess.run(["umount", place], check=True)


def table(path, tokenizer):
    rng = np.random.default_rng(0)  # nothing that could be compressed
    rows = pd.DataFrame(
        {"doc_id": [f"d{i}" for i in range(2000)], "split": "train", "text": [rng.bytes(40).hex() for _ in range(2000)]}
    )
    tables.write_table(rows, "corpus", path)


def policy(path, tokenizer):
    size = Scratch(layers=2, width=96, heads=2, feed_forward=128, context=64, bpe_vocabulary=300)
    models.save(models.from_scratch(size, tokenizer), tokenizer, path)


def picture(path, tokenizer):
    rng = np.random.default_rng(0)
    points = [{"policy": None, "x": float(x), "y": float(y)} for x, y in rng.random((6000, 2))]
    marks = charts.alt.Chart(charts.data(points)).mark_point()
    chart = marks.encode(x=charts.axis("x", "x"), y=charts.axis("y", "y", None, charts.alt.Y))
    with atomic.folder(path) as place:
        charts.picture(chart.properties(width=1000, height=800), place / "a.png")


WRITERS = {
    "table": table,
    "policy": policy,
    "picture": picture,
    "json": lambda path, tokenizer: atomic.write_json({str(i): i for i in range(9000)}, path),
    "csv": lambda path, tokenizer: atomic.write_csv(pd.DataFrame({"x": np.arange(30_000)}), path),
}


@pytest.mark.parametrize("kind", WRITERS)
def test_the_error_names_path_and_bytes_and_what_was_there_stays(small_disk, tokenizer, kind):
    disk, enlarge = small_disk
    path = disk / "out"
    before = b"what was there before"
    if kind not in ("policy", "picture"):
        path.write_bytes(before)
    with pytest.raises(DiskError) as error:
        WRITERS[kind](path, tokenizer)
    said = str(error.value)
    assert said.startswith(f"{path}: the disk is full: it needs more than ") and len(said.splitlines()) == 1
    assert [entry.name for entry in os.scandir(disk)] == (["out"] if path.exists() else [])
    assert not path.exists() or path.read_bytes() == before
    enlarge()
    WRITERS[kind](path, tokenizer)
    assert path.exists() and (path.is_dir() or path.read_bytes() != before)
