"""A mixture of experts as one function against a loop over tokens and experts."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from call_counts import calls_of
from tolerances import AUTOCAST_RTOL, assert_as_accurate_as_torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import peftkern
from peftkern.backends.cpu.module import cpu_isas, use_isa
from peftkern.functional.lora_experts import ExpertLinear, lora_experts, swiglu
from peftkern.tools.bench.memory import peak_bytes

F64, F32, BF16 = torch.float64, torch.float32, torch.bfloat16
T, K, INNER, E, TOP, R = 13, 64, 32, 6, 3, 4
NAMES = ("hidden", "weights", "A1", "B1", "b1", "A2", "B2", "b2")


def clipped(u: Tensor) -> Tensor:
    """gpt-oss's gate: interleaved, clamped, not zero at zero."""
    gate, up = u[..., ::2].clamp(max=7.0), u[..., 1::2].clamp(-7.0, 7.0)
    return (up + 1) * gate * torch.sigmoid(gate * 1.702)


class Mixture:
    """Operands of one call; id E is another rank's, and expert 0 has no token."""

    def __init__(self, dtype, *, transposed=False, nf4=False, gate=swiglu, bias=True) -> None:
        self.gate, self.transposed = gate, transposed
        up, down = ((K, 2 * INNER), (INNER, K)) if transposed else ((2 * INNER, K), (K, INNER))
        self.dense = [(torch.randn(E, *s) * s[0] ** -0.5).to(dtype) for s in (up, down)]
        self.weights = self.dense
        if nf4:
            self.weights = [peftkern.quantize_nf4(w, double_quant=False) for w in self.dense]
            self.dense = [peftkern.dequantize_nf4(w, dtype) for w in self.weights]
        self.index = torch.stack([torch.randperm(E)[:TOP] + 1 for _ in range(T)])
        shapes = {"A1": (E, R, K), "B1": (2 * INNER, R * E), "A2": (E, R, INNER), "B2": (K, R * E)}
        values = {name: torch.randn(shape) * 0.1 for name, shape in shapes.items()}
        values |= {"hidden": torch.randn(T, K).to(dtype), "weights": torch.rand(T, TOP).to(dtype)}
        if bias:
            values |= {"b1": torch.randn(E, 2 * INNER).to(dtype), "b2": torch.randn(E, K).to(dtype)}
        self.values = {name: values.get(name) for name in NAMES}
        self.dy = torch.randn(T, K).to(dtype)

    def to(self, dtype: torch.dtype) -> Mixture:
        other = object.__new__(Mixture)
        vars(other).update(vars(self))
        other.dense = other.weights = [w.to(dtype) for w in self.dense]
        other.values = {k: v if v is None else v.to(dtype) for k, v in self.values.items()}
        other.dy = self.dy.to(dtype)
        return other

    @staticmethod
    def factor(B: Tensor) -> Tensor:
        return B.view(len(B), R, E).permute(2, 0, 1)

    def ours(self, hidden, weights, A1, B1, b1, A2, B2, b2) -> Tensor:
        up = ExpertLinear(self.weights[0], A1, self.factor(B1), 1.5, b1)
        down = ExpertLinear(self.weights[1], A2, self.factor(B2), 0.5, b2)
        options = {"gate": self.gate, "transposed": self.transposed}
        return lora_experts(hidden, self.index, weights, up, down, **options)

    def looped(self, hidden, weights, A1, B1, b1, A2, B2, b2) -> Tensor:
        """Eager torch: each pair's two layers, then the sum in float32 as transformers does."""
        W1, W2 = (w.mT if self.transposed else w for w in self.dense)
        B1, B2 = self.factor(B1), self.factor(B2)
        wide = F64 if hidden.dtype is F64 else F32

        def linear(x, W, A, B, scaling, bias):
            update = F.linear(F.linear(x.to(A.dtype), A), B) * scaling
            return (F.linear(x, W, bias) + update).to(x.dtype)

        tokens = []
        for t in range(T):
            total = hidden.new_zeros(K, dtype=wide)
            for j, e in enumerate(self.index[t].tolist()):
                if e == E:
                    continue
                bias1, bias2 = (None if b is None else b[e] for b in (b1, b2))
                u = linear(hidden[t : t + 1], W1[e], A1[e], B1[e], 1.5, bias1)
                y = linear(self.gate(u), W2[e], A2[e], B2[e], 0.5, bias2)
                total = total + (y[0] * weights[t, j]).to(wide)
            tokens.append(total.to(hidden.dtype))
        return torch.stack(tokens)

    def with_gradients(self, function) -> dict[str, Tensor]:
        leaves = {
            name: None if value is None else value.detach().requires_grad_()
            for name, value in self.values.items()
        }
        y = function(*leaves.values())
        y.backward(self.dy)
        grads = {f"d{name}": leaf.grad for name, leaf in leaves.items() if leaf is not None}
        return {"y": y.detach(), **grads}


def check(case: Mixture) -> None:
    got, eager = case.with_gradients(case.ours), case.with_gradients(case.looped)
    oracle = case.to(F64)
    for name, value in oracle.with_gradients(oracle.looped).items():
        assert_as_accurate_as_torch(got[name], eager[name], value, case.dy.dtype)


@pytest.mark.parametrize("nf4", [False, True])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("gate", [swiglu, clipped])
@pytest.mark.parametrize("dtype", [F32, BF16])
def test_values_and_gradients(backend, dtype, gate, transposed, nf4):
    check(Mixture(dtype, transposed=transposed, nf4=nf4, gate=gate, bias=gate is clipped))


@pytest.mark.parametrize("name", ["torch", "triton"])
def test_back_ends_without_a_gate_take_its_steps(name):
    with peftkern.use_backend(name):
        check(Mixture(F32))


def test_second_derivatives():
    """Of a function of first ones, as the loop's are."""
    case = Mixture(F64).to(F64)

    def second(function) -> tuple[Tensor, ...]:
        values = [value.detach().requires_grad_() for value in case.values.values()]
        first = torch.autograd.grad(function(*values), values, case.dy, create_graph=True)
        return torch.autograd.grad(sum(grad.square().sum() for grad in first), values)

    for got, right in zip(second(case.ours), second(case.looped), strict=True):
        torch.testing.assert_close(got, right)


def test_only_what_is_trained_gets_a_gradient(backend):
    """Any subset of the operands, as of the two factors alone in the first layer of a model."""
    case = Mixture(F32)
    whole = case.with_gradients(case.ours)
    for trained in ({"A1", "B1"}, {"B2"}, {"hidden"}, {"weights"}, {"A2", "b2"}):
        leaves = {
            name: value.detach().requires_grad_(name in trained)
            for name, value in case.values.items()
        }
        case.ours(*leaves.values()).backward(case.dy)
        for name, leaf in leaves.items():
            assert (leaf.grad is None) == (name not in trained)
            if name in trained:
                torch.testing.assert_close(leaf.grad, whole[f"d{name}"])


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpointed(backend, use_reentrant):
    case = Mixture(BF16)

    def checkpointed(*values):
        return checkpoint(case.ours, *values, use_reentrant=use_reentrant)

    whole, again = case.with_gradients(case.ours), case.with_gradients(checkpointed)
    assert all(torch.equal(again[name], value) for name, value in whole.items())


def test_saved_for_backward():
    """What is kept: x, what the gate reads, S twice; no row of x or of y for each pair."""
    case = Mixture(BF16, bias=False)
    kept: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        kept[tensor.data_ptr()] = tensor
        return tensor

    leaves = [None if v is None else v.requires_grad_() for v in case.values.values()]
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        case.ours(*leaves)
    own = {leaf.data_ptr() for leaf in leaves if leaf is not None}
    own |= {weight.data_ptr() for weight in case.weights}
    made = sum(t.nbytes for at, t in kept.items() if at not in own)
    pairs = T * TOP
    expected = pairs * 2 * INNER * 2 + 2 * pairs * R * 4  # u in bfloat16, S in float32
    assert made <= expected + pairs * (4 + 8 + 4) + 4 * E  # rows, inverse, a weight each; offsets


def test_float32_experts_under_autocast():
    """The dtype of the weights decides, as in transformers' grouped_mm."""
    case = Mixture(F32, bias=False)
    hidden, *rest = case.values.values()
    with torch.autocast("cpu", torch.bfloat16):
        y = case.ours(hidden.bfloat16(), *rest)
    assert y.dtype is BF16
    torch.testing.assert_close(y, case.ours(hidden.bfloat16().float(), *rest).bfloat16())


@pytest.mark.parametrize("nf4", [(True, False), (False, True)])
def test_weights_of_two_kinds_under_autocast(backend, nf4):
    """An NF4 weight is computed with in autocast's dtype, a dense one in its own."""
    case = Mixture(F32, bias=False)
    quantized = [peftkern.quantize_nf4(w, double_quant=False) for w in case.dense]
    case.weights = [
        q if packed else w for q, w, packed in zip(quantized, case.dense, nf4, strict=True)
    ]
    case.dense = [
        peftkern.dequantize_nf4(w, F32) if p else w for w, p in zip(case.weights, nf4, strict=True)
    ]
    oracle = case.with_gradients(case.looped)
    with torch.autocast("cpu", torch.bfloat16):
        got = case.with_gradients(case.ours)
    for name, value in oracle.items():
        assert got[name].dtype is F32
        assert (got[name] - value).norm() <= AUTOCAST_RTOL * value.norm(), name


def test_no_token():
    case = Mixture(F32)
    case.index = case.index[:0]
    hidden, weights, *rest = case.values.values()
    leaf = rest[0].requires_grad_()
    y = case.ours(hidden[:0], weights[:0], *rest)
    y.sum().backward()
    assert y.shape == (0, K) and leaf.grad.eq(0).all()


def test_refuses():
    case = Mixture(F32)
    hidden, weights, *rest = case.values.values()
    for changed, message in (
        ((hidden[0], weights), r"hidden: expected \[T, K\]"),
        ((hidden, weights[:, :1]), r"top_k_weights: expected \[13, top\]"),
        ((hidden[:, 1:], weights), r"x: expected \[T, 64\]"),
    ):
        with pytest.raises(ValueError, match=message):
            case.ours(*changed, *rest)


def test_peak_memory_is_counted():
    """A step holds its gradients, what it returns, u with its gradient and x's rows: the rest goes
    through in pieces, two megabytes at once."""
    rows, width, inner, groups = 512, 512, 1024, 8
    up, down = torch.randn(groups, 2 * inner, width), torch.randn(groups, width, inner)
    shapes = (
        (groups, 16, width),
        (2 * inner, 16, groups),
        (groups, 16, inner),
        (width, 16, groups),
    )
    leaves = [torch.randn(shape, requires_grad=True) for shape in shapes]
    hidden = torch.randn(rows // 2, width, requires_grad=True)
    weights, index = torch.rand(rows // 2, groups).topk(2)

    def step() -> None:
        A1, B1, A2, B2 = leaves
        up_layer = ExpertLinear(up, A1, B1.permute(2, 0, 1))
        down_layer = ExpertLinear(down, A2, B2.permute(2, 0, 1))
        y = lora_experts(hidden, index, weights, up_layer, down_layer)
        torch.autograd.grad(y, [hidden, *leaves], torch.ones_like(y))

    step()  # verdicts and workspaces of the first call are not of a step
    of_rows = rows * (2 * 2 * inner + width) + 2 * hidden.numel()
    counted = 4 * (sum(leaf.numel() for leaf in leaves) + of_rows) + (2 << 20)
    assert peak_bytes(step, hidden.device) <= counted


class Few:
    """One token for three of many experts; PEFT's factors, whose groups are innermost in lora_B."""

    def __init__(self, dtype: torch.dtype, *, nf4: bool = False, tokens: int = 1) -> None:
        groups = 4 * TOP
        self.weights = [torch.randn(groups, 2 * INNER, K), torch.randn(groups, K, INNER)]
        self.weights = [w.to(dtype) for w in self.weights]
        if nf4:
            self.weights = [peftkern.quantize_nf4(w, double_quant=False) for w in self.weights]
        self.index = torch.tensor([[9, 2, 11]] * tokens)
        shapes = ((groups, R, K), (2 * INNER, R, groups), (groups, R, INNER), (K, R, groups))
        self.leaves = [torch.randn(shape).requires_grad_() for shape in shapes]
        self.hidden, self.dy = (torch.randn(tokens, K).to(dtype) for _ in range(2))
        self.leaves.append(self.hidden.requires_grad_())

    def forward(self, contiguous: bool = False) -> Tensor:
        A1, B1, A2, B2, hidden = self.leaves
        B1, B2 = (B.permute(2, 0, 1) for B in (B1, B2))
        if contiguous:
            B1, B2 = B1.contiguous(), B2.contiguous()
        up, down = ExpertLinear(self.weights[0], A1, B1), ExpertLinear(self.weights[1], A2, B2)
        return lora_experts(hidden, self.index, torch.ones(self.index.shape), up, down)

    def step(self, contiguous: bool = False) -> list[Tensor]:
        y = self.forward(contiguous)
        return [y.detach(), *torch.autograd.grad(y, self.leaves, self.dy)]


@pytest.mark.parametrize("nf4", [False, True])
@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize("isa", cpu_isas())
def test_few_experts_of_many(isa, dtype, nf4):
    """Backward reads what forward collected of lora_B, even if hooks saved it elsewhere."""
    case = Few(dtype, nf4=nf4)
    with use_isa(isa):
        right = case.step(contiguous=True)
        with torch.autograd.graph.saved_tensors_hooks(Tensor.clone, lambda tensor: tensor):
            elsewhere = case.step()
        for got in (case.step(), elsewhere):
            assert all(map(torch.equal, got, right))


@pytest.mark.parametrize(("tokens", "calls"), [(1, 2), (2, 4)])
def test_lora_B_is_collected_once_for_few_experts(tokens, calls):
    """More of them are read again: what is saved stays small beside the factors."""
    case = Few(F32, tokens=tokens)
    case.step()
    assert calls_of(case.step).count("grouped_collect") == calls


def test_lora_B_that_changed_before_backward():
    case = Few(F32)
    y = case.forward()
    with torch.no_grad():
        case.leaves[1].mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.backward(case.dy)
