"""Facts that need no training: equalities, as how far they are from holding, and bounds, as by how much they hold.

What is a loss of the project is called, not rewritten: gradients go through `losses` and the training loops' own code.
"""

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from rlhf_vs_dpo.config import Theory
from rlhf_vs_dpo.evaluation.order_statistics import kl_bound, log_ratio, order_weights, win_rate_bound
from rlhf_vs_dpo.losses.dpo import dpo
from rlhf_vs_dpo.losses.gae import token_rewards
from rlhf_vs_dpo.losses.ipo import ipo
from rlhf_vs_dpo.losses.reinforce import leave_one_out, policy_gradient_loss
from rlhf_vs_dpo.run.progress import Record
from rlhf_vs_dpo.theory import laws
from rlhf_vs_dpo.theory.experiments import rl_settings
from rlhf_vs_dpo.theory.problems import Problem
from rlhf_vs_dpo.training import policy_gradient
from rlhf_vs_dpo.training.learner import Networks

Identities = dict[str, float]
Bounds = dict[str, dict[str, float]]


def _outcomes(count: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """A reference and rewards over outcomes."""
    rng = np.random.default_rng(seed)
    logits = 1.5 * rng.normal(size=count)
    return np.exp(logits) / np.exp(logits).sum(), rng.normal(size=count)


def gibbs(settings: Theory, seed: int) -> Identities:
    """J(pi*) = beta log Z, no other policy does better, and r = beta log(pi*/ref) + beta log Z (the implicit reward)."""
    ref, reward = _outcomes(settings.law_outcomes, seed)
    beta = settings.kl_coefficient
    best, log_z = laws.gibbs(ref, reward, beta)
    top = laws.objective(best, ref, reward, beta)
    other, _ = laws.gibbs(ref, reward, 1.1 * beta)
    lost = top - laws.objective(other, ref, reward, beta)
    return {
        "J(pi*) = beta log Z": float(abs(top - beta * log_z)),
        "J(pi*) - J(pi) = beta KL(pi || pi*)": float(abs(lost - beta * laws.kl(other, best))),
        "r = beta log(pi*/ref) + beta log Z": float(np.abs(beta * np.log(best / ref) + beta * log_z - reward).max()),
    }


# ---- gradients, by enumeration ---------------------------------------------------------------------------------------


def _gradient(logits: Tensor, loss: Callable[[Tensor], Tensor]) -> Tensor:
    """Gradient with respect to the logits of a softmax of a loss of its log-probabilities."""
    leaf = logits.clone().requires_grad_(True)
    return torch.autograd.grad(loss(leaf.log_softmax(-1)), leaf)[0]


def gradients(settings: Theory, seed: int) -> Identities:
    """Policy gradients and the DPO gradient against closed forms; expectations are sums over all outcomes."""
    rng = np.random.default_rng(seed)
    beta, count = settings.kl_coefficient, 6
    logits, ref_logits, r = (torch.from_numpy(rng.normal(size=count)) for _ in range(3))
    ref = ref_logits.log_softmax(-1)
    logp = logits.log_softmax(-1)
    pi = logp.exp()
    one = torch.ones(count, 1)
    shaped = token_rewards(logp[:, None], ref[:, None], r, one.long(), beta)[:, 0]  # R(x, y), as the rollouts make it
    exact = -_gradient(logits, lambda lp: -(lp.exp() * (r - beta * (lp - ref))).sum())
    plain = -_gradient(logits, lambda lp: (pi * policy_gradient_loss(lp, shaped)).sum())
    # RLOO with k = 2: all pairs of outcomes, each with its probability
    both = torch.stack([shaped[:, None].expand(-1, count), shaped[None, :].expand(count, -1)], -1).reshape(-1, 2)
    centred = leave_one_out(both).view(count, count, 2)
    weight = pi[:, None] * pi[None, :]
    rloo = -_gradient(
        logits,
        lambda lp: (
            (
                weight
                * (policy_gradient_loss(lp[:, None], centred[..., 0]) + policy_gradient_loss(lp[None], centred[..., 1]))
            ).sum()
            / 2
        ),
    )
    s = beta * ((logp[0] - ref[0]) - (logp[1] - ref[1]))
    of_dpo = _gradient(logits, lambda lp: dpo(lp[0], lp[1], ref[0], ref[1], beta).loss)
    closed = -beta * torch.sigmoid(-s) * (_gradient(logits, lambda lp: lp[0]) - _gradient(logits, lambda lp: lp[1]))
    # The population DPO loss has no slope at pi*, for preferences of the same reward
    star = (ref + r / beta).log_softmax(-1)
    chance = ref.exp()[:, None] * ref.exp()[None, :] * torch.sigmoid(r[:, None] - r[None, :])
    at_star = _gradient(
        star, lambda lp: (chance * dpo(lp[:, None], lp[None], ref[:, None], ref[None], beta).loss).sum()
    )
    return {
        "E[REINFORCE gradient] = gradient of J": float((plain - exact).abs().max()),
        "E[RLOO gradient] = gradient of J": float((rloo - exact).abs().max()),
        "DPO gradient = -beta sigmoid(-s) (grad log pi_w - grad log pi_l)": float((of_dpo - closed).abs().max()),
        "population DPO gradient at pi* = 0": float(at_star.abs().max()),
    }


def kl_estimators(settings: Theory, seed: int) -> tuple[Identities, dict[str, float]]:
    """k1 = -log u, k2 = (log u)^2 / 2, k3 = u - 1 - log u with u = ref/pi: expectation, and gradient in reward and loss.

    (Schulman 2020, "Approximating KL divergence"; arXiv:2510.01555.) In the reward, k is a constant that weights grad
    log pi; in the loss, it is differentiated itself. Returns identities, and the relative error of what is biased.
    """
    rng = np.random.default_rng(seed)
    logits, ref = (torch.from_numpy(rng.normal(size=6)).log_softmax(-1) for _ in range(2))
    pi = logits.exp()

    def estimators(lp: Tensor) -> dict[str, Tensor]:
        log_u = ref - lp
        return {"k1": -log_u, "k2": log_u**2 / 2, "k3": log_u.exp() - 1 - log_u}

    exact = (pi * (logits - ref)).sum()
    slope = _gradient(logits, lambda lp: (lp.exp() * (lp - ref)).sum())
    backward = _gradient(logits, lambda lp: (ref.exp() * (ref - lp)).sum())  # of the other KL(ref || pi)
    fixed = estimators(logits)
    in_reward = {k: _gradient(logits, lambda lp, v=v: (pi * v * lp).sum()) for k, v in fixed.items()}
    in_loss = {k: _gradient(logits, lambda lp, k=k: (pi * estimators(lp)[k]).sum()) for k in fixed}

    def error(gradient: Tensor, truth: Tensor = slope) -> float:
        return float((gradient - truth).norm() / slope.norm())

    identities = {
        "E[k1] = KL": float(((pi * fixed["k1"]).sum() - exact).abs()),
        "E[k3] = KL": float(((pi * fixed["k3"]).sum() - exact).abs()),
        "gradient of k1 in the reward = gradient of KL": error(in_reward["k1"]),
        "gradient of k2 in the loss = gradient of KL": error(in_loss["k2"]),
        "gradient of k1 in the loss = 0": float(in_loss["k1"].norm()),
        "gradient of k3 in the loss = gradient of KL(ref || pi)": error(in_loss["k3"], backward),
    }
    biased = {
        "E[k2] / KL - 1": float((pi * fixed["k2"]).sum() / exact - 1),
        "k2 in the reward": error(in_reward["k2"]),
        "k3 in the reward": error(in_reward["k3"]),
        "k1 in the loss": error(in_loss["k1"]),
        "k3 in the loss": error(in_loss["k3"]),
    }
    return identities, biased


# ---- laws of selection -----------------------------------------------------------------------------------------------


def selection(settings: Theory, seed: int) -> tuple[Identities, Bounds]:
    """Best-of-n, expert iteration, thresholds and choices between two: exact laws, with and without ties."""
    ref, reward = _outcomes(settings.law_outcomes, seed)
    tied = np.round(reward, 1)  # few levels of reward, many responses on each
    identities: Identities = {}
    bounds: Bounds = {}
    for name, r in (("", reward), (" with ties", tied)):
        for n in (2, 16, 128, 1024):
            law = laws.best_of_n_law(ref, r, n)
            bounds[f"best of {n}{name}: KL"] = _bound(laws.kl(law, ref), kl_bound(n))
            bounds[f"best of {n}{name}: win rate"] = _bound(laws.win_rate(law, ref, r), win_rate_bound(n))
            gibbs_there = laws.gibbs_at_kl(ref, r, float(laws.kl(law, ref)))
            bounds[f"best of {n}{name}: reward below Gibbs at equal KL"] = _bound(law @ r, gibbs_there @ r)
        for label, certain in (("Bradley-Terry labels", False), ("certain labels", True)):
            law = laws.chosen_law(ref, r, certain)
            bounds[f"chosen of two{name}, {label}: KL"] = _bound(laws.kl(law, ref), np.log(2) - 0.5)
            bounds[f"chosen of two{name}, {label}: win rate"] = _bound(laws.win_rate(law, ref, r), 2 / 3)
        repeated = ref
        for _ in range(3):
            repeated = laws.best_of_n_law(repeated, r, 4)
        gap = np.abs(repeated - laws.best_of_n_law(ref, r, 4**3)).max()
        identities[f"3 rounds of best of 4 = best of 64{name}"] = float(gap)
        certain = laws.chosen_law(ref, r, deterministic=True)
        identities[f"chosen of two by certain labels = best of 2{name}"] = float(
            np.abs(certain - laws.best_of_n_law(ref, r, 2)).max()
        )
        threshold = float(np.quantile(np.unique(r), 0.9))  # of levels: something is always above it
        kept = laws.threshold_law(ref, r, threshold)
        above = float(ref[r > threshold].sum())
        identities[f"KL of a threshold = -log P(r > threshold){name}"] = float(abs(laws.kl(kept, ref) + np.log(above)))
    for n in (2, 64):  # the estimator of evaluation/order_statistics.py, from 256 samples that are all there is
        pool = np.sort(np.random.default_rng(seed).normal(size=256))
        without = order_weights(256, n) @ pool
        again = np.array([np.random.default_rng(i).permutation(pool)[:n].max() for i in range(2000)])
        bounds[f"order-statistic estimate, n = {n}: off a simulation, in its standard errors"] = _bound(
            abs(without - again.mean()) / (again.std(ddof=1) / len(again) ** 0.5), 5.0
        )
    ranks = np.arange(256.0)
    tiny = np.full(256, -40.0)  # responses without weight of their own: the estimated KL is the bound
    for n in (2, 256):
        ratio = log_ratio(ranks, tiny, ranks.astype(str), n)
        identities[f"estimated KL of best of {n} of 256 without atoms = the bound"] = float(
            abs(order_weights(256, n) @ ratio - kl_bound(n))
        )
    return identities, bounds


def _bound(value: float, limit: float) -> dict[str, float]:
    return {"value": float(value), "bound": float(limit), "slack": float(limit - value)}


# ---- two outcomes: where DPO has no optimum and IPO has ----------------------------------------------------------------


def two_outcomes(tau: float = 0.5, beta: float = 0.5) -> tuple[Identities, dict[str, float]]:
    """IPO's optimum in closed form; DPO under preferences without exception, which has none.

    One logit z, pi(first) = sigmoid(z), a uniform reference, preference probability p for the first. Both losses are the
    production ones; what is measured is the slope of their population mean.
    """
    half = torch.tensor(0.5).double().log()

    def population_loss(loss: Callable, z: Tensor, p: float) -> Tensor:
        first, second = torch.nn.functional.logsigmoid(z), torch.nn.functional.logsigmoid(-z)
        return p * loss(first, second, half, half).loss + (1 - p) * loss(second, first, half, half).loss

    def slope(loss: Callable, z: float, p: float) -> float:
        leaf = torch.tensor(z, dtype=torch.float64, requires_grad=True)
        return torch.autograd.grad(population_loss(loss, leaf, p), leaf)[0].item()

    def of_ipo(*args: Tensor):
        return ipo(*args, tau=tau)

    def of_dpo(*args: Tensor):
        return dpo(*args, beta=beta)

    identities = {}
    for p in (0.6, 1.0):
        z = (2 * p - 1) / (2 * tau)
        identities[f"IPO at p = {p}: no slope at sigmoid((2p-1)/(2 tau))"] = abs(slope(of_ipo, z, p))
    identities["DPO at p = 0.6: no slope at sigmoid(log-odds / beta)"] = abs(
        slope(of_dpo, float(np.log(0.6 / 0.4)) / beta, 0.6)
    )
    runaway = {f"DPO at p = 1: slope at log-odds {z}": slope(of_dpo, float(z), 1.0) for z in (10, 20, 40)}
    return identities, runaway


def ptx_off(problem: Problem, episodes: int, seed: int) -> bool:
    """PPO-ptx with gamma = 0 gives the weights of PPO, bit for bit; with gamma > 0 it does not."""
    corpus = problem.examples()[:8]  # responses to the first prompt
    weights = []
    for gamma, text in ((0.0, []), (0.0, corpus), (0.5, corpus)):
        settings = rl_settings("ppo", 2, episodes, 0.5, 0.04).model_copy(
            update={"ptx_coefficient": gamma, "ptx_batch": 4, "unfinished_reward": problem.unfinished_reward}
        )
        policy = problem.start()
        policy_gradient.train(
            Networks(policy, problem.reference, problem.scorer), problem.prompts, text, settings, problem.max_new_tokens, seed,
            Record(lambda metrics, step: None, "PPO-ptx"),
        )  # fmt: skip
        weights.append(torch.cat([p.detach().flatten() for p in policy.parameters()]))
    return bool(torch.equal(weights[0], weights[1]) and not torch.equal(weights[0], weights[2]))
