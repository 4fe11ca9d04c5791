"""What `peftkern.initialize_` refuses by name, with the model as it was."""

from __future__ import annotations

import pytest
import torch
from peft import (
    AdaLoraConfig,
    LoraConfig,
    PeftModel,
)
from peft.tuners.lora.config import CordaConfig
from peft_models import (
    Net,
    layer_of,
    lora_net,
    make_conv1d,
    make_linear,
    make_linear4bit,
)
from torch import nn

import peftkern


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
    (lambda: lora_net(make_linear()), {"lora_config": LoraConfig()}, "lora_config: expected None"),
    (lambda: lora_net(make_linear(), lora_alpha=0), {}, "proj: scaling: expected a number of 1"),
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
    with pytest.raises(ValueError, match="loss: expected to depend on a layer"):
        peftkern.initialize_(
            model, "lora_ga", batches=[torch.ones(2, 64)], loss=lambda m, b: +fixed
        )
    peftkern.initialize_(
        model, "lora_ga", batches=[torch.ones(2, 64)], loss=lambda m, b: m(b).square().sum()
    )
