"""Planned questions: answered from three lines on, wrongly in at most one experiment of twenty."""

import os
import runpy

import numpy as np
import pytest
from conftest import ROOT

from rlhf_vs_dpo.evaluation.questions import answered
from rlhf_vs_dpo.evaluation.statistics import Resamples

# Standard deviations of `preferred`: what a line gives to all its methods, to each, of prompts, of answers to a prompt. Estimated from five
# lines of the tuned settings by benchmarks/spread_of_lines.py, see docs/statistics.md.
LINE, METHOD, PROMPT, ANSWER = 0.015, 0.047, 0.050, 0.159
EXPERIMENTS = int(os.environ.get("RLHF_EXPERIMENTS", 30))


def experiment(rng, lines, effects, prompts=500):
    """Estimates of rows in lines that differ: by what a line gives to all its methods, by what it gives to each, and by noise."""
    resamples = Resamples(200, int(rng.integers(2**31)))
    asked = PROMPT * rng.normal(size=prompts)
    shared = LINE * rng.normal(size=(lines, 1))
    found = {}
    for name, effect in effects.items():
        own = METHOD * rng.normal(size=(lines, 1))
        top = 0.6 + effect + asked + shared + own + ANSWER * rng.normal(size=(lines, prompts))
        found[name] = resamples.ratio("prompt", top, np.ones_like(top))
    return found, resamples


def test_the_spread_of_lines_is_estimated_as_it_was_made():
    """benchmarks/spread_of_lines.py, from which the spreads above are."""
    rng = np.random.default_rng(0)
    methods, lines, prompts = 20, 200, 400
    made = {"line": 0.3, "method in line": 0.2, "prompt": 0.5, "rest": 0.8}
    values = rng.normal(size=(methods, 1, 1)) + made["line"] * rng.normal(size=(lines, 1))
    values = (
        values
        + made["method in line"] * rng.normal(size=(methods, lines, 1))
        + made["prompt"] * rng.normal(size=prompts)
    )
    values = values + made["rest"] * rng.normal(size=(methods, lines, prompts))
    found = runpy.run_path(str(ROOT / "benchmarks" / "spread_of_lines.py"))["spreads"](values)
    assert found == pytest.approx(made, rel=0.12)


def test_the_higher_one_is_named_whichever_stands_first():
    estimates, resamples = experiment(np.random.default_rng(0), 8, {"a": 0.0, "b": 2.0})
    for pair, answer in ((("a", "b"), "b"), (("b", "a"), "a")):
        (entry,) = answered([pair], estimates, resamples)
        assert entry["answer"] == answer and (entry["mean"] > 0) == (answer == "a")


@pytest.mark.parametrize("lines", [1, 2])
def test_one_line_or_two_answer_nothing(lines):
    estimates, resamples = experiment(np.random.default_rng(0), lines, {"a": 0.5, "b": 0.0})
    (entry,) = answered([("a", "b")], estimates, resamples)
    assert entry["p"] is entry["p_holm"] is entry["answer"] is None
    apart = 4 * METHOD * (2 / lines) ** 0.5  # four standard deviations of what lines give to the two
    assert entry["mean"] == pytest.approx(0.5, abs=apart) and entry["low"] < entry["mean"] < entry["high"]


@pytest.mark.parametrize("lines", [3, *(pytest.param(n, marks=pytest.mark.slow) for n in (4, 5, 8))])
def test_a_question_without_a_difference_is_answered_differs_in_at_most_five_percent(lines):
    rng, wrong, experiments = np.random.default_rng(lines), 0, EXPERIMENTS
    names = [f"m{i}" for i in range(13)]
    questions = [(names[0], name) for name in names[1:]]
    for _ in range(experiments):
        estimates, resamples = experiment(rng, lines, dict.fromkeys(names, 0.0))
        wrong += any(entry["answer"] != "open" for entry in answered(questions, estimates, resamples))
    print(f"{lines} lines: any of twelve answered 'differs' in {wrong} of {experiments} experiments")
    # any of twelve, after Holm: 5 %, and three standard errors of that many experiments
    assert wrong / experiments <= 0.05 + 3 * (0.05 * 0.95 / experiments) ** 0.5


@pytest.mark.slow
@pytest.mark.parametrize("effect", [0.10, 0.20])
def test_power_grows_with_lines(effect):
    """Twelve questions, one of which has a difference: how often is it found?"""
    names, found = [f"m{i}" for i in range(13)], {}
    questions = [(names[0], name) for name in names[1:]]
    for lines in (3, 4, 5, 8) if EXPERIMENTS > 30 else (3, 8):
        rng, right = np.random.default_rng(lines), 0
        for _ in range(EXPERIMENTS):
            estimates, resamples = experiment(rng, lines, dict.fromkeys(names, 0.0) | {"m1": effect})
            right += answered(questions, estimates, resamples)[0]["answer"] == "b"
        found[lines] = right / EXPERIMENTS
        print(f"{lines} lines: a difference of {effect} found in {right} of {EXPERIMENTS} experiments")
    assert sorted(found.values()) == list(found.values()) and found[8] > (0.9 if effect == 0.20 else 0.3)


def test_questions_about_rows_that_were_not_run_are_left_out_and_silent_rows_are_not_compared():
    rng = np.random.default_rng(2)
    estimates, resamples = experiment(rng, 3, {"a": 0.2, "b": 0.0})
    top = np.stack([np.full(500, 0.5), np.full(500, 0.5), np.zeros(500)])
    silent = resamples.ratio("prompt", top, (top > 0).astype(float))  # in one line it says nothing that ends
    estimates |= {"silent": silent, "never": None}
    found = answered([("a", "gone"), ("a", "silent"), ("a", "never"), ("a", "b")], estimates, resamples)
    assert [(e["b"], e["p"] is None) for e in found] == [("silent", True), ("never", True), ("b", False)]


def test_holm_is_over_the_questions_of_one_axis():
    estimates, resamples = experiment(np.random.default_rng(3), 4, {"a": 0.3, "b": 0.0, "c": 0.3})
    found = answered([("a", "b"), ("a", "c"), ("c", "b")], estimates, resamples)
    smallest = min(found, key=lambda entry: entry["p"])
    assert smallest["p_holm"] == pytest.approx(min(1.0, 3 * smallest["p"]))
    assert {entry["b"]: entry["answer"] for entry in found[:2]} == {"b": "a", "c": "open"}
