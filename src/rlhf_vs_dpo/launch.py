"""The same stage command on a laptop, one GPU or several: a stage that can use more processes starts them itself.

Hardware is no dependency of a stage, so it is not in dvc.yaml: with several visible GPUs a training stage replaces itself
by `torchrun` of itself, whose environment Accelerate reads. RLHF_PROCESSES sets the number of processes (2 on a CPU works,
for testing); RLHF_LAUNCH replaces the launcher, for several nodes ("accelerate launch --config_file cluster.yaml").
"""

import os
import shlex
import sys


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
        import torch

        processes = int(os.environ.get("RLHF_PROCESSES", max(torch.cuda.device_count(), 1)))
        if processes < 2:
            return
        command = [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--standalone",
            "--nproc_per_node",
            str(processes),
            "--",
        ]
    os.environ["RLHF_LAUNCHED"] = "1"  # whatever a launcher does, its children do not launch again
    os.execvp(command[0], [*command, *sys.argv])
