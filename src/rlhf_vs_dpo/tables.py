"""The contract of every table that crosses a stage boundary, and the only way to read or write one.

Tables are parquet: the same rows give the same bytes, which is what lets DVC stop early. A table that breaks its
contract is refused whole, with all bad rows named at once (file, row, column, reason), before anything is written.
"""

from collections.abc import Iterable
from pathlib import Path

import pandas as pd
import pandera.pandas as pa

from rlhf_vs_dpo.errors import DataError
from rlhf_vs_dpo.run.atomic import writing

SPLITS = ("train", "validation", "test")


def _text(**kwargs) -> pa.Column:
    # `\S`: a prompt or response of white space alone is as empty as an empty one.
    filled = pa.Check(lambda s: s.str.contains(r"\S", regex=True), error="is empty")
    return pa.Column(str, checks=[filled], **kwargs)


def _split() -> pa.Column:
    return pa.Column(str, checks=pa.Check.isin(SPLITS, error=f"is none of {', '.join(SPLITS)}"))


def _number(kind: type = float, nullable: bool = False, check: pa.Check | None = None) -> pa.Column:
    return pa.Column(kind, checks=check, nullable=nullable)


def one_split_per_prompt() -> pa.Check:
    """No prompt is in two splits: not under two ids, not under one."""

    def check(frame: pd.DataFrame) -> pd.Series:
        return frame.groupby("prompt")["split"].transform("nunique").eq(1)

    return pa.Check(check, error="this prompt is in two splits")


ID = {"unique": True, "report_duplicates": "exclude_first"}
POSITIVE = pa.Check.gt(0, error="is not positive")
LOGP = pa.Check.le(0, error="is a log-probability above 0")

CONTRACTS: dict[str, pa.DataFrameSchema] = {
    "corpus": pa.DataFrameSchema({"doc_id": _text(**ID), "split": _split(), "text": _text()}),
    "demonstrations": pa.DataFrameSchema(
        {"prompt_id": _text(), "split": _split(), "prompt": _text(), "response": _text()},
        checks=one_split_per_prompt(),
    ),
    "prompts": pa.DataFrameSchema(
        {
            "prompt_id": _text(**ID),
            "split": _split(),
            "prompt": _text(),
            "facts": pa.Column(str, nullable=True),  # JSON of what a gold reward needs
        },
        checks=one_split_per_prompt(),
    ),
    "pairs": pa.DataFrameSchema(
        {
            "pair_id": _text(**ID),
            "prompt_id": _text(),
            "split": _split(),
            "prompt": _text(),
            "chosen": _text(),
            "rejected": _text(),
            "annotator": _text(),
            "p_chosen": _number(nullable=True, check=pa.Check.in_range(0, 1, error="is not a probability")),
            "chosen_ids": pa.Column(object, nullable=True),  # what was sampled, with EOS; null for pairs of a data set
            "rejected_ids": pa.Column(object, nullable=True),
        },
        checks=[
            one_split_per_prompt(),
            pa.Check(lambda f: f["chosen"] != f["rejected"], error="chosen equals rejected"),
        ],
    ),
    "unusable": pa.DataFrameSchema(  # rows that were left out
        {
            "table": _text(),
            "row": _number(int),  # in the table, or in the source where it never became a row
            "id": _text(),
            "reason": _text(),
            "text": pa.Column(str),  # how it begins
        }
    ),
    "reference": pa.DataFrameSchema(
        {
            "pair_id": _text(**ID),
            "chosen_logp": _number(check=LOGP),
            "rejected_logp": _number(check=LOGP),
            "chosen_tokens": _number(int, check=POSITIVE),
            "rejected_tokens": _number(int, check=POSITIVE),
        }
    ),
    "demonstration_scores": pa.DataFrameSchema(
        {"prompt_id": _text(), "split": _split(), "response": pa.Column(str), "reward": _number()}
    ),
    "pair_rewards": pa.DataFrameSchema(
        {"pair_id": _text(**ID), "prompt_id": _text(), "chosen": _number(), "rejected": _number()}
    ),
    "pool": pa.DataFrameSchema(
        {
            "prompt_id": _text(),
            "split": _split(),
            "sample": _number(int),
            "response": pa.Column(str),
            "response_ids": pa.Column(object),
            "tokens": _number(int, check=POSITIVE),
            "finished": pa.Column(bool),
            "logp": _number(check=LOGP),
            "reference_logp": _number(check=LOGP),  # the same: the pool is of the reference
            "reward": _number(nullable=True),  # null where the response never ended
            "gold": _number(nullable=True),
            "utility": _number(nullable=True),  # the annotator's
        }
    ),
    "samples": pa.DataFrameSchema(
        {
            "prompt_id": _text(),
            "suffix": pa.Column(str),  # what the policy was given behind the prompt; mostly nothing
            "sample": _number(int),
            "response": pa.Column(str),  # a policy may say nothing
            "tokens": _number(int, check=POSITIVE),
            "finished": pa.Column(bool),
            "logp": _number(check=LOGP),
            "reference_logp": _number(check=LOGP),
            "reward": _number(nullable=True),  # null where the response never ended: there is no EOS to score at
            "gold": _number(nullable=True),
            "utility": _number(nullable=True),  # the annotator's; null where the pairs are those of a data set
        }
    ),
    "heldout": pa.DataFrameSchema(
        {
            "step": _number(int),
            "prompt_id": _text(),
            "prompt_ids": pa.Column(object),
            "response_ids": pa.Column(object),
            "response": pa.Column(str),
            "finished": pa.Column(bool),
            "logp": _number(check=LOGP),
            "reference_logp": _number(check=LOGP),
            "gold": _number(nullable=True),
            "filler": _number(nullable=True),
        }
    ),
    "watched": pa.DataFrameSchema(
        {
            "step": _number(int),
            "prompt_id": _text(),
            "finished": pa.Column(bool),
            "logp": _number(check=LOGP),
            "reference_logp": _number(check=LOGP),
            "gold": _number(nullable=True),
            "filler": _number(nullable=True),
            "tokens": _number(int, check=POSITIVE),
            "reward": _number(nullable=True),
            "utility": _number(nullable=True),
        }
    ),
    "judgements": pa.DataFrameSchema(
        {
            "judge": _text(),
            "policy": _text(),
            "prompt_id": _text(),
            "win": _number(nullable=True, check=pa.Check.isin([0.0, 0.5, 1.0])),
            "consistent": _number(nullable=True, check=pa.Check.isin([0.0, 1.0])),
            "first": _number(nullable=True, check=pa.Check.isin([0.0, 0.5, 1.0])),
        }
    ),
    "facts": pa.DataFrameSchema({"fact_id": _text(**ID), "prompt": _text(), "answer": _text()}),
    "trials": pa.DataFrameSchema(  # of `make tune`; metrics are null where the run diverged
        {
            "method": _text(),
            "trial": _number(int, check=POSITIVE),
            "settings": _text(),  # JSON
            "outcome": pa.Column(str, checks=pa.Check.isin(["finished", "collapsed", "diverged"])),
            "said": pa.Column(str),  # of a run that diverged
            **{
                name: _number(nullable=True)
                for name in (
                    "preferred",
                    "utility",
                    "objective",
                    "gold",
                    "reward",
                    "kl",
                    "tokens",
                    "finished",
                    "seconds",
                    "flops",
                )
            },
        }
    ),
    "retention": pa.DataFrameSchema(
        {
            "kind": pa.Column(str, checks=pa.Check.isin(["corpus", "fact"])),
            "item_id": _text(),
            "tokens": _number(int, check=POSITIVE),
            "logp": _number(check=LOGP),
            "correct": _number(nullable=True),
        }
    ),
}

EMPTY_ALLOWED = {"facts", "dataset_pairs", "judgements", "unusable"}


def validate(frame: pd.DataFrame, contract: str, place: str) -> pd.DataFrame:
    """Check a table against its contract; `place` (a path) names it in the error.

    Raises DataError that lists up to 20 offending rows, numbered from 0 as pandas does.
    """
    schema = CONTRACTS[contract]
    needs = ", ".join(schema.columns)
    lost = [name for name in schema.columns if name not in frame]
    if lost:  # checks of whole rows could not run
        named = ", ".join(map(repr, lost))
        raise DataError(f"{place}: column {named} is missing; a row of `{contract}` has {needs}")
    try:
        return schema.validate(frame, lazy=True)
    except pa.errors.SchemaErrors as errors:
        lines = []
        for case in errors.failure_cases.itertuples():
            where = "" if pd.isna(case.index) else f"row {int(case.index)}, "
            if case.schema_context == "DataFrameSchema":  # a check of whole rows is reported for each of their columns
                lines.append(f"  {where}whole row: {case.check} ({str(frame.loc[case.index].to_dict())[:80]})")
                continue
            what = "is not unique" if "field_uniqueness" in str(case.check) else str(case.check)
            lines.append(f"  {where}{case.column}: {what} ({repr(case.failure_case)[:80]})")
        lines = list(dict.fromkeys(lines))
        more = f"\n  ... and {len(lines) - 20} more" if len(lines) > 20 else ""
        raise DataError(
            f"{place}: {len(lines)} fault(s) against the `{contract}` contract ({needs}):\n"
            + "\n".join(lines[:20])
            + more
            + "\nFix these rows at the source and run the stage again."
        ) from None


def write_table(frame: pd.DataFrame, contract: str, path: Path) -> None:
    """Validate, then write parquet atomically: a reader sees the whole table or none."""
    path = Path(path)
    if contract == "dataset_pairs":
        contract, frame = "pairs", frame if len(frame) else empty("pairs")
    validate(frame, contract, str(path))
    with writing(path) as temporary:
        frame.to_parquet(temporary, index=False)


def write_stream(frames: Iterable[pd.DataFrame], contract: str, path: Path) -> None:
    """Write a table part by part, each validated as it comes; a reader sees the whole table or none."""
    import pyarrow
    import pyarrow.parquet

    with writing(path) as temporary:
        writer = None
        try:
            for frame in frames:
                part = pyarrow.Table.from_pandas(validate(frame, contract, str(path)), preserve_index=False)
                if writer is None:
                    writer = pyarrow.parquet.ParquetWriter(temporary, part.schema)
                writer.write_table(part.cast(writer.schema))
        finally:
            if writer is not None:
                writer.close()
        if writer is None:
            raise DataError(f"{path}: nothing to write")


def read_table(path: Path, contract: str, split: str | None = None) -> pd.DataFrame:
    """Read a parquet table, validate it, and keep one split of it if asked (index reset).

    Raises DataError if the file is missing, is not parquet, breaks its contract, or has no row in the split.
    """
    path = Path(path)
    if not path.is_file():
        raise DataError(f"{path}: no such file; `dvc repro` makes it, `dvc status` says by which stage")
    try:
        frame = pd.read_parquet(path)
    except Exception as error:  # pyarrow raises several unrelated types for a broken file
        raise DataError(f"{path}: not a readable parquet file ({error}); delete it and run `dvc repro`") from error
    if contract == "dataset_pairs":
        contract = "pairs"
    elif not len(frame) and contract not in EMPTY_ALLOWED:
        raise DataError(f"{path}: the table is empty")
    frame = validate(frame, contract, str(path))
    if split is not None:
        frame = frame[frame["split"] == split].reset_index(drop=True)
        if not len(frame):
            raise DataError(f"{path}: no row has split {split!r}; give the source rows for it in params.yaml (`data`)")
    return frame


def read_csv(path: Path, contract: str) -> pd.DataFrame:
    """Read a table that is kept as CSV, to be seen in git. Raises DataError if it is missing or breaks its contract."""
    path, schema = Path(path), CONTRACTS[contract]
    if not path.is_file():
        raise DataError(f"{path}: no such file; `make tune` makes it")
    numbers = [name for name, column in schema.columns.items() if str(column.dtype) in ("float64", "int64")]
    try:
        frame = pd.read_csv(path, keep_default_na=False, na_values={name: [""] for name in numbers})
        kinds = {name: str(schema.columns[name].dtype) for name in numbers if name in frame}
        frame = frame.astype(kinds).astype({name: str for name in frame if name not in numbers})
    except (ValueError, pd.errors.ParserError) as error:
        raise DataError(f"{path}: not a readable table ({str(error).splitlines()[0]})") from error
    return validate(frame, contract, str(path))


def empty(contract: str) -> pd.DataFrame:
    """A table with the contract's columns, of its types, and no row."""
    kinds = {
        name: "object" if column.dtype is None else str(column.dtype)
        for name, column in CONTRACTS[contract].columns.items()
    }
    return pd.DataFrame({name: pd.Series(dtype=kind) for name, kind in kinds.items()})
