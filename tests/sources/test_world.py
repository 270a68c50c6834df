"""The built-in world: what it generates, and what its gold reward and its annotator make of it."""

import json
import random

import numpy as np
import pytest

from rlhf_vs_dpo import tables as contracts
from rlhf_vs_dpo.config import Annotator, Flaws, MiniTldr
from rlhf_vs_dpo.language.text import word_tokenizer
from rlhf_vs_dpo.preferences import annotator, gold
from rlhf_vs_dpo.sources import mini_tldr

FLAWS = Flaws(omit=0.25, invent=0.1, distract=0.2, filler=0.2, repeat=0.1, state_time=0.5)
PERFECT = Flaws(omit=0, invent=0, distract=0, filler=0, repeat=0, state_time=1)
SIZES = MiniTldr(train=60, validation=20, test=20, corpus_train=50, corpus_validation=10, flaws=FLAWS)
FACTS = {"time": "yesterday", "person": "sister", "event": "found a dog", "outcome": "i moved out", "feeling": "happy"}


@pytest.fixture(scope="module")
def world():
    return mini_tldr.World(mini_tldr.Path(__file__).parents[2] / mini_tldr.WORLD)


@pytest.fixture(scope="module")
def tables(world):
    return mini_tldr.build(SIZES, seed=0)


@pytest.fixture(scope="module")
def judge(tables):
    return gold.MiniTldrGold(json.loads(json.dumps(tables.gold)))


def test_same_seed_same_tables(tables):
    again, other = mini_tldr.build(SIZES, seed=0), mini_tldr.build(SIZES, seed=1)
    assert again.demonstrations.equals(tables.demonstrations) and again.corpus.equals(tables.corpus)
    assert not other.demonstrations.equals(tables.demonstrations)


def test_tables_keep_their_contracts(tables):
    for name in ("corpus", "demonstrations", "prompts", "facts"):
        contracts.validate(getattr(tables, name), name, name)


def test_no_text_is_in_two_splits(tables):
    prompts = tables.prompts
    assert prompts["prompt"].is_unique and prompts.groupby("split").size().to_dict() == {
        "train": 60,
        "validation": 20,
        "test": 20,
    }
    assert tables.corpus["text"].is_unique
    posts = prompts["prompt"].str.removesuffix(" tl;dr :")
    assert not set(posts) & set(tables.corpus["text"])


def test_every_text_survives_the_tokenizer(tables):
    tokenizer = word_tokenizer(tables.words)
    texts = [
        *tables.corpus["text"],
        *tables.prompts["prompt"],
        *tables.demonstrations["response"],
        *(tables.facts["prompt"] + " " + tables.facts["answer"]),
    ]
    for text, ids in zip(texts, tokenizer(texts, add_special_tokens=False)["input_ids"], strict=True):
        assert tokenizer.unk_token_id not in ids
        assert tokenizer.decode(ids) == text


def test_a_post_holds_its_facts(world):
    rng = random.Random(0)
    for _ in range(50):
        facts = world.facts(rng)
        post, _ = world.post(rng, facts)
        assert all(value in post for value in facts.values())


def test_a_perfect_summary_scores_three(world, judge):
    rng = random.Random(0)
    for _ in range(50):
        facts = world.facts(rng)
        post, distractions = world.post(rng, facts)
        summary = world.summary(rng, facts, distractions, PERFECT)
        assert judge.score(post, json.dumps(facts), summary)["gold"] == pytest.approx(3.0)


@pytest.mark.parametrize(
    "response, parts",
    [
        ("yesterday my sister found a dog , i moved out , i feel happy .", {"coverage": 3.0}),
        ("my sister found a dog , i moved out .", {"coverage": 2.0}),
        ("my brother found a dog .", {"coverage": 0.5, "faithfulness": -1.0}),
        ("today my aunt won a prize .", {"faithfulness": -3.0}),
        ("i feel happy , i feel happy .", {"coverage": 0.75, "redundancy": -0.5}),
        ("i feel happy , i feel sad .", {"coverage": 0.75, "redundancy": -0.5, "faithfulness": -1.0}),
        ("the weather was cold , i moved out .", {"coverage": 1.0, "redundancy": -0.5}),
        ("my mother was at work .", {"redundancy": -0.5}),
        ("to be honest , i moved out .", {"coverage": 1.0, "filler": -0.25}),
        ("to be honest , to be honest .", {"filler": -0.5}),
        ("i moved out", {"coverage": 1.0, "form": -1.0}),
        ("i moved out . i feel happy .", {"coverage": 1.0, "form": -1.0}),
        ("i moved , out feel .", {"form": -2.0}),
        ("", {"form": -2.0}),
        (".", {"form": -2.0}),
    ],
)
def test_gold_by_hand(judge, response, parts):
    score = judge.score("", json.dumps(FACTS), response)
    assert {p: score[f"gold_{p}"] for p in gold.PARTS if score[f"gold_{p}"]} == pytest.approx(parts)
    assert score["gold"] == pytest.approx(sum(parts.values()))


def test_filler(judge):
    assert judge.has_filler("long story short , i moved out .") and not judge.has_filler("i moved out .")


def test_demonstrations_are_of_mixed_quality(tables, judge):
    facts = tables.prompts["facts"]
    scores = gold.columns(judge, tables.prompts["prompt"], facts, tables.demonstrations["response"])["gold"]
    assert 0.5 < scores.mean() < 2.5 and scores.std() > 0.5


def test_the_annotator_is_bradley_terry():
    settings = Annotator(temperature=2.0, length_bias=0.1, filler_bias=0.5)
    utility = annotator.utility(np.array([1.0, 2.0]), np.array([10, 5]), np.array([1.0, np.nan]), settings)
    assert utility.tolist() == pytest.approx([1.0 + 1.0 + 0.5, 2.0 + 0.5])
    many = annotator.choose(np.full(40_000, 1.0), np.full(40_000, 0.0), settings, np.random.default_rng(0))
    p = 1 / (1 + np.exp(-0.5))
    assert many.first.mean() == pytest.approx(p, abs=0.01)
    assert many.p_chosen[many.first] == pytest.approx(p) and many.p_chosen[~many.first] == pytest.approx(1 - p)


def test_a_cold_annotator_always_prefers_the_better():
    settings = Annotator(temperature=1e-6, length_bias=0.0, filler_bias=0.0)
    choice = annotator.choose(np.array([1.0, 0.0]), np.array([0.0, 1.0]), settings, np.random.default_rng(0))
    assert choice.first.tolist() == [True, False]
