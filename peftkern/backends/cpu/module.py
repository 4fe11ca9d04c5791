"""The C++ library `peftkern._cpu`, its instruction sets, and checks that every family shares."""

from __future__ import annotations

import contextlib
import functools
import math
import os
from collections.abc import Iterator, Sequence
from types import ModuleType

import torch
from torch import Tensor

from peftkern.backends.device import device_info
from peftkern.backends.pointers import DTYPE_CODES


@functools.cache
def cpu_module() -> tuple[ModuleType | None, str | None]:
    """Return the native library and None, or None and the reason why it cannot be used."""
    try:
        from peftkern import _cpu
    except ImportError as error:
        return None, f"the native library peftkern._cpu is not usable ({error})"
    if _forked:
        _cpu.set_fork_child()
    return _cpu, None


_forked = False


def _after_fork_in_child() -> None:
    """OpenMP's threads, torch's among them, do not survive a fork: the child does without."""
    global _forked
    _forked = True
    if cpu_module.cache_info().currsize and cpu_module()[0] is not None:
        cpu_module()[0].set_fork_child()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork_in_child)


def library() -> ModuleType:
    """Return the native library.

    Raises: RuntimeError with the reason if there is none.
    """
    module, reason = cpu_module()
    if module is None:
        raise RuntimeError(reason)
    return module


@functools.cache
def cpu_isas() -> tuple[str, ...]:
    """Instruction sets that are compiled in and that this machine has, weakest first."""
    module, _ = cpu_module()
    return () if module is None else tuple(module.isas())


# Name and code by PEFTKERN_CPU_ISA, read once, or by `use_isa`; assigned whole, for threads.
_chosen: tuple[str, int] | None = None


def cpu_isa() -> str:
    """Return the instruction set in use: PEFTKERN_CPU_ISA, read once, or the strongest.

    Raises: ValueError listing what this machine has if PEFTKERN_CPU_ISA names anything else.
    """
    return _isa()[0]


def _isa() -> tuple[str, int]:
    global _chosen
    chosen = _chosen
    if chosen is None:
        chosen = _chosen = _available(os.environ.get("PEFTKERN_CPU_ISA") or cpu_isas()[-1])
    return chosen


def _available(name: str) -> tuple[str, int]:
    isas = library().isas()
    if name not in isas:
        raise ValueError(f"PEFTKERN_CPU_ISA: expected one of {list(isas)}, got {name!r}")
    return name, isas[name]


@contextlib.contextmanager
def use_isa(name: str | None) -> Iterator[None]:
    """Run one instruction set's kernels inside the `with` block, in every thread of the process.

    None reads PEFTKERN_CPU_ISA again.

    Raises: ValueError listing what this machine has if it has none of that name.
    """
    global _chosen
    before, _chosen = _chosen, None if name is None else _available(name)
    try:
        yield
    finally:
        _chosen = before


def isa_and_threads() -> tuple[int, int]:
    """Return what every parallel kernel takes first."""
    return _isa()[1], torch.get_num_threads()


def describe() -> str:
    """Return one line on the native library for humans."""
    module, reason = cpu_module()
    if module is None:
        return str(reason)
    cpu = device_info("cpu")
    return f"cpu: {cpu.name}, {cpu_isa()} (of {', '.join(cpu_isas())}), {cpu.threads} threads"


def refusal_device(tensor: Tensor, *args: object) -> str | None:
    """Refuse tensors of another device, or give the reason why there is no library."""
    if not tensor.is_cpu:
        return f"tensors are on {tensor.device}"
    return cpu_module()[1]


def refusal_dense(dense: Tensor, *args: object) -> str | None:
    """Refuse a first tensor (a weight, x, dy) in another dtype or place."""
    if dense.dtype not in DTYPE_CODES:
        return f"the dtype is {dense.dtype}"
    if not dense.is_cpu:
        return f"tensors are on {dense.device}"
    return cpu_module()[1]


def refusal_list(tensors: Sequence[Tensor]) -> str | None:
    """Refuse several tensors that differ in dtype, or any of them."""
    dtypes = {tensor.dtype for tensor in tensors}
    if len(dtypes) > 1:
        return f"tensors are {', '.join(sorted(map(str, dtypes)))}"
    if {tensor.is_cpu for tensor in tensors} != {True}:
        return f"tensors are on {tensors[0].device}"
    return refusal_dense(tensors[0])


def float32(tensor: Tensor) -> Tensor:
    """Return a contiguous float32 tensor: the same one if it is."""
    if tensor.dtype is torch.float32:
        return tensor.contiguous()
    return tensor.to(dtype=torch.float32, memory_format=torch.contiguous_format)


def rows_of(x: Tensor, columns: int) -> Tensor:
    """Return x[..., columns] as a contiguous matrix, copied only if it has to be."""
    if x.dim() != 2:
        x = x.reshape(math.prod(x.shape[:-1]), columns)
    return x.contiguous()


def contiguous(tensors: list[Tensor | None]) -> list[Tensor | None]:
    """Return contiguous tensors, copied only where they have to be."""
    return [t if t is None or t.is_contiguous() else t.contiguous() for t in tensors]
