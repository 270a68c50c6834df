"""What a report is made of, before anyone decides whether it is HTML or Markdown."""

from dataclasses import dataclass, field

from rlhf_vs_dpo.report.charts import Figure
from rlhf_vs_dpo.report.marks import Piece


@dataclass(frozen=True)
class Heading:
    text: str
    anchor: str


@dataclass(frozen=True)
class Text:
    """A paragraph; `code` between backticks."""

    text: str


@dataclass(frozen=True)
class Cell:
    """What is shown, what it is sorted by (the text where it is None), and where it leads."""

    text: str
    value: float | None = None
    link: str | None = None


@dataclass(frozen=True)
class Table:
    head: list[str]
    rows: list[list[Cell]]
    caption: str
    name: str = ""


@dataclass(frozen=True)
class Details:
    """Blocks behind a line that opens them."""

    summary: str
    blocks: list = field(default_factory=list)


@dataclass(frozen=True)
class Responses:
    """One prompt, and what everyone made of it: (who, gold reward, pieces)."""

    prompt: str
    rows: list[tuple[str, float | None, list[Piece]]]


Block = Heading | Text | Table | Details | Responses | Figure
