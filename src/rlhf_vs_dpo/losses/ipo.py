r"""Identity preference optimisation.

Azar et al. 2023, "A General Theoretical Paradigm to Understand Learning from Human Preferences", arXiv:2310.12036, eq. 17:

    L = ( h_w - h_l - 1 / (2 * tau) )^2,      h = log pi(y|x) - log ref(y|x)

    tau   weight of the KL to the reference: the difference of log-ratios is regressed onto 1 / (2 tau)

Unlike DPO it has a finite optimum where one response is always preferred: with two outcomes, a uniform reference and
preference probability p for the first, pi(first) = sigmoid( (2p - 1) / (2 tau) ).
Where we differ: nothing. Log-ratios are *summed* over the tokens of a response, as in the equation and in the DPO
authors' code. TRL averages them over tokens, so that its tau is another number: 1 / (2 tau) is there per token.
"""

from torch import Tensor

from rlhf_vs_dpo.losses.dpo import PairLoss


def ipo(chosen: Tensor, rejected: Tensor, ref_chosen: Tensor, ref_rejected: Tensor, tau: float) -> PairLoss:
    """Eq. 17 from log-probabilities of whole responses under pi and ref, each (B,); implicit rewards are tau * h."""
    h_w, h_l = chosen - ref_chosen, rejected - ref_rejected
    short = h_w - h_l - 1 / (2 * tau)  # of the target
    return PairLoss(short**2, (tau * h_w).detach(), (tau * h_l).detach(), -2 * short.detach() / tau)
