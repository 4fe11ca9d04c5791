"""`peftkern.initialize_` against PEFT's own initializations, and what PEFT does with the result."""

from __future__ import annotations

import copy
import json
import warnings

import pytest
import torch
from peft import (
    LoraConfig,
    PeftModel,
    get_peft_model,
)
from peft_models import (
    add_lora,
    layer_of,
    lora_net,
    make_linear,
    make_linear4bit,
    tiny_llama,
)
from started_models import (
    BATCHES,
    DATA,
    data,
    initialized_by_peft,
    layers_of,
    logits,
    settings,
    update_of,
)
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel

import peftkern
from peftkern.formats.nf4 import NF4Weight
from peftkern.formats.table import FORMATS
from peftkern.functional import dequantize, dequantize_nf4
from peftkern.layers import BlockLinear, NF4Linear


@pytest.mark.parametrize("method", ["pissa", "olora", "corda"])
def test_updates_and_bases_are_those_of_peft(method):
    """CorDA's hook of PEFT takes one text at a time."""
    batch = {key: value[:1] for key, value in BATCHES[0].items()}
    expected = layers_of(initialized_by_peft(method, batch))
    options = {"batches": [batch]} if method in DATA else {}
    report = peftkern.initialize_(tiny_llama(), method, settings("pissa"), tol=1e-6, **options)
    got = layers_of(report.model)
    assert got.keys() == expected.keys() and len(report.layers) == len(got) == 14
    for name, layer in got.items():
        other = expected[name]
        size = update_of(other).norm().item()
        torch.testing.assert_close(update_of(layer), update_of(other), rtol=0, atol=2e-3 * size)
        bases = (layer.get_base_layer().weight, other.get_base_layer().weight)
        torch.testing.assert_close(*bases, rtol=0, atol=2e-3 * size)
        for mine, theirs in ((layer.lora_A, other.lora_A), (layer.lora_B, other.lora_B)):
            sizes = (mine["default"].weight.norm(), theirs["default"].weight.norm())
            torch.testing.assert_close(*sizes, rtol=1e-3, atol=0)


def test_lora_ga_has_the_factors_of_peft():
    """The product depends on the signs of its singular vectors, which are nobody's choice."""
    expected = layers_of(initialized_by_peft("lora_ga", BATCHES[0]))
    model = add_lora(tiny_llama(), lora_alpha=6)
    peftkern.initialize_(model, "lora_ga", batches=BATCHES[:1])
    for name, layer in layers_of(model).items():
        pairs = ((layer.lora_A, expected[name].lora_A), (layer.lora_B, expected[name].lora_B))
        for (mine, theirs), dim in zip(pairs, (1, 0), strict=True):
            mine, theirs = mine["default"].weight, theirs["default"].weight
            signs = (mine * theirs).sum(dim, keepdim=True).sign()
            atol = 2e-2 * theirs.norm().item()  # PEFT's SVD is approximate
            torch.testing.assert_close(mine * signs, theirs, rtol=0, atol=atol)


def test_eva_gives_the_ranks_and_directions_of_peft():
    """PEFT's incremental SVD is approximate: its directions are within its own threshold, 0.99."""
    expected = layers_of(initialized_by_peft("eva", BATCHES[0]))
    model = get_peft_model(tiny_llama(), settings("eva"))
    report = peftkern.initialize_(model, "eva", batches=BATCHES[:1])
    got = layers_of(model)
    assert got.keys() == expected.keys()
    ranks = {name: layer.r["default"] for name, layer in got.items()}
    theirs = {name: layer.r["default"] for name, layer in expected.items()}
    assert sum(ranks.values()) == sum(theirs.values()) == 4 * 14
    assert sum(abs(ranks[name] - theirs[name]) for name in ranks) <= 2  # near equals
    for name, layer in got.items():
        other = expected[name]
        k = min(ranks[name], theirs[name])
        mine, there = (one.lora_A["default"].weight[:k] for one in (layer, other))
        assert torch.linalg.svdvals(mine @ there.T).min() > 0.97
        assert not layer.lora_B["default"].weight.any()
        if ranks[name] == theirs[name]:
            assert layer.scaling == other.scaling
    assert {layer.name: layer.rank for layer in report.layers} == {
        name.removeprefix("base_model.model."): rank for name, rank in ranks.items()
    }


@pytest.mark.parametrize("method", ["pissa", "olora", "corda", "lora_ga", "eva"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_model_computes_what_it_did(method, dtype):
    model = add_lora(tiny_llama(dtype))
    before = logits(model).float()
    wanted = {name: p.requires_grad for name, p in model.named_parameters()}
    report = peftkern.initialize_(model, method, **data(method))
    after = logits(model).float()
    tolerance = 1e-4 if dtype is torch.float32 else 0.05
    assert (after - before).norm() <= tolerance * before.norm()
    if method != "eva":
        assert report.error is None if dtype is torch.float32 else report.error < 2**-8
    after = {name: p.requires_grad for name, p in model.named_parameters()}
    assert all(after[name] == wanted[name] for name in after.keys() & wanted.keys())
    assert not any(m.training or m._forward_hooks for m in model.modules())


@pytest.mark.parametrize("method", ["pissa", "olora", "loftq", "lora_ga"])
def test_an_adapter_loads_on_the_base_saved_beside_it(tmp_path, method):
    report = peftkern.initialize_(tiny_llama(), method, settings("pissa"), **data(method))
    model = report.model
    with torch.no_grad():  # as if it had been trained
        for layer in layers_of(model).values():
            layer.lora_B["default"].weight.add_(0.01)
    expected = logits(model)
    model.save_pretrained(tmp_path / "adapter")
    model.unload().save_pretrained(tmp_path / "base")
    base = tiny_llama().from_pretrained(tmp_path / "base")
    loaded = PeftModel.from_pretrained(base, tmp_path / "adapter")
    torch.testing.assert_close(logits(loaded), expected)


@pytest.mark.parametrize("method", ["pissa", "olora", "corda"])
def test_peft_converts_a_trained_adapter_for_the_original_base(tmp_path, method):
    model = peftkern.initialize_(tiny_llama(), method, settings("pissa"), **data(method)).model
    model.save_pretrained(tmp_path / "initial")
    with torch.no_grad():
        for layer in layers_of(model).values():
            layer.lora_B["default"].weight.add_(0.01)
    expected = logits(model)
    initial = str(tmp_path / "initial")
    model.save_pretrained(tmp_path / "lora", path_initial_model_for_weight_conversion=initial)
    config = json.loads((tmp_path / "lora" / "adapter_config.json").read_text())
    assert config["r"] == 8
    loaded = PeftModel.from_pretrained(tiny_llama(), tmp_path / "lora")
    torch.testing.assert_close(logits(loaded), expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("double_quant", [True, False])
@pytest.mark.parametrize("method", ["pissa", "qpissa", "olora", "loftq"])
def test_a_base_in_4_bits_is_quantized_anew(method, double_quant):
    dense = make_linear().weight.data
    model = lora_net(make_linear4bit(double_quant=double_quant))
    layer = layer_of(model)
    plain = dequantize_nf4(NF4Weight.from_bitsandbytes(layer.get_base_layer().weight))
    weights = {"proj.weight": dense}
    (start,) = peftkern.initialize_(model, method, weights=weights).layers
    nf4 = NF4Weight.from_bitsandbytes(layer.get_base_layer().weight)
    assert nf4.nested is double_quant and nf4.blocksize == 64
    missed = (dequantize_nf4(nf4) + update_of(layer) - dense).norm() / dense.norm()
    assert start.error == pytest.approx(missed.item(), rel=1e-3)
    assert missed < (plain - dense).norm() / dense.norm()
    x = torch.randn(3, 64)
    expected = x @ (dequantize_nf4(nf4) + update_of(layer)).T + layer.get_base_layer().bias
    torch.testing.assert_close(model.train()(x), expected, rtol=1e-3, atol=1e-3)
    peftkern.patch(model)
    torch.testing.assert_close(model(x), expected, rtol=1e-3, atol=1e-3)


def test_loftq_of_a_dense_base_leaves_it_dense():
    model = lora_net(make_linear(torch.bfloat16))
    before = layer_of(model).get_base_layer().weight.clone().float()
    (start,) = peftkern.initialize_(model, "loftq", steps=3).layers
    weight = layer_of(model).get_base_layer().weight
    assert weight.dtype is torch.bfloat16
    missed = (weight.float() + update_of(layer_of(model)) - before).norm() / before.norm()
    assert start.error == pytest.approx(missed.item(), rel=0.02)
    assert start.error < 0.095  # of NF4 alone


def test_steps_of_loftq_are_those_of_the_config():
    errors = []
    for steps, given in ((1, None), (8, None), (1, 8)):
        model = lora_net(make_linear())
        model.peft_config["default"].loftq_config = {"loftq_bits": 4, "loftq_iter": steps}
        errors.append(peftkern.initialize_(model, "loftq", steps=given).error)
    assert errors[0] > errors[1] == errors[2]


@pytest.mark.parametrize("method", ["pissa", "olora", "corda", "lora_ga", "loftq"])
def test_weights_that_are_kept_transposed(method):
    """GPT-2's Conv1D holds [in, out]."""
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=64, n_positions=32, n_embd=32, n_layer=1, n_head=2)
    base = GPT2LMHeadModel(config)
    lora = LoraConfig(r=3, lora_alpha=6, target_modules=["c_attn", "c_proj"], fan_in_fan_out=True)
    before = logits(base)
    report = peftkern.initialize_(base, method, lora, **data(method))
    assert {layer.shape for layer in report.layers} == {(96, 32), (32, 32), (32, 128)}
    limit = 0.2 if method == "loftq" else 1e-4
    assert (logits(report.model) - before).norm() <= limit * before.norm()


def test_magnitudes_of_dora_are_those_of_the_whole_weight():
    model = lora_net(make_linear(), use_dora=True)
    weight = layer_of(model).get_base_layer().weight.clone()
    peftkern.initialize_(model, "pissa")
    magnitude = layer_of(model).lora_magnitude_vector["default"].weight
    torch.testing.assert_close(magnitude, weight.norm(dim=1), rtol=1e-4, atol=0)
    x = torch.randn(3, 64)
    expected = x @ weight.T + layer_of(model).get_base_layer().bias
    torch.testing.assert_close(model.eval()(x), expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("method", ["pissa", "olora", "corda", "loftq"])
def test_lower_precisions_of_a_training_do_not_reach_it(method):
    options = {"batches": [torch.randn(8, 640)]} if method in DATA else {}
    torch.manual_seed(0)
    linear = nn.Linear(640, 640).bfloat16().float()
    results = []
    before = torch.get_float32_matmul_precision()
    try:
        for precision, autocast in (("highest", False), ("medium", False), ("highest", True)):
            torch.set_float32_matmul_precision(precision)
            model = lora_net(copy.deepcopy(linear))
            if autocast and method != "corda":  # whose batches run as the caller has it
                with torch.autocast("cpu", torch.bfloat16):
                    peftkern.initialize_(model, method, **options)
            else:
                peftkern.initialize_(model, method, **options)
            assert torch.get_float32_matmul_precision() == precision
            results.append(layer_of(model).get_base_layer().weight)
    finally:
        torch.set_float32_matmul_precision(before)
    assert all(torch.equal(results[0], other) for other in results[1:])


@pytest.mark.parametrize("method", ["olora", "corda"])
def test_a_rank_for_all_layers(method):
    model = add_lora(tiny_llama(torch.bfloat16), rank_pattern={"q_proj": 2}, use_rslora=True)
    before = logits(model).float()
    report = peftkern.initialize_(model, method, rank=9, **data(method))
    assert (logits(model).float() - before).norm() <= 0.05 * before.norm()
    assert {p.dtype for name, p in model.named_parameters() if "lora_" in name} == {torch.float32}
    assert {layer.rank for layer in report.layers} == {9}
    assert {layer.scaling for layer in report.layers} == {8 / 3}
    config = model.peft_config["default"]
    assert (config.r, config.rank_pattern) == (9, {})


def test_layers_that_stay_as_they_are_are_named():
    """An embedding; a head that shares its weight with it."""
    base = tiny_llama()
    base.config.tie_word_embeddings = True
    base.tie_weights()
    table = base.lm_head.weight.clone()
    config = LoraConfig(r=4, target_modules=["q_proj", "lm_head", "embed_tokens"])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT's, about tied weights
        report = peftkern.initialize_(base, "pissa", config)
    assert [layer.name[-6:] for layer in report.layers] == ["q_proj"] * 2
    assert set(report.skipped) == {"lm_head", "model.embed_tokens"}
    assert "Embedding" in report.skipped["model.embed_tokens"]
    assert "embed_tokens" in report.skipped["lm_head"]
    assert torch.equal(report.model.base_model.model.lm_head.base_layer.weight, table)
    assert "2 left as they were" in str(report)


def test_the_report_can_be_printed_and_kept():
    report = peftkern.initialize_(lora_net(make_linear()), "pissa")
    record = json.loads(json.dumps(report.as_dict()))
    (layer,) = record["layers"]
    assert layer["name"] == "proj" and layer["shape"] == [96, 64] and layer["rank"] == 4
    assert 0 < layer["energy"] < 1 and 0 <= layer["certificate"] < 1e-3
    line = str(report)
    assert line.startswith("pissa: 1 layers, energy kept ") and "excess error at most" in line
    assert line.endswith(", of each with probability 0.999")


def test_a_training_goes_on_from_the_start():
    model = peftkern.initialize_(tiny_llama(), "pissa", settings("pissa")).model
    peftkern.patch(model)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=3e-3)
    losses = []
    for _ in range(5):
        loss = model(**BATCHES[0]).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]


def four_bit(format: str) -> nn.Module:
    kind, _, format = format.rpartition(" ")
    if kind == "bitsandbytes":
        return make_linear4bit(quant_type=format)
    if format in ("nf4", "fp4"):
        return NF4Linear.from_linear(make_linear(), quant_type=format)
    blocksize = 32 if format == "int4" else None
    return BlockLinear.from_linear(make_linear(), format=format, blocksize=blocksize)


@pytest.mark.parametrize("method", ["pissa", "loftq", "lora_ga"])
@pytest.mark.parametrize("format", ["bitsandbytes fp4", "nf4", "fp4", "mxfp4", "nvfp4", "int4"])
def test_a_base_in_4_bits_is_quantized_anew_in_its_format(format, method):
    model = lora_net(four_bit(format))
    base = layer_of(model).base_layer
    given, options = make_linear().weight.detach(), {}
    if method == "lora_ga":
        x = torch.randn(4, given.shape[1], generator=torch.Generator().manual_seed(0))
        options = {"batches": [x], "loss": lambda net, x: net(x).square().mean()}
    weights = {"proj.weight": given} if method == "loftq" else None
    report = peftkern.initialize_(model, method, weights=weights, **options)
    w = getattr(base, "quantized_weight", None) or NF4Weight.from_bitsandbytes(base.weight)
    assert FORMATS[w.layout[0]].name == format.rpartition(" ")[2]
    assert not base.weight.requires_grad and type(layer_of(model).base_layer) is type(base)
    if method == "loftq":
        together = dequantize(w) + layer_of(model).get_delta_weight("default")
        error = ((together - given).norm() / given.norm()).item()
        assert report.error == pytest.approx(error, rel=1e-3) and error < 0.13
        alone = dequantize(four_bit(format).quantized_weight) if format != "bitsandbytes fp4" else 0
        assert error < ((alone - given).norm() / given.norm()).item()
    else:
        assert report.error < 0.13
