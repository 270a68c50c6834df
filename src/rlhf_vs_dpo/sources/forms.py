"""The usual forms of preference data, mapped to the contract of `pairs` (prompt, chosen, rejected as text).

explicit        {"prompt": "...", "chosen": "...", "rejected": "..."}
implicit        {"chosen": "...", "rejected": "..."} that share the prompt as their prefix
conversational  the same two with lists of {"role", "content"}, rendered by the model's chat template; `prompt` may say the first
                question once more, as text (UltraFeedback, Tulu 3)

A row whose two answers have the same score (`SCORES`) is a tie, and no preference.
Column names are TRL's. A prompt's id is a hash of its text, and so is its split: the same prompt is always in the same
split, whatever file or order it comes in.
"""

import hashlib
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import pandas as pd

from rlhf_vs_dpo.config import Splits
from rlhf_vs_dpo.errors import DataError
from rlhf_vs_dpo.tables import empty, validate

Render = Callable[[Sequence[dict[str, str]], bool], str]  # (messages, add the opening of an answer) -> text

COLUMNS = ("pair_id", "prompt_id", "split", "prompt", "chosen", "rejected", "annotator", "p_chosen")
SCORES = (("score_chosen", "score_rejected"), ("chosen_rating", "rejected_rating"))  # of UltraFeedback, of Tulu 3
HELD_OUT = "held out"  # of a source that says so much and no more
# What a person says in between is no response.
BEFORE_THE_LAST_TURN = (
    "`chosen` and `rejected` differ before the last turn; a preference is between two answers to one conversation"
)

# For models that bring no chat template: plain text, a turn a paragraph.
PLAIN_TEMPLATE = (
    "{% for m in messages %}{{ m['role'] | capitalize }}: {{ m['content'] }}\n\n{% endfor %}"
    "{% if add_generation_prompt %}Assistant:{% endif %}"
)


def prompt_id(prompt: str) -> str:
    return hashlib.sha256(prompt.encode()).hexdigest()[:16]


def _place(prompt: str) -> float:
    """A number from 0 to 1 that belongs to a prompt."""
    return int(hashlib.sha256(b"split:" + prompt.encode()).hexdigest()[:8], 16) / 16**8


def _half(prompt: str) -> str:
    """validation or test, by a hash of the prompt."""
    return "test" if _place(prompt) < 0.5 else "validation"


def split_of(prompt: str, splits: Splits) -> str:
    """train, validation or test, by a hash of the prompt."""
    place = _place(prompt)
    if place < splits.test:
        return "test"
    return "validation" if place < splits.test + splits.validation else "train"


def pair_of(row: dict[str, Any], place: str, render: Render, turn_marker: str | None) -> tuple[str, str, str]:
    """(prompt, chosen, rejected) of one row in any of the forms. Raises DataError naming the row."""
    missing = [name for name in ("chosen", "rejected") if row.get(name) is None]
    if missing:
        raise DataError(
            f"{place}: column {missing[0]!r} is missing; a preference has `chosen`, `rejected` and usually `prompt`"
        )
    prompt, chosen, rejected = row.get("prompt"), row["chosen"], row["rejected"]
    kinds = {type(value) for value in (prompt, chosen, rejected) if value is not None}
    if kinds == {str}:
        return (prompt, chosen, rejected) if prompt is not None else _implicit(chosen, rejected, place, turn_marker)
    if kinds == {list}:
        return _conversation(prompt, chosen, rejected, place, render)
    if isinstance(prompt, str) and isinstance(chosen, list) and isinstance(rejected, list):
        return _conversation(_asked(prompt, chosen, rejected, place), chosen, rejected, place, render)
    raise DataError(f"{place}: `prompt`, `chosen` and `rejected` must all be text, or all be lists of messages")


def _implicit(chosen: str, rejected: str, place: str, marker: str | None) -> tuple[str, str, str]:
    """Cut two texts where their shared prefix ends: behind its last turn marker, else at its last white space."""
    length = next(
        (i for i, (a, b) in enumerate(zip(chosen, rejected, strict=False)) if a != b), min(len(chosen), len(rejected))
    )
    shared = chosen[:length]
    cut = (
        shared.rfind(marker) + len(marker)
        if marker and marker in shared
        else len(shared.rstrip())
        if shared[-1:].isspace()
        else _word_start(shared)
    )
    if not shared[:cut].strip():
        raise DataError(
            f"{place}: `chosen` and `rejected` share no prefix, so there is no prompt in them; add a `prompt` column"
        )
    if marker and any(marker in text[cut:] for text in (chosen, rejected)):
        raise DataError(f"{place}: {BEFORE_THE_LAST_TURN}")
    return chosen[:cut], chosen[cut:], rejected[cut:]


def _word_start(text: str) -> int:
    """Where the last word begins, its white space included: a boundary inside a word would split a token."""
    head = text.rstrip()
    at = max((head.rfind(space) for space in " \n\t"), default=-1)
    return len(head[: at + 1].rstrip()) if at >= 0 else 0


def _asked(prompt: str, chosen: list, rejected: list, place: str) -> list | None:
    """Messages before answers whose question stands beside them as text; None: the answers bring it with them."""
    first = [of[0] for of in (chosen, rejected) if of and isinstance(of[0], dict)]
    if all(message.get("role") == "assistant" for message in first):
        return [{"role": "user", "content": prompt}]
    said = [message.get("content") for message in chosen if isinstance(message, dict) and message.get("role") == "user"]
    if prompt not in said:
        raise DataError(f"{place}: `prompt` asks something else than the conversation in `chosen`")
    return None


def _conversation(
    prompt: list | None, chosen: list, rejected: list, place: str, render: Render
) -> tuple[str, str, str]:
    for message in [*(prompt or []), *chosen, *rejected]:
        texts = [message.get(key) for key in ("role", "content")] if isinstance(message, dict) else [None]
        if not all(isinstance(text, str) for text in texts):
            raise DataError(f"{place}: a message needs `role` and `content`, both text, got {str(message)[:80]}")
    if prompt is None:
        shared = 0
        while shared < min(len(chosen), len(rejected)) - 1 and chosen[shared] == rejected[shared]:
            shared += 1
        prompt, chosen, rejected = chosen[:shared], chosen[shared:], rejected[shared:]
    if not prompt:
        raise DataError(f"{place}: the conversation has no message before the answer; add a `prompt`")
    for name, answer in (("chosen", chosen), ("rejected", rejected)):
        if not answer or not answer[-1]["content"].strip():
            raise DataError(f"{place}, {name}: is empty")
        if answer[0]["role"] == "user":
            raise DataError(
                f"{place}, {name}: begins with what the user says; behind the prompt it must begin with the answer"
            )
        if len(answer) > 1:
            raise DataError(f"{place}: {BEFORE_THE_LAST_TURN}")
    opening = render(prompt, True)
    answers = []
    for answer in (chosen, rejected):
        whole = render([*prompt, *answer], False)
        if not whole.startswith(opening):
            raise DataError(
                f"{place}: this chat template renders a conversation differently once it has an answer; "
                "give one in `data.chat_template` that only appends"
            )
        answers.append(whole[len(opening) :])
    return opening, answers[0], answers[1]


def chat_renderer(template: str | None, tokenizer) -> Render:
    """Renders messages by `template`, else by the tokenizer's own template, else as plain text.

    The end-of-turn that a template writes after an answer, EOS or another, is cut: a response is closed by EOS, which `text` adds.
    Raises DataError for a template that is none, and where a model brings several and none of them is `default`.
    """
    import jinja2.ext
    import jinja2.sandbox

    given = template or getattr(tokenizer, "chat_template", None) or PLAIN_TEMPLATE
    if isinstance(given, dict):
        if "default" not in given:
            raise DataError(
                f"the model has several chat templates ({', '.join(given)}); write one into `data.chat_template`"
            )
        given = given["default"]

    class Generation(jinja2.ext.Extension):
        """`{% generation %}`, by which templates of the Hub mark what the assistant says: here it is what stands in it."""

        tags = frozenset({"generation"})

        def parse(self, parser):
            next(parser.stream)
            return parser.parse_statements(("name:endgeneration",), drop_needle=True)

    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols", Generation]
    )

    def refuse(message: str):
        raise jinja2.TemplateError(message)

    # What templates of the Hub expect to find; the date is fixed, or the same data would render differently tomorrow.
    environment.globals |= {"raise_exception": refuse, "strftime_now": lambda form: ""}
    try:
        compiled = environment.from_string(given)
    except jinja2.TemplateError as error:
        raise DataError(
            f"the chat template (`data.chat_template`, or the model's own) is not valid Jinja: {error}"
        ) from None
    special = {name: getattr(tokenizer, name, None) or "" for name in ("bos_token", "eos_token")}
    asked = [{"role": "user", "content": "asked"}, {"role": "assistant", "content": "answered"}]
    try:
        end = compiled.render(messages=asked, add_generation_prompt=False, **special).rpartition("answered")[2].strip()
    except (jinja2.TemplateError, TypeError):
        # A template that wants more than that, and may render the data all the same.
        end = special["eos_token"]

    def render(messages: Sequence[dict[str, str]], opening: bool) -> str:
        try:
            text = compiled.render(messages=list(messages), add_generation_prompt=opening, **special)
        except (jinja2.TemplateError, TypeError) as error:
            raise DataError(f"the chat template cannot render {str(messages)[:120]}: {error}") from None
        if opening:
            return text
        return text.rstrip().removesuffix(end).rstrip()

    return render


class Read(NamedTuple):
    """Preferences of a source: the `pairs` table, and an `unusable` table of the rows that are no preference."""

    pairs: pd.DataFrame
    left_out: pd.DataFrame


def to_pairs(
    rows: Iterable[dict[str, Any]],
    place: str,
    render: Render,
    splits: Splits,
    turn_marker: str | None,
    drop: bool = False,
) -> Read:
    """Preferences in any of the forms. Optional columns are kept where a row has them: `pair_id`, `split`, `annotator`, `p_chosen`.

    Rows that are no preference (in no form, an empty text, the same answer twice, a tie) are listed and left out where `drop` is set, else
    reported together by a DataError. A row of split `held out` is of validation or of test, by a hash of its prompt; rows of `train` with
    that prompt are left out, too.
    """
    pairs: dict[str, list] = {name: [] for name in COLUMNS}
    numbers: list[int] = []  # of the rows that became pairs: their index, by which errors name them
    held_out = False
    faults: dict[int, tuple[str, str, str]] = {}  # what is wrong with a row, its id and how it begins
    for number, row in enumerate(rows):
        name = f"pair-{number:06d}" if row.get("pair_id") is None else str(row["pair_id"])
        try:
            prompt, chosen, rejected = pair_of(row, f"{place}, row {number}", render, turn_marker)
            probability = row.get("p_chosen")
            if isinstance(probability, bool) or not isinstance(probability, (int, float, type(None))):
                raise DataError(f"{place}, row {number}: `p_chosen` must be a number, got {probability!r}")
            _check_texts(prompt, chosen, rejected, f"{place}, row {number}")
            _check_decided(row, f"{place}, row {number}")
        except DataError as error:
            faults[number] = str(error), name, str(row)[:80]
            continue
        split = row.get("split") or split_of(prompt, splits)
        held_out = held_out or split == HELD_OUT
        values = (
            name, prompt_id(prompt), _half(prompt) if split == HELD_OUT else split, prompt, chosen, rejected,
            str(row.get("annotator") or "dataset"), row.get("p_chosen"),
        )  # fmt: skip
        for column, value in zip(COLUMNS, values, strict=True):
            pairs[column].append(value)
        numbers.append(number)
    frame = pd.DataFrame(pairs, index=numbers)
    del pairs
    if held_out:
        held = set(frame.loc[frame["split"] != "train", "prompt_id"])
        again = (frame["split"] == "train") & frame["prompt_id"].isin(held)
        for number, row in frame[again].iterrows():
            why = f"{place}, row {number}: its prompt is held out, too"
            faults[number] = why, row["pair_id"], row["prompt"][:80]
        frame = frame[~again]
    if faults and not drop:
        more = f"\n... and {len(faults) - 20} more" if len(faults) > 20 else ""
        raise DataError(
            "\n".join([why for why, _, _ in faults.values()][:20])
            + more
            + "\nMend these rows, or set `data.unusable: drop` in params.yaml to leave them out"
        )
    if not len(frame):
        raise DataError(f"{place}: holds no row" + (" that is a preference" if faults else ""))
    frame = frame.astype({"p_chosen": "float64"}).assign(chosen_ids=None, rejected_ids=None)
    left_out = [
        ("dataset_pairs", number, name, why.removeprefix(f"{place}, row {number}").lstrip(":, "), begins)
        for number, (why, name, begins) in sorted(faults.items())
    ]
    listed = pd.DataFrame(left_out, columns=empty("unusable").columns) if left_out else empty("unusable")
    return Read(validate(frame, "pairs", place).reset_index(drop=True), listed)


def _check_decided(row: dict[str, Any], place: str) -> None:
    for names in SCORES:
        scores = [row.get(name) for name in names]
        if None not in scores and scores[0] == scores[1]:
            raise DataError(f"{place}: is a tie, both answers have the score {scores[0]}")


def _check_texts(prompt: str, chosen: str, rejected: str, place: str) -> None:
    for name, text in (("prompt", prompt), ("chosen", chosen), ("rejected", rejected)):
        if not text.strip():
            raise DataError(f"{place}, {name}: is empty")
    if chosen == rejected:
        raise DataError(f"{place}: chosen equals rejected")


def derived(pairs: pd.DataFrame) -> dict[str, pd.DataFrame]:
    """Prompts, demonstrations and corpus of a data set that brings pairs alone.

    The chosen responses serve as demonstrations (Rafailov et al. 2023, section 4: "when it is not available, initialise
    pi_ref by maximising the likelihood of preferred completions") and prompt with chosen response as corpus.
    """
    first = pairs.drop_duplicates("prompt_id")
    prompts = first[["prompt_id", "split", "prompt"]].assign(facts=None).astype({"facts": "str"})
    demonstrations = pairs.rename(columns={"chosen": "response"})[["prompt_id", "split", "prompt", "response"]]
    corpus = pd.DataFrame(
        {
            "doc_id": [f"doc-{i:06d}" for i in range(len(pairs))],
            "split": pairs["split"].replace({"test": "validation"}),
            "text": pairs["prompt"] + pairs["chosen"],
        }
    )
    return {
        "prompts": prompts.reset_index(drop=True),
        "demonstrations": demonstrations.reset_index(drop=True),
        "corpus": corpus.reset_index(drop=True),
        "facts": empty("facts"),
    }
