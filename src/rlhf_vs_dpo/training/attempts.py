"""Three attempts at improving a policy, side by side: the same episodes, another step.

               advantage A of a token                              how the policy moves
    reinforce  R(y) - mean R of the rest of the batch, or R(y)     one step along the gradient of E[A log pi]
    rloo       R(y) - mean R of the other answers to the prompt    the same
    trpo       GAE, from a value network                           one natural-gradient step, kept within mean KL <= delta
    ppo        GAE, from a value network                           some epochs of steps on the clipped surrogate (+ ptx)

`ATTEMPTS` is that table as code. The first is cheap and has no brake; the second brakes by a constraint, for which it
needs second derivatives; the third imitates the brake by clipping, at the price of the first.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from functools import cache, partial
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from rlhf_vs_dpo.errors import TrainingError
from rlhf_vs_dpo.language import adapters, sharding
from rlhf_vs_dpo.language.logprobs import Policy
from rlhf_vs_dpo.language.models import in_full
from rlhf_vs_dpo.language.text import Batch, collate, micro_batches
from rlhf_vs_dpo.losses.ppo import policy_loss, value_loss
from rlhf_vs_dpo.losses.reinforce import policy_gradient_loss
from rlhf_vs_dpo.losses.sft import nll
from rlhf_vs_dpo.losses.trpo import conjugate_gradient, kl_divergence, surrogate
from rlhf_vs_dpo.training.learner import Learner
from rlhf_vs_dpo.training.optimise import Averages, check_finite
from rlhf_vs_dpo.training.rollouts import Episodes, generalised_advantages, leave_one_out_advantages, state_values


class Micro(NamedTuple):
    """A micro-batch of episodes on the device, and where its N response tokens are among those of all episodes.

    weight    1; 0 of one that is gone through again for nothing but company (`memory.sharding`)
    """

    batch: Batch
    place: Tensor
    weight: float = 1.0

    def of(self, values: Tensor) -> Tensor:
        return values[self.place]

    def counted(self, total: Tensor) -> Tensor:
        return total if self.weight else total * 0.0


class Attempt(NamedTuple):
    """How advantages are made of rewards, and how the policy moves."""

    critic: bool
    advantages: Callable[[Learner, Episodes], tuple[Episodes, dict[str, float]]]
    improve: Callable[[Learner, Episodes], dict[str, float]]


# ---- attempt 1: the policy gradient ----------------------------------------------------------------------------------


def policy_gradient_step(learner: Learner, episodes: Episodes) -> dict[str, float]:
    """One step along the policy gradient, the mean over episodes of A grad log pi(y|x) (losses/reinforce.py)."""
    everything = list(range(len(episodes.tokens)))

    def loss(group: Micro) -> Tensor:
        logp = learner.actor.module(group.batch).logp[group.batch.response_mask]
        return group.counted(policy_gradient_loss(logp, group.of(episodes.advantages)).sum())

    rate = learner.actor.learning_rate
    value = learner.memory.within(
        lambda tokens: learner.actor.accumulate(
            _micro(learner, episodes, everything, tokens), loss, learner.settings.episodes
        ),
        learner.actor,
    )
    norm = learner.actor.step(value, episodes.names)
    learner.trained += _length(learner, episodes, everything)
    return {"policy_loss": value, "policy_gradient_norm": norm, "learning_rate": rate}


# ---- attempt 2: a trust region ---------------------------------------------------------------------------------------


def trust_region_step(learner: Learner, episodes: Episodes) -> dict[str, float]:
    """One natural-gradient step, backtracked until mean KL(old, new) <= delta and the surrogate has not fallen.

    (losses/trpo.py.) Then the value network learns for some epochs. In float32 throughout: the constraint is finer than
    bf16. Gradients are summed over processes by hand, for they are wanted as vectors.
    """
    metrics = _trust_region(learner, episodes) if learner.train_policy else {}
    averages = Averages()
    for part in _minibatches(learner, episodes):
        averages.add(_fit_values(learner, episodes, partial(_micro, learner, episodes, part), part))
    return metrics | averages.read()


@in_full()
def slope_of_kl(policy: Policy, batch: Batch, parameters: Sequence[Tensor], units: float) -> Tensor:
    """Gradient of the mean KL(old, new) at new = old, (P,), with the graph that leads to second derivatives."""
    with sdpa_kernel(SDPBackend.MATH):  # the one attention kernel that can be differentiated twice
        new = policy.distributions(batch)
        kl = kl_divergence(new.detach(), new).sum() / units
        return torch.cat([g.flatten() for g in torch.autograd.grad(kl, parameters, create_graph=True)])


@in_full()
def _trust_region(learner: Learner, episodes: Episodes) -> dict[str, float]:
    settings, policy, reduce = learner.settings, learner.networks.policy, learner.accelerate.reduce
    parameters = [p for p in policy.parameters() if p.requires_grad]
    start = torch.nn.utils.parameters_to_vector(parameters).detach()
    old = adapters.twin(policy).requires_grad_(False)
    micro = _micro(learner, episodes, list(range(len(episodes.tokens))), learner.memory.tokens)
    units = _tokens(learner, episodes, range(len(episodes.tokens)))
    # Prompts come in random order, so that the first of the global batch are as good as any others.
    few = [i for i, place in enumerate(episodes.places) if place < math.ceil(settings.fisher_share * settings.episodes)]
    fisher_micro = _micro(learner, episodes, few, learner.memory.tokens)  # none on a process that holds none of them
    fisher_units = _tokens(learner, episodes, few)

    def gradient() -> Tensor:
        total = torch.zeros_like(start)
        for group in micro:
            logp = policy(group.batch).logp[group.batch.response_mask]
            gain = surrogate(logp, logp.detach(), group.of(episodes.advantages)).sum() / units
            total += torch.cat([g.flatten() for g in torch.autograd.grad(gain, parameters)])
        return reduce(total)

    g = gradient()  # before the graph of the slope is there, which a product goes through once
    slope = [slope_of_kl(policy, group.batch, parameters, fisher_units) for group in fisher_micro]
    slope = [sum(slope[1:], slope[0])] if slope else []  # one vector, however many micro-batches; none without episodes

    def fisher_product(vector: Tensor) -> Tensor:
        total = torch.zeros_like(start)
        for of in slope:
            with sdpa_kernel(SDPBackend.MATH):
                along = torch.autograd.grad(of, parameters, vector, retain_graph=True)
            total += torch.cat([g.flatten() for g in along])
        return reduce(total) + settings.damping * vector

    @torch.no_grad()
    def measure(step: Tensor) -> tuple[float, float]:
        """(gain of the surrogate, mean KL(old, new)) of a step."""
        torch.nn.utils.vector_to_parameters(start + step, parameters)
        sums = torch.zeros(2, device=start.device, dtype=torch.float64)
        for group in micro:
            before, after = old.distributions(group.batch), policy.distributions(group.batch)
            chosen = group.batch.input_ids[group.batch.response_mask][:, None]
            advantages = group.of(episodes.advantages)
            ratio_gain = (
                surrogate(after.gather(-1, chosen)[:, 0], before.gather(-1, chosen)[:, 0], advantages) - advantages
            )
            sums += torch.stack([ratio_gain.double().sum(), kl_divergence(before, after).double().sum()])
        gain, kl = (reduce(sums) / units).tolist()
        return gain, kl

    length = _length(learner, episodes, range(len(episodes.tokens)))
    # A product is a backward pass through the graph of these episodes; one more measures the curvature along the step.
    learner.trained += length + (settings.cg_steps + 1) * _length(learner, episodes, few)
    direction = conjugate_gradient(fisher_product, g, settings.cg_steps)
    curvature = float(direction @ fisher_product(direction))
    slope.clear()  # with its graph: the line search needs room for whole distributions
    usable = math.isfinite(curvature) and curvature > 0
    bound = settings.max_kl * learner.trust
    step = math.sqrt(2 * bound / curvature) * direction if usable else torch.zeros_like(start)
    expected = float(g @ step)
    accepted, gain, kl, halved = False, 0.0, 0.0, 0
    for halved in range(settings.backtracks + 1 if usable else 0):
        gain, kl = measure(0.5**halved * step)
        accepted = kl <= bound and gain >= 0
        if accepted:
            break
    learner.read += 2 * length * (halved + 1 if usable else 0)  # two policies at each try
    if not accepted:
        torch.nn.utils.vector_to_parameters(start, parameters)
        gain = kl = 0.0
    return {
        "kl_old_new": kl,
        "kl_bound": bound,
        "surrogate_gain": gain,
        "surrogate_gain_expected": expected,
        "backtracks": float(halved),
        "rejected": float(not accepted),
        "policy_gradient_norm": float(g.norm()),
    }


# ---- attempt 3: clipping ---------------------------------------------------------------------------------------------


def clipped_steps(learner: Learner, episodes: Episodes) -> dict[str, float]:
    """`epochs` passes over the episodes in minibatches: clipped steps of the policy, and of the value network."""
    settings, actor, accelerate = learner.settings, learner.actor, learner.accelerate
    averages = Averages()
    for part in _minibatches(learner, episodes):
        micro = cache(partial(_micro, learner, episodes, part))  # of the policy's step and of the value network's
        units = _tokens(learner, episodes, part)
        names = [episodes.names[i] for i in part]

        def passes(tokens: int, micro=micro, units=units, documents=draw_documents(learner)) -> tuple:
            watched = torch.zeros(4, device=accelerate.device, dtype=torch.float64)

            def loss(group: Micro) -> Tensor:
                logp = actor.module(group.batch).logp[group.batch.response_mask]
                old = group.of(episodes.logp)
                with torch.no_grad():
                    ratio = (logp - old).exp()
                    clipped = (ratio - 1).abs() > settings.clip
                    seen = [clipped.sum(), (ratio - 1 - (logp - old)).sum(), ratio.sum(), (ratio**2).sum()]
                    watched.add_(group.counted(torch.stack(seen)))
                return group.counted(policy_loss(logp, old, group.of(episodes.advantages), settings.clip).sum())

            value = actor.accumulate(micro(tokens), loss, units)
            return value, watched, accumulate_ptx(learner, documents, tokens) if documents else {}

        step = {"learning_rate": actor.learning_rate}
        if learner.train_policy:
            value, watched, of_ptx = learner.memory.within(passes, actor)
            step |= of_ptx
            step["policy_gradient_norm"] = actor.step(value, names)
            clipped, approximate_kl, ratio, squared = (accelerate.reduce(watched) / units).tolist()
            step |= {
                "policy_loss": value,
                "clip_fraction": clipped,
                "kl_old_new": approximate_kl,
                "ratio_mean": ratio,
                "ratio_std": max(squared - ratio**2, 0.0) ** 0.5,
            }
            learner.trained += _length(learner, episodes, part)
        averages.add(step | _fit_values(learner, episodes, micro, part))
    return averages.read()


def draw_documents(learner: Learner) -> list[int]:
    """Numbers of the documents of one step of PPO-ptx, alike on every process; none where gamma is 0 or the policy rests."""
    if learner.settings.ptx_coefficient == 0 or not learner.train_policy:
        return []
    count, few = len(learner.corpus), len(learner.corpus) < learner.settings.ptx_batch
    return [int(i) for i in learner.ptx_rng.choice(count, size=learner.settings.ptx_batch, replace=few)]


def accumulate_ptx(learner: Learner, picked: list[int], tokens: int) -> dict[str, float]:
    """Add the gradient of gamma times the pretraining loss (InstructGPT eq. 2) to the one that is there.

    `picked` are documents, which go through in micro-batches of `tokens`.

    `ptx_gradient_share` is |gamma * g_ptx| / (|g_ppo| + |gamma * g_ptx|): 0 says that gamma does nothing, 1 that PPO
    does nothing.
    """
    actor, corpus, settings = learner.actor, learner.corpus, learner.settings
    ppo = [p.grad.clone() if p.grad is not None else None for p in actor.parameters]
    units = sum(len(corpus[i].response) for i in picked)
    lengths = {i: len(corpus[i]) for i in picked}

    def loss(group: list[int]) -> Tensor:
        batch = collate([corpus[i] for i in group], learner.pad).to(learner.accelerate.device)
        return settings.ptx_coefficient * nll(actor.module(batch, temperature=1.0).sums()).sum()

    value = actor.accumulate(actor.share(picked, lengths, tokens), loss, units)
    of_ppo = sharding.number(torch.nn.utils.get_total_norm([g for g in ppo if g is not None]))
    for p, before in zip(actor.parameters, ppo, strict=True):  # in place: a second copy of all gradients would not fit
        if before is not None:
            before.neg_().add_(p.grad)
    added = [p.grad if of is None else of for p, of in zip(actor.parameters, ppo, strict=True)]
    of_ptx = sharding.number(torch.nn.utils.get_total_norm([g for g in added if g is not None]))
    learner.trained += sum(len(corpus[i]) for i in picked)
    return {
        "ptx_loss": value / settings.ptx_coefficient,
        "ptx_gradient_share": of_ptx / max(of_ppo + of_ptx, 1e-12),
    }


ATTEMPTS = {
    "reinforce": Attempt(
        critic=False,
        advantages=lambda learner, episodes: leave_one_out_advantages(
            learner, episodes, group=learner.settings.episodes if learner.settings.baseline else 1
        ),
        improve=policy_gradient_step,
    ),
    "rloo": Attempt(
        critic=False,
        advantages=lambda learner, episodes: leave_one_out_advantages(
            learner, episodes, group=learner.settings.samples_per_prompt
        ),
        improve=policy_gradient_step,
    ),
    "trpo": Attempt(critic=True, advantages=generalised_advantages, improve=trust_region_step),
    "ppo": Attempt(critic=True, advantages=generalised_advantages, improve=clipped_steps),
}


# ---- what they share -------------------------------------------------------------------------------------------------


def _minibatches(learner: Learner, episodes: Episodes) -> Iterator[list[int]]:
    """`epochs` passes in minibatches drawn from the global batch, alike on every process, each of which keeps its own."""
    settings, accelerate = learner.settings, learner.accelerate
    local = {place: i for i, place in enumerate(episodes.places)}
    for _ in range(settings.epochs):
        for drawn in np.array_split(learner.minibatch_rng.permutation(settings.episodes), settings.minibatches):
            part = [local[place] for place in drawn.tolist() if place in local]
            if int(accelerate.gather(torch.tensor([len(part)], device=accelerate.device)).min()) == 0:
                raise TrainingError(
                    f"a minibatch of {len(drawn)} episodes left one of {accelerate.num_processes} processes without any; "
                    "lower `rl.defaults.minibatches` or raise `episodes`"
                )
            yield part


def _micro(learner: Learner, episodes: Episodes, part: Sequence[int], tokens: int) -> list[Micro]:
    """Episodes as micro-batches of so many padded tokens; as many on every process, for each must run as many backward passes as the others."""
    device = learner.accelerate.device
    lengths = [len(episodes.tokens[i]) for i in part]
    wanted = torch.tensor([len(micro_batches(lengths, tokens))], device=device)
    most = int(learner.accelerate.gather(wanted).max())
    groups = [[part[j] for j in g] for g in micro_batches(lengths, tokens, min(most, len(part)))]
    made = [
        Micro(collate([episodes.tokens[i] for i in g], learner.pad).to(device), episodes.flat(g).to(device))
        for g in groups
    ]
    if not learner.sharded:
        return made
    return made + [made[0]._replace(weight=0.0)] * (most - len(made))


def _tokens(learner: Learner, episodes: Episodes, part: Sequence[int]) -> float:
    """Response tokens of some episodes, on all processes: what a mean over tokens is divided by."""
    count = sum(len(episodes.tokens[i].response) for i in part)
    return float(learner.accelerate.reduce(torch.tensor([float(count)], device=learner.accelerate.device)))


def _length(learner: Learner, episodes: Episodes, part: Sequence[int]) -> int:
    """Tokens of some episodes, prompts included, on all processes: the cost of a pass over them."""
    count = sum(len(episodes.tokens[i]) for i in part)
    return int(learner.accelerate.reduce(torch.tensor([count], device=learner.accelerate.device)))


def _fit_values(
    learner: Learner, episodes: Episodes, micro: Callable[[int], Sequence[Micro]], part: Sequence[int]
) -> dict[str, float]:
    """One step of the value network towards the returns; `micro(tokens)` are the episodes of `part`."""
    critic, clip = learner.critic, learner.settings.value_clip

    def loss(group: Micro) -> Tensor:
        values = state_values(critic.module, group.batch)
        return group.counted(value_loss(values, group.of(episodes.values), group.of(episodes.returns), clip).sum())

    units = _tokens(learner, episodes, part)
    value = learner.memory.within(lambda tokens: critic.accumulate(micro(tokens), loss, units), critic)
    learner.trained += _length(learner, episodes, part)
    return {"value_loss": value, "value_gradient_norm": critic.step(value, [episodes.names[i] for i in part])}


@torch.no_grad()
def check_policy(learner: Learner, episodes: Episodes) -> None:
    """After the updates of an iteration: what the policy now says of its first episodes must be numbers."""
    some = list(range(min(8, len(episodes.tokens))))
    group = Micro(
        collate([episodes.tokens[i] for i in some], learner.pad).to(learner.accelerate.device), torch.empty(0)
    )
    names = [episodes.names[i] for i in some]
    check_finite(learner.acting(group.batch).logp, learner.actor or learner.critic, names)
