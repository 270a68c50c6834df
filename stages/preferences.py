"""Make preference pairs: two samples from the SFT policy, chosen by the simulated annotator; or the data set's own pairs."""

from pathlib import Path
from typing import Annotated

import typer

from rlhf_vs_dpo.run import frame, launch


def main(
    seed: Annotated[int, typer.Option(help="Line that this is of: the seed of all that is random here.")],
    sft: Annotated[Path, typer.Option(help="Policy to sample from.")],
    prompts: Annotated[Path, typer.Option(help="Prompts; those of train and validation are used.")],
    dataset_pairs: Annotated[Path, typer.Option(help="Pairs that the data set brought.")],
    world: Annotated[Path, typer.Option(help="Folder of the gold reward.")],
    out: Annotated[Path, typer.Option(help="Where the pairs go.")],
    metrics: Annotated[Path, typer.Option(help="What the pairs are like.")],
    run_file: Annotated[Path, typer.Option("--run", help="MLflow run id and cost.")],
) -> None:
    """Write `pairs`: of train (to learn from) and of validation (to measure the reward model on)."""
    with frame.stage(f"preferences@{seed}", [sft, prompts], run_file, [dataset_pairs, world], seed=str(seed)) as run:
        import pandas as pd

        from rlhf_vs_dpo import tables
        from rlhf_vs_dpo.errors import DataError
        from rlhf_vs_dpo.preferences import gold

        settings = run.section("preferences")
        if settings.source == "dataset":
            pairs = tables.read_table(dataset_pairs, "dataset_pairs")
            if not len(pairs):
                raise DataError(
                    f"{dataset_pairs}: the source brought no pairs; set `preferences.source: annotator` in params.yaml"
                )
            pairs = pairs[pairs["split"] != "test"].reset_index(drop=True)
            summary = {}
        else:
            judge = gold.load(world)
            if judge is None:
                raise DataError(
                    "the source has no gold reward for the annotator to choose by; set `preferences.source: dataset` in params.yaml"
                )
            from rlhf_vs_dpo.language import models
            from rlhf_vs_dpo.language.logprobs import Policy
            from rlhf_vs_dpo.preferences import labelling

            sampling = run.section("sampling")
            model, tokenizer = models.load_policy(sft)
            drawn = labelling.two_samples(
                Policy(model, sampling.temperature), tokenizer,
                pd.concat([tables.read_table(prompts, "prompts", "train").head(settings.train_prompts),
                           tables.read_table(prompts, "prompts", "validation").head(settings.validation_prompts)]),
                sampling.max_new_tokens, seed, "two samples per prompt", run.checkpoint.pieces("responses"),
            )  # fmt: skip
            run.spent(
                parameters=models.size(model), tokens_generated=drawn.tokens_generated, tokens_read=drawn.tokens_read, models_held=1
            )  # fmt: skip
            pairs, summary = labelling.label(drawn.table, judge, settings.annotator, seed)
            summary = {"tokenised_otherwise_share": drawn.tokenised_otherwise_share} | summary
        for split in ("train", "validation"):
            if not (pairs["split"] == split).any():
                raise DataError(
                    f"{out}: no pair has split {split!r}; give the source more prompts (`data` in params.yaml)"
                )
        tables.write_table(pairs, "pairs", out)
        run.finish(
            {"pairs": {split: int((pairs["split"] == split).sum()) for split in ("train", "validation")}} | summary,
            metrics,
        )


if __name__ == "__main__":
    launch.command(main)
