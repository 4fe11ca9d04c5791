"""Modules that read the weight of a layer in place of calling it: no layer is bypassed unseen."""

from __future__ import annotations

import functools
import warnings

import pytest
import torch
import torch.nn.functional as F
from tolerances import LOGITS
from torch import Tensor, nn

from peftkern.layers import LoRALinear, NF4Linear, NF4LoRALinear, SVDLinear
from peftkern.layers.weight_readers import reader_of
from peftkern.methods import (
    DeltaLoRALinear,
    DoRALinear,
    DyLoRALinear,
    QuantumPEFTLinear,
    RoSALinear,
)

K, HEADS = 64, 4
OVER_BASE = [DeltaLoRALinear, DoRALinear, DyLoRALinear, QuantumPEFTLinear, RoSALinear, SVDLinear]
UPDATED = [LoRALinear, NF4LoRALinear, *OVER_BASE]


def updated(cls: type, linear: nn.Linear) -> nn.Module:
    layer = cls(linear, r=4) if cls in OVER_BASE else cls.from_linear(linear, r=4)
    for parameter in layer.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter, std=0.3)
    return layer


def encoder(cls: type, merge: bool = False) -> nn.TransformerEncoder:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(K, HEADS, 2 * K, dropout=0.0, batch_first=True)
    model = nn.TransformerEncoder(layer, 2)
    for block in model.layers:
        for name in ("linear1", "linear2"):
            new = updated(cls, getattr(block, name))
            setattr(block, name, new.merge() if merge else new)
    return model.eval()


@pytest.mark.parametrize("cls", UPDATED)
@torch.no_grad()
def test_the_update_is_applied_in_torchs_fused_encoder(cls):
    """Of padded batches it makes nested tensors where it may."""
    model, dense = encoder(cls), encoder(cls, merge=True)
    x, padding = torch.randn(3, 7, K), torch.arange(7) >= torch.tensor([[7], [4], [2]])
    torch.testing.assert_close(model(x), dense(x), **LOGITS)
    torch.testing.assert_close(model.layers[0](x), dense.layers[0](x), **LOGITS)
    got, want = (m(x, src_key_padding_mask=padding) for m in (model, dense))
    torch.testing.assert_close(got[~padding], want[~padding], **LOGITS)


@pytest.mark.parametrize("cls", UPDATED)
def test_encoders_train_as_with_merged_layers(cls):
    model, dense = encoder(cls).train(), encoder(cls, merge=True).train()
    x = torch.randn(3, 7, K)
    grads = []
    for m in (model, dense):
        leaf = x.clone().requires_grad_()
        m(leaf).square().sum().backward()
        grads.append(leaf.grad)
    torch.testing.assert_close(*grads, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("cls", [*UPDATED, NF4Linear])
def test_the_projection_that_attention_reads_is_refused(cls):
    attention = nn.MultiheadAttention(K, HEADS)
    with pytest.raises(TypeError, match=r"nn\.MultiheadAttention reads the weight of its out_proj"):
        cls(attention.out_proj) if cls in OVER_BASE else cls.from_linear(attention.out_proj)


@pytest.mark.parametrize("cls", OVER_BASE)
@pytest.mark.parametrize("base", [nn.Linear, NF4Linear])
def test_a_read_of_an_updated_layers_weight_raises(cls, base):
    layer = cls(base(K, K), r=4)
    weight, x = layer.weight, torch.randn(2, 3, K)
    assert weight.shape == (K, K) and weight.dtype is torch.float32 and weight.device == x.device
    assert layer.bias is layer.base.bias
    attention = nn.MultiheadAttention(K, HEADS, batch_first=True)
    attention.out_proj = layer
    reads = (
        lambda: attention(x, x, x),
        lambda: F.linear(x, weight),
        lambda: weight @ x.mT,
        lambda: x @ weight,
    )
    for read in reads:
        with pytest.raises(TypeError, match=f"weight: expected a call of {cls.__name__}, got"):
            read()


def decorated(function):
    @functools.wraps(function)
    def call(*args):
        return function(*args)

    return call


def hidden_by_a_decorator(function):
    return lambda *args: function(*args)


class Readers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        names = ("product", "dtype", "wrapped", "hidden", "inner", "get", "device", "bias", "plain")
        self.parts = nn.ModuleDict({"deep": nn.ModuleDict({"fc": nn.Linear(4, 4)})})
        self.parts["fc"] = nn.Linear(4, 4)
        for name in names:
            setattr(self, name, nn.Linear(4, 4))
        self.plain.weight.data.zero_()

    def forward(self, x: Tensor) -> Tensor:
        return x.to(self.dtype.weight.dtype) @ self.product.weight

    @decorated
    def decorated(self, x: Tensor) -> Tensor:
        return F.linear(x, self.wrapped.weight, self.bias.bias)

    @hidden_by_a_decorator
    def more(self, x: Tensor) -> Tensor:
        return self.plain(x.to(self.device.weight.device)) @ self.hidden.weight

    def nested(self) -> list[Tensor]:
        return [(lambda: self.inner.weight * i)() for i in range(2)]

    @property
    def norm(self) -> Tensor:
        return self.get.weight.norm() + self.parts["deep"].fc.weight.norm()

    def reset_parameters(self) -> None:
        self.plain.weight.data.zero_()


def test_reads_are_found_wherever_a_method_does_them():
    model = nn.Sequential(Readers())
    modules, reads = dict(model.named_modules()), {}
    linear = [name for name, module in modules.items() if isinstance(module, nn.Linear)]
    found = {name: reader_of(name, modules, reads) for name in linear}
    assert {name.removeprefix("0."): reader for name, reader in found.items() if reader} == {
        "product": "Readers.forward",
        "dtype": "Readers.forward",
        "wrapped": "Readers.decorated",
        "hidden": "Readers.more",
        "inner": "Readers.nested",
        "get": "Readers.norm",
        "parts.fc": "Readers.norm",  # any of the name below an index that is not known
        "parts.deep.fc": "Readers.norm",
    }


def test_reads_are_found_without_a_source():
    namespace = {"nn": nn}
    source = "class Unseen(nn.Module):\n    def forward(self, x):\n        return x @ self.a.weight"
    exec(source, namespace)
    model = namespace["Unseen"]()
    model.a = nn.Linear(4, 4)
    assert reader_of("a", dict(model.named_modules()), {}) == "Unseen.forward"


def test_ordinary_models_have_no_readers():
    class Net(nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) + self[0].bias

    model = Net(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4))
    modules = dict(model.named_modules())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert [reader_of(name, modules, {}) for name in ("0", "2")] == [None, None]
