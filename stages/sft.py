"""Fine-tune the base model on demonstrations: the reference policy of everything after it."""

from pathlib import Path
from typing import Annotated

import typer

from rlhf_vs_dpo.run import frame, launch


def main(
    seed: Annotated[int, typer.Option(help="Line that this is of: the seed of all that is random here.")],
    base: Annotated[Path, typer.Option(help="Model to start from.")],
    demonstrations: Annotated[Path, typer.Option(help="Prompts with responses to imitate.")],
    out: Annotated[Path, typer.Option(help="Where the SFT policy goes.")],
    metrics: Annotated[Path, typer.Option(help="Final metrics.")],
    curves: Annotated[Path, typer.Option(help="Training curve.")],
    run_file: Annotated[Path, typer.Option("--run", help="MLflow run id and cost.")],
) -> None:
    """Maximum likelihood of the demonstrations, on response tokens only."""
    launch.on_all_devices()
    tags = {"family": "sft", "method": "sft", "seed": str(seed), "policy": f"sft-{seed}"}
    with frame.stage(f"sft@{seed}", [base, demonstrations], run_file, **tags) as run:
        import torch

        from rlhf_vs_dpo import tables
        from rlhf_vs_dpo.language import forward, models, text
        from rlhf_vs_dpo.language.logprobs import Policy
        from rlhf_vs_dpo.run.progress import Record
        from rlhf_vs_dpo.training import supervised

        settings, sampling = run.section("sft"), run.section("sampling")
        torch.manual_seed(seed)
        model, tokenizer = models.load_learner(base, run.section("adapter"), run.section("memory"))
        policy = Policy(model, temperature=1.0)  # likelihood is the model's own: at T it would learn to undo T

        def encoded(split: str) -> text.Examples:
            rows = tables.read_table(demonstrations, "demonstrations", split)
            names = rows["prompt_id"]
            tokens = text.encode(tokenizer, rows["prompt"], rows["response"], names, policy.context)
            return text.Examples(tokens, list(names))

        heldout, examples = encoded("validation").tokens, encoded("train")

        def nll() -> float:
            tokens = sum(len(example.response) for example in heldout)
            return -sum(forward.log_likelihoods(policy, heldout, "validation")) / tokens

        before = nll()
        run.checkpoint.keep(policy=policy)
        trained = supervised.likelihood(
            policy, examples, settings.training, seed, Record(run.log, "sft", checkpoint=run.checkpoint)
        )
        run.spent(
            parameters=models.size(policy.model),
            frozen=models.frozen(policy.model),
            tokens_trained=trained,
            models_held=1,
        )
        if launch.is_main():
            after = nll()
            models.sampled_at(policy.model, sampling.temperature)
            # Whole, for the adapters of everything after it are attached to it.
            models.save(policy.model, tokenizer, out, base, merge=True)
            run.curve(curves)
            run.finish({"nll_per_token_before": before, "nll_per_token": after}, metrics, settings.training.steps)


if __name__ == "__main__":
    launch.command(main)
