"""House style of charts: colors, and a page in pixels for text and axes."""

from __future__ import annotations

import math
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass

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


def clean(text: str) -> str:
    """Replace characters that end a line or a parse, or reverse the text, by U+FFFD."""
    odd = {"Cc", "Cf", "Cs"}
    return "".join("\ufffd" if unicodedata.category(one) in odd else one for one in str(text))


class Canvas:
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
            y = min(y for one in series for a, y in zip(one.x, one.y, strict=True) if a == x)
            at = axis.transData.transform((x, y))
            half = 0.28 * (SIZE - 1) * len(name)
            middle = min(max(at[0], 56 + half), self.width - half)
            if all(middle - half > end or middle + half < begin for begin, end in taken):
                taken.append((middle - half, middle + half))
                where = middle, self.height - max(at[1] - 17, axis.bbox.y0 + 4)
                self.text(*where, name, color=MUTED, size=SIZE - 1, anchor="center")


def ratios_axis(axis: Axes, values: Sequence[float], narrow: bool) -> list[float]:
    """Set a logarithmic axis around 1 and the values; return its ticks."""
    low, high = min([*values, 0.8]) / 1.15, max([*values, 1.25]) * 1.15
    axis.set_xscale("log")
    axis.xaxis.set_minor_locator(FixedLocator([]))
    axis.set_xlim(low, high)
    return _spaced(_decimal(low, high, 6), math.log(high / low) * (0.13 if narrow else 0.1))


def amounts_axis(axis: Axes, values: Sequence[float]) -> list[float]:
    high = max(values, default=1.0) * 1.05
    axis.set_xlim(0, high)
    return [float(tick) for tick in MaxNLocator(5).tick_values(0, high) if tick <= high]


def _decimal(low: float, high: float, most: int) -> list[float]:
    """Return at most so many round numbers, evenly spread on a logarithmic axis."""
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    for mantissas in ((1, 1.25, 1.5, 2, 3, 4, 6, 8), (1, 1.5, 2, 3, 5, 7), (1, 2, 5), (1, 3), (1,)):
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


def scale(axis, which: str, values: Sequence[float], log: bool, margin: float, ticks) -> None:
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
        whole = high - low >= 2 and all(float(value - values[0]).is_integer() for value in values)
        located = MaxNLocator(4, integer=whole).tick_values(low, high)
        found = [tick for tick in located if low <= tick <= high]
    getattr(axis, f"set_{which}lim")(low, high)
    one = getattr(axis, f"{which}axis")
    if ticks and log:
        found = _spaced(found, 0.11 * math.log(high / low))
    one.set_major_locator(FixedLocator(found))
    one.set_minor_locator(FixedLocator([]))
    one.set_major_formatter(lambda value, _: f"{value:g}")
