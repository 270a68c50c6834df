"""The only room that turns hidden states into log pi(y|x).

Three rules hold for every log-probability of the project: it is taken under the distribution that is sampled from
(logits divided by the sampling temperature; likelihoods of given texts, in SFT and in PPO-ptx, are the model's own, at 1), in
float32 with the vocabulary projection itself, and at response tokens only.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from rlhf_vs_dpo.errors import ModelError
from rlhf_vs_dpo.language.models import Network, in_float32, in_full
from rlhf_vs_dpo.language.states import before, states
from rlhf_vs_dpo.language.text import Batch

AT_ONCE = 2**26  # logits held at once: 256 MiB of float32, and as much again for their softmax


class TokenLogprobs(NamedTuple):
    """Log-probabilities of response tokens, laid out as the batch is.

    logp    (B, T) float32: log pi(token | what precedes it) at response tokens, 0 elsewhere
    mask    (B, T) bool: where response tokens are; whoever averages must use it, zeros are not values
    entropy (B, T) float32, detached: entropy of the distribution each response token was drawn from, 0 elsewhere; None where not asked for
    """

    logp: Tensor
    mask: Tensor
    entropy: Tensor | None

    def sums(self) -> Tensor:
        """log pi(y|x), shape (B,)."""
        return self.logp.sum(-1)

    def lengths(self) -> Tensor:
        """|y|, response tokens with EOS, shape (B,)."""
        return self.mask.sum(-1)


def suppress(logits: Tensor, model: nn.Module) -> Tensor:
    """Logits in which the tokens that a policy never says (`suppress_tokens` of its generation config) have probability 0.

    Part of what the policy is: sampling and every log-probability go through here. The fill is finite, so that 0 times
    its logarithm is 0.
    """
    silent = getattr(getattr(model, "generation_config", None), "suppress_tokens", None)
    if not silent:
        return logits
    return logits.index_fill(-1, torch.tensor(silent, device=logits.device), -1e30)


class Policy(Network):
    """A causal language model as a policy: batch in, log-probabilities of its response tokens out.

    One `forward` does it all, so that wrappers which hook it (DistributedDataParallel) see every pass.
    """

    def __init__(self, model: nn.Module, temperature: float):
        super().__init__(model)
        self.temperature = temperature
        self.again = False  # whether logits are computed again in the backward pass however few they are

    @property
    def eos(self) -> int:
        """Id of the token that ends a response."""
        return self.model.config.eos_token_id

    def forward(self, batch: Batch, temperature: float | None = None, entropy: bool = False) -> TokenLogprobs:
        """Log-probabilities at the policy's own temperature, unless another is given; and entropies, if asked for."""
        mask, temperature = batch.response_mask, temperature or self.temperature
        hidden, chosen = states(self.model, batch, before(mask)), batch.input_ids[mask]
        rows = max(1, AT_ONCE // self.vocabulary)
        if len(hidden) <= rows and not self.again:
            logp, spread = self._read(hidden, chosen, temperature, entropy)
        else:  # of a large vocabulary, logits of some tokens at a time; backward computes them again and keeps none
            parts = [
                checkpoint(self._read, *part, temperature, entropy, use_reentrant=False, preserve_rng_state=False)
                for part in zip(hidden.split(rows), chosen.split(rows), strict=True)
            ]
            logp, spread = (torch.cat(of) for of in zip(*parts, strict=True))
        empty = torch.zeros(mask.shape, dtype=torch.float32, device=mask.device)
        return TokenLogprobs(
            empty.masked_scatter(mask, logp), mask, empty.masked_scatter(mask, spread) if entropy else None
        )

    def _read(self, hidden: Tensor, chosen: Tensor, temperature: float, entropy: bool) -> tuple[Tensor, Tensor]:
        """Log-probabilities of N tokens at the states before them, and entropies, empty where they are not asked for; (N,)."""
        log_distribution = self._log_distribution(hidden, temperature)
        logp = log_distribution.gather(-1, chosen[:, None])[:, 0]
        if not entropy:
            return logp, logp.new_empty(0)
        with torch.no_grad():
            return logp, -(log_distribution.exp() * log_distribution).sum(-1)

    def distributions(self, batch: Batch) -> Tensor:
        """Log-probabilities of every token at the states before the N response tokens, in their order, (N, V) float32."""
        return self._log_distribution(states(self.model, batch, before(batch.response_mask)), self.temperature)

    def _log_distribution(self, hidden: Tensor, temperature: float) -> Tensor:
        logits = suppress(self.project(hidden), self.model)
        return (logits if temperature == 1.0 else logits / temperature).log_softmax(-1)

    @property
    def vocabulary(self) -> int:
        """Tokens of the model's projection."""
        return self.model.config.get_text_config().vocab_size

    def project(self, hidden: Tensor) -> Tensor:
        """Vocabulary logits of hidden states (N, d) -> (N, V) float32; `check_projection` proves that this is the model's own.

        bf16 would step by 1/8 between logits of 16 and 32.
        """
        return in_float32(self.model.get_output_embeddings(), hidden)


@in_full()
def check_projection(policy: Policy, batch: Batch) -> None:
    """Refuse a model whose logits are not a plain projection of its last hidden state (soft caps, logit scales).

    Compares our response-only log-probabilities with those from the model's own full logits, on one small batch.
    """
    with torch.no_grad():
        ours = policy(batch).logp
        full = policy.model(
            input_ids=batch.input_ids,
            attention_mask=batch.attention_mask,
            use_cache=False,
        ).logits
        log_distribution = (suppress(full[:, :-1].float(), policy.model) / policy.temperature).log_softmax(-1)
        theirs = log_distribution.gather(-1, batch.input_ids[:, 1:, None])[..., 0]
        mask = batch.response_mask[:, 1:]
        gap = (ours[:, 1:] - theirs)[mask].abs().max().item()
    if not gap < (1e-3 if full.dtype == torch.float32 else 0.2):
        raise ModelError(
            f"{type(policy.model).__name__} ({policy.model.config.name_or_path or 'from scratch'}): its logits are not a plain projection of its hidden "
            f"states (log-probabilities differ by {gap:.2g}); such models are not supported"
        )
