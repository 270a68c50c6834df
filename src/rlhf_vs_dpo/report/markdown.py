"""Blocks as Markdown, for git; figures are the PNG files beside it."""

import re
from html import escape

from rlhf_vs_dpo.report.blocks import Block, Cell, Details, Heading, Responses, Table, Text
from rlhf_vs_dpo.report.charts import Figure
from rlhf_vs_dpo.report.marks import Piece


def table(rows: list[list[str]]) -> str:
    """Rows (the first one the heading) as an aligned Markdown table, which also reads well in a terminal."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    padded = [" | ".join(value.ljust(width) for value, width in zip(row, widths, strict=True)) for row in rows]
    rule = " | ".join("-" * width for width in widths)
    return "\n".join(f"| {line} |" for line in [padded[0], rule, *padded[1:]])


def _cell(cell: Cell, headings: dict[str, str]) -> str:
    text = cell.text.replace("|", "\\|")
    link = f"#{headings[cell.link[1:]]}" if cell.link and cell.link[1:] in headings else cell.link
    return f"[{text}]({link})" if link else text


def foreign(text: str) -> str:
    """Somebody's text on one line, such that nothing in it is Markdown or HTML."""
    return re.sub(r"([\\`*_{}\[\]<>#|&~])", r"\\\1", " ".join(text.split()))


def _piece(piece: Piece) -> str:
    text = foreign(piece.text)
    if not piece.parts:
        return f" {text} " if piece.text.strip() in (",", ".") else text
    return f"**{text}** (" + ", ".join(f"{part} {worth:+.2f}" for part, worth in piece.parts.items()) + ")"


def _slug(heading: str) -> str:
    """The anchor that GitHub gives a heading."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


def render(blocks: list[Block], title: str | None = "RLHF versus DPO: the comparison") -> str:
    """The report as one Markdown text."""
    parts = [f"# {title}"] if title else []
    headings = {block.anchor: _slug(block.text) for block in blocks if isinstance(block, Heading)}
    for block in blocks:
        match block:
            case Heading():
                parts.append(f"{'###' if block.anchor.startswith('trace-') else '##'} {block.text}")
            case Text():
                parts.append(block.text)
            case Table():
                parts.append(table([block.head, *([_cell(cell, headings) for cell in row] for row in block.rows)]))
                parts.append(f"*{block.caption}.*" if not block.caption.endswith(".") else f"*{block.caption}*")
            case Figure():
                parts.append(f"![{block.alt}](figures/{block.name}.png)\n\n*{block.caption}.*")
            case Details():
                inner = render(block.blocks, None)
                parts.append(f"<details><summary>{escape(block.summary)}</summary>\n\n{inner}\n</details>")
            case Responses():
                rows = [["who", "gold", "response"]]
                for who, gold, pieces in block.rows:
                    said = "".join(_piece(piece) for piece in pieces)
                    rows.append([who, "" if gold is None else f"{gold:.2f}", said])
                parts.append(f"> {foreign(block.prompt)}\n\n{table(rows)}")
    return "\n\n".join(parts) + "\n"
