"""What a trial is worth: its last samples on validation prompts, measured as those that are watched in training."""

from typing import Any

import pandas as pd

from rlhf_vs_dpo.config import Evaluate, Preferences
from rlhf_vs_dpo.evaluation import measure
from rlhf_vs_dpo.language.heads import Scorer
from rlhf_vs_dpo.study.summary import MEASURED
from rlhf_vs_dpo.training import watched


def measured(
    heldout: pd.DataFrame, scorer: Scorer, rivals: pd.DataFrame, preferences: Preferences, evaluate: Evaluate
) -> dict[str, Any]:
    """Means at the end of training, and whether the run has `collapsed`; `rivals` are other samples of the line's SFT policy.

    heldout    what the production loop sampled: before the first step, where the policy is the SFT policy, and after the last
    """
    table = watched.scored(heldout, scorer, preferences)
    simulated = preferences.source == "annotator" and table["utility"].notna().any()
    asked = measure.Asked(preferences.annotator.temperature if simulated else None, evaluate.price)
    table = measure.watched(table, rivals, asked)
    steps = sorted(table["step"].unique())
    start, end = (table.loc[table["step"] == step, list(MEASURED)].mean() for step in (steps[0], steps[-1]))
    judge = "gold" if table["gold"].notna().any() else "reward"
    gone = measure.collapsed(end["finished"], end[judge], start[judge], evaluate.collapse)
    return {"collapsed": gone, **end.to_dict()}
