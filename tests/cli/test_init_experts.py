"""`peftkern init` over fused experts, which files hold one by one or in a stack of all."""

from __future__ import annotations

import itertools
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_folders import changing, contents, load_tensors, save_characters, save_moe
from command_line import refused, told, told_json
from peft import LoraConfig, PeftModel
from peft.tuners.lora.layer import ParamWrapper
from torch import Tensor
from transformers import AutoModelForCausalLM

import peftkern
from peftkern.layers.nf4_stack import NF4Stack
from peftkern.tools.initialize.starts import Starts

IDS = torch.arange(12)[None]
EXPERTS = ["experts.gate_up_proj", "experts.down_proj"]
TARGETS = [word for name in ("q_proj", *EXPERTS) for word in ("--target", name)]


def logits(model: torch.nn.Module) -> Tensor:
    with torch.no_grad():
        return model(IDS).logits.float()


def largest_error(got: Tensor, expected: Tensor) -> float:
    """Of an expert, relative."""
    errors = (got - expected).flatten(1).norm(dim=1) / expected.flatten(1).norm(dim=1)
    return errors.max().item()


@pytest.fixture(scope="module", params=["qwen3_moe", "mixtral", "gpt_oss"])
def source(request, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("init") / request.param
    save_moe(folder, request.param, torch.float32)
    return folder


@pytest.mark.parametrize("method", ["pissa", "olora"])
def test_experts_start_as_those_of_a_model_in_memory(source, tmp_path, capsys, method):
    destination = tmp_path / "dst"
    options = ("--rank", 4, "--alpha", 6, "--shard-size", "30KB", *TARGETS)
    said = told(capsys, "init", method, source, destination, *options)
    assert f"{method}: 6 layers, energy kept " in said and "4 of " in said
    base = AutoModelForCausalLM.from_pretrained(destination)
    model = PeftModel.from_pretrained(base, destination / "adapter")
    expected = logits(AutoModelForCausalLM.from_pretrained(source))
    torch.testing.assert_close(logits(model), expected, rtol=1e-3, atol=1e-4)
    assert set(load_tensors(destination)) == set(load_tensors(source))

    twin = AutoModelForCausalLM.from_pretrained(source)
    config = LoraConfig(r=4, lora_alpha=6, target_modules=["q_proj"], target_parameters=EXPERTS)
    other = peftkern.initialize_(twin, method, config).model
    assert sorted(model.peft_config["default"].target_parameters) == sorted(EXPERTS)
    for name, value in other.state_dict().items():
        torch.testing.assert_close(model.state_dict()[name], value, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("source", ["qwen3_moe"], indirect=True)
def test_texts_start_experts(source, tmp_path, capsys):
    folder, texts = shutil.copytree(source, tmp_path / "src"), tmp_path / "texts.txt"
    save_characters(folder)
    texts.write_text("thequickbrownfox\njumpsoverthelazydog\n")
    options = ("--rank", 4, "--alpha", 4, "--data", texts, *TARGETS)
    assert "eva: " in told(capsys, "init", "eva", folder, tmp_path / "dst", *options)
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "dst")
    model = PeftModel.from_pretrained(base, tmp_path / "dst" / "adapter")
    expected = logits(AutoModelForCausalLM.from_pretrained(source))
    torch.testing.assert_close(logits(model), expected)
    wrappers = [module for module in model.modules() if isinstance(module, ParamWrapper)]
    assert len(wrappers) == 4
    for wrapper in wrappers:  # what reads of each expert that has a token is orthonormal
        A = wrapper.lora_A["default"].weight.unflatten(0, (wrapper.num_experts, -1)).detach()
        errors = (A @ A.mT - torch.eye(A.shape[1])).abs().amax((1, 2))
        assert errors.min() < 1e-4


@pytest.mark.parametrize("source", ["qwen3_moe", "gpt_oss"], indirect=True)
@pytest.mark.parametrize("method", ["qpissa", "loftq"])
def test_stacks_in_nf4_are_closer_than_nf4_alone(source, tmp_path, capsys, method):
    """Of gpt-oss they are kept transposed."""
    options = ("--rank", 8, "--alpha", 6, *TARGETS[2:])
    record = told_json(capsys, "init", method, source, tmp_path / "dst", *options)
    layers = {one["name"]: one for one in record["layers"]}
    dense = AutoModelForCausalLM.from_pretrained(source)
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "dst")
    model = PeftModel.from_pretrained(base, tmp_path / "dst" / "adapter")
    for path, wrapper in model.named_modules():
        if not isinstance(wrapper, ParamWrapper):
            continue
        path = path.removeprefix("base_model.model.").replace(".base_layer", "")
        name = f"{path}.{wrapper.parameter_name}"
        layer, weight = layers.pop(name), dense.get_parameter(name).detach()
        whole = wrapper.get_param().dequantize() + wrapper.get_delta_weight("default").detach()
        alone = NF4Stack.from_dense(weight).dequantize()
        assert layer["error"] == pytest.approx(largest_error(whole, weight), rel=1e-3)
        assert layer["error"] < largest_error(alone, weight) and layer["matrices"] == 4
    assert layers == {}


@pytest.mark.parametrize("source", ["mixtral"], indirect=True)
def test_a_stopped_run_goes_on_and_ends_with_the_same_files(source, tmp_path, capsys, monkeypatch):
    """In the middle of the experts of a parameter, where a file has few of them."""
    options = ("--rank", 4, "--shard-size", "30KB", *TARGETS)
    whole = told(capsys, "init", "pissa", source, tmp_path / "whole", *options)
    work, calls = Starts.keep, itertools.count(1)

    def stop(*arguments: Any) -> None:
        if next(calls) == 3:
            raise KeyboardInterrupt
        work(*arguments)

    monkeypatch.setattr(Starts, "keep", stop)
    command = ("init", "pissa", source, tmp_path / "stopped", *options)
    told(capsys, *command, status=130)
    assert told(capsys, *command).splitlines()[:-1] == whole.splitlines()[:-1]
    whole, again = contents(tmp_path / "whole"), contents(tmp_path / "stopped")
    for files in (whole, again):  # which names the folder
        del files["adapter/adapter_config.json"]
    assert whole == again


@pytest.mark.parametrize("source", ["mixtral"], indirect=True)
def test_what_cannot_start_experts_is_one_line(source, tmp_path, capfd):
    texts = tmp_path / "texts.txt"
    texts.write_text("text\n")
    destination = tmp_path / "dst"
    command = ("init", "corda", source, destination, *TARGETS, "--data", texts)
    accepted = "pissa, olora, qpissa, loftq, eva"
    complaint = f"experts.gate_up_proj: expected one of {accepted} to start experts, got corda"
    refused(capfd, complaint, *command)
    command = ("init", "pissa", source, destination, "--target")
    refused(capfd, "no linear layer is called 'experts.up'; there are ", *command, "experts.up")
    rank = (EXPERTS[1], "--rank", "999")
    refused(capfd, "experts.down_proj: rank: expected 1 to ", *command, *rank)
    assert not (tmp_path / "dst").exists()


def test_one_expert_that_is_not_finite_is_named(tmp_path, capfd):

    for family, name, where in (
        ("qwen3_moe", "experts.2.up_proj.weight", "experts.2.gate_proj.weight"),
        ("gpt_oss", "experts.down_proj", "experts.down_proj[2]"),
    ):
        source = tmp_path / family
        save_moe(source, family, torch.float32)
        with changing(source / "model.safetensors") as tensors:
            weight = tensors[f"model.layers.1.mlp.{name}"]
            (weight[2] if weight.dim() == 3 else weight)[3, 5] = float("nan")
        command = ("init", "pissa", source, tmp_path / "dst", "--rank", "4", *TARGETS)
        refused(capfd, f"{where}: weight: expected finite values, got NaN or Inf", *command)


@pytest.mark.parametrize("method", ["pissa", "loftq", "eva"])
def test_experts_after_a_gap_in_their_numbers(tmp_path, capfd, method):
    """There are as many as the model has."""
    folder, texts = tmp_path / "src", tmp_path / "texts.txt"
    save_moe(folder, "qwen3_moe")
    texts.write_text("text\n")
    with changing(folder / "model.safetensors") as tensors:
        for name in [name for name in tensors if ".experts.3." in name]:
            tensors[name.replace(".experts.3.", ".experts.4.")] = tensors.pop(name)
    data = ("--data", texts) if method == "eva" else ()
    complaint = "tensors of each of 4 experts, numbered from 0, got "
    for targets in (TARGETS, TARGETS[:2]):
        refused(capfd, complaint, "init", method, folder, tmp_path / "dst", *data, *targets)
    assert not (tmp_path / "dst").exists()
