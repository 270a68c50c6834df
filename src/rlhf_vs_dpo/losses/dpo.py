r"""Direct preference optimisation, its length-normalised form, and its form for noisy labels.

Rafailov et al. 2023, "Direct Preference Optimization", arXiv:2305.18290, eq. 7:

    L = - log sigmoid( beta * h_w - beta * h_l ),      h = log pi(y|x) - log ref(y|x)

    pi    policy        ref   reference policy, the SFT model        beta  KL weight of the RLHF objective
    beta * h is the implicit reward; it equals r(x, y) up to a constant of x when pi is optimal (eq. 5).

LN-DPO (Lambert et al. 2024, Tulu 3, arXiv:2411.15124, eq. 6; `dpo_norm` in open-instruct, `sigmoid_norm` in TRL) divides
each h by the length of its response:

    L = - log sigmoid( beta * h_w / |y_w| - beta * h_l / |y_l| )

cDPO (Mitchell 2023, "A note on DPO with noisy preferences", eq. 3; `label_smoothing` in the DPO authors' code and in TRL)
takes each label to be wrong with probability eps:

    L = - (1 - eps) * log sigmoid(s) - eps * log sigmoid(-s),      s = beta * h_w - beta * h_l

so that the loss has a finite minimum, at sigmoid(s) = 1 - eps, where DPO pushes s without end.

Where we differ: nothing; lengths count the EOS token, which is part of the response.
"""

from typing import NamedTuple

import torch.nn.functional as F
from torch import Tensor


class PairLoss(NamedTuple):
    """Per pair, each (B,), detached but for the loss.

    loss                            what is minimised
    chosen_reward, rejected_reward  implicit rewards of the two responses
    weight                          - dL/ds, s the margin of implicit rewards: how hard the pair still pulls. sigmoid(-s) for DPO (eq. 7's
                                    gradient): the more, the more wrongly the policy orders the pair
    """

    loss: Tensor
    chosen_reward: Tensor
    rejected_reward: Tensor
    weight: Tensor


def logistic(reward_w: Tensor, reward_l: Tensor, shift: float = 0.0) -> PairLoss:
    """- log sigmoid(s - shift) of the margin s between two implicit rewards."""
    s = reward_w - reward_l - shift
    return PairLoss(-F.logsigmoid(s), reward_w.detach(), reward_l.detach(), (-s.detach()).sigmoid())


def dpo(chosen: Tensor, rejected: Tensor, ref_chosen: Tensor, ref_rejected: Tensor, beta: float) -> PairLoss:
    """Eq. 7 from log-probabilities of whole responses under pi and ref, each (B,)."""
    return logistic(beta * (chosen - ref_chosen), beta * (rejected - ref_rejected))


def cdpo(
    chosen: Tensor, rejected: Tensor, ref_chosen: Tensor, ref_rejected: Tensor, beta: float, label_smoothing: float
) -> PairLoss:
    """DPO with label smoothing eps; arguments as those of `dpo`."""
    reward_w = beta * (chosen - ref_chosen)
    reward_l = beta * (rejected - ref_rejected)
    s = reward_w - reward_l
    loss = -(1 - label_smoothing) * F.logsigmoid(s) - label_smoothing * F.logsigmoid(-s)
    weight = (-s.detach()).sigmoid() - label_smoothing
    return PairLoss(loss, reward_w.detach(), reward_l.detach(), weight)


def ln_dpo(
    chosen: Tensor,
    rejected: Tensor,
    ref_chosen: Tensor,
    ref_rejected: Tensor,
    chosen_tokens: Tensor,
    rejected_tokens: Tensor,
    beta: float,
) -> PairLoss:
    """Length-normalised DPO; `*_tokens` are |y|, each (B,)."""
    return logistic(beta * (chosen - ref_chosen) / chosen_tokens, beta * (rejected - ref_rejected) / rejected_tokens)
