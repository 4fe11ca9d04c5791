"""`peftkern.initialize_` against PEFT's own initializations, and what PEFT does with the result."""

from __future__ import annotations

import copy
import dataclasses
import json
import sys
import warnings
import weakref
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import (
    AdaLoraConfig,
    EvaConfig,
    LoraConfig,
    LoraGAConfig,
    PeftModel,
    get_peft_model,
    initialize_lora_eva_weights,
)
from peft.tuners.lora.config import CordaConfig
from peft.tuners.lora.layer import LoraLayer
from peft.tuners.lora.loraga import preprocess_loraga
from peft_models import (
    Net,
    add_lora,
    layer_of,
    lora_net,
    make_conv1d,
    make_linear,
    make_linear4bit,
    text_batch,
    tiny_llama,
)
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel

import peftkern
from peftkern.formats.nf4 import NF4Weight
from peftkern.functional import dequantize_nf4
from peftkern.methods.initialization.from_data import Covariance

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
BATCHES = [text_batch(seed=seed) for seed in range(2)]
DATA = ("corda", "eva", "lora_ga")


def settings(method: str, **config: Any) -> LoraConfig:
    """PEFT's config for its own initialization."""
    own = {"r": 4, "lora_alpha": 6, "target_modules": list(TARGETS), "task_type": "CAUSAL_LM"}
    extra = {"corda": {"corda_config": CordaConfig(corda_method="ipm")},
             "lora_ga": {"lora_ga_config": LoraGAConfig()},
             "eva": {"eva_config": EvaConfig()}}  # fmt: skip
    return LoraConfig(**own, init_lora_weights=method, **extra.get(method, {}), **config)


def initialized_by_peft(method: str, batch: dict[str, Tensor]) -> PeftModel:
    base = tiny_llama().eval()
    config = settings(method)
    if method == "corda":
        # PEFT's module imports attrs, which it does not require, for this one decorator.
        sys.modules.setdefault("attr", SimpleNamespace(dataclass=dataclasses.dataclass))
        from peft.tuners.lora.corda import preprocess_corda

        preprocess_corda(base, config, run_model=lambda: base(**batch))
    if method == "lora_ga":
        preprocess_loraga(base, config, lambda: base(**batch).loss.backward())
    torch.manual_seed(0)
    model = get_peft_model(base, config)
    if method == "eva":
        initialize_lora_eva_weights(model, [batch], show_progress_bar=False)
    return model


def layers_of(model: nn.Module) -> dict[str, LoraLayer]:
    return {name: m for name, m in model.named_modules() if isinstance(m, LoraLayer)}


def update_of(layer: LoraLayer) -> Tensor:
    lora_A, lora_B = (f["default"].weight for f in (layer.lora_A, layer.lora_B))
    return (layer.scaling["default"] * lora_B @ lora_A).detach()


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model.eval()(BATCHES[0]["input_ids"]).logits


def data(method: str) -> dict[str, Any]:
    return {"batches": BATCHES} if method in DATA else {}


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


def test_the_memory_for_statistics_changes_nothing():
    results = []
    for size in (1, 4 << 30):
        for method in ("corda", "lora_ga"):
            model = add_lora(tiny_llama())
            peftkern.initialize_(model, method, batches=BATCHES, statistics_bytes=size)
            results.append({name: update_of(m) for name, m in layers_of(model).items()})
    for few, all_ in ((results[0], results[2]), (results[1], results[3])):
        for name in few:
            torch.testing.assert_close(few[name], all_[name], rtol=1e-4, atol=1e-6)


def test_covariances_of_a_group_are_freed_before_the_next(monkeypatch):
    live, most = weakref.WeakSet(), []

    class Watched(Covariance):
        def __init__(self) -> None:
            super().__init__()
            live.add(self)
            most.append(len(live))

    monkeypatch.setattr("peftkern.integrations.peft.init_data.Covariance", Watched)
    peftkern.initialize_(add_lora(tiny_llama()), "corda", batches=BATCHES, statistics_bytes=1)
    assert len(most) > 2 and set(most) == {1}


def test_eva_of_inputs_that_have_fewer_directions_than_the_rank():
    model = lora_net(make_linear())
    model.peft_config["default"].eva_config = EvaConfig(whiten=True)
    peftkern.initialize_(model, "eva", batches=[torch.ones(3, 64), torch.zeros(2, 64)])
    assert layer_of(model).lora_A["default"].weight.isfinite().all()


@pytest.mark.parametrize("method", ["corda", "eva", "lora_ga"])
def test_inputs_that_are_not_finite_are_named(method):
    model = lora_net(make_linear())
    options = {"loss": lambda m, b: m(b).sum()} if method == "lora_ga" else {}
    batches = [torch.full((3, 64), float("nan"))]
    what = "weight" if method == "lora_ga" else "batches"
    with pytest.raises(ValueError, match=f"proj: {what}: expected finite"):
        peftkern.initialize_(model, method, batches=batches, **options)


def test_eva_leaves_dtypes_and_layers_that_it_does_not_start_as_they_are(tmp_path):
    base = tiny_llama(torch.bfloat16)
    model = add_lora(base, target_modules=["q_proj", "down_proj", "embed_tokens"])
    table = model.base_model.model.model.embed_tokens
    before = {name: p.clone() for name, p in table.named_parameters()}
    report = peftkern.initialize_(model, "eva", batches=BATCHES)
    assert set(report.skipped) == {"model.embed_tokens"}
    assert all(torch.equal(before[name], p) for name, p in table.named_parameters())
    assert {p.dtype for name, p in model.named_parameters() if "lora_" in name} == {torch.float32}
    assert len({layer.rank for layer in report.layers}) > 1
    for layer in layers_of(model).values():
        for lora_A in layer.lora_A.values():
            identity = (lora_A.weight @ lora_A.weight.T).detach()
            torch.testing.assert_close(identity, torch.eye(len(identity)), rtol=0, atol=1e-4)
    config = model.peft_config["default"]
    assert config.init_lora_weights is True and config.eva_config is None
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny_llama(torch.bfloat16), tmp_path)
    torch.testing.assert_close(logits(loaded), logits(model))


def test_eva_leaves_padding_out_and_drops_layers():
    model = add_lora(tiny_llama())
    padded = {key: torch.cat([value, value[:1].expand(3, -1)]) for key, value in BATCHES[0].items()}
    mask = torch.ones_like(padded["input_ids"])
    mask[4:] = 0
    twin = copy.deepcopy(model)
    peftkern.initialize_(model, "eva", batches=[{**padded, "attention_mask": mask}])
    plain = {**BATCHES[0], "attention_mask": mask[:4]}
    peftkern.initialize_(twin, "eva", batches=[plain])
    assert model.peft_config["default"].rank_pattern == twin.peft_config["default"].rank_pattern
    for one, other in zip(layers_of(model).values(), layers_of(twin).values(), strict=True):
        mine, there = one.lora_A["default"].weight, other.lora_A["default"].weight
        assert torch.linalg.svdvals(mine @ there.T).min() > 0.99
    few = add_lora(tiny_llama(), r=1)
    report = peftkern.initialize_(few, "eva", batches=BATCHES)
    dropped = set(report.skipped)
    assert dropped and len(layers_of(few)) == len(report.layers) == 14 - len(dropped)
    assert all(why.startswith("no direction") for why in report.skipped.values())


def test_the_report_can_be_printed_and_kept():
    report = peftkern.initialize_(lora_net(make_linear()), "pissa")
    record = json.loads(json.dumps(report.as_dict()))
    (layer,) = record["layers"]
    assert layer["name"] == "proj" and layer["shape"] == [96, 64] and layer["rank"] == 4
    assert 0 < layer["energy"] < 1 and 0 <= layer["certificate"] < 1e-3
    line = str(report)
    assert line.startswith("pissa: 1 layers, energy kept ") and "excess error at most" in line
    assert line.endswith(", of each with probability 0.999")


def broken(weight: float) -> PeftModel:
    model = lora_net(make_linear())
    layer_of(model).get_base_layer().weight.data[0, 0] = weight
    return model


def two_adapters() -> PeftModel:
    model = lora_net(make_linear())
    model.add_adapter("other", LoraConfig(target_modules=["proj"]))
    return model


def merged() -> PeftModel:
    model = lora_net(make_linear())
    model.merge_adapter()
    return model


def patched() -> PeftModel:
    model = lora_net(make_linear())
    peftkern.patch(model)
    return model


REFUSED = [
    (lambda: lora_net(make_linear()), {"method": "svd"}, "method: expected one of"),
    (lambda: lora_net(make_linear()), {"rank": 0}, "rank: expected an integer of at least 1"),
    (lambda: lora_net(make_linear()), {"rank": 65}, r"proj: rank: expected 1 to 64, .* got 65"),
    (lambda: lora_net(make_linear()), {"method": "lora_ga", "rank": 33, "batches": [1]},
     r"proj: rank: expected 1 to 32, half the smaller side of \[96, 64\], got 33"),
    (lambda: lora_net(make_linear()), {"rank": 3, "tol": 0}, "tol: expected a positive number"),
    (lambda: lora_net(make_linear()), {"rank": 3, "certify": 1}, "certify: expected True or False"),
    (lambda: lora_net(make_linear()), {"rank": 3, "seed": -1}, "seed: expected an integer of at"),
    (lambda: lora_net(make_linear()), {"steps": 0}, "steps: expected an integer of at least 1"),
    (lambda: lora_net(make_linear()), {"method": "eva"}, "batches: expected a list of batches"),
    (lambda: lora_net(make_linear()), {"method": "corda", "batches": []},
     "batches: expected at least one, got none"),
    (lambda: lora_net(make_linear()), {"batches": [1]}, "batches: expected None: 'pissa' needs no"),
    (lambda: lora_net(make_linear()), {"adapter_name": "b"},
     r"adapter_name: expected LoRA's of \['default'\], got 'b'"),
    (lambda: lora_net(make_linear()), {"weights": {"proj.weight": torch.ones(96, 64)}},
     "weights: expected those of layers in 4 bits"),
    (lambda: lora_net(make_linear4bit()), {"method": "loftq"},
     "proj: weights: expected what the base in 4 bits was quantized from"),
    (lambda: lora_net(make_linear4bit()), {"weights": {"proj.weight": torch.ones(64, 96)}},
     r"proj: weights: expected a tensor of shape \[96, 64\], got"),
    (lambda: lora_net(make_linear4bit(quant_type="fp4")), {}, "proj: quant_type: expected 'nf4'"),
    (lambda: lora_net(make_linear()), {"lora_config": LoraConfig()}, "lora_config: expected None"),
    (lambda: lora_net(make_linear(), lora_alpha=0), {}, "proj: scaling: expected a finite number"),
    (lambda: broken(float("nan")), {}, "proj: weight: expected finite values, got NaN or Inf"),
    (lambda: broken(float("inf")), {"method": "olora"}, "proj: weight: expected finite values"),
    (two_adapters, {}, r"model: expected one adapter, got \['default', 'other'\]"),
    (merged, {}, "proj: its adapters are merged"),
    (patched, {}, "model: expected one that is not patched yet"),
]  # fmt: skip


@pytest.mark.parametrize(("make", "arguments", "complaint"), REFUSED, ids=[c for *_, c in REFUSED])
def test_what_does_not_fit_is_named_and_changes_nothing(make, arguments, complaint):
    model = make()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    method = arguments.get("method", "pissa")
    options = {key: value for key, value in arguments.items() if key != "method"}
    with pytest.raises(ValueError, match=complaint) as caught:
        peftkern.initialize_(model, method, **options)
    assert "\n" not in str(caught.value)
    after = model.state_dict()
    for name, value in before.items():
        torch.testing.assert_close(after[name], value, rtol=0, atol=0, equal_nan=True)


def test_a_plain_model_stays_plain_where_its_adapters_cannot_start():
    net = Net(make_linear().requires_grad_())
    config = LoraConfig(r=40, target_modules=["proj"])
    with pytest.raises(ValueError, match="proj: rank: expected 1 to 32, half"):
        peftkern.initialize_(net, "lora_ga", config, batches=[torch.ones(2, 64)])
    assert type(net.proj) is nn.Linear and not hasattr(net, "peft_config")
    assert net.proj.weight.requires_grad


@pytest.mark.parametrize(
    ("config", "options", "complaint"),
    [
        (AdaLoraConfig(total_step=9, target_modules=["proj"]), {}, "lora_config: expected a Lora"),
        (LoraConfig(target_modules=["proj"], corda_config=CordaConfig(corda_method="kpm")), {},
         "corda_method: expected 'ipm', got 'kpm'"),
        (LoraConfig(target_modules=["proj"]), {"tol": -1.0}, "tol: expected a positive number"),
        (LoraConfig(target_modules=["other"]), {}, "other"),
    ],
)  # fmt: skip
def test_a_config_that_does_not_fit_changes_no_plain_model(config, options, complaint):
    net = Net(make_linear().requires_grad_())
    with pytest.raises(ValueError, match=complaint):
        peftkern.initialize_(net, "corda", config, batches=[torch.ones(2, 64)], **options)
    assert type(net.proj) is nn.Linear and not hasattr(net, "peft_config")
    assert net.proj.weight.requires_grad


def test_batches_that_do_not_run_change_nothing():
    model = lora_net(make_linear())
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(RuntimeError):
        peftkern.initialize_(model, "corda", rank=7, batches=[torch.ones(2, 63)])
    assert model.peft_config["default"].r == 4
    after = model.state_dict()
    assert all(torch.equal(value, after[name]) for name, value in before.items())


@pytest.mark.parametrize("model", [None, make_conv1d(), Net(make_linear())])
def test_what_is_no_model_of_peft(model):
    with pytest.raises(TypeError, match="model: expected a"):
        peftkern.initialize_(model, "pissa")


def test_a_loss_that_is_missing_or_reaches_nothing():
    model = lora_net(make_linear())
    with pytest.raises(ValueError, match=r"loss: expected a function of \(model, batch\)"):
        peftkern.initialize_(model, "lora_ga", batches=[torch.ones(2, 64)])
    fixed = torch.ones((), requires_grad=True)
    with pytest.raises(ValueError, match="proj: loss: expected to depend on it"):
        peftkern.initialize_(
            model, "lora_ga", batches=[torch.ones(2, 64)], loss=lambda m, b: +fixed
        )
    peftkern.initialize_(
        model, "lora_ga", batches=[torch.ones(2, 64)], loss=lambda m, b: m(b).square().sum()
    )


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
