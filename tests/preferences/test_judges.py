"""Judges behind one interface; the language model is a stand-in here, a real one is asked in tests/test_real.py."""

import json
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pandas as pd
import pytest

from rlhf_vs_dpo import config
from rlhf_vs_dpo.errors import DataError, JudgeError, ModelError, ParamsError
from rlhf_vs_dpo.preferences import judges

QUESTION = "Post: {prompt}\nSummary A: {first}\nSummary B: {second}\nWhich is better, A or B?"
ASKED = pd.DataFrame(
    {"prompt": ["p", "p", "p"], "facts": None, "a": ["good", "bad", "same"], "b": ["bad", "good", "same"]}
)


class Server:
    """Answers as `answer(question)` says; counts what it was asked, and fails as often as it is told to."""

    def __init__(self, answer, failures=0, body=None):
        self.asked, self.failures, self.body = [], failures, body
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                outer.asked.append(body)
                if outer.failures > 0:
                    outer.failures -= 1
                    self.send_response(500)
                    self.send_header("Content-Length", "0")
                    self.end_headers()
                    return
                said = answer(body["messages"][0]["content"])
                choice = {"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": said}}
                whole = {
                    "id": "x",
                    "object": "chat.completion",
                    "created": 0,
                    "model": body["model"],
                    "choices": [choice],
                }
                content = json.dumps(whole if outer.body is None else outer.body).encode()
                self.send_response(200)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)

            def log_message(self, *args):
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.http.serve_forever, daemon=True).start()

    def __enter__(self):
        self.endpoint = f"http://127.0.0.1:{self.http.server_port}/v1"
        return self

    def __exit__(self, *args):
        self.http.shutdown()
        self.http.server_close()


def settings(endpoint, **changes):
    entry = {
        "kind": "language_model", "endpoint": endpoint, "model": "m", "question": QUESTION, "retries": 2, "workers": 2,
        "key_variable": None, "max_tokens": 16, "timeout": 30.0,
    }  # fmt: skip
    return config.LanguageModelJudge(**(entry | changes))


def reward_model(folder, batch=64):
    return config.RewardModelJudge(kind="reward_model", model=str(folder), revision=None, batch=batch)


def likes_good(question):
    return "The better one is A." if question.index("good") < question.index("bad") else "B"


def test_a_judge_is_asked_in_both_orders(tmp_path):
    with Server(likes_good) as server:
        found = judges.load(settings(server.endpoint), tmp_path, tmp_path / "c.jsonl", 0).compare(ASKED)
    assert found["win"].tolist() == [1.0, 0.0, 0.5] and found["consistent"].tolist()[:2] == [1.0, 1.0]
    assert (
        found["first"].tolist()[:2] == [0.5, 0.5] and found["consistent"].isna()[2]
    )  # equal texts are not asked about
    # The question is put in both orders; that of the second row is that of the first, and was asked once.
    questions = [body["messages"][0]["content"] for body in server.asked]
    assert sorted(questions) == sorted(
        [
            QUESTION.replace("{prompt}", "p").replace("{first}", x).replace("{second}", y)
            for x, y in (("good", "bad"), ("bad", "good"))
        ]
    )
    assert {body["temperature"] for body in server.asked} == {0.0} and {body["model"] for body in server.asked} == {"m"}


def test_a_taste_for_the_first_place_is_a_tie_and_is_told(tmp_path):
    with Server(lambda question: "A") as server:
        found = judges.load(settings(server.endpoint), tmp_path, tmp_path / "c.jsonl", 0).compare(ASKED.head(1))
    assert found.iloc[0].tolist() == [0.5, 0.0, 1.0]


def test_no_usable_answer_is_no_verdict(tmp_path):
    with Server(lambda question: "A or B, both are fine") as server:
        found = judges.load(settings(server.endpoint), tmp_path, tmp_path / "c.jsonl", 0).compare(ASKED.head(1))
    assert found.iloc[0].isna().all()


def test_answers_are_kept_and_not_asked_for_again(tmp_path):
    cache = tmp_path / "c.jsonl"
    with Server(likes_good) as server:
        first = judges.load(settings(server.endpoint), tmp_path, cache, 0).compare(ASKED)
        count = len(server.asked)
        again = judges.load(settings(server.endpoint), tmp_path, cache, 0).compare(ASKED)
        assert len(server.asked) == count == 2 and first.equals(again)
        judges.load(settings(server.endpoint, model="other"), tmp_path, cache, 0).compare(ASKED)
        assert len(server.asked) == 4  # another model: other answers
    whole = cache.read_text()
    cache.write_text(whole[:-9])  # killed while it wrote: the last answer is asked for again, and nothing else is lost
    with Server(likes_good) as server:
        judges.load(settings(server.endpoint), tmp_path, cache, 0)
        judges.load(settings("http://127.0.0.1:1/v1"), tmp_path, cache, 0)
    assert cache.read_text() == "".join(line + "\n" for line in whole.splitlines()[:-1])
    cache.write_text("not json\n" + whole)
    with pytest.raises(DataError, match="line 1 is not an answer"):
        judges.load(settings("http://127.0.0.1:1/v1"), tmp_path, cache, 0)


def test_retries_are_bounded_and_a_dead_server_is_an_error_that_says_what_to_do(tmp_path):
    with Server(likes_good, failures=2) as server:
        found = judges.load(settings(server.endpoint, workers=1), tmp_path, tmp_path / "c.jsonl", 0).compare(
            ASKED.head(1)
        )
        assert found["win"].tolist() == [1.0] and len(server.asked) == 4
    with Server(likes_good, failures=99) as server:
        with pytest.raises(JudgeError, match=r"after 1 retries.*is the server up"):
            judges.load(settings(server.endpoint, workers=1, retries=1), tmp_path, tmp_path / "d.jsonl", 0).compare(
                ASKED
            )
        assert len(server.asked) <= 4
    with pytest.raises(JudgeError, match="NO_SUCH_KEY"):
        judges.load(settings("http://127.0.0.1:1/v1", key_variable="NO_SUCH_KEY"), tmp_path, tmp_path / "e.jsonl", 0)


def test_what_answers_mean():
    assert judges.read_choice("A") == "first" and judges.read_choice("Summary B.") == "second"
    assert judges.read_choice("**B**") == "second" and judges.read_choice("Answer: (A)") == "first"
    assert judges.read_choice("") is None and judges.read_choice("Both, A and B") is None
    assert judges.read_choice("A good summary is short") is None and judges.read_choice("I choose B over a") == "second"
    assert judges.read_choice("ABBA") is None and judges.read_choice("A! Clearly A.") == "first"


@pytest.mark.parametrize(
    ("answer", "choice"),
    [
        ("Option A wins", "first"), ("I prefer A.", "first"), ("Summary A covers the post better.", "first"),
        ("I prefer A over B.", None), ("Summary A covers more than Summary B.", None), ("Neither A nor B", None),
        ("A beats the other", None), ("A, because it is short", "first"),
    ],
)  # fmt: skip
def test_both_letters_are_read_alike(answer, choice):
    turned = answer.translate(str.maketrans("AB", "BA"))
    assert judges.read_choice(answer) == choice
    assert judges.read_choice(turned) == {"first": "second", None: None}[choice]


@pytest.mark.parametrize(
    "body",
    [{"error": {"message": "overloaded"}}, {"choices": []}, {"choices": [{"index": 0}]}, [], None,
     {"choices": [{"index": 0, "message": {"role": "assistant", "content": 7}}]}],
)  # fmt: skip
def test_what_is_no_answer_is_an_error_and_not_kept(body, tmp_path):
    cache = tmp_path / "c.jsonl"
    refused = pytest.raises(JudgeError, match="not as an OpenAI-compatible endpoint")
    with Server(likes_good, body=body if body is not None else "nothing") as server, refused:
        judges.load(settings(server.endpoint), tmp_path, cache, 0).compare(ASKED)
    assert not cache.exists()


def test_what_was_answered_before_a_failure_is_kept(tmp_path):
    def one_fails(question):
        return 7 if "Summary A: bad" in question else "A"

    cache = tmp_path / "c.jsonl"
    with Server(one_fails) as server, pytest.raises(JudgeError):
        judges.load(settings(server.endpoint, workers=2), tmp_path, cache, 0).compare(ASKED.head(1))
    assert [json.loads(line)["answer"] for line in cache.read_text().splitlines()] == ["A"]


def test_a_question_that_shows_nothing_is_refused():
    params = config.read_params()
    entry = settings("http://x").model_dump() | {"question": "{prompt}"}
    params["judging"]["judges"]["x"] = entry
    with pytest.raises(ParamsError, match=r"judging.*lacks \{first\}, \{second\}"):
        config.section(params, "judging")


def test_a_reward_model_judges_by_its_scores(tokenizer, tmp_path):
    from test_training import scorer

    from rlhf_vs_dpo.language import models
    from rlhf_vs_dpo.language.forward import scores
    from rlhf_vs_dpo.language.text import Tokens

    reward = scorer(tokenizer)
    words = [word for word in tokenizer.get_vocab() if word.isalpha()][:6]
    asked = pd.DataFrame({"prompt": words[:3], "facts": None, "a": words[3:], "b": list(reversed(words[3:]))})
    models.save(reward.model, tokenizer, tmp_path / "rm-3")
    judge = judges.load(reward_model(tmp_path / "rm-{seed}"), tmp_path, tmp_path / "c", seed=3)  # that of line 3
    found = judge.compare(asked)

    def ids(text):
        return tokenizer(text, add_special_tokens=False)["input_ids"]

    both = [
        scores(
            reward,
            [Tokens([tokenizer.bos_token_id, *ids(p)], [*ids(r), tokenizer.eos_token_id]) for p, r in zip(asked["prompt"], asked[side], strict=True)],
        )
        for side in ("a", "b")
    ]  # fmt: skip
    assert found["win"].tolist() == [0.5 if x == y else float(x > y) for x, y in zip(*both, strict=True)]
    assert found["consistent"].isna().all()
    with pytest.raises(ModelError, match="cannot be loaded"):
        judges.load(reward_model(tmp_path / "none"), tmp_path, tmp_path / "c", 0)


def test_a_foreign_reward_model_reads_text(tokenizer, tmp_path):
    """One without this project's normalisation: plain sequence classification, batched without touching the scores."""
    from test_training import scorer

    from rlhf_vs_dpo.language import models

    reward = scorer(tokenizer).model
    del reward.config.reward_shift, reward.config.reward_scale
    models.save(reward, tokenizer, tmp_path / "rm")
    words = [word for word in tokenizer.get_vocab() if word.isalpha()][:8]
    prompts, responses = ["", *words[:2]], [" ".join(words), words[3], " ".join(words[2:6])]
    together = judges.load(reward_model(tmp_path / "rm"), tmp_path, tmp_path / "c", 0).scores(prompts, responses, "x")
    alone = judges.load(reward_model(tmp_path / "rm", batch=1), tmp_path, tmp_path / "c", 0).scores(
        prompts, responses, "x"
    )
    assert together.tolist() == pytest.approx(alone.tolist(), abs=1e-5) and len(set(alone.tolist())) == 3


def test_a_foreign_reward_model_refuses_what_it_would_have_to_cut(tokenizer, tmp_path):
    from test_training import scorer

    from rlhf_vs_dpo.language import models

    reward = scorer(tokenizer).model
    del reward.config.reward_shift, reward.config.reward_scale
    reward.config.max_position_embeddings = 6
    models.save(reward, tokenizer, tmp_path / "rm")
    word = next(word for word in tokenizer.get_vocab() if word.isalpha())
    judge = judges.load(reward_model(tmp_path / "rm"), tmp_path, tmp_path / "c", 0)
    with pytest.raises(DataError, match="reads 6; to cut them would be to judge something else"):
        judge.scores([" ".join([word] * 9)], [word], "x")


def test_a_text_that_looks_like_a_place_is_left_alone(tmp_path):
    asked = pd.DataFrame({"prompt": ["see {first}"], "facts": None, "a": ["{second}"], "b": ["b"]})
    with Server(lambda question: "A") as server:
        judges.load(settings(server.endpoint), tmp_path, tmp_path / "c", 0).compare(asked)
        assert server.asked[0]["messages"][0]["content"].startswith("Post: see {first}\nSummary ")
        assert "{second}" in server.asked[0]["messages"][0]["content"]


def test_a_lexicon_is_an_outsider(tmp_path, monkeypatch):
    asked = pd.DataFrame(
        {
            "prompt_id": ["p", "q", "r"], "prompt": ["The film was", "It is", "A plot"],
            "a": [" wonderful, I loved it.", " a table.", " that is awful and boring."],
            "b": [" terrible, I hated it.", " a table.", " that is great fun!"],
        }
    )  # fmt: skip
    said = pytest.importorskip("vaderSentiment")
    assert said is not None
    found = judges.load(config.LexiconJudge(kind="vader"), tmp_path, tmp_path / "c.jsonl", 0).compare(asked)
    assert list(found["win"]) == [1.0, 0.5, 0.0] and found["consistent"].isna().all()
    monkeypatch.setitem(sys.modules, "vaderSentiment.vaderSentiment", None)
    with pytest.raises(JudgeError, match=r"pip install -e '\.\[real\]'"):
        judges.load(config.LexiconJudge(kind="vader"), tmp_path, tmp_path / "c.jsonl", 0)
