"""Command `peftkern doctor`: is this installation well, and what to do if not."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated, Any

import typer

from peftkern.cli.frame import bad_input
from peftkern.integrations.packages import OPTIONAL

if TYPE_CHECKING:
    from rich.console import Console

    from peftkern.tools.doctor.doctor import Diagnosis

_STYLES = {"wrong": "bold red", "note": "yellow"}
_SHOWN = 12  # classes; the others are in --json
# Lists of the diagnosis that --verbose shows: field, title, columns, how many of them stay whole.
_DETAILS = (
    ("served", "Who serves bf16 activations", ("op", "device", "backend", "others"), 3),
    ("versions", "Packages", ("name", "version", "accepted", "imports", "error"), 4),
    ("probes", "Known defects", ("package", "probe", "answer", "cause"), 3),
    (
        "tested",
        "Self-test against float64: share is the error over its bound",
        ("function", "dtype", "device", "share", "worst"),
        4,
    ),
)


def doctor(
    as_json: Annotated[
        bool, typer.Option("--json", help="Print all of it as JSON, for a bug report.")
    ] = False,
    verbose: Annotated[
        bool, typer.Option("--verbose", help="Print everything that was looked at, too.")
    ] = False,
    forget: Annotated[
        bool, typer.Option("--forget", help="Clear what this machine trusts, and nothing else.")
    ] = False,
) -> None:
    """Say whether this installation is well, and what to do about what is not.

    Every function is tested on small inputs against float64. The packages around this one are
    imported in another process, where their known defects are tried; one that is not installed is
    not wrong. Exit status: 0 if all is well, 1 if something is wrong; a note is not.
    """
    import json

    if forget:
        _forget(as_json)
        return
    from rich.console import Console

    from peftkern.tools import tables
    from peftkern.tools.doctor.doctor import diagnose

    with Console(stderr=True).status("Looking at this installation; importing peers takes longest"):
        diagnosis = diagnose()
    if as_json:
        print(json.dumps(diagnosis.as_dict(), indent=2, allow_nan=False))
    else:
        console = tables.console()
        _print(diagnosis, console)
        if verbose:
            _print_details(diagnosis.as_dict(), console)
    if not diagnosis.healthy:
        raise typer.Exit(1)


def _forget(as_json: bool) -> None:
    """Remove every verdict, and say what that was."""
    import json

    from peftkern.backends import trust

    folder = trust.cache_folder() / "trust"
    found = [trust.verdicts(path) for path in trust.files()]
    told = {
        "programs": sum(len(programs) for programs, _ in found),
        "classes": sum(len(classes) for _, classes in found),
    }
    with bad_input():
        told = {"files": trust.forget(), **told, "folder": str(folder)}
    if as_json:
        print(json.dumps(told, indent=2))
    else:
        print(
            f"removed {told['files']} files of verdicts on {told['programs']} programs and "
            f"{told['classes']} classes from {folder}"
        )


def _print(d: Diagnosis, console: Console) -> None:
    """Print the verdict, what to do, and what this installation is."""
    from peftkern.tools import tables

    wrong = sum(finding.severity == "wrong" for finding in d.findings)
    verdict = f"{wrong} wrong" if wrong else "healthy"
    console.print(f"peftkern {d.machine['peftkern']}: {verdict}", style="red" if wrong else "green")
    shown = tables.table("", "")
    for finding, following in zip(d.findings, [*d.findings, None][1:], strict=True):
        shown.add_row(finding.severity, finding.cause, style=_STYLES[finding.severity])
        if following is None or following.cure != finding.cure:
            shown.add_row("  do", finding.cure)
    for title, text in _summary(d):
        shown.add_row(title, text, style="dim")
    console.print(shown)


def _summary(d: Diagnosis) -> Iterator[tuple[str, str]]:
    names = {"cpu": d.machine["cpu"]} | {gpu["device"]: gpu["name"] for gpu in d.machine["gpus"]}
    for device in dict.fromkeys(row.device for row in d.served):
        served = [row.backend for row in d.served if row.device == device]
        by = [f"{served.count(one)} ops by {one or 'nothing'}" for one in dict.fromkeys(served)]
        right = [one.ok for one in d.tested if one.device == device]
        tests = f"{sum(right)} of {len(right)} self-tests right"
        isa = [f"{d.backends['cpu']['in_use']}"] if device == "cpu" else []
        yield device, "; ".join([names[device], *isa, *by, tests])
    for name, backend in d.backends.items():
        if backend["why"] is not None:
            yield name, f"not used: {backend['why']}"
    for device in dict.fromkeys(row.device for row in d.formats):
        rows = [row for row in d.formats if row.device == device]
        by = dict.fromkeys(row.backend for row in rows)
        names = (
            f"{', '.join(row.format for row in rows if row.backend == one)} by {one or 'nothing'}"
            for one in by
        )
        yield "4-bit", f"bases on {device}: {'; '.join(names)}"
    packages = (f"{one.name} {one.version}" for one in d.versions if one.version is not None)
    yield "with", ", ".join(packages)
    absent = [one.name for one in d.versions if one.version is None and one.name in OPTIONAL]
    if absent:
        yield "without", ", ".join(absent)


def _print_details(told: dict[str, Any], console: Console) -> None:
    for part in ("machine", "backends"):
        _print_facts(console, part.capitalize(), told[part])
    for field, *how in _DETAILS:
        _print_records(console, told[field], *how)
    if told["trust"] is not None:
        _print_trust(told["trust"], console)


def _print_trust(trust: dict[str, Any], console: Console) -> None:
    lists = ("devices", "classes")
    _print_facts(console, "Trust", {k: v for k, v in trust.items() if k not in lists})
    for one in trust["devices"]:
        facts = {k: v for k, v in one.items() if k not in lists}
        _print_facts(console, f"Trusted on {one['device']}", facts)
        more = len(one["classes"]) - _SHOWN
        title = f"Classes measured on {one['device']}; ratio: ours over PEFT's, the worst"
        title += f"; --json has {more} more" if more > 0 else ""
        columns = ("name", "side", "ratio", "why")
        _print_records(console, one["classes"][:_SHOWN], title, columns, 0)


def _print_facts(console: Console, title: str, facts: dict[str, Any]) -> None:
    from peftkern.tools import tables

    rows = ((name, _text(value)) for name, value in facts.items())
    tables.section(console, title, tables.table("", "", rows=rows))


def _print_records(
    console: Console,
    records: list[dict[str, Any]],
    title: str,
    columns: tuple[str, ...],
    whole: int,
) -> None:
    from peftkern.tools import tables

    rows = ([_text(record[column]) for column in columns] for record in records)
    if records:
        tables.section(console, title, tables.table(*columns, rows=rows, whole=whole))


def _text(value: Any) -> str:
    """Return a value of the JSON in words."""
    if isinstance(value, dict):
        return "; ".join(f"{name}: {_text(one)}" for name, one in value.items())
    if isinstance(value, list):
        return ", ".join(map(_text, value))
    if value is None or isinstance(value, bool):
        return "-" if value is None else "yes" if value else "no"
    return f"{value:.2f}" if isinstance(value, float) else str(value)
