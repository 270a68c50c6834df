"""The whole comparison on a run whose truth is known."""

import json
import math
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import synthetic

from rlhf_vs_dpo.evaluation import views, whole
from rlhf_vs_dpo.report import words

DATASET = synthetic.inputs(prompts=4, seeds=(0,)).preferences.model_copy(update={"source": "dataset"})
ROWS = ["sft", *synthetic.METHODS, "control_tokens [BAD]", "best_of_4"]


@pytest.fixture(scope="module")
def found():
    return synthetic.found()


def test_rows_are_methods_and_best_of_n(found):
    assert list(found["methods"]) == ROWS
    assert found["families"]["best_of_4"] == "best_of_n" and found["judge"] == "gold"
    assert found["axes"] == ["preferred", "gold"] and found["asked"] == {
        "temperature": 0.6,
        "price": 0.1,
        "judge": None,
        "tastes": True,
    }
    for method, (_, gain, kl) in synthetic.METHODS.items():
        gold, sft = found["methods"][method]["gold"], found["methods"]["sft"]["gold"]
        assert gold["mean"] - sft["mean"] == pytest.approx(gain, abs=0.1) and gold["low"] < gold["mean"] < gold["high"]
        assert found["methods"][method]["kl"]["mean"] == pytest.approx(kl, abs=0.03)
    assert found["methods"]["best_of_4"]["corpus_perplexity"]["mean"] is None


def test_a_mean_over_lines_is_that_of_its_runs(found):
    runs = [run["gold"] for run in found["runs"]["ppo"].values()]
    assert found["methods"]["ppo"]["gold"]["mean"] == pytest.approx(np.mean(runs))
    assert found["spread"]["ppo"]["gold"]["standard_deviation"] == pytest.approx(np.std(runs, ddof=1))
    assert found["spread"]["sft"]["lines"] == 3 and list(found["runs"]["sft"]) == ["sft-0", "sft-1", "sft-2"]


def test_differences_are_of_every_two_rows_and_exploratory(found):
    assert len(found["differences"]) == 21
    by_pair = {(e["a"], e["b"]): e for e in found["differences"]}
    gap = by_pair["ppo", "dpo"]
    assert gap["gold"]["low"] < 0.5 < gap["gold"]["high"] and gap["preferred"]["low"] > 0
    assert not any("p" in entry or "p_holm" in entry for entry in found["differences"])
    # Two normal responses with noise 0.5 each, 0.5 apart
    assert gap["wins"] == pytest.approx(0.5 * (1 + math.erf(0.5 / math.sqrt(2) / 0.5 / math.sqrt(2))), abs=0.05)


def test_planned_questions_are_answered_on_both_axes_from_three_lines_on(found):
    for axis in ("preferred", "gold"):  # of the twelve, one is about rows that were run
        (entry,) = found["questions"][axis]
        assert (entry["a"], entry["b"], entry["answer"]) == ("ppo", "dpo", "a") and entry["p"] < 0.05
    assert found["answers"]
    for seeds in ((0,), (0, 1)):
        few = synthetic.found(seeds=seeds)
        (entry,) = few["questions"]["gold"]
        assert not few["answers"] and entry["p"] is None and entry["answer"] is None and entry["mean"] > 0


def test_a_collapsed_line_is_counted_by_the_definition_in_params():
    results = synthetic.found(collapsed=("dpo-1",))
    assert results["spread"]["control_tokens [BAD]"]["collapsed"] == 1.0  # a way to prompt it, worse on purpose
    assert "1 of 12 trained policies collapsed" in " ".join(words.verdict(results))  # and no run of its own
    assert (
        results["spread"]["dpo"]["collapsed"] == pytest.approx(1 / 3) and results["spread"]["ppo"]["collapsed"] == 0.0
    )
    strict = synthetic.settings(collapse=synthetic.settings().collapse.model_copy(update={"gain_below": 0.3}))
    assert whole.compare(synthetic.inputs(), strict, 0)["spread"]["chosen_sft"]["collapsed"] == 1.0


def test_paths_and_what_is_read_off_them(found):
    points = found["paths"]["ppo"]
    assert (
        len(points) == 6
        and points[0]["kl"]["mean"] == 0.0
        and points[-1]["gold"]["mean"] == pytest.approx(2.0, abs=0.1)
    )
    # gold = 1 + gain sqrt(KL / 2) of ppo: at KL 0.5 half the gain
    at_kl = found["equal_kl"]["gold"]
    assert at_kl["ppo"]["0.5"]["mean"] == pytest.approx(1.5, abs=0.12) and at_kl["ppo"]["0.5"]["read"] == "path"
    assert at_kl["chosen_sft"]["2"] is None
    low, high = at_kl["ppo"]["0.5"]["between"]
    assert low < 0.5 <= high
    compute = found["equal_compute"]
    assert compute["flops"]["1"] == pytest.approx(max(c["total"]["flops"] for c in found["cost"].values()))
    assert compute["axes"]["gold"]["ppo"]["1"]["mean"] == pytest.approx(points[-1]["gold"]["mean"])
    own_best = found["own_best"]["gold"]
    assert own_best["ppo"]["at"] > 0.7 and own_best["best of n"]["on"] == "test"
    assert set(found["overoptimisation"]) == {*synthetic.METHODS, "best of n"}
    assert set(found["overoptimisation"]["ppo"]) == {"form", "gold", "utility", "reward"}


def test_equal_kl_is_read_from_settings_where_there_are_several():
    """ppo (KL 2, gain 1) and control_tokens (KL 0.2, gain 0.2) as two settings of one method, and the SFT policy before them."""
    several = synthetic.settings(settings_of={"ppo": ["ppo", "control_tokens"], "dpo": ["dpo", "gone"]})
    found = whole.compare(synthetic.inputs(), several, 0)
    assert list(found["frontiers"]) == ["ppo"]  # of dpo one setting was run
    kls = [point["kl"]["mean"] for point in found["frontiers"]["ppo"]]
    assert kls == sorted(kls) and len(kls) == 3
    entry = found["equal_kl"]["gold"]["ppo"]["0.5"]
    share = (0.5**0.5 - 0.2**0.5) / (2.0**0.5 - 0.2**0.5)
    near, far = (found["methods"][row]["gold"]["mean"] for row in ("control_tokens", "ppo"))
    assert entry["read"] == "settings" and entry["mean"] == pytest.approx(near + (far - near) * share, abs=0.02)
    assert found["equal_kl"]["gold"]["dpo"]["0.5"]["read"] == "path"


def test_the_two_ways_to_prompt_one_policy_are_resampled_together():
    """[GOOD] and [BAD] are the same weights: what a line gives to both cancels in their difference."""
    made = synthetic.inputs(seeds=(0, 1, 2, 3))
    for number, folder in enumerate(made.members["control_tokens"]):
        table = made.samples[folder]
        made.samples[folder] = table.assign(gold=table["gold"] + 2.0 * (number - 1.5))  # lines far apart
    found = whole.compare(made, synthetic.settings(), 0)
    both = [found["methods"][row]["gold"] for row in ("control_tokens", "control_tokens [BAD]")]
    gap = next(
        e["gold"] for e in found["differences"] if (e["a"], e["b"]) == ("control_tokens", "control_tokens [BAD]")
    )
    assert min(entry["high"] - entry["low"] for entry in both) > 5 * (gap["high"] - gap["low"])


def test_costs_follow_what_is_needed(found):
    ppo, dpo, best = (found["cost"][m] for m in ("ppo", "dpo", "best_of_4"))
    assert ppo["needs"] == ["preferences", "reward"] and dpo["needs"] == ["preferences", "reference"]
    assert ppo["own"]["flops"] == 1000 * 6 * 5000 and ppo["upstream"]["flops"] == 2 * 1000 * 2 * 600
    assert best["own"]["flops"] == 0 and best["tokens_per_answer"] == pytest.approx(4, rel=0.1)
    tokens = found["methods"]
    assert ppo["tokens_per_answer"] == pytest.approx(tokens["ppo"]["tokens"]["mean"] / tokens["sft"]["tokens"]["mean"])
    assert ppo["hyperparameters"] > dpo["hyperparameters"] and dpo["hyperparameters_upstream"] == 0


def test_tables_for_dvc_and_mlflow(found):
    rows = views.of_methods(found)
    assert set(rows) == {*ROWS[:5], "control_tokens_BAD", "best_of_4"}
    assert "collapsed" in rows["ppo"] and "collapsed" not in rows["control_tokens_BAD"]
    assert rows["ppo"]["gold_low"] < rows["ppo"]["gold"] < rows["ppo"]["gold_high"] and len(rows["ppo"]) < 22
    assert rows["ppo"]["preferred_low"] < rows["ppo"]["preferred"] and {"utility", "objective"} <= rows["ppo"].keys()
    assert views.file_name("control_tokens [BAD]") == "control_tokens_BAD"
    assert list(views.comparison(found)["policy"]) == list(found["methods"])
    assert len(views.paths(found)) == 24
    assert views.best_of_n(found)["value"].notna().all()
    entries = views.for_tracking(found, synthetic.inputs())
    folders = [f"{m}-{seed}" for m in synthetic.METHODS for seed in range(3)]
    bad = [f"control_tokens-{seed}" for seed in range(3)]  # the other prompt's numbers go to the same runs
    best = [f"best_of_4-{seed}" for seed in range(3)]
    assert [e["folder"] for e in entries] == [*(f"sft-{seed}" for seed in range(3)), *folders, *bad, *best]
    assert [e["seed"] for e in entries] == [0, 1, 2] * 7
    assert all(name.startswith("evaluation BAD/") for name in entries[-4]["metrics"])
    ppo = entries[3]
    assert ppo["settings"]["algorithm"] == "ppo"
    assert ppo["metrics"]["validation/preferred"] == found["validation"]["ppo-0"] and found["criterion"] == "preferred"
    assert set(ppo["steps"][0][1]) == {"heldout/reward", "heldout/utility"}
    assert [step for step, _ in ppo["steps"]] == [0, 1, 2, 3, 4, 5] and len(ppo["samples"]) == 50
    names = [
        {n for n in e["metrics"] if n.startswith("evaluation/")} - {"evaluation/pair_accuracy"} for e in entries[:12]
    ]
    assert all(n == names[0] for n in names)


def test_training_curves_are_put_side_by_side(tmp_path):
    (tmp_path / "dpo-0.csv").write_text("step,loss,pairs/margin\n" + "".join(f"{s},{s},1\n" for s in range(1, 81)))
    (tmp_path / "dpo-1.csv").write_text("step,loss,pairs/margin\n" + "".join(f"{s},{s + 2},3\n" for s in range(1, 81)))
    shown = views.learning(tmp_path, {"sft": ["sft-0"], "dpo": ["dpo-0", "dpo-1"], "ppo": ["ppo-0"]})
    assert set(shown["policy"]) == {"dpo"} and len(shown) == 40 and (shown["margin"] == 2.0).all()
    assert shown["loss"].iloc[0] == pytest.approx(2.5) and shown["share"].iloc[-1] == 1.0


def variants():
    """Runs as other people's are: without some family, without best-of-n, with one seed, one answer, no gold reward."""
    yield "one seed", {"seeds": (0,)}, lambda inputs: inputs
    for family in ("rl", "preference", "imitation"):
        yield f"no {family}", {}, lambda inputs, family=family: without(inputs, family)
    yield (
        "no best of n",
        {},
        lambda inputs: replace(inputs, policies=inputs.policies.model_copy(update={"best_of_n": []})),
    )
    yield "one answer, no fillers, a smaller pool", {}, sparse
    yield (
        "no pairs of ours",
        {},
        lambda inputs: replace(inputs, pairs={s: {"pairs": {"train": 3}} for s in inputs.seeds}, preferences=DATASET),
    )
    yield "no gold", {}, without_gold
    yield "a judge in the annotator's place", {}, judged
    yield "a line that never ends", {"collapsed": ("dpo-1",)}, lambda inputs: without_gold(silent(inputs, "dpo-1"))


def sparse(inputs):
    return replace(
        inputs,
        samples={f: t[t["sample"] == 0] for f, t in inputs.samples.items()},
        pairs={s: p | {"filler": {"chosen": None, "rejected": None}} for s, p in inputs.pairs.items()},
        pool={s: p[(p["split"] != "test") | (p["prompt_id"] < "p020")] for s, p in inputs.pool.items()},
    )


def without(inputs, family):
    gone = [m for m, (its, _, _) in synthetic.METHODS.items() if its == family]
    return replace(
        inputs,
        policies=inputs.policies.model_copy(update={family: []}),
        settings={m: s for m, s in inputs.settings.items() if m not in gone},
        pair_rewards={} if family == "preference" else inputs.pair_rewards,
    )


def without_gold(inputs):
    def blank(table):
        return table.assign(**{c: np.nan for c in table if c.startswith("gold") or c in ("filler", "utility")})

    return replace(
        inputs, samples={f: blank(t) for f, t in inputs.samples.items()}, watched={f: blank(t) for f, t in inputs.watched.items()},
        pool={s: blank(p) for s, p in inputs.pool.items()}, demonstrations={s: blank(d) for s, d in inputs.demonstrations.items()},
        pairs={s: {} for s in inputs.seeds}, preferences=DATASET,
    )  # fmt: skip


def judged(inputs):
    """Without gold, each policy's wins as some judge has them; the SFT policy against itself draws."""
    rng, prompts = np.random.default_rng(0), sorted(inputs.sft[0]["prompt_id"].unique())
    wins = {f: pd.Series(rng.choice([0.0, 0.5, 1.0], size=len(prompts)), index=prompts) for f in inputs.samples}
    wins |= {f: pd.Series(0.5, index=prompts) for f in inputs.members["sft"]}
    return replace(without_gold(inputs), judged=wins)


def silent(inputs, folder):
    table = inputs.samples[folder].assign(finished=False, reward=np.nan)
    watched = inputs.watched[folder].assign(reward=np.nan)
    return replace(inputs, samples=inputs.samples | {folder: table}, watched=inputs.watched | {folder: watched})


@pytest.mark.parametrize(("of", "change"), [v[1:] for v in variants()], ids=[v[0] for v in variants()])
def test_other_runs_are_compared_and_reported_too(of, change):
    from test_report import source

    from rlhf_vs_dpo.report import content, markdown, page

    inputs = change(synthetic.inputs(**of))
    results = json.loads(
        json.dumps(whole.compare(inputs, synthetic.settings(resamples=100), 0)).replace("NaN", "null")
    ) | {"judges": {}}
    assert next(iter(results["methods"])) == "sft" and len(words.verdict(results)) >= 1
    blocks = content.blocks(source(results))
    assert page.render(blocks) and markdown.render(blocks)
    text = markdown.render(blocks)
    if change is without_gold:
        assert results["axes"] == ["reward"] and results["judge"] == "reward" and "for want of a gold reward" in text
        assert (
            "what the labels asked for is not measured" in text
            and "| utility" not in text
            and "objective |" not in text
        )
    if change is judged:
        assert results["axes"] == ["preferred"] and results["criterion"] == "reward"
        assert results["methods"]["sft"]["preferred"]["mean"] == 0.5 and "`preferred` is how often the judge" in text
    if "collapsed" in of:
        assert results["spread"]["dpo"]["collapsed"] == pytest.approx(1 / 3)


def test_lines_are_read_where_the_same_share_of_training_is_done():
    """Lines have their own pairs, and so their own numbers of steps: 121 and 122 are watched at other steps, 9 and 10 even at fewer."""
    from rlhf_vs_dpo.evaluation import paths
    from rlhf_vs_dpo.evaluation.statistics import Resamples

    def table(steps: int, points: int) -> pd.DataFrame:
        watched = sorted({round(p * steps / (points - 1)) for p in range(points)} | {steps})
        rows = [(step, f"v{i}", step / steps) for step in watched for i in range(4)]
        frame = pd.DataFrame(rows, columns=["step", "prompt_id", "gold"])
        return frame.assign(**{name: 0.0 for name in paths.WATCHED if name != "gold"})

    for of in ((121, 121, 122), (778, 781, 777), (9, 10, 10), (5, 121, 122)):
        path = paths.of_training("dpo", [table(steps, 10) for steps in of], Resamples(100, 0))
        _, counted = path.sums["gold"]
        assert counted.all(), of  # every line has a say at every point
        assert path.share[0] == 0 and path.share[-1] == 1
        assert path.values("gold") == pytest.approx(path.share, abs=0.06)
        each = np.stack([point.each for point in path.points["gold"]])
        assert np.abs(each - path.share[:, None]).max() < 0.12


def test_best_of_n_is_measured_on_the_prompts_that_methods_are_watched_on():
    from dataclasses import replace

    of = synthetic.inputs(seeds=(0, 1))
    few = [f"v{i:03d}" for i in range(12)]
    fewer = replace(of, watched={name: table[table["prompt_id"].isin(few)] for name, table in of.watched.items()})
    for inputs, prompts in ((of, 40), (fewer, 12)):
        for pool in inputs.drawn("validation"):
            assert pool["prompt_id"].nunique() == prompts and (pool["split"] == "validation").all()
        path, *_ = whole._best_of_n(inputs, inputs.lines(synthetic.settings()), whole.Resamples(100, 0))
        assert path.points["gold"][0].units == prompts


def test_best_of_n_on_validation_prompts_is_not_compared_with_its_own_candidates():
    """Against an independent sample the best of n wins n / (n + 1) of comparisons."""
    from dataclasses import replace

    of = synthetic.inputs(seeds=(0,))
    rng = np.random.default_rng(0)
    pool = pd.concat([of.pool[0][of.pool[0]["split"] == "validation"].assign(prompt_id=f"v{i}") for i in range(1500)])
    pool = pool.groupby("prompt_id").head(3).reset_index(drop=True)
    pool["sample"] = pool.groupby("prompt_id").cumcount()
    drawn = rng.normal(size=len(pool))
    pool = pool.assign(reward=drawn, gold=drawn, utility=1e6 * drawn, finished=True)
    whole_pool = pd.concat([of.pool[0][of.pool[0]["split"] != "validation"], pool], ignore_index=True)
    of = replace(of, pool={0: whole_pool}, watched={})
    settings = synthetic.settings()
    path, *_ = whole._best_of_n(of, of.lines(settings), whole.Resamples(100, 0))
    assert list(path.share) == [1, 2]
    assert path.values("preferred") == pytest.approx([1 / 2, 2 / 3], abs=0.03)
