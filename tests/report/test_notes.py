"""docs/notes.md, README and docs/results say what the results say. `python tests/report/test_notes.py` writes the numbers anew."""

import json
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "docs" / "results"
PAGES = [
    ROOT / "docs" / "notes.md",
    ROOT / "README.md",
    RESULTS / "five-lines" / "README.md",
    RESULTS / "smollm2" / "README.md",
]
FILES = {
    "study": "tuning/study.json",
    "lines": "docs/results/five-lines/results.json",
    "smollm2": "docs/results/smollm2/results.json",
}  # others are of the default run
NUMBER = re.compile(r"(-?\d+(?:\.\d+)?(?:e[+-]\d+)?)<!--(\S+): (.+?)-->")


def value(file: str, key: str) -> float:
    """`theory: identities/…`, `policies/ppo: gold`, `study: methods/ppo/collapsed`, `lines: methods/ppo/gold/mean`: a number of a file."""
    found = json.loads((ROOT / FILES.get(file, f"metrics/{file}.json")).read_text())
    while key:
        names = [str(number) for number in range(len(found))] if isinstance(found, list) else found
        first = next(name for name in names if f"{key}/".startswith(f"{name}/"))  # a name may hold slashes itself
        found, key = found[int(first) if isinstance(found, list) else first], key.removeprefix(first).removeprefix("/")
    return found


def refreshed(page: str) -> str:
    """The page with every number as the results have it, with as many digits as it has now."""

    def number(found: re.Match) -> str:
        said, file, key = found.groups()
        digits = len(said.partition("e")[0].partition(".")[2])
        truth = value(file, key.replace("\\|", "|"))
        return f"{truth:.{digits}{'e' if 'e' in said else 'f'}}<!--{file}: {key}-->"

    return NUMBER.sub(number, page)


@pytest.mark.parametrize(
    ("place", "least"), list(zip(PAGES, (60, 12, 20, 20), strict=True)), ids=["notes", "readme", "lines", "smollm2"]
)
def test_every_number_is_that_of_the_results(place, least):
    page = place.read_text()
    assert len(NUMBER.findall(page)) == page.count("<!--") > least
    for ours, theirs in zip(page.splitlines(), refreshed(page).splitlines(), strict=True):
        assert ours == theirs


def test_every_section_of_both_notes_is_there():
    page = PAGES[0].read_text()
    for section in ("5.0", "5.1", "5.2", "6.0", "6.1", "6.2", "6.3", "6.4"):
        assert re.search(rf"^## .*{re.escape(section)}", page, re.M), section
    for heading in (
        "DPO：动机",
        "(1) 背景与关键假设",
        "(2) 最优策略的解析解",
        "(3) 将偏好模型代入并消去 r",
        "(4) 构造 DPO 的损失",
        "伪代码",
        "附录 1.推导",
        "附录 2.梯度直观",
    ):
        assert heading in page, heading


if __name__ == "__main__":
    for page in PAGES:
        page.write_text(refreshed(page.read_text()))
