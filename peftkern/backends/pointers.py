"""Addresses of tensors: the only code that takes one.

Everything native code is handed goes through here: dtype, device, contiguity and size are checked
(C++ checks the sizes again), and the caller holds the tensors over the call.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from peftkern.formats.table import FORMATS, fields

CPU = torch.device("cpu")
DTYPE_CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}  # DType of base.h


class Unlike(ValueError):
    """A tensor whose dtype, device, size or strides are not those that were asked for."""


def address(
    name: str, tensor: Tensor, dtype: torch.dtype, numel: int, device: torch.device = CPU
) -> int:
    """Return the address of a contiguous tensor that has this dtype, size and device.

    Raises: Unlike naming the argument, what is accepted and what came.
    """
    if (
        tensor.dtype is not dtype
        or tensor.numel() != numel
        or tensor.device != device
        or not tensor.is_contiguous()
    ):
        layout = "contiguous" if tensor.is_contiguous() else f"strides {tensor.stride()}"
        raise Unlike(
            f"{name}: expected {numel} contiguous {dtype} values on {device}, got "
            f"{tuple(tensor.shape)} {tensor.dtype} on {tensor.device}, {layout}"
        )
    return tensor.data_ptr()


def optional(
    name: str, tensor: Tensor | None, dtype: torch.dtype, numel: int, device: torch.device = CPU
) -> int:
    """`address`, 0 for None."""
    return 0 if tensor is None else address(name, tensor, dtype, numel, device)


def strided(name: str, tensor: Tensor, shape: Sequence[int], device: torch.device = CPU) -> tuple:
    """Return the address, the number of the dtype and the strides of a tensor of this shape.

    Raises: ValueError naming the argument, what is accepted and what came.
    """
    if tuple(tensor.shape) != tuple(shape) or tensor.device != device:
        raise ValueError(
            f"{name}: expected {tuple(shape)} on {device}, got {tuple(tensor.shape)} on "
            f"{tensor.device}"
        )
    return tensor.data_ptr(), dtype_code(name, tensor), *tensor.stride()


def fresh(tensor: Tensor | None) -> int:
    """Return the address of a tensor that the caller has just allocated, 0 for None."""
    return 0 if tensor is None else tensor.data_ptr()


def each(device: torch.device, *rows: tuple[str, Tensor | None, torch.dtype, int]) -> list[int]:
    """Return `optional` of several tensors of a device: (name, tensor, dtype, numel) each."""
    found = []
    for name, tensor, dtype, numel in rows:
        if tensor is None:
            found.append(0)
        elif (
            tensor.dtype is dtype
            and tensor.numel() == numel
            and tensor.device == device
            and tensor.is_contiguous()
        ):
            found.append(tensor.data_ptr())
        else:
            address(name, tensor, dtype, numel, device)  # raises
    return found


def addresses(
    name: str, tensors: Sequence[Tensor], dtype: torch.dtype | None, sizes: Sequence[int]
) -> list[int]:
    """`address` of hundreds of CPU tensors: each question is asked of all before the next.

    dtype: None for whatever each of them has.
    """
    if not (
        [*map(Tensor.numel, tensors)] == [*sizes]
        and (dtype is None or {tensor.dtype for tensor in tensors} <= {dtype})
        and {tensor.is_cpu for tensor in tensors} <= {True}
        and all(map(Tensor.is_contiguous, tensors))
    ):
        for i, (tensor, size) in enumerate(zip(tensors, sizes, strict=True)):
            address(f"{name}[{i}]", tensor, dtype or tensor.dtype, size)
    return [*map(Tensor.data_ptr, tensors)]


def address_table(
    tensors: Sequence[Tensor | None], device: torch.device, numbers: Sequence[int] = ()
) -> Tensor:
    """Return int64 on a device: addresses of contiguous tensors there (0 for None), then `numbers`.

    It keeps nothing alive: the tensors have to outlive the launches that read it, in the order of
    their stream. The copy to a GPU does not wait: pinned memory is reused only after it.

    Raises: RuntimeError while a CUDA graph is captured, whose replays would read that memory later.
    """
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        raise RuntimeError("a table of addresses cannot be part of a CUDA graph")
    for tensor in tensors:
        if tensor is not None and (tensor.device != device or not tensor.is_contiguous()):
            raise ValueError(
                f"tensors: expected contiguous ones on {device}, got strides {tensor.stride()} on "
                f"{tensor.device}"
            )
    table = torch.tensor([*map(fresh, tensors), *numbers], dtype=torch.int64, device="cpu")
    return table.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else table


def begins_at(tensor: Tensor, multiple: int) -> bool:
    """Check that a tensor's memory is aligned to this many bytes."""
    return tensor.data_ptr() % multiple == 0


def placements(tensors: Sequence[Tensor]) -> list[tuple[int, int, torch.dtype, bool]]:
    """Return where values of tensors are, so that another memory or another view of it shows."""
    return [(t.data_ptr(), t.numel(), t.dtype, t.is_contiguous()) for t in tensors]


def first_shared(written: Sequence[Tensor], read: Sequence[Tensor]) -> tuple[int, int] | None:
    """Return the places, in `written + read`, of two tensors that share memory, or None.

    The first of the two is written. Of a tensor with gaps all bytes from its first to its last
    count. Two that are only read may share theirs.
    """
    spans = [
        (tensor.data_ptr(), place, tensor.nbytes if tensor.is_contiguous() else _extent(tensor))
        for place, tensor in enumerate((*written, *read))
    ]
    count = len(written)
    end = end_written = place_of_end = place_of_written = -1  # of what reaches furthest so far
    for begin, place, size in sorted(spans):
        if size == 0:
            continue
        if begin < end and place < count:
            return min(place, place_of_end), max(place, place_of_end)
        if begin < end_written:
            return place_of_written, place
        if begin + size > end:
            end, place_of_end = begin + size, place
        if place < count and begin + size > end_written:
            end_written, place_of_written = begin + size, place
    return None


def _extent(tensor: Tensor) -> int:
    """Return how many bytes there are from the first to the last of a tensor with gaps."""
    if not tensor.numel():
        return 0
    steps = zip(tensor.shape, tensor.stride(), strict=True)
    return (1 + sum((size - 1) * step for size, step in steps)) * tensor.itemsize


def all_begin_at(tensors: Sequence[Tensor | None], multiple: int) -> bool:
    """Check that the memory of tensors is aligned to this many bytes, a power of two."""
    found = 0
    for tensor in tensors:
        if tensor is not None:
            found |= tensor.data_ptr()
    return found % multiple == 0


def dtype_code(name: str, tensor: Tensor) -> int:
    """Return the number of a tensor's dtype in C++.

    Raises: ValueError listing the dtypes if it has none.
    """
    code = DTYPE_CODES.get(tensor.dtype)
    if code is None:
        raise ValueError(f"{name}: expected one of {list(DTYPE_CODES)}, got {tensor.dtype}")
    return code


def check_blocksize(name: str, blocksize: int, form: int = 0) -> None:
    """Raise ValueError unless a format has blocks of this size."""
    accepted = FORMATS[form].blocksizes
    if blocksize not in accepted:
        raise ValueError(f"{name}: expected one of {accepted}, got {blocksize}")


@functools.lru_cache(maxsize=4096)  # host time counts
def _columns(layout: tuple[int, ...]) -> tuple[tuple, ...]:
    """Return names, dtypes and lengths of a weight's tensors, and what C++ takes before them."""
    names, dtypes, lengths = zip(*fields(layout), strict=True)
    form, blocksize, nested_blocksize, *shape = layout
    sizes = (form, math.prod(shape), blocksize, int(nested_blocksize > 0), nested_blocksize)
    return names, dtypes, lengths, sizes


def weight(
    tensors: Sequence[Tensor], layout: Sequence[int], device: torch.device = CPU
) -> tuple[int, ...]:
    """Return a weight as C++ takes it: the fields of `view_of` in binding.h.

    Raises: ValueError naming the tensor, or what of the layout, does not fit.
    """
    names, dtypes, lengths, sizes = _columns(tuple(layout))
    if len(tensors) != len(names):
        raise ValueError(f"w: expected {len(names)} tensors, got {len(tensors)}")
    packed_at, scale_at, *rest = each(device, *zip(names, tensors, dtypes, lengths, strict=True))
    aux_at, code_at, offset_at = (*rest, 0, 0, 0)[:3]
    octets, nblocks, aux_len = (*lengths, 0)[:3]
    return (*sizes, packed_at, octets, scale_at, nblocks, aux_at, aux_len, code_at, offset_at)
