"""The torch.library ops: schema and fakes, torch.compile, torch.export, autocast, checkpointing."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import peftkern
from peftkern.backends import ops
from peftkern.formats.nf4 import dynamic_map
from peftkern.functional.arguments import draw_keep
from peftkern.functional.rosa import SparseMask

N, K, R = 24, 70, 4


def stored(double_quant: bool = True) -> tuple:
    w = peftkern.quantize_nf4(torch.randn(N, K), double_quant=double_quant)
    return w.tensors, w.layout


def forward_operands(dtype: torch.dtype = torch.bfloat16, dropout_p: float = 0.25) -> tuple:
    x = torch.randn(2, 3, K, dtype=dtype)
    keep = torch.empty_like(x, dtype=torch.bool).bernoulli_(1 - dropout_p) if dropout_p else None
    return x, torch.randn(R, K), torch.randn(N, R), torch.randn(N, dtype=dtype), keep


def op_cases() -> dict[str, list[tuple]]:
    """Arguments of every op: with and without each optional one."""
    torch.manual_seed(0)
    x, A, B, bias, keep = forward_operands()
    weight = torch.randn(N, K, dtype=x.dtype)
    dy, S = torch.randn(2, 3, N, dtype=x.dtype), torch.randn(2, 3, R)
    every, none = [True] * 4, [False] * 4
    absmax = torch.rand(600)
    code = torch.tensor(dynamic_map())
    return {
        "nf4_quantize": [(torch.randn(N, K, dtype=d), 64) for d in (x.dtype, torch.float32)],
        "nf4_quantize_absmax": [(absmax, absmax.mean(), code, 256)],
        "nf4_dequantize": [(*stored(q), torch.float16) for q in (True, False)],
        "nf4_dequantize_out": [(*stored(q), torch.zeros(N, K)) for q in (True, False)],
        "lora_linear_forward": [
            (x, weight, A, B, bias, 2.0, keep, 0.25),
            (x[0], weight, A, B, None, 2.0, None, 0.0),
        ],
        "lora_linear_backward": [
            (dy, x, S, weight, A, B, 2.0, keep, 0.25, every),
            (dy, None, S, weight, A, B, 2.0, None, 0.0, [True, False, True, False]),
            (dy, x, None, None, A, B, 2.0, None, 0.0, [False, True, False, False]),
            (dy, None, None, None, A, B, 2.0, None, 0.0, none),
        ],
        "nf4_lora_linear_forward": [
            (x, *stored(), A, B, bias, 2.0, keep, 0.25),
            (x, *stored(False), None, None, None, 1.0, None, 0.0),
        ],
        "dora_norm": [(weight, A, B, 2.0), (weight.float(), A, B.bfloat16(), 0.5)],
        "nf4_dora_norm": [
            (*stored(q), dtype, A, B, 2.0)
            for q, dtype in ((True, torch.bfloat16), (False, torch.float32))
        ],
        "low_rank_svd": [
            ([B, B.bfloat16()], [A, A], [2.0, -1.0], True, "accurate"),
            ([B, torch.randn(3, 5)], [A.bfloat16(), torch.randn(5, 2)], [1.0, 1.0], True, "fast"),
            ([B], [A], [1.0], False, "accurate"),
        ],
        "nf4_lora_linear_backward": [
            (dy, x, S, *stored(), A, B, 2.0, keep, 0.25, every),
            (dy, None, None, *stored(False), None, None, 1.0, None, 0.0, [True, *none[1:]]),
        ],
        **adalora_op_cases(),
        **rosa_op_cases(),
    }


def adalora_op_cases() -> dict[str, list[tuple]]:
    """Two layers of different shapes and ranks; one gradient is missing."""
    layers = [[torch.randn(r, 1), torch.randn(r, K), torch.randn(N, r)] for r in (R, 3)]
    params = [p for layer in layers for p in layer]
    numel = sum(p.numel() for p in params)
    grads = [torch.randn_like(p) for p in params]
    lora_E, lora_A, lora_B = (params[i::3] for i in range(3))
    residual, factors = torch.randn(2 * (R * R + 9)), torch.rand(4)
    return {
        "adalora_importance_": [
            (torch.rand(numel), torch.rand(numel), params, g, 0.85, 0.9)
            for g in (grads, [*grads[:-1], None])
        ],
        "adalora_allocate_": [
            (torch.rand(R + 3), [E.clone() for E in lora_E], 5, ties) for ties in (False, True)
        ],
        "adalora_orthogonality_forward": [(lora_A, lora_B, squared) for squared in (False, True)],
        "adalora_orthogonality_backward": [(torch.tensor(0.5), residual, factors, lora_A, lora_B)],
    }


def rosa_op_cases() -> dict[str, list[tuple]]:
    """Indices of both widths; the product with the matrix and with its transpose."""
    x, y, values = torch.randn(2, 3, K), torch.randn(2, 3, N), torch.randn(50)
    flat = torch.randperm(N * K)[:50]
    narrow, wide = (
        SparseMask.from_indices(flat // K, flat % K, (N, K), dtype)
        for dtype in (torch.int32, torch.int64)
    )
    return {
        "rosa_sddmm": [
            (y.to(d), x.to(d), m.crow, m.col)
            for d, m in ((x.dtype, narrow), (torch.bfloat16, wide))
        ],
        "rosa_spmm_": [
            (y.clone(), x, values, narrow.crow, narrow.col, None),
            (x.clone(), y, values, wide.ccol, wide.row, wide.order),
        ],
    }


@pytest.mark.parametrize("op", sorted(ops.SCHEMAS))
def test_opcheck(op: str, backend: str) -> None:
    for args in op_cases()[op]:
        torch.library.opcheck(getattr(ops, op), args)


@pytest.mark.parametrize("op", sorted(ops.SCHEMAS))
def test_op_is_covered(op: str) -> None:
    assert op in op_cases()
    assert getattr(torch.ops.peftkern, op).default is getattr(ops, op)


class Layer(nn.Module):
    """The two linear functions over registered tensors, as a user's module would hold them."""

    def __init__(self, kind: str, dtype: torch.dtype = torch.float32, dropout_p: float = 0.0):
        super().__init__()
        self.kind, self.dropout_p, self.scaling = kind, dropout_p, 2.0
        weight = torch.randn(N, K, dtype=dtype)
        self.lora_A = nn.Parameter(torch.randn(R, K) / K**0.5)
        self.lora_B = nn.Parameter(torch.randn(N, R))
        self.bias = nn.Parameter(torch.randn(N, dtype=dtype))
        self.register_buffer("weight", weight)
        self.w = peftkern.quantize_nf4(weight)

    def forward(self, x: Tensor) -> Tensor:
        options = {"scaling": self.scaling, "bias": self.bias, "dropout_p": self.dropout_p}
        if self.kind == "lora_linear":
            return peftkern.lora_linear(x, self.weight, self.lora_A, self.lora_B, **options)
        return peftkern.nf4_lora_linear(x, self.w, self.lora_A, self.lora_B, **options)


@pytest.fixture(params=["lora_linear", "nf4_lora_linear"])
def kind(request: pytest.FixtureRequest) -> str:
    return request.param


def run(layer, x: Tensor, **context) -> tuple[Tensor, ...]:
    """Output and every gradient, from the same seed."""
    torch.manual_seed(1)
    x = x.clone().requires_grad_()
    for parameter in layer.parameters():
        parameter.grad = None
    y = layer(x)
    y.float().square().sum().backward()
    return (y.detach(), x.grad, *(p.grad for p in layer.parameters()))


def assert_same(got: tuple[Tensor, ...], wanted: tuple[Tensor, ...]) -> None:
    assert len(got) == len(wanted)
    for a, b in zip(got, wanted, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("engine", ["eager", "aot_eager", "inductor"])
def test_compile_fullgraph_training(kind: str, engine: str) -> None:
    layer, x = Layer(kind), torch.randn(5, K)
    wanted = run(layer, x)
    torch._dynamo.reset()
    compiled = torch.compile(layer, fullgraph=True, backend=engine)
    assert_same(run(compiled, x), wanted)
    layer.scaling = 0.5  # a run-time value: changing it must show
    wanted = run(layer, x)
    assert_same(run(compiled, x), wanted)
    with torch.no_grad():
        assert torch.equal(compiled(x), wanted[0])
    wanted = run(layer, x[:3])
    assert_same(run(compiled, x[:3]), wanted)


def test_compile_fullgraph_dropout_and_autocast(kind: str) -> None:
    layer, x = Layer(kind, dropout_p=0.3), torch.randn(5, K)
    torch._dynamo.reset()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    with torch.autocast("cpu", torch.bfloat16):
        wanted = run(layer, x)
        assert_same(run(compiled, x), wanted)


def test_compile_dynamic_batch(kind: str) -> None:
    layer = Layer(kind)
    torch._dynamo.reset()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager", dynamic=True)
    for rows in (2, 7, 12):
        x = torch.randn(rows, K)
        assert_same(run(compiled, x), run(layer, x))


def test_export(kind: str) -> None:
    layer, x = Layer(kind).eval(), torch.randn(4, K)
    batch = torch.export.Dim("batch")
    program = torch.export.export(layer, (x,), dynamic_shapes=({0: batch},))
    names = {str(node.target) for node in program.graph.nodes if node.op == "call_function"}
    assert any(f"peftkern.{kind}_forward" in name for name in names)
    longer = torch.randn(9, K)
    assert torch.equal(program.module()(longer), layer(longer))


def test_compile_scaling_tensor_needs_no_recompile(kind: str) -> None:
    layer, x = Layer(kind), torch.randn(5, K)
    layer.scaling = torch.tensor(2.0)
    torch._dynamo.reset()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    assert_same(run(compiled, x), run(layer, x))
    layer.scaling.fill_(0.25)
    with torch.compiler.set_stance("fail_on_recompile"):
        got = run(compiled, x)
    assert_same(got, run(layer, x))


@pytest.mark.parametrize("x_dtype", [torch.float32, torch.bfloat16])
def test_autocast_equals_arguments_cast_by_hand(kind: str, x_dtype: torch.dtype) -> None:
    layer, x = Layer(kind), torch.randn(5, K, dtype=x_dtype)
    with torch.autocast("cpu", torch.bfloat16):
        got = run(layer, x)
    y, dx, dA, dB, dbias = got
    assert y.dtype is torch.bfloat16 and dx.dtype is x_dtype
    assert dA.dtype is dB.dtype is dbias.dtype is torch.float32  # the parameters' own
    low = [p.detach().bfloat16().requires_grad_() for p in layer.parameters()]
    leaf = x.bfloat16().requires_grad_()
    if kind == "lora_linear":
        weight = layer.weight.bfloat16()
        by_hand = peftkern.lora_linear(leaf, weight, *low[:2], scaling=2.0, bias=low[2])
    else:
        by_hand = peftkern.nf4_lora_linear(leaf, layer.w, *low[:2], scaling=2.0, bias=low[2])
    by_hand.float().square().sum().backward()
    wanted = (by_hand.detach(), leaf.grad, *(p.grad for p in low))
    assert_same(tuple(g.to(w.dtype) for g, w in zip(got, wanted, strict=True)), wanted)


def test_autocast_leaves_the_op_alone(kind: str) -> None:
    """A float64 call stays float64, and torch's ops inside an op are not cast a second time."""
    layer = Layer(kind).double()
    x = torch.randn(5, K, dtype=torch.float64)
    with torch.autocast("cpu", torch.bfloat16):
        inside = run(layer, x)
    assert_same(inside, run(layer, x))


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpoint_replays_dropout(kind: str, reentrant: bool) -> None:
    layer, x = Layer(kind, dropout_p=0.4), torch.randn(5, K)
    wanted = run(layer, x)

    class Checkpointed(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = layer

        def forward(self, x):
            return checkpoint(self.inner, x, use_reentrant=reentrant)

    assert_same(run(Checkpointed(), x), wanted)


@pytest.mark.parametrize("adapter_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("layout", ["contiguous", "transposed", "sliced", "expanded"])
def test_dropout_draws_as_nn_dropout(layout: str, adapter_dtype: torch.dtype) -> None:
    """PEFT drops x cast to the adapter's dtype: same mask, and the generator ends the same."""
    x = {
        "contiguous": torch.ones(6, 4, K),
        "transposed": torch.ones(4, 6, K).transpose(0, 1),
        "sliced": torch.ones(6, 4, 2 * K)[..., ::2],
        "expanded": torch.ones(6, 1, K).expand(6, 4, K),
    }[layout].bfloat16()
    torch.manual_seed(3)
    dropped = F.dropout(x.to(adapter_dtype), 0.3)
    state = torch.get_rng_state()
    torch.manual_seed(3)
    keep = draw_keep(x, 0.3)
    assert torch.equal(keep, dropped != 0)
    assert torch.equal(torch.get_rng_state(), state)
