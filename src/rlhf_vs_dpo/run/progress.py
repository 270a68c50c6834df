"""One progress bar for all loops: on a terminal it redraws, in a log file it adds a line every ten seconds."""

import sys

from tqdm import tqdm


def bar(total: int, what: str, unit: str = "step", visible: bool = True, done: int = 0) -> tqdm:
    """`done` of `total` were done before, by a process that was killed."""
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
