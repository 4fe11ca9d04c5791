"""Loading NF4: whatever comes, a ValueError that names the field or a weight that dequantizes."""

from __future__ import annotations

import copy
import json
import re
from typing import Any

import numpy as np
import torch
from bitsandbytes.functional import QuantState
from bitsandbytes.nn import Params4bit
from hypothesis import example, given
from hypothesis import strategies as st
from nf4_strategies import shapes, weights
from nf4_weights import DTYPES, assert_same_bits, bitsandbytes_state, numpy_dequantize
from safetensors.torch import load, save
from torch import Tensor

import peftkern
from peftkern.backends import reference
from peftkern.backends.programs import PLAIN
from peftkern.formats.nf4 import BLOCKSIZES, NF4Weight, dynamic_map

BLOB = "weight.quant_state.bitsandbytes__nf4"
FP4_BLOB = "weight.quant_state.bitsandbytes__fp4"
KEYS = (
    "weight",
    "weight.absmax",
    "weight.quant_map",
    "weight.nested_absmax",
    "weight.nested_quant_map",
    BLOB,
)
ITEMS = (
    "quant_type",
    "blocksize",
    "dtype",
    "shape",
    "nested_blocksize",
    "nested_dtype",
    "nested_offset",
)
FIELDS = (
    *KEYS,
    *ITEMS,
    *NF4Weight.__dataclass_fields__,
    "quant_map",
    "quant_storage",
    "quant_state",
    "state2",
    FP4_BLOB,
    BLOB.removeprefix("weight."),
    FP4_BLOB.removeprefix("weight."),
)

numbers = st.one_of(
    st.integers(-4, 5000),
    st.integers(-(2**70), 2**70),
    st.just(10**4000),
    st.floats(),
    st.booleans(),
)
scalars = st.one_of(st.none(), numbers, st.text(max_size=12), st.sampled_from(["nf4", "float32"]))
# JSON of any kind; sizes in lists come often enough to make wrong shapes, too.
junk = st.one_of(
    scalars,
    st.lists(numbers, max_size=4),
    st.recursive(scalars, lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner)),
)
tensor_dtypes = st.sampled_from(
    [*DTYPES, torch.uint8, torch.int8, torch.int64, torch.float64, torch.bool, torch.complex64]
)


@st.composite
def mangled(draw: st.DrawFn, value: Any) -> Any:
    """A tensor of another dtype, length, rank, layout or device, or no tensor at all."""
    if not isinstance(value, Tensor) or value.is_meta or value.layout is not torch.strided:
        return draw(junk)
    kind = draw(st.sampled_from(["dtype", "length", "rank", "stride", "layout", "meta", "junk"]))
    if kind == "dtype":
        return torch.zeros(value.shape, dtype=draw(tensor_dtypes))
    if kind == "length":
        return torch.zeros(draw(st.integers(0, 300)), dtype=value.dtype)
    if kind == "rank":
        return value.reshape(draw(st.sampled_from([(1, -1), (-1, 1), (1, -1, 1)])))
    if kind == "stride":
        return torch.zeros(2 * value.numel() + 1, dtype=value.dtype)[1::2].reshape(value.shape)
    if kind == "layout":
        return value.to_sparse() if value.dim() else torch.zeros((), dtype=value.dtype).to_sparse()
    if kind == "meta":
        return value.to("meta")
    return draw(junk)


def as_blob(text: str | bytes) -> Tensor:
    data = text.encode("utf-8", "surrogatepass") if isinstance(text, str) else text
    return torch.from_numpy(np.frombuffer(data, dtype=np.uint8).copy())


@st.composite
def broken_states(draw: st.DrawFn) -> dict[str, Any]:
    """A valid state dict with one to three things wrong with it, or none by luck."""
    state: dict[str, Any] = dict(draw(weights()).state_dict())
    items = json.loads(bytes(state[BLOB].tolist()))
    for _ in range(draw(st.integers(1, 3))):
        kind = draw(st.sampled_from(["drop", "tensor", "item", "drop item", "bytes", "fp4"]))
        if kind == "drop":
            state.pop(draw(st.sampled_from(KEYS)), None)
        elif kind == "tensor":
            key = draw(st.sampled_from(KEYS))
            state[key] = draw(mangled(state.get(key)))
        elif kind in ("item", "drop item"):
            key = draw(st.sampled_from(ITEMS))
            items.pop(key, None)
            if kind == "item":
                items[key] = draw(junk)
            state[BLOB] = as_blob(json.dumps(items))
        elif kind == "bytes" and isinstance(state.get(BLOB), Tensor):
            state[BLOB] = as_blob(draw(st.binary(max_size=80)))
        else:
            state[FP4_BLOB] = state.pop(BLOB, None)
    return state


def check(load_weight: Any) -> None:
    """The property: a ValueError that begins with a field, or a weight that is safe to read."""
    try:
        w = load_weight()
    except ValueError as error:
        field = re.match(r"([\w.]+): ", str(error))
        assert field and field[1] in FIELDS, f"names no field: {error}"
        return
    if w.device.type == "meta":
        return
    expected = numpy_dequantize(w, torch.float32).nan_to_num()
    for name in ("cpu", *PLAIN):
        with peftkern.use_backend(name):
            got = peftkern.dequantize_nf4(w, torch.float32)
        assert_same_bits(got.nan_to_num(), expected)


@given(broken_states())
@example({})
@example({"weight": torch.zeros(1, dtype=torch.uint8), BLOB: as_blob("[" * 60_000)})
@example({"weight": torch.zeros(1, dtype=torch.uint8), BLOB: as_blob("[" * 900 + "]" * 900)})
@example({"weight": torch.zeros(1, dtype=torch.uint8), BLOB: as_blob(b" " * 70_000)})
@example({"weight": torch.zeros(1, dtype=torch.uint8), BLOB: as_blob("9" * 5000)})
@example({"weight": torch.zeros(1, dtype=torch.uint8), BLOB: as_blob(b"\xff\xfe{}")})
@example({"weight": torch.zeros(1, dtype=torch.uint8), BLOB: as_blob('{"quant_type": "\\ud800"}')})
def test_broken_state_dict_is_refused_by_name_or_safe(state):
    check(lambda: NF4Weight.from_state_dict(state))


@given(weights(), st.data())
def test_broken_field_is_refused_by_name_or_safe(w, data):
    fields = {name: getattr(w, name) for name in w.__dataclass_fields__}
    for _ in range(data.draw(st.integers(1, 3))):
        name = data.draw(st.sampled_from(sorted(fields)))
        fields[name] = data.draw(st.one_of(mangled(fields[name]), junk, tensor_dtypes))
    check(lambda: NF4Weight(**fields))


@given(weights(), st.data())
def test_broken_quant_state_is_refused_by_name_or_safe(w, data):
    state = copy.copy(bitsandbytes_state(w))
    for _ in range(data.draw(st.integers(1, 3))):
        nested = isinstance(state.state2, QuantState) and data.draw(st.booleans())
        owner = state.state2 if nested else state
        name = data.draw(st.sampled_from(sorted(vars(owner))))
        setattr(owner, name, data.draw(st.one_of(mangled(vars(owner)[name]), junk)))
    packed = data.draw(st.one_of(st.just(w.packed), mangled(w.packed)))
    param = packed
    if isinstance(packed, Tensor) and packed.layout is torch.strided:
        param = Params4bit(packed, quant_state=state, quant_storage=packed.dtype)
    check(lambda: NF4Weight.from_bitsandbytes(param))


@given(weights())
def test_valid_weight_survives_safetensors_and_dequantizes(w):
    again = NF4Weight.from_state_dict(load(save(w.state_dict("a.b."))), "a.b.")
    assert again.shape == w.shape and again.dtype == w.dtype and again.nested == w.nested
    for name in ("packed", "absmax", "nested_absmax", "nested_code", "nested_offset"):
        before, after = getattr(w, name), getattr(again, name)
        assert (before is None) == (after is None)
        if before is not None:
            assert_same_bits(after, before)
    for dtype in DTYPES:
        for name in ("cpu", *PLAIN):
            with peftkern.use_backend(name):
                assert_same_bits(peftkern.dequantize_nf4(again, dtype), numpy_dequantize(w, dtype))


@given(
    shapes,
    st.sampled_from(BLOCKSIZES),
    st.sampled_from(DTYPES),
    st.integers(-30, 30),
    st.integers(0, 2**32 - 1),
)
def test_back_ends_quantize_alike(shape, blocksize, dtype, exponent, seed):
    torch.manual_seed(seed)
    weight = (torch.randn(shape) * 2.0**exponent).to(dtype)
    with peftkern.use_backend("cpu"):
        native = peftkern.quantize_nf4(weight, blocksize=blocksize)
    packed, absmax = reference.nf4_quantize(weight, blocksize)
    assert_same_bits(native.packed, packed)
    if weight.numel():
        code = torch.tensor(dynamic_map())
        q, nested = reference.nf4_quantize_absmax(absmax, absmax.mean(), code, 256)
        assert_same_bits(native.absmax, q)
        assert_same_bits(native.nested_absmax, nested)
