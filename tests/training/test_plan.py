"""A plan of memory is what is then measured, to within 20 %, and what cannot fit is refused before the first step."""

from types import SimpleNamespace

import pytest
import torch
from conftest import gpt2, small_model
from torch.profiler import ProfilerActivity, profile

from rlhf_vs_dpo.config import Adapter, Memory, Scratch, Training
from rlhf_vs_dpo.errors import OutOfMemory
from rlhf_vs_dpo.language import adapters, models
from rlhf_vs_dpo.language.logprobs import Policy
from rlhf_vs_dpo.language.text import Examples, Tokens
from rlhf_vs_dpo.run.progress import Record
from rlhf_vs_dpo.training import plan, supervised
from rlhf_vs_dpo.training.optimise import Optimiser, accelerator

ONCE = Training(
    steps=1, batch=8, learning_rate=1e-3, schedule="constant", warmup=0.0, weight_decay=0.0, max_grad_norm=1.0, adam_epsilon=1e-8
)  # fmt: skip
TEXTS = [Tokens([1, 5, 6, 7 + i], [8] * 43 + [2]) for i in range(8)]  # eight rows of 48


def network(tokenizer, kind: str) -> Policy:
    if kind == "gpt2":
        return Policy(gpt2(tokenizer, layers=4), 1.0)
    torch.manual_seed(0)
    size = Scratch(layers=4, width=64, heads=2, feed_forward=160, context=64, bpe_vocabulary=300)
    return Policy(models.from_scratch(size, tokenizer), 1.0)


def at_most(body) -> int:
    """Bytes that are held at once on the CPU while `body` runs, beyond those held before."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        body()
    now = most = 0
    for event in sorted(seen.profiler.kineto_results.events(), key=lambda event: event.start_ns()):
        if event.name() == "[memory]":
            now += event.nbytes()
            most = max(most, now)
    return most


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@pytest.mark.parametrize("adapted", [False, True])
@pytest.mark.parametrize("again", [False, True])
def test_a_plan_is_what_is_then_measured(kind, adapted, again, tokenizer):
    policy = network(tokenizer, kind)
    models.to_learn(
        policy.model,
        Adapter(rank=8, alpha=16.0, targets="all", merge=False) if adapted else None,
        Memory(gradient_checkpointing=again, sharding=False),
    )
    examples = Examples(TEXTS, [str(i) for i in range(8)])
    losses = {}

    def record(module, examples=examples):
        from rlhf_vs_dpo.language.text import collate

        return -module(collate(examples.tokens, policy.pad)).sums().sum()

    planned = plan.plan({policy: lambda count: record(policy, Examples(TEXTS[:count], []))}, 48, 8 * 48, 8)
    weights = sum(p.nbytes for p in policy.parameters())
    assert planned.weights == weights and planned.gradients * 2 == planned.optimiser
    optimiser = Optimiser(accelerator(), policy, ONCE)
    found = at_most(lambda: losses.update(loss=optimiser.accumulate([0], lambda group: record(policy), 8)))
    optimiser.step(losses["loss"], ["all"])
    moments = sum(m.nbytes for state in optimiser.adamw.state.values() for m in state.values() if m.ndim)
    assert moments == planned.optimiser
    assert found == pytest.approx(planned.gradients + planned.activations, rel=0.2)


def test_what_cannot_fit_is_refused_before_the_first_step(tokenizer, monkeypatch):
    policy = Policy(small_model(tokenizer), 1.0)
    examples = Examples(TEXTS, [str(i) for i in range(8)])
    before = policy.state_dict()["model.model.embed_tokens.weight"].clone()
    monkeypatch.setattr(plan, "_room", lambda device, planned: 10_000)
    with pytest.raises(OutOfMemory, match=r"sft needs .* for one example at a time") as error:
        supervised.likelihood(policy, examples, ONCE, 0, Record(lambda *_: None, "sft"))
    for key in ("memory.gradient_checkpointing", "adapter", "sampling.max_new_tokens", "data.max_prompt_tokens"):
        assert key in str(error.value)
    assert torch.equal(policy.state_dict()["model.model.embed_tokens.weight"], before)


def test_it_is_said_where_it_is_a_good_part_of_the_device(tokenizer, monkeypatch, capsys):
    policy = Policy(small_model(tokenizer), 1.0)
    supervised.likelihood(policy, Examples(TEXTS, list("abcdefgh")), ONCE, 0, Record(lambda *_: None, "sft"))
    assert "memory" not in capsys.readouterr().err
    monkeypatch.setattr(plan, "_room", lambda device, planned: 10_000_000)
    supervised.likelihood(policy, Examples(TEXTS, list("abcdefgh")), ONCE, 0, Record(lambda *_: None, "sft"))
    assert "sft, memory: weights" in capsys.readouterr().err


def test_networks_of_one_base_are_counted_once(tokenizer):
    model = adapters.attach(small_model(tokenizer), Adapter(rank=2, alpha=4.0, targets="all", merge=False))
    policy, base = Policy(model, 1.0), Policy(adapters.switched_off(model), 1.0)
    batch_free = lambda count: next(p for p in policy.parameters() if p.requires_grad).sum()  # noqa: E731
    alone = plan.plan({policy: batch_free}, 1, 1, 1)
    together = plan.plan({policy: batch_free}, 1, 1, 1, held=(base,))
    added = sum(p.nbytes for name, p in model.named_parameters() if "lora_" in name)
    assert together.weights == alone.weights + added
    assert alone.gradients == added


def made_up(**given: int) -> plan.Plan:
    """A plan with round figures: 200 bytes for the longest example of 100 tokens, 2 for each token more, 2,000 always held."""
    known = {"weights": 500, "gradients": 500, "optimiser": 1000, "activations": 1000, "cache": 0, "smallest": 200}
    return plan.Plan(**known | {"longest": 100, "tokens": 500, "batch": 10_000, "held": 500} | given)


@pytest.mark.parametrize(
    ("room", "tokens"), [(2_000 + 1_000, 300), (2_000 + 10_000, 3_000), (2_000 + 200, 60), (2**30, 2**17)]
)
def test_on_a_gpu_a_micro_batch_fills_what_is_left(room, tokens, monkeypatch, capsys):
    """Six tenths of it with activations: 200 + 2 (n - 100) bytes of n tokens."""
    on_gpu = SimpleNamespace(device=torch.device("cuda"), is_main_process=True)
    monkeypatch.setattr(plan, "_room", lambda device, planned: room)
    monkeypatch.delenv("RLHF_MICRO_TOKENS", raising=False)
    assert plan.check(made_up(), 500, on_gpu, "x") == tokens
    monkeypatch.setenv("RLHF_MICRO_TOKENS", "500")
    assert plan.check(made_up(), 500, on_gpu, "x") == min(tokens, 500)
    assert plan.check(made_up(), 500, on_gpu, "x", 70) == min(tokens, 70)
    assert plan.check(made_up(), 500, SimpleNamespace(device=torch.device("cpu"), is_main_process=False), "x") == 500


def test_a_plan_of_other_micro_batches():
    assert made_up().of(3_000).activations == 200 + 2 * 2_900 and made_up().of(50).activations == 200
    assert made_up().of(20_000).activations == 200 + 2 * 9_900  # there are no more than a batch has
    assert made_up(cache=9_000).total == 2_000 + 9_000


def test_what_samples_too_much_at_once_is_refused_for_that(monkeypatch):
    monkeypatch.setattr(plan, "_room", lambda device, planned: 10_000)
    with pytest.raises(
        OutOfMemory,
        match=r"ppo needs .* to sample, and .* lower `monitor.prompts` and, of a method of `rl`, `rl.defaults.episodes`, ",
    ):
        plan.check(made_up(cache=9_000), 500, SimpleNamespace(device=torch.device("cpu"), is_main_process=True), "ppo")


@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize("adapted", [False, True])
def test_the_copy_that_is_sampled_from_is_counted(adapted, half, tokenizer, monkeypatch):
    monkeypatch.setattr(models, "in_half", lambda device: half)
    adapter = Adapter(rank=2, alpha=4.0, targets="all", merge=False) if adapted else None
    model = models.to_learn(small_model(tokenizer), adapter, None)
    theirs = {p.data_ptr() for p in model.parameters()}
    copied = [p for p in models.sampler(model).parameters() if p.data_ptr() not in theirs]
    assert models.size_of_sampler(model) == sum(p.nbytes for p in copied)
    assert any(p.dtype == torch.bfloat16 for p in model.parameters()) == (adapted and half)
    full = models.to_learn(small_model(tokenizer), adapter, None, half=False)
    assert all(p.dtype == torch.float32 for p in full.parameters())


def test_memory_of_a_run_of_ppo(tokenizer):
    """Policy and value network learn, reference and reward model are held, episodes and watched prompts are sampled."""
    from test_training import rl_settings, scorer

    from rlhf_vs_dpo.language.generation import bytes_of_row
    from rlhf_vs_dpo.training import policy_gradient
    from rlhf_vs_dpo.training.learner import Networks

    policy, reference, reward = (
        Policy(small_model(tokenizer), 1.0),
        Policy(small_model(tokenizer), 1.0),
        scorer(tokenizer),
    )
    learner = policy_gradient.new_learner(Networks(policy, reference, reward), [], rl_settings("ppo", episodes=8), 6, 0)
    bytes_of = lambda network: sum(p.nbytes for p in network.parameters())  # noqa: E731
    for watch, row, asked in (
        (None, 10, 8),
        (SimpleNamespace(asked=100, longest=10), 10, 100),
        (SimpleNamespace(asked=1000, longest=30), 30, 256),
        (SimpleNamespace(asked=0, longest=0), 10, 8),
    ):
        found = policy_gradient.planned(learner, [[1, 5, 6, 7], [1, 5]], watch)
        assert found.weights == found.held == 2 * bytes_of(policy) + 2 * bytes_of(reward)
        assert found.gradients == bytes_of(policy) + bytes_of(reward) and found.longest == 10 and found.batch == 80
        assert found.cache == asked * bytes_of_row(policy.model, row)
    cache = 2 * 32 * 10 * 4  # keys and values of ten tokens in one layer, float32
    assert bytes_of_row(policy.model, 10) == cache + 32 * len(tokenizer)


@pytest.mark.parametrize("words", [3, 40])
def test_documents_of_ppo_ptx_are_counted(words, tokenizer):
    """PPO's gradients are kept beside what documents leave behind, which may be longer than episodes, or shorter."""
    from test_training import rl_settings, scorer

    from rlhf_vs_dpo.training import attempts, policy_gradient
    from rlhf_vs_dpo.training.learner import Networks

    policy, corpus = network(tokenizer, "llama"), [Tokens([1], [*[5 + i] * words, 2]) for i in range(8)]
    networks, settings = Networks(policy, policy, scorer(tokenizer)), {"episodes": 8, "ptx_batch": 8}
    prompts = [[1, 5, 6, 7], [1, 5]]
    ppo, learner = (
        policy_gradient.new_learner(networks, corpus, rl_settings(method, **settings), 12, 0)
        for method in ("ppo", "ppo_ptx")
    )
    alone, planned = (policy_gradient.planned(one, prompts) for one in (ppo, learner))
    for p in policy.parameters():
        p.grad = torch.zeros_like(p)
    found = at_most(lambda: attempts.accumulate_ptx(learner, list(range(8)), learner.memory.tokens))
    assert planned.activations == pytest.approx(max(found, alone.activations), rel=0.2)
    assert (planned.longest == words + 2) == (found > alone.activations) == (words == 40)


def test_what_is_sampled_while_a_policy_learns_from_pairs_is_counted(tokenizer, monkeypatch):
    """Of the DPO family, SFT and imitation: what is watched is sampled between steps."""
    from rlhf_vs_dpo.language.generation import bytes_to_sample

    policy, seen = Policy(small_model(tokenizer), 1.0), []
    monkeypatch.setattr(plan, "check", lambda planned, tokens, *_: seen.append(planned) or tokens)
    watch = SimpleNamespace(asked=40, longest=60, watch=lambda *_: None)
    for heldout in (None, watch):
        record = Record(lambda *_: None, "sft", heldout)
        supervised.likelihood(policy, Examples(TEXTS, list("abcdefgh")), ONCE, 0, record)
    assert [planned.cache for planned in seen] == [0, bytes_to_sample(policy.model, 40, 60)]
    assert seen[1].cache > 40 * 60 * 2 * 32 * 4  # keys and values in one layer of width 32, float32


@pytest.mark.parametrize("method", ["ppo", "trpo"])
def test_the_value_network_computes_again_where_the_policy_does(method, tokenizer):
    """`memory.gradient_checkpointing` is of all that learns: the same gradients, fewer bytes."""
    from test_training import rl_settings, scorer

    from rlhf_vs_dpo.language.text import collate
    from rlhf_vs_dpo.training import policy_gradient
    from rlhf_vs_dpo.training.learner import Networks
    from rlhf_vs_dpo.training.rollouts import state_values

    kept, slopes = [], []
    for again in (False, True):
        policy = network(tokenizer, "llama")
        models.to_learn(policy.model, None, Memory(gradient_checkpointing=again, sharding=False))
        reward = scorer(tokenizer, layers=4)
        networks = Networks(policy, policy, reward)
        value = policy_gradient.new_learner(networks, [], rl_settings(method), 44, 0).critic.network
        assert not models.recomputing(reward)
        forward = lambda value=value: state_values(value, collate(TEXTS, value.pad)).square().sum()  # noqa: E731
        kept.append(plan.kept(forward, torch.device("cpu"), {p.data_ptr() for p in value.parameters()}))
        slopes.append(
            torch.autograd.grad(forward(), [p for p in value.parameters() if p.requires_grad], allow_unused=True)
        )
    assert kept[1] < 0.5 * kept[0]
    for plain, recomputed in zip(*slopes, strict=True):
        assert (plain is None) == (recomputed is None) and (plain is None or torch.equal(plain, recomputed))


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@pytest.mark.parametrize("adapted", [False, True])
@pytest.mark.parametrize("share", [0.1, 1.0])
def test_memory_of_a_step_of_trpo(kind, adapted, share, tokenizer):
    """The graphs of all its Fisher episodes, the old policy, and the vectors of the conjugate gradient."""
    from test_training import rl_settings, scorer

    from rlhf_vs_dpo.training import attempts, policy_gradient
    from rlhf_vs_dpo.training.learner import Networks
    from rlhf_vs_dpo.training.rollouts import Episodes

    policy = network(tokenizer, kind)
    models.to_learn(
        policy.model, Adapter(rank=8, alpha=16.0, targets="all", merge=False) if adapted else None, None, half=False
    )
    settings = rl_settings("trpo").model_copy(update={"episodes": 32, "fisher_share": share, "cg_steps": 2})
    learner = policy_gradient.new_learner(Networks(policy, policy, scorer(tokenizer)), [], settings, 44, 0)
    planned = policy_gradient.planned(learner, [text.prompt for text in TEXTS[:2]])
    empty, ones = torch.zeros(0), torch.ones(32 * 44)
    episodes = Episodes(
        TEXTS * 4, [str(i) for i in range(32)], list(range(32)), torch.arange(33) * 44, ones, ones, ones, empty, empty, ones, ones.cumsum(0), ones
    )  # fmt: skip
    found = at_most(lambda: attempts._trust_region(learner, episodes))
    learned = sum(p.nbytes for p in policy.parameters() if p.requires_grad)
    assert (planned.curvature > planned.activations) == (share == 1.0)
    assert found == pytest.approx(4 * learned + max(planned.activations, planned.curvature), rel=0.2)
    assert planned.weights - planned.held == learned  # the old policy


def test_what_differentiates_too_much_twice_is_refused_for_that(monkeypatch):
    monkeypatch.setattr(plan, "_room", lambda device, planned: 10_000)
    with pytest.raises(
        OutOfMemory, match=r"trpo needs .* for its products with the Fisher matrix, .* lower `rl.trpo.fisher_share`, "
    ):
        plan.check(
            made_up(curvature=9_000), 500, SimpleNamespace(device=torch.device("cpu"), is_main_process=True), "trpo"
        )
