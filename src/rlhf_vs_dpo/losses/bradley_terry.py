r"""Reward modelling under Bradley-Terry preferences.

Stiennon et al. 2020, "Learning to summarize from human feedback", arXiv:2009.01325, section 3.4, eq. (unnumbered, "loss(r)"):

    L = - log sigmoid( r(x, y_w) - r(x, y_l) )

    r     scalar read at the EOS of the response       y_w, y_l   chosen and rejected response

After training the reward is shifted so that demonstrations score 0 on average (same section; also Ouyang et al. 2022,
arXiv:2203.02155, section 3.5): the loss fixes r only up to a constant.
Where we differ: we may also scale to unit standard deviation over demonstrations (`reward.unit_scale`), off by default.
"""

import torch.nn.functional as F
from torch import Tensor


def bradley_terry(chosen: Tensor, rejected: Tensor) -> Tensor:
    """Loss per pair from the scores of both responses, each (B,) -> (B,)."""
    return -F.logsigmoid(chosen - rejected)
