"""Check params.yaml whole, before any stage: DVC removes the outputs of a stage before that stage could refuse."""

import sys
from pathlib import Path
from typing import Annotated

import typer

from rlhf_vs_dpo.run import launch


def main(
    out: Annotated[Path, typer.Option(help="Says that all is well; always the same, so that nothing runs again.")],
) -> None:
    """Every key known, none missing, each in its range, all of them together; and the files that they name are there."""
    from rlhf_vs_dpo import config
    from rlhf_vs_dpo.errors import ParamsError
    from rlhf_vs_dpo.run import atomic

    try:
        params = config.read_params()
        config.check(params)
        named = params["data"]["files"] if params["data"]["source"] == "files" else {}
        for key in ("preferences", "demonstrations", "corpus"):
            if named.get(key) is not None and not Path(named[key]).is_file():
                raise ParamsError(f"{named[key]}: no such file; `data.files.{key}` in params.yaml names it")
    except ParamsError as error:
        print(f"\nerror: {error}\n", file=sys.stderr)
        raise SystemExit(1) from None
    with atomic.writing(out) as temporary:
        temporary.write_text("Every key of params.yaml is known, and all of them fit together.\n")


if __name__ == "__main__":
    launch.command(main)
