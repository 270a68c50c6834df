"""Inside the loops: every quantity of a rollout and of an update against brute force, so that wiring cannot be wrong."""

import copy
import math
from itertools import pairwise

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import small_model
from test_training import halves, rl_settings, run_ppo, scorer, variant, weights

from rlhf_vs_dpo import config
from rlhf_vs_dpo.config import Monitor
from rlhf_vs_dpo.language.forward import log_likelihoods, scores
from rlhf_vs_dpo.language.logprobs import Policy
from rlhf_vs_dpo.language.text import Prompts, Tokens, collate
from rlhf_vs_dpo.losses.dpo import cdpo, dpo, ln_dpo
from rlhf_vs_dpo.losses.ipo import ipo
from rlhf_vs_dpo.losses.simpo import simpo
from rlhf_vs_dpo.run.progress import Record
from rlhf_vs_dpo.training import attempts, forgetting, monitor, preference, rollouts, supervised
from rlhf_vs_dpo.training import reward as reward_training
from rlhf_vs_dpo.training import watched as watching
from rlhf_vs_dpo.training.learner import Learner, Networks
from rlhf_vs_dpo.training.optimise import Memory, Optimiser, accelerator

SETTINGS = rl_settings(
    episodes=12, epochs=1, gae_discount=0.9, gae_lambda=0.6, unfinished_reward=-7.0, kl_coefficient=0.3, clip=0.1, value_clip=0.05
)  # fmt: skip


def token_logp(model, tokens: Tokens, temperature: float) -> list[float]:
    ids = torch.tensor([[*tokens.prompt, *tokens.response]])
    with torch.no_grad():
        logp = (model(ids).logits[0].double() / temperature).log_softmax(-1)
    start = len(tokens.prompt)
    return [logp[i - 1, ids[0, i]].item() for i in range(start, ids.shape[1])]


def token_entropies(model, tokens: Tokens, temperature: float) -> list[float]:
    with torch.no_grad():
        logp = (model(torch.tensor([[*tokens.prompt, *tokens.response]])).logits[0] / temperature).log_softmax(-1)
    return (-(logp.exp() * logp).sum(-1)[len(tokens.prompt) - 1 : -1]).tolist()


def values_before(value, tokens: Tokens) -> list[float]:
    with torch.no_grad():
        batch = collate([tokens], 3)
        place = torch.arange(len(tokens))[None]
        where = (place >= len(tokens.prompt) - 1) & (place < len(tokens) - 1)
        return value(batch, where).tolist()


@pytest.fixture
def world(tokenizer):
    """A policy that has moved away from its reference, a reward model, a value network that is another one."""
    reference = Policy(small_model(tokenizer, seed=0, scale=2.0), 0.8)
    policy = Policy(small_model(tokenizer, seed=5, scale=2.0), 0.8)
    return Networks(policy, reference, scorer(tokenizer, seed=1)), scorer(tokenizer, seed=2)


def roll(taught, tokenizer):
    prompts = Prompts([[tokenizer.bos_token_id, 5 + i % 3] for i in range(12)], [f"p{i}" for i in range(12)])
    episodes, metrics = rollouts.rollout(taught, prompts, list(range(12)), 0.3, (0, 0))
    episodes, explained = rollouts.generalised_advantages(taught, episodes)
    return episodes, metrics | explained


def test_a_rollout_against_brute_force(world, tokenizer):
    (policy, reference, reward), value = world
    episodes, metrics = roll(learner(*world), tokenizer)
    assert 0 < episodes.finished.sum() < 12  # both kinds occur
    advantages, returns, kls, everything = [], [], [], []
    for i, tokens in enumerate(episodes.tokens):
        place = slice(int(episodes.offsets[i]), int(episodes.offsets[i + 1]))
        logp, ref = token_logp(policy.model, tokens, 0.8), token_logp(reference.model, tokens, 0.8)
        state_values = values_before(value, tokens)
        assert episodes.logp[place].tolist() == pytest.approx(logp, abs=1e-4)
        assert episodes.ref_logp[place].tolist() == pytest.approx(ref, abs=1e-4)
        assert episodes.values[place].tolist() == pytest.approx(state_values, abs=1e-5)
        ended = tokens.response[-1] == tokenizer.eos_token_id
        score = scores(reward, [tokens])[0] if ended else -7.0
        assert episodes.score[i].item() == pytest.approx(score, abs=1e-5)
        rewards = [-0.3 * (a - b) for a, b in zip(logp, ref, strict=True)]
        rewards[-1] += score
        later, mine = 0.0, []
        for t in reversed(range(len(rewards))):
            following = state_values[t + 1] if t + 1 < len(rewards) else 0.0
            later = rewards[t] + 0.9 * following - state_values[t] + 0.9 * 0.6 * later
            mine.insert(0, later)
        advantages += mine
        returns += [a + v for a, v in zip(mine, state_values, strict=True)]
        kls.append(sum(logp) - sum(ref))
        everything.append(sum(rewards))
    white = (np.array(advantages) - np.mean(advantages)) / np.std(advantages)
    assert episodes.advantages.tolist() == pytest.approx(white.tolist(), abs=1e-3)
    assert episodes.returns.tolist() == pytest.approx(returns, abs=1e-3)
    assert metrics["kl"] == pytest.approx(np.mean(kls), abs=1e-3)
    assert metrics["objective"] == pytest.approx(np.mean(everything), abs=1e-3)
    assert metrics["explained_variance"] == pytest.approx(1 - np.var(advantages) / np.var(returns), abs=1e-3)
    assert metrics["finished"] == pytest.approx(episodes.finished.float().mean().item())
    assert metrics["score"] == pytest.approx(episodes.score.mean().item(), abs=1e-5)
    lengths = [len(tokens.response) for tokens in episodes.tokens]
    assert metrics["tokens"] == pytest.approx(np.mean(lengths)) and metrics["tokens_generated"] == sum(lengths)
    # Policy, reference, reward model and value network each read prompt and response; before that each prompt is read to answer it.
    assert metrics["tokens_read"] == 4 * sum(map(len, episodes.tokens)) + 3 * 2
    entropies = [x for tokens in episodes.tokens for x in token_entropies(policy.model, tokens, 0.8)]
    assert metrics["entropy"] == pytest.approx(np.mean(entropies), abs=1e-4)  # per token


def optimiser(module, **changes):
    given = {
        "learning_rate": 1e-3,
        "adam_epsilon": 1e-5,
        "batch": 1,
        "max_grad_norm": 1e9,
        "weight_decay": 0.0,
        "schedule": "constant",
        "warmup": 0.0,
        "steps": 4,
    }
    return Optimiser(accelerator(), module, config.Training(**(given | changes)))


def learner(networks, value=None, settings=SETTINGS, corpus=()):
    """Optimisers of both, random streams, four tokens a response, a small budget."""
    return Learner(
        networks, accelerator(), settings, 4, optimiser(networks.policy), value and optimiser(value), corpus, Memory(64, accelerator()),
        np.random.default_rng(0), np.random.default_rng(1),
    )  # fmt: skip


def test_an_update_against_brute_force(world, tokenizer):
    """Losses of the first step, with old log-probabilities and values moved so that both clips bind somewhere."""
    (policy, _, _), value = world
    taught = learner(*world)
    episodes, _ = roll(taught, tokenizer)
    torch.manual_seed(0)
    episodes = episodes._replace(
        logp=episodes.logp + 0.2 * torch.randn_like(episodes.logp),
        values=episodes.values + 0.2 * torch.randn_like(episodes.values),
    )
    logp = torch.tensor([x for tokens in episodes.tokens for x in token_logp(policy.model, tokens, 0.8)])
    new = torch.tensor([x for tokens in episodes.tokens for x in values_before(value, tokens)])
    ratio, a, old, g = (logp - episodes.logp).exp(), episodes.advantages, episodes.values, episodes.returns
    policy_loss = -torch.minimum(ratio * a, ratio.clamp(0.9, 1.1) * a).mean()
    clipped = old + (new - old).clamp(-0.05, 0.05)
    value_loss = 0.5 * torch.maximum((new - g) ** 2, (clipped - g) ** 2).mean()
    outside = ((ratio - 1).abs() > 0.1).float().mean()
    measured = attempts.clipped_steps(taught, episodes)
    assert taught.trained == 2 * sum(map(len, episodes.tokens))  # once for the policy, once for the value network
    assert 0.1 < outside < 0.9
    assert measured["policy_loss"] == pytest.approx(policy_loss.item(), abs=1e-4)
    assert measured["value_loss"] == pytest.approx(value_loss.item(), rel=1e-4)
    assert measured["clip_fraction"] == pytest.approx(outside.item(), abs=1e-5)
    assert measured["ratio_mean"] == pytest.approx(ratio.mean().item(), abs=1e-4)
    assert measured["ratio_std"] == pytest.approx(ratio.std(correction=0).item(), abs=1e-3)
    assert measured["kl_old_new"] == pytest.approx((ratio - 1 - ratio.log()).mean().item(), abs=1e-4)


def test_a_value_warm_up_leaves_the_policy_alone(tokenizer):
    rows = []
    settings = rl_settings(iterations=3, value_warmup=1, epochs=1, minibatches=1, schedule="linear", learning_rate=1e-5)
    run_ppo(tokenizer, settings, log=lambda m, s: rows.append(m))
    assert "update/policy_loss" not in rows[0] and "update/value_loss" in rows[0]
    assert rows[1]["rollout/kl"] == pytest.approx(0.0, abs=1e-5)  # the second rollout is still of the reference
    assert "update/policy_loss" in rows[1]
    # The policy's schedule begins when it does, and ends with the run.
    assert [row["update/learning_rate"] for row in rows[1:]] == pytest.approx([1e-5, 0.5e-5])


def gradients(module) -> torch.Tensor:
    return torch.cat([p.grad.flatten().clone() for p in module.parameters()])


def test_ptx_adds_gamma_times_the_mean_token_gradient(tokenizer, examples):
    policy = Policy(
        small_model(tokenizer, scale=2.0), 0.7
    )  # is sampled at 0.7, and likelihood is still the model's own
    networks = Networks(policy, policy, scorer(tokenizer))
    taught = learner(networks, None, rl_settings(ptx_coefficient=0.7, ptx_batch=12), examples)
    policy(collate(examples[:3], 3)).sums().sum().backward()
    before = gradients(policy)
    measured = attempts.accumulate_ptx(taught, attempts.draw_documents(taught), taught.memory.tokens)
    added = gradients(policy) - before
    picked = np.random.default_rng(1).choice(12, size=12, replace=False)
    chosen = [examples[i] for i in picked]
    assert taught.trained == sum(map(len, chosen))
    policy.zero_grad()
    mean = -Policy(policy.model, 1.0)(collate(chosen, 3)).sums().sum() / sum(len(e.response) for e in chosen)
    mean.backward()
    expected = 0.7 * gradients(policy)
    assert torch.allclose(added, expected, atol=1e-4)
    assert measured["ptx_loss"] == pytest.approx(mean.item(), rel=1e-5)
    assert measured["ptx_gradient_share"] == pytest.approx(
        (expected.norm() / (expected.norm() + before.norm())).item(), rel=1e-3
    )


# ---- the optimiser ---------------------------------------------------------------------------------------------------


def test_the_schedule_and_the_clip_reach_the_optimiser(tokenizer, examples):
    policy = Policy(small_model(tokenizer), 1.0)
    taught = optimiser(
        policy, schedule="linear", learning_rate=0.4, max_grad_norm=0.25, weight_decay=0.3, adam_epsilon=1e-4
    )
    (group,) = taught.adamw.param_groups
    assert (group["weight_decay"], group["eps"]) == (0.3, 1e-4)
    seen = []
    taught.adamw.optimizer.register_step_pre_hook(
        lambda *_: seen.append((taught.adamw.param_groups[0]["lr"], gradients(policy).norm().item()))
    )
    for _ in range(4):
        loss = taught.accumulate(
            [[0, 1], [2]], lambda group: -taught.module(collate([examples[i] for i in group], 3)).sums().sum(), 3
        )
        assert taught.step(loss, ["x"]) > 0.25  # the norm before clipping is what is reported
    assert [rate for rate, _ in seen] == pytest.approx([0.4, 0.3, 0.2, 0.1])
    assert all(norm == pytest.approx(0.25, rel=1e-3) for _, norm in seen)


# ---- preference losses, as the loop calls them -----------------------------------------------------------------------


@pytest.mark.parametrize("name", ["dpo", "cdpo", "ipo", "ln_dpo", "simpo"])
def test_the_loop_hands_each_loss_what_it_needs(tokenizer, examples, name, monkeypatch):
    """Loss and metrics of the first step, recomputed from brute-force log-probabilities; all lengths differ."""
    settings = variant(name, batch=6, learning_rate=1e-12)
    monkeypatch.setattr(preference, "check_reference", lambda *_: None)  # a reference that is not the start, on purpose
    policy = Policy(small_model(tokenizer, scale=1.0), 1.0)
    logp = torch.tensor([sum(token_logp(policy.model, tokens, 1.0)) for tokens in examples])
    lengths = torch.tensor([float(len(tokens.response)) for tokens in examples])
    reference = pd.DataFrame(
        {"chosen_logp": logp[:6].numpy() - 0.0, "rejected_logp": logp[6:].numpy() - np.linspace(0, 3, 6)}
    )
    ref = torch.tensor(reference.to_numpy()).float()
    sides = (logp[:6], logp[6:])
    expected = {
        "dpo": lambda: dpo(*sides, ref[:, 0], ref[:, 1], settings.beta),
        "cdpo": lambda: cdpo(*sides, ref[:, 0], ref[:, 1], settings.beta, settings.label_smoothing),
        "ipo": lambda: ipo(*sides, ref[:, 0], ref[:, 1], settings.tau),
        "ln_dpo": lambda: ln_dpo(*sides, ref[:, 0], ref[:, 1], lengths[:6], lengths[6:], settings.beta),
        "simpo": lambda: simpo(*sides, lengths[:6], lengths[6:], settings.beta, settings.gamma),
    }[name]()
    rows = []
    known = None if name == "simpo" else reference
    preference.train(policy, halves(examples), known, settings, 1, 0, Record(lambda m, s: rows.append(m), "x"))
    assert rows[0]["loss"] == pytest.approx(expected.loss.mean().item(), abs=1e-4)
    assert rows[0]["pairs/margin"] == pytest.approx(
        (expected.chosen_reward - expected.rejected_reward).mean().item(), abs=1e-4
    )
    assert rows[0]["pairs/accuracy"] == pytest.approx(
        (expected.chosen_reward > expected.rejected_reward).float().mean().item(), abs=0.2
    )
    assert rows[0]["pairs/chosen_logp"] == pytest.approx(logp[:6].mean().item(), abs=1e-3)
    assert rows[0]["pairs/rejected_tokens"] == pytest.approx(lengths[6:].mean().item())


def test_training_moves_towards_the_chosen(tokenizer, examples):
    from test_training import stored

    policy = Policy(small_model(tokenizer, scale=1.0), 1.0)
    before = log_likelihoods(policy, examples)
    settings = variant("dpo", batch=6, epochs=20.0, learning_rate=1e-3)
    steps, reference = supervised.steps_over(settings, 6), stored(tokenizer, examples)
    preference.train(policy, halves(examples), reference, settings, steps, 0, Record(lambda m, s: None, "x"))
    moved = np.array(log_likelihoods(policy, examples)) - np.array(before)
    assert moved[:6].mean() > moved[6:].mean() + 1


# ---- what is watched, what is forgotten, what is calibrated ----------------------------------------------------------


def test_the_watch_measures_kl_and_what_ended_is_scored(tokenizer):
    policy, reference = (Policy(small_model(tokenizer, seed=seed, scale=2.0), 2.0) for seed in (5, 0))
    prompts = pd.DataFrame(
        {
            "prompt_id": [f"p{i}" for i in range(12)],
            "prompt": [["a", "dog", "cat"][i % 3] for i in range(12)],
            "facts": None,
        }
    )
    watched = monitor.HeldOut(prompts, None, reference, tokenizer, Monitor(points=3, prompts=12), 9, 0, 10)
    logged = {}
    for step in range(11):
        watched.watch(policy, step, lambda m, s: logged.update({s: m}))
    assert sorted(logged) == [0, 5, 10]
    table = watched.table()
    rows = table[table["step"] == 5]
    examples = [Tokens(p, r) for p, r in zip(rows["prompt_ids"], rows["response_ids"], strict=True)]
    kl = np.mean([sum(token_logp(policy.model, t, 2.0)) - sum(token_logp(reference.model, t, 2.0)) for t in examples])
    assert logged[5]["heldout/kl"] == pytest.approx(kl, abs=1e-3) and kl > 0.1
    reward = scorer(tokenizer)
    judged = watching.scored(table, reward, config.section(config.read_params(), "preferences"))
    judged = judged[judged["step"] == 5]
    ended = [t for t in examples if t.response[-1] == tokenizer.eos_token_id]
    assert 0 < len(ended) < 12
    assert judged["reward"].dropna().tolist() == pytest.approx(list(scores(reward, ended)), abs=1e-5)
    assert judged["reward"].notna().tolist() == judged["finished"].tolist() and judged["finished"].sum() == len(ended)
    assert logged[5]["heldout/finished"] == pytest.approx(len(ended) / 12)


def test_retention_asks_for_greedy_answers(tokenizer):
    """A fact is recalled exactly where the argmax after its question is its answer, token by token."""
    model = small_model(tokenizer, scale=3.0)
    questions = ["the cat", "a dog ran", "the mat and"]
    greedy = []
    for question in questions:
        ids = [tokenizer.bos_token_id, *tokenizer(question, add_special_tokens=False)["input_ids"]]
        for _ in range(2):
            with torch.no_grad():
                ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
        greedy.append(ids[-2:])
    wrong = [greedy[2][0], 4 if greedy[2][1] != 4 else 5]
    answers = [tokenizer.decode(greedy[0]), tokenizer.decode(greedy[1]), tokenizer.decode(wrong)]
    facts = pd.DataFrame({"fact_id": list("abc"), "prompt": questions, "answer": answers})
    corpus = pd.DataFrame({"doc_id": ["d"], "text": ["the cat sat on the mat ."]})
    table = forgetting.retention(model, tokenizer, corpus, facts)
    assert table.loc[table["kind"] == "fact", "correct"].tolist() == [1.0, 1.0, 0.0]
    tokens = Tokens([tokenizer.bos_token_id], [*tokenizer(corpus["text"][0])["input_ids"], tokenizer.eos_token_id])
    row = table[table["kind"] == "corpus"].iloc[0]
    assert row["logp"] == pytest.approx(sum(token_logp(model, tokens, 1.0)), abs=1e-3) and row["tokens"] == len(
        tokens.response
    )


def test_calibration_by_hand():
    # margin 3 twice, right once: predicted 0.9526 against observed 0.5; margin -0.1: predicted 0.525, observed 0
    frame = pd.DataFrame({"chosen_reward": [3.0, 0.0, 0.0], "rejected_reward": [0.0, 3.0, 0.1]})
    frame = frame.assign(chosen_tokens=5, rejected_tokens=6, chosen_gold=np.nan, rejected_gold=np.nan)
    quality = reward_training.quality(frame)
    high, low = 1 / (1 + math.exp(-3)), 1 / (1 + math.exp(-0.1))
    assert quality["calibration_error"] == pytest.approx((high - 0.5) * 2 / 3 + low * 1 / 3)
    assert quality["calibration"]["0.95"] == {"pairs": 2, "predicted": pytest.approx(high), "observed": 0.5}
    assert quality["calibration"]["0.50"]["observed"] == 0.0 and "accuracy_against_gold" not in quality


def test_calibration_is_of_the_head_whatever_its_scale():
    """sigmoid(head - head') is what Bradley-Terry trained, not the sigmoid of rewards brought to unit spread."""
    head = pd.DataFrame({"chosen_reward": [3.0, 0.0, 0.5], "rejected_reward": [0.0, 3.0, 0.1]})
    head = head.assign(chosen_tokens=[5, 7, 8], rejected_tokens=[6, 4, 9], chosen_gold=np.nan, rejected_gold=np.nan)
    scaled = head.assign(chosen_reward=head["chosen_reward"] / 4, rejected_reward=head["rejected_reward"] / 4)
    raw, found = reward_training.quality(head), reward_training.quality(scaled, 4.0)
    for key in ("calibration", "calibration_error", "log_loss", "accuracy"):
        assert found[key] == raw[key]
    assert found["mean_by_length"] != raw["mean_by_length"]  # that is of the rewards


def test_the_reference_is_a_constant(tokenizer):
    """Training moves the policy alone: reference and reward model come out bit for bit as they went in."""
    model = small_model(tokenizer, scale=2.0)
    reference, reward = copy.deepcopy(model), scorer(tokenizer)
    before = weights(reference), weights(reward)
    run_ppo(tokenizer, rl_settings(), model=model, reference=reference, reward=reward)
    assert torch.equal(weights(reference), before[0]) and torch.equal(weights(reward), before[1])


# ---- the policy gradient ---------------------------------------------------------------------------------------------


def raw_roll(taught, tokenizer):
    ids = [[tokenizer.bos_token_id, 5 + (i // 3) % 3] for i in range(12)]  # three answers to each prompt
    prompts = Prompts(ids, [f"p{i // 3}" for i in range(12)])
    return rollouts.rollout(taught, prompts, list(range(12)), beta=0.3, key=(0, 0))


def expected_totals(networks, episodes):
    policy, reference, _ = networks
    totals = []
    for i, tokens in enumerate(episodes.tokens):
        gap = sum(token_logp(policy.model, tokens, 0.8)) - sum(token_logp(reference.model, tokens, 0.8))
        totals.append(episodes.score[i].item() - 0.3 * gap)
    return np.array(totals)


@pytest.mark.parametrize("method, group", [("reinforce_plain", 1), ("rloo", 3), ("reinforce", 12)])
def test_a_policy_gradient_step_against_brute_force(world, tokenizer, method, group):
    changes = {"episodes": 12, "kl_coefficient": 0.3, "unfinished_reward": -7.0}
    settings = rl_settings(method, **changes)
    if method == "rloo":
        settings = settings.model_copy(update={"samples_per_prompt": 3})
    networks, _ = world
    taught = learner(networks, None, settings)
    episodes, metrics = raw_roll(taught, tokenizer)
    assert "explained_variance" not in metrics and len(episodes.values) == 0
    totals = expected_totals(networks, episodes)
    assert episodes.totals().tolist() == pytest.approx(totals.tolist(), abs=1e-3)
    assert metrics["objective"] == pytest.approx(totals.mean(), abs=1e-3)
    wanted = []
    for i in range(12):
        others = [totals[j] for j in range(12) if j // group == i // group and j != i]
        wanted.append(totals[i] - (np.mean(others) if others else 0.0))
    episodes, _ = attempts.ATTEMPTS[settings.algorithm].advantages(taught, episodes)
    lengths = [len(t.response) for t in episodes.tokens]
    assert episodes.advantages.tolist() == pytest.approx(np.repeat(wanted, lengths).tolist(), abs=1e-3)
    seen = []
    taught.actor.adamw.optimizer.register_step_pre_hook(lambda *_: seen.append(gradients(networks.policy)))
    measured = attempts.policy_gradient_step(taught, episodes)
    assert taught.trained == sum(map(len, episodes.tokens)) and taught.read == 0
    reference_model = small_model(tokenizer, seed=5, scale=2.0)
    loss = 0.0
    for advantage, tokens in zip(wanted, episodes.tokens, strict=True):
        ids = torch.tensor([[*tokens.prompt, *tokens.response]])
        logp = (reference_model(ids).logits[0] / 0.8).log_softmax(-1)
        start = len(tokens.prompt)
        loss = loss - advantage * sum(logp[t - 1, ids[0, t]] for t in range(start, ids.shape[1])) / 12
    loss.backward()
    assert measured["policy_loss"] == pytest.approx(loss.item(), rel=1e-3)
    assert torch.allclose(seen[0], gradients(reference_model), atol=2e-3)


def test_the_passes_of_trpo_are_counted(world, tokenizer):
    """The gradient; a product for each step of the conjugate gradient and one more, on the episodes of the Fisher matrix; the value
    network's steps. Only read: the old and the new policy, at each try of the line search."""
    networks, value = world
    settings = rl_settings("trpo", episodes=12, epochs=2).model_copy(
        update={"cg_steps": 3, "fisher_share": 0.25, "minibatches": 1}
    )
    taught = learner(networks, value, settings)
    episodes, metrics = raw_roll(taught, tokenizer)
    assert metrics["tokens_read"] == 4 * sum(map(len, episodes.tokens)) + 3 * 2
    episodes, _ = rollouts.generalised_advantages(taught, episodes)
    measured = attempts.trust_region_step(taught, episodes)
    whole, few = (sum(map(len, episodes.tokens[:count])) for count in (12, 3))
    assert taught.trained == whole + (3 + 1) * few + 2 * whole
    assert taught.read == 2 * whole * (measured["backtracks"] + 1)


@pytest.mark.parametrize("together", [1, 4])
def test_answers_of_a_group_are_to_one_prompt(tokenizer, together, monkeypatch):
    """RLOO's baseline is of the other answers to the same prompt; and every prompt is asked as often as any other."""
    from rlhf_vs_dpo.training import policy_gradient

    asked, rollout = [], policy_gradient.rollout

    def spied(learner, prompts, places, *rest):
        assert places == list(range(16))
        asked.append(prompts.names)
        return rollout(learner, prompts, places, *rest)

    monkeypatch.setattr(policy_gradient, "rollout", spied)
    model = small_model(tokenizer, scale=2.0)
    networks = Networks(Policy(model, 1.0), Policy(copy.deepcopy(model), 1.0), scorer(tokenizer))
    prompts = Prompts([[tokenizer.bos_token_id, 4 + i] for i in range(6)], [f"p{i}" for i in range(6)])
    settings = rl_settings("rloo", iterations=3, episodes=16).model_copy(update={"samples_per_prompt": together})
    policy_gradient.train(networks, prompts, [], settings, 2, 0, Record(lambda m, s: None, "x"))
    groups = [names[i : i + together] for names in asked for i in range(0, 16, together)]
    assert len(asked) == 3 and all(len(set(group)) == 1 for group in groups)
    counts = [sum(group[0] == f"p{i}" for group in groups) for i in range(6)]
    assert sum(counts) == 48 // together and max(counts) - min(counts) <= 1
    assert any(one[0] != other[0] for one, other in pairwise(groups))


def test_the_kl_of_a_rollout_has_its_noise(world, tokenizer):
    episodes, metrics = raw_roll(learner(world[0], None, rl_settings("reinforce", episodes=12)), tokenizer)
    kl = episodes.padded(episodes.logp - episodes.ref_logp).sum(-1).numpy()
    assert metrics["kl_standard_error"] == pytest.approx(kl.std() / 12**0.5, rel=1e-3)


def test_scores_out_of_the_range_of_training_are_counted(world, tokenizer):
    networks, _ = world
    taught = learner(networks, None, rl_settings("reinforce", episodes=12))
    episodes, metrics = raw_roll(taught, tokenizer)
    assert metrics["score_out_of_range"] == 0.0  # a reward model that knows no range
    ended = episodes.score[episodes.finished].sort().values
    known = [ended[0].item() - 1, (ended[-1].item() + ended[-2].item()) / 2]
    networks.reward.model.config.reward_range = known
    _, metrics = raw_roll(taught, tokenizer)
    assert metrics["score_out_of_range"] == pytest.approx(1 / 12)


def test_trpo_in_a_transformer_keeps_its_promise(tokenizer, monkeypatch):
    """KL of every step, computed anew over whole distributions of the policy before and after it."""
    rows, kls = [], []
    model = small_model(tokenizer, scale=2.0)
    trpo = attempts.ATTEMPTS["trpo"]

    def distributions(tokens: Tokens) -> torch.Tensor:
        with torch.no_grad():
            logits = model(torch.tensor([[*tokens.prompt, *tokens.response]])).logits[0].double()
        return logits.log_softmax(-1)[len(tokens.prompt) - 1 : -1]

    def improve(learner, episodes):
        before = [distributions(tokens) for tokens in episodes.tokens]
        metrics = trpo.improve(learner, episodes)
        after = [distributions(tokens) for tokens in episodes.tokens]
        kls.append(torch.cat([(a.exp() * (a - b)).sum(-1) for a, b in zip(before, after, strict=True)]).mean().item())
        return metrics

    monkeypatch.setitem(attempts.ATTEMPTS, "trpo", trpo._replace(improve=improve))
    monkeypatch.setenv("RLHF_NATIVE", "1")  # else the next is not heard
    monkeypatch.setenv("RLHF_MICRO_TOKENS", "20")  # several micro-batches, all of which count
    settings = rl_settings("trpo").model_copy(update={"iterations": 3, "episodes": 16, "max_kl": 0.005})
    run_ppo(tokenizer, settings, log=lambda metrics, step: rows.append(metrics), max_new_tokens=5, model=model)
    assert [row["update/kl_old_new"] for row in rows] == pytest.approx(kls, rel=1e-3, abs=1e-7)
    assert all(kl <= row["update/kl_bound"] for row, kl in zip(rows, kls, strict=True))
    assert [row["update/kl_bound"] for row in rows] == pytest.approx([0.005, 0.005 * 2 / 3, 0.005 / 3])
    accepted = [row for row in rows if not row["update/rejected"]]
    assert accepted and all(row["update/surrogate_gain"] >= 0 and row["update/kl_old_new"] > 0 for row in accepted)


def test_step_0_knows_each_loss(tokenizer, examples, monkeypatch):
    """The invariant of the loss itself: log 2, 1 / (4 tau^2); a loss that is wired wrongly is stopped."""
    from test_training import run_pairs, stored

    from rlhf_vs_dpo.errors import TrainingError

    for name in ("dpo", "cdpo", "ipo", "ln_dpo"):
        rows = []
        run_pairs(
            tokenizer, examples, variant(name), stored(tokenizer, examples), lambda m, s, rows=rows: rows.append(m)
        )
        assert rows[0]["loss"] == pytest.approx(preference.loss_at_reference(variant(name)), rel=1e-3)
    assert preference.loss_at_reference(variant("ipo")) == pytest.approx(1 / (4 * variant("ipo").tau ** 2))
    whole = preference.pair_loss
    monkeypatch.setattr(preference, "pair_loss", lambda *a: whole(*a)._replace(loss=whole(*a).loss + 0.1))
    with pytest.raises(TrainingError, match=r"the ipo loss is .*, expected 25"):
        run_pairs(tokenizer, examples, variant("ipo", tau=0.1), stored(tokenizer, examples))


def test_a_reward_model_without_its_shift_is_stopped(tokenizer, examples):
    from rlhf_vs_dpo.errors import TrainingError
    from rlhf_vs_dpo.training.invariants import check_normalised

    reward = scorer(tokenizer)
    demos = [examples[i % 12] for i in range(240)]
    reward.model.config.reward_shift += reward.model.config.reward_scale * float(np.mean(scores(reward, demos)))
    check_normalised(reward, demos)
    reward.model.config.reward_shift = 5.0
    with pytest.raises(TrainingError, match="mean RM score of 240 demonstrations"):
        check_normalised(reward, demos)


def test_implicit_rewards_are_what_the_loss_compares(tokenizer, examples):
    policy = Policy(small_model(tokenizer, scale=1.0), 1.0)
    reference = pd.DataFrame({"chosen_logp": np.linspace(-9, -4, 6), "rejected_logp": np.linspace(-5, -8, 6)})
    logp = np.array(log_likelihoods(policy, examples))
    lengths = np.array([len(t.response) for t in examples])
    for name, weight in (
        ("dpo", 0.1),
        ("ipo", variant("ipo").tau),
        ("ln_dpo", 2.0 / lengths),
        ("simpo", 2.0 / lengths),
    ):
        known = None if name == "simpo" else reference
        table = preference.implicit_rewards(policy, halves(examples), known, variant(name))
        ref = 0.0 if name == "simpo" else np.concatenate([reference["chosen_logp"], reference["rejected_logp"]])
        wanted = weight * (logp - ref)
        assert table["chosen"].tolist() == pytest.approx(wanted[:6].tolist(), abs=1e-4)
        assert table["rejected"].tolist() == pytest.approx(wanted[6:].tolist(), abs=1e-4)


def test_later_rounds_go_on_where_the_last_one_stopped(tokenizer, examples):
    """Steps count on, and the policy need not be the reference any more."""
    from test_training import stored

    policy = Policy(small_model(tokenizer, scale=1.0), 1.0)
    rows, reference, pairs = [], stored(tokenizer, examples), halves(examples)
    settings = variant("dpo", batch=6)

    def log(metrics, step):
        rows.append((step, metrics["loss"]))

    for taken in (0, 2):
        preference.train(policy, pairs, reference, settings, 2, 0, Record(log, "x", taken=taken))
    assert [step for step, _ in rows] == [1, 2, 3, 4]
    with pytest.raises(Exception, match="step-0 invariant"):
        preference.train(policy, pairs, reference, settings, 2, 0, Record(log, "x"))


def test_the_trust_region_shrinks_from_the_end_of_the_warm_up_on(tokenizer):
    rows = []
    settings = rl_settings("trpo").model_copy(
        update={"iterations": 4, "episodes": 16, "max_kl": 0.005, "value_warmup": 2}
    )
    run_ppo(tokenizer, settings, log=lambda m, s: rows.append(m), max_new_tokens=3)
    bounds = [row["update/kl_bound"] for row in rows if "update/kl_bound" in row]
    assert bounds == pytest.approx([0.005, 0.0025])


def test_the_kl_coefficient_waits_for_the_policy(tokenizer, monkeypatch):
    """While the value network learns alone the KL is 0, which says nothing of the coefficient."""
    from rlhf_vs_dpo.training import policy_gradient

    asked = []
    monkeypatch.setattr(policy_gradient, "next_kl_coefficient", lambda beta, *rest: asked.append(beta) or beta)
    settings = rl_settings("ppo").model_copy(update={"iterations": 3, "kl_target": 1.0, "value_warmup": 2})
    run_ppo(tokenizer, settings)
    assert len(asked) == 1


def test_micro_batches_do_not_change_a_natural_gradient_step(tokenizer, monkeypatch):
    found = []
    for tokens in (100_000, 20):
        monkeypatch.setattr(Policy, "budget", tokens)
        model = small_model(tokenizer, scale=2.0)
        settings = rl_settings("trpo").model_copy(update={"iterations": 1, "episodes": 16, "fisher_share": 1.0})
        found.append(weights(run_ppo(tokenizer, settings, max_new_tokens=4, model=model)))
    start = weights(Policy(small_model(tokenizer, scale=2.0), 1.0))
    moved = (found[0] - start).abs().max()
    assert moved > 0 and (found[0] - found[1]).abs().max() < 0.02 * moved


def test_a_process_without_episodes_has_no_micro_batches():
    """A share of few episodes, for the Fisher matrix, may leave a process without any."""
    from types import SimpleNamespace

    learner = SimpleNamespace(accelerate=accelerator(), pad=0, sharded=False)
    assert attempts._micro(learner, None, [], 100) == []
