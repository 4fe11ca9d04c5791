"""Devices of the machine, and the errors about what it lacks."""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import os
import platform
from dataclasses import dataclass

import torch

__all__ = ["BackendUnavailableError"]
# Architectures of AMD for which all kernels compile without spills. On gfx1100 half of them spill,
# up to 900 registers; nothing was measured on either.
_AMD = ("gfx90a", "gfx942", "gfx950")


class BackendUnavailableError(RuntimeError):
    """The back end that was asked for cannot run this call; the message says why."""


@dataclass(frozen=True)
class DeviceInfo:
    """A device as dispatch sees it.

    `name` is what torch calls it, `capability` is (major, minor) on CUDA and None elsewhere, and
    `threads` is the number of threads that a kernel may use on a CPU, 0 elsewhere.
    """

    type: str
    name: str
    capability: tuple[int, int] | None
    threads: int


def device_info(device: torch.device | str = "cpu") -> DeviceInfo:
    """Describe a device. An unknown GPU is not an error: only its name is reported."""
    device = torch.device(device)
    if device.type == "cpu":
        return DeviceInfo("cpu", _cpu_name(), None, torch.get_num_threads())
    if device.type == "cuda" and torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(device)
        return DeviceInfo("cuda", properties.name, (properties.major, properties.minor), 0)
    return DeviceInfo(device.type, str(device), None, 0)


@functools.cache
def arch(device: torch.device) -> str:
    """Return the name of a device's measured table: "sm90", "gfx942"; "interpreter" on a CPU."""
    if device.type == "cpu":
        return "interpreter"
    properties = torch.cuda.get_device_properties(device)
    if torch.version.hip:
        return properties.gcnArchName.split(":")[0]
    return f"sm{properties.major}{properties.minor}"


def triton_interpreted() -> bool:
    """Return True if Triton's kernels run in its interpreter, which takes tensors of a CPU."""
    return os.environ.get("TRITON_INTERPRET") == "1"


@functools.cache
def triton_missing(device: torch.device) -> str | None:
    """Return why Triton's kernels cannot run on a device, or None if they can."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    if device.type == "cuda" and torch.version.hip:
        name = arch(device)
        if name not in _AMD:
            return f"{name} is none of {', '.join(_AMD)}, where no kernel spills"
    elif device.type == "cuda":
        major, minor = torch.cuda.get_device_capability(device)
        if major < 8:
            return f"compute capability {major}.{minor} is below 8.0"
    return None


def _products_of_16_bits() -> dict[torch.dtype, bool]:
    limited = torch.backends.cpu.get_cpu_capability() in ("DEFAULT", "AVX2")  # by its environment
    none = limited and platform.machine() in ("x86_64", "AMD64")
    return {
        torch.bfloat16: not none and torch.ops.mkldnn._is_mkldnn_bf16_supported(),
        torch.float16: not none and torch.ops.mkldnn._is_mkldnn_fp16_supported(),
    }


_PRODUCTS = _products_of_16_bits()  # now: torch.compile traces a look into a dict, not the call


def has_products(dtype: torch.dtype, device: torch.device) -> bool:
    """Return whether torch has matrix products of a dtype on a device; elsewhere than on a CPU yes.

    Without, which is bfloat16 before AVX-512 and float16 on most, x @ weight.T takes several times
    as long as in float32, and dy @ weight runs on one thread, a value at a time: 200 times as long
    (EPYC 7003, torch 2.13, November 2026).
    """
    return device.type != "cpu" or _PRODUCTS.get(dtype, True)


def _cpu_name() -> str:
    machine = os.uname().machine if hasattr(os, "uname") else "cpu"
    return _cpu_field("model name") or machine


def cpu_maker() -> str:
    """Return "GenuineIntel", "AuthenticAMD", ...; "unknown" where the system does not say."""
    return _cpu_field("vendor_id") or "unknown"


def _cpu_field(name: str) -> str | None:
    """Return a field of the first processor; None where there is no /proc/cpuinfo, or not that."""
    with contextlib.suppress(OSError), open("/proc/cpuinfo", encoding="utf-8") as lines:
        for line in lines:
            if line.startswith(name):
                return line.split(":", 1)[1].strip()
    return None
