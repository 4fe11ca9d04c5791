"""The CUDA library `peftkern._cuda`, and the devices that it runs on.

Launches go to the current stream of the tensors' device, and neither wait nor allocate but through
torch, so that a CUDA graph can record them. As in any op of torch, memory that is freed after the
launch is used again in the order of that stream.

The tests load the same kernels compiled for a CPU in place of `peftkern._cuda`; `emulated` says so.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from types import ModuleType

import torch


@functools.cache
def cuda_module() -> tuple[ModuleType | None, str | None]:
    """Return the CUDA library and None, or None and the reason why it cannot be used."""
    try:
        from peftkern import _cuda
    except ImportError as error:
        return None, f"the CUDA library peftkern._cuda is not usable ({error})"
    return _cuda, None


def library() -> ModuleType:
    module, reason = cuda_module()
    if module is None:
        raise RuntimeError(reason)
    return module


def refusal_library() -> str | None:
    """Return why the library cannot be used, or None if it can."""
    return cuda_module()[1]


def emulated() -> bool:
    """Return True if the kernels are emulated on a CPU, and so take its tensors."""
    module, _ = cuda_module()
    return module is not None and module.emulated


def refusal_device(device: torch.device) -> str | None:
    """Return why the library's kernels cannot run on a device, or None if they can."""
    module, reason = cuda_module()
    return reason if module is None else _refusal(module, device)


@functools.cache
def _refusal(module: ModuleType, device: torch.device) -> str | None:
    if module.emulated:
        return None if device.type == "cpu" else f"the kernels are a CPU's, not for {device}"
    if torch.version.hip is not None:
        return "the kernels are CUDA's, and this PyTorch is ROCm's"
    if module.device_count() == 0:
        driver = module.driver_version()
        return (
            f"the kernels are built with CUDA {version(module.runtime_version())}, which finds no "
            f"GPU: the driver {'is for CUDA ' + version(driver) if driver else 'is missing'}"
        )
    capability = torch.cuda.get_device_capability(device)
    if not covers(module.architectures(), capability):
        return (
            f"the kernels are built for {', '.join(module.architectures())}, not for "
            f"sm_{capability[0]}{capability[1]}"
        )
    return None


def version(number: int) -> str:
    """Format a CUDA version: 13.0 of 13000."""
    return f"{number // 1000}.{number % 1000 // 10}"


def covers(architectures: list[str], capability: tuple[int, int]) -> bool:
    """Return True if code for these architectures runs on a device of this capability.

    Real code ("sm_80") serves its capability and later ones of the same major number, "sm_90a" 9.0
    alone, and PTX ("compute_120") everything from there on.
    """
    for name in architectures:
        kind, _, number = name.partition("_")
        built = divmod(int(number.rstrip("a")), 10)
        if built == capability or (kind == "compute" and built <= capability):
            return True
        if not number.endswith("a") and built[0] == capability[0] and built <= capability:
            return True
    return False


@contextlib.contextmanager
def launching_on(device: torch.device) -> Iterator[int]:
    """Make a device current, and yield the address of its current stream."""
    wanted = "cpu" if emulated() else "cuda"
    if device.type != wanted:
        raise ValueError(f"tensors: expected them on a {wanted.upper()} device, got {device}")
    if wanted == "cpu":
        yield 0
        return
    with torch.cuda.device(device):
        yield torch.cuda.current_stream(device).cuda_stream
