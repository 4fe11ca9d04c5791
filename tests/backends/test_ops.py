"""The torch.library ops: schema and fakes, torch.compile, torch.export, autocast, checkpointing."""

from __future__ import annotations

from itertools import product

import pytest
import torch
import torch.nn.functional as F
from linear_cases import KINDS
from op_cases import LAYERS, Checkpointed, K, Layer, op_cases, run
from tolerances import DORA_RMS_RATIO, FLOOR_RMS, errors
from torch import Tensor

import peftkern
from peftkern.backends import ops
from peftkern.functional.arguments import draw_keep


@pytest.mark.parametrize("op", sorted(ops.SCHEMAS))
def test_opcheck(op: str, backend: str) -> None:
    """Schema and fake on either back end; what torch traces is the same on both."""
    tests = ("test_schema", "test_faketensor")
    tests += ("test_autograd_registration", "test_aot_dispatch_dynamic") * (backend == "cpu")
    for args in op_cases()[op]:
        torch.library.opcheck(getattr(ops, op), args, test_utils=tests)


@pytest.mark.parametrize("op", sorted(ops.SCHEMAS))
def test_op_is_covered(op: str) -> None:
    assert op in op_cases()
    assert getattr(torch.ops.peftkern, op).default is getattr(ops, op)


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(params=LAYERS)
def any_kind(request: pytest.FixtureRequest) -> str:
    return request.param


def assert_same(got: tuple[Tensor, ...], wanted: tuple[Tensor, ...], kind: str = "") -> None:
    """Bit for bit, but for DoRA's products with its lengths, which a compiler may fuse."""
    assert len(got) == len(wanted)
    for a, b in zip(got, wanted, strict=True):
        assert a.dtype is b.dtype
        if kind.endswith("dora_linear"):
            assert errors(a, b)[0] <= DORA_RMS_RATIO * FLOOR_RMS[a.dtype]
        else:
            assert torch.equal(a, b)


MORE, LONG = pytest.mark.more, pytest.mark.long  # what another does, too: inductor, a dense base


@pytest.mark.parametrize(
    ("kind", "engine"),
    [
        ("nf4_lora_linear", "inductor"),
        *product(["lora_linear", "dora_linear", "rosa_linear"], ["aot_eager"]),
        pytest.param("nf4_dora_linear", "inductor", marks=MORE),
        pytest.param("nf4_rosa_linear", "aot_eager", marks=MORE),
        *(pytest.param(kind, "eager", marks=LONG) for kind in KINDS),
        *(pytest.param(f"nf4_{name}_linear", "aot_eager", marks=LONG) for name in ("lora", "dora")),
        *(pytest.param(f"{name}_linear", "inductor", marks=LONG) for name in ("lora", "dora")),
    ],
)
def test_compile_fullgraph_training(kind: str, engine: str) -> None:
    layer, x = Layer(kind), torch.randn(5, K)
    torch._dynamo.reset()
    compiled = torch.compile(layer, fullgraph=True, backend=engine)
    assert_same(run(compiled, x), run(layer, x), kind)
    layer.scaling = 0.5  # a run-time value: changing it must show
    wanted = run(layer, x)
    assert_same(run(compiled, x), wanted, kind)
    if kind in KINDS:  # each is a graph more to compile
        with torch.no_grad():
            assert torch.equal(compiled(x), wanted[0])
        assert_same(run(compiled, x[:3]), run(layer, x[:3]))


@pytest.mark.parametrize(
    "kind",
    [
        *("nf4_lora_linear", "dora_linear", "rosa_linear"),
        *(
            pytest.param(k, marks=MORE)
            for k in ("lora_linear", "nf4_dora_linear", "nf4_rosa_linear")
        ),
    ],
)
def test_compile_dropout_autocast_and_a_dynamic_batch(kind: str) -> None:
    layer = Layer(kind, dropout_p=0.3)
    torch._dynamo.reset()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager", dynamic=True)
    for rows in (2, 7, 12):
        x = torch.randn(rows, K)
        with torch.autocast("cpu", torch.bfloat16):
            assert_same(run(compiled, x), run(layer, x), kind)


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
    weight = layer.weight.bfloat16() if kind == "lora_linear" else layer.w
    by_hand = getattr(peftkern, kind)(leaf, weight, *low[:2], scaling=2.0, bias=low[2])
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
def test_checkpoint_replays_dropout(any_kind: str, reentrant: bool) -> None:
    layer, x = Layer(any_kind, dropout_p=0.4), torch.randn(5, K)
    wanted = run(layer, x)

    assert_same(run(Checkpointed(layer, reentrant), x), wanted)


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
