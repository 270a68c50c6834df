"""What people wrote goes through source, tables, report and MLflow as it is, or is refused by name; nothing in it is ever obeyed."""

import json
import re
from dataclasses import replace

import pandas as pd
import pytest
import synthetic
from test_report import source

from rlhf_vs_dpo import config, tables
from rlhf_vs_dpo.errors import DataError
from rlhf_vs_dpo.report import content, figures, markdown, page
from rlhf_vs_dpo.report.marks import visible
from rlhf_vs_dpo.sources import files
from rlhf_vs_dpo.sources.forms import chat_renderer

NASTY = {
    "html": "<script>alert(1)</script><img src=x onerror=alert(1)> &amp; </td></table>",
    "jinja": "{{ 7 * 7 }} {% raw %} {# gone #} {{ cycler.__init__.__globals__ }}",
    "markdown": "# not a heading\n| a | b |\n[link](javascript:alert(1)) ```",
    "ansi": "\x1b[31mred\x1b[0m \x1b]0;title\x07 \x9b31m",
    "turned round": "abc \u202e\u2066 fed \u2069 \u05d0\u05d1",
    "nul": "a\x00b",
    "long": "word " * 200_000,  # a megabyte
    "lines": "one\r\ntwo\u2028three\x85four",
    "wide": "\U0001f9d1\u200d\U0001f680 e\u0301 \ufeff",
}


def preferences(path, texts):
    rows = [
        {"prompt": f"{text} p{i}", "chosen": f"{text} yes", "rejected": f"{text} no"} for i, text in enumerate(texts)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return rows


@pytest.mark.parametrize("kind", NASTY)
def test_a_source_and_its_tables_give_back_what_was_written(tmp_path, monkeypatch, kind):
    monkeypatch.chdir(tmp_path)
    rows = preferences(tmp_path / "own.jsonl", [NASTY[kind]] * 3)
    params = config.read_params(synthetic.PARAMS)
    params["data"]["files"] |= {"preferences": str(tmp_path / "own.jsonl")}
    made = files.build(config.section(params, "data").files, chat_renderer(None, None), drop=False)
    tables.write_table(made.dataset_pairs, "dataset_pairs", tmp_path / "pairs.parquet")
    back = tables.read_table(tmp_path / "pairs.parquet", "dataset_pairs").set_index("prompt")
    for row in rows:
        assert (back.loc[row["prompt"], "chosen"], back.loc[row["prompt"], "rejected"]) == (
            row["chosen"],
            row["rejected"],
        )


def test_half_a_character_is_no_text_and_its_line_is_named(tmp_path):
    (tmp_path / "own.jsonl").write_text(
        '{"prompt": "a", "chosen": "b", "rejected": "c"}\n{"prompt": "\\ud800", "chosen": "b", "rejected": "c"}\n'
    )
    with pytest.raises(DataError, match=r"own\.jsonl, line 2: holds no usable text"):
        list(files.read_rows(tmp_path / "own.jsonl"))


@pytest.mark.parametrize("kind", sorted(set(NASTY) - {"long"}))
def test_the_report_shows_it_and_obeys_nothing(kind, monkeypatch):
    monkeypatch.setattr(figures, "draw", lambda *_: [])
    found = synthetic.found(seeds=(0,))
    text = NASTY[kind]
    made = source(found, pd.DataFrame())
    said = {method: dict.fromkeys(of, f"{text} said") for method, of in made.samples.items()}
    made = replace(made, prompts=made.prompts.assign(prompt=f"{text} asked"), samples=said)
    blocks = content.texts(made)
    html, text_form = page.render(blocks), markdown.render(blocks)
    for shown in (html, text_form):
        assert not re.search(
            r"[\x00-\x08\x0b-\x1f\x7f\u202a-\u202e\u2066-\u2069]", shown
        )  # nothing rings, moves or turns
        assert "49" not in shown and "asked" in shown and "said" in shown
    body = html[html.index("<header>") :]
    assert "<script>alert" not in body and "<img" not in body and body.count("</table>") == html.count("<table>")
    assert not re.search(r"(?<!\\)<(script|img|/td)", text_form)  # each < has a backslash before it, or is &lt;
    if kind == "html":
        assert "&lt;script&gt;alert(1)&lt;/script&gt;" in html
    if kind == "jinja":
        assert "{{ 7 * 7 }}" in html


def test_what_cannot_be_seen_is_made_visible():
    assert visible("a\x1b[0m\x00\x7f\u202eb\tc\n") == "a␛[0m␀␡⟨U+202E⟩b\tc\n"
    assert visible(NASTY["wide"]) == NASTY["wide"]


def test_mlflow_keeps_it(tmp_path, monkeypatch):
    from mlflow.tracking import MlflowClient

    from rlhf_vs_dpo.run import journal, store

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DVC_ROOT", str(tmp_path))
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    texts = {kind: text for kind, text in NASTY.items() if kind != "long"}
    sender = journal.Sender(journal.Journal(), print)
    sender.send(
        sender.journal.add(
            {
                "create": "x",
                "experiment": store.STAGES,
                "tags": {"warning.x": texts["html"]},
                "params": {"x": texts["jinja"]},
            }
        )
    )
    client = MlflowClient(tracking_uri=f"sqlite:///{tmp_path}/mlflow.db")
    client.log_table(sender.run_id, {"response": list(texts.values())}, "samples.json")
    (run,) = client.search_runs([client.get_experiment_by_name(store.STAGES).experiment_id])
    assert run.data.tags["warning.x"] == texts["html"] and run.data.params["x"] == texts["jinja"]
    kept = json.loads(open(client.download_artifacts(sender.run_id, "samples.json")).read())  # noqa: SIM115
    assert [row[0] for row in kept["data"]] == list(texts.values())
