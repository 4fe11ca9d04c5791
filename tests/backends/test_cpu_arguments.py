"""Arguments that lie: straight into C++, and into the ops past NF4Weight.

Sizes and addresses that do not fit each other are a ValueError, never an access.
"""

from __future__ import annotations

import pytest
import torch
from linear_cases import F16, F32
from torch import Tensor

import peftkern
from peftkern.backends import ops, pointers
from peftkern.backends.cpu import module as native
from peftkern.formats.nf4 import dynamic_map
from peftkern.formats.table import FORMATS

ISA = native.library().isas()[native.cpu_isas()[-1]]
INT64_MAX = 2**63 - 1


@pytest.fixture(autouse=True)
def on_native_kernels():
    with peftkern.use_backend("cpu"):
        yield


M, N, K, R = 3, 10, 70, 4
_W = peftkern.quantize_nf4(torch.randn(N, K))
_PLAIN = peftkern.quantize_nf4(torch.randn(N, K), double_quant=False)
WEIGHT_FIELDS = (
    "format", "numel", "blocksize", "nested", "nested_blocksize", "packed", "packed_bytes",
    "absmax", "absmax_len", "nested_absmax", "nested_absmax_len", "nested_code", "nested_offset",
)  # fmt: skip
_KEEP: list[Tensor] = []  # what the addresses below point to


def address(*shape: int, dtype: torch.dtype = F32) -> int:
    _KEEP.append(torch.zeros(shape, dtype=dtype))
    return _KEEP[-1].data_ptr()


def changed(good: dict, changes: dict) -> tuple:
    """Arguments in the order of `good`, some of them others."""
    assert changes.keys() <= good.keys()
    return tuple((good | changes).values())


def weight_tuple(nested: bool = True, **changes) -> tuple:
    w = _W if nested else _PLAIN
    return changed(
        dict(zip(WEIGHT_FIELDS, pointers.weight(w.tensors, w.layout), strict=True)), changes
    )


SIZES = {"isa": ISA, "threads": 1, "M": M, "N": N, "K": K, "r": R}


def forward_args(**changes) -> tuple:
    good = {
        **SIZES,
        "x": address(M, K),
        "dtype": 0,
        "w": weight_tuple(),
        "a": address(R, K),
        "keep": 0,
        "keep_scale": 1.0,
        "s": address(M, R),
        "scaling": 1.0,
        "b": address(N, R),
        "bias": address(N),
        "y": address(M, N),
        "few_rows": 8,
    }
    return changed(good, changes)


def backward_args(**changes) -> tuple:
    changes = {{"x": "dy", "b": "a", "y": "dx"}.get(k, k): v for k, v in changes.items()}
    good = {
        **SIZES,
        "dy": address(M, N),
        "dtype": 0,
        "w": weight_tuple(),
        "s": address(M, R),
        "a": address(R, K),
        "adapter": (),
        "dx": address(M, K),
        "few_rows": 8,
    }
    return changed(good, changes)


def adapter_fields(**changes) -> tuple:
    good = {
        "dy": address(M, N),
        "dy_dtype": 0,
        "b": address(R, N),
        "scaling": 1.0,
        "ds": address(M, R),
        "x": address(M, K),
        "x_dtype": 0,
        "keep": 0,
        "keep_scale": 1.0,
        "da": address(R, K),
        "s": address(M, R),
        "db": address(N, R),
    }
    return changed(good, changes)


BAD_WEIGHTS = {
    "format unknown": {"format": len(FORMATS)},
    "format negative": {"format": -1},
    "nested_offset null": {"nested_offset": 0},
    "packed short": {"packed_bytes": N * K // 2 - 1},
    "packed negative": {"packed_bytes": -1},
    "packed null": {"packed": 0},
    "absmax short": {"absmax_len": N * K // 64},
    "absmax null": {"absmax": 0},
    "absmax absurd": {"absmax_len": -INT64_MAX},
    "nested_absmax short": {"nested_absmax_len": 0},
    "nested_absmax null": {"nested_absmax": 0},
    "nested_code null": {"nested_code": 0},
    "blocksize zero": {"blocksize": 0},
    "blocksize negative": {"blocksize": -64},
    "blocksize odd": {"blocksize": 48},
    "blocksize small": {"blocksize": 16},
    "blocksize huge": {"blocksize": 2**62},
    "nested_blocksize zero": {"nested_blocksize": 0},
    "nested_blocksize negative": {"nested_blocksize": -256},
    "numel negative": {"numel": -1},
    "numel huge": {"numel": INT64_MAX},
    "numel other": {"numel": N * K - 1},
}


BAD_CALLS = {
    "isa unknown": {"isa": 5},
    "isa negative": {"isa": -1},
    "isa absurd": {"isa": 2**31 - 1},
    "threads zero": {"threads": 0},
    "threads negative": {"threads": -3},
    "M negative": {"M": -1},
    "N negative": {"N": -1},
    "K negative": {"K": -1},
    "r negative": {"r": -1},
    "M overflows": {"M": INT64_MAX},
    "N other": {"N": N + 1},
    "K other": {"K": K + 1},
    "N and K overflow": {"N": 2**32, "K": 2**32},
    "r overflows": {"r": INT64_MAX},
    "x null": {"x": 0},
    "y null": {"y": 0},
    "s null": {"s": 0},
    "b null": {"b": 0},
    "dtype unknown": {"dtype": 9},
    "dtype negative": {"dtype": -1},
    "dtype float16": {"dtype": 2},
    "w short": {"w": weight_tuple()[:12]},
    "w long": {"w": (*weight_tuple(), 0)},
}


@pytest.mark.parametrize("nested", [True, False])
def test_good_arguments_are_taken(nested):
    module = native.library()
    module.nf4_lora_linear_forward(*forward_args(w=weight_tuple(nested)))
    module.nf4_lora_linear_backward(*backward_args(w=weight_tuple(nested)))
    module.nf4_lora_linear_forward(*forward_args(r=0, s=0, b=0, bias=0))
    module.nf4_lora_linear_backward(*backward_args(r=0, s=0, b=0))
    module.nf4_lora_linear_backward(*backward_args(s=0, adapter=adapter_fields()))
    module.nf4_dequantize(ISA, 1, weight_tuple(nested), address(N, K), 0, N * K, False)


def refused(name: str, *args) -> None:
    with pytest.raises(ValueError):
        getattr(native.library(), name)(*args)


@pytest.mark.parametrize("bad", BAD_CALLS)
def test_linear_refuses_bad_arguments(bad):
    refused("nf4_lora_linear_forward", *forward_args(**BAD_CALLS[bad]))
    refused("nf4_lora_linear_backward", *backward_args(**BAD_CALLS[bad]))


@pytest.mark.parametrize("bad", BAD_WEIGHTS)
def test_every_function_refuses_bad_weights(bad):
    w = weight_tuple(**BAD_WEIGHTS[bad])
    refused("nf4_lora_linear_forward", *forward_args(w=w))
    refused("nf4_lora_linear_backward", *backward_args(w=w))
    refused("nf4_dequantize", ISA, 1, w, address(N, K), 0, N * K, False)


def check_refusals(name: str, good: dict, bad: dict[str, list]) -> None:
    """Good arguments are taken, and with any of the bad values in its place they are refused."""
    getattr(native.library(), name)(*good.values())
    for argument, values in bad.items():
        for value in values:
            refused(name, *changed(good, {argument: value}))


def test_quantize_refuses():
    good = {
        "isa": ISA,
        "threads": 1,
        "src": address(700),
        "src_dtype": 0,
        "numel": 700,
        "blocksize": 64,
        "packed": address(350, dtype=torch.uint8),
        "packed_bytes": 350,
        "absmax": address(11),
        "absmax_len": 11,
    }
    bad = {
        "isa": [5],
        "threads": [0],
        "src": [0],
        "src_dtype": [5],
        "numel": [-1, 2**62, 702],
        "blocksize": [0, 63],
        "packed": [0],
        "packed_bytes": [349],
        "absmax": [0],
        "absmax_len": [10, -1],
    }
    check_refusals("nf4_quantize", good, bad)


def test_quantize_absmax_refuses():
    _KEEP.append(torch.tensor(dynamic_map()))
    good = {
        "threads": 1,
        "absmax": address(600),
        "n": 600,
        "offset": 0.0,
        "code": _KEEP[-2].data_ptr(),
        "nested_blocksize": 256,
        "out_q": address(600, dtype=torch.uint8),
        "nested_absmax": address(3),
        "nested_len": 3,
    }
    bad = {
        "threads": [0],
        "absmax": [0],
        "n": [-1, 2**62],
        "code": [0],
        "nested_blocksize": [0, -256],
        "out_q": [0],
        "nested_absmax": [0],
        "nested_len": [2, -1],
    }
    check_refusals("nf4_quantize_absmax", good, bad)


BAD_SIZES = {"isa": [5], "threads": [0], "M": [-1], "K": [-1], "r": [-1, INT64_MAX]}


@pytest.mark.parametrize(
    ("product", "order"),
    [
        ("lora_shrink", "activation dtype factor keep scale s"),
        ("lora_expand", "s factor keep scale activation dtype"),
    ],
)
def test_lora_products_refuse(product, order):
    operands = {
        "activation": address(M, K),
        "dtype": 0,
        "factor": address(R, K),
        "keep": 0,
        "scale": 1.0,
        "s": address(M, R),
    }
    sizes = {name: SIZES[name] for name in ("isa", "threads", "M", "K", "r")}
    good = {**sizes, **{name: operands[name] for name in order.split()}}
    bad = {"M": [-1, INT64_MAX], "activation": [0], "dtype": [7], "factor": [0], "s": [0]}
    check_refusals(product, good, {**BAD_SIZES, **bad})


@pytest.mark.parametrize(
    "changes",
    [{"dy": 0}, {"dy_dtype": 7}, {"b": 0}, {"ds": 0}, {"x": 0}, {"x_dtype": -1}, {"s": 0}],
    ids=str,
)
def test_backward_refuses_bad_adapters(changes):
    fields = adapter_fields(**changes)
    refused("lora_backward", ISA, 1, M, N, K, R, fields)
    refused("nf4_lora_linear_backward", *backward_args(adapter=fields))


def test_backward_refuses_bad_sizes():
    good = {**SIZES, "adapter": adapter_fields()}
    bad = {**BAD_SIZES, "N": [-1], "adapter": [(), (0,) * 13]}
    check_refusals("lora_backward", good, bad)


@pytest.mark.parametrize(
    ("index", "value", "message"),
    [
        (0, torch.zeros(N * K // 2 - 1, dtype=torch.uint8), "packed: expected 350 contiguous"),
        (0, torch.zeros(N * K // 2), "packed: .*uint8"),
        (0, torch.zeros(N * K, dtype=torch.uint8)[::2], "packed: .*strides"),
        (1, torch.zeros(11), "absmax: .*uint8"),
        (1, torch.zeros(10, dtype=torch.uint8), "absmax: expected 11 contiguous"),
        (2, torch.zeros(0), "nested_absmax: expected 1 contiguous"),
        (3, torch.zeros(16), "nested_code: expected 256 contiguous"),
        (4, torch.zeros(2), "nested_offset: expected 1 contiguous"),
        (4, torch.zeros((), dtype=F16), "nested_offset: .*float32"),
        (1, 0, "blocksize: expected one of"),
        (1, 128, "absmax: expected 6 contiguous"),
        (2, 48, "nested_blocksize: expected one of"),
        (2, 0, "w: expected 2 tensors, got 5"),
        (0, 5, "layout: expected a format"),
    ],
)
def test_ops_refuse_malformed_pieces(index, value, message):
    """Whoever calls the ops without NF4Weight meets the checks of pointers.py."""
    w, layout = list(_W.tensors), list(_W.layout)
    if isinstance(value, int):
        layout[index] = value
    else:
        w[index] = value
    with pytest.raises(ValueError, match=message):
        ops.nf4_dequantize(w, layout, F32)
    with pytest.raises(ValueError, match=message):
        ops.nf4_lora_linear_forward(torch.zeros(M, K), w, layout, *[None] * 3, 1.0, None, 0.0)


@pytest.mark.parametrize("blocksize", [0, -64, 48, 8192])
def test_quantize_ops_refuse_blocksizes(blocksize):
    with pytest.raises(ValueError, match="blocksize: expected one of"):
        ops.nf4_quantize(torch.zeros(64), blocksize)
    code = torch.tensor(dynamic_map())
    with pytest.raises(ValueError, match="blocksize: expected one of"):
        ops.nf4_quantize_absmax(torch.zeros(64), torch.zeros(()), code, blocksize)


def test_backward_refuses_factors_of_another_width():
    """Their mask would be of another size than the weight's: at rank 0 nothing else says so."""
    x, w = torch.ones(M, N), (_W.tensors, _W.layout)
    factors = (torch.zeros(0, 1), torch.zeros(N, 0))
    options = (1.0, torch.ones(M, 1, dtype=torch.bool), 0.5, [True, False, False, False])
    with pytest.raises(ValueError, match=r"lora_A: expected \[r, 70\]"):
        ops.nf4_lora_linear_backward(x, None, None, *w, *factors, *options)
