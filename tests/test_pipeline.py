"""The whole graph with the smoke profile. Marked `pipeline`; minutes, and part of `make test`.

It is reproduced once, all stages in one process, and locked by `dvc commit`: DVC then takes it for its own work, and each test
runs what it is about, through DVC where DVC is what is tested.
"""

import hashlib
import io
import json
import os
import re
import shutil
import sys
from pathlib import Path

import pandas as pd
import pytest
from project import ENV, by_hand, change, copy_project, fails, inside, lock, planned, ran, run, stages
from ruamel.yaml import YAML

from rlhf_vs_dpo import config, tables
from rlhf_vs_dpo.evaluation.measure import METRICS
from rlhf_vs_dpo.language import heads
from rlhf_vs_dpo.run import cells

pytestmark = pytest.mark.pipeline
POLICIES = [
    "rloo",
    "trpo",
    "ppo",
    "ppo_ptx",
    "dpo",
    "simpo",
    "dpo_online",
    "control_tokens",
    "rm_filtered",
    "expert_iteration",
]
STAGES = 14 + 2 * len(POLICIES)  # each policy is trained and sampled
TAIL = ["judge", "evaluate", "report"]


@pytest.fixture(scope="module")
def smoke(tmp_path_factory):
    folder = copy_project(tmp_path_factory.mktemp("smoke") / "project", "smoke")
    run(
        folder, sys.executable, Path(__file__).parent / "project.py", str(folder), PYTHONPATH=str(Path(__file__).parent)
    )
    return folder


def test_everything_ran_and_a_second_time_nothing_does(smoke):
    assert len(lock(smoke)) == STAGES
    assert ran(run(smoke, "dvc", "repro")) == []
    assert "up to date" in run(smoke, "dvc", "status")


def results(folder: Path) -> dict:
    return json.loads((folder / "evaluation" / "results.json").read_text())


def test_evaluation_holds_every_policy_and_metric(smoke):
    folder = smoke
    evaluation = results(folder)["methods"]
    rows = ["sft", *POLICIES, "best_of_4"]
    rows.insert(rows.index("control_tokens") + 1, "control_tokens [BAD]")
    assert list(evaluation) == rows
    for name, entry in evaluation.items():
        assert set(METRICS) <= entry.keys()
        for metric in METRICS:
            assert entry[metric].keys() == {"mean", "low", "high"}
            if entry[metric]["mean"] is None:
                assert metric == "pair_accuracy" or name == "best_of_4"
                continue
            assert entry[metric]["low"] <= entry[metric]["mean"] <= entry[metric]["high"]
    assert [name for name, entry in evaluation.items() if entry["pair_accuracy"]["mean"] is not None] == [
        "dpo", "simpo", "dpo_online",
    ]  # fmt: skip
    sampled, tokens = (evaluation["best_of_4"][m]["mean"] for m in ("sampled_tokens", "tokens"))
    assert sampled > 2 * tokens and evaluation["dpo"]["sampled_tokens"] == evaluation["dpo"]["tokens"]
    assert evaluation["sft"]["kl"]["mean"] == 0.0 and evaluation["sft"]["win_rate_vs_sft"]["mean"] == 0.5


def test_best_of_n_over_n_and_the_bounds(smoke):
    folder = smoke
    curve = pd.read_csv(folder / "plots" / "best_of_n.csv")
    assert curve["n"].tolist() == [1, 2, 4, 8, 16]
    assert curve["reward"].is_monotonic_increasing and curve["kl"].iloc[0] == pytest.approx(0.0, abs=1e-6)
    bounds = results(folder)["bounds"]
    named = {name.split(":")[0] for name in bounds}
    assert {"control_tokens", "rm_filtered", "expert_iteration", "best_of_4", "best of 16 (curve)"} <= named
    for name, entry in bounds.items():
        assert entry["slack"] == pytest.approx(entry["bound"] - entry["mean"], abs=1e-5), name
        assert entry["holds"] == (entry["low"] <= entry["bound"])
    pool = tables.read_table(folder / "samples" / "pool-0.parquet", "pool")
    assert pool.groupby("split").size().to_dict() == {
        "test": 2 * 16 + 6 * 4, "train": 16 * 4, "validation": 2 * 4,
    }  # fmt: skip
    assert pool["reward"].isna().equals(~pool["finished"])


def test_the_policy_folder_says_how_it_is_prompted(smoke):
    """`sample` knows nothing of control tokens; what it was told stands in the folder, and users find it there too."""
    from transformers import AutoConfig, AutoTokenizer, GenerationConfig

    folder = smoke
    place = folder / "models" / "control_tokens-0"
    assert AutoConfig.from_pretrained(place).prompt_suffixes == ["[GOOD]", "[BAD]"]
    tokens = AutoTokenizer.from_pretrained(place).convert_tokens_to_ids(["[GOOD]", "[BAD]"])
    assert set(tokens) < set(GenerationConfig.from_pretrained(place).suppress_tokens)  # and PAD and BOS
    samples = tables.read_table(folder / "samples" / "control_tokens-0.parquet", "samples")
    assert samples.groupby("suffix").size().to_dict() == {"[BAD]": 16, "[GOOD]": 16}
    assert not samples["response"].str.contains("GOOD|BAD", regex=True).any()
    others = tables.read_table(folder / "samples" / "dpo-0.parquet", "samples")
    assert set(others["suffix"]) == {""}


def test_trpo_steps_stay_in_the_trust_region(smoke):
    folder = smoke
    curve = pd.read_csv(folder / "curves" / "trpo-0.csv")
    assert (curve["update/kl_old_new"] <= curve["update/kl_bound"]).all() and (curve["update/kl_bound"] <= 0.02).all()
    assert {"update/backtracks", "update/rejected", "update/surrogate_gain"} <= set(curve.columns)


def test_theory_is_measured(smoke):
    folder = smoke
    theory = json.loads((folder / "metrics" / "theory.json").read_text())
    assert {"reinforce", "rloo", "trpo", "ppo", "dpo", "chosen_sft", "control_tokens"} <= theory["tabular"].keys()
    assert {"ppo", "dpo"} <= theory["transformer"].keys() and theory["ppo_ptx_with_gamma_0_is_ppo"] is True
    assert max(theory["identities"].values()) < 1e-5 and min(b["slack"] for b in theory["bounds"].values()) >= 0
    assert (folder / "theory" / "curves.png").stat().st_size > 1000


def test_online_rounds_sample_new_pairs(smoke):
    folder = smoke
    online = json.loads((folder / "runs" / "dpo_online-0.json").read_text())
    offline = json.loads((folder / "runs" / "dpo-0.json").read_text())
    assert online["tokens_generated"] > 0 == offline["tokens_generated"]
    curve = pd.read_csv(folder / "curves" / "dpo_online-0.csv")
    assert curve["step"].is_monotonic_increasing and curve["step"].is_unique
    heldout = tables.read_table(folder / "heldout" / "dpo_online-0.parquet", "heldout")
    assert heldout.groupby("step").size().nunique() == 1


def again(folder: Path, stage: str, to: Path) -> list[str]:
    """Options of a stage, with what it makes in another folder."""
    words, outs = stages(folder)[stage]
    return [str(to / word.replace("/", "-")) if word in outs else word for word in words[1:]]


def test_a_later_round_of_online_dpo_learns_the_pairs_that_were_drawn_for_it(smoke, tmp_path, monkeypatch):
    from rlhf_vs_dpo.language import forward, models
    from rlhf_vs_dpo.language.logprobs import Policy
    from rlhf_vs_dpo.preferences import labelling
    from rlhf_vs_dpo.training import preference

    drawn, learned, label, train = [], [], labelling.label, preference.train

    def labels(*given):
        pairs, summary = label(*given)
        drawn.append(pairs)
        return pairs, summary

    def trains(policy, pairs, known, *rest):
        learned.append((pairs, known))
        return train(policy, pairs, known, *rest)

    monkeypatch.setattr(labelling, "label", labels)
    monkeypatch.setattr(preference, "train", trains)
    assert by_hand(smoke, "preference", *again(smoke, "preference@dpo_online-0", tmp_path)) == 0
    stored = tables.read_table(smoke / "data" / "pairs-0.parquet", "pairs")
    assert len(learned) == len(drawn) + 1 > 1 and set(learned[0][0].names) <= set(stored["pair_id"])
    reference = Policy(models.load_policy(smoke / "models" / "sft-0")[0], 1.0)
    for table, (pairs, known) in zip(drawn, learned[1:], strict=True):
        for side in ("chosen", "rejected"):
            given = getattr(pairs, side)
            assert [tokens.response for tokens in given] == [list(ids) for ids in table[f"{side}_ids"]]
            assert known[f"{side}_logp"].tolist() == pytest.approx(forward.log_likelihoods(reference, given), abs=1e-4)


def test_a_later_round_of_expert_iteration_learns_the_pool_that_was_drawn_for_it(smoke, tmp_path, monkeypatch):
    from rlhf_vs_dpo.training import imitation, supervised

    drawn, learned, draw, fit = [], [], imitation.draw_pool, supervised.likelihood

    def draws(*given):
        pool = draw(*given)
        drawn.append(pool[0])
        return pool

    def fits(policy, examples, *rest):
        learned.append(examples)
        return fit(policy, examples, *rest)

    monkeypatch.setattr(imitation, "draw_pool", draws)
    monkeypatch.setattr(supervised, "likelihood", fits)
    assert by_hand(smoke, "imitation", *again(smoke, "imitation@expert_iteration-0", tmp_path)) == 0
    settings = config.section(config.read_params(smoke / "params.yaml"), "imitation", "expert_iteration")
    assert len(learned) == len(drawn) + 1 == settings.rounds > 1
    for pool, examples in zip(drawn, learned[1:], strict=True):
        kept = imitation.best_of_each(pool, settings.n)
        assert [tokens.response for tokens in examples.tokens] == [list(ids) for ids in kept["response_ids"]]


def test_no_prompt_of_test_reached_training(smoke):
    folder = smoke
    prompts = tables.read_table(folder / "data" / "prompts.parquet", "prompts")
    test = set(prompts.loc[prompts["split"] == "test", "prompt_id"])
    pairs = tables.read_table(folder / "data" / "pairs-0.parquet", "pairs")
    assert test and not test & set(pairs["prompt_id"])
    demonstrations = tables.read_table(folder / "data" / "demonstrations.parquet", "demonstrations")
    assert not test & set(demonstrations.loc[demonstrations["split"] != "test", "prompt_id"])
    pool = tables.read_table(folder / "samples" / "pool-0.parquet", "pool")
    assert not test & set(pool.loc[pool["split"] == "train", "prompt_id"])
    for path in (folder / "heldout").glob("*-pairs.parquet"):
        assert not test & set(tables.read_table(path, "pair_rewards")["prompt_id"])
    for path in set((folder / "heldout").glob("*.parquet")) - set((folder / "heldout").glob("*-pairs.parquet")):
        assert not test & set(tables.read_table(path, "heldout")["prompt_id"])
    assert set(tables.read_table(folder / "samples" / "dpo-0.parquet", "samples")["prompt_id"]) <= test


def test_training_stages_read_nothing_of_test(smoke):
    """SFT, reward and PPO give the same bytes when every row of the test split is gone from the tables they read."""
    folder = smoke
    out = folder / "by-hand" / "leak"
    out.mkdir(parents=True)
    for name in ("prompts", "demonstrations"):
        table = pd.read_parquet(folder / "data" / f"{name}.parquet")
        table[table["split"] != "test"].to_parquet(out / f"{name}.parquet", index=False)
    prompts, demonstrations = str(out / "prompts.parquet"), str(out / "demonstrations.parquet")
    cell = [f"--seed=0 --sft=models/sft-0 --prompts={prompts} --world=data/world --heldout={out}/h.parquet"]
    commands = {
        "sft": f"--seed=0 --base=models/base --demonstrations={demonstrations}",
        "reward": f"--seed=0 --sft=models/sft-0 --pairs=data/pairs-0.parquet --prompts={prompts} --demonstrations={demonstrations} "
        f"--world=data/world --demonstration-scores={out}/scores.parquet",
        "rl": f"--method=ppo --reward=models/reward-0 --corpus=data/corpus.parquet --demonstrations={demonstrations} {cell[0]}",
    }
    for stage_name, options in commands.items():
        place = out / stage_name
        ends = f"--out={place} --metrics={place}.json --curves={place}.csv --run={place}-run.json"
        assert by_hand(folder, stage_name, *options.split(), *ends.split()) == 0
        made = folder / "models" / {"rl": "ppo-0"}.get(stage_name, f"{stage_name}-0")
        assert (place / "model.safetensors").read_bytes() == (made / "model.safetensors").read_bytes(), stage_name


def test_samples_carry_their_own_log_probabilities(smoke):
    """log pi under the policy and log ref under SFT, recomputed from the text, and the gold reward of the text."""
    from rlhf_vs_dpo.language import models, text
    from rlhf_vs_dpo.language.forward import log_likelihoods, scores
    from rlhf_vs_dpo.language.logprobs import Policy
    from rlhf_vs_dpo.preferences import gold

    folder = smoke
    samples = tables.read_table(folder / "samples" / "dpo-0.parquet", "samples")
    samples = samples[samples["finished"] & samples["response"].str.strip().ne("")].reset_index(drop=True)
    prompts = tables.read_table(folder / "data" / "prompts.parquet", "prompts").set_index("prompt_id")
    asked = prompts.loc[samples["prompt_id"]].reset_index()
    assert len(samples) > 3
    for column, name in (("logp", "dpo-0"), ("reference_logp", "sft-0")):
        model, tokenizer = models.load_policy(folder / "models" / name)
        tokens = text.encode(tokenizer, asked["prompt"], samples["response"], samples["prompt_id"], 256)
        assert log_likelihoods(Policy(model, 1.0), tokens) == pytest.approx(samples[column].tolist(), abs=1e-3)
    assert scores(heads.load_scorer(folder / "models" / "reward-0"), tokens) == pytest.approx(
        samples["reward"].tolist(), abs=1e-3
    )
    judged = gold.columns(gold.load(folder / "data" / "world"), asked["prompt"], asked["facts"], samples["response"])
    assert judged["gold"].tolist() == pytest.approx(samples["gold"].tolist())


def test_the_annotator_prefers_what_is_worth_more(smoke):
    folder = smoke
    metrics = json.loads((folder / "metrics" / "stages" / "preferences-0.json").read_text())
    assert metrics["gold"]["chosen"] > metrics["gold"]["rejected"]
    assert metrics["annotator_agrees_with_gold"] > 0.5 and metrics["annotator_mean_p_chosen"] > 0.5


def test_reward_and_preference_learn_from_chosen_to_rejected(smoke, monkeypatch):
    """Pairs in which every chosen response is one sentence and every rejected another: both stages must see which is which."""
    folder = smoke
    out = folder / "by-hand" / "planted"
    out.mkdir(parents=True)
    pairs = pd.read_parquet(folder / "data" / "pairs-0.parquet").assign(
        chosen="i feel happy .", rejected="to be honest , we had a fight .", chosen_ids=None, rejected_ids=None
    )
    pairs.to_parquet(out / "pairs.parquet", index=False)
    monkeypatch.setattr(config, "read_params", lambda: planted)
    planted = YAML(typ="safe").load((folder / "params.yaml").read_text())
    planted["reward"]["training"] |= {"steps": 30, "learning_rate": 0.01}

    def ends(name: str) -> str:
        return f"--out={out}/{name} --metrics={out}/{name}.json --curves={out}/{name}.csv --run={out}/{name}-run.json"

    tables = "--sft=models/sft-0 --prompts=data/prompts.parquet --world=data/world " + f"--pairs={out}/pairs.parquet"
    reward = (
        f"{tables} --demonstrations=data/demonstrations.parquet --demonstration-scores={out}/s.parquet {ends('reward')}"
    )
    simpo = f"--method=simpo --seed=0 --reference=none {tables} --heldout={out}/h.parquet --pair-rewards={out}/p.parquet {ends('simpo')}"
    assert by_hand(folder, "reward", "--seed=0", *reward.split()) == 0
    assert by_hand(folder, "preference", *simpo.split()) == 0
    assert json.loads((out / "reward.json").read_text())["accuracy"] > 0.95
    curve = pd.read_csv(out / "simpo.csv")
    assert (curve["pairs/chosen_tokens"] == 5).all() and (curve["pairs/rejected_tokens"] == 10).all()
    assert curve["pairs/margin"].iloc[-1] > curve["pairs/margin"].iloc[0]


def test_models_are_plain_folders(smoke):
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

    folder = smoke
    for name in ("base", "sft-0", "ppo-0", "dpo-0"):
        model = AutoModelForCausalLM.from_pretrained(folder / "models" / name)
        tokenizer = AutoTokenizer.from_pretrained(folder / "models" / name)
        assert model.config.eos_token_id == tokenizer.eos_token_id != tokenizer.pad_token_id
    reward = AutoModelForSequenceClassification.from_pretrained(folder / "models" / "reward-0")
    assert reward.config.num_labels == 1 and reward.config.reward_shift != 0.0
    assert not list(folder.rglob("models/**/*.bin")) and not list(folder.rglob("models/**/*.pkl"))


def test_demonstrations_score_zero_on_average(smoke):
    """The normalisation that the reward stage stored is applied when the model is loaded."""
    from rlhf_vs_dpo.language import models, text
    from rlhf_vs_dpo.language.forward import scores

    folder = smoke
    scorer, (_, tokenizer) = (
        heads.load_scorer(folder / "models" / "reward-0"),
        models.load_policy(folder / "models" / "sft-0"),
    )
    rows = tables.read_table(folder / "data" / "demonstrations.parquet", "demonstrations", "train")
    examples = text.encode(tokenizer, rows["prompt"], rows["response"], rows["prompt_id"], 256)
    assert abs(sum(scores(scorer, examples)) / len(examples)) < 1e-5


def test_mlflow_has_a_row_for_each_policy_and_the_stages_apart(smoke):
    from mlflow.tracking import MlflowClient

    folder = smoke
    client = MlflowClient(tracking_uri=f"sqlite:///{folder}/mlflow.db")
    rows, others = (
        client.search_runs([client.get_experiment_by_name(name).experiment_id])
        for name in ("rlhf-vs-dpo", "rlhf-vs-dpo stages")
    )
    assert {entry.info.status for entry in [*rows, *others]} == {"FINISHED"}
    by_policy = {entry.info.run_name: entry for entry in rows}
    assert sorted(by_policy) == sorted(["sft-0", *(f"{p}-0" for p in POLICIES), "best_of_4-0"]) and len(
        by_policy
    ) == len(rows)
    assert len(rows) - 1 + len(others) == STAGES - 1  # best-of-n has a row and no stage, and `check` a stage and no run
    dpo = by_policy["dpo-0"]
    assert dpo.info.run_id == json.loads((folder / "runs" / "dpo-0.json").read_text())["run_id"]
    assert {
        "evaluation/preferred",
        "evaluation/utility",
        "evaluation/objective",
        "heldout/utility",
    } <= dpo.data.metrics.keys()
    assert {"evaluation/gold", "evaluation/kl", "heldout/gold", "heldout/reward", "loss"} <= dpo.data.metrics.keys()
    assert {
        "cost/total_flops",
        "cost/seconds",
        "cost/peak_memory_mib",
        "validation/preferred",
    } <= dpo.data.metrics.keys()
    given = config.read_params(smoke / "params.yaml")["preference"]
    beta = str(given["dpo"]["beta"])
    assert dpo.data.params["preference.dpo.beta"] == beta == dpo.data.params["method.beta"]
    assert dpo.data.params["method.batch"] == str(given["defaults"]["batch"])  # defaults included
    tags = {"family": "preference", "method": "dpo", "seed": "0", "dvc.stage": "preference@dpo-0", "profile": "smoke"}
    assert tags.items() <= dpo.data.tags.items()
    # The same names for all; the DPO family are reward models besides.
    measured = {
        name: {m for m in run.data.metrics if m.startswith("evaluation/")} - {"evaluation/pair_accuracy"}
        for name, run in by_policy.items()
        if name != "best_of_4-0"
    }
    assert all(names == measured["sft-0"] for names in measured.values())
    inputs = {(i.dataset.name, i.dataset.digest) for i in dpo.inputs.dataset_inputs}
    locked = lock(folder)
    assert ("pairs-0", locked["preferences@0"]["outs"][0]["md5"]) in inputs
    # What a method opened, and nothing that its neighbours in the matrix open.
    read = {policy: {i.dataset.name for i in row.inputs.dataset_inputs} for policy, row in by_policy.items()}
    assert read["dpo-0"] == {"pairs-0", "prompts", "reference-0"} and read["simpo-0"] == {"pairs-0", "prompts"}
    assert read["ppo_ptx-0"] - read["ppo-0"] == {"corpus"} and read["ppo-0"] == {"prompts", "demonstrations"}
    assert read["control_tokens-0"] == {"prompts", "pairs-0"} and read["rm_filtered-0"] == {"prompts", "pool-0"}
    assert read["best_of_4-0"] == {"pool-0"}
    again = by_policy["expert_iteration-0"].data.tags
    assert again["dvc.dep.models/reward-0"] in {
        out["md5"] for out in locked["reward@0"]["outs"] if out["path"] == "models/reward-0"
    }
    assert "dvc.dep.models/reward-0" not in by_policy["rm_filtered-0"].data.tags
    tables = [a.path for a in client.list_artifacts(dpo.info.run_id)]
    assert [path for path in tables if path.startswith("samples-")]
    by_stage = {entry.data.tags["dvc.stage"]: entry for entry in others}
    assert [a.path for a in client.list_artifacts(by_stage["report"].info.run_id)]


def test_policies_are_registered_once_and_the_best_on_validation_is_named(smoke):
    from mlflow.tracking import MlflowClient

    folder = smoke
    client = MlflowClient(tracking_uri=f"sqlite:///{folder}/mlflow.db")
    run(folder, "dvc", "repro", "--single-item", "--force", "--no-run-cache", "evaluate")  # a second time adds none
    ppo = client.get_run(json.loads((folder / "runs" / "ppo-0.json").read_text())["run_id"])
    for metric in ("evaluation/gold", "heldout/reward", "heldout/gold", "rollout/score"):
        steps = [point.step for point in client.get_metric_history(ppo.info.run_id, metric)]
        assert steps and len(set(steps)) == len(steps), metric
    assert not {"step", "rollout_score", "heldout_gold"} & ppo.data.metrics.keys()
    versions = client.search_model_versions("name = 'rlhf-vs-dpo-policy'")
    assert sorted(v.tags["policy"] for v in versions) == sorted(["sft-0", *(f"{p}-0" for p in POLICIES)])
    locked = lock(folder)
    weights = {
        out["path"]: out["md5"]
        for stage in locked.values()
        for out in stage["outs"]
        if out["path"].startswith("models/")
    }
    assert all(weights[v.tags["dvc.path"]] == v.tags["dvc.md5"] for v in versions)
    judged = results(folder)["validation"]
    best = client.get_model_version_by_alias("rlhf-vs-dpo-policy", "best")
    assert judged[best.tags["policy"]] == max(judged.values())
    experiment = client.get_experiment_by_name("rlhf-vs-dpo")
    view = json.loads(experiment.tags["mlflow.sharedViewState.comparison"])
    assert {"metrics.`evaluation/gold`", "metrics.`evaluation/preferred`"} <= set(view["selectedColumns"])
    assert view["orderByKey"] == "metrics.`evaluation/preferred`"
    told = run(folder, sys.executable, "-m", "rlhf_vs_dpo.run.store")
    assert told.strip().endswith(f"/#/experiments/{experiment.experiment_id}/runs?viewStateShareKey=comparison")


def test_every_stage_says_what_it_cost(smoke):
    folder = smoke
    for path in (folder / "runs").glob("*.json"):
        spent = json.loads(path.read_text())
        assert {
            "run_id",
            "seconds",
            "device",
            "arithmetic",
            "peak_memory_mib",
            "parameters",
            "models_held",
        } <= spent.keys(), path
        assert spent["peak_memory_mib"] > 100 and spent["parameters"] > 1000
    ppo, dpo, simpo = (json.loads((folder / "runs" / f"{p}-0.json").read_text()) for p in ("ppo", "dpo", "simpo"))
    assert (ppo["models_held"], dpo["models_held"], simpo["models_held"]) == (4, 1, 1)
    costs = results(folder)["cost"]
    assert costs["dpo"]["needs"] == ["preferences", "reference"] and costs["simpo"]["needs"] == ["preferences"]
    assert costs["dpo"]["total"]["flops"] == pytest.approx(
        costs["simpo"]["total"]["flops"]
        + 2 * dpo["parameters"] * json.loads((folder / "runs" / "reference-0.json").read_text())["tokens_read"],
        rel=1e-4,
    )


def test_the_report_shows_figures_texts_and_cost(smoke):
    folder = smoke
    report = (folder / "report" / "report.md").read_text()
    for needle in ("| ppo_ptx", "## The same prompt", "## What it cost", "tokens generated", "(coverage +"):
        assert needle in report
    figures = {path.name for path in (folder / "report" / "figures").glob("*.png")}
    assert {"comparison.png", "training.png", "frontier.png", "overoptimisation.png"} <= figures
    assert all(name in report for name in figures)
    page = (folder / "report" / "index.html").read_text()
    locked = lock(folder)
    md5 = next(out["md5"] for out in locked["preference@dpo-0"]["outs"] if out["path"] == "models/dpo-0")
    run_id = json.loads((folder / "runs" / "dpo-0.json").read_text())["run_id"]
    took = (folder / "report" / "run.html").read_text()
    assert md5 in page and "preference@dpo-0" in page and run_id not in page and f"/runs/{run_id}" in took
    table = run(folder, sys.executable, "-m", "rlhf_vs_dpo.report", "evaluation/results.json")
    assert table.splitlines()[0].startswith("| policy") and "win vs SFT" in table


def test_dvc_shows_a_row_of_metrics_per_policy_and_draws_plots(smoke):
    folder = smoke
    shown = run(folder, "dvc", "metrics", "show", "--md")
    rows = [line for line in shown.splitlines() if line.startswith("| metrics/")]
    assert len(rows) == len(POLICIES) + 3 and "metrics/policies/control_tokens_BAD.json" in shown
    assert shown.splitlines()[0].count("|") < 20
    drawn = run(folder, "dvc", "plots", "show", "-o", "drawn")
    assert "failed" not in drawn.lower()
    page = (folder / "drawn" / "index.html").read_text()
    assert page.count("vegaEmbed(") >= 5 and "What each policy is worth" in page
    import vl_convert

    specs = re.findall(r"var spec = (\{.*?\});\s*\n\s*vegaEmbed", page, re.DOTALL)
    own = [s for s in map(json.loads, specs) if s and {"policy", "n"} & s["data"]["values"][0].keys()]
    assert len(own) == 4
    for spec in own:
        picture = vl_convert.vegalite_to_svg(json.dumps(spec))  # raises where a template does not compile
        assert picture.count("<path") > 20 and "undefined" not in picture


@pytest.mark.slow
def test_a_stage_gives_the_same_bytes_twice(smoke):
    folder = smoke

    def digest():
        files = [
            path for name in ("reward-0", "ppo-0", "dpo-0") for path in sorted((folder / "models" / name).iterdir())
        ]
        return [hashlib.md5(path.read_bytes()).hexdigest() for path in [*files, folder / "data" / "pairs-0.parquet"]]

    before = digest()  # of stages in one process; now each in a process of its own, as DVC starts them
    run(
        folder,
        "dvc",
        "repro",
        "--single-item",
        "--force",
        "--no-run-cache",
        "preferences@0",
        "reward@0",
        "rl@ppo-0",
        "preference@dpo-0",
    )
    assert digest() == before
    run(folder, "dvc", "repro", "report")


ASKED = {
    "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "OMP_THREAD_LIMIT": "1", "PYTHONHASHSEED": "9",
    "ATEN_CPU_CAPABILITY": "default", "MKL_CBWR": "COMPATIBLE", "OPENBLAS_CORETYPE": "Nehalem",
}  # fmt: skip


def test_what_the_environment_asks_for_moves_no_byte(smoke):
    """Other threads, other instruction sets, one visible core; and with RLHF_NATIVE, which lets them through, the bytes differ."""

    def weights(name: str, **env: str) -> bytes:
        on_one_core = ["taskset", "-c", str(min(os.sched_getaffinity(0)))] if shutil.which("taskset") else []
        options = preference("dpo", "data/reference-0.parquet", f"by-hand/{name}")
        asked = ASKED | {"PYTHONPATH": "src", "MLFLOW_TRACKING_URI": f"sqlite:///{smoke}/by-hand.db"}
        run(smoke, *on_one_core, sys.executable, "stages/preference.py", *options, **asked, **env)
        return (smoke / "by-hand" / name / "model" / "model.safetensors").read_bytes()

    made = (smoke / "models" / "dpo-0" / "model.safetensors").read_bytes()
    assert weights("asked") == made
    assert weights("native", RLHF_NATIVE="1") != made
    assert json.loads((smoke / "by-hand" / "native" / "r.json").read_text())["arithmetic"].startswith("native")


def test_a_changed_number_and_a_new_variant_make_their_cells_and_the_tail_stale_only(smoke):
    before = (smoke / "params.yaml").read_text()
    change(smoke, "preference.dpo.beta", 0.2)
    change(smoke, "preference.dpo_b05", {"loss": "dpo", "beta": 0.5})
    change(smoke, "policies.preference", ["dpo", "simpo", "dpo_online", "dpo_b05"])
    with inside(smoke, **ENV):
        assert cells.checked() == 0
        stale = planned()
        (smoke / "params.yaml").write_text(before)
        assert cells.checked() == 0 and not planned()
    ours = {f"{stage}@{method}-0" for method in ("dpo", "dpo_b05") for stage in ("preference", "sample_preference")}
    assert stale == ours | set(TAIL)


@pytest.mark.slow
def test_a_changed_number_and_a_new_variant_run_their_cells_and_the_tail_only(smoke, request):
    before = (smoke / "params.yaml").read_text()
    request.addfinalizer(lambda: (smoke / "params.yaml").write_text(before))
    change(smoke, "preference.dpo.beta", 0.2)
    change(smoke, "preference.dpo_b05", {"loss": "dpo", "beta": 0.5})
    change(smoke, "policies.preference", ["dpo", "simpo", "dpo_online", "dpo_b05"])
    again = ran(run(smoke, "dvc", "repro"))
    ours = [f"{stage}@{method}-0" for method in ("dpo", "dpo_b05") for stage in ("preference", "sample_preference")]
    assert sorted(again) == sorted(["check", *ours, *TAIL]) and again[0] == "check" and again[-3:] == TAIL
    assert "dpo_b05" in results(smoke)["methods"]
    (smoke / "params.yaml").write_text(before)
    assert not [stage for stage in ran(run(smoke, "dvc", "repro", "sample_preference@dpo-0")) if stage != "check"]


def test_a_colleague_pulls_what_was_pushed_and_runs_nothing(smoke, tmp_path):
    """What git does not hold goes through a DVC remote, here a folder; in a fresh clone nothing is left to do."""
    origin, clone, store = tmp_path / "origin", tmp_path / "clone", tmp_path / "store"
    shutil.copytree(smoke, origin, ignore=shutil.ignore_patterns("by-hand", "mlflow.db*", "mlartifacts"))
    run(origin, "dvc", "remote", "add", "--local", "--default", "store", str(store))
    run(origin, "dvc", "push")
    git = ("git", "-c", "user.name=a", "-c", "user.email=a@b")
    run(origin, *git, "init", "-q")
    run(origin, *git, "add", "-A")
    run(origin, *git, "commit", "-q", "-m", "x")
    run(tmp_path, *git, "clone", "-q", str(origin), str(clone))
    assert not (clone / "models").exists() and not (clone / ".dvc" / "cache").exists()
    run(clone, "dvc", "remote", "add", "--local", "--default", "store", str(store))
    run(clone, "dvc", "pull")
    assert "Everything is up to date" in run(
        clone, sys.executable, "-m", "rlhf_vs_dpo.run.cells", PYTHONPATH=str(clone / "src")
    )
    assert (clone / "models" / "ppo-0" / "model.safetensors").read_bytes() == (
        smoke / "models" / "ppo-0" / "model.safetensors"
    ).read_bytes()


def test_editing_the_evaluation_retrains_nothing(smoke, request):
    path = smoke / "src" / "rlhf_vs_dpo" / "evaluation" / "statistics.py"
    before = path.read_text()
    request.addfinalizer(lambda: path.write_text(before))
    path.write_text(before + "\n# edited\n")
    stale = json.loads(run(smoke, "dvc", "status", "--json"))
    assert set(stale) <= set(TAIL)  # the test before left a variant for all of it
    assert "src/rlhf_vs_dpo/evaluation" in stale["evaluate"][0]["changed deps"]


def preference(method: str, reference: str, out: str) -> list[str]:
    """Options of a preference stage that is started by hand."""
    return (
        f"--method={method} --seed=0 --sft=models/sft-0 --pairs=data/pairs-0.parquet --reference={reference} --prompts=data/prompts.parquet "
        f"--world=data/world --out={out}/model --heldout={out}/h.parquet --pair-rewards={out}/p.parquet --metrics={out}/m.json "
        f"--curves={out}/c.csv --run={out}/r.json"
    ).split()


def test_simpo_reads_no_reference(smoke, capfd):
    assert by_hand(smoke, "preference", *preference("simpo", "data/none.parquet", "by-hand/simpo")) == 0
    assert by_hand(smoke, "preference", *preference("dpo", "data/none.parquet", "by-hand/dpo")) == 1
    assert "none.parquet: no such file" in capfd.readouterr().err
    assert not (smoke / "by-hand" / "dpo").exists()


def same_policy(folder: Path, one: str, two: str) -> None:
    """Two runs of a method that did the same work: what is left between them is rounding."""
    from safetensors.torch import load_file

    first, second = (load_file(folder / "by-hand" / name / "model" / "model.safetensors") for name in (one, two))
    start = load_file(folder / "models" / "sft-0" / "model.safetensors")
    moved = max(float((first[key] - start[key]).abs().max()) for key in first)
    apart = max(float((first[key] - second[key]).abs().max()) for key in first)
    assert moved > 0 and apart < 0.02 * moved


def two_processes(folder: Path, stage: str, options: list[str]) -> None:
    """The stage as torchrun starts it, on two processes."""
    store = f"sqlite:///{folder}/by-hand.db"
    run(
        folder,
        sys.executable,
        f"stages/{stage}.py",
        *options,
        PYTHONPATH="src",
        RLHF_PROCESSES="2",
        MLFLOW_TRACKING_URI=store,
    )


@pytest.mark.slow
@pytest.mark.parametrize("sharding", [False, True])
def test_two_processes_train_the_same_policy(smoke, sharding, request):
    before = (smoke / "params.yaml").read_text()
    request.addfinalizer(lambda: (smoke / "params.yaml").write_text(before))
    change(smoke, "memory.sharding", sharding)
    one, two = f"one-{sharding}", f"two-{sharding}"
    assert by_hand(smoke, "preference", *preference("dpo", "data/reference-0.parquet", f"by-hand/{one}")) == 0
    two_processes(smoke, "preference", preference("dpo", "data/reference-0.parquet", f"by-hand/{two}"))
    same_policy(smoke, one, two)


@pytest.mark.parametrize(
    ("method", "sharding"),
    [
        ("ppo_ptx", False),
        *(pytest.param(*of, marks=pytest.mark.slow) for of in (("trpo", False), ("rloo", False), ("ppo_ptx", True))),
    ],
)
def test_two_processes_reinforce_the_same_policy(smoke, method, sharding, request):
    """With two minibatches: episodes, groups, whitening, minibatches, Fisher products and line search are global."""
    before = (smoke / "params.yaml").read_text()
    request.addfinalizer(lambda: (smoke / "params.yaml").write_text(before))
    change(smoke, "rl.defaults.minibatches", 2)
    change(smoke, "memory.sharding", sharding)

    def options(out: str) -> list[str]:
        return (
            f"--method={method} --seed=0 --sft=models/sft-0 --reward=models/reward-0 --prompts=data/prompts.parquet "
            "--demonstrations=data/demonstrations.parquet --corpus=data/corpus.parquet --world=data/world "
            f"--out={out}/model --heldout={out}/h.parquet --metrics={out}/m.json --curves={out}/c.csv --run={out}/r.json"
        ).split()

    one, two = f"{method}-1-{sharding}", f"{method}-2-{sharding}"
    assert by_hand(smoke, "rl", *options(f"by-hand/{one}")) == 0
    two_processes(smoke, "rl", options(f"by-hand/{two}"))
    same_policy(smoke, one, two)


# ---- bad input, through the command a user types -----------------------------------------------------------------------


@pytest.fixture
def broken(smoke, tmp_path):
    """A throw-away copy of the reproduced smoke project, real files in place of links."""
    folder = tmp_path / "project"
    shutil.copytree(smoke, folder, ignore=shutil.ignore_patterns("mlartifacts", "by-hand"))
    for name in ("models/ppo-0", "models/dpo-0"):  # outputs, which DVC removes before a stage runs
        shutil.rmtree(folder / name)
    for name in ("runs/dpo-0.json",):
        (folder / name).unlink()
    (folder / "copied").touch()
    yield folder
    shutil.rmtree(folder, ignore_errors=True)


def made(path: Path) -> Path | None:
    """The output of a stage, or what it left of one, if it is newer than the project's copy."""
    left = [path, *path.parent.glob(f".{path.name}.*.tmp")]
    return next(
        (p for p in left if p.exists() and p.stat().st_mtime > (path.parents[1] / "copied").stat().st_mtime), None
    )


def rewrite(path: Path, content: bytes) -> None:
    path.unlink()
    path.write_bytes(content)


def test_a_misspelt_key_is_refused_before_anything_is_touched(broken):
    """Under plain `dvc repro`, whichever stage the key belongs to: DVC removes a stage's outputs before the stage could refuse."""
    before = {path: path.stat().st_mtime_ns for path in (broken / "models" / "sft-0").iterdir()}
    change(broken, "sft.training.lr", 1.0)
    change(broken, "sft.training.learning_rate", 2.0e-3)
    for command in (["dvc", "repro"], ["dvc", "repro", "sft@0"], [sys.executable, "-m", "rlhf_vs_dpo.run.cells"]):
        output = run(broken, *command, expect=None)
        assert (
            "unknown key `sft.training.lr`" in output
            and "Traceback" not in output
            and "Running stage 'sft" not in output
        )
    assert {path: path.stat().st_mtime_ns for path in (broken / "models" / "sft-0").iterdir()} == before
    output = run(broken, "dvc", "repro", "--single-item", "--force", "--no-run-cache", "data", expect=255)
    assert "unknown key `sft.training.lr`" in output and "Traceback" not in output


def test_a_file_that_is_not_there_is_refused_before_anything_is_touched(broken):
    change(broken, "data.source", "files")
    change(broken, "data.files.preferences", "data/own/mien.jsonl")
    change(broken, "preferences.source", "dataset")
    change(broken, "policies", {"rl": ["ppo"], "preference": ["dpo"], "imitation": [], "best_of_n": []})
    before = (broken / "data" / "corpus.parquet").read_bytes()
    for command in (["dvc", "repro"], [sys.executable, "-m", "rlhf_vs_dpo.run.cells"]):
        output = run(broken, *command, expect=None)
        assert "data/own/mien.jsonl: no such file; `data.files.preferences`" in output and "Traceback" not in output
    assert (broken / "data" / "corpus.parquet").read_bytes() == before


def test_sft_learns_the_models_own_likelihood_whatever_the_sampling_temperature(smoke, request):
    before = (smoke / "params.yaml").read_text()
    request.addfinalizer(lambda: (smoke / "params.yaml").write_text(before))
    made = (smoke / "models" / "sft-0" / "model.safetensors").read_bytes()
    change(smoke, "sampling.temperature", 0.5)
    out = "by-hand/sft-cold"
    options = (
        f"--seed=0 --base=models/base --demonstrations=data/demonstrations.parquet --out={out}/model --metrics={out}/m.json "
        f"--curves={out}/c.csv --run={out}/r.json"
    ).split()
    assert by_hand(smoke, "sft", *options) == 0
    assert (smoke / out / "model" / "model.safetensors").read_bytes() == made
    told = json.loads((smoke / out / "model" / "generation_config.json").read_text())
    assert told["temperature"] == 0.5 and told["do_sample"]


def test_truncated_model_folder(broken):
    weights = broken / "models" / "sft-0" / "model.safetensors"
    rewrite(weights, weights.read_bytes()[:1000])
    fails(broken, "reference@0", "models/sft-0", "corrupt, truncated", "dvc repro")
    assert made(broken / "data" / "reference-0.parquet") is None


def test_model_folder_without_config(broken):
    (broken / "models" / "sft-0" / "config.json").unlink()
    fails(broken, "reference@0", "models/sft-0", "cannot be loaded")


def test_reward_folder_without_normalisation(broken):
    path = broken / "models" / "reward-0" / "config.json"
    settings = json.loads(path.read_text())
    del settings["reward_shift"]
    rewrite(path, json.dumps(settings).encode())
    fails(broken, "rl@ppo-0", "models/reward-0", "reward_shift")
    assert made(broken / "models" / "ppo-0") is None


def test_prompt_longer_than_the_context(broken):
    path = broken / "data" / "prompts.parquet"
    prompts = pd.read_parquet(path)
    prompts.loc[0, "prompt"] = "the cat " * 200
    rewrite(path, b"")
    prompts.to_parquet(path)
    fails(broken, "preferences@0", prompts.loc[0, "prompt_id"], "longer than the model's context of 256 tokens")
    assert made(broken / "data" / "pairs-0.parquet") is None


def test_pairs_that_break_their_contract(broken):
    path = broken / "data" / "pairs-0.parquet"
    pairs = pd.read_parquet(path)
    pairs.loc[1, "rejected"] = pairs.loc[1, "chosen"]
    rewrite(path, b"")
    pairs.to_parquet(path)
    fails(broken, "reward@0", "data/pairs-0.parquet", "row 1", "chosen equals rejected")


def test_a_diverging_run_saves_nothing(broken):
    change(broken, "preference.dpo.learning_rate", 1.0e38)
    fails(broken, "preference@dpo-0", "learning rate", "batch: pair-")
    assert made(broken / "models" / "dpo-0") is None and made(broken / "runs" / "dpo-0.json") is None


# ---- sweeps ---------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_queued_sweep_is_shown_by_dvc_and_grouped_by_mlflow(tmp_path):
    """Three values of beta: one of them has run already, and runs nothing more."""
    from mlflow.tracking import MlflowClient

    folder = copy_project(tmp_path / "project", "smoke")
    change(folder, "policies", {"rl": ["ppo"], "preference": ["dpo"], "imitation": [], "best_of_n": []})
    change(folder, "preference.dpo.beta", 0.1)
    (folder / ".dvc" / "config.local").unlink()
    for command in (
        ["init", "-q"],
        ["add", "-A"],
        ["-c", "user.name=t", "-c", "user.email=t@t", "commit", "-qm", "start"],
    ):
        run(folder, "git", *command)
    run(folder, "dvc", "repro", "report")
    run(folder, "git", "add", "-A")
    run(folder, "git", "-c", "user.name=t", "-c", "user.email=t@t", "commit", "-qm", "run")
    run(folder, "dvc", "exp", "run", "--queue", "-S", "preference.dpo.beta=0.05,0.1,0.5")
    run(folder, "dvc", "exp", "run", "--run-all")
    shown = pd.read_csv(io.StringIO(run(folder, "dvc", "exp", "show", "--csv", "--only-changed").split("\n", 0)[0]))
    tried = shown[shown["rev"] != "workspace"]["preference.dpo.beta"].astype(float)
    assert {0.05, 0.1, 0.5} <= set(tried)
    gold = [column for column in shown if column.endswith("dpo.json:gold") or column == "gold"]
    assert gold or any("gold" in column for column in shown), list(shown)
    client = MlflowClient(tracking_uri=f"sqlite:///{folder}/mlflow.db")
    runs = client.search_runs([client.get_experiment_by_name("rlhf-vs-dpo").experiment_id], "tags.method = 'dpo'")
    grouped = {entry.data.params["method.beta"]: entry.data.tags.get("dvc.exps", "") for entry in runs}
    assert set(grouped) == {"0.05", "0.1", "0.5"} and grouped["0.05"] and grouped["0.5"]
    assert grouped["0.05"] != grouped["0.5"]
    assert not (folder / ".dvc" / "tmp" / "exps" / "mlflow.db").exists()  # the store is the repository's own


@pytest.mark.slow
def test_two_workers_of_a_queue_beside_a_repro(tmp_path):
    """All finish, each with its own weights, and no file of the cache is another than its name says."""
    import subprocess
    import time

    folder = copy_project(tmp_path / "project", "smoke")
    change(folder, "policies", {"rl": [], "preference": ["dpo", "simpo"], "imitation": [], "best_of_n": [4]})
    (folder / ".dvc" / "config.local").unlink()
    git = ("git", "-c", "user.name=t", "-c", "user.email=t@t")
    for command in (["init", "-q"], ["add", "-A"], ["commit", "-qm", "start"]):
        run(folder, *git, *command)
    run(folder, "dvc", "repro", "report")
    run(folder, "git", "add", "-A")
    run(folder, *git, "commit", "-qm", "run")
    betas = ["0.05", "0.2", "0.5", "0.8"]
    run(folder, "dvc", "exp", "run", "--queue", "-S", f"preference.dpo.beta={','.join(betas)}")
    change(folder, "preference.simpo.beta", 3.0)
    run(folder, "dvc", "queue", "start", "--jobs", "2")
    beside = subprocess.run(
        ["dvc", "--wait-for-lock", "repro", "report"], cwd=folder, env=ENV, capture_output=True, text=True, check=False
    )
    assert beside.returncode == 0, beside.stdout + beside.stderr
    for _ in range(600):
        status = run(folder, "dvc", "queue", "status")
        if "Running" not in status and "Queued" not in status:
            break
        time.sleep(2)
    assert status.count("Success") == len(betas), status
    said = subprocess.run(
        ["dvc", "exp", "show", "--json"], cwd=folder, env=ENV, capture_output=True, text=True, check=True
    )
    shown = json.loads(said.stdout)
    weights = {}
    for commit in shown:
        for experiment in commit.get("experiments") or []:
            for revision in experiment["revs"]:
                data = revision["data"]
                beta = data["params"]["params.yaml"]["data"]["preference"]["dpo"].get("beta")
                weights[beta] = data["outs"]["models/dpo-0"]["hash"]
    assert len(weights) == len(betas) == len(set(weights.values())), weights
    for file in (folder / ".dvc" / "cache" / "files" / "md5").rglob("*"):
        if file.is_file() and file.suffix != ".dir":
            assert hashlib.md5(file.read_bytes()).hexdigest() == file.parent.name + file.name
    for name in ("journal", "checkpoints"):
        assert not list((folder / ".dvc" / "tmp" / "rlhf" / name).rglob("state.json"))
