"""Tensors that a caller gives for results to be written to: what they have to be."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from peftkern.backends.pointers import first_shared
from peftkern.functional.arguments import check_tensor, mismatch, tensor_list


class Output(NamedTuple):
    """One result: its name, the tensor given for it, or the list of them, and what is expected.

    shapes: one for each tensor of a list, or the one shape.
    """

    name: str
    given: Any
    shapes: list[tuple[int, ...]] | tuple[int, ...]
    dtype: torch.dtype


def check_outputs(
    outputs: Sequence[Output], device: torch.device, inputs: Mapping[str, Sequence[Tensor]]
) -> list[list[Tensor]]:
    """Return the tensors of every output as a list of them: they may be written to.

    Raises: ValueError naming the tensor, unless it is contiguous and outside of autograd, is of the
        shape, dtype and device that are expected, and shares no memory with another or an input.
    """
    found, labels = [], []
    for name, given, shapes, dtype in outputs:
        single = isinstance(shapes, tuple)
        if single:
            check_tensor(name, given)
        tensors = [given] if single else tensor_list(name, given)
        shapes = [shapes] if single else shapes
        if len(tensors) != len(shapes):
            raise ValueError(f"{name}: expected {len(shapes)} tensors, got {len(tensors)}")
        names = [name] if single else [f"{name}[{i}]" for i in range(len(tensors))]
        for label, tensor, shape in zip(names, tensors, shapes, strict=True):
            _check(label, tensor, shape, dtype, device)
        found.append(tensors)
        labels += names
    if torch.compiler.is_compiling() or device.type == "meta":
        return found
    read = itertools.chain.from_iterable(inputs.values())
    shared = first_shared(list(itertools.chain.from_iterable(found)), list(read))
    if shared is not None:
        labels += [f"{name}[{i}]" for name, ts in inputs.items() for i in range(len(ts))]
        one, other = (labels[place] for place in shared)
        raise ValueError(f"{one}: expected memory of its own, got some that {other} has, too")
    return found


def _check(
    name: str, tensor: Tensor, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device
) -> None:
    if tensor.shape != shape or tensor.dtype is not dtype or tensor.device != device:
        raise mismatch(name, f"{list(shape)} {dtype} on {device}", tensor)
    if not tensor.is_contiguous():
        raise mismatch(name, "a contiguous tensor", tensor)
    if tensor.requires_grad and torch.is_grad_enabled():
        raise ValueError(f"{name}: expected a tensor outside of autograd, got one with a gradient")
