"""Host side shared by the launchers: traits of the device, its tiles, its tables."""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextvars import ContextVar
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from peftkern.backends.device import arch
from peftkern.formats.nf4 import nf4_code
from peftkern.kernels.configs import Problem, TileConfig, chosen, tensor_cores
from peftkern.kernels.interpreter import INTERPRETED


@dataclass(frozen=True)
class Traits:
    """Traits of a device that decide how kernels are launched.

    arch: the name of its measured table; cores: its kind of tensor cores; processors: programs that
    run at once at least; precision: of `tl.dot` for float32, where three tf32 products come within
    float32's rounding; ptx: NVIDIA's assembly can be written inline; float64_cores: Triton has
    tensor-core code for float64.
    """

    arch: str
    cores: str
    processors: int
    precision: str
    ptx: bool
    float64_cores: bool

    @classmethod
    def of_gpu(cls, arch: str, processors: int, *, hip: bool) -> Traits:
        precision = "ieee" if hip else "tf32x3"
        float64 = arch in ("sm80", "sm90")
        return cls(arch, tensor_cores(arch), processors, precision, not hip, float64)


# Few processors, so that the interpreter meets split reductions on small shapes.
_INTERPRETER = Traits("interpreter", "", 4, "ieee", ptx=False, float64_cores=True)
_recorded: ContextVar[Traits] = ContextVar("peftkern_recorded")
_forced: ContextVar[tuple[str, TileConfig] | None] = ContextVar("peftkern_config", default=None)


def traits(device: torch.device) -> Traits:
    """Return a device's traits; of "meta", those of the GPU for which launches are recorded."""
    return _recorded.get() if device.type == "meta" else _traits(device)


@functools.cache
def _traits(device: torch.device) -> Traits:
    if device.type == "cpu":
        return _INTERPRETER
    count = torch.cuda.get_device_properties(device).multi_processor_count
    found = Traits.of_gpu(arch(device), count, hip=bool(torch.version.hip))
    return replace(found, ptx=found.ptx and not INTERPRETED.value)


@contextlib.contextmanager
def _set(variable: ContextVar, value: object) -> Iterator[None]:
    token = variable.set(value)
    try:
        yield
    finally:
        variable.reset(token)


def recorded_for(traits: Traits) -> contextlib.AbstractContextManager:
    """Take tensors on "meta" for those of a GPU with these traits inside the `with` block."""
    return _set(_recorded, traits)


def forced(kernel: str, config: TileConfig) -> contextlib.AbstractContextManager:
    """Launch one kernel with these tiles inside the `with` block, as tuning tries a candidate."""
    return _set(_forced, (kernel, config))


def config_for(problem: Problem, device: torch.device) -> TileConfig:
    """Return the tiles of a problem on a device."""
    force = _forced.get()
    if force is not None and force[0] == problem.kernel:
        return force[1]
    on = traits(device)
    return chosen(problem, on.arch, on.processors, on.cores)


@functools.cache
def code_table(device: torch.device) -> Tensor:
    """Return the sixteen NF4 values, made once per device.

    Made in a thread of its own: what the caller's thread allocates while a CUDA graph warms up
    belongs to the graph, and this outlives it.
    """
    with ThreadPoolExecutor(1) as thread:
        return thread.submit(nf4_code, device).result()


def guard(tensor: Tensor) -> contextlib.AbstractContextManager:
    """Make the tensor's device current: Triton launches on the current device."""
    return torch.cuda.device_of(tensor) if tensor.is_cuda else contextlib.nullcontext()


def rows_of(x: Tensor, columns: int) -> Tensor:
    """Return x[..., columns] as a contiguous matrix, copied only if it has to be."""
    if x.dim() != 2:
        x = x.reshape(math.prod(x.shape[:-1]), columns)
    return x.contiguous()
