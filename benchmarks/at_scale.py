"""Large models on a GPU: tokens per second of SFT, DPO, PPO and generation, against what the device could do, and memory against its plan.

    python benchmarks/at_scale.py [--only 0.5] [--text 1024]

Llamas of the shapes of SmolLM2-135M, Qwen2.5-0.5B and -1.5B and Llama-3.1-8B, their weights drawn at random, trained by the loops of the
project; 8B by adapters of rank 16. MFU is the model's own arithmetic (forward and twice that backward; once backward for frozen weights;
attention counted as causal, the vocabulary's projection at the tokens whose log-probabilities are read, a prompt that two responses share
once, and no recomputation) over the datasheet's dense bf16 rate; generation is held against the time that reading weights and cache in bf16
once takes at the measured bandwidth. `--tiny` runs it all on small models, to try it where there is no GPU.
"""

import gc
import os
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Annotated, NamedTuple

import typer

HERE = Path(__file__).parent
DATASHEET = {"H100": 989.4e12, "H200": 989.4e12, "A100": 312e12}  # NVIDIA, dense bf16 of the SXM modules, FLOP/s


class Shape(NamedTuple):
    """Of a Llama, and what is run on it: texts of an update, adapters or all weights, activations again or not."""

    layers: int
    width: int
    heads: int
    shared: int
    feed: int
    words: int
    texts: int
    adapters: bool
    again: bool


SHAPES = {
    "135M": Shape(30, 576, 9, 3, 1536, 49_152, 128, False, False),
    "0.5B": Shape(24, 896, 14, 2, 4864, 151_936, 64, False, False),
    "1.5B": Shape(28, 1536, 12, 2, 8960, 151_936, 32, False, False),
    "8B": Shape(32, 4096, 32, 8, 14_336, 128_256, 16, True, True),
}
TINY = {
    "tiny": Shape(2, 64, 4, 2, 128, 300, 4, False, False),
    "tiny, adapters": Shape(2, 64, 4, 2, 128, 300, 4, True, True),
}
LOOPS = ("sft", "dpo", "ppo", "generate")
PROMPT, EPOCHS = 128, 2


def main(
    only: Annotated[str, typer.Option(help="One of the shapes.")] = "",
    loops: Annotated[str, typer.Option(help="Some of sft, dpo, ppo, generate.")] = ",".join(LOOPS),
    text: Annotated[int, typer.Option(help="Tokens of a text.")] = 1024,
    tiny: Annotated[bool, typer.Option(help="Small models, anywhere.")] = False,
    profile: Annotated[bool, typer.Option(help="Say which kernels take the time of an SFT step.")] = False,
    inside: Annotated[bool, typer.Option(hidden=True)] = False,
) -> None:
    """Each model in a process of its own."""
    shapes = TINY if tiny else SHAPES
    if inside:
        one(only, shapes[only], loops.split(","), text, profile)
        return
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join([str(HERE.parent / "src"), os.environ.get("PYTHONPATH", "")])
    }
    more = ["--loops", loops, "--text", str(text), *(["--tiny"] if tiny else []), *(["--profile"] if profile else [])]
    for name in [only] if only else shapes:
        subprocess.run([sys.executable, __file__, "--inside", "--only", name, *more], env=environment, check=False)


def one(name: str, shape: Shape, loops: list[str], text: int, profile: bool) -> None:
    from rlhf_vs_dpo.run import arithmetic

    arithmetic.fix()
    import torch

    from rlhf_vs_dpo.errors import OutOfMemory
    from rlhf_vs_dpo.language import models

    device = models.device()
    where = torch.cuda.get_device_name() if device.type == "cuda" else "CPU"
    rates = measured_rates(device)
    peak = next((rate for known, rate in DATASHEET.items() if known in where), rates[0])
    print(
        f"{name} on {where}: products {rates[0] / 1e12:.3g} TFLOP/s, copies {rates[1] / 1e9:.0f} GB/s measured; MFU of {peak / 1e12:.4g}",
        flush=True,
    )
    for loop in loops:
        begun = time.perf_counter()
        try:
            for found in (
                generation(shape, rates[1]) if loop == "generate" else training(loop, shape, text, peak, profile)
            ):
                print(f"{name:6} {found}", flush=True)
        except (torch.OutOfMemoryError, OutOfMemory) as error:
            print(f"{name:6} {loop}: {str(error).splitlines()[0]}", flush=True)
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()
        print(f"{name:6} ({loop} took {time.perf_counter() - begun:.0f} s in all)", flush=True)


def measured_rates(device) -> tuple[float, float]:
    """bf16 products, FLOP/s, and copies, bytes read and written per second: the best of five."""
    import torch

    size = 8192 if device.type == "cuda" else 256
    a, b = (torch.randn(size, size, device=device, dtype=torch.bfloat16) for _ in range(2))
    c = torch.empty(2**28 if device.type == "cuda" else 2**20, device=device, dtype=torch.bfloat16).normal_()
    d = torch.empty_like(c)
    product, copy = (min(seconds(of, device) for _ in range(6)) for of in (lambda: a @ b, lambda: d.copy_(c)))
    return 2 * size**3 / product, 2 * c.nbytes / copy


def seconds(work: Callable, device) -> float:
    import torch

    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    wait()
    begun = time.perf_counter()
    work()
    wait()
    return time.perf_counter() - begun


def made(shape: Shape, scorer: bool = False):
    """A model as a stage trains it: on the device, float32, or with adapters on a base in bf16."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification

    from rlhf_vs_dpo.config import Adapter, Memory
    from rlhf_vs_dpo.language import models

    config = LlamaConfig(
        vocab_size=shape.words, hidden_size=shape.width, intermediate_size=shape.feed, num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads, num_key_value_heads=shape.shared, max_position_embeddings=8192,
        tie_word_embeddings=not shape.adapters, pad_token_id=0, bos_token_id=1, eos_token_id=2, num_labels=1,
    )  # fmt: skip
    torch.manual_seed(0)
    with models.device():
        model = (LlamaForSequenceClassification if scorer else LlamaForCausalLM)(config).eval()
    model.config.reward_shift, model.config.reward_scale = 0.0, 1.0
    if not scorer:
        model.generation_config.suppress_tokens = [0, 1, 2]  # every response has its full length
    adapter = Adapter(rank=16, alpha=32.0, targets="all", merge=False) if shape.adapters else None
    return models.to_learn(model, adapter, Memory(gradient_checkpointing=shape.again, sharding=False))


def flops(shape: Shape, tokens: float, length: int, read: float, backward: bool = True) -> float:
    """Of a pass over `tokens` of texts of `length`, whose log-probabilities are read at `read` of them."""
    head = shape.width // shape.heads
    matrices = shape.width * (2 * shape.heads * head + 2 * shape.shared * head + 3 * shape.feed)
    forward = 2 * tokens * shape.layers * (matrices + shape.width * length) + 2 * read * shape.words * shape.width
    return forward * ((2 if shape.adapters else 3) if backward else 1)


def training(loop: str, shape: Shape, text: int, peak: float, profile: bool):
    """Lines of what a loop does: the last two of four updates, or the last of two iterations of PPO."""
    import copy

    import pandas as pd
    import torch

    from rlhf_vs_dpo import config
    from rlhf_vs_dpo.language import adapters, models
    from rlhf_vs_dpo.language.forward import log_likelihoods
    from rlhf_vs_dpo.language.heads import Scorer
    from rlhf_vs_dpo.language.logprobs import Policy
    from rlhf_vs_dpo.language.text import Examples, Pairs, Prompts, Tokens
    from rlhf_vs_dpo.run.progress import Record
    from rlhf_vs_dpo.training import attempts, plan, policy_gradient, preference, supervised
    from rlhf_vs_dpo.training.learner import Networks

    planned, times, improving = [], [], []
    check = plan.check

    def noted(given, tokens, *rest):
        found = check(given, tokens, *rest)
        planned.append(given._replace(activations=given.activations * found // tokens))
        return found

    plan.check = noted
    cuda = torch.cuda.is_available()
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    model = made(shape)
    policy = Policy(model, 1.0)
    response = text - PROMPT

    def said(count: int) -> list[Tokens]:
        ids = torch.randint(3, shape.words, (count, text)).tolist()
        return [Tokens([1, *row[1:PROMPT]], row[PROMPT:]) for row in ids]

    def log(metrics, step) -> None:
        times.append(time.perf_counter())

    updates, batch = 4, shape.texts if loop != "dpo" else shape.texts // 2
    names = [str(i) for i in range(batch * updates)]
    settings = config.Training(
        steps=updates, batch=batch, learning_rate=1e-5, schedule="constant", warmup=0.0, weight_decay=0.0, max_grad_norm=1.0,
        adam_epsilon=1e-8,
    )  # fmt: skip
    tokens, read = shape.texts * text, shape.texts * response
    if loop == "sft":
        rows = Examples(said(len(names)), names)
        run = partial(supervised.likelihood, policy, rows, settings, 0, Record(log, loop))
        needed = flops(shape, tokens, text, read)
    elif loop == "dpo":
        chosen = said(len(names))
        rejected = [Tokens(a.prompt, b.response) for a, b in zip(chosen, said(len(names)), strict=True)]
        rows = Pairs(chosen, rejected, names)
        known = pd.DataFrame({f"{s}_logp": log_likelihoods(policy, getattr(rows, s)) for s in ("chosen", "rejected")})
        given = config.Dpo(
            loss="dpo", beta=0.1, epochs=1.0, rounds=1, batch=batch, learning_rate=1e-5, schedule="constant", warmup=0.0,
            weight_decay=0.0, max_grad_norm=1.0, adam_epsilon=1e-8,
        )  # fmt: skip
        run = partial(preference.train, policy, rows, known, given, updates, 0, Record(log, loop))
        needed = flops(shape, tokens - batch * PROMPT, text, read)
    else:
        updates = 2
        start = adapters.switched_off(model) if shape.adapters else models.light(models.freeze(copy.deepcopy(model)))
        reward = made(shape, scorer=True)
        if shape.adapters:
            adapters.share(reward, model)
        given = config.Ppo(
            algorithm="ppo", samples_per_prompt=1, epochs=EPOCHS, minibatches=1, value_learning_rate=1e-5, value_clip=0.2, value_warmup=0,
            gae_discount=1.0, gae_lambda=0.95, clip=0.2, ptx_coefficient=0.0, ptx_batch=1, iterations=updates, episodes=shape.texts,
            schedule="constant", adam_epsilon=1e-5, max_grad_norm=1.0, kl_coefficient=0.1, kl_target=None, kl_horizon=1e4,
            unfinished_reward=-3.0, learning_rate=1e-5,
        )  # fmt: skip
        asked = Prompts([example.prompt for example in said(len(names))], names)
        improve = attempts.ATTEMPTS["ppo"].improve

        def timed(*given) -> dict:
            done: list[dict] = []
            improving.append(seconds(lambda: done.append(improve(*given)), models.device()))
            return done[0]

        attempts.ATTEMPTS["ppo"] = attempts.ATTEMPTS["ppo"]._replace(improve=timed)
        networks = Networks(policy, Policy(start, 1.0), Scorer(reward))
        run = partial(policy_gradient.train, networks, asked, [], given, response, 0, Record(log, loop))
        needed = EPOCHS * (flops(shape, tokens, text, read) + flops(shape, tokens, text, 0))
    run()
    if loop == "ppo":
        took, trained = improving[-1], 2 * EPOCHS * tokens
        attempts.ATTEMPTS["ppo"] = attempts.ATTEMPTS["ppo"]._replace(improve=improve)
        whole = times[-1] - times[-2]
        yield f"ppo: an iteration of {shape.texts} episodes {whole:.2f} s, of which updates {took:.2f} s"
    else:
        took, trained = (times[-1] - times[-3]) / 2, tokens
    yield f"{loop}{' by adapters' if shape.adapters else ''}: {trained / took:,.0f} tokens/s, MFU {needed / took / peak:.3f}"
    plan.check = check
    if cuda:
        held = torch.cuda.max_memory_allocated()
        yield f"{loop}: plan {plan.readable(planned[-1].total)}, held {plan.readable(held)} ({planned[-1].total / held:.2f})"
    if profile and loop == "sft":
        yield from kernels(run, cuda)


def kernels(run: Callable, cuda: bool):
    """The eight kernels that take most of the time."""
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as watching

    with watching(activities=[ProfilerActivity.CUDA if cuda else ProfilerActivity.CPU]) as seen:
        run()
    cost = "self_device_time_total" if cuda else "self_cpu_time_total"
    rows = sorted(seen.key_averages(), key=lambda row: -getattr(row, cost))
    whole = sum(getattr(row, cost) for row in rows)
    for row in rows[:12]:
        yield f"  {getattr(row, cost) / whole:6.1%} {row.count:6} x {row.key[:100]}"


def generation(shape: Shape, bandwidth: float):
    """Lines of tokens per second by rows sampled together."""
    import torch

    from rlhf_vs_dpo.language import models
    from rlhf_vs_dpo.language.generation import generate
    from rlhf_vs_dpo.language.logprobs import Policy
    from rlhf_vs_dpo.language.text import Prompts

    model = made(shape)
    policy, most = Policy(model, 1.0), 128
    head = shape.width // shape.heads
    weights = 2 * (
        shape.layers * shape.width * (2 * shape.heads * head + 2 * shape.shared * head + 3 * shape.feed)
        + shape.words * shape.width
    )
    for rows in (1, 16, 64, 256, 1024) if torch.cuda.is_available() else (1, 4):
        asked = Prompts(
            [[1, *torch.randint(3, shape.words, (PROMPT - 1,)).tolist()] for _ in range(rows)],
            list(map(str, range(rows))),
        )
        generate(policy, asked, [0] * rows, 4, 0, rows=rows)
        took = seconds(
            lambda asked=asked, rows=rows: generate(policy, asked, [0] * rows, most, 0, rows=rows), models.device()
        )
        cache = 2 * 2 * rows * (PROMPT + most / 2) * shape.layers * shape.shared * head
        least = most * (weights + cache) / bandwidth
        yield f"generate, {rows:4} rows: {rows * most / took:,.0f} tokens/s, {least / took:.2f} of the limit of memory"


if __name__ == "__main__":
    typer.run(main)
