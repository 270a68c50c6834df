"""The loops: what must not change the gradient does not, what must hold at step 0 holds, and PPO finds the optimum."""

import copy
import math

import numpy as np
import pandas as pd
import pytest
import torch
from accelerate import Accelerator
from conftest import small_model, untuned
from torch import nn

from rlhf_vs_dpo import config
from rlhf_vs_dpo.config import Rl, Training
from rlhf_vs_dpo.errors import OutOfMemory, TrainingError
from rlhf_vs_dpo.language.forward import log_likelihoods, scores
from rlhf_vs_dpo.language.heads import Scorer
from rlhf_vs_dpo.language.logprobs import Policy
from rlhf_vs_dpo.language.text import Examples, Pairs, Prompts, Tokens
from rlhf_vs_dpo.run.progress import Record
from rlhf_vs_dpo.training import policy_gradient, preference, supervised
from rlhf_vs_dpo.training import reward as reward_training
from rlhf_vs_dpo.training.invariants import hold, tolerance
from rlhf_vs_dpo.training.learner import Networks
from rlhf_vs_dpo.training.optimise import round_seed, scheduled

TRAINING = Training(
    steps=3,
    batch=6,
    learning_rate=1e-2,
    schedule="linear",
    warmup=0.0,
    weight_decay=0.0,
    max_grad_norm=1.0,
    adam_epsilon=1e-5,
)


def weights(module: nn.Module) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in module.parameters()])


def silent(metrics, step):
    pass


def scorer(tokenizer, seed=1, layers=1) -> Scorer:
    from transformers import LlamaConfig, LlamaForSequenceClassification

    torch.manual_seed(seed)
    shape = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": layers,
        "num_attention_heads": 2,
        "num_labels": 1,
    }
    settings = LlamaConfig(vocab_size=len(tokenizer), initializer_range=0.3, **shape)
    settings.reward_shift, settings.reward_scale = 0.1, 2.0
    model = LlamaForSequenceClassification(settings).eval()
    model.config.pad_token_id, model.config.eos_token_id = tokenizer.pad_token_id, tokenizer.eos_token_id
    return Scorer(model)


def named(examples, prefix="r") -> Examples:
    return Examples(examples, [f"{prefix}{i}" for i in range(len(examples))])


def halves(examples) -> Pairs:
    """The first six examples preferred to the last six."""
    return Pairs(examples[:6], examples[6:], [f"pair-{i}" for i in range(6)])


# ---- the global batch is what counts ---------------------------------------------------------------------------------


@pytest.mark.parametrize("budget", ["16", "40"])
def test_micro_batches_do_not_change_training(tokenizer, examples, budget, monkeypatch):
    def trained(tokens):
        monkeypatch.setenv("RLHF_MICRO_TOKENS", tokens)
        monkeypatch.setenv("RLHF_NATIVE", "1")  # else it is not heard
        policy = Policy(small_model(tokenizer, scale=1.0), 1.0)
        rows = []
        supervised.likelihood(policy, named(examples), TRAINING, 0, Record(lambda m, s: rows.append(m), "x"))
        return weights(policy), [row["loss"] for row in rows]

    (one, losses), (other, other_losses) = trained("100000"), trained(budget)
    assert other_losses == pytest.approx(losses, abs=1e-4)
    assert (one - other).abs().max() < 2e-4


class Full:
    """A device whose memory is full from the second backward pass on, so many times; then somebody has gone."""

    def __init__(self, monkeypatch, times: int):
        self.passes, self.times, original = 0, times, Accelerator.backward

        def backward(accelerate, loss, **kwargs):
            self.passes += 1
            if self.passes >= 2 and self.times:
                self.times -= 1
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
            original(accelerate, loss, **kwargs)

        monkeypatch.setattr(Accelerator, "backward", backward)


@pytest.mark.parametrize("what", ["sft", "reinforce", "ppo", "ppo_ptx"])
def test_a_batch_that_does_not_fit_is_begun_again_in_halves(tokenizer, examples, what, monkeypatch, capsys):
    """Part of its gradient was there already; nothing but rounding is another one, metrics included."""
    monkeypatch.setenv("RLHF_NATIVE", "1")
    monkeypatch.setenv("RLHF_MICRO_TOKENS", "60")

    def trained():
        rows = []
        if what == "sft":
            policy = Policy(small_model(tokenizer, scale=1.0), 1.0)
            supervised.likelihood(policy, named(examples), TRAINING, 0, Record(lambda m, s: rows.append(m), "x"))
        else:
            settings = rl_settings(what, iterations=1)
            policy = run_ppo(
                tokenizer, settings, corpus=examples * 3, log=lambda m, s: rows.append(m), max_new_tokens=9
            )
        return weights(policy), rows[-1]

    whole, metrics = trained()
    Full(monkeypatch, 1)
    again, other = trained()
    assert capsys.readouterr().err.count("micro-batches are halved, to 30 tokens") == 1
    assert (again - whole).abs().max() < 2e-4 and other == pytest.approx(metrics, rel=1e-3, abs=1e-3)


def test_a_batch_that_does_not_fit_in_halves_says_what_to_lower(tokenizer, examples, monkeypatch):
    monkeypatch.setenv("RLHF_NATIVE", "1")
    monkeypatch.setenv("RLHF_MICRO_TOKENS", "60")
    Full(monkeypatch, 99)
    policy = Policy(small_model(tokenizer, scale=1.0), 1.0)
    before = weights(policy)
    with pytest.raises(OutOfMemory, match=r"(?s)Tried to allocate 2.00 GiB.*RLHF_MICRO_TOKENS to 15"):
        supervised.likelihood(policy, named(examples), TRAINING, 0, Record(silent, "x"))
    assert torch.equal(weights(policy), before)


def test_the_loss_is_the_mean_over_tokens_not_over_sequences(tokenizer, examples):
    policy = Policy(small_model(tokenizer, scale=1.0), 1.0)
    logp = log_likelihoods(policy, examples)
    expected = -sum(logp) / sum(len(example.response) for example in examples)
    rows = []
    one_step = TRAINING.model_copy(update={"steps": 1, "batch": 12})
    trained = supervised.likelihood(policy, named(examples), one_step, 0, Record(lambda m, s: rows.append(m), "x"))
    assert rows[0]["loss"] == pytest.approx(expected, rel=1e-4)
    assert trained == sum(map(len, examples))  # a step over all of them: prompts count, padding does not


def test_schedules():
    assert [scheduled("linear", s, 4, 0.0) for s in range(5)] == [1.0, 0.75, 0.5, 0.25, 0.0]
    assert [scheduled("constant", s, 4, 0.5) for s in range(4)] == pytest.approx([1 / 3, 2 / 3, 1.0, 1.0])
    # Behind the warm-up it has the whole rate, and falls from there to the end.
    risen = [scheduled("linear", s, 10, 0.3) for s in range(10)]
    assert risen == pytest.approx([1 / 4, 2 / 4, 3 / 4, *(left / 7 for left in range(7, 0, -1))])
    assert [scheduled("cosine", s, 10, 0.2) for s in (1, 2, 6)] == pytest.approx([2 / 3, 1.0, 0.5])
    assert [scheduled("cosine", s, 2, 0.0) for s in range(3)] == pytest.approx([1.0, 0.5, 0.0])


def test_a_loss_that_is_not_finite_stops_with_step_rate_and_ids(tokenizer, examples):
    policy = Policy(small_model(tokenizer, scale=1.0), 1.0)
    with torch.no_grad():
        policy.model.lm_head.weight[5] = float("nan")
    with pytest.raises(TrainingError, match=r"step 0: loss nan.*learning rate 0\.01; batch: row-\d+"):
        supervised.likelihood(policy, named(examples, "row-"), TRAINING, 0, Record(silent, "x"))


# ---- reward model ----------------------------------------------------------------------------------------------------


def test_the_reward_model_learns_a_preference(tokenizer):
    """Responses that hold 'cat' are always preferred: a few steps suffice to order held-out pairs."""
    rng = np.random.default_rng(0)
    cat = tokenizer.convert_tokens_to_ids("cat")
    others = [i for i in range(4, len(tokenizer)) if i != cat]

    def response(with_cat):
        ids = rng.choice(others, size=rng.integers(2, 8)).tolist()
        if with_cat:
            ids.insert(int(rng.integers(len(ids) + 1)), cat)
        return Tokens([tokenizer.bos_token_id, 5], [*ids, tokenizer.eos_token_id])

    good, bad = [response(True) for _ in range(160)], [response(False) for _ in range(160)]
    model = scorer(tokenizer)
    settings = TRAINING.model_copy(update={"steps": 40, "batch": 16})
    reward_training.train(model, Pairs(good[:128], bad[:128], ["p"] * 128), settings, 0, Record(silent, "x"))
    right = np.array(scores(model, good[128:])) > np.array(scores(model, bad[128:]))
    assert right.mean() > 0.95


def test_a_round_has_a_seed_of_its_own():
    seeds = [round_seed(seed, number) for seed in range(3) for number in range(4)]
    assert len(set(seeds)) == 12 and round_seed(1, 2) == round_seed(1, 2)


def test_reward_by_length_and_its_correlation_with_gold_by_hand():
    """Eight responses of 1 to 8 tokens: quarters hold two each."""
    pairs = pd.DataFrame(
        {
            "chosen_reward": [1.0, 3.0, 5.0, 7.0], "rejected_reward": [2.0, 4.0, 6.0, 9.0],
            "chosen_tokens": [1, 3, 5, 7], "rejected_tokens": [2, 4, 6, 8],
            "chosen_gold": [1.0, 0.0, 0.0, 1.0], "rejected_gold": [0.0, 1.0, 1.0, 0.0],
        }
    )  # fmt: skip
    quality = reward_training.quality(pairs)
    assert [entry["responses"] for entry in quality["mean_by_length"].values()] == [2, 2, 2, 2]
    assert [entry["reward"] for entry in quality["mean_by_length"].values()] == [1.5, 3.5, 5.5, 8.0]
    assert quality["accuracy"] == 0.0 and quality["accuracy_standard_error"] == 0.0
    rewards, gold = [1.0, 3.0, 5.0, 7.0, 2.0, 4.0, 6.0, 9.0], [1.0, 0.0, 0.0, 1.0, 0.0, 1.0, 1.0, 0.0]
    assert quality["correlation_with_gold"] == pytest.approx(np.corrcoef(rewards, gold)[0, 1])


def test_reward_quality_by_hand():
    pairs = pd.DataFrame(
        {
            "chosen_reward": [2.0, 0.0, 1.0, 1.0],
            "rejected_reward": [0.0, 1.0, 0.0, 1.0],
            "chosen_tokens": [5, 6, 7, 8],
            "rejected_tokens": [5, 6, 7, 8],
            "chosen_gold": [1.0, 1.0, np.nan, 0.0],
            "rejected_gold": [0.0, 0.0, 1.0, 1.0],
        }
    )
    quality = reward_training.quality(pairs)
    assert quality["accuracy"] == pytest.approx(2.5 / 4)  # a tie is half right
    assert quality["accuracy_standard_error"] == pytest.approx(np.std([1, 0, 1, 0.5]) / 2)
    assert quality["accuracy_against_gold"] == pytest.approx(1 / 3)  # right, wrong, unknown, undecided counts as wrong
    margins = [2.0, -1.0, 1.0, 0.0]
    assert quality["log_loss"] == pytest.approx(np.mean([math.log(1 + math.exp(-m)) for m in margins]))


# ---- preference training ---------------------------------------------------------------------------------------------


def variant(name, **changes):
    params = untuned()
    params["preference"]["defaults"] |= {"batch": 4, "epochs": 1.0, "learning_rate": 1e-2, "warmup": 0.0} | changes
    return config.section(params, "preference", name)


def run_pairs(tokenizer, examples, settings, reference, log=silent):
    policy = Policy(small_model(tokenizer, scale=1.0), 1.0)
    steps = supervised.steps_over(settings, 6)
    preference.train(policy, halves(examples), reference, settings, steps, 0, Record(log, "x"))
    return weights(policy)


def stored(tokenizer, examples, shift=0.0):
    policy = Policy(small_model(tokenizer, scale=1.0), 1.0)
    logp = log_likelihoods(policy, examples)
    return pd.DataFrame({"chosen_logp": np.array(logp[:6]) + shift, "rejected_logp": np.array(logp[6:]) + shift})


@pytest.mark.parametrize("loss", ["dpo", "cdpo", "ln_dpo"])
def test_step_0_loss_is_log_2(tokenizer, examples, loss):
    rows = []
    run_pairs(tokenizer, examples, variant(loss), stored(tokenizer, examples), lambda m, s: rows.append(m))
    assert rows[0]["loss"] == pytest.approx(math.log(2), abs=1e-5)
    assert rows[0]["pairs/margin"] == pytest.approx(0.0, abs=1e-5)


def test_a_foreign_reference_stops_the_run(tokenizer, examples):
    with pytest.raises(TrainingError, match=r"step-0 invariant broken.*Likely causes"):
        run_pairs(tokenizer, examples, variant("dpo"), stored(tokenizer, examples, shift=0.1))


def test_a_foreign_reference_of_the_rejected_stops_the_run_too(tokenizer, examples):
    reference = stored(tokenizer, examples)
    reference["rejected_logp"] -= 5.0
    with pytest.raises(TrainingError, match="rejected responses"):
        run_pairs(tokenizer, examples, variant("dpo"), reference)


def test_pairs_that_are_one_to_the_tokenizer_are_refused(tokenizer, examples):
    from rlhf_vs_dpo.errors import DataError

    policy = Policy(small_model(tokenizer), 1.0)
    pairs = Pairs(examples[:2], [examples[5], examples[1]], ["a", "b"])
    with pytest.raises(DataError, match="b: chosen and rejected are the same tokens"):
        preference.train(policy, pairs, None, variant("simpo"), 1, 0, Record(silent, "x"))


def test_a_last_step_that_diverges_is_noticed(tokenizer, examples):
    wild = TRAINING.model_copy(update={"steps": 1, "batch": 12, "learning_rate": 1e38, "schedule": "constant"})
    policy = Policy(small_model(tokenizer, scale=1.0), 1.0)
    with pytest.raises(TrainingError, match="not finite"):
        supervised.likelihood(policy, named(examples), wild, 0, Record(silent, "x"))
    with pytest.raises(TrainingError, match=r"not finite.*last batch: p"):
        run_ppo(tokenizer, rl_settings(iterations=1, epochs=1, learning_rate=1e38, schedule="constant"))


def test_simpo_needs_no_reference(tokenizer, examples):
    rows = []
    run_pairs(tokenizer, examples, variant("simpo"), None, lambda m, s: rows.append(m))
    assert math.isfinite(rows[0]["loss"]) and abs(rows[0]["loss"] - math.log(2)) > 1e-3


def test_training_raises_the_margin(tokenizer, examples):
    rows = []
    run_pairs(
        tokenizer, examples, variant("dpo", epochs=20.0), stored(tokenizer, examples), lambda m, s: rows.append(m)
    )
    assert rows[-1]["pairs/margin"] > 0.5 and rows[-1]["pairs/accuracy"] == 1.0


def test_stored_reference_is_matched_by_id():
    from rlhf_vs_dpo.errors import DataError

    pairs = pd.DataFrame({"pair_id": ["b", "a"]})
    reference = pd.DataFrame({"pair_id": ["a", "b"], "chosen_logp": [-1.0, -2.0], "rejected_logp": [-3.0, -4.0]})
    assert preference.stored_reference(pairs, reference, "ref.parquet")["chosen_logp"].tolist() == [-2.0, -1.0]
    with pytest.raises(DataError, match=r"ref\.parquet: no log-probability for 1 pairs, b first"):
        preference.stored_reference(pairs, reference.head(1), "ref.parquet")


# ---- PPO -------------------------------------------------------------------------------------------------------------


def rl_settings(method="ppo", **changes) -> Rl:
    params = untuned()
    params["rl"]["defaults"] |= {"iterations": 2, "episodes": 16, "epochs": 2, "learning_rate": 1e-3} | changes
    return config.section(params, "rl", method)


def run_ppo(
    tokenizer, settings, corpus=(), seed=0, log=silent, max_new_tokens=2, model=None, reference=None, reward=None
):
    model = model or small_model(tokenizer, scale=2.0)
    reference = reference or copy.deepcopy(model)
    networks = Networks(Policy(model, 1.0), Policy(reference, 1.0), reward or scorer(tokenizer))
    prompts = Prompts([[tokenizer.bos_token_id, 5], [tokenizer.bos_token_id, 6, 7]], ["p0", "p1"])
    policy_gradient.train(networks, prompts, corpus, settings, max_new_tokens, seed, Record(log, "x"))
    return networks.policy


def test_at_step_0_ratio_is_1_and_kl_is_0(tokenizer):
    rows = []
    run_ppo(tokenizer, rl_settings(iterations=1, epochs=1), log=lambda m, s: rows.append(m))
    assert rows[0]["rollout/kl"] == pytest.approx(0.0, abs=1e-5)
    assert rows[0]["update/ratio_mean"] == pytest.approx(1.0, abs=1e-5)
    assert rows[0]["update/clip_fraction"] == 0.0
    assert rows[0]["update/kl_old_new"] == pytest.approx(0.0, abs=1e-6)


def test_a_foreign_reference_policy_stops_the_run(tokenizer):
    with pytest.raises(TrainingError, match=r"KL\(policy, reference\)"):
        run_ppo(tokenizer, rl_settings(), reference=small_model(tokenizer, seed=9, scale=2.0))


def test_dropout_stops_the_run(tokenizer):
    """Dropout switched back on: new and old log-probabilities differ before any update."""
    model = small_model(tokenizer, scale=2.0)
    reference = copy.deepcopy(model)
    for layer in model.model.layers:
        layer.mlp.down_proj = nn.Sequential(layer.mlp.down_proj, nn.Dropout(0.5).train())
    with pytest.raises(TrainingError, match="step-0 invariant broken"):
        run_ppo(tokenizer, rl_settings(), model=model, reference=reference)


def test_ppo_does_not_depend_on_micro_batches(tokenizer, monkeypatch):
    def trained(tokens):
        monkeypatch.setenv("RLHF_MICRO_TOKENS", tokens)
        monkeypatch.setenv("RLHF_NATIVE", "1")  # else it is not heard
        return weights(run_ppo(tokenizer, rl_settings(iterations=1), max_new_tokens=9))

    assert (trained("100000") - trained("24")).abs().max() < 5e-5


def test_ptx_with_gamma_0_is_ppo_bit_for_bit(tokenizer, examples):
    ppo = weights(run_ppo(tokenizer, rl_settings()))
    off = weights(run_ppo(tokenizer, rl_settings(ptx_coefficient=0.0, ptx_batch=4), corpus=examples))
    on = weights(run_ppo(tokenizer, rl_settings(ptx_coefficient=0.5, ptx_batch=4), corpus=examples))
    assert torch.equal(ppo, off) and not torch.equal(ppo, on)


def test_ptx_keeps_the_corpus(tokenizer, examples):
    """With a large gamma the corpus becomes more likely than PPO alone leaves it."""
    changes = {"iterations": 6, "learning_rate": 3e-3, "ptx_batch": 8}
    kept = run_ppo(tokenizer, rl_settings(ptx_coefficient=5.0, **changes), corpus=examples)
    lost = run_ppo(tokenizer, rl_settings(**changes))
    assert sum(log_likelihoods(kept, examples)) > sum(log_likelihoods(lost, examples)) + 10


def test_the_adaptive_coefficient_moves(tokenizer):
    rows = []
    run_ppo(tokenizer, rl_settings(iterations=3, kl_target=50.0, kl_horizon=100.0), log=lambda m, s: rows.append(m))
    betas = [row["rollout/kl_coefficient"] for row in rows]
    assert betas[0] == 0.1 and betas[1] == pytest.approx(0.1 * (1 - 0.2 * 16 / 100)) and betas[2] < betas[1]


def test_what_rounding_may_add_up_to_grows_with_the_root_of_the_tokens():
    """Errors of tokens that are independent pass at any length; the same error at every token is caught."""
    device, tokens = torch.device("cpu"), 400
    one, many = tolerance(device, 1), tolerance(device, tokens)
    assert many == pytest.approx(tokens**0.5 * one)
    errors = one * np.random.default_rng(0).uniform(-1, 1, (1000, tokens)).sum(
        1
    )  # each within the tolerance of a token
    assert np.abs(errors).max() > one
    hold("a sum", float(np.quantile(np.abs(errors), 0.9)), 0.0, many, "rounding")
    with pytest.raises(TrainingError, match="a sum"):
        hold("a sum", 0.1 * one * tokens, 0.0, many, "a bias of a tenth at every token")
