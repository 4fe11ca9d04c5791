"""Gradients of gradients: those of torch, or one clear error; never a missing term."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from grids import thinned
from peft import AdaLoraConfig, LoraConfig, get_peft_model
from peft_models import K, Net, fill_adapters, make_linear, make_linear4bit
from torch import Tensor, nn
from torch.autograd import gradcheck, gradgradcheck

import peftkern
from peftkern.functional.adalora import orthogonality_loss
from peftkern.functional.dora import dora_linear
from peftkern.functional.rosa import SparseMask, rosa_linear
from peftkern.layers import LoRALinear, NF4LoRALinear, SVDLinear
from peftkern.methods import DeltaLoRALinear, DyLoRALinear, QuantumPEFTLinear
from peftkern.methods.quantum_peft import angle_count, orthonormal_columns

WIDE = torch.float64
k, n, r = 8, 6, 2


def leaf(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=WIDE, requires_grad=True)


@pytest.fixture
def operands() -> dict[str, Tensor]:
    torch.manual_seed(0)
    return {"x": leaf(2, 2, k), "A": leaf(r, k), "B": leaf(n, r), "bias": leaf(n), "s": leaf()}


def same_dropout(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def call(*args: Tensor) -> Tensor:
        torch.manual_seed(1)
        return function(*args)

    return call


def weights() -> list:
    torch.manual_seed(4)
    W = torch.randn(n, k)
    return [W.double(), peftkern.quantize_nf4(W)]


@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
def test_lora_linear(operands, dropout_p: float) -> None:
    for W in weights():
        function = peftkern.lora_linear if isinstance(W, Tensor) else peftkern.nf4_lora_linear

        @same_dropout
        def call(x, A, B, bias, s, W=W, function=function):
            return function(x, W, A, B, scaling=s, bias=bias, dropout_p=dropout_p)

        assert gradgradcheck(call, tuple(operands.values()))


def test_nf4_linear(operands) -> None:
    w = weights()[1]
    inputs = operands["x"], operands["bias"]
    assert gradgradcheck(lambda x, bias: peftkern.nf4_linear(x, w, bias), inputs)


@pytest.mark.parametrize(("dropout_p", "recompute"), thinned([0.0, 0.3], [True, False]))
def test_dora_linear(operands, dropout_p: float, recompute: bool) -> None:
    """The norm counts as a constant, so that the factors' own second derivatives are those of the
    same layer written with a constant."""
    options = {"scaling": 1.5, "dropout_p": dropout_p, "recompute": recompute}
    A, B, m = operands["A"].detach(), operands["B"].detach(), leaf(n)
    for W in weights():

        @same_dropout
        def call(x, m, bias, W=W):
            return dora_linear(x, W, A, B, m, bias=bias, **options)

        assert gradgradcheck(call, (operands["x"], m, operands["bias"]))
    W = weights()[0]
    norm = torch.linalg.vector_norm(W + 1.5 * B @ A, dim=1)

    def plain(x: Tensor, A: Tensor, B: Tensor, m: Tensor, bias: Tensor) -> Tensor:
        torch.manual_seed(1)
        d = torch.nn.functional.dropout(x, dropout_p)
        c = m / norm
        return x @ W.T + (c - 1) * (d @ W.T) + c * 1.5 * (d @ A.T @ B.T) + bias

    def ours(x: Tensor, A: Tensor, B: Tensor, m: Tensor, bias: Tensor) -> Tensor:
        torch.manual_seed(1)
        return dora_linear(x, W, A, B, m, bias=bias, **options)

    inputs = (operands["x"], operands["A"], operands["B"], m, operands["bias"])
    torch.testing.assert_close(penalty(ours, inputs), penalty(plain, inputs))


def penalty(function: Callable[..., Tensor], inputs: tuple[Tensor, ...]) -> list[Tensor]:
    """Gradients of the squared size of all gradients, weighted so that no term cancels."""
    grads = torch.autograd.grad(function(*inputs).square().sum(), inputs, create_graph=True)
    total = sum((i + 1) * g.square().sum() for i, g in enumerate(grads))
    return list(torch.autograd.grad(total, inputs))


@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
def test_rosa_linear(operands, dropout_p: float) -> None:
    mask = SparseMask.from_indices(torch.tensor([0, 1, 5]), torch.tensor([3, 7, 0]), (n, k))
    inputs = (*list(operands.values())[:4], leaf(3))
    for W in weights():

        @same_dropout
        def call(x, A, B, bias, values, W=W):
            options = {"scaling": 1.5, "bias": bias, "dropout_p": dropout_p}
            return rosa_linear(x, W, A, B, values, mask, **options)

        assert gradgradcheck(call, inputs)


@pytest.mark.parametrize("squared", [True, False])
def test_orthogonality_loss(operands, squared: bool) -> None:
    inputs = operands["A"], operands["B"]
    assert gradgradcheck(lambda A, B: orthogonality_loss([A], [B], squared=squared), inputs)


@pytest.mark.parametrize("size", [4, 6])
def test_orthonormal_columns(size: int) -> None:
    torch.manual_seed(0)
    angles = leaf(angle_count(size, 1))
    assert gradcheck(lambda a: orthonormal_columns(a, size, 2), (angles,))
    assert gradgradcheck(lambda a: orthonormal_columns(a, size, 2), (angles,))


def test_one_argument_computed_from_another(operands) -> None:
    """As where a network writes the adapter: each gradient is partial, and autograd adds them."""
    W, m = weights()[0], leaf(n)

    def total(x: Tensor, layer: Callable[..., Tensor]) -> Tensor:
        A = x[0, :r] * 0.5
        return layer(x, A, operands["B"], m)

    def ours(x: Tensor, A: Tensor, B: Tensor, m: Tensor) -> Tensor:
        return peftkern.lora_linear(x, W, A, B, scaling=2.0) + dora_linear(
            x, W, A.detach(), B.detach(), m * x.mean(), scaling=2.0
        )

    def plain(x: Tensor, A: Tensor, B: Tensor, m: Tensor) -> Tensor:
        A0, B0 = A.detach(), B.detach()
        c = m * x.mean() / torch.linalg.vector_norm(W + 2.0 * B0 @ A0, dim=1)
        dora = c * (x @ (W + 2.0 * B0 @ A0).T)
        return x @ W.T + 2.0 * (x @ A.T @ B.T) + dora

    got, expected = (
        penalty(lambda x, layer=layer: total(x, layer), (operands["x"],)) for layer in (ours, plain)
    )
    torch.testing.assert_close(got, expected)


def test_a_frozen_lora_A_is_an_error_where_x_matters(operands) -> None:
    """LoRA-FA does not keep x, on which the gradient of lora_B depends."""
    W, A = weights()[0], operands["A"].detach()
    x, B = operands["x"], operands["B"]
    y = peftkern.lora_linear(x, W, A, B, scaling=2.0)
    with pytest.raises(RuntimeError, match="lora_A: expected one that requires a gradient for sec"):
        torch.autograd.grad(y.sum(), x, create_graph=True)
    fixed = x.detach()
    assert gradgradcheck(lambda B: peftkern.lora_linear(fixed, W, A, B, scaling=2.0), (B,))
    m, B0 = leaf(n).detach(), B.detach().requires_grad_()
    y = dora_linear(x, W, A, B0, m, scaling=2.0)
    with pytest.raises(RuntimeError, match="lora_A, magnitude: expected one that requires a grad"):
        torch.autograd.grad(y.sum(), x, create_graph=True)
    y = dora_linear(x, W, A, B0.detach(), m, scaling=2.0, bias=operands["bias"])
    (dx,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
    assert torch.autograd.grad(dx.square().sum(), x)[0].abs().sum() > 0


@pytest.mark.parametrize("trained", range(1, 16))
@pytest.mark.parametrize("name", ["lora_linear", "dora_linear", "rosa_linear"])
def test_whatever_is_trained(operands, name: str, trained: int) -> None:
    """With any of the factors and the bias frozen, in a gradient penalty by what is not."""
    x, A, B, bias, _ = operands.values()
    W, mask = weights()[0], SparseMask.from_indices(torch.tensor([0]), torch.tensor([3]), (n, k))
    leaves = [A, B, bias, leaf(n) if name == "dora_linear" else leaf(1)]
    leaves = [t if trained >> i & 1 else t.detach() for i, t in enumerate(leaves)]
    A, B, bias, last = leaves
    x = x.detach()
    options = {"scaling": 1.5, "bias": bias}
    layer = {
        "lora_linear": lambda: peftkern.lora_linear(x, W, A, B, **options),
        "dora_linear": lambda: dora_linear(x, W, A, B, last, **options),
        "rosa_linear": lambda: rosa_linear(x, W, A, B, last, mask, **options),
    }[name]
    wanted = [t for t in leaves[: 4 if name != "lora_linear" else 3] if t.requires_grad]
    if not wanted:
        return
    if name == "dora_linear" and trained in (2, 6):  # lora_B, but neither lora_A nor magnitude
        with pytest.raises(RuntimeError, match="lora_A, magnitude: expected one that requires"):
            torch.autograd.grad(layer().square().sum(), wanted, create_graph=True)
        return
    grads = torch.autograd.grad(layer().square().sum(), wanted, create_graph=True)
    second = torch.autograd.grad(sum(g.square().sum() for g in grads), wanted)
    assert all(torch.isfinite(g).all() and g.abs().sum() > 0 for g in second)


LAYERS = {
    "LoRALinear": lambda: LoRALinear.from_linear(make_linear(), r=4),
    "NF4LoRALinear": lambda: NF4LoRALinear.from_linear(make_linear(), r=4),
    "SVDLinear": lambda: SVDLinear(make_linear(), r=4),
    "DeltaLoRALinear": lambda: DeltaLoRALinear(make_linear(), r=4),
    "DyLoRALinear": lambda: DyLoRALinear(make_linear(), r=4).eval(),
    "QuantumPEFTLinear": lambda: QuantumPEFTLinear(make_linear(), r=4),
}


def hessian_products(model: nn.Module, x: Tensor) -> list[Tensor]:
    """Hessian-vector products of a loss by the trained parameters, in a fixed direction."""
    trained = [p for p in model.parameters() if p.requires_grad]
    grads = torch.autograd.grad(model(x).square().mean(), trained, create_graph=True)
    generator = torch.Generator().manual_seed(5)
    along = [torch.randn(g.shape, generator=generator) for g in grads]
    return list(torch.autograd.grad(grads, trained, along))


@pytest.mark.parametrize("name", sorted(LAYERS))
def test_layers(name: str) -> None:
    """In float32, against differences of the first gradient."""
    torch.manual_seed(0)
    layer = LAYERS[name]()
    for p in layer.parameters():
        if p.requires_grad:
            nn.init.normal_(p, std=0.3)
    x = torch.randn(6, K)
    got = hessian_products(layer, x)
    trained = [p for p in layer.parameters() if p.requires_grad]
    generator, step = torch.Generator().manual_seed(5), 1e-2
    along = [torch.randn(p.shape, generator=generator) for p in trained]
    sides = []
    for sign in (1, -1):
        with torch.no_grad():
            for p, v in zip(trained, along, strict=True):
                p += sign * step * v
        sides.append(torch.autograd.grad(layer(x).square().mean(), trained))
        with torch.no_grad():
            for p, v in zip(trained, along, strict=True):
                p -= sign * step * v
    for value, up, down in zip(got, *sides, strict=True):
        expected = (up - down) / (2 * step)
        assert (value - expected).norm() < 0.02 * expected.norm()


CONFIGS = {
    "LoRA": lambda: LoraConfig(target_modules=["proj"], r=4),
    "DoRA": lambda: LoraConfig(target_modules=["proj"], r=4, use_dora=True),
    "AdaLoRA": lambda: AdaLoraConfig(target_modules=["proj"], init_r=4, total_step=10),
}


@pytest.mark.usefixtures("small_layers")
@pytest.mark.parametrize("kind", sorted(CONFIGS))
@pytest.mark.parametrize("make", [make_linear, make_linear4bit])
def test_patched_layers(kind: str, make: Callable[[], nn.Module]) -> None:
    """A gradient penalty and Hessian-vector products, as unpatched."""
    net = Net(make())
    net.is_loaded_in_4bit = make is make_linear4bit
    model = get_peft_model(net, CONFIGS[kind]())
    fill_adapters(model)
    for name, p in model.named_parameters():
        if "lora_E" in name:
            nn.init.normal_(p)
    twin = copy.deepcopy(model)
    assert len(peftkern.patch(twin).patched) >= 1
    x0 = torch.randn(6, K, generator=torch.Generator().manual_seed(1))
    results = []
    for m in (model, twin):
        x = x0.clone().requires_grad_()
        (dx,) = torch.autograd.grad(m(x).square().sum(), x, create_graph=True)
        (m(x).square().mean() + dx.square().mean()).backward()
        grads = [p.grad for p in m.parameters()]
        results.append([g for g in grads if g is not None] + hessian_products(m, x0))
    torch.testing.assert_close(*results[::-1], rtol=1e-4, atol=1e-4)


def test_factors_written_to_under_autocast_are_an_error(operands) -> None:
    """Autograd has not saved the originals, so their versions are looked at here."""
    A, B = (operands[name].detach().float().requires_grad_() for name in ("A", "B"))
    with torch.autocast("cpu", torch.bfloat16):
        y = peftkern.lora_linear(operands["x"].float(), weights()[0].float(), A, B, scaling=2.0)
    with torch.no_grad():
        A.mul_(2)
    with pytest.raises(RuntimeError, match=r"^lora_A, lora_B: modified by an inplace"):
        torch.autograd.grad(y.sum(), A, create_graph=True)
