"""params.yaml: no default outside it, and an error for every wrong key that names it."""

import copy

import pytest
from conftest import ROOT

from rlhf_vs_dpo import config
from rlhf_vs_dpo.errors import ParamsError


@pytest.fixture
def params():
    return copy.deepcopy(config.read_params(ROOT / "profiles" / "default.yaml"))


def put(params, path, value):
    *parents, key = path.split(".")
    for parent in parents:
        params = params[parent]
    params[key] = value


def test_the_working_params_validate():
    config.check(config.read_params(ROOT / "params.yaml"))


def test_sections_equal_the_models_both_ways(params):
    assert params.keys() == config.SECTIONS.keys()

    def compare(kind, values, place):
        if isinstance(kind, type) and issubclass(kind, config.Section):
            assert kind.model_fields.keys() == values.keys(), place
            for name, info in kind.model_fields.items():
                compare(info.annotation, values[name], f"{place}.{name}")

    for name, kind in config.SECTIONS.items():
        if name not in config.FAMILIES:
            compare(kind, params[name], name)
    for family, kind in config.FAMILIES.items():  # what an entry and the defaults hold together is what its model knows
        for method in params[family].keys() - {"defaults"}:
            entry = params[family][method]
            known = config._kinds(family)[entry[kind]].model_fields.keys()
            assert known == {*entry, *(params[family]["defaults"].keys() & known)}, f"{family}.{method}"
        everything = set().union(*(kind.model_fields for kind in config._kinds(family).values()))
        assert params[family]["defaults"].keys() <= everything, family


def test_no_number_hides_in_the_code():
    """A default in config.py would be a parameter that DVC cannot see."""
    for kind in vars(config).values():
        if isinstance(kind, type) and issubclass(kind, config.Section):
            assert all(info.is_required() for info in kind.model_fields.values()), kind


def test_a_new_variant_is_one_entry(params):
    params["preference"]["dpo_b05"] = {"loss": "dpo", "beta": 0.5}
    params["policies"]["preference"].append("dpo_b05")
    config.check(params)
    variant = config.section(params, "preference", "dpo_b05")
    assert (variant.beta, variant.batch) == (0.5, params["preference"]["defaults"]["batch"])
    assert config.folders(config.section(params, "policies"), [0])["dpo_b05"] == ["dpo_b05-0"]


def test_folders_and_families_of_methods():
    policies = config.Policies(rl=["ppo"], preference=["dpo"], imitation=[], best_of_n=[4])
    assert config.folders(policies, [3]) == {"sft": ["sft-3"], "ppo": ["ppo-3"], "dpo": ["dpo-3"]}
    assert config.folders(policies, [0, 1])["dpo"] == ["dpo-0", "dpo-1"]
    assert config.families(policies) == {"sft": "sft", "ppo": "rl", "dpo": "preference"}


@pytest.mark.parametrize(
    "path, value, message",
    [
        ("prefernce", {}, "unknown key `prefernce`"),
        ("sft.training.lr", 0.1, "unknown key `sft.training.lr`"),
        ("preference.dpo.bta", 0.1, "unknown key `preference.dpo.bta`"),
        ("preference.dpo.loss", "dop", "`preference.dpo.loss` is 'dop', which is no known loss"),
        ("data.source", "reddit", "`data.source` is 'reddit'"),
        ("preference.dpo.beta", -0.1, "`preference.dpo.beta` is -0.1"),
        ("preference.dpo.beta", "1e-5", "`preference.dpo.beta` is '1e-5'"),
        ("sampling.temperature", 0.0, "`sampling.temperature` is 0.0"),
        ("reward.training.batch", 0, "`reward.training.batch` is 0"),
        ("reward.training.batch", 1.5, "`reward.training.batch` is 1.5"),
        ("seeds", [], "`seeds`"),
        ("seeds", [2**32], "`seeds"),
        ("sample.prompts", 1, "`sample.prompts` is 1"),
        ("monitor.prompts", 1, "`monitor.prompts` is 1"),
        ("pool.validation_prompts", 1, "`pool.validation_prompts` is 1"),
        ("data.mini_tldr.test", 1, "`data.mini_tldr.test` is 1"),
        ("tuning.spaces", {}, "`tuning.spaces`"),
        ("evaluate.settings_of", {"dpo_family": ["dpo", "ipo"]}, "`evaluate.settings_of` is for 'dpo_family'"),
        ("rl.defaults.minibatches", 3, "episodes (128) must be a multiple of minibatches (3)"),
        ("policies.preference", ["dpo", "orpo"], "lists 'orpo', but there is no `preference.orpo`"),
        ("policies.preference", ["dpo", "dpo"], "lists a method twice"),
        ("rl.ppo", 3, "`rl.ppo` is 3; a method is a map of keys"),
        ("rl.defaults.value_warmup", 60, "value_warmup (60) must be below iterations (60)"),
        ("policies.preference", ["sft"], "that name is taken"),
        ("policies.imitation", ["dpo"], "there is no `imitation.dpo`"),
        ("policies.best_of_n", [16, 16], "`policies.best_of_n` lists a number twice"),
        ("policies.best_of_n", [64], "more than `pool.test_samples` (32)"),
        ("imitation.best_of_n.n", 32, "`imitation.best_of_n.n` (32) is more than `pool.train_samples` (16)"),
        ("imitation.chosen_sft.rounds", 2, "`imitation.chosen_sft.rounds` is 2"),
        ("imitation.chosen_sft.recipe", "sft", "is 'sft', which is no known recipe"),
        ("rl.trpo.algorithm", "trpoo", "`rl.trpo.algorithm` is 'trpoo', which is no known algorithm"),
        ("rl.trpo.clip", 0.2, "unknown key `rl.trpo.clip`"),
        ("rl.defaults.clap", 0.2, "unknown key `rl.defaults.clap`"),
        ("rl.rloo.samples_per_prompt", 1, "samples_per_prompt must be at least 2"),
        ("rl.rloo.samples_per_prompt", 3, "episodes (128) must be a multiple of samples_per_prompt (3)"),
        ("preference.cdpo.label_smoothing", 0.5, "`preference.cdpo.label_smoothing` is 0.5"),
        ("policies", {"rl": [], "preference": [], "imitation": [], "best_of_n": [2]}, "there is nothing to compare"),
        ("pool.deep_prompts", 501, "deep_prompts <= test_prompts"),
        ("policies", [], "`policies` is []"),
        ("seeds", [0, 0], "`seeds` holds a seed twice"),
        ("seed", "0", "`seed` is '0'"),
        ("sft.training.learning_rate", float("inf"), "`sft.training.learning_rate` is inf"),
        ("data.imdb.prompt_words", [8, 2], "prompt_words must be the least and the most"),
        ("data.files.splits", {"validation": 0.6, "test": 0.6, "limit": None}, "leave something for train"),
        ("base.scratch.heads", 9, "must be an even multiple of heads"),
        ("data.source", "files", "`data.files.preferences` names none"),
        ("preferences.source", "dataset", "which needs `preferences.source: annotator`"),
        ("report.examples", 501, "`report.examples` is more than `sample.prompts`"),
        ("sampling.max_new_tokens", 256, "leaves no room for a prompt"),
        ("data.mini_tldr.flaws.omit", 1.5, "`data.mini_tldr.flaws.omit` is 1.5"),
        (
            "judging.judges.rm.kind",
            "reward",
            "`judging.judges.rm.kind` is 'reward', which is no known kind ('gold', 'reward_model'",
        ),
        ("judging.judges.rm", {"model": "x"}, "missing key `judging.judges.rm.kind`; it is one of gold, reward_model"),
        ("judging.judges.rm", {"kind": "reward_model"}, "missing key `judging.judges.rm.batch`"),
        ("judging.judges.gold.loud", True, "unknown key `judging.judges.gold.loud`"),
        ("preference.dpo.loss", "dop", "`preference.dpo.loss` is 'dop', which is no known loss"),
        ("preference.dpo.bta", 1.0, "unknown key `preference.dpo.bta`"),
    ],
)
def test_wrong_keys_are_named(params, path, value, message):
    put(params, path, value)
    with pytest.raises(ParamsError) as error:
        config.check(params)
    assert message in str(error.value)


@pytest.mark.parametrize(
    "path",
    [
        "seed",
        "rl.defaults.clip",
        "preference.dpo.beta",
        "preference.simpo.gamma",
        "base.scratch.width",
        "preference.dpo.loss",
        "preference.ipo.tau",
        "rl.ppo.algorithm",
        "rl.trpo.max_kl",
        "imitation.best_of_n.n",
        "theory.episodes",
    ],
)
def test_missing_keys_are_named(params, path):
    *parents, key = path.split(".")
    target = params
    for parent in parents:
        target = target[parent]
    del target[key]
    with pytest.raises(ParamsError, match="missing key"):
        config.check(params)
    try:
        config.check(params)
    except ParamsError as error:
        assert key in str(error)


@pytest.mark.parametrize("whole", [[], "text", 3])
def test_params_that_are_no_map(whole):
    with pytest.raises(ParamsError, match="must be a map of sections"):
        config.check(whole)


def test_all_faults_are_reported_together(params):
    put(params, "sft.training.lr", 1)
    put(params, "sample.per_prompt", 0)
    with pytest.raises(ParamsError) as error:
        config.check(params)
    assert "sft.training.lr" in str(error.value) and "sample.per_prompt" in str(error.value)


def test_yaml_is_read_as_dvc_reads_it(tmp_path):
    (tmp_path / "p.yaml").write_text("a: 1e-5\n")
    assert config.read_params(tmp_path / "p.yaml") == {"a": 1e-5}
    (tmp_path / "p.yaml").write_text("a: [1\n")
    with pytest.raises(ParamsError, match="not valid YAML"):
        config.read_params(tmp_path / "p.yaml")
    with pytest.raises(ParamsError, match="no such file"):
        config.read_params(tmp_path / "q.yaml")


def test_online_pairs_need_somebody_to_choose(params):
    put(params, "data.source", "files")
    put(params, "data.files.preferences", "x.jsonl")
    put(params, "preferences.source", "dataset")
    with pytest.raises(
        ParamsError, match=r"`preference.dpo_online.rounds` above 1 needs `preferences.source: annotator`"
    ):
        config.check(params)
