"""HTML report of a record: what stands in it; its looks are in templates/bench.html.j2."""

from __future__ import annotations

import json
import re
import shlex
import statistics
from pathlib import Path

from markupsafe import escape

from peftkern.tools import pages
from peftkern.tools.bench import compare, machine, report_figures, terminal
from peftkern.tools.bench.names import about, people, times
from peftkern.tools.bench.record import OURS, Provider, Record
from peftkern.tools.bench.terminal import number


def write_html(
    record: Record, path: Path, earlier: Record | None = None, fail_if: float = 0.05
) -> None:
    """Write the report atomically; with an earlier record, compared with it. Raises: OSError."""
    machine.write_text(path, render(record, earlier, fail_if))


def render(record: Record, earlier: Record | None = None, fail_if: float = 0.05) -> str:
    tools = (about, people, times, number, why, places, report_figures, terminal)
    given = record["environment"]["variables"]
    variables = [f"{name}={shlex.quote(value)}" for name, value in given.items()]
    return pages.render(
        "bench.html.j2",
        **{tool.__name__.rpartition(".")[2]: tool for tool in tools},
        record=record,
        cases={case["name"]: case for case in record["cases"]},
        earlier=earlier,
        changes=compare.changes(earlier, record) if earlier else ([], {}),
        fail_if=fail_if,
        headline=headline(record),
        labels=report_figures.numbered(record),
        troubles=[
            (case, row, *why(row))
            for case in record["cases"]
            for row in case["providers"].values()
            if why(row)
        ],
        command=" ".join([*variables, record["command"]]),
        raw=escape(_raw(record)),
        ours=OURS,
    )


def headline(record: Record) -> tuple[str, str]:
    """Return one sentence in two parts: how much faster than whom, and what speaks against it."""
    cases = len(record["cases"])
    found = [
        (case["providers"][name]["label"], ratio, noise)
        for case, name, ratio, noise in terminal.beside(record)
        if name == case["against"]
    ]
    bounds = [
        (case["providers"][name]["label"], least, False)
        for case, name, least in terminal.beside_stopped(record)
        if name == case["against"]
    ]
    slower = sum(ratio < 1 and not noise for _, ratio, noise in found)
    alike = sum(noise for _, _, noise in found)
    if bounds and mean_of([*found, *bounds]) > 1:  # a mean of ratios some of which are larger
        found += bounds
    else:
        bounds = []
    ours = [case["providers"][OURS] for case in record["cases"]]
    wrong, failed = (sum(row[key] is not None for row in ours) for key in ("wrong", "failed"))
    notes = [f"{wrong} wrong", *([f"{failed} failed"] if failed else [])]
    if record["not_reached"]:
        notes.append(f"{_cases(len(record['not_reached']))} not reached")
    if not found:
        said = f"{_cases(cases)} measured, nothing to compare with" if cases else "Nothing measured"
        return said, "; ".join(notes) if cases else ""
    mean = mean_of(found)
    peers = list(dict.fromkeys(label for label, _, _ in found))
    whom = " and ".join(peers) if len(peers) < 3 else "its peers"
    if 0.995 < mean < 1.005 and not bounds:
        said = f"As fast as {whom} on this machine"
    else:
        word = "faster" if mean > 1 else "slower"
        said = f"{times(max(mean, 1 / mean))} {word} than {whom} on this machine"
        said = f"At least {said}" if bounds else said
    notes = [
        f"{_cases(slower)} {'is' if slower == 1 else 'are'} slower" if slower else "none is slower",
        *([f"{alike} within noise"] if alike else []),
        *([f"a lower bound of {_cases(len(bounds))}"] if bounds else []),
        *notes,
    ]
    return said, f"geometric mean of {_cases(len(found))}; {'; '.join(notes)}"


def mean_of(found: list[tuple[str, float, bool]]) -> float:
    return statistics.geometric_mean(ratio for _, ratio, _ in found)


def _cases(count: int) -> str:
    return f"{count} case{'' if count == 1 else 's'}"


def why(row: Provider) -> tuple[str, str] | None:
    """Return that it is wrong or failed, and the reason; None if it has a result."""
    return next(((kind, row[kind]) for kind in ("wrong", "failed") if row[kind] is not None), None)


def places(record: Record) -> list[str]:
    """List where and when it was measured, for the line below the headline."""
    facts = record["environment"]
    date = facts["date"].replace("T", " ").replace("+00:00", " UTC")
    device = facts["gpu"]["name"] if facts["gpu"] else f"{facts['cpu']}, {facts['isa'] or 'no ISA'}"
    found = [device, f"{facts['threads']} threads", date]
    return [*found, f"peftkern {facts['versions'].get('peftkern') or 'of unknown version'}"]


def _raw(record: Record) -> str:
    """Format the record itself, a line for each list of numbers."""
    plain = json.dumps(record, indent=1, allow_nan=False)
    return re.sub(  # a line break inside a string would be escaped: this meets only lists
        r"\[\n[^\[\]{}]*?\n *\]", lambda found: re.sub(r"\n *", " ", found[0]), plain
    )
