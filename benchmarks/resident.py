"""The plan of memory against what a process then holds, on a CPU: SFT of 3, 30 and 135 M weights, with all weights and with adapters.

    python benchmarks/resident.py

Each model in a process of its own: its resident memory before there is a model is taken off the most that it ever held. A batch is as large as
one micro-batch of the plan. "as it is": glibc keeps blocks that were freed, for later. "given back": with MALLOC_MMAP_THRESHOLD_=1000000 it
returns them to the system at once.
"""

import json
import os
import resource
import subprocess
import sys
from pathlib import Path
from typing import Annotated

import typer

HERE = Path(__file__).parent
SIZES, LENGTH = (3, 30, 135), 64
GIVEN_BACK = {"MALLOC_MMAP_THRESHOLD_": "1000000"}


def one(millions: float, adapted: bool) -> dict[str, int]:
    """Bytes that were planned, and that were held."""
    from rlhf_vs_dpo.run import arithmetic

    arithmetic.fix()
    import growth
    import psutil
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from rlhf_vs_dpo.config import Adapter, Training
    from rlhf_vs_dpo.language import models
    from rlhf_vs_dpo.language.logprobs import Policy
    from rlhf_vs_dpo.language.text import Examples, Tokens
    from rlhf_vs_dpo.run.progress import Record
    from rlhf_vs_dpo.training import plan, supervised

    torch.randn(512, 512) @ torch.randn(512, 512)  # libraries take what they need
    before = psutil.Process().memory_info().rss
    layers, width, wide, shared, feed, words = growth.SHAPES[millions]
    made = LlamaConfig(
        vocab_size=words, hidden_size=width, intermediate_size=feed, num_hidden_layers=layers, num_attention_heads=wide,
        num_key_value_heads=shared, max_position_embeddings=128, tie_word_embeddings=True, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    model = LlamaForCausalLM(made).eval()
    adapter = Adapter(rank=16, alpha=32.0, targets="all", merge=False) if adapted else None
    policy, planned, check = Policy(models.to_learn(model, adapter, None), 1.0), [], plan.check

    def noted(given: plan.Plan, *rest):
        planned.append(given.total)
        return check(given, *rest)

    plan.check = noted
    count = policy.budget // LENGTH
    ids = torch.randint(3, words, (2 * count, LENGTH)).tolist()
    rows = Examples([Tokens([1, *row[1:16]], row[16:]) for row in ids], [str(i) for i in range(2 * count)])
    settings = Training(
        steps=2, batch=count, learning_rate=1e-4, schedule="constant", warmup=0.0, weight_decay=0.0, max_grad_norm=1.0, adam_epsilon=1e-8
    )  # fmt: skip
    supervised.likelihood(policy, rows, settings, 0, Record(lambda *_: None, "sft"))
    return {"plan": planned[0], "held": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before}


def main(single: Annotated[str, typer.Option(hidden=True)] = "") -> None:
    """Print a table."""
    if single:
        millions, adapted = json.loads(single)
        print(json.dumps(one(millions, adapted)))
        return
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(HERE.parent / "src"), str(HERE)])}
    print(
        f"{'weights':>8} {'learns':12} {'plan MiB':>9} {'as it is':>9} {'plan / it':>9} {'given back':>10} {'plan / it':>9}"
    )
    for millions in SIZES:
        for adapted in (False, True):
            row = f"{millions:>6} M {'adapters' if adapted else 'all weights':12} "
            for number, more in enumerate(({}, GIVEN_BACK)):
                command = [sys.executable, __file__, "--single", json.dumps([millions, adapted])]
                done = subprocess.run(command, env=environment | more, capture_output=True, text=True, check=False)
                if done.returncode:
                    raise SystemExit(done.stderr[-3000:])
                found = json.loads(done.stdout.splitlines()[-1])
                if not number:
                    row += f"{found['plan'] / 2**20:>9.0f} "
                row += f"{found['held'] / 2**20:>{9 + number}.0f} {found['plan'] / found['held']:>9.2f} "
            print(row, flush=True)


if __name__ == "__main__":
    typer.run(main)
