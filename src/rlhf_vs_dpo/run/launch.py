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

from rlhf_vs_dpo.run import arithmetic, preloaded

SHUTDOWN_SECONDS = "600"  # from SIGTERM until torchrun kills: the step at hand, and the checkpoint after it


def command(main: Callable[..., None]) -> None:
    """Run the Typer command of a stage."""
    import typer

    end_with_parent()
    preloaded.hand_over()
    arithmetic.fix()
    keep_memory()
    typer.run(main)


def keep_memory() -> None:
    """Let blocks of up to 32 MiB that are freed be used again (glibc; elsewhere nothing is done).

    By default the larger ones go back to the kernel, which hands them out again page by page, each filled with zeros: a sixth of the
    time of sampling.
    """
    import ctypes

    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        trim_threshold, mmap_threshold = -1, -3  # M_TRIM_THRESHOLD, M_MMAP_THRESHOLD of <malloc.h>
        libc.mallopt(trim_threshold, 2**31 - 1)
        libc.mallopt(mmap_threshold, 2**25)  # the most that glibc takes


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


def gpus() -> list[str]:
    """Names of the GPUs that this process may use, as CUDA_VISIBLE_DEVICES has them; none on a machine without."""
    if (given := os.environ.get("CUDA_VISIBLE_DEVICES")) is not None:
        return [name.strip() for name in given.split(",") if name.strip() not in ("", "-1")]
    import pynvml

    try:
        pynvml.nvmlInit()
        count = pynvml.nvmlDeviceGetCount()
    except pynvml.NVMLError:  # no GPU, or no driver
        return []
    return [str(number) for number in range(count)]


def device() -> str:
    """The kind of device that stages compute on: the name of the first GPU, else CPU."""
    seen = gpus()
    if not seen:
        return "CPU"
    import pynvml

    try:
        pynvml.nvmlInit()
        handle = (
            pynvml.nvmlDeviceGetHandleByIndex(int(seen[0]))
            if seen[0].isdigit()
            else pynvml.nvmlDeviceGetHandleByUUID(seen[0])
        )
        return str(pynvml.nvmlDeviceGetName(handle))
    except pynvml.NVMLError:  # a part of a GPU, or one that is not there
        return "GPU"


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
    os.environ.setdefault("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", SHUTDOWN_SECONDS)
    os.environ["RLHF_LAUNCHED"] = "1"  # whatever a launcher does, its children do not launch again
    os.execvp(command[0], [*command, *sys.argv])
