"""Measure and compare all policies at once: the statistics are paired over prompts."""

from pathlib import Path
from typing import Annotated

import typer

from rlhf_vs_dpo.run import frame, launch


def main(
    samples: Annotated[Path, typer.Option(help="Folder of samples, retention and watched tables of each policy.")],
    heldout: Annotated[Path, typer.Option(help="Folder with the implicit rewards of pairs, where a policy has them.")],
    pool: Annotated[Path, typer.Option(help="Scored samples of the SFT policy, for best-of-n without training.")],
    pool_metrics: Annotated[Path, typer.Option(help="Metrics of the pool stage.")],
    preferences_metrics: Annotated[Path, typer.Option(help="Metrics of the preferences stage.")],
    prompts: Annotated[Path, typer.Option(help="Prompts, for the facts that a gold reward needs.")],
    demonstrations: Annotated[Path, typer.Option(help="Scored held-out demonstrations.")],
    world: Annotated[Path, typer.Option(help="Folder of the gold reward.")],
    judgements: Annotated[Path, typer.Option(help="What the judges said.")],
    curves: Annotated[Path, typer.Option(help="Folder of training curves.")],
    runs: Annotated[Path, typer.Option(help="Folder of MLflow run ids and cost.")],
    out: Annotated[Path, typer.Option(help="Everything, as one JSON file.")],
    policies: Annotated[Path, typer.Option(help="Folder for a few numbers per method, for `dvc metrics`.")],
    plots: Annotated[Path, typer.Option(help="Folder for tables that `dvc plots` draws.")],
) -> None:
    """Write what `evaluation.whole.compare` finds, and add each policy's numbers to its MLflow run."""
    with frame.stage("evaluate", [prompts, pool]) as run:
        import json

        from rlhf_vs_dpo import config, tables
        from rlhf_vs_dpo.preferences import gold
        from rlhf_vs_dpo.run import atomic
        from rlhf_vs_dpo.evaluation import tables, verdicts, whole
        from rlhf_vs_dpo.evaluation.statistics import Resamples

        chosen, seeds = run.section("policies"), run.section("seeds")
        members, family = config.folders(chosen, seeds), config.families(chosen)
        folders = [folder for of in members.values() for folder in of]
        demos = tables.read_table(demonstrations, "demonstration_scores", "test")
        asked = demos.merge(
            tables.read_table(prompts, "prompts")[["prompt_id", "prompt", "facts"]], on="prompt_id", how="left"
        )
        inputs = whole.Inputs(
            policies=chosen,
            seeds=seeds,
            settings={method: run.section(family[method], method) for method in members if method != "sft"},
            own_pairs=run.section("preferences").source == "dataset",
            reward_settings=run.section("reward"),
            samples={f: tables.read_table(samples / f"{f}.parquet", "samples") for f in folders},
            retention={f: tables.read_table(samples / f"{f}-retention.parquet", "retention") for f in folders},
            watched={f: tables.read_table(samples / f"{f}-heldout.parquet", "watched") for f in folders if f != "sft"},
            pair_rewards={
                f: tables.read_table(path, "pair_rewards")
                for f in folders
                if (path := heldout / f"{f}-pairs.parquet").exists()
            },
            demonstrations=demos.join(
                gold.columns(gold.load(world), asked["prompt"], asked["facts"], demos["response"])
            ),
            pool=tables.read_table(pool, "pool"),
            runs={path.stem: tracking.read_run(path) for path in sorted(runs.glob("*.json"))},
            pairs=json.loads(preferences_metrics.read_text()),
            pool_metrics=json.loads(pool_metrics.read_text()),
        )
        settings = run.section("evaluate")
        found = whole.compare(inputs, settings, run.seed)
        said = tables.read_table(judgements, "judgements")
        found["judges"] = verdicts.summary(said, members, Resamples(settings.resamples, run.seed))
        tracking.write_json(found, out)
        with atomic.folder(policies) as place:
            for name, row in tables.of_methods(found).items():
                tracking.write_json(row, place / f"{name}.json")
        with atomic.folder(plots) as place:
            tables.comparison(found).to_csv(place / "comparison.csv", index=False, float_format="%.6g")
            tables.paths(found).to_csv(place / "over_training.csv", index=False, float_format="%.6g")
            tables.learning(curves, members).to_csv(place / "learning.csv", index=False, float_format="%.6g")
            tables.best_of_n(found).to_csv(place / "best_of_n.csv", index=False, float_format="%.6g")
        tracking.publish(tables.for_tracking(found, inputs), found["judge"], typer.echo)
        typer.echo(f"wins are judged by {found['judge']}")


if __name__ == "__main__":
    launch.command(main)
