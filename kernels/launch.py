"""Host side shared by the launchers: traits of the device, its tiles, its tables."""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextvars import ContextVar
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor
from triton import knobs
from triton.runtime import JITFunction, driver

from peftkern.backends.device import arch
from peftkern.backends.pointers import all_begin_at
from peftkern.formats.nf4 import nf4_code
from peftkern.kernels.configs import Problem, TileConfig, chosen
from peftkern.kernels.interpreter import INTERPRETED


@dataclass(frozen=True)
class Traits:
    """Traits of a device that decide how kernels are launched.

    arch: the name of its measured table; processors: programs that run at once at least; precision:
    of `tl.dot` for float32, where three tf32 products come within float32's rounding; ptx: NVIDIA's
    assembly can be written inline; float64_cores: Triton has tensor-core code for float64.
    """

    arch: str
    processors: int
    precision: str
    ptx: bool
    float64_cores: bool

    @classmethod
    def of_gpu(cls, arch: str, processors: int, *, hip: bool) -> Traits:
        precision = "ieee" if hip else "tf32x3"
        return cls(arch, processors, precision, not hip, arch in ("sm80", "sm90"))


# Few processors, so that the interpreter meets split reductions on small shapes.
_INTERPRETER = Traits("interpreter", 4, "ieee", ptx=False, float64_cores=True)
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
    return chosen(problem, on.arch, on.processors)


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


class Program(NamedTuple):
    """A compiled kernel with what Triton's own launch gives it beside its arguments."""

    run: Any
    function: Any
    metadata: Any
    constants: tuple[Any, ...]  # in the order of the kernel's parameters


# What Triton specialized: by kernel, device, kinds of the arguments, numbers and constants.
_programs: dict[tuple[Any, ...], Program | None] = {}
_specialized: dict[tuple[Any, ...], tuple[int, ...]] = {}  # places of such numbers
_ALIGNMENT = 16  # of addresses, for which Triton compiles wider loads
_INT32 = 2**31
# Lists of functions that want to see each launch: before Triton 3.5 a knob that is set, or not.
_WATCHERS = tuple(
    getattr(getattr(knobs.runtime, name), "calls", ())
    for name in ("launch_enter_hook", "launch_exit_hook")
)


def launch(
    kernel: Any,
    on: Tensor,
    grid: tuple[int, ...],
    tensors: tuple[Tensor | None, ...],
    numbers: tuple[float, ...],
    **constants: Any,
) -> None:
    """Launch kernel[grid](*tensors, *numbers, **constants) on the device of `on`.

    Triton's own launch binds, specializes and looks up all arguments anew. From the second time on
    a program is started as that does at its end. What it specializes on is the key: dtypes, whether
    every address is aligned, the values of numbers, constants. Whatever is unusual goes through
    Triton: the interpreter, recorded launches, a knob that was set, hooks, an address that is not
    aligned, a compiler other than NVIDIA's (AMD's looks at the tensors' sizes, too).
    """
    if (
        type(kernel) is not JITFunction
        or on.is_meta
        or knobs.runtime.__dict__
        or any(_WATCHERS)
        or kernel.pre_run_hooks
        or not all_begin_at(tensors, _ALIGNMENT)
        or max(numbers) >= _INT32
    ):
        with guard(on):
            kernel[grid](*tensors, *numbers, **constants)
        return
    active, device = driver.active, on.get_device()
    if active.get_current_device() != device:
        with guard(on):
            launch(kernel, on, grid, tensors, numbers, **constants)
        return
    kinds = tuple(map(type, numbers))
    places = _specialized.get((id(kernel), kinds))
    if places is None:
        places = _specialized[id(kernel), kinds] = _places(kernel, len(tensors), kinds)
    dtypes = [None if tensor is None else tensor.dtype for tensor in tensors]
    values = [numbers[place] for place in places]
    key = (id(kernel), device, kinds, *dtypes, *values, *constants.items())
    program = _programs.get(key)
    if program is None:
        compiled = kernel[grid](*tensors, *numbers, **constants)
        if key not in _programs:
            _programs[key] = _program(kernel, compiled, len(tensors) + len(numbers), constants)
        return
    run, function, metadata, rest = program
    stream = active.get_current_stream(device)
    blocks = (*grid, 1, 1)[:3]
    run(*blocks, stream, function, metadata, None, None, None, *tensors, *numbers, *rest)


def _places(kernel: Any, tensors: int, kinds: tuple[type, ...]) -> tuple[int, ...]:
    """Return which of a launch's numbers Triton specializes on: integers, unless told not to."""
    params = kernel.params[tensors : tensors + len(kinds)]
    return tuple(
        i
        for i, (param, kind) in enumerate(zip(params, kinds, strict=True))
        if kind is not float and not param.do_not_specialize
    )


def _program(
    kernel: Any, compiled: Any, given: int, constants: dict[str, Any]
) -> Program | None:
    """Return what a later launch starts, or None if this Triton keeps it in another way."""
    names = kernel.arg_names[given:]
    metadata = getattr(compiled, "metadata", None)
    target = getattr(metadata, "target", None)
    if getattr(target, "backend", None) != "cuda" or not constants.keys() >= set(names):
        return None
    fields = [getattr(compiled, name, None) for name in ("run", "function", "packed_metadata")]
    if None in fields or not callable(fields[0]):
        return None
    return Program(*fields, tuple(constants[name] for name in names))


def rows_of(x: Tensor, columns: int) -> Tensor:
    """Return x[..., columns] as a contiguous matrix, copied only if it has to be."""
    if x.dim() != 2:
        x = x.reshape(math.prod(x.shape[:-1]), columns)
    return x.contiguous()
