"""Weights of bitsandbytes as ops take them, prepared once and looked at again at every call.

To read and check a weight takes longer than to see that nothing has changed since. A record is
believed only if all that it was made of is the same: objects by identity, tensors also by address,
size and dtype, the table of values by its version. It is kept beside the weight and not on it, so
that no copy, pickle or state dict holds one, and goes when the weight goes.
"""

from __future__ import annotations

import operator
import weakref
from typing import Any, NamedTuple

import torch
from torch import Tensor

from peftkern.backends.pointers import placement
from peftkern.formats.nf4 import NF4Weight

# What `NF4Weight.from_bitsandbytes` reads of a state, and of the state of its scales.
_FIELDS = ("code", "absmax", "offset", "quant_type", "shape", "blocksize", "dtype")
_FIELDS += ("packing_format_for_cpu", "state2")
_NESTED = ("absmax", "code", "blocksize", "dtype")


class _Record(NamedTuple):
    owner: weakref.ref
    fields: tuple[Any, ...]
    placements: list[tuple[Any, ...]]
    version: int
    weight: NF4Weight


_records: dict[int, _Record] = {}


def nf4_weight(param: Tensor, state: Any) -> NF4Weight:
    """View a weight of bitsandbytes with its state, as `NF4Weight.from_bitsandbytes` does.

    Raises: what that raises; of such a weight nothing is kept.
    """
    if torch.compiler.is_compiling():
        return NF4Weight.from_bitsandbytes(param, state)
    fields = _fields(param, state)
    record = _records.get(id(param))
    if (
        record is not None
        and record.owner() is param
        and len(fields) == len(record.fields)
        and all(map(operator.is_, fields, record.fields))
        and record.version == _version(fields[0])
        and record.placements == _placements(param, fields)
    ):
        return record.weight
    weight = NF4Weight.from_bitsandbytes(param, state)
    if weight.packed.device.type != "meta":
        key = id(param)
        owner = weakref.ref(param, lambda _: _records.pop(key, None))
        version, placements = _version(fields[0]), _placements(param, fields)
        _records[key] = _Record(owner, fields, placements, version, weight)
    return weight


def _fields(param: Tensor, state: Any) -> tuple[Any, ...]:
    """Return all objects that the weight is read from: the table of values first."""
    values = state.__dict__
    found = tuple(map(values.get, _FIELDS))
    nested = getattr(found[-1], "__dict__", None)
    if nested is not None:
        found += tuple(map(nested.get, _NESTED))
    return (*found, state, getattr(param, "quant_storage", None))


def _placements(param: Tensor, fields: tuple[Any, ...]) -> list[tuple[Any, ...]]:
    with torch._C.DisableTorchFunctionSubclass():  # else Params4bit adds 1 us to each attribute
        return [placement(param), *(placement(f) for f in fields if isinstance(f, Tensor))]


def _version(code: Any) -> int:
    """Return the version of the table's data; one made in inference mode has none, and stays."""
    return code._version if isinstance(code, Tensor) and not code.is_inference() else 0
