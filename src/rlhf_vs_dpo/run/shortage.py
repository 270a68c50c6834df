"""Memory that ran out: how it is recognised, and what a user can do."""

from pathlib import Path

from rlhf_vs_dpo.errors import OutOfMemory

ADVICE = (
    "lower what is held at once: the environment variable RLHF_MICRO_TOKENS (tokens of a micro-batch; on a CPU with RLHF_NATIVE=1), "
    "`sampling.max_new_tokens` or `data.max_prompt_tokens` in params.yaml, or JOBS, the number of cells that run side by side; or "
    "take a smaller model"
)


def of(error: BaseException) -> OutOfMemory | None:
    """The error as one that a user can act on, if it says that memory ran out: a GPU's, or this machine's."""
    said = str(error)
    if not (
        type(error).__name__ == "OutOfMemoryError"
        or isinstance(error, MemoryError)
        or (isinstance(error, RuntimeError) and ("not enough memory" in said or "can't allocate memory" in said))
    ):
        return None
    first = said.splitlines()[0] if said else "there is no memory left"
    return OutOfMemory(f"out of memory ({first}); {ADVICE}")


def kills() -> int:
    """How many processes the kernel has killed since it started because memory ran out, as far as it says (Linux)."""
    count = 0
    for file in (Path("/sys/fs/cgroup/memory.events"), Path("/proc/vmstat")):  # of this container; of the machine
        try:
            said = dict(line.split() for line in file.read_text().splitlines())
        except (OSError, ValueError):
            continue
        count += int(said.get("oom_kill", 0))
    return count
