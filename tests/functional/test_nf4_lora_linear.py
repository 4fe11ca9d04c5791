"""peftkern.nf4_lora_linear and nf4_linear against PEFT's formula over the dequantised weight."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import dataclass, replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from linear_cases import (
    BF16,
    DTYPES,
    F16,
    F32,
    F64,
    SHAPES,
    Operands,
    check_accuracy,
    layouts,
    operands,
    peft_formula,
    trials,
    with_gradients,
)
from paths import GOLDEN as FOLDER
from paths import ROOT
from safetensors import safe_open
from tolerances import (
    DETERMINISM_RUNS,
    FUZZ_EXAMPLES,
    GOLDEN_RTOL,
    GRADCHECK,
    assert_as_accurate_as_torch,
)
from torch import Tensor

import peftkern
from peftkern import NF4Weight

PEAK_STEP_KILOBYTES = 33_000  # x, y and their gradients take 8 MB, half of that in bfloat16
GOLDEN = FOLDER / "nf4_lora_linear.safetensors"


@dataclass(frozen=True)
class NF4Operands(Operands):
    w: NF4Weight | None = None


def ours(o: NF4Operands, x: Tensor, A: Tensor, B: Tensor, bias: Tensor | None) -> Tensor:
    return peftkern.nf4_lora_linear(
        x, o.w, A, B, scaling=o.scaling, bias=bias, dropout_p=o.dropout_p
    )


def nf4_operands(
    shape, dtype, adapter_dtype, *, blocksize=64, double_quant=True, **options
) -> NF4Operands:
    """`weight` is the packed weight rounded to the dtype that the kernels compute in."""
    w = peftkern.quantize_nf4(
        torch.randn(shape[1], shape[2]), blocksize=blocksize, double_quant=double_quant
    )
    o = operands(shape, dtype, adapter_dtype, weight=peftkern.dequantize_nf4(w, dtype), **options)
    return NF4Operands(**vars(o), w=w)


def check(shape, *args, **options) -> None:
    check_accuracy([nf4_operands(shape, *args, **options) for _ in range(trials(shape))], ours)


@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
@pytest.mark.parametrize(("dtype", "adapter_dtype"), DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_values_and_gradients(backend, shape, dtype, adapter_dtype, dropout_p):
    check(shape, dtype, adapter_dtype, dropout_p=dropout_p, bias=shape[0] != 5)


@pytest.mark.parametrize("double_quant", [True, False])
@pytest.mark.parametrize("blocksize", [32, 256, 4096])
@pytest.mark.parametrize("dtype", [F32, BF16])
def test_blocksizes(backend, blocksize, double_quant, dtype):
    """Rows that are a part of a block, and blocks that cross rows."""
    for shape in ((3, 37, 129, 4), (40, 70, 256, 4)):
        check(shape, dtype, F32, blocksize=blocksize, double_quant=double_quant)


@settings(max_examples=FUZZ_EXAMPLES // 2)
@given(
    shape=st.tuples(*(st.integers(1, n) for n in (40, 70, 150, 20))),
    dtype=st.sampled_from([F32, BF16, F16]),
    blocksize=st.sampled_from([32, 64, 128]),
    double_quant=st.booleans(),
    bias=st.booleans(),
    dropout_p=st.sampled_from([0.0, 0.5]),
    seed=st.integers(0, 2**31),
)
def test_any_shape(shape, dtype, blocksize, double_quant, bias, dropout_p, seed):
    torch.manual_seed(seed)
    layout = {"blocksize": blocksize, "double_quant": double_quant}
    check(shape, dtype, F32, **layout, bias=bias, dropout_p=dropout_p)


@pytest.mark.parametrize("dtype", [F32, BF16, F16])
@pytest.mark.parametrize("bias", [True, False])
def test_nf4_linear(backend, dtype, bias):
    o = nf4_operands((9, 37, 129, 1), dtype, F32, bias=bias)
    plain = replace(o, lora_B=torch.zeros_like(o.lora_B))

    def linear(o, x, A, B, bias):
        return peftkern.nf4_linear(x, o.w, bias)

    leaf = o.x.clone().requires_grad_()
    leaf_bias = o.bias.clone().requires_grad_() if bias else None
    y = linear(o, leaf, None, None, leaf_bias)
    y.backward(o.dy)
    eager, oracle = with_gradients(plain, peft_formula), with_gradients(plain.to(F64), peft_formula)
    got = {"y": y.detach(), "dx": leaf.grad} | ({"dbias": leaf_bias.grad} if bias else {})
    for name in got:
        assert_as_accurate_as_torch(got[name], eager[name], oracle[name])


@pytest.mark.parametrize("double_quant", [True, False])
@pytest.mark.parametrize("dropout_p", [0.0, 0.4])
def test_gradcheck(double_quant, dropout_p):
    o = nf4_operands((3, 5, 7, 2), F64, F64, double_quant=double_quant, dropout_p=dropout_p)
    scaling = torch.tensor(0.7, dtype=F64, requires_grad=True)

    def function(x, A, B, bias, scaling):
        torch.manual_seed(o.seed)
        return ours(replace(o, scaling=scaling), x, A, B, bias)

    inputs = [t.requires_grad_() for t in (o.x, o.lora_A, o.lora_B, o.bias)]
    assert torch.autograd.gradcheck(function, (*inputs, scaling), **GRADCHECK)
    assert torch.autograd.gradcheck(
        lambda x, bias: peftkern.nf4_linear(x, o.w, bias), (o.x, o.bias), **GRADCHECK
    )


@pytest.mark.parametrize("case", range(3))
def test_golden_peft_over_bitsandbytes(backend, case):
    with safe_open(GOLDEN, "pt") as file:
        about = json.loads(file.metadata()["cases"])[case]
        saved = {k.removeprefix(f"{case}."): file.get_tensor(k) for k in file.keys()}  # noqa: SIM118
        own = {k: file.get_tensor(k) for k in file.keys() if k.startswith(f"{case}.")}  # noqa: SIM118
    w = NF4Weight.from_state_dict(own, f"{case}.")
    o = NF4Operands(
        x=saved["x"],
        weight=peftkern.dequantize_nf4(w, saved["x"].dtype),
        lora_A=saved["lora_A"],
        lora_B=saved["lora_B"],
        bias=saved.get("bias"),
        scaling=about["lora_alpha"] / about["r"],
        dropout_p=about["dropout_p"],
        dy=saved["dy"],
        seed=1,
        w=w,
    )
    got = with_gradients(o, ours)
    rtol = GOLDEN_RTOL[o.x.dtype]
    for name in ("y", "dx", "dA", "dB"):
        scale = saved[name].abs().max().item()
        torch.testing.assert_close(got[name], saved[name], rtol=rtol, atol=rtol * scale)


@pytest.mark.parametrize("layout", ["transposed", "sliced", "misaligned", "3-d"])
@pytest.mark.parametrize("dtype", [F32, BF16])
def test_layouts_give_the_same(backend, layout, dtype):
    o = nf4_operands((6, 20, 40, 4), dtype, F32)
    changed = {k: layouts(getattr(o, k))[layout] for k in ("x", "dy")}
    if layout != "3-d":
        changed |= {k: layouts(getattr(o, k))[layout] for k in ("lora_A", "lora_B")}
    wanted, got = with_gradients(o, ours), with_gradients(replace(o, **changed), ours)
    eager, oracle = with_gradients(o, peft_formula), with_gradients(o.to(F64), peft_formula)
    for name in got:
        same = got[name].reshape(wanted[name].shape)
        if backend == "cpu":
            assert torch.equal(same, wanted[name])
        else:  # torch's GEMM sums in another order for another layout
            assert_as_accurate_as_torch(same, eager[name], oracle[name])


def test_misaligned_weight(backend):
    """Tensors of a mapped file start at any byte."""
    o = nf4_operands((6, 20, 40, 4), BF16, F32)
    packed = torch.cat((o.w.packed.new_zeros(1), o.w.packed))[1:]
    absmax = torch.cat((o.w.absmax.new_zeros(1), o.w.absmax))[1:]
    moved = replace(o, w=replace(o.w, packed=packed, absmax=absmax))
    wanted, got = with_gradients(o, ours), with_gradients(moved, ours)
    for name in got:
        assert torch.equal(got[name], wanted[name])


def test_stride_0_activation_and_gradient(backend):
    o = nf4_operands((1, 20, 40, 4), BF16, F32)
    dense = replace(o, x=o.x.repeat(5, 1), dy=o.dy.repeat(5, 1))
    expanded = replace(o, x=o.x.expand(5, 40), dy=o.dy.expand(5, 20))
    wanted, got = with_gradients(dense, ours), with_gradients(expanded, ours)
    eager, oracle = with_gradients(dense, peft_formula), with_gradients(dense.to(F64), peft_formula)
    for name in got:
        if backend == "cpu":
            assert torch.equal(got[name], wanted[name])
        else:  # torch's GEMM sums in another order for another layout
            assert_as_accurate_as_torch(got[name], eager[name], oracle[name])
    leaf = o.x.clone().requires_grad_()  # sum() sends a gradient with all strides 0
    ours(o, leaf, o.lora_A, o.lora_B, o.bias).sum().backward()
    assert torch.isfinite(leaf.grad).all()


def test_inputs_are_not_changed(backend):
    o = nf4_operands((6, 20, 40, 4), BF16, F32, dropout_p=0.2)
    tensors = {k: v for k, v in (vars(o) | vars(o.w)).items() if isinstance(v, Tensor)}
    before = {k: v.clone() for k, v in tensors.items()}
    with_gradients(o, ours)
    for name, value in before.items():
        assert torch.equal(tensors[name], value)


@pytest.mark.parametrize("shape", [(0,), (0, 3), (2, 0, 3)], ids=str)
def test_empty_batch(backend, shape):
    o = nf4_operands((1, 20, 40, 4), F32, F32)
    o = replace(o, x=torch.zeros(*shape, 40), dy=torch.zeros(*shape, 20))
    got = with_gradients(o, ours)
    assert got["y"].shape == (*shape, 20) and got["dx"].shape == (*shape, 40)
    for name in ("dA", "dB", "dbias"):
        assert (got[name] == 0).all()


def test_empty_weight_goes_to_the_reference():
    w = peftkern.quantize_nf4(torch.zeros(0, 40))
    assert peftkern.nf4_linear(torch.ones(3, 40), w).shape == (3, 0)
    w = peftkern.quantize_nf4(torch.zeros(5, 0), double_quant=False)
    bias = torch.randn(5)
    assert torch.equal(peftkern.nf4_linear(torch.ones(3, 0), w, bias), bias.expand(3, 5))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("name", ["x", "lora_A", "lora_B", "dy", "bias"])
@pytest.mark.parametrize("dtype", [F32, BF16])
def test_nan_and_inf_propagate(backend, name, value, dtype):
    o = nf4_operands((4, 20, 40, 4), dtype, F32)
    getattr(o, name).view(-1)[3] = value
    got, wanted = with_gradients(o, ours), with_gradients(o, peft_formula)
    for key in got:
        assert torch.equal(torch.isfinite(got[key]), torch.isfinite(wanted[key])), key


@pytest.mark.parametrize("frozen", ["A", "B", "AB", "x", "xA", "xB"])
def test_frozen_parts_get_no_gradient(backend, frozen):
    o = nf4_operands((6, 20, 40, 4), BF16, F32, bias=False)
    leaves = {"x": o.x, "A": o.lora_A, "B": o.lora_B}
    for name, leaf in leaves.items():
        leaf.requires_grad_(name not in frozen)
    wanted = with_gradients(o, ours)
    ours(o, *leaves.values(), None).backward(o.dy)
    for name, leaf in leaves.items():
        if name in frozen:
            assert leaf.grad is None
        else:
            assert torch.equal(leaf.grad, wanted[f"d{name}"])


@pytest.mark.parametrize("dropout_p", [0.0, 0.5])
def test_saved_bytes(backend, dropout_p):
    M, N, K, r = 32, 24, 64, 4
    o = nf4_operands((M, N, K, r), BF16, F32, dropout_p=dropout_p, bias=False)
    own = {
        t.untyped_storage().data_ptr()
        for t in (*vars(o.w).values(), o.lora_A, o.lora_B)
        if isinstance(t, Tensor)
    }
    x_bytes, S_bytes, keep_bytes = M * K * 2, M * r * 4, M * K if dropout_p else 0
    cases = {  # what requires a gradient: x, A, B
        (True, True, True): x_bytes + S_bytes + keep_bytes,
        (True, False, True): S_bytes + keep_bytes,
        (False, False, True): S_bytes,
        (False, True, False): x_bytes + keep_bytes,
        (True, False, False): keep_bytes,
    }
    for needs, expected in cases.items():
        leaves = [o.x, o.lora_A, o.lora_B]
        leaves = [t.detach().requires_grad_(n) for t, n in zip(leaves, needs, strict=True)]
        saved = {}

        def pack(t, saved=saved):
            saved[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
            return t

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            ours(o, *leaves, None)
        kept = sum(nbytes for address, nbytes in saved.items() if address not in own)
        assert kept == expected, needs


PEAK_SCRIPT = """
import resource, sys, torch, peftkern
dtype, M, side, blocksize = getattr(torch, sys.argv[1]), 64, 8192, 64
packed = torch.randint(0, 256, (side * side // 2,), dtype=torch.uint8)
absmax = torch.rand(side * side // blocksize)
w = peftkern.NF4Weight(packed, absmax, (side, side), blocksize, torch.bfloat16)
A, B = torch.randn(8, side, requires_grad=True), torch.randn(side, 8, requires_grad=True)

def step(M, w, A, B):
    x = torch.randn(M, w.shape[1], dtype=dtype, requires_grad=True)
    y = peftkern.nf4_lora_linear(x, w, A, B, scaling=1.0, dropout_p=0.1)
    y.backward(torch.ones_like(y))

small = peftkern.quantize_nf4(torch.randn(64, 64))
step(M, small, torch.randn(8, 64, requires_grad=True), torch.randn(64, 8, requires_grad=True))
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
step(M, w, A, B)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_no_dense_copy_of_the_weight(dtype):
    """Peak memory of a step over an 8192 x 8192 weight: 33 MB packed, 134 MB or more dense."""
    command = [sys.executable, "-c", PEAK_SCRIPT, dtype]
    answer = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)
    assert answer.returncode == 0, answer.stderr
    assert int(answer.stdout) < PEAK_STEP_KILOBYTES


@pytest.mark.parametrize("dtype", [F32, BF16])
def test_deterministic(dtype):
    o = nf4_operands((130, 200, 300, 8), dtype, F32)
    first = with_gradients(o, ours)
    for _ in range(DETERMINISM_RUNS - 1):
        again = with_gradients(o, ours)
        assert all(torch.equal(first[name], again[name]) for name in first)


def test_bias_of_another_dtype_is_cast(backend):
    o = nf4_operands((3, 20, 40, 4), BF16, F32)
    bias = torch.randn(20, requires_grad=True)
    y = peftkern.nf4_linear(o.x, o.w, bias)
    assert torch.equal(y, peftkern.nf4_linear(o.x, o.w, bias.detach().bfloat16()))
    y.backward(o.dy)
    assert bias.grad.dtype is F32


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("x", torch.zeros(2, 41), r"x: expected \[\.\.\., 40\]"),
        ("x", torch.zeros(2, 40, dtype=torch.int32), "x: expected a tensor of one of"),
        ("x", torch.zeros(2, 40, device="meta"), "w: expected .* on meta like x"),
        ("lora_A", torch.zeros(4, 39), r"lora_A: expected \[r, 40\] .* got \[4, 39\]"),
        ("lora_A", None, "lora_A, lora_B: expected two tensors"),
        ("lora_B", torch.zeros(20, 5), r"lora_B: expected \[20, 4\] .* got \[20, 5\]"),
        ("bias", torch.zeros(21), r"bias: expected \[20\] .* got \[21\]"),
        ("bias", torch.zeros(20, dtype=torch.int32), "bias: expected .*float32"),
        ("dropout_p", 1.5, r"dropout_p: expected a probability in \[0, 1\], got 1.5"),
    ],
)
def test_errors_name_both_sides(name, value, message):
    o = replace(nf4_operands((2, 20, 40, 4), F32, F32), **{name: value})
    with pytest.raises(ValueError, match=message):
        ours(o, o.x, o.lora_A, o.lora_B, o.bias)


def test_weight_must_be_a_matrix():
    w = peftkern.quantize_nf4(torch.zeros(2, 3, 4))
    with pytest.raises(ValueError, match=r"w: expected shape \(N, K\)"):
        peftkern.nf4_linear(torch.zeros(1, 4), w)
