"""LoRALinear, NF4Linear and NF4LoRALinear for people who do not use PEFT."""

from __future__ import annotations

import copy
import functools
import pickle
import warnings

import bitsandbytes as bnb
import pytest
import torch
from safetensors.torch import load_file, save_file
from tolerances import assert_as_accurate_as_torch
from torch import nn

import peftkern
from peftkern.layers import LoRALinear, NF4Linear, NF4LoRALinear

K, N = 64, 96
F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
LORA = [LoRALinear, NF4LoRALinear]
NF4 = [NF4Linear, NF4LoRALinear]
ALL = [LoRALinear, NF4Linear, NF4LoRALinear]


def make(cls: type, dtype: torch.dtype = F32, bias: bool = True, **options) -> nn.Module:
    """A layer from a fixed nn.Linear, its update already contributing."""
    torch.manual_seed(1)
    layer = cls.from_linear(nn.Linear(K, N, bias=bias).to(dtype), **options)
    if hasattr(layer, "lora_B"):
        nn.init.normal_(layer.lora_B, std=0.1)
    return layer


def dense_weight(layer: nn.Module, dtype: torch.dtype) -> torch.Tensor:
    if isinstance(layer, NF4Linear):
        return peftkern.dequantize_nf4(layer.nf4, dtype)
    return layer.weight.detach().to(dtype)


def eager(layer: nn.Module, x: torch.Tensor, weight: torch.Tensor | None = None) -> torch.Tensor:
    """The formula in plain torch, everything in the dtype of x."""
    dtype = x.dtype
    weight = dense_weight(layer, dtype) if weight is None else weight
    bias = None if layer.bias is None else layer.bias.to(dtype)
    y = nn.functional.linear(x, weight, bias)
    if hasattr(layer, "lora_A"):
        update = x @ layer.lora_A.to(dtype).t() @ layer.lora_B.to(dtype).t()
        y = y + layer.scaling * update
    return y


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", [F32, BF16, F16], ids=str)
@pytest.mark.parametrize("cls", ALL)
def test_forward_and_gradients(cls, dtype, bias):
    layer = make(cls, dtype, bias)
    weight = dense_weight(layer, dtype)

    in_dtype = functools.partial(eager, layer, weight=weight)
    in_float64 = functools.partial(eager, layer, weight=weight.double())
    results = []
    for run, wide in ((layer, dtype), (in_dtype, dtype), (in_float64, torch.float64)):
        x = torch.randn(2, 5, K, generator=torch.Generator().manual_seed(2)).to(dtype)
        x = x.to(wide).requires_grad_()
        layer.zero_grad()
        y = run(x)
        dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(3), dtype=F32)
        y.backward(dy.to(dtype).to(y.dtype))
        grads = [p.grad for p in layer.parameters() if p.grad is not None]
        results.append([y.detach(), x.grad, *(g.clone() for g in grads)])
    assert len(results[0]) == (2 if cls is NF4Linear else 4)
    assert_as_accurate_as_torch(*results)


@pytest.mark.parametrize("cls", ALL)
def test_only_the_adapter_is_trained(cls):
    for layer in (make(cls), cls(K, N)):
        trained = {n for n, p in layer.named_parameters() if p.requires_grad}
        assert trained == (set() if cls is NF4Linear else {"lora_A", "lora_B"})


@pytest.mark.parametrize("cls", ALL)
@pytest.mark.parametrize("bias", [True, False])
def test_from_sizes(cls, bias):
    layer = cls(K, N, bias=bias, dtype=BF16)
    assert (layer.bias is None) == (not bias)
    x = torch.randn(3, K, dtype=BF16)
    y = layer(x)
    assert y.shape == (3, N) and y.dtype is BF16
    # lora_B starts at zero, so the layer starts as its base
    torch.testing.assert_close(y, eager(layer, x), rtol=2**-6, atol=2**-6)
    assert isinstance(layer, nn.Linear)
    assert f"in_features={K}, out_features={N}, bias={bias}" in repr(layer)


@pytest.mark.parametrize("cls", LORA)
def test_options_of_the_update(cls):
    layer = cls(K, N, r=4, lora_alpha=6, lora_dropout=0.25, adapter_dtype=BF16)
    assert layer.lora_A.shape == (4, K) and layer.lora_B.shape == (N, 4)
    assert layer.lora_A.dtype is layer.lora_B.dtype is BF16
    assert layer.scaling == 1.5 and "r=4, scaling=1.5, lora_dropout=0.25" in repr(layer)
    assert layer.lora_A.abs().max() > 0 and layer.lora_B.abs().max() == 0
    for wrong in ({"r": 0}, {"lora_dropout": 1.0}, {"lora_dropout": -0.1}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            cls(K, N, **wrong)


@pytest.mark.parametrize("cls", LORA)
def test_an_option_that_is_not_there_is_refused_by_the_method_called(cls):
    with pytest.raises(TypeError, match=r"from_linear\(\) got an unexpected .* 'rank'"):
        cls.from_linear(nn.Linear(K, N), rank=8)


def test_an_update_over_fp4():
    layer = make(NF4LoRALinear, quant_type="fp4")
    from_sizes = NF4LoRALinear(K, N, quant_type="fp4")
    from_sizes.load_state_dict(layer.state_dict())
    x = torch.randn(5, K)
    assert layer.quant_type == from_sizes.quant_type == "fp4"
    torch.testing.assert_close(layer(x), eager(layer, x))
    assert torch.equal(from_sizes(x), layer(x))


@pytest.mark.parametrize("cls", LORA)
def test_scaling_changes_at_run_time(cls):
    layer = make(cls, r=4)
    x = torch.randn(3, K)
    for scaling in (0.0, -2.0, torch.tensor(0.5)):
        layer.scaling = scaling
        torch.testing.assert_close(layer(x), eager(layer, x))


@pytest.mark.parametrize("cls", LORA)
def test_merge(cls):
    layer = make(cls, dtype=F32)
    merged = layer.merge()
    assert type(merged) is nn.Linear
    x = torch.randn(3, K)
    torch.testing.assert_close(merged(x), layer(x))
    with torch.no_grad():
        merged.weight.zero_()
        merged.bias.zero_()
    torch.testing.assert_close(layer(x), eager(layer, x))  # nothing is shared


def test_from_linear_takes_over_the_parameters():
    linear = nn.Linear(K, N).eval()
    layer = LoRALinear.from_linear(linear)
    assert layer.weight is linear.weight and layer.bias is linear.bias and not layer.training
    quantized = NF4Linear.from_linear(linear)
    assert quantized.bias is linear.bias
    again = NF4LoRALinear.from_linear(quantized)
    assert torch.equal(again.weight, quantized.weight) and again.nf4.shape == (N, K)
    with pytest.raises(TypeError, match=r"linear: expected an nn\.Linear, got Conv1d"):
        NF4Linear.from_linear(nn.Conv1d(4, 4, 1))


@pytest.mark.parametrize("double_quant", [True, False])
@pytest.mark.parametrize("blocksize", [32, 64, 4096])
def test_nf4linear_holds_the_quantized_weight(blocksize, double_quant):
    linear = nn.Linear(K, N, dtype=BF16)
    layer = NF4Linear.from_linear(linear, blocksize=blocksize, double_quant=double_quant)
    weight = linear.weight.detach()
    w = peftkern.quantize_nf4(weight, blocksize=blocksize, double_quant=double_quant)
    assert layer.weight.dtype is torch.uint8 and torch.equal(layer.weight.view(-1), w.packed)
    dense = layer.to_linear()
    assert type(dense) is nn.Linear and dense.weight.dtype is BF16
    assert torch.equal(dense.weight, peftkern.dequantize_nf4(w))
    assert f"blocksize={blocksize}, absmax={'nested' if double_quant else 'plain'}" in repr(layer)


@pytest.mark.parametrize("cls", NF4)
def test_casting_leaves_the_format_alone(cls):
    layer = make(cls)
    before = peftkern.dequantize_nf4(layer.nf4)
    layer.half().bfloat16()
    assert layer.bias.dtype is BF16 and layer.nf4.absmax.dtype is torch.uint8
    assert layer.nf4.nested_absmax.dtype is F32
    assert torch.equal(peftkern.dequantize_nf4(layer.nf4), before)
    assert layer(torch.randn(2, K)).dtype is F32  # the bias follows the input


def test_meta_device():
    layer = make(NF4LoRALinear).to("meta")
    assert all(p.is_meta for p in layer.parameters()) and layer.nf4.device.type == "meta"
    assert layer(torch.empty(3, K, device="meta")).shape == (3, N)


@pytest.mark.parametrize("cls", ALL)
def test_copies(cls):
    layer = make(cls)
    x = torch.randn(2, K)
    expected = layer(x)
    for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(twin(x), expected)
        with torch.no_grad():
            twin.weight.zero_()
        assert torch.equal(layer(x), expected)


@pytest.mark.parametrize("double_quant", [True, False])
@pytest.mark.parametrize("cls", NF4)
def test_state_dict_round_trip(cls, double_quant, tmp_path):
    source = make(cls, double_quant=double_quant)
    save_file(source.state_dict(), tmp_path / "layer.safetensors")
    target = cls(K, N)  # with other random values, and another kind of absmax
    result = target.load_state_dict(load_file(tmp_path / "layer.safetensors"))
    assert result.missing_keys == [] and result.unexpected_keys == []
    x = torch.randn(2, K)
    assert torch.equal(target(x), source(x))
    assert list(target.state_dict()) == list(source.state_dict())


@pytest.mark.parametrize("double_quant", [True, False])
def test_state_dict_in_bitsandbytes_keys(double_quant):
    ours = make(NF4Linear, double_quant=double_quant)
    theirs = bnb.nn.Linear4bit(
        K, N, quant_type="nf4", compress_statistics=double_quant, compute_dtype=F32
    )
    theirs.load_state_dict(make(LoRALinear).state_dict(), strict=False)
    theirs.to("cpu")
    assert set(ours.state_dict()) == set(theirs.state_dict())
    x = torch.randn(3, K, requires_grad=True)
    loaded = NF4Linear(K, N)
    assert loaded.load_state_dict(theirs.state_dict()).missing_keys == []
    torch.testing.assert_close(loaded(x), theirs(x))

    state = ours.state_dict()
    statistics = {k.removeprefix("weight."): v for k, v in state.items() if k.startswith("weight.")}
    theirs.weight = bnb.nn.Params4bit.from_prequantized(state["weight"], statistics, device="cpu")
    theirs.bias.data = state["bias"]
    torch.testing.assert_close(theirs(x), ours(x))


def test_a_dense_checkpoint_is_quantized_on_the_way():
    linear = nn.Linear(K, N)
    layer = NF4Linear(K, N, blocksize=128, double_quant=False)
    layer.load_state_dict(linear.state_dict())
    expected = NF4Linear.from_linear(linear, blocksize=128, double_quant=False)
    assert torch.equal(layer.weight, expected.weight) and layer.nf4.blocksize == 128
    assert not layer.nf4.nested


@pytest.mark.parametrize("nested_in_a_model", [False, True])
def test_wrong_state_dicts_are_named(nested_in_a_model):
    model = nn.Sequential(NF4Linear(K, N)) if nested_in_a_model else NF4Linear(K, N)
    prefix = "0." if nested_in_a_model else ""
    good = model.state_dict()
    expected = model(torch.ones(1, K))

    other = {k: v for k, v in NF4Linear(K, 8).state_dict().items() if k != "bias"}
    for changes, says in (
        ({"weight.absmax": good[prefix + "weight.absmax"][:1]}, "absmax"),
        ({"weight.quant_map": None}, r"weight\.quant_map: missing"),
        (other, r"expected shape \(96, 64\), got \(8, 64\)"),
        ({"weight": None}, f'Missing key.*"{prefix}weight"'),
        ({"other": torch.ones(1)}, f'Unexpected key.*"{prefix}other"'),
    ):
        state = {**good, **{prefix + k: v for k, v in changes.items()}}
        with pytest.raises(RuntimeError, match=says):
            model.load_state_dict({k: v for k, v in state.items() if v is not None})
    assert torch.equal(model(torch.ones(1, K)), expected)


@pytest.mark.parametrize("cls", ALL)
def test_compile_and_export(cls):
    layer = make(cls)
    x = torch.randn(3, K)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), layer(x))
    program = torch.export.export(layer, (x,), strict=cls is NF4LoRALinear)
    torch.testing.assert_close(program.module()(x), layer(x))


@pytest.mark.parametrize("cls", ALL)
def test_autocast(cls):
    layer = make(cls)
    with torch.autocast("cpu", BF16):
        y = layer(torch.randn(3, K))
    assert y.dtype is BF16
    if cls is not NF4Linear:
        y.sum().backward()
        assert layer.lora_A.grad.dtype is F32


def checkpoint(cls: type, kind: str) -> dict[str, torch.Tensor]:
    source = make(cls, double_quant=False).state_dict()
    if kind == "nf4":
        return source
    dense = nn.Linear(K, N).state_dict()
    return {**{k: v for k, v in source.items() if k.startswith("lora_")}, **dense}


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("assign", [True, False])
@pytest.mark.parametrize("device", ["cpu", "meta", "emptied"])
@pytest.mark.parametrize("kind", ["nf4", "dense"])
@pytest.mark.parametrize("cls", NF4)
def test_loading_with_and_without_memory(cls, kind, device, assign, strict):
    state = checkpoint(cls, kind)
    expected = cls(K, N)
    expected.load_state_dict(state)
    model = nn.Sequential(cls(K, N, device="cpu" if device == "cpu" else "meta"))
    if device == "emptied":
        model.to_empty(device="cpu")
    state = {f"0.{name}": value for name, value in state.items()}
    if device == "meta" and not assign:  # as nn.Linear: nothing to copy into
        with pytest.warns(UserWarning, match=r"0\.weight: not loaded, .* pass assign=True"):
            model.load_state_dict(state, strict=strict)
        assert all(p.is_meta for p in model.parameters())
        return
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        result = model.load_state_dict(state, strict=strict, assign=assign)
    assert result.missing_keys == [] and result.unexpected_keys == []
    x = torch.randn(3, K)
    assert torch.equal(model(x), expected(x))
    if kind == "nf4":  # the tensors themselves, or copies of them
        assert (model[0].weight.data_ptr() == state["0.weight"].data_ptr()) == assign


@pytest.mark.parametrize("cls", [nn.Linear, *ALL])
def test_a_model_built_in_the_context_of_meta_loads(cls):
    source = cls(K, N)
    with torch.device("meta"):
        model = cls(K, N)
    model.load_state_dict(source.state_dict(), assign=True)
    x = torch.randn(3, K)
    assert torch.equal(model(x), source(x))


def trained(layer: nn.Module) -> list[torch.Tensor]:
    x = torch.ones(3, K, requires_grad=True)
    layer(x).square().sum().backward()
    return [x.grad, *(p.grad for p in layer.parameters() if p.requires_grad)]


@pytest.mark.parametrize("cls", [nn.Linear, *ALL])
def test_loaded_under_inference_mode_and_then_trained(cls):
    source, layer = cls(K, N), cls(K, N)
    dense = make(LoRALinear).state_dict()
    with torch.inference_mode():
        layer.load_state_dict(source.state_dict())
    for got, want in zip(trained(layer), trained(source), strict=True):
        assert torch.equal(got, want)
    with torch.inference_mode():
        layer.load_state_dict(dense, strict=False)
    assert all(torch.isfinite(grad).all() for grad in trained(layer))


def test_made_under_inference_mode_and_then_trained():
    linear = nn.Linear(K, N)
    model = nn.Sequential(copy.deepcopy(linear))
    with torch.inference_mode():
        peftkern.quantize_(model)
        layers = [model[0], NF4Linear.from_linear(linear)]
        adapted = [nn.Linear(K, N), *(cls.from_linear(linear) for cls in LORA)]
        adapted += [make(cls).merge() for cls in LORA]
    (want,) = trained(NF4Linear.from_linear(linear))
    for layer in layers:
        assert torch.equal(*trained(layer), want)
    for layer in adapted:  # one line of torch's, as for nn.Linear
        with pytest.raises(RuntimeError, match="Inference tensors cannot be saved for backward"):
            trained(layer)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("layout", [torch.sparse_coo, torch.sparse_csr])
@pytest.mark.parametrize("cls", ALL)
def test_sparse_inputs(cls, layout, bias):
    layer, x = make(cls, bias=bias), torch.randn(5, K).relu()
    sparse = x.to_sparse(layout=layout)
    got, want = layer(sparse), layer(x)
    assert got.layout is nn.Linear(K, N)(sparse).layout
    torch.testing.assert_close(got, want)
    if cls is not NF4Linear:
        leaves = [layer.lora_A, layer.lora_B]
        grads = [torch.autograd.grad(y.sum(), leaves) for y in (got, want)]
        torch.testing.assert_close(*grads, rtol=1e-4, atol=1e-4)
        layer.lora_dropout = 0.5
        assert layer(sparse).shape == (5, N)


@pytest.mark.parametrize("layout", [torch.strided, torch.jagged])
@pytest.mark.parametrize("cls", ALL)
def test_nested_inputs(cls, layout):
    layer, rows = make(cls), [torch.randn(3, K), torch.randn(2, K)]
    y = layer(torch.nested.nested_tensor(rows, layout=layout))
    for got, x in zip(y.unbind(), rows, strict=True):
        torch.testing.assert_close(got, layer(x))


@pytest.mark.parametrize("cls", ALL)
def test_errors_of_forward_name_the_layer(cls):
    layer = make(cls)
    with pytest.raises(ValueError, match=rf"^{cls.__name__}: x: expected "):
        layer(torch.randn(2, K + 1))
    layer.qualified_name = "model.layers.0.up_proj"
    with pytest.raises(ValueError, match=rf"^{cls.__name__} model\.layers\.0\.up_proj: x: "):
        layer(torch.ones(2, K, dtype=torch.uint8))


def test_a_weight_that_is_computed_is_refused():
    linear = torch.nn.utils.weight_norm(nn.Linear(K, N))
    for cls in ALL:
        with pytest.raises(TypeError, match="linear: expected a weight that is a parameter"):
            cls.from_linear(linear)
