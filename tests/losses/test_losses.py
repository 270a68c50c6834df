"""Each loss against numbers worked out by hand, brute force, and its closed-form gradient."""

import math

import pytest
import torch
from torch import Tensor

from rlhf_vs_dpo.losses.bradley_terry import bradley_terry
from rlhf_vs_dpo.losses.dpo import cdpo, dpo, ln_dpo
from rlhf_vs_dpo.losses.gae import gae, token_rewards, whiten
from rlhf_vs_dpo.losses.ipo import ipo
from rlhf_vs_dpo.losses.ppo import next_kl_coefficient, policy_loss, value_loss
from rlhf_vs_dpo.losses.reinforce import leave_one_out, policy_gradient_loss
from rlhf_vs_dpo.losses.sft import nll
from rlhf_vs_dpo.losses.simpo import simpo
from rlhf_vs_dpo.losses.trpo import conjugate_gradient, kl_divergence, surrogate


def t(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def leaf(*values: float) -> Tensor:
    return t(*values).requires_grad_()


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def test_nll_is_the_negative_log_probability():
    # two responses of probability 1/8 and 1/2
    assert nll(t(math.log(1 / 8), math.log(1 / 2))).tolist() == pytest.approx([2.0794415, 0.6931472])


def test_bradley_terry_by_hand():
    # scores 2 and 1: sigmoid(1) = 0.7310586, -log = 0.3132617; the other way round -log sigmoid(-1) = 1.3132617
    assert bradley_terry(t(2.0, 1.0), t(1.0, 2.0)).tolist() == pytest.approx([0.3132617, 1.3132617])


def test_bradley_terry_recovers_the_reward_up_to_a_constant():
    """Fitted to the population of choices of a known reward, the scores are that reward plus a constant."""
    reward = t(0.3, -1.2, 2.0, 0.0)
    scores = leaf(0, 0, 0, 0)
    first, second = torch.combinations(torch.arange(4)).T
    p_first = torch.sigmoid(reward[first] - reward[second])
    optimiser = torch.optim.LBFGS(
        [scores], max_iter=200, tolerance_grad=1e-12, tolerance_change=0, line_search_fn="strong_wolfe"
    )

    def closure():
        optimiser.zero_grad()
        loss = p_first * bradley_terry(scores[first], scores[second])
        loss = (loss + (1 - p_first) * bradley_terry(scores[second], scores[first])).sum()
        loss.backward()
        return loss

    optimiser.step(closure)
    gap = scores.detach() - reward
    assert (gap - gap.mean()).abs().max() < 1e-5


def test_dpo_is_log_2_where_policy_is_reference():
    logp = t(-3.0, -7.5)
    result = dpo(logp, logp - 1, logp, logp - 1, beta=0.3)
    assert result.loss.tolist() == pytest.approx([math.log(2)] * 2)
    assert result.chosen_reward.tolist() == result.rejected_reward.tolist() == [0.0, 0.0]


def test_dpo_by_hand():
    # h_w = -10 - -12 = 2, h_l = -9 - -8 = -1, beta 0.5: s = 0.5 * 3 = 1.5, -log sigmoid(1.5) = 0.2014133
    result = dpo(t(-10.0), t(-9.0), t(-12.0), t(-8.0), beta=0.5)
    assert result.loss.item() == pytest.approx(0.2014133)
    assert (result.chosen_reward.item(), result.rejected_reward.item()) == pytest.approx((1.0, -0.5))


def test_dpo_gradient_is_minus_beta_sigmoid_of_minus_s():
    beta, chosen, rejected = 0.7, leaf(-10.0, -4.0), leaf(-9.0, -6.0)
    ref_chosen, ref_rejected = leaf(-12.0, -4.5), leaf(-8.0, -5.0)
    dpo(chosen, rejected, ref_chosen, ref_rejected, beta).loss.sum().backward()
    s = [beta * ((c - rc) - (r - rr)) for c, r, rc, rr in ((-10, -9, -12, -8), (-4, -6, -4.5, -5))]
    expected = [-beta * sigmoid(-value) for value in s]
    assert chosen.grad.tolist() == pytest.approx(expected)
    assert rejected.grad.tolist() == pytest.approx([-g for g in expected])


def test_the_weight_of_a_pair_is_minus_the_slope_in_the_margin():
    """DPO: sigmoid(-s), the weight of the gradient in eq. 7; of every loss, - dL/ds by differences."""
    chosen, rejected, ref = t(-10.0, -4.0), t(-9.0, -6.0), (t(-12.0, -4.5), t(-8.0, -5.0))
    tokens = (t(5.0, 3.0), t(4.0, 7.0))
    s = 0.5 * ((chosen - ref[0]) - (rejected - ref[1]))
    assert dpo(chosen, rejected, *ref, beta=0.5).weight.tolist() == pytest.approx(torch.sigmoid(-s).tolist())
    losses = {  # loss of a shift of the chosen log-probability, and by how much that shifts the margin
        "dpo": (lambda h: dpo(chosen + h, rejected, *ref, beta=0.5), t(0.5, 0.5)),
        "cdpo": (lambda h: cdpo(chosen + h, rejected, *ref, beta=0.5, label_smoothing=0.2), t(0.5, 0.5)),
        "ln_dpo": (lambda h: ln_dpo(chosen + h, rejected, *ref, *tokens, beta=2.0), 2.0 / tokens[0]),
        "ipo": (lambda h: ipo(chosen + h, rejected, *ref, tau=0.3), t(0.3, 0.3)),
        "simpo": (lambda h: simpo(chosen + h, rejected, *tokens, beta=2.0, gamma=0.4), 2.0 / tokens[0]),
    }
    for name, (loss, scale) in losses.items():
        slope = (loss(1e-3).loss - loss(-1e-3).loss) / 2e-3 / scale
        assert loss(0.0).weight.tolist() == pytest.approx((-slope).tolist(), rel=1e-3, abs=1e-4), name


def test_dpo_reaches_the_gibbs_policy():
    """Population DPO on Bradley-Terry preferences of r has its optimum at ref * exp(r / beta) / Z."""
    beta = 0.5
    reward, ref = t(1.0, 0.2, -0.7, 0.5), torch.log_softmax(t(0.1, 1.0, -0.3, 0.4), 0)
    logits = leaf(*ref.tolist())
    first, second = torch.cartesian_prod(torch.arange(4), torch.arange(4)).T
    weight = torch.exp(ref[first] + ref[second]) * torch.sigmoid(reward[first] - reward[second])
    optimiser = torch.optim.LBFGS(
        [logits], max_iter=500, tolerance_grad=1e-12, tolerance_change=0, line_search_fn="strong_wolfe"
    )

    def closure():
        optimiser.zero_grad()
        logp = torch.log_softmax(logits, 0)
        loss = (weight * dpo(logp[first], logp[second], ref[first], ref[second], beta).loss).sum()
        loss.backward()
        return loss

    optimiser.step(closure)
    gibbs = torch.softmax(ref + reward / beta, 0)
    assert 0.5 * (torch.softmax(logits.detach(), 0) - gibbs).abs().sum() < 1e-5


def test_ln_dpo_by_hand_and_its_relation_to_dpo():
    # h_w / |y_w| = 2 / 4, h_l / |y_l| = -1 / 2, beta 3: s = 3 * (0.5 + 0.5) = 3, -log sigmoid(3) = 0.0485874
    result = ln_dpo(t(-10.0), t(-9.0), t(-12.0), t(-8.0), t(4.0), t(2.0), beta=3.0)
    assert result.loss.item() == pytest.approx(0.0485874, abs=1e-7)
    equal = ln_dpo(t(-10.0), t(-9.0), t(-12.0), t(-8.0), t(5.0), t(5.0), beta=3.0)
    assert equal.loss.item() == pytest.approx(dpo(t(-10.0), t(-9.0), t(-12.0), t(-8.0), beta=3.0 / 5).loss.item())


def test_simpo_by_hand_and_its_gradient():
    # 2 * -12 / 4 = -6, 2 * -9 / 3 = -6, gamma 0.5: -log sigmoid(-0.5) = 0.9740770
    chosen, rejected = leaf(-12.0), leaf(-9.0)
    result = simpo(chosen, rejected, t(4.0), t(3.0), beta=2.0, gamma=0.5)
    assert result.loss.item() == pytest.approx(0.9740770)
    result.loss.sum().backward()
    weight = sigmoid(0.5)  # sigmoid(-s)
    assert chosen.grad.item() == pytest.approx(-2.0 / 4 * weight)
    assert rejected.grad.item() == pytest.approx(2.0 / 3 * weight)


@pytest.mark.parametrize("loss", ["dpo", "ln_dpo", "simpo"])
def test_implicit_rewards_carry_no_gradient(loss):
    a, b = leaf(-3.0), leaf(-4.0)
    results = {
        "dpo": lambda: dpo(a, b, t(-3.5), t(-4.0), 0.1),
        "ln_dpo": lambda: ln_dpo(a, b, t(-3.5), t(-4.0), t(2.0), t(3.0), 0.1),
        "simpo": lambda: simpo(a, b, t(2.0), t(3.0), 0.1, 0.2),
    }
    result = results[loss]()
    assert (
        result.loss.requires_grad
        and not result.chosen_reward.requires_grad
        and not result.rejected_reward.requires_grad
    )


# ---- GAE -------------------------------------------------------------------------------------------------------------


def test_token_rewards_put_kl_on_every_token_and_the_score_on_the_last():
    logp, ref = t(-1.0, -2.0, 9.0).expand(2, 3), t(-1.5, -1.0, 5.0).expand(2, 3)
    mask = torch.tensor([[True, True, False], [True, True, True]])
    rewards = token_rewards(logp, ref, t(10.0, 20.0), mask, beta=0.1)
    # k1 = 0.5, -1, 4; the masked third token of the first response is worth nothing
    assert rewards.tolist() == [pytest.approx([-0.05, 0.1 + 10, 0.0]), pytest.approx([-0.05, 0.1, -0.4 + 20])]


def test_gae_by_hand():
    # one response of two tokens, R = (1, 2), V = (0.5, 1), gamma 0.9, lambda 0.8
    # delta_2 = 2 - 1 = 1; delta_1 = 1 + 0.9 * 1 - 0.5 = 1.4; A_2 = 1; A_1 = 1.4 + 0.72 * 1 = 2.12
    mask = torch.tensor([[1.0, 1.0, 0.0]], dtype=torch.float64)
    advantages, returns = gae(t(1.0, 2.0, 77.0)[None], t(0.5, 1.0, 55.0)[None], mask, 0.9, 0.8)
    assert advantages[0].tolist() == pytest.approx([2.12, 1.0, 0.0])
    assert returns[0].tolist() == pytest.approx([2.62, 2.0, 0.0])


def test_gae_against_brute_force():
    """A_t = sum_k (gamma * lambda)^k delta_(t+k), within each response, for lengths 1 to R."""
    torch.manual_seed(0)
    rewards, values = torch.randn(7, 7, dtype=torch.float64), torch.randn(7, 7, dtype=torch.float64)
    lengths = torch.arange(1, 8)
    mask = (torch.arange(7) < lengths[:, None]).double()
    gamma, lam = 0.95, 0.7
    advantages, returns = gae(rewards, values, mask, gamma, lam)
    for row, length in enumerate(lengths.tolist()):
        for start in range(7):
            expected = 0.0
            for k in range(length - start):
                later = values[row, start + k + 1].item() if start + k + 1 < length else 0.0
                delta = rewards[row, start + k].item() + gamma * later - values[row, start + k].item()
                expected += (gamma * lam) ** k * delta
            assert advantages[row, start].item() == pytest.approx(expected)
            assert returns[row, start].item() == pytest.approx(
                (expected + values[row, start].item()) * (start < length)
            )


def test_gae_with_lambda_one_is_reward_to_go_minus_value():
    rewards, values = t(0.1, -0.2, 3.0)[None], t(1.0, 2.0, 0.5)[None]
    advantages, returns = gae(rewards, values, torch.ones(1, 3, dtype=torch.float64), 1.0, 1.0)
    assert returns[0].tolist() == pytest.approx([2.9, 2.8, 3.0])
    assert advantages[0].tolist() == pytest.approx([1.9, 0.8, 2.5])


def test_whitening():
    white = whiten(t(1.0, 3.0), t(2.0), t(1.0))
    assert white.tolist() == pytest.approx([-1.0, 1.0], abs=1e-6)


# ---- PPO -------------------------------------------------------------------------------------------------------------


def test_ppo_clips_by_hand():
    # ratio 1.5, A > 0: min(1.5, 1.2) * 2; ratio 0.5, A < 0: min(-0.5, -0.8) * 1; ratio 1.5, A < 0: not clipped; ratio 0.5, A > 0: not
    ratio = t(1.5, 0.5, 1.5, 0.5)
    loss = policy_loss(ratio.log(), torch.zeros(4, dtype=torch.float64), t(2.0, -1.0, -1.0, 2.0), clip=0.2)
    assert loss.tolist() == pytest.approx([-2.4, 0.8, 1.5, -1.0])


def test_ppo_at_ratio_one_is_the_policy_gradient():
    """d/dtheta = -A * d log pi: the REINFORCE gradient, whatever the clip."""
    logp = leaf(-1.0, -2.0, -0.3)
    policy_loss(logp, logp.detach(), t(2.0, -1.0, 0.5), clip=0.2).sum().backward()
    assert logp.grad.tolist() == pytest.approx([-2.0, 1.0, -0.5])


def test_ppo_has_no_gradient_where_the_clip_binds():
    logp = leaf(math.log(1.5), math.log(0.5), math.log(1.5))
    policy_loss(logp, torch.zeros(3, dtype=torch.float64), t(1.0, -1.0, -1.0), clip=0.2).sum().backward()
    assert logp.grad.tolist() == pytest.approx([0.0, 0.0, 1.5])


def test_value_loss_by_hand():
    # V 2, V_old 1, G 3, eps 0.2: clipped V = 1.2; max((2-3)^2, (1.2-3)^2) / 2 = 1.62
    # V 1.1, V_old 1, G 3: inside the clip: (1.9)^2 / 2 = 1.805
    assert value_loss(t(2.0, 1.1), t(1.0, 1.0), t(3.0, 3.0), 0.2).tolist() == pytest.approx([1.62, 1.805])


def test_adaptive_kl_coefficient():
    # KL twice the target: the error is clipped to 0.2: 0.1 * (1 + 0.2 * 128 / 10000)
    assert next_kl_coefficient(0.1, 12.0, 6.0, 10000, 128) == pytest.approx(0.100256)
    assert next_kl_coefficient(0.1, 6.6, 6.0, 10000, 1000) == pytest.approx(0.1 * (1 + 0.1 * 0.1))
    assert next_kl_coefficient(0.1, 0.0, 6.0, 10000, 1000) == pytest.approx(0.1 * (1 - 0.2 * 0.1))


# ---- cDPO and IPO ----------------------------------------------------------------------------------------------------


def test_cdpo_by_hand_and_its_gradient():
    # h_w = 1, h_l = -1, beta 0.5: s = 1; eps 0.2: 0.8 * 0.3132617 + 0.2 * 1.3132617
    chosen, rejected = leaf(-1.0), leaf(-4.0)
    result = cdpo(chosen, rejected, t(-2.0), t(-3.0), beta=0.5, label_smoothing=0.2)
    assert result.loss.item() == pytest.approx(0.8 * 0.3132617 + 0.2 * 1.3132617)
    result.loss.sum().backward()
    slope = 0.5 * (0.8 * -sigmoid(-1.0) + 0.2 * sigmoid(1.0))
    assert chosen.grad.item() == pytest.approx(slope) and rejected.grad.item() == pytest.approx(-slope)
    assert (result.chosen_reward.item(), result.rejected_reward.item()) == (0.5, -0.5)


def test_cdpo_without_smoothing_is_dpo_and_has_a_minimum_with_it():
    args = (t(-1.0, -2.0), t(-4.0, -1.0), t(-2.0, -2.5), t(-3.0, -1.0))
    assert torch.equal(cdpo(*args, beta=0.3, label_smoothing=0.0).loss, dpo(*args, beta=0.3).loss)
    margin = math.log(0.9 / 0.1) / 0.3  # sigmoid(beta * margin) = 1 - eps
    chosen = leaf(margin)
    cdpo(chosen, t(0.0), t(0.0), t(0.0), beta=0.3, label_smoothing=0.1).loss.sum().backward()
    assert chosen.grad.item() == pytest.approx(0.0, abs=1e-12)


def test_ipo_by_hand_and_its_gradient():
    # h_w = 1, h_l = -1, tau 0.5: (2 - 1)^2; d/dh_w = 2 (2 - 1)
    chosen, rejected = leaf(-1.0), leaf(-4.0)
    result = ipo(chosen, rejected, t(-2.0), t(-3.0), tau=0.5)
    assert result.loss.item() == pytest.approx(1.0)
    result.loss.sum().backward()
    assert (chosen.grad.item(), rejected.grad.item()) == (pytest.approx(2.0), pytest.approx(-2.0))
    assert (result.chosen_reward.item(), result.rejected_reward.item()) == (0.5, -0.5)
    assert ipo(t(0.0), t(0.0), t(0.0), t(0.0), tau=0.1).loss.item() == pytest.approx(25.0)  # 1 / (4 tau^2)


# ---- the policy gradient, and the trust region -----------------------------------------------------------------------


def test_leaving_one_out_by_hand():
    assert leave_one_out(t(1.0, 2.0, 6.0)[None])[0].tolist() == pytest.approx([-3.0, -1.5, 4.5])
    rewards = torch.randn(5, 4, dtype=torch.float64)
    assert leave_one_out(rewards).sum(-1).abs().max() < 1e-12
    assert torch.allclose(leave_one_out(rewards + 7.0), leave_one_out(rewards))


def test_the_policy_gradient_is_minus_advantage_times_the_score_function():
    logp = leaf(-1.0, -2.0)
    policy_gradient_loss(logp, t(3.0, -0.5)).sum().backward()
    assert logp.grad.tolist() == [-3.0, 0.5]


def test_the_surrogate_starts_at_the_advantage_with_the_policy_gradient():
    logp = leaf(-1.0, -2.0)
    value = surrogate(logp, logp.detach(), t(2.0, -1.0))
    assert value.tolist() == pytest.approx([2.0, -1.0])
    value.sum().backward()
    assert logp.grad.tolist() == pytest.approx([2.0, -1.0])
    assert surrogate(t(math.log(0.6)), t(math.log(0.3)), t(-1.0)).item() == pytest.approx(-2.0)


def test_kl_between_states_by_hand_and_its_curvature_is_the_fisher_matrix():
    old, new = t(0.5, 0.5).log()[None], t(0.25, 0.75).log()[None]
    assert kl_divergence(old, new).item() == pytest.approx(0.5 * math.log(2) + 0.5 * math.log(2 / 3))
    logits = torch.randn(4, dtype=torch.float64)
    p = logits.softmax(-1)
    hessian = torch.autograd.functional.hessian(
        lambda z: kl_divergence(logits.log_softmax(-1)[None], z.log_softmax(-1)[None]).sum(), logits
    )
    assert torch.allclose(hessian, torch.diag(p) - torch.outer(p, p), atol=1e-12)


def test_conjugate_gradient_solves():
    torch.manual_seed(0)
    half = torch.randn(6, 6, dtype=torch.float64)
    matrix, target = half @ half.T + torch.eye(6, dtype=torch.float64), torch.randn(6, dtype=torch.float64)
    solution = conjugate_gradient(lambda v: matrix @ v, target, 6)
    assert torch.allclose(matrix @ solution, target, atol=1e-8)
    rough = conjugate_gradient(lambda v: matrix @ v, target, 2)
    assert 1e-6 < (matrix @ rough - target).norm() < target.norm()
    assert conjugate_gradient(lambda v: matrix @ v, torch.zeros(6, dtype=torch.float64), 6).norm() == 0
