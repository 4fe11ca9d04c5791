"""`peftkern.initialize_` from data: statistics in bounded memory, EVA's ranks and inputs."""

from __future__ import annotations

import copy
import weakref

import pytest
import torch
from peft import EvaConfig, LoraConfig, PeftModel, get_peft_model
from peft_models import (
    add_lora,
    layer_of,
    lora_net,
    make_linear,
    tiny_llama,
)
from started_models import BATCHES, layers_of, logits, update_of
from torch import Tensor, nn

import peftkern
from peftkern.integrations.peft.init_data import counted_rows
from peftkern.methods.initialization.from_data import Covariance


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


@pytest.mark.parametrize(
    ("labels", "of_three", "of_two"),
    [([5, -100], [0, 1], [0]), ([5, -100, 6], [0], [0, 1]), (None, [0, 1], [0, 1])],
)
def test_rows_of_an_encoder_and_of_its_decoder_count_by_their_own_masks(labels, of_three, of_two):
    batch = {"attention_mask": torch.tensor([[1, 1, 0]])}
    if labels is not None:
        batch["labels"] = torch.tensor([labels])
    rows = counted_rows(batch, -100)
    for length, expected in ((3, of_three), (2, of_two), (4, [0, 1, 2, 3])):
        assert rows(torch.arange(length)[None, :, None]).flatten().tolist() == expected
        assert rows(torch.arange(length)[:, None]).flatten().tolist() == expected  # of all texts


class Branches(nn.Module):
    """Layers of which `off` runs, but the loss does not depend on it, and `far` does not run."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.used, self.off, self.far = (nn.Linear(16, 16) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        return self.used(x) + 0 * self.off(x).detach()


@pytest.mark.parametrize("size", [1, 4 << 30])  # groups without a gradient, or one with
def test_lora_ga_leaves_layers_without_a_gradient_at_their_default_start(size):
    config = LoraConfig(r=2, target_modules=["used", "off", "far"])
    torch.manual_seed(1)
    model = get_peft_model(Branches(), config)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    data = {"batches": [torch.randn(8, 16)], "loss": lambda m, b: m(b).square().sum()}
    with pytest.warns(UserWarning, match="lora_ga: no gradient reaches off, far: left at") as said:
        report = peftkern.initialize_(model, "lora_ga", statistics_bytes=size, **data)
    assert len(said) == 1 and [layer.name for layer in report.layers] == ["used"]
    assert report.skipped == dict.fromkeys(("off", "far"), "the loss does not depend on it")
    changed = {n for n, value in model.state_dict().items() if not torch.equal(before[n], value)}
    assert changed and all(".used." in name for name in changed)


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
