"""Write the report: one HTML page, and the same in Markdown; apart from them, what differs from one run to the next."""

import json
from pathlib import Path
from typing import Annotated

import typer

from rlhf_vs_dpo.run import frame, launch


def main(
    results: Annotated[Path, typer.Option(help="What was measured and compared.")],
    stage_metrics: Annotated[Path, typer.Option(help="Folder with the final metrics of each stage.")],
    samples: Annotated[Path, typer.Option(help="Folder of samples, and of the pools that best-of-n draws from.")],
    prompts: Annotated[Path, typer.Option(help="Prompts.")],
    demonstrations: Annotated[Path, typer.Option(help="Demonstrations.")],
    world: Annotated[Path, typer.Option(help="Folder of the gold reward, to mark texts.")],
    plots: Annotated[Path, typer.Option(help="Folder with the training curves of all methods.")],
    machine: Annotated[Path, typer.Option(help="What the run took of the machine, and where MLflow has it.")],
    out: Annotated[Path, typer.Option(help="Folder of the report.")],
) -> None:
    """Write index.html, report.md and its figures, run.html and run.md, and log them to MLflow."""
    with frame.stage("report", [results]) as run:
        import pandas as pd

        from rlhf_vs_dpo import config, tables
        from rlhf_vs_dpo.preferences import answers, gold
        from rlhf_vs_dpo.report import charts, content, figures, markdown, page
        from rlhf_vs_dpo.run import atomic, pipeline, store

        chosen, seeds = run.section("policies"), run.section("seeds")
        members, family = config.folders(chosen, seeds), config.families(chosen)
        found, took, known = json.loads(results.read_text()), json.loads(machine.read_text()), pipeline.locked()
        pooled = tables.read_table(samples / f"pool-{seeds[0]}.parquet", "pool", "test")

        def first(folder: str) -> dict[str, str]:
            table = answers.first(tables.read_table(samples / f"{folder}.parquet", "samples"))
            return dict(zip(table["prompt_id"], table["response"], strict=True))

        def best_of_first(n: int) -> dict[str, str]:
            """Best of the first n samples of the pool for each prompt."""
            drawn = pooled[pooled["finished"] & (pooled["sample"] < n)]
            best = drawn.loc[drawn.groupby("prompt_id")["reward"].idxmax()]
            return dict(zip(best["prompt_id"], best["response"], strict=True))

        def trace(folder: str, stage: str, output: str, settings: dict[str, object]) -> content.Trace:
            run_id = took["stages"][folder]["run_id"]
            lock = known.get(output, "not in dvc.lock yet")
            return content.Trace(folder, stage, lock, run_id, store.link(run_id), settings)

        def traces(method: str) -> list[content.Trace]:
            settings = _flat(run.section("sft") if method == "sft" else run.section(family[method], method))
            return [
                trace(folder, f"{family[method]}@{seed if method == 'sft' else folder}", f"models/{folder}", settings)
                for folder, seed in zip(members[method], seeds, strict=True)
            ]

        def best_of(n: int) -> list[content.Trace]:
            return [trace(f"pool-{seed}", f"pool@{seed}", f"samples/pool-{seed}.parquet", {"n": n}) for seed in seeds]

        demos = tables.read_table(demonstrations, "demonstrations", "test").drop_duplicates("prompt_id")
        drawn = figures.draw(found, pd.read_csv(plots / "learning.csv"))
        source = content.Source(
            found=found,
            reward_quality=[json.loads((stage_metrics / f"reward-{seed}.json").read_text()) for seed in seeds],
            samples={method: first(of[0]) for method, of in members.items()}
            | {f"best_of_{n}": best_of_first(n) for n in chosen.best_of_n},
            prompts=tables.read_table(prompts, "prompts", "test"),
            demonstrations=dict(zip(demos["prompt_id"], demos["response"], strict=True)),
            judge=gold.load(world),
            traces={method: traces(method) for method in members}
            | {f"best_of_{n}": best_of(n) for n in chosen.best_of_n},
            took=took,
            examples=run.section("report").examples,
            figures=drawn,
        )
        blocks, this_run = content.blocks(source), content.run_blocks(source)
        title = "RLHF versus DPO: this run"
        with atomic.folder(out) as place:
            pictures = charts.save(drawn, place / "figures")
            (place / "index.html").write_text(page.render(blocks, families=found["families"]))
            (place / "report.md").write_text(markdown.render(blocks))
            (place / "run.html").write_text(page.render(this_run, title))
            (place / "run.md").write_text(markdown.render(this_run, title))
        for path in [*pictures, place / "index.html", place / "report.md", place / "run.html"]:
            run.artifact(out / path.relative_to(place))


def _flat(settings) -> dict[str, object]:
    """Parameters of a method, those of its training among them, by name."""
    flat: dict[str, object] = {}
    for key, value in settings.model_dump().items():
        flat |= value if isinstance(value, dict) else {key: value}
    return flat


if __name__ == "__main__":
    launch.command(main)
