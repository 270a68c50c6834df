"""Write the report: one HTML page, and the same in Markdown."""

import json
from pathlib import Path
from typing import Annotated

import typer

from rlhf_vs_dpo.run import frame, launch

SHARED = ("base", "sft", "preferences", "reward", "reference", "pool")  # stages whose cost several methods share


def main(
    results: Annotated[Path, typer.Option(help="What was measured and compared.")],
    reward_metrics: Annotated[Path, typer.Option(help="Metrics of the reward model.")],
    samples: Annotated[Path, typer.Option(help="Folder of samples.")],
    pool: Annotated[Path, typer.Option(help="Scored samples of the SFT policy, for the texts of best-of-n.")],
    prompts: Annotated[Path, typer.Option(help="Prompts.")],
    demonstrations: Annotated[Path, typer.Option(help="Demonstrations.")],
    world: Annotated[Path, typer.Option(help="Folder of the gold reward, to mark texts.")],
    plots: Annotated[Path, typer.Option(help="Folder with the training curves of all methods.")],
    runs: Annotated[Path, typer.Option(help="Folder of MLflow run ids and cost.")],
    out: Annotated[Path, typer.Option(help="Folder of the report.")],
) -> None:
    """Write index.html, report.md and its figures, and log them to MLflow."""
    with frame.stage("report", [results]) as run:
        import pandas as pd

        from rlhf_vs_dpo import config, tables
        from rlhf_vs_dpo.preferences import answers, gold
        from rlhf_vs_dpo.run import atomic
        from rlhf_vs_dpo.report import content, figures, markdown, page

        chosen = run.section("policies")
        members, family = config.folders(chosen, run.section("seeds")), config.families(chosen)

        def first(folder: str) -> dict[str, str]:
            table = answers.first(tables.read_table(samples / f"{folder}.parquet", "samples"))
            return dict(zip(table["prompt_id"], table["response"], strict=True))

        def best_of_first(n: int) -> dict[str, str]:
            """Best of the first n samples of the pool for each prompt."""
            drawn = pooled[pooled["finished"] & (pooled["sample"] < n)]
            best = drawn.loc[drawn.groupby("prompt_id")["reward"].idxmax()]
            return dict(zip(best["prompt_id"], best["response"], strict=True))

        def traces(method: str) -> list[content.Trace]:
            settings = run.section("sft") if method == "sft" else run.section(family[method], method)
            found = []
            for folder in members[method]:
                stage = "sft" if method == "sft" else f"{family[method]}@{folder}"
                run_id = tracking.read_run(runs / f"{folder}.json")["run_id"]
                lock = known.get(f"models/{folder}", "not in dvc.lock yet")
                found.append(content.Trace(folder, stage, lock, run_id, tracking.link(run_id), _flat(settings)))
            return found

        def best_of(n: int) -> list[content.Trace]:
            run_id = tracking.read_run(runs / "pool.json")["run_id"]
            lock = known.get("data/pool.parquet", "not in dvc.lock yet")
            return [content.Trace("data/pool.parquet", "pool", lock, run_id, tracking.link(run_id), {"n": n})]

        pooled = tables.read_table(pool, "pool", "test")
        found, known = json.loads(results.read_text()), tracking.locked()
        demos = tables.read_table(demonstrations, "demonstrations", "test").drop_duplicates("prompt_id")
        drawn = figures.draw(found, pd.read_csv(plots / "learning.csv"))
        source = content.Source(
            found=found,
            reward_quality=json.loads(reward_metrics.read_text()),
            samples={method: first(of[0]) for method, of in members.items()}
            | {f"best_of_{n}": best_of_first(n) for n in chosen.best_of_n},
            prompts=tables.read_table(prompts, "prompts", "test"),
            demonstrations=dict(zip(demos["prompt_id"], demos["response"], strict=True)),
            judge=gold.load(world),
            traces={method: traces(method) for method in members}
            | {f"best_of_{n}": best_of(n) for n in chosen.best_of_n},
            shared={name: tracking.read_run(runs / f"{name}.json") for name in SHARED},
            examples=run.section("report").examples,
            figures=drawn,
        )
        blocks = content.blocks(source)
        with atomic.folder(out) as place:
            pictures = figures.save(drawn, place / "figures")
            (place / "index.html").write_text(page.render(blocks))
            (place / "report.md").write_text(markdown.render(blocks))
            for path in [*pictures, place / "index.html", place / "report.md"]:
                run.artifact(path)


def _flat(settings) -> dict[str, object]:
    """Parameters of a method, those of its training among them, by name."""
    flat: dict[str, object] = {}
    for key, value in settings.model_dump().items():
        flat |= value if isinstance(value, dict) else {key: value}
    return flat


if __name__ == "__main__":
    launch.command(main)
