"""Figures of the HTML report: bars of speed-ups, roofline, times over M and over r."""

from __future__ import annotations

from collections.abc import Callable

from peftkern.tools.bench import charts
from peftkern.tools.bench.charts import Point, Series
from peftkern.tools.bench.markup import Markup, join, tag
from peftkern.tools.bench.record import OURS, Case, Provider, Record
from peftkern.tools.bench.terminal import SHORT, copies, is_bound, number, speed_up, title

BOUND = "without the adapter: does less"  # of the frozen layer, where it is the baseline
KINDS = {"faster": "faster", "slower": "slower", "level": "≈"}

Labels = dict[tuple[str, str], int]
Span = Callable[[Provider, Provider], tuple[float, float]]


def numbered(record: Record) -> Labels:
    """Enumerate every (name, label) of a provider: a label may differ from op to op."""
    found: Labels = {}
    for case in record["cases"]:
        for name, row in case["providers"].items():
            found.setdefault((name, row["label"]), len(found))
    return found


def speed_ups(record: Record) -> Markup | None:
    """Draw their time over ours; the whisker spans the range of the two intervals' ratio, so it
    includes 1 exactly if the difference is within the noise."""

    def span(ours: Provider, theirs: Provider) -> tuple[float, float]:
        return theirs["p20_ms"] / ours["p80_ms"], theirs["p80_ms"] / ours["p20_ms"]

    cases = [case for case in record["cases"] if case["mode"] != "memory"]
    note = "Their median over peftkern's, beside the baseline that speaks for each case. Whiskers"
    note += " and brackets: from their p20 over our p80 to their p80 over our p20. The axis is"
    note += " logarithmic, so that half as fast is as far from 1 as twice as fast."
    return _bars(cases, "median_ms", span, note)


def memory(record: Record) -> Markup | None:
    cases = [case for case in record["cases"] if case["mode"] == "memory"]
    note = "Their peak over peftkern's: what a call holds beyond what was there before it."
    return _bars(cases, "peak_bytes", None, note)


def _bars(cases: list[Case], field: str, span: Span | None, note: str) -> Markup | None:
    if not cases:
        return None
    ratios = {}
    for index, case in enumerate(cases):
        ours, theirs = case["providers"][OURS], case["providers"].get(case["against"] or OURS)
        if case["against"] not in (None, OURS) and ours[field] and theirs[field]:
            ratios[index] = theirs[field] / ours[field]
    axis = charts.ratio_axis(list(ratios.values()))
    items = [tag("li", tag("span"), charts.ratio_scale(axis), class_="scale")] if ratios else []
    for index, case in enumerate(cases):
        items.append(_bar(case, ratios.get(index), axis, span))
    return join([tag("p", note, class_="muted"), tag("ul", *items, class_="bars")])


def _bar(case: Case, ratio: float | None, axis: charts.Axis, span: Span | None) -> Markup:
    against = case["against"]
    if against in (None, OURS):
        versus = "no baseline with a right result"
    else:
        versus = f"beside {case['providers'][against]['label']}"
        versus += f" ({BOUND})" if is_bound(case, against) else ""
    label = tag("div", title(case), tag("div", versus, class_="versus"))
    ours = case["providers"][OURS]
    if ratio is None:
        what = why(ours) or "nothing to compare with"
        return tag("li", label, tag("div", what, class_="only"))
    low, high = span(ours, case["providers"][against]) if span else (None, None)
    found = speed_up(case, against) if span else None
    level = found[1] if found else ratio == 1
    kind = "level" if level else "faster" if ratio > 1 else "slower"
    words = KINDS if span else {"faster": "less", "slower": "more", "level": "the same"}
    value = [tag("span", f"{times(ratio)} ({words[kind]})", class_=kind)]
    if span:
        value.append(tag("small", f"[{times(low)} - {times(high)}]"))
    bar = charts.ratio_bar(axis, ratio, low, high, kind)
    return tag("li", label, bar, tag("div", *value, class_="value"))


def roofline(record: Record, labels: Labels) -> Markup | None:
    """Draw a roofline per dtype, as each has its own roof; ops without FLOPs are left out."""
    figures, used = [], set()
    for dtype, short in SHORT.items():
        cases = [case for case in record["cases"] if case["dtype"] == dtype and case["flops"]]
        points: dict[int, list[Point]] = {}
        for case in cases:
            for name, row in case["providers"].items():
                if row["tflop_s"] and case["bytes"]:
                    says = f"{row['label']}, {title(case)}: {row['tflop_s']:.3g} TFLOP/s"
                    point = Point(case["flops"] / case["bytes"], row["tflop_s"], says)
                    points.setdefault(labels[name, row["label"]], []).append(point)
        if not points:
            continue
        used.update(points)
        copy, top = record["roof"]["copy"] / 1e12, record["roof"][dtype] / 1e12
        xs = [point.x for series in points.values() for point in series]
        svg = charts.plot(
            _series(points),
            charts.axis([*xs, top / copy], charts.LEFT, charts.RIGHT, margin=1.5, least=10),
            340,
            label=f"Roofline in {short}: floating-point operations per byte against TFLOP/s",
            x_label="FLOP per byte",
            y_label="TFLOP/s",
            ceiling=(copy, top),
        )
        said = f"{copies(record)}, dense products {top:.3g} TFLOP/s"
        caption = tag("figcaption", short, tag("small", f"Roof, measured in this run: {said}"))
        figures.append(tag("figure", caption, svg, class_="wide"))
    if not figures:
        return None
    note = "Each result at the operations per byte that its case needs at least. The line is what"
    note += " this machine's memory and its dense products allow."
    return join([tag("p", note, class_="muted"), _legend(labels, used), *figures])


def scaling(record: Record, labels: Labels, over: str) -> Markup | None:
    """Draw a chart of the cases that differ only in `over` ("M" or "r"), if at least two."""
    groups: dict[tuple, list[Case]] = {}
    for case in record["cases"]:
        if case[over]:
            groups.setdefault(_apart_from(case, over), []).append(case)
    figures, used = [], set()
    for cases in groups.values():
        values = sorted({case[over] for case in cases})
        if len(values) < 2:
            continue
        memory = cases[0]["mode"] == "memory"
        points: dict[int, list[Point]] = {}
        silent = []
        for case in sorted(cases, key=lambda case: case[over]):
            for name, row in case["providers"].items():
                if point := _measured(case, row, over, memory):
                    points.setdefault(labels[name, row["label"]], []).append(point)
                else:
                    silent.append(f"{row['label']} at {case[over]}: {_kind(row) or 'no result'}")
        if not points:
            continue
        used.update(points)
        unit = "peak MB" if memory else "ms"
        svg = charts.plot(
            _series(points),
            charts.axis(values, charts.LEFT, charts.RIGHT, margin=1.15, least=2),
            240,
            label=f"{title(cases[0], without=over)}: {unit} over {over}",
            x_label="rows M" if over == "M" else "rank r",
            y_label=unit,
            x_ticks=values,
            joined=True,
        )
        missing = tag("small", "; ".join(silent), class_="error") if silent else None
        caption = tag("figcaption", title(cases[0], without=over), missing)
        figures.append(tag("figure", caption, svg))
    if not figures:
        return None
    note = "Median of one call, whiskers p20 to p80; lower is better. Both axes are logarithmic."
    grid = tag("div", *figures, class_="charts")
    return join([tag("p", note, class_="muted"), _legend(labels, used), grid])


def _apart_from(case: Case, over: str) -> tuple:
    """Return the key of cases that differ only in `over`; numeric shapes name rows, too."""
    given = case["shape"] == f"{case['M']}x{case['N']}x{case['K']}"
    shape = "" if given else case["shape"]
    keys = ("op", "M", "N", "K", "r", "dtype", "mode")
    return (shape, *(case[key] for key in keys if key != over))


def _measured(case: Case, row: Provider, over: str, memory: bool) -> Point | None:
    if memory:
        if not row["peak_bytes"]:
            return None
        peak = row["peak_bytes"] / 1e6
        return Point(case[over], peak, f"{row['label']}, {over}={case[over]}: {number(peak)} MB")
    if not row["median_ms"]:
        return None
    low, high = row["p20_ms"], row["p80_ms"]
    says = f"{row['label']}, {over}={case[over]}: {_interval(row)} ms"
    return Point(case[over], row["median_ms"], says, low, high)


def _series(points: dict[int, list[Point]]) -> list[Series]:
    return [Series(one, tuple(points[one])) for one in sorted(points)]


def _legend(labels: Labels, used: set[int]) -> Markup:
    return charts.legend([(index, label) for (_, label), index in labels.items() if index in used])


def why(row: Provider) -> Markup | None:
    """Return why it has no result; None if it has."""
    if (kind := _kind(row)) is None:
        return None
    return join([tag("strong", kind, class_="error"), f" {row['wrong'] or row['failed']}"])


def _kind(row: Provider) -> str | None:
    return "WRONG" if row["wrong"] is not None else "FAILED" if row["failed"] is not None else None


def _interval(row: Provider) -> str:
    return f"{number(row['median_ms'])} [{number(row['p20_ms'])}-{number(row['p80_ms'])}]"


def times(ratio: float) -> str:
    """Format with two decimals where significant, else three digits."""
    return f"{ratio:.2f}x" if 0.1 <= ratio < 100 else f"{ratio:.3g}x"
