"""Losses of a batch as TRL 1.16.0 computes them, recorded: `python benchmarks/against_trl.py --record`.

A seeded model of two layers, sixteen pairs of seeded tokens of many lengths, and a policy a little apart from its reference, so that no
loss is a constant. IPO is compared as TRL defines it, over means per token (losses/ipo.py says why ours is not).
"""

import json
import sys
from pathlib import Path

import pytest
from conftest import ROOT

RECORDED = json.loads((Path(__file__).parent / "trl.json").read_text())


@pytest.fixture(scope="module")
def ours():
    sys.path.insert(0, str(ROOT / "benchmarks"))
    try:
        import sides
    finally:
        sys.path.pop(0)
    size = sides.SIZES["tiny"]
    return {
        name: value
        for loop in ("sft", "reward", "dpo", "rloo")
        for name, value in sides.losses("ours", loop, sides.tiny(size), size).items()
    }


@pytest.mark.parametrize("name", RECORDED)
def test_the_loss_is_that_of_trl(ours, name):
    assert ours[name] == pytest.approx(RECORDED[name], abs=1e-4)


def test_every_loss_is_recorded_and_none_is_a_constant(ours):
    assert ours.keys() == RECORDED.keys() and len(ours) == 7
    assert abs(RECORDED["DPO"] - 0.6931) > 1e-3
