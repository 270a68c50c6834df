"""Measure all policies at once: the statistics are paired over prompts."""

from pathlib import Path
from typing import Annotated

import typer

from rlhf_vs_dpo import tracking


def main(
    samples: Annotated[Path, typer.Option(help="Folder of samples and retention tables, one of each per policy.")],
    heldout: Annotated[Path, typer.Option(help="Folder with the implicit rewards of pairs, where a policy has them.")],
    pool: Annotated[Path, typer.Option(help="Scored samples of the SFT policy, for best-of-n without training.")],
    prompts: Annotated[Path, typer.Option(help="Prompts, for the facts that a gold reward needs.")],
    demonstrations: Annotated[Path, typer.Option(help="Scored held-out demonstrations.")],
    world: Annotated[Path, typer.Option(help="Folder of the gold reward.")],
    curves: Annotated[Path, typer.Option(help="Folder of the held-out curves, to be added to the MLflow runs.")],
    runs: Annotated[Path, typer.Option(help="Folder of the MLflow run ids.")],
    out: Annotated[Path, typer.Option(help="Where the metrics of all policies go.")],
    bounds: Annotated[Path, typer.Option(help="Where theory's bounds go, beside what was measured.")],
    best_of_n: Annotated[Path, typer.Option(help="Where the curve of best-of-n over n goes.")],
) -> None:
    """Write {policy: {metric: {mean, low, high}}}, and add the means to each policy's MLflow run."""
    with tracking.stage("evaluate", [prompts, pool]) as run:
        import pandas as pd

        from rlhf_vs_dpo import config, gold, schemas
        from rlhf_vs_dpo.evaluation import measure
        from rlhf_vs_dpo.evaluation.best_of_n import as_samples
        from rlhf_vs_dpo.evaluation.bounds import of_best_of_n, of_imitation
        from rlhf_vs_dpo.progress import bar

        settings, policies = run.section("evaluate"), run.section("policies")
        names = config.policy_names(policies, run.section("seeds"))
        tables = {folder: schemas.read_table(samples / f"{folder}.parquet", "samples") for folder in names}
        kept = {folder: schemas.read_table(samples / f"{folder}-retention.parquet", "retention") for folder in names}
        rewards = {
            folder: schemas.read_table(path, "pair_rewards")
            for folder in names
            if (path := heldout / f"{folder}-pairs.parquet").exists()
        }
        demos = schemas.read_table(demonstrations, "demonstration_scores", "test")
        asked = demos.merge(
            schemas.read_table(prompts, "prompts")[["prompt_id", "prompt", "facts"]], on="prompt_id", how="left"
        )
        demos = demos.join(gold.columns(gold.load(world), asked["prompt"], asked["facts"], demos["response"]))
        sft = tables["sft"]
        bootstrap = measure.Bootstrap.of(sft, kept["sft"], settings.resamples, run.seed)
        results: dict[str, dict] = {}
        onto: dict[str, tuple[str, str]] = {}  # row of the results -> run file, prefix of its metrics
        for folder, name in names.items():
            # The first suffix is how the policy is meant to be prompted; others are rows of their own.
            for number, (suffix, table) in enumerate(tables[folder].groupby("suffix", sort=False)):
                row = name if number == 0 else f"{name} {suffix}"
                results[row] = measure.policy(
                    table.reset_index(drop=True), kept[folder], sft, demos, bootstrap, rewards.get(folder)
                )
                onto[row] = folder, "evaluation" if number == 0 else f"evaluation {suffix.strip('[]')}"
        whole = schemas.read_table(pool, "pool")
        learned = whole.loc[whole["split"] == "train", "sample"]
        drawn = whole[(whole["split"] == "test") & whole["prompt_id"].isin(bootstrap.prompts)]
        for n in policies.best_of_n:
            results[f"best_of_{n}"] = measure.policy(as_samples(drawn, n), None, sft, demos, bootstrap)
            onto[f"best_of_{n}"] = "pool", f"best_of_{n}"
        size = drawn.groupby("prompt_id")["sample"].transform("size")
        deep = drawn[size == size.max()]
        powers = [2**k for k in range(int(size.max()).bit_length())]
        curve = []
        with bar(len(powers), "best of n", "n") as progress:
            for n in powers:
                curve.append({"n": n} | measure.policy(as_samples(deep, n), None, sft, demos, bootstrap))
                progress.update()
        recipes = {
            f"{method}-{seed}": run.section("imitation", method)
            for method in policies.imitation
            for seed in run.section("seeds")
        }
        own_pairs = run.section("preferences").source == "dataset"
        samples_each = int(learned.max()) + 1 if len(learned) else 1
        checked = [
            of_imitation(names[folder], results[names[folder]], entry, own_pairs, samples_each, len(sft))
            for folder, entry in recipes.items()
        ]
        checked += [of_best_of_n(f"best_of_{n}", results[f"best_of_{n}"], n, len(sft)) for n in policies.best_of_n]
        compared = int(sft["prompt_id"].isin(deep["prompt_id"]).sum())
        checked += [
            of_best_of_n(f"best of {row['n']} (curve)", row, row["n"], compared) for row in curve if row["n"] > 1
        ]
        tracking.write_json(results, out)
        tracking.write_json({name: entry for part in checked for name, entry in part.items()}, bounds)
        tracking.write_curve([measure.flat(row) for row in curve], best_of_n)
        for row, (folder, prefix) in onto.items():
            means = {f"{prefix}/{m}": entry["mean"] for m, entry in results[row].items() if entry["mean"] is not None}
            steps = []
            points = curves / f"{folder}-heldout.csv"
            if points.exists() and prefix == "evaluation":
                scored = pd.read_csv(points)[["step", "reward"]].dropna()
                steps = [(int(step), {"heldout/reward": reward}) for step, reward in scored.itertuples(index=False)]
            tracking.log_onto(runs / f"{folder}.json", means, steps, typer.echo)
        typer.echo(f"wins are judged by {measure.judged_by(sft)}")


if __name__ == "__main__":
    typer.run(main)
