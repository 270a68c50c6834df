"""Measure all policies at once: the statistics are paired over prompts."""

from pathlib import Path
from typing import Annotated

import typer

from rlhf_vs_dpo import tracking


def main(
    samples: Annotated[Path, typer.Option(help="Folder of samples and retention tables, one of each per policy.")],
    prompts: Annotated[Path, typer.Option(help="Prompts, for the facts that a gold reward needs.")],
    demonstrations: Annotated[Path, typer.Option(help="Scored held-out demonstrations.")],
    world: Annotated[Path, typer.Option(help="Folder of the gold reward.")],
    curves: Annotated[Path, typer.Option(help="Folder of the held-out curves, to be added to the MLflow runs.")],
    runs: Annotated[Path, typer.Option(help="Folder of the MLflow run ids.")],
    out: Annotated[Path, typer.Option(help="Where the metrics of all policies go.")],
) -> None:
    """Write {policy: {metric: {mean, low, high}}}, and add the means to each policy's MLflow run."""
    with tracking.stage("evaluate", [prompts]) as run:
        import pandas as pd

        from rlhf_vs_dpo import config, gold, schemas
        from rlhf_vs_dpo.evaluation import measure

        settings = run.section("evaluate")
        names = config.policy_names(run.section("policies"), run.section("seeds"))
        tables = {folder: schemas.read_table(samples / f"{folder}.parquet", "samples") for folder in names}
        kept = {folder: schemas.read_table(samples / f"{folder}-retention.parquet", "retention") for folder in names}
        demos = schemas.read_table(demonstrations, "demonstration_scores", "test")
        asked = demos.merge(
            schemas.read_table(prompts, "prompts")[["prompt_id", "prompt", "facts"]], on="prompt_id", how="left"
        )
        demos = demos.join(gold.columns(gold.load(world), asked["prompt"], asked["facts"], demos["response"]))
        bootstrap = measure.Bootstrap.of(tables["sft"], kept["sft"], settings.resamples, run.seed)
        results = {
            name: measure.policy(tables[folder], kept[folder], tables["sft"], demos, bootstrap)
            for folder, name in names.items()
        }
        tracking.write_json(results, out)
        for folder, name in names.items():
            means = {
                f"evaluation/{metric}": entry["mean"]
                for metric, entry in results[name].items()
                if entry["mean"] is not None
            }
            steps = []
            curve = curves / f"{folder}-heldout.csv"
            if curve.exists():
                points = pd.read_csv(curve)[["step", "reward"]].dropna()
                steps = [(int(step), {"heldout/reward": reward}) for step, reward in points.itertuples(index=False)]
            tracking.log_onto(runs / f"{folder}.json", means, steps, typer.echo)
        typer.echo(f"wins are judged by {measure.judged_by(tables['sft'])}")


if __name__ == "__main__":
    typer.run(main)
