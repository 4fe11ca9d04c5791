"""Command `peftkern doctor`: what was built, what serves what here, and what is wrong."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from peftkern.cli.frame import section, table

if TYPE_CHECKING:
    from rich.console import Console

    from peftkern.integrations.packages import Version
    from peftkern.tools.doctor.doctor import Diagnosis
    from peftkern.tools.doctor.self_test import Result
    from peftkern.tools.doctor.trusted import Trust

_SHOWN = 12  # classes; the others are in --json
PEER = "PEFT"


def doctor(
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    forget: Annotated[
        bool, typer.Option("--forget", help="Clear what this machine trusts, and nothing else.")
    ] = False,
) -> None:
    """Say what was built, what serves what here and why not the rest, and what is wrong.

    Every function is tested on small inputs against float64. The packages around this one are
    imported in another process; one that is not installed is not wrong. Exit status: 0 if all is
    well, 1 if something is wrong; a note is not.
    """
    import json

    if forget:
        _forget(as_json)
        return
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
    if d.trust is not None:
        _print_trust(d.trust, console)
    findings = table("", "")
    for finding in d.findings:
        style = "bold red" if finding.wrong else "yellow"
        findings.add_row("wrong" if finding.wrong else "note", finding.what, style=style)
        findings.add_row("  do", finding.do)
    if d.findings:
        section(console, "Findings", findings)
    console.print()
    wrong = sum(finding.wrong for finding in d.findings)
    console.print(f"{wrong} wrong" if wrong else "healthy", style="red" if wrong else "green")


def _forget(as_json: bool) -> None:
    """Remove every verdict, and say what that was."""
    import json

    from peftkern.backends import trust
    from peftkern.cli.frame import bad_input

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


def _print_built(d: Diagnosis, console: Console) -> None:
    machine, built = d.machine, d.built
    shown = table("", "")
    shown.add_row("CPU", f"{machine['cpu']}, {machine['threads']} threads")
    cpu = built["_cpu"]
    if "missing" in cpu:
        shown.add_row("_cpu", cpu["missing"])
    else:
        shown.add_row("_cpu", f"compiled in: {', '.join(cpu['compiled_in'] or ['unknown'])}")
        shown.add_row("", f"usable here: {', '.join(cpu['usable_here'])}")
        shown.add_row("", f"in use: {cpu['in_use'] or 'none, see below'}")
    for gpu in machine["gpus"]:
        memory = f"{gpu['memory_bytes'] / 1e9:.0f} GB"
        text = f"{gpu['name']}, compute capability {gpu['capability']}, {memory}"
        shown.add_row(gpu["device"], text)
    if not machine["gpus"]:
        backend = machine["torch_cuda"] and f"CUDA {machine['torch_cuda']}"
        backend = backend or (machine["torch_hip"] and f"ROCm {machine['torch_hip']}")
        built_for = f"built for {backend}" if backend else "built without CUDA"
        shown.add_row("GPU", f"none that torch can use; torch is {built_for}")
    triton, cuda = built["triton"], built["_cuda"]
    shown.add_row("Triton", triton.get("version") or triton["missing"])
    shown.add_row(
        "_cuda", cuda.get("missing") or f"compiled for {', '.join(cuda['architectures'])}"
    )
    section(console, "Built", shown)


def _print_served(d: Diagnosis, console: Console) -> None:
    from peftkern.backends.programs import PLAIN

    for device in dict.fromkeys(row.device for row in d.served):
        shown = table("op", "served by", "not by", whole=1)
        for row in d.served:
            if row.device == device:
                others = "; ".join(f"{name}: {why}" for name, why in row.others.items())
                style = None if row.backend not in (None, *PLAIN) else "yellow"
                shown.add_row(row.op, row.backend or "none", others, style=style)
        section(console, f"Who serves bf16 activations on {device}", shown)


def _print_versions(d: Diagnosis, console: Console) -> None:
    shown = table("package", "version", "accepted", "imports")
    for version in d.versions:
        accepted = {None: "unknown", "": "any"}.get(version.accepted, version.accepted)
        shown.add_row(version.name, version.version or "-", accepted, _imports(version))
    section(console, "Packages", shown)


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
    shown = table("function", "dtype", "device", "served by", "error / bound", whole=4)
    for result in d.tested:
        style = None if result.ok else "bold red"
        row = (result.function, result.dtype, result.device, result.backends, _verdict(result))
        shown.add_row(*row, style=style)
    section(console, f"Self-test against float64, {d.tested_seconds:.1f} s", shown)


def _print_trust(trust: Trust, console: Console) -> None:
    shown = table("", "")
    shown.add_row("mode", f"{trust.mode} (PEFTKERN_TRUST)")
    shown.add_row("folder", f"{trust.folder}, {trust.forgettable} files")
    sizes = ", ".join(f"{name} {size:,}" for name, size in trust.crossovers.items())
    shown.add_row("crossovers", f"{sizes}: {trust.crossovers_are}")
    for one in trust.devices:
        ours = sum(verdict.side != PEER for verdict in one.classes)
        shown.add_row(
            one.device,
            f"programs: {one.right} right, {len(one.demoted)} demoted; classes: {ours} ours, "
            f"{len(one.classes) - ours} PEFT's{f'; {one.state}' if one.state else ''}",
        )
    section(console, "Trust", shown)
    for one in trust.devices:
        if not one.classes:
            continue
        shown = table("class", "served by", "ours / PEFT")
        for verdict in one.classes[:_SHOWN]:
            ratio = "-" if verdict.ratio is None else f"{verdict.ratio:.2f}"
            style = "yellow" if verdict.side == PEER else None
            shown.add_row(verdict.name, verdict.side, ratio, style=style)
        more = len(one.classes) - _SHOWN
        of = f", the worst {_SHOWN}; --json has {more} more" if more > 0 else ""
        section(console, f"Classes measured on {one.device}{of}", shown)


def _verdict(result: Result) -> str:
    if result.error is not None:
        return "not served" if result.unserved else "failed, see below"
    if result.share == 0.0:
        return "ok, same bits"
    return f"{'ok' if result.ok else 'WRONG'}, {result.share:.2f} ({result.worst})"
