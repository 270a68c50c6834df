"""Preference data sets of the Hugging Face Hub, at a pinned revision, in any of the forms of `forms.py`."""

from collections.abc import Iterable
from itertools import chain, islice
from typing import Any

from rlhf_vs_dpo.config import Hub
from rlhf_vs_dpo.errors import DataError
from rlhf_vs_dpo.sources import Tables
from rlhf_vs_dpo.sources.forms import HELD_OUT, Render, derived, to_pairs


def load_rows(name: str, config: str | None, split: str, revision: str | None) -> Iterable[dict[str, Any]]:
    """Rows of one split, read from disk one by one. `name` is a Hub id, which needs a revision, or a local folder of data files.

    Raises DataError where it cannot be loaded, saying how to go on without a network.
    """
    from pathlib import Path

    import datasets

    local = Path(name).is_dir()
    if not local and revision is None:
        raise DataError(
            f"params.yaml: the data set {name} has no revision; give a commit hash, for a Hub id alone is invisible to DVC"
        )
    try:
        data = datasets.load_dataset(name, config, split=split, **({} if local else {"revision": revision}))
    except Exception as error:  # the Hub client, datasets and pyarrow raise unrelated types
        raise DataError(
            f"{name} (split {split}): cannot be loaded ({type(error).__name__}: {str(error)[:300]}).\n"
            "If the Hub cannot be reached from here: download the data set where it can (`hf download --repo-type dataset "
            f"{name} --local-dir FOLDER`) and name FOLDER in params.yaml instead, or use `data.source: files`"
        ) from error
    return data


def build(settings: Hub, render: Render, drop: bool) -> Tables:
    """Tables from a preference data set of the Hub; demonstrations and corpus are derived from the pairs. `drop` is that of `to_pairs`."""
    if settings.name is None:
        raise DataError("params.yaml: `data.hub.name` is null; name a preference data set there")
    place = settings.name, settings.config
    rows: Iterable[dict[str, Any]] = islice(load_rows(*place, settings.split, settings.revision), settings.splits.limit)
    if settings.held_out is not None:
        held = load_rows(*place, settings.held_out, settings.revision)
        rows = chain(({**row, "split": "train"} for row in rows), ({**row, "split": HELD_OUT} for row in held))
    read = to_pairs(rows, settings.name, render, settings.splits, settings.turn_marker, drop)
    return Tables(dataset_pairs=read.pairs, gold={"kind": "none"}, left_out=read.left_out, **derived(read.pairs))
