"""Modules that read the weight of a linear layer below them themselves.

A layer that keeps its weight in another form, or adds an update to it, is only right where it is
called. nn.TransformerEncoderLayer, T5 (`self.wo.weight.dtype`), Mamba (`self.dt_proj.weight @ x`)
and others read the weight instead. Such reads are found in the bytecode of the methods of a
module's class, which is there whether or not the source is: `a.b.weight`, looked up one by one.

What is found may never run, and a look-up that goes another way (`getattr`, a local variable for
the layer, a function that is given the layer) is not found.
"""

from __future__ import annotations

import dis
import inspect
import itertools
import re
import types
from collections.abc import Iterator
from typing import Any, NamedTuple

from torch import nn

_HARMLESS = {"device", "grad", "is_cuda", "is_meta", "requires_grad"}  # `weight` has them all
# Methods that run before weights are replaced, or not in training at all.
_SETTING_UP = re.compile(r"_*(post_)?(init|reset|tie_|resize|load|save)")
_LOOK_UPS = ("LOAD_ATTR", "LOAD_METHOD")


class Read(NamedTuple):
    """Read of `weight`, by `method`, of the module at the names of `path`."""

    method: str  # with its class: "T5DenseActDense.forward"
    path: tuple[str, ...]
    whole: bool  # whether the path begins at self


def weight_reads(cls: type) -> list[Read]:
    """Find the weights that the methods of a module's class and its base classes read."""
    found = []
    for kind in cls.__mro__:
        if kind is nn.Module:
            break
        for name, method in vars(kind).items():
            if not _SETTING_UP.match(name):
                label = f"{kind.__name__}.{name}"
                codes = _codes(method, set())
                found += [Read(label, *read) for code in codes for read in _reads_of(code)]
    return found


def reader_of(
    place: str, modules: dict[str, nn.Module], reads: dict[type, list[Read]]
) -> str | None:
    """Find the method that reads the weight of the layer at this place in a model, if any.

    Args: place, "encoder.layers.0.linear1"; modules, the model's by their places; reads, a cache.
    """
    parts = place.split(".")
    for depth in range(len(parts)):
        cls = type(modules[".".join(parts[:depth])])
        if cls not in reads:
            reads[cls] = weight_reads(cls)
        below = tuple(parts[depth:])
        for read in reads[cls]:
            tail = below if read.whole else below[-len(read.path) :]
            if tail == read.path:
                return read.method
    return None


def _codes(method: Any, seen: set[int]) -> Iterator[types.CodeType]:
    """Yield the code of a method, of what it defines, and of what its decorators were given."""
    if isinstance(method, property):
        for accessor in (method.fget, method.fset):
            yield from _codes(accessor, seen)
        return
    method = inspect.unwrap(getattr(method, "__func__", method)) if callable(method) else method
    if not isinstance(method, types.FunctionType) or id(method) in seen:
        return
    seen.add(id(method))
    pending = [method.__code__]
    while pending:
        code = pending.pop()
        yield code
        pending += [value for value in code.co_consts if isinstance(value, types.CodeType)]
    for cell in method.__closure__ or ():
        try:
            value = cell.cell_contents
        except ValueError:  # a name that has not been given a value
            continue
        yield from _codes(value, seen)


def _reads_of(code: types.CodeType) -> Iterator[tuple[tuple[str, ...], bool]]:
    """Yield (path, whether it begins at self) of each `path.weight` that is not harmless."""
    if "weight" not in code.co_names:
        return
    steps = [step for step in dis.get_instructions(code) if step.opname != "EXTENDED_ARG"]
    path: list[str] = []
    whole = False
    for step, following in itertools.pairwise(steps):
        if step.opname not in _LOOK_UPS:
            names = step.argval  # of the variable that is loaded; of both, where it loads two
            path, whole = [], (names[-1:] if isinstance(names, tuple) else (names,)) == ("self",)
            continue
        harmless = following.opname in _LOOK_UPS and following.argval in _HARMLESS
        if step.argval == "weight" and path and not harmless:
            yield tuple(path), whole
        path.append(step.argval)
