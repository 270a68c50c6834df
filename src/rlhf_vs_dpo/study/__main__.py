"""Print what tuning/study.json says, a row for each method, the best first.

python -m rlhf_vs_dpo.study tuning/study.json                     what the searches found
python -m rlhf_vs_dpo.study tuning/study.json metrics/policies    beside what the comparison found on test prompts, of lines of its own
"""

import json
import sys
from pathlib import Path
from typing import Any

from rlhf_vs_dpo.report.markdown import table

TRIED = (1, 4, 16)  # trials after which the expected best is shown, as far as there were so many
HEAD = ("method", "best", "gold", "KL", "median", "lowest", "lost")


def rows(study: dict[str, Any], tested: Path | None = None) -> list[list[str]]:
    """The heading, and a row for each method: its best trial, all trials, and what a search of k of them is expected to find.

    tested    folder of a JSON file for each policy of the comparison, whose `preferred` goes beside that of the best trial
    """
    methods = sorted(study["methods"].items(), key=lambda item: -item[1]["expected_best"][-1]["mean"])
    shown = [k for k in TRIED if k <= max(len(of["expected_best"]) for _, of in methods)]
    found = [[*HEAD, *(f"after {k}" for k in shown), *(["test"] if tested else []), "setting"]]
    for method, of in methods:
        best = of["best"]
        lost = of["collapsed"] + of["diverged"]
        measured = (
            ["-", "-", "-"] if best is None else [_shown(best[name]) for name in (study["criterion"], "gold", "kl")]
        )
        expected = [
            f"{one['mean']:.2f} ({one['low']:.2f} to {one['high']:.2f})"
            for one in of["expected_best"]
            if one["trials"] in shown
        ]
        setting = "-" if best is None else ", ".join(f"{key} {value:g}" for key, value in best["settings"].items())
        row = [method, *measured, f"{of['median']:.2f}", f"{of['lowest']:.2f}", f"{lost}/{of['trials']}", *expected]
        found.append([*row, *([_tested(tested / f"{method}.json", study["criterion"])] if tested else []), setting])
    return found


def _shown(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def _tested(file: Path, criterion: str) -> str:
    if not file.exists():
        return "-"
    of = json.loads(file.read_text())
    ends = [of.get(f"{criterion}_{end}") for end in ("low", "high")]  # of what rows are compared by alone
    return f"{of[criterion]:.2f}" + ("" if None in ends else f" ({ends[0]:.2f} to {ends[1]:.2f})")


if __name__ == "__main__":
    if len(sys.argv) not in (2, 3):
        sys.exit("usage: python -m rlhf_vs_dpo.study tuning/study.json [metrics/policies]")
    try:
        print(table(rows(json.loads(Path(sys.argv[1]).read_text()), *map(Path, sys.argv[2:]))))
    except (OSError, ValueError, KeyError, TypeError) as error:
        sys.exit(f"error: {sys.argv[1]} is not a study.json ({type(error).__name__}: {error}); `make tune` makes one")
