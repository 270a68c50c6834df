"""`make profile NAME=imdb`: lay profiles/imdb.yaml over params.yaml, and show what changed.

Comments and order of params.yaml survive. Keys that it does not have are refused, and so is a result that does not
validate; nothing is written then. `default` puts profiles/default.yaml back.
"""

import difflib
import io
from pathlib import Path
from typing import Annotated, Any

import typer
from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from rlhf_vs_dpo import config
from rlhf_vs_dpo.errors import ParamsError, UserError
from rlhf_vs_dpo.run import atomic

WHOLE = ("tuning.spaces", "evaluate.settings_of")  # maps whose keys are names of methods


def overlay(params: Any, profile: dict[str, Any], place: str, key: str = "") -> None:
    """Lay `profile` over `params` in place; a list replaces a list, and what is in `WHOLE` is replaced as it stands. Raises ParamsError for a key that is not there.

    A method's own entry (`preference.dpo_b05`) may be new, as a judge may, and may hold any key that its defaults or its loss know:
    what it holds is validated afterwards.
    """
    for name, value in profile.items():
        dotted = f"{key}.{name}" if key else name
        method = key in config.FAMILIES or (key.rpartition(".")[0] in config.FAMILIES and not key.endswith(".defaults"))
        if name not in params and not method and not key.startswith("judging.judges"):
            raise ParamsError(
                f"{place}: unknown key `{dotted}`; params.yaml has {', '.join(params) or 'nothing'} there"
            )
        if isinstance(value, dict) and isinstance(params.get(name), dict) and dotted not in WHOLE:
            overlay(params[name], value, place, dotted)
        else:
            params[name] = value


def current(params: Path = Path("params.yaml"), profiles: Path = Path("profiles")) -> str:
    """The profile that params.yaml is, or `custom` where it is none of them."""
    yaml = YAML(typ="safe")
    now = yaml.load(params.read_text())
    if not (profiles / "default.yaml").is_file():
        return "custom"
    for path in sorted(profiles.glob("*.yaml")):
        then = yaml.load((profiles / "default.yaml").read_text())
        try:
            if path.stem != "default":
                overlay(then, yaml.load(path.read_text()) or {}, str(path))
        except (ParamsError, YAMLError, AttributeError):  # a profile that nobody is using now need not be right
            continue
        if then == now:
            return path.stem
    return "custom"


def _text(params: Any, yaml: YAML) -> str:
    stream = io.StringIO()
    yaml.dump(params, stream)
    return stream.getvalue()


def main(
    name: Annotated[str, typer.Argument(help="A file of profiles/, without its ending; `default` to go back.")],
    params: Annotated[Path, typer.Option(help="File to change.")] = Path("params.yaml"),
    profiles: Annotated[Path, typer.Option(help="Folder of the profiles.")] = Path("profiles"),
) -> None:
    """Merge a profile into params.yaml and print the difference."""
    try:
        path = profiles / f"{name}.yaml"
        if not path.is_file():
            known = ", ".join(sorted(p.stem for p in profiles.glob("*.yaml")))
            raise ParamsError(f"{path}: no such profile; there are {known}")
        default = (profiles / "default.yaml").read_text()
        if name == "default":
            before = params.read_text() if params.exists() else ""
            after = default
        else:
            yaml = YAML()
            yaml.width = 120
            yaml.preserve_quotes = True
            yaml.representer.add_representer(
                type(None), lambda r, _: r.represent_scalar("tag:yaml.org,2002:null", "null")
            )
            for file in (params, path):  # for its errors; read again, with the spelling of its numbers kept
                if not isinstance(config.read_params(file), dict):
                    raise ParamsError(f"{file}: must be a map of keys")
            before = params.read_text()
            merged = yaml.load(before) or {}
            if before != default:
                typer.echo("params.yaml differs from the default already; the profile is laid over it as it is "
                           "(`make profile NAME=default` first for a clean start)\n")  # fmt: skip
            overlay(merged, yaml.load(path.read_text()) or {}, str(path))
            after = _text(merged, yaml)
        config.check(YAML(typ="safe").load(after), str(path))
    except UserError as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(1) from None
    difference = list(
        difflib.unified_diff(
            before.splitlines(), after.splitlines(), "params.yaml before", f"with {name}", lineterm="", n=0
        )
    )
    with atomic.writing(params) as temporary:
        temporary.write_text(after)
    typer.echo("\n".join(difference) or "nothing to change")
    typer.echo("\nnext: make repro")


if __name__ == "__main__":
    typer.run(main)
