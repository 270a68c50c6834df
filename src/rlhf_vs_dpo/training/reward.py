"""Train a reward model on preference pairs, and measure it on pairs that it was not trained on."""

import numpy as np
import pandas as pd
from torch import Tensor, nn

from rlhf_vs_dpo.config import Training
from rlhf_vs_dpo.language.heads import Scorer
from rlhf_vs_dpo.language.states import last
from rlhf_vs_dpo.language.text import Pairs, check_distinct, collate
from rlhf_vs_dpo.losses.bradley_terry import bradley_terry
from rlhf_vs_dpo.run.progress import Record
from rlhf_vs_dpo.training.supervised import fit, work_of_pairs


def train(scorer: Scorer, pairs: Pairs, settings: Training, seed: int, record: Record) -> int:
    """Bradley-Terry on pairs; both responses of a pair go through in one forward pass."""

    def loss(module: nn.Module, group: list[int]) -> tuple[Tensor, dict[str, float]]:
        batch = collate(pairs.both(group), scorer.pad).to(next(scorer.parameters()).device)
        good, bad = module(batch, last(batch.response_mask)).chunk(2)
        return bradley_terry(good, bad).sum(), {
            "accuracy": (good > bad).sum().item(),
            "margin": (good - bad).sum().item(),
        }

    check_distinct(pairs)
    return fit(scorer, settings, work_of_pairs(pairs), loss, seed, record)


def quality(pairs: pd.DataFrame, scale: float = 1.0) -> dict:
    """Accuracy against the annotator and against gold, calibration, and mean reward by length.

    `pairs` has `{chosen,rejected}_{reward,tokens,gold}`; gold may be null. Rewards are those of the head over `scale` (`reward_scale`);
    of margins of the head the Bradley-Terry probability is the sigmoid. Calibration: that probability of the response that scores
    higher, against how often the annotator chose it, in ten bins; `calibration_error` is their mean absolute difference weighted by
    bin size (expected calibration error).
    """
    margin = scale * (pairs["chosen_reward"] - pairs["rejected_reward"]).to_numpy()
    right = (margin > 0) + 0.5 * (margin == 0)
    predicted = 1 / (1 + np.exp(-np.abs(margin)))
    bins = np.minimum(((predicted - 0.5) * 20).astype(int), 9)
    calibration = {}
    error = 0.0
    for number in range(10):
        inside = bins == number
        if inside.any():
            entry = {
                "pairs": int(inside.sum()),
                "predicted": float(predicted[inside].mean()),
                "observed": float(right[inside].mean()),
            }
            calibration[f"{0.5 + number / 20:.2f}"] = entry
            error += abs(entry["predicted"] - entry["observed"]) * inside.mean()
    result = {
        "accuracy": float(right.mean()),
        "accuracy_standard_error": float(right.std() / np.sqrt(len(right))),
        "log_loss": float(np.logaddexp(0, -margin).mean()),
        "calibration_error": float(error),
        "calibration": calibration,
        "mean_by_length": by_length(pairs),
    }
    gap = (pairs["chosen_gold"] - pairs["rejected_gold"]).to_numpy()
    decided = np.isfinite(gap) & (gap != 0)
    if decided.any():
        result["accuracy_against_gold"] = float((np.sign(margin[decided]) == np.sign(gap[decided])).mean())
        gold = np.concatenate([pairs["chosen_gold"], pairs["rejected_gold"]])
        reward = np.concatenate([pairs["chosen_reward"], pairs["rejected_reward"]])
        result["correlation_with_gold"] = float(np.corrcoef(gold, reward)[0, 1])
    return result


def by_length(pairs: pd.DataFrame) -> dict[str, dict[str, float]]:
    """Mean reward of responses by quarter of their length: a slope says that the model pays for length."""
    tokens = pd.concat([pairs["chosen_tokens"], pairs["rejected_tokens"]], ignore_index=True)
    reward = pd.concat([pairs["chosen_reward"], pairs["rejected_reward"]], ignore_index=True)
    groups = reward.groupby(pd.qcut(tokens, 4, duplicates="drop"), observed=True)
    return {
        f"{int(interval.left) + 1}-{int(interval.right)}": {"reward": float(values.mean()), "responses": len(values)}
        for interval, values in groups
    }
