"""Which of a policy's samples speak for it, where one answer to each prompt is wanted."""

import pandas as pd


def first(samples: pd.DataFrame) -> pd.DataFrame:
    """The first sample for each prompt of a `samples` table, the policy prompted as it is meant to be (its first suffix)."""
    meant = samples["suffix"] == samples["suffix"].iloc[0]
    return samples[meant & (samples["sample"] == 0)].reset_index(drop=True)
