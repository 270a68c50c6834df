"""Adapters: nothing at the start, W + (alpha / rank) B A afterwards, one base for all, folders that others can read."""

import dataclasses
import json

import pytest
import torch
from conftest import gpt2, small_model
from torch import nn

from rlhf_vs_dpo import config
from rlhf_vs_dpo.config import Adapter, Training
from rlhf_vs_dpo.errors import ModelError
from rlhf_vs_dpo.language import adapters, heads, models
from rlhf_vs_dpo.language.generation import generate
from rlhf_vs_dpo.language.logprobs import Policy
from rlhf_vs_dpo.language.text import Prompts, Tokens, collate
from rlhf_vs_dpo.theory import experiments, laws, problems
from rlhf_vs_dpo.training import policy_gradient, rollouts
from rlhf_vs_dpo.training.optimise import Optimiser, accelerator

RANK_4 = Adapter(rank=4, alpha=8.0, targets="all", merge=False)


@pytest.fixture(params=["llama", "gpt2"])
def plain(request, tokenizer):
    return small_model(tokenizer) if request.param == "llama" else gpt2(tokenizer)


def learned(model, seed: int = 0):
    """The adapters as if they had been trained: B no longer 0."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for layer in adapters.attached(model).values():
            layer.lora_B["default"].weight.normal_(std=0.05)
    return model


def test_fresh_adapters_change_nothing_at_all(plain, examples, tokenizer):
    batch = collate(examples, tokenizer.pad_token_id)
    before = Policy(plain, 0.7)(batch).logp
    model = adapters.attach(plain, RANK_4)
    reference = adapters.switched_off(model)
    ours, theirs = (Policy(of, 0.7)(batch).logp for of in (model, reference))
    assert torch.equal(ours, theirs)  # KL 0, exactly
    assert (ours - before).abs().max() < 1e-4
    changed = Policy(learned(model), 0.7)(batch).logp
    assert (changed - ours).abs().max() > 0.01
    assert torch.equal(Policy(reference, 0.7)(batch).logp, theirs)


def test_merged_is_unmerged_and_is_what_the_equation_says(plain, examples, tokenizer):
    weights = {name: p.detach().clone() for name, p in plain.named_parameters()}
    model = learned(adapters.attach(plain, RANK_4))
    batch = collate(examples, tokenizer.pad_token_id)
    merged = adapters.merged(model)
    assert not adapters.attached(merged) and type(merged) is type(model)
    for name, layer in adapters.attached(model).items():
        a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
        added = (8.0 / 4) * b @ a
        if type(layer.get_base_layer()) is not nn.Linear:
            added = added.T
        assert torch.allclose(merged.get_submodule(name).weight, weights[f"{name}.weight"] + added, atol=1e-6)
        assert torch.equal(layer.get_base_layer().weight, weights[f"{name}.weight"])  # of the model itself: as it was
    ours, theirs = (Policy(of, 0.7)(batch).logp for of in (model, merged))
    assert (ours - theirs).abs().max() < 1e-4
    as_it_comes = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits
    expected = merged(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits
    assert (as_it_comes - expected)[batch.attention_mask.bool()].abs().max() < 1e-3


def test_only_adapters_learn_and_the_reference_never_changes(plain, examples, tokenizer):
    model = adapters.attach(plain, RANK_4)
    reference = adapters.switched_off(model)
    batch = collate(examples, tokenizer.pad_token_id)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    said = Policy(reference, 1.0)(batch).logp
    settings = Training(
        steps=3, batch=12, learning_rate=1e-2, schedule="constant", warmup=0.0, weight_decay=0.1, max_grad_norm=1.0,
        adam_epsilon=1e-8,
    )  # fmt: skip
    optimiser = Optimiser(accelerator(), Policy(model, 1.0), settings)
    for _ in range(3):
        loss = optimiser.accumulate([0], lambda group: -optimiser.module(batch).sums().sum(), 12)
        optimiser.step(loss, ["all"])
    changed = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert changed == {name for name in before if "lora_" in name}
    assert torch.equal(Policy(reference, 1.0)(batch).logp, said)


@pytest.fixture
def base(plain, tokenizer, tmp_path, monkeypatch):
    """A folder as the `sft` stage leaves it, in the working directory."""
    monkeypatch.chdir(tmp_path)
    models.save(plain, tokenizer, tmp_path / "sft")
    return tmp_path / "sft"


def test_a_folder_of_adapters_is_what_was_trained(base, examples, tokenizer):
    model, _ = models.load_learner(base, RANK_4)
    start = models.start_of(model, base)
    models.save(learned(model), tokenizer, base.parent / "dpo", base=base)
    batch = collate(examples, tokenizer.pad_token_id)
    ours = Policy(model, 0.7)(batch).logp
    again, words = models.load_policy(base.parent / "dpo")
    assert (Policy(again, 0.7)(batch).logp - ours).abs().max() < 1e-4
    assert again.generation_config.suppress_tokens == start.generation_config.suppress_tokens
    assert len(words) == len(tokenizer) and not (base.parent / "dpo" / "model.safetensors").exists()
    models.save(model, tokenizer, base.parent / "merged", base, merge=True)
    whole, _ = models.load_policy(base.parent / "merged")
    assert torch.equal(Policy(whole, 0.7)(batch).logp, Policy(again, 0.7)(batch).logp)

    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    theirs = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), base.parent / "dpo")
    logits = theirs(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits
    expected = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits
    assert (logits - expected)[batch.attention_mask.bool()].abs().max() < 1e-3


def test_another_base_a_lost_base_and_broken_adapters_are_refused_by_name(base, tokenizer):
    model, _ = models.load_learner(base, RANK_4)
    folder = base.parent / "dpo"
    models.save(model, tokenizer, folder, base=base)
    whole = (folder / adapters.WEIGHTS).read_bytes()
    (folder / adapters.WEIGHTS).write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ModelError, match=r"adapter_model\.safetensors: cannot be read"):
        models.load_policy(folder)
    (folder / adapters.WEIGHTS).write_bytes(whole)
    given = json.loads((folder / adapters.CONFIG).read_text())
    (folder / adapters.CONFIG).write_text(json.dumps(given | {"r": 8}))
    with pytest.raises(ModelError, match="adapters for another model"):
        models.load_policy(folder)
    (folder / adapters.CONFIG).write_text(json.dumps(given))
    models.load_policy(folder)
    torch.manual_seed(1)
    models.save(small_model(tokenizer, seed=7), tokenizer, base)
    with pytest.raises(ModelError, match="other weights than"):
        models.load_policy(folder)
    with pytest.raises(ModelError, match=r"`adapter\.targets` names lm_head"):
        models.load_learner(base, Adapter(rank=2, alpha=2.0, targets=["lm_head"], merge=False))
    base.rename(base.parent / "away")
    with pytest.raises(ModelError, match="which is not there"):
        models.load_policy(folder)


def test_four_networks_of_ppo_are_one_base(base, tokenizer, examples):
    rewarding, _ = heads.scorer_from_policy(base, RANK_4)
    rewarding.model.config.reward_shift, rewarding.model.config.reward_scale = 0.5, 2.0
    learned(rewarding.model, seed=3)
    models.save(rewarding.model, tokenizer, base.parent / "reward", base=base)
    model, _ = models.load_learner(base, RANK_4)
    start = models.start_of(model, base)
    scorer = heads.load_scorer(base.parent / "reward", beside=start)
    value = policy_gradient.value_network(scorer)
    batch = collate(examples, tokenizer.pad_token_id)
    where = batch.response_mask
    assert torch.equal(scorer(batch, where), value(batch, where))
    assert (heads.load_scorer(base.parent / "reward")(batch, where) - value(batch, where)).abs().max() < 1e-4
    assert (rewarding(batch, where) - 0).abs().max() > 0.1

    held = [p for network in (model, start, scorer.model, value.model) for p in network.named_parameters()]
    shared = {p.data_ptr(): p.numel() for name, p in held if "lora_" not in name and "score" not in name}
    assert sum(shared.values()) == sum(p.numel() for p in models.load_policy(base)[0].parameters())
    assert len({p.data_ptr() for name, p in held if "score" in name}) == 2
    assert {
        name.rsplit(".", 1)[0] for name, p in value.named_parameters() if p.requires_grad and "lora" not in name
    } == {"model.score"}
    with torch.no_grad():
        for p in value.parameters():
            if p.requires_grad:
                p.add_(0.1)
    assert not torch.equal(scorer(batch, where), value(batch, where))
    assert (heads.load_scorer(base.parent / "reward")(batch, where) - scorer(batch, where)).abs().max() < 1e-4


def test_samples_are_those_of_the_merged_policy(tokenizer):
    model = learned(adapters.attach(small_model(tokenizer), RANK_4))
    asked = Prompts([[1, 5, 6], [1, 7]], ["a", "b"])
    ours, theirs = (generate(Policy(of, 0.9), asked, [0, 0], 12, 0) for of in (model, adapters.merged(model)))
    assert ours.tokens == theirs.tokens and theirs.logp == ()
    assert ours.tokens != generate(Policy(adapters.switched_off(model), 0.9), asked, [0, 0], 12, 0).tokens
    batch = collate(ours.tokens, tokenizer.pad_token_id)
    trained = Policy(model, 0.9)(batch).logp[batch.response_mask]
    gap = rollouts.sampler_gap(accelerator(), ours.logp, trained)
    assert 0 < gap["sampler_gap"] <= gap["sampler_gap_largest"] < 1e-4
    wrong = rollouts.sampler_gap(accelerator(), ours.logp, Policy(model, 1.2)(batch).logp[batch.response_mask])
    assert wrong["sampler_gap"] > 0.05


def test_a_checkpoint_holds_what_is_learned_alone(tokenizer, examples):
    policy = Policy(learned(adapters.attach(small_model(tokenizer), RANK_4)), 0.7)
    state = {name: value.clone() for name, value in policy.state_dict().items()}
    assert state and all("lora_" in name for name in state)
    again = Policy(adapters.attach(small_model(tokenizer), RANK_4), 0.7)
    again.load_state_dict(state)
    batch = collate(examples, tokenizer.pad_token_id)
    assert torch.equal(again(batch).logp, policy(batch).logp)
    with pytest.raises(RuntimeError, match="other adapters"):
        again.load_state_dict({name: value for name, value in list(state.items())[1:]})


def test_control_tokens_learn_alone_among_the_embeddings(tokenizer, examples):
    model = adapters.attach(small_model(tokenizer), RANK_4)
    models.add_control_tokens(model, tokenizer, ["<good>"], weight_decay=0.0)
    table = model.get_input_embeddings().weight
    before, new = table.detach().clone(), tokenizer.convert_tokens_to_ids("<good>")
    settings = Training(
        steps=1, batch=2, learning_rate=1e-2, schedule="constant", warmup=0.0, weight_decay=0.0, max_grad_norm=1.0,
        adam_epsilon=1e-8,
    )  # fmt: skip
    optimiser = Optimiser(accelerator(), Policy(model, 1.0), settings)
    batch = collate([Tokens([*e.prompt, new], e.response) for e in examples[:2]], tokenizer.pad_token_id)
    optimiser.step(optimiser.accumulate([0], lambda group: -optimiser.module(batch).sums().sum(), 2), ["both"])
    moved = (table != before).any(-1).nonzero().flatten().tolist()
    assert moved == [new]
    with pytest.raises(ModelError, match=r"weight_decay: 0\.0"):
        models.add_control_tokens(model, tokenizer, ["<bad>"], weight_decay=0.1)


def test_full_rank_reaches_the_enumerable_optimum(monkeypatch):
    problem = problems.transformer(3)
    reference = problem.reference
    whole = Adapter(rank=32, alpha=32.0, targets="all", merge=False)

    class Adapted(problems.Problem):
        def start(self):
            return Policy(adapters.attach(super().start().model, whole), reference.temperature)

    adapted = Adapted(**{field.name: getattr(problem, field.name) for field in dataclasses.fields(problem)})
    start = float(laws.kl(problem.ref, problem.optimum(0.5)).max())
    settings = experiments.rl_settings("ppo", 60, 256, 0.5, 0.04)
    assert start > 0.3 and experiments.reinforcement(adapted, settings, 0)[0]["kl"] < 0.05
    pairs = experiments.population(adapted, 8000, same=False, seed=0)
    loss = config.Dpo(loss="dpo", beta=0.5, batch=1024, learning_rate=3e-3, **experiments.PASSES)
    assert experiments.direct(adapted, loss, pairs, 150, problem.optimum(0.5), 0)[0]["kl"] < 0.08


def test_a_base_that_is_held_in_bf16_is_shared_too(base, tokenizer):
    """As on a GPU: the reward model comes from disk in float32, and stands on the base that the policy has."""
    rewarding, _ = heads.scorer_from_policy(base, RANK_4)
    rewarding.model.config.reward_shift, rewarding.model.config.reward_scale = 0.0, 1.0
    models.save(rewarding.model, tokenizer, base.parent / "reward", base=base)
    model, _ = models.load_learner(base, RANK_4)
    start = models.start_of(models.in_bf16(model), base)
    scorer = heads.load_scorer(base.parent / "reward", beside=start)
    theirs = {p.data_ptr() for p in start.parameters()}
    own = [name for name, p in scorer.model.named_parameters() if p.data_ptr() not in theirs]
    assert own and all("lora_" in name or name.startswith("score") for name in own)
    assert any(p.dtype is torch.bfloat16 for p in scorer.model.parameters())


@pytest.mark.parametrize("rounded", [False, True])
def test_what_adapters_have_learned_is_sampled_and_read(plain, rounded, tokenizer, examples, monkeypatch):
    """On a GPU matrices are held in bf16 (TRPO's are rounded for its sampler alone): an update that is smaller than the rounding would
    be lost in a sum of both."""
    model = adapters.attach(plain, RANK_4)
    torch.manual_seed(0)
    with torch.no_grad():
        for layer in adapters.attached(model).values():
            layer.lora_B["default"].weight.normal_(std=1e-3)
    if rounded:
        models.in_bf16(model)
    monkeypatch.setattr(models, "in_half", lambda device: True)
    sampled = models.sampler(model)
    theirs = {p.data_ptr() for p in model.parameters()}
    copied = [p for p in sampled.parameters() if p.data_ptr() not in theirs]
    assert models.size_of_sampler(model) == sum(p.nbytes for p in copied)
    batch = collate(examples, tokenizer.pad_token_id)
    for name, layer in adapters.attached(model).items():
        other, base = adapters.attached(sampled)[name], layer.get_base_layer()
        low, high = other.lora_A["default"].weight.float(), other.lora_B["default"].weight.float()
        wanted = layer.lora_B["default"].weight @ layer.lora_A["default"].weight
        assert torch.nn.functional.cosine_similarity((high @ low).flatten(), wanted.flatten(), dim=0) > 0.999, name
        assert (other.get_base_layer().weight.data_ptr() == base.weight.data_ptr()) == rounded
    with torch.no_grad(), models.autocast(torch.device("cpu")):
        ours, same, read = (Policy(of, 1.0)(batch).logp for of in (model, sampled, models.to_read(model)))
    assert torch.equal(ours, same) and torch.equal(ours, read)
