"""The study in numbers: for each method its best setting, what share of settings is lost, and what k trials bring and cost."""

import json
from typing import Any

import pandas as pd

from rlhf_vs_dpo.study import search
from rlhf_vs_dpo.study.space import MEASURED


def of_method(
    trials: pd.DataFrame, criterion: str, start: dict[str, float], upstream: float, seed: int
) -> dict[str, Any]:
    """What the trials of one method say.

    start       what the SFT policy of the line is worth, by metric
    upstream    FLOPs of the stages that the method needs before its first trial
    """
    found = search.values(trials, criterion, start[criterion])
    low, high = search.interval(found, len(trials), seed)
    chosen = search.best(trials, criterion)
    return {
        "trials": len(trials),
        "collapsed": int((trials["outcome"] == "collapsed").sum()),
        "diverged": int((trials["outcome"] == "diverged").sum()),
        "lowest": float(found.min()),
        "median": float(pd.Series(found).median()),
        "best": None
        if chosen is None
        else {
            "trial": int(chosen["trial"]),
            "settings": json.loads(chosen["settings"]),
            **{name: float(chosen[name]) for name in MEASURED},
        },
        "expected_best": [
            {"trials": k + 1, "mean": float(mean), "low": float(low[k]), "high": float(high[k])}
            for k, mean in enumerate(search.expected_best(found, len(trials)))
        ],
        "flops_upstream": upstream,
        "flops_per_trial": float(trials["flops"].mean()),
        "seconds_per_trial": float(trials["seconds"].mean()),
    }
