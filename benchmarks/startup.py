"""What a stage costs before it works: seconds from its start to its first progress bar, beside a bare `import torch`.

    python benchmarks/startup.py [--rounds 5] [--folder .]

The folder holds a reproduced run (`make repro`, with any profile). Stages run one after another, several rounds, in turn with
`import torch`, each as `dvc repro` would start it (DVC's own second apart) until it first has something to count; there it is
ended, before it has written anything. Prints medians, and the range over rounds.
"""

import os
import re
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Annotated

import typer
from ruamel.yaml import YAML

# Ends a stage at its first progress bar, or at the first table or picture it writes: it has begun to work.
STOP = """
import os, sys, runpy
import tqdm
def stop(*args, **kwargs):
    os._exit(99)
tqdm.tqdm.__init__ = stop
from rlhf_vs_dpo.run import atomic
atomic.writing = stop
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""
CELLS = {"rl": "ppo", "preference": "dpo", "imitation": "control_tokens"}


def seconds(command: list[str], folder: Path, expect: int, **env: str) -> float:
    """Wall time of a command; fails where it does not end as expected."""
    begun = time.perf_counter()
    done = subprocess.run(command, cwd=folder, env=os.environ | env, capture_output=True, text=True, check=False)
    took = time.perf_counter() - begun
    if done.returncode != expect:
        sys.exit(f"error: {' '.join(command[:3])} ... exited with {done.returncode}:\n{done.stderr[-2000:]}")
    return took


def main(
    rounds: Annotated[int, typer.Option(help="How often each is started.")] = 5,
    folder: Annotated[Path, typer.Option(help="A reproduced run.")] = Path("."),
) -> None:
    """Print a table."""
    stages = YAML(typ="safe").load((folder / "dvc.yaml").read_text())["stages"]
    params = YAML(typ="safe").load((folder / "params.yaml").read_text())
    seed = str(params["seeds"][0])
    commands = {}
    for name, stage in stages.items():
        if name.startswith("sample_") and name != "sample_sft":
            continue  # the same stage
        method = CELLS.get(name, "")
        words = re.sub(
            r"\$\{item\.(\w+)\}", lambda m, method=method: {"seed": seed, "method": method}[m[1]], stage["cmd"]
        )
        address = name + (f"@{method}-{seed}" if method else f"@{seed}" if "matrix" in stage else "")
        commands[name] = (words.partition("python ")[2].split(), address)
    times: dict[str, list[float]] = {name: [] for name in ["import torch", *commands]}
    for number in range(rounds):
        times["import torch"].append(seconds([sys.executable, "-c", "import torch"], folder, 0))
        for name, (words, address) in commands.items():
            print(f"\rround {number + 1} of {rounds}: {name:<20}", end="", file=sys.stderr, flush=True)
            environment = {"DVC_STAGE": address, "DVC_ROOT": str(folder.resolve()), "PYTHONPATH": "src"}
            times[name].append(seconds([sys.executable, "-c", STOP, *words], folder, 99, **environment))
    print(file=sys.stderr)
    bare = statistics.median(times["import torch"])
    print(f"{'':<14} median   least   most   over import torch")
    for name, all_of in times.items():
        middle = statistics.median(all_of)
        over = "" if name == "import torch" else f"{middle - bare:+.2f}"
        print(f"{name:<14} {middle:6.2f}  {min(all_of):6.2f} {max(all_of):6.2f}   {over}")


if __name__ == "__main__":
    typer.run(main)
