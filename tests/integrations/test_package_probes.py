"""What doctor says of experts in other packages, where they have the defect and where not."""

from __future__ import annotations

import peft
import pytest
import torch
from checkpoint_folders import save_moe
from peft.tuners.lora.layer import ParamWrapper
from transformers import PreTrainedModel
from transformers.quantizers.quantizer_bnb_4bit import Bnb4BitHfQuantizer

from peftkern.integrations import package_probes as probes


def told(probe) -> list[str]:
    """What one probe says, through the table: nothing if its defect is absent."""
    (name,) = [name for name, rows in probes.PROBES.items() if probe in [row[0] for row in rows]]
    *_, answer = [one for one in probes.answers(name) if one[0] == probe.__name__]
    assert (answer[1], bool(answer[2]), "peftkern" in answer[3]) in (
        ("present", True, True),
        ("absent", False, False),
    )
    return [answer[2]] if answer[1] == "present" else []


def test_a_mixture_that_is_made_wide_is_told(tmp_path, monkeypatch):
    model = save_moe(tmp_path, "qwen3_moe")
    model.is_loaded_in_4bit = True
    before = model.get_memory_footprint()
    peft.prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
    wide = model.get_memory_footprint() > 1.9 * before
    assert [line.startswith("makes the experts") for line in told(probes.wide_experts)] == [
        True
    ] * wide
    monkeypatch.setattr(peft, "prepare_model_for_kbit_training", lambda model, **options: model)
    assert told(probes.wide_experts) == []


def test_quantized_parameters_that_do_not_train_or_merge_are_told(monkeypatch):
    """With the first defect mended the second one shows."""
    said = told(probes.parametrized_experts)
    assert len(said) <= 1

    def remove_last(self) -> None:
        del self.get_base_layer().parametrizations[self.parameter_name][-1]

    monkeypatch.setattr(ParamWrapper, "_remove_parametrizations", remove_last)
    mended = told(probes.parametrized_experts)
    assert mended in ([], ["loses the adapter of quantized experts in merge_adapter, silently"])
    monkeypatch.setattr(peft.PeftModel, "merge_adapter", lambda self: None, raising=False)
    assert told(probes.parametrized_experts) == []


def test_experts_that_stay_dense_are_told(monkeypatch):
    needed = Bnb4BitHfQuantizer.param_needs_quantization
    monkeypatch.setattr(
        Bnb4BitHfQuantizer, "param_needs_quantization", lambda self, *args, **options: False
    )
    (what,) = told(probes.dense_experts)
    assert what == "leaves the experts of a mixture in 16 bits with load_in_4bit"

    def all_needed(self, model: torch.nn.Module, name: str, **options) -> bool:
        return "experts" in name or needed(self, model, name, **options)

    monkeypatch.setattr(Bnb4BitHfQuantizer, "param_needs_quantization", all_needed)
    assert told(probes.dense_experts) == []


@pytest.mark.parametrize("error", [None, "Undefined"])
def test_experts_that_are_not_saved_are_told(monkeypatch, error):
    def save(self, folder: str) -> None:
        if error is not None:
            raise ValueError(error)

    monkeypatch.setattr(PreTrainedModel, "save_pretrained", save)
    said = told(probes.unsaved_experts)
    assert said == [] if error is None else said[0].endswith(": 'Undefined'")


def test_a_probe_that_cannot_be_run_is_unknown(monkeypatch):
    """And says why; the others answer."""

    def no_gradient():
        raise RuntimeError("no such\nthing")

    def never():
        raise AssertionError("its module is not here")

    rows = (
        (no_gradient, (), "cure"),
        (never, ("no_such_module",), "cure"),
        (never, ("torch.no_such_module", "torch"), "cure"),
        (lambda: "goes wrong", ("torch.nn",), "cure"),
    )
    monkeypatch.setattr(probes, "PROBES", {"torch": rows})
    told = list(probes.answers("torch"))
    assert [one[1:3] for one in told[::2]] == [("unknown", None)] * 4  # until they end
    assert [one[1:] for one in told[1::2]] == [
        ("unknown", "RuntimeError: no such\nthing", ""),
        ("absent", "", ""),
        ("absent", "", ""),
        ("present", "goes wrong", "cure"),
    ]
    assert list(probes.answers("numpy")) == []
