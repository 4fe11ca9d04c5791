"""Triton's interpreter without its detours: the same values in a third of the time.

- A launch patches `triton.language` once. Triton looks through all names of the language again at
  each call of a jitted function, `tl.sum` and `tl.zeros` among them.
- bfloat16 is widened by a shift, which keeps subnormal values as a GPU does.
- What Triton derives from a type or a shape, it derives once: each operation makes types anew.
- A reduction by a function of ours folds one half onto the other; Triton goes value by value.

tests/kernels/test_quick_interpreter.py holds each to what Triton does without it.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from types import ModuleType
from typing import Any

import numpy as np
import triton.language as tl
from triton.language import core
from triton.runtime import interpreter
from triton.runtime.interpreter import InterpreterBuilder, ReduceOps, TensorHandle

_patch_lang = interpreter._patch_lang
_cast = InterpreterBuilder.cast_impl
_generic_reduce = ReduceOps.generic_reduce
_get_np_dtype = interpreter._get_np_dtype
_init_block = tl.block_type.__init__
_type_for_tuple_values = core._type_for_tuple_values
AS_IT_IS = [  # what is replaced: owner, name and Triton's own
    (interpreter, "_patch_lang", _patch_lang),
    (interpreter, "_get_np_dtype", _get_np_dtype),
    (core, "_type_for_tuple_values", _type_for_tuple_values),
    (InterpreterBuilder, "cast_impl", _cast),
    (ReduceOps, "generic_reduce", _generic_reduce),
    (tl.block_type, "__init__", _init_block),
    (tl.tensor, "__init__", tl.tensor.__init__),
]


@functools.cache
def languages(function: Callable) -> frozenset[ModuleType]:
    """The modules that the interpreter patches for a function: those that it sees."""
    seen = function.__globals__.values()
    return frozenset(module for module in (tl, tl.core) if any(v is module for v in seen))


def patched_once() -> Callable[[Callable], Any]:
    """Return a `_patch_lang` that leaves alone what the launch that runs has patched already."""
    patched: set[ModuleType] = set()

    def patch_lang(function: Callable) -> Any:
        wanted = languages(function)
        if wanted and wanted <= patched:
            scope = interpreter._LangPatchScope()  # of no change
        else:
            scope = _patch_lang(function)
            patched.update(wanted)
        restore = scope.restore

        def restore_all() -> None:  # of a launch alone: a call inside it drops its scope
            restore()
            patched.clear()

        scope.restore = restore_all
        return scope

    return patch_lang


_BLOCKS: dict[tuple, tuple] = {}
_NUMPY: dict[tl.dtype, np.dtype] = {}
_TUPLES: dict[tuple[int, ...], core.tuple_type] = {}


def init_block(self: tl.block_type, element_ty: tl.dtype, shape: Any) -> None:
    key = element_ty.name, *(n.value if isinstance(n, tl.constexpr) else n for n in shape)
    if key in _BLOCKS:
        self.element_ty = element_ty
        self.shape, self.numel, self.name = _BLOCKS[key]
    else:
        _init_block(self, element_ty, shape)
        _BLOCKS[key] = self.shape, self.numel, self.name


@functools.cache
def sizes_of(*shape: int) -> tuple[tl.constexpr, tl.tuple]:
    return tl.constexpr(math.prod(shape)), tl.tuple([tl.constexpr(n) for n in shape])


def init_tensor(self: tl.tensor, handle: Any, type: tl.dtype) -> None:
    self.handle, self.type, self.dtype = handle, type, type.scalar
    self.numel, self.shape = sizes_of(*(type.shape.values if type.is_block() else ()))


def type_for_tuple_values(values: list, fields: list[str] | None = None) -> core.tuple_type:
    key = tuple(v.value if isinstance(v, tl.constexpr) else v for v in values)
    if fields is not None or any(type(v) is not int for v in key):
        return _type_for_tuple_values(values, fields)
    if key not in _TUPLES:
        _TUPLES[key] = _type_for_tuple_values(values)
    return _TUPLES[key]


def get_np_dtype(dtype: tl.dtype) -> np.dtype:
    if isinstance(dtype, (tl.block_type, tl.pointer_type)):
        return _get_np_dtype(dtype)
    if dtype not in _NUMPY:
        _NUMPY[dtype] = _get_np_dtype(dtype)
    return _NUMPY[dtype]


def cast(self: InterpreterBuilder, src: TensorHandle, dst_type: tl.dtype) -> TensorHandle:
    if src.dtype.scalar == tl.bfloat16 and dst_type.scalar == tl.float32:
        wide = src.data.astype(np.uint32) << np.uint32(16)
        return TensorHandle(wide.view(np.float32), tl.float32)
    return _cast(self, src, dst_type)


def reduce_by_halves(self: ReduceOps, tensors: tuple[tl.tensor, ...]) -> list[tl.tensor]:
    """Reduce one tensor along an axis of 2^n values, as every block's length is."""
    if len(tensors) > 1 or self.axis is None or self.keep_dims:
        return _generic_reduce(self, tensors)
    dtype = tensors[0].dtype
    values = np.moveaxis(tensors[0].handle.data, self.axis, 0)
    while len(values) > 1:
        half = len(values) // 2
        halves = (self.to_tensor(part, dtype) for part in (values[:half], values[half:]))
        values = self.combine_fn.fn(*halves).handle.data
    return [self.to_tensor(values[0], dtype)]


def install() -> None:
    """Take the detours out of the interpreter of this process."""
    if not hasattr(interpreter, "_LangPatchScope"):
        return  # of an older Triton, which patches for good
    quick = [patched_once(), get_np_dtype, type_for_tuple_values, cast, reduce_by_halves]
    for (owner, name, _), function in zip(AS_IT_IS, [*quick, init_block, init_tensor], strict=True):
        setattr(owner, name, function)
