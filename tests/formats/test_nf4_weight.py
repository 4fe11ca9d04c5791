"""NF4Weight: validation, and interchange with bitsandbytes in memory and through safetensors."""

from __future__ import annotations

import copy
import pickle
from dataclasses import replace

import bitsandbytes as bnb
import pytest
import torch
from bitsandbytes.nn import Params4bit
from nf4_weights import (
    DTYPES,
    assert_same_bits,
    assert_same_numbers,
    bitsandbytes_param,
    bitsandbytes_state,
    every_byte_weight,
    random_weight,
)
from safetensors.torch import load_file, save_file
from torch import Tensor

import peftkern
from peftkern.backends.programs import PLAIN
from peftkern.formats.nf4 import NF4Weight, RepackedWeightError


@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("nested", [False, True])
def test_from_bitsandbytes_views_the_parameter(nested, dtype, quant_type):
    param = bitsandbytes_param(dtype=dtype, compress_statistics=nested, quant_type=quant_type)
    w = NF4Weight.from_bitsandbytes(param)
    assert (
        w.quant_type == quant_type
        and w.shape == (96, 128)
        and w.dtype == dtype
        and w.nested == nested
    )
    assert w.packed.data_ptr() == param.data_ptr()
    assert w.absmax.data_ptr() == param.quant_state.absmax.data_ptr()
    expected = bnb.functional.dequantize_4bit(param.data, param.quant_state)
    for name in (None, *PLAIN):
        with peftkern.use_backend(name):
            assert_same_numbers(peftkern.dequantize_nf4(w), expected)


@pytest.mark.parametrize("storage", [torch.uint8, torch.bfloat16, torch.float16, torch.float32])
def test_quant_storage_is_read_as_bytes(backend, storage, tmp_path):
    """Also the bytes that are NaNs in that dtype, which a float copy may rewrite."""
    w = every_byte_weight(64, True, torch.bfloat16)
    data = w.packed.view(storage).view(-1, 1)
    assert storage == torch.uint8 or data.isnan().any()
    param = Params4bit(
        data, quant_state=bitsandbytes_state(w), quant_storage=storage, bnb_quantized=True
    )
    assert_same_bits(NF4Weight.from_bitsandbytes(param).packed, w.packed)
    state = w.state_dict("layer.") | {"layer.weight": data.clone()}
    save_file(state, tmp_path / "model.safetensors")
    read = NF4Weight.from_state_dict(load_file(tmp_path / "model.safetensors"), "layer.")
    assert_same_bits(read.packed, w.packed)


def test_quant_storage_that_was_cast_is_refused():
    """`model.half()` converts a bfloat16 storage as if it held numbers."""
    param = bitsandbytes_param(quant_storage=torch.bfloat16)
    cast = Params4bit(
        param.data.half(),
        quant_state=param.quant_state,
        quant_storage=torch.bfloat16,
        bnb_quantized=True,
    )
    with pytest.raises(ValueError, match="quant_storage"):
        NF4Weight.from_bitsandbytes(cast)


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(96, 128), (7, 13), (5, 300)], ids=str)
def test_state_dict_is_loaded_by_bitsandbytes(backend, shape, dtype, nested, tmp_path):
    w = peftkern.quantize_nf4(random_weight(shape, dtype), double_quant=nested)
    save_file(w.state_dict("layer."), tmp_path / "model.safetensors")
    stats = load_file(tmp_path / "model.safetensors")
    data = stats.pop("layer.weight")
    stats = {key.removeprefix("layer.weight."): value for key, value in stats.items()}
    param = Params4bit.from_prequantized(data, stats, device="cpu")
    assert tuple(param.quant_state.shape) == shape and param.quant_state.dtype == dtype
    assert param.quant_state.nested == nested
    again = NF4Weight.from_bitsandbytes(param)
    assert_same_bits(peftkern.dequantize_nf4(again), peftkern.dequantize_nf4(w))


@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_state_dict_of_bitsandbytes_is_loaded_and_written_alike(
    dtype, nested, quant_type, tmp_path
):
    options = {"compress_statistics": nested, "quant_type": quant_type}
    layer = bnb.nn.Linear4bit(128, 96, bias=False, **options)
    layer = layer.to(dtype).to("cpu")
    theirs = {f"a.b.{key}": value for key, value in layer.state_dict().items()}
    save_file(theirs, tmp_path / "model.safetensors")
    theirs = load_file(tmp_path / "model.safetensors")
    w = NF4Weight.from_state_dict(theirs, "a.b.")
    assert w.quant_type == quant_type
    ours = w.state_dict("a.b.")
    assert sorted(ours) == sorted(theirs)
    for key, value in theirs.items():
        assert_same_bits(ours[key], value)


def test_a_state_dict_whose_key_and_content_differ_is_refused():
    state = peftkern.quantize_nf4(torch.randn(4, 64)).state_dict()
    blob = state.pop("weight.quant_state.bitsandbytes__nf4")
    state["weight.quant_state.bitsandbytes__fp4"] = blob
    with pytest.raises(
        ValueError, match=r"^quant_type: expected 'fp4', as its key says, got 'nf4'"
    ):
        NF4Weight.from_state_dict(state)


def test_state_dict_of_two_weights_fits_one_safetensors_file(tmp_path):
    """Weights that share a nested table must not share memory in the file."""
    first = every_byte_weight(32, True, torch.float32)
    own = {name: getattr(first, name).clone() for name in ("packed", "absmax", "nested_absmax")}
    second = replace(first, **own)
    save_file(first.state_dict("a.") | second.state_dict("b."), tmp_path / "model.safetensors")


@pytest.mark.parametrize("nested", [False, True])
def test_repacked_weight_is_recognised(nested):
    param = bitsandbytes_param(compress_statistics=nested)
    data, state = bnb.functional._convert_weight_packed_for_cpu(param.data, param.quant_state)
    param.data, param.quant_state = data, state
    with pytest.raises(RepackedWeightError, match="repacks"):
        NF4Weight.from_bitsandbytes(param)


@pytest.mark.skipif(
    not bnb.functional.has_avx512bf16(), reason="bitsandbytes repacks with AVX512-BF16 only"
)
def test_layer_repacked_by_its_own_eval_is_recognised():
    layer = bnb.nn.Linear4bit(128, 96, quant_type="nf4", compute_dtype=torch.bfloat16).to("cpu")
    NF4Weight.from_bitsandbytes(layer.weight)
    layer.eval()(torch.randn(1, 128))
    with pytest.raises(RepackedWeightError):
        NF4Weight.from_bitsandbytes(layer.weight)


@pytest.mark.parametrize(("nested", "field"), [(False, "absmax"), (True, "nested_dtype")])
def test_weight_that_bitsandbytes_unpacked_is_refused(nested, field):
    """Its inverse restores the nibbles but leaves a plain absmax transposed and in bfloat16.

    A nested one is rebuilt with bfloat16 roundings, which is not NF4 as defined.
    """
    param = bitsandbytes_param(compress_statistics=nested)
    functional = bnb.functional
    packed = functional._convert_weight_packed_for_cpu(param.data, param.quant_state)
    param.data, param.quant_state = functional._convert_weight_packed_for_cpu_inverse(*packed)
    with pytest.raises(ValueError, match=field):
        NF4Weight.from_bitsandbytes(param)


def test_from_bitsandbytes_refuses_what_is_not_nf4():
    weight = random_weight((32, 64))
    flipped = bitsandbytes_param()
    flipped.quant_state.code = flipped.quant_state.code.flip(0)
    other, exchanged = bitsandbytes_param(), bitsandbytes_param()
    other.quant_state.quant_type = "af4"
    exchanged.quant_state.quant_type = "fp4"  # over NF4's table
    for param, field in (
        (Params4bit(weight, quant_type="nf4"), "quant_state"),
        (torch.nn.Parameter(weight), "quant_state"),
        (None, "Params4bit"),
        (other, "quant_type: expected 'nf4' or 'fp4', got 'af4'"),
        (flipped, "quant_map"),
        (exchanged, "quant_map: expected FP4's sixteen values"),
    ):
        with pytest.raises(ValueError, match=field):
            NF4Weight.from_bitsandbytes(param)


def test_short_absmax_is_refused_where_bitsandbytes_reads_out_of_bounds():
    param = bitsandbytes_param(compress_statistics=False)
    param.quant_state.absmax = param.quant_state.absmax[:1].clone()
    with pytest.raises(ValueError, match=r"^absmax: .*\[192\]"):
        NF4Weight.from_bitsandbytes(param)


def test_weight_reports_its_size_and_moves():
    w = peftkern.quantize_nf4(random_weight((96, 128), torch.bfloat16))
    assert (w.numel, w.nblocks, w.nested) == (96 * 128, 192, True)
    assert w.device == torch.device("cpu") and w.to("cpu") is w
    assert w.nbytes == 96 * 64 + 192 + 4 + 1024 + 4
    meta = w.to("meta")
    assert meta.device.type == "meta" and meta.shape == w.shape and meta.nested_blocksize == 256
    assert repr(w) == (
        "NF4Weight(shape=(96, 128), blocksize=64, absmax=nested, dtype=bfloat16, device='cpu')"
    )


def test_weight_is_copied_and_pickled():
    w = peftkern.quantize_nf4(random_weight((5, 77)))
    for again in (copy.deepcopy(w), pickle.loads(pickle.dumps(w))):
        assert again.packed.data_ptr() != w.packed.data_ptr()
        assert_same_bits(peftkern.dequantize_nf4(again), peftkern.dequantize_nf4(w))


def test_weight_is_built_inside_torch_compile():
    param = bitsandbytes_param()

    @torch.compile(fullgraph=True, backend="eager")
    def count(x: Tensor) -> Tensor:
        w = NF4Weight.from_bitsandbytes(param)
        return x + w.absmax.sum() + w.numel

    assert count(torch.zeros(())) == param.quant_state.absmax.sum() + 96 * 128


def test_weight_beyond_two_to_the_31_is_measured_in_64_bits():
    shape = (1 << 20, 1 << 20)
    packed = torch.empty(1 << 39, dtype=torch.uint8, device="meta")
    absmax = torch.empty(1 << 34, dtype=torch.float32, device="meta")
    w = NF4Weight(packed, absmax, shape, 64, torch.bfloat16)
    assert w.numel == 1 << 40 and w.nblocks == 1 << 34
    with pytest.raises(ValueError, match="packed"):
        NF4Weight(packed[: 1 << 7], absmax, shape, 64, torch.bfloat16)


def fields_of(w: NF4Weight) -> dict:
    return {name: getattr(w, name) for name in w.__dataclass_fields__}


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("packed", None),
        ("packed", torch.zeros(6143, dtype=torch.uint8)),
        ("packed", torch.zeros(6145, dtype=torch.uint8)),
        ("packed", torch.zeros(6144, dtype=torch.int8)),
        ("packed", torch.zeros(96, 64, dtype=torch.uint8)),
        ("packed", torch.zeros(12288, dtype=torch.uint8)[::2]),
        ("packed", torch.zeros(6144, 2, dtype=torch.uint8)[:, :1]),
        ("packed", torch.zeros(6144, dtype=torch.uint8).to_sparse()),
        ("packed", torch.zeros(6144, dtype=torch.uint8, device="meta")),
        ("absmax", torch.zeros(192)),
        ("absmax", torch.zeros(191, dtype=torch.uint8)),
        ("absmax", torch.zeros(1, dtype=torch.uint8).expand(192)),
        ("absmax", torch.zeros(192, dtype=torch.uint8, device="meta")),
        ("shape", (96, 129)),
        ("shape", (-96, -128)),
        ("shape", (96.0, 128)),
        ("shape", (True, 96 * 128)),
        ("shape", (1 << 62, 1 << 62)),
        ("shape", (1 << 80, 0)),
        pytest.param("shape", (10**5000, 1), id="shape-of-5000-digits"),
        ("shape", 12288),
        ("shape", None),
        ("blocksize", 0),
        ("blocksize", -64),
        ("blocksize", 63),
        ("blocksize", 64.0),
        ("blocksize", True),
        ("blocksize", 1 << 70),
        pytest.param("blocksize", 10**5000, id="blocksize-of-5000-digits"),
        ("blocksize", None),
        ("dtype", torch.float64),
        ("dtype", "float32"),
        ("dtype", None),
        ("nested_absmax", torch.zeros(2)),
        ("nested_absmax", torch.zeros(1, dtype=torch.float64)),
        ("nested_code", None),
        ("nested_code", torch.zeros(255)),
        ("nested_offset", None),
        ("nested_offset", 0.5),
        ("nested_offset", torch.zeros(1)),
        ("nested_offset", torch.zeros((), dtype=torch.bfloat16)),
        ("nested_blocksize", 0),
        ("nested_blocksize", 64),
        ("nested_blocksize", -256),
    ],
)
def test_malformed_field_is_named(field, value):
    fields = fields_of(NF4Weight.from_bitsandbytes(bitsandbytes_param()))
    # A wrong shape shows first in the buffer that does not fit it, a missing device in the others.
    named = {(96, 129): "packed"}.get(value if isinstance(value, tuple) else None, field)
    if field == "packed" and isinstance(value, Tensor) and value.is_meta:
        named = "absmax"
    with pytest.raises(ValueError, match=f"^{named}: expected .*, got "):
        NF4Weight(**(fields | {field: value}))


@pytest.mark.parametrize("field", ["nested_code", "nested_offset", "nested_blocksize"])
def test_nested_field_without_nested_absmax_is_named(field):
    nested = fields_of(NF4Weight.from_bitsandbytes(bitsandbytes_param()))
    plain = fields_of(NF4Weight.from_bitsandbytes(bitsandbytes_param(compress_statistics=False)))
    with pytest.raises(ValueError, match=f"^{field}: expected"):
        NF4Weight(**(plain | {field: nested[field]}))
