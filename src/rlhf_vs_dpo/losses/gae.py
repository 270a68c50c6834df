r"""Token rewards of the RLHF objective, generalised advantage estimation, and whitening.

Ouyang et al. 2022, arXiv:2203.02155, eq. 2 (first term), and Ziegler et al. 2019, arXiv:1909.08593, eq. 2:

    R(x, y) = r(x, y) - beta * log( pi(y|x) / ref(y|x) )

The KL term is paid token by token as k1 = log pi(y_t) - log ref(y_t); r is paid at the last token, EOS.

Schulman et al. 2016, "High-dimensional continuous control using generalized advantage estimation", arXiv:1506.02438, eq. 16:

    delta_t = R_t + gamma * V(s_{t+1}) - V(s_t)
    A_t     = delta_t + gamma * lambda * A_{t+1},      V after the last token = 0

Where we differ from "The N+ implementation details" (arXiv:2403.17031): r is paid at EOS, not one position after it, so
that the value of the state after EOS never enters. Where a response never ended the caller replaces r, see
`training/rollouts.py`.
"""

import torch
from torch import Tensor


def token_rewards(logp: Tensor, ref_logp: Tensor, score: Tensor, mask: Tensor, beta: float) -> Tensor:
    """R_t of each response token: logp, ref_logp and mask are (B, R), score (B,); 0 outside the mask, (B, R)."""
    rewards = -beta * (logp - ref_logp) * mask
    end = mask.sum(-1) - 1  # responses start at column 0, so that this is the column of the last token
    return rewards.scatter_add(1, end[:, None], score[:, None])


def gae(rewards: Tensor, values: Tensor, mask: Tensor, discount: float, lam: float) -> tuple[Tensor, Tensor]:
    """(advantages, returns) from rewards and values of (B, R) response tokens; 0 outside the mask.

    V(s_t) = values[:, t] is the value of the state *before* token t. returns = advantages + values: the target of the
    value network, taken before any whitening.
    """
    advantages = torch.zeros_like(rewards)
    later = torch.zeros_like(rewards[:, 0])
    following = torch.zeros_like(later)
    for t in reversed(range(rewards.shape[1])):
        delta = rewards[:, t] + discount * following - values[:, t]
        later = (delta + discount * lam * later) * mask[:, t]  # a masked column resets both carries to 0
        following = values[:, t] * mask[:, t]
        advantages[:, t] = later
    return advantages, (advantages + values) * mask


def whiten(values: Tensor, mean: Tensor, variance: Tensor) -> Tensor:
    """Zero mean, unit variance, given the moments over *all* response tokens of the batch, on every process."""
    return (values - mean) * torch.rsqrt(variance + 1e-8)
