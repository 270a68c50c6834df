"""Fine-tune the base model on demonstrations: the reference policy of everything after it."""

from pathlib import Path
from typing import Annotated

import typer

from rlhf_vs_dpo import launch, tracking


def main(
    base: Annotated[Path, typer.Option(help="Model to start from.")],
    demonstrations: Annotated[Path, typer.Option(help="Prompts with responses to imitate.")],
    out: Annotated[Path, typer.Option(help="Where the SFT policy goes.")],
    metrics: Annotated[Path, typer.Option(help="Final metrics.")],
    curves: Annotated[Path, typer.Option(help="Training curve.")],
    run_file: Annotated[Path, typer.Option("--run", help="MLflow run id and cost.")],
) -> None:
    """Maximum likelihood of the demonstrations, on response tokens only."""
    launch.on_all_devices()
    with tracking.stage("sft", [base, demonstrations], run_file, method="sft", family="sft", policy="sft") as run:
        import torch

        from rlhf_vs_dpo import models, schemas, text
        from rlhf_vs_dpo.logprobs import Policy
        from rlhf_vs_dpo.training import forward, supervised

        settings, sampling = run.section("sft"), run.section("sampling")
        torch.manual_seed(run.seed)
        model, tokenizer = models.load_policy(base)
        policy, pad, context = Policy(model, sampling.temperature), tokenizer.pad_token_id, models.context_of(model)

        def encoded(split: str):
            frame = schemas.read_table(demonstrations, "demonstrations", split)
            return text.encode(tokenizer, frame["prompt"], frame["response"], frame["prompt_id"], context), list(
                frame["prompt_id"]
            )

        heldout, _ = encoded("validation")
        examples, names = encoded("train")

        def nll() -> float:
            tokens = sum(len(example.response) for example in heldout)
            return -sum(forward.log_likelihoods(policy, heldout, pad, "validation")) / tokens

        before = nll()
        trained = supervised.likelihood(policy, examples, names, pad, settings.training, run.seed, run.log, "sft")
        run.spent(parameters=models.size(model), tokens_trained=trained, models_held=1)
        if launch.is_main():
            after = nll()
            models.save(model, tokenizer, out)
            run.curve(curves)
            run.finish({"nll_per_token_before": before, "nll_per_token": after}, metrics, settings.training.steps)


if __name__ == "__main__":
    typer.run(main)
