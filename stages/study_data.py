"""Write what the study may see: prompts and demonstrations without those of test, and of each method the settings that it does not draw."""

from pathlib import Path
from typing import Annotated

import typer

from rlhf_vs_dpo.run import frame, launch


def main(
    prompts: Annotated[Path, typer.Option(help="Prompts of all splits.")],
    demonstrations: Annotated[Path, typer.Option(help="Demonstrations of all splits.")],
    out: Annotated[Path, typer.Option(help="Folder of both without test.")],
    untuned: Annotated[Path, typer.Option(help="Folder; a JSON file for each method of `tuning.spaces`.")],
) -> None:
    """A search depends on its file in `untuned`, not on the method's entry in params.yaml, into which its best setting is written."""
    with frame.stage("study_data", [prompts, demonstrations]):
        from rlhf_vs_dpo import config, tables
        from rlhf_vs_dpo.run import atomic

        params = config.read_params()
        config.check_study(params)
        with atomic.folder(out) as folder:
            for table, path in (("prompts", prompts), ("demonstrations", demonstrations)):
                rows = tables.read_table(path, table)
                tables.write_table(
                    rows[rows["split"] != "test"].reset_index(drop=True), table, folder / f"{table}.parquet"
                )
        with atomic.folder(untuned) as folder:
            for method, space in params["tuning"]["spaces"].items():
                family = config.family_of(params, method)
                settings = config.section(params, family, method).model_dump()
                left = {key: value for key, value in settings.items() if key not in space}
                atomic.write_json(left, folder / f"{method}.json")


if __name__ == "__main__":
    launch.command(main)
