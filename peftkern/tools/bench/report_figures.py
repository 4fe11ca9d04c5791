"""Figures of the HTML report: speed-ups, roofline, times over M and r, memory, samples."""

from __future__ import annotations

from matplotlib.figure import Figure

from peftkern.tools import charts
from peftkern.tools.bench.cases import SHORT
from peftkern.tools.bench.compare import Change
from peftkern.tools.bench.names import about, people, times, tokens
from peftkern.tools.bench.record import OURS, Case, Provider, Record
from peftkern.tools.bench.rows import product_rate, ratio_at_least
from peftkern.tools.bench.terminal import copies, first_call, is_bound, number, speed_up

BOUND = "without the adapter: does less"  # of the frozen layer, where it is the baseline
WIDTHS = {"wide": charts.WIDE, "narrow": charts.NARROW}
Labels = dict[tuple[str, str], int]


def numbered(record: Record) -> Labels:
    """Enumerate every (name, label) of a provider, peftkern first: a label may differ from op to
    op."""
    found: Labels = {}
    for case in record["cases"]:
        for name, row in case["providers"].items():
            found.setdefault((name, row["label"]), len(found))
    return found


def bars(record: Record) -> list[charts.Bar]:
    """Bars of every timed case: the time of the baseline that speaks for it over ours. The whisker
    includes 1 exactly if the difference is within the noise."""
    return [_bar(case) for case in record["cases"] if case["mode"] != "memory"]


def _bar(case: Case) -> charts.Bar:
    against, ours = case["against"], case["providers"][OURS]
    if against is None or not compares(case, against):
        bad = "wrong" if ours["wrong"] is not None else "failed" if ours["failed"] else None
        note = f"{about(case)}; no baseline with a right result"
        return charts.Bar(
            people(case), bad or "alone", None, "error" if bad else "level", note=note
        )
    bound = f" ({BOUND})" if is_bound(case, against) else ""
    note = f"{about(case)}; against {case['providers'][against]['label']}{bound}"
    return bar_of(case, against, people(case), note)


def compares(case: Case, name: str) -> bool:
    """Return whether a baseline has a speed-up, or a lower bound of one."""
    return speed_up(case, name) is not None or ratio_at_least(case, name) is not None


def bar_of(case: Case, name: str, label: str, note: str = "") -> charts.Bar:
    """Return the bar of a baseline that `compares`; of a lower bound it has no whisker, and is gray
    where that says nothing."""
    if (least := ratio_at_least(case, name)) is not None:
        says = f"> {times(least)}"
        tip = f"{case['name']}: {says}, its first call was stopped"
        color = "faster" if least > 1 else "level"
        return charts.Bar(label, says, least, color, note=note, tip=tip)
    (ratio, noise), ours, theirs = (
        speed_up(case, name),
        case["providers"][OURS],
        case["providers"][name],
    )
    low, high = theirs["p20_ms"] / ours["p80_ms"], theirs["p80_ms"] / ours["p20_ms"]
    color = "level" if noise else "faster" if ratio > 1 else "slower"
    tip = f"{case['name']}: {times(ratio)} [{times(low)} to {times(high)}]"
    says = f"{'≈ ' if noise else ''}{times(ratio)}"
    return charts.Bar(label, says, ratio, color, low, high, note, tip)


def speed_ups(record: Record) -> dict[str, Figure]:
    """Draw the bars; {} without any. Of a phone's and of a desk's width, as all in a dict."""
    title = "Speed-up of peftkern, case by case"
    return (
        _both([("", found)], title, "Right of 1x peftkern is faster")
        if (found := bars(record))
        else {}
    )


def changes(found: list[Change], fail_if: float, cases: dict[str, Case]) -> dict[str, Figure]:
    rows = []
    for one in found:
        ratio, case = 1 / (1 + one.slower), cases[one.case]
        level = abs(one.slower) <= fail_if
        color = "level" if level else "slower" if ratio < 1 else "faster"
        note = f"{about(case)}; by {one.by}"
        rows.append(charts.Bar(people(case), times(ratio), ratio, color, note=note))
    return _both([("", rows)], "Speed now over speed before", "Right of 1x is faster than before")


def _both(panels, title: str, description: str) -> dict[str, Figure]:
    return {
        name: charts.bars(panels, title=title, description=description, width=width)
        for name, width in WIDTHS.items()
    }


def rooflines(record: Record, labels: Labels) -> list[tuple[str, dict[str, Figure]]]:
    """Draw a roofline per dtype, as each has its own roof; ops without FLOPs are left out."""
    figures = []
    for dtype, short in SHORT.items():
        series: dict[int, charts.Series] = {}
        names: dict[float, str] = {}
        cases = [case for case in record["cases"] if case["dtype"] == dtype and case["flops"]]
        one_weight = len({people(case, without="M") for case in cases}) == 1
        for case in cases:
            for name, row in case["providers"].items():
                if not (row["tflop_s"] and case["bytes"]):
                    continue
                at, key = case["flops"] / case["bytes"], (name, row["label"])
                one = charts.Series(row["label"], labels[key], [], [], tips=[])
                one = series.setdefault(labels[key], one)
                one.x.append(at)
                one.y.append(row["tflop_s"])
                one.tips.append(f"{row['label']}, {case['name']}: {row['tflop_s']:.3g} TFLOP/s")
                said = tokens(case["M"]) if one_weight and case["M"] else people(case)
                names.setdefault(at, said)
        if not series:
            continue
        roof = record["roof"]["copy"] / 1e12, product_rate(dtype, record["roof"]) / 1e12
        drawn = {
            name: charts.lines(
                [series[number] for number in sorted(series)],
                title=f"Roofline in {short}",
                description="Operations per byte against TFLOP/s, below what the machine allows",
                x_label="FLOP per byte",
                y_label="TFLOP/s",
                width=min(width, 900),
                height=360,
                log_x=True,
                log_y=True,
                joined=False,
                roof=roof,
                names=list(names.items()),
            )
            for name, width in WIDTHS.items()
        }
        said = f"{short}: {copies(record)}, dense products {roof[1]:.3g} TFLOP/s"
        figures.append((said, drawn))
    return figures


def scaling(record: Record, labels: Labels, over: str) -> list[tuple[Case, Figure, list[str]]]:
    """Draw a chart of the cases that differ only in `over` ("M" or "r"), if at least two; with
    what has no point in it."""
    groups: dict[tuple, list[Case]] = {}
    for case in record["cases"]:
        if case[over]:
            groups.setdefault(_apart_from(case, over), []).append(case)
    figures = []
    for cases in groups.values():
        values = sorted({case[over] for case in cases})
        if len(values) < 2:
            continue
        memory = cases[0]["mode"] == "memory"
        series: dict[int, charts.Series] = {}
        silent = []
        for case in sorted(cases, key=lambda case: case[over]):
            for name, row in case["providers"].items():
                points = _measured(row, memory)
                if points is None:
                    said = first_call(row) or "no result"
                    silent.append(f"{row['label']} at {case[over]}: {said}")
                    continue
                number = labels[name, row["label"]]
                one = charts.Series(row["label"], number, [], [], [], [], [])
                one = series.setdefault(number, one)
                tip = f"{row['label']}, {over}={case[over]}: {points[-1]}"
                parts = one.x, one.y, one.low, one.high, one.tips
                for part, value in zip(parts, (case[over], *points[:-1], tip), strict=True):
                    part.append(value)
        if series:
            figure = charts.lines(
                [series[number] for number in sorted(series)],
                title=f"{people(cases[0], over)}, {about(cases[0], over)}: over {over}",
                description="lower is better",
                x_label="tokens (rows M)" if over == "M" else "rank r",
                y_label="peak MB" if memory else "ms",
                log_x=True,
                log_y=True,
                ticks=values,
            )
            figures.append((cases[0], figure, silent))
    return figures


def _apart_from(case: Case, over: str) -> tuple:
    """Return the key of cases that differ only in `over`; numeric shapes name rows, too."""
    given = case["shape"] == f"{case['M']}x{case['N']}x{case['K']}"
    shape = "" if given else case["shape"]
    keys = ("op", "M", "N", "K", "r", "dtype", "mode")
    return (shape, *(case[key] for key in keys if key != over))


def _measured(row: Provider, memory: bool) -> tuple[float, float, float, str] | None:
    """Return the height, the ends of the whisker, and the text of a point."""
    if memory:
        peak = (row["peak_bytes"] or 0) / 1e6
        return (peak, peak, peak, f"{number(peak)} MB") if peak else None
    if not row["median_ms"]:
        return None
    middle, low, high = (row[key] for key in ("median_ms", "p20_ms", "p80_ms"))
    return middle, low, high, f"{number(middle)} [{number(low)}-{number(high)}] ms"


def memory(record: Record) -> list[tuple[Case, Figure]]:
    """Draw peaks: those of the cases that measure nothing else, or all if there are none."""
    cases = [
        case
        for case in record["cases"]
        if any(row["peak_bytes"] for row in case["providers"].values())
    ]
    apart = [case for case in cases if case["mode"] == "memory"]
    figures = []
    for case in apart or cases:
        rows = [
            charts.Bar(
                row["label"],
                f"{number(row['peak_bytes'] / 1e6)} MB",
                row["peak_bytes"] / 1e6,
                "faster" if name == OURS else "level",
            )
            for name, row in case["providers"].items()
            if row["peak_bytes"]
        ]
        title = f"Peak memory of {people(case)}, {about(case)}"
        panels = [("", rows)]
        figure = charts.bars(panels, title=title, width=charts.NARROW, origin=0, unit="")
        figures.append((case, figure))
    return figures


def samples(record: Record, labels: Labels) -> list[tuple[Case, Figure]]:
    """Draw every timed call of every provider."""
    figures = []
    for case in record["cases"]:
        rows = [
            (row["label"], labels[name, row["label"]], row["samples_ms"], row["median_ms"])
            for name, row in case["providers"].items()
            if row["samples_ms"] and row["median_ms"]
        ]
        if rows:
            title = f"Calls of {people(case)}, {about(case)}"
            figures.append((case, charts.strips(rows, title=title)))
    return figures
