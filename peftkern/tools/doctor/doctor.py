"""Diagnosis of this installation: its parts, the back end of every op, and defects.

`diagnose` never raises for a defect: a peer that is missing, broken or too slow to import is a
finding. Peers are imported in a process of their own, with a time limit.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.metadata
import importlib.util
import math
import os
import platform
import re
import shutil
import sysconfig
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

import peftkern
from peftkern.backends import dispatch, ops, trust
from peftkern.backends.cpu import module as cpu_back_end
from peftkern.backends.device import device_info, triton_interpreted, triton_missing
from peftkern.integrations.packages import (
    BNB_LIBRARY,
    IMPORT_SECONDS,
    PEERS,
    Version,
    accepted,
    importing,
    installed_version,
    one_line,
    release,
)
from peftkern.tools.doctor import self_test
from peftkern.tools.doctor.sample_calls import Sample
from peftkern.tools.doctor.trusted import Trust, look

_CPU_FLAGS = {  # of /proc/cpuinfo, for every instruction set that has kernels
    "avx2": {"avx2", "fma", "f16c"},
    "avx512": {"avx512f", "avx512bw", "avx512vl", "avx512dq"},
    "avx512_bf16": {"avx512_bf16"},
    "amx_bf16": {"amx_tile", "amx_bf16"},
}
_REPORT = "please report it with this output"
_REBUILD = "in the source folder: python setup.py build_ext --inplace; or reinstall peftkern"


@dataclass(frozen=True)
class Finding:
    """Defect, or a note, with its remedy."""

    wrong: bool
    what: str
    do: str


@dataclass(frozen=True)
class Served:
    """Back end that would serve an op on a device, with the refusals of those before it."""

    op: str
    device: str
    backend: str | None
    others: dict[str, str]


@dataclass(frozen=True)
class Diagnosis:
    """Result of `diagnose`; `as_dict` is the JSON of `peftkern doctor --json`."""

    machine: dict[str, Any]
    built: dict[str, Any]
    served: list[Served]
    versions: list[Version]
    tested: list[self_test.Result]
    tested_seconds: float
    trust: Trust | None  # None where a switch is wrong
    findings: list[Finding]

    @property
    def healthy(self) -> bool:
        return not any(finding.wrong for finding in self.findings)

    def as_dict(self) -> dict[str, Any]:
        tested = [{**asdict(result), "ok": result.ok} for result in self.tested]
        for result in tested:  # JSON has no infinity
            result["share"] = result["share"] if math.isfinite(result["share"]) else None
        return {"healthy": self.healthy, **asdict(self), "tested": tested}


def diagnose(import_seconds: float = IMPORT_SECONDS) -> Diagnosis:
    """Diagnose everything; it takes as long as importing the peers, some ten seconds."""
    findings = sorted(_environment_findings(), key=lambda finding: not finding.wrong)
    usable = not findings or not findings[0].wrong  # else no op runs at all
    installed = [name for name in PEERS if installed_version(name) is not None]
    with importing(installed) as peers:
        built, devices = _built(), _devices()
        findings += _build_findings(built)
        findings += gpu_findings()
        served = [row for device in devices for row in _served(device)] if usable else []
        findings += _served_findings(served)
        begin = time.perf_counter()
        tested = [r for device in devices for r in self_test.run(device)] if usable else []
        seconds = time.perf_counter() - begin
        findings += [_test_finding(r) for r in tested if not (r.ok or r.unserved)]
        imports = peers(import_seconds)
    trusted = look(devices) if usable else None
    findings += trust_findings(trusted)
    versions = [
        Version(name, installed_version(name), accepted(name), *imports.get(name, ()))
        for name in ("torch", *PEERS)
    ]
    findings += [finding for version in versions for finding in version_findings(version)]
    findings += numpy_findings(installed_version("numpy"), triton_interpreted())
    return Diagnosis(_machine(), built, served, versions, tested, seconds, trusted, findings)


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
        "gpus": gpus,
        "torch_cuda": torch.version.cuda,
        "torch_hip": torch.version.hip,
    }


def _built() -> dict[str, Any]:
    """Describe the native libraries and Triton: their contents, or why there is none."""
    module, reason = cpu_back_end.cpu_module()
    cpu: dict[str, Any] = {"missing": reason}
    if module is not None:
        cpu = {
            "compiled_in": list(module.built_isas()) if hasattr(module, "built_isas") else None,
            "usable_here": list(cpu_back_end.cpu_isas()),
            "in_use": None,
        }
        with contextlib.suppress(ValueError):  # of PEFTKERN_CPU_ISA: a finding of its own
            cpu["in_use"] = cpu_back_end.cpu_isa()
    try:
        architectures = importlib.import_module("peftkern._cuda").architectures()
        cuda: dict[str, Any] = {"architectures": [str(arch) for arch in architectures]}
    except ImportError as error:
        absent = importlib.util.find_spec("peftkern._cuda") is None
        cuda = {"missing": "not built" if absent else one_line(error)}
    version = installed_version("triton")
    triton = {"version": version} if version else {"missing": "triton is not installed"}
    return {"_cpu": cpu, "_cuda": cuda, "triton": triton}


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
    for op in ops.SCHEMAS:
        try:
            explanation = dispatch.explain({op: sample.arguments(op)})
        except Exception as error:  # say, of a Triton that does not import
            reason = f"{type(error).__name__}: {one_line(error)}"
            yield Served(op, str(device), None, {"not asked": reason})
            continue
        chosen = explanation.chosen(op)
        others = {}
        for _, name, verdict in explanation.rows:
            if name == chosen:
                break
            if not verdict.startswith("not asked"):
                others[name] = verdict.removeprefix("cannot: ")
        yield Served(op, str(device), chosen, others)


def _served_findings(served: list[Served]) -> Iterator[Finding]:
    """Report ops that would raise, those with the same reasons in one finding."""
    groups: dict[tuple[str, str], list[str]] = {}
    for row in served:
        if row.backend is None:
            text = "; ".join(f"{name}: {why}" for name, why in row.others.items()) or "no kernel"
            groups.setdefault((row.device, text), []).append(row.op)
    forced = dispatch.forced_backend() if groups else None
    do = _REPORT if forced is None else f"unset PEFTKERN_BACKEND, which asks for {forced} alone"
    for (device, text), names in groups.items():
        yield Finding(True, f"nothing serves {', '.join(names)} on {device} ({text})", do)


def version_findings(version: Version) -> Iterator[Finding]:
    """Report packages too old or not importable. Only `>=` is read: pyproject.toml has no other."""
    minimum = re.fullmatch(r">=([\d.]+)", version.accepted or "")
    name = version.name
    if version.version and minimum and release(version.version) < release(minimum[1]):
        yield Finding(
            True,
            f"{name} {version.version} is older than {minimum[1]}, the oldest that is supported",
            f"pip install -U '{name}{version.accepted}'",
        )
    for what, do in version.defects:
        yield Finding(False, f"{name} {version.version} {what}", do)
    if not version.imports:
        return
    wrong = True
    do = f"python -c 'import {name}' shows all of it; pip install --force-reinstall {name}"
    if version.imports.startswith(BNB_LIBRARY):
        wrong = torch.cuda.is_available()  # on a CPU it has slower ways
        do = (
            "pip install -U --force-reinstall bitsandbytes, or set BNB_CUDA_VERSION to a version "
            "whose library it has; python -m bitsandbytes says more"
        )
    yield Finding(wrong, f"{name} does not work: {version.imports}", do)


def numpy_findings(version: str | None, interpreted: bool) -> list[Finding]:
    """Report numpy 2.4, which removed int() of one-element arrays: Triton's interpreter uses it."""
    if not interpreted or version is None or release(version) < (2, 4):
        return []
    return [
        Finding(
            True,
            f"TRITON_INTERPRET=1 with numpy {version}: Triton's interpreter needs one before 2.4",
            "pip install 'numpy<2.4', or unset TRITON_INTERPRET",
        )
    ]


def _environment_findings() -> Iterator[Finding]:
    """Report the switches that the environment sets."""
    checks = {"PEFTKERN_BACKEND": dispatch.forced_backend, "PEFTKERN_CPU_ISA": _isa}
    checks["PEFTKERN_TRUST"] = trust.mode
    for name, check in checks.items():
        try:
            check()
        except ValueError as error:
            text = one_line(error).removeprefix("back end: ").removeprefix(f"{name}: ")
            yield Finding(True, f"{name}: {text}", f"unset {name}, or give it one of these")
        else:
            if os.environ.get(name) and name != "PEFTKERN_TRUST":  # a section tells of that one
                what = f"{name}={os.environ[name]} is set: nothing else is used"
                yield Finding(False, what, f"unset {name} to let peftkern choose")


def _isa() -> str | None:
    return cpu_back_end.cpu_isa() if cpu_back_end.cpu_isas() else None


def _build_findings(built: dict[str, Any]) -> Iterator[Finding]:
    if "missing" in built["_cpu"]:
        yield Finding(
            True,
            f"no kernels for the CPU, plain torch serves it: {built['_cpu']['missing']}",
            _REBUILD,
        )
    elif built["_cpu"]["compiled_in"] is None:
        yield Finding(True, "the native library was built from older sources", _REBUILD)
    else:
        lacking = [isa for isa in _machine_isas() if isa not in built["_cpu"]["compiled_in"]]
        if lacking:
            yield Finding(
                False,
                f"this CPU has {', '.join(lacking)}, the native library was built without",
                f"with a newer compiler (gcc 13 or clang 16), {_REBUILD}",
            )


def _machine_isas() -> list[str]:
    """Return the instruction sets with kernels that this CPU has, according to Linux."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:  # not Linux
        return []
    found = re.search(r"^flags\s*:(.*)$", text, re.MULTILINE)
    flags = set(found[1].split()) if found else set()
    return [isa for isa, wanted in _CPU_FLAGS.items() if wanted <= flags]


def gpu_findings() -> Iterator[Finding]:
    """Report obstacles to using a GPU, or Triton's kernels on it."""
    if not torch.cuda.is_available():
        if not Path("/dev/nvidiactl").exists():
            return  # no NVIDIA GPU here
        if torch.version.cuda is None:
            yield Finding(
                False,
                f"this machine has an NVIDIA GPU, torch {torch.__version__} is built without CUDA",
                "install torch for CUDA: https://pytorch.org/get-started/locally",
            )
            return
        try:
            torch.cuda.init()
            reason = "no device is visible"
        except (RuntimeError, AssertionError) as error:
            reason = one_line(error)
        yield Finding(
            True,
            f"torch {torch.__version__} (CUDA {torch.version.cuda}) cannot use the GPU: {reason}",
            "nvidia-smi shows the driver and what it supports; CUDA_VISIBLE_DEVICES may hide GPUs",
        )
        return
    if importlib.util.find_spec("triton") is None:
        yield Finding(True, "a GPU, but no Triton: plain torch serves it", "pip install triton")
        return
    if triton_interpreted():
        yield Finding(
            True,
            "TRITON_INTERPRET=1: Triton's kernels run on the CPU, in Python",
            "unset TRITON_INTERPRET",
        )
    yield from compiler_findings(Path(sysconfig.get_path("include")), os.environ.get("CC"))
    for device in _devices()[1:]:
        reason = triton_missing(device)
        if reason is not None:
            name = torch.cuda.get_device_name(device)
            yield Finding(False, f"{name} has no kernels here: {reason}", "plain torch serves it")


def compiler_findings(include: Path, compiler: str | None) -> Iterator[Finding]:
    """Report a missing compiler or Python.h: Triton builds each kernel's launcher in C."""
    if not (include / "Python.h").exists():
        yield Finding(
            True,
            f"no {include / 'Python.h'}: Triton cannot build the launchers of its kernels",
            "install Python's headers (python3-dev, python3-devel), or a Python that has them",
        )
    names = [compiler] if compiler else ["gcc", "clang", "cc"]
    if not any(shutil.which(name) for name in names):
        yield Finding(
            True,
            f"no C compiler ({', '.join(names)}): Triton cannot build the launchers of its kernels",
            "install gcc, or set CC",
        )


def trust_findings(trusted: Trust | None) -> Iterator[Finding]:
    """Report kernels that were demoted here, and a cache of verdicts that does not serve."""
    for one in trusted.devices if trusted is not None else ():
        for program, reason in one.demoted.items():
            do = f"another path serves; `peftkern doctor --forget` tries it again; {_REPORT}"
            yield Finding(False, f"{program} is demoted on {one.device}: {reason}", do)
        if one.state is not None and trusted.mode in ("auto", "off"):
            do = "`peftkern doctor --forget` removes it"
            if one.state.startswith("read-only"):
                do = "set PEFTKERN_CACHE to a folder that can be written"
            yield Finding(False, f"{one.file} is {one.state}", do)


def _test_finding(result: self_test.Result) -> Finding:
    where = f"{result.function} in {result.dtype} on {result.device}"
    if result.error is not None:
        what = f"{where} failed: {result.error}"
    else:
        what = (
            f"{where} by {result.backends}: error of {result.worst} is {result.share:.3g} of bound"
        )
    return Finding(True, what, f"PEFTKERN_BACKEND=torch avoids it; {_REPORT}")
