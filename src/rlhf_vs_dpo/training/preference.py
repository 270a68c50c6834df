"""Optimise a policy directly on preference pairs: one loop for DPO, cDPO, IPO, LN-DPO and SimPO, one loss each."""

import math
from pathlib import Path

import pandas as pd
import torch
from torch import Tensor, nn

from rlhf_vs_dpo.config import Preference
from rlhf_vs_dpo.errors import DataError
from rlhf_vs_dpo.language.forward import log_likelihoods, measure
from rlhf_vs_dpo.language.logprobs import Policy
from rlhf_vs_dpo.language.text import Batch, Pairs, check_distinct, collate
from rlhf_vs_dpo.losses.dpo import PairLoss, cdpo, dpo, ln_dpo
from rlhf_vs_dpo.losses.ipo import ipo
from rlhf_vs_dpo.losses.simpo import simpo
from rlhf_vs_dpo.run.progress import Record
from rlhf_vs_dpo.training.invariants import hold, tolerance
from rlhf_vs_dpo.training.supervised import as_training, fit, work_of_pairs

CHECKED = 8  # pairs whose log-probabilities are held against the stored ones before the first step
NEEDS_REFERENCE = {"dpo": True, "cdpo": True, "ipo": True, "ln_dpo": True, "simpo": False}


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
        case "cdpo":
            return cdpo(chosen, rejected, *reference, beta=settings.beta, label_smoothing=settings.label_smoothing)
        case "ipo":
            return ipo(chosen, rejected, *reference, tau=settings.tau)
        case "ln_dpo":
            return ln_dpo(chosen, rejected, *reference, *lengths, beta=settings.beta)
        case "simpo":
            return simpo(chosen, rejected, *lengths, beta=settings.beta, gamma=settings.gamma)
    raise ValueError(settings.loss)  # config.py admits no other


def loss_at_reference(settings: Preference) -> float | None:
    """What the loss is where policy and reference are one; None for SimPO, which knows no reference."""
    match settings.loss:
        case "dpo" | "cdpo" | "ln_dpo":
            return math.log(2)
        case "ipo":
            return 1 / (4 * settings.tau**2)
    return None


def train(
    policy: Policy,
    pairs: Pairs,
    reference: pd.DataFrame | None,
    settings: Preference,
    steps: int,
    seed: int,
    record: Record,
) -> int:
    """Train on pairs for `steps` batches; returns the tokens trained on.

    `reference` holds log ref of each pair, in the order of the pairs (columns `chosen_logp`, `rejected_logp`); None for
    losses that need none. Its values are constants: no gradient flows to the reference policy, which is not even loaded
    here. In the first round (`record.taken` is 0) the policy must be the reference: TrainingError is raised if the step-0
    invariants of the loss are broken.
    """
    check_distinct(pairs)
    device = next(policy.parameters()).device
    stored = None
    if NEEDS_REFERENCE[settings.loss]:
        stored = [
            torch.tensor(reference[f"{side}_logp"].to_numpy(), dtype=torch.float32, device=device)
            for side in ("chosen", "rejected")
        ]
        if record.taken == 0 and not record.checkpoint.goes_on("fit"):
            check_reference(policy, pairs, reference, settings)

    def loss(module: nn.Module, group: list[int]) -> tuple[Tensor, dict[str, float]]:
        batch = collate(pairs.both(group), policy.pad).to(device)
        output = module(batch)
        good, bad = output.sums().chunk(2)
        lengths = output.lengths().chunk(2)
        result = pair_loss(
            settings, good, bad, lengths, None if stored is None else tuple(side[group] for side in stored)
        )
        sums = {
            "accuracy": (result.chosen_reward > result.rejected_reward).float(),
            "margin": result.chosen_reward - result.rejected_reward,
            "weight": result.weight,
            "chosen_reward": result.chosen_reward,
            "rejected_reward": result.rejected_reward,
            "chosen_logp": good,
            "rejected_logp": bad,
            "chosen_tokens": lengths[0].float(),
            "rejected_tokens": lengths[1].float(),
        }
        return result.loss.sum(), {f"pairs/{name}": value.sum().item() for name, value in sums.items()}

    return fit(policy, as_training(settings, steps), work_of_pairs(pairs), loss, seed, record)


def stored_reference(pairs: pd.DataFrame, reference: pd.DataFrame, place: Path) -> pd.DataFrame:
    """The rows of `reference` in the order of `pairs`. Raises DataError if a pair has none."""
    joined = pairs[["pair_id"]].merge(reference, on="pair_id", how="left")
    lost = joined.loc[joined["chosen_logp"].isna(), "pair_id"]
    if len(lost):
        raise DataError(
            f"{place}: no log-probability for {len(lost)} pairs, {lost.iloc[0]} first; run `dvc repro reference`"
        )
    return joined


def implicit_rewards(
    policy: Policy, pairs: Pairs, reference: pd.DataFrame | None, settings: Preference
) -> pd.DataFrame:
    """The policy as a reward model: the implicit rewards that its own loss compares (`chosen`, `rejected`), per pair."""

    def read(policy: Policy, batch: Batch) -> list[tuple[float, int]]:
        output = policy(batch)
        return list(zip(output.sums().tolist(), output.lengths().tolist(), strict=True))

    sides = []
    for examples in (pairs.chosen, pairs.rejected):
        logp, lengths = zip(*measure(policy, examples, read), strict=True)
        sides.append((torch.tensor(logp), torch.tensor(lengths)))
    stored = None
    if NEEDS_REFERENCE[settings.loss]:
        stored = tuple(torch.tensor(reference[f"{side}_logp"].to_numpy()).float() for side in ("chosen", "rejected"))
    result = pair_loss(settings, sides[0][0], sides[1][0], (sides[0][1], sides[1][1]), stored)
    return pd.DataFrame(
        {"chosen": result.chosen_reward.double().numpy(), "rejected": result.rejected_reward.double().numpy()}
    )


def check_reference(policy: Policy, pairs: Pairs, stored: pd.DataFrame, settings: Preference) -> None:
    """At step 0 the policy is the reference: h = 0, hence a loss of log 2 (DPO, cDPO, LN-DPO) or 1 / (4 tau^2) (IPO).

    Of the first `CHECKED` pairs; `stored` has their log ref (`chosen_logp`, `rejected_logp`), in the order of the pairs.
    """
    chosen, rejected, stored = pairs.chosen[:CHECKED], pairs.rejected[:CHECKED], stored.head(CHECKED)
    device = next(policy.parameters()).device
    causes = "data/reference.parquet belongs to another SFT model or temperature; dropout is on; the tokenizer changed"
    logp = {}
    for side, examples in (("chosen", chosen), ("rejected", rejected)):
        logp[side] = log_likelihoods(policy, examples)
        apart = zip(logp[side], stored[f"{side}_logp"], examples, strict=True)
        gap = max(abs(a - b) / len(tokens.response) ** 0.5 for a, b, tokens in apart)
        what = f"the largest |log pi - log ref| / sqrt(tokens) of {len(examples)} {side} responses"
        hold(what, gap, 0.0, tolerance(device, 1), causes)
    lengths = tuple(torch.tensor([float(len(tokens.response)) for tokens in side]) for side in (chosen, rejected))
    reference = tuple(torch.tensor(stored[f"{side}_logp"].to_numpy()).float() for side in ("chosen", "rejected"))
    sides = [torch.tensor(logp[side], requires_grad=True) for side in ("chosen", "rejected")]
    losses = pair_loss(settings, *sides, lengths, reference).loss
    slope = float(torch.autograd.grad(losses.sum(), sides[0])[0].abs().max())
    longest = float(torch.cat(lengths).max())
    allowed = 2 * slope * tolerance(device, longest) / len(losses) ** 0.5  # errors of pairs are independent, too
    hold(f"the {settings.loss} loss", float(losses.detach().mean()), loss_at_reference(settings), allowed, causes)
