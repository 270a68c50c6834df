"""Ask judges: each policy's first sample for a prompt against the SFT policy's."""

from pathlib import Path
from typing import Annotated

import typer

from rlhf_vs_dpo import tracking


def main(
    samples: Annotated[Path, typer.Option(help="Folder of samples.")],
    prompts: Annotated[Path, typer.Option(help="Prompts; those of test are used.")],
    world: Annotated[Path, typer.Option(help="Folder of the gold reward.")],
    out: Annotated[Path, typer.Option(help="Where the judgements go.")],
) -> None:
    """Write `judgements`: who won, whether the judge agreed with itself, and which place it favoured."""
    with tracking.stage("judge", [prompts]) as run:
        import pandas as pd

        from rlhf_vs_dpo import answers, config, judges, schemas

        settings = run.section("judging")
        folders = [f for of in config.folders(run.section("policies"), run.section("seeds")).values() for f in of]

        def first(folder: str) -> pd.Series:
            table = answers.first(schemas.read_table(samples / f"{folder}.parquet", "samples"))
            return table.set_index("prompt_id")["response"]

        theirs = first("sft").head(settings.prompts)
        rows = schemas.read_table(prompts, "prompts", "test").set_index("prompt_id").loc[theirs.index]
        asked = {
            folder: pd.DataFrame(
                {"prompt": rows["prompt"], "facts": rows["facts"], "a": first(folder).loc[theirs.index], "b": theirs}
            )
            for folder in folders
            if folder != "sft"
        }
        parts = [schemas.empty("judgements")]
        for name, entry in settings.judges.items():
            judge = judges.load(entry, world, tracking.root() / ".judge_cache" / f"{name}.jsonl")
            if judge is None:
                typer.echo(f"judge {name}: the source has no gold reward; left out")
                continue
            whole = pd.concat(asked.values(), ignore_index=True)
            verdicts = judge.compare(whole)
            policies = [folder for folder, table in asked.items() for _ in range(len(table))]
            verdicts.insert(0, "judge", name)
            verdicts.insert(1, "policy", policies)
            verdicts.insert(2, "prompt_id", list(theirs.index) * len(asked))
            parts.append(verdicts)
        schemas.write_table(pd.concat(parts, ignore_index=True).astype({"win": float}), "judgements", out)


if __name__ == "__main__":
    typer.run(main)
