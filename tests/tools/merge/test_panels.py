"""Panels of rows, threads and memory: none of them is seen in the bits."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from checkpoint_folders import contents, load_tensors, save_tensors
from merged_folders import (
    STACKS,
    assert_same_tensors,
    make_model,
    merge,
    merged_by_peft,
    save_adapter,
    save_base,
    save_both,
)
from peak_memory import growth

from peftkern.tools.adapters import Adapter, Update, read_adapter, write_adapter
from peftkern.tools.checkpoints.weights import Weight
from peftkern.tools.merge import tensors
from peftkern.tools.merge.edits import Edit
from peftkern.tools.merge.placement import Place
from peftkern.tools.merge.plan import Unit

GPT2 = {"family": "GPT2", "head": "LMHeadModel", "n_embd": 64, "n_layer": 2, "n_head": 4}
MOE = {"family": "Qwen3Moe", "num_experts": 4, "moe_intermediate_size": 64, "head_dim": 16}
LAYERS = ["q_proj", "down_proj", "embed_tokens"]
CUT = {
    "linear": ({}, {"target_modules": LAYERS}),
    "dora": ({}, {"target_modules": ["q_proj", "down_proj"], "use_dora": True}),
    "Conv1D": (GPT2, {"target_modules": ["c_attn", "c_proj"]}),
    "experts": (MOE, {"target_modules": [], "target_parameters": STACKS}),
    "stacks": (
        {"family": "GptOss", "num_local_experts": 4, "head_dim": 16},
        {"target_modules": [], "target_parameters": STACKS},
    ),
}


@pytest.mark.parametrize("case", CUT)
def test_small_panels_have_the_bits_of_the_whole(tmp_path: Path, monkeypatch, case: str) -> None:
    sizes, config = CUT[case]
    base, adapter = save_both(tmp_path, make_model(**sizes), **config)
    monkeypatch.setattr(tensors, "_PANEL", 1 << 10)  # 16 rows of 64
    merge(base, adapter, to=tmp_path / "out")
    expected = merged_by_peft(base, adapter, tmp_path / "peft")
    assert_same_tensors(load_tensors(tmp_path / "out"), expected)


@pytest.mark.parametrize("rank", [16, 64, 500])
def test_layers_of_many_panels(tmp_path: Path, rank: int) -> None:
    """Whose products are large enough for a library to cut them itself; any number of threads."""
    model = make_model(
        hidden_size=512, intermediate_size=1400, num_hidden_layers=1, vocab_size=1000
    )
    base, adapter = save_both(tmp_path, model, target_modules=LAYERS, r=rank)
    expected = merged_by_peft(base, adapter, tmp_path / "peft")
    before = torch.get_num_threads()
    for threads in (1, 3):
        torch.set_num_threads(threads)
        merge(base, adapter, to=tmp_path / f"out{threads}")
        assert torch.get_num_threads() == threads
        assert_same_tensors(load_tensors(tmp_path / f"out{threads}"), expected)
    torch.set_num_threads(before)
    assert contents(tmp_path / "out1") == contents(tmp_path / "out3")


def test_several_adapters_are_added_up_before_the_one_rounding(tmp_path: Path) -> None:
    model = make_model()
    base = save_base(tmp_path / "base", model)
    one = save_adapter(tmp_path / "one", model, target_modules=["q_proj", "up_proj"])
    two = save_adapter(tmp_path / "two", model, seed=6, r=7, target_modules=["q_proj"])
    merge(base, (one, 0.7), (two, -1.5), to=tmp_path / "out")
    got, expected = load_tensors(tmp_path / "out"), load_tensors(base)
    for path, weight in ((one, 0.7), (two, -1.5)):
        for module, update in read_adapter(path).updates.items():
            name = f"{module}.weight"
            delta = update.lora_B.double() @ update.lora_A.double() * update.scaling * weight
            expected[name] = expected[name].double() + delta
    for name, tensor in expected.items():
        if tensor.dtype is torch.float64:  # one rounding: at most the next value of 8 bits
            torch.testing.assert_close(got[name].double(), tensor, rtol=2**-8, atol=2**-20)
            exact = got[name] == tensor.to(torch.bfloat16)
            assert exact.float().mean() > 0.999
        else:
            assert torch.equal(got[name], tensor)


@pytest.mark.parametrize("rows", [1, 16, 17, 31, 32, 40, 95, 96])
def test_no_panel_has_few_rows(monkeypatch, rows: int) -> None:
    """But of a tensor that has no more: some libraries sum such products in another order."""
    monkeypatch.setattr(tensors, "_PANEL", 1 << 10)  # 16 rows of 64
    unit = Unit("a", Weight("a", torch.bfloat16, (rows, 64), ()), ())
    cuts = [(panel.first, panel.last) for panel in tensors.panels(unit)]
    assert [0, *(last for _, last in cuts)] == [*(first for first, _ in cuts), rows]
    assert min(last - first for first, last in cuts) >= min(rows, 16)
    assert max(last - first for first, last in cuts) < 32


def test_total_counts_all_merged_values(tmp_path: Path, monkeypatch) -> None:
    """Of a layer of which one panel in many is compared as much as of a small one."""
    model = make_model(intermediate_size=2048, num_hidden_layers=1)
    base, adapter = save_both(tmp_path, model, target_modules=["q_proj", "up_proj"])
    expected = merge(base, adapter, to=tmp_path / "whole").total
    assert expected.values == expected.merged == (64 + 2048) * 64
    monkeypatch.setattr(tensors, "_PANEL", 1 << 10)
    found = merge(base, adapter, to=tmp_path / "out").total
    assert found.values < found.merged == expected.merged
    assert found.update == pytest.approx(expected.update, rel=0.3)
    assert found.total == pytest.approx(expected.total, rel=0.1)


def test_a_tensor_whose_merged_rows_come_late_is_measured(monkeypatch) -> None:
    """After 40 panels of rows that stay, as in a tensor of several parameters."""
    monkeypatch.setattr(tensors, "_PANEL", 1 << 10)
    update = Update("a", "weight", "linear", torch.ones(2, 64), torch.ones(32, 2), 1.0)
    edits = ((Place("a.weight", 32, at=656), Edit(updates=[(update, 1.0)])),)
    weight = Weight("a", torch.bfloat16, (688, 64), ())
    found = list(tensors.panels(Unit("a", weight, (), edits)))
    assert [(p.block.at, p.measured) for p in found if p.added is not None] == [
        (656, True),
        (656, False),
    ]


def test_peak_memory_is_that_of_panels(tmp_path: Path) -> None:
    """For a table of 134 MB a few buffers of two threads, and the adapter in float32."""
    tables = {"vocab_size": 131072, "hidden_size": 512, "num_hidden_layers": 1}
    with torch.device("meta"):
        model = make_model(**tables)
    shapes = {name: value.shape for name, value in model.named_parameters()}
    tensors = {name: torch.zeros(shape, dtype=torch.bfloat16) for name, shape in shapes.items()}
    largest = max(tensor.nbytes for tensor in tensors.values())
    assert largest == 131072 * 512 * 2
    save_tensors(tmp_path / "base", {"model.safetensors": tensors})
    del tensors
    model.config.architectures = ["LlamaForCausalLM"]
    model.config.save_pretrained(tmp_path / "base")
    update = Update("model.embed_tokens", "weight", "embedding",
                    torch.randn(2, 131072), torch.randn(512, 2), 1.0)  # fmt: skip
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "target_modules": ["embed_tokens"]}
    write_adapter(Adapter(config, {update.module: update}), tmp_path / "adapter")
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    merge(tmp_path / "base", tmp_path / "adapter", to=tmp_path / "warm")
    again = growth(lambda: merge(tmp_path / "base", tmp_path / "adapter", to=tmp_path / "out"))
    torch.set_num_threads(before)
    assert again < largest / 4
