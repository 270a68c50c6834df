r"""Attempt 1 at reinforcement learning: the policy gradient, and RLOO.

Ahmadian et al. 2024, "Back to Basics: Revisiting REINFORCE Style Optimization", arXiv:2402.14740, sections 2.2 and 2.3
(REINFORCE, eq. of the vanilla policy gradient with a baseline; RLOO, eq. of the leave-one-out estimator); Williams 1992:

    grad J = E_{y ~ pi}[ ( R(x, y) - b ) * grad log pi(y|x) ],      R = r(x, y) - beta * log( pi(y|x) / ref(y|x) )

    R    KL-shaped reward of the whole response, a constant to the gradient      b    baseline, independent of y

    REINFORCE            b = 0, or the mean R of the other episodes of the batch
    RLOO                 b = the mean R of the other k - 1 responses to the same prompt

The response is one action: every token of it is weighted by the same R - b. The gradient is unbiased for any b that does
not depend on y, which is why an episode is left out of its own baseline.
Where we differ: the paper's REINFORCE takes a running mean over training as its baseline; ours is the mean of the
others in the batch, which needs no memory and is the same function as RLOO's with the batch as the group.
"""

from torch import Tensor


def policy_gradient_loss(logp: Tensor, advantages: Tensor) -> Tensor:
    """-(R - b) log pi, whose gradient is the estimate above, negated; both arguments (N,), one entry per response token."""
    return -advantages * logp


def leave_one_out(rewards: Tensor) -> Tensor:
    """R minus the mean R of the others in the group: (groups, k) -> (groups, k), k at least 2."""
    others = (rewards.sum(-1, keepdim=True) - rewards) / (rewards.shape[-1] - 1)
    return rewards - others
