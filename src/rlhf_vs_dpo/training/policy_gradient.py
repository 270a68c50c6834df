"""Reinforcement learning against the reward model: one loop for REINFORCE, RLOO, TRPO, PPO and PPO-ptx.

An iteration is: sample episodes from the policy and score them (rollouts.py), turn rewards into advantages, and improve
the policy by them (attempts.py, where the methods differ). Which detail of the literature on PPO is built, and which is
left out on purpose, is listed in docs/ppo-details.md.
"""

import copy
import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from rlhf_vs_dpo.config import Rl, Training
from rlhf_vs_dpo.errors import TrainingError
from rlhf_vs_dpo.language import adapters, sharding
from rlhf_vs_dpo.language.generation import bytes_to_sample
from rlhf_vs_dpo.language.heads import Scorer
from rlhf_vs_dpo.language.logprobs import AT_ONCE
from rlhf_vs_dpo.language.models import autocast, freeze, in_full, recompute, recomputing
from rlhf_vs_dpo.language.states import last
from rlhf_vs_dpo.language.text import Batch, Prompts, Tokens, check_context, collate
from rlhf_vs_dpo.losses.ppo import next_kl_coefficient
from rlhf_vs_dpo.run.checkpoint import Values
from rlhf_vs_dpo.run.progress import Record, Watch, bar
from rlhf_vs_dpo.training import plan
from rlhf_vs_dpo.training.attempts import ATTEMPTS, check_policy, slope_of_kl
from rlhf_vs_dpo.training.invariants import hold, tolerance
from rlhf_vs_dpo.training.learner import Learner, Networks
from rlhf_vs_dpo.training.optimise import Memory, Optimiser, accelerator, scheduled
from rlhf_vs_dpo.training.rollouts import Episodes, rollout, state_values

PRODUCT = 1.4  # what a product with the Fisher matrix holds, as a multiple of the graph that it goes through
VECTORS = 4  # as long as the policy has parameters, at the worst moment of TRPO, besides the three that are counted as for AdamW


class Totals(NamedTuple):
    """Cost of a run, over all processes: tokens that were trained on (once for each network that learned from them),
    that were sampled, and that were run forward only (prompts, the networks that judge, old log-probabilities)."""

    tokens_trained: int
    tokens_generated: int
    tokens_read: int


def train(
    networks: Networks,
    prompts: Prompts,
    corpus: Sequence[Tokens],
    settings: Rl,
    max_new_tokens: int,
    seed: int,
    record: Record,
) -> Totals:
    """Train `networks.policy` in place, by the attempt that `settings.algorithm` names.

    The value network, where there is one, is a copy of the reward model, its normalisation included, with parameters of
    its own. `corpus` is read by PPO-ptx alone (`ptx_coefficient` > 0). Raises DataError where a prompt and a response of
    `max_new_tokens` do not fit the context, TrainingError at a broken step-0 invariant or a loss that is not finite.
    """
    lengths = [len(ids) + max_new_tokens for ids in prompts.ids]
    check_context(lengths, prompts.names, networks.policy.context, "the prompt with room for a response is")
    attempt = ATTEMPTS[settings.algorithm]
    learner = new_learner(networks, corpus, settings, max_new_tokens, seed)
    accelerate = learner.accelerate
    if sharding.sharded(networks.policy.model):
        for network in (networks.reference, networks.reward):
            sharding.shard(network)
    if settings.episodes < accelerate.num_processes:
        raise TrainingError(
            f"{settings.episodes} episodes cannot be divided among {accelerate.num_processes} processes; raise `episodes`"
        )
    freeze(networks.reward)
    freeze(networks.reference)
    longest = sorted({*map(tuple, prompts.ids)}, key=lambda ids: (len(ids), ids))[:-3:-1]
    most = plan.MOST
    if settings.algorithm == "trpo":  # it compares whole distributions of two policies
        most = max(1, AT_ONCE // networks.policy.vocabulary)
        learner.memory.tokens = min(learner.memory.tokens, most)
    learner.memory.tokens = plan.check(
        planned(learner, [*map(list, longest)], record.heldout), learner.memory.tokens, accelerate, record.what, most
    )
    rng = np.random.default_rng(seed)  # the same on every process
    distinct = settings.episodes // settings.samples_per_prompt
    # What an iteration hands to the next: prompts that are still to be asked, the KL coefficient, tokens generated and read.
    at = Values(
        iteration=0, queue=[], beta=settings.kl_coefficient, generated=0, read=0, prompts=rng.bit_generator.state
    )
    with (
        record.checkpoint.during(iterations=at, learner=learner),
        bar(settings.iterations, record.what, "iteration", accelerate.is_main_process, at.iteration) as progress,
    ):
        rng.bit_generator.state = at.prompts
        for iteration in range(at.iteration, settings.iterations):
            record.watch(networks.policy, iteration)
            while len(at.queue) < distinct:
                at.queue += rng.permutation(len(prompts.ids)).tolist()
            picked, at.queue = np.repeat(at.queue[:distinct], settings.samples_per_prompt).tolist(), at.queue[distinct:]
            places = list(range(accelerate.process_index, len(picked), accelerate.num_processes))
            mine = [picked[place] for place in places]
            asked = Prompts([prompts.ids[i] for i in mine], [prompts.names[i] for i in mine])
            experience, metrics = rollout(learner, asked, places, at.beta, (seed, iteration))
            if iteration == 0:
                check_start(learner, experience, metrics)
            at.generated += int(metrics.pop("tokens_generated"))
            at.read += int(metrics.pop("tokens_read"))
            experience, explained = attempt.advantages(learner, experience)
            metrics |= explained
            waited = getattr(settings, "value_warmup", 0)
            learner.train_policy = iteration >= waited
            learner.trust = scheduled(
                settings.schedule, max(iteration - waited, 0), max(settings.iterations - waited, 1), warmup=0.0
            )
            updates = attempt.improve(learner, experience)
            check_policy(learner, experience)
            if settings.kl_target is not None and learner.train_policy:
                at.beta = next_kl_coefficient(
                    at.beta, metrics["kl"], settings.kl_target, settings.kl_horizon, settings.episodes
                )
            progress.set_postfix(score=f"{metrics['score']:.2f}", kl=f"{metrics['kl']:.2f}", refresh=False)
            progress.update()
            record.add(
                {f"rollout/{name}": value for name, value in metrics.items()}
                | {f"update/{name}": value for name, value in updates.items()},
                iteration + 1,
            )
            at.iteration, at.prompts = iteration + 1, rng.bit_generator.state
            record.checkpoint.offer()
        record.watch(networks.policy, settings.iterations)
    sharding.gather(networks.policy)
    return Totals(learner.trained, at.generated, at.read + learner.read)


def new_learner(networks: Networks, corpus: Sequence[Tokens], settings: Rl, max_new_tokens: int, seed: int) -> Learner:
    """Optimisers for what the method trains: the policy (not TRPO's, which steps by itself), the value network."""
    accelerate = accelerator()
    steps = settings.iterations * getattr(settings, "epochs", 1) * getattr(settings, "minibatches", 1)
    waiting = getattr(settings, "value_warmup", 0) * steps // settings.iterations

    def training(learning_rate: float, steps: int) -> Training:
        return Training(
            steps=steps, batch=settings.episodes, learning_rate=learning_rate, schedule=settings.schedule, warmup=0.0, weight_decay=0.0,
            max_grad_norm=settings.max_grad_norm, adam_epsilon=settings.adam_epsilon,
        )  # fmt: skip

    actor = critic = None
    if settings.algorithm == "trpo" and sharding.asked(networks.policy):
        raise TrainingError(
            "TRPO differentiates twice and needs whole weights: set `memory.sharding: false` in params.yaml for it"
        )
    if hasattr(settings, "learning_rate"):
        actor = Optimiser(accelerate, networks.policy, training(settings.learning_rate, steps - waiting))
    else:
        networks.policy.to(accelerate.device)
    if ATTEMPTS[settings.algorithm].critic:
        networks.reward.model.shard = getattr(
            networks.policy.model, "shard", False
        )  # the value network is a copy of it
        value = value_network(networks.reward)
        if recomputing(networks.policy.model):
            recompute(value.model)
        critic = Optimiser(accelerate, value, training(settings.value_learning_rate, steps))
    return Learner(
        networks, accelerate, settings, max_new_tokens, actor, critic, corpus, Memory(networks.policy.budget, accelerate),
        minibatch_rng=np.random.default_rng([seed, 2]),
        ptx_rng=np.random.default_rng([seed, 1]),  # of its own, so that PPO-ptx sees the prompts that PPO sees
    )  # fmt: skip


def planned(learner: Learner, longest: list[list[int]], watch: Watch | None = None) -> plan.Plan:
    """Memory of a run of which these are the longest prompts: the policy and the value network learn in turn, the others are read.

    Each process samples its episodes, and at another time all that `watch` asks for.
    """
    policy, reference, reward = learner.networks
    trpo = learner.settings.algorithm == "trpo"
    whole = [Tokens(prompt, [policy.eos] * learner.max_new_tokens) for prompt in (*longest, *longest)[:2]]

    def batch(count: int) -> Batch:
        return collate(whole[:count], learner.pad).to(learner.accelerate.device)

    def likelihood(count: int) -> Tensor:
        return policy(batch(count)).sums().sum()

    learning: dict[nn.Module, Callable[[int], Tensor]] = {policy: in_full()(likelihood) if trpo else likelihood}
    if learner.critic is not None:
        value = learner.critic.network
        learning[value] = lambda count: state_values(value, batch(count)).sum()
    length, processes = len(whole[0]), learner.accelerate.num_processes
    episodes = -(-learner.settings.episodes // processes)
    cache = bytes_to_sample(policy.model, episodes, length)
    if watch is not None:
        cache = max(cache, bytes_to_sample(policy.model, watch.asked, watch.longest))
    found = plan.plan(learning, length, learner.memory.tokens, episodes, (reference, reward), cache, processes)
    parameters = [p for p in policy.parameters() if p.requires_grad]
    learned = sum(sharding.local(p).nbytes for p in parameters)
    if getattr(learner.settings, "ptx_coefficient", 0.0) > 0:
        return max(found, _of_documents(learner, found, learned), key=lambda each: each.activations)
    if not trpo:
        return found
    weights = {p.data_ptr() for p in policy.parameters()}
    few = -(-math.ceil(learner.settings.fisher_share * learner.settings.episodes) // processes)
    one, two = (
        plan.kept(partial(slope_of_kl, policy, batch(count), parameters, 1.0), learner.accelerate.device, weights)
        for count in (1, 2)
    )
    curvature = round(PRODUCT * (one + (few - 1) * (two - one))) + VECTORS * learned
    return found._replace(weights=found.weights + learned, curvature=curvature)  # the old policy is held, too


def _of_documents(learner: Learner, found: plan.Plan, learned: int) -> plan.Plan:
    """The plan `found` with activations of the documents of PPO-ptx in the place of those of episodes.

    PPO's gradients, of `learned` bytes, are kept while those of documents are made.
    """
    policy, accelerate = learner.networks.policy, learner.accelerate
    whole = sorted(learner.corpus, key=len)[:-3:-1]

    def likelihood(count: int) -> Tensor:
        batch = collate((whole * 2)[:count], learner.pad).to(accelerate.device)
        return policy(batch, temperature=1.0).sums().sum()

    rows = -(-learner.settings.ptx_batch // accelerate.num_processes)
    documents = plan.plan({policy: likelihood}, len(whole[0]), learner.memory.tokens, rows)
    return found._replace(
        activations=documents.activations + learned, smallest=documents.smallest + learned,
        longest=documents.longest, tokens=documents.tokens, batch=documents.batch,
    )  # fmt: skip


def value_network(reward: Scorer) -> Scorer:
    """What PPO's value network starts from: the reward model, with weights of its own wherever it learns."""
    if adapters.attached(reward.model):
        return Scorer(adapters.twin(reward.model))
    return Scorer(copy.deepcopy(reward.model)).float().requires_grad_(True)


@torch.no_grad()
def check_start(learner: Learner, episodes: Episodes, metrics: dict[str, float]) -> None:
    """Before the first update the policy is the reference, and the value network the reward model."""
    device = episodes.logp.device
    causes = "dropout is on; the reference is not the model the policy started from; temperature is not in both"
    hold("KL(policy, reference) per episode", metrics["kl"], 0.0, tolerance(device, metrics["tokens"]), causes)
    group = list(range(min(8, len(episodes.tokens))))
    batch = collate([episodes.tokens[i] for i in group], learner.pad).to(device)
    with autocast(device):
        ratio = (learner.acting(batch).logp[batch.response_mask] - episodes.logp[episodes.flat(group).to(device)]).exp()
    hold("the ratio of new to old probability furthest from 1", 1 + float((ratio - 1).abs().max()), 1.0, tolerance(device, 1),
         "dropout is on; log-probabilities depend on padding or on the micro-batch")  # fmt: skip
    if learner.criticising is not None:
        with autocast(device):
            ours, theirs = (
                of(batch, last(batch.response_mask)) for of in (learner.criticising, learner.networks.reward)
            )
        gap = ours - theirs
        hold("value at EOS minus RM score, at most", float(gap.abs().max()), 0.0, tolerance(device, 1),
             "the value network was not started from the reward model, or lost its normalisation")  # fmt: skip
