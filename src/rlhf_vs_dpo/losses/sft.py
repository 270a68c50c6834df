r"""Supervised fine-tuning, and pretraining: maximum likelihood.

Ouyang et al. 2022 (InstructGPT), arXiv:2203.02155, section 3.1 and the second term of eq. 2:

    L = - sum_t log pi(y_t | x, y_<t)

SFT sums over response tokens only; pretraining is the same loss with a prompt that is BOS alone (`text.documents`).
Where we differ: nothing. The caller divides the sum by the number of tokens in the global batch.
"""

from torch import Tensor


def nll(logp: Tensor) -> Tensor:
    """Negative log-likelihood of each response, from its log-probability: (B,) -> (B,)."""
    return -logp
