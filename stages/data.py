"""Fetch or generate text, and write the tables that everything else starts from."""

import json
import shutil
from pathlib import Path
from typing import Annotated

import typer

from rlhf_vs_dpo.run import frame, launch


def main(
    out: Annotated[Path, typer.Option(help="Folder of the tables.")],
    metrics: Annotated[Path, typer.Option(help="Sizes of the tables.")],
) -> None:
    """Build corpus, demonstrations, prompts, pairs of the data set (if it has any), facts and the gold reward."""
    with frame.stage("data", []) as run:
        from rlhf_vs_dpo import tables
        from rlhf_vs_dpo.errors import DataError
        from rlhf_vs_dpo.sources import Tables, files, forms, hub, imdb, mini_tldr

        settings = run.section("data")
        drop = settings.unusable == "drop"

        def render(messages, opening):
            nonlocal renderer
            if renderer is None:
                renderer = forms.chat_renderer(settings.chat_template, tokenizer(run.params["base"]))
            return renderer(messages, opening)

        renderer = None
        match settings.source:
            case "mini_tldr":
                built: Tables = mini_tldr.build(settings.mini_tldr, run.section("seed"))
            case "imdb":
                built = imdb.build(settings.imdb, run.section("seed"))
            case "hub":
                built = hub.build(settings.hub, render, drop)
            case "files":
                built = files.build(settings.files, render, drop)

        named = {
            name: getattr(built, name) for name in ("corpus", "demonstrations", "prompts", "dataset_pairs", "facts")
        }
        for name, table in named.items():  # all are checked before the first is written
            if name != "dataset_pairs" or len(table):
                tables.validate(table, "pairs" if name == "dataset_pairs" else name, f"{settings.source}: {name}")
        for name, splits in (
            ("corpus", ("train", "validation")),
            ("demonstrations", tables.SPLITS),
            ("prompts", tables.SPLITS),
        ):
            lost = [split for split in splits if not (named[name]["split"] == split).any()]
            if lost:
                raise DataError(
                    f"{settings.source}: no row of {name} has split {', '.join(lost)}; give more rows, or other shares in `data`"
                )
        for name, table in named.items():  # what depends on what a model can read is sorted once there is one
            whole = name in ("corpus", "facts")
            tables.write_table(table, name, (out if whole else out / "raw") / f"{name}.parquet")
        tables.write_table(built.left_out, "unusable", out / "raw" / "unusable.parquet")
        world = out / "world"
        shutil.rmtree(world, ignore_errors=True)
        world.mkdir()
        (world / "gold.json").write_text(json.dumps(built.gold))
        (world / "words.json").write_text(json.dumps(built.words))
        if built.classifier is not None:
            built.classifier.to_parquet(world / "classifier.parquet", index=False)
        splits = {split: int((built.prompts["split"] == split).sum()) for split in tables.SPLITS}
        run.finish(
            {"rows": {name: len(table) for name, table in named.items()}, "prompts": splits} | built.metrics, metrics
        )


def tokenizer(base: dict):
    """The tokenizer whose chat template renders conversations: that of the pretrained model, if there is one."""
    if base["pretrained"] is None:
        return None
    from rlhf_vs_dpo.language.models import pretrained_tokenizer

    return pretrained_tokenizer(base["pretrained"], base["revision"])


if __name__ == "__main__":
    launch.command(main)
