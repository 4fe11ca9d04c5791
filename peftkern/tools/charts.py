"""House style of all charts: plain data in, a matplotlib Figure out, SVG text for a page or a file.

A figure is measured in CSS pixels and drawn in the light colors; `svg` gives each its place in a
theme: "light" and "dark" for files, "page" for an HTML page, whose style sheet says what `--faster`
and the others are. Text stays text, in the reader's fonts. The same data gives the same bytes.
"""

from __future__ import annotations

import io
import itertools
import math
import re
import textwrap
import warnings
import xml.etree.ElementTree as ET
from collections.abc import Sequence
from dataclasses import dataclass

import matplotlib.colors
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from peftkern.tools.canvas import (
    COLORS,
    INK,
    LINE,
    MARKERS,
    MUTED,
    NARROW,
    SERIES,
    SIZE,
    STYLE,
    WIDE,
    Canvas,
    Series,
    amounts_axis,
    clean,
    ratios_axis,
    scale,
)

NAMESPACE = "http://www.w3.org/2000/svg"


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
    beside, notes = width >= 560, [bar.note for _, rows in panels for bar in rows]
    longest = max(map(len, [bar.label for _, rows in panels for bar in rows] + notes), default=0)
    labels = min(max(0.56 * SIZE * longest + 14, 0.3 * width), 0.5 * width) if beside else 0
    wrap = width if beside else int(width / (0.54 * SIZE))
    lines = max(len(textwrap.wrap(note, wrap)[:2]) for note in [*notes, ""])
    row = (24 if beside else 40) + 14 * lines
    head = [30 if name else 6 for name, _ in panels]
    height = sum(top + row * len(rows) + 26 for top, (_, rows) in zip(head, panels, strict=True))
    page = Canvas(width, height, title, description)
    left, right = (labels, width - 118) if beside else (6, width - 6)
    top = 0.0
    for space, (name, rows) in zip(head, panels, strict=True):
        if name:
            page.text(0, top + 18, name, weight="bold", room=width)
        top += space
        values = [bar.value for bar in rows if bar.value]
        axis = page.axes(left, top, right - left, row * len(rows))
        axis.set_ylim(row * len(rows), 0)
        ticks = ratios_axis(axis, values, not beside) if origin else amounts_axis(axis, values)
        for index, bar in enumerate(rows):
            _label(page, bar, top + row * index, row, labels, wrap)
            if bar.value is not None:
                _bar(axis, bar, row * index + (row / 2 if beside else row - 10), ticks, origin)
        axis.set_xticks(ticks if values else [], [f"{tick:g}{unit}" for tick in ticks if values])
        top += row * len(rows) + 26
    return page.figure


def _label(page, bar: Bar, top: float, row: float, labels: float, wrap: int) -> None:
    """Write a row's words: at the left of its bar, in a column of that width if any, or above."""
    first = top + (row / 2 + 4 if labels and not bar.note else 15)
    room = labels - 8 if labels else page.width - 8 - 0.6 * SIZE * len(bar.says)
    page.text(0, first, bar.label, room=room, tip=bar.tip or bar.label)
    for number, line in enumerate(textwrap.wrap(bar.note, wrap)[:2], 1):
        room = labels - 8 if labels else page.width
        page.text(0, first + 14 * number, line, color=MUTED, size=SIZE - 1, room=room)
    says = {"color": COLORS[bar.color][0], "weight": "bold", "tip": bar.tip}
    if labels and bar.value is None:
        says["room"] = page.width - labels
        page.text(labels + 6, top + row / 2 + 4, bar.says, **says)
    elif labels:
        page.text(page.width - 108, top + row / 2 + 4, bar.says, **says)
    else:
        page.text(page.width, first, bar.says, anchor="right", **says)


def _bar(axis: Axes, bar: Bar, middle: float, ticks: Sequence[float], origin: float) -> None:
    low, high = axis.get_xlim()
    axis.vlines(ticks, middle - 9, middle + 9, color=LINE, linewidth=1, zorder=0)
    ends = sorted((origin, min(max(bar.value, low), high)))
    color = COLORS[bar.color][0]
    (drawn,) = axis.barh(middle, ends[1] - ends[0], left=ends[0], height=13, color=color)
    drawn.set_gid(f"tip:{clean(bar.tip or f'{bar.label}: {bar.says}')}")
    if bar.low and bar.high:
        ends = [min(max(end, low), high) for end in (bar.low, bar.high)]
        axis.hlines(middle, *ends, color=INK, linewidth=1)
        inside = [end for end in (bar.low, bar.high) if low <= end <= high]
        axis.vlines(inside, middle - 3.5, middle + 3.5, color=INK, linewidth=1)
    axis.vlines(origin, middle - 10, middle + 10, color=INK, linewidth=1.2)


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
    from_zero: bool = False,
    roof: tuple[float, float] | None = None,
    names: Sequence[tuple[float, str]] = (),
) -> Figure:
    """Draw points, joined or not, with their names in their colors above.

    `roof`: slope up to its ridge, and the height where it is flat. `names`: texts at an x, below
    the lowest point there, as far as there is room.
    """
    page = Canvas(width, height, title, description)
    rows = page.key(series)
    top, below = 12 + 16 * rows, 40 if x_label else 24
    axis = page.axes(52, top + 14, width - 62, height - top - 14 - below)
    values = [v for one in series for part in (one.y, one.low, one.high) for v in part]
    xs = [x for one in series for x in one.x]
    if roof is not None:
        values, xs = [*values, roof[1]], [*xs, roof[1] / roof[0]]
    scale(axis, "x", xs, log_x, 1.5 if roof else 1.12, ticks)
    above = 1.8 if names else 1.3
    scale(axis, "y", [*values, 0.0] if from_zero else values, log_y, above, ())
    if from_zero:
        axis.set_ylim(bottom=min([*values, 0.0]))
    axis.grid(color=LINE, linewidth=1)
    page.text(0, top + 4, y_label, color=MUTED, size=SIZE - 1)
    middle = 52 + (width - 62) / 2
    page.text(middle, height - 6, x_label, color=MUTED, size=SIZE - 1, anchor="center")
    if roof is not None:
        (left, right), (bottom, _), ridge = axis.get_xlim(), axis.get_ylim(), roof[1] / roof[0]
        left = max(left, bottom / roof[0])
        at = [left, ridge, right], [left * roof[0], roof[1], roof[1]]
        axis.add_line(Line2D(*at, color=INK, linewidth=1.5))
        for x in sorted(set(xs[:-1])):
            column = [y for one in series for a, y in zip(one.x, one.y, strict=True) if a == x]
            axis.vlines(x, min(column), max(column), color=LINE, linewidth=2)
    for one in reversed(series):  # the first above the others
        _points(axis, one, joined, markers)
    page.names(axis, names, series)
    return page.figure


def _points(axis: Axes, one: Series, joined: bool, markers: bool) -> None:
    style = {"color": one.color, "linewidth": 1.8 if joined else 0}
    marks = MARKERS[one.number % len(MARKERS)]
    if markers:
        style |= {"marker": marks, "markersize": 6}
    for x, low, high in zip(one.x, one.low, one.high, strict=False):
        axis.vlines(x, low, high, color=one.color, linewidth=1)
    (drawn,) = axis.plot(one.x, one.y, **style)
    drawn.set_gid(f"tip:{clean(one.name)}")
    for x, y, tip in zip(one.x, one.y, one.tips, strict=False):  # seen by a pointer alone
        (spot,) = axis.plot(x, y, marker="o", markersize=12, color=INK, alpha=0)
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
    page = Canvas(width, 36 * len(rows) + 24, title, description)
    axis = page.axes(6, 0, width - 12, 36 * len(rows))
    axis.set_ylim(36 * len(rows), 0)
    scale(axis, "x", [value for _, _, samples, _ in rows for value in samples], False, 1.02, ())
    axis.set_xticks(ticks := list(axis.get_xticks()), [f"{tick:g} {unit}" for tick in ticks])
    for index, (name, number, samples, median) in enumerate(rows):
        color, top = COLORS[f"series-{number % SERIES}"][0], 36 * index
        page.text(0, top + 13, name, color=color, size=SIZE - 1, weight="bold", room=width)
        xs = [x for value in samples for x in (value, value, math.nan)]
        ys = [y for _ in samples for y in (top + 18, top + 30, math.nan)]
        axis.add_line(Line2D(xs, ys, color=color, linewidth=1, alpha=0.6))
        axis.vlines(median, top + 16, top + 33, color=INK, linewidth=2)
    return page.figure


def stretches(
    rows: Sequence[tuple[str, str, Sequence[tuple[float, float, float]]]],
    *,
    title: str,
    description: str = "",
    x_label: str = "",
    y_label: str = "",
    ends: tuple[str, str] | None = None,
    width: int = NARROW,
) -> Figure:
    """Draw values over stretches of x as colors, from none at 0 to the fullest at the largest.

    rows: (label, tip, stretches of (begin, end, value)); rows in turn that share a label have it
    once, at their middle. ends: what the key says of 0 and the largest, if not these numbers.
    """
    row = min(max(200 / max(len(rows), 1), 3), 16)
    page = Canvas(width, 24 + row * len(rows) + 40, title, description)
    every = [part for _, _, parts in rows for part in parts]
    most = max((value for _, _, value in every), default=0) or 1
    blue = matplotlib.colors.to_rgb(COLORS["series-0"][0])
    axis = page.axes(84, 24, width - 94, row * len(rows))
    at = [x for begin, end, _ in every for x in (begin, end)]
    scale(axis, "x", at, False, 1.0, ())
    axis.set_xlim(min(at, default=0), max(at, default=1))
    axis.set_ylim(len(rows), 0)
    for index, (_, tip, parts) in enumerate(rows):
        spans = [(begin, end - begin) for begin, end, _ in parts]
        shades = [(*blue, value / most) for _, _, value in parts]
        drawn = axis.broken_barh(spans, (index, 1), facecolors=shades, linewidth=0)
        drawn.set_gid(f"tip:{clean(tip)}")
    first = 0
    for label, group in itertools.groupby(label for label, _, _ in rows):
        last = first + len(list(group))
        axis.axhline(first, color=LINE, linewidth=1)
        page.text(0, 28 + row * (first + last) / 2, label, size=SIZE - 1, room=80)
        first = last
    key = page.axes(width - 82, 4, 50, 10)
    key.set_xticks([])
    for fifth in range(6):
        key.axvspan(fifth, fifth + 1, facecolor=(*blue, fifth / 5), linewidth=0)
    least, largest = ends or ("0", f"{most:g}")
    page.text(width - 86, 13, least, color=MUTED, size=SIZE - 1, anchor="right")
    page.text(width - 28, 13, largest, color=MUTED, size=SIZE - 1)
    room = width - 94 - 0.56 * SIZE * len(least)
    page.text(0, 13, y_label, color=MUTED, size=SIZE - 1, room=room)
    middle, below = 84 + (width - 94) / 2, 24 + row * len(rows) + 34
    page.text(middle, below, x_label, color=MUTED, size=SIZE - 1, anchor="center")
    return page.figure


def svg(figure: Figure, theme: str = "light", salt: str = "peftkern") -> str:
    """Return the SVG; of figures on one page each has a `salt` of its own, that ids differ."""
    for artist in figure.findobj():  # nothing lies outside, and a clip path would need a reference
        artist.set_clip_on(False)
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
