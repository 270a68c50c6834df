r"""Attempt 2 at reinforcement learning: trust region policy optimisation.

Schulman et al. 2015, "Trust Region Policy Optimization", arXiv:1502.05477, eq. 14:

    maximise_theta   E_{s, a ~ old}[ pi(a|s) / old(a|s) * A(s, a) ]
    subject to       E_{s ~ old}[ KL( old(.|s) || pi(.|s) ) ] <= delta

A state s is a prompt with the response tokens so far, an action a the next token. Appendix C: with g the gradient of the
objective and F the Hessian of the mean KL at theta = old (the Fisher matrix), the step is

    x = F^-1 g  by conjugate gradient on products F v,      step = sqrt( 2 * delta / (x' F x) ) * x

halved until the constraint holds and the objective has not fallen (backtracking line search).
Where we differ: (F + damping * I) stands for F, as in OpenAI's code (baselines/trpo_mpi), for F is singular wherever two
parameters do the same; F may be estimated on a share of the episodes, as appendix C proposes; and delta shrinks by the schedule by which the
other methods lower their learning rate (`rl.schedule`; constant is the paper's).
"""

from collections.abc import Callable

import torch
from torch import Tensor


def surrogate(logp: Tensor, old_logp: Tensor, advantages: Tensor) -> Tensor:
    """Importance-weighted advantage per response token, to be maximised: eq. 14; every argument (N,)."""
    return (logp - old_logp).exp() * advantages


def kl_divergence(old: Tensor, new: Tensor) -> Tensor:
    """KL(old || new) of the token distributions at each state: log-probabilities (N, V), (N, V) -> (N,)."""
    return (old.exp() * (old - new)).sum(-1)


def conjugate_gradient(product: Callable[[Tensor], Tensor], target: Tensor, steps: int) -> Tensor:
    """Approximate solution x of product(x) = target, for a symmetric positive definite product; (P,) -> (P,)."""
    x = torch.zeros_like(target)
    residual = target.clone()
    direction = target.clone()
    squared = residual @ residual
    for _ in range(steps):
        if squared <= 1e-20:
            break
        applied = product(direction)
        along = squared / (direction @ applied)
        x = x + along * direction
        residual = residual - along * applied
        following = residual @ residual
        direction = residual + following / squared * direction
        squared = following
    return x
