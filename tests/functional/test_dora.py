"""dora_linear against PEFT's formula in float64 and PEFT's own layer."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from grids import thinned
from linear_cases import BF16, F16, F32, F64
from nf4_weights import assert_same_every_time
from op_cases import K, Layer, run
from peft import LoraConfig
from peft.tuners import lora
from tolerances import (
    DORA_NORM_RTOL,
    DORA_RMS_RATIO,
    FLOOR_RMS,
    GRADCHECK,
    assert_as_accurate_as_torch,
    errors,
)
from torch import Tensor, nn

import peftkern
from peftkern.backends import ops
from peftkern.backends.reference import dora as reference
from peftkern.functional.dora import dora_linear, dora_norm

SHAPES = [(1, 64, 128, 16), (5, 13, 17, 3), (16, 129, 63, 8), (33, 31, 257, 1)]
DTYPES = [(F32, F32), (BF16, F32), (F16, F32), (BF16, BF16)]
NAMES = ("x", "A", "B", "bias", "magnitude")


def leaves_of(shape, dtype=F32, adapter_dtype=F32) -> dict[str, Tensor]:
    """x, A, B, bias and magnitude: lengths near those of the rows, as training leaves them."""
    M, N, K, r = shape
    return {
        "x": torch.randn(M, K).to(dtype),
        "A": (torch.randn(r, K) / K**0.5).to(adapter_dtype),
        "B": (torch.randn(N, r) / r**0.5).to(adapter_dtype),
        "bias": torch.randn(N).to(dtype),
        "magnitude": ((1 + 0.3 * torch.randn(N)) * K**0.5).to(adapter_dtype),
    }


def peft_formula(x, weight, A, B, magnitude, *, scaling, bias=None, dropout_p=0.0, seed=5):
    """PEFT's lora.Linear.forward with DoraLinearVariant, in torch calls; weight is dense.

    All products with the weight are in the dtype of x. PEFT makes an exception of the one after
    dropout, for which it casts the whole weight to the adapter's.
    """
    result = F.linear(x, weight, bias)
    dropped = x.to(A.dtype)
    if dropout_p:
        torch.manual_seed(seed)
        noise = torch.empty(x.shape).bernoulli_(1 - dropout_p)
        dropped = dropped * noise.to(A.dtype).div_(1 - dropout_p)
        base = F.linear(x * noise.to(x.dtype), weight) / (1 - dropout_p)
    else:
        base = result if bias is None else result - bias
    total = weight.to(A.dtype) + scaling * (B @ A).detach()
    c = magnitude / torch.linalg.norm(total, dim=1).detach()
    update = F.linear(F.linear(dropped, A), B) * scaling
    return (result + (c - 1) * base + c * update).to(result.dtype)


def ours(leaves: dict[str, Tensor], weight, **options) -> Tensor:
    x, A, B, bias, magnitude = (leaves[name] for name in NAMES)
    return dora_linear(x, weight, A, B, magnitude, bias=bias, **options)


def with_gradients(function, leaves, weight, dy, *, dropout_p=0.0, **options) -> dict[str, Tensor]:
    leaves = {k: None if v is None else v.detach().requires_grad_() for k, v in leaves.items()}
    torch.manual_seed(5)
    options = {"scaling": 1.5, "bias": leaves["bias"], "dropout_p": dropout_p, **options}
    y = function(leaves["x"], weight, leaves["A"], leaves["B"], leaves["magnitude"], **options)
    y.backward(dy)
    grads = {f"d{k}": leaf.grad for k, leaf in leaves.items() if leaf is not None}
    return {"y": y.detach(), **grads}


def double(leaves: dict[str, Tensor]) -> dict[str, Tensor]:
    return {k: None if v is None else v.double() for k, v in leaves.items()}


def check(shape, dtypes, dropout_p, make_weight, **options) -> None:
    """Every result over enough draws of a shape is as accurate as PEFT's formula."""
    runs = {"got": [], "eager": [], "oracle": []}
    for seed in range(max(1, 16 // min(shape))):
        torch.manual_seed(seed)
        leaves = leaves_of(shape, *dtypes)
        weight, dense = make_weight(shape[1], shape[2], dtypes[0])
        dy = torch.randn(shape[0], shape[1]).to(dtypes[0])
        given = {"dropout_p": dropout_p}
        runs["got"].append(with_gradients(dora_linear, leaves, weight, dy, **given, **options))
        runs["eager"].append(with_gradients(peft_formula, leaves, dense, dy, **given))
        wide = (double(leaves), dense.double(), dy.double())
        runs["oracle"].append(with_gradients(peft_formula, *wide, **given))
    for name in runs["oracle"][0]:
        results = (torch.stack([run[name] for run in runs[kind]]) for kind in runs)
        assert_as_accurate_as_torch(*results)


def dense_weight(N, K, dtype):
    weight = torch.randn(N, K).to(dtype)
    return weight, weight


def nf4_weight(N, K, dtype):
    w = peftkern.quantize_nf4(torch.randn(N, K).to(dtype))
    return w, peftkern.dequantize_nf4(w)


@pytest.mark.parametrize(
    ("shape", "dtypes", "dropout_p", "recompute"),
    thinned(SHAPES, DTYPES, [0.0, 0.3], [True, False], diagonals=2),
)
def test_accuracy_dense(backend, shape, dtypes, dropout_p, recompute):
    check(shape, dtypes, dropout_p, dense_weight, recompute=recompute)


@pytest.mark.parametrize(
    ("shape", "dtypes", "dropout_p", "recompute"),
    thinned([(5, 13, 17, 3), (33, 40, 257, 5)], DTYPES[:2], [0.0, 0.3], [True, False], diagonals=2),
)
def test_accuracy_nf4(every_backend, shape, dtypes, dropout_p, recompute):
    check(shape, dtypes, dropout_p, nf4_weight, recompute=recompute)


@pytest.mark.parametrize("recompute", [True, False])
@pytest.mark.parametrize("dropout_p", [0.0, 0.4])
def test_float64_equals_the_formula_and_its_gradients(dropout_p, recompute):
    """The norm is a constant to every gradient, so that gradcheck has to hold it fixed."""
    shape = (3, 5, 7, 2)
    leaves = leaves_of(shape, F64, F64)
    weight, dy = torch.randn(5, 7, dtype=F64), torch.randn(3, 5, dtype=F64)
    options = {"dropout_p": dropout_p}
    wanted = with_gradients(peft_formula, leaves, weight, dy, **options)
    got = with_gradients(dora_linear, leaves, weight, dy, **options, recompute=recompute)
    torch.testing.assert_close(got, wanted, rtol=1e-12, atol=1e-12)

    def function(x, bias, magnitude):
        torch.manual_seed(1)
        given = {**leaves, "x": x, "bias": bias, "magnitude": magnitude}
        return ours(given, weight, scaling=0.7, recompute=recompute, **options)

    inputs = [leaves[k].requires_grad_() for k in ("x", "bias", "magnitude")]
    assert torch.autograd.gradcheck(function, inputs, **GRADCHECK)


def peft_layer(base: nn.Linear, dropout: float = 0.0) -> lora.Linear:
    config = LoraConfig(r=4, lora_alpha=6, use_dora=True, lora_dropout=dropout)
    layer = lora.Linear(base, "default", config=config, r=4, lora_alpha=6)
    nn.init.normal_(layer.lora_B["default"].weight, std=0.3)
    with torch.no_grad():
        layer.lora_magnitude_vector["default"].weight.mul_(1.2)
    return layer.train()


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("bias", [True, False])
def test_equals_peft_in_float64(dropout, bias):
    """PEFT's own autograd: gradients of both factors and the lengths with the norm detached."""
    layer = peft_layer(
        nn.Linear(24, 20, bias=bias).double().requires_grad_(False), dropout
    ).double()
    A, B = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    magnitude = layer.lora_magnitude_vector["default"].weight
    x, dy = torch.randn(2, 3, 24, dtype=F64), torch.randn(2, 3, 20, dtype=F64)
    results = []
    for ours in (True, False):
        leaf = x.clone().requires_grad_()
        torch.manual_seed(9)
        if ours:
            base = layer.base_layer
            options = {"scaling": 1.5, "bias": base.bias, "dropout_p": dropout}
            y = dora_linear(leaf, base.weight, A, B, magnitude, **options)
        else:
            y = layer(leaf)
        results.append([y, *torch.autograd.grad(y, [leaf, A, B, magnitude], dy)])
    torch.testing.assert_close(*results, rtol=1e-11, atol=1e-11)


# ---- the norm


@pytest.mark.parametrize("dtype", [F32, BF16, F16])
@pytest.mark.parametrize("shape", [(1, 1, 1), (7, 257, 3), (33, 600, 16), (50, 1000, 40)], ids=str)
def test_norm(every_backend, shape, dtype):
    N, K, r = shape
    A, B, W = torch.randn(r, K), torch.randn(N, r), torch.randn(N, K).to(dtype)
    w = peftkern.quantize_nf4(torch.randn(N, K).to(dtype), blocksize=64)
    for weight, dense in ((W, W), (w, peftkern.dequantize_nf4(w)), (W.t().contiguous().t(), W)):
        oracle = torch.linalg.norm(dense.double() + 0.7 * B.double() @ A.double(), dim=1)
        eager = torch.linalg.norm(dense.float() + 0.7 * (B @ A), dim=1)
        got = dora_norm(weight, A, B, scaling=0.7)
        assert_as_accurate_as_torch(got, eager, oracle)
        scaled = dora_norm(weight, A, B, scaling=torch.tensor(0.7))
        torch.testing.assert_close(scaled, got, rtol=DORA_NORM_RTOL, atol=0)


@pytest.mark.parametrize("nf4", [False, True])
@pytest.mark.parametrize("left", [1e-2, 1e-4, 0.0])
def test_norm_of_an_update_that_undoes_the_weight(every_backend, left, nf4):
    """Rows of rank 2 that B A takes away but for a share: |W|^2 + cross + Gram would cancel."""
    N, K = 24, 512
    A, B = torch.randn(2, K), torch.randn(N, 2)
    update = B.double() @ A.double()
    if nf4:  # the rest cannot be small here: what NF4 rounds away stays
        w = peftkern.quantize_nf4((left - update).float())
        weight, dense = w, peftkern.dequantize_nf4(w)
    else:
        weight = dense = ((left - 1) * update).float()
    oracle = torch.linalg.norm(dense.double() + update, dim=1)
    eager = torch.linalg.norm(dense + B @ A, dim=1)
    size = torch.linalg.norm(dense.double(), dim=1)
    got = dora_norm(weight, A, B, scaling=1.0)
    # Relative to what cancels: a row that the update undoes is known to its last bits only.
    assert ((got.double() - oracle).abs() / size).max() <= DORA_NORM_RTOL
    if left == 1e-2:  # what is left is a hundredth, and known nearly as well as torch knows it
        assert_as_accurate_as_torch(got, eager, oracle)


def test_norm_is_the_same_twenty_times(backend):
    A, B, W = torch.randn(8, 300), torch.randn(70, 8), torch.randn(70, 300)
    assert_same_every_time(lambda: [dora_norm(W, A, B, scaling=0.5)])


def test_norm_follows_a_weight_that_changes_behind_its_back(backend):
    """Nothing is cached: PEFT's merge writes through `.data`, which no version counter sees."""
    A, B, weight = torch.randn(4, 30), torch.randn(20, 4), nn.Parameter(torch.randn(20, 30))
    before = dora_norm(weight, A, B, scaling=1.0)
    weight.data *= 2
    got = dora_norm(weight, A, B, scaling=1.0)
    assert not torch.allclose(got, before)
    torch.testing.assert_close(got, torch.linalg.norm(weight.detach() + B @ A, dim=1))


# ---- edges


@pytest.mark.parametrize("recompute", [True, False])
@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
def test_zero_magnitude_has_the_right_gradient(backend, dropout_p, recompute):
    """A length of zero hides its column of the output, not the gradient that would lift it."""
    leaves = leaves_of((6, 20, 40, 4))
    leaves["magnitude"][::3] = 0.0
    weight, dy = torch.randn(20, 40), torch.randn(6, 20)
    given = {"dropout_p": dropout_p}
    got = with_gradients(dora_linear, leaves, weight, dy, **given, recompute=recompute)
    eager = with_gradients(peft_formula, leaves, weight, dy, **given)
    oracle = with_gradients(peft_formula, double(leaves), weight.double(), dy.double(), **given)
    assert (got["dmagnitude"][::3] != 0).all()
    assert_as_accurate_as_torch(got, eager, oracle)


def test_zero_rows_are_nan_as_in_peft(backend):
    leaves = leaves_of((3, 5, 8, 2))
    leaves["B"][1], leaves["magnitude"][1] = 0.0, 0.0
    weight = torch.randn(5, 8)
    weight[1] = 0.0
    dy = torch.randn(3, 5)
    got = with_gradients(dora_linear, leaves, weight, dy)
    wanted = with_gradients(peft_formula, leaves, weight, dy)
    for name in got.keys() - {"dbias"}:  # in PEFT it goes through c as well
        assert torch.equal(got[name].isnan(), wanted[name].isnan()), name
    assert torch.equal(got["dbias"], dy.sum(0))


@pytest.mark.parametrize("K", [1, 16, 17, 300])
@pytest.mark.parametrize("name", ["weight", "A", "B"])
def test_inf_makes_inf_of_norms(every_kernel, name, K):
    """Of columns that fill no vector, too: behind the last one Inf times zero is NaN."""
    tensors = {"weight": torch.randn(21, K), "A": torch.rand(3, K), "B": torch.rand(21, 3)}
    tensors[name][1, 0] = -torch.inf
    got = dora_norm(*tensors.values(), scaling=1.5)
    rows = torch.ones(21, dtype=torch.bool) if name == "A" else torch.arange(21) == 1
    assert torch.equal(got.isposinf(), rows)
    assert torch.equal(got.isfinite(), ~rows)


@pytest.mark.parametrize("recompute", [True, False])
@pytest.mark.parametrize("make_weight", [dense_weight, nf4_weight])
@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
def test_frozen_parts_get_no_gradient(backend, dropout_p, make_weight, recompute):
    leaves = leaves_of((6, 20, 40, 4), BF16)
    weight, _ = make_weight(20, 40, BF16)
    dy = torch.randn(6, 20).to(BF16)
    options = {"dropout_p": dropout_p, "recompute": recompute}
    wanted = with_gradients(dora_linear, leaves, weight, dy, **options)
    several = [("x", "bias"), ("A", "B"), ("A", "B", "x", "bias"), ("magnitude", "B")]
    for frozen in [*((name,) for name in NAMES), *several]:
        given = {k: v.detach().clone() for k, v in leaves.items()}
        for name, leaf in given.items():
            leaf.requires_grad_(name not in frozen)
        torch.manual_seed(5)
        ours(given, weight, scaling=1.5, **options).backward(dy)
        for name, leaf in given.items():
            if leaf.requires_grad:
                assert torch.equal(leaf.grad, wanted[f"d{name}"]), (frozen, name)
            else:
                assert leaf.grad is None


@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
def test_backward_called_under_autocast(backend, dropout_p):
    leaves = leaves_of((6, 20, 40, 4))
    weight, dy = torch.randn(20, 40), torch.randn(6, 20)
    given = {"dropout_p": dropout_p, "recompute": True}
    wanted = with_gradients(dora_linear, leaves, weight, dy, **given)

    def function(*args, **options):
        y = dora_linear(*args, **options)
        backward = y.backward

        def under_autocast(dy):
            with torch.autocast("cpu", BF16):
                backward(dy)

        y.backward = under_autocast
        return y

    got = with_gradients(function, leaves, weight, dy, **given)
    for name in wanted:
        assert torch.equal(got[name], wanted[name])


@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
def test_output_may_be_written_to(backend, dropout_p, with_bias):
    """No gradient leans on the output, which is the caller's, nor on how magnitude's is found."""
    leaves = leaves_of((4, 6, 8, 2))
    weight, options = torch.randn(6, 8), {"scaling": 1.0, "dropout_p": dropout_p}
    grads = []
    for recompute in (True, False):
        for factor in (None, 2.0):
            given = {k: v.clone().requires_grad_() for k, v in leaves.items()}
            bias = given["bias"] if with_bias else None
            torch.manual_seed(5)
            y = ours({**given, "bias": bias}, weight, recompute=recompute, **options)
            (y.sum() if factor is None else y.mul_(factor).sum() / factor).backward()
            grads.append([given[name].grad for name in ("x", "A", "B", "magnitude")])
    for other in grads[1:]:
        torch.testing.assert_close(other, grads[0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("rows", [1, 3, 100])
def test_reference_norm_of_every_block_of_rows(monkeypatch, rows):
    weight, A, B = torch.randn(10, 16), torch.randn(2, 16), torch.randn(10, 2)
    monkeypatch.setattr(reference, "_CHUNK", rows * 16)
    got = reference.dora_norm(weight, A, B, 0.7)
    torch.testing.assert_close(got, (weight + 0.7 * B @ A).norm(dim=1))


@pytest.mark.parametrize("shape", [(0,), (2, 0, 3)], ids=str)
@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
def test_empty_batch(backend, shape, dropout_p):
    leaves = leaves_of((1, 20, 40, 4))
    leaves["x"] = torch.zeros(*shape, 40)
    dy = torch.zeros(*shape, 20)
    got = with_gradients(dora_linear, leaves, torch.randn(20, 40), dy, dropout_p=dropout_p)
    assert got["y"].shape == (*shape, 20)
    for name in ("dA", "dB", "dbias", "dmagnitude"):
        assert (got[name] == 0).all()


def test_vector_input_and_stride_0_gradient(backend):
    leaves = leaves_of((1, 20, 40, 4))
    weight = torch.randn(20, 40)
    whole = with_gradients(dora_linear, leaves, weight, torch.ones(1, 20))
    leaves["x"] = leaves["x"][0]
    got = with_gradients(dora_linear, leaves, weight, torch.ones(()).expand(20))
    for name in got:
        torch.testing.assert_close(got[name].reshape(whole[name].shape), whole[name])


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("x", torch.zeros(2, 41), r"x: expected \[\.\.\., 40\]"),
        ("x", None, "x: expected a tensor of one of"),
        ("weight", torch.zeros(20, 40, dtype=BF16), "weight: expected .*float32"),
        ("weight", torch.zeros(20, 2, 20), r"weight: expected shape \(N, K\)"),
        ("weight", torch.zeros(20, 40, requires_grad=True), "weight: expected a frozen tensor"),
        ("weight", torch.zeros(20, 40, dtype=torch.int8), "weight: expected a tensor of one of"),
        ("A", torch.zeros(4, 39), r"lora_A: expected \[r, 40\] .* got \[4, 39\]"),
        ("B", torch.zeros(20, 5), r"lora_B: expected \[20, 4\] .* got \[20, 5\]"),
        ("magnitude", torch.zeros(21), r"magnitude: expected \[20\] .* got \[21\]"),
        ("magnitude", torch.zeros(20, 1), r"magnitude: expected \[20\]"),
        ("magnitude", None, "magnitude: expected a tensor of one of"),
        ("magnitude", torch.zeros(20, dtype=torch.int8), "magnitude: expected a tensor of one of"),
        ("bias", torch.zeros(21), r"bias: expected \[20\]"),
        ("scaling", torch.zeros(2), "scaling: expected a number or a 0-dim tensor"),
        ("dropout_p", 1.5, r"dropout_p: expected a probability in \[0, 1\], got 1.5"),
    ],
)
def test_errors_name_both_sides(name, value, message):
    given = {**leaves_of((2, 20, 40, 4)), "weight": torch.zeros(20, 40), "scaling": 1.0}
    given = {**given, "dropout_p": 0.0, name: value}
    positional = [given.pop(k) for k in ("x", "weight", "A", "B", "magnitude")]
    with pytest.raises(ValueError, match=message):
        dora_linear(*positional, **given)


# ---- memory


def kept_bytes(function, inputs: list[Tensor], parameters: list[Tensor]) -> int:
    """Bytes that the graph keeps alive besides parameters, which live anyway."""
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        function(*inputs)
    own = {p.untyped_storage().data_ptr() for p in parameters}
    alive = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in saved}
    return sum(nbytes for address, nbytes in alive.items() if address not in own)


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("dtype", [F32, BF16])
def test_saved_bytes_are_named_and_fewer_than_peft_keeps(backend, dtype, dropout):
    M, N, K, r = 32, 48, 64, 4
    layer = peft_layer(nn.Linear(K, N, bias=False).to(dtype).requires_grad_(False), dropout)
    A, B = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    magnitude = layer.lora_magnitude_vector["default"].weight
    weight, parameters = layer.base_layer.weight, list(layer.parameters())
    x = torch.randn(M, K).to(dtype).requires_grad_()

    def ours(recompute):
        options = {"scaling": 1.5, "dropout_p": dropout, "recompute": recompute}
        return lambda x: dora_linear(x, weight, A, B, magnitude, **options)

    peft = kept_bytes(layer, [x], parameters)
    lean = kept_bytes(ours(True), [x], parameters)
    item = dtype.itemsize
    mask, S, norm = M * K if dropout else 0, M * r * 4, N * 4
    assert lean == M * K * item + S + mask + norm
    assert kept_bytes(ours(False), [x], parameters) == lean + M * N * item
    assert lean + M * N * item < peft  # even the faster way keeps less
    assert peft >= lean + 2 * M * N * item


def test_by_default_the_product_is_formed_again_where_that_is_fast():
    from peftkern.functional.dora import _forms_again

    x, large = torch.empty(2, 256, 1024), 1 << 20
    assert _forms_again(x, large) and _forms_again(x.to(BF16).repeat(2, 1, 1), large)
    assert not _forms_again(x, large - 1)
    assert not _forms_again(x.repeat(2, 1, 1), large)
    assert _forms_again(x.to("meta").repeat(9, 1, 1), 1)  # elsewhere memory comes first


# ---- autocast, dropout


@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
@pytest.mark.parametrize("kind", ["dora_linear", "nf4_dora_linear"])
def test_autocast_computes_in_its_dtype(kind, dropout_p):
    layer, x = Layer(kind, dropout_p=dropout_p), torch.randn(5, K)
    with torch.autocast("cpu", BF16):
        y, dx, *grads = run(layer, x)
    assert y.dtype is BF16 and dx.dtype is F32
    assert all(grad.dtype is F32 for grad in grads)
    # By hand: everything but the lengths in bfloat16, the norm of the tensors as they are.
    low = [t.detach().to(BF16).requires_grad_() for t in (x, layer.lora_A, layer.lora_B)]
    weight = layer.w if layer.frozen is layer.w else layer.weight.to(BF16)
    exact = dora_norm(layer.frozen, layer.lora_A, layer.lora_B, scaling=layer.scaling)
    rounded = dora_norm(weight, low[1].detach(), low[2].detach(), scaling=layer.scaling)
    magnitude = (layer.magnitude.detach() * rounded / exact).requires_grad_()
    torch.manual_seed(1)
    options = {"scaling": layer.scaling, "bias": layer.bias.to(BF16), "dropout_p": dropout_p}
    by_hand = dora_linear(low[0], weight, low[1], low[2], magnitude, **options)
    assert errors(y, by_hand)[0] <= DORA_RMS_RATIO * FLOOR_RMS[BF16]


def test_seed_in_place_of_a_mask(monkeypatch):
    """Away from the CPU dropout is a seed: the same formula with the mask that it stands for."""
    from peftkern.backends.dropout import philox_keep
    from peftkern.functional import dora

    leaves = leaves_of((6, 20, 40, 4))
    weight, dy = torch.randn(20, 40), torch.randn(6, 20)
    seed = torch.tensor([1234567])
    results = []
    for keep in (seed, philox_keep(seed, 6, 40, 0.3)):
        monkeypatch.setattr(dora, "draw_keep", lambda x, p, keep=keep: keep)
        results.append(with_gradients(dora_linear, leaves, weight, dy, dropout_p=0.3))
    for name in results[0]:
        torch.testing.assert_close(results[0][name], results[1][name])


def test_ops_are_served_by_the_native_library():
    peftkern.reset_stats()
    w = peftkern.quantize_nf4(torch.randn(8, 64))
    dora_norm(torch.randn(8, 64), torch.randn(2, 64), torch.randn(8, 2), scaling=1.0)
    dora_norm(w, torch.randn(2, 64), torch.randn(8, 2), scaling=1.0)
    calls = peftkern.stats().calls
    assert calls["dora_norm", "cpu"] == calls["nf4_dora_norm", "cpu"] == 1
    wide = ops.dora_norm(torch.randn(8, 64).double(), torch.randn(2, 64), torch.randn(8, 2), 1.0)
    assert wide.dtype is F64
