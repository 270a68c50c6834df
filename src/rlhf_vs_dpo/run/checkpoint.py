"""What a stage has done so far, on disk: killed anywhere and started again, it goes on and ends with the same bytes.

    run.checkpoint.keep(policy=policy, watched=watched)     what the rest of the run depends on; restored here where a checkpoint is found
    with checkpoint.during(fit=at): ... checkpoint.offer()  a loop: after a step one is written if `checkpoint.minutes` have passed
    run.checkpoint.pieces("responses")                      a list of finished pieces of work, for stages that sample

A part has `state_dict` and `load_state_dict`, as PyTorch's modules and optimisers have: dictionaries and lists of tensors, tables and
plain values. Tensors go into a safetensors file, the rest into JSON. Checkpoints are no outputs, for DVC removes those before a stage
runs: they are in .dvc/tmp/rlhf/checkpoints/<stage>/<key>/, the key being a hash of everything that can change a number. Each is
written aside, flushed and renamed, the last two are kept, and all are removed when the stage is done.

SIGTERM, by which queues end a job and a stage ends with its parent: the step that runs is finished, and a checkpoint is written.
"""

import hashlib
import json
import os
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Protocol

from rlhf_vs_dpo.run import arithmetic, atomic, pipeline
from rlhf_vs_dpo.run.launch import device, is_main

KEPT = 2  # checkpoints of a stage
PATIENCE = 30.0  # seconds to wait for another process at the same work, which may be finishing its last step
ONE_END = 5.0  # seconds in which a second SIGTERM is the first, told twice
TENSORS, STATE, IDENTITY, RUNS = "tensors.safetensors", "state.json", "identity.json", "runs.txt"


class Part(Protocol):
    """Something whose state can be read and set, as in `torch.distributed.checkpoint.stateful.Stateful`."""

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any]) -> Any: ...


class Values(SimpleNamespace):
    """Plain values and tables that a loop carries, as attributes."""

    def state_dict(self) -> dict[str, Any]:
        return vars(self)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        vars(self).update(state)


class Checkpoint:
    """Keeps nothing: for loops outside a stage, and where `checkpoint.minutes` is null. `OnDisk` keeps."""

    runs: list[str]  # journals (run/journal.py) of the MLflow run that this process works at, its own the last
    asked_to_end = False  # by SIGTERM

    def keep(self, **parts: Part) -> None:
        """Parts that the rest of the run depends on. Restores those that a checkpoint was found of."""

    @contextmanager
    def during(self, **parts: Part) -> Iterator[None]:
        """`keep`, while a loop runs that offers checkpoints."""
        yield

    def offer(self) -> None:
        """All parts are as they must be to go on from: a checkpoint is written here if it is time."""

    def goes_on(self, name: str) -> bool:
        """Whether a checkpoint was found that holds this part, which has not been kept yet."""
        return False

    def pieces(self, name: str) -> "list | Pieces":
        """Finished pieces of work in their order, those before a kill among them. Appending one offers a checkpoint.

        A piece is JSON, or a table, and is never changed: it is written once.
        """
        return []

    def save(self) -> None:
        """Write one at once."""

    def done(self) -> None:
        """The stage has its outputs, or will never have them."""

    def close(self) -> None:
        """This process works no more; what is kept stays."""

    @contextmanager
    def listening(self) -> Iterator[None]:
        """While a stage runs, SIGTERM ends it with a checkpoint."""
        yield


NOT_KEPT = Checkpoint()


class Pieces:
    """Finished pieces of work: what has been written is on disk alone, and read from there.

    folder      of their files
    seals       hashes of those files
    appended    called when there is one more
    """

    def __init__(self, folder: Path, seals: list[str], appended: Callable[[], None]):
        self.folder, self.seals, self.appended = folder, seals, appended
        self.unwritten: list[Any] = []

    def __len__(self) -> int:
        return len(self.seals) + len(self.unwritten)

    def __getitem__(self, number: int) -> Any:
        """Raises IndexError behind the last, so that a loop over pieces ends."""
        if number < len(self.seals):
            return _object(self._file(number).read_text(), {})
        return self.unwritten[number - len(self.seals)]

    def append(self, piece: Any) -> None:
        self.unwritten.append(piece)
        self.appended()

    def write(self) -> None:
        while self.unwritten:
            with atomic.writing(self._file(len(self.seals))) as temporary:
                temporary.write_text(_json(self.unwritten[0], None))
                _flush(temporary)
                seal = _sha256(temporary)
            self.seals.append(seal)
            del self.unwritten[0]

    def check(self) -> None:
        """Raises ValueError where a file is not what was written."""
        for number, seal in enumerate(self.seals):
            if _sha256(self._file(number)) != seal:
                raise ValueError(f"piece {number} of {self.folder.name} is not what was written")

    def _file(self, number: int) -> Path:
        return self.folder / f"{number:06d}.json"


class OnDisk(Checkpoint):
    """The checkpoints of one stage.

    stage      as DVC addresses it; a trial adds its number
    identity   everything that can change a number, by what it is called in words
    minutes    between two checkpoints; 0: one at every offer
    run        key of the journal of its MLflow run (run/journal.py)
    write      whether this process writes; the others of a distributed run read
    """

    def __init__(self, stage: str, identity: dict[str, Any], minutes: float, run: str, write: bool = True):
        self.identity, self.seconds, self.writes = identity, 60 * minutes, write
        self.place = folder() / stage.replace("/", "-").replace(":", "-")
        self.folder = self.place / _key(identity)
        self.runs = [run]
        self.parts: dict[str, Part] = {}
        self.lists: dict[str, Pieces] = {}
        self.found: dict[str, Any] = {}  # parts that nobody has asked for yet
        self.number = self.loops = 0
        self.saving = self.asked_to_end = False
        self.asked_at = 0.0
        self.began = time.monotonic()
        self._lock: Any = None
        if write and not self._alone():
            self.writes = False
            _say(f"{self.folder}: another process keeps its checkpoints there; this one keeps none")
        found = self._find() if self.writes else None
        if (chosen := _of_the_first(found and found[0].name)) is None:
            if self.writes:
                (self.folder / RUNS).unlink(missing_ok=True)
            return
        path, content = found or self._whole(self.folder / chosen)
        self.found, self.lists = content["parts"], content["pieces"]
        self._attempt()
        _say(f"going on from {path}, which is {_age(path)} old")

    # ---- what a stage and its loops say ----

    def keep(self, **parts: Part) -> None:
        for name, part in parts.items():
            if name in self.found:
                part.load_state_dict(self.found.pop(name))
        self.parts |= parts

    @contextmanager
    def during(self, **parts: Part) -> Iterator[None]:
        self.keep(**parts)
        if "generator" in self.found:
            import torch

            torch.set_rng_state(self.found.pop("generator")["state"])
        self.loops += 1
        try:
            yield
            self.offer()
        finally:
            self.loops -= 1
            for name in parts:
                del self.parts[name]

    def offer(self) -> None:
        if self.writes and (self.asked_to_end or time.monotonic() - self.began >= self.seconds):
            self.save()
        if self.asked_to_end:
            self._end()

    def goes_on(self, name: str) -> bool:
        return name in self.found

    def pieces(self, name: str) -> "Pieces":
        return self.lists.setdefault(name, self._pieces(name, []))

    def _pieces(self, name: str, seals: list[str]) -> Pieces:
        return Pieces(self.folder / "pieces" / name.strip().replace("/", "-"), seals, self.offer)

    # ---- files ----

    def save(self) -> None:
        """Write all parts, and the pieces that have not been written, as one checkpoint; remove all but the last two.

        Nothing where another process writes. Raises DiskError where they do not fit; the checkpoint before stays.
        """
        if not self.writes:
            return
        self.saving = True
        if not (self.folder / RUNS).exists():
            self._attempt()
            with atomic.writing(self.folder / IDENTITY) as temporary:
                temporary.write_text(json.dumps(self.identity, indent=1))
        for pieces in self.lists.values():
            pieces.write()
        self.number += 1
        with atomic.folder(self.folder / f"{self.number:06d}") as aside:
            _write(self._content(), aside)
        _flush(self.folder)
        for old in self._checkpoints()[:-KEPT]:
            shutil.rmtree(old, ignore_errors=True)
        self.began = time.monotonic()
        self.saving = False

    def _attempt(self) -> None:
        """Note down that this process works at a run which others have worked at, or may go on with."""
        path = self.folder / RUNS
        self.runs = [*(path.read_text().split() if path.exists() else []), *self.runs]
        if self.writes:
            with atomic.writing(path) as temporary:
                temporary.write_text("\n".join(self.runs) + "\n")

    def _content(self) -> dict[str, Any]:
        """What a checkpoint says. Parts that were found and have not been asked for yet are later work, and stay as they are."""
        import torch

        parts = self.found | {name: part.state_dict() for name, part in self.parts.items()}
        # Nothing draws from PyTorch's own generator while a stage trains; it is kept in case that changes.
        parts |= {"generator": {"state": torch.get_rng_state()}}
        return {"pieces": {name: of.seals for name, of in self.lists.items()}, "parts": parts}

    def done(self) -> None:
        """Remove all checkpoints of this stage, those of other parameters or code among them that nobody works on."""
        if self._lock is None:
            return
        shutil.rmtree(self.folder, ignore_errors=True)
        self.close()
        for path in self.place.glob("*"):
            if path.is_dir():
                _remove(path)
        with suppress(OSError):  # another works there, or has removed it
            self.place.rmdir()

    def close(self) -> None:
        self.writes = False
        if self._lock is not None:
            self._lock.release()
            self._lock = None

    def _alone(self) -> bool:
        """Whether nobody else works under this key, such as another worker of a queue that was given the same work."""
        from filelock import Timeout

        lock = _lock(self.folder)
        try:
            lock.acquire(timeout=PATIENCE)
        except Timeout:
            return False
        self._lock = lock
        return True

    def _checkpoints(self) -> list[Path]:
        return sorted(path for path in self.folder.glob("*") if path.name.isdigit())

    def _find(self) -> tuple[Path, dict[str, Any]] | None:
        """The last checkpoint that is whole, and what it says; of the others, why they are not used, is said."""
        for other in sorted(self.place.glob("*")):
            if other.is_dir() and other != self.folder and _unattended(other):
                _say(f"{other}: a checkpoint is set aside: {_why(other, self.identity)}")
        for path in reversed(self._checkpoints()):
            self.number = max(self.number, int(path.name))
            try:
                return self._whole(path)
            except Exception as error:  # whatever a damaged file makes of its reader
                reason = (str(error) or type(error).__name__).splitlines()[0]
                _say(f"{path}: a checkpoint is set aside: it is damaged ({reason})")
                shutil.rmtree(path.with_suffix(".damaged"), ignore_errors=True)
                path.rename(path.with_suffix(".damaged"))
        return None

    def _whole(self, path: Path) -> tuple[Path, dict[str, Any]]:
        """A checkpoint, and what it says, its pieces as lists of them. Raises an error where it is damaged."""
        content = _read(path)
        content["pieces"] = {name: self._pieces(name, seals) for name, seals in content["pieces"].items()}
        for pieces in content["pieces"].values():
            pieces.check()
        return path, content

    # ---- SIGTERM ----

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Behind the step of a loop, else at once. A second SIGTERM does not wait, unless it is the first told twice: to the whole group of
        processes, and by the end of DVC (`launch.end_with_parent`)."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return

        def heard(*_: Any) -> None:
            if self.asked_to_end:
                if time.monotonic() - self.asked_at > ONE_END:
                    raise SystemExit(128 + signal.SIGTERM)
                return
            self.asked_at = time.monotonic()
            if self.loops or self.saving:
                # Of several processes the first writes and ends; then the others have nobody to work with.
                self.asked_to_end = True
                return
            if self.writes and self.lists:
                self.save()
            self._end()

        before = signal.signal(signal.SIGTERM, heard)
        try:
            yield
        finally:
            signal.signal(signal.SIGTERM, before)

    def _end(self) -> None:
        if is_main():
            _say("ended by SIGTERM; run again, it goes on from here")
            raise SystemExit(128 + signal.SIGTERM)


def of_stage(
    stage: str, params: dict[str, Any], inputs: Iterable[Path], minutes: float | None, run: str, trial: str | None
) -> Checkpoint:
    """The checkpoints of a stage that was given these parameters, those that DVC tracks for it, and inputs; `minutes` None: none.

    run      key of the journal of its MLflow run
    trial    number of a trial of the study, which is a stage inside another
    """
    if minutes is None:
        nothing = Checkpoint()
        nothing.runs = [run]
        return nothing
    identity = {
        "parameters": params,
        "code": _hashes(pipeline.code(stage)),
        "inputs": _hashes(inputs),
        "processes": int(os.environ.get("WORLD_SIZE", 1)),
        "device": device(),
        "arithmetic": arithmetic.name(),
        "torch": version("torch"),
    }
    return OnDisk(stage if trial is None else f"{stage}.{trial}", identity, minutes, run, write=is_main())


def _of_the_first(chosen: str | None) -> str | None:
    """What the first of several processes chose: another that looks a moment later may find one that a process asked to end has written."""
    if int(os.environ.get("WORLD_SIZE", 1)) == 1:
        return chosen
    import torch
    from accelerate import PartialState

    PartialState(cpu=not torch.cuda.is_available())  # they find each other here, not first where they train
    said = [chosen]
    torch.distributed.broadcast_object_list(said, src=0)
    return said[0]


def folder() -> Path:
    return pipeline.root() / ".dvc" / "tmp" / "rlhf" / "checkpoints"


# ---- what is in the files --------------------------------------------------------------------------------------------


def _write(content: dict[str, Any], aside: Path) -> None:
    """Tensors, and the rest with their hash in it, and its own in front of it."""
    from safetensors.torch import save_file

    tensors: dict[str, Any] = {}
    text = _json(content, tensors)
    save_file(tensors, aside / TENSORS)
    text = json.dumps({"tensors": _sha256(aside / TENSORS)}) + "\n" + text
    (aside / STATE).write_text(f"{hashlib.sha256(text.encode()).hexdigest()}\n{text}")
    for path in (aside / TENSORS, aside / STATE):
        _flush(path)


def _read(path: Path) -> dict[str, Any]:
    """What `_write` wrote. Raises ValueError where it is not."""
    from safetensors.torch import load_file

    seal, _, text = (path / STATE).read_text().partition("\n")
    if hashlib.sha256(text.encode()).hexdigest() != seal:
        raise ValueError(f"{STATE} is not what was written")
    tensors, _, text = text.partition("\n")
    if _sha256(path / TENSORS) != json.loads(tensors)["tensors"]:
        raise ValueError(f"{TENSORS} is not what was written")
    return _object(text, load_file(path / TENSORS))


def _json(value: Any, tensors: dict[str, Any] | None) -> str:
    """JSON of a value, tables in it; its tensors go into `tensors`, where those that share memory are one."""

    def other(value: Any) -> Any:
        if type(value).__name__ == "DataFrame":
            return {"$table": {name: column.tolist() for name, column in value.items()}}
        if type(value).__module__ == "numpy":
            return value.tolist()
        if tensors is None or not hasattr(value, "data_ptr"):
            raise TypeError(f"a checkpoint cannot hold a {type(value).__name__}")
        value = value.detach()
        for name, known in tensors.items():
            if (known.data_ptr(), known.shape, known.dtype) == (value.data_ptr(), value.shape, value.dtype):
                return {"$tensor": name}
        name = str(len(tensors))
        tensors[name] = value.contiguous()
        return {"$tensor": name}

    return json.dumps(value, default=other)


def _object(text: str, tensors: dict[str, Any]) -> Any:
    def made(value: dict[str, Any]) -> Any:
        match value:
            case {"$tensor": name}:
                return tensors[name]
            case {"$table": columns}:
                import pandas as pd

                return pd.DataFrame(columns)
        return value

    return json.loads(text, object_hook=made)


# ---- whose they are --------------------------------------------------------------------------------------------------


def _key(identity: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:16]


def _hashes(paths: Iterable[Path]) -> dict[str, str]:
    """Hash of each file, of files and folders."""
    return {str(path): _sha256(path) for path in _files(paths)}


def _files(paths: Iterable[Path]) -> Iterator[Path]:
    for path in paths:
        if path.is_dir():
            yield from sorted(p for p in path.rglob("*") if p.is_file() and p.suffix != ".pyc")
        elif path.exists():
            yield path


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _why(other: Path, identity: dict[str, Any]) -> str:
    """In what a checkpoint's identity is another one."""
    try:
        theirs = json.loads((other / IDENTITY).read_text())
    except (OSError, ValueError):
        return "it does not say what it is of"
    if theirs["parameters"] != identity["parameters"]:
        return f"it is of other parameters ({', '.join(_differ(theirs['parameters'], identity['parameters']))})"
    for name in ("inputs", "code"):
        if theirs[name] != identity[name]:
            return f"it is of other {name} ({', '.join(_differ(theirs[name], identity[name]))})"
    kinds = ("processes", "device", "arithmetic", "torch")
    name = next(name for name in kinds if theirs.get(name) != identity[name])
    return f"it was made with {name} {theirs.get(name)}, and this is {identity[name]}"


def _differ(one: dict[str, Any], other: dict[str, Any], prefix: str = "") -> list[str]:
    """Dotted names of what differs, three at most."""
    found: list[str] = []
    for key in sorted(one.keys() | other.keys()):
        a, b = one.get(key), other.get(key)
        if isinstance(a, dict) and isinstance(b, dict):
            found += _differ(a, b, f"{prefix}{key}.")
        elif a != b:
            found.append(f"{prefix}{key}")
    return found[:3]


def _lock(path: Path) -> Any:
    """Who works under a key. Its file, which is empty, is never removed: somebody may be waiting for it."""
    from filelock import FileLock

    place = folder().with_name("locks") / f"{path.parent.name}-{path.name}.lock"
    place.parent.mkdir(parents=True, exist_ok=True)
    return FileLock(place, thread_local=False)


def _remove(path: Path) -> None:
    """What is kept under a key that nobody works on; whoever begins meanwhile waits."""
    from filelock import Timeout

    with suppress(Timeout), _lock(path).acquire(timeout=0):
        shutil.rmtree(path, ignore_errors=True)


def _unattended(path: Path) -> bool:
    from filelock import Timeout

    try:
        with _lock(path).acquire(timeout=0):
            return True
    except Timeout:
        return False


def _age(path: Path) -> str:
    seconds = time.time() - path.stat().st_mtime
    return f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.0f} min"


def _flush(path: Path) -> None:
    """Onto the disk, a file or the names in a folder."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _say(what: str) -> None:
    if is_main():
        print(f"\ncheckpoint: {what}", file=sys.stderr)
