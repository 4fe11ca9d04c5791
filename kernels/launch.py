"""What the launchers share on the host: the device, its tiles, its tables."""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextvars import ContextVar

import torch
from torch import Tensor

from peftkern.backends.device import arch
from peftkern.formats.nf4 import nf4_code
from peftkern.kernels.configs import Problem, TileConfig, chosen
from peftkern.kernels.primitives import INTERPRETED

_INTERPRETED_PROCESSORS = 4  # so that the interpreter meets split reductions on small shapes


@functools.cache
def processors(device: torch.device) -> int:
    """How many programs run at once at least."""
    if device.type == "cpu":
        return _INTERPRETED_PROCESSORS
    return torch.cuda.get_device_properties(device).multi_processor_count


_forced: ContextVar[tuple[str, TileConfig] | None] = ContextVar("peftkern_config", default=None)


@contextlib.contextmanager
def forced(kernel: str, config: TileConfig) -> Iterator[None]:
    """Launch one kernel with these tiles inside the `with` block: how tuning tries a candidate."""
    token = _forced.set((kernel, config))
    try:
        yield
    finally:
        _forced.reset(token)


def config_for(problem: Problem, device: torch.device) -> TileConfig:
    """The tiles of a problem on a device."""
    force = _forced.get()
    if force is not None and force[0] == problem.kernel:
        return force[1]
    return chosen(problem, arch(device), processors(device))


def precision(device: torch.device) -> str:
    """How `tl.dot` multiplies float32 here: three tf32 products come within float32's rounding."""
    return "ieee" if device.type == "cpu" or torch.version.hip else "tf32x3"


def has_ptx(device: torch.device) -> bool:
    """Whether NVIDIA's assembly can be written inline."""
    return device.type == "cuda" and torch.version.hip is None and not INTERPRETED.value


@functools.cache
def code_table(device: torch.device) -> Tensor:
    """The sixteen values, once per device.

    Made in a thread of its own: what the caller's thread allocates while a CUDA graph warms up
    belongs to the graph, and this outlives it.
    """
    with ThreadPoolExecutor(1) as thread:
        return thread.submit(nf4_code, device).result()


def guard(tensor: Tensor) -> contextlib.AbstractContextManager:
    """Triton launches on torch's current device: make it the tensor's."""
    return torch.cuda.device_of(tensor) if tensor.is_cuda else contextlib.nullcontext()


def rows_of(x: Tensor, columns: int) -> Tensor:
    """x[..., columns] as a contiguous matrix, copied only if it has to be."""
    if x.dim() != 2:
        x = x.reshape(math.prod(x.shape[:-1]), columns)
    return x.contiguous()
