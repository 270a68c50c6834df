"""Blocks as one HTML page that needs nothing else: no network, no file beside it."""

import base64
import io
import re
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from rlhf_vs_dpo.report.blocks import Block, Text
from rlhf_vs_dpo.report.figures import Figure


def _picture(figure: Figure) -> str:
    """A figure as SVG within its own address."""
    stream = io.BytesIO()
    figure.drawn.savefig(stream, format="svg", metadata={"Date": None, "Creator": None})
    # A hundredth of a point is finer than any screen; labels are text and stay as they are.
    small = re.sub(rb' d="[^"]*"', lambda path: re.sub(rb"(\d\.\d\d)\d+", rb"\1", path[0]), stream.getvalue())
    return "data:image/svg+xml;base64," + base64.b64encode(small).decode()


TITLE = "RLHF versus DPO: the comparison"


def render(blocks: list[Block], title: str = TITLE) -> str:
    """The page; the paragraphs before the first heading are the verdict."""
    lead = next(i for i, block in enumerate(blocks) if not isinstance(block, Text))
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        keep_trailing_newline=True,
    )
    environment.tests["even"] = lambda number: number % 2 == 0
    template = environment.get_template("page.html.j2")
    return template.render(
        title=title,
        verdict=blocks[:lead],
        blocks=blocks[lead:],
        kind_of=lambda block: type(block).__name__,
        picture=_picture,
    )
