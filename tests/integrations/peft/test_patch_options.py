"""include, exclude, dry_run and strict of `patch`; `is_patched` and `patched`."""

from __future__ import annotations

import pytest
import torch
from adalora_models import adalora_llama, quantize_4bit_
from expert_models import add_experts_lora, tiny_moe
from peft import LoraConfig, get_peft_model
from peft.tuners import lora
from peft_models import (
    TARGETS,
    K,
    add_lora,
    layer_of,
    lora_net,
    make_linear,
    make_linear4bit,
    served_by_us,
    text_batch,
    tiny_llama,
)
from torch import nn

import peftkern


def state_of(model: nn.Module) -> dict[str, tuple]:
    """All that `patch` may change: classes, own attributes, hooks, what is trained."""
    return {
        name: (
            type(module),
            {k: v for k, v in vars(module).items() if not k.startswith("_")},
            list(module._forward_hooks.values()),
            [parameter.requires_grad for parameter in module.parameters()],
        )
        for name, module in model.named_modules()
    }


def four_bit() -> nn.Module:
    return add_lora(quantize_4bit_(tiny_llama()), target_modules=["q_proj", "v_proj"])


def nf4_experts() -> nn.Module:
    model = tiny_moe("Qwen3Moe")
    peftkern.quantize_(model, include=["experts"])
    return add_experts_lora(model)


MODELS = [lambda: add_lora(tiny_llama()), adalora_llama, four_bit, nf4_experts]
every_model = pytest.mark.parametrize("make", MODELS)


def names_of(model: nn.Module, ending: str) -> list[str]:
    layers = (name for name, module in model.named_modules() if isinstance(module, lora.Linear))
    return [name for name in layers if name.endswith(ending)]


def test_include_and_exclude_read_names_as_quantize_does():
    model = add_lora(tiny_llama())
    report = peftkern.patch(model, include=["q_proj", "layers.1.mlp.up_proj"])
    expected = {*names_of(model, "q_proj"), *names_of(model, "1.mlp.up_proj")}
    assert set(report.patched) == expected and len(expected) == 3
    assert set(report.left_out.values()) == {"not in include"} and len(report.left_out) == 11
    assert "3 patched (lora.Linear 3), 0 skipped; left out: not in include 11" in str(report)
    peftkern.reset_stats()
    model(**text_batch())
    assert served_by_us() == 3
    more = peftkern.patch(model, include=["self_attn"], exclude=["k_proj", "v_proj"])
    assert set(more.patched) == {*expected, *names_of(model, "o_proj")}  # what is patched stays so
    assert more.left_out[names_of(model, "k_proj")[0]] == "in exclude"


@pytest.mark.parametrize("entry", ["proj", "_proj", "q_proj.lora", "layers.7"])
def test_an_entry_that_is_in_no_name_is_an_error_and_changes_nothing(entry):
    model = add_lora(tiny_llama())
    with pytest.raises(ValueError, match=f"include: no layer with an adapter has '{entry}'"):
        peftkern.patch(model, include=["q_proj", entry])
    assert not peftkern.is_patched(model)
    assert len(peftkern.patch(model, exclude=[entry]).patched) == 14


@pytest.mark.parametrize("argument", ["include", "exclude"])
def test_a_string_is_no_list_of_names(argument):
    with pytest.raises(TypeError, match=f"{argument}: expected names in a list"):
        peftkern.patch(lora_net(make_linear()), **{argument: "q_proj"})


def test_filters_hold_for_layers_of_bitsandbytes():
    model = four_bit()
    report = peftkern.patch(model, include=["layers.0"])
    kinds = {name: type(m) for name, m in model.named_modules() if hasattr(m, "quant_state")}
    ours = {name for name, kind in kinds.items() if kind.__module__.startswith("peftkern")}
    assert ours == {name for name in kinds if ".layers.0." in name} and ours != set(kinds)
    assert all(".layers.0." in name for name in report.without_adapter + report.patched)


def test_filters_that_leave_out_all_adalora_layers_leave_out_its_model():
    report = peftkern.patch(adalora_llama(), exclude=TARGETS)
    assert report.patched == [] and set(report.left_out.values()) == {"in exclude"}


@every_model
@pytest.mark.parametrize("options", [{}, {"include": ["layers.0"], "exclude": ["v_proj"]}])
def test_a_dry_run_tells_what_patch_does_and_changes_nothing(make, options):
    model = make()
    before = state_of(model)
    told = peftkern.patch(model, dry_run=True, **options)
    assert state_of(model) == before and not peftkern.is_patched(model)
    assert told.dry_run and " would be patched (" in str(told)
    done = peftkern.patch(model, **options)
    assert told.patched and peftkern.is_patched(model)
    assert told.as_dict() | {"dry_run": False} == done.as_dict()
    again = peftkern.patch(model, dry_run=True, **options)
    assert again.as_dict() == told.as_dict()


def mixed() -> nn.Module:
    """One layer that is served, one that has no kernel, one whose state sends it to PEFT."""
    net = nn.ModuleDict({"table": nn.Embedding(8, K), "proj": make_linear(), "odd": make_linear()})
    model = get_peft_model(net, LoraConfig(target_modules=["table", "proj", "odd"]))
    model.base_model.model.odd.base_layer.register_forward_hook(lambda *args: None)
    return model


def test_strict_names_what_would_not_be_served_and_changes_nothing():
    model = mixed()
    before = state_of(model)
    told = (
        r"strict: 2 layers with an adapter would not be served, and nothing was changed: "
        r"base_model.model.table \(lora.Embedding has no kernel\), "
        r"base_model.model.odd \(hooks on base_layer\)$"
    )
    with pytest.raises(ValueError, match=told):
        peftkern.patch(model, strict=True)
    with pytest.raises(ValueError, match="strict: 2 layers"):
        peftkern.patch(model, strict=True, dry_run=True)
    assert state_of(model) == before
    report = peftkern.patch(model, strict=True, exclude=["table", "odd"])
    assert report.patched == ["base_model.model.proj"] and peftkern.is_patched(model)
    assert len(peftkern.patch(model).patched) == 2


def test_strict_names_the_first_few():
    model = get_peft_model(
        nn.ModuleDict({str(i): nn.Embedding(8, K) for i in range(9)}),
        LoraConfig(target_modules=[str(i) for i in range(9)]),
    )
    with pytest.raises(ValueError, match=r"strict: 9 layers .* and 4 more$"):
        peftkern.patch(model, strict=True)


def test_strict_takes_a_weight_that_bitsandbytes_has_repacked():
    """`patch` puts it back, which a dry run must not do and has to know of."""
    model = lora_net(make_linear4bit())
    base = layer_of(model).base_layer
    if not base.support_avx512bf16_for_cpu:
        base.weight.quant_state.packing_format_for_cpu = True
        assert peftkern.patch(model, strict=True, dry_run=True).falling_back == {}
        return
    model.eval()
    with torch.no_grad():
        base(torch.randn(2, K))
    assert base.weight.quant_state.packing_format_for_cpu
    assert peftkern.patch(model, strict=True, dry_run=True).falling_back == {}
    with pytest.warns(UserWarning, match="had been repacked"):
        assert peftkern.patch(model, strict=True).falling_back == {}


def test_is_patched_takes_a_model_or_a_layer():
    model = lora_net(make_linear())
    layer = layer_of(model)
    assert not peftkern.is_patched(model) and not peftkern.is_patched(layer)
    peftkern.patch(model)
    assert peftkern.is_patched(model) and peftkern.is_patched(layer)
    assert not peftkern.is_patched(layer.base_layer)
    peftkern.unpatch(model)
    assert not peftkern.is_patched(model)
    with pytest.raises(TypeError, match=r"model: expected a torch\.nn\.Module, got str"):
        peftkern.is_patched("model")


PARTS = [(make, part) for make in MODELS for part in (None, "layers.0")]


@pytest.mark.parametrize(("make", "part"), [*PARTS, (nf4_experts, "base_layer")])
@pytest.mark.parametrize("fails", [False, True])
def test_a_with_block_restores_what_was_there(make, part, fails):
    model = make()
    if part is not None:
        assert peftkern.patch(model, include=[part]).patched
    before = state_of(model)
    try:
        with peftkern.patched(model) as report:
            assert report.patched and peftkern.is_patched(model)
            if fails:
                raise RuntimeError("in the middle")
    except RuntimeError as error:
        assert fails and str(error) == "in the middle"
    assert state_of(model) == before


def test_a_with_block_that_strict_refuses_changes_nothing():
    model = mixed()
    before = state_of(model)
    with pytest.raises(ValueError, match="strict"), peftkern.patched(model, strict=True):
        pytest.fail("the block is not entered")
    assert state_of(model) == before


def test_a_with_block_serves():
    model = add_lora(tiny_llama())
    peftkern.reset_stats()
    with peftkern.patched(model, exclude=["mlp"]):
        model(**text_batch())
    assert served_by_us() == 8
    model(**text_batch())
    assert served_by_us() == 8
