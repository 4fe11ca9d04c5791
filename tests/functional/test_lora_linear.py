"""peftkern.lora_linear against PEFT's formula: values, gradients, layouts, memory, errors."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from linear_cases import (
    BF16,
    DTYPES,
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
from safetensors import safe_open
from tolerances import FUZZ_EXAMPLES, GOLDEN_RTOL, GRADCHECK, assert_as_accurate_as_torch
from torch import Tensor

import peftkern

GOLDEN = FOLDER / "lora_linear.safetensors"


def ours(o: Operands, x: Tensor, A: Tensor, B: Tensor, bias: Tensor | None) -> Tensor:
    return peftkern.lora_linear(
        x, o.weight, A, B, scaling=o.scaling, bias=bias, dropout_p=o.dropout_p
    )


@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
@pytest.mark.parametrize(("dtype", "adapter_dtype"), DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_values_and_gradients(backend, shape, dtype, adapter_dtype, dropout_p):
    options = {"dropout_p": dropout_p, "bias": shape[0] != 5}
    cases = [operands(shape, dtype, adapter_dtype, **options) for _ in range(trials(shape))]
    check_accuracy(cases, ours)


@settings(max_examples=FUZZ_EXAMPLES // 2)
@given(
    shape=st.tuples(*(st.integers(1, n) for n in (40, 70, 150, 20))),
    dtypes=st.sampled_from(DTYPES),
    bias=st.booleans(),
    dropout_p=st.sampled_from([0.0, 0.5]),
    seed=st.integers(0, 2**31),
)
def test_any_shape(shape, dtypes, bias, dropout_p, seed):
    torch.manual_seed(seed)
    options = {"bias": bias, "dropout_p": dropout_p}
    check_accuracy([operands(shape, *dtypes, **options) for _ in range(trials(shape))], ours)


@pytest.mark.parametrize("dropout_p", [0.0, 0.4, 1.0])
def test_gradcheck(dropout_p):
    o = operands((3, 5, 7, 2), F64, F64, dropout_p=dropout_p)
    scaling = torch.tensor(0.7, dtype=F64, requires_grad=True)

    def function(x, A, B, bias, scaling):
        torch.manual_seed(o.seed)
        return ours(replace(o, scaling=scaling), x, A, B, bias)

    inputs = [t.requires_grad_() for t in (o.x, o.lora_A, o.lora_B, o.bias)]
    assert torch.autograd.gradcheck(function, (*inputs, scaling), **GRADCHECK)


@pytest.mark.parametrize("case", range(3))
def test_golden_peft(backend, case):
    with safe_open(GOLDEN, "pt") as file:
        about = json.loads(file.metadata()["cases"])[case]
        saved = {k.removeprefix(f"{case}."): file.get_tensor(k) for k in file.keys()}  # noqa: SIM118
    o = Operands(
        x=saved["x"],
        weight=saved["weight"],
        lora_A=saved["lora_A"],
        lora_B=saved["lora_B"],
        bias=saved.get("bias"),
        scaling=about["lora_alpha"] / about["r"],
        dropout_p=about["dropout_p"],
        dy=saved["dy"],
        seed=1,
    )
    got = with_gradients(o, ours)
    rtol = GOLDEN_RTOL[o.x.dtype]
    for name in ("y", "dx", "dA", "dB"):
        scale = saved[name].abs().max().item()
        torch.testing.assert_close(got[name], saved[name], rtol=rtol, atol=rtol * scale)


@pytest.mark.parametrize("layout", ["transposed", "sliced", "misaligned", "3-d"])
@pytest.mark.parametrize("dtype", [F32, BF16])
def test_layouts_give_the_same(backend, layout, dtype):
    o = operands((6, 20, 40, 4), dtype, F32)
    wanted = with_gradients(o, ours)
    changed = {k: layouts(getattr(o, k))[layout] for k in ("x", "dy")}
    if layout != "3-d":
        changed |= {k: layouts(getattr(o, k))[layout] for k in ("weight", "lora_A", "lora_B")}
    got = with_gradients(replace(o, **changed), ours)
    eager = with_gradients(o, peft_formula)
    oracle = with_gradients(o.to(F64), peft_formula)
    for name in got:
        assert torch.isfinite(got[name]).all()
        same = got[name].reshape(wanted[name].shape)
        assert_as_accurate_as_torch(same, eager[name], oracle[name])


def test_stride_0_activation_and_gradient(backend):
    o = operands((1, 20, 40, 4), BF16, F32)
    dense = replace(o, x=o.x.repeat(5, 1), dy=o.dy.repeat(5, 1))
    expanded = replace(o, x=o.x.expand(5, 40), dy=o.dy.expand(5, 20))
    got, eager = with_gradients(expanded, ours), with_gradients(dense, peft_formula)
    oracle = with_gradients(dense.to(F64), peft_formula)
    for name in got:  # torch's GEMM may sum in another order for another layout
        assert_as_accurate_as_torch(got[name], eager[name], oracle[name])
    leaf = o.x.clone().requires_grad_()  # sum() sends a gradient with all strides 0
    ours(o, leaf, o.lora_A, o.lora_B, o.bias).sum().backward()
    assert torch.isfinite(leaf.grad).all()


def test_inputs_are_not_changed(backend):
    o = operands((6, 20, 40, 4), BF16, F32, dropout_p=0.2)
    before = {k: v.clone() for k, v in vars(o).items() if isinstance(v, Tensor)}
    with_gradients(o, ours)
    for name, value in before.items():
        assert torch.equal(getattr(o, name), value)


@pytest.mark.parametrize("shape", [(0,), (0, 3), (2, 0, 3)], ids=str)
def test_empty_batch(backend, shape):
    o = operands((1, 20, 40, 4), F32, F32)
    o = replace(o, x=torch.zeros(*shape, 40), dy=torch.zeros(*shape, 20))
    got = with_gradients(o, ours)
    assert got["y"].shape == (*shape, 20) and got["dx"].shape == (*shape, 40)
    for name in ("dA", "dB", "dbias"):
        assert (got[name] == 0).all()


def test_vector_input(backend):
    o = operands((1, 20, 40, 4), F32, F32)
    y = ours(o, o.x[0], o.lora_A, o.lora_B, o.bias)
    assert torch.equal(y, ours(o, o.x, o.lora_A, o.lora_B, o.bias)[0])


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("name", ["x", "lora_A", "lora_B", "dy"])
def test_nan_and_inf_propagate(backend, name, value):
    o = operands((4, 20, 40, 4), F32, F32)
    getattr(o, name)[1, 3] = value
    got, wanted = with_gradients(o, ours), with_gradients(o, peft_formula)
    for key in got:
        assert torch.equal(torch.isfinite(got[key]), torch.isfinite(wanted[key]))


@pytest.mark.parametrize("frozen", ["A", "B", "AB", "x", "xA", "xB"])
def test_frozen_parts_get_no_gradient(backend, frozen):
    o = operands((6, 20, 40, 4), BF16, F32, bias=False)
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


def saved_for_backward(function, inputs: list[Tensor]) -> list[Tensor]:
    """What a call saves that is not one of its inputs, plus those inputs whose data it keeps."""
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        function(*inputs)
    return saved


def kept_bytes(saved: list[Tensor], parameters: list[Tensor]) -> int:
    """Bytes kept alive by the graph alone: parameters live anyway."""
    own = {p.untyped_storage().data_ptr() for p in parameters}
    alive = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in saved}
    return sum(nbytes for address, nbytes in alive.items() if address not in own)


@pytest.mark.parametrize("dropout_p", [0.0, 0.5])
def test_saved_bytes(backend, dropout_p):
    M, N, K, r = 32, 24, 64, 4
    o = operands((M, N, K, r), BF16, F32, dropout_p=dropout_p, bias=False)
    parameters = [o.weight, o.lora_A, o.lora_B]
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
        saved = saved_for_backward(lambda *leaves: ours(o, *leaves, None), leaves)
        assert kept_bytes(saved, parameters) == expected, needs


def test_scaling_tensor_equals_number(backend):
    o = operands((6, 20, 40, 4), BF16, F32)
    wanted = with_gradients(o, ours)
    got = with_gradients(replace(o, scaling=torch.tensor(o.scaling)), ours)
    oracle = with_gradients(o.to(F64), peft_formula)
    for name in got:
        assert_as_accurate_as_torch(got[name], wanted[name], oracle[name])


def test_no_grad_mode_keeps_no_graph(backend):
    o = operands((6, 20, 40, 4), F32, F32)
    o.lora_A.requires_grad_()
    with torch.no_grad():
        assert not ours(o, o.x, o.lora_A, o.lora_B, o.bias).requires_grad
    with torch.inference_mode():
        assert ours(o, o.x, o.lora_A, o.lora_B, o.bias).is_inference()


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("x", torch.zeros(2, 41), r"x: expected \[\.\.\., 40\]"),
        ("x", torch.tensor(1.0), r"x: expected \[\.\.\., 40\]"),
        ("x", torch.zeros(2, 40, dtype=torch.int32), "x: expected a tensor of one of"),
        ("x", None, "x: expected a tensor of one of"),
        ("x", torch.zeros(2, 40, device="meta"), "weight: expected .* on meta like x"),
        ("weight", torch.zeros(20, 40, dtype=BF16), "weight: expected .*float32"),
        ("weight", torch.zeros(20, 2, 20), r"weight: expected \[N, K\]"),
        ("weight", torch.zeros(20, 40, requires_grad=True), "weight: expected a frozen tensor"),
        ("lora_A", torch.zeros(4, 39), r"lora_A: expected \[r, 40\] .* got \[4, 39\]"),
        ("lora_A", torch.zeros(40), r"lora_A: expected \[r, 40\]"),
        ("lora_A", torch.zeros(4, 40, dtype=torch.int8), "lora_A: expected a tensor of one of"),
        ("lora_B", torch.zeros(20, 5), r"lora_B: expected \[20, 4\] .* got \[20, 5\]"),
        ("lora_B", torch.zeros(20, 4, device="meta"), "lora_B: expected .* on cpu"),
        ("bias", torch.zeros(21), r"bias: expected \[20\] .* got \[21\]"),
        ("bias", torch.zeros(20, dtype=BF16), "bias: expected .*float32.* got .*bfloat16"),
        ("scaling", torch.zeros(2), "scaling: expected a number or a 0-dim tensor"),
        ("dropout_p", 1.5, r"dropout_p: expected a probability in \[0, 1\], got 1.5"),
        ("dropout_p", -0.1, "dropout_p"),
        ("dropout_p", float("nan"), "dropout_p"),
    ],
)
def test_errors_name_both_sides(name, value, message):
    o = replace(operands((2, 20, 40, 4), F32, F32), **{name: value})
    with pytest.raises(ValueError, match=message):
        ours(o, o.x, o.lora_A, o.lora_B, o.bias)
