"""HTML report of a record: one file without network, scripts or other files.

Its policy forbids everything but its own style sheet; all text of the record is escaped by
`markup`. The same record gives the same bytes.
"""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

from peftkern.tools.bench import charts, machine
from peftkern.tools.bench import report_figures as figures
from peftkern.tools.bench.markup import Markup, join, tag
from peftkern.tools.bench.record import OURS, Case, Provider, Record
from peftkern.tools.bench.report_style import STYLE
from peftkern.tools.bench.terminal import (
    SHORT,
    above_roof,
    beside,
    busy_machine,
    copies,
    counts,
    number,
    speed_up,
    title,
)

POLICY = "default-src 'none'; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'"


def write_html(record: Record, path: Path) -> None:
    """Write the report atomically. Raises: OSError."""
    machine.write_text(path, render(record))


def render(record: Record) -> str:
    labels = figures.numbered(record)
    sections = [
        ("speed-up", "Speed-up", figures.speed_ups(record)),
        ("memory", "Peak memory", figures.memory(record)),
        ("roofline", "Roofline", figures.roofline(record, labels)),
        ("rows", "Over rows M", figures.scaling(record, labels, "M")),
        ("rank", "Over rank r", figures.scaling(record, labels, "r")),
        ("table", "Every result", _table(record)),
        ("environment", "Environment", _environment(record)),
        ("raw", "Raw samples", _raw(record)),
    ]
    shown = [(key, name, content) for key, name, content in sections if content]
    name = f"peftkern bench: {_device(record)}, {record['environment']['date'][:10]}"
    head = (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"{tag('title', name)}<style>{STYLE}</style></head>"
    )
    links = [tag("a", name, href=f"#{key}") for key, name, _ in shown]
    parts = [
        join([tag("section", tag("h2", name), content, id=key), "\n"])
        for key, name, content in shown
    ]
    top = ["\n", charts.markers(), _headline(record, labels), tag("nav", *links), "\n"]
    return f"{head}\n{tag('body', tag('main', *top, *parts))}</html>\n"


def _headline(record: Record, labels: figures.Labels) -> Markup:
    facts = record["environment"]
    peers = list(dict.fromkeys(label for name, label in labels if name != OURS))
    date = facts["date"].replace("T", " ").replace("+00:00", " UTC")
    where = [_device(record), f"{facts['threads']} threads", date]
    where.append(f"peftkern {facts['versions'].get('peftkern') or 'of unknown version'}")
    where.append(f"commit {facts['commit'] or 'unknown'}")
    faster, slower, alike = counts(record)
    rows = [(name, row) for case in record["cases"] for name, row in case["providers"].items()]
    wrong, failed = (
        [name for name, row in rows if row[key] is not None] for key in ("wrong", "failed")
    )
    tiles = [
        _tile(faster, "faster", "faster"),
        _tile(slower, "slower", "slower"),
        _tile(alike, "≈ in the noise", "level"),
        _tile(len(wrong), "WRONG", "bad", f"peftkern: {wrong.count(OURS)}"),
        _tile(len(failed), "FAILED", "bad", f"peftkern: {failed.count(OURS)}"),
    ]
    if record["not_reached"]:
        tiles.append(_tile(len(record["not_reached"]), "not reached", "level", "cases"))
    cases = f"{len(record['cases'])} case{'' if len(record['cases']) == 1 else 's'}"
    return join(
        [
            tag("h1", "peftkern bench"),
            tag("p", f"{cases}, peftkern beside: {' · '.join(peers) or 'nobody'}"),
            tag("p", " · ".join(where), class_="muted"),
            tag("ul", *tiles, class_="counts"),
            tag(
                "p",
                "Each comparison of peftkern with one that does the same counts once. Within noise:"
                " their intervals from the 20th to the 80th percentile have a time in common."
                " Every result was compared with a float64 oracle before the clock ran; a wrong one"
                " has no time.",
                class_="muted",
            ),
            tag("ul", *_remarks(record), class_="notes"),
        ]
    )


def _tile(count: int, says: str, kind: str, more: str | None = None) -> Markup:
    parts = tag("strong", count), says, tag("small", more) if more else None
    return tag("li", *parts, class_=kind if count else None)


def _remarks(record: Record) -> Iterator[Markup]:
    """List remarks before the figures: doubts, the extremes, then what is missing, with reasons."""
    if busy := busy_machine(record):
        yield tag("li", busy, class_="error")
    found = sorted(beside(record), key=lambda one: one[2])
    for word, (case, name, ratio, noise) in (
        [("Least favorable", found[0]), ("Most favorable", found[-1])] if found else []
    ):
        label, level = case["providers"][name]["label"], " (≈)" if noise else ""
        yield tag("li", f"{word}: {figures.times(ratio)}{level} beside {label}, {title(case)}")
    if record["environment"]["interpreter"]:
        yield tag("li", "Measured in Triton's interpreter: the times mean nothing.", class_="error")
    for case in record["cases"]:
        for row in case["providers"].values():
            if above := above_roof(row):
                yield tag("li", f"{row['label']}, {title(case)}: {above}")
            if reason := figures.why(row):
                yield tag("li", reason, f" ({row['label']}, {title(case)})")
    if not record["cases"]:
        yield tag("li", "Nothing was measured.", class_="error")
    for name in record["not_reached"]:
        yield tag("li", f"Not reached within {record['budget_s']:g} s: {name}")
    for name, why in record["not_installed"].items():
        yield tag("li", f"Took no part: {name}: {why}")


def _table(record: Record) -> Markup | None:
    if not record["cases"]:
        return None
    names = ("", "ms [p20-p80]", "speed-up", "of roof", "GB/s", "TFLOP/s", "peak MB", "error rms")
    names += ("error max", "calls")
    head = tag("thead", tag("tr", *(tag("th", name, scope="col") for name in names)))
    bodies = [_case_rows(case, len(names)) for case in record["cases"]]
    note = "Speed-up: their time over peftkern's. Of roof: the shortest time that the measured"
    note += " ceilings allow over the median. Errors are relative to a float64 oracle."
    table = tag("table", head, *bodies)
    region = {"class_": "scroll", "tabindex": 0, "role": "region", "aria_label": "Every result"}
    return join([tag("p", note, class_="muted"), tag("div", table, **region)])


def _case_rows(case: Case, columns: int) -> Markup:
    facts = f"at least {number(case['bytes'] / 1e6)} MB to move"
    facts += f" and {number(case['flops'] / 1e9)} GFLOP" if case["flops"] else ""
    facts += f": {number(case['floor_ms'])} ms at the roof"
    again = tag("details", tag("summary", "measure it again"), tag("pre", case["command"]))
    notes = [
        tag("div", f"{row['label']} left it to others: {row['note']}")
        for row in case["providers"].values()
        if row["note"]
    ]
    facts = tag("div", facts, class_="muted")
    name = tag("div", tag("strong", title(case)), facts, *notes, again)
    rows = [tag("tr", tag("th", name, colspan=columns, scope="rowgroup", class_="case"))]
    for provider, row in case["providers"].items():
        label = tag("th", row["label"], scope="row")
        ours = "ours" if provider == OURS else None
        rows.append(tag("tr", label, *_cells(case, provider, row), class_=ours))
    return tag("tbody", *rows)


def _cells(case: Case, name: str, row: Provider) -> list[Markup]:
    errors = [tag("td", _given(row[key], "{:.1e}")) for key in ("error_rms", "error_max")]
    calls = tag("td", len(row["samples_ms"]) or "")
    if reason := figures.why(row):
        return [tag("td", reason, colspan=6, class_="why"), *errors, calls]
    peak = "" if row["peak_bytes"] is None else number(row["peak_bytes"] / 1e6)
    return [
        tag("td", *_time_cell(row)),
        tag("td", _ratio(case, name)),
        tag("td", _given(row["share_of_roof"], "{:.1%}"), "!" if above_roof(row) else None),
        tag("td", _given(row["gb_s"], "{:.3g}")),
        tag("td", _given(row["tflop_s"], "{:.3g}")),
        tag("td", peak),
        *errors,
        calls,
    ]


def _time_cell(row: Provider) -> list[object]:
    if not row["median_ms"]:
        return []
    low, high = (number(row[key]) for key in ("p20_ms", "p80_ms"))
    return [number(row["median_ms"]), tag("small", f" [{low}-{high}]")]


def _ratio(case: Case, name: str) -> Markup | str:
    found = speed_up(case, name)
    if found is None:
        return ""
    ratio, noise = found
    kind = "level" if noise else "faster" if ratio > 1 else "slower"
    return tag("span", f"{'≈ ' if noise else ''}{figures.times(ratio)}", class_=kind)


def _environment(record: Record) -> Markup:
    facts = record["environment"]
    gpu = facts["gpu"]
    roof = [copies(record)] if "copy" in record["roof"] else []
    for dtype, short in SHORT.items():
        if dtype in record["roof"]:
            roof.append(f"{short} products {record['roof'][dtype] / 1e12:.4g} TFLOP/s")
    pairs: list[tuple[str, object]] = [("device", record["device"]), ("CPU", facts["cpu"])]
    isas = f"{facts['isa'] or 'none'}, of {', '.join(facts['isas']) or 'none'}"
    pairs.append(("instruction set", isas))
    if gpu:
        pairs += [
            ("GPU", f"{gpu['name']}, {gpu['multiprocessors']} multiprocessors"),
            ("compute capability", gpu["capability"]),
            ("GPU memory", f"{gpu['memory'] / 2**30:.4g} GiB"),
            ("GPU L2 cache", f"{gpu['l2_cache'] / 2**20:.4g} MiB"),
            ("CUDA or ROCm", gpu["cuda"] or "unknown"),
        ]
    pairs += [
        ("threads", facts["threads"]),
        ("last-level cache", f"{facts['last_level_cache'] / 2**20:.4g} MiB"),
        ("load average", ", ".join(f"{load:.2f}" for load in facts["load_average"])),
        ("roof", ", ".join(roof) or "not measured"),
        ("date", facts["date"]),
        ("commit", facts["commit"] or "unknown"),
        ("Python", facts["python"]),
        *((name, version or "not installed") for name, version in facts["versions"].items()),
        *facts["variables"].items(),
        ("seed", record["seed"]),
        ("budget", f"{record['budget_s']:g} s, used {record['elapsed_s']:.1f} s"),
    ]
    items = [join([tag("dt", name), tag("dd", value)]) for name, value in pairs]
    words = [f"{name}={shlex.quote(value)}" for name, value in facts["variables"].items()]
    command = tag("pre", " ".join([*words, record["command"]]))
    return join([tag("dl", *items), tag("p", "The command:"), command])


def _raw(record: Record) -> Markup:
    """Format the record itself, a line for each list of numbers."""
    plain = json.dumps(record, indent=1, allow_nan=False)
    lines = re.sub(  # a line break inside a string would be escaped: this meets only lists
        r"\[\n[^\[\]{}]*?\n *\]", lambda found: re.sub(r"\n *", " ", found[0]), plain
    )
    count = sum(
        len(row["samples_ms"]) for case in record["cases"] for row in case["providers"].values()
    )
    name = "The record as JSON"
    # A line break at the very beginning would not count, so there is one.
    area = tag("textarea", "\n", lines, readonly=True, spellcheck="false", aria_label=name)
    summary = tag("summary", f"The whole record as JSON: {count} calls, in ms")
    return tag("details", summary, area)


def _device(record: Record) -> str:
    facts = record["environment"]
    return facts["gpu"]["name"] if facts["gpu"] else f"{facts['cpu']}, {facts['isa'] or 'no ISA'}"


def _given(value: float | None, form: str) -> str:
    return "" if value is None else form.format(value)
