"""A process beside the stages that tells MLflow what they say: one JSON line for each thing said.

    {"create": "rl@ppo-0", "tags": {...}, "params": {...},     first; the answer is {"run_id": ...} or {"error": ...}
     "journals": [...]}                                        keys of the journals of attempts that were killed, and of this one
    {"metrics": {...}, "step": 10, "tags": {...}}              also alone
    {"reads": ["data/prompts.parquet"]}, {"artifact": "report/report.md"}
    {"end": "FINISHED"}                                        last; the answer is {"end": ...} or {"error": ...}, with {"unsent": key}
                                                               where a journal still holds what MLflow does not have

Importing MLflow takes as long as importing torch does; here it happens meanwhile, and under `make repro` once for all stages: they share
the process that `shared` starts. A stage by itself starts its own. A stage that is killed says no `end`, and its run is marked FAILED.
What is said goes through a file (`journal`), so that MLflow may be away meanwhile.
"""

import contextlib
import itertools
import json
import os
import queue
import re
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from rlhf_vs_dpo.errors import DataError, DiskError, UserError
from rlhf_vs_dpo.run import journal, shortage, store

ANSWER_SECONDS = 60.0  # for the id of a run, where somebody asks for it; a store that is there answers in seconds
SYSTEM_SECONDS = 5  # between two looks at processor, memory and GPU
SHARED = "RLHF_RECORDER"  # the socket of a process that several stages share
# What "dirty" looks at: DVC itself removes the committed metrics and curves of a stage before it runs.
WRITTEN_BY_HAND = ("src", "stages", "data/mini_tldr", "dvc.yaml", "params.yaml", "constraints.txt")


class Recorder:
    """The stage's end of the line."""

    def __init__(self) -> None:
        self.said, self.answers, self.process = _line()
        self.run_id: str | None = None
        self.failure: str | None = None
        self.unsent: str | None = None
        self.answered, self.ended = threading.Event(), threading.Event()
        threading.Thread(target=self._listen, daemon=True).start()

    def _listen(self) -> None:
        try:
            for line in self.answers:
                self._heard(line)
        except OSError:  # a shared recorder that was killed before it had read all: `tell` says so
            pass
        finally:
            self.answered.set()
            self.ended.set()

    def _heard(self, line: str) -> None:
        try:
            answer = json.loads(line)
        except json.JSONDecodeError:  # a library that prints
            sys.stderr.write(line)
            return
        self.run_id = answer.get("run_id", self.run_id)
        self.failure = answer.get("error", self.failure)
        self.unsent = answer.get("unsent", self.unsent)
        if "notice" in answer:
            print(f"\nwarning [mlflow]: {answer['notice']}", file=sys.stderr)
        else:
            self.answered.set()

    def begun(self) -> str | None:
        """Wait a moment for the run to have an id, and return it; None where MLflow has not answered yet."""
        self.answered.wait(ANSWER_SECONDS)
        return self.run_id

    def tell(self, **message: Any) -> None:
        """Send a message. Raises DataError where the store has turned out to be unusable."""
        if self.failure is not None:
            raise DataError(self.failure)
        try:
            self.said.write(json.dumps(message) + "\n")
            self.said.flush()
        except (BrokenPipeError, ConnectionError):
            self.ended.wait()
            raise DataError(
                self.failure
                or "the process that tells MLflow has ended; its message stands above, or in logs/mlflow.log"
            ) from None

    def end(self, status: str) -> str | None:
        """End the run, wait until MLflow has everything, and return the run's id.

        Where MLflow is silent for too long, what it does not have is kept, and the id of a run that it has never heard of is that of
        its journal (`store.known_as`). Raises DataError if MLflow did not take it all (not for a run that FAILED: its own error matters more).
        """
        try:
            self.tell(end=status)
            self.said.close()
        except (DataError, OSError, ValueError):  # ValueError: it has been ended before
            if status != "FAILED":
                raise
        self.ended.wait()
        status_of_process = 0 if self.process is None else self.process.wait()
        if status != "FAILED" and (self.failure is not None or status_of_process != 0):
            raise DataError(
                self.failure
                or "the process that tells MLflow ended early; its message stands above, or in logs/mlflow.log"
            )
        if self.unsent is None:
            return self.run_id
        minutes = journal.SILENT_SECONDS / 60
        print(
            f"\nwarning [mlflow]: MLflow has not answered for {minutes:g} minutes; what it does not have of this run is kept in "
            f"{journal.folder()}, and `{journal.SEND}` sends it",
            file=sys.stderr,
        )
        return self.run_id or store.JOURNAL + self.unsent


def _line() -> tuple[IO[str], IO[str], subprocess.Popen | None]:
    """Where to say things, where answers come, and the process that does it, if it is this stage's own."""
    if place := os.environ.get(SHARED):
        line = socket.socket(socket.AF_UNIX)
        try:
            line.connect(place)
        except OSError:  # that `make repro` has ended
            line.close()
        else:
            return line.makefile("w"), line.makefile("r"), None
    # A session of its own: Ctrl-C ends the stage, and then this learns of it by the end of its input.
    process = subprocess.Popen(
        [sys.executable, "-m", "rlhf_vs_dpo.run.recorder"],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, start_new_session=True,
    )  # fmt: skip
    assert process.stdin is not None and process.stdout is not None  # both are pipes
    return process.stdin, process.stdout, process


@contextmanager
def shared(log: Path) -> Iterator[None]:
    """One process for all stages that are started meanwhile; what libraries print goes to `log`."""
    with tempfile.TemporaryDirectory(prefix="rlhf-") as folder, socket.socket(socket.AF_UNIX) as door:
        place = str(Path(folder) / "recorder")  # the path of a socket must be short
        try:
            door.bind(place)
        except OSError:  # a folder for temporary files with a very long name: each stage starts its own
            yield
            return
        door.listen()
        # It ends by itself when its input has ended, which is also when this process is killed, and every stage has hung up.
        with log.open("w") as output:
            process = subprocess.Popen(
                [sys.executable, "-m", "rlhf_vs_dpo.run.recorder", str(door.fileno())],
                stdin=subprocess.PIPE, stdout=output, stderr=output, pass_fds=[door.fileno()], start_new_session=True,
            )  # fmt: skip
        before = os.environ.get(SHARED)
        os.environ[SHARED] = place
        try:
            yield
        finally:
            del os.environ[SHARED]
            if before is not None:
                os.environ[SHARED] = before
            process.communicate()


def flat(values: dict[str, Any], prefix: str = "") -> dict[str, float]:
    """Numbers of nested metrics under names that MLflow takes; a slash is a level."""
    found: dict[str, float] = {}
    for key, value in values.items():
        name = prefix + re.sub(r"[^\w\-./ ]", "_", str(key))
        if isinstance(value, dict):
            found |= flat(value, f"{name}/")
        elif isinstance(value, (int, float)):
            found[name] = float(value)
    return found


# ---- the other end ---------------------------------------------------------------------------------------------------


def tags_of(name: str, tags: dict[str, str]) -> dict[str, str]:
    """What one filters on in the UI: stage, method, commit, profile, and what the stage says of itself."""
    from rlhf_vs_dpo.run import profiles

    tags = {"dvc.stage": name, "profile": profiles.current(), **tags}
    if commit := _git("rev-parse", "HEAD"):
        tags["mlflow.source.git.commit"] = commit
        tags["git.dirty"] = str(bool(_git("status", "--porcelain", "--", *WRITTEN_BY_HAND))).lower()
    return tags


def _git(*arguments: str) -> str:
    from rlhf_vs_dpo.run.pipeline import root

    done = subprocess.run(["git", *arguments], cwd=root(), capture_output=True, text=True, check=False)
    return done.stdout.strip() if done.returncode == 0 else ""


class Machine:
    """MLflow's own looks at processor, memory, disk, network and GPU, said as other metrics are: an outage loses none of them."""

    def __init__(self, say: Callable[..., None]):
        from mlflow.system_metrics.metrics.cpu_monitor import CPUMonitor
        from mlflow.system_metrics.metrics.disk_monitor import DiskMonitor
        from mlflow.system_metrics.metrics.gpu_monitor import GPUMonitor
        from mlflow.system_metrics.metrics.network_monitor import NetworkMonitor

        self.say, self.looks, self.done = say, [CPUMonitor(), DiskMonitor(), NetworkMonitor()], threading.Event()
        with contextlib.suppress(Exception):  # of NVIDIA's library, where there is no GPU
            self.looks.append(GPUMonitor())
        self.thread = threading.Thread(target=self._watch, daemon=True)
        self.thread.start()

    def _watch(self) -> None:
        for step in itertools.count():
            for look in self.looks:
                look.collect_metrics()
            if self.done.wait(SYSTEM_SECONDS):
                return
            seen = [look.aggregate_metrics() for look in self.looks]
            self.say(metrics={f"system/{name}": value for part in seen for name, value in part.items()}, step=step)
            for look in self.looks:
                look.clear_metrics()

    def finish(self) -> None:
        self.done.set()
        self.thread.join()


def hashes(paths: list[str], of_dvc: bool) -> dict[str, str]:
    """path -> md5 of those paths that dvc.lock knows.

    Another stage that ends right now rewrites dvc.lock: a stage that DVC started looks again for a moment for what is not in it.
    """
    from ruamel.yaml.error import YAMLError

    from rlhf_vs_dpo.run.pipeline import locked

    known: dict[str, str] = {}
    for _ in range(10 if of_dvc else 1):
        try:
            known = locked()
        except (YAMLError, AttributeError):  # half of it
            known = {}
        if all(path in known for path in paths):
            break
        time.sleep(0.3)
    return {path: known[path] for path in paths if path in known}


def main() -> None:
    """Serve the stage on standard input and output, or all that connect to the socket whose number is given."""
    answers, sys.stdout = sys.stdout, sys.stderr  # what libraries print is no answer
    # Once, and before there are threads: two that import MLflow at the same time find half of it.
    import mlflow.tracking  # noqa: F401

    threading.Thread(target=_send_left, daemon=True).start()
    if len(sys.argv) == 1:
        sys.exit(0 if serve(sys.stdin, answers) else 1)
    door, conversations = socket.socket(fileno=int(sys.argv[1])), []

    def wait_for_the_end() -> None:
        sys.stdin.read()
        door.shutdown(socket.SHUT_RDWR)  # nobody comes any more; `accept` ends

    threading.Thread(target=wait_for_the_end, daemon=True).start()
    while True:
        try:
            line, _ = door.accept()
        except OSError:
            break
        conversations.append(threading.Thread(target=_converse, args=[line]))
        conversations[-1].start()
    for conversation in conversations:
        conversation.join()


def _send_left() -> None:
    """What stages before could not send, tried once."""
    with contextlib.suppress(journal.Unanswered, DataError, DiskError):
        journal.send_left(lambda notice: print(notice, file=sys.stderr))


def _converse(line: socket.socket) -> None:
    try:
        with line, line.makefile("r") as said, line.makefile("w") as answers:
            try:
                serve(said, answers)
            finally:
                line.shutdown(socket.SHUT_RDWR)  # whoever still reads from it stops
    except OSError:  # a stage that was killed hears no answer
        pass


def serve(said: IO[str], answers: IO[str]) -> bool:
    """Record one run from the lines that are said until they end; False where MLflow did not take it."""

    def answer(**content: Any) -> None:
        # A stage that was killed hears no answer; its run is sent all the same.
        with contextlib.suppress(OSError, ValueError):
            answers.write(json.dumps(content) + "\n")
            answers.flush()

    begun = said.readline()
    if not begun:
        return True
    journals = json.loads(begun).get("journals", [None])
    kept = journal.Journal(journals[-1])
    sender = journal.Sender(kept, lambda notice: answer(notice=notice))
    heard: queue.Queue[dict[str, Any] | Exception] = queue.Queue()
    threading.Thread(target=_hear, args=[begun, said, sender, heard], daemon=True).start()
    try:
        while True:
            try:
                message = heard.get(timeout=journal.FLUSH_SECONDS)
            except queue.Empty:
                sender.flush()
                continue
            if isinstance(message, Exception):
                raise message
            sender.send(message)
            if "create" in message:
                answer(run_id=sender.run_id)
            if "end" in message:
                answer(end=message["end"])
                return True
    except journal.Unanswered:
        kept.close()
        answer(end="unsent", unsent=journals[0] or kept.key)
        return True
    except Exception as error:
        if isinstance(error, DiskError):
            kept.close()  # the next attempt sends what is there
        else:
            kept.remove()
        answer(error=str(error) if isinstance(error, UserError) else f"MLflow: {type(error).__name__}: {error}")
        return False


def _hear(begun: str, said: IO[str], sender: journal.Sender, heard: queue.Queue) -> None:
    """Write down what a stage says, until it ends or hangs up, and pass it on."""
    watching: Machine | None = None

    def say(**message: Any) -> None:
        heard.put(sender.journal.add(message))

    killed_before = shortage.kills()
    try:
        for line in itertools.chain([begun], _until_hung_up(said)):
            message = written(json.loads(line))
            if "end" in message:
                break
            say(**message)
            if "create" in message:
                watching = Machine(say)
        else:
            message = {"end": "FAILED"}  # of a stage that is killed
            if shortage.kills() > killed_before:
                say(tags={"killed": "out of memory"})
                print(f"\nerror: the stage was killed because memory ran out; {shortage.ADVICE}\n", file=sys.stderr)
        if watching is not None:
            watching.finish()
        sender.ended = True
        say(**message)
    except Exception as error:
        heard.put(error)


def written(message: dict[str, Any]) -> dict[str, Any]:
    """What a stage said as the line of a journal: what git and DVC know of it at this moment is written down, too."""
    if "create" in message:
        name, tags = message["create"], message["tags"]
        row = store.EXPERIMENT if "policy" in tags and "family" in tags else store.STAGES
        place = store.STUDY if "study" in tags or name.startswith("tuning/") else row
        return message | {"experiment": place, "tags": tags_of(name, tags)}
    if "reads" in message:
        return {"inputs": hashes(message["reads"], message["of_dvc"])}
    return message


def _until_hung_up(said: IO[str]) -> Iterator[str]:
    try:
        yield from said
    except (OSError, ValueError):
        return


if __name__ == "__main__":
    main()
