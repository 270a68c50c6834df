"""The answer a reader came for: one table, the curves behind it, the texts themselves, and what each method cost.

`python -m rlhf_vs_dpo.report metrics/evaluation.json` prints the table alone.
"""

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

COLUMNS = {  # metric -> (heading, digits)
    "gold": ("gold", 2),
    "reward": ("RM reward", 2),
    "win_rate_vs_sft": ("win vs SFT", 2),
    "win_rate_vs_demonstration": ("win vs demo", 2),
    "kl": ("KL", 2),
    "tokens": ("tokens", 1),
    "finished": ("finished", 2),
    "filler": ("filler", 2),
    "corpus_perplexity": ("corpus ppl", 2),
    "fact_recall": ("fact recall", 2),
    "pair_accuracy": ("pairs", 2),
}
COLOURS = ["#000000", "#0072B2", "#56B4E9", "#D55E00", "#E69F00", "#009E73", "#CC79A7", "#F0E442"]  # Okabe and Ito 2008


@dataclass
class Policy:
    """What the report knows of one policy; `folder` is its name under models/, `family` a section of params.yaml."""

    folder: str
    name: str
    family: str
    curve: pd.DataFrame | None
    heldout: pd.DataFrame | None
    run: dict[str, Any]
    samples: pd.DataFrame


def cell(entry: dict[str, float | None], digits: int) -> str:
    """Mean with half the width of its 95 % interval, or a dash where the source cannot tell."""
    if entry["mean"] is None:
        return "–"
    return f"{entry['mean']:.{digits}f} ± {(entry['high'] - entry['low']) / 2:.{digits}f}"


def table(evaluation: dict[str, dict[str, dict[str, float | None]]]) -> str:
    """The comparison as a Markdown table that also reads well in a terminal; columns without any value are left out."""
    shown = {m: spec for m, spec in COLUMNS.items() if any(row[m]["mean"] is not None for row in evaluation.values())}
    lines = [["policy", *(heading for heading, _ in shown.values())]]
    for policy, row in evaluation.items():
        lines.append([policy, *(cell(row[metric], digits) for metric, (_, digits) in shown.items())])
    return markdown(lines)


def markdown(rows: list[list[str]]) -> str:
    """Rows (the first one the heading) as an aligned Markdown table."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    padded = [" | ".join(value.ljust(width) for value, width in zip(row, widths, strict=True)) for row in rows]
    rule = " | ".join("-" * width for width in widths)
    return "\n".join(f"| {line} |" for line in [padded[0], rule, *padded[1:]])


def cost_table(policies: list[Policy], upstream: dict[str, dict[str, Any]]) -> str:
    """Seconds and tokens of each method's own stage, then of the stages that methods share."""
    rows = [["stage", "seconds", "tokens trained", "tokens generated", "device"]]
    entries = {policy.name: policy.run for policy in policies} | upstream
    for name, run in entries.items():
        rows.append(
            [
                name,
                f"{run['seconds']:.0f}",
                f"{run.get('tokens_trained', 0):,}",
                f"{run.get('tokens_generated', 0):,}",
                run["device"],
            ]
        )
    return markdown(rows)


def inference(evaluation: dict[str, dict[str, dict[str, float | None]]]) -> str:
    """What an answer costs where more is sampled for it than is given: best-of-n without training."""
    lines = [
        f"{name} needs no training and pays for each answer: {row['sampled_tokens']['mean']:.0f} tokens sampled, and every "
        f"sample scored by the reward model, for one answer of {row['tokens']['mean']:.0f} tokens "
        f"(the SFT policy: {evaluation['sft']['tokens']['mean']:.0f})."
        for name, row in evaluation.items()
        if row["sampled_tokens"]["mean"] is not None and row["sampled_tokens"]["mean"] > row["tokens"]["mean"] * 1.01
    ]
    return "\n\n".join(lines) or "Every policy samples one answer for each that it gives."


def examples(policies: list[Policy], prompts: pd.DataFrame, demonstrations: pd.DataFrame, count: int) -> str:
    """The first sample of every policy for the first `count` test prompts, side by side."""
    parts = []
    sampled = prompts[prompts["prompt_id"].isin(policies[0].samples["prompt_id"])]
    for row in sampled.head(count).itertuples():
        demos = demonstrations[demonstrations["prompt_id"] == row.prompt_id]["response"]
        lines = (
            [["who", "gold", "response"], ["demonstration", "", _inline(demos.iloc[0])]]
            if len(demos)
            else [["who", "gold", "response"]]
        )
        for policy in policies:
            sample = policy.samples[policy.samples["prompt_id"] == row.prompt_id].sort_values("sample").iloc[0]
            lines.append(
                [policy.name, "" if pd.isna(sample["gold"]) else f"{sample['gold']:.2f}", _inline(sample["response"])]
            )
        parts.append(f"**{_inline(row.prompt)}**\n\n{markdown(lines)}")
    return "\n\n".join(parts)


def _inline(text: str) -> str:
    """Text that cannot break out of a table cell."""
    return " ".join(text.split()).replace("|", "\\|")


def bounds_table(bounds: dict[str, dict[str, Any]]) -> str:
    """What was measured beside what theory allows."""
    rows = [["what", "measured", "95 %", "bound", "holds"]]
    for name, entry in bounds.items():
        rows.append(
            [
                name,
                f"{entry['mean']:.3f}",
                f"{entry['low']:.3f} to {entry['high']:.3f}",
                f"{entry['bound']:.3f}",
                "yes" if entry["mean"] <= entry["bound"] else "within its interval" if entry["holds"] else "NO",
            ]
        )
    return markdown(rows)


def figures(policies: list[Policy], evaluation: dict, best_of_n: pd.DataFrame, folder: Path) -> dict[str, Path]:
    """Draw all figures into `folder`; returns {caption: path}."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    plt.rcParams.update(
        {"figure.dpi": 110, "axes.grid": True, "grid.alpha": 0.3, "axes.spines.top": False, "axes.spines.right": False}
    )
    trained = [policy for policy in policies if policy.heldout is not None]
    families = list(dict.fromkeys(policy.family for policy in trained))
    of = {family: [policy for policy in trained if policy.family == family] for family in families}
    colour = {p.name: COLOURS[i % len(COLOURS)] for members in of.values() for i, p in enumerate(members)}
    drawn: dict[str, Path] = {}

    def save(figure, name: str, caption: str) -> None:
        path = folder / f"{name}.png"
        figure.savefig(path, metadata={"Software": None})
        plt.close(figure)
        drawn[caption] = path

    measured = [
        m
        for m in ("gold", "reward", "win_rate_vs_sft")
        if any(row[m]["mean"] is not None for row in evaluation.values())
    ]
    figure, axes = plt.subplots(
        1,
        len(measured),
        figsize=(4.2 * len(measured), 0.3 * len(evaluation) + 1.6),
        sharey=True,
        squeeze=False,
        layout="constrained",
    )
    for axis, metric in zip(axes[0], measured, strict=True):
        for row, (name, metrics) in enumerate(evaluation.items()):
            entry = metrics[metric]
            if entry["mean"] is None:  # a policy of which no response ever ended has no reward
                continue
            axis.errorbar(
                entry["mean"],
                row,
                xerr=[[entry["mean"] - entry["low"]], [entry["high"] - entry["mean"]]],
                fmt="o",
                color=colour.get(name, COLOURS[0]),
                capsize=3,
            )
        axis.set_xlabel(COLUMNS[metric][0])
    axes[0][0].set_yticks(range(len(evaluation)), list(evaluation))
    axes[0][0].invert_yaxis()
    save(figure, "comparison", "Every policy on held-out prompts, with 95 % intervals")

    for metric, name in (("gold", "gold reward"), ("reward", "RM reward")):
        shown = [family for family in families if any(p.heldout[metric].notna().any() for p in of[family])]
        if not shown:
            continue
        figure, axes = plt.subplots(
            1, len(shown), figsize=(4.6 * len(shown), 4.2), sharey=True, squeeze=False, layout="constrained"
        )
        for axis, family in zip(axes[0], shown, strict=True):
            axis.plot(best_of_n["kl"], best_of_n[metric], "k:", label="best of n (test prompts)")
            for policy in of[family]:
                axis.plot(
                    policy.heldout["kl"],
                    policy.heldout[metric],
                    marker="o",
                    markersize=3,
                    color=colour[policy.name],
                    label=policy.name,
                )
            axis.set_title(family)
            axis.set_xlabel("KL(policy, SFT) in nats per response")
            axis.legend(fontsize="small")
        axes[0][0].set_ylabel(f"{name} on validation prompts")
        save(
            figure,
            f"{metric}_against_kl",
            f"{name[0].upper()}{name[1:]} against KL over training; each dot is one of the watched points",
        )

    judge = "gold" if best_of_n["gold"].notna().any() else "reward"
    figure, axes = plt.subplots(1, 3, figsize=(12, 3.6), layout="constrained")
    panels = [(judge, "best of n: " + judge), ("win_rate_vs_sft", "win rate against SFT"), ("kl", "KL to SFT, nats")]
    n = best_of_n["n"]
    limits = {"win_rate_vs_sft": n / (n + 1), "kl": np.log(n) - (n - 1) / n}
    for axis, (metric, title) in zip(axes, panels, strict=True):
        axis.fill_between(n, best_of_n[f"{metric}_low"], best_of_n[f"{metric}_high"], alpha=0.25, color=COLOURS[1])
        axis.plot(n, best_of_n[metric], marker="o", markersize=3, color=COLOURS[1])
        if metric in limits:
            axis.plot(n, limits[metric], "k--", label="bound")
            axis.legend()
        axis.set_xscale("log", base=2)
        axis.set_xlabel("n")
        axis.set_title(title)
    save(figure, "best_of_n", "Best of n without training, from one pool (unbiased order-statistic estimate)")

    if trained:
        names = [
            n
            for n in ("gold", "reward", "kl", "tokens", "filler", "finished")
            if any(p.heldout[n].notna().any() for p in trained)
        ]
        figure, axes = plt.subplots(
            len(names), len(families), figsize=(4 * len(families), 2.4 * len(names)),
            squeeze=False, sharey="row", sharex=True, layout="constrained",
        )  # fmt: skip
        for column, family in enumerate(families):
            for row, name in enumerate(names):
                axis = axes[row][column]
                for policy in of[family]:
                    share = policy.heldout["step"] / policy.heldout["step"].max()
                    axis.plot(share, policy.heldout[name], color=colour[policy.name], label=policy.name)
                if column == 0:
                    axis.set_ylabel(name)
            axes[0][column].set_title(family)
            axes[0][column].legend(fontsize="x-small")
            axes[-1][column].set_xlabel("share of training")
        save(figure, "training", "What changes while each method trains (validation prompts)")

    panels = [  # (metric of a training curve, title, how to draw it)
        ("pairs/accuracy", "implicit-reward accuracy", "-"),
        ("pairs/margin", "implicit-reward margin", "-"),
        ("pairs/chosen_logp", "log π: chosen (line), rejected (dotted)", "-"),
        ("rollout/score", "RM score of episodes", "-"),
        ("rollout/explained_variance", "explained variance of the value", "-"),
        ("update/kl_old_new", "KL(old, new) of an iteration's updates", "-"),
    ]
    figure, axes = plt.subplots(2, 3, figsize=(12, 6.4), layout="constrained")
    for axis, (metric, title, style) in zip(axes.flat, panels, strict=True):
        for policy in trained:
            if policy.curve is None or metric not in policy.curve:
                continue
            lines = [(metric, style)] + ([("pairs/rejected_logp", ":")] if metric == "pairs/chosen_logp" else [])
            for name, drawn_as in lines:
                # A batch is noisy: a centred mean over a twentieth of the run shows where it goes.
                smooth = policy.curve[name].rolling(max(1, len(policy.curve) // 20), center=True, min_periods=1).mean()
                axis.plot(
                    policy.curve["step"],
                    smooth,
                    drawn_as,
                    color=colour[policy.name],
                    label=policy.name if drawn_as == "-" else None,
                )
        axis.set_title(title)
        axis.set_xlabel("step" if metric.startswith("pairs") else "iteration")
        if axis.lines:
            axis.legend(fontsize="x-small")
    save(figure, "learning", "Training curves: the preference family above, the RL family below")
    return drawn


def write(
    folder: Path, policies: list[Policy], evaluation: dict, bounds: dict, best_of_n: pd.DataFrame, upstream: dict[str, dict[str, Any]], prompts: pd.DataFrame,
    demonstrations: pd.DataFrame, reward_quality: dict, judge: str, seeds: list[int], count: int,
) -> list[Path]:  # fmt: skip
    """Write report.md and its figures into `folder`; returns the figures."""
    drawn = figures(policies, evaluation, best_of_n, folder)
    intervals = (
        f"Intervals are 95 % from a bootstrap over test prompts. There is {'one seed' if len(seeds) == 1 else f'a row for each of {len(seeds)} seeds'} "
        "per method: they say nothing about how another training run would have ended."
    )
    sections = [
        "# RLHF versus DPO: the comparison",
        table(evaluation),
        f"{intervals} RM reward is the mean over responses that ended, for there is no EOS to score the others at. Wins are judged by {'the gold reward' if judge == 'gold' else 'the reward model, for want of a gold reward'}. "
        f"The reward model orders held-out pairs as the annotator did in {reward_quality['accuracy']:.1%} of cases "
        f"(± {1.96 * reward_quality['accuracy_standard_error']:.1%}); `pairs` says the same of a policy's implicit reward.",
        *(f"![{caption}]({path.name})\n\n*{caption}.*" for caption, path in drawn.items()),
        "## What theory allows",
        "A choice between two samples of the SFT policy, by whatever judge, is at most as selective as best-of-2 (pairs of equal "
        "responses are left out of the data, which the bound does not know); best-of-n has "
        "KL at most log n − (n−1)/n and wins at most n/(n+1) of comparisons ([docs/from-rlhf-to-dpo.md](../docs/from-rlhf-to-dpo.md)).",
        bounds_table(bounds),
        "## Side by side",
        examples(policies, prompts, demonstrations, count),
        "## What it cost",
        "Seconds are wall time of the whole stage, start-up and held-out sampling included. Trained tokens count prompts and "
        "responses at every pass; generated tokens are those a method learns from (its monitoring left out).",
        cost_table(policies, upstream),
        inference(evaluation),
        "MLflow runs: " + ", ".join(f"{policy.name} `{policy.run['run_id']}`" for policy in policies) + ".",
    ]
    (folder / "report.md").write_text("\n\n".join(sections) + "\n")
    return list(drawn.values())


if __name__ == "__main__":
    print(table(json.loads(Path(sys.argv[1]).read_text())))
