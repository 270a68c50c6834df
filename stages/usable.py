"""Leave out, or refuse, the rows that the base model cannot use."""

from pathlib import Path
from typing import Annotated

import typer

from rlhf_vs_dpo.run import frame, launch


def main(
    base: Annotated[Path, typer.Option(help="Model whose tokens and context decide.")],
    raw: Annotated[Path, typer.Option(help="Folder of demonstrations, prompts and pairs as the source has them.")],
    out: Annotated[Path, typer.Option(help="Folder for those that can be used.")],
    unusable: Annotated[Path, typer.Option(help="Table of the others, with the reason of each.")],
    metrics: Annotated[Path, typer.Option(help="How many of each.")],
) -> None:
    """Write `demonstrations`, `prompts` and `dataset_pairs`, all rows of which fit this model; and what was left out."""
    with frame.stage("usable", [base]) as run:
        import pandas as pd

        from rlhf_vs_dpo import tables
        from rlhf_vs_dpo.errors import DataError
        from rlhf_vs_dpo.language import models, usable
        from rlhf_vs_dpo.run import atomic

        asked = run.params["data"]
        tokenizer, context = models.tokenizer_and_context(base)
        limit = usable.limits(context, run.section("sampling").max_new_tokens, asked["max_prompt_tokens"])
        names = ("prompts", "demonstrations", "dataset_pairs")
        given = {name: tables.read_table(raw / f"{name}.parquet", name) for name in names}
        found = usable.sort(tokenizer, given, limit, drop=asked["unusable"] == "drop")
        left_out = tables.read_table(raw / "unusable.parquet", "unusable")  # what is no preference, to any model
        listed = pd.concat([left_out, found.unusable], ignore_index=True) if len(left_out) else found.unusable
        for name in ("prompts", "demonstrations"):
            # An interval is over prompts: one alone says nothing of another.
            least = {split: 2 if name == "prompts" and split != "train" else 1 for split in tables.SPLITS}
            lost = [split for split in tables.SPLITS if (found.tables[name]["split"] == split).sum() < least[split]]
            if lost:
                raise DataError(
                    f"too little is left of {name} of split {', '.join(lost)}: of {len(given[name])} rows this model can use "
                    f"{len(found.tables[name])} ({limit.context} tokens fit, prompts up to {limit.prompt}, responses up to {limit.response})"
                )
        for name in names:
            tables.write_table(found.tables[name], name, out / f"{name}.parquet")
        atomic.write_csv(listed, unusable)
        if len(listed):
            typer.echo(f"left out {len(listed)} rows, listed in {unusable}:")
            reasons = listed["reason"].str.replace(r"\d+", "…", regex=True)
            for (table, reason), count in listed.groupby(["table", reasons]).size().items():
                typer.echo(f"  {count:>6}  {table}: {reason}")
            run.artifact(unusable)
        counts = {
            name: {"given": len(given[name]) + int((left_out["table"] == name).sum()), "used": len(found.tables[name])}
            for name in names
        }
        run.finish(counts, metrics)


if __name__ == "__main__":
    launch.command(main)
