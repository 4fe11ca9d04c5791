"""BlockWeight: what it fills in, and malformed fields, each refused by its name."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
import torch
from block_weights import assert_same_values, numpy_values, random_weight_of
from hypothesis import given
from hypothesis import strategies as st

import peftkern
from peftkern.formats.block_weight import NAMES, BlockWeight
from peftkern.formats.nf4 import TruncatedWeightError

FIELDS = tuple(BlockWeight.__dataclass_fields__)


def test_what_is_left_out_is_filled_in():
    w = random_weight_of("nvfp4", (2, 32))
    assert replace(w, tensor_scale=None).tensor_scale.tolist() == [1.0]
    w = random_weight_of("int4", (2, 64))
    assert replace(w, zero=None).zero.tolist() == [8.0] * 4


@pytest.mark.parametrize("name", NAMES)
def test_tensors_of_any_shape_and_float8_are_viewed(name):
    w = random_weight_of(name, (4, 64))
    kind = {"mxfp4": torch.float8_e8m0fnu, "nvfp4": torch.float8_e4m3fn}.get(name, torch.float32)
    scale = w.scale.view(4, -1).view(kind)
    same = replace(w, packed=w.packed.view(4, 32), scale=scale, shape=[4, 64])
    assert same.packed.data_ptr() == w.packed.data_ptr() and same.packed.dim() == 1
    assert same.scale.data_ptr() == w.scale.data_ptr() and same.shape == (4, 64)
    assert_same_values(peftkern.dequantize_nf4(same), numpy_values(w, torch.float32))


@pytest.mark.parametrize(
    ("name", "changes", "text"),
    [
        ("mxfp4", {"format": "mxfp8"}, "format: expected one of ('mxfp4', 'nvfp4', 'int4'), got"),
        ("mxfp4", {"format": "nf4"}, "format: expected one of"),
        ("mxfp4", {"blocksize": 16}, "blocksize: expected one of (32,), got 16"),
        ("nvfp4", {"blocksize": 16.0}, "blocksize: expected one of (16,), got 16.0"),
        ("int4", {"blocksize": 512}, "blocksize: expected one of (32, 64, 128, 256), got 512"),
        (
            "int4",
            {"shape": (8, 16)},
            "shape: expected rows of a multiple of 32 values, got (8, 16)",
        ),
        ("int4", {"shape": ()}, "shape: expected rows of a multiple of 32 values, got ()"),
        ("int4", {"shape": (-2, -64)}, "shape: expected integers in"),
        ("int4", {"dtype": torch.float64}, "dtype: expected one of ['float32', 'float16', "),
        ("mxfp4", {"packed": torch.zeros(63, dtype=torch.uint8)}, "packed: expected a torch.uint8"),
        (
            "mxfp4",
            {"packed": torch.zeros(64)},
            "packed: expected a torch.uint8 tensor of shape [64]",
        ),
        ("mxfp4", {"scale": torch.zeros(4)}, "scale: expected a torch.uint8 tensor of shape [4]"),
        ("mxfp4", {"scale": torch.zeros(3, dtype=torch.uint8)}, "scale: expected a torch.uint8"),
        ("mxfp4", {"scale": torch.zeros(4, dtype=torch.float8_e4m3fn)}, "scale: expected a"),
        ("nvfp4", {"scale": torch.zeros(8, dtype=torch.float8_e8m0fnu)}, "scale: expected a"),
        ("nvfp4", {"tensor_scale": torch.ones(2)}, "tensor_scale: expected a torch.float32"),
        ("nvfp4", {"tensor_scale": 1.0}, "tensor_scale: expected a torch.float32 tensor"),
        ("nvfp4", {"zero": torch.zeros(8)}, "zero: expected None in nvfp4, got"),
        ("int4", {"tensor_scale": torch.ones(1)}, "tensor_scale: expected None in int4, got"),
        ("int4", {"zero": torch.zeros(4, dtype=torch.int32)}, "zero: expected a torch.float32"),
        ("int4", {"zero": torch.zeros(8)[::2]}, "zero: expected contiguous memory"),
        ("int4", {"scale": torch.zeros(2, 4).t()[:, :2].t()}, "scale: expected"),
        ("int4", {"scale": torch.zeros(4, device="meta")}, "scale: expected a torch.float32"),
    ],
)
def test_malformed_fields_are_refused_by_name(name, changes, text):
    w = random_weight_of(name, (2, 64))
    with pytest.raises(ValueError, match="^" + re.escape(text)):
        replace(w, **changes)


def test_a_short_tensor_is_known_as_such():
    w = random_weight_of("mxfp4", (2, 64))
    with pytest.raises(TruncatedWeightError, match=r"^scale: "):
        replace(w, scale=w.scale[:-1].clone())


junk = st.one_of(
    st.none(),
    st.integers(-3, 300),
    st.floats(),
    st.text(max_size=3),
    st.lists(st.integers(-2, 70), max_size=3),
    st.builds(
        torch.zeros,
        st.lists(st.integers(0, 70), max_size=2),
        dtype=st.sampled_from([torch.uint8, torch.float32, torch.int64, torch.float8_e4m3fn]),
        device=st.sampled_from(["cpu", "meta"]),
    ),
)


@given(st.sampled_from(NAMES), st.data())
def test_broken_fields_are_refused_by_name_or_safe(name, data):
    w = random_weight_of(name, (2, 64))
    changes = {data.draw(st.sampled_from(FIELDS)): data.draw(junk) for _ in range(2)}
    try:
        w = replace(w, **changes)
    except ValueError as error:
        assert str(error).partition(":")[0] in FIELDS
        return
    if w.device.type == "cpu":
        assert_same_values(
            peftkern.dequantize_nf4(w, torch.float32), numpy_values(w, torch.float32)
        )
