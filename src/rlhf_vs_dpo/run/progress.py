"""Where the progress of a loop goes: a bar for people, metrics for MLflow, held-out samples, checkpoints."""

import sys
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

from tqdm import tqdm

from rlhf_vs_dpo.run.checkpoint import NOT_KEPT, Checkpoint

Log = Callable[[dict[str, float], int], None]


class Watch(Protocol):
    """Measures a policy at some of its steps (training/monitor.py).

    asked    prompts that it is sampled for; 0 where it is measured without samples
    longest  tokens of a response at the most, with its prompt
    """

    asked: int
    longest: int

    def watch(self, policy: Any, step: int, log: Log) -> None: ...


class Record(NamedTuple):
    """Where the progress of one run goes.

    log         takes the metrics of a step
    what        stands on its progress bar
    heldout     watches the policy, where that is wanted
    checkpoint  keeps where the loop is; whoever makes it has it keep the networks themselves
    taken       steps of earlier rounds: those of this run are counted on from there
    """

    log: Log
    what: str
    heldout: Watch | None = None
    checkpoint: Checkpoint = NOT_KEPT
    taken: int = 0

    def add(self, metrics: dict[str, float], step: int) -> None:
        """Log the metrics of a step of this run."""
        self.log(metrics, self.taken + step)

    def watch(self, policy: Any, step: int) -> None:
        """Have `policy` measured, if that is wanted at this step."""
        if self.heldout is not None:
            self.heldout.watch(policy, self.taken + step, self.log)


def bar(total: int, what: str, unit: str = "step", visible: bool = True, done: int = 0) -> tqdm:
    """A progress bar: on a terminal it redraws, in a log file it adds a line every ten seconds.

    `done` of `total` were done before, by a process that was killed.
    """
    terminal = sys.stderr.isatty()
    return tqdm(
        total=total,
        initial=done,
        desc=what,
        unit=unit,
        disable=not visible,
        mininterval=0.2 if terminal else 10.0,
        dynamic_ncols=terminal,
        ncols=None if terminal else 110,
    )
