"""Findings of the doctor: one table of them, and the checks that report them."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import sysconfig
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from peftkern.backends import dispatch, trust
from peftkern.backends.cpu import module as cpu_back_end
from peftkern.backends.device import has_products, triton_interpreted, triton_missing
from peftkern.integrations.packages import (
    BNB_LIBRARY,
    Answer,
    Version,
    installed_pure,
    one_line,
    release,
)
from peftkern.tools.doctor.self_test import Result
from peftkern.tools.doctor.trusted import Trust

WRONG, NOTE = "wrong", "note"
_REPORT = "please report it with `peftkern doctor --json`"
_REBUILD = "in the source folder: python setup.py build_ext --inplace; or reinstall peftkern"
_REINSTALL = "pip install --force-reinstall {name}; python -c 'import {name}' shows all of it"
_FORGET = "`peftkern doctor --forget`"
_LIBRARY = (
    "pip install -U --force-reinstall bitsandbytes, or set BNB_CUDA_VERSION to a version whose "
    "library it has; python -m bitsandbytes says more"
)
# By id: severity, cause, cure. Names in braces are what a check has found.
_TABLE = {
    "switch": (WRONG, "{name}: {error}", "unset {name}, or give it one of these"),
    "forced": (
        NOTE,
        "{name}={value} is set: nothing else is used",
        "unset {name}: the best serves",
    ),
    "fsdp": (
        NOTE,
        "{where}: FSDP shards packed weights of bitsandbytes in a floating dtype alone, and their "
        "default is uint8",
        "for QLoRA: BitsAndBytesConfig(bnb_4bit_quant_storage=torch.bfloat16), the dtype of mixed "
        "precision",
    ),
    "unserved": (WRONG, "nothing serves {ops} on {device} ({why})", _REPORT),
    "unserved_forced": (
        WRONG,
        "nothing serves {ops} on {device} ({why})",
        "unset PEFTKERN_BACKEND, which asks for {forced} alone",
    ),
    "no_native": (WRONG, "no kernels for the CPU, plain torch serves it: {why}", _REBUILD),
    "pure": (
        NOTE,
        "installed without native code, plain torch serves the CPU",
        "on Linux with a C++ compiler, and PEFTKERN_NATIVE unset: pip install --force-reinstall "
        "--no-deps --no-cache-dir from where peftkern came from",
    ),
    "stale_native": (WRONG, "the native library was built from older sources", _REBUILD),
    "weak_native": (
        NOTE,
        "this CPU has {isas}, the native library was built without",
        f"with a newer compiler (gcc 13 or clang 16), {_REBUILD}",
    ),
    "no_products": (
        NOTE,
        "torch has no matrix products in bfloat16 on this CPU: a backward pass through them takes "
        "many times as long as in float32",
        "patched layers have their own; load what has no adapter (lm_head) in float32",
    ),
    "torch_without_cuda": (
        NOTE,
        "this machine has an NVIDIA GPU, torch {torch} is built without CUDA",
        "install torch for CUDA: https://pytorch.org/get-started/locally",
    ),
    "gpu_unusable": (
        WRONG,
        "torch {torch} (CUDA {cuda}) cannot use the GPU: {why}",
        "nvidia-smi shows the driver and what it supports; CUDA_VISIBLE_DEVICES may hide GPUs",
    ),
    "no_triton": (WRONG, "a GPU, but no Triton: plain torch serves it", "pip install triton"),
    "interpreted": (
        WRONG,
        "TRITON_INTERPRET=1: Triton's kernels run on the CPU, in Python",
        "unset TRITON_INTERPRET",
    ),
    "gpu_unserved": (NOTE, "{gpu} has no kernels here: {why}", "plain torch serves it"),
    "no_headers": (
        WRONG,
        "no {file}: Triton cannot build the launchers of its kernels",
        "install Python's headers (python3-dev, python3-devel), or a Python that has them",
    ),
    "no_compiler": (
        WRONG,
        "no C compiler ({names}): Triton cannot build the launchers of its kernels",
        "install gcc, or set CC",
    ),
    "numpy": (
        WRONG,
        "TRITON_INTERPRET=1 with numpy {version}: Triton's interpreter needs one before 2.4",
        "pip install 'numpy<2.4', or unset TRITON_INTERPRET",
    ),
    "deepspeed": (
        NOTE,
        "deepspeed {version} clips gradients to a norm of 1 if its config says nothing of that",
        'a "gradient_clipping" in its config, "auto" under the Trainer; AdaLoraSteps is made after '
        "deepspeed.initialize",
    ),
    "old": (
        WRONG,
        "{name} {version} is older than {oldest}, the oldest that is supported",
        "pip install -U '{name}>={oldest}'",
    ),
    "broken": (WRONG, "{name} does not work: {error}", _REINSTALL),
    "no_library": (WRONG, "{name} does not work: {error}", _LIBRARY),
    "no_library_on_cpu": (NOTE, "{name} does not work: {error}", _LIBRARY),
    "defect": (NOTE, "{name} {version} {cause}", "{cure}"),
    "untried": (NOTE, "{name} {version}: probe {probe} tells nothing: {cause}", _REPORT),
    "demoted": (
        NOTE,
        "{program} is demoted on {device}: {why}",
        f"another path serves; {_FORGET} tries it again; {_REPORT}",
    ),
    "damaged_cache": (NOTE, "{file} is {state}", f"{_FORGET} removes it"),
    "fixed_cache": (NOTE, "{file} is {state}", "set PEFTKERN_CACHE to a folder you can write"),
    "failed": (WRONG, "{test} failed: {error}", f"PEFTKERN_BACKEND=torch avoids it; {_REPORT}"),
    "inexact": (
        WRONG,
        "{test} by {backends}: error of {worst} is {share:.3g} of bound",
        f"PEFTKERN_BACKEND=torch avoids it; {_REPORT}",
    ),
}
_CPU_FLAGS = {  # of /proc/cpuinfo, for every instruction set that has kernels
    "avx2": {"avx2", "fma", "f16c"},
    "avx512": {"avx512f", "avx512bw", "avx512vl", "avx512dq"},
    "avx512_bf16": {"avx512_bf16"},
    "amx_bf16": {"amx_tile", "amx_bf16"},
}


@dataclass(frozen=True)
class Finding:
    """Defect ("wrong"), or a note, with its cause and its cure. id: its row in the table."""

    id: str
    severity: str
    cause: str
    cure: str


@dataclass(frozen=True)
class Served:
    """Back end that would serve an op on a device, with the refusals of those before it."""

    op: str
    device: str
    backend: str | None
    others: dict[str, str]


@dataclass(frozen=True)
class FormatServed:
    """Back end that would serve LoRA over a base in a 4-bit format on a device."""

    format: str
    device: str
    backend: str | None


def finding(id: str, **seen: Any) -> Finding:
    severity, cause, cure = _TABLE[id]
    return Finding(id, severity, cause.format(**seen), cure.format(**seen))


def environment_findings() -> Iterator[Finding]:
    """Report the switches that the environment sets."""
    checks = {"PEFTKERN_BACKEND": dispatch.forced_backend, "PEFTKERN_CPU_ISA": _isa}
    checks["PEFTKERN_TRUST"] = trust.mode
    for name, check in checks.items():
        try:
            check()
        except ValueError as error:
            text = one_line(error).removeprefix("back end: ").removeprefix(f"{name}: ")
            yield finding("switch", name=name, error=text)
        else:
            if os.environ.get(name) and name != "PEFTKERN_TRUST":  # a section tells of that one
                yield finding("forced", name=name, value=os.environ[name])
    where = _asking_for_fsdp()
    if where is not None:
        yield finding("fsdp", where=where)


def _asking_for_fsdp() -> str | None:
    """Return what tells accelerate to use FSDP: the environment, or the file of its answers."""
    if os.environ.get("ACCELERATE_USE_FSDP", "").lower() in ("true", "1"):
        return f"ACCELERATE_USE_FSDP={os.environ['ACCELERATE_USE_FSDP']}"
    caches = os.environ.get("XDG_CACHE_HOME", "~/.cache")
    home = os.environ.get("HF_HOME", os.path.join(caches, "huggingface"))  # as accelerate has it
    file = Path(os.path.expanduser(home)) / "accelerate" / "default_config.yaml"
    try:
        asks = re.search(r"^distributed_type: *FSDP\b", file.read_text("utf-8"), re.MULTILINE)
    except (OSError, UnicodeDecodeError):  # nobody ran `accelerate config`
        return None
    return f"distributed_type: FSDP in {file}" if asks else None


def _isa() -> str | None:
    return cpu_back_end.cpu_isa() if cpu_back_end.cpu_isas() else None


def build_findings(cpu: dict[str, Any]) -> Iterator[Finding]:
    """Report a native library that is missing, on purpose or not, old, or weaker than the CPU."""
    if cpu["why"] is not None:
        yield finding("pure") if installed_pure() else finding("no_native", why=cpu["why"])
    elif cpu["compiled_in"] is None:
        yield finding("stale_native")
    else:
        lacking = [isa for isa in machine_isas() if isa not in cpu["compiled_in"]]
        if lacking:
            yield finding("weak_native", isas=", ".join(lacking))


def product_findings() -> Iterator[Finding]:
    """Report a CPU on which torch has no products of the usual dtype of training."""
    if not has_products(torch.bfloat16, torch.device("cpu")):
        yield finding("no_products")


def machine_isas() -> list[str]:
    """Return the instruction sets with kernels that this CPU has, according to Linux."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:  # not Linux
        return []
    found = re.search(r"^flags\s*:(.*)$", text, re.MULTILINE)
    flags = set(found[1].split()) if found else set()
    return [isa for isa, wanted in _CPU_FLAGS.items() if wanted <= flags]


def gpu_findings(gpus: list[torch.device]) -> Iterator[Finding]:
    """Report obstacles to using a GPU, or Triton's kernels on it."""
    if not torch.cuda.is_available():
        if not Path("/dev/nvidiactl").exists():
            return  # no NVIDIA GPU here
        if torch.version.cuda is None:
            yield finding("torch_without_cuda", torch=torch.__version__)
            return
        try:
            torch.cuda.init()
            why = "no device is visible"
        except (RuntimeError, AssertionError) as error:
            why = one_line(error)
        yield finding("gpu_unusable", torch=torch.__version__, cuda=torch.version.cuda, why=why)
        return
    if importlib.util.find_spec("triton") is None:
        yield finding("no_triton")
        return
    if triton_interpreted():
        yield finding("interpreted")
    yield from compiler_findings(Path(sysconfig.get_path("include")), os.environ.get("CC"))
    for device in gpus:
        why = triton_missing(device)
        if why is not None:
            yield finding("gpu_unserved", gpu=torch.cuda.get_device_name(device), why=why)


def compiler_findings(include: Path, compiler: str | None) -> Iterator[Finding]:
    """Report a missing compiler or Python.h: Triton builds each kernel's launcher in C."""
    if not (include / "Python.h").exists():
        yield finding("no_headers", file=include / "Python.h")
    names = [compiler] if compiler else ["gcc", "clang", "cc"]
    if not any(shutil.which(name) for name in names):
        yield finding("no_compiler", names=", ".join(names))


def version_findings(version: Version) -> Iterator[Finding]:
    """Report packages too old or not importable. Only `>=` is read: pyproject.toml has no other."""
    oldest = re.fullmatch(r">=([\d.]+)", version.accepted or "")
    seen = {"name": version.name, "version": version.version, "error": version.error}
    if version.version and oldest and release(version.version) < release(oldest[1]):
        yield finding("old", **seen, oldest=oldest[1])
    if version.error:
        kind = "broken"
        if version.error.startswith(BNB_LIBRARY):  # on a CPU it has slower ways
            kind = "no_library" if torch.cuda.is_available() else "no_library_on_cpu"
        yield finding(kind, **seen)


def probe_findings(answers: list[Answer], versions: dict[str, str | None]) -> Iterator[Finding]:
    """Report defects that show in the packages here, and probes that could not be run."""
    for one in answers:
        seen = {"name": one.package, "version": versions[one.package], "probe": one.probe}
        if one.answer != "absent":
            kind = "defect" if one.answer == "present" else "untried"
            yield finding(kind, **seen, cause=one.cause, cure=one.cure)


def numpy_findings(version: str | None, interpreted: bool) -> Iterator[Finding]:
    """Report numpy 2.4, which removed int() of one-element arrays: Triton's interpreter uses it."""
    if interpreted and version is not None and release(version) >= (2, 4):
        yield finding("numpy", version=version)


def deepspeed_findings(version: str | None) -> Iterator[Finding]:
    """Report what DeepSpeed does to a training of its own accord."""
    if version is not None:
        yield finding("deepspeed", version=version)


def trust_findings(trusted: Trust | None) -> Iterator[Finding]:
    """Report kernels that were demoted here, and a cache of verdicts that does not serve."""
    for one in trusted.devices if trusted is not None else ():
        for program, why in one.demoted.items():
            yield finding("demoted", program=program, device=one.device, why=why)
        if one.state is not None and trusted.mode in ("auto", "off"):
            kind = "fixed_cache" if one.state.startswith("read-only") else "damaged_cache"
            yield finding(kind, file=one.file, state=one.state)


def served_findings(served: list[Served]) -> Iterator[Finding]:
    """Report ops that would raise, those with the same reasons in one finding."""
    groups: dict[tuple[str, str], list[str]] = {}
    for row in served:
        if row.backend is None:
            why = "; ".join(f"{name}: {why}" for name, why in row.others.items()) or "no kernel"
            groups.setdefault((row.device, why), []).append(row.op)
    forced = dispatch.forced_backend() if groups else None
    for (device, why), ops in groups.items():
        seen = {"ops": ", ".join(ops), "device": device, "why": why, "forced": forced}
        yield finding("unserved" if forced is None else "unserved_forced", **seen)


def test_findings(tested: list[Result]) -> Iterator[Finding]:
    """Report functions whose results are wrong; a forced back end may not be able to run all."""
    for one in tested:
        if not (one.ok or one.unserved):
            test = f"{one.function} in {one.dtype} on {one.device}"
            yield finding("inexact" if one.error is None else "failed", test=test, **asdict(one))
