"""peftkern.patch over PEFT's DoRA: the patched model is PEFT's in all that users do with it."""

from __future__ import annotations

import copy

import pytest
import torch
from peft import LoraConfig, PeftModel
from peft_models import (
    K,
    Net,
    add_lora,
    fallbacks,
    fill_adapters,
    layer_of,
    lora_net,
    make_linear,
    make_linear4bit,
    patched_copy,
    text_batch,
    tiny_llama,
)
from peft_oracle import oracle_for, outputs_and_gradients, sample
from safetensors.torch import load_file
from tolerances import (
    BF16_LOSS_RTOL,
    DORA_DROPPED_MAGNITUDE_RMS,
    LOSS_CURVE_RTOL,
    assert_as_accurate_as_torch,
    errors,
)
from torch import nn
from torch.utils.checkpoint import checkpoint

import peftkern
from peftkern.layers import NF4Linear

SMALL = "small dense product: PEFT's own operations are as fast"
F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
MAKERS = [make_linear, make_linear4bit]


@pytest.fixture(autouse=True)
def form_the_product_again(monkeypatch):
    """As layers of real sizes do; what is kept instead, tests/functional/test_dora.py tests."""
    monkeypatch.setattr("peftkern.functional.dora._forms_again", lambda x, weights: True)


def dora_net(base: nn.Module, **config) -> PeftModel:
    """A DoRA adapter whose lengths have been trained away from the norms they start at."""
    model = lora_net(base, use_dora=True, **config)
    stretch_magnitudes(model)
    return model


def stretch_magnitudes(model: nn.Module) -> None:
    torch.manual_seed(6)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "magnitude" in name:
                p.mul_(torch.empty_like(p).uniform_(0.5, 1.5))


def norms_computed() -> int:
    """How often a norm came from our op: once per DoRA adapter and call."""
    calls = peftkern.stats().calls
    return sum(n for (op, _), n in calls.items() if op in ("dora_norm", "nf4_dora_norm"))


def assert_like_peft(model, x, *, computes_in, autocast=False, adapters=1) -> None:
    twin = patched_copy(model)
    oracle = outputs_and_gradients(oracle_for(model, computes_in), x.double(), False)
    eager = outputs_and_gradients(model, x, autocast)
    peftkern.reset_stats()
    got = outputs_and_gradients(twin, x, autocast)
    assert fallbacks() == {} and norms_computed() == adapters
    assert got.keys() == eager.keys() == oracle.keys()
    dropped = any(getattr(d, "p", 0.0) for d in layer_of(model).lora_dropout.values())
    for name in eager:
        if "magnitude" in name and dropped and computes_in is not F32 and not autocast:
            # PEFT casts the whole weight to float32 for this product; ours stays in its dtype.
            assert errors(got[name], oracle[name])[0] <= DORA_DROPPED_MAGNITUDE_RMS
        else:
            assert_as_accurate_as_torch(got[name], eager[name], oracle[name])


VARIANTS = {"plain": {}, "dropout": {"lora_dropout": 0.3}, "rank64": {"r": 64, "use_rslora": True}}


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(
    ("dtype", "adapter_dtype"), [(F32, None), (BF16, None), (BF16, BF16), (F16, None)], ids=str
)
def test_dense_like_peft(dtype, adapter_dtype, bias, variant):
    model = dora_net(make_linear(dtype, bias), adapter_dtype=adapter_dtype, **VARIANTS[variant])
    assert_like_peft(model, sample(dtype), computes_in=dtype)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize(
    ("x_dtype", "compute_dtype"),
    [(F32, F32), (BF16, BF16), (F32, BF16), (BF16, F32), (F16, None)],
    ids=str,
)
def test_linear4bit_like_peft(x_dtype, compute_dtype, variant):
    base = make_linear4bit(x_dtype, compute_dtype=compute_dtype)
    model = dora_net(base, adapter_dtype=F32, **VARIANTS[variant])
    assert_like_peft(model, sample(x_dtype), computes_in=compute_dtype or x_dtype)


@pytest.mark.parametrize("variant", ["plain", "dropout"])
@pytest.mark.parametrize("make", MAKERS)
@pytest.mark.parametrize("x_dtype", [F32, BF16], ids=str)
def test_autocast_like_peft(x_dtype, make, variant):
    model = dora_net(make(F32), adapter_dtype=F32, **VARIANTS[variant])
    assert_like_peft(model, sample(x_dtype), computes_in=BF16, autocast=True)


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("second_dora", [True, False])
@pytest.mark.parametrize("active", [["default", "second"], ["second", "default"], ["second"]])
@pytest.mark.parametrize("make", MAKERS)
def test_several_adapters_like_peft(make, active, second_dora, dropout):
    model = dora_net(make(), adapter_dtype=F32, lora_dropout=dropout)
    settings = {"r": 7, "lora_alpha": 5, "target_modules": ["proj"]}
    model.add_adapter(
        "second", LoraConfig(use_dora=second_dora, lora_dropout=dropout / 2, **settings)
    )
    fill_adapters(model)
    stretch_magnitudes(model)
    model.base_model.set_adapter(active)
    twin, x = patched_copy(model), sample(F32)
    expected = outputs_and_gradients(model, x, False)
    peftkern.reset_stats()
    got = outputs_and_gradients(twin, x, False)
    assert fallbacks() == {}
    assert norms_computed() == ("default" in active) + ("second" in active and second_dora)
    assert got.keys() == expected.keys()
    for name in expected:
        torch.testing.assert_close(got[name], expected[name], rtol=1e-4, atol=1e-4)


def test_our_nf4linear_under_dora():
    """A base that PEFT cannot dequantise: the adapter is made over the dense layer."""
    model = dora_net(make_linear())
    layer = layer_of(model)
    layer.base_layer = NF4Linear.from_linear(layer.base_layer)
    dense = copy.deepcopy(model)
    layer_of(dense).base_layer = layer.base_layer.to_linear()
    layer_of(dense).base_layer.requires_grad_(False)
    peftkern.patch(model)
    got, expected = (outputs_and_gradients(net, sample(F32), False) for net in (model, dense))
    for name in expected:
        torch.testing.assert_close(got[name], expected[name], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("make", MAKERS)
def test_dropout_only_where_peft_drops(make):
    """DoRA asks the layer whether it trains, and the dropout module whether it drops."""
    model = dora_net(make(), lora_dropout=0.5)
    twin, x = patched_copy(model), sample(F32).requires_grad_()
    for layer_trains in (True, False):
        for dropout_trains in (True, False):
            for net in (model, twin):
                layer_of(net).train(layer_trains)
                layer_of(net).lora_dropout.train(dropout_trains)
            outputs = []
            for net in (model, twin):
                torch.manual_seed(3)
                outputs.append(net(x))
            torch.testing.assert_close(*outputs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("make", MAKERS)
def test_frozen_parts(make):
    for frozen in ("lora_A", "lora_B", "lora_magnitude_vector"):
        model = dora_net(make(), lora_dropout=0.2)
        getattr(layer_of(model), frozen).requires_grad_(False)
        assert_like_peft(model, sample(F32), computes_in=F32)


def test_trained_base_bias():
    model = dora_net(make_linear(), bias="all")
    twin, x = patched_copy(model), sample(F32)
    for net in (model, twin):
        net(x).square().sum().backward()
    got, expected = layer_of(twin).base_layer.bias.grad, layer_of(model).base_layer.bias.grad
    torch.testing.assert_close(got, expected)


def test_scaling_changed_at_run_time():
    model = dora_net(make_linear())
    twin, x = patched_copy(model), sample(F32)
    for scaling in (0.5, torch.tensor(0.25), torch.tensor(-1.5)):
        for net in (model, twin):
            layer_of(net).scaling["default"] = scaling
        torch.testing.assert_close(twin(x), model(x))


def test_small_layers_are_left_to_peft(monkeypatch):
    model = dora_net(make_linear())
    layer = layer_of(model)
    smallest = layer.in_features * layer.out_features
    for minimum, reasons in ((smallest, {}), (smallest + 1, {SMALL: 1})):
        monkeypatch.setattr("peftkern.integrations.peft.serve.DORA_CPU_MINIMUM", minimum)
        peftkern.patch(model)
        peftkern.reset_stats()
        model(sample(F32))
        assert fallbacks() == reasons and norms_computed() == (not reasons)


# ---- what users do with the model


@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize(("dtype", "rtol"), [(F32, LOSS_CURVE_RTOL), (BF16, BF16_LOSS_RTOL)])
def test_training_run_is_the_same(dtype, rtol, dropout):
    model = add_lora(tiny_llama(dtype), use_dora=True, lora_dropout=dropout)
    twin = patched_copy(model)
    losses = []
    for net in (model, twin):
        torch.manual_seed(0)
        optimizer = torch.optim.AdamW([p for p in net.parameters() if p.requires_grad], lr=5e-3)
        curve = []
        for _ in range(20 if dtype is F32 else 5):
            loss = net(**text_batch()).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            curve.append(loss.item())
        losses.append(curve)
    torch.testing.assert_close(*map(torch.tensor, losses), rtol=rtol, atol=0)
    if dtype is F32:
        assert losses[0][-1] < 0.95 * losses[0][0], "the model has to learn something"
        for (name, got), expected in zip(twin.named_parameters(), model.parameters(), strict=True):
            if "magnitude" in name:
                assert errors(got, expected)[0] <= LOSS_CURVE_RTOL


def test_report_and_unpatch():
    model = add_lora(tiny_llama(), use_dora=True)
    report = peftkern.patch(model)
    assert len(report.patched) == 14 and report.falling_back == {}
    peftkern.reset_stats()
    model(**text_batch())
    assert norms_computed() == 14 and fallbacks() == {}
    assert len(peftkern.unpatch(model)) == 14
    peftkern.reset_stats()
    model(**text_batch())
    assert norms_computed() == 0


def assert_same_model(got, expected) -> None:
    ours, theirs = got.state_dict(), expected.state_dict()
    assert list(ours) == list(theirs)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    x = sample(F32).requires_grad_()  # a gradient keeps bitsandbytes from its bfloat16 path
    torch.testing.assert_close(got(x), expected(x))


@pytest.mark.parametrize("make", MAKERS)
def test_save_and_load(make, tmp_path):
    model = dora_net(make())
    twin = patched_copy(model)
    model.save_pretrained(tmp_path / "peft")
    twin.save_pretrained(tmp_path / "patched")
    ours, theirs = (
        load_file(tmp_path / side / "adapter_model.safetensors") for side in ("patched", "peft")
    )
    assert list(ours) == list(theirs) and all(torch.equal(ours[k], theirs[k]) for k in ours)
    net = Net(make())
    net.is_loaded_in_4bit = make is make_linear4bit
    loaded = PeftModel.from_pretrained(net, tmp_path / "patched")
    x = sample(F32).requires_grad_()
    expected = loaded(x)
    assert peftkern.patch(loaded).falling_back == {}
    torch.testing.assert_close(loaded(x), expected)
    torch.testing.assert_close(loaded(x), twin(x))


@pytest.mark.parametrize("make", MAKERS)
def test_set_disable_and_delete_adapter(make, tmp_path):
    other = dora_net(make(), seed=8, r=7)
    other.save_pretrained(tmp_path)
    model = dora_net(make())
    twin, x = patched_copy(model), sample(F32).requires_grad_()
    for net in (model, twin):
        net.load_adapter(str(tmp_path), "other", is_trainable=True)
    outputs = {}
    for name in ("other", "default"):
        for net in (model, twin):
            net.set_adapter(name)
        peftkern.reset_stats()
        outputs[name] = twin(x)
        assert norms_computed() == 1
        torch.testing.assert_close(outputs[name], model(x))
    assert not torch.allclose(outputs["other"], outputs["default"])
    with model.disable_adapter(), twin.disable_adapter():
        torch.testing.assert_close(twin(x), model(x))
    for net in (model, twin):
        net.set_adapter("other")
        net.delete_adapter("default")
    assert_same_model(twin, model)


@pytest.mark.parametrize("make", MAKERS)
@pytest.mark.filterwarnings("ignore:Merge lora module to 4-bit", "ignore:Unmerge lora module")
def test_merge_and_unmerge(make):
    """The norm is of the weight as it is: that of PEFT's own merge and unmerge through `.data`."""
    model = dora_net(make())
    twin, x = patched_copy(model), sample(F32).requires_grad_()
    before = twin(x)
    for net in (model, twin):
        net.merge_adapter()
    assert_same_model(twin, model)
    if make is make_linear:
        torch.testing.assert_close(twin(x), before, rtol=1e-4, atol=1e-4)
    for net in (model, twin):
        net.unmerge_adapter()
    peftkern.reset_stats()
    if make is make_linear:
        assert_same_model(twin, model)
    else:  # PEFT alone does not come back to the weight that it quantized
        torch.testing.assert_close(twin(x), before)
    assert norms_computed() == 1
    for net in (model, twin):
        merged = net.merge_and_unload()
        assert not any("lora" in name for name, _ in merged.named_parameters())


@pytest.mark.parametrize("make", MAKERS)
def test_a_base_weight_that_changes_is_seen(make):
    model = dora_net(make())
    twin, x = patched_copy(model), sample(F32).requires_grad_()
    before = twin(x)
    torch.manual_seed(77)
    dense = nn.Linear(K, 96).requires_grad_(False)
    for net in (model, twin):
        base = layer_of(net).base_layer
        if make is make_linear:
            base.weight.data.copy_(dense.weight)
        else:
            base.weight.quant_state.absmax = base.weight.quant_state.absmax.flip(0).contiguous()
    torch.testing.assert_close(twin(x), model(x))
    assert not torch.allclose(twin(x), before)


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("make", MAKERS)
def test_compile_fullgraph(make, dropout):
    model = dora_net(make(), lora_dropout=dropout)
    peftkern.patch(model)
    torch._dynamo.reset()
    compiled = torch.compile(layer_of(model), fullgraph=True, backend="aot_eager")
    results = []
    for call in (layer_of(model), compiled):
        x = torch.ones(2, 3, K, requires_grad=True)
        torch.manual_seed(0)
        y = call(x)
        y.square().sum().backward()
        gradients = [p.grad.clone() for p in model.parameters() if p.grad is not None]
        model.zero_grad()
        results.append([y.detach(), x.grad, *gradients])
    assert len(results[0]) == 5
    for got, expected in zip(*results, strict=True):
        torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing(reentrant):
    model = dora_net(make_linear(), lora_dropout=0.3)
    peftkern.patch(model)
    plain = outputs_and_gradients(model, sample(F32), False)
    forward = model.forward
    model.forward = lambda x: checkpoint(forward, x, use_reentrant=reentrant)
    replayed = outputs_and_gradients(model, sample(F32), False)
    assert plain.keys() == replayed.keys()
    assert all(torch.equal(replayed[name], plain[name]) for name in plain)
