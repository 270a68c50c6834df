"""Blocks as Markdown, for git; figures are the PNG files beside it."""

from rlhf_vs_dpo.report.blocks import Block, Cell, Details, Heading, Responses, Table, Text
from rlhf_vs_dpo.report.figures import Figure


def table(rows: list[list[str]]) -> str:
    """Rows (the first one the heading) as an aligned Markdown table, which also reads well in a terminal."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    padded = [" | ".join(value.ljust(width) for value, width in zip(row, widths, strict=True)) for row in rows]
    rule = " | ".join("-" * width for width in widths)
    return "\n".join(f"| {line} |" for line in [padded[0], rule, *padded[1:]])


def _cell(cell: Cell) -> str:
    text = plain(cell.text)
    return f"[{text}]({cell.link})" if cell.link and not cell.link.startswith("#") else text


def plain(text: str) -> str:
    """Text that cannot break out of a table cell."""
    return " ".join(text.split()).replace("|", "\\|")


def render(blocks: list[Block], title: str | None = "RLHF versus DPO: the comparison") -> str:
    """The report as one Markdown text."""
    parts = [f"# {title}"] if title else []
    for block in blocks:
        match block:
            case Heading():
                parts.append(f"{'###' if block.anchor.startswith('trace-') else '##'} {block.text}")
            case Text():
                parts.append(block.text)
            case Table():
                parts.append(table([block.head, *([_cell(cell) for cell in row] for row in block.rows)]))
                parts.append(f"*{block.caption}.*" if not block.caption.endswith(".") else f"*{block.caption}*")
            case Figure():
                parts.append(f"![{block.alt}](figures/{block.name}.png)\n\n*{block.caption}.*")
            case Details():
                inner = render(block.blocks, None)
                parts.append(f"<details><summary>{plain(block.summary)}</summary>\n\n{inner}\n</details>")
            case Responses():
                rows = [["who", "gold", "response"]]
                for who, gold, pieces in block.rows:
                    said = "".join(
                        f"**{plain(piece.text)}** ({piece.part} {piece.worth:+.2g})" if piece.part else piece.text
                        for piece in pieces
                    )
                    rows.append([who, "" if gold is None else f"{gold:.2f}", plain(said)])
                parts.append(f"> {plain(block.prompt)}\n\n{table(rows)}")
    return "\n\n".join(parts) + "\n"
