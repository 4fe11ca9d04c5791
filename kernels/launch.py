"""Host side shared by the launchers: traits of the device, its tiles, its tables."""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Callable, Iterator
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
from peftkern.formats.table import FORMATS
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
def code_table(device: torch.device, form: int) -> Tensor:
    """Return the sixteen float32 values of a format's codes, made once per device.

    Made in a thread of its own: what the caller's thread allocates while a CUDA graph warms up
    belongs to the graph, and this outlives it.
    """
    with ThreadPoolExecutor(1) as thread:
        options = {"dtype": torch.float32, "device": device}
        return thread.submit(torch.tensor, FORMATS[form].code, **options).result()


def whole_blocks(block: int, form: int, blocksize: int, length: int) -> int:
    """Return the values of a row of a tile, `block` at most, that divide a row of `length`.

    They are of one block of NF4 and FP4, whose sums it scales. Of the others they may be several
    blocks, as those are short: to scale each weight takes fewer instructions than a shorter tile.
    """
    return min(block, blocksize) if FORMATS[form].crosses_rows else math.gcd(block, length)


def guard(tensor: Tensor) -> contextlib.AbstractContextManager:
    """Make the tensor's device current: Triton launches on the current device."""
    return torch.cuda.device_of(tensor) if tensor.is_cuda else contextlib.nullcontext()


class Plan:
    """A launch but for its tensors: kernel, grid, numbers and constants, and the compiled programs.

    numbers: the kernel's parameters between its tensors and its constants.
    programs: of Triton for dtypes of the tensors, or None where this has to go through Triton.
    """

    __slots__ = ("constants", "grid", "kernel", "numbers", "programs")

    def __init__(
        self, kernel: Any, grid: tuple[int, ...], numbers: tuple[float, ...], **constants: Any
    ) -> None:
        self.kernel, self.grid, self.numbers, self.constants = kernel, grid, numbers, constants
        self.programs: dict[tuple[torch.dtype | None, ...], Program | None] = {}


class Program(NamedTuple):
    """A compiled kernel between what a launch gives it, as Triton's own launch calls it."""

    run: Callable[..., None]
    grid: tuple[int, int, int]
    fixed: tuple[Any, ...]  # function, metadata of the kernel and of the launch, hooks
    rest: tuple[Any, ...]  # numbers and constants in the order of the kernel's parameters


_plans: list[Any] = []  # functions that keep them
_ALIGNMENT = 16  # of addresses, for which Triton compiles wide loads
# Functions that want to see each launch: before Triton 3.5 a knob that is set, or None.
_WATCHERS = tuple(
    getattr(getattr(knobs.runtime, name), "calls", ())
    for name in ("launch_enter_hook", "launch_exit_hook")
)


def planned(build: Callable[..., Plan]) -> Callable[..., Plan]:
    """Keep the plans that `build` makes of a device and numbers, for tiles that are not forced."""
    kept = functools.lru_cache(maxsize=4096)(build)
    _plans.append(kept)

    @functools.wraps(build)
    def plan(device: torch.device, *numbers: float) -> Plan:
        if _forced.get() is None and _recorded.get(None) is None:
            return kept(device, *numbers)
        return build(device, *numbers)

    return plan


def forget_plans() -> None:
    """Choose tiles anew, after the tables that they come from have changed."""
    for kept in _plans:
        kept.cache_clear()


def launch(plan: Plan, on: Tensor, *tensors: Tensor | None) -> None:
    """Launch a plan's kernel with its tensors on the device of `on`.

    Triton's own launch binds, specializes and looks up all arguments anew. A plan remembers what
    that found and starts it as that does at its end: numbers and constants are the plan's, and of
    tensors Triton specializes on dtypes and on addresses that are aligned. Whatever is unusual goes
    through Triton: the interpreter, recorded launches, hooks, a knob that was set, an address that
    is not aligned, a compiler other than NVIDIA's (AMD's looks at the tensors' sizes, too).
    """
    kernel = plan.kernel
    if (
        type(kernel) is not JITFunction
        or on.is_meta
        or knobs.runtime.__dict__
        or any(_WATCHERS)
        or kernel.pre_run_hooks
        or not all_begin_at(tensors, _ALIGNMENT)
    ):
        with guard(on):
            kernel[plan.grid](*tensors, *plan.numbers, **plan.constants)
        return
    active, device = driver.active, on.get_device()
    if active.get_current_device() != device:
        with guard(on):
            launch(plan, on, *tensors)
        return
    key = tuple([None if tensor is None else tensor.dtype for tensor in tensors])
    program = plan.programs.get(key)
    if program is None:
        compiled = kernel[plan.grid](*tensors, *plan.numbers, **plan.constants)
        plan.programs[key] = _program(plan, compiled, len(tensors))
        return
    run, grid, fixed, rest = program
    run(*grid, active.get_current_stream(device), *fixed, *tensors, *rest)


def _program(plan: Plan, compiled: Any, tensors: int) -> Program | None:
    """Return what a later launch starts, or None if this Triton keeps it in another way."""
    names = plan.kernel.arg_names[tensors + len(plan.numbers) :]
    target = getattr(getattr(compiled, "metadata", None), "target", None)
    if getattr(target, "backend", None) != "cuda" or not plan.constants.keys() >= set(names):
        return None
    run, function, metadata = (
        getattr(compiled, name, None) for name in ("run", "function", "packed_metadata")
    )
    if not callable(run) or function is None or metadata is None:
        return None
    constants = [plan.constants[name] for name in names]
    grid = (*plan.grid, 1, 1)[:3]
    return Program(run, grid, (function, metadata, None, None, None), (*plan.numbers, *constants))


def rows_of(x: Tensor, columns: int) -> Tensor:
    """Return x[..., columns] as a contiguous matrix, copied only if it has to be."""
    if x.dim() != 2:
        x = x.reshape(math.prod(x.shape[:-1]), columns)
    return x.contiguous()
