"""The ways to do without reinforcement learning: what each keeps, how it is prompted, and pairs sampled anew."""

import copy

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import small_model, untuned

from rlhf_vs_dpo import config
from rlhf_vs_dpo.config import Annotator, Monitor
from rlhf_vs_dpo.errors import DataError, ModelError, ParamsError
from rlhf_vs_dpo.language import models, text
from rlhf_vs_dpo.language.forward import log_likelihoods, measure
from rlhf_vs_dpo.language.generation import generate, generate_together
from rlhf_vs_dpo.language.logprobs import Policy
from rlhf_vs_dpo.language.text import Prompts, Tokens, word_tokenizer
from rlhf_vs_dpo.preferences import labelling
from rlhf_vs_dpo.run.progress import Record
from rlhf_vs_dpo.training import imitation, monitor, supervised


def recipe(name, **changes):
    params = untuned()
    params["imitation"][name] |= changes
    return config.section(params, "imitation", name)


@pytest.fixture
def own_tokenizer():
    """One that may be changed."""
    return word_tokenizer(["the", "cat", "dog", "sat", "ran", "."])


def pool():
    """Two prompts, six samples each; one response of `a` never ended, though it would score highest."""
    return pd.DataFrame(
        {
            "prompt_id": ["a"] * 6 + ["b"] * 6,
            "sample": [*range(6)] * 2,
            "response_ids": [[i, 1] for i in range(12)],
            "finished": [True, True, False, True, True, True] + [True] * 6,
            "reward": [0.1, 0.5, np.nan, 0.3, 0.2, 0.4, 9.0, 8.0, 7.0, 6.0, 5.0, 9.5],
        }
    )


def kept(settings):
    examples = imitation.from_pool(settings, pool(), Prompts([[100], [200]], ["a", "b"]))
    assert all(t.prompt == [100 if name[0] == "a" else 200] for t, name in zip(*examples, strict=True))
    return examples.names


def test_best_of_n_keeps_the_best_of_every_n_and_drops_what_is_left_over():
    assert kept(recipe("best_of_n", n=3)) == ["a/1", "a/5", "b/0", "b/5"]
    assert kept(recipe("best_of_n", n=4)) == ["a/1", "b/0"]
    assert kept(recipe("best_of_n", n=6)) == ["a/1", "b/5"]
    assert kept(recipe("best_of_n", n=2)) == ["a/1", "a/3", "a/5", "b/0", "b/2", "b/5"]


def test_a_filter_keeps_its_share_of_each_prompt():
    assert kept(recipe("rm_filtered", share=0.5)) == ["a/1", "a/3", "a/5", "b/0", "b/1", "b/5"]
    assert kept(recipe("rm_filtered", share=0.01)) == ["a/1", "b/5"]  # one at least
    assert len(kept(recipe("rm_filtered", share=1.0))) == 11  # all that ended


def test_a_pool_without_an_end_is_refused():
    endless = pool().assign(finished=False, reward=np.nan)
    for name in ("best_of_n", "rm_filtered"):
        with pytest.raises(DataError, match="nothing to imitate: none of its 12 responses ended"):
            imitation.from_pool(recipe(name), endless, Prompts([[1], [2]], ["a", "b"]))


def pairs():
    return pd.DataFrame(
        {
            "pair_id": ["x", "y"],
            "prompt": ["the cat", "the dog"],
            "chosen": ["sat .", "ran ."],
            "rejected": ["ran", "sat"],
            "chosen_ids": None,
            "rejected_ids": None,
        }
    )


def test_pairs_become_examples(own_tokenizer):
    chosen = imitation.from_pairs("chosen_sft", pairs(), own_tokenizer, 32)
    assert [own_tokenizer.decode(t.response) for t in chosen.tokens] == ["sat . <eos>", "ran . <eos>"]
    models.add_control_tokens(small_model(own_tokenizer), own_tokenizer, ["[GOOD]", "[BAD]"])
    controlled = imitation.from_pairs("control_tokens", pairs(), own_tokenizer, 32)
    said = [own_tokenizer.decode([*t.prompt, *t.response]) for t in controlled.tokens]
    assert said == [
        "<bos> the cat [GOOD] sat . <eos>",
        "<bos> the dog [GOOD] ran . <eos>",
        "<bos> the cat [BAD] ran <eos>",
        "<bos> the dog [BAD] sat <eos>",
    ]


# ---- control tokens --------------------------------------------------------------------------------------------------


def test_control_tokens_change_nothing_until_they_are_trained_and_are_never_said(own_tokenizer):
    model = small_model(own_tokenizer)
    before, known = copy.deepcopy(model), len(own_tokenizer)
    prompt = [own_tokenizer.bos_token_id, 4, 5]
    example = [Tokens(prompt, [6, 7, own_tokenizer.eos_token_id])]
    plain = log_likelihoods(Policy(before, 0.7), example)
    models.add_control_tokens(model, own_tokenizer, ["[GOOD]", "[BAD]"])
    assert len(own_tokenizer) == known + 2 == model.get_input_embeddings().num_embeddings
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight  # still tied
    assert log_likelihoods(Policy(model, 0.7), example) == pytest.approx(plain, abs=1e-5)
    good, bad = own_tokenizer.convert_tokens_to_ids(["[GOOD]", "[BAD]"])
    rows = [[Tokens([*prompt, token], [6, 7, 1])] for token in (good, bad)]
    policy = Policy(model, 1.0)
    assert log_likelihoods(policy, rows[0]) == log_likelihoods(policy, rows[1])
    with torch.no_grad():  # even a policy that wants nothing else
        model.get_input_embeddings().weight[good] *= 100
    prompts = Prompts([prompt] * 50, [f"{i}" for i in range(50)])
    drawn = generate(Policy(model, 0.3), prompts, [0] * 50, 8, 0)
    assert not {good, bad} & {token for t in drawn.tokens for token in t.response}
    entropies = measure(
        policy, drawn.tokens, lambda policy, batch: policy(batch, entropy=True).entropy.sum(-1).tolist()
    )
    assert np.isfinite(entropies).all()
    assert np.isfinite(log_likelihoods(policy, drawn.tokens)).all()


def test_a_token_that_exists_is_no_control_token(own_tokenizer):
    with pytest.raises(ModelError, match="has one of cat, dog already"):
        models.add_control_tokens(small_model(own_tokenizer), own_tokenizer, ["cat", "dog"])


def test_the_folder_says_how_it_is_prompted(own_tokenizer, tmp_path):
    model = small_model(own_tokenizer)
    assert models.prompt_suffixes(model) == [""]
    models.add_control_tokens(model, own_tokenizer, ["[GOOD]", "[BAD]"])
    models.save(model, own_tokenizer, tmp_path / "policy")
    again, tokenizer = models.load_policy(tmp_path / "policy")
    assert models.prompt_suffixes(again) == ["[GOOD]", "[BAD]"]
    good = tokenizer.convert_tokens_to_ids("[GOOD]")
    assert text.encode_prompts(tokenizer, ["the cat"], "[GOOD]") == [[tokenizer.bos_token_id, 4, 5, good]]
    assert again.generation_config.suppress_tokens == tokenizer.convert_tokens_to_ids(["[GOOD]", "[BAD]"])


def test_training_behind_tokens_makes_them_mean_something(own_tokenizer):
    """[GOOD] before `sat`, [BAD] before `ran`: a few steps tell them apart."""
    model = small_model(own_tokenizer, scale=1.0)
    models.add_control_tokens(model, own_tokenizer, ["[GOOD]", "[BAD]"])
    rows = pd.DataFrame(
        {
            "pair_id": list("abcdefgh"),
            "prompt": "the cat",
            "chosen": "sat .",
            "rejected": "ran .",
            "chosen_ids": None,
            "rejected_ids": None,
        }
    )
    examples = imitation.from_pairs("control_tokens", rows, own_tokenizer, 32)
    settings = supervised.as_training(recipe("control_tokens", batch=8, learning_rate=3e-3), 60)
    policy = Policy(model, 1.0)
    supervised.likelihood(policy, examples, settings, 0, Record(lambda m, s: None, "x"))
    good, bad = examples.tokens[0], examples.tokens[8]
    swapped = [Tokens(good.prompt, bad.response), Tokens(bad.prompt, good.response)]
    right = log_likelihoods(policy, [good, bad])
    assert min(right) > max(log_likelihoods(policy, swapped)) + 2


def test_what_is_watched_is_prompted_as_the_folder_says_and_scored_on_the_plain_prompt(own_tokenizer):
    reference = small_model(own_tokenizer)
    model = copy.deepcopy(reference)
    models.add_control_tokens(model, own_tokenizer, ["[GOOD]", "[BAD]"])
    with torch.no_grad():
        model.get_input_embeddings().weight[-2] = model.get_input_embeddings().weight[6] * 2
    prompts = pd.DataFrame({"prompt_id": ["p", "q"], "prompt": ["the cat", "the dog"], "facts": None})
    policy, frozen = Policy(model, 1.0), Policy(reference, 1.0)
    watched = monitor.HeldOut(prompts, None, frozen, own_tokenizer, Monitor(points=1, prompts=2), 5, 0, 1)
    watched.watch(policy, 0, lambda m, s: None)
    table = watched.table()
    good = own_tokenizer.convert_tokens_to_ids("[GOOD]")
    assert [list(ids) for ids in table["prompt_ids"]] == text.encode_prompts(own_tokenizer, list(prompts["prompt"]))
    asked = [Tokens([*p, good], list(r)) for p, r in zip(table["prompt_ids"], table["response_ids"], strict=True)]
    assert table["logp"].tolist() == pytest.approx(log_likelihoods(policy, asked), abs=1e-5)
    seen = [Tokens(list(p), list(r)) for p, r in zip(table["prompt_ids"], table["response_ids"], strict=True)]
    assert table["reference_logp"].tolist() == pytest.approx(log_likelihoods(frozen, seen), abs=1e-5)
    watched.watch(policy, 0, lambda m, s: None)  # the end of a round is the start of the next: sampled once
    assert len(watched.table()) == 2


# ---- sampling anew ---------------------------------------------------------------------------------------------------


class Shorter:
    """A gold reward that likes few words."""

    def score(self, prompt, facts, response):
        return {"gold": -float(len(response.split()))}

    def has_filler(self, response):
        return None


def test_labelled_pairs_come_from_the_policy_and_follow_the_annotator(own_tokenizer):
    policy = Policy(small_model(own_tokenizer, scale=1.0), 1.0)
    prompts = pd.DataFrame(
        {"prompt_id": [f"p{i}" for i in range(300)], "split": "train", "prompt": "the cat", "facts": None}
    )
    settings = Annotator(temperature=0.5, length_bias=0.0, filler_bias=0.0)
    drawn = labelling.two_samples(policy, own_tokenizer, prompts, 12, 3, "x")
    pairs, summary = labelling.label(drawn.table, Shorter(), settings, 3)
    for side in ("chosen", "rejected"):
        again = [own_tokenizer.decode(ids, skip_special_tokens=True) for ids in pairs[f"{side}_ids"]]
        assert again == pairs[side].tolist()
        assert all(ids[-1] == own_tokenizer.eos_token_id for ids in pairs[f"{side}_ids"])
    # A word is a token here, and has one spelling; but this policy says control tokens, too, which its texts have lost.
    assert 0 < drawn.tokenised_otherwise_share < 1
    lengths = pairs[["chosen", "rejected"]].map(lambda said: len(said.split()))
    assert (lengths["chosen"] <= lengths["rejected"]).mean() > 0.8
    gap = (lengths["rejected"] - lengths["chosen"]).to_numpy() / 0.5
    assert pairs["p_chosen"].tolist() == pytest.approx((1 / (1 + np.exp(-gap))).tolist())
    assert (pairs["chosen"] != pairs["rejected"]).all()
    assert summary["dropped_share"] == pytest.approx(1 - len(pairs) / 300)
    other = labelling.two_samples(policy, own_tokenizer, prompts, 12, 4, "x").table
    assert not drawn.table["response"].equals(other["response"])  # another round, other samples


def test_labels_follow_length_and_filler_as_the_annotator_does():
    """Utility by hand: gold + 0.5 tokens + 3 [filler]; at a temperature near 0 the higher one is chosen."""

    class Wordy:
        def score(self, prompt, facts, response):
            return {"gold": 10.0 if "gold" in response else 0.0}

        def has_filler(self, response):
            return "well" in response

    said = {
        "a": ("gold", "no"),
        "b": ("well", "one two three"),
        "c": ("well x", "one two three four five six seven"),
        "d": ("gold", "well " * 30),
    }
    rows = [
        {
            "prompt_id": name, "split": "train", "prompt": "q", "facts": None, "sample": number, "response": text,
            "response_ids": [number], "tokens": len(text.split()), "finished": True,
        }
        for number in (0, 1)
        for name, text in ((name, both[number]) for name, both in said.items())
    ]  # fmt: skip
    settings = Annotator(temperature=1e-3, length_bias=0.5, filler_bias=3.0)
    pairs, summary = labelling.label(pd.DataFrame(rows), Wordy(), settings, 0)
    chosen = dict(zip(pairs["prompt_id"], pairs["chosen"], strict=True))
    # a: 10.5 against 0.5; b: 3.5 against 1.5; c: 4.0 against 3.5; d: 10.5 against 18.0
    assert chosen == {"a": "gold", "b": "well", "c": "well x", "d": "well " * 30}
    assert summary["annotator_agrees_with_gold"] == 0.5  # of a and d, which differ in gold
    assert (
        summary["filler"] == {"chosen": 0.75, "rejected": 0.0} and summary["tokens"]["chosen"] == (1 + 1 + 2 + 30) / 4
    )


def test_the_annotator_does_not_choose_without_a_gold_reward():
    """Every comparison with what is not a number is false: it would choose the first of two, always."""
    with pytest.raises(ParamsError, match="needs a gold reward"):
        labelling.label(pd.DataFrame(), None, config.section(untuned(), "preferences").annotator, 0)


def test_alone_a_process_generates_everything(own_tokenizer):
    asked = [[own_tokenizer.bos_token_id, 4 + i % 3] for i in range(9)]
    prompts = Prompts(asked, [f"{i}" for i in range(9)])
    args = (Policy(small_model(own_tokenizer), 1.0), prompts, [0] * 9, 4, 0)
    assert generate_together(*args) == generate(*args)


def test_equal_prompts_are_read_once_and_answered_apart(own_tokenizer):
    """Many responses to few prompts are those that each prompt gets alone."""
    policy = Policy(small_model(own_tokenizer, scale=1.0), 1.0)
    asked = [[own_tokenizer.bos_token_id, *[4 + i % 2] * (1 + i % 2)] for i in range(40)]
    names, samples = [f"{i % 2}" for i in range(40)], list(range(40))
    together = generate(policy, Prompts(asked, names), samples, 6, 0, rows=16)
    for i in (0, 1, 17, 39):
        alone = generate(policy, Prompts(asked[i : i + 1], names[i : i + 1]), samples[i : i + 1], 6, 0)
        assert alone.tokens[0] == together.tokens[i]
    assert len({tuple(t.response) for t in together.tokens}) > 10


def test_a_pool_of_a_round_is_scored_by_the_reward_model(own_tokenizer):
    from test_training import scorer

    from rlhf_vs_dpo.language.forward import scores

    policy, reward = Policy(small_model(own_tokenizer, scale=1.0), 1.0), scorer(own_tokenizer)
    ids = {"a": [own_tokenizer.bos_token_id, 4], "b": [own_tokenizer.bos_token_id, 5]}
    table, tokens, read = imitation.draw_pool(policy, reward, Prompts(list(ids.values()), list(ids)), 5, 6, 0)
    assert table.groupby("prompt_id")["sample"].apply(list).to_dict() == {"a": [*range(5)], "b": [*range(5)]}
    assert tokens == table["response_ids"].map(len).sum()
    rows = [Tokens(ids[p], list(r)) for p, r in zip(table["prompt_id"], table["response_ids"], strict=True)]
    texts = {tuple(r.prompt + r.response): r for r in rows}  # each prompt is read to answer it, each text to score it
    assert read == 2 + 2 + sum(map(len, texts))
    assert table["reward"].tolist() == pytest.approx(scores(reward, rows), abs=1e-5)


def test_texts_that_occur_twice_are_read_once_and_each_gets_its_value(own_tokenizer):
    policy = Policy(small_model(own_tokenizer), 1.0)
    rows = [Tokens([2, 4], [5, 1]), Tokens([2, 4], [6, 6, 1]), Tokens([2, 4], [5, 1]), Tokens([2, 5], [5, 1])]
    each = [log_likelihoods(policy, [row])[0] for row in rows]
    assert log_likelihoods(policy, rows) == pytest.approx(each, abs=1e-5)
    read = []
    policy.register_forward_hook(lambda module, args, output: read.append(len(args[0].input_ids)))
    log_likelihoods(policy, rows)
    assert sum(read) == 3
