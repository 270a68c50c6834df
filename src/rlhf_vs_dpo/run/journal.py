"""What is said of a run, on disk until MLflow has it: an outage of the store delays a run, and loses no number.

Each thing said is a line of a file, with the time at which it was said; how many of them MLflow has taken stands beside it. They are sent
in order, again and again until MLflow answers. A line whose answer was lost does no harm when it is sent again: MLflow keeps a metric of
the same run, time, step and value once, and a run is found again by its tag `journal`, the key of its first journal. A stage that goes on
from a checkpoint has a journal of its own and goes on with the run: steps that the run has already are not sent again.

    python -m rlhf_vs_dpo.run.journal      send what stages left that have ended, or were killed
"""

import contextlib
import json
import shutil
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from rlhf_vs_dpo.errors import DataError, DiskError
from rlhf_vs_dpo.run import atomic, store
from rlhf_vs_dpo.run.pipeline import root

SILENT_SECONDS = 600.0  # without an answer; then a stage that has ended waits no longer
FLUSH_SECONDS = 5.0
PARENT_SECONDS = 30  # for the run that a trial belongs to: both are sent when MLflow answers again, in no order
LIMIT = 64 * 2**20  # bytes of what is still to be sent; a stage that says more waits
SEND = "python -m rlhf_vs_dpo.run.journal"


class Unanswered(Exception):
    """MLflow was silent for so long that nobody waits for it any more."""


class Journal:
    """The lines of one run. Whoever holds the lock of a journal attends to it; a lock goes with its process."""

    def __init__(self, key: str | None = None):
        from filelock import FileLock

        self.key = key or uuid.uuid4().hex
        self.path = folder() / f"{self.key}.jsonl"
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.lock = FileLock(self.path.with_suffix(".lock"), thread_local=False)
        self.lock.acquire(timeout=0)  # raises filelock.Timeout where somebody else attends to it
        if self.path.exists():  # half a line at the end, of a process that was killed, is cut off
            with self.path.open("r+b") as file:
                file.truncate(file.read().rfind(b"\n") + 1)
        self.sent = self._noted()
        self._before = len(self.lines()) if self.path.exists() else 0  # lines of attempts before this one
        self._ends = [0]  # bytes of this one's lines, up to each of them
        self.unsent_bytes = 0
        self._turn = threading.Condition()

    @property
    def _count(self) -> Path:
        return self.path.with_suffix(".sent")

    def _noted(self) -> int:
        """How many lines MLflow is known to have; 0 where nobody could note it: to send a line again does no harm."""
        try:
            return int(self._count.read_text())
        except (OSError, ValueError):
            return 0

    @property
    def files(self) -> Path:
        """Folder of copies of what is to be sent as an artifact."""
        return self.path.with_suffix(".files")

    def add(self, message: dict[str, Any]) -> dict[str, Any]:
        """Write a line, stamped with the time; returns it as it was written. Waits while too much is still to be sent."""
        message = {"at": int(time.time() * 1000)} | message
        if "artifact" in message:
            message["artifact"] = self._kept(Path(message["artifact"]))
        line = json.dumps(message) + "\n"
        with self._turn:
            self._turn.wait_for(lambda: self.unsent_bytes < LIMIT)
            try:
                with self.path.open("a") as file:
                    file.write(line)
            except OSError as error:
                if error.errno not in atomic.FULL:
                    raise
                raise DiskError(
                    f"{self.path}: the disk is full: {len(line):,} bytes more do not fit; make room and run again"
                ) from error
            self.unsent_bytes += len(line)
            self._ends.append(self._ends[-1] + len(line))
        return message

    def _kept(self, artifact: Path) -> str:
        """A copy, for the file may be another one by the time it is sent."""
        self.files.mkdir(exist_ok=True)
        place = self.files / str(len(list(self.files.iterdir())))
        place.mkdir()
        return str(shutil.copy2(artifact, place))

    def lines(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.path.read_text().splitlines()]

    def taken(self, count: int) -> None:
        """Note that MLflow has `count` lines."""
        self.sent = count
        with atomic.writing(self._count) as temporary:
            temporary.write_text(str(count))
        with self._turn:
            own = min(max(count - self._before, 0), len(self._ends) - 1)
            self.unsent_bytes = self._ends[-1] - self._ends[own]
            self._turn.notify_all()

    def remove(self) -> None:
        self.path.unlink(missing_ok=True)
        self._count.unlink(missing_ok=True)
        shutil.rmtree(self.files, ignore_errors=True)
        self.close()
        self.path.with_suffix(".lock").unlink(missing_ok=True)

    def close(self) -> None:
        self.lock.release()


def folder() -> Path:
    return root() / ".dvc" / "tmp" / "rlhf" / "mlflow"


def _when_nobody_attends(key: str) -> Journal:
    """The journal of an attempt that was killed, as soon as nobody attends to it any more."""
    from filelock import Timeout

    while True:
        try:
            return Journal(key)
        except Timeout:
            time.sleep(0.2)


class Sender:
    """Sends the lines of one journal to MLflow.

    say         told once, in words, when MLflow falls silent, and when it answers again
    patience    seconds of silence after which nobody waits who has nothing else to do
    """

    def __init__(self, journal: Journal, say: Callable[[str], None], patience: float = SILENT_SECONDS):
        self.journal, self.say, self.patience = journal, say, patience
        self.run_id: str | None = None
        self.steps: dict[str, set[int]] | None = None  # of each metric, of attempts before; None: there were none
        self.shift: int | None = None  # of looks at the machine, see `_shift`
        self.waiting: list[Any] = []
        self.flushed = time.monotonic()
        self.heard = journal.sent  # lines that were handed to `send`, those before among them
        self.ended = False  # whether the stage has: only then does waiting come to an end

    def send(self, message: dict[str, Any]) -> None:
        """Send one line. Raises what MLflow raises where it answers, and Unanswered where it does not, see `patiently`."""
        if self.run_id is None:
            begun = message if "create" in message else self.journal.lines()[0]
            before = self._journals(begun)[:-1]
            # Whoever still attends to an attempt before may be about to make the run. None is held while another is waited for: they wait, too.
            for key in before:
                _when_nobody_attends(key).close()
            self.run_id = self.patiently(lambda: self._run(begun))
            for key in before:
                self._take_over(_when_nobody_attends(key))
        self.heard += 1
        self._send(message)
        if "end" in message or len(self.waiting) >= store.BATCH or time.monotonic() - self.flushed > FLUSH_SECONDS:
            self.flush()
        if "end" in message:
            self.patiently(lambda: store.client().set_terminated(self.run_id, message["end"], message["at"]))
            self.journal.remove()

    def _send(self, message: dict[str, Any]) -> None:
        client, run_id = store.client(), self.run_id
        if "metrics" in message:
            step = message["step"] + self._shift(message)
            self.waiting += store.metrics(self._unknown(message["metrics"], step), step, message["at"])
        if tags := message.get("tags") if "create" not in message else None:
            self.patiently(lambda: [client.set_tag(run_id, key, value) for key, value in tags.items()])
        if "inputs" in message:
            self.patiently(lambda: self._inputs(message["inputs"]))
        if "artifact" in message:
            self.patiently(lambda: client.log_artifact(run_id, message["artifact"]))

    def _journals(self, begun: dict[str, Any]) -> list[str]:
        """Keys of the journals of a run: those of attempts that were killed, and the one of this sender."""
        return begun.get("journals") or [self.journal.key]

    def _take_over(self, before: Journal) -> None:
        """Send what the journal of an attempt that was killed still holds."""
        if before.path.exists():
            for line in before.lines()[before.sent :]:
                self._send(line)
            self.flush()
            self.steps, self.shift = {}, None  # the run has more steps now
        before.remove()

    def _unknown(self, metrics: dict[str, float], step: int) -> dict[str, float]:
        """Those metrics of a step that the run does not have yet."""
        if self.steps is None:
            return metrics
        return {name: value for name, value in metrics.items() if step not in self._known(name)}

    def _known(self, name: str) -> set[int]:
        """Steps of a metric that the run has of attempts before."""
        assert self.steps is not None, "this is the first attempt"
        if name not in self.steps:
            history = partial(store.client().get_metric_history, self.run_id, name)
            self.steps[name] = {known.step for known in self.patiently(history)}
        return self.steps[name]

    def _shift(self, message: dict[str, Any]) -> int:
        """Each attempt counts its looks at the machine from 0: what is added to their steps, so that they stand behind those before."""
        name = next(iter(message["metrics"]), "")
        if self.steps is None or not name.startswith("system/"):
            return 0
        if self.shift is None:
            self.shift = max(0, 1 + max(self._known(name), default=-1) - message["step"])
        return self.shift

    def flush(self) -> None:
        """Send the metrics that wait for others."""
        while self.waiting:
            batch = self.waiting[: store.BATCH]
            self.patiently(partial(store.client().log_batch, self.run_id, metrics=batch))
            self.waiting = self.waiting[store.BATCH :]
        self.flushed = time.monotonic()
        self.journal.taken(self.heard)

    def _run(self, begun: dict[str, Any]) -> str:
        """The run of this journal: made, or found again where it is that of an attempt before, or the answer to its making was lost."""
        place, client = store.experiment(begun["experiment"]), store.client()
        first, *again = self._journals(begun)
        made = client.search_runs([place], f"tags.journal = '{first}'", max_results=1)
        if not made:
            tags = begun["tags"] | {"journal": first}
            if parent := tags.get("mlflow.parentRunId"):
                tags["mlflow.parentRunId"] = _sent_by_now(parent)
            made = [client.create_run(place, begun["at"], tags, tags.get("policy", begun["create"]))]
        run_id = made[0].info.run_id
        if again:
            self.steps = {}
            client.update_run(run_id, "RUNNING")
            client.set_tag(run_id, "attempts", 1 + len(again))
        client.log_batch(run_id, params=store.params(begun["params"]))
        return run_id

    def _inputs(self, hashes: dict[str, str]) -> None:
        from mlflow.entities import RunTag

        client = store.client()
        client.log_batch(self.run_id, tags=[RunTag(f"dvc.dep.{path}", md5) for path, md5 in hashes.items()])
        if tables := store.datasets(hashes):
            client.log_inputs(self.run_id, tables)

    def patiently(self, action: Callable[[], Any]) -> Any:
        """What `action` returns, see the function; a stage that works does not mind how long it takes."""
        kept = f"work goes on, and what is said is kept in {folder()} until it does"
        return patiently(action, self.say, kept, lambda: self.patience if self.ended else None)


def _sent_by_now(run_id: str) -> str:
    """`store.known_as` of a run that somebody else is about to send; after a moment, the name of its journal."""
    from mlflow.exceptions import MlflowException

    for _ in range(PARENT_SECONDS):
        try:
            return store.known_as(run_id)
        except MlflowException as error:
            if out_of_reach(error):
                raise
        time.sleep(1)
    return run_id


def patiently(
    action: Callable[[], Any], say: Callable[[str], None], meanwhile: str, patience: Callable[[], float | None]
) -> Any:
    """What `action` returns, tried until MLflow answers.

    Says once that it does not, and what happens `meanwhile`. Raises Unanswered where MLflow has been silent for `patience()` seconds,
    whomever it was silent to first; never, where that is None.
    """
    pause = 1.0
    while True:
        try:
            result = action()
        except Exception as error:  # MLflow lets through what SQLAlchemy, SQLite and requests raise
            if not out_of_reach(error):
                raise
            first = not silence().exists()
            since = silent_since()
            if first:
                say(f"MLflow does not answer ({_short(error)}); {meanwhile}")
            if (limit := patience()) is not None and time.time() - since >= limit:
                raise Unanswered(_short(error)) from error
            time.sleep(pause)
            pause = min(2 * pause, 15.0)
        else:
            if silence().exists():
                silence().unlink(missing_ok=True)
                say("MLflow answers again")
            return result


def out_of_reach(error: BaseException | None) -> bool:
    """Whether an error says that the store did not answer, not that it refused.

    A server that is away, starting, or without its database; an SQLite file that somebody else has locked.
    """
    from mlflow.exceptions import MlflowException
    from requests.exceptions import ConnectionError, Timeout

    while error is not None:
        said = str(error).lower()
        if "database is locked" in said:
            return True
        if store.database() is None and (
            (isinstance(error, MlflowException) and (error.get_http_status_code() >= 500 or "429" in said))
            or isinstance(error, (ConnectionError, Timeout))
        ):
            return True
        error = error.__cause__
    return False


def silence() -> Path:
    """A file that is there while MLflow is silent: since when."""
    return folder() / "silent"


def silent_since() -> float:
    """When MLflow fell silent: now, if nobody has noted it yet. Several threads may note it at once, each the same."""
    try:
        return float(silence().read_text())
    except (OSError, ValueError):
        with contextlib.suppress(OSError):  # of a full disk: the note only helps others
            folder().mkdir(parents=True, exist_ok=True)
            silence().write_text(str(time.time()))
        return time.time()


def _short(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]


def left() -> Iterator[Journal]:
    """Journals that nobody attends to: of stages that stopped waiting, or were killed."""
    from filelock import Timeout

    for path in sorted(folder().glob("*.jsonl")):
        try:
            journal = Journal(path.stem)
        except Timeout:
            continue
        if path.exists():  # else it was sent and removed meanwhile
            yield journal


def send_left(say: Callable[[str], None], patience: float = 0.0) -> int:
    """Send all that is left; returns how many runs that were. A stage that was killed before its end has FAILED.

    Raises Unanswered where MLflow does not answer for `patience` seconds, DiskError where the disk is full.
    """
    count = 0
    for journal in left():
        sender = Sender(journal, say, patience)
        sender.ended = True
        try:
            lines = journal.lines()
            if lines and "create" in lines[0]:
                if "end" not in lines[-1]:
                    lines.append(journal.add({"end": "FAILED"}))
                for line in lines[journal.sent :]:
                    sender.send(line)
                count += 1
            journal.remove()
        except (Unanswered, DiskError):
            journal.close()
            raise
        except Exception as error:
            journal.path.rename(journal.path.with_suffix(".refused"))
            journal.close()
            say(
                f"MLflow refused a run that was left: {_short(error)}; it stays in {journal.path.with_suffix('.refused')}"
            )
    return count


def main() -> None:
    try:
        count = send_left(print)
    except Unanswered as error:
        sys.exit(f"error: MLflow does not answer ({error}); what is to be sent stays in {folder()}")
    except (DataError, DiskError) as error:
        sys.exit(f"error: {error}")
    print(f"{count} runs were sent" if count else "nothing is left to be sent")


if __name__ == "__main__":
    main()
