"""What DVC knows of the pipeline, read from its files: the parameters that a stage tracks, the hashes of outputs, what a
stage left behind.

DVC's own API would answer, too, after a second of imports in every stage; a test holds these answers against it.
"""

import json
import os
import re
from pathlib import Path
from typing import Any

from rlhf_vs_dpo.errors import DataError, ParamsError


def root() -> Path:
    """The repository, also inside a queued experiment, whose own folder is deleted when it ends."""
    return Path(os.environ.get("DVC_ROOT", ".")).resolve()


def tracked(whole: dict[str, Any], stage: str | None, **item: str) -> dict[str, Any]:
    """The part of params.yaml that DVC tracks for a stage, and no other: what is read is what invalidates.

    stage     as DVC addresses it, `rl@ppo-0`, `tuning/dvc.yaml:tune@ppo`; None outside DVC (a stage started by hand), where all of it is returned
    item      what dvc.yaml calls `${item.…}`: method and seed of a cell; `${key}` of a `foreach` is in the stage's name
    """
    if stage is None:
        return whole
    part: dict[str, Any] = {}
    entry, item["key"] = _entry(stage)
    for key in entry.get("params", []):
        *parents, last = re.sub(r"\$\{(?:item\.)?(\w+)\}", lambda found: item[found[1]], key).split(".")
        source, target = whole, part
        try:
            for parent in parents:
                source, target = source[parent], target.setdefault(parent, {})
            target[last] = source[last]
        except (KeyError, TypeError):
            raise ParamsError(f"params.yaml: missing key `{'.'.join([*parents, last])}`") from None
    return part


def code(stage: str) -> list[Path]:
    """The code that DVC tracks for a stage, files and folders; all of it where dvc.yaml does not know the stage (started by hand)."""
    try:
        deps = _entry(stage)[0]["deps"]
    except (FileNotFoundError, KeyError):
        return [Path("src/rlhf_vs_dpo"), Path("stages")]
    return [Path(dep) for dep in deps if dep.startswith(("src/", "stages/"))]


def _entry(stage: str) -> tuple[dict[str, Any], str]:
    """What dvc.yaml, or the file that `stage` names, says of it; and its part behind `@`."""
    file, _, name = stage.rpartition(":")
    name, _, key = name.partition("@")
    entry = _yaml(Path(file or "dvc.yaml"))["stages"][name]
    return entry.get("do", entry), key  # what `foreach` repeats


def locked() -> dict[str, str]:
    """md5 of every output that dvc.lock knows, by path."""
    stages = [
        stage
        for lock in (Path("dvc.lock"), Path("tuning/dvc.lock"))
        if lock.exists()
        for stage in (_yaml(lock) or {}).get("stages", {}).values()
    ]
    return {out["path"]: out.get("md5", "") for stage in stages for out in stage.get("outs", [])}


def read_run(path: Path) -> dict[str, Any]:
    """The content of a runs/*.json file: MLflow run id, device, arithmetic and cost of a stage."""
    try:
        return json.loads(Path(path).read_text())
    except (FileNotFoundError, json.JSONDecodeError) as error:
        raise DataError(f"{path}: cannot be read ({error}); `dvc repro` makes it") from None


def _yaml(path: Path) -> Any:
    from ruamel.yaml import YAML

    return YAML(typ="safe").load(path.read_text())  # of C where ruamel.yaml.clib is installed
