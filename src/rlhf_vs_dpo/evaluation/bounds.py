"""What theory says no policy of a kind can exceed, beside what was measured. Derivations: `theory`, and docs/from-rlhf-to-dpo.md."""

import math

from rlhf_vs_dpo.config import Imitation
from rlhf_vs_dpo.evaluation.order_statistics import kl_bound, win_rate_bound

WINS = ("win_rate_vs_sft", "win_rate_vs_sft_by_rm")


def check(name: str, row: dict[str, dict], kl: float, wins: float, comparisons: int) -> dict[str, dict]:
    """KL and win rates of a policy against what it cannot exceed; `comparisons` is how many win rates are means of.

    `holds` is False where the whole 95 % interval is above the bound: the bound is of the exact optimum, and a policy
    fitted to finitely many texts, or measured on finitely many prompts, may lie beyond it by chance. A win rate of which
    fewer than five losses are to be expected is left out: its interval says nothing that near to 1.
    """
    limits = {"kl": kl} | (dict.fromkeys(WINS, wins) if (1 - wins) * comparisons >= 5 else {})
    return {
        f"{name}: {quantity}": row[quantity]
        | {"bound": limit, "slack": limit - row[quantity]["mean"], "holds": row[quantity]["low"] <= limit}
        for quantity, limit in limits.items()
        if row[quantity]["mean"] is not None
    }


def of_best_of_n(name: str, row: dict[str, dict], n: int, comparisons: int) -> dict[str, dict]:
    """Best-of-n, and whatever is at most as selective: log n - (n-1)/n, and n/(n+1)."""
    return check(name, row, kl_bound(n), win_rate_bound(n), comparisons)


def of_imitation(
    name: str, row: dict[str, dict], settings: Imitation, own_pairs: bool, samples: int, comparisons: int
) -> dict[str, dict]:
    """A choice between two samples of ref is at most as selective as best-of-2, t rounds of best-of-n as best-of-n^t.

    The best share s of `samples` is ref above a threshold, t times over: KL <= -t log s, and 1 - s^t / 2 of comparisons
    won. `own_pairs`: pairs come from a data set, and not from ref; then nothing bounds what imitates them.
    """
    match settings.recipe:
        case "chosen_sft" | "control_tokens" if not own_pairs:
            return of_best_of_n(name, row, 2, comparisons)
        case "best_of_n":
            return of_best_of_n(name, row, settings.n**settings.rounds, comparisons)
        case "rm_filtered":
            share = (max(1, round(samples * settings.share)) / samples) ** settings.rounds
            return check(name, row, -math.log(share), 1 - share / 2, comparisons)
    return {}
