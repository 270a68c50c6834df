"""Episodes: what a policy says, what it is paid for it, and the two ways to say how much better than expected that was."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from rlhf_vs_dpo.language import sharding
from rlhf_vs_dpo.language.generation import generate
from rlhf_vs_dpo.language.models import autocast
from rlhf_vs_dpo.language.states import before, last
from rlhf_vs_dpo.language.text import Batch, Prompts, Tokens, collate, micro_batches
from rlhf_vs_dpo.losses.gae import gae, token_rewards, whiten
from rlhf_vs_dpo.losses.reinforce import leave_one_out
from rlhf_vs_dpo.training.learner import Learner


class Episodes(NamedTuple):
    """What the policy did, flat over the N response tokens of B episodes, in their order.

    tokens, names, places    B examples, the ids of their prompts and their numbers in the global batch
    offsets                  (B + 1) where each episode starts among the N
    logp, ref_logp           (N,) under the policy that sampled and under the reference, both frozen
    rewards                  (N,) R_t: minus beta times the log-ratio, and the score at the last token
    score                    (B,) RM score at EOS, or `unfinished_reward` where there is none
    finished                 (B,) bool
    values                   (N,) of the value network before each token; empty where there is none
    advantages, returns      (N,) filled in by `generalised_advantages` or `leave_one_out_advantages`; empty before
    """

    tokens: list[Tokens]
    names: list[str]
    places: list[int]
    offsets: Tensor
    logp: Tensor
    ref_logp: Tensor
    rewards: Tensor
    score: Tensor
    finished: Tensor
    values: Tensor
    advantages: Tensor
    returns: Tensor

    def flat(self, group: Sequence[int]) -> Tensor:
        """Indices of the response tokens of some episodes, in the order in which a collated batch holds them."""
        starts, counts = self.offsets[:-1][list(group)], self.offsets.diff()[list(group)]
        return torch.arange(int(counts.sum())) + torch.repeat_interleave(starts - counts.cumsum(0) + counts, counts)

    def owners(self) -> Tensor:
        """Episode of each response token, (N,) int64."""
        return torch.repeat_interleave(torch.arange(len(self.tokens)), self.offsets.diff()).to(self.logp.device)

    def totals(self) -> Tensor:
        """R(x, y) of each episode, the sum of its token rewards: score - beta * log(pi / ref), (B,)."""
        return torch.zeros_like(self.score).index_add(0, self.owners(), self.rewards)

    def mask(self) -> Tensor:
        """(B, R) bool: the response tokens, every response starting at column 0."""
        lengths = self.offsets.diff()
        return (torch.arange(int(lengths.max()))[None, :] < lengths[:, None]).to(self.logp.device)

    def padded(self, values: Tensor) -> Tensor:
        """Flat values as rows, one per episode, 0 behind its end: (N,) -> (B, R)."""
        mask = self.mask()
        return torch.zeros(mask.shape, device=values.device).masked_scatter(mask, values)


def state_values(scorer, batch: Batch) -> Tensor:
    """V(s_t) of each response token: the value read one position before it, at the state it was chosen in; (N,)."""
    return scorer(batch, before(batch.response_mask))


@torch.no_grad()
def rollout(
    learner: Learner, prompts: Prompts, places: list[int], beta: float, key: tuple[int, int]
) -> tuple[Episodes, dict[str, float]]:
    """Sample one response per prompt and compute all that the updates hold fixed, advantages apart.

    `places` are the episodes' numbers in the global batch: they key the random streams, so that a prompt that occurs
    twice in an iteration is answered independently. `beta` is the KL coefficient; `key` is (seed, iteration).

    Old log-probabilities and values come from the very forward pass that the updates differentiate (of the modules as they
    are trained), not from generation.
    """
    policy, reference, reward = learner.networks
    accelerate, acting, criticising = learner.accelerate, learner.acting, learner.criticising
    device = accelerate.device
    seed = int(np.random.SeedSequence(key).generate_state(1)[0])
    drawn = generate(policy, prompts, places, learner.max_new_tokens, seed)
    tokens, finished = drawn.tokens, torch.tensor(drawn.finished, device=device)
    offsets = torch.tensor([0, *np.cumsum([len(example.response) for example in tokens])])
    flat = {name: torch.zeros(int(offsets[-1]), device=device) for name in ("logp", "ref_logp", "values", "entropy")}
    score = torch.zeros(len(tokens), device=device)
    nothing = torch.empty(0, device=device)
    episodes = Episodes(
        tokens, prompts.names, places, offsets, flat["logp"], flat["ref_logp"], nothing, score, finished,
        flat["values"] if criticising is not None else nothing, nothing, nothing,
    )  # fmt: skip
    groups = micro_batches([len(example) for example in tokens], learner.memory.tokens)
    if learner.sharded:  # each pass is work of all processes: who has fewer makes some again
        groups += groups[:1] * (sharding.most(len(groups)) - len(groups))
    for group in groups:
        batch = collate([tokens[i] for i in group], learner.pad).to(device)
        place = episodes.flat(group).to(device)
        with autocast(device):
            output = acting(batch, entropy=True)
            flat["logp"][place] = output.logp[batch.response_mask]
            flat["entropy"][place] = output.entropy[batch.response_mask]
            flat["ref_logp"][place] = reference(batch).logp[batch.response_mask]
            if criticising is not None:
                flat["values"][place] = state_values(criticising, batch)
            score[group] = reward(batch, last(batch.response_mask))
    passes = 3 + (criticising is not None)  # policy, reference and reward model, each over prompt and response
    read = drawn.tokens_read + passes * sum(len(example) for example in tokens)
    raw = score
    # A response that never ended has no EOS to be scored at: its reward is set, not corrected.
    score = torch.where(finished, score, learner.settings.unfinished_reward)
    mask = episodes.mask()
    rewards = token_rewards(episodes.padded(flat["logp"]), episodes.padded(flat["ref_logp"]), score, mask, beta)[mask]
    episodes = episodes._replace(score=score, rewards=rewards)
    kl = episodes.padded(flat["logp"] - flat["ref_logp"]).sum(-1)
    low, high = getattr(reward.model.config, "reward_range", None) or (-float("inf"), float("inf"))
    outside = finished & ((raw < low) | (raw > high))
    per_episode = [score, kl, mask.sum(-1), finished, episodes.totals(), outside, kl**2, torch.ones_like(score)]
    sums = accelerate.reduce(torch.stack([row.double().sum() for row in per_episode])).tolist()
    means = [total / sums[-1] for total in sums]
    metrics = dict(zip(("score", "kl", "tokens", "finished", "objective", "score_out_of_range"), means, strict=False))
    count = float(accelerate.reduce(torch.tensor(float(len(rewards)), device=device)))
    metrics |= {
        "kl_standard_error": max(means[6] - means[1] ** 2, 0.0) ** 0.5 / sums[-1] ** 0.5,
        "kl_coefficient": beta,
        "entropy": float(accelerate.reduce(flat["entropy"].sum()) / count),
        "tokens_generated": count,
        "tokens_read": float(accelerate.reduce(torch.tensor(float(read), device=device))),
    }
    return episodes, metrics | sampler_gap(accelerate, drawn.logp, flat["logp"])


def sampler_gap(accelerate, sampled: Sequence[list[float]], trained: Tensor) -> dict[str, float]:
    """How far log pi of sampled tokens, as the sampler had it, lies from that of the training forward pass (N,): mean and largest.

    Nothing where the policy itself is the sampler. Old log-probabilities are those of the training pass, so that ratios are right; what
    the sampler's rounding leaves is a bias of the samples.
    """
    if not sampled:
        return {}
    gap = (torch.tensor([value for row in sampled for value in row], device=trained.device) - trained).abs().double()
    total, count = accelerate.reduce(
        torch.stack([gap.sum(), torch.tensor(float(len(gap)), device=gap.device).double()])
    )
    return {"sampler_gap": float(total / count), "sampler_gap_largest": float(accelerate.gather(gap.max()[None]).max())}


def moments(accelerate, values: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Mean, (biased) variance and count over the values of all processes."""
    sums = torch.stack(
        [
            values.double().sum(),
            (values.double() ** 2).sum(),
            torch.tensor(float(len(values)), dtype=torch.float64, device=values.device),
        ]
    )
    total, squares, count = accelerate.reduce(sums)
    mean = total / count
    return mean.float(), (squares / count - mean**2).clamp_min(0).float(), count.float()


@torch.no_grad()
def generalised_advantages(learner: Learner, episodes: Episodes) -> tuple[Episodes, dict[str, float]]:
    """Advantages per token by GAE, whitened over all processes, and the returns that the value network learns."""
    accelerate, mask = learner.accelerate, episodes.mask()
    advantages, returns = gae(
        episodes.padded(episodes.rewards),
        episodes.padded(episodes.values),
        mask.float(),
        learner.settings.gae_discount,
        learner.settings.gae_lambda,
    )
    advantages, returns = advantages[mask], returns[mask]
    mean, variance, _ = moments(accelerate, advantages)
    unexplained = moments(accelerate, returns - episodes.values)[1]
    spread = moments(accelerate, returns)[1]
    return episodes._replace(advantages=whiten(advantages, mean, variance), returns=returns), {
        "value_mean": float(moments(accelerate, episodes.values)[0]),
        "explained_variance": float(1 - unexplained / spread.clamp_min(1e-8)),
    }


@torch.no_grad()
def leave_one_out_advantages(learner: Learner, episodes: Episodes, group: int) -> tuple[Episodes, dict[str, float]]:
    """R(x, y) minus the mean R of the others in its group, the same for every token of a response; `group` 1: R itself.

    A group is `group` neighbours in the global batch, whichever process holds them.
    """
    whole = torch.zeros(learner.settings.episodes, device=episodes.score.device)
    places = torch.tensor(episodes.places, device=whole.device)
    whole[places] = episodes.totals()
    whole = learner.accelerate.reduce(whole)
    centred = leave_one_out(whole.view(-1, group)).flatten() if group > 1 else whole
    return episodes._replace(advantages=centred[places][episodes.owners()]), {
        "advantage_variance": float(centred.var(correction=0))
    }
