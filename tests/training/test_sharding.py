"""Networks in parts on two processes train as whole ones on one: five steps of SFT, DPO and PPO in float32, micro-batches uneven."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import WORDS, small_model
from test_training import rl_settings, scorer, variant

from rlhf_vs_dpo.config import Training
from rlhf_vs_dpo.errors import ModelError, TrainingError
from rlhf_vs_dpo.language import models, sharding
from rlhf_vs_dpo.language.forward import log_likelihoods
from rlhf_vs_dpo.language.logprobs import Policy
from rlhf_vs_dpo.language.text import Examples, Pairs, Prompts, Tokens, collate, word_tokenizer
from rlhf_vs_dpo.run.progress import Record
from rlhf_vs_dpo.training import optimise, policy_gradient, preference, supervised
from rlhf_vs_dpo.training.learner import Networks

LOOPS = ["sft", "dpo", "ppo"]
TRAINING = Training(
    steps=5, batch=8, learning_rate=3e-3, schedule="constant", warmup=0.0, weight_decay=0.1, max_grad_norm=0.5, adam_epsilon=1e-8
)  # fmt: skip


def texts(seed: int, eos: int) -> list[Tokens]:
    """Forty of very different lengths, so that one process has more micro-batches than the other."""
    draw = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, 30, (40,), generator=draw).tolist()
    return [
        Tokens([1, 5 + i % 5], [*torch.randint(4, 15, (n,), generator=draw).tolist(), eos])
        for i, n in enumerate(lengths)
    ]


def losses(loop: str) -> tuple[list[float], dict[str, torch.Tensor]]:
    """Loss and gradient norm of each step, and the weights in the end; run on whatever processes there are."""
    tokenizer = word_tokenizer(WORDS)
    rows: list[dict] = []
    policy = Policy(small_model(tokenizer, scale=1.5), 1.0)
    policy.model.shard = True
    log = lambda values, step: rows.append(values)  # noqa: E731
    chosen, rejected = texts(0, tokenizer.eos_token_id), texts(1, tokenizer.eos_token_id)
    names = [str(i) for i in range(40)]
    if loop == "sft":
        supervised.likelihood(policy, Examples(chosen, names), TRAINING, 0, Record(log, loop))
        names = ["loss", "gradient_norm"]
    elif loop == "dpo":
        import pandas as pd

        pairs = Pairs(chosen, [Tokens(a.prompt, b.response) for a, b in zip(chosen, rejected, strict=True)], names)
        known = pd.DataFrame({f"{s}_logp": log_likelihoods(policy, getattr(pairs, s)) for s in ("chosen", "rejected")})
        settings = variant("dpo").model_copy(
            update={"batch": 8, "learning_rate": 3e-3, "warmup": 0.0, "schedule": "constant"}
        )
        preference.train(policy, pairs, known, settings, 5, 0, Record(log, loop))
        names = ["loss", "gradient_norm", "pairs/accuracy"]
    else:
        reference = Policy(small_model(tokenizer, scale=1.5), 1.0)
        prompts = Prompts([t.prompt for t in chosen], names)
        settings = rl_settings("ppo", iterations=3, episodes=8, epochs=2, minibatches=2, learning_rate=1e-3)
        corpus = [Tokens([1], t.response) for t in rejected]
        settings = settings.model_copy(update={"ptx_coefficient": 0.1, "ptx_batch": 4})
        policy_gradient.train(
            Networks(policy, reference, scorer(tokenizer)),
            prompts,
            corpus,
            settings,
            20,
            0,
            Record(log, loop),
        )
        names = ["update/policy_loss", "update/policy_gradient_norm", "update/value_loss", "update/kl_old_new", "rollout/objective",
                 "update/ptx_gradient_share"]  # fmt: skip
    assert not sharding.sharded(policy.model)
    return [row[name] for row in rows for name in names], policy.model.state_dict()


def on_processes(count: int, *words: str) -> None:
    """Run this file on so many processes."""
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={count}", "--standalone", "--local-addr=127.0.0.1", __file__, *words],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=300,
        check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.fixture(scope="module")
def together(tmp_path_factory) -> Path:
    """What two processes found, in a folder for each loop."""
    folder = tmp_path_factory.mktemp("together")
    on_processes(2, str(folder))
    return folder


@pytest.mark.parametrize("loop", LOOPS)
def test_two_processes_with_a_part_each_train_as_one_with_all(loop, together, monkeypatch):
    monkeypatch.setattr(Policy, "budget", 40)  # tokens of a micro-batch: some processes have more of them than others
    alone, weights = losses(loop)
    for rank in (0, 1):
        found = json.loads((together / loop / f"{rank}.json").read_text())
        assert found == pytest.approx(alone, rel=2e-4, abs=2e-5)
        whole = torch.load(together / loop / f"{rank}.pt")
        assert whole.keys() == weights.keys()
        for name, value in weights.items():
            torch.testing.assert_close(whole[name], value, rtol=1e-3, atol=1e-5)
    held, all_of_it = json.loads((together / loop / "held.json").read_text())
    assert held < 0.6 * all_of_it  # each process holds half of what learns, padded to equal shares
    assert len({*json.loads((together / loop / "counts.json").read_text())}) > 1  # micro-batches were uneven


def in_half() -> None:
    """A forward pass in parts in bf16, as a GPU makes it, keeps no weights for the backward pass; alone in its process."""
    torch.distributed.init_process_group("gloo")
    models.in_half = lambda device: True
    tokenizer = word_tokenizer(WORDS)
    whole, parts = (Policy(small_model(tokenizer, scale=1.5), 1.0) for _ in range(2))
    root = sharding.shard(parts)
    batch = collate(texts(0, tokenizer.eos_token_id)[:4], whole.pad)
    with models.autocast(torch.device("cpu")):
        expected = whole(batch)
    found = root(batch)
    assert torch.allclose(found.logp, expected.logp, atol=0.1) and found.logp.dtype == torch.float32
    assert not torch.equal(found.logp, Policy(small_model(tokenizer, scale=1.5), 1.0)(batch).logp)
    sizes = {p.numel() for layer in whole.model.model.layers for p in layer.parameters() if p.ndim == 2}
    kept: list[torch.Tensor] = []
    keep = lambda tensor: kept.append(tensor) or tensor  # noqa: E731
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        found = root(batch)
    weights = [
        tensor for tensor in kept if tensor.dtype == torch.bfloat16 and tensor.numel() in sizes and tensor.ndim == 2
    ]
    assert sum(tensor.untyped_storage().nbytes() for tensor in weights) == 0, len(weights)
    (-found.sums().sum()).backward()
    assert all(p.grad.dtype == torch.float32 for p in root.parameters() if p.grad is not None)


def test_in_bf16_no_layer_stays_whole_until_the_backward_pass():
    on_processes(1, "half")


def test_what_cannot_be_in_parts_is_refused_by_name(tokenizer, monkeypatch):
    from rlhf_vs_dpo.config import Adapter
    from rlhf_vs_dpo.language import adapters

    monkeypatch.setenv("WORLD_SIZE", "2")
    adapted = Policy(
        adapters.attach(small_model(tokenizer), Adapter(rank=2, alpha=4.0, targets="all", merge=False)), 1.0
    )
    with pytest.raises(ModelError, match=r"`memory\.sharding` and `adapter`"):
        sharding.shard(adapted)
    policy = Policy(models.to_learn(small_model(tokenizer), None, None), 1.0)
    policy.model.shard = True
    with pytest.raises(TrainingError, match=r"TRPO.*`memory\.sharding: false`"):
        policy_gradient.new_learner(Networks(policy, policy, scorer(tokenizer)), [], rl_settings("trpo"), 4, 0)


def main(folder: Path) -> None:
    """All loops, on one of two processes."""
    Policy.budget = 40
    rank, shard, share = os.environ["RANK"], sharding.shard, optimise.micro_batches
    held: list[list[int]] = []
    counts: list[int] = []

    def seen(network):
        root = shard(network)
        if isinstance(network, Policy) and not held:
            held.append(
                [sum(sharding.local(p).numel() for p in root.parameters()), sum(p.numel() for p in root.parameters())]
            )
        return root

    def noted(lengths, tokens, at_least=1):
        groups = share(lengths, tokens, at_least)
        counts.append(len(groups))
        return groups

    sharding.shard, optimise.micro_batches = seen, noted
    for loop in LOOPS:
        held.clear()
        counts.clear()
        rows, weights = losses(loop)
        (folder / loop).mkdir(exist_ok=True)
        (folder / loop / f"{rank}.json").write_text(json.dumps(rows))
        torch.save(weights, folder / loop / f"{rank}.pt")
        if rank == "0":
            (folder / loop / "held.json").write_text(json.dumps(held[0]))
            (folder / loop / "counts.json").write_text(json.dumps(counts))


if __name__ == "__main__":
    in_half() if sys.argv[1] == "half" else main(Path(sys.argv[1]))
