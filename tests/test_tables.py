"""Tables: every broken contract is refused by file, row, column and reason, and nothing is left behind."""

import pandas as pd
import pytest

from rlhf_vs_dpo import tables
from rlhf_vs_dpo.errors import DataError


def pairs(**changes):
    frame = pd.DataFrame(
        {
            "pair_id": ["a", "b", "c"],
            "prompt_id": ["1", "2", "3"],
            "split": ["train", "train", "validation"],
            "prompt": ["one", "two", "three"],
            "chosen": ["good", "good", "good"],
            "rejected": ["bad", "bad", "bad"],
            "annotator": ["x", "x", "x"],
            "p_chosen": [0.9, 0.8, None],
            "chosen_ids": [[4, 5], [6], [7, 1]],
            "rejected_ids": [[4], [6, 5], [8, 1]],
        }
    )
    for column, values in changes.items():
        frame[column] = values
    return frame


def test_round_trip_and_stable_bytes(tmp_path):
    for name in ("a", "b"):
        tables.write_table(pairs(), "pairs", tmp_path / f"{name}.parquet")
    assert (tmp_path / "a.parquet").read_bytes() == (tmp_path / "b.parquet").read_bytes()
    back = tables.read_table(tmp_path / "a.parquet", "pairs")
    back = back.assign(**{ids: back[ids].map(list) for ids in ("chosen_ids", "rejected_ids")})  # parquet gives arrays
    assert back.equals(pairs())
    assert len(tables.read_table(tmp_path / "a.parquet", "pairs", "validation")) == 1


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"prompt": ["one", "", "three"]}, "row 1, prompt: is empty"),
        ({"chosen": ["good", "good", " \n"]}, "row 2, chosen: is empty"),
        ({"chosen": ["good", "bad", "good"]}, "row 1, whole row: chosen equals rejected"),
        ({"pair_id": ["a", "a", "c"]}, "row 1, pair_id: is not unique ('a')"),
        ({"prompt": ["one", "two", "one"]}, "whole row: this prompt is in two splits"),
        ({"split": ["train", "trian", "validation"]}, "row 1, split: is none of train, validation, test ('trian')"),
        ({"p_chosen": [0.9, 1.8, None]}, "row 1, p_chosen: is not a probability"),
        ({"p_chosen": ["0.9", "1", "x"]}, "p_chosen: dtype('float64')"),
        ({"chosen": [1, 2, 3]}, "chosen: dtype"),
    ],
)
def test_faults_are_named_and_nothing_is_written(changes, message, tmp_path):
    with pytest.raises(DataError) as error:
        tables.write_table(pairs(**changes), "pairs", tmp_path / "pairs.parquet")
    assert message in str(error.value) and "pairs.parquet" in str(error.value)
    assert list(tmp_path.iterdir()) == []


def test_a_missing_column_is_named(tmp_path):
    with pytest.raises(DataError, match="column 'rejected' is missing"):
        tables.write_table(pairs().drop(columns="rejected"), "pairs", tmp_path / "pairs.parquet")


def test_all_faults_at_once():
    with pytest.raises(DataError) as error:
        tables.validate(pairs(prompt=["", "two", "three"], pair_id=["a", "a", "c"]), "pairs", "file.parquet")
    assert "row 0, prompt" in str(error.value) and "row 1, pair_id" in str(error.value)


def test_unreadable_files(tmp_path):
    with pytest.raises(DataError, match="no such file"):
        tables.read_table(tmp_path / "none.parquet", "pairs")
    (tmp_path / "broken.parquet").write_bytes(b"PAR1 and then nothing")
    with pytest.raises(DataError, match="not a readable parquet file"):
        tables.read_table(tmp_path / "broken.parquet", "pairs")
    tables.write_table(pairs().iloc[:2], "pairs", tmp_path / "pairs.parquet")
    with pytest.raises(DataError, match="no row has split 'validation'"):
        tables.read_table(tmp_path / "pairs.parquet", "pairs", "validation")


def test_empty_tables_have_their_columns(tmp_path):
    tables.write_table(pd.DataFrame(), "dataset_pairs", tmp_path / "p.parquet")
    assert list(tables.read_table(tmp_path / "p.parquet", "dataset_pairs").columns) == list(pairs().columns)
    with pytest.raises(DataError, match="the table is empty"):
        tables.read_table(tmp_path / "p.parquet", "pairs")
