"""A user's own preferences: local JSONL or parquet in any of the forms of `forms.py`."""

import json
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import pandas as pd

from rlhf_vs_dpo.config import Files
from rlhf_vs_dpo.errors import DataError
from rlhf_vs_dpo.sources import Tables
from rlhf_vs_dpo.sources.forms import Render, derived, prompt_id, split_of, to_pairs
from rlhf_vs_dpo.tables import validate

WATCHED = Path("data/own")  # a dependency of the `data` stage


def read_rows(path: Path) -> Iterator[dict[str, Any]]:
    """Rows of a JSONL or parquet file, read one by one. Raises DataError naming the file, and the line where one is not JSON."""
    path = Path(path)
    if not path.is_file():
        raise DataError(f"{path}: no such file; `data.files` in params.yaml names it")
    if path.suffix.lower() == ".parquet":
        import pyarrow.parquet

        try:
            for batch in pyarrow.parquet.ParquetFile(path).iter_batches(batch_size=1000):
                yield from batch.to_pylist()
        except (OSError, pyarrow.ArrowException) as error:
            raise DataError(f"{path}: not a readable parquet file ({error})") from error
        return
    if path.suffix.lower() not in (".jsonl", ".ndjson"):
        raise DataError(f"{path}: unknown kind of file; give .jsonl (an object a line) or .parquet")
    read = 0  # bytes of the lines before
    with path.open("rb") as lines:  # bytes: U+2028 may stand inside a string, and ends no line there
        for number, raw in enumerate(lines, start=1):
            try:
                line = raw.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError as error:
                raise DataError(
                    f"{path}: not UTF-8 ({error.reason} at byte {read + error.start}); convert it"
                ) from None
            read += len(raw)
            if not line.strip():
                continue
            try:
                row = json.loads(line)
                json.dumps(row, ensure_ascii=False).encode()  # a lone surrogate is JSON, and no text
            except json.JSONDecodeError as error:
                raise DataError(f"{path}, line {number}: not JSON ({error.msg})") from None
            except (UnicodeEncodeError, RecursionError) as error:
                raise DataError(f"{path}, line {number}: holds no usable text ({type(error).__name__})") from None
            if not isinstance(row, dict):
                raise DataError(f"{path}, line {number}: not a JSON object")
            yield row


def build(settings: Files, render: Render, drop: bool) -> Tables:
    """Tables from files: preferences are needed; demonstrations and corpus are derived from them where not given.

    `drop` is that of `forms.to_pairs`.
    """
    if settings.preferences is None:
        raise DataError("params.yaml: `data.files.preferences` is null; name your JSONL or parquet file there")
    path = Path(settings.preferences)
    for given in filter(None, (settings.preferences, settings.demonstrations, settings.corpus)):
        if not Path(given).resolve().is_relative_to(WATCHED.resolve()):
            print(
                f"note: {given} is outside {WATCHED}/, so that DVC sees its name alone; after a change: dvc repro --force data, then dvc repro"
            )
    rows = islice(read_rows(path), settings.splits.limit)
    pairs, left_out = to_pairs(rows, str(path), render, settings.splits, settings.turn_marker, drop)
    tables = derived(pairs)
    if settings.demonstrations:
        tables["demonstrations"] = _demonstrations(Path(settings.demonstrations), settings, pairs)
    if settings.corpus:
        tables["corpus"] = _corpus(Path(settings.corpus), settings)
    return Tables(dataset_pairs=pairs, gold={"kind": "none"}, left_out=left_out, **tables)


def _demonstrations(path: Path, settings: Files, pairs: pd.DataFrame) -> pd.DataFrame:
    """Columns `prompt`, `response` and perhaps `split`; a prompt that pairs have keeps the split it has there."""
    rows = list(read_rows(path))
    for number, row in enumerate(rows):
        for column in ("prompt", "response"):
            if not isinstance(row.get(column), str):
                raise DataError(f"{path}, row {number}: `{column}` must be text, got {row.get(column)!r}")
    frame = pd.DataFrame(
        {name: [row.get(name) for row in rows] for name in ("prompt", "response", "split")}, dtype=object
    )
    known = dict(zip(pairs["prompt"], pairs["split"], strict=True))
    given = frame["split"]
    clash = [
        i for i, (p, s) in enumerate(zip(frame["prompt"], given, strict=True)) if s is not None and known.get(p, s) != s
    ]
    if clash:
        raise DataError(
            f"{path}, row {clash[0]}: this prompt is in two splits ({given[clash[0]]} here, {known[frame['prompt'][clash[0]]]} in {settings.preferences})"
        )
    split = [s or known.get(p) or split_of(p, settings.splits) for p, s in zip(frame["prompt"], given, strict=True)]
    frame = frame.assign(prompt_id=[prompt_id(str(p)) for p in frame["prompt"]], split=split)
    frame = frame[["prompt_id", "split", "prompt", "response"]].astype("str")
    return validate(frame, "demonstrations", str(path))


def _corpus(path: Path, settings: Files) -> pd.DataFrame:
    """Column `text` and perhaps `split` (train, validation)."""
    frame = pd.DataFrame(list(read_rows(path)))
    if "text" not in frame:
        raise DataError(f"{path}: column 'text' is missing")
    if "split" not in frame:
        frame["split"] = [
            split_of(str(text), settings.splits.model_copy(update={"test": 0.0})) for text in frame["text"]
        ]
    frame["doc_id"] = [f"doc-{i:06d}" for i in range(len(frame))]
    return validate(frame[["doc_id", "split", "text"]], "corpus", str(path))
