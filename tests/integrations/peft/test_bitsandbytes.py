"""The states of a bitsandbytes 4-bit weight: which are read in place, which are left to it."""

from __future__ import annotations

import copy
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import bitsandbytes as bnb
import pytest
import torch
from adalora_models import quantize_4bit_
from peft_models import (
    K,
    N,
    add_lora,
    assert_falls_back,
    fallbacks,
    layer_of,
    lora_net,
    make_linear,
    make_linear4bit,
    served_by_us,
    step_and_frozen,
    text_batch,
    tiny_llama,
)
from torch import Tensor, nn

import peftkern


def as_fsdp_leaves_it(base: bnb.nn.Linear4bit, kind: str) -> None:
    """The weight as a view of other memory, without its state; the layer still has that."""
    weight = base.weight
    flat = torch.cat([weight.data.view(-1), weight.data.new_zeros(3)])
    view = flat[: weight.numel()].view(weight.shape)
    if kind == "parameter":
        base.weight = nn.Parameter(view, requires_grad=False)
    elif kind == "tensor":
        del base.weight
        base.weight = view
    else:
        weight.quant_state = None


@pytest.mark.parametrize("storage", [torch.uint8, torch.float32])
@pytest.mark.parametrize("kind", ["parameter", "tensor", "Params4bit"])
def test_quant_state_of_the_layer(kind, storage):
    model = lora_net(make_linear4bit(quant_storage=storage))
    twin = copy.deepcopy(model)
    layer_of(twin).base_layer.quant_state = layer_of(twin).base_layer.weight.quant_state
    as_fsdp_leaves_it(layer_of(twin).base_layer, kind)
    held = layer_of(twin).base_layer.weight.data_ptr()
    report = peftkern.patch(twin)
    assert report.falling_back == {} and len(report.patched) == 1
    x = torch.randn(2, K, requires_grad=True)
    peftkern.reset_stats()
    outputs = [net(x) for net in (twin, model)]
    torch.testing.assert_close(*outputs)
    torch.testing.assert_close(*[torch.autograd.grad(y.square().sum(), x)[0] for y in outputs])
    with twin.disable_adapter(), model.disable_adapter():
        torch.testing.assert_close(twin(x), model(x))
    assert served_by_us() == 2 and fallbacks() == {}
    assert layer_of(twin).base_layer.weight.data_ptr() == held
    assert set(twin.state_dict()) == set(model.state_dict())  # with the quantization state


def test_view_that_fsdp_has_cast_fails_as_in_bitsandbytes():
    model = lora_net(make_linear4bit(quant_storage=torch.float32))
    base = layer_of(model).base_layer
    as_fsdp_leaves_it(base, "parameter")
    peftkern.patch(model)
    base.weight.data = base.weight.data.bfloat16()
    peftkern.reset_stats()
    with pytest.raises(RuntimeError):
        model(torch.randn(2, K))
    assert fallbacks() == {"quant_storage is torch.float32 over torch.bfloat16 data": 1}


def test_not_quantized_yet_fails_as_in_peft():
    base = bnb.nn.Linear4bit(K, N, quant_type="nf4", compute_dtype=torch.float32)
    model = lora_net(base)
    peftkern.patch(model)
    peftkern.reset_stats()
    with pytest.raises(AssertionError):
        model(torch.randn(2, K))
    assert fallbacks() == {"quant_state is missing": 1}


@pytest.mark.parametrize("double_quant", [True, False])
def test_fp4_is_served_with_adapters_and_without(double_quant):
    """bitsandbytes' default: losses and gradients are PEFT's, and so are those of its base."""
    model = lora_net(make_linear4bit(quant_type="fp4", double_quant=double_quant))
    twin = copy.deepcopy(model)
    report = peftkern.patch(twin)
    assert report.falling_back == {} and report.patched == ["base_model.model.proj"]
    codes = layer_of(twin).base_layer.weight.data.clone()
    peftkern.reset_stats()
    torch.testing.assert_close(step_and_frozen(twin), step_and_frozen(model))
    assert served_by_us() == 2 and fallbacks() == {}
    twin.eval()
    with torch.no_grad():  # where bitsandbytes repacks the weight
        twin(torch.randn(2, K))
    twin.merge_adapter()
    twin.unmerge_adapter()
    weight = layer_of(twin).base_layer.weight
    assert torch.equal(weight.data, codes) and weight.quant_state.quant_type == "fp4"


def test_formats_that_our_kernels_do_not_read():
    model = lora_net(make_linear4bit(bias=False))
    layer_of(model).base_layer.weight.quant_state.quant_type = "int4"
    reason = "quant_type is int4, expected nf4 or fp4"
    assert peftkern.patch(model).falling_back == {"base_model.model.proj": reason}
    model = lora_net(make_linear4bit(bias=False))
    weight = layer_of(model).base_layer.weight
    weight.data = weight.data.view(-1).view(torch.int16).view(-1, 1)
    assert_falls_back(model, "quant_storage is torch.uint8 over torch.int16 data")


def test_weight_quantized_the_other_way_round():
    model = lora_net(make_linear4bit(bias=False))
    base = layer_of(model).base_layer
    transposed = bnb.nn.Params4bit(
        make_linear().weight.detach().t().contiguous(), quant_type="nf4"
    ).to("cpu")
    base.weight = transposed
    with pytest.warns(DeprecationWarning, match="quantized from a"):
        assert_falls_back(model, "weight is not quantized as [out_features, in_features]")


def test_truncated_quant_state_is_an_error_and_reads_nothing():
    """bitsandbytes does not look, and reads on."""
    model = lora_net(make_linear4bit(double_quant=False))
    state = layer_of(model).base_layer.weight.quant_state
    state.absmax = state.absmax[:1]
    peftkern.patch(model)
    for adapters in (True, False):
        layer_of(model).enable_adapters(adapters)
        with pytest.raises(ValueError, match="absmax: expected"):
            model(torch.randn(2, K))


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (
            lambda s: vars(s).update(code=s.code.half()),
            "quant_map: expected a torch.float32 tensor",
        ),
        (lambda s: vars(s).update(code=s.code.flip(0)), "quant_map: expected NF4's sixteen"),
        (
            lambda s: vars(s).update(absmax=s.absmax.float().half(), state2=None, nested=False),
            "absmax: expected a torch.float32 tensor",
        ),
        # As bitsandbytes leaves it when it restores a weight that it has repacked.
        (lambda s: vars(s.state2).update(dtype=torch.bfloat16), "nested_dtype: expected float32"),
    ],
)
def test_unusual_state_is_left_to_bitsandbytes(change, reason):
    model = lora_net(make_linear4bit())
    change(layer_of(model).base_layer.weight.quant_state)
    twin = copy.deepcopy(model)
    report = peftkern.patch(twin)
    assert [why.startswith(reason) for why in report.falling_back.values()] == [True]
    peftkern.reset_stats()
    for x in (torch.randn(2, K), torch.randn(3, K, requires_grad=True)):
        assert torch.equal(twin(x), model(x))
        with twin.disable_adapter(), model.disable_adapter():
            assert torch.equal(twin(x), model(x))
    assert served_by_us() == 0
    assert all(why.startswith(reason) for why in fallbacks())


def test_absmax_on_another_device_is_left_to_bitsandbytes(monkeypatch):
    """Its kernel would read where the other device's address points here: it is not run."""
    model = lora_net(make_linear4bit(double_quant=False))
    state = layer_of(model).base_layer.weight.quant_state
    state.absmax = state.absmax.to("meta")
    monkeypatch.setattr(bnb.nn.Linear4bit, "forward", lambda self, x: x.new_zeros(len(x), N))
    report = peftkern.patch(model)
    reason = "absmax: expected a torch.float32 tensor of shape [96] on cpu"
    assert [why.startswith(reason) for why in report.falling_back.values()] == [True]
    peftkern.reset_stats()
    model(torch.randn(2, K))
    assert served_by_us() == 0 and fallbacks() == {reason: 1}


class OnGpu(Tensor):
    """A table that says that it is on a GPU, and counts who waits for that."""

    is_cpu, is_cuda, device = False, True, torch.device("cuda:0")
    waits = 0

    def cpu(self) -> Tensor:
        OnGpu.waits += 1
        return self.as_subclass(Tensor)


@pytest.fixture
def on_gpu(monkeypatch) -> Callable[[bnb.nn.Linear4bit], Tensor]:
    """Puts the table of a layer there."""
    monkeypatch.setattr(OnGpu, "waits", 0)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)

    def move(base: bnb.nn.Linear4bit) -> Tensor:
        state = base.weight.quant_state
        state.code = state.code.as_subclass(Tensor).clone().as_subclass(OnGpu)
        return state.code

    return move


def test_tables_are_read_once_by_patch(on_gpu):
    model = add_lora(quantize_4bit_(tiny_llama()))
    layers = [m for m in model.modules() if isinstance(m, bnb.nn.Linear4bit)]
    for layer in layers:
        on_gpu(layer)
    peftkern.patch(model)
    peftkern.reset_stats()
    for _ in range(2):
        model(**text_batch())
    assert served_by_us() == 2 * len(layers) and fallbacks() == {}
    assert OnGpu.waits == 1


def test_table_that_is_changed_is_read_again(on_gpu):
    model = lora_net(make_linear4bit())
    code = on_gpu(layer_of(model).base_layer)
    peftkern.patch(model)
    x, reason = torch.randn(2, K), "quant_map: expected NF4's sixteen values"
    for change, served in ((Tensor.neg_, 0), (Tensor.neg_, 1)):
        waits = OnGpu.waits
        change(code)
        peftkern.reset_stats()
        for _ in range(3):
            model(x)
        assert served_by_us() == 3 * served and OnGpu.waits == waits + 1
        assert fallbacks() == ({} if served else {reason: 3})


def test_no_table_is_read_in_a_graph_capture(on_gpu, monkeypatch):
    """It would wait for the device: what was not read before goes to bitsandbytes."""
    model = lora_net(make_linear4bit())
    on_gpu(layer_of(model).base_layer)
    peftkern.patch(model)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    x = torch.randn(2, K)
    peftkern.reset_stats()
    expected = model(x)
    assert served_by_us() == 1 and fallbacks() == {}
    on_gpu(layer_of(model).base_layer)
    peftkern.reset_stats()
    torch.testing.assert_close(model(x), expected)
    assert fallbacks() == {"quant_map: expected one that was read before this graph capture": 1}
    assert OnGpu.waits == 1


def repacked(**options: Any) -> nn.Module:
    """A model on which bitsandbytes has run its CPU inference path, which rewrites the weight."""
    model = lora_net(make_linear4bit(**options)).eval()
    with torch.no_grad():
        model(torch.randn(2, K))
    return model


needs_repacking = pytest.mark.skipif(
    not bnb.functional.has_avx512bf16(), reason="bitsandbytes repacks with AVX512-BF16 only"
)


@needs_repacking
@pytest.mark.parametrize("double_quant", [True, False])
@pytest.mark.parametrize(
    ("storage", "quant_type"),
    [(torch.uint8, "nf4"), (torch.bfloat16, "nf4"), (torch.uint8, "fp4")],
)
def test_repacked_weight_is_restored_by_patch(double_quant, storage, quant_type):
    options = {"double_quant": double_quant, "bias": False, "quant_storage": storage}
    options |= {"quant_type": quant_type}
    fresh = lora_net(make_linear4bit(**options))
    keys = list(fresh.state_dict())
    codes = layer_of(fresh).base_layer.weight.data.clone().view(torch.uint8)
    model = repacked(**options)
    with pytest.warns(UserWarning, match="repacked by bitsandbytes"):
        peftkern.patch(model)
    weight = layer_of(model).base_layer.weight
    assert not weight.quant_state.packing_format_for_cpu
    assert weight.dtype is storage and torch.equal(weight.data.view(torch.uint8), codes)
    assert list(model.state_dict()) == keys
    x = torch.randn(3, K, requires_grad=True)
    peftkern.reset_stats()
    y, expected = model.train()(x), fresh(x)
    assert served_by_us() == 1 and fallbacks() == {}
    # bitsandbytes rounded absmax to bfloat16 when it repacked: that is what is left to see.
    torch.testing.assert_close(y, expected, rtol=0, atol=0.02)
    grads = [torch.autograd.grad(out.sum(), x)[0] for out in (y, expected)]
    torch.testing.assert_close(*grads, rtol=0, atol=0.02)


@needs_repacking
@pytest.mark.filterwarnings("ignore:A 4-bit weight had been repacked")
def test_threads_restore_a_weight_once():
    """It was repacked behind the back of the patched model, as by code that calls bitsandbytes."""
    model = repacked().train()
    base = layer_of(model).base_layer
    spoiled = copy.deepcopy(base)
    peftkern.patch(model)
    x = torch.randn(3, K)
    expected = model(x)
    for _ in range(10):
        base.weight.data = spoiled.weight.data.clone()
        base.weight.quant_state = copy.deepcopy(spoiled.weight.quant_state)
        with ThreadPoolExecutor(8) as pool:
            results = list(pool.map(model, [x] * 8))
        assert all(torch.equal(y, expected) for y in results)


@pytest.mark.parametrize("double_quant", [True, False])
def test_our_inference_never_repacks(double_quant):
    model = lora_net(make_linear4bit(double_quant=double_quant))
    peftkern.patch(model)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    weight = layer_of(model).base_layer.weight
    state = dict(weight.quant_state.__dict__)
    model.eval()
    for autocast in (False, True):
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            model(torch.randn(2, K))
    assert weight.quant_state.__dict__ == state
    after = model.state_dict()
    assert list(after) == list(before) and all(torch.equal(after[k], before[k]) for k in before)
