"""Optimise the SFT policy directly on preference pairs: DPO, LN-DPO, SimPO."""

from pathlib import Path
from typing import Annotated

import typer

from rlhf_vs_dpo import launch, tracking


def main(
    method: Annotated[str, typer.Option(help="Entry of `preference` in params.yaml.")],
    seed: Annotated[int, typer.Option(help="Seed of this cell.")],
    sft: Annotated[Path, typer.Option(help="Policy to start from.")],
    pairs: Annotated[Path, typer.Option(help="Preference pairs.")],
    reference: Annotated[Path, typer.Option(help="log pi_ref of the pairs; opened only by losses that need it.")],
    prompts: Annotated[Path, typer.Option(help="Prompts of validation, to watch.")],
    world: Annotated[Path, typer.Option(help="Folder of the gold reward, to watch.")],
    out: Annotated[Path, typer.Option(help="Where the policy goes.")],
    heldout: Annotated[Path, typer.Option(help="Samples taken while training.")],
    metrics: Annotated[Path, typer.Option(help="Final metrics.")],
    curves: Annotated[Path, typer.Option(help="Training curve.")],
    run_file: Annotated[Path, typer.Option("--run", help="MLflow run id and cost.")],
) -> None:
    """One loop, one loss each; no reward model and no sampling is part of it."""
    launch.on_all_devices()
    tags = {"family": "preference", "method": method, "seed": str(seed), "policy": f"{method}-{seed}"}
    with tracking.stage(f"preference@{method}-{seed}", [sft, pairs, reference], run_file, **tags) as run:
        import torch

        from rlhf_vs_dpo import gold, models, schemas, text
        from rlhf_vs_dpo.logprobs import Policy
        from rlhf_vs_dpo.training import preference
        from rlhf_vs_dpo.training.monitor import HeldOut

        settings, sampling = run.section("preference", method), run.section("sampling")
        torch.manual_seed(seed)
        model, tokenizer = models.load_policy(sft)
        start, _ = models.load_policy(sft)  # to measure KL at the watched points; the loss never sees it
        train = schemas.read_table(pairs, "pairs", "train")
        stored = None
        if preference.NEEDS_REFERENCE[settings.loss]:
            stored = preference.stored_reference(train, schemas.read_table(reference, "reference"), reference)
        watched = HeldOut(
            schemas.read_table(prompts, "prompts", "validation"), gold.load(world), start, tokenizer,
            run.section("monitor"), sampling, run.seed, preference.schedule(settings, len(train)).steps,
        )  # fmt: skip
        chosen, rejected = (
            text.encode(tokenizer, train["prompt"], train[side], train["pair_id"], models.context_of(model))
            for side in ("chosen", "rejected")
        )
        trained = preference.train(
            Policy(model, sampling.temperature), chosen, rejected, list(train["pair_id"]), stored,
            tokenizer.pad_token_id, settings, seed, watched, run.log, method,
        )  # fmt: skip
        run.spent(tokens_trained=trained, tokens_generated=0)
        if launch.is_main():
            models.save(model, tokenizer, out)
            schemas.write_table(watched.table(), "heldout", heldout)
            run.curve(curves)
            run.finish(run.rows[-1] | watched.final(), metrics, int(run.rows[-1]["step"]))


if __name__ == "__main__":
    typer.run(main)
