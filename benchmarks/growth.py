"""How a step grows: seconds and memory of SFT, DPO and PPO by the size of the model and the number of tokens.

    python benchmarks/growth.py [--sizes 0.3,3,30,135]

Llamas of 0.3, 3, 30 and 135 M weights, drawn at random, each on 512 tokens of eight texts, and on 2, 4 and 8 times as many texts. Every
measurement is a process of its own, under the project's fixed arithmetic: one update of warm-up, then two that are timed; of the two
largest, whose updates take up to minutes, one, without warm-up. Memory is the most that the process held. What is measured is kept in
benchmarks/.against/growth.json, and a run that breaks off goes on from there; remove the file to measure again, and before another machine
measures. Prints each measurement, and a table with the slopes of log(seconds) and log(memory) in log(tokens): 1 is linear. The figure goes
to benchmarks/.against/growth.png.
"""

import json
import os
import resource
import subprocess
import sys
from pathlib import Path
from typing import Annotated

import typer

HERE = Path(__file__).parent
# Millions of weights -> layers, width, heads, key-value heads, feed-forward, vocabulary. The last is the shape of SmolLM2-135M.
SHAPES = {
    0.3: (2, 112, 7, 7, 304, 512),
    3: (4, 256, 8, 8, 704, 512),
    30: (9, 512, 8, 8, 1408, 512),
    135: (30, 576, 9, 3, 1536, 49152),
}
LOOPS, TIMES = ("sft", "dpo", "ppo"), (1, 2, 4, 8)
TEXTS, PROMPT, RESPONSE = 8, 40, 24
TOKENS = TEXTS * (PROMPT + RESPONSE)  # 512


def one(loop: str, millions: float, times: int) -> dict:
    """Seconds of an update, and the most memory the process held, in MiB."""
    import sides
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification

    from rlhf_vs_dpo.language.text import Pairs, Prompts, Tokens

    layers, width, wide, shared, feed, words = SHAPES[millions]
    made = LlamaConfig(
        vocab_size=words, hidden_size=width, intermediate_size=feed, num_hidden_layers=layers, num_attention_heads=wide,
        num_key_value_heads=shared, max_position_embeddings=128, tie_word_embeddings=True, initializer_range=width**-0.5, pad_token_id=0,
        bos_token_id=1, eos_token_id=2, num_labels=1,
    )  # fmt: skip
    torch.manual_seed(0)
    model = LlamaForCausalLM(made).eval()
    model.generation_config.suppress_tokens = [2]  # every response has its full length
    reward = LlamaForSequenceClassification(made).eval()
    reward.config.reward_shift, reward.config.reward_scale = 0.0, 1.0
    batch = (TEXTS if loop != "dpo" else TEXTS // 2) * times  # a pair is two texts
    size = sides.Size(batch, 2, TEXTS * times, 2, RESPONSE)
    asked = [torch.randint(3, words, (PROMPT,)).tolist() for _ in range(3 * batch)]
    chosen, rejected = (
        [Tokens(prompt, [*torch.randint(3, words, (RESPONSE - 1,)).tolist(), 2]) for prompt in asked] for _ in range(2)
    )
    names = [str(i) for i in range(len(asked))]
    given = sides.Material(model, reward, None, chosen, Pairs(chosen, rejected, names), Prompts(asked, names), [])
    timed = 2 if millions < 30 else 1
    if timed > 1:
        sides.ours(loop, given, size, 1)
    return {
        "seconds": sides.ours(loop, given, size, timed).seconds / timed,
        "mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
    }


def draw(found: dict[tuple[str, float, int], dict], path: Path) -> None:
    """Seconds and memory by tokens, a line for each size."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    drawn, axes = plt.subplots(2, len(LOOPS), figsize=(11, 6), sharex=True, squeeze=False)
    for row, (what, label) in enumerate((("seconds", "seconds of an update"), ("mib", "memory of the process, MiB"))):
        for column, loop in enumerate(LOOPS):
            place = axes[row][column]
            for millions in SHAPES:
                times = [t for t in TIMES if (loop, millions, t) in found]
                if not times:
                    continue
                values = [found[loop, millions, t][what] for t in times]
                tokens = [TOKENS * t for t in times]
                place.loglog(tokens, values, marker="o")
                place.annotate(
                    f"{millions:g} M", (tokens[-1], values[-1]), xytext=(4, -3), textcoords="offset points", fontsize=8
                )
            place.set_xlim(right=TOKENS * TIMES[-1] * 1.8)
            place.set_xticks([TOKENS * t for t in TIMES], [f"{TOKENS * t:,}" for t in TIMES])
            place.minorticks_off()
            if row == 0:
                place.set_title(loop)
            else:
                place.set_xlabel("tokens of an update")
            if column == 0:
                place.set_ylabel(label)
    drawn.tight_layout()
    drawn.savefig(path, dpi=150)


def table(found: dict[tuple[str, float, int], dict]) -> str:
    """Seconds at the fewest and the most tokens, and slopes over all, as Markdown; of what was measured whole."""
    import numpy as np

    said = [
        f"| loop | weights | {TOKENS} tokens, s | {TOKENS * TIMES[-1]:,} tokens, s | slope of seconds | slope of memory |",
        "| ---- | ------- | ------------- | --------------- | ---------------- | --------------- |",
    ]
    for loop in LOOPS:
        for millions in SHAPES:
            of_tokens = [found.get((loop, millions, t)) for t in TIMES]
            if None in of_tokens:
                continue
            seconds, mib = ([each[what] for each in of_tokens if each] for what in ("seconds", "mib"))
            slopes = [np.polyfit(np.log(TIMES), np.log(values), 1)[0] for values in (seconds, mib)]
            said.append(
                f"| {loop.upper()} | {millions:g} M | {seconds[0]:.3f} | {seconds[-1]:.3f} | {slopes[0]:.2f} | {slopes[1]:.2f} |"
            )
    return "\n".join(said)


def main(
    sizes: Annotated[str, typer.Option(help="Millions of weights, some of these.")] = "0.3,3,30,135",
    single: Annotated[str, typer.Option(hidden=True)] = "",
) -> None:
    """Print seconds and memory, and slopes."""
    known = {f"{millions:g}": millions for millions in SHAPES}
    if single:
        loop, millions, times = single.split(",")
        print(json.dumps(one(loop, known[millions], int(times))))
        return
    if unknown := set(sizes.split(",")) - set(known):
        raise SystemExit(f"--sizes: {', '.join(sorted(unknown))} is none of {', '.join(known)}")
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(HERE.parent / "src"), str(HERE)])}
    (HERE / ".against").mkdir(exist_ok=True)
    kept = HERE / ".against" / "growth.json"
    measured = json.loads(kept.read_text()) if kept.exists() else {}
    for name in [f"{loop},{size},{times}" for size in sizes.split(",") for loop in LOOPS for times in TIMES]:
        if name not in measured:
            command = [sys.executable, __file__, "--single", name]
            done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
            if done.returncode:
                raise SystemExit(done.stderr[-3000:])
            measured[name] = json.loads(done.stdout.splitlines()[-1])
            kept.write_text(json.dumps(measured, indent=1))
        loop, size, times = name.split(",")
        took = measured[name]
        print(
            f"{loop:4} {size:>5} M {TOKENS * int(times):>6} tokens {took['seconds']:>9.3f} s {took['mib']:>7.0f} MiB",
            flush=True,
        )
    names = {name: name.split(",") for name in measured}
    found = {(loop, known[size], int(times)): measured[name] for name, (loop, size, times) in names.items()}
    draw(found, HERE / ".against" / "growth.png")
    print("\n" + table(found))


if __name__ == "__main__":
    typer.run(main)
