"""`peftkern quantize --format`: FP4 as bitsandbytes reads it, gpt-oss in MXFP4 as transformers
does, linear layers in MXFP4, NVFP4 and INT4 as `BlockLinearConfig` does."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from bitsandbytes.nn import Linear4bit
from checkpoint_folders import load_tensors, save_llama, save_moe
from peft import LoraConfig, get_peft_model
from quantized_folders import convert
from torch import nn
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

import peftkern
from peftkern.formats.block_weight import BlockWeight
from peftkern.formats.nf4 import NF4Weight
from peftkern.integrations.transformers import BlockLinearConfig, MXFP4ExpertsConfig
from peftkern.layers import BlockLinear
from peftkern.layers.expert_stack import stacks_of
from peftkern.tools.checkpoints.checkpoint import CheckpointError

BLOCKS = {"mxfp4": None, "nvfp4": None, "int4": 32}  # format: blocksize that is asked for
QUANTIZE = {
    "mxfp4": peftkern.quantize_mxfp4,
    "nvfp4": peftkern.quantize_nvfp4,
    "int4": lambda weight: peftkern.quantize_int4(weight, blocksize=32),
}
IDS = torch.arange(12)[None]
UP = "model.layers.1.mlp.up_proj"


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_llama(tmp_path_factory.mktemp("dense") / "llama")


def load(folder: Path, **options: object) -> nn.Module:
    return AutoModelForCausalLM.from_pretrained(folder, **options)


def dequantized(folder: Path, model: nn.Module) -> nn.Module:
    """The dense model with the values that the layers of another one have."""
    dense = load(folder)
    for name, module in model.named_modules():
        if isinstance(module, BlockLinear):
            dense.get_submodule(name).weight = module.to_linear().weight
    return dense


@pytest.mark.parametrize("format", BLOCKS)
def test_block_formats_are_written_read_trained_over_and_saved(tmp_path, llama, format):
    out = tmp_path / "out"
    convert(llama, out, format=format, blocksize=BLOCKS[format], shard_bytes=30_000)
    written, source = load_tensors(out), load_tensors(llama)
    expected = QUANTIZE[format](source[f"{UP}.weight"]).state_dict(f"{UP}.")
    assert len(expected) == {"mxfp4": 2, "nvfp4": 3, "int4": 3}[format]
    for key, value in expected.items():
        assert written[key].dtype is value.dtype and torch.equal(written[key], value)
    assert torch.equal(written["lm_head.weight"], source["lm_head.weight"])

    model = load(out, dtype=torch.float32)
    layer = model.get_submodule(UP)
    assert type(layer) is BlockLinear and layer.quantized_weight.format == format
    assert not any(p.is_meta or p.requires_grad for p in layer.parameters())
    torch.testing.assert_close(model(IDS).logits, dequantized(llama, model).float()(IDS).logits)

    net = get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj", "up_proj"]))
    assert peftkern.patch(net).falling_back == {}
    net(IDS, labels=IDS).loss.backward()
    trained = [p for p in net.parameters() if p.requires_grad]
    assert trained and all(p.grad is not None for p in trained)
    peftkern.unpatch(net)

    load(out).save_pretrained(tmp_path / "again")
    again = load_tensors(tmp_path / "again")
    assert set(again) == set(written) and all(torch.equal(again[k], written[k]) for k in again)
    configs = [json.loads((f / "config.json").read_text()) for f in (out, tmp_path / "again")]
    assert configs[0]["quantization_config"] == configs[1]["quantization_config"]


def test_a_dense_checkpoint_is_quantized_while_it_is_read(llama):
    model = load(llama, quantization_config=BlockLinearConfig("int4", 32))
    w = model.get_submodule(UP).quantized_weight
    expected = QUANTIZE["int4"](load_tensors(llama)[f"{UP}.weight"])
    assert all(torch.equal(a, b) for a, b in zip(w.tensors, expected.tensors, strict=True))
    assert type(model.lm_head) is nn.Linear
    dense = model.dequantize()
    assert type(dense.get_submodule(UP)) is nn.Linear
    assert torch.equal(dense.get_submodule(UP).weight, peftkern.dequantize(w))


def test_fp4_is_bitsandbytes(tmp_path, llama):
    convert(llama, tmp_path / "out", format="fp4")
    layer = load(tmp_path / "out").get_submodule(UP)
    assert type(layer) is Linear4bit and layer.weight.quant_type == "fp4"
    dense = load_tensors(llama)[f"{UP}.weight"]
    w = NF4Weight.from_bitsandbytes(layer.weight)
    expected = peftkern.quantize_fp4(dense)
    assert all(torch.equal(a, b) for a, b in zip(w.tensors, expected.tensors, strict=True))


def test_gpt_oss_in_mxfp4_is_what_openai_ships(tmp_path):
    save_moe(tmp_path / "dense", "gpt_oss")
    summary = convert(tmp_path / "dense", tmp_path / "out", format="mxfp4")
    assert 0 < summary.largest_error < 0.2
    written, source = load_tensors(tmp_path / "out"), load_tensors(tmp_path / "dense")
    for name in ("gate_up_proj", "down_proj"):
        key = f"model.layers.0.mlp.experts.{name}"
        E, K, N = source[key].shape
        assert written[f"{key}_blocks"].shape == (E, N, K // 32, 16)
        assert written[f"{key}_scales"].shape == (E, N, K // 32)
        of_one = peftkern.quantize_mxfp4(source[key][1].T.contiguous())
        assert torch.equal(written[f"{key}_blocks"][1].view(-1), of_one.packed)
        assert torch.equal(written[f"{key}_scales"][1].view(-1), of_one.scale)
    config = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert config["quant_method"] == "mxfp4" and "lm_head" in config["modules_to_not_convert"]
    theirs = load(tmp_path / "out")  # in bf16, as transformers has it without its kernels
    ours = load(tmp_path / "out", config=MXFP4ExpertsConfig.of_checkpoint(tmp_path / "out"))
    experts = [model.model.layers[0].mlp.experts for model in (ours, theirs)]
    for name, stack in stacks_of(experts[0]).items():
        assert torch.equal(stack.dequantize(), getattr(experts[1], name))
    assert len(stacks_of(experts[0])) == 2


def test_layers_whose_rows_are_no_whole_blocks_stay(tmp_path):
    save_llama(tmp_path / "dense", hidden_size=64, intermediate_size=72)
    convert(tmp_path / "dense", tmp_path / "out", format="mxfp4")
    mlp = load(tmp_path / "out").model.layers[0].mlp
    assert type(mlp.down_proj) is nn.Linear and type(mlp.up_proj) is BlockLinear
    with pytest.raises(CheckpointError, match=r"q_proj are no whole blocks of 128 values"):
        convert(tmp_path / "dense", tmp_path / "none", format="int4")
    with pytest.raises(CheckpointError, match="blocksize: expected 16 in nvfp4"):
        convert(tmp_path / "dense", tmp_path / "none", format="nvfp4", blocksize=32)


def test_conv1d_is_turned(tmp_path):
    torch.manual_seed(0)
    model = GPT2LMHeadModel(
        GPT2Config(vocab_size=32, n_positions=16, n_embd=32, n_layer=1, n_head=2)
    )
    model.save_pretrained(tmp_path / "dense")
    convert(tmp_path / "dense", tmp_path / "out", format="nvfp4")
    layer = load(tmp_path / "out").transformer.h[0].mlp.c_fc
    expected = peftkern.quantize_nvfp4(
        model.transformer.h[0].mlp.c_fc.weight.detach().T.contiguous()
    )
    assert type(layer) is BlockLinear and torch.equal(layer.weight.view(-1), expected.packed)
    read = load(tmp_path / "dense", quantization_config=BlockLinearConfig("nvfp4"))
    assert torch.equal(read.transformer.h[0].mlp.c_fc.weight, layer.weight)


def test_what_no_config_describes_is_not_saved(tmp_path, llama):
    model = load(llama, quantization_config=BlockLinearConfig("mxfp4"))
    w = peftkern.quantize_nvfp4(torch.randn(64, 64).bfloat16())
    assert isinstance(w, BlockWeight)
    model.model.layers[0].self_attn.q_proj = BlockLinear.from_weight(w)
    with pytest.raises(ValueError, match=r"q_proj is in nvfp4, 16, the model in mxfp4"):
        model.save_pretrained(tmp_path / "out")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [(("nf4",), "format: expected one of"), (("int4", 16), "blocksize: expected one of 32, ")],
)
def test_config_refuses(arguments, words):
    with pytest.raises(ValueError, match=words):
        BlockLinearConfig(*arguments)
