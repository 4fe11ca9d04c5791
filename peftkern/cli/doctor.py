"""Command `peftkern doctor`: what was built, what serves what here, and what is wrong."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from peftkern.integrations.packages import Version
    from peftkern.tools.doctor.doctor import Diagnosis
    from peftkern.tools.doctor.self_test import Result


def doctor(
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Say what was built, what serves what here and why not the rest, and what is wrong.

    Every function is tested on small inputs against float64. The packages around this one are
    imported in another process; one that is not installed is not wrong. Exit status: 0 if all is
    well, 1 if something is wrong; a note is not.
    """
    import json

    from rich.console import Console

    from peftkern.tools.doctor.doctor import diagnose

    with Console(stderr=True).status("Looking at this installation; importing peers takes longest"):
        diagnosis = diagnose()
    if as_json:
        print(json.dumps(diagnosis.as_dict(), indent=2, allow_nan=False))
    else:
        _print(diagnosis, Console(highlight=False, markup=False))
    if not diagnosis.healthy:
        raise typer.Exit(1)


def _print(d: Diagnosis, console: Console) -> None:
    machine = d.machine
    console.print(
        f"peftkern {machine['peftkern']}, Python {machine['python']}, {machine['system']}",
        style="bold",
    )
    console.print(machine["folder"], soft_wrap=True)
    _print_built(d, console)
    _print_served(d, console)
    _print_versions(d, console)
    _print_tested(d, console)
    findings = _table("", "")
    for finding in d.findings:
        style = "bold red" if finding.wrong else "yellow"
        findings.add_row("wrong" if finding.wrong else "note", finding.what, style=style)
        findings.add_row("  do", finding.do)
    if d.findings:
        _section(console, "Findings", findings)
    console.print()
    wrong = sum(finding.wrong for finding in d.findings)
    console.print(f"{wrong} wrong" if wrong else "healthy", style="red" if wrong else "green")


def _print_built(d: Diagnosis, console: Console) -> None:
    machine, built = d.machine, d.built
    table = _table("", "")
    table.add_row("CPU", f"{machine['cpu']}, {machine['threads']} threads")
    cpu = built["_cpu"]
    if "missing" in cpu:
        table.add_row("_cpu", cpu["missing"])
    else:
        table.add_row("_cpu", f"compiled in: {', '.join(cpu['compiled_in'] or ['unknown'])}")
        table.add_row("", f"usable here: {', '.join(cpu['usable_here'])}")
        table.add_row("", f"in use: {cpu['in_use'] or 'none, see below'}")
    for gpu in machine["gpus"]:
        memory = f"{gpu['memory_bytes'] / 1e9:.0f} GB"
        text = f"{gpu['name']}, compute capability {gpu['capability']}, {memory}"
        table.add_row(gpu["device"], text)
    if not machine["gpus"]:
        backend = machine["torch_cuda"] and f"CUDA {machine['torch_cuda']}"
        backend = backend or (machine["torch_hip"] and f"ROCm {machine['torch_hip']}")
        built_for = f"built for {backend}" if backend else "built without CUDA"
        table.add_row("GPU", f"none that torch can use; torch is {built_for}")
    triton, cuda = built["triton"], built["_cuda"]
    table.add_row("Triton", triton.get("version") or triton["missing"])
    table.add_row(
        "_cuda", cuda.get("missing") or f"compiled for {', '.join(cuda['architectures'])}"
    )
    _section(console, "Built", table)


def _print_served(d: Diagnosis, console: Console) -> None:
    from peftkern.backends.programs import PLAIN

    for device in dict.fromkeys(row.device for row in d.served):
        table = _table("op", "served by", "not by", whole=1)
        for row in d.served:
            if row.device == device:
                others = "; ".join(f"{name}: {why}" for name, why in row.others.items())
                style = None if row.backend not in (None, *PLAIN) else "yellow"
                table.add_row(row.op, row.backend or "none", others, style=style)
        _section(console, f"Who serves bf16 activations on {device}", table)


def _print_versions(d: Diagnosis, console: Console) -> None:
    table = _table("package", "version", "accepted", "imports")
    for version in d.versions:
        accepted = {None: "unknown", "": "any"}.get(version.accepted, version.accepted)
        table.add_row(version.name, version.version or "-", accepted, _imports(version))
    _section(console, "Packages", table)


def _imports(version: Version) -> str:
    if version.version is None:
        return "not installed"
    if version.name == "torch":
        return "yes"
    return {None: "not tried", "": "yes"}.get(version.imports, "no, see below")


def _print_tested(d: Diagnosis, console: Console) -> None:
    if not d.tested:
        console.print("\nSelf-test: not run, see below", style="bold")
        return
    table = _table("function", "dtype", "device", "served by", "error / bound", whole=4)
    for result in d.tested:
        style = None if result.ok else "bold red"
        row = (result.function, result.dtype, result.device, result.backends, _verdict(result))
        table.add_row(*row, style=style)
    _section(console, f"Self-test against float64, {d.tested_seconds:.1f} s", table)


def _verdict(result: Result) -> str:
    if result.error is not None:
        return "not served" if result.unserved else "failed, see below"
    if result.share == 0.0:
        return "ok, same bits"
    return f"{'ok' if result.ok else 'WRONG'}, {result.share:.2f} ({result.worst})"


def _table(*columns: str, whole: int = 0) -> Table:
    """Build a table whose first `whole` columns do not break words on a narrow terminal."""
    from rich.table import Table

    table = Table(box=None, pad_edge=False, show_header=any(columns), header_style="dim")
    for number, column in enumerate(columns):
        table.add_column(column, overflow="fold", no_wrap=number < whole)
    return table


def _section(console: Console, title: str, table: Table) -> None:
    console.print()
    console.print(title, style="bold")
    console.print(table)
