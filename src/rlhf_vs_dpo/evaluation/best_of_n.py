"""Best-of-n without training, for every n from one pool of N >= n samples per prompt (order_statistics.py)."""

import numpy as np
import pandas as pd

from rlhf_vs_dpo.evaluation.order_statistics import log_ratio, tied_weights


def as_samples(pool: pd.DataFrame, n: int) -> pd.DataFrame:
    """Rows of a pool as a `samples` table of the best-of-n policy: `weight` sums to 1 per prompt, `logp` is of its law."""
    codes, _ = pd.factorize(pool["prompt_id"])
    order = np.argsort(codes, kind="stable")
    ends = np.cumsum(np.bincount(codes))[:-1]
    columns = (pool[name].to_numpy()[order] for name in ("reward", "logp", "response", "tokens"))
    weight, ratio, sampled = [], [], []
    for rewards, logp, responses, tokens in zip(*(np.split(column, ends) for column in columns), strict=True):
        weight.append(tied_weights(rewards, n))
        ratio.append(log_ratio(rewards, logp, responses.astype(str), n))
        sampled.append(np.full(len(tokens), n * tokens.mean()))  # what one answer costs at inference
    law = pool.iloc[order].reset_index(drop=True)
    law = law.assign(weight=np.concatenate(weight), sampled_tokens=np.concatenate(sampled))
    law["logp"] = law["reference_logp"] + np.concatenate(ratio)
    return law[law["weight"] > 0].reset_index(drop=True)
