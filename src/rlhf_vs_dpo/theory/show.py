"""What the theory stage found, for people: a figure, and the table of docs/from-rlhf-to-dpo.md.

`python -m rlhf_vs_dpo.theory.show metrics/theory.json` prints the table.
"""

import json
import sys
from pathlib import Path

import pandas as pd

COLOURS = ["#0072B2", "#56B4E9", "#D55E00", "#E69F00", "#009E73", "#CC79A7", "#000000"]  # Okabe and Ito 2008
OPTIMUM = dict.fromkeys(("reinforce", "rloo", "trpo", "ppo", "dpo", "reward_model_and_gibbs"), "ref exp(r/β)/Z")
OPTIMUM |= dict.fromkeys(("chosen_sft", "control_tokens"), "2 ref E σ(r−r′)")


def draw(rows: list[dict], path: Path) -> None:
    """KL(pi || its optimum) over the share of training done, a panel for each problem."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    frame = pd.DataFrame(rows)
    problems = list(dict.fromkeys(frame["problem"]))
    methods = list(dict.fromkeys(frame["method"]))
    figure, axes = plt.subplots(1, len(problems), figsize=(5 * len(problems), 4), sharey=True, layout="constrained")
    for axis, problem in zip(axes, problems, strict=True):
        for method, curve in frame[frame["problem"] == problem].groupby("method", sort=False):
            axis.plot(
                curve["share"],
                curve["kl_to_optimum"].clip(lower=1e-6),
                marker=".",
                color=COLOURS[methods.index(method) % len(COLOURS)],
                label=f"{method} ({int(curve['step'].max())} steps)",
            )
        axis.set_yscale("log")
        axis.set_title(problem)
        axis.set_xlabel("share of training")
        axis.grid(alpha=0.3)
        axis.legend(fontsize="small")
    axes[0].set_ylabel("KL(policy, optimum) in nats, worst prompt")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110, metadata={"Software": None})
    plt.close(figure)


def table(theory: dict) -> str:
    """Distances to each optimum, the tightest bounds, the worst identities, as Markdown."""
    lines = [
        "| problem | method | optimum | total variation | KL(π‖optimum), nats |",
        "| --- | --- | --- | --- | --- |",
    ]
    for problem in ("tabular", "transformer"):
        for method, entry in theory[problem].items():
            lines.append(
                f"| {problem} | {method} | {OPTIMUM[method]} | {entry['total_variation']:.4f} | {entry['kl']:.4f} |"
            )
    worst = max(theory["identities"].items(), key=lambda item: item[1])
    tight = min(theory["bounds"].items(), key=lambda item: item[1]["slack"])
    lines += [
        "",
        f"Of {len(theory['identities'])} identities the worst is off by {worst[1]:.1e} ({worst[0]}); of "
        f"{len(theory['bounds'])} bounds {sum(b['slack'] >= 0 for b in theory['bounds'].values())} hold, the tightest by "
        f"{tight[1]['slack']:.1e} ({tight[0]}).",
    ]
    return "\n".join(lines)


def facts(theory: dict) -> dict[str, str]:
    """The other numbers of that page, as it prints them."""
    biased, bounds, slopes = theory["biased_kl_gradients"], theory["bounds"], theory["dpo_without_exception"].values()
    gibbs = bounds["best of 16: reward below Gibbs at equal KL"]
    chosen = theory["tabular"]["chosen_sft"]
    return {
        "k2": f"{biased['k2 in the reward']:.2f}",
        "k3": f"{biased['k3 in the reward']:.2f}",
        "slopes": ", ".join(f"{slope:.1e}" for slope in slopes),
        "kl": f"{chosen['kl_to_reference']:.3f}",
        "win": f"{chosen['win_rate']:.3f}",
        "kl1024": f"{bounds['best of 1024: KL']['value']:.3f}",
        "bound1024": f"{bounds['best of 1024: KL']['bound']:.3f}",
        "ties1024": f"{bounds['best of 1024 with ties: KL']['value']:.3f}",
        "gibbs16": f"{gibbs['bound']:.2f}",
        "best16": f"{gibbs['value']:.2f}",
    }


if __name__ == "__main__":
    print(table(json.loads(Path(sys.argv[1]).read_text())))
