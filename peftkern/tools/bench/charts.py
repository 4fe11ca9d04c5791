"""SVG charts of the report: bars of ratios, points and lines over logarithmic axes.

Horizontal positions are shares of the width, vertical ones pixels: a chart is as wide as its place
and its text keeps its size, on a phone as on a desk. Colors are classes of `report_style`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from peftkern.tools.bench.markup import Markup, join, tag, text

COLORS, MARKERS = 8, 5  # .s0 to .s7 in report_style; #m0 to #m4 below
LEFT, RIGHT = 13.0, 97.0  # edges of the plot, in percent of the width
TOP, BOTTOM = 22.0, 38.0  # pixels above and below it
NARROW = 4.2  # percent of the bars' width per character of their scale on a small phone
SHAPES = (
    "M-4.5 0a4.5 4.5 0 1 0 9 0a4.5 4.5 0 1 0 -9 0z",  # a disc: peftkern
    "M-4 -4h8v8h-8z",
    "M0 -5.5L5.5 0L0 5.5L-5.5 0z",
    "M0 -5L5 4H-5z",
    "M0 5L5 -4H-5z",
)


@dataclass(frozen=True)
class Axis:
    """Logarithmic axis from `low` to `high`, which are drawn at `start` and `end`."""

    low: float
    high: float
    start: float
    end: float

    def at(self, value: float) -> float:
        low, high = math.log(self.low), math.log(self.high)
        share = (math.log(value) - low) / (high - low)
        return self.start + (self.end - self.start) * share

    def inside(self, value: float) -> float:
        """Clamp a position to the axis."""
        return self.at(min(max(value, self.low), self.high))

    def ticks(self, most: int) -> list[float]:
        """Return at most so many round numbers: 1, 2, 5 within a decade or two, else 10^n."""
        first, last = math.floor(math.log10(self.low)), math.ceil(math.log10(self.high))
        for mantissas in ((1, 1.5, 2, 3, 4, 5, 6, 8), (1, 2, 5), (1, 3), (1,)):
            found = [m * 10.0**e for e in range(first, last + 1) for m in mantissas]
            found = [tick for tick in found if self.low <= tick <= self.high]
            if len(found) <= most:
                return found
        step = -(-len(found) // most)
        return [tick for tick in found if round(math.log10(tick)) % step == 0]


def axis(values: Sequence[float], start: float, end: float, *, margin: float, least: float) -> Axis:
    """Build an axis around all values, with a factor of `margin` beyond and of `least` in all."""
    low, high = min(values) / margin, max(values) * margin
    if high / low < least:
        middle = math.sqrt(low) * math.sqrt(high)
        low, high = middle / math.sqrt(least), middle * math.sqrt(least)
    return Axis(low, high, start, end)


@dataclass(frozen=True)
class Point:
    """Data point; `low` and `high` are the ends of its whisker."""

    x: float
    y: float
    says: str
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True)
class Series:
    number: int  # decides color and marker
    points: tuple[Point, ...]


def markers() -> Markup:
    """Define the markers that the charts and legends refer to; once per page."""
    paths = [tag("path", id=f"m{i}", d=shape) for i, shape in enumerate(SHAPES)]
    return tag("svg", tag("defs", *paths), width=0, height=0, class_="defs", aria_hidden="true")


def legend(names: Sequence[tuple[int, str]]) -> Markup:
    """Draw the legend of series, by their numbers."""
    items = []
    for number, name in names:
        sample = tag("svg", _marker(number, "50%", 7), width=14, height=14, aria_hidden="true")
        items.append(tag("li", sample, tag("span", name)))
    return tag("ul", *items, class_="legend")


def plot(
    series: Sequence[Series],
    x: Axis,
    height: int,
    *,
    label: str,
    x_label: str,
    y_label: str,
    x_ticks: Sequence[float] | None = None,
    joined: bool = False,
    ceiling: tuple[float, float] | None = None,
) -> Markup:
    """Plot points with whiskers, optionally joined by lines per series, under a roof if given:
    `ceiling` is its slope, and the height where it becomes flat."""
    values = [
        value
        for one in series
        for point in one.points
        for value in (point.y, point.low, point.high)
        if value
    ]
    if ceiling is not None:
        values.append(ceiling[1])
    y = axis(values, height - BOTTOM, TOP, margin=1.3, least=4)
    parts = [_grid(x, y, x_ticks)]
    parts.append(tag("text", y_label, x="0", y=12, class_="axis"))
    parts.append(tag("text", x_label, x="55%", y=height - 4, class_="axis", text_anchor="middle"))
    if ceiling is not None:
        parts.append(_roof(x, y, *ceiling))
    for one in reversed(series):  # ours above the others
        if joined:
            parts += [
                _line(x, y, (a.x, a.y), (b.x, b.y), f"s{one.number % COLORS} path")
                for a, b in zip(one.points, one.points[1:], strict=False)
            ]
        for point in one.points:
            if point.low and point.high:
                ends = (point.x, point.low), (point.x, point.high)
                parts.append(_line(x, y, *ends, f"s{one.number % COLORS} whisker"))
            at = percent(x.at(point.x)), f"{y.at(point.y):.1f}"
            parts.append(_marker(one.number, *at, tag("title", point.says)))
    return tag("svg", *parts, width="100%", height=height, role="img", aria_label=label)


def ratio_axis(ratios: Sequence[float]) -> Axis:
    """Build an axis around 1 and all ratios; longer whiskers are cut, their figures are not."""
    return axis([*ratios, 1.0], 1.0, 99.0, margin=1.6, least=4)


def ratio_scale(x: Axis) -> Markup:
    """Draw the labels above bars."""
    labels: list[Markup] = []
    taken: list[tuple[float, float]] = []
    for tick in sorted({1.0, *x.ticks(5)}, key=lambda tick: abs(math.log(tick))):
        at, label = x.at(tick), f"{tick:g}x"
        width = NARROW * len(label)
        left = min(max(at - width / 2, 0.0), 100.0 - width)
        if all(left > end or left + width < start for start, end in taken):
            taken.append((left, left + width))
            anchor = "start" if left == 0 else "end" if left == 100 - width else "middle"
            edge = 0.0 if left == 0 else 100.0 if anchor == "end" else at
            labels.append(tag("text", label, x=percent(edge), y=13, text_anchor=anchor))
    return tag("svg", *labels, width="100%", height=18, aria_hidden="true")


def ratio_bar(x: Axis, ratio: float, low: float | None, high: float | None, kind: str) -> Markup:
    """Draw a bar from 1 to the ratio, with a whisker; `kind` is its class."""
    lines = [
        tag("line", x1=at, x2=at, y1=0, y2=24, class_="one" if tick == 1 else "grid")
        for tick in sorted({*x.ticks(5), 1.0})
        for at in [percent(x.at(tick))]
    ]
    ends = sorted((x.at(1), x.at(ratio)))
    width = percent(max(ends[1] - ends[0], 0.4))
    parts = [tag("rect", x=percent(ends[0]), y=5, width=width, height=14, class_=kind)]
    if low and high:
        left, right = percent(x.inside(low)), percent(x.inside(high))
        parts.append(tag("line", x1=left, x2=right, y1=12, y2=12, class_="whisker"))
        parts += [
            tag("line", x1=at, x2=at, y1=8, y2=16, class_="whisker")
            for at, end in ((left, low), (right, high))
            if x.low <= end <= x.high
        ]
    return tag("svg", *lines, *parts, width="100%", height=24, aria_hidden="true")


def percent(value: float) -> str:
    return f"{value:.2f}%"


def _marker(number: int, x: object, y: object, title: Markup | None = None) -> Markup:
    classes = f"s{number % COLORS} mark"
    return tag("use", title, href=f"#m{number % MARKERS}", x=x, y=y, class_=classes)


def _line(x: Axis, y: Axis, a: tuple[float, float], b: tuple[float, float], kind: str) -> Markup:
    (x1, y1), (x2, y2) = ((percent(x.inside(p)), f"{y.inside(q):.1f}") for p, q in (a, b))
    return tag("line", x1=x1, y1=y1, x2=x2, y2=y2, class_=kind)


def _grid(x: Axis, y: Axis, x_ticks: Sequence[float] | None) -> Markup:
    parts = []
    for tick in y.ticks(6):
        at = f"{y.at(tick):.1f}"
        parts.append(tag("line", x1=percent(LEFT), x2=percent(RIGHT), y1=at, y2=at, class_="grid"))
        where = {"x": percent(LEFT - 1.5), "y": f"{y.at(tick) + 4:.1f}"}
        parts.append(tag("text", f"{tick:g}", **where, text_anchor="end"))
    free = 0.0  # where the next label may begin
    for tick in x.ticks(6) if x_ticks is None else x_ticks:
        at = percent(x.at(tick))
        parts.append(tag("line", x1=at, x2=at, y1=y.start, y2=y.end, class_="grid"))
        label = text(f"{tick:g}")
        if x.at(tick) - len(label) > free:
            parts.append(tag("text", label, x=at, y=y.start + 15, text_anchor="middle"))
            free = x.at(tick) + len(label) + 1
    return join(parts)


def _roof(x: Axis, y: Axis, slope: float, top: float) -> Markup:
    ridge = top / slope
    left = max(x.low, y.low / slope)
    parts = []
    if left < ridge:
        end = min(ridge, x.high)
        parts.append(_line(x, y, (left, left * slope), (end, end * slope), "roof"))
    if ridge < x.high:
        parts.append(_line(x, y, (max(ridge, x.low), top), (x.high, top), "roof"))
    return join(parts)
