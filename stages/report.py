"""Write the report: the table, the curves, the texts side by side, the cost of each method."""

import json
from pathlib import Path
from typing import Annotated

import typer

from rlhf_vs_dpo import tracking

SHARED = ("base", "sft", "preferences", "reward", "reference", "pool")  # stages whose cost several methods share


def main(
    evaluation: Annotated[Path, typer.Option(help="Metrics of all policies.")],
    bounds: Annotated[Path, typer.Option(help="Theory's bounds beside what was measured.")],
    best_of_n: Annotated[Path, typer.Option(help="Best-of-n over n.")],
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

        chosen = run.section("policies")
        names = config.policy_names(chosen, run.section("seeds"))
        family = {method: name for name in config.FAMILIES for method in getattr(chosen, name)}

        def intended(name: str) -> pd.DataFrame:
            """Samples of a policy, prompted as it is meant to be."""
            table = schemas.read_table(samples / f"{name}.parquet", "samples")
            return table[table["suffix"] == table["suffix"].iloc[0]]

        def curve(name: str):
            path = curves / f"{name}.csv"
            return pd.read_csv(path) if path.exists() and path.stat().st_size > 1 else None

        policies = [
            report.Policy(
                folder, name, family.get(folder.rpartition("-")[0], "sft"), curve(folder), None if folder == "sft" else curve(f"{folder}-heldout"),
                tracking.read_run(runs / f"{folder}.json"), intended(folder),
            )
            for folder, name in names.items()
        ]  # fmt: skip
        shared = {name: tracking.read_run(runs / f"{name}.json") for name in SHARED if name not in names}
        temporary = out.with_name(f".{out.name}.{os.getpid()}.tmp")
        temporary.mkdir(parents=True)
        try:
            drawn = report.write(
                temporary, policies, json.loads(evaluation.read_text()), json.loads(bounds.read_text()),
                pd.read_csv(best_of_n), shared,
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
