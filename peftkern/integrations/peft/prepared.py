"""Weights of bitsandbytes as ops take them, prepared once and looked at again at every call.

To read and check a weight takes longer than to see that nothing has changed since. A record is
believed only if all that it was made of is the same: objects by identity, tensors also by address,
size and dtype, the table of values by its version. It is kept beside the weight and not on it, so
that no copy, pickle or state dict holds one. It goes, and with it the hold on memory, when the
weight goes or its module is moved. DeepSpeed's stage 3 puts other memory into a weight for every
pass: of that nothing is kept. What else replaces `weight.data` keeps the old to the next forward.
"""

from __future__ import annotations

import operator
import weakref
from typing import Any, NamedTuple

import torch
from torch import Tensor

from peftkern.backends.pointers import placements
from peftkern.formats.nf4 import NF4Weight

# What `NF4Weight.from_bitsandbytes` reads of a state, and of the state of its scales.
_FIELDS = ("code", "absmax", "offset", "quant_type", "shape", "blocksize", "dtype")
_FIELDS += ("packing_format_for_cpu", "state2")
_NESTED = ("absmax", "code", "blocksize", "dtype")


class _Record(NamedTuple):
    owner: weakref.ref
    fields: tuple[Any, ...]
    tensors: list[Tensor]  # those of `fields`
    placements: list[tuple[Any, ...]]  # of the owner and of them
    version: int
    weight: NF4Weight


_records: dict[int, _Record] = {}


def kept(param: Tensor, state: Any) -> NF4Weight | None:
    """Return a weight of bitsandbytes as it was prepared, None if it was not or is another now."""
    record = None if torch.compiler.is_compiling() else _records.get(id(param))
    if record is None or record.owner() is not param:
        return None
    fields, known = _fields(param, state), record.fields
    if len(fields) != len(known) or not all(map(operator.is_, fields, known)):
        return None
    if record.version != _version(fields[0]):
        return None
    with torch._C.DisableTorchFunctionSubclass():  # else Params4bit adds 1 us to each attribute
        same = record.placements == placements([param, *record.tensors])
    return record.weight if same else None


def prepare(param: Tensor, state: Any) -> NF4Weight:
    """View a weight with its state as `NF4Weight.from_bitsandbytes` does, and keep that.

    Raises: what that raises; of such a weight nothing is kept.
    """
    weight = NF4Weight.from_bitsandbytes(param, state)
    if torch.compiler.is_compiling():
        return weight
    memory = weight.packed.untyped_storage().device.type  # "meta" of a fake tensor as well
    if memory != "meta" and not hasattr(param, "ds_id"):  # of DeepSpeed
        key, fields = id(param), _fields(param, state)
        owner = weakref.ref(param, lambda _: _records.pop(key, None))
        tensors = [field for field in fields if isinstance(field, Tensor)]
        with torch._C.DisableTorchFunctionSubclass():
            found = placements([param, *tensors])
        _records[key] = _Record(owner, fields, tensors, found, _version(fields[0]), weight)
    return weight


def forget(param: Tensor) -> None:
    """Drop what is kept of a weight, and with it the memory that it may have had."""
    _records.pop(id(param), None)


def _fields(param: Tensor, state: Any) -> tuple[Any, ...]:
    """Return all objects that the weight is read from: the table of values first."""
    values = state.__dict__
    found = tuple(map(values.get, _FIELDS))
    nested = getattr(found[-1], "__dict__", None)
    if nested is not None:
        found += tuple(map(nested.get, _NESTED))
    return (*found, state, getattr(param, "quant_storage", None))


def _version(code: Any) -> int:
    """Return the version of the table's data; one made in inference mode has none, and stays."""
    return code._version if isinstance(code, Tensor) and not code.is_inference() else 0
