"""Best-of-n without training, for every n from one pool of N >= n samples per prompt (order_statistics.py)."""

import pandas as pd

from rlhf_vs_dpo.evaluation.order_statistics import log_ratio, tied_weights


def as_samples(pool: pd.DataFrame, n: int) -> pd.DataFrame:
    """Rows of a pool as a `samples` table of the best-of-n policy: `weight` sums to 1 per prompt, `logp` is of its law."""
    parts = []
    for _, group in pool.groupby("prompt_id", sort=False):
        rewards = group["reward"].to_numpy()
        ratio = log_ratio(rewards, group["logp"].to_numpy(), group["response"].to_numpy(str), n)
        weight = tied_weights(rewards, n)
        sampled = n * group["tokens"].mean()  # what one answer costs at inference
        law = group["reference_logp"] + ratio
        parts.append(group.assign(weight=weight, logp=law, sampled_tokens=sampled)[weight > 0])
    return pd.concat(parts, ignore_index=True)
