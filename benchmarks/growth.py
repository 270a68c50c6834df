"""How a step grows: seconds and memory of SFT, DPO and PPO by the size of the model and the number of tokens.

    python benchmarks/growth.py [--largest 135]

Llamas of 0.3, 3, 30 and 135 M weights, drawn at random, each on 512 tokens of eight texts, and on 2, 4 and 8 times as many texts. Every
measurement is a process of its own, under the project's fixed arithmetic: one update of warm-up, then two that are timed (of the largest,
whose updates take minutes, one, without warm-up); memory is the most that the process held. Prints a table, and the slope of log(seconds) in log(tokens) for each model: 1 is linear. The figure goes to
benchmarks/.against/growth.png.
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
TEXTS, PROMPT, RESPONSE = 8, 40, 24  # 512 tokens


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
    timed = 2 if millions < 100 else 1
    if timed > 1:
        sides.ours(loop, given, size, 1)
    return {
        "seconds": sides.ours(loop, given, size, timed).seconds / timed,
        "mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
    }


def draw(found: dict[tuple[str, float, int], dict], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    drawn, axes = plt.subplots(2, len(LOOPS), figsize=(11, 6), sharex=True, squeeze=False)
    for row, (what, label) in enumerate((("seconds", "seconds of an update"), ("mib", "memory of the process, MiB"))):
        for column, loop in enumerate(LOOPS):
            place = axes[row][column]
            for millions in dict.fromkeys(m for _, m, _ in found):
                times = [t for t in TIMES if (loop, millions, t) in found]
                values = [found[loop, millions, t][what] for t in times]
                tokens = [TEXTS * (PROMPT + RESPONSE) * t for t in times]
                place.loglog(tokens, values, marker="o")
                place.annotate(
                    f"{millions:g} M", (tokens[-1], values[-1]), xytext=(4, -3), textcoords="offset points", fontsize=8
                )
            place.set_xlim(right=TEXTS * (PROMPT + RESPONSE) * TIMES[-1] * 1.8)
            if row == 0:
                place.set_title(loop)
            else:
                place.set_xlabel("tokens of an update")
            if column == 0:
                place.set_ylabel(label)
    drawn.tight_layout()
    drawn.savefig(path, dpi=150)


def main(
    largest: Annotated[float, typer.Option(help="Millions of weights of the largest model.")] = 135,
    single: Annotated[str, typer.Option(hidden=True)] = "",
) -> None:
    """Print seconds and memory, and slopes."""
    if single:
        loop, millions, times = single.split(",")
        print(json.dumps(one(loop, next(m for m in SHAPES if f"{m:g}" == millions), int(times))))
        return
    import numpy as np  # not before a single measurement has fixed its arithmetic

    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(HERE.parent / "src"), str(HERE)])}
    found: dict[tuple[str, float, int], dict] = {}
    print(f"{'loop':4} {'weights':>8} {'tokens':>7} {'seconds':>9} {'MiB':>7}")
    for loop in LOOPS:
        for millions in [m for m in SHAPES if m <= largest]:
            for times in TIMES:
                command = [sys.executable, __file__, "--single", f"{loop},{millions:g},{times}"]
                done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
                if done.returncode:
                    raise SystemExit(done.stderr[-3000:])
                measured = found[loop, millions, times] = json.loads(done.stdout.splitlines()[-1])
                tokens = TEXTS * (PROMPT + RESPONSE) * times
                print(
                    f"{loop:4} {millions:>6g} M {tokens:>7} {measured['seconds']:>9.3f} {measured['mib']:>7.0f}",
                    flush=True,
                )
            slopes = [
                np.polyfit(np.log(TIMES), np.log([found[loop, millions, t][w] for t in TIMES]), 1)[0]
                for w in ("seconds", "mib")
            ]
            print(
                f"{loop:4} {millions:>6g} M slope in tokens: seconds {slopes[0]:.2f}, memory {slopes[1]:.2f}",
                flush=True,
            )
    (HERE / ".against").mkdir(exist_ok=True)
    draw(found, HERE / ".against" / "growth.png")


if __name__ == "__main__":
    typer.run(main)
