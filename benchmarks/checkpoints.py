"""What a checkpoint costs: seconds and bytes, of DPO and of PPO, at the size of the built-in model and at 135 M parameters.

    python benchmarks/checkpoints.py

Weights are random; what is written is what training writes (run/checkpoint.py): the policy with AdamW's two moments, and for PPO the value
network with its own. Read back, it is what it was. "disk" is the same number of bytes written and flushed by themselves.
"""

import os
import tempfile
import time
from pathlib import Path

import typer

from rlhf_vs_dpo.run import arithmetic

SIZES = {
    "0.33 M": {"vocab_size": 160, "hidden_size": 96, "intermediate_size": 256, "num_hidden_layers": 3, "num_attention_heads": 4},
    "135 M": {"vocab_size": 49152, "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "num_attention_heads": 9,
              "num_key_value_heads": 3},
}  # fmt: skip
ROUNDS = 3


def main() -> None:
    """Print a table."""
    os.chdir(tempfile.mkdtemp(prefix="rlhf-"))
    print(f"{'model':8} {'method':7} {'parameters':>12} {'bytes':>15} {'write s':>8} {'disk s':>7} {'read s':>7}")
    for name, shape in SIZES.items():
        for method, networks in (("dpo", 1), ("ppo", 2)):
            print(f"{name:8} {method:7} " + measured(shape, networks), flush=True)


def measured(shape: dict, networks: int) -> str:
    import numpy as np
    import torch

    from rlhf_vs_dpo.run.checkpoint import of_stage

    parts = {f"network{number}": network(shape) for number in range(networks)}
    writes, reads, disk = [], [], []
    for _ in range(ROUNDS):
        kept = of_stage("x", {}, [], 0.0, "a", None)
        kept.keep(**parts)
        began = time.perf_counter()
        kept.save()
        writes.append(time.perf_counter() - began)
        files = [path for path in sorted(kept.folder.glob("[0-9]*"))[-1].iterdir() if path.is_file()]
        size = sum(path.stat().st_size for path in files)
        kept.close()
        again = {name: network(shape) for name in parts}
        began = time.perf_counter()
        other = of_stage("x", {}, [], 0.0, "a", None)
        other.keep(**again)
        reads.append(time.perf_counter() - began)
        for name, of in parts.items():
            for ours, theirs in zip(of.module.parameters(), again[name].module.parameters(), strict=True):
                assert torch.equal(ours, theirs)
        other.done()
        disk.append(alone(size))
    parameters = sum(p.numel() for of in parts.values() for p in of.module.parameters())
    times = " ".join(f"{np.median(of):{width}.3f}" for of, width in ((writes, 8), (disk, 7), (reads, 7)))
    return f"{parameters:12,} {size:15,} {times}"


def network(shape: dict):
    """A network and its optimiser after a step, as one part."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from rlhf_vs_dpo.config import Training
    from rlhf_vs_dpo.training.optimise import Optimiser, accelerator

    class Part:
        def __init__(self):
            self.module = LlamaForCausalLM(LlamaConfig(**shape, tie_word_embeddings=True))
            settings = Training(
                steps=1, batch=1, learning_rate=1e-4, schedule="constant", warmup=0.0, weight_decay=0.0, max_grad_norm=1.0,
                adam_epsilon=1e-8,
            )  # fmt: skip
            self.optimiser = Optimiser(accelerator(), self.module, settings)
            for parameter in self.module.parameters():
                parameter.grad = torch.randn_like(parameter)
            self.optimiser.step(0.0, ["x"])

        def state_dict(self):
            return {"weights": self.module.state_dict(), "optimiser": self.optimiser.state_dict()}

        def load_state_dict(self, state):
            self.module.load_state_dict(state["weights"])
            self.optimiser.load_state_dict(state["optimiser"])

    return Part()


def alone(size: int) -> float:
    """Seconds to write and flush so many bytes."""
    block = os.urandom(2**20)
    began = time.perf_counter()
    with Path("alone").open("wb") as file:
        for _ in range(size // len(block) + 1):
            file.write(block)
        file.flush()
        os.fsync(file.fileno())
    took = time.perf_counter() - began
    Path("alone").unlink()
    return took


if __name__ == "__main__":
    arithmetic.fix()
    typer.run(main)
