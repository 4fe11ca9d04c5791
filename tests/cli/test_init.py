"""`peftkern init` as a user meets it: what it prints, what it leaves, what PEFT makes of that."""

from __future__ import annotations

import itertools
import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from checkpoint_folders import LLAMA, changing, contents, load_tensors, save_characters, save_llama
from command_line import refused, told, told_json
from merged_folders import make_model, save_base
from peft import PeftModel
from torch import Tensor
from transformers import AutoModelForCausalLM

from peftkern.cli import main
from peftkern.methods.initialization.factors import pissa
from peftkern.methods.initialization.loftq import Storage
from peftkern.tools.checkpoints import staging
from peftkern.tools.initialize.request import Request, Target
from peftkern.tools.initialize.starts import Starts
from peftkern.tools.quantize import quantized_checkpoint

IDS = torch.arange(12)[None]


def logits(model: torch.nn.Module) -> Tensor:
    with torch.no_grad():
        return model(IDS).logits.float()


def loaded(folder: Path) -> PeftModel:
    base = AutoModelForCausalLM.from_pretrained(folder)
    return PeftModel.from_pretrained(base, folder / "adapter", is_trainable=True)


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    """A checkpoint in several files, with a tokenizer of single characters."""
    folder = save_llama(tmp_path_factory.mktemp("init") / "src", torch.float32, sharded=True)
    save_characters(folder)
    return folder


@pytest.mark.parametrize("method", ["pissa", "olora"])
def test_base_and_adapter_compute_what_the_source_does(source, tmp_path, capsys, method):
    destination = tmp_path / "dst"
    options = ("--rank", 4, "--alpha", 6, "--rslora", "--shard-size", "30KB")
    lines = told(capsys, "init", method, source, destination, *options).splitlines()
    assert "energy kept" in lines[0] and "excess" in lines[0]
    assert sum("_proj" in line for line in lines) == 14
    assert lines[-1] == f"{destination}: written, the adapter in {destination / 'adapter'}"
    assert lines[-2].startswith(f"{method}: 14 layers, energy kept ")
    model = loaded(destination)
    assert model.peft_config["default"].target_modules == {
        *("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    }
    expected = logits(AutoModelForCausalLM.from_pretrained(source))
    torch.testing.assert_close(logits(model), expected, rtol=1e-3, atol=1e-4)
    changed = logits(AutoModelForCausalLM.from_pretrained(destination))
    assert (changed - expected).norm() > 1e-2 * expected.norm()
    name = "model.layers.1.mlp.up_proj.weight"
    if method == "pissa":
        (factors,) = pissa([load_tensors(source)[name]], 4, 3.0)
        saved = load_tensors(destination / "adapter")
        key = "base_model.model.model.layers.1.mlp.up_proj.lora_B.weight"
        torch.testing.assert_close(saved[key], factors.lora_B)


@pytest.mark.parametrize("method", ["qpissa", "loftq"])
def test_a_base_in_4_bits_is_closer_than_nf4_alone(source, tmp_path, capsys, method):
    destination = tmp_path / "dst"
    options = ("--rank", 8, "--alpha", 16, "--no-double-quant")
    record = told_json(capsys, "init", method, source, destination, *options)
    assert record["method"] == method and len(record["layers"]) == 14
    nf4 = tmp_path / "nf4"
    told(capsys, "quantize", source, nf4, "--no-double-quant")
    expected = logits(AutoModelForCausalLM.from_pretrained(source))
    plain = logits(AutoModelForCausalLM.from_pretrained(nf4).train())
    got = logits(loaded(destination).train())  # bitsandbytes repacks weights to evaluate them
    assert (got - expected).norm() < (plain - expected).norm()
    assert all(0 < layer["error"] < 0.09 for layer in record["layers"])


def test_weights_that_are_kept_transposed(tmp_path, capsys):
    sizes = {"num_hidden_layers": 1, "dtype": torch.float32}
    save_base(tmp_path / "src", make_model("GPT2", "LMHeadModel", **sizes))
    expected = logits(AutoModelForCausalLM.from_pretrained(tmp_path / "src"))
    for method in ("pissa", "qpissa"):
        destination = tmp_path / method
        told(capsys, "init", method, tmp_path / "src", destination, "--rank", 4)
        limit = 1e-4 if method == "pissa" else 0.3
        assert (logits(loaded(destination)) - expected).norm() <= limit * expected.norm()


@pytest.mark.parametrize("method", ["corda", "eva", "lora_ga", "lora-ga"])
def test_texts_start_adapters(source, tmp_path, capsys, recwarn, method):
    texts = tmp_path / "texts.txt"
    texts.write_text("thequickbrownfox\n\nx\njumpsoverthelazydog\n")
    destination = tmp_path / "dst"
    options = ("--rank", 4, "--data", texts, "--target", "q_proj", "--target", "down_proj")
    said = told(capsys, "init", method, source, destination, *options)
    assert f"{method.replace('-', '_')}: " in said
    assert not [w for w in recwarn if "config file" in str(w.message)]
    expected = logits(AutoModelForCausalLM.from_pretrained(source))
    torch.testing.assert_close(logits(loaded(destination)), expected, rtol=1e-3, atol=1e-4)
    assert (destination / "tokenizer.json").exists()
    config = json.loads((destination / "adapter" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(destination)
    assert config["init_lora_weights"] is True and config["eva_config"] is None


@pytest.mark.parametrize(
    ("owner", "function", "count"),
    [
        (quantized_checkpoint, "_write_file", 4),
        (Starts, "keep", 3),  # a file is written, and what was found of it is not
        (staging, "replace_json", 5),  # both are, and neither is noted
        (Starts, "complete", 1),
        (staging, "publish", 1),
    ],
)
def test_a_stopped_run_goes_on_and_ends_with_the_same_files(
    source, tmp_path, capsys, monkeypatch, owner, function, count
):
    options = ("--rank", 4, "--shard-size", "30KB")
    told(capsys, "init", "pissa", source, tmp_path / "whole", *options)
    work, calls = getattr(owner, function), itertools.count(1)

    def stop(*arguments: Any, **keywords: Any) -> Any:
        if next(calls) == count:
            raise KeyboardInterrupt
        return work(*arguments, **keywords)

    monkeypatch.setattr(owner, function, stop)
    destination = tmp_path / "stopped"
    command = ("init", "pissa", source, destination)
    assert main([*map(str, (*command, *options))]) == 130
    assert "the same command goes on from here" in capsys.readouterr().err
    assert not (destination / "config.json").exists()
    complaint = "holds an unfinished run with rank 4, not 5"
    refused(capsys, complaint, *command, "--rank", 5, "--shard-size", "30KB")
    record = told(capsys, *command, *options)
    assert sum("_proj" in line for line in record.splitlines()) == 14
    whole, again = contents(tmp_path / "whole"), contents(destination)
    for files in (whole, again):  # which names the folder
        del files["adapter/adapter_config.json"]
    assert whole == again


REFUSED = [
    (("svd",), "METHOD: expected one of pissa, olora, qpissa, loftq, corda, eva, lora_ga"),
    (("pissa", "--rank", "0"), "--rank: expected at least 1, got 0"),
    (("pissa", "--rank", "65"),
     "self_attn.q_proj: rank: expected 1 to 64, the smaller side of [64, 64], got 65"),
    (("pissa", "--alpha", "-1"), "--alpha: expected a number above 0, got -1.0"),
    *(
        ((method, "--alpha", alpha, "--rank", "4"), "scaling: expected a number of 1e-18 to 1e+18")
        for method, alpha in (("pissa", "1e300"), ("olora", "1e300"), ("loftq", "1e-300"))
    ),
    (("pissa", "--seed", str(1 << 63)), "--seed: expected an integer that fits 64 bits"),
    (("pissa", "--tol", "0"), "--tol: expected a number above 0, got 0.0"),
    (("pissa", "--target", "proj"), "--target: no linear layer is called 'proj'; there are"),
    (("loftq", "--target", "lm_head"), "--target: lm_head is not quantized, which loftq needs"),
    (("loftq", "--steps", "0"), "--steps: expected at least 1, got 0"),
    (("loftq", "--blocksize", "63"), "--blocksize: expected one of"),
    (("pissa", "--steps", "5"), "--steps: has no effect on pissa"),
    (("olora", "--no-double-quant"), "--double-quant: has no effect on olora"),
    (("qpissa", "--length", "8"), "--length: has no effect on qpissa"),
    (("eva", "--data", "short.txt", "--blocksize", "64"), "--blocksize: has no effect on eva"),
    (("eva",), "--data: expected a file of texts for eva, got none"),
    (("pissa", "--data", "x"), "--data: expected none: it starts from weights for pissa, got x"),
    (("eva", "--data", "missing.txt"), "missing.txt"),
    (("eva", "--data", "empty.txt"), "expected a text on each line, got none"),
    (("eva", "--data", "short.txt"), "--data: expected texts of more than one token, got none"),
    (("eva", "--data", "short.txt", "--texts", "0"), "--texts: expected at least 1, got 0"),
]  # fmt: skip


@pytest.mark.parametrize(("arguments", "complaint"), REFUSED)
def test_what_does_not_fit_is_one_line_and_writes_nothing(
    source, tmp_path, capsys, monkeypatch, arguments, complaint
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty.txt").write_text("\n")
    (tmp_path / "short.txt").write_text("x\n")
    method, *options = arguments
    refused(capsys, complaint, "init", method, source, tmp_path / "dst", *options)
    assert not (tmp_path / "dst").exists()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("method", ["pissa", "olora", "loftq"])
def test_a_weight_that_is_not_finite_is_named(tmp_path, capsys, method, value):
    source = save_llama(tmp_path / "src", torch.float32)
    name = "model.layers.1.mlp.down_proj.weight"
    with changing(source / "model.safetensors") as tensors:
        tensors[name][3, 5] = value
    complaint = f"{name}: weight: expected finite values, got NaN or Inf"
    refused(capsys, complaint, "init", method, source, tmp_path / "dst", "--rank", 4)
    assert not (tmp_path / "dst").exists()


@pytest.mark.parametrize("method", ["corda", "eva", "lora_ga"])
def test_a_weight_that_is_not_finite_is_named_where_texts_run(source, tmp_path, capsys, method):
    copied = shutil.copytree(source, tmp_path / "src")
    for path in copied.glob("*.safetensors"):
        with changing(path) as tensors:
            for name in tensors.keys() & {"model.layers.1.mlp.down_proj.weight"}:
                tensors[name][3, 5] = float("nan")
    (tmp_path / "texts.txt").write_text("thequickbrownfox\n")
    options = ("--rank", 4, "--data", tmp_path / "texts.txt")
    command = ("init", method, copied, tmp_path / "dst", *options)
    assert main([*map(str, command)]) == 2
    said = capsys.readouterr().err
    assert "layers.1.mlp.down_proj: weight: expected finite values, got NaN or Inf" in said
    assert not (tmp_path / "dst").exists()


@pytest.mark.parametrize("method", ["pissa", "olora", "qpissa"])
def test_lower_precisions_of_a_training_do_not_reach_a_start(method):
    torch.manual_seed(0)
    weight, before = torch.randn(640, 640), torch.get_float32_matmul_precision()
    targets = {"a.weight": Target("a", (640, 640), False)}
    unit, results = SimpleNamespace(name="a.weight", quantized=method == "qpissa"), []
    for precision, autocast in (("highest", False), ("medium", False), ("highest", True)):
        starts = Starts(Request(method, 8), targets, None, "", Storage())
        try:
            torch.set_float32_matmul_precision(precision)
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                base, _ = starts.rewrite(unit, weight.clone())
        finally:
            torch.set_float32_matmul_precision(before)
        results.append(base if method != "qpissa" else base.packed)
    assert all(torch.equal(results[0], other) for other in results[1:])


def test_tied_embeddings_are_refused_as_a_target(tmp_path, capsys):
    source = save_llama(tmp_path / "src", tie_word_embeddings=True)
    told(capsys, "init", "pissa", source, tmp_path / "dst", "--rank", 4)
    command = ("init", "pissa", source, tmp_path / "other", "--rank", 4)
    refused(capsys, "lm_head", *command, "--target", "lm_head")
    assert LLAMA["vocab_size"] == len(load_tensors(tmp_path / "dst")["model.embed_tokens.weight"])


def test_an_adapter_is_merged_into_the_base_that_was_made_with_it_alone(source, tmp_path, capfd):
    destination = tmp_path / "dst"
    told(capfd, "init", "pissa", source, destination, "--rank", 4)
    adapter = destination / "adapter"
    command = ("merge", source, adapter, tmp_path / "out")
    refused(capfd, f"belongs to {destination}, whose weights peftkern init changed", *command)
    both = ("adapter", "combine", adapter, adapter, tmp_path / "out")
    refused(capfd, f"--to lora --initial {adapter}", *both)
    told(capfd, "merge", destination, adapter, tmp_path / "out")
    expected = logits(AutoModelForCausalLM.from_pretrained(source))
    merged = logits(AutoModelForCausalLM.from_pretrained(tmp_path / "out"))
    torch.testing.assert_close(merged, expected, rtol=1e-3, atol=1e-4)
