r"""Proximal policy optimisation, and PPO-ptx.

Schulman et al. 2017, "Proximal Policy Optimization Algorithms", arXiv:1707.06347, eq. 7, negated to a loss:

    L_t = - min( rho_t * A_t, clip(rho_t, 1 - eps, 1 + eps) * A_t ),      rho_t = pi(y_t) / pi_old(y_t)

The value network has parameters of its own (Stiennon et al. 2020, arXiv:2009.01325, section 3.4) and minimises

    L_t = 1/2 * max( (V - G)^2, (clip(V, V_old - eps, V_old + eps) - G)^2 ),      G = returns

which is the clipping of OpenAI's code (baselines/ppo2), not of the paper.

PPO-ptx (Ouyang et al. 2022, InstructGPT, arXiv:2203.02155, eq. 2) adds gamma * E_pretrain[ log pi(x) ] to the objective.
Where we differ: both terms are means over tokens here, so that gamma is the weight of a token of text against a token of
experience; InstructGPT's 27.8 belongs to its own loss scales. gamma is fixed, as in eq. 2, and the share of the gradient
that it takes is logged (`update/ptx_gradient_share`), which is what to look at when choosing it.
"""

import torch
from torch import Tensor


def policy_loss(logp: Tensor, old_logp: Tensor, advantages: Tensor, clip: float) -> Tensor:
    """Eq. 7 per response token; every argument is (N,), N response tokens."""
    ratio = (logp - old_logp).exp()
    return -torch.min(ratio * advantages, ratio.clamp(1 - clip, 1 + clip) * advantages)


def value_loss(values: Tensor, old_values: Tensor, returns: Tensor, clip: float) -> Tensor:
    """Clipped squared error per response token; every argument is (N,)."""
    clipped = old_values + (values - old_values).clamp(-clip, clip)
    return 0.5 * torch.max((values - returns) ** 2, (clipped - returns) ** 2)


def next_kl_coefficient(beta: float, kl: float, target: float, horizon: float, episodes: int) -> float:
    """Adaptive KL coefficient: Ziegler et al. 2019, arXiv:1909.08593, section 2.2 (eq. unnumbered).

    error = clip(KL / target - 1, -0.2, 0.2);   beta <- beta * (1 + error * episodes / horizon)
    """
    error = min(max(kl / target - 1, -0.2), 0.2)
    return beta * (1 + error * episodes / horizon)
