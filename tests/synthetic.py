"""A finished run made up of numbers whose truth is known: what `evaluate` reads, without a model behind it."""

import json
from functools import cache
from pathlib import Path

import numpy as np
import pandas as pd

from rlhf_vs_dpo import config
from rlhf_vs_dpo.evaluation import whole
from rlhf_vs_dpo.preferences.gold import PARTS

PARAMS = Path(__file__).parents[1] / "profiles" / "default.yaml"
METHODS = {
    "ppo": ("rl", 1.0, 2.0),
    "dpo": ("preference", 0.5, 1.0),
    "chosen_sft": ("imitation", 0.1, 0.1),
    "control_tokens": ("imitation", 0.2, 0.2),
}  # gain, KL
BAD = -0.5  # gain of the control tokens' policy when it is prompted by the other one
NASTY = 'A <script>alert("x")</script> & a | b `c` </td> .'


def responses(rng, folder, prompts, gain, kl, finished=1.0, per_prompt=3):
    """A `samples` table: gold is 1 + gain + what the prompt adds + noise."""
    base = np.random.default_rng(5).normal(size=prompts)  # of the prompts: the same for every policy
    rows = pd.DataFrame({"prompt_id": np.repeat([f"p{i:03d}" for i in range(prompts)], per_prompt)})
    n = len(rows)
    gold = 1.0 + gain + np.repeat(base, per_prompt) + 0.5 * rng.normal(size=n)
    ended = rng.random(n) < finished
    return rows.assign(
        suffix="", sample=np.tile(range(per_prompt), prompts), response=[NASTY if i == 0 else f"word{i % 7} is {folder} ." for i in range(n)],
        tokens=rng.integers(5, 20, size=n), finished=ended, logp=-3.0 + kl + 0.1 * rng.normal(size=n), reference_logp=-3.0,
        reward=np.where(ended, gold + 0.2 * rng.normal(size=n), np.nan), gold=gold, utility=gold + 0.1, filler=(rng.random(n) < 0.3).astype(float),
        **{f"gold_{part}": 0.0 for part in PARTS},
    )  # fmt: skip


def inputs(prompts=80, seeds=(0, 1, 2), collapsed=()):
    """`whole.Inputs` of four methods, a line for each seed; policies in `collapsed` (folders) never end a response."""
    params = config.read_params(PARAMS)
    params["policies"] = {family: [] for family in config.FAMILIES} | {"best_of_n": [4]}
    for method, (family, _, _) in METHODS.items():
        params["policies"][family].append(method)
    policies = config.section(params, "policies")
    members = config.folders(policies, list(seeds))
    samples, retention, watched, runs, rewards = {}, {}, {}, {}, {}
    spent = {
        "parameters": 1000,
        "seconds": 10.0,
        "peak_memory_mib": 500.0,
        "models_held": 1,
        "device": "CPU, 2 cores",
        "arithmetic": "AVX2, 2 threads",
        "run_id": "r",
    }
    kept = pd.DataFrame(
        {
            "kind": ["corpus"] * 3 + ["fact"] * 2, "item_id": list("abcde"), "tokens": [9, 8, 7, 1, 1],
            "logp": [-9.0, -9.0, -6.0, -1.0, -1.0], "correct": [np.nan] * 3 + [1.0, 0.0],
        }
    )  # fmt: skip
    for method, of in members.items():
        _, gain, kl = METHODS.get(method, ("sft", 0.0, 0.0))
        for number, folder in enumerate(of):
            rng = np.random.default_rng([number, sum(map(ord, method))])
            samples[folder] = responses(rng, folder, prompts, gain, kl, 0.1 if folder in collapsed else 1.0)
            if method == "control_tokens":
                bad = responses(rng, folder, prompts, BAD, kl).assign(suffix="[BAD]")
                samples[folder] = pd.concat([samples[folder].assign(suffix="[GOOD]"), bad], ignore_index=True)
            retention[folder] = kept.assign(logp=kept["logp"] - 0.1 * kl)
            runs[folder] = spent | {"tokens_trained": 5000 if method == "ppo" else 1000}
            if method == "sft":
                continue
            points = []
            for step, share in enumerate(np.linspace(0, 1, 6)):
                points.append(
                    pd.DataFrame(
                        {
                            "step": step, "prompt_id": [f"v{i:03d}" for i in range(60)], "finished": True,
                            "logp": -3.0 + kl * share**2 + (share > 0) * 0.05 * rng.normal(size=60), "reference_logp": -3.0,
                            "gold": 1.0 + gain * share + 0.3 * rng.normal(size=60), "filler": 0.0, "tokens": 9,
                            "reward": 1.0 + 1.5 * gain * share + 0.3 * rng.normal(size=60),
                            "utility": 1.0 + 1.2 * gain * share + 0.3 * rng.normal(size=60),
                        }
                    )
                )  # fmt: skip
            watched[folder] = pd.concat(points, ignore_index=True)
    rewards = {
        f: pd.DataFrame({"prompt_id": ["a", "b"], "chosen": [1.0, 0.0], "rejected": [0.0, 1.0]}) for f in members["dpo"]
    }
    runs["base"] = spent
    pools, demos = {}, {}
    for seed in seeds:
        for stage in ("preferences", "reward", "reference", "pool"):
            runs[f"{stage}-{seed}"] = spent | {"tokens_generated": 500, "tokens_read": 100}
        rng = np.random.default_rng([9, seed])
        pool = []
        for split, count, each in (("train", 20, 4), ("validation", 40, 9), ("test", prompts, 8)):
            part = responses(rng, "pool", count, 0.0, 0.0, per_prompt=each).drop(columns="suffix")
            if split != "test":
                part["prompt_id"] = split[0] + part["prompt_id"].str[1:]
            pool.append(part.assign(split=split, logp=-9.0, reference_logp=-9.0))
        pools[seed] = pd.concat(pool, ignore_index=True)
        demos[seed] = samples[f"sft-{seed}"].drop_duplicates("prompt_id")[["prompt_id", "gold", "reward"]]
    pairs = {"filler": {"chosen": 0.2, "rejected": 0.1}, "tokens": {"chosen": 12.0, "rejected": 11.0}}
    return whole.Inputs(
        policies=policies,
        seeds=list(seeds),
        settings={m: config.section(params, family, m) for m, (family, _, _) in METHODS.items()},
        preferences=config.section(params, "preferences"),
        judged={},
        reward_settings=config.section(params, "reward"),
        samples=samples,
        retention=retention,
        watched=watched,
        pair_rewards=rewards,
        demonstrations=demos,
        pool=pools,
        runs=runs,
        pairs=dict.fromkeys(seeds, pairs),
        pool_metrics={
            s: {n: {"tokens": 100, "tokens_read": 100} for n in ("train", "validation", "test")} for s in seeds
        },
    )


def settings(**changes):
    return config.section(config.read_params(PARAMS), "evaluate").model_copy(update={"resamples": 300} | changes)


def found(**of):
    """What `evaluate` would write, read back from JSON."""
    return json.loads(_written(**of))


@cache
def _written(**of) -> str:
    results = whole.compare(inputs(**of), settings(), 0)
    results["judges"] = {
        "llm": {
            "methods": {"ppo": {"mean": 0.6, "low": 0.5, "high": 0.7}}, "comparisons": 10, "unanswered": 0.1, "inconsistent": 0.3,
            "shown_first": 0.7, "agreement": {"gold": 0.8},
        }
    }  # fmt: skip
    return json.dumps(results)
