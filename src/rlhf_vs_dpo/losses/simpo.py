r"""Simple preference optimisation: no reference policy.

Meng, Xia and Chen 2024, "SimPO: Simple Preference Optimization with a Reference-Free Reward", arXiv:2405.14734, eq. 6:

    L = - log sigmoid( beta / |y_w| * log pi(y_w|x) - beta / |y_l| * log pi(y_l|x) - gamma )

    pi    policy        beta   scale of the reward        gamma   target margin between the two rewards

Where we differ: nothing. `gamma` is the paper's; the official code and open-instruct set `gamma_beta_ratio` = gamma / beta
instead, and TRL calls it `simpo_gamma`.
"""

from torch import Tensor

from rlhf_vs_dpo.losses.dpo import PairLoss, logistic


def simpo(
    chosen: Tensor, rejected: Tensor, chosen_tokens: Tensor, rejected_tokens: Tensor, beta: float, gamma: float
) -> PairLoss:
    """Eq. 6 from log-probabilities of whole responses under pi and their lengths |y|, each (B,)."""
    return logistic(beta * chosen / chosen_tokens, beta * rejected / rejected_tokens, gamma)
