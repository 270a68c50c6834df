"""Every training loop here against the same loop in TRL: the same model, data, batch, updates and cores, in turn.

    python benchmarks/against_trl.py [--size small] [--rounds 5] [--folder .] [--loops dpo,ppo]

    small   the built-in model and its texts, of a reproduced run in the folder (`make repro`)
    large   SmolLM2-135M and real reviews, from their packages (make test-real); a few updates each

TRL 1.16 has SFT, reward model, DPO and RLOO; the last release with PPO is 1.12. Both are installed aside (benchmarks/.against/), without
dependencies: they run on the very torch and transformers that this project runs on, under its fixed arithmetic (RLHF_NATIVE=1 for the
machine's own, on both sides). Each run is a process of its own: loading, tokenising and two updates of warm-up are not timed; DPO's pass
of the reference is, on both sides. Printed are medians over rounds, their range, and the ratio; the machine's rate of matrix products;
what share of it the training reaches (FLOPs by formula); and, for losses that both sides define alike, how far the two values on one
batch lie apart. A table and a figure go to benchmarks/.against/<size>.{md,png}.
"""

import json
import os
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Annotated

import typer

HERE = Path(__file__).parent
ASIDE = HERE / ".against"
RELEASES = {"sft": "1.16.0", "reward": "1.16.0", "dpo": "1.16.0", "rloo": "1.16.0", "ppo": "1.12.0"}
UNITS = {"sft": "examples", "reward": "pairs", "dpo": "pairs", "rloo": "episodes", "ppo": "episodes"}
SAME = 1e-4  # how far losses of one batch may lie apart


def installed(release: str) -> Path:
    """Folder of a release of TRL, alone; installed if need be."""
    place = ASIDE / f"trl-{release}"
    if not place.exists():
        print(f"installing TRL {release} into {place}", flush=True)
        install = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", str(place), f"trl=={release}"]
        subprocess.run(install, check=True)
    return place


def run(side: str, loop: str, size: str, folder: Path, **more: str) -> dict:
    """One process of one side: what it printed last, as JSON. Ends the benchmark with its output where it fails."""
    paths = [str(HERE.parent / "src"), *([str(installed(RELEASES[loop]))] if side == "trl" else [])]
    environment = (
        os.environ
        | {"PYTHONPATH": os.pathsep.join(paths), "WANDB_DISABLED": "true", "TRL_EXPERIMENTAL_SILENCE": "1"}
        | more
    )
    command = [sys.executable, str(HERE / "sides.py"), side, loop, size, str(folder.resolve()), str(ASIDE.resolve())]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{side} {loop} failed:\n{done.stderr[-3000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def compare(loop: str, size: str, folder: Path, rounds: int) -> dict:
    """Run both sides of a loop in turn; raises SystemExit where they did not do the same work."""
    found: dict[str, list[dict]] = {"ours": [], "trl": []}
    for number in range(rounds):
        for side in ("ours", "trl") if number % 2 == 0 else ("trl", "ours"):
            found[side].append(run(side, loop, size, folder))
            one = found[side][-1]
            print(f"  {loop} {side:4} {one['units'] / one['seconds']:8.1f} {UNITS[loop]}/s", flush=True)
    ours, trl = found["ours"][0], found["trl"][0]
    for what in ("updates", "units") + (("tokens",) if loop in ("sft", "reward", "dpo") else ()):
        if ours[what] != trl[what]:
            raise SystemExit(f"{loop}: not the same work: {what} {ours[what]} here, {trl[what]} in TRL")
    rates = {side: [one["units"] / one["seconds"] for one in runs] for side, runs in found.items()}
    tokens = {side: statistics.median(one["tokens"] / one["seconds"] for one in runs) for side, runs in found.items()}
    return {
        "loop": loop, "unit": UNITS[loop], "release": RELEASES[loop], "updates": ours["updates"], "units": ours["units"],
        "tokens_trained": [found[side][0]["tokens"] for side in ("ours", "trl")], "rates": rates, "tokens_per_second": tokens,
        "ratio": statistics.median(rates["ours"]) / statistics.median(rates["trl"]),
        "share": statistics.median(one["flops"] / one["seconds"] for one in found["ours"]) / ours["rate"],
        "rate": ours["rate"] / 1e9, "arithmetic": ours["arithmetic"],
    }  # fmt: skip


def table(rows: list[dict], losses: dict[str, tuple[float, float]], size: str) -> str:
    """The result as Markdown."""
    first = rows[0]
    said = [
        f"{size}: {first['arithmetic']}; matrix products {first['rate']:.0f} GFLOP/s (float32).", "",
        "| loop | TRL | work | here, per s | TRL, per s | ratio | tokens/s here | of the matrix rate |",
        "| ---- | --- | ---- | ----------- | ---------- | ----- | ------------- | ------------------ |",
    ]  # fmt: skip
    for row in rows:
        ours, trl = (f"{statistics.median(r):.1f} ({min(r):.1f} to {max(r):.1f})" for r in row["rates"].values())
        said.append(
            f"| {row['loop']} | {row['release']} | {row['units']} {row['unit']}, {row['updates']} updates | {ours} | {trl} | "
            f"{row['ratio']:.2f} | {row['tokens_per_second']['ours']:.0f} | {row['share']:.0%} |"
        )
    if losses:
        said += ["", "| loss on one batch | here | TRL | apart |", "| ----------------- | ---- | --- | ----- |"]
        said += [f"| {name} | {a:.6f} | {b:.6f} | {abs(a - b):.1e} |" for name, (a, b) in losses.items()]
    return "\n".join(said) + "\n"


def figure(rows: list[dict], path: Path) -> None:
    """Ratios with their range over rounds."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    drawn, axes = plt.subplots(figsize=(6, 0.5 * len(rows) + 1.2))
    for place, row in enumerate(rows[::-1]):
        ratios = [a / b for a, b in zip(row["rates"]["ours"], row["rates"]["trl"], strict=True)]
        axes.barh(place, row["ratio"], color="#4477aa")
        axes.plot([min(ratios), max(ratios)], [place, place], color="black", linewidth=1.5)
        axes.annotate(
            f"{row['ratio']:.2f}", (max(ratios), place), xytext=(4, -3), textcoords="offset points", fontsize=9
        )
    axes.axvline(1.0, color="black", linewidth=0.8)
    axes.set_yticks(range(len(rows)), [row["loop"] for row in rows[::-1]])
    axes.set_xlabel("rate here, TRL = 1 (bar: ratio of medians; line: range over rounds)")
    axes.margins(x=0.15)
    drawn.tight_layout()
    drawn.savefig(path, dpi=150)


def main(
    size: Annotated[str, typer.Option(help="small or large.")] = "small",
    rounds: Annotated[int, typer.Option(help="Times each side is run.")] = 5,
    folder: Annotated[Path, typer.Option(help="A reproduced run (for small).")] = Path(),
    loops: Annotated[str, typer.Option(help="Some of sft, reward, dpo, rloo, ppo.")] = ",".join(RELEASES),
    record: Annotated[bool, typer.Option(help="Only write TRL's losses for tests/losses/test_against_trl.py.")] = False,
) -> None:
    """Print rates of both sides, their ratio, and how far their losses lie apart."""
    if record:
        found = [run("trl", loop, "tiny", folder, ONE_BATCH="1") for loop in ("sft", "reward", "dpo", "rloo")]
        whole = {name: round(value, 6) for one in found for name, value in one.items()}
        (HERE.parent / "tests" / "losses" / "trl.json").write_text(json.dumps(whole, indent=2) + "\n")
        return
    wanted = loops.split(",")
    if unknown := set(wanted) - set(RELEASES):
        raise SystemExit(f"--loops: {', '.join(sorted(unknown))} is none of {', '.join(RELEASES)}")
    if size not in ("small", "large"):
        raise SystemExit("--size is small or large")
    if size == "small" and not (folder / "models" / "reward-0").exists():
        raise SystemExit(
            f"{folder / 'models' / 'reward-0'} is not there: `make repro` first, or name a reproduced run with --folder"
        )
    ASIDE.mkdir(exist_ok=True)
    losses: dict[str, tuple[float, float]] = {}
    for loop in [loop for loop in wanted if loop != "ppo"]:  # TRL adds up PPO's two losses, and means them otherwise
        ours, trl = (run(side, loop, size, folder, ONE_BATCH="1") for side in ("ours", "trl"))
        losses |= {name: (value, trl[name]) for name, value in ours.items()}
    rows = []
    for loop in wanted:
        rows.append(compare(loop, size, folder, rounds))
        said = table(rows, losses, size)
        (ASIDE / f"{size}.md").write_text(said)
    figure(rows, ASIDE / f"{size}.png")
    print("\n" + said)
    if far := {name: pair for name, pair in losses.items() if abs(pair[0] - pair[1]) > SAME * max(1.0, abs(pair[1]))}:
        raise SystemExit(f"losses that should be one: {far}")


if __name__ == "__main__":
    typer.run(main)
