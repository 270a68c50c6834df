"""How a stage starts: with fixed arithmetic, tied to who started it, on one device or several.

Hardware is no dependency of a stage, so it is not in dvc.yaml: with several visible GPUs a training stage replaces itself
by `torchrun` of itself, whose environment Accelerate reads. RLHF_PROCESSES sets the number of processes (2 on a CPU works,
for testing); RLHF_LAUNCH replaces the launcher, for several nodes ("accelerate launch --config_file cluster.yaml").
"""

import os
import shlex
import signal
import sys
from collections.abc import Callable

from rlhf_vs_dpo.run import arithmetic


def command(main: Callable[..., None]) -> None:
    """Run the Typer command of a stage."""
    import typer

    arithmetic.fix()
    end_with_parent()
    typer.run(main)


def end_with_parent() -> None:
    """End this process when the one that started it ends, even by kill -9 (Linux; elsewhere nothing is done).

    A stage whose DVC is gone would go on for minutes, and write over what the next one makes.
    """
    if not sys.platform.startswith("linux"):
        return
    import ctypes

    set_parent_death_signal = 1  # PR_SET_PDEATHSIG of <linux/prctl.h>
    parent = os.getppid()
    ctypes.CDLL(None).prctl(set_parent_death_signal, signal.SIGTERM)
    if os.getppid() != parent:  # it ended in between
        os.kill(os.getpid(), signal.SIGTERM)


def is_main() -> bool:
    """Whether this process is the one that writes and logs."""
    return int(os.environ.get("RANK", 0)) == 0


def on_all_devices() -> None:
    """Replace this process by one per GPU where that is more than one; return at once otherwise."""
    if "RANK" in os.environ or "RLHF_LAUNCHED" in os.environ:
        return
    if launcher := os.environ.get("RLHF_LAUNCH"):
        command = shlex.split(launcher)
    else:
        processes = int(os.environ.get("RLHF_PROCESSES", 0))
        if not processes:
            import torch

            processes = max(torch.cuda.device_count(), 1)
        if processes < 2:
            return
        command = [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--standalone",
            "--local-addr=127.0.0.1",  # else it asks for the name of this machine, which some do not know themselves
            "--nproc_per_node",
            str(processes),
            "--",
        ]
    os.environ["RLHF_LAUNCHED"] = "1"  # whatever a launcher does, its children do not launch again
    os.execvp(command[0], [*command, *sys.argv])
