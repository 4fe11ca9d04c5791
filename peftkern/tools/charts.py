"""House style of all charts: plain data in, a matplotlib Figure out, SVG text for a page or a file.

A figure is measured in CSS pixels and drawn in the light colors; `svg` gives each its place in a
theme: "light" and "dark" for files, "page" for an HTML page, whose style sheet says what `--faster`
and the others are. Text stays text, in the reader's fonts. The same data gives the same bytes.
"""

from __future__ import annotations

import io
import math
import re
import unicodedata
import warnings
import xml.etree.ElementTree as ET
from collections.abc import Sequence
from dataclasses import dataclass

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, MaxNLocator

NARROW, WIDE = 328, 1040  # pixels between the margins of a phone and of a desk
COLORS = {  # name: light, dark; each light one only once, as `svg` finds a color by it
    "ink": ("#1b1f24", "#e6edf3"),
    "muted": ("#5b6470", "#98a1ab"),
    "line": ("#dbe0e6", "#2f363e"),
    # Blue and orange differ for the color-blind, too.
    "faster": ("#0b69c7", "#58a6ff"),
    "slower": ("#c4510a", "#f0883e"),
    "level": ("#8a939d", "#7d8691"),
    "error": ("#c9242f", "#ff7b72"),
    "series-0": ("#0a68c6", "#57a5fe"),  # peftkern's
    "series-1": ("#7a4fd6", "#bc8cff"),
    "series-2": ("#1b7d38", "#3fb950"),
    "series-3": ("#b93585", "#f778ba"),
    "series-4": ("#946400", "#d4a72c"),
    "series-5": ("#0b7084", "#39c5cf"),
    "series-6": ("#59626d", "#99a2ac"),
}
INK, MUTED, LINE = (COLORS[name][0] for name in ("ink", "muted", "line"))
SERIES = sum(name.startswith("series") for name in COLORS)
MARKERS = "osD^v"
SIZE = 12  # of text; of notes and ticks one less
NAMESPACE = "http://www.w3.org/2000/svg"
STYLE = {
    "svg.fonttype": "none",
    "text.parse_math": False,  # a dollar sign in somebody's label
    "axes.unicode_minus": False,
    "path.simplify": True,
    "font.family": "DejaVu Sans",  # comes with matplotlib: what is measured is alike everywhere
    "font.size": SIZE,
    "text.color": INK,
}


@dataclass(frozen=True)
class Bar:
    """Bar from the origin to `value`, with a whisker; without a value `says` stands alone."""

    label: str
    says: str  # the value in words, at the right
    value: float | None = None
    color: str = "level"  # a name of COLORS
    low: float | None = None
    high: float | None = None
    note: str = ""  # under the label
    tip: str = ""  # shown to a pointer


@dataclass(frozen=True)
class Series:
    """Points of one color; `low` and `high` are the ends of their whiskers, `tips` their texts."""

    name: str
    number: int
    x: Sequence[float]
    y: Sequence[float]
    low: Sequence[float] = ()
    high: Sequence[float] = ()
    tips: Sequence[str] = ()

    @property
    def color(self) -> str:
        return COLORS[f"series-{self.number % SERIES}"][0]


@matplotlib.rc_context(STYLE)
def bars(
    panels: Sequence[tuple[str, Sequence[Bar]]],
    *,
    title: str,
    description: str = "",
    width: int = WIDE,
    origin: float = 1.0,
    unit: str = "x",
) -> Figure:
    """Draw bars, a panel below the other, each under its heading (if any) with its own axis.

    With an origin of 1 the axis is logarithmic, so that half as fast is as far from 1 as twice as
    fast; with 0 it is linear. Where there is little room, the labels stand above their bars.
    """
    beside, noted = width >= 560, any(bar.note for _, rows in panels for bar in rows)
    row = (38 if noted else 24) if beside else (54 if noted else 40)
    head = [30 if name else 6 for name, _ in panels]
    height = sum(top + row * len(rows) + 26 for top, (_, rows) in zip(head, panels, strict=True))
    page = _Canvas(width, height, title, description)
    longest = max((len(bar.label) for _, rows in panels for bar in rows), default=0)
    labels = min(max(0.56 * SIZE * longest + 14, 0.3 * width), 0.5 * width) if beside else width
    left, right = (labels, width - 118) if beside else (6, width - 6)
    top = 0.0
    for space, (name, rows) in zip(head, panels, strict=True):
        if name:
            page.text(0, top + 18, name, weight="bold", room=width)
        top += space
        values = [bar.value for bar in rows if bar.value]
        axis = page.axes(left, top, right - left, row * len(rows))
        axis.set_ylim(row * len(rows), 0)
        ticks = _ratios(axis, values, not beside) if origin else _amounts(axis, values)
        for index, bar in enumerate(rows):
            _bar(page, axis, bar, (top, index * row, row), ticks, origin, labels if beside else 0)
        axis.set_xticks(ticks if values else [], [f"{tick:g}{unit}" for tick in ticks if values])
        top += row * len(rows) + 26
    return page.figure


def _bar(page, axis, bar: Bar, place, ticks, origin: float, beside: float) -> None:
    """Draw one row; `place`: top of the panel on the page, of the row in it, and its height;
    `beside`: width of the labels at its left, 0 for labels above."""
    (top, start, row), color = place, COLORS[bar.color][0]
    middle = start + (row / 2 if beside else row - 10)
    words = top + (middle + 4 if beside and not bar.note else start + 15)
    room = beside - 8 if beside else page.width - 8 - 0.6 * SIZE * len(bar.says)
    page.text(0, words, bar.label, room=room, tip=bar.tip or bar.label)
    if bar.note:
        page.text(0, words + 14, bar.note, color=MUTED, size=SIZE - 1, room=room)
    says = {"color": color, "weight": "bold", "tip": bar.tip}
    if beside and bar.value is None:
        page.text(beside + 6, top + middle + 4, bar.says, **says, room=page.width - beside)
    elif beside:
        page.text(page.width - 108, top + middle + 4, bar.says, **says)
    else:
        page.text(page.width, words, bar.says, **says, anchor="right")
    if bar.value is None:
        return
    low, high = axis.get_xlim()
    axis.vlines(ticks, middle - 9, middle + 9, color=LINE, linewidth=1, zorder=0)
    ends = sorted((origin, min(max(bar.value, low), high)))
    tip = bar.tip or f"{bar.label}: {bar.says}"
    (drawn,) = axis.barh(middle, ends[1] - ends[0], left=ends[0], height=13, color=color)
    drawn.set_gid(f"tip:{clean(tip)}")
    if bar.low and bar.high:
        ends = [min(max(end, low), high) for end in (bar.low, bar.high)]
        axis.hlines(middle, *ends, color=INK, linewidth=1)
        inside = [end for end in (bar.low, bar.high) if low <= end <= high]
        axis.vlines(inside, middle - 3.5, middle + 3.5, color=INK, linewidth=1)
    axis.vlines(origin, middle - 11, middle + 11, color=INK, linewidth=1.2)


@matplotlib.rc_context(STYLE)
def lines(
    series: Sequence[Series],
    *,
    title: str,
    description: str = "",
    x_label: str = "",
    y_label: str = "",
    width: int = NARROW,
    height: int = 240,
    log_x: bool = False,
    log_y: bool = False,
    ticks: Sequence[float] = (),
    joined: bool = True,
    markers: bool = True,
    roof: tuple[float, float] | None = None,
    names: Sequence[tuple[float, str]] = (),
) -> Figure:
    """Draw points, joined or not, with their names in their colors above.

    `roof`: slope up to its ridge, and the height where it is flat. `names`: texts at an x, above
    the highest point there, as far as there is room.
    """
    page = _Canvas(width, height, title, description)
    rows = page.key(series)
    top, below = 12 + 16 * rows, 40 if x_label else 24
    axis = page.axes(52, top + 14, width - 62, height - top - 14 - below)
    values = [v for one in series for part in (one.y, one.low, one.high) for v in part]
    xs = [x for one in series for x in one.x]
    if roof is not None:
        values, xs = [*values, roof[1]], [*xs, roof[1] / roof[0]]
    _scale(axis, "x", xs, log_x, 1.5 if roof else 1.12, ticks)
    _scale(axis, "y", values, log_y, 1.3, ())
    axis.grid(color=LINE, linewidth=1)
    page.text(0, top + 4, y_label, color=MUTED, size=SIZE - 1)
    middle = 52 + (width - 62) / 2
    page.text(middle, height - 6, x_label, color=MUTED, size=SIZE - 1, anchor="center")
    if roof is not None:
        (left, right), (bottom, _), ridge = axis.get_xlim(), axis.get_ylim(), roof[1] / roof[0]
        left = max(left, bottom / roof[0])
        at = [left, ridge, right], [left * roof[0], roof[1], roof[1]]
        axis.add_line(Line2D(*at, color=INK, linewidth=1.5, clip_on=False))
        for x in sorted(set(xs[:-1])):
            column = [y for one in series for a, y in zip(one.x, one.y, strict=True) if a == x]
            axis.vlines(x, min(column), max(column), color=LINE, linewidth=2)
    for one in reversed(series):  # the first above the others
        _points(axis, one, joined, markers)
    page.names(axis, names, series)
    return page.figure


def _points(axis: Axes, one: Series, joined: bool, markers: bool) -> None:
    style = {"color": one.color, "clip_on": False, "linewidth": 1.8 if joined else 0}
    marks = MARKERS[one.number % len(MARKERS)]
    if markers:
        style |= {"marker": marks, "markersize": 6}
    for x, low, high in zip(one.x, one.low, one.high, strict=False):
        axis.vlines(x, low, high, color=one.color, linewidth=1)
    (drawn,) = axis.plot(one.x, one.y, **style)
    drawn.set_gid(f"tip:{clean(one.name)}")
    for x, y, tip in zip(one.x, one.y, one.tips, strict=False):  # seen by a pointer alone
        (spot,) = axis.plot(x, y, marker="o", markersize=12, color=INK, alpha=0, clip_on=False)
        spot.set_gid(f"tip:{clean(tip)}")


@matplotlib.rc_context(STYLE)
def strips(
    rows: Sequence[tuple[str, int, Sequence[float], float]],
    *,
    title: str,
    description: str = "",
    unit: str = "ms",
    width: int = NARROW,
) -> Figure:
    """Draw every sample as a tick, a row for each (name, number of its color, samples, median)."""
    page = _Canvas(width, 36 * len(rows) + 24, title, description)
    axis = page.axes(6, 0, width - 12, 36 * len(rows))
    axis.set_ylim(36 * len(rows), 0)
    _scale(axis, "x", [value for _, _, samples, _ in rows for value in samples], False, 1.02, ())
    axis.set_xticks(ticks := list(axis.get_xticks()), [f"{tick:g} {unit}" for tick in ticks])
    for index, (name, number, samples, median) in enumerate(rows):
        color, top = COLORS[f"series-{number % SERIES}"][0], 36 * index
        page.text(0, top + 13, name, color=color, size=SIZE - 1, weight="bold", room=width)
        xs = [x for value in samples for x in (value, value, math.nan)]
        ys = [y for _ in samples for y in (top + 18, top + 30, math.nan)]
        axis.add_line(Line2D(xs, ys, color=color, linewidth=1, alpha=0.6, clip_on=False))
        axis.vlines(median, top + 16, top + 33, color=INK, linewidth=2)
    return page.figure


def svg(figure: Figure, theme: str = "light", salt: str = "peftkern") -> str:
    """Return the SVG; of figures on one page each has a `salt` of its own, that ids differ."""
    file = io.StringIO()
    # A glyph that matplotlib's font has not is drawn with the reader's.
    with matplotlib.rc_context({**STYLE, "svg.hashsalt": salt}), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph")
        nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
        figure.savefig(file, format="svg", metadata=nothing)
    root = ET.fromstring(file.getvalue())
    for name in ("metadata", "defs/{*}style"):
        for parent in root.findall(f".//{{*}}{name}/.."):
            parent.remove(parent.find(f"{{*}}{name.rpartition('/')[2].rpartition('}')[2]}"))
    used = {value for one in root.iter() for key, value in one.items() if key.endswith("href")}
    for one in root.iter():
        one.tag = one.tag.rpartition("}")[2]
        one.attrib = dict(_attributes(one, theme, used))
        if (gid := one.attrib.pop("tip", None)) is not None:
            one.insert(0, tip := ET.Element("title"))
            tip.text = gid
    title, description = figure.words
    for name, words in (("desc", description), ("title", title)):
        if words:
            root.insert(0, said := ET.Element(name))
            said.text = words
    width, height = (f"{value * 72:g}" for value in figure.get_size_inches())
    root.attrib = {"viewBox": f"0 0 {width} {height}", "width": width, "height": height}
    root.attrib |= {"role": "img", "aria-label": title, "stroke-linejoin": "round"}
    if theme != "page":
        root.attrib |= {"xmlns": NAMESPACE, "font-family": "system-ui, sans-serif"}
    for one in reversed(list(root.iter())):
        if one.tag not in ("text", "title", "desc"):
            one.text = None  # white space
        one.tail = None
        for child in [child for child in one if child.tag in ("g", "defs") and not len(child)]:
            one.remove(child)
    return ET.tostring(root, encoding="unicode") + "\n"


def _attributes(one: ET.Element, theme: str, used: set[str]):
    """Yield the attributes of an element: no name spaces, and no style, which a policy forbids."""
    places = {
        light: f"var(--{name})" if theme == "page" else (light, dark)[theme == "dark"]
        for name, (light, dark) in COLORS.items()
    }
    for key, value in one.items():
        key = key.rpartition("}")[2]
        if key == "style":
            for name, given in re.findall(r"([\w-]+): *([^;]+)", value):
                if name == "font-family":
                    continue
                if name != "font":
                    given = given.strip().removesuffix("px")
                    yield name, places.get(given, given)
                    continue
                weight, size = re.match(r"(?:(\w+) )?([\d.]+)px", given).groups()
                yield "font-size", size  # matplotlib before 3.11 wrote all of it in one
                if weight:
                    yield "font-weight", weight
        elif key == "id" and value.startswith("tip:"):
            yield "tip", value[4:]
        elif (key != "id" or f"#{value}" in used) and not value.startswith("rotate(-0 "):
            yield key, re.sub(r"\d+\.\d{3,}", lambda found: f"{float(found[0]):.5g}", value)


def clean(text: str) -> str:
    """Replace characters that end a line or a parse, or reverse the text, by U+FFFD."""
    odd = {"Cc", "Cf", "Cs"}
    return "".join("\ufffd" if unicodedata.category(one) in odd else one for one in str(text))


class _Canvas:
    """Page in pixels from the top left, for text and axes."""

    def __init__(self, width: float, height: float, title: str, description: str) -> None:
        self.figure = Figure(figsize=(width / 72, height / 72), dpi=72)
        self.figure.patch.set_visible(False)
        self.figure.words = clean(title), clean(description)
        self.width, self.height = width, height

    def text(self, x, y, text, *, color=INK, size=SIZE, weight="normal", room=None, **more) -> None:
        text, anchor, tip = clean(text), more.get("anchor", "left"), more.get("tip")
        most = int(room / (0.56 * size)) if room else len(text)
        if len(text) > most:
            text, tip = f"{text[: max(most - 1, 1)]}…", tip or text
        at = x / self.width, 1 - y / self.height
        drawn = self.figure.text(*at, text, color=color, size=size, weight=weight, ha=anchor)
        if tip:
            drawn.set_gid(f"tip:{clean(tip)}")

    def axes(self, left: float, top: float, width: float, height: float) -> Axes:
        place = left / self.width, 1 - (top + height) / self.height
        axis = self.figure.add_axes((*place, width / self.width, height / self.height))
        axis.patch.set_visible(False)
        axis.spines[:].set_visible(False)
        axis.tick_params(length=0, labelsize=SIZE - 1, labelcolor=MUTED, which="both")
        axis.yaxis.set_tick_params(pad=6)
        axis.set_axisbelow(True)
        axis.set_yticks([])
        return axis

    def key(self, series: Sequence[Series]) -> int:
        """Write the names of the series in their colors; return the number of lines."""
        x, row = 0.0, 1
        for one in series:
            length = 18 + 0.62 * (SIZE - 1) * min(len(one.name), 40)
            if x and x + length > self.width:
                x, row = 0.0, row + 1
            y = 1 - (16 * row - 8) / self.height
            mark = MARKERS[one.number % len(MARKERS)]
            at = [(x + 4) / self.width], [y]
            self.figure.add_artist(Line2D(*at, marker=mark, markersize=6, color=one.color))
            self.text(x + 12, 16 * row - 4, one.name, color=one.color, size=SIZE - 1, room=260)
            x += length
        return row

    def names(self, axis: Axes, names: Sequence[tuple[float, str]], series) -> None:
        taken: list[tuple[float, float]] = []
        for x, name in names:
            y = max(y for one in series for a, y in zip(one.x, one.y, strict=True) if a == x)
            at = axis.transData.transform((x, y))
            half = 0.28 * (SIZE - 1) * len(name)
            middle = min(max(at[0], half), self.width - half)
            if all(middle - half > end or middle + half < begin for begin, end in taken):
                taken.append((middle - half, middle + half))
                where = middle, self.height - at[1] - 9
                self.text(*where, name, color=MUTED, size=SIZE - 1, anchor="center")


def _ratios(axis: Axes, values: Sequence[float], narrow: bool) -> list[float]:
    """Set a logarithmic axis around 1 and the values; return its ticks."""
    low, high = min([*values, 0.8]) / 1.15, max([*values, 1.25]) * 1.15
    axis.set_xscale("log")
    axis.xaxis.set_minor_locator(FixedLocator([]))
    axis.set_xlim(low, high)
    return _spaced(_decimal(low, high, 6), math.log(high / low) * (0.13 if narrow else 0.1))


def _amounts(axis: Axes, values: Sequence[float]) -> list[float]:
    high = max(values, default=1.0) * 1.05
    axis.set_xlim(0, high)
    return [float(tick) for tick in MaxNLocator(5).tick_values(0, high) if tick <= high]


def _decimal(low: float, high: float, most: int) -> list[float]:
    """Return at most so many round numbers, evenly spread on a logarithmic axis."""
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    for mantissas in ((1, 1.25, 1.5, 2, 3, 4, 6, 8), (1, 2, 5), (1, 3), (1,)):
        found = [float(f"{m}e{e}") for e in range(first, last + 1) for m in mantissas]
        found = [tick for tick in found if low <= tick <= high]
        if len(found) <= most:
            return found
    step = -(-len(found) // most)
    return [tick for tick in found if round(math.log10(tick)) % step == 0]


def _spaced(ticks: Sequence[float], gap: float) -> list[float]:
    """Leave out those nearer to another than a ratio of e^gap; those next to 1 stay."""
    kept: list[float] = []
    for tick in sorted(ticks, key=lambda tick: abs(math.log(tick))):
        if all(abs(math.log(tick / one)) >= gap for one in kept):
            kept.append(tick)
    return sorted(kept)


def _scale(axis, which: str, values: Sequence[float], log: bool, margin: float, ticks) -> None:
    """Set an axis around the values; `ticks`, if given, are thinned until they have room
    on a logarithmic axis."""
    low, high = min(values, default=1.0), max(values, default=1.0)
    if log:
        low, high = low / margin, high * margin
        if high / low < 4:
            middle = math.sqrt(low) * math.sqrt(high)
            low, high = middle / 2, middle * 2
        getattr(axis, f"set_{which}scale")("log")
        found = list(ticks) or _decimal(low, high, 6)
    else:
        pad = (margin - 1) / 2 * (high - low) or abs(high) * 0.1 or 1.0
        low, high = low - pad, high + pad
        found = [t for t in MaxNLocator(4).tick_values(low, high) if low <= t <= high]
    getattr(axis, f"set_{which}lim")(low, high)
    one = getattr(axis, f"{which}axis")
    if ticks and log:
        found = _spaced(found, 0.11 * math.log(high / low))
    one.set_major_locator(FixedLocator(found))
    one.set_minor_locator(FixedLocator([]))
    one.set_major_formatter(lambda value, _: f"{value:g}")
