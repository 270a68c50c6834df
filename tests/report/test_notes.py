"""docs/notes.md says what the committed results say."""

import json
import re

from conftest import ROOT

NUMBER = re.compile(r"(-?\d+\.\d+(?:e[+-]\d+)?)<!--(\S+): (.+?)-->")


def value(file: str, key: str) -> float:
    found = json.loads((ROOT / "metrics" / f"{file}.json").read_text())
    if key in found:
        return found[key]
    section, _, rest = key.partition("/")
    if rest in found[section]:
        return found[section][rest]
    name, _, last = rest.rpartition("/")
    return found[section][name][last]


def test_every_number_of_the_notes_is_that_of_the_results():
    page = (ROOT / "docs" / "notes.md").read_text()
    numbers = NUMBER.findall(page)
    assert len(numbers) > 60 and len(numbers) == page.count("<!--")
    for said, file, key in numbers:
        digits = len(said.partition("e")[0].partition(".")[2])
        truth = value(file, key.replace("\\|", "|"))
        assert said == (f"{truth:.{digits}e}" if "e" in said else f"{truth:.{digits}f}"), key


def test_every_section_of_both_notes_is_there():
    page = (ROOT / "docs" / "notes.md").read_text()
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
