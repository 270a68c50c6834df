"""Put the trials of all methods side by side: what tuning brings, what it costs, how sensitive each method is."""

from pathlib import Path
from typing import Annotated

import typer

from rlhf_vs_dpo.run import frame, launch


def main(
    trials: Annotated[Path, typer.Option(help="Folder of a CSV of trials for each method.")],
    line: Annotated[Path, typer.Option(help="Folder of the line that they ran on.")],
    out: Annotated[Path, typer.Option(help="What they say, in numbers.")],
    figures: Annotated[Path, typer.Option(help="Folder of figures.")],
) -> None:
    """Write `study`: best settings, expected best score after k trials, what was lost, cost; and four figures."""
    with frame.stage("study", [line / "pool.parquet"], study="all methods") as run:
        import json

        import pandas as pd

        from rlhf_vs_dpo import config, tables
        from rlhf_vs_dpo.errors import DataError
        from rlhf_vs_dpo.evaluation import cost
        from rlhf_vs_dpo.run import atomic
        from rlhf_vs_dpo.run.pipeline import read_run
        from rlhf_vs_dpo.study import figures as drawn
        from rlhf_vs_dpo.study import summary

        params, tuning = config.read_params(), run.section("tuning")
        found = {method: tables.read_csv(trials / f"{method}.csv", "trials") for method in tuning.spaces}
        for method, table in found.items():
            if len(table) != tuning.trials:
                raise DataError(
                    f"{trials / f'{method}.csv'}: {len(table)} trials in the place of {tuning.trials}; run `make tune`"
                )
        pool = tables.read_table(line / "pool.parquet", "pool", "validation")
        start = {name: float(pool[name].mean()) for name in ("utility", "gold", "reward", "tokens", "finished")}
        start |= {"preferred": 0.5, "kl": 0.0}
        preferences = run.section("preferences")
        start["objective"] = start["utility"] / (
            preferences.annotator.temperature if preferences.source == "annotator" else 1.0
        )
        # Of the pool, the part that methods learn from, as in evaluation.
        drawn_tokens = json.loads((line / "metrics" / "pool.json").read_text())
        spent = {split: of["tokens"] + of["tokens_read"] for split, of in drawn_tokens.items()}
        shares = {"pool": spent["train"] / sum(spent.values())}
        families, upstream, said = {}, {}, {}
        for method, table in found.items():
            family = families[method] = config.family_of(params, method)
            kind = getattr(config.section(params, family, method), config.FAMILIES[family])
            upstream[method] = sum(
                cost.of_stage(read_run(line / "runs" / f"{stage}.json"), shares.get(stage, 1.0))["flops"]
                for stage in cost.needs(family, kind)
            )
            said[method] = {"family": family} | summary.of_method(
                table, tuning.criterion, start, upstream[method], tuning.seed
            )
        with atomic.folder(figures) as folder:
            drawn.draw(
                pd.concat(found.values(), ignore_index=True), families, start, tuning.criterion, upstream, folder
            )
        atomic.write_json({"criterion": tuning.criterion, "line": tuning.seed, "start": start, "methods": said}, out)


if __name__ == "__main__":
    launch.command(main)
