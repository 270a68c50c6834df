"""Which words of a response the gold reward likes, and which it does not."""

from typing import NamedTuple

from rlhf_vs_dpo.preferences.gold import PARTS, Gold

TURNING = (
    "\u200e\u200f\u061c\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069"  # of Unicode's bidirectional algorithm
)
SEPARATOR = " , "  # between clauses of the built-in world


class Piece(NamedTuple):
    """A stretch of a response, and what it adds to each part of the gold reward; nothing where it did nothing."""

    text: str
    parts: dict[str, float]

    @property
    def worth(self) -> float:
        return sum(self.parts.values())


def visible(text: str) -> str:
    """A text whose characters can all be seen: nothing in it rings, moves the cursor, colours a terminal, or turns what stands behind it round.

    Control characters become their pictures (ESC: ␛), except for tab and line feed; marks that turn the direction of writing become their code.
    """
    return "".join(
        chr(0x2400 + ord(c))
        if ord(c) < 32 and c not in "\t\n"
        else "␡"
        if c == "\x7f"
        else f"⟨U+{ord(c):04X}⟩"
        if c in TURNING
        else c
        for c in text
    )


def marked(judge: Gold | None, prompt: str, facts: str | None, response: str) -> list[Piece]:
    """A response in pieces, each with what it adds to the gold reward.

    The gold reward is asked about every beginning of the response that ends with a clause; what changes from one to the
    next is what the clause is worth. So the marks say what the reward says, whatever its rules. A source whose gold reward
    has no parts (or that has none) gives the response as it is.
    """
    if judge is None or not response.strip():
        return [Piece(response, {})]
    body, dot, rest = response.partition(" .")
    clauses = body.split(SEPARATOR)
    before = dict.fromkeys(PARTS, 0.0)
    pieces = []
    for number in range(len(clauses)):
        scored = judge.score(prompt, facts, SEPARATOR.join(clauses[: number + 1]) + " .")
        if not any(f"gold_{part}" in scored for part in PARTS):
            return [Piece(response, {})]
        now = {part: scored[f"gold_{part}"] for part in PARTS}
        changed = {part: now[part] - before[part] for part in PARTS if abs(now[part] - before[part]) > 1e-9}
        before = now
        pieces.append(Piece(clauses[number], changed))
        if number + 1 < len(clauses):
            pieces.append(Piece(SEPARATOR, {}))
    whole = judge.score(prompt, facts, response)["gold_form"] - before["form"]
    pieces.append(Piece(dot + rest if dot else " (no end)", {"form": whole} if abs(whole) > 1e-9 else {}))
    return pieces
