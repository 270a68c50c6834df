"""The frame of every stage: its parameters, where its numbers go, and errors a user can act on.

What MLflow is told goes through a process beside the stage (`recorder`): a second of imports and every wait for a store
happen there, and a stage that is killed leaves a run that says so. Nothing here can change a number of a table or a model.
"""

import os
import signal
import sys
import time
import uuid
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Any, NamedTuple

from rlhf_vs_dpo.errors import ModelError, TrainingError, UserError
from rlhf_vs_dpo.run import arithmetic, atomic, pipeline, shortage, store
from rlhf_vs_dpo.run.checkpoint import NOT_KEPT, Checkpoint, of_stage
from rlhf_vs_dpo.run.launch import is_main
from rlhf_vs_dpo.run.recorder import Recorder, flat


class Trial(NamedTuple):
    """A stage run inside another: with `params` in the place of params.yaml, as `stage` (`rl@ppo-0`), under `tags` of its own.

    `measure` is called when its outputs are written; the numbers it returns go onto the run, too.
    """

    params: dict[str, Any]
    stage: str
    tags: dict[str, str]
    measure: Callable[[], dict[str, float]] = dict


_TRIAL: ContextVar[Trial | None] = ContextVar("trial", default=None)


@contextmanager
def trial(given: Trial) -> Iterator[None]:
    """What a stage that is called meanwhile is told. Its UserErrors are raised, for whoever called it."""
    token = _TRIAL.set(given)
    try:
        yield
    finally:
        _TRIAL.reset(token)


class Run:
    """What a stage is handed: its parameters, where to put its numbers, and what it keeps to go on from."""

    def __init__(self, params: dict[str, Any], recorder: Recorder | None = None, checkpoint: Checkpoint = NOT_KEPT):
        self.params, self.recorder, self.checkpoint = params, recorder, checkpoint
        self.started = time.monotonic()
        self.rows: list[dict[str, float]] = []
        self.cost: dict[str, float] = {}
        self._logged = {"step"}  # names of metrics, and that of the column of curves

    def section(self, name: str, method: str | None = None) -> Any:
        """A section of params.yaml as its type from `config`."""
        from rlhf_vs_dpo import config

        return config.section(self.params, name, method)

    def log(self, metrics: dict[str, float], step: int) -> None:
        """Metrics of a step: onto MLflow, and into the rows of the stage's curve (`heldout/` is kept as samples)."""
        training = {name: value for name, value in metrics.items() if not name.startswith("heldout/")}
        if training:
            self.rows.append({"step": step} | training)
        self._logged |= metrics.keys()
        self._tell(metrics=metrics, step=step)

    def seconds(self) -> float:
        """How long the stage has worked, before it was killed and since."""
        return time.monotonic() - self.started

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint must know."""
        return {"rows": self.rows, "logged": sorted(self._logged), "seconds": self.seconds()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.rows, self._logged = state["rows"], set(state["logged"])
        self.started -= state["seconds"]

    def reads(self, *paths: Path) -> None:
        """Inputs of the run, with the md5 that dvc.lock knows them by: a tag each, and tables as MLflow datasets.

        `stage` tells of those that are always read; this is for what only some settings open.
        """
        self._tell(reads=[str(path) for path in paths], of_dvc="DVC_STAGE" in os.environ)

    def run_id(self) -> str:
        """The id of this run on MLflow; where MLflow does not answer yet, that of its journal (`store.known_as`)."""
        begun = None if self.recorder is None else self.recorder.begun()
        return begun or store.JOURNAL + self.checkpoint.runs[0]

    def warn(self, name: str, message: str) -> None:
        """A named warning: in the log, and as the tag `warning.<name>` of the run."""
        if is_main():
            print(f"\nwarning [{name}]: {message}", file=sys.stderr)
        self._tell(tags={f"warning.{name}": message})

    def spent(self, **cost: float) -> None:
        """Cost for the report: `parameters` of a network, tokens trained, generated and read, models held at once."""
        self.cost |= cost

    def finish(self, metrics: dict[str, Any], path: Path, step: int = 0) -> None:
        """The final metrics of the stage: a JSON file for DVC; on MLflow those that no step has logged (nested keys joined by /)."""
        if is_main():
            atomic.write_json(metrics, path)
            self._tell(metrics={name: v for name, v in flat(metrics).items() if name not in self._logged}, step=step)

    def curve(self, path: Path) -> None:
        """The rows logged so far as CSV, six digits, one column per metric."""
        if is_main():
            import pandas as pd

            atomic.write_csv(pd.DataFrame(self.rows), path)

    def artifact(self, path: Path) -> None:
        """Copy a small file (a figure, a table) to the run."""
        self._tell(artifact=str(path))

    def _tell(self, **message: Any) -> None:
        if self.recorder is not None:
            self.recorder.tell(**message)


@contextmanager
def stage(
    name: str, inputs: list[Path], run_file: Path | None = None, may_read: Iterable[Path] = (), **tags: str
) -> Iterator[Run]:
    """The frame of every stage: parameters, one MLflow run, checkpoints, errors a user can act on.

    name        used where DVC does not say who we are (a stage started by hand)
    inputs      what it always reads
    may_read    what it reads besides, or at some settings: `reads` says so to MLflow
    run_file    receives the run's id and cost when the stage has succeeded
    tags        of the run; `policy` and `family` together make it a row of the comparison

    A UserError is printed without a traceback and ends the process with status 1; the run is marked FAILED at any exception.
    """
    from rlhf_vs_dpo import config

    recorder, checkpoint = None, NOT_KEPT
    given = _TRIAL.get()
    try:
        whole = config.read_params() if given is None else given.params
        config.check(whole)
        asked = os.environ.get("DVC_STAGE") if given is None else given.stage
        params = pipeline.tracked(whole, asked, **tags)
        if given is not None:
            tags |= given.tags
        journal, minutes = uuid.uuid4().hex, whole["checkpoint"]["minutes"]
        if whole["memory"]["sharding"] and int(os.environ.get("WORLD_SIZE", 1)) > 1:
            minutes = None  # one process would have to write what all hold
        checkpoint = of_stage(asked or name, params, [*inputs, *may_read], minutes, journal, tags.get("trial"))
        if is_main():
            if arithmetic.native():
                print(f"arithmetic: {arithmetic.name()}", file=sys.stderr)
            recorder = Recorder()
            recorder.tell(create=asked or name, tags=tags | _circumstances(), params=params, journals=checkpoint.runs)
        # DVC need not know `memory`: no number depends on it.
        run = Run(params | {"memory": whole["memory"]}, recorder, checkpoint)
        checkpoint.keep(run=run)
        run.reads(*inputs)
        with checkpoint.listening():
            yield run
        if given is not None:
            run.log({f"trial/{name}": value for name, value in given.measure().items()}, 0)
        if recorder is not None:
            spent = {"seconds": round(run.seconds(), 1), "peak_memory_mib": round(_peak_memory(), 1), **run.cost}
            device = _device_name()
            recorder.tell(
                metrics={f"cost/{name}": value for name, value in spent.items()}, step=0, tags={"device": device}
            )
            run_id = recorder.end("FINISHED")
            if run_file is not None:
                content = {"run_id": run_id, "device": device, "arithmetic": arithmetic.name(), **spent}
                atomic.write_json(content, run_file)
        checkpoint.done()
    except BaseException as error:
        if recorder is not None:
            recorder.end("FAILED")
        if isinstance(error, (ModelError, TrainingError)):  # it would fail again
            checkpoint.done()
        error = shortage.of(error) or error
        if isinstance(error, UserError) and given is None:
            print(f"\nerror: {error}\n", file=sys.stderr)
            raise SystemExit(1) from None
        if checkpoint.asked_to_end and not is_main():  # the first process has ended, as it was asked to
            raise SystemExit(128 + signal.SIGTERM) from None
        raise
    finally:
        checkpoint.close()


def _circumstances() -> dict[str, str]:
    """Tags of the process that a stage is."""
    experiment = os.environ.get("DVC_EXP_NAME")
    return {"arithmetic": arithmetic.name(), "processes": os.environ.get("WORLD_SIZE", "1")} | (
        {"dvc.exp": experiment} if experiment else {}
    )


def _device_name() -> str:
    torch = sys.modules.get("torch")  # stages without torch need not import it to say so
    if torch is not None and torch.cuda.is_available():
        return torch.cuda.get_device_name()
    return f"CPU, {os.cpu_count()} cores"


def _peak_memory() -> float:
    """Most memory that this process held, in MiB: on the GPU where there is one, else resident."""
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**20
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 2**20 if sys.platform == "darwin" else peak / 2**10  # bytes there, KiB elsewhere
