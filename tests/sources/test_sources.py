"""Preference data in all its forms, from files and from data sets."""

import json

import pandas as pd
import pytest

from rlhf_vs_dpo.config import Files, Hub, Imdb, Splits
from rlhf_vs_dpo.errors import DataError
from rlhf_vs_dpo.preferences.gold import SentimentGold
from rlhf_vs_dpo.sources import files, forms, hub, imdb

SPLITS = Splits(validation=0.2, test=0.2, limit=None)
RENDER = forms.chat_renderer(None, None)
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def user(text):
    return {"role": "user", "content": text}


def assistant(text):
    return {"role": "assistant", "content": text}


def pair(row, render=RENDER, marker="\n\nAssistant:"):
    return forms.pair_of(row, "row 0", render, marker)


def test_explicit_prompt():
    assert pair({"prompt": "Q: 1+1? A:", "chosen": " 2", "rejected": " 3"}) == ("Q: 1+1? A:", " 2", " 3")


def test_implicit_prompt_is_cut_between_words():
    cut = pair({"chosen": "Name a fruit: apple", "rejected": "Name a fruit: apricot"})
    assert cut == ("Name a fruit:", " apple", " apricot")


def test_implicit_prompt_is_cut_behind_its_last_turn_marker():
    opening = "\n\nHuman: Hi\n\nAssistant: Hello\n\nHuman: Say yes or no\n\nAssistant:"
    cut = pair({"chosen": opening + " I say yes", "rejected": opening + " I say no"})
    assert cut == (opening, " I say yes", " I say no")


def test_conversational_with_a_template():
    class Tokenizer:
        chat_template, bos_token, eos_token = CHATML, None, "<|im_end|>"

    render = forms.chat_renderer(None, Tokenizer())
    explicit = pair({"prompt": [user("hi")], "chosen": [assistant("yes")], "rejected": [assistant("no")]}, render)
    implicit = pair({"chosen": [user("hi"), assistant("yes")], "rejected": [user("hi"), assistant("no")]}, render)
    assert explicit == implicit == ("<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n", "yes", "no")


@pytest.mark.parametrize("eos", ["<|im_end|>", "<|endoftext|>"])
def test_the_end_of_a_turn_is_no_part_of_a_response_whatever_the_eos(eos):
    class Tokenizer:
        chat_template, bos_token, eos_token = None, None, eos

    render = forms.chat_renderer(CHATML, Tokenizer())
    row = {"prompt": [user("hi")], "chosen": [assistant("yes. ")], "rejected": [assistant("<|im_end|>no")]}
    assert pair(row, render)[1:] == ("yes.", "<|im_end|>no")
    assert pair(row, forms.chat_renderer(CHATML, None))[1:] == ("yes.", "<|im_end|>no")


def test_templates_as_models_bring_them():
    """Several by name, and marked for the loss by a tag of transformers."""

    class Tokenizer:
        bos_token, eos_token = None, "<|im_end|>"

        def __init__(self, template):
            self.chat_template = template

    row = {"prompt": [user("hi")], "chosen": [assistant("yes")], "rejected": [assistant("no")]}
    plain = pair(row, forms.chat_renderer(None, Tokenizer(CHATML)))
    assert pair(row, forms.chat_renderer(None, Tokenizer({"tool_use": "x", "default": CHATML}))) == plain
    with pytest.raises(DataError, match=r"several chat templates \(rag, tool_use\)"):
        forms.chat_renderer(None, Tokenizer({"rag": "x", "tool_use": "x"}))
    marked = CHATML.replace("{{ m['content'] }}", "{% generation %}{{ m['content'] }}{% endgeneration %}")
    assert pair(row, forms.chat_renderer(None, Tokenizer(marked))) == plain


def test_conversational_without_a_template_is_plain_text():
    result = pair({"prompt": [user("hi")], "chosen": [assistant("yes")], "rejected": [assistant("no")]})
    assert result == ("User: hi\n\nAssistant:", " yes", " no")


@pytest.mark.parametrize(
    "row, message",
    [
        ({"prompt": "x", "chosen": "y"}, "column 'rejected' is missing"),
        ({"chosen": "alpha", "rejected": "beta"}, "share no prefix"),
        ({"prompt": "x", "chosen": [assistant("y")], "rejected": "z"}, "must all be text, or all be lists"),
        (
            {"prompt": [{"text": "x"}], "chosen": [assistant("y")], "rejected": [assistant("z")]},
            "needs `role` and `content`",
        ),
        ({"prompt": [user(None)], "chosen": [assistant("y")], "rejected": [assistant("z")]}, "both text"),
        ({"chosen": [assistant("y")], "rejected": [assistant("z")]}, "no message before the answer"),
        ({"prompt": 3, "chosen": "y", "rejected": "z"}, "must all be text"),
        ({"prompt": [user("x")], "chosen": [assistant(" ")], "rejected": [assistant("z")]}, "chosen: is empty"),
        ({"prompt": [user("x")], "chosen": [assistant("y")], "rejected": []}, "rejected: is empty"),
        (
            {"prompt": [user("x")], "chosen": [user("x"), assistant("y")], "rejected": [user("x"), assistant("z")]},
            "what the user says",
        ),
        (
            {name: [user("x"), assistant(name), user("more"), assistant("y")] for name in ("chosen", "rejected")},
            "differ before the last turn",
        ),
        (
            {
                "chosen": "\n\nHuman: a\n\nAssistant: b\n\nHuman: c\n\nAssistant: d",
                "rejected": "\n\nHuman: a\n\nAssistant: z",
            },
            "differ before the last turn",
        ),
    ],
)
def test_rows_in_no_form_are_refused_by_number(row, message):
    with pytest.raises(DataError, match="row 0") as error:
        pair(row)
    assert message in str(error.value)


def test_a_prompt_keeps_its_split_whatever_the_order():
    rows = [{"prompt": f"prompt {i % 40}", "chosen": f"good {i}", "rejected": f"bad {i}"} for i in range(80)]
    one = forms.to_pairs(rows, "f", RENDER, SPLITS, None).pairs
    two = forms.to_pairs(rows[::-1], "f", RENDER, SPLITS, None).pairs
    assert one.groupby("prompt")["split"].nunique().max() == 1
    assert one.set_index("chosen")["split"].equals(two.set_index("chosen")["split"].reindex(one["chosen"]))
    assert set(one["split"]) == {"train", "validation", "test"}


def test_a_question_that_stands_beside_the_conversation():
    """UltraFeedback and Tulu 3: `prompt` is text, and the answers are whole conversations, or messages alone."""
    whole = {"prompt": "why?", "chosen": [user("why?"), assistant("so")], "rejected": [user("why?"), assistant("no")]}
    assert pair(whole) == ("User: why?\n\nAssistant:", " so", " no")
    alone = {"prompt": "why?", "chosen": [assistant("so")], "rejected": [assistant("no")]}
    assert pair(alone) == pair(whole)
    system = [{"role": "system", "content": "be kind"}, user("hi"), assistant("hello")]
    turns = {name: [*system, user("why?"), assistant(name)] for name in ("chosen", "rejected")}
    opening = "System: be kind\n\nUser: hi\n\nAssistant: hello\n\nUser: why?\n\nAssistant:"
    assert pair(turns | {"prompt": "hi"}) == pair(turns) == (opening, " chosen", " rejected")
    with pytest.raises(DataError, match="asks something else"):
        pair(whole | {"prompt": "who?"})


def test_a_row_keeps_its_number_whatever_was_left_out_before_it():
    rows = [{"prompt": f"q{i}", "chosen": "" if i < 2 else "a", "rejected": "b"} for i in range(5)]
    rows[2]["split"], rows[3]["p_chosen"] = "dev", 2.0
    with pytest.raises(DataError) as error:
        forms.to_pairs(rows, "f", RENDER, SPLITS, None, drop=True)
    assert (
        "row 2, split" in str(error.value) and "row 3, p_chosen" in str(error.value) and "row 0" not in str(error.value)
    )


def test_ties_are_no_preference():
    rows = [
        {"prompt": f"q{i}", "chosen": "a", "rejected": "b", "score_chosen": 7.0, "score_rejected": i} for i in range(9)
    ]
    with pytest.raises(DataError, match=r"row 7: is a tie, both answers have the score 7\.0"):
        forms.to_pairs(rows, "f", RENDER, SPLITS, None)
    read = forms.to_pairs(rows, "f", RENDER, SPLITS, None, drop=True)
    assert len(read.pairs) == 8 and list(read.left_out["row"]) == [7] and "is a tie" in read.left_out["reason"][0]


# ---- files -----------------------------------------------------------------------------------------------------------


def settings(path, **changes):
    return Files(
        **{"preferences": str(path), "demonstrations": None, "corpus": None, "turn_marker": None, "splits": SPLITS}
        | changes
    )


def write(path, rows):
    path.write_text("\n".join(json.dumps(row) for row in rows) + "\n")
    return path


ROWS = [{"prompt": f"question {i} ?", "chosen": f" yes {i}", "rejected": f" no {i}"} for i in range(50)]
FORMS = {
    "explicit": ROWS,
    "implicit": [{"chosen": r["prompt"] + r["chosen"], "rejected": r["prompt"] + r["rejected"]} for r in ROWS],
    "conversational": [
        {
            "prompt": [user(r["prompt"])],
            "chosen": [assistant(r["chosen"].strip())],
            "rejected": [assistant(r["rejected"].strip())],
        }
        for r in ROWS
    ],
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_files_in_each_form(form, kind, tmp_path):
    path = tmp_path / f"mine.{kind}"
    write(path, FORMS[form]) if kind == "jsonl" else pd.DataFrame(FORMS[form]).to_parquet(path)
    tables = files.build(settings(path), RENDER, False)
    pairs = tables.dataset_pairs
    assert len(pairs) == 50 and pairs["chosen"].str.strip().tolist() == [f"yes {i}" for i in range(50)]
    assert set(tables.prompts["split"]) == {"train", "validation", "test"}
    assert set(tables.demonstrations["response"]) == set(pairs["chosen"])
    assert tables.gold == {"kind": "none"} and len(tables.corpus) == 50


def test_own_demonstrations_and_corpus(tmp_path):
    path = write(tmp_path / "mine.jsonl", ROWS)
    demos = write(
        tmp_path / "demos.jsonl",
        [{"prompt": "question 1 ?", "response": " maybe"}, {"prompt": "new ?", "response": " so"}],
    )
    corpus = write(tmp_path / "corpus.jsonl", [{"text": f"text {i}"} for i in range(30)])
    tables = files.build(settings(path, demonstrations=str(demos), corpus=str(corpus)), RENDER, False)
    split = tables.dataset_pairs.set_index("prompt")["split"]["question 1 ?"]
    assert tables.demonstrations.loc[0, "split"] == split
    assert set(tables.corpus["split"]) == {"train", "validation"}


@pytest.mark.parametrize(
    "text, message",
    [
        ('{"prompt": "a", "chosen": "b", "rejected": "c"}\n{oops\n', "mine.jsonl, line 2: not JSON"),
        ('{"prompt": "a", "chosen": "b", "rejected": "c", "p_chosen": "high"}\n', "row 0: `p_chosen` must be a number"),
        ('{"prompt": "a\\ud800", "chosen": "b", "rejected": "c"}\n', "line 1: holds no usable text"),
        ("[1]\n", "line 1: not a JSON object"),
        ("", "holds no row"),
        ('{"prompt": "a", "chosen": "b"}\n', "mine.jsonl, row 0: column 'rejected' is missing"),
        ('{"prompt": "", "chosen": "b", "rejected": "c"}\n', "row 0, prompt: is empty"),
        ('{"prompt": "a", "chosen": "b", "rejected": "b"}\n', "chosen equals rejected"),
        ('{"pair_id": "1", "prompt": "a", "chosen": "b", "rejected": "c"}\n' * 2, "row 1, pair_id: is not unique"),
        (
            '{"prompt": "a", "chosen": "b", "rejected": "c", "split": "train"}\n'
            '{"prompt": "a", "chosen": "d", "rejected": "e", "split": "test"}\n',
            "this prompt is in two splits",
        ),
    ],
)
def test_bad_files_are_refused_by_place(text, message, tmp_path):
    path = tmp_path / "mine.jsonl"
    path.write_text(text)
    with pytest.raises(DataError) as error:
        files.build(settings(path), RENDER, False)
    assert message in str(error.value)


def test_rows_that_are_no_preference_are_dropped_and_listed(tmp_path):
    bad = [
        {"prompt": "a", "chosen": "b"},
        {"prompt": "a", "chosen": "b", "rejected": "b"},
        {"prompt": "a", "chosen": " ", "rejected": "b", "pair_id": "mine"},
        {"chosen": "alpha", "rejected": "beta"},
    ]
    path = write(tmp_path / "mine.jsonl", [*ROWS[:20], *bad, *ROWS[20:]])
    with pytest.raises(DataError, match=r"data\.unusable: drop"):
        files.build(settings(path), RENDER, False)
    tables = files.build(settings(path), RENDER, True)
    assert len(tables.dataset_pairs) == 50 and tables.dataset_pairs["pair_id"].iloc[20] == "pair-000024"
    left = tables.left_out
    assert list(left["row"]) == [20, 21, 22, 23] and list(left["id"]) == [
        "pair-000020",
        "pair-000021",
        "mine",
        "pair-000023",
    ]
    for row, reason in enumerate(
        ("column 'rejected' is missing", "chosen equals rejected", "chosen: is empty", "share no prefix")
    ):
        assert reason in left["reason"][row] and str(path) not in left["reason"][row]
    assert left["text"].str.len().max() <= 80


def test_what_editors_do_to_files(tmp_path):
    """A BOM, Windows line ends and a Unicode line separator inside a string are no fault; another encoding is."""
    rows = [{"prompt": f"q {i}", "chosen": " a\u2028b", "rejected": " c"} for i in range(40)]
    path = tmp_path / "MINE.JSONL"
    path.write_bytes(b"\xef\xbb\xbf" + "\r\n".join(json.dumps(row, ensure_ascii=False) for row in rows).encode())
    assert len(files.build(settings(path), RENDER, False).dataset_pairs) == 40
    path.write_bytes("caf\u00e9".encode("latin-1"))
    with pytest.raises(DataError, match="not UTF-8"):
        files.build(settings(path), RENDER, False)


def test_a_template_that_is_not_valid():
    with pytest.raises(DataError, match="not valid Jinja"):
        forms.chat_renderer("{% for m in messages %}", None)
    refusing = forms.chat_renderer("{{ raise_exception('no system role') }}", None)
    with pytest.raises(DataError, match="no system role"):
        refusing([user("hi")], True)


def test_missing_and_unknown_files(tmp_path):
    with pytest.raises(DataError, match="no such file"):
        files.build(settings(tmp_path / "none.jsonl"), RENDER, False)
    (tmp_path / "mine.csv").write_text("x")
    with pytest.raises(DataError, match="unknown kind of file"):
        files.build(settings(tmp_path / "mine.csv"), RENDER, False)
    with pytest.raises(DataError, match="is null"):
        files.build(settings("x", preferences=None), RENDER, False)


# ---- hub and imdb ----------------------------------------------------------------------------------------------------


def hub_settings(name, **changes):
    return Hub(
        **{
            "name": name,
            "config": None,
            "split": "train",
            "held_out": None,
            "revision": None,
            "turn_marker": None,
            "splits": SPLITS,
        }
        | changes
    )


def test_a_data_set_in_a_local_folder(tmp_path):
    pd.DataFrame(ROWS).to_parquet(tmp_path / "train.parquet")
    tables = hub.build(hub_settings(str(tmp_path)), RENDER, False)
    assert tables.dataset_pairs["chosen"].tolist() == [row["chosen"] for row in ROWS]


def test_a_split_of_the_source_is_held_out(tmp_path):
    both = [ROWS[3] | {"chosen": " else"}]  # a question that the source has in both of its splits
    pd.DataFrame(ROWS).to_parquet(tmp_path / "train.parquet")
    pd.DataFrame([*({**row, "prompt": "new " + row["prompt"]} for row in ROWS[:40]), *both]).to_parquet(
        tmp_path / "test.parquet"
    )
    with pytest.raises(DataError, match="row 3: its prompt is held out, too"):
        hub.build(hub_settings(str(tmp_path), held_out="test"), RENDER, False)
    tables = hub.build(hub_settings(str(tmp_path), held_out="test"), RENDER, True)
    pairs = tables.dataset_pairs
    train = pairs[pairs["split"] == "train"]
    assert len(train) == 49 and not train["prompt"].str.startswith("new").any()
    assert set(pairs["split"]) == {"train", "validation", "test"}
    assert pairs.groupby("prompt")["split"].nunique().max() == 1
    assert 10 < (pairs["split"] == "test").sum() < 31
    assert list(tables.left_out["row"]) == [3]


def test_a_hub_id_needs_a_revision():
    with pytest.raises(DataError, match="has no revision"):
        hub.build(hub_settings("someone/preferences"), RENDER, False)


def test_an_unreachable_hub_says_how_to_go_on(monkeypatch):
    import datasets

    def unreachable(*args, **kwargs):
        raise ConnectionError("Couldn't reach the Hub")

    monkeypatch.setattr(datasets, "load_dataset", unreachable)
    with pytest.raises(DataError, match="hf download --repo-type dataset someone/preferences --local-dir FOLDER"):
        hub.build(hub_settings("someone/preferences", revision="0" * 40), RENDER, False)


def reviews(count):
    good, bad = "great wonderful superb delightful", "awful boring terrible dreadful"
    filler = "the plot of this film was told by an actor who had been in another film before and knew it well indeed"
    return [
        {
            "text": f"Film {i} was {good if i % 2 else bad} <br /><br />{filler} and it was {(good if i % 2 else bad)} number {i}.",
            "label": i % 2,
        }
        for i in range(count)
    ]


def imdb_settings():
    return Imdb(
        origin="hub", dataset="stanfordnlp/imdb", revision="0" * 40, train=60, validation=20, test=20, corpus_train=20, corpus_validation=10,
        classifier_reviews=200, prompt_words=[2, 4], response_words=12,
    )  # fmt: skip


@pytest.fixture
def imdb_tables(monkeypatch):
    monkeypatch.setattr(imdb, "load_rows", lambda *args: reviews(400))
    return imdb.build(imdb_settings(), seed=0)


def test_imdb_cuts_reviews_into_prompt_and_continuation(imdb_tables):
    demos = imdb_tables.demonstrations
    words = demos["prompt"].str.split().str.len()
    assert words.between(2, 4).all() and demos["response"].str.startswith(" ").all()
    assert demos["response"].str.split().str.len().max() == 12
    assert not (demos["prompt"] + demos["response"]).str.contains("<br").any()
    assert imdb_tables.metrics["classifier_accuracy"] > 0.95


def test_the_stored_classifier_is_scikit_learns(imdb_tables):
    """`SentimentGold` scores from a table what the fitted pipeline's decision function says."""
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression

    train = pd.DataFrame(reviews(120))
    table, intercept, _ = imdb.fit_classifier(train, train)
    gold = SentimentGold({"intercept": intercept}, table)
    vectorizer = TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True, min_df=5, max_features=50_000)
    model = LogisticRegression(C=10.0, max_iter=1000).fit(vectorizer.fit_transform(train["text"]), train["label"])
    texts = [
        "A great, GREAT film: don't miss it",
        "boring and awful",
        "nothing known here xyzzy",
        "It's a wonderful wonderful life 10/10",
    ]
    expected = model.decision_function(vectorizer.transform(texts))
    assert [gold.score(text[:5], None, text[5:])["gold"] for text in texts] == pytest.approx(expected.tolist())


def test_no_review_serves_two_purposes(imdb_tables, monkeypatch):
    parts, fit = [], imdb.fit_classifier
    monkeypatch.setattr(imdb, "fit_classifier", lambda *frames: parts.extend(frames) or fit(*frames))
    tables = imdb.build(imdb_settings(), seed=0)
    learned = set(parts[0]["text"])
    others = [set(parts[1]["text"]), set(tables.corpus["text"])]
    shown = [row.prompt + row.response for row in tables.demonstrations.itertuples()]
    assert all(not learned & texts for texts in others) and not others[0] & others[1]
    for texts in (learned, *others):
        assert not any(text.startswith(cut) for text in texts for cut in shown)
    with pytest.raises(DataError, match="asks for 640 reviews in all, and there are 400"):
        imdb.build(
            Imdb(
                origin="hub", dataset="stanfordnlp/imdb", revision="0" * 40, train=60, validation=20, test=20, corpus_train=20, corpus_validation=20,
                classifier_reviews=400, prompt_words=[2, 4], response_words=12,
            ),
            seed=0,
        )  # fmt: skip
