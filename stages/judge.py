"""Ask judges: each policy's first sample against that of the SFT policy of its own line."""

from pathlib import Path
from typing import Annotated

import typer

from rlhf_vs_dpo.run import frame, launch


def main(
    samples: Annotated[Path, typer.Option(help="Folder of samples.")],
    prompts: Annotated[Path, typer.Option(help="Prompts; those of test are used.")],
    world: Annotated[Path, typer.Option(help="Folder of the gold reward.")],
    out: Annotated[Path, typer.Option(help="Where the judgements go.")],
) -> None:
    """Write `judgements`: who won, whether the judge agreed with itself, and which place it favoured."""
    with frame.stage("judge", [prompts], None, [samples, world, Path("data/own")]) as run:
        import pandas as pd

        from rlhf_vs_dpo import config, tables
        from rlhf_vs_dpo.preferences import answers, judges
        from rlhf_vs_dpo.run.pipeline import root

        settings, seeds = run.section("judging"), run.section("seeds")
        members = config.folders(run.section("policies"), seeds)
        test = tables.read_table(prompts, "prompts", "test").set_index("prompt_id")

        def first(folder: str) -> pd.Series:
            table = answers.first(tables.read_table(samples / f"{folder}.parquet", "samples"))
            return table.set_index("prompt_id")["response"]

        parts = [tables.empty("judgements")]
        for line, seed in enumerate(seeds):
            theirs = first(members["sft"][line]).head(settings.prompts)
            rows = test.loc[theirs.index]
            asked = pd.concat(
                [
                    pd.DataFrame({"policy": of[line], "prompt_id": theirs.index, "prompt": rows["prompt"], "facts": rows["facts"],
                                  "a": first(of[line]).loc[theirs.index], "b": theirs})
                    for method, of in members.items()
                    if method != "sft"
                ],
                ignore_index=True,
            )  # fmt: skip
            for name, entry in settings.judges.items():
                kept = lambda what, of=f"{name}-{seed}": run.checkpoint.pieces(f"{of} {what}")  # noqa: E731
                judge = judges.load(entry, world, root() / ".judge_cache" / f"{name}.jsonl", seed, kept)
                if judge is None:
                    typer.echo(f"judge {name}: the source has no gold reward; left out")
                    continue
                verdicts = judge.compare(asked[["prompt", "facts", "a", "b"]])
                parts.append(asked[["policy", "prompt_id"]].join(verdicts).assign(judge=name))
        tables.write_table(pd.concat(parts, ignore_index=True).astype({"win": float}), "judgements", out)


if __name__ == "__main__":
    launch.command(main)
