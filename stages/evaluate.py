"""Measure and compare all policies at once: the statistics are paired over lines and prompts."""

from pathlib import Path
from typing import Annotated

import typer

from rlhf_vs_dpo.run import frame, launch


def main(
    samples: Annotated[
        Path, typer.Option(help="Folder of samples, retention and watched tables, pools and scored demonstrations.")
    ],
    heldout: Annotated[Path, typer.Option(help="Folder with the implicit rewards of pairs, where a policy has them.")],
    stage_metrics: Annotated[Path, typer.Option(help="Folder with the final metrics of each stage.")],
    prompts: Annotated[Path, typer.Option(help="Prompts, for the facts that a gold reward needs.")],
    world: Annotated[Path, typer.Option(help="Folder of the gold reward.")],
    judgements: Annotated[Path, typer.Option(help="What the judges said.")],
    curves: Annotated[Path, typer.Option(help="Folder of training curves.")],
    runs: Annotated[Path, typer.Option(help="Folder of MLflow run ids and cost.")],
    out: Annotated[Path, typer.Option(help="Everything, as one JSON file.")],
    machine: Annotated[Path, typer.Option(help="What the run took of the machine: seconds, memory, MLflow runs.")],
    policies: Annotated[Path, typer.Option(help="Folder for a few numbers per method, for `dvc metrics`.")],
    plots: Annotated[Path, typer.Option(help="Folder for tables that `dvc plots` draws.")],
) -> None:
    """Write what `evaluation.whole.compare` finds, and add each policy's numbers to its MLflow run."""
    with frame.stage("evaluate", [prompts]) as run:
        import json

        import pandas as pd

        from rlhf_vs_dpo import config, tables
        from rlhf_vs_dpo.evaluation import verdicts, views, whole
        from rlhf_vs_dpo.evaluation.statistics import Resamples
        from rlhf_vs_dpo.preferences import gold
        from rlhf_vs_dpo.run import atomic, pipeline, publish

        chosen, seeds, seed = run.section("policies"), run.section("seeds"), run.section("seed")
        members, family = config.folders(chosen, seeds), config.families(chosen)
        folders = [folder for of in members.values() for folder in of]
        known, judge = tables.read_table(prompts, "prompts")[["prompt_id", "prompt", "facts"]], gold.load(world)

        def demonstrations(line: int):
            scored = tables.read_table(samples / f"demonstrations-{line}.parquet", "demonstration_scores", "test")
            asked = scored.merge(known, on="prompt_id", how="left")
            return scored.join(gold.columns(judge, asked["prompt"], asked["facts"], scored["response"]))

        def metrics_of(stage: str) -> dict[int, dict]:
            return {line: json.loads((stage_metrics / f"{stage}-{line}.json").read_text()) for line in seeds}

        settings, preferences = run.section("evaluate"), run.section("preferences")
        said = tables.read_table(judgements, "judgements")
        # Where nobody simulated made the pairs, a judge takes the annotator's place.
        wins = said[(said["judge"] == settings.preferred_by) & (preferences.source != "annotator")]
        judged = {f: of.set_index("prompt_id")["win"] for f, of in wins.groupby("policy")}
        if judged:  # nobody is judged against itself
            asked = next(iter(judged.values())).index
            judged |= {f: pd.Series(0.5, index=asked) for f in members["sft"]}
        inputs = whole.Inputs(
            policies=chosen,
            seeds=seeds,
            settings={method: run.section(family[method], method) for method in members if method != "sft"},
            preferences=preferences,
            reward_settings=run.section("reward"),
            samples={f: tables.read_table(samples / f"{f}.parquet", "samples") for f in folders},
            retention={f: tables.read_table(samples / f"{f}-retention.parquet", "retention") for f in folders},
            watched={
                f: tables.read_table(samples / f"{f}-heldout.parquet", "watched")
                for f in folders
                if f not in members["sft"]
            },
            pair_rewards={
                f: tables.read_table(path, "pair_rewards")
                for f in folders
                if (path := heldout / f"{f}-pairs.parquet").exists()
            },
            judged=judged,
            demonstrations={line: demonstrations(line) for line in seeds},
            pool={line: tables.read_table(samples / f"pool-{line}.parquet", "pool") for line in seeds},
            runs={path.stem: pipeline.read_run(path) for path in sorted(runs.glob("*.json"))},
            pairs=metrics_of("preferences"),
            pool_metrics=metrics_of("pool"),
        )
        found = whole.compare(inputs, settings, seed)
        found["judges"] = verdicts.summary(said, members, Resamples(settings.resamples, seed))
        atomic.write_json(found, out)
        atomic.write_json(views.of_machine(found, inputs), machine)
        with atomic.folder(policies) as place:
            for name, row in views.of_methods(found).items():
                atomic.write_json(row, place / f"{name}.json")
        with atomic.folder(plots) as place:
            atomic.write_csv(views.comparison(found), place / "comparison.csv")
            atomic.write_csv(views.paths(found), place / "over_training.csv")
            atomic.write_csv(views.learning(curves, members), place / "learning.csv")
            atomic.write_csv(views.best_of_n(found), place / "best_of_n.csv")
        publish.publish(views.for_tracking(found, inputs), found["axes"], typer.echo)
        typer.echo(f"axes: {', '.join(found['axes'])}; wins are judged by {found['judge']}")


if __name__ == "__main__":
    launch.command(main)
