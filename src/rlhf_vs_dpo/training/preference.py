"""Optimise a policy directly on preference pairs: one loop for DPO, LN-DPO and SimPO, one loss each."""

import math
from collections.abc import Sequence
from pathlib import Path

import pandas as pd
import torch
from torch import Tensor, nn

from rlhf_vs_dpo.config import Preference, Training
from rlhf_vs_dpo.errors import DataError
from rlhf_vs_dpo.logprobs import Policy
from rlhf_vs_dpo.losses.dpo import PairLoss, dpo, ln_dpo
from rlhf_vs_dpo.losses.simpo import simpo
from rlhf_vs_dpo.text import Tokens, check_distinct, collate
from rlhf_vs_dpo.training.forward import log_likelihoods
from rlhf_vs_dpo.training.invariants import hold
from rlhf_vs_dpo.training.monitor import HeldOut
from rlhf_vs_dpo.training.optimise import Log
from rlhf_vs_dpo.training.supervised import fit

NEEDS_REFERENCE = {"dpo": True, "ln_dpo": True, "simpo": False}


def pair_loss(
    settings: Preference,
    chosen: Tensor,
    rejected: Tensor,
    lengths: tuple[Tensor, Tensor],
    reference: tuple[Tensor, Tensor] | None,
) -> PairLoss:
    """The loss that `settings.loss` names. All tensors (B,): log pi of both responses, |y| and, where needed, log ref."""
    match settings.loss:
        case "dpo":
            return dpo(chosen, rejected, *reference, beta=settings.beta)
        case "ln_dpo":
            return ln_dpo(chosen, rejected, *reference, *lengths, beta=settings.beta)
        case "simpo":
            return simpo(chosen, rejected, *lengths, beta=settings.beta, gamma=settings.gamma)
    raise ValueError(settings.loss)  # config.py admits no other


def train(
    policy: Policy,
    chosen: Sequence[Tokens],
    rejected: Sequence[Tokens],
    names: Sequence[str],
    reference: pd.DataFrame | None,
    pad: int,
    settings: Preference,
    seed: int,
    heldout: HeldOut,
    log: Log,
    what: str,
) -> int:
    """Train on pairs; returns the tokens trained on.

    `reference` holds log ref of each pair, in the order of the pairs (columns `chosen_logp`, `rejected_logp`); None for
    losses that need none. Its values are constants: no gradient flows to the reference policy, which is not even loaded
    here. Raises TrainingError if the step-0 invariant of the loss is broken.
    """
    check_distinct(chosen, rejected, names)
    device = next(policy.parameters()).device
    stored = None
    if NEEDS_REFERENCE[settings.loss]:
        stored = [
            torch.tensor(reference[f"{side}_logp"].to_numpy(), dtype=torch.float32, device=device)
            for side in ("chosen", "rejected")
        ]
        for side, examples in (("chosen", chosen), ("rejected", rejected)):
            check_reference(policy, examples[:32], reference[f"{side}_logp"].head(32), pad, side)

    def loss(module: nn.Module, group: list[int]) -> tuple[Tensor, dict[str, float]]:
        batch = collate([chosen[i] for i in group] + [rejected[i] for i in group], pad).to(device)
        output = module(batch)
        good, bad = output.sums().chunk(2)
        lengths = output.lengths().chunk(2)
        result = pair_loss(
            settings, good, bad, lengths, None if stored is None else tuple(side[group] for side in stored)
        )
        sums = {
            "accuracy": (result.chosen_reward > result.rejected_reward).float(),
            "margin": result.chosen_reward - result.rejected_reward,
            "chosen_reward": result.chosen_reward,
            "rejected_reward": result.rejected_reward,
            "chosen_logp": good,
            "rejected_logp": bad,
            "chosen_tokens": lengths[0].float(),
            "rejected_tokens": lengths[1].float(),
        }
        return result.loss.sum(), {f"pairs/{name}": value.sum().item() for name, value in sums.items()}

    training = schedule(settings, len(chosen))
    return fit(
        policy,
        training,
        [2 * max(len(a), len(b)) for a, b in zip(chosen, rejected, strict=True)],
        [1] * len(chosen),
        [len(a) + len(b) for a, b in zip(chosen, rejected, strict=True)],
        loss,
        names,
        seed,
        log,
        what,
        before_step=lambda step: heldout.watch(policy.model, step, log),
    )


def stored_reference(pairs: pd.DataFrame, reference: pd.DataFrame, place: Path) -> pd.DataFrame:
    """The rows of `reference` in the order of `pairs`. Raises DataError if a pair has none."""
    joined = pairs[["pair_id"]].merge(reference, on="pair_id", how="left")
    lost = joined.loc[joined["chosen_logp"].isna(), "pair_id"]
    if len(lost):
        raise DataError(
            f"{place}: no log-probability for {len(lost)} pairs, {lost.iloc[0]} first; run `dvc repro reference`"
        )
    return joined


def schedule(settings: Preference, pairs: int) -> Training:
    """Epochs over pairs as a number of steps."""
    return Training(
        steps=max(1, math.floor(settings.epochs * pairs / settings.batch)),
        **{name: getattr(settings, name) for name in Training.model_fields if name != "steps"},
    )


def check_reference(policy: Policy, examples: Sequence[Tokens], stored: pd.Series, pad: int, side: str) -> None:
    """At step 0 the policy is the reference: h = 0, hence a DPO or LN-DPO loss of log 2."""
    gap = max(abs(a - b) for a, b in zip(log_likelihoods(policy, examples, pad), stored, strict=True))
    exact = next(policy.parameters()).device.type == "cpu"
    hold(
        f"the largest |log pi - log ref| of {len(examples)} {side} responses (DPO loss is log 2 where all are 0)",
        gap,
        0.0,
        1e-3 if exact else 0.5,
        "data/reference.parquet belongs to another SFT model or temperature; dropout is on; the tokenizer changed",
    )
