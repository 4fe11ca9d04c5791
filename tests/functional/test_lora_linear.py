"""The linear functions over dense and NF4 weights against PEFT's formula: values, gradients,
layouts, memory, errors."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from grids import examples, thinned
from hypothesis import given
from hypothesis import strategies as st
from linear_cases import (
    BF16,
    DTYPES,
    F16,
    F32,
    F64,
    KINDS,
    SHAPES,
    NF4Operands,
    Operands,
    check_accuracy,
    layouts,
    nf4_operands,
    operands,
    operands_of,
    ours,
    peft_formula,
    trials,
    with_gradients,
)
from nf4_weights import assert_same_every_time
from paths import GOLDEN
from peak_memory import growth
from safetensors import safe_open
from tolerances import GOLDEN_RTOL, GRADCHECK, assert_as_accurate_as_torch
from torch import Tensor

import peftkern
from peftkern import NF4Weight
from peftkern.backends.programs import PLAIN

PEAK_STEP_BYTES = 33 << 20  # x, y and their gradients take 8 MB, half of that in bfloat16
SMALL = (6, 20, 40, 4)


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    return request.param


def check(kind: str, shape, *dtypes, **options) -> None:
    cases = [operands_of(kind, shape, *dtypes, **options) for _ in range(trials(shape))]
    check_accuracy(cases, ours)


def tensors_of(o: Operands) -> dict[str, Tensor]:
    fields = vars(o) | (vars(o.w) if isinstance(o, NF4Operands) else {})
    return {name: value for name, value in fields.items() if isinstance(value, Tensor)}


# ---- values and gradients


@pytest.mark.parametrize(
    ("shape", "dtypes", "dropout_p"), thinned(SHAPES, DTYPES, [0.0, 0.3], diagonals=2)
)
def test_values_and_gradients(every_backend, kind, shape, dtypes, dropout_p):
    check(kind, shape, *dtypes, dropout_p=dropout_p, bias=shape[0] != 5)


@pytest.mark.parametrize(
    ("blocksize", "double_quant", "dtype"),
    thinned([32, 256, 4096], [True, False], [F32, BF16, F16], diagonals=2),
)
def test_blocksizes(every_backend, blocksize, double_quant, dtype):
    """Rows that are a part of a block, and blocks that cross rows."""
    layout = {"blocksize": blocksize, "double_quant": double_quant}
    for shape in ((3, 37, 129, 4), (40, 70, 256, 4)):
        check("nf4_lora_linear", shape, dtype, F32, **layout, bias=double_quant)


@examples(0.6)
@given(
    kind=st.sampled_from(KINDS),
    shape=st.tuples(*(st.integers(1, n) for n in (40, 70, 150, 20))),
    dtypes=st.sampled_from(DTYPES),
    blocksize=st.sampled_from([32, 64, 128]),
    double_quant=st.booleans(),
    bias=st.booleans(),
    dropout_p=st.sampled_from([0.0, 0.5]),
    seed=st.integers(0, 2**31),
)
def test_any_shape(kind, shape, dtypes, blocksize, double_quant, bias, dropout_p, seed):
    torch.manual_seed(seed)
    options = {"bias": bias, "dropout_p": dropout_p}
    if kind == "nf4_lora_linear":
        options |= {"blocksize": blocksize, "double_quant": double_quant}
    check(kind, shape, *dtypes, **options)


@pytest.mark.parametrize("dtype", [F32, BF16, F16])
@pytest.mark.parametrize("bias", [True, False])
def test_nf4_linear(backend, dtype, bias):
    o = nf4_operands((9, 37, 129, 1), dtype, F32, bias=bias)
    plain = replace(o, lora_B=torch.zeros_like(o.lora_B))
    leaf = o.x.clone().requires_grad_()
    leaf_bias = o.bias.clone().requires_grad_() if bias else None
    y = peftkern.nf4_linear(leaf, o.w, leaf_bias)
    y.backward(o.dy)
    eager, oracle = with_gradients(plain, peft_formula), with_gradients(plain.to(F64), peft_formula)
    got = {"y": y.detach(), "dx": leaf.grad} | ({"dbias": leaf_bias.grad} if bias else {})
    assert_as_accurate_as_torch(got, eager, oracle)


@pytest.mark.parametrize("dropout_p", [0.0, 0.4, 1.0])
def test_gradcheck(kind, dropout_p):
    o = operands_of(kind, (3, 5, 7, 2), F64, F64, dropout_p=dropout_p)
    scaling = torch.tensor(0.7, dtype=F64, requires_grad=True)

    def function(x, A, B, bias, scaling):
        torch.manual_seed(o.seed)
        return ours(replace(o, scaling=scaling), x, A, B, bias)

    inputs = [t.requires_grad_() for t in (o.x, o.lora_A, o.lora_B, o.bias)]
    assert torch.autograd.gradcheck(function, (*inputs, scaling), **GRADCHECK)
    if kind == "nf4_lora_linear":
        assert torch.autograd.gradcheck(
            lambda x, bias: peftkern.nf4_linear(x, o.w, bias), (o.x, o.bias), **GRADCHECK
        )


@pytest.mark.parametrize("case", range(3))
def test_golden_peft(backend, kind, case):
    """For NF4, PEFT over bitsandbytes."""
    with safe_open(GOLDEN / f"{kind}.safetensors", "pt") as file:
        about = json.loads(file.metadata()["cases"])[case]
        saved = {k.removeprefix(f"{case}."): file.get_tensor(k) for k in file.keys()}  # noqa: SIM118
    given = {k: saved.get(k) for k in ("x", "weight", "lora_A", "lora_B", "bias", "dy")}
    given |= {"scaling": about["lora_alpha"] / about["r"], "dropout_p": about["dropout_p"]}
    if kind == "nf4_lora_linear":
        w = NF4Weight.from_state_dict(saved)
        weight = peftkern.dequantize_nf4(w, saved["x"].dtype)
        o = NF4Operands(**{**given, "weight": weight}, seed=1, w=w)
    else:
        o = Operands(**given, seed=1)
    got = with_gradients(o, ours)
    rtol = GOLDEN_RTOL[o.x.dtype]
    for name in ("y", "dx", "dA", "dB"):
        scale = saved[name].abs().max().item()
        torch.testing.assert_close(got[name], saved[name], rtol=rtol, atol=rtol * scale)


def test_scaling_tensor_equals_number(backend, kind):
    o = operands_of(kind, SMALL, BF16, F32)
    wanted = with_gradients(o, ours)
    got = with_gradients(replace(o, scaling=torch.tensor(o.scaling)), ours)
    oracle = with_gradients(o.to(F64), peft_formula)
    assert_as_accurate_as_torch(got, wanted, oracle)


@pytest.mark.parametrize("dtype", [F32, BF16])
def test_deterministic(every_backend, dtype):
    o = nf4_operands((130, 200, 300, 8), dtype, F32)
    assert_same_every_time(lambda: with_gradients(o, ours).values())


# ---- layouts and edges


def assert_same(backend: str, o: Operands, changed: Operands) -> None:
    """Other strides change no bit where the products are ours; torch's GEMM may sum otherwise."""
    wanted, got = with_gradients(o, ours), with_gradients(changed, ours)
    eager, oracle = with_gradients(o, peft_formula), with_gradients(o.to(F64), peft_formula)
    for name in got:
        same = got[name].reshape(wanted[name].shape)
        if backend not in PLAIN and isinstance(o, NF4Operands):
            assert torch.equal(same, wanted[name])
        else:
            assert_as_accurate_as_torch(same, eager[name], oracle[name])


@pytest.mark.parametrize(
    ("layout", "dtype"),
    thinned(["transposed", "sliced", "misaligned", "3-d"], [F32, BF16]),
)
def test_layouts_give_the_same(every_backend, kind, layout, dtype):
    o = operands_of(kind, SMALL, dtype, F32)
    names = ["x", "dy"]
    if layout != "3-d":
        names += ["lora_A", "lora_B", *(["weight"] if kind == "lora_linear" else [])]
    changed = {name: layouts(getattr(o, name))[layout] for name in names}
    assert_same(every_backend, o, replace(o, **changed))


def test_misaligned_weight(backend):
    """Tensors of a mapped file start at any byte."""
    o = nf4_operands(SMALL, BF16, F32)
    packed = torch.cat((o.w.packed.new_zeros(1), o.w.packed))[1:]
    absmax = torch.cat((o.w.absmax.new_zeros(1), o.w.absmax))[1:]
    moved = replace(o, w=replace(o.w, packed=packed, absmax=absmax))
    wanted, got = with_gradients(o, ours), with_gradients(moved, ours)
    for name in got:
        assert torch.equal(got[name], wanted[name])


def test_stride_0_activation_and_gradient(backend, kind):
    o = operands_of(kind, (1, 20, 40, 4), BF16, F32)
    dense = replace(o, x=o.x.repeat(5, 1), dy=o.dy.repeat(5, 1))
    assert_same(backend, dense, replace(o, x=o.x.expand(5, 40), dy=o.dy.expand(5, 20)))
    leaf = o.x.clone().requires_grad_()  # sum() sends a gradient with all strides 0
    ours(o, leaf, o.lora_A, o.lora_B, o.bias).sum().backward()
    assert torch.isfinite(leaf.grad).all()


def test_inputs_are_not_changed(backend, kind):
    o = operands_of(kind, SMALL, BF16, F32, dropout_p=0.2)
    before = {name: value.clone() for name, value in tensors_of(o).items()}
    with_gradients(o, ours)
    for name, value in tensors_of(o).items():
        assert torch.equal(value, before[name])


@pytest.mark.parametrize("shape", [(0,), (0, 3), (2, 0, 3)], ids=str)
def test_empty_batch(backend, kind, shape):
    o = operands_of(kind, (1, 20, 40, 4), F32, F32)
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


def test_vector_input(backend, kind):
    o = operands_of(kind, (1, 20, 40, 4), F32, F32)
    y = ours(o, o.x[0], o.lora_A, o.lora_B, o.bias)
    assert torch.equal(y, ours(o, o.x, o.lora_A, o.lora_B, o.bias)[0])


@pytest.mark.parametrize("name", ["x", "lora_A", "lora_B", "dy", "bias"])
def test_nan_and_inf_propagate(every_backend, kind, name):
    for value in (float("nan"), float("inf")):
        for dtype in (F32, BF16):
            o = operands_of(kind, (4, 20, 40, 4), dtype, F32)
            getattr(o, name).view(-1)[3] = value
            got, wanted = with_gradients(o, ours), with_gradients(o, peft_formula)
            for key in got:
                assert torch.equal(torch.isfinite(got[key]), torch.isfinite(wanted[key])), key


# ---- what autograd keeps, and for whom


@pytest.mark.parametrize("frozen", ["A", "B", "AB", "x", "xA", "xB"])
def test_frozen_parts_get_no_gradient(backend, kind, frozen):
    o = operands_of(kind, SMALL, BF16, F32, bias=False)
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
def test_saved_bytes(backend, kind, dropout_p):
    """Of what the graph alone keeps alive: weights and factors live anyway.

    A quantized weight is kept and not saved: hooks that move what is saved do not move it.
    """
    M, N, K, r = 32, 24, 64, 4
    o = operands_of(kind, (M, N, K, r), BF16, F32, dropout_p=dropout_p, bias=False)
    own = {t.untyped_storage().data_ptr() for k, t in tensors_of(o).items() if k not in ("x", "dy")}
    x_bytes, S_bytes, keep_bytes = M * K * 2, M * r * 4, M * K if dropout_p else 0
    cases = {  # what requires a gradient: x, A, B
        (True, True, True): x_bytes + S_bytes + keep_bytes,
        (True, False, True): S_bytes + keep_bytes,
        (False, False, True): S_bytes,
        (False, True, False): x_bytes + keep_bytes,
        (True, False, False): keep_bytes,
        (False, False, False): 0,
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
        if isinstance(o, NF4Operands):
            assert saved.keys().isdisjoint(t.untyped_storage().data_ptr() for t in o.w.tensors)


def test_no_dense_copy_of_the_weight():
    """Peak memory of a step over an 8192 x 8192 weight: 33 MB packed, 134 MB or more dense."""
    M, side, blocksize = 64, 8192, 64
    packed = torch.randint(0, 256, (side * side // 2,), dtype=torch.uint8)
    absmax = torch.rand(side * side // blocksize)
    large = NF4Weight(packed, absmax, (side, side), blocksize, BF16)
    small = peftkern.quantize_nf4(torch.randn(64, 64))
    A, B = torch.randn(8, side, requires_grad=True), torch.randn(side, 8, requires_grad=True)

    def step(w: NF4Weight, dtype: torch.dtype) -> None:
        x = torch.randn(M, w.shape[1], dtype=dtype, requires_grad=True)
        a, b = A[:, : w.shape[1]].contiguous(), B[: w.shape[0]].contiguous()
        y = peftkern.nf4_lora_linear(x, w, a, b, scaling=1.0, dropout_p=0.1)
        y.backward(torch.ones_like(y))

    for dtype in (BF16, torch.float16, F32):
        step(small, dtype)
        assert growth(lambda dtype=dtype: step(large, dtype)) < PEAK_STEP_BYTES


def test_no_grad_mode_keeps_no_graph(backend, kind):
    o = operands_of(kind, SMALL, F32, F32)
    o.lora_A.requires_grad_()
    with torch.no_grad():
        assert not ours(o, o.x, o.lora_A, o.lora_B, o.bias).requires_grad
    with torch.inference_mode():
        assert ours(o, o.x, o.lora_A, o.lora_B, o.bias).is_inference()


# ---- arguments


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
        ("x", torch.tensor(1.0), r"x: expected \[\.\.\., 40\]"),
        ("x", torch.zeros(2, 40, dtype=torch.int32), "x: expected a tensor of one of"),
        ("x", None, "x: expected a tensor of one of"),
        ("x", torch.zeros(2, 40, device="meta"), "(weight|w): expected .* on meta like x"),
        ("lora_A", torch.zeros(4, 39), r"lora_A: expected \[r, 40\] .* got \[4, 39\]"),
        ("lora_A", torch.zeros(40), r"lora_A: expected \[r, 40\]"),
        ("lora_A", torch.zeros(4, 40, dtype=torch.int8), "lora_A: expected a tensor of one of"),
        ("lora_B", torch.zeros(20, 5), r"lora_B: expected \[20, 4\] .* got \[20, 5\]"),
        ("lora_B", torch.zeros(20, 4, device="meta"), "lora_B: expected .* on cpu"),
        ("bias", torch.zeros(21), r"bias: expected \[20\] .* got \[21\]"),
        ("bias", torch.zeros(20, dtype=torch.int32), "bias: expected .*float32"),
        ("scaling", torch.zeros(2), "scaling: expected a number or a 0-dim tensor"),
        ("dropout_p", 1.5, r"dropout_p: expected a probability in \[0, 1\], got 1.5"),
        ("dropout_p", -0.1, "dropout_p"),
        ("dropout_p", float("nan"), "dropout_p"),
    ],
)
def test_errors_name_both_sides(kind, name, value, message):
    o = replace(operands_of(kind, (2, 20, 40, 4), F32, F32), **{name: value})
    with pytest.raises(ValueError, match=message):
        ours(o, o.x, o.lora_A, o.lora_B, o.bias)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("weight", torch.zeros(20, 40, dtype=BF16), "weight: expected .*float32"),
        ("weight", torch.zeros(20, 2, 20), r"weight: expected \[N, K\]"),
        ("weight", torch.zeros(20, 40, requires_grad=True), "weight: expected a frozen tensor"),
        ("bias", torch.zeros(20, dtype=BF16), "bias: expected .*float32.* got .*bfloat16"),
    ],
)
def test_errors_over_a_dense_weight(name, value, message):
    o = replace(operands((2, 20, 40, 4), F32, F32), **{name: value})
    with pytest.raises(ValueError, match=message):
        ours(o, o.x, o.lora_A, o.lora_B, o.bias)


def test_errors_over_an_nf4_weight():
    o = nf4_operands((2, 20, 40, 4), F32, F32)
    with pytest.raises(ValueError, match="lora_A, lora_B: expected two tensors"):
        ours(o, o.x, None, o.lora_B, o.bias)
    w = peftkern.quantize_nf4(torch.zeros(2, 3, 4))
    with pytest.raises(ValueError, match=r"w: expected shape \(N, K\)"):
        peftkern.nf4_linear(torch.zeros(1, 4), w)
