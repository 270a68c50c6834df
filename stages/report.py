"""Write the report: the table, the curves, the texts side by side, the cost of each method."""

import json
from pathlib import Path
from typing import Annotated

import typer

from rlhf_vs_dpo import tracking

SHARED = ("base", "sft", "preferences", "reward", "reference")  # stages whose cost several methods share


def main(
    evaluation: Annotated[Path, typer.Option(help="Metrics of all policies.")],
    reward_metrics: Annotated[Path, typer.Option(help="Metrics of the reward model.")],
    samples: Annotated[Path, typer.Option(help="Folder of samples.")],
    prompts: Annotated[Path, typer.Option(help="Prompts.")],
    demonstrations: Annotated[Path, typer.Option(help="Demonstrations.")],
    curves: Annotated[Path, typer.Option(help="Folder of curves.")],
    runs: Annotated[Path, typer.Option(help="Folder of MLflow run ids and cost.")],
    out: Annotated[Path, typer.Option(help="Folder of the report.")],
) -> None:
    """Write report.md and its figures, and log the figures to MLflow."""
    with tracking.stage("report", [evaluation]) as run:
        import os
        import shutil

        import pandas as pd

        from rlhf_vs_dpo import config, report, schemas
        from rlhf_vs_dpo.evaluation import measure

        names = config.policy_names(run.section("policies"), run.section("seeds"))

        def curve(name: str):
            path = curves / f"{name}.csv"
            return pd.read_csv(path) if path.exists() and path.stat().st_size > 1 else None

        policies = [
            report.Policy(
                folder, name, curve(folder), None if folder == "sft" else curve(f"{folder}-heldout"),
                tracking.read_run(runs / f"{folder}.json"), schemas.read_table(samples / f"{folder}.parquet", "samples"),
            )
            for folder, name in names.items()
        ]  # fmt: skip
        shared = {name: tracking.read_run(runs / f"{name}.json") for name in SHARED if name not in names}
        temporary = out.with_name(f".{out.name}.{os.getpid()}.tmp")
        temporary.mkdir(parents=True)
        try:
            drawn = report.write(
                temporary, policies, json.loads(evaluation.read_text()), shared,
                schemas.read_table(prompts, "prompts", "test"), schemas.read_table(demonstrations, "demonstrations", "test"),
                json.loads(reward_metrics.read_text()), measure.judged_by(policies[0].samples), run.section("seeds"),
                run.section("report").examples,
            )  # fmt: skip
            for path in [*drawn, temporary / "report.md"]:
                run.artifact(path)
            shutil.rmtree(out, ignore_errors=True)
            temporary.rename(out)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)


if __name__ == "__main__":
    typer.run(main)
