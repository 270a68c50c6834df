"""Print the table of evaluation/results.json, and the verdict, to a terminal."""

import json
import sys
import textwrap
from pathlib import Path

from rlhf_vs_dpo.report.content import main_table
from rlhf_vs_dpo.report.markdown import table
from rlhf_vs_dpo.report.words import verdict

NARROW = ("preferred", "gold", "utility", "reward", "win_rate_vs_sft", "kl", "tokens", "finished")  # fits a terminal

if len(sys.argv) != 2:
    sys.exit("usage: python -m rlhf_vs_dpo.report evaluation/results.json")
try:
    found = json.loads(Path(sys.argv[1]).read_text())
    shown = main_table(found, set(), NARROW)
except (OSError, ValueError, KeyError, TypeError) as error:
    sys.exit(
        f"error: {sys.argv[1]} is not a results.json ({type(error).__name__}: {error}); `dvc repro evaluate` makes one"
    )
print(table([shown.head, *([cell.text for cell in row] for row in shown.rows)]))
for sentence in verdict(found):
    print("\n" + textwrap.fill(sentence, 110))
