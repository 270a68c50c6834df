"""A user's own preferences through the whole graph, in one process: every form, rows that cannot be used, two lines, no gold reward."""

import json
import re
from pathlib import Path

import pandas as pd
import pytest
from project import change, copy_project, fails, reproduce

from rlhf_vs_dpo import config, tables

pytestmark = pytest.mark.pipeline


def results(folder: Path) -> dict:
    return json.loads((folder / "evaluation" / "results.json").read_text())


def own_rows(form: str) -> list[dict]:
    rows = []
    for i in range(60):
        question, good, bad = f"What comes after {i} ?", f" It is {i + 1}, of course.", f" I do not know {i}."
        match form:
            case "explicit":
                rows.append({"prompt": question, "chosen": good, "rejected": bad})
            case "implicit":
                rows.append(
                    {
                        "chosen": f"\n\nHuman: {question}\n\nAssistant:{good}",
                        "rejected": f"\n\nHuman: {question}\n\nAssistant:{bad}",
                    }
                )
            case "conversational":
                say = [{"role": "user", "content": question}]
                rows.append(
                    {
                        "chosen": [*say, {"role": "assistant", "content": good.strip()}],
                        "rejected": [*say, {"role": "assistant", "content": bad.strip()}],
                    }
                )
    return rows


def own_project(folder: Path, form: str) -> Path:
    copy_project(folder, "smoke")
    (folder / "mine.jsonl").write_text("\n".join(json.dumps(row) for row in own_rows(form)))
    change(folder, "data.source", "files")
    change(folder, "data.files.preferences", "mine.jsonl")
    change(folder, "data.files.splits", {"validation": 0.2, "test": 0.2, "limit": None})
    change(folder, "preferences.source", "dataset")
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("form", ["explicit", "conversational"])
def test_own_preferences_become_pairs_whatever_their_form(form, tmp_path):
    folder = own_project(tmp_path / "project", form)
    change(folder, "policies.preference", ["dpo"])  # online DPO would ask the annotator, and there is none
    reproduce(folder, re.compile("check|data|base|usable|sft@0|preferences@0"))
    pairs = tables.read_table(folder / "data" / "pairs-0.parquet", "pairs")
    assert pairs["chosen"].str.contains("of course").all() and pairs["rejected"].str.contains("do not know").all()
    assert pairs["prompt"].str.contains("What comes after").all() and len(pairs) > 30


def test_own_preferences_go_through_the_whole_graph(tmp_path):
    folder = own_project(tmp_path / "project", "implicit")
    imitation = ["best_of_n"]
    change(folder, "policies", {"rl": ["ppo"], "preference": ["dpo"], "imitation": imitation, "best_of_n": [2]})
    change(folder, "seeds", [0, 1])
    change(folder, "evaluate.preferred_by", "rm")
    config.check(config.read_params(folder / "params.yaml"))
    bad = own_rows("implicit")[
        :3
    ]  # as some of 60,000 rows of the Hub are: too long for the model, a control token spelled out
    bad[0]["chosen"] += " and so on" * 200
    bad[1]["rejected"] += " <eos> and more"
    bad[2] = {side: text.replace("What", "What else " * 150) for side, text in bad[2].items()}
    with (folder / "mine.jsonl").open("a") as rows:
        rows.write("".join("\n" + json.dumps(row) for row in bad))
    reproduce(folder, re.compile("check|data|base"))
    fails(folder, "usable", "dataset_pairs, row 60 (pair-000060)", "row 61 (pair-000061): rejected spells a control token of this model: <eos>",
          "data.unusable: drop")  # fmt: skip
    assert not list((folder / "data").glob("prompts.parquet")) and not list((folder / "data").rglob("*.tmp"))
    change(folder, "data.unusable", "drop")
    reproduce(folder, re.compile("(?!theory).*"))  # which reads nothing of it
    left = pd.read_csv(folder / "data" / "unusable.csv")
    assert set(left.loc[left["table"] == "dataset_pairs", "id"]) == {f"pair-{i:06d}" for i in (60, 61, 62)}
    assert {"prompts", "demonstrations"} <= set(left["table"]) and left["reason"].str.contains("tokens").any()
    counts = json.loads((folder / "metrics" / "stages" / "usable.json").read_text())
    assert counts["dataset_pairs"] == {"given": 63, "used": 60}
    found = results(folder)
    evaluation = found["methods"]
    assert list(evaluation) == ["sft", "ppo", "dpo", *imitation, "best_of_2"]
    assert len(found["runs"]["ppo"]) == found["spread"]["ppo"]["lines"] == 2 == len(found["runs"]["sft"])
    assert found["judge"] == "reward" and list(found["judges"]) == ["rm"]  # no gold reward: that judge is left out
    assert (
        found["axes"] == ["preferred"] and found["asked"]["judge"] == "rm"
    )  # and rm is asked in the annotators' place
    assert (
        found["methods"]["dpo"]["preferred"]["mean"] is not None and found["methods"]["dpo"]["utility"]["mean"] is None
    )
    assert evaluation["sft"]["gold"]["mean"] is None and evaluation["sft"]["tokens"]["mean"] > 0
    assert "for want of a gold reward" in (folder / "report" / "report.md").read_text()
    for seed in (0, 1):
        pairs = tables.read_table(folder / "data" / f"pairs-{seed}.parquet", "pairs")
        assert pairs["chosen"].str.contains("of course").all()
    weights = [(folder / "models" / f"sft-{seed}" / "model.safetensors").read_bytes() for seed in (0, 1)]
    assert weights[0] != weights[1]


def as_published(form: str, folder: Path) -> dict[str, str]:
    """A hundred rows in the exact form of a data set of the Hub, as its files lie there; the names of its splits."""

    def said(i: int, answer: str) -> list[dict]:
        turns = [("user", f"What comes after {i} ?"), ("assistant", answer)]
        if i % 4 == 0:
            turns = [("user", "hello there"), ("assistant", "hello, what is it ?"), *turns]
        if i % 10 == 0 and form == "tulu":
            turns = [("system", "You count well."), *turns]
        return [{"content": content, "role": role} for role, content in turns]

    rows = []
    for i in range(100):
        good, bad = f"It is {i + 1}, of course.", f"I do not know {i}."
        chosen, rejected = said(i, good), said(i, bad)
        match form:
            case "hh-rlhf":
                named = {"user": "Human", "assistant": "Assistant"}
                texts = ("".join(f"\n\n{named[m['role']]}: {m['content']}" for m in of) for of in (chosen, rejected))
                rows.append(dict(zip(("chosen", "rejected"), texts, strict=True)))
            case "ultrafeedback":
                rows.append(
                    {
                        "prompt": chosen[0]["content"], "prompt_id": f"{i:064x}", "chosen": chosen, "rejected": rejected,
                        "messages": chosen, "score_chosen": 8.0, "score_rejected": 8.0 if i == 41 else 3.5,
                    }
                )  # fmt: skip
            case "tulu":
                first = next(m["content"] for m in chosen if m["role"] == "user")
                rows.append(
                    {
                        "id": f"row-{i}", "source": "made", "prompt": first, "chosen": chosen, "rejected": rejected,
                        "chosen_rating": 4.5, "rejected_rating": 4.5 if i == 41 else 1.0, "chosen_model": "a", "rejected_model": "b",
                    }
                )  # fmt: skip
    names = {"hh-rlhf": ("train", "test"), "ultrafeedback": ("train_prefs", "test_prefs"), "tulu": ("train", None)}[
        form
    ]
    parts = [rows] if names[1] is None else [rows[:60], rows[60:]]
    for name, part in zip(names, parts, strict=False):
        path = folder / "data" / f"{name}-00000-of-00001.parquet"
        path.parent.mkdir(parents=True, exist_ok=True)
        pd.DataFrame(part).to_parquet(path)
    return {"split": names[0], "held_out": names[1]}


@pytest.mark.slow
@pytest.mark.parametrize("form", ["hh-rlhf", "ultrafeedback", "tulu"])
def test_published_forms_go_through_the_whole_graph(form, tmp_path):
    folder = copy_project(tmp_path / "project", "smoke")
    names = as_published(form, folder / "data" / "own" / form)
    change(folder, "data.source", "hub")
    change(folder, "data.unusable", "drop")
    for key, value in {
        "name": f"data/own/{form}",
        "splits": {"validation": 0.2, "test": 0.2, "limit": None},
        **names,
    }.items():
        change(folder, f"data.hub.{key}", value)
    change(folder, "preferences.source", "dataset")
    change(folder, "policies", {"rl": ["ppo"], "preference": ["dpo"], "imitation": ["best_of_n"], "best_of_n": [2]})
    change(folder, "evaluate.preferred_by", "rm")
    reproduce(folder)
    assert set(results(folder)["methods"]) == {"sft", "ppo", "dpo", "best_of_n", "best_of_2"}
    pairs = tables.read_table(folder / "data" / "dataset_pairs.parquet", "pairs")
    assert pairs["chosen"].str.contains("of course").all() and pairs["rejected"].str.contains("do not know").all()
    left = pd.read_csv(folder / "data" / "unusable.csv")
    assert len(pairs) + len(left) == 100
    ties = left["reason"].str.contains("tie").sum()
    assert ties == (form != "hh-rlhf")


@pytest.mark.slow
def test_adapters_go_through_the_whole_graph(tmp_path):
    """Every family learns adapters on one SFT policy, which is whole; every stage that reads a policy reads them."""
    folder = copy_project(tmp_path / "project", "smoke")
    change(folder, "adapter", {"rank": 4, "alpha": 8.0, "targets": "all", "merge": False})
    change(folder, "memory.gradient_checkpointing", True)
    imitation = ["chosen_sft", "control_tokens", "expert_iteration"]
    change(folder, "policies", {"rl": ["rloo", "trpo", "ppo_ptx"], "preference": ["dpo", "dpo_online"], "imitation": imitation, "best_of_n": [2]})  # fmt: skip
    reproduce(folder)
    whole = (folder / "models" / "sft-0" / "model.safetensors").stat().st_size
    for method in ("rloo", "trpo", "ppo_ptx", "dpo", "dpo_online", "chosen_sft", "expert_iteration", "reward"):
        place = folder / "models" / f"{method}-0"
        assert not (place / "model.safetensors").exists()
        assert (place / "adapter_model.safetensors").stat().st_size < whole / 2
        assert json.loads((place / "adapter_config.json").read_text())["base_model_name_or_path"] == "models/sft-0"
    assert (folder / "models" / "control_tokens-0" / "model.safetensors").exists()
    found = results(folder)["methods"]
    assert set(found) > {"sft", "rloo", "trpo", "ppo_ptx", "dpo", "dpo_online", "control_tokens [BAD]", "best_of_2"}
    assert all(entry["kl"]["mean"] is not None for entry in found.values())
    costs = json.loads((folder / "runs" / "dpo-0.json").read_text())
    assert 0 < costs["frozen"] < costs["parameters"]
