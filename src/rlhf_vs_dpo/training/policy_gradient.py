"""Reinforcement learning against the reward model: PPO, and PPO-ptx.

An iteration is: sample episodes from the policy, score them, turn scores and KL into token rewards, estimate advantages,
then a few epochs of clipped updates. Which detail of the literature is built, and which is left out on purpose, is
listed in docs/ppo-details.md.
"""

import copy
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from rlhf_vs_dpo.config import Rl, Sampling
from rlhf_vs_dpo.errors import TrainingError
from rlhf_vs_dpo.generation import generate
from rlhf_vs_dpo.logprobs import Policy, before
from rlhf_vs_dpo.losses.gae import gae, token_rewards, whiten
from rlhf_vs_dpo.losses.ppo import next_kl_coefficient, policy_loss, value_loss
from rlhf_vs_dpo.losses.sft import nll
from rlhf_vs_dpo.models import Scorer, autocast, context_of, freeze, last, token_budget
from rlhf_vs_dpo.progress import bar
from rlhf_vs_dpo.text import Batch, Tokens, check_context, collate, micro_batches
from rlhf_vs_dpo.training.invariants import hold
from rlhf_vs_dpo.training.monitor import HeldOut
from rlhf_vs_dpo.training.optimise import Log, Optimiser, accelerator, check_finite

MAX_RATIO_GAP = {"cpu": 1e-3, "cuda": 0.3}  # of step 0: float32, and bf16 (2403.17031 measured 0.11 for bf16)


class Episodes(NamedTuple):
    """What the policy did, flat over the N response tokens of B episodes, in their order.

    tokens, names, places    B examples, the ids of their prompts and their numbers in the global batch
    offsets                  (B + 1) where each episode starts among the N
    logp, ref_logp, values   (N,) under the policy that sampled, the reference and the value network, all frozen
    advantages, returns      (N,) advantages whitened over all processes; returns from the raw ones
    score                    (B,) RM score at EOS, or `unfinished_reward` where there is none
    finished                 (B,) bool
    """

    tokens: list[Tokens]
    names: list[str]
    places: list[int]
    offsets: Tensor
    logp: Tensor
    ref_logp: Tensor
    values: Tensor
    advantages: Tensor
    returns: Tensor
    score: Tensor
    finished: Tensor

    def flat(self, group: Sequence[int]) -> Tensor:
        """Indices of the response tokens of some episodes, in the order in which a collated batch holds them."""
        return torch.cat([torch.arange(int(self.offsets[i]), int(self.offsets[i + 1])) for i in group])


class Totals(NamedTuple):
    """Cost of a run, over all processes."""

    tokens_trained: int
    tokens_generated: int


def state_values(scorer, batch: Batch) -> Tensor:
    """V(s_t) of each response token: the value read one position before it, at the state it was chosen in; (N,)."""
    return scorer(batch)[before(batch.response_mask)]


def train(
    policy: Policy,
    reference: Policy,
    reward: Scorer,
    tokenizer,
    prompts: Sequence[list[int]],
    names: Sequence[str],
    corpus: Sequence[Tokens],
    settings: Rl,
    sampling: Sampling,
    seed: int,
    heldout: HeldOut,
    log: Log,
    what: str,
) -> Totals:
    """Train `policy` in place.

    The value network is a copy of the reward model, its normalisation included, with parameters of its own.
    `prompts` are ids, `names` their ids in tables; `corpus` is read by PPO-ptx alone (`settings.ptx_coefficient` > 0).
    Raises TrainingError at a broken step-0 invariant or a loss that is not finite.
    """
    limit = context_of(policy.model) - sampling.max_new_tokens
    check_context([len(ids) for ids in prompts], names, limit, "the prompt (with room for a response) is")
    accelerate = accelerator()
    value = Scorer(copy.deepcopy(reward.model))
    freeze(reward)
    freeze(reference)
    policy_steps = max(settings.iterations - settings.value_warmup, 1) * settings.epochs * settings.minibatches
    value_steps = settings.iterations * settings.epochs * settings.minibatches
    shared = (settings.adam_epsilon, settings.max_grad_norm, 0.0, settings.schedule, 0.0)
    actor = Optimiser(accelerate, policy, settings.learning_rate, *shared, policy_steps)
    critic = Optimiser(accelerate, value, settings.value_learning_rate, *shared, value_steps)
    budget = token_budget(policy.model)
    rng = np.random.default_rng(seed)  # the same on every process
    ptx_rng = np.random.default_rng([seed, 1])  # of its own, so that PPO-ptx sees the prompts that PPO sees
    minibatch_rng = np.random.default_rng([seed, 2])
    queue: list[int] = []
    beta = settings.kl_coefficient
    trained = generated = 0
    with bar(settings.iterations, what, "iteration", visible=accelerate.is_main_process) as progress:
        for iteration in range(settings.iterations):
            heldout.watch(policy.model, iteration, log)
            while len(queue) < settings.episodes:
                queue += rng.permutation(len(prompts)).tolist()
            picked, queue = queue[: settings.episodes], queue[settings.episodes :]
            places = list(range(accelerate.process_index, len(picked), accelerate.num_processes))
            mine = [picked[place] for place in places]
            experience, metrics = rollout(
                accelerate, actor.module, critic.module, policy, reference, reward, tokenizer,
                [prompts[i] for i in mine], [names[i] for i in mine], places, settings, sampling, beta,
                (seed, iteration), budget,
            )  # fmt: skip
            if iteration == 0:
                check_start(actor.module, critic.module, reward, experience, metrics, tokenizer.pad_token_id)
            generated += int(metrics["tokens_total"])
            updates = update(
                accelerate, actor, critic, experience, corpus, settings, minibatch_rng, ptx_rng, tokenizer.pad_token_id, budget,
                train_policy=iteration >= settings.value_warmup,
            )  # fmt: skip
            trained += int(updates.pop("tokens_trained"))
            if settings.kl_target is not None:
                beta = next_kl_coefficient(
                    beta, metrics["kl"], settings.kl_target, settings.kl_horizon, settings.episodes
                )
            progress.set_postfix(score=f"{metrics['score']:.2f}", kl=f"{metrics['kl']:.2f}", refresh=False)
            progress.update()
            named = {f"rollout/{name}": metric for name, metric in metrics.items() if name != "tokens_total"}
            log(named | {f"update/{name}": metric for name, metric in updates.items()}, iteration + 1)
        heldout.watch(policy.model, settings.iterations, log)
    return Totals(trained, generated)


@torch.no_grad()
def rollout(
    accelerate, acting, criticising, policy: Policy, reference: Policy, reward: Scorer, tokenizer,
    prompts: list[list[int]], names: list[str], places: list[int], settings: Rl, sampling: Sampling, beta: float, key: tuple[int, int], budget: int,
) -> tuple[Episodes, dict[str, float]]:  # fmt: skip
    """Sample one response per prompt and compute all that the updates hold fixed.

    `places` are the episodes' numbers in the global batch: they key the random streams, so that a prompt that occurs
    twice in an iteration is answered independently.

    `acting` and `criticising` are the modules as trained (wrapped for several processes): the old log-probabilities and
    values come from the very forward pass that the updates differentiate, not from generation.
    """
    device = accelerate.device
    seed = int(np.random.SeedSequence(key).generate_state(1)[0])
    drawn = generate(policy.model, tokenizer, prompts, names, places, sampling, seed)
    tokens, finished = drawn.tokens, torch.tensor(drawn.finished, device=device)
    lengths = [len(example.response) for example in tokens]
    offsets = torch.tensor([0, *np.cumsum(lengths)])
    flat = {name: torch.zeros(int(offsets[-1]), device=device) for name in ("logp", "ref_logp", "values", "entropy")}
    score = torch.zeros(len(tokens), device=device)
    episodes = Episodes(
        tokens,
        names,
        places,
        offsets,
        flat["logp"],
        flat["ref_logp"],
        flat["values"],
        *[torch.empty(0)] * 2,
        score,
        finished,
    )
    for group in micro_batches([len(example) for example in tokens], budget):
        batch = collate([tokens[i] for i in group], tokenizer.pad_token_id).to(device)
        place = episodes.flat(group).to(device)
        with autocast(device):
            output = acting(batch)
            flat["logp"][place] = output.logp[batch.response_mask]
            flat["entropy"][place] = output.entropy[batch.response_mask]
            flat["ref_logp"][place] = reference(batch).logp[batch.response_mask]
            flat["values"][place] = state_values(criticising, batch)
            score[group] = last(reward(batch), batch.response_mask)
    # A response that never ended has no EOS to be scored at: its reward is set, not corrected.
    score = torch.where(finished, score, settings.unfinished_reward)
    mask = torch.arange(max(lengths))[None, :] < torch.tensor(lengths)[:, None]  # (B, R)
    mask = mask.to(device)

    def padded(values: Tensor) -> Tensor:
        return torch.zeros(mask.shape, device=device).masked_scatter(mask, values)

    rewards = token_rewards(padded(flat["logp"]), padded(flat["ref_logp"]), score, mask, beta)
    advantages, returns = gae(rewards, padded(flat["values"]), mask.float(), settings.gae_discount, settings.gae_lambda)
    advantages, returns = advantages[mask], returns[mask]
    mean, variance, count = moments(accelerate, advantages)
    values_error = moments(accelerate, returns - flat["values"])[1]
    returns_variance = moments(accelerate, returns)[1]
    episodes = episodes._replace(advantages=whiten(advantages, mean, variance), returns=returns, score=score)
    kl = padded(flat["logp"] - flat["ref_logp"]).sum(-1)
    per_episode = torch.stack(
        [score, kl, mask.sum(-1).float(), finished.float(), rewards.sum(-1), torch.ones_like(score)]
    )
    sums = accelerate.reduce(per_episode.double().sum(-1)).tolist()
    means = [total / sums[-1] for total in sums[:-1]]
    metrics = dict(zip(("score", "kl", "tokens", "finished", "objective"), means, strict=True))
    metrics |= {
        "kl_coefficient": beta,
        "entropy": float(accelerate.reduce(flat["entropy"].sum()) / count),
        "value_mean": float(accelerate.reduce(flat["values"].sum()) / count),
        "explained_variance": float(1 - values_error / returns_variance.clamp_min(1e-8)),
        "tokens_total": float(count),
    }
    return episodes, metrics


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


def update(
    accelerate, actor: Optimiser, critic: Optimiser, episodes: Episodes, corpus: Sequence[Tokens], settings: Rl,
    rng: np.random.Generator, ptx_rng: np.random.Generator, pad: int, budget: int, train_policy: bool,
) -> dict[str, float]:  # fmt: skip
    """`settings.epochs` passes over the episodes in minibatches; returns means over the steps taken."""
    device = accelerate.device
    lengths = [len(example) for example in episodes.tokens]
    local = {place: i for i, place in enumerate(episodes.places)}
    sums: dict[str, float] = {}
    steps = trained = 0

    def add(name: str, value: float) -> None:
        sums[name] = sums.get(name, 0.0) + value

    for _ in range(settings.epochs):
        # Minibatches are drawn from the global batch, alike on every process, each of which keeps its own episodes.
        for drawn in np.array_split(rng.permutation(settings.episodes), settings.minibatches):
            part = [local[place] for place in drawn.tolist() if place in local]
            if int(accelerate.gather(torch.tensor([len(part)], device=device)).min()) == 0:
                raise TrainingError(
                    f"a minibatch of {len(drawn)} episodes left one of {accelerate.num_processes} processes without any; "
                    "lower `rl.defaults.minibatches` or raise `episodes`"
                )
            counted = torch.tensor([sum(len(episodes.tokens[i].response) for i in part)], device=device)
            units = float(accelerate.reduce(counted))  # response tokens of the minibatch on all processes
            wanted = micro_batches([lengths[i] for i in part], budget)
            most = int(accelerate.gather(torch.tensor([len(wanted)], device=device)).max())
            groups = [
                [int(part[j]) for j in g]
                for g in micro_batches([lengths[i] for i in part], budget, min(most, len(part)))
            ]
            batches = {
                id(g): (collate([episodes.tokens[i] for i in g], pad).to(device), episodes.flat(g)) for g in groups
            }
            watched = torch.zeros(3, device=device, dtype=torch.float64)

            def actor_loss(group: list[int], batches=batches, watched=watched) -> Tensor:
                batch, place = batches[id(group)]
                logp = actor.module(batch).logp[batch.response_mask]
                old = episodes.logp[place]
                with torch.no_grad():
                    log_ratio = logp - old
                    ratio = log_ratio.exp()
                    watched.add_(
                        torch.stack(
                            [((ratio - 1).abs() > settings.clip).sum(), (ratio - 1 - log_ratio).sum(), ratio.sum()]
                        )
                    )
                return policy_loss(logp, old, episodes.advantages[place], settings.clip).sum()

            def critic_loss(group: list[int], batches=batches) -> Tensor:
                batch, place = batches[id(group)]
                values = state_values(critic.module, batch)
                return value_loss(values, episodes.values[place], episodes.returns[place], settings.value_clip).sum()

            names = [episodes.names[i] for i in part]
            if train_policy:
                loss = actor.accumulate(groups, actor_loss, units)
                if settings.ptx_coefficient > 0:
                    ptx_loss, share, tokens = accumulate_ptx(accelerate, actor, corpus, settings, ptx_rng, pad, budget)
                    trained += tokens
                    add("ptx_loss", ptx_loss)
                    add("ptx_gradient_share", share)
                add("policy_gradient_norm", actor.step(loss, names))
                add("policy_loss", loss)
                clipped, approximate_kl, ratio = (accelerate.reduce(watched) / units).tolist()
                add("clip_fraction", clipped)
                add("kl_old_new", approximate_kl)
                add("ratio_mean", ratio)
            loss = critic.accumulate(groups, critic_loss, units)
            add("value_gradient_norm", critic.step(loss, names))
            add("value_loss", loss)
            steps += 1
            trained += int(accelerate.reduce(torch.tensor([sum(lengths[i] for i in part)], device=device)))
    with torch.no_grad():
        check_finite(actor.module(batches[id(groups[0])][0]).logp, actor, names)
    return {name: value / steps for name, value in sums.items()} | {
        "learning_rate": actor.learning_rate,
        "tokens_trained": trained,
    }


def accumulate_ptx(
    accelerate,
    actor: Optimiser,
    corpus: Sequence[Tokens],
    settings: Rl,
    rng: np.random.Generator,
    pad: int,
    budget: int,
) -> tuple[float, float, int]:
    """Add the gradient of gamma times the pretraining loss (InstructGPT eq. 2) to the one that is there.

    Returns the pretraining loss per token, the share of the gradient that it contributes, and the tokens it read:
    |gamma * g_ptx| / (|g_ppo| + |gamma * g_ptx|); 0 says that gamma does nothing, 1 that PPO does nothing.
    """
    ppo = [p.grad.clone() if p.grad is not None else None for p in actor.parameters]
    picked = rng.choice(len(corpus), size=settings.ptx_batch, replace=len(corpus) < settings.ptx_batch)
    units = sum(len(corpus[i].response) for i in picked)
    lengths = {int(i): len(corpus[i]) for i in picked}

    def loss(group: list[int]) -> Tensor:
        batch = collate([corpus[i] for i in group], pad).to(accelerate.device)
        return settings.ptx_coefficient * nll(actor.module(batch).sums()).sum()

    value = actor.accumulate(actor.share([int(i) for i in picked], lengths, budget), loss, units)
    added = [p.grad - g if g is not None else p.grad for p, g in zip(actor.parameters, ppo, strict=True)]
    of_ppo = torch.nn.utils.get_total_norm([g for g in ppo if g is not None]).item()
    of_ptx = torch.nn.utils.get_total_norm([g for g in added if g is not None]).item()
    return value / settings.ptx_coefficient, of_ptx / max(of_ppo + of_ptx, 1e-12), sum(lengths.values())


@torch.no_grad()
def check_start(acting, criticising, reward: Scorer, episodes: Episodes, metrics: dict[str, float], pad: int) -> None:
    """Before the first update the policy is the reference, and the value network the reward model."""
    device = episodes.logp.device
    tolerance = MAX_RATIO_GAP["cuda" if device.type == "cuda" else "cpu"]
    causes = "dropout is on; the reference is not the model the policy started from; temperature is not in both"
    hold("KL(policy, reference) per episode", metrics["kl"], 0.0, tolerance, causes)
    group = list(range(min(8, len(episodes.tokens))))
    batch = collate([episodes.tokens[i] for i in group], pad).to(device)
    with autocast(device):
        ratio = (acting(batch).logp[batch.response_mask] - episodes.logp[episodes.flat(group).to(device)]).exp()
        gap = last(criticising(batch), batch.response_mask) - last(reward(batch), batch.response_mask)
    hold("the ratio of new to old probability furthest from 1", 1 + float((ratio - 1).abs().max()), 1.0, tolerance,
         "dropout is on; log-probabilities depend on padding or on the micro-batch")  # fmt: skip
    hold("value at EOS minus RM score, at most", float(gap.abs().max()), 0.0, tolerance,
         "the value network was not started from the reward model, or lost its normalisation")  # fmt: skip
