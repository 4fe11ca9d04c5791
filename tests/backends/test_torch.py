"""The back end "torch" beyond what every back end is held to: scratch, and what chunks change."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from linear_cases import BF16, F16, F32, F64, operands
from tolerances import FLOOR_MAX, errors
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import peftkern
from peftkern.backends import device, ops, reference
from peftkern.backends.dropout import philox_keep
from peftkern.backends.torch import chunks, lora_linear, nf4

SHAPE = (64, 80, 88, 4)  # M, N, K, r
SCALING = 1.5
SEED = torch.tensor([2**40 + 3])


class Largest(TorchDispatchMode):
    """The most values of each dtype that an operation has made anew."""

    def __init__(self) -> None:
        super().__init__()
        self.values: dict[torch.dtype, int] = {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(tensor, Tensor):
                before = self.values.get(tensor.dtype, 0)
                self.values[tensor.dtype] = max(before, tensor.numel())
        return result


def keeps(x: Tensor) -> Iterator[tuple[Tensor | None, float]]:
    """Without dropout, with a mask, and with the seed of the same one."""
    yield None, 0.0
    yield philox_keep(SEED, *x.shape, 0.3), 0.3
    yield SEED, 0.3


def run(module, o, keep, p) -> tuple[Tensor, ...]:
    """Both ops of a module's functions, every gradient wanted."""
    weights = (o.weight, o.lora_A, o.lora_B)
    y, S = module.lora_linear_forward(o.x, *weights, o.bias, SCALING, keep, p)
    return y, S, *module.lora_linear_backward(o.dy, o.x, S, *weights, SCALING, keep, p, [True] * 4)


@pytest.fixture(params=["products", "no products"])
def products(request, monkeypatch: pytest.MonkeyPatch) -> None:
    """Torch multiplies 16 bits, or it does not."""
    for dtype in (BF16, F16):
        monkeypatch.setitem(device._PRODUCTS, dtype, request.param == "products")


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks are small beside the tensors, as they are beside those of a model."""
    monkeypatch.setattr(chunks, "_ON_CPU", 1 << 10)


@pytest.mark.parametrize("adapter_dtype", [BF16, F32])
def test_no_float32_copy_of_a_large_tensor(small_chunks, products, adapter_dtype):
    """Of x, y, weight or their gradients; nor indices or masks of that size in wide integers."""
    M, N, K, _ = SHAPE
    o = operands(SHAPE, BF16, adapter_dtype)
    smallest = min(M * N, M * K, N * K)
    for keep, p in keeps(o.x):
        with Largest() as seen:
            run(lora_linear, o, keep, p)
        for dtype in (F32, F64, torch.int64, torch.int32):
            assert seen.values.get(dtype, 0) < smallest, (dtype, keep)
    with Largest() as seen:
        run(reference, o, None, 0.0)
    assert seen.values[F32] >= smallest  # it would have been seen


def test_no_wide_copy_of_a_decoded_weight(small_chunks):
    w = peftkern.quantize_nf4(torch.randn(64, 80))
    with Largest() as seen:
        nf4.nf4_dequantize(w.tensors, w.layout, BF16)
    assert seen.values[BF16] == w.numel
    for dtype in (F32, torch.int64, torch.int32):
        assert seen.values.get(dtype, 0) < w.numel


@pytest.mark.parametrize(("x_dtype", "adapter_dtype"), [(F32, F32), (BF16, F32), (BF16, BF16)])
def test_chunks_change_nothing(monkeypatch, products, x_dtype, adapter_dtype):
    """A mask and its seed give the same bits in any chunks, and all agree with the reference."""
    M, N, K, r = 23, 40, 36, 4
    o = operands((M, N, K, r), x_dtype, adapter_dtype)
    for keep, p in keeps(o.x):
        wanted = run(reference, o, keep, p)
        for size in (1, 5 * K, 1 << 20):
            monkeypatch.setattr(chunks, "_ON_CPU", size)
            got = run(lora_linear, o, keep, p)
            for ours, theirs in zip(got, wanted, strict=True):
                bound = max(FLOOR_MAX[ours.dtype], FLOOR_MAX[adapter_dtype])
                assert errors(ours, theirs)[1] <= 2 * bound  # either side has rounded
            if keep is SEED:
                mask = philox_keep(SEED, M, K, p)
                for ours, theirs in zip(got, run(lora_linear, o, mask, p), strict=True):
                    assert torch.equal(ours, theirs)


@pytest.mark.parametrize("blocksize", [64, 4096])
@pytest.mark.parametrize("double_quant", [False, True])
def test_decoding_over_chunks_and_a_last_part_of_a_block(blocksize, double_quant):
    numel = (1 << 20) + 2 * 4096 + 37
    w = peftkern.quantize_nf4(torch.randn(numel), blocksize=blocksize, double_quant=double_quant)
    for dtype in (F64, F32, F16, BF16):
        got = nf4.nf4_dequantize(w.tensors, w.layout, dtype)
        assert torch.equal(got, reference.nf4_dequantize(w.tensors, w.layout, dtype))


@pytest.mark.parametrize("adapter_dtype", [BF16, F32])
def test_scaling_of_zero_hides_no_nan(products, adapter_dtype):
    o = operands((6, 20, 40, 4), BF16, adapter_dtype)
    o.x[2, 3], o.dy[4, 5] = float("nan"), float("inf")
    results = []
    for name in ("torch", "reference"):
        with peftkern.use_backend(name):
            weights = (o.weight, o.lora_A, o.lora_B)
            y, S = ops.lora_linear_forward(o.x, *weights, None, 0.0, None, 0.0)
            grads = ops.lora_linear_backward(
                o.dy, o.x, S, *weights, 0.0, None, 0.0, [True, True, True, False]
            )
            results.append((y, S, *grads))
    for ours, theirs in zip(*results, strict=True):
        assert torch.equal(ours.isfinite(), theirs.isfinite())
