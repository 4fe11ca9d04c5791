"""PEFT's LoRA over layers of HQQ, torchao and GPT-QModel, with the real libraries where they are.

Their packing is tested without them (`formats/test_int4_layouts.py`).
"""

from __future__ import annotations

import copy

import pytest
import torch
from peft_models import K, N, fallbacks, layer_of, lora_net, make_linear, served_by_us
from torch import Tensor, nn

import peftkern
from peftkern.integrations.peft import other_bases
from peftkern.integrations.peft.repacked import Repacked

pytestmark = pytest.mark.usefixtures("one_thread")


def hqq_linear(dtype: torch.dtype = torch.float32, **config: object) -> nn.Module:
    quantize = pytest.importorskip("hqq.core.quantize")
    settings = {"nbits": 4, "group_size": 32, "axis": 1, **config}
    chosen = quantize.BaseQuantizeConfig(**settings)
    dense = make_linear(dtype)
    return quantize.HQQLinear(dense, chosen, compute_dtype=dtype, device="cpu")


def torchao_linear(kind: str, dtype: torch.dtype = torch.float32) -> nn.Module:
    quantization = pytest.importorskip("torchao.quantization")
    layer = make_linear(dtype)
    if kind == "nvfp4":
        from torchao.prototype.mx_formats.nvfp4_tensor import NVFP4Tensor

        scale = layer.weight.abs().max().float() / (6 * 448)
        weight = NVFP4Tensor.to_nvfp4(layer.weight.detach(), per_tensor_scale=scale)
        layer.weight = nn.Parameter(weight, requires_grad=False)
    else:
        groups = quantization.PerGroup(32)
        bits = getattr(torch, kind)
        config = quantization.IntxWeightOnlyConfig(weight_dtype=bits, granularity=groups)
        quantization.quantize_(layer, config)
    return layer.requires_grad_(False)


def gptqmodel_linear(kind: str) -> nn.Module:
    """A layer as GPT-QModel loads it, of random codes, zero points and scales."""
    pytest.importorskip("gptqmodel", exc_type=ImportError)
    from gptqmodel.nn_modules.qlinear.torch import TorchLinear
    from gptqmodel.nn_modules.qlinear.torch_awq import AwqTorchLinear

    settings = {"bits": 4, "group_size": 32, "sym": False, "desc_act": kind == "act-order"}
    sizes = {"in_features": K, "out_features": N, "register_buffers": True}
    layer = (AwqTorchLinear if kind == "awq" else TorchLinear)(**settings, **sizes)
    generator = torch.Generator().manual_seed(0)
    for name in ("qweight", "qzeros"):
        words = getattr(layer, name)
        words.random_(-(2**31), 2**31 - 1, generator=generator)
    layer.scales.uniform_(1e-3, 2e-2, generator=generator)
    if kind != "awq":
        layer.qzero_format(format=2)  # what loading converts to
    if kind == "act-order":
        layer.g_idx.copy_(torch.randperm(K, generator=generator) // 32)
    # PEFT asks the model for the device of a parameter, and this has buffers alone.
    layer.register_parameter("unused", nn.Parameter(torch.zeros(1), requires_grad=False))
    return layer


MADE = {
    "gptq, float16": lambda: gptqmodel_linear("gptq"),
    "awq, float16": lambda: gptqmodel_linear("awq"),
    "hqq": hqq_linear,
    "hqq, bfloat16": lambda: hqq_linear(torch.bfloat16),
    "nvfp4": lambda: torchao_linear("nvfp4"),
    "nvfp4, bfloat16": lambda: torchao_linear("nvfp4", torch.bfloat16),
    "int4": lambda: torchao_linear("int4"),
}


# Of both sides together, whose sums round at other places: relative norms.
BOUNDS = {torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}


def results(model: nn.Module, dtype: torch.dtype) -> list[Tensor]:
    x = torch.randn(5, K, generator=torch.Generator().manual_seed(0)).to(dtype).requires_grad_()
    loss = model(x).float().square().mean()
    loss.backward()
    with model.disable_adapter():
        frozen = model(x)
    return [loss, x.grad, frozen, *(p.grad for p in model.parameters() if p.requires_grad)]


@pytest.mark.filterwarnings("ignore:TorchaoLoraLinear was instantiated")
@pytest.mark.parametrize("made", MADE)
def test_served_as_peft_computes_it(made):
    dtype = getattr(torch, made.partition(", ")[2] or "float32")
    model = lora_net(MADE[made](), adapter_dtype=dtype)
    twin = copy.deepcopy(model)
    kept = {name: t.clone() for name, t in twin.state_dict().items() if type(t) is Tensor}
    report = peftkern.patch(twin)
    assert report.falling_back == {} and report.patched == ["base_model.model.proj"]
    peftkern.reset_stats()
    ours = results(twin, dtype)
    assert served_by_us() == 2 and fallbacks() == {}
    theirs = results(model, dtype)
    for one, other in zip(ours, theirs, strict=True):
        error = (one - other).float().norm() / other.float().norm()
        assert error <= BOUNDS[dtype]
    assert all(torch.equal(t, kept[n]) for n, t in twin.state_dict().items() if n in kept)
    peftkern.unpatch(twin)
    assert type(layer_of(twin)) is type(layer_of(model))


def test_a_weight_that_is_written_to_is_read_again():
    model = lora_net(hqq_linear())
    peftkern.patch(model)
    x = torch.randn(2, K)
    before = model(x)
    base = layer_of(model).base_layer
    base.meta["scale"].mul_(2)
    assert not torch.equal(model(x), before)
    base.W_q.data = torch.full_like(base.W_q, 0x88)
    twin = copy.deepcopy(model)
    peftkern.unpatch(twin)
    torch.testing.assert_close(model(x), twin(x))


UNSERVED = {
    "act-order": (
        lambda: gptqmodel_linear("act-order"),
        "g_idx: expected rows in the order of their groups",
    ),
    "axis": (lambda: hqq_linear(axis=0), "axis: expected groups along rows, axis 1"),
    "bits": (lambda: hqq_linear(nbits=2), "nbits: expected 4"),
    "int8": (lambda: torchao_linear("int8"), "target_dtype: expected torch.int4"),
}


@pytest.mark.filterwarnings("ignore:TorchaoLoraLinear was instantiated")
@pytest.mark.parametrize("kind", UNSERVED)
def test_what_is_not_read_is_named_and_left_to_peft(kind):
    make, reason = UNSERVED[kind]
    model = lora_net(make())
    twin = copy.deepcopy(model)
    assert peftkern.patch(twin).falling_back == {"base_model.model.proj": reason}
    x = torch.randn(3, K)
    peftkern.reset_stats()
    assert torch.equal(twin(x), model(x))
    assert fallbacks() == {reason: 1}


@pytest.mark.filterwarnings("ignore:TorchaoLoraLinear was instantiated")
def test_a_trial_over_one_format_says_nothing_of_another():
    keys = set()
    for kind in ("nvfp4", "int4"):
        model = lora_net(torchao_linear(kind))
        peftkern.patch(model)
        keys.add(layer_of(model).outlook().key)
    assert len(keys) == 2 and None not in keys


def test_a_layer_without_the_usual_fields_is_left_to_peft():
    base = hqq_linear()
    del base.meta["group_size"]  # which its own forward does not ask for
    model = lora_net(base)
    expected = model(x := torch.randn(2, K))
    reason = "base_layer: expected the fields of HQQLinear"
    assert peftkern.patch(model).falling_back == {"base_model.model.proj": reason}
    assert torch.equal(model(x), expected)


def test_unpatching_drops_the_codes_that_were_packed_anew():
    model = lora_net(hqq_linear())
    peftkern.patch(model)
    base = layer_of(model).base_layer
    assert base in other_bases._records
    peftkern.unpatch(model)
    assert base not in other_bases._records


def codes_of(base: nn.Module) -> Tensor:
    found = getattr(base, "W_q", getattr(base, "qweight", None))
    return base.weight.qdata if found is None else found


@pytest.mark.filterwarnings("ignore:TorchaoLoraLinear was instantiated")
@pytest.mark.parametrize("made", [name for name in MADE if not name.startswith("nvfp4")])
def test_released_codes_are_made_again_wherever_they_are_read(made):
    dtype = getattr(torch, made.partition(", ")[2] or "float32")
    model = lora_net(MADE[made](), adapter_dtype=dtype)
    twin = copy.deepcopy(model)
    bases = [layer_of(net).base_layer for net in (model, twin)]
    before = codes_of(bases[0])
    kept, kind = before.detach().clone(), type(before)
    for net, release in ((model, True), (twin, False)):
        assert peftkern.patch(net, release=release).falling_back == {}
    assert type(codes_of(bases[0])) is Repacked
    peftkern.reset_stats()
    for one, other in zip(results(model, dtype), results(twin, dtype), strict=True):
        assert torch.equal(one, other)
    assert served_by_us() == 4 and fallbacks() == {}
    theirs = [layer_of(net).original.forward(layer_of(net), torch.ones(2, K, dtype=dtype))
              for net in (model, twin)]  # fmt: skip
    assert torch.equal(*theirs)
    for name, value in twin.state_dict().items():
        got = model.state_dict()[name]
        assert type(got) is type(value)
        if isinstance(value, Tensor):
            assert torch.equal(*(getattr(t, "qdata", t) for t in (got, value)))
    x = torch.randn(2, K, dtype=dtype)
    changed = kept.flip(0)
    for base in bases:
        codes_of(base).copy_(changed)
    assert torch.equal(model(x), twin(x))
    assert codes_of(bases[0]).packed is other_bases._records[bases[0]].weight.packed
    with peftkern.patched(model):
        pass
    assert type(codes_of(bases[0])) is Repacked  # as before the block
    peftkern.unpatch(model)
    assert type(codes_of(bases[0])) is kind and torch.equal(codes_of(bases[0]), changed)
    assert not layer_of(model)._state_dict_hooks
