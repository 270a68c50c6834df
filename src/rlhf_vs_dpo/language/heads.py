"""Scalar heads on a language model: the reward model, and, started from it, PPO's value network."""

import math
from pathlib import Path

from torch import Tensor, nn

from rlhf_vs_dpo.config import Adapter, Memory
from rlhf_vs_dpo.errors import ModelError
from rlhf_vs_dpo.language import adapters
from rlhf_vs_dpo.language.models import Network, device, in_float32, light, load, load_own, to_learn, to_read
from rlhf_vs_dpo.language.states import states
from rlhf_vs_dpo.language.text import Batch


class Scorer(Network):
    """A language model with a scalar head: the reward model, and, started from it, PPO's value network.

    Laid out and saved as AutoModelForSequenceClassification with one label. The raw head is normalised by two
    constants that live in the config and travel with the folder: score = (head - reward_shift) / reward_scale.
    """

    def forward(self, batch: Batch, where: Tensor) -> Tensor:
        """Normalised scalar at the N True places of `where` (B, T), in their order, (N,) float32."""
        config = self.model.config
        raw = in_float32(self.head, states(self.model, batch, where))[:, 0]
        return (raw - config.reward_shift) / config.reward_scale

    @property
    def head(self) -> nn.Linear:
        return self.model.score if hasattr(self.model, "score") else self.model.classifier


def scorer_from_policy(
    folder: Path, adapter: Adapter | None = None, memory: Memory | None = None
) -> tuple[Scorer, object]:
    """A reward model to be trained: the policy's body, and a head drawn from N(0, 1/(d+1)) (Stiennon et al. 2020, B.1).

    adapter     low-rank adapters to be trained, with the head, in the place of all weights
    memory      what is given for memory: activations computed again, weights in parts
    """
    model, tokenizer = load(str(folder), "AutoModelForSequenceClassification", {"num_labels": 1}, new_head=True)
    model.config.reward_shift, model.config.reward_scale = 0.0, 1.0
    scorer = Scorer(model)
    width = scorer.head.in_features
    nn.init.normal_(scorer.head.weight, std=(width + 1) ** -0.5)
    to_learn(model, adapter, memory)
    return scorer.to(device()), tokenizer


def load_scorer(folder: Path, beside: nn.Module | None = None) -> Scorer:
    """A trained reward model with its normalisation. Raises ModelError if the folder carries none.

    beside      a model that this one shares the base of its adapters with; without it, it is read only (`models.to_read`)
    """
    model, _ = load_own(folder, "AutoModelForSequenceClassification")
    shift, scale = getattr(model.config, "reward_shift", None), getattr(model.config, "reward_scale", None)
    if (
        not isinstance(shift, float)
        or not isinstance(scale, float)
        or not math.isfinite(shift)
        or not 0 < scale < math.inf
    ):
        raise ModelError(
            f"{folder}: config.json has no usable reward_shift and reward_scale ({shift}, {scale}); it is not a reward model of the `reward` stage "
            "(set both, to 0.0 and 1.0 for raw scores)"
        )
    if beside is None:
        return Scorer(to_read(model))
    adapters.share(model, beside)
    return Scorer(light(model.to(device())))
