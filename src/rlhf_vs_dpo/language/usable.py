"""Rows that this model can use, and why it cannot use the others: too long, empty, or with a control token spelled out.

Of a hundred rows of one's own, one that is unusable is a mistake to be mended: `data.unusable: refuse`. Of sixty thousand rows of the
Hub some always are, and are left out: `drop`. Either way each is listed with its reason.
"""

from collections.abc import Sequence
from typing import NamedTuple

import pandas as pd

from rlhf_vs_dpo.errors import DataError

SHOWN = 20  # rows that an error names
# Of demonstrations that may be longer than what is sampled: with more, a policy that learned them never ends.
LONG_SHARE = 0.01


class Limits(NamedTuple):
    """Tokens that fit: of a prompt and its response together, of a prompt, and of a response that is sampled.

    One token of the model's context stays free: a control token behind the prompt (`control_tokens`).
    """

    context: int
    prompt: int
    response: int


class Sorted(NamedTuple):
    """Tables by name, without what cannot be used; and that, as rows of `table, row, id, reason, text`."""

    tables: dict[str, pd.DataFrame]
    unusable: pd.DataFrame


def limits(context: int, max_new_tokens: int, max_prompt_tokens: int | None) -> Limits:
    """What fits: a prompt must leave room for a response of `max_new_tokens`, and for a control token."""
    room = context - max_new_tokens - 1
    return Limits(context - 1, room if max_prompt_tokens is None else min(room, max_prompt_tokens), max_new_tokens)


def sort(tokenizer, tables: dict[str, pd.DataFrame], limit: Limits, drop: bool) -> Sorted:
    """Find what this model cannot use of `prompts`, `demonstrations` and `dataset_pairs`; `drop` it, or raise DataError that names it.

    A demonstration whose response is longer than what is sampled teaches a policy never to end: where these are dropped, all of them
    are; else DataError is raised where they are more than 1 %.
    """
    of_prompt = _prompt_faults(tokenizer, tables["prompts"]["prompt"], limit)
    bad = dict(zip(tables["prompts"]["prompt_id"], of_prompt, strict=True))
    faults = {"prompts": of_prompt}
    refused: list[str] = []
    for name, columns in (("demonstrations", ["response"]), ("dataset_pairs", ["chosen", "rejected"])):
        table = tables[name]
        found = [bad.get(prompt) for prompt in table["prompt_id"]]
        prompts = _lengths(tokenizer, table["prompt"])
        ids = {column: _ids(tokenizer, table[column]) for column in columns}
        for row in range(len(table)):
            for column in columns:
                found[row] = found[row] or _response_fault(tokenizer, column, ids[column][row], prompts[row], limit)
            if name == "dataset_pairs" and found[row] is None and ids["chosen"][row] == ids["rejected"][row]:
                found[row] = "chosen and rejected are the same tokens to this model"
        if name == "demonstrations":
            long = [i for i, f in enumerate(found) if f is None and len(ids["response"][i]) + 1 > limit.response]
            if drop:
                for i in long:
                    found[i] = (
                        f"a response of {len(ids['response'][i]) + 1} tokens, more than `sampling.max_new_tokens` ({limit.response})"
                    )
            elif len(long) > LONG_SHARE * len(table):
                refused.append(_too_long(table, long, ids["response"], limit))
        faults[name] = found
    unusable = _listed(tables, faults)
    if len(unusable) and not drop:
        refused.append(_refused(unusable))
    if refused:
        raise DataError("\n".join(refused))
    return Sorted({name: _kept(tables[name], faults.get(name)) for name in tables}, unusable)


def _prompt_faults(tokenizer, prompts: Sequence[str], limit: Limits) -> list[str | None]:
    faults: list[str | None] = []
    for tokens in _lengths(tokenizer, prompts):
        if tokens == 0:
            faults.append("the prompt tokenises to nothing")
        elif tokens > limit.prompt:
            faults.append(f"a prompt of {tokens} tokens, more than the {limit.prompt} that fit")
        else:
            faults.append(None)
    return faults


def _response_fault(tokenizer, column: str, ids: list[int], prompt: int, limit: Limits) -> str | None:
    if not ids:
        return f"{column} tokenises to nothing"
    control = {tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id} & set(ids)
    if control:
        spelled = ", ".join(tokenizer.convert_ids_to_tokens(sorted(control)))
        return f"{column} spells a control token of this model: {spelled}"
    if prompt + len(ids) + 1 > limit.context:
        return f"prompt and {column} have {prompt + len(ids) + 1} tokens, more than the {limit.context} that fit (one token of the context stays free)"
    return None


def _ids(tokenizer, texts: Sequence[str]) -> list[list[int]]:
    return tokenizer(list(texts), add_special_tokens=False)["input_ids"] if len(texts) else []


def _lengths(tokenizer, prompts: Sequence[str]) -> list[int]:
    """Tokens of prompts, with the BOS that opens each; 0 where nothing would open it."""
    bos = tokenizer.bos_token_id
    return [len(ids) + (bos is not None and ids[:1] != [bos]) for ids in _ids(tokenizer, prompts)]


def _kept(table: pd.DataFrame, faults: list[str | None] | None) -> pd.DataFrame:
    if faults is None:
        return table
    return table[[fault is None for fault in faults]].reset_index(drop=True)


def _listed(tables: dict[str, pd.DataFrame], faults: dict[str, list[str | None]]) -> pd.DataFrame:
    rows = []
    for name, found in faults.items():
        known = "pair_id" if name == "dataset_pairs" else "prompt_id"
        for row, fault in enumerate(found):
            if fault is not None:
                entry = tables[name].iloc[row]
                rows.append(
                    {"table": name, "row": row, "id": entry[known], "reason": fault, "text": entry["prompt"][:80]}
                )
    return pd.DataFrame(rows, columns=["table", "row", "id", "reason", "text"])


def _refused(unusable: pd.DataFrame) -> str:
    lines = [f"  {row.table}, row {row.row} ({row.id}): {row.reason}" for row in unusable.head(SHOWN).itertuples()]
    more = f"\n  ... and {len(unusable) - SHOWN} more" if len(unusable) > SHOWN else ""
    return (
        f"{len(unusable)} row(s) that this model cannot use:\n"
        + "\n".join(lines)
        + more
        + "\nMend them at the source, raise the limit "
        "that is named, or set `data.unusable: drop` in params.yaml to leave them out"
    )


def _too_long(table: pd.DataFrame, long: list[int], ids: list[list[int]], limit: Limits) -> str:
    lengths = sorted(len(of) + 1 for of in ids)
    most = lengths[min(int(0.99 * len(lengths)), len(lengths) - 1)]
    return (
        f"{len(long)} of {len(table)} demonstrations ({len(long) / len(table):.0%}), {table['prompt_id'].iloc[long[0]]} first, have responses "
        f"longer than `sampling.max_new_tokens` ({limit.response}): a policy that learned them would never end. Raise it (99 % fit into "
        f"{most}), or set `data.unusable: drop`"
    )
