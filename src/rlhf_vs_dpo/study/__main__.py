"""Print what tuning/study.json says, a row for each method, the best first."""

import json
import sys
from pathlib import Path
from typing import Any

from rlhf_vs_dpo.report.markdown import table

TRIED = (1, 4, 16)  # trials after which the expected best is shown, as far as there were so many
HEAD = ("method", "best", "gold", "KL", "median", "lowest", "lost")


def rows(study: dict[str, Any]) -> list[list[str]]:
    """The heading, and a row for each method: its best trial, all trials, and what a search of k of them is expected to find."""
    methods = sorted(study["methods"].items(), key=lambda item: -item[1]["expected_best"][-1]["mean"])
    shown = [k for k in TRIED if k <= max(len(of["expected_best"]) for _, of in methods)]
    found = [[*HEAD, *(f"after {k}" for k in shown), "setting"]]
    for method, of in methods:
        best = of["best"]
        lost = of["collapsed"] + of["diverged"]
        measured = (
            ["-", "-", "-"] if best is None else [f"{best[name]:.2f}" for name in (study["criterion"], "gold", "kl")]
        )
        expected = [
            f"{one['mean']:.2f} ({one['low']:.2f} to {one['high']:.2f})"
            for one in of["expected_best"]
            if one["trials"] in shown
        ]
        setting = "-" if best is None else ", ".join(f"{key} {value:g}" for key, value in best["settings"].items())
        found.append(
            [
                method,
                *measured,
                f"{of['median']:.2f}",
                f"{of['lowest']:.2f}",
                f"{lost}/{of['trials']}",
                *expected,
                setting,
            ]
        )
    return found


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python -m rlhf_vs_dpo.study tuning/study.json")
    try:
        print(table(rows(json.loads(Path(sys.argv[1]).read_text()))))
    except (OSError, ValueError, KeyError, TypeError) as error:
        sys.exit(f"error: {sys.argv[1]} is not a study.json ({type(error).__name__}: {error}); `make tune` makes one")
