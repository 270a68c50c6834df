"""Bad input by property: whatever is broken in params.yaml or in a table, one short error names the file and the place.

`RLHF_CASES=500 pytest tests/test_bad_input.py --hypothesis-show-statistics` tries more of them, and says how each kind ended.
"""

import copy
import io
import os
import shutil
from contextlib import redirect_stderr
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import HealthCheck, event, given, settings
from hypothesis import strategies as st
from project import command, inside
from ruamel.yaml import YAML

from rlhf_vs_dpo import config, tables
from rlhf_vs_dpo.errors import DataError, UserError

ROOT = Path(__file__).parents[1]
CASES = settings(
    max_examples=int(os.environ.get("RLHF_CASES", "100")), deadline=None, derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)  # fmt: skip
PARAMS = config.read_params(ROOT / "params.yaml")
ODD = [
    None,
    True,
    -1,
    0,
    3,
    1.5,
    -0.5,
    1e300,
    float("nan"),
    float("inf"),
    "",
    "x",
    "1e-5",
    [],
    [0],
    ["x"],
    {},
    {"x": 1},
]


def leaves(values, path=()):
    """Paths of everything in params.yaml that holds no map."""
    for key, value in values.items():
        if isinstance(value, dict) and value:
            yield from leaves(value, (*path, key))
        else:
            yield (*path, key)


LEAVES = list(leaves(PARAMS))


def checked(folder: Path, text: str) -> tuple[int, str]:
    """Exit status and words of the stage `check` on this params.yaml."""
    (folder / "params.yaml").write_text(text)
    said = io.StringIO()
    with inside(folder), redirect_stderr(said):
        return command([str(ROOT / "stages" / "check.py"), "--out", "checked.txt"]), said.getvalue()


@CASES
@given(
    path=st.sampled_from(LEAVES),
    how=st.sampled_from(["replace", "remove", "misspell", "twice"]),
    value=st.sampled_from(ODD),
)
def test_a_params_yaml_with_any_leaf_broken_is_refused_in_few_words_or_is_right(tmp_path, path, how, value):
    params = copy.deepcopy(PARAMS)
    *parents, key = path
    place = params
    for parent in parents:
        place = place[parent]
    match how:
        case "replace":
            place[key] = value
        case "remove":
            del place[key]
        case "misspell":
            place[f"{key}x"] = place.pop(key)
    text = io.StringIO()
    YAML().dump(params, text)
    written = text.getvalue()
    if how == "twice":
        lines = written.splitlines(keepends=True)
        number = next(i for i, line in enumerate(lines) if line.strip().startswith(f"{key}:"))
        written = "".join([*lines[: number + 1], lines[number], *lines[number + 1 :]])
    out = tmp_path / "checked.txt"
    out.unlink(missing_ok=True)
    status, said = checked(tmp_path, written)
    event(f"params.yaml, {how}: {'a right one' if status == 0 else 'refused'}")
    if status == 0:
        assert how in ("replace", "remove", "misspell") and out.exists()
        config.check(config.read_params(tmp_path / "params.yaml"))
        return
    assert not out.exists() and "Traceback" not in said, said
    assert "params.yaml" in said and len(said.strip().splitlines()) < 20, said
    if how != "twice":
        assert (
            str(key) in said or ".".join(map(str, parents)) in said or str(parents[-1] if parents else key) in said
        ), said


@pytest.fixture(scope="module")
def good() -> dict[str, pd.DataFrame]:
    """A right table of each contract, of a few rows."""
    return {name: made_up(schema) for name, schema in tables.CONTRACTS.items()}


@pytest.mark.parametrize("contract", sorted(set(tables.CONTRACTS) - {"trials"}))
def test_the_tables_that_are_broken_below_are_right_before(tmp_path, good, contract):
    good[contract].to_parquet(tmp_path / "table.parquet", index=False)
    assert len(tables.read_table(tmp_path / "table.parquet", contract)) == 6


def made_up(schema, rows: int = 6) -> pd.DataFrame:
    """A table that keeps a contract: each column of its type, identifiers unlike each other."""
    special = {
        "split": ["train", "train", "validation", "validation", "test", "test"], "outcome": "finished", "kind": "corpus", "win": 0.5,
        "consistent": 1.0, "first": 0.5, "p_chosen": 0.7, "tokens": 3, "logp": -1.5, "reference_logp": -1.5, "chosen_logp": -1.5,
        "rejected_logp": -1.5, "chosen_tokens": 3, "rejected_tokens": 3, "trial": 1,
    }  # fmt: skip
    columns = {}
    for name, column in schema.columns.items():
        kind = str(column.dtype)
        if name in special:
            columns[name] = special[name]
        elif kind.startswith("float"):
            columns[name] = np.linspace(0.1, 0.9, rows)
        elif kind.startswith("int"):
            columns[name] = np.arange(1, rows + 1)
        elif kind == "bool":
            columns[name] = True
        elif kind == "object":
            columns[name] = pd.Series([[1, 2, 3]] * rows)
        else:
            columns[name] = [f"{name} {number}" for number in range(rows)]
    return pd.DataFrame(columns, index=range(rows))


@CASES
@given(
    contract=st.sampled_from(sorted(set(tables.CONTRACTS) - {"trials"})),
    how=st.sampled_from(["cell", "column", "row", "type", "cut", "flip"]),
    draw=st.randoms(use_true_random=False),
)
def test_a_table_with_anything_broken_is_refused_by_name_or_keeps_its_contract(tmp_path, good, contract, how, draw):
    table, path = good[contract].copy(), tmp_path / f"{contract}.parquet"
    column = draw.choice(list(table.columns))
    match how:
        case "cell":
            odd = draw.choice([None, "", "   ", np.nan, np.inf, -5, "\x00", "\ud800"])
            table[column] = table[column].astype(object)
            table.at[2, column] = odd
        case "column":
            table = table.drop(columns=column)
        case "row":
            table = pd.concat([table, table.iloc[[0]]], ignore_index=True)
        case "type":
            table[column] = [object.__repr__(object()) if n % 2 else n for n in range(len(table))]
            table[column] = table[column].astype(str)
    try:
        table.to_parquet(path, index=False)
    except Exception:
        event(f"table, {how}: parquet itself cannot hold it")
        return
    whole = path.read_bytes()
    if how == "cut":
        path.write_bytes(whole[: draw.randrange(len(whole))])
    if how == "flip":
        place = draw.randrange(len(whole))
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 0xFF]) + whole[place + 1 :])
    try:
        read = tables.read_table(path, contract)
    except UserError as error:
        event(f"table, {how}: refused")
        said = str(error)
        assert isinstance(error, DataError) and str(path) in said and len(said.splitlines()) < 25, said
        if how in ("cell", "column", "type"):
            assert repr(column) in said or column in said, said
    else:
        event(f"table, {how}: keeps its contract")
        tables.validate(read, contract, "again")
        assert how != "column"


# ---- folders of models -----------------------------------------------------------------------------------------------

FOLDERS = ("policy", "adapters", "reward")


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A policy, one of adapters on it, and a reward model; and the same of other shapes, to swap files with."""
    from rlhf_vs_dpo.config import Adapter, Scratch
    from rlhf_vs_dpo.language import heads, models, text

    place = tmp_path_factory.mktemp("models")
    for name, width, words in (("ours", 32, ["a", "b", "c"]), ("theirs", 48, ["a", "b", "c", "d", "e"])):
        torch.manual_seed(0)
        tokenizer, base = text.word_tokenizer(words), place / name / "base"
        size = Scratch(layers=1, width=width, heads=2, feed_forward=48, context=32, bpe_vocabulary=300)
        models.save(models.from_scratch(size, tokenizer), tokenizer, base)
        shutil.copytree(base, place / name / "policy")
        adapted, _ = models.load_learner(base, Adapter(rank=2, alpha=2.0, targets="all", merge=False))
        models.save(adapted, tokenizer, place / name / "adapters", base)
        models.save(heads.scorer_from_policy(base)[0].model, tokenizer, place / name / "reward")
    return place


@CASES
@given(
    which=st.sampled_from(FOLDERS),
    how=st.sampled_from(["cut", "flip", "swap", "empty", "gone"]),
    draw=st.randoms(use_true_random=False),
)
def test_a_model_folder_with_any_file_broken_is_refused_by_name_or_can_be_used(folders, tmp_path, which, how, draw):
    from rlhf_vs_dpo.language import heads, models
    from rlhf_vs_dpo.language.forward import log_likelihoods, scores
    from rlhf_vs_dpo.language.logprobs import Policy
    from rlhf_vs_dpo.language.text import Tokens

    folder = tmp_path / "model"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(folders / "ours" / which, folder)
    path = draw.choice(sorted(folder.iterdir()))
    whole = path.read_bytes()
    match how:
        case "cut":
            path.write_bytes(whole[: draw.randrange(len(whole))])
        case "flip":
            place = draw.randrange(len(whole))
            path.write_bytes(whole[:place] + bytes([whole[place] ^ 0xFF]) + whole[place + 1 :])
        case "swap":
            shutil.copy2(folders / "theirs" / which / path.name, path)
        case "empty":
            path.write_bytes(b"")
        case "gone":
            path.unlink()
    texts = [Tokens([1, 4], [5, 6, 2])]
    try:
        if which == "reward":
            found = scores(heads.load_scorer(folder), texts)
        else:
            found = log_likelihoods(Policy(models.load_policy(folder)[0], 1.0), texts)
    except UserError as error:
        event(f"{which}, {how}: refused")
        said = str(error)
        assert str(folder) in said and len(said.splitlines()) < 20, said
    else:
        event(f"{which}, {how}: can be used")
        assert all(map(np.isfinite, found)) or how == "flip"
        assert path.name not in ("model.safetensors", "adapter_model.safetensors") or how == "flip", path.name
