"""Methods on problems whose optimum is known, through the production losses and loops.

A run starts at the reference, and what is watched while it trains is the exact distance to the method's own optimum.
"""

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import pandas as pd
import torch

from rlhf_vs_dpo import config
from rlhf_vs_dpo.config import Rl, Theory
from rlhf_vs_dpo.language.forward import scores
from rlhf_vs_dpo.language.logprobs import Policy
from rlhf_vs_dpo.language.text import Pairs, Tokens
from rlhf_vs_dpo.run.progress import Record
from rlhf_vs_dpo.theory import laws
from rlhf_vs_dpo.theory.problems import CONTROLS, Problem
from rlhf_vs_dpo.training import policy_gradient, preference, supervised
from rlhf_vs_dpo.training import reward as reward_training
from rlhf_vs_dpo.training.imitation import from_pairs
from rlhf_vs_dpo.training.learner import Networks

POINTS = 40  # of a curve

# What the runs share; learning rates suit a table of logits. A transformer shares parameters between states and takes less.
OPTIMISER = {"schedule": "linear", "max_grad_norm": 1.0}
RL: dict[str, Any] = OPTIMISER | {
    "samples_per_prompt": 1, "adam_epsilon": 1e-5, "kl_target": None, "kl_horizon": 1e4, "unfinished_reward": -1.0,
}  # fmt: skip
CRITIC = {
    "epochs": 2, "minibatches": 1, "value_learning_rate": 0.1, "value_clip": 10.0, "value_warmup": 0,
    "gae_discount": 1.0, "gae_lambda": 1.0,
}  # fmt: skip
PASSES = OPTIMISER | {"epochs": 1.0, "rounds": 1, "warmup": 0.0, "weight_decay": 0.0, "adam_epsilon": 1e-8}


class Watch:
    """In the place of `HeldOut`: the exact distance of the policy to an optimum, at some steps of its training."""

    asked = longest = 0  # it samples nothing

    def __init__(self, problem: Problem, optimum: np.ndarray, steps: int, suffix: tuple[int, ...] = ()):
        self.problem, self.optimum, self.suffix = problem, optimum, suffix
        self.every = max(1, steps // POINTS)
        self.steps = steps
        self.curve: list[tuple[int, float]] = []

    def watch(self, policy: Policy, step: int, log) -> None:
        if step % self.every == 0 or step == self.steps:
            self.curve.append((step, self.measure(policy)["kl"]))

    def measure(self, policy: Policy) -> dict[str, float]:
        """Worst prompt: total variation, and KL(pi || optimum) in nats."""
        pi = self.problem.distribution(policy, self.suffix)
        return {
            "total_variation": float(laws.total_variation(pi, self.optimum).max()),
            "kl": float(laws.kl(pi, self.optimum).max()),
        }


def _silent(metrics: dict[str, float], step: int) -> None:
    pass


def rl_settings(name: str, iterations: int, episodes: int, beta: float, scale: float) -> Rl:
    """Settings of an attempt on an enumerable problem; `scale` multiplies the learning rates."""
    shared = RL | {"iterations": iterations, "episodes": episodes, "kl_coefficient": beta}
    critic = shared | CRITIC | {"value_learning_rate": CRITIC["value_learning_rate"] * scale}
    match name:
        case "reinforce":
            return config.Reinforce(algorithm="reinforce", baseline=True, learning_rate=0.15 * scale, **shared)
        case "rloo":
            return config.Rloo(algorithm="rloo", learning_rate=0.1 * scale, **(shared | {"samples_per_prompt": 4}))
        case "trpo":
            return config.Trpo(
                algorithm="trpo", max_kl=0.01, damping=1e-4, cg_steps=10, fisher_share=1.0, backtracks=10, **critic
            )
        case "ppo":
            return config.Ppo(
                algorithm="ppo", learning_rate=0.05 * scale, clip=0.2, ptx_coefficient=0.0, ptx_batch=1, **critic
            )
    raise ValueError(name)


def reinforcement(problem: Problem, settings: Rl, seed: int) -> tuple[dict[str, float], list[tuple[int, float]]]:
    """Train on sampled episodes; distance to the Gibbs policy, and its curve over iterations."""
    policy = problem.start()
    watch = Watch(problem, problem.optimum(settings.kl_coefficient), settings.iterations)
    settings = settings.model_copy(update={"unfinished_reward": problem.unfinished_reward})
    policy_gradient.train(
        Networks(policy, problem.reference, problem.scorer), problem.prompts, [], settings, problem.max_new_tokens, seed,
        Record(_silent, f"{problem.name}: {settings.algorithm}", watch),
    )  # fmt: skip
    return watch.measure(policy), watch.curve


def population(problem: Problem, count: int, same: bool, seed: int) -> pd.DataFrame:
    """Pairs of two responses of ref in the proportions of an infinite population: `prompt, chosen, rejected` (numbers).

    The share of (y chosen, y' rejected) is ref(y) ref(y') sigmoid(r - r'); `same` keeps pairs of a response with itself,
    of which DPO learns nothing. Shares become counts by systematic sampling: each is right to within one pair.
    """
    shares = []
    for ref, reward in zip(problem.ref, problem.reward, strict=True):
        share = ref[:, None] * ref[None, :] * laws.sigmoid(reward[:, None] - reward[None, :])
        if not same:
            np.fill_diagonal(share, 0.0)
        shares.append(share / share.sum())
    flat = np.concatenate([share.flatten() for share in shares])
    ends = np.cumsum(flat / flat.sum()) * count
    offset = np.random.default_rng(seed).random()
    counts = np.diff(np.floor(np.concatenate([[0.0], ends]) + offset)).astype(int)
    cells = np.repeat(np.arange(len(flat)), counts)
    prompt, chosen, rejected = np.unravel_index(cells, (len(shares), *shares[0].shape))
    return pd.DataFrame({"prompt": prompt, "chosen": chosen, "rejected": rejected})


def _tokens(problem: Problem, pairs: pd.DataFrame) -> Pairs:
    """Chosen and rejected texts of a population."""
    prompts, responses = problem.prompts.ids, problem.responses
    chosen, rejected = (
        [Tokens(prompts[p], responses[y]) for p, y in zip(pairs["prompt"], pairs[side], strict=True)]
        for side in ("chosen", "rejected")
    )
    return Pairs(chosen, rejected, list(map(str, pairs.index)))


def direct(
    problem: Problem, settings: config.Preference, pairs: pd.DataFrame, steps: int, optimum: np.ndarray, seed: int
) -> tuple[dict[str, float], list[tuple[int, float]]]:
    """Train on population pairs by a loss of the DPO family; distance to `optimum`, and its curve over steps."""
    policy = problem.start()
    watch = Watch(problem, optimum, steps)
    log_ref = np.log(problem.ref)
    known = pd.DataFrame({f"{side}_logp": log_ref[pairs["prompt"], pairs[side]] for side in ("chosen", "rejected")})
    preference.train(
        policy,
        _tokens(problem, pairs),
        known,
        settings,
        steps,
        seed,
        Record(_silent, f"{problem.name}: {settings.loss}", watch),
    )
    return watch.measure(policy), watch.curve


def modelled(problem: Problem, pairs: pd.DataFrame, beta: float, steps: int, batch: int, seed: int) -> dict[str, float]:
    """RLHF's two steps without reinforcement learning: a reward model of the pairs, then the Gibbs policy of its rewards."""
    scorer = copy.deepcopy(problem.scorer).requires_grad_(True)
    with torch.no_grad():
        scorer.head.weight.zero_()
    settings = config.Dpo(loss="dpo", beta=beta, batch=batch, learning_rate=0.1, **PASSES)
    training = supervised.as_training(settings, steps)
    reward_training.train(
        scorer, _tokens(problem, pairs), training, seed, Record(_silent, f"{problem.name}: reward model")
    )
    learned = scores(scorer, problem.examples())
    policy, _ = laws.gibbs(problem.ref, np.array(learned).reshape(problem.ref.shape), beta)
    optimum = problem.optimum(beta)
    return {
        "total_variation": float(laws.total_variation(policy, optimum).max()),
        "kl": float(laws.kl(policy, optimum).max()),
    }


def imitated(
    problem: Problem, recipe: str, pairs: pd.DataFrame, steps: int, batch: int, seed: int
) -> tuple[dict[str, float], list[tuple[int, float]], np.ndarray]:
    """SFT on chosen responses or behind control tokens; distance to the law of the chosen response, and the policy."""
    policy = problem.start()
    law = np.stack([laws.chosen_law(ref, reward) for ref, reward in zip(problem.ref, problem.reward, strict=True)])
    controlled = recipe == "control_tokens"
    suffix = tuple(problem.tokenizer.convert_tokens_to_ids(CONTROLS[:1])) if controlled else ()
    watch = Watch(problem, law, steps, suffix)

    def texts(side: str) -> list[str]:
        return [f"y{y}" for y in pairs[side]]

    table = pd.DataFrame(
        {
            "pair_id": list(map(str, pairs.index)),
            "prompt": [f"p{p}" for p in pairs["prompt"]],
            "chosen": texts("chosen"),
            "rejected": texts("rejected"),
            "chosen_ids": None,
            "rejected_ids": None,
        }
    )
    examples = from_pairs(recipe, table, problem.tokenizer, 16)
    settings = config.ChosenSft(recipe="chosen_sft", batch=batch, learning_rate=0.03, **PASSES)
    supervised.likelihood(
        policy, examples, supervised.as_training(settings, steps), seed,
        Record(_silent, f"{problem.name}: {recipe}", watch),
    )  # fmt: skip
    return watch.measure(policy), watch.curve, problem.distribution(policy, suffix)


def study(
    settings: Theory, problems: list[Problem], seed: int, log: Callable[[str, str, list], None]
) -> dict[str, dict[str, dict[str, float]]]:
    """REINFORCE, RLOO, TRPO, PPO, DPO, chosen_sft and control_tokens on the table, PPO and DPO on the transformer.

    Returns {problem: {method: {total_variation, kl}}}; calls `log(problem, method, curve)`.
    """
    torch.manual_seed(seed)
    beta = settings.kl_coefficient
    results: dict[str, dict[str, dict[str, float]]] = {}
    for problem in problems:
        small = problem.name == "tabular"
        found: dict[str, dict[str, float]] = {}
        scale = 1.0 if small else 0.04
        iterations = settings.rl_iterations if small else settings.transformer_iterations
        for name in ("reinforce", "rloo", "trpo", "ppo") if small else ("ppo",):
            attempt = rl_settings(name, iterations, settings.episodes, beta, scale)
            found[name], curve = reinforcement(problem, attempt, seed)
            log(problem.name, name, curve)
        pairs = population(problem, settings.pairs, same=False, seed=seed)
        batch = min(4096 if small else 1024, len(pairs))
        dpo = config.Dpo(loss="dpo", beta=beta, batch=batch, learning_rate=0.15 if small else 2e-3, **PASSES)
        found["dpo"], curve = direct(problem, dpo, pairs, settings.pair_steps, problem.optimum(beta), seed)
        log(problem.name, "dpo", curve)
        if small:
            found["reward_model_and_gibbs"] = modelled(problem, pairs, beta, settings.pair_steps, batch, seed)
            every = population(problem, settings.pairs, same=True, seed=seed)
            for recipe in ("chosen_sft", "control_tokens"):
                found[recipe], curve, policy = imitated(problem, recipe, every, settings.pair_steps, batch, seed)
                log(problem.name, recipe, curve)
                found[recipe] |= {
                    "kl_to_reference": float(laws.kl(policy, problem.ref).max()),
                    "win_rate": max(map(laws.win_rate, policy, problem.ref, problem.reward)),
                }
        results[problem.name] = found
    return results
