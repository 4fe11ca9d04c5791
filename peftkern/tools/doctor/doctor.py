"""Diagnosis of this installation: its parts, the back end of every op, and defects.

`diagnose` never raises for a defect: a peer that is missing, broken or too slow to import is a
finding. Peers are imported in a process of their own, with a time limit.
"""

from __future__ import annotations

import contextlib
import importlib.util
import math
import platform
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

import peftkern
from peftkern.backends import dispatch, ops
from peftkern.backends.cpu import module as cpu_back_end
from peftkern.backends.cuda import module as cuda_back_end
from peftkern.backends.device import device_info, triton_interpreted
from peftkern.formats.table import FORMATS
from peftkern.integrations.packages import (
    IMPORT_SECONDS,
    OPTIONAL,
    PEERS,
    Answer,
    Version,
    accepted,
    importing,
    installed_version,
    one_line,
)
from peftkern.tools.doctor import findings as check
from peftkern.tools.doctor import self_test
from peftkern.tools.doctor.findings import WRONG, Finding, FormatServed, Served
from peftkern.tools.doctor.sample_calls import Sample
from peftkern.tools.doctor.trusted import Trust, look


@dataclass(frozen=True)
class Diagnosis:
    """Result of `diagnose`; `as_dict` is the JSON of `peftkern doctor --json`, with "healthy".

    Its fields keep their names; later versions may add others.
    machine: peftkern, folder, python, system, cpu, threads, torch_cuda, torch_hip, gpus (a list of
        device, name, capability, memory_bytes).
    backends: {"cpu", "triton", "cuda": why it is not available here or None if it is, and what it
        is: compiled_in, usable_here, in_use (instruction sets); version; architectures}.
    served: per op and device the back end of bf16 activations, with the reasons of `others`, which
        were asked before it and could not.
    formats: per device and 4-bit format the back end of LoRA over such a base (None: none).
    versions: name, version (None: not installed), accepted ("": any), imports (None: not tried),
        error ("": none).
    probes: package, probe, answer (present, absent, unknown), cause, cure.
    tested: of the self-test function, dtype, device, backends, share (error over bound, None if the
        function failed), worst, error, ok; tested_seconds.
    trust: mode, folder, forgettable, crossovers, crossovers_are, devices (a list of device, file,
        state, right, demoted, classes (a list of name, side, ratio, why)); None where a switch is
        wrong.
    findings: id, severity ("wrong", "note"), cause, cure; first what is wrong.
    """

    machine: dict[str, Any]
    backends: dict[str, dict[str, Any]]
    served: list[Served]
    formats: list[FormatServed]
    versions: list[Version]
    probes: list[Answer]
    tested: list[self_test.Result]
    tested_seconds: float
    trust: Trust | None
    findings: list[Finding]

    @property
    def healthy(self) -> bool:
        return not any(finding.severity == WRONG for finding in self.findings)

    def as_dict(self) -> dict[str, Any]:
        tested = [{**asdict(result), "ok": result.ok} for result in self.tested]
        for result in tested:  # JSON has no infinity
            result["share"] = result["share"] if math.isfinite(result["share"]) else None
        return {"healthy": self.healthy, **asdict(self), "tested": tested}


def diagnose(import_seconds: float = IMPORT_SECONDS) -> Diagnosis:
    """Diagnose everything; it takes as long as importing the peers, a few seconds."""
    found = list(check.environment_findings())
    usable = not any(one.severity == WRONG for one in found)  # else no op runs at all
    versions = {name: installed_version(name) for name in ("torch", *PEERS, *OPTIONAL)}
    with importing([name for name in PEERS if versions[name] is not None]) as peers:
        backends, devices = _backends(versions["triton"]), _devices()
        served = [row for device in devices for row in _served(device)] if usable else []
        formats = [row for device in devices for row in _formats(device)] if usable else []
        begin = time.perf_counter()
        tested = [r for device in devices for r in self_test.run(device)] if usable else []
        seconds = time.perf_counter() - begin
        errors, probes = peers(import_seconds)
    trusted = look(devices) if usable else None
    packages = []
    for name, version in versions.items():
        imports = not errors[name] if name in errors else None
        error = errors.get(name, "")
        packages.append(Version(name, version, accepted(name), imports, error))
    found += [
        *check.build_findings(backends["cpu"]),
        *check.product_findings(),
        *check.gpu_findings(devices[1:]),
        *check.served_findings(served),
        *check.test_findings(tested),
        *check.trust_findings(trusted),
        *(finding for package in packages for finding in check.version_findings(package)),
        *check.numpy_findings(installed_version("numpy"), triton_interpreted()),
        *check.deepspeed_findings(installed_version("deepspeed")),
        *check.probe_findings(probes, versions),
    ]
    found.sort(key=lambda one: one.severity != WRONG)
    return Diagnosis(
        _machine(), backends, served, formats, packages, probes, tested, seconds, trusted, found
    )


def _machine() -> dict[str, Any]:
    cpu = device_info("cpu")
    gpus = []
    for index in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        properties = torch.cuda.get_device_properties(index)
        gpus.append(
            {
                "device": f"cuda:{index}",
                "name": properties.name,
                "capability": f"{properties.major}.{properties.minor}",
                "memory_bytes": properties.total_memory,
            }
        )
    return {
        "peftkern": peftkern.__version__,
        "folder": str(Path(peftkern.__file__).parent),
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "cpu": cpu.name,
        "threads": cpu.threads,
        "torch_cuda": torch.version.cuda,
        "torch_hip": torch.version.hip,
        "gpus": gpus,
    }


def _backends(triton: str | None) -> dict[str, dict[str, Any]]:
    """Describe each back end: why it is not available here, and what it was built for."""
    module, why = cpu_back_end.cpu_module()
    cpu: dict[str, Any] = {"why": why, "compiled_in": None, "usable_here": [], "in_use": None}
    if module is not None:
        compiled = list(module.built_isas()) if hasattr(module, "built_isas") else None
        cpu |= {"compiled_in": compiled, "usable_here": list(cpu_back_end.cpu_isas())}
        with contextlib.suppress(ValueError):  # of PEFTKERN_CPU_ISA: a finding of its own
            cpu["in_use"] = cpu_back_end.cpu_isa()
    library, no_library = cuda_back_end.cuda_module()
    if importlib.util.find_spec("peftkern._cuda") is None:
        no_library = "not in this build: PEFTKERN_CUDA=1 builds it"
    no_gpu = None
    if not torch.cuda.is_available():
        built = (
            "for CUDA" if torch.version.cuda else "for ROCm" if torch.version.hip else "for CPUs"
        )
        no_gpu = f"no GPU that torch can use; torch is built {built}"
    no_triton = None if triton else "triton is not installed"
    return {
        "cpu": cpu,
        "triton": {"why": no_triton or no_gpu, "version": triton},
        "cuda": {
            "why": no_library or no_gpu,
            "architectures": list(map(str, library.architectures())) if library else [],
        },
    }


def _devices() -> list[torch.device]:
    """Return the CPU, and one GPU of each kind."""
    found, kinds = [torch.device("cpu")], set()
    for index in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        device = torch.device("cuda", index)
        kind = torch.cuda.get_device_name(device)
        if kind not in kinds:
            kinds.add(kind)
            found.append(device)
    return found


def _served(device: torch.device) -> Iterator[Served]:
    sample = Sample(M=16, N=256, K=256, r=8, device=device)
    forced = dispatch.forced_backend()
    for op in ops.SCHEMAS:
        try:
            explanation = dispatch.explain({op: sample.arguments(op)})
        except Exception as error:  # say, of a Triton that does not import
            reason = f"{type(error).__name__}: {one_line(error)}"
            yield Served(op, str(device), None, {"not asked": reason})
            continue
        kinds = {one.name: one.device for one in dispatch.CANDIDATES[op]}
        chosen = explanation.chosen(op)
        others = {}
        for _, name, verdict in explanation.rows:
            if name == chosen:
                break
            if name == forced or (forced is None and kinds[name] in (None, device.type)):
                others[name] = verdict.removeprefix("cannot: ")
        yield Served(op, str(device), chosen, others)


def _formats(device: torch.device) -> Iterator[FormatServed]:
    op = "nf4_lora_linear_forward"
    for row in FORMATS:
        sample = Sample(M=16, N=256, K=256, r=8, device=device, format=row.name)
        chosen = None
        with contextlib.suppress(Exception):  # the diagnosis of each op tells what it raises
            chosen = dispatch.explain({op: sample.arguments(op)}).chosen(op)
        yield FormatServed(row.name, str(device), chosen)
