"""Preference data sets of the Hugging Face Hub, at a pinned revision, in any of the forms of `forms.py`."""

from typing import Any

from rlhf_vs_dpo.config import Hub
from rlhf_vs_dpo.errors import DataError
from rlhf_vs_dpo.sources import Tables
from rlhf_vs_dpo.sources.forms import Render, derived, to_pairs


def load_rows(name: str, config: str | None, split: str, revision: str | None) -> list[dict[str, Any]]:
    """Rows of one split. `name` is a Hub id, which needs a revision, or a local folder of data files.

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
    return data.to_list()


def build(settings: Hub, render: Render, drop: bool) -> Tables:
    """Tables from a preference data set of the Hub; demonstrations and corpus are derived from the pairs. `drop` is that of `to_pairs`."""
    if settings.name is None:
        raise DataError("params.yaml: `data.hub.name` is null; name a preference data set there")
    rows = load_rows(settings.name, settings.config, settings.split, settings.revision)[: settings.splits.limit]
    read = to_pairs(rows, settings.name, render, settings.splits, settings.turn_marker, drop)
    return Tables(dataset_pairs=read.pairs, gold={"kind": "none"}, left_out=read.left_out, **derived(read.pairs))
