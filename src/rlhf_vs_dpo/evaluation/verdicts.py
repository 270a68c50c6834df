"""What judges said, and how far they agree: with each other, and with themselves."""

from itertools import combinations
from typing import Any

import numpy as np
import pandas as pd

from rlhf_vs_dpo.evaluation.statistics import Resamples


def summary(judgements: pd.DataFrame, members: dict[str, list[str]], resamples: Resamples) -> dict[str, Any]:
    """Per judge, from a `judgements` table; `members` are the folders of each method.

    methods       win rate against the SFT policy, a tie half a win, with its 95 % interval over prompts and lines
    unanswered    share of comparisons without a usable answer; they are left out of the win rate
    inconsistent  share of answered comparisons in which the two orders disagree; null for judges that see no order
    shown_first   share of its answers that named the response shown first; a judge without a taste for places says 1/2
    agreement     with each other judge: share of comparisons in which both name the same winner, where neither ties
    """
    found: dict[str, Any] = {}
    for judge, said in judgements.groupby("judge", sort=False):
        prompts = sorted(said["prompt_id"].unique())
        wide = said.pivot(index="policy", columns="prompt_id", values="win").reindex(columns=prompts)
        methods = {}
        for method, folders in members.items():
            if method != "sft":
                values = wide.loc[folders].to_numpy(float)
                estimate = resamples.ratio(
                    "judged prompt", np.nan_to_num(values), np.isfinite(values).astype(float), share=True
                )
                methods[method] = estimate.interval()
        found[str(judge)] = {
            "methods": methods,
            "comparisons": len(said),
            "unanswered": float(said["win"].isna().mean()),
            "inconsistent": _mean(1 - said["consistent"]),
            "shown_first": _mean(said["first"]),
            "agreement": {},
        }
    wins = judgements.pivot(index=["policy", "prompt_id"], columns="judge", values="win") if found else pd.DataFrame()
    for a, b in combinations(found, 2):
        both = wins[[a, b]].dropna()
        decided = both[(both[a] != 0.5) & (both[b] != 0.5)]
        share = float((decided[a] == decided[b]).mean()) if len(decided) else None
        found[a]["agreement"][b] = found[b]["agreement"][a] = share
    return found


def _mean(values: pd.Series) -> float | None:
    known = values.dropna()
    return float(known.mean()) if len(known) else None
