"""DPO training throughput: this project against TRL, on the same model, pairs, batch and machine, in one run.

Ours is timed with its reference pass; TRL precomputes reference log-probabilities and is timed with that pass as well.
Each is warmed up, then both are run in turn, `--rounds` times; the median is printed.
"""

import copy
import statistics
import tempfile
import time
from pathlib import Path
from typing import Annotated

import torch
import typer

from rlhf_vs_dpo import config, tables
from rlhf_vs_dpo.language import models, text
from rlhf_vs_dpo.language.forward import log_likelihoods
from rlhf_vs_dpo.language.logprobs import Policy
from rlhf_vs_dpo.training import preference, supervised
from rlhf_vs_dpo.training.monitor import Record


class NoWatch:
    """No held-out sampling: training alone is timed."""

    def watch(self, policy, step, log):
        pass


def ours(model, tokenizer, pairs, settings) -> None:
    policy = Policy(copy.deepcopy(model), 1.0)
    encoded = text.encode_pairs(tokenizer, pairs, 256)
    reference = pairs[["pair_id"]].assign(
        chosen_logp=log_likelihoods(policy, encoded.chosen), rejected_logp=log_likelihoods(policy, encoded.rejected)
    )
    steps = supervised.steps_over(settings, len(pairs))
    preference.train(policy, encoded, reference, settings, steps, 0, Record(NoWatch(), lambda m, s: None, "ours"))


def trl(model, tokenizer, pairs, settings) -> None:
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer

    with tempfile.TemporaryDirectory() as folder:
        arguments = DPOConfig(
            output_dir=folder, per_device_train_batch_size=settings.batch, num_train_epochs=1, learning_rate=settings.learning_rate,
            beta=settings.beta, max_length=256, precompute_ref_log_probs=True, precompute_ref_batch_size=256, bf16=False,
            gradient_checkpointing=False, use_cpu=not torch.cuda.is_available(), report_to="none", save_strategy="no", disable_tqdm=True,
            logging_steps=1000, dataloader_drop_last=True,
        )  # fmt: skip
        rows = Dataset.from_pandas(pairs[["prompt", "chosen", "rejected"]], preserve_index=False)
        DPOTrainer(model=copy.deepcopy(model), args=arguments, train_dataset=rows, processing_class=tokenizer).train()


def matrix_rate(size: int = 2048) -> float:
    """float32 matrix products of this machine, GFLOP/s."""
    a = torch.randn(size, size, device=models.device())
    a @ a
    started = time.perf_counter()
    for _ in range(5):
        b = a @ a
    float(b[0, 0])
    return 5 * 2 * size**3 / (time.perf_counter() - started) / 1e9


def main(
    count: Annotated[int, typer.Option(help="Pairs.")] = 1920,
    rounds: Annotated[int, typer.Option(help="Times each is run.")] = 3,
) -> None:
    """Print pairs per second of both, and their ratio."""
    model, tokenizer = models.load_policy(Path("models/sft-0"))
    pairs = tables.read_table(Path("data/pairs-0.parquet"), "pairs", "train").head(count)
    settings = config.section(config.read_params(), "preference", "dpo").model_copy(update={"epochs": 1.0})
    rates: dict[str, list[float]] = {"ours": [], "trl": []}
    for number in range(rounds + 1):
        for name, run in (("ours", ours), ("trl", trl)):
            rows = pairs.head(settings.batch * 2) if number == 0 else pairs  # the first is a warm-up
            started = time.perf_counter()
            run(model, tokenizer, rows, settings)
            if number:
                rates[name].append(len(rows) / (time.perf_counter() - started))
    medians = {name: statistics.median(values) for name, values in rates.items()}
    print(
        f"\nmachine {matrix_rate():.0f} GFLOP/s float32, {torch.get_num_threads()} threads; {len(pairs)} pairs, batch {settings.batch}"
    )
    for name, values in rates.items():
        print(f"{name:5} {medians[name]:7.1f} pairs/s   (runs: {', '.join(f'{value:.1f}' for value in values)})")
    print(f"ratio {medians['ours'] / medians['trl']:.2f}")


if __name__ == "__main__":
    typer.run(main)
