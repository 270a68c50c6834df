"""How everything is drawn: one description of a chart (Vega-Lite), live on the page and as a picture for Markdown, git and DVC.

A family has a hue; a method has a shade of it, a shape and a dash of its own, so that none hangs on colour. The name of a method stands
where its line ends, or beside the point on a thin leader: no legend lies over data. In every chart a parameter `picked` holds the name
of the method that a reader has chosen, and all others fade.
"""

import io
import json
import math
from collections.abc import Iterable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Literal, NamedTuple

import altair as alt
from altair.utils import schemapi

from rlhf_vs_dpo.report.words import Entry

# Okabe and Ito 2008, told apart in all common kinds of colour-blindness.
FAMILY_COLOURS = {
    "sft": "#000000",
    "rl": "#0072B2",
    "preference": "#D55E00",
    "imitation": "#009E73",
    "best_of_n": "#CC79A7",
}
FAMILY_NAMES = {
    "sft": "SFT",
    "rl": "RL",
    "preference": "DPO family",
    "imitation": "imitation",
    "best_of_n": "best of n",
}
SHAPES = ["circle", "square", "triangle-up", "diamond", "triangle-down", "cross", "triangle-right", "triangle-left"]
DASHES = [[1, 0], [7, 3], [2, 2], [8, 3, 2, 3], [12, 4], [4, 2, 1, 2, 1, 2]]
FONT = "DejaVu Sans"  # matplotlib carries it, so that a picture is the same wherever it is made
GREY = "#808080"
LABEL, LABEL_GAP = 10, 12  # size of a name, and the least distance between two, in pixels
Scale = Literal["linear", "log", "symlog", "sqrt"]
PICKED = "picked == '' || datum.policy == picked || datum.policy == null"


class Figure(NamedTuple):
    """A figure: what it shows in a sentence, and what a reader who cannot see it should know."""

    name: str
    caption: str
    alt: str
    chart: Any  # of altair


class Style:
    """Colour, shape and dash of every policy, by its family and its place in it."""

    def __init__(self, families: dict[str, str]):
        self.families = families
        self.rows = list(families)
        members = {family: self.of(family) for family in dict.fromkeys(families.values())}
        self._place = {row: (of.index(row), len(of)) for of in members.values() for row in of}

    def of(self, family: str) -> list[str]:
        return [row for row, its in self.families.items() if its == family]

    def colour(self, row: str) -> str:
        return shade(FAMILY_COLOURS[self.families[row]], *self._place[row])

    def shape(self, row: str) -> str:
        return SHAPES[self._place[row][0] % len(SHAPES)]

    def dash(self, row: str) -> list[int]:
        return DASHES[self._place[row][0] % len(DASHES)]

    @property
    def colours(self) -> alt.Color:
        return alt.Color("policy:N", legend=None, scale=self._scale([self.colour(row) for row in self.rows]))

    @property
    def shapes(self) -> alt.Shape:
        return alt.Shape("policy:N", legend=None, scale=self._scale([self.shape(row) for row in self.rows]))

    @property
    def dashes(self) -> alt.StrokeDash:
        return alt.StrokeDash("policy:N", legend=None, scale=self._scale([self.dash(row) for row in self.rows]))

    def _scale(self, values: list[Any]) -> alt.Scale:
        return alt.Scale(domain=self.rows, range=values)


def shade(colour: str, place: int, count: int) -> str:
    """The `place`-th of `count` tones of a colour, from dark to light."""
    tone = 0.0 if count < 2 else -0.4 + 0.8 * place / (count - 1)
    parts = [int(colour[at : at + 2], 16) for at in (1, 3, 5)]
    mixed = [part * (1 + tone) if tone < 0 else part + (255 - part) * tone * 0.7 for part in parts]
    return "#" + "".join(f"{round(part):02x}" for part in mixed)


def faded(full: float = 1.0) -> Any:
    """Opacity of a mark: `full`, or next to nothing while another method is picked."""
    return alt.when(PICKED).then(alt.value(full)).otherwise(alt.value(full * 0.12))


def data(rows: Iterable[dict[str, Any]]) -> alt.Data:
    """Rows of a chart, five digits each: finer than any screen, and the same on every machine."""
    return alt.Data(values=[{key: _short(value) for key, value in row.items()} for row in rows])


def _short(value: Any) -> Any:
    return float(f"{value:.5g}") if isinstance(value, float) else value


def spoken(entry: Entry) -> str:
    """`1.81 (1.75 to 1.87)`: what is shown where the pointer is."""
    return f"{entry['mean']:.2f} ({entry['low']:.2f} to {entry['high']:.2f})"


def span(values: Iterable[float | None], scale: Scale = "linear") -> list[float]:
    """Ends of an axis that holds all values, with a little room at both; one of roots begins near 0."""
    known = [value for value in values if value is not None and math.isfinite(value)]
    if not known:
        return [0.0, 1.0]
    low, high = min(known), max(known)
    if scale == "log":
        return [low / 1.3, high * 1.3]
    if scale == "sqrt":
        high = max(high, 0.0)
        room = high or 0.5
        return [1.1 * min(low, 0.0) - 0.003 * room, high + 0.1 * room]
    room = 0.06 * (high - low) or 0.5
    return [low - room, high + room]


def axis(
    field: str,
    title: str | None,
    domain: list[float] | None = None,
    kind: type = alt.X,
    large: bool = False,
    scale: Scale = "linear",
) -> Any:
    """A quantitative channel with a title; `large` numbers get a unit (2M, 3T); `symlog` is linear up to about 0.5.

    `sqrt` suits KL: best-of-n and the laws of overoptimisation are curves of its root (Gao et al. 2022, arXiv:2210.10760, section 3).
    """
    of: dict[str, Any] = {"type": scale, "nice": False}
    of |= {} if scale == "log" else {"zero": False}  # a logarithmic scale has none
    of |= {"constant": 0.5} if scale == "symlog" else {}
    of |= {"domain": domain} if domain else {}
    return kind(
        f"{field}:Q", title=title, scale=alt.Scale(**of), axis=alt.Axis(format="~s") if large else alt.Undefined
    )


def tooltip(**titles: str) -> list[alt.Tooltip]:
    """What is said of a mark: field -> heading."""
    return [alt.Tooltip(f"{field}:N", title=title) for field, title in titles.items()]


def labels(
    ends: list[dict[str, Any]], across: alt.X, up: alt.Y, size: tuple[int, int], colours: Any, leaders: bool = True
) -> list[alt.Chart]:
    """Names in a column at the right, pushed apart so that none covers another, each on a leader from where its line ends.

    ends         rows `policy, x, y`, x and y as on the axes; `name` is shown in the place of `policy` where it is given
    across, up   the axes, of fields x and y; `up` has a linear scale with a domain
    size         of the plot in pixels
    """
    width, height = size
    low, high = up["scale"]["domain"]
    placed = sorted((height * (high - end["y"]) / (high - low), number) for number, end in enumerate(ends))
    places = [place for place, _ in placed]
    for i in range(1, len(places)):
        places[i] = max(places[i], places[i - 1] + LABEL_GAP)
    if places and places[-1] > height:
        places[-1] = float(height)
        for i in range(len(places) - 2, -1, -1):
            places[i] = min(places[i], places[i + 1] - LABEL_GAP)
    rows = [
        {"name": ends[number]["policy"]} | ends[number] | {"at": high - place * (high - low) / height}
        for (_, number), place in zip(placed, places, strict=True)
    ]
    base = alt.Chart(data(rows)).encode(color=colours, opacity=faded())
    named = base.mark_text(align="left", fontSize=LABEL, clip=False).encode(
        x=alt.value(width + 16), y=alt.Y("at:Q", scale=up["scale"], title=up["title"]), text="name:N"
    )
    if not leaders:
        return [named]
    leader = base.mark_rule(strokeWidth=0.5, clip=False).encode(
        x=across, x2=alt.value(width + 13), y=up, y2="at:Q", opacity=faded(0.45)
    )
    return [leader, named]


def rule(values: list[float], dash: list[int] | None = None) -> alt.Chart:
    """Thin vertical lines at values of an axis."""
    return (
        alt.Chart(data({"at": value} for value in values))
        .mark_rule(color=GREY, strokeDash=dash or [1, 0], strokeWidth=1)
        .encode(x="at:Q")
    )


def unchecked() -> AbstractContextManager[None]:
    """Within it, charts are not checked against Vega-Lite's schema: that takes as long as drawing them. Tests check them."""
    return schemapi.debug_mode(False)


def spec(chart: Any, background: str = "transparent") -> dict[str, Any]:
    """A chart as Vega-Lite, with what all have in common."""
    with unchecked():
        known = chart.to_dict(validate=False)
    known.pop("$schema", None)
    known["params"] = [{"name": "picked", "value": ""}, *known.get("params", [])]
    known["background"] = background
    known["config"] = {
        "font": FONT,
        "view": {"stroke": "transparent"},
        "axis": {
            "gridOpacity": 0.4,
            "labelFontSize": 10,
            "titleFontSize": 11,
            "titleFontWeight": "normal",
            "domainColor": GREY,
        },
        "title": {"fontSize": 12, "fontWeight": "bold", "anchor": "start"},
        "concat": {"spacing": 14},
    }
    return known


def picture(chart: Any, path: Path) -> Path:
    """Write a chart as PNG, of 256 colours: git keeps every version of it."""
    import matplotlib
    import vl_convert
    from PIL import Image

    vl_convert.register_font_directory(str(Path(matplotlib.get_data_path()) / "fonts" / "ttf"))
    drawn = vl_convert.vegalite_to_png(json.dumps(spec(chart, "white"), sort_keys=True), scale=1.4)
    whole = Image.open(io.BytesIO(drawn)).convert("RGB")
    whole.quantize(256, Image.Quantize.FASTOCTREE, dither=Image.Dither.NONE).save(path, "PNG", optimize=True)
    return path


def save(figures: list[Figure], folder: Path) -> list[Path]:
    """Write each figure as PNG, for Markdown, MLflow and DVC."""
    folder.mkdir(exist_ok=True)
    return [picture(figure.chart, folder / f"{figure.name}.png") for figure in figures]
