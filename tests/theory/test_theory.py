"""The mathematics that ties the methods together, through the production losses and loops, small enough for seconds."""

import numpy as np
import pytest
import torch

from rlhf_vs_dpo import config
from rlhf_vs_dpo.config import Tabular, Theory
from rlhf_vs_dpo.language.forward import scores
from rlhf_vs_dpo.language.states import states
from rlhf_vs_dpo.language.text import Prompts, Tokens
from rlhf_vs_dpo.theory import experiments, identities, laws, problems, show

SETTINGS = Theory(
    tabular=Tabular(prompts=2, outcomes=5),
    kl_coefficient=0.5,
    rl_iterations=80,
    episodes=256,
    pairs=4000,
    pair_steps=120,
    transformer_iterations=60,
    law_outcomes=300,
)


@pytest.fixture(scope="module")
def tabular():
    return problems.tabular(SETTINGS.tabular, 0)


@pytest.fixture(scope="module")
def transformer():
    return problems.transformer(3)


# ---- the problems are what they say --------------------------------------------------------------------------------------


def test_every_response_is_known_and_rewards_are_read_at_eos(tabular, transformer):
    for problem in (tabular, transformer):
        assert problem.ref.sum(-1) == pytest.approx([1.0, 1.0])
        assert problem.reward.shape == problem.ref.shape and problem.reward.std() > 0.3
    weight = tabular.scorer.head.weight[0, tabular.scorer.model.base_model.before :].detach()
    assert tabular.reward == pytest.approx(weight.reshape(2, 5).numpy(), abs=1e-6)


def test_a_sampled_response_of_the_table_is_an_outcome_and_eos(tabular):
    from rlhf_vs_dpo.language.generation import generate

    prompts = Prompts([tabular.prompts.ids[1]] * 4000, [f"n{i}" for i in range(4000)])
    drawn = generate(tabular.reference, prompts, [0] * 4000, tabular.max_new_tokens, 0)
    assert all(drawn.finished) and {len(t.response) for t in drawn.tokens} == {2}
    counts = np.bincount([tabular.responses.index(t.response) for t in drawn.tokens], minlength=5) / 4000
    assert laws.total_variation(counts, tabular.ref[1]) < 0.03


def test_an_incomplete_enumeration_is_refused(tabular):
    import dataclasses

    with pytest.raises(AssertionError, match="not complete"):
        dataclasses.replace(tabular, responses=tabular.responses[:-1])


# ---- who reaches the optimum ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["reinforce", "rloo", "trpo", "ppo"])
def test_reinforcement_learning_reaches_the_gibbs_policy(tabular, method):
    settings = experiments.rl_settings(method, SETTINGS.rl_iterations, SETTINGS.episodes, 0.5, 1.0)
    reached, curve = experiments.reinforcement(tabular, settings, 0)
    start = laws.total_variation(tabular.ref, tabular.optimum(0.5)).max()
    assert start > 0.2 and reached["total_variation"] < 0.03
    assert curve[0][1] == pytest.approx(float(laws.kl(tabular.ref, tabular.optimum(0.5)).max()), abs=1e-4)


def test_reinforce_without_a_baseline_reaches_it_too(tabular):
    settings = experiments.rl_settings("reinforce", 150, 512, 0.5, 1.0).model_copy(update={"baseline": False})
    assert experiments.reinforcement(tabular, settings, 0)[0]["total_variation"] < 0.05


def test_dpo_and_a_reward_model_reach_the_same_policy(tabular):
    pairs = experiments.population(tabular, SETTINGS.pairs, same=False, seed=0)
    shared = {"batch": 1024, "learning_rate": 0.15} | experiments.PASSES
    loss = config.Dpo(loss="dpo", beta=0.5, **shared)
    reached, _ = experiments.direct(tabular, loss, pairs, SETTINGS.pair_steps, tabular.optimum(0.5), 0)
    assert reached["total_variation"] < 0.02
    assert experiments.modelled(tabular, pairs, 0.5, SETTINGS.pair_steps, 1024, 0)["total_variation"] < 0.02
    elsewhere, _ = experiments.direct(tabular, loss, pairs, SETTINGS.pair_steps, tabular.optimum(1.0), 0)
    assert elsewhere["total_variation"] > 0.1  # beta matters


@pytest.mark.parametrize("recipe", ["chosen_sft", "control_tokens"])
def test_imitating_the_chosen_reaches_its_law_and_no_further(tabular, recipe):
    pairs = experiments.population(tabular, SETTINGS.pairs, same=True, seed=0)
    reached, _, policy = experiments.imitated(tabular, recipe, pairs, SETTINGS.pair_steps, 1024, 0)
    assert reached["total_variation"] < 0.01
    assert laws.kl(policy, tabular.ref).max() < np.log(2) - 0.5
    assert max(map(laws.win_rate, policy, tabular.ref, tabular.reward)) < 2 / 3


def test_the_control_token_controls(tabular):
    """Behind [BAD] the same training gives the law of the rejected response: 2 ref E[sigmoid(r' - r)]."""
    pairs = experiments.population(tabular, SETTINGS.pairs, same=True, seed=0)
    swapped = pairs.rename(columns={"chosen": "rejected", "rejected": "chosen"})
    good, _, _ = experiments.imitated(tabular, "control_tokens", swapped, SETTINGS.pair_steps, 1024, 0)
    assert good["total_variation"] > 0.1  # [GOOD] now stands before what was rejected


def test_ppo_and_dpo_reach_it_in_a_transformer(transformer):
    settings = experiments.rl_settings("ppo", SETTINGS.transformer_iterations, 256, 0.5, 0.04)
    reached, _ = experiments.reinforcement(transformer, settings, 0)
    assert reached["kl"] < 0.05
    pairs = experiments.population(transformer, 8000, same=False, seed=0)
    loss = config.Dpo(loss="dpo", beta=0.5, batch=1024, learning_rate=3e-3, **experiments.PASSES)
    assert experiments.direct(transformer, loss, pairs, 150, transformer.optimum(0.5), 0)[0]["kl"] < 0.08


def test_trpo_and_rloo_move_towards_it_in_a_transformer(transformer):
    start = float(laws.kl(transformer.ref, transformer.optimum(0.5)).max())
    for method in ("trpo", "rloo", "reinforce"):
        settings = experiments.rl_settings(method, 25, 256, 0.5, 0.04)
        assert experiments.reinforcement(transformer, settings, 0)[0]["kl"] < 0.5 * start, method


# ---- identities and bounds ----------------------------------------------------------------------------------------------------


def test_identities_hold():
    laws_hold, bounds = identities.selection(SETTINGS, 0)
    kl, biased = identities.kl_estimators(SETTINGS, 0)
    ipo, runaway = identities.two_outcomes()
    every = laws_hold | kl | ipo | identities.gibbs(SETTINGS, 0) | identities.gradients(SETTINGS, 0)
    assert len(every) > 20 and max(every.values()) < 1e-5, {k: v for k, v in every.items() if v >= 1e-5}
    assert all(entry["slack"] >= 0 for entry in bounds.values())
    assert min(abs(v) for v in biased.values()) > 0.05  # what is biased is not by chance right
    slopes = list(runaway.values())
    assert all(s < 0 for s in slopes) and slopes == sorted(slopes)  # DPO at p = 1 pushes on, ever more gently


def test_laws_by_hand():
    ref, reward = np.array([0.5, 0.3, 0.2]), np.array([0.0, 1.0, 2.0])
    assert laws.best_of_n_law(ref, reward, 2) == pytest.approx([0.25, 0.64 - 0.25, 1 - 0.64])
    tied = np.array([0.0, 1.0, 1.0])  # the best level has 0.5, and (1 - 0.25) falls to its members 3 : 2
    assert laws.best_of_n_law(ref, tied, 2) == pytest.approx([0.25, 0.45, 0.30])
    assert laws.win_rate(ref, ref, reward) == pytest.approx(0.5)
    assert laws.chosen_law(ref, reward).sum() == pytest.approx(1.0)
    assert laws.threshold_law(ref, reward, 0.5) == pytest.approx([0.0, 0.6, 0.4])
    best, log_z = laws.gibbs(ref, reward, 0.5)
    assert best == pytest.approx(ref * np.exp(2 * reward) / np.exp(log_z))
    assert laws.kl(laws.gibbs_at_kl(ref, reward, 0.2), ref) == pytest.approx(0.2)
    assert laws.ipo_two_outcomes(0.5, 0.3) == 0.5


def test_the_population_has_the_proportions_of_the_law(tabular):
    pairs = experiments.population(tabular, 20000, same=True, seed=1)
    for prompt in range(2):
        mine = pairs[pairs["prompt"] == prompt]
        share = np.bincount(mine["chosen"], minlength=5) / len(mine)
        assert laws.total_variation(share, laws.chosen_law(tabular.ref[prompt], tabular.reward[prompt])) < 0.002


def test_ipo_trains_to_its_closed_form():
    """Two outcomes, uniform reference, every preference the same way: DPO's margin grows with training, IPO's is 1/(2 tau)."""
    problem = problems.tabular(Tabular(prompts=1, outcomes=2), 0)
    with torch.no_grad():
        problem.reference.model.outcomes.weight.zero_()
    problem.__post_init__()
    pairs = experiments.population(problem, 64, same=False, seed=0).assign(prompt=0, chosen=0, rejected=1)
    shared = {"batch": 64} | experiments.PASSES
    optimum = np.array([[laws.ipo_two_outcomes(1.0, 0.5), 1 - laws.ipo_two_outcomes(1.0, 0.5)]])
    ipo = config.Ipo(loss="ipo", tau=0.5, learning_rate=0.1, **shared)
    assert experiments.direct(problem, ipo, pairs, 150, optimum, 0)[0]["total_variation"] < 1e-3
    grown = []
    for steps in (50, 200):
        dpo = config.Dpo(loss="dpo", beta=0.5, learning_rate=0.1, **(shared | {"schedule": "constant"}))
        reached, _ = experiments.direct(problem, dpo, pairs, steps, np.array([[1.0, 1e-12]]), 0)
        grown.append(reached["total_variation"])
    assert grown[1] < 0.1 * grown[0]  # towards certainty, without end
    cdpo = config.Cdpo(loss="cdpo", beta=0.5, label_smoothing=0.2, learning_rate=0.1, **shared)
    z = np.log(0.8 / 0.2) / 0.5  # sigmoid(beta z) = 1 - eps
    wanted = np.array([[1 / (1 + np.exp(-z)), 1 / (1 + np.exp(z))]])
    assert experiments.direct(problem, cdpo, pairs, 200, wanted, 0)[0]["total_variation"] < 1e-3


@pytest.mark.parametrize("share", [1.0, 0.5])
def test_a_dense_fisher_matrix_gives_the_trust_region_step(tabular, share):
    """TRPO's step on the table: conjugate gradient against the Fisher matrix, of a share of the episodes, written out and inverted."""
    from rlhf_vs_dpo.losses.trpo import kl_divergence
    from rlhf_vs_dpo.training import attempts, policy_gradient, rollouts
    from rlhf_vs_dpo.training.learner import Networks

    settings = experiments.rl_settings("trpo", 4, 64, 0.5, 1.0).model_copy(
        update={"damping": 1e-3, "backtracks": 0, "fisher_share": share}
    )
    policy = tabular.start()
    learner = policy_gradient.new_learner(
        Networks(policy, tabular.reference, tabular.scorer), [], settings, tabular.max_new_tokens, 0
    )
    prompts, places = Prompts(tabular.prompts.ids * 32, [f"e{i}" for i in range(64)]), list(range(64))
    episodes, _ = rollouts.rollout(learner, prompts, places, 0.5, (0, 0))
    episodes, _ = rollouts.generalised_advantages(learner, episodes)
    batch = attempts._micro(learner, episodes, places, learner.memory.tokens)[0]
    weight = policy.model.outcomes.weight
    before = weight.detach().clone()

    def of(flat, what):
        out = torch.func.functional_call(policy, {"model.outcomes.weight": flat.view_as(before)}, (batch.batch,))
        return what(out)

    flat = before.flatten()
    old = policy.distributions(batch.batch).detach()

    def kl(values):
        weight.data.copy_(values.view_as(before))
        return kl_divergence(old, policy.distributions(batch.batch)).mean().item()

    advantages = batch.of(episodes.advantages)
    old_logp = batch.of(episodes.logp)
    gain = lambda out: ((out.logp[batch.batch.response_mask] - old_logp).exp() * advantages).mean()  # noqa: E731
    g = torch.autograd.functional.jacobian(lambda f: of(f, gain), flat)
    # Fisher: mean over states of the covariance of grad log pi, which for a softmax is diag(p) - p p' at its state
    fisher = torch.zeros(len(flat), len(flat))
    first = tabular.tokenizer.convert_tokens_to_ids("y0")
    few = attempts._micro(learner, episodes, places[: int(64 * share)], learner.memory.tokens)[0].batch
    hidden, said = states(policy.model, few, few.response_mask.roll(-1, 1)), policy.distributions(few).detach()
    for state, logp in zip(hidden, said, strict=True):
        row = int(state.argmax())
        if row < before.shape[0]:
            p = logp.exp()[first:]
            block = slice(row * 5, row * 5 + 5)
            fisher[block, block] += (torch.diag(p) - torch.outer(p, p)) / len(said)
    direction = torch.linalg.solve(fisher + 1e-3 * torch.eye(len(flat)), g)
    curvature = direction @ (fisher + 1e-3 * torch.eye(len(flat))) @ direction
    expected = (2 * settings.max_kl / curvature).sqrt() * direction
    weight.data.copy_(before)
    for halvings in range(12):
        learner.settings = settings.model_copy(update={"backtracks": halvings})
        measured = attempts._trust_region(learner, episodes)
        if not measured["rejected"]:
            break
    moved = (weight.detach() - before).flatten()
    assert torch.allclose(moved, expected * 0.5**halvings, atol=2e-3 * float(expected.abs().max()))
    assert measured["kl_old_new"] == pytest.approx(kl(weight.detach().clone().flatten()), abs=1e-6)
    assert measured["kl_old_new"] <= settings.max_kl and measured["surrogate_gain"] > 0
    assert measured["surrogate_gain_expected"] == pytest.approx(float(g @ expected), rel=1e-2)


def test_a_step_that_no_backtracking_saves_is_taken_back(tabular, monkeypatch):
    from rlhf_vs_dpo.training import attempts, policy_gradient, rollouts
    from rlhf_vs_dpo.training.learner import Networks

    settings = experiments.rl_settings("trpo", 4, 32, 0.5, 1.0)
    networks = Networks(tabular.start(), tabular.reference, tabular.scorer)
    learner = policy_gradient.new_learner(networks, [], settings, tabular.max_new_tokens, 0)
    prompts = Prompts([tabular.prompts.ids[0]] * 32, ["e"] * 32)
    episodes, _ = rollouts.rollout(learner, prompts, list(range(32)), 0.5, (0, 0))
    episodes, _ = rollouts.generalised_advantages(learner, episodes)
    weight = networks.policy.model.outcomes.weight
    before = weight.detach().clone()
    whole = attempts.surrogate
    monkeypatch.setattr(  # every step that is tried seems to lose
        attempts, "surrogate", lambda *args: whole(*args) if torch.is_grad_enabled() else whole(*args) - 1.0
    )
    measured = attempts._trust_region(learner, episodes)
    assert measured["rejected"] == 1.0 and measured["backtracks"] == settings.backtracks
    assert torch.equal(weight, before) and measured["kl_old_new"] == 0.0
    none = episodes._replace(advantages=torch.zeros_like(episodes.advantages))  # nothing to gain: no direction at all
    assert attempts._trust_region(learner, none)["rejected"] == 1.0
    assert torch.equal(weight, before)


def test_the_table_scores_what_it_was_given(tabular):
    example = Tokens(tabular.prompts.ids[0], tabular.responses[2])
    assert scores(tabular.scorer, [example])[0] == pytest.approx(tabular.reward[0, 2])


def test_the_table_of_the_docs_and_the_figure(tmp_path):
    entry = {"total_variation": 0.01, "kl": 0.001}
    theory = {
        "tabular": {"ppo": entry},
        "transformer": {"dpo": entry},
        "identities": {"a = b": 1e-9},
        "bounds": {"x": {"value": 0.1, "bound": 0.2, "slack": 0.1}},
    }
    assert "| transformer | dpo | ref exp(r/β)/Z | 0.0100 | 0.0010 |" in show.table(theory)
    rows = [
        {"problem": p, "method": "ppo", "step": s, "share": s, "kl_to_optimum": 0.1}
        for p in ("tabular", "transformer")
        for s in (0, 1)
    ]
    show.draw(rows, tmp_path / "deep" / "x.png")
    assert (tmp_path / "deep" / "x.png").stat().st_size > 1000


def test_the_page_says_what_was_measured():
    """docs/from-rlhf-to-dpo.md against metrics/theory.json, and the targets of the stage at its default settings."""
    import json

    from conftest import ROOT

    page = (ROOT / "docs" / "from-rlhf-to-dpo.md").read_text()
    theory = json.loads((ROOT / "metrics" / "theory.json").read_text())
    assert show.table(theory) in page, "python -m rlhf_vs_dpo.theory.show metrics/theory.json prints the table"
    for name, number in show.facts(theory).items():
        assert number in page, f"{name}: {number}"
    for method in ("dpo", "reinforce", "rloo", "trpo", "ppo"):
        assert theory["tabular"][method]["total_variation"] <= 0.02, method
    assert max(theory["transformer"][m]["kl"] for m in ("ppo", "dpo")) <= 0.02
    assert max(theory["identities"].values()) <= 1e-5 and min(b["slack"] for b in theory["bounds"].values()) >= 0
