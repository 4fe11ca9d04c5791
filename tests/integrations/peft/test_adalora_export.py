"""AdaLoRA as plain LoRA: unpatched PEFT loads it, with the same outputs."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from adalora_models import adalora_llama, optimizer_of, quantize_4bit_
from adalora_runs import take_steps
from peft import AdaLoraConfig, LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import Linear as LoraLinear
from peft_models import TARGETS, add_lora, logits, tiny_llama
from safetensors.torch import load_file
from torch import nn

import peftkern
from peftkern.integrations.peft.adalora_compact import compact_
from peftkern.integrations.peft.adalora_steps import AdaLoraSteps

pytestmark = pytest.mark.usefixtures("one_thread")
TOTAL = 14
SCHEDULE = {"total_step": TOTAL, "tinit": 2, "tfinal": 4, "deltaT": 2}
OUTPUTS = {"rtol": 0, "atol": 1e-6}  # of logits of a few tenths


def trained(steps: int = TOTAL, **config) -> PeftModel:
    model = adalora_llama(**{**SCHEDULE, **config})
    optimizer = optimizer_of(model)
    allocation = AdaLoraSteps(model, optimizer, TOTAL)
    take_steps(model, optimizer, range(1, steps + 1))
    allocation.close()
    return model


# Before the first mask, between two (with what has revived), after the last; alpha of PEFT's r.
@pytest.mark.parametrize(
    ("steps", "config"), [(1, {}), (9, {}), (TOTAL, {}), (TOTAL, {"lora_alpha": -1})]
)
def test_unpatched_peft_loads_it(tmp_path: Path, steps: int, config: dict):
    model = trained(steps, **config)
    ranks = peftkern.export_lora(model, tmp_path)
    loaded = PeftModel.from_pretrained(tiny_llama(), str(tmp_path))
    layers = {n: m for n, m in loaded.base_model.model.named_modules() if isinstance(m, LoraLinear)}
    assert {n: m.r["default"] for n, m in layers.items()} == {n: r for n, r in ranks.items() if r}
    assert {m.scaling["default"] for m in layers.values()} == {1.0}
    torch.testing.assert_close(logits(loaded), logits(model), **OUTPUTS)
    assert (logits(loaded) - logits(tiny_llama())).abs().max() > 1e-4 or steps == 1
    if steps == TOTAL:
        assert sum(ranks.values()) == 28 and 0 in ranks.values() and len(set(ranks.values())) > 2
    said = json.loads((tmp_path / "adapter_config.json").read_text())
    assert said["peft_type"] == "LORA" and said["rank_pattern"] == said["alpha_pattern"]
    assert said["r"] == said["lora_alpha"]


def test_unpatched_peft_loads_ranks_of_zero_as_adalora(tmp_path: Path):
    """Those that PEFT itself has saved; ours are the same bytes."""
    model = trained()
    expected = logits(model)
    model.save_pretrained(str(tmp_path))
    loaded = PeftModel.from_pretrained(tiny_llama(), str(tmp_path))
    torch.testing.assert_close(logits(loaded), expected, **OUTPUTS)


def test_compacted_and_16_bit_models(tmp_path: Path):
    model = trained()
    expected = peftkern.export_lora(model, tmp_path / "whole")
    compact_(model)
    assert peftkern.export_lora(model, tmp_path / "compacted") == expected
    whole, compacted = (
        load_file(tmp_path / name / "adapter_model.safetensors") for name in ("whole", "compacted")
    )
    assert whole.keys() == compacted.keys()
    assert all(torch.equal(whole[key], compacted[key]) for key in whole)
    for parameter in model.parameters():
        parameter.data = parameter.data.bfloat16().float()
    expected = logits(model)
    for name, parameter in model.named_parameters():
        if "lora_A" in name or "lora_B" in name:
            parameter.data = parameter.data.bfloat16()
    peftkern.export_lora(model, tmp_path / "half")
    base = tiny_llama()
    for parameter in base.parameters():
        parameter.data = parameter.data.bfloat16().float()
    loaded = PeftModel.from_pretrained(base, str(tmp_path / "half"))
    torch.testing.assert_close(logits(loaded), expected, **OUTPUTS)


def test_over_a_4_bit_base(tmp_path: Path):
    base = quantize_4bit_(tiny_llama())
    model = trained(nf4=True)
    peftkern.export_lora(model, tmp_path)
    loaded = PeftModel.from_pretrained(base, str(tmp_path))
    peftkern.patch(loaded)  # the base in one arithmetic: bitsandbytes' for inference is another
    torch.testing.assert_close(logits(loaded), logits(model), **OUTPUTS)


class Net(nn.Module):
    """A convolution, a layer whose name ends another's, and a head that is trained whole."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.conv, self.proj = nn.Conv2d(3, 8, 3), nn.Linear(8, 4)
        self.inner, self.head = nn.ModuleDict({"proj": nn.Linear(4, 4)}), nn.Linear(4, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.inner["proj"](self.proj(self.conv(x).mean((2, 3)))))


@pytest.mark.parametrize("cut", ["inner.proj", ".proj", "conv"])
def test_convolutions_heads_and_names_that_end_alike(tmp_path: Path, cut: str):
    config = AdaLoraConfig(
        target_modules=["conv", "proj"], modules_to_save=["head"], total_step=9, init_r=4
    )
    model = get_peft_model(Net(), config)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter)
        if "lora_E" in name and f"model.{cut}" in name.replace("model.proj", "model..proj"):
            parameter.data[:3] = 0
    ranks = peftkern.export_lora(model, tmp_path)
    assert ranks == {**dict.fromkeys(["conv", "proj", "inner.proj"], 4), cut.lstrip("."): 1}
    x = torch.randn(2, 3, 6, 6)
    loaded = PeftModel.from_pretrained(Net(), str(tmp_path))
    y = model(x)
    atol = 1e-6 * y.abs().max().item()  # of the largest: small ones are sums that cancel
    torch.testing.assert_close(loaded(x), y, rtol=1e-5, atol=atol)
    layers = {name: loaded.base_model.model.get_submodule(name) for name in ranks}
    assert {name: layer.r["default"] for name, layer in layers.items()} == ranks


def test_what_cannot_be_exported(tmp_path: Path):
    with pytest.raises(ValueError, match="expected a PeftModel with an AdaLoRA adapter"):
        peftkern.export_lora(add_lora(tiny_llama(), target_modules=TARGETS), tmp_path)
    model = adalora_llama()
    with pytest.raises(ValueError, match="all triplets of 'default' are zero"):
        peftkern.export_lora(model, tmp_path)
    with pytest.raises(ValueError, match=r"adapter_name: 'other' is not one of \['default'\]"):
        peftkern.export_lora(model, tmp_path, "other")


def filled_net() -> PeftModel:
    model = get_peft_model(Net(), AdaLoraConfig(target_modules=["proj"], total_step=9))
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            nn.init.normal_(parameter)
    return model


def test_a_failed_export_leaves_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    model, folder = filled_net(), tmp_path / "a"
    peftkern.export_lora(model, folder)
    before = {file.name: file.read_bytes() for file in folder.iterdir()}
    for parameter in model.parameters():
        parameter.data.mul_(2)

    def full_disk(*args: object) -> None:
        raise OSError("no space left")

    with monkeypatch.context() as patches:
        patches.setattr(LoraConfig, "save_pretrained", full_disk)
        with pytest.raises(OSError, match="no space left"):
            peftkern.export_lora(model, folder)
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == before
    assert list(tmp_path.iterdir()) == [folder]
    peftkern.export_lora(model, folder)
    assert {file.name: file.read_bytes() for file in folder.iterdir()} != before


def test_a_checkpoint_of_adalora_is_not_mixed_with_its_export(tmp_path: Path):
    model = filled_net()
    model.save_pretrained(str(tmp_path))
    with pytest.raises(ValueError, match=r"one of a LoRA adapter, holds .*peft_type ADALORA"):
        peftkern.export_lora(model, tmp_path)
    (tmp_path / "adapter_config.json").unlink()
    (tmp_path / "adalora_state.safetensors").touch()
    with pytest.raises(ValueError, match=r"holds adalora_state\.safetensors"):
        peftkern.export_lora(model, tmp_path)
