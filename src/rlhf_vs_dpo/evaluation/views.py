"""What was found, cut for those who show it: DVC's metrics and plots, MLflow's runs."""

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from rlhf_vs_dpo.evaluation import cost
from rlhf_vs_dpo.evaluation.measure import flat
from rlhf_vs_dpo.evaluation.whole import Inputs, lines_of
from rlhf_vs_dpo.preferences import answers

HEADLINES = (  # of `dvc metrics show`: few enough to be read
    "preferred", "gold", "utility", "objective", "reward", "win_rate_vs_sft", "kl", "tokens", "finished", "filler",
    "corpus_perplexity",
)  # fmt: skip
LEARNING = {  # column of a training curve -> column of the table
    "pairs/accuracy": "accuracy",
    "pairs/margin": "margin",
    "pairs/chosen_logp": "chosen_logp",
    "pairs/rejected_logp": "rejected_logp",
    "rollout/score": "score",
    "rollout/entropy": "entropy",
    "rollout/explained_variance": "explained_variance",
    "update/kl_old_new": "kl_old_new",
    "loss": "loss",
}
LINE = ("sft", "preferences", "reward", "reference", "pool")  # stages of a line that its methods share
BINS = 40  # points of a training curve that are shown
TEXTS = 50  # of each policy that MLflow shows as a table


def file_name(row: str) -> str:
    """A row's name as part of a path: `control_tokens [BAD]` -> `control_tokens_BAD`."""
    return row.replace(" [", "_").replace("]", "")


def of_methods(found: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """A few numbers per row, for `dvc metrics`."""
    rows = {}
    for name, row in found["methods"].items():
        shown = {metric: row[metric]["mean"] for metric in HEADLINES if row[metric]["mean"] is not None}
        rows[file_name(name)] = shown | {
            f"{axis}_{end}": row[axis][end] for axis in found["axes"] for end in ("low", "high")
        }
        if name in found["paths"]:
            rows[file_name(name)]["collapsed"] = found["spread"][name]["collapsed"]
    return rows


def comparison(found: dict[str, Any]) -> pd.DataFrame:
    """A row per method with every metric and its interval."""
    rows = [
        {"policy": name, "family": found["families"][name]} | _judged(row, found) | flat(row)
        for name, row in found["methods"].items()
    ]
    return pd.DataFrame(rows)


def best_of_n(found: dict[str, Any]) -> pd.DataFrame:
    """Best-of-n over n, as deep as the pool goes."""
    return pd.DataFrame([{"n": row["n"]} | _judged(row, found) | flat(row) for row in found["best_of_n"]])


def _judged(row: dict[str, Any], found: dict[str, Any]) -> dict[str, float | None]:
    """What is drawn of a row: the first axis, whichever that is, as `value`."""
    return flat({"value": row[found["axes"][0]]})


def paths(found: dict[str, Any]) -> pd.DataFrame:
    """A row per method and watched point of training."""
    return pd.DataFrame(
        {"policy": method, "family": found["families"][method]} | flat(point)
        for method, points in found["paths"].items()
        for point in points
    )


def learning(curves: Path, members: dict[str, list[str]]) -> pd.DataFrame:
    """Training curves of all methods in bins of their length, means over lines."""
    parts = []
    for method, folders in members.items():
        frames = []
        for folder in folders:
            path = curves / f"{folder}.csv"
            if method != "sft" and path.exists() and path.stat().st_size > 1:
                frame = pd.read_csv(path)
                frames.append(frame.assign(share=frame["step"] / max(frame["step"].max(), 1)))
        if not frames:
            continue
        whole = pd.concat(frames).rename(columns=LEARNING)
        known = [name for name in LEARNING.values() if name in whole]
        bins = np.ceil(whole["share"] * BINS).clip(1, BINS) / BINS
        parts.append(whole[known].groupby(bins).mean().rename_axis("share").reset_index().assign(policy=method))
    columns = ["policy", "share", *LEARNING.values()]
    return pd.concat(parts).reindex(columns=columns) if parts else pd.DataFrame(columns=columns)


def of_machine(found: dict[str, Any], inputs: Inputs) -> dict[str, Any]:
    """What differs from one run to the next: `stages`, the run file of each; `methods`, seconds and memory of each row."""
    shared = [f"{stage}-{seed}" for seed in inputs.seeds for stage in LINE]
    cells = [folder for method, of in inputs.members.items() if method != "sft" for folder in of]
    return {
        "stages": {name: inputs.runs[name] for name in ["base", *shared, *cells]},
        "methods": {row: cost.of_machine(lines_of(inputs, row, row in inputs.settings)) for row in found["cost"]},
    }


def for_tracking(found: dict[str, Any], inputs: Inputs) -> list[dict[str, Any]]:
    """An entry for each policy: what belongs on its MLflow run.

    folder, method, family, seed, settings    what it is; settings are those of its method, defaults included
    metrics     means on test prompts under `evaluation/`, its cost with all that it needs, and `validation/<criterion>`
    steps       RM reward and utility over training, which the training stage could not know: [(step, metrics)]
    samples     its first texts beside prompt and reward
    """
    entries = []
    for row, runs in found["runs"].items():
        method = found["method_of"][row]
        first = row == method
        took = {}
        if first and row in found["cost"]:
            took = {"cost/total_flops": found["cost"][row]["total"]["flops"]}
            took["cost/total_seconds"] = cost.of_machine(lines_of(inputs, row, row in inputs.settings))["total_seconds"]
        for (folder, values), seed in zip(runs.items(), inputs.seeds, strict=True):
            prefix = "evaluation" if first else f"evaluation {row.partition(' ')[2].strip('[]')}"
            metrics = {f"{prefix}/{name}": value for name, value in values.items()} | took
            steps, samples = [], None
            if first and folder in found["validation"]:
                metrics[f"validation/{found['criterion']}"] = found["validation"][folder]
                means = inputs.watched[folder].groupby("step")[["reward", "utility"]].mean()
                steps = [
                    (int(step), {f"heldout/{name}": value for name, value in row.dropna().items()})
                    for step, row in means.iterrows()
                ]
            if first and folder in inputs.samples:
                table = answers.first(inputs.samples[folder]).head(TEXTS)
                samples = table[["prompt_id", "response", "gold", "utility", "reward", "tokens", "finished"]]
            entries.append(
                {
                    "folder": folder,
                    "method": method,
                    "family": found["families"][row],
                    "seed": seed,
                    "settings": inputs.settings[method].model_dump() if method in inputs.settings else {},
                    "metrics": metrics,
                    "steps": steps,
                    "samples": samples,
                    "validation": found["validation"].get(folder) if first else None,
                }
            )
    return entries
