"""Where text comes from. Each source module has `build(settings, seed) -> Tables`."""

from dataclasses import dataclass, field
from typing import Any

import pandas as pd

from rlhf_vs_dpo.tables import empty


@dataclass
class Tables:
    """What a source delivers to the `data` stage (columns: `tables.py`).

    `words` is the closed vocabulary where the source has one (a word is then a token), else empty.
    `gold` describes the gold reward in the form that `gold.load` reads; `{"kind": "none"}` where there is none.
    `classifier` goes with the gold reward of kind "sentiment". `facts` are questions with one right answer, asked
    to see what a policy has forgotten. `left_out` lists the rows of the source that are no preference, where
    `data.unusable` is `drop`.
    """

    corpus: pd.DataFrame
    demonstrations: pd.DataFrame
    prompts: pd.DataFrame
    dataset_pairs: pd.DataFrame
    facts: pd.DataFrame
    gold: dict[str, Any]
    words: list[str] = field(default_factory=list)
    classifier: pd.DataFrame | None = None
    metrics: dict[str, float] = field(default_factory=dict)
    left_out: pd.DataFrame = field(default_factory=lambda: empty("unusable"))
