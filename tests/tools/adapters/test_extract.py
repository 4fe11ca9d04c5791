"""`extract`: planted updates found in fine-tunes of float32 and bf16, PEFT loading the result."""

from __future__ import annotations

import copy
import math
from pathlib import Path

import pytest
import torch
from checkpoint_folders import save_llama, save_moe
from peft import PeftModel
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

import peftkern
from peftkern.formats.table import NUMBERS
from peftkern.tools.adapters import Adapter, AdapterError, write_adapter
from peftkern.tools.adapters.extract import ExtractRule, extract
from peftkern.tools.adapters.noise import dense_rounding, noise_edge, quantized_rounding
from peftkern.tools.checkpoints.checkpoint import CheckpointError
from peftkern.tools.checkpoints.four_bit import FourBit

IDS = torch.arange(20)[None]
PLANTED = 3


def planted(shape: tuple[int, ...], size: float) -> Tensor:
    """An update of rank PLANTED, whose singular values are about equal."""
    m, n = shape
    left, right = (torch.linalg.qr(torch.randn(k, PLANTED))[0] for k in (m, n))
    return size * (left @ right.T)


def tune(folder: Path, target: Path, size: float = 1.0, others: bool = True) -> nn.Module:
    """Save a fine-tune of a model: low rank in its matrices, and other norms."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
    torch.manual_seed(11)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 2 and "norm" not in name:
                weight = parameter.float()
                parameter.copy_(weight + planted(weight.shape, size * weight.norm().item() / 10))
            elif others:
                parameter.mul_(1.25)
    model.save_pretrained(target, max_shard_size="40KB")
    return model


def loaded(base: Path, adapter: Adapter, folder: Path) -> PeftModel:
    write_adapter(adapter, folder)
    return PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(base, dtype="auto"), folder
    )


def test_a_planted_update_is_found_whole(tmp_path):
    base = save_llama(tmp_path / "base", torch.float32, sharded=True)
    model = tune(base, tmp_path / "tuned")
    done = []
    found, layers = extract(base, tmp_path / "tuned", progress=lambda size, name: done.append(size))
    assert sum(done) == sum(p.numel() * 4 for p in model.parameters())
    assert {update.rank for update in found.updates.values()} == {PLANTED}
    assert found.updates["model.embed_tokens"].kind == "embedding"
    assert "model.norm" in found.config["modules_to_save"]
    for one in layers.values():
        assert one.loss.error < 1e-3 and one.change == pytest.approx(0.1 * math.sqrt(3), rel=0.05)
    peft = loaded(base, found, tmp_path / "adapter").eval()
    with torch.no_grad():
        torch.testing.assert_close(peft(IDS).logits, model(IDS).logits, rtol=1e-3, atol=1e-4)
        merged = peft.merge_and_unload()
        torch.testing.assert_close(merged(IDS).logits, model(IDS).logits, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    ("rule", "ranks"),
    [
        (ExtractRule("rank", 2), {2}),
        (ExtractRule("energy", 0.99), {PLANTED}),
        (ExtractRule("energy", 0.5), {2}),
        (ExtractRule("noise", most=1), {1}),
        (ExtractRule("energy", 0.99, most=2), {2}),
    ],
)
def test_rules(rule, ranks, tmp_path):
    base = save_llama(tmp_path / "base", torch.float32)
    tune(base, tmp_path / "tuned")
    found, layers = extract(base, tmp_path / "tuned", rule)
    assert {update.rank for update in found.updates.values()} == ranks
    for key, one in layers.items():
        assert one.loss.kept == found.updates[key].rank
        kept = min(1.0, one.loss.kept / PLANTED)  # of equal values
        assert 1 - one.loss.share == pytest.approx(kept, abs=0.02)


def test_the_edge_of_noise_finds_what_was_planted_below_the_rounding(tmp_path):
    """In bf16 the rounding is a fifth of a difference of 0.9% of the weight."""
    base = save_llama(tmp_path / "base", hidden_size=256, intermediate_size=512, head_dim=64)
    tune(base, tmp_path / "tuned", 0.05, others=False)
    found, layers = extract(base, tmp_path / "tuned")
    for key, update in found.updates.items():
        if min(update.size) >= 256:
            assert update.rank == PLANTED, (key, layers[key])
    greedy, _ = extract(base, tmp_path / "tuned", ExtractRule("energy", 0.99))
    assert min(u.rank for u in greedy.updates.values() if min(u.size) >= 256) > 10 * PLANTED


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_edge_is_the_largest_value_of_the_rounding(dtype):
    weight = torch.randn(400, 300)
    rounding = weight.to(dtype).float() - weight
    edge = noise_edge(dense_rounding(weight.to(dtype)), (400, 300))
    assert torch.linalg.svdvals(rounding)[0].item() == pytest.approx(edge, rel=0.1)


@pytest.mark.parametrize("format", NUMBERS)
def test_the_edge_is_the_largest_value_of_the_rounding_to_4_bits(format):
    """Or above it, by little: it errs towards what is noise."""
    weight = 0.02 * torch.randn(400, 384)
    stored = FourBit.of(format, nested=True).quantize(weight)
    top = torch.linalg.svdvals(peftkern.dequantize(stored) - weight)[0].item()
    assert 0.95 < noise_edge(quantized_rounding(stored), (400, 384)) / top < 1.2


def test_what_did_not_change_is_left_out_and_biases_are_carried(tmp_path):
    base = save_llama(tmp_path / "base", torch.float32, attention_bias=True, mlp_bias=True)
    model = AutoModelForCausalLM.from_pretrained(base)
    first = model.model.layers[0]
    with torch.no_grad():
        first.self_attn.q_proj.weight += planted((64, 64), 1.0)
        first.self_attn.q_proj.bias += 0.5
        first.mlp.up_proj.bias += 0.5
    model.save_pretrained(tmp_path / "tuned")
    found, _ = extract(base, tmp_path / "tuned")
    assert list(found.updates) == ["model.layers.0.self_attn.q_proj"]
    assert len(found.extras) == 2 and not found.config["modules_to_save"]
    peft = loaded(base, found, tmp_path / "adapter").eval()
    torch.testing.assert_close(peft(IDS).logits, model(IDS).logits, rtol=1e-3, atol=1e-4)


def test_tied_embeddings_are_carried_whole(tmp_path):
    base = save_llama(tmp_path / "base", torch.float32, tie_word_embeddings=True)
    model = tune(base, tmp_path / "tuned")
    found, _ = extract(base, tmp_path / "tuned")
    assert {"model.embed_tokens", "lm_head"} <= set(found.config["modules_to_save"])
    peft = loaded(base, found, tmp_path / "adapter").eval()
    torch.testing.assert_close(peft(IDS).logits, model(IDS).logits, rtol=1e-3, atol=1e-4)


def test_conv1d(tmp_path):
    torch.manual_seed(1)
    sizes = {"n_embd": 32, "n_layer": 1, "n_head": 2, "vocab_size": 48, "n_positions": 24}
    GPT2LMHeadModel(GPT2Config(**sizes)).save_pretrained(tmp_path / "base")
    model = tune(tmp_path / "base", tmp_path / "tuned").eval()
    found, _ = extract(tmp_path / "base", tmp_path / "tuned")
    assert found.updates["transformer.h.0.attn.c_attn"].size == (96, 32)
    peft = loaded(tmp_path / "base", found, tmp_path / "adapter").eval()
    torch.testing.assert_close(peft(IDS).logits, model(IDS).logits, rtol=1e-3, atol=1e-4)


def test_refusals(tmp_path):
    base = save_llama(tmp_path / "base")
    same = save_llama(tmp_path / "same")
    with pytest.raises(AdapterError, match="same: no matrix of a layer differs from"):
        extract(base, same)
    save_llama(tmp_path / "wide", vocab_size=50)
    with pytest.raises(AdapterError, match=r"expected \[48, 64\], got \[50, 64\]"):
        extract(base, tmp_path / "wide")
    save_llama(tmp_path / "deep", num_hidden_layers=3)
    with pytest.raises(AdapterError, match=r"layers\.2\.\S+: missing, the other checkpoint has it"):
        extract(base, tmp_path / "deep")
    with pytest.raises(CheckpointError, match="no: expected a folder"):
        extract(base, tmp_path / "no")
    model = AutoModelForCausalLM.from_pretrained(base, dtype="auto")
    broken = copy.deepcopy(model)
    with torch.no_grad():
        broken.model.layers[1].mlp.up_proj.weight[0, 0] = torch.nan
    broken.save_pretrained(tmp_path / "broken")
    with pytest.raises(AdapterError, match=r"layers\.1\.mlp\.up_proj\.weight: .*NaN"):
        extract(base, tmp_path / "broken")


def test_a_file_that_changes_while_it_is_read_is_named(tmp_path):
    base, done = save_llama(tmp_path / "base", torch.float32), []
    tune(base, tmp_path / "tuned")

    def cut_off(nbytes: int, name: str) -> None:
        done.append(name)
        for file in (tmp_path / "tuned").glob("*.safetensors"):
            file.write_bytes(b"")

    with pytest.raises(CheckpointError, match=r"tuned/model-.*\.safetensors: changed while it was"):
        extract(base, tmp_path / "tuned", progress=cut_off)
    assert len(done) == 1


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss"])
def test_experts_one_by_one_and_stacked(family, tmp_path):
    model = save_moe(tmp_path / "base", family, torch.float32)
    torch.manual_seed(2)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "experts" in name and parameter.dim() == 3:
                for matrix in parameter[1:]:  # the first expert stays
                    matrix += planted(matrix.shape, 1.0)
    model.save_pretrained(tmp_path / "tuned")
    found, layers = extract(tmp_path / "base", tmp_path / "tuned")
    for key, update in found.updates.items():
        assert update.kind == "experts" and update.rank == PLANTED
        assert layers[key].loss.error < 1e-3 and not update.lora_B[0].any()
    merged = loaded(tmp_path / "base", found, tmp_path / "adapter").merge_and_unload()
    for name, want in model.state_dict().items():
        torch.testing.assert_close(merged.state_dict()[name], want, rtol=1e-3, atol=1e-4)


def test_what_an_adapter_has_no_place_for_is_told(tmp_path):
    """Sinks and biases of gpt-oss lie in modules that hold layers with updates."""
    model = save_moe(tmp_path / "base", "gpt_oss", torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.01 * torch.randn_like(parameter)
    model.save_pretrained(tmp_path / "tuned")
    found, _ = extract(tmp_path / "base", tmp_path / "tuned")
    told = {note.partition(":")[0].rpartition(".")[2] for note in found.notes}
    assert told == {"sinks", "gate_up_proj_bias", "down_proj_bias"}
    merged = loaded(tmp_path / "base", found, tmp_path / "adapter").merge_and_unload()
    assert torch.equal(merged.model.norm.weight, model.model.norm.weight)


def test_other_dtypes_are_refused_if_they_changed(tmp_path):
    base = save_llama(tmp_path / "base", torch.float64)
    model = AutoModelForCausalLM.from_pretrained(base, dtype="auto")
    with torch.no_grad():
        model.lm_head.weight += 1
    model.save_pretrained(tmp_path / "tuned")
    with pytest.raises(
        AdapterError, match=r"lm_head\.weight: expected F32, F16 or BF16, got torch.float64"
    ):
        extract(base, tmp_path / "tuned")
