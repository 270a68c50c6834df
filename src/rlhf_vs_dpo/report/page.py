"""Blocks as one HTML page that needs nothing else: no network, no file beside it. Its figures are live (Vega-Lite)."""

import json
from pathlib import Path
from typing import NamedTuple

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from rlhf_vs_dpo.report import charts
from rlhf_vs_dpo.report.blocks import Block, Heading
from rlhf_vs_dpo.report.charts import Figure, Style

TITLE = "RLHF versus DPO: the comparison"
# Shapes of Vega as SVG paths in a box from -1 to 1, for the list of policies.
PATHS = {
    "circle": "M-.8,0a.8,.8 0 1,0 1.6,0a.8,.8 0 1,0 -1.6,0z",
    "square": "M-.75,-.75h1.5v1.5h-1.5z",
    "triangle-up": "M0,-.9L.9,.7H-.9z",
    "triangle-down": "M0,.9L.9,-.7H-.9z",
    "triangle-right": "M.9,0L-.7,.9V-.9z",
    "triangle-left": "M-.9,0L.7,.9V-.9z",
    "diamond": "M0,-1L.8,0L0,1L-.8,0z",
    "cross": "M-.3,-.9h.6v.6h.6v.6h-.6v.6h-.6v-.6h-.6v-.6h.6z",
}


class Section(NamedTuple):
    """A heading and what stands under it, to be opened and closed."""

    heading: Heading
    blocks: list[Block]


class Policy(NamedTuple):
    """An entry of the list by which a policy is picked out everywhere."""

    name: str
    colour: str
    path: str


def render(blocks: list[Block], title: str = TITLE, families: dict[str, str] | None = None) -> str:
    """The page: what stands before the first heading is the answer, each heading opens a section.

    families    policy -> its family, to list the policies whose marks can be picked out in all figures and tables
    """
    sections: list[Section] = []
    answer: list[Block] = []
    for block in blocks:
        if isinstance(block, Heading) and not block.anchor.startswith("trace-"):
            sections.append(Section(block, []))
        else:
            (sections[-1].blocks if sections else answer).append(block)
    style = Style(families or {})
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        keep_trailing_newline=True,
    )
    environment.tests["even"] = lambda number: number % 2 == 0
    figures = {block.name: charts.spec(block.chart) for block in blocks if isinstance(block, Figure)}
    return environment.get_template("page.html.j2").render(
        title=title,
        answer=answer,
        sections=sections,
        policies=[Policy(row, style.colour(row), PATHS[style.shape(row)]) for row in style.rows],
        kind_of=lambda block: type(block).__name__,
        figures=Markup(json.dumps(figures, sort_keys=True).replace("<", "\\u003c")) if figures else "",
        library=Markup(_library()) if figures else "",
    )


def _library() -> str:
    """Vega, Vega-Lite and Vega-Embed in one script, from the package that also makes the pictures."""
    import vl_convert

    return vl_convert.javascript_bundle()  # type: ignore[call-arg]  # its stub says less than it does
