"""What was sampled while a method trained, scored when it is done: a `heldout` table becomes a `watched` one."""

import pandas as pd

from rlhf_vs_dpo.config import Preferences
from rlhf_vs_dpo.language.forward import scores
from rlhf_vs_dpo.language.heads import Scorer
from rlhf_vs_dpo.language.text import Tokens
from rlhf_vs_dpo.preferences import annotator


def scored(heldout: pd.DataFrame, reward: Scorer, preferences: Preferences) -> pd.DataFrame:
    """Numbers alone, with the RM reward of the responses that ended, and the annotator's utility."""
    examples = [Tokens(list(p), list(r)) for p, r in zip(heldout["prompt_ids"], heldout["response_ids"], strict=True)]
    watched = heldout[["step", "prompt_id", "finished", "logp", "reference_logp", "gold", "filler"]].assign(
        tokens=heldout["response_ids"].map(len),
        reward=pd.Series(scores(reward, examples), index=heldout.index).where(heldout["finished"]),
    )
    return watched.assign(utility=annotator.column(watched, preferences))
