"""One progress bar for all loops: on a terminal it redraws, in a log file it adds a line every ten seconds."""

import sys

from tqdm import tqdm


def bar(total: int, what: str, unit: str = "step", visible: bool = True) -> tqdm:
    terminal = sys.stderr.isatty()
    return tqdm(
        total=total,
        desc=what,
        unit=unit,
        disable=not visible,
        mininterval=0.2 if terminal else 10.0,
        dynamic_ncols=terminal,
        ncols=None if terminal else 110,
    )
