"""`peftkern init`, `ranks` and `adapter` over bases in 4 bits, stacks of experts among them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from checkpoint_folders import config_of, configure, load_tensors, save_characters
from command_line import refused, told, told_json
from decoded_folders import decode, dense_values, mixture_in_4_bits
from merged_folders import (
    assert_same_tensors,
    load,
    make_model,
    merged_by_peft,
    save_adapter,
    save_base,
)
from merged_folders import mixture as dense_mixture
from peft import PeftModel
from quantized_folders import convert
from torch import Tensor

NAMES = ["o_proj", "experts.gate_up_proj", "experts.down_proj"]
TARGETS = [word for name in NAMES for word in ("--target", name)]
KINDS = [("Qwen3Moe", "nf4"), ("GptOss", "nf4"), ("GptOss", "mxfp4")]


def whole(folder: Path) -> dict[str, Tensor]:
    """The values of a checkpoint, and the tensors of its adapter."""
    return dense_values(load(folder)) | load_tensors(folder / "adapter")


@pytest.fixture(scope="module", params=KINDS, ids="-".join)
def mixture(request, tmp_path_factory) -> tuple[Path, ...]:
    """A mixture in 4 bits, the same decoded, and an adapter of it."""
    return mixture_in_4_bits(tmp_path_factory.mktemp("mixture"), *request.param)


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory) -> tuple[Path, Path]:
    """A model whose layers are Conv1D, in NF4, and the same decoded."""
    folder = tmp_path_factory.mktemp("gpt2")
    base = save_base(folder / "base", make_model("GPT2", "LMHeadModel", num_hidden_layers=1))
    convert(base, folder / "stored")
    return folder / "stored", decode(folder / "stored", base, folder / "decoded")


@pytest.mark.parametrize("method", ["pissa", "olora", "qpissa"])
def test_experts_start_as_those_of_the_decoded_base(mixture, tmp_path, capsys, method):
    stored, decoded, _ = mixture
    for name, base in (("got", stored), ("expected", decoded)):
        told(capsys, "init", method, base, tmp_path / name, "--rank", 4, "--alpha", 6, *TARGETS)
    assert_same_tensors(whole(tmp_path / "got"), whole(tmp_path / "expected"))
    assert config_of(tmp_path / "got") == config_of(tmp_path / "expected")


def test_base_and_update_are_the_weights_in_4_bits(mixture, tmp_path, capsys):
    stored, _, _ = mixture
    dst = tmp_path / "dst"
    told(capsys, "init", "pissa", stored, dst, "--rank", 4, *TARGETS)
    merged_by_peft(dst, dst / "adapter", tmp_path / "merged")
    folders = (stored, dst, tmp_path / "merged")
    expected, alone, whole = (dense_values(load(folder)) for folder in folders)
    names = [name for name in expected if name.removesuffix(".weight").endswith(tuple(NAMES))]
    assert len(names) == len(NAMES)
    for name in names:
        norm = expected[name].float().norm()
        assert (whole[name].float() - expected[name].float()).norm() < 2**-7 * norm  # of 16 bits
        assert (alone[name].float() - expected[name].float()).norm() > 0.1 * norm


@pytest.mark.parametrize("method", ["pissa", "qpissa"])
def test_layers_that_are_kept_transposed(gpt2, tmp_path, capsys, method):
    stored, decoded = gpt2
    for name, base in (("got", stored), ("expected", decoded)):
        told(capsys, "init", method, base, tmp_path / name, "--rank", 4)
    assert_same_tensors(whole(tmp_path / "got"), whole(tmp_path / "expected"))
    configs = [tmp_path / name / "adapter" / "adapter_config.json" for name in ("got", "expected")]
    got, expected = (json.loads(path.read_text()) for path in configs)
    assert got["fan_in_fan_out"] == expected["fan_in_fan_out"] == (method == "pissa")


def test_ranks_are_those_of_the_decoded_base(mixture, tmp_path, capsys):
    stored, decoded, _ = mixture
    options = ["--rank", 4, "--cost", "parameters", *TARGETS]
    got, expected = (told_json(capsys, "ranks", base, *options) for base in (stored, decoded))
    assert got["layers"] == expected["layers"] and got["config"] == expected["config"]
    values = dense_values(load(stored))
    layers = {layer["name"]: layer for layer in got["layers"]}
    for name in NAMES[1:]:
        name = f"model.layers.0.mlp.{name}"
        S = torch.linalg.svdvals(values[name].double()).square().sum(0).sqrt()[:8]
        assert layers[name]["S"] == pytest.approx(S.tolist(), rel=1e-4)
        assert layers[name]["experts"] == 4


def test_an_adapter_is_verified(mixture, tmp_path, capfd):
    stored, decoded, adapter = mixture
    said = told(capfd, "adapter", "verify", adapter, "--base", stored)
    assert "has a weight of the right shape for all 3 updates" in said
    family = config_of(stored)["architectures"][0].removesuffix("ForCausalLM")
    _, wrong = dense_mixture(tmp_path, family, hidden_size=128)
    said = told(capfd, "adapter", "verify", wrong, "--base", stored, status=1)
    assert "FAILED: base: " in said
    assert said == told(capfd, "adapter", "verify", wrong, "--base", decoded, status=1)


def test_dora_becomes_lora_by_a_base_in_4_bits(gpt2, tmp_path, capsys):
    stored, decoded = gpt2
    targets = {"target_modules": ["c_attn", "c_proj"], "use_dora": True, "fan_in_fan_out": True}
    adapter = save_adapter(tmp_path / "adapter", load(decoded), **targets)
    for name, base in (("got", stored), ("expected", decoded)):
        how = ("--to", "lora", "--base", base, "--rank", 8)
        told(capsys, "adapter", "convert", adapter, tmp_path / name, *how)
    got, expected = (load_tensors(tmp_path / name) for name in ("got", "expected"))
    assert_same_tensors(got, expected)


def test_what_loftq_would_start_at_zero_is_refused(gpt2, tmp_path, capfd):
    """Of a base on the points of NF4 nothing is lost in NF4, and zeros do not train."""
    complaint = "c_attn: loftq starts from what NF4 loses of a weight, and this one is in nf4"
    refused(capfd, complaint, "init", "loftq", gpt2[0], tmp_path / "dst")
    assert not (tmp_path / "dst").exists()


def test_an_adapter_is_extracted(gpt2, tmp_path, capsys):
    stored, decoded = gpt2
    model = load(decoded)
    with torch.no_grad():
        model.transformer.h[0].attn.c_attn.weight += 0.1 * torch.randn(64, 2) @ torch.randn(2, 192)
        model.transformer.ln_f.weight += 1
    save_base(tmp_path / "tuned", model)
    options = ("--rank", 2)
    for name, base in (("got", stored), ("expected", decoded)):
        record = told_json(
            capsys, "adapter", "extract", base, tmp_path / "tuned", tmp_path / name, *options
        )
        assert [key.rpartition(".")[2] for key in record["updates"]] == ["c_attn"]
        assert len(record["carried"]) == 2  # the norm, weight and bias
    got, expected = (load_tensors(tmp_path / name) for name in ("got", "expected"))
    assert_same_tensors(got, expected)


def test_what_is_quantized_otherwise_is_no_side_of_an_extraction(gpt2, tmp_path, capfd):
    stored, decoded = gpt2
    other = shutil.copytree(decoded, tmp_path / "other")
    configure(other, quantization_config={"quant_method": "gptq"})
    for base, tuned in ((other, stored), (stored, other)):
        command = ("adapter", "extract", base, tuned, tmp_path / "dst")
        refused(capfd, "got quant_method 'gptq'", *command)
    assert not (tmp_path / "dst").exists()


@pytest.mark.parametrize("method", ["eva", "corda", "lora_ga"])
@pytest.mark.parametrize("format", ["nf4", "int4"])
def test_texts_start_layers_of_a_base_in_4_bits(tmp_path, capsys, method, format):
    """As those of a model in memory; what is left of a weight is quantized as it was."""
    base, texts = save_base(tmp_path / "base", make_model(num_hidden_layers=1)), tmp_path / "t.txt"
    save_characters(base)
    convert(base, tmp_path / "stored", format=format, blocksize=32)
    texts.write_text("thequickbrownfox\njumpsoverthelazydog\n")
    options = ("--rank", 4, "--alpha", 6, "--data", texts, "--target", "q_proj")
    record = told_json(capsys, "init", method, tmp_path / "stored", tmp_path / "dst", *options)
    assert [layer["name"] for layer in record["layers"]] == ["model.layers.0.self_attn.q_proj"]
    weights, alone = (dense_values(load(tmp_path / name)) for name in ("stored", "dst"))
    names = {name for name in weights if method == "eva" or "q_proj" not in name}
    assert_same_tensors(*({name: one[name] for name in names} for one in (alone, weights)))
    assert load_tensors(tmp_path / "dst").keys() == load_tensors(tmp_path / "stored").keys()
    adapted = PeftModel.from_pretrained(load(tmp_path / "dst"), tmp_path / "dst" / "adapter")
    layer = adapted.get_submodule("base_model.model.model.layers.0.self_attn.q_proj")
    before, after = (
        one["model.layers.0.self_attn.q_proj.weight"].float() for one in (weights, alone)
    )
    update = layer.get_delta_weight("default").float()
    error = (after + update - before).norm() / before.norm()
    assert layer.lora_A["default"].weight.any() and error < 0.15
    if method != "eva":
        assert update.any() and error < record["layers"][0]["error"] + 2**-8  # of 16 bits


@pytest.mark.parametrize("mixture", KINDS[:2], indirect=True)
def test_texts_start_experts_in_4_bits(mixture, tmp_path, capsys):
    stored, texts = shutil.copytree(mixture[0], tmp_path / "stored"), tmp_path / "texts.txt"
    save_characters(stored)
    texts.write_text("thequickbrownfox\njumpsoverthelazydog\n")
    options = ("--rank", 4, "--data", texts, *TARGETS)
    record = told_json(capsys, "init", "eva", stored, tmp_path / "dst", *options)
    assert {layer["name"].rpartition("mlp.")[2] for layer in record["layers"]} > {*NAMES[1:]}
    assert_same_tensors(*(dense_values(load(one)) for one in (tmp_path / "dst", stored)))
    adapter = load_tensors(tmp_path / "dst" / "adapter")
    A = [value for name, value in adapter.items() if "experts" in name and "lora_A" in name]
    assert len(A) == 2 and all(value.any() for value in A)
    complaint = "experts.gate_up_proj: expected one of pissa, olora, qpissa, loftq, eva to start"
    refused(capsys, complaint, "init", "corda", stored, tmp_path / "other", *options)
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize("mixture", KINDS[2:], indirect=True)
def test_texts_do_not_start_a_model_that_cannot_be_saved(mixture, tmp_path, capfd):
    (tmp_path / "texts.txt").write_text("thequickbrownfox\n")
    for method in ("eva", "corda", "lora_ga"):
        command = ("init", method, mixture[0], tmp_path / "dst", "--data", tmp_path / "texts.txt")
        complaint = f"_proj: {method} loads the whole model and saves it, and experts in MXFP4"
        refused(capfd, complaint, *command)
    assert not (tmp_path / "dst").exists()


def test_texts_start_layers_that_a_dense_model_keeps_transposed(gpt2, tmp_path, capsys):
    stored, texts = shutil.copytree(gpt2[0], tmp_path / "stored"), tmp_path / "texts.txt"
    save_characters(stored)
    texts.write_text("thequickbrownfox\n")
    told(capsys, "init", "eva", stored, tmp_path / "dst", "--rank", 4, "--data", texts)
    config = json.loads((tmp_path / "dst" / "adapter" / "adapter_config.json").read_text())
    assert not config["fan_in_fan_out"]
    PeftModel.from_pretrained(load(tmp_path / "dst"), tmp_path / "dst" / "adapter")
