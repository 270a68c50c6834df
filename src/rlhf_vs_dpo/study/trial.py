"""What a trial is worth: its last samples on validation prompts, measured as those that are watched in training."""

from typing import NamedTuple

import pandas as pd

from rlhf_vs_dpo.config import Evaluate, Preferences
from rlhf_vs_dpo.errors import DataError
from rlhf_vs_dpo.evaluation import measure
from rlhf_vs_dpo.language.heads import Scorer
from rlhf_vs_dpo.study.space import MEASURED
from rlhf_vs_dpo.training import watched


def check_criterion(criterion: str, pool: pd.DataFrame) -> None:
    """Refuse, before any trial, a criterion that nobody can tell; `pool` has samples of the SFT policy. Raises DataError."""
    needed = {"preferred": "utility", "objective": "utility"}.get(criterion, criterion)
    if pool[needed].isna().all():
        raise DataError(
            f"`tuning.criterion` is {criterion}, and this source has no {needed}; in params.yaml set it to one that it has, such as reward"
        )


class Ruler(NamedTuple):
    """What all trials are measured by: the reward model of their line, and `rivals`, other samples of its SFT policy."""

    scorer: Scorer
    rivals: pd.DataFrame
    preferences: Preferences
    evaluate: Evaluate

    def measure(self, heldout: pd.DataFrame) -> tuple[dict[str, float], bool]:
        """Means at the end of training, and whether the run has collapsed.

        heldout    what the production loop sampled: before the first step, where the policy is the SFT policy, and after the last
        """
        table = watched.scored(heldout, self.scorer, self.preferences)
        simulated = self.preferences.source == "annotator" and table["utility"].notna().any()
        asked = measure.Asked(self.preferences.annotator.temperature if simulated else None, self.evaluate.price)
        table = measure.watched(table, self.rivals, asked)
        steps = sorted(table["step"].unique())
        start, end = (table.loc[table["step"] == step, list(MEASURED)].mean() for step in (steps[0], steps[-1]))
        judge = measure.judged_by(table)
        gone = measure.collapsed(end["finished"], end[judge], start[judge], self.evaluate.collapse)
        return end.to_dict(), gone
