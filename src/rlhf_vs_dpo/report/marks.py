"""Which words of a response the gold reward likes, and which it does not."""

from typing import NamedTuple

from rlhf_vs_dpo.preferences.gold import PARTS, Gold

SEPARATOR = " , "  # between clauses of the built-in world


class Piece(NamedTuple):
    """A stretch of a response, and what it adds to each part of the gold reward; nothing where it did nothing."""

    text: str
    parts: dict[str, float]

    @property
    def worth(self) -> float:
        return sum(self.parts.values())


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
