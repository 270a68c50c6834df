"""Profiles: each one applies, shows what it changes, and refuses what it does not know."""

import shutil

import pytest
import typer
from conftest import ROOT
from ruamel.yaml import YAML
from typer.testing import CliRunner

from rlhf_vs_dpo import config
from rlhf_vs_dpo.run import profiles

app = typer.Typer()
app.command()(profiles.main)
PROFILES = sorted(path.stem for path in (ROOT / "profiles").glob("*.yaml") if path.stem != "default")


def apply(name, params, folder=ROOT / "profiles"):
    return CliRunner().invoke(app, [name, "--params", str(params), "--profiles", str(folder)])


@pytest.fixture
def params(tmp_path):
    path = tmp_path / "params.yaml"
    path.write_text((ROOT / "profiles" / "default.yaml").read_text())
    return path


@pytest.mark.parametrize("name", PROFILES)
def test_every_profile_applies_and_goes_back(name, params):
    default = params.read_text()
    result = apply(name, params)
    assert result.exit_code == 0, result.output
    config.check(config.read_params(params))
    assert params.read_text() != default and "# beta" in params.read_text()  # comments survive
    assert "+++ with" in result.output
    assert apply("default", params).exit_code == 0
    assert params.read_text() == default


@pytest.mark.parametrize("name", PROFILES)
def test_what_was_tuned_on_the_built_in_world_reaches_no_other(name):
    """Each method of the default has settings of its own, which win over `defaults`: a profile with a real model says them anew."""
    profile = YAML(typ="safe").load((ROOT / "profiles" / f"{name}.yaml").read_text())
    if not profile.get("base", {}).get("pretrained"):
        return
    default = config.read_params(ROOT / "profiles" / "default.yaml")
    listed = profile.get("policies", default["policies"])
    for family in config.FAMILIES:
        for method in listed[family]:
            said = (profile.get(family) or {}).get(method) or {}
            lost = default["tuning"]["spaces"][method].keys() - said.keys()
            assert not lost, f"{name}: {family}.{method} has {sorted(lost)} of the built-in world"


@pytest.mark.parametrize("name", PROFILES)
def test_every_profile_says_what_machine_it_is_for(name):
    head = (ROOT / "profiles" / f"{name}.yaml").read_text().split("\n\n")[0]
    assert head.startswith("#") and any(word in head for word in ("machine", "cores", "GPU"))


@pytest.mark.parametrize(
    "text, message",
    [
        ("sft: {trainig: {steps: 1}}", "unknown key `sft.trainig`"),
        ("rl: {defaults: {clipp: 0.1}}", "unknown key `rl.defaults.clipp`"),
        ("preference: {dpo: {bta: 0.1}}", "unknown key `preference.dpo.bta`"),
        ("sample: {per_prompt: 0}", "`sample.per_prompt` is 0"),
    ],
)
def test_what_it_does_not_know_is_refused_and_nothing_is_written(text, message, params, tmp_path):
    (tmp_path / "default.yaml").write_text(params.read_text())
    (tmp_path / "bad.yaml").write_text(text)
    before = params.read_text()
    result = apply("bad", params, tmp_path)
    assert result.exit_code == 1 and message in result.output
    assert params.read_text() == before


@pytest.mark.parametrize("text", ["", "# to be written\n"])
def test_a_profile_that_says_nothing_changes_nothing(text, params, tmp_path):
    (tmp_path / "default.yaml").write_text(params.read_text())
    (tmp_path / "empty.yaml").write_text(text)
    before = config.read_params(params)
    result = apply("empty", params, tmp_path)
    assert result.exit_code == 0 and config.read_params(params) == before


@pytest.mark.parametrize(
    ("file", "text", "message"),
    [
        ("bad.yaml", "- a\n- b\n", "bad.yaml: must be a map of keys"),
        ("bad.yaml", "a: [1\n", "bad.yaml: not valid YAML"),
        ("params.yaml", "a: [1\n", "params.yaml: not valid YAML"),
        ("params.yaml", "- a\n", "params.yaml: must be a map of keys"),
        ("params.yaml", "", "there"),
        ("params.yaml", None, "params.yaml: no such file; restore it with `make profile NAME=default`"),
    ],
)
def test_files_that_cannot_be_laid_over_one_another_are_named(file, text, message, params, tmp_path):
    (tmp_path / "default.yaml").write_text(params.read_text())
    (tmp_path / "bad.yaml").write_text("seed: 1\n")
    (tmp_path / file).unlink() if text is None else (tmp_path / file).write_text(text)
    result = apply("bad", params, tmp_path)
    assert result.exit_code == 1 and message in result.output and isinstance(result.exception, SystemExit), (
        result.output
    )
    assert not params.exists() if text is None else params.exists()


def test_a_profile_may_bring_a_variant(params, tmp_path):
    (tmp_path / "default.yaml").write_text(params.read_text())
    (tmp_path / "more.yaml").write_text(
        "preference: {dpo_b05: {loss: dpo, beta: 0.5}}\npolicies: {preference: [dpo, dpo_b05]}\n"
    )
    assert apply("more", params, tmp_path).exit_code == 0
    assert config.section(config.read_params(params), "preference", "dpo_b05").beta == 0.5


def test_a_profile_may_show_several_settings_as_one_method(params, tmp_path):
    """`evaluate.settings_of` is a map of names that the default does not have."""
    (tmp_path / "default.yaml").write_text(params.read_text())
    (tmp_path / "more.yaml").write_text("evaluate: {settings_of: {dpo: [dpo, cdpo]}}\n")
    assert apply("more", params, tmp_path).exit_code == 0
    assert config.section(config.read_params(params), "evaluate").settings_of == {"dpo": ["dpo", "cdpo"]}


def test_an_unknown_profile_lists_those_there_are(params):
    result = apply("nope", params)
    assert result.exit_code == 1 and "imdb" in result.output and "smoke" in result.output


def test_the_profile_in_use_is_recognised(params, tmp_path):
    place = tmp_path / "profiles"
    shutil.copytree(ROOT / "profiles", place)
    assert profiles.current(params, place) == "default"
    apply("smoke", params)
    assert profiles.current(params, place) == "smoke"
    params.write_text(params.read_text().replace("seed: 0 ", "seed: 7 "))
    assert profiles.current(params, place) == "custom"
    (place / "broken.yaml").write_text("no_such_section: {a: 1}\n")
    (place / "not_yaml.yaml").write_text("a: [1\n")
    apply("default", params)
    assert profiles.current(params, place) == "default"  # a broken profile that nobody uses is not looked at


def test_seeds_differ_from_the_default_in_seeds_alone(params):
    before = config.read_params(params)
    apply("seeds", params)
    after = config.read_params(params)
    assert after.pop("seeds") == [0, 1, 2, 3, 4] and before.pop("seeds") == [0] and before == after
