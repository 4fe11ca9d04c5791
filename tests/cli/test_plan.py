"""`peftkern plan` as a user meets it."""

from __future__ import annotations

import json
import re

import pytest
import torch
from command_line import refused, told, told_json
from paths import ROOT
from peft import LoraConfig
from plan_configs import LLAMA_CONFIG

QLORA_65B = ["llama-65b", "--method", "qlora", "--r", "64"]
QLORA_65B += ["--adapter-dtype", "bf16", "--optimizer", "paged-adamw"]


def test_table_and_verdict_of_the_published_example_fit_80_columns(capfd):
    out = told(capfd, "plan", *QLORA_65B, "--sequence", "512", "--fit", "48GB")
    lines = out.splitlines()
    assert max(map(len, lines)) <= 80
    assert not any(line != line.rstrip() for line in lines)
    text = " ".join(out.split())
    assert "65.29 billion parameters, 799.54 million trained" in text
    assert "linear layers │ 33.41 │ 33.41 │ 33.41" in text
    found = re.search(r"peak (\S+) GB = (\S+) GiB, in the backward pass", text)
    assert 44 < float(found[1]) < 45
    assert float(found[2]) == pytest.approx(float(found[1]) * 1e9 / 2**30, abs=0.01)
    assert "fits 48.00 GB" in text
    assert "not measured on a GPU" in text


def test_json_holds_the_sums_and_status_1_says_that_it_does_not_fit(capsys):
    report = told_json(capsys, "plan", *QLORA_65B, "--sequence", "512", "--fit", "24GiB", status=1)
    plan = report["plan"]
    for phase, total in plan["totals"].items():
        assert total == sum(plan["fixed"].values()) + sum(plan["phases"][phase].values())
    assert plan["peak"] == plan["totals"][plan["peak_phase"]]
    largest = {"largest_batch": 0, "largest_sequence": 0}
    assert report["fit"] == {"budget": 24 * 2**30, "fits": False, **largest}
    assert report["training"]["base"] == "nf4"


def test_small_model_of_a_folder_is_shown_in_mb(tmp_path, capsys):
    config = {**LLAMA_CONFIG, "model_type": "qwen2", "tie_word_embeddings": True}
    config["num_key_value_heads"] = 4
    (tmp_path / "config.json").write_text(json.dumps(config))
    options = ["--method", "full", "--sequence", "16", "--device", "cpu", "--dtype", "bfloat16"]
    said = " ".join(told(capsys, "plan", tmp_path, *options).split())
    assert "MB at the peak" in said and "activations bf16" in said
    assert re.search(r"peak 0\.\d\d MB = 0\.\d\d MiB", said)
    assert "lm_head" not in said
    assert "0.04 million parameters" in said


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["llama9-1b"], "one of llama2-7b, "),
        (["."], "model: .: expected a config.json, or the folder of one"),
        (["setup.py"], "setup.py: expected JSON in UTF-8"),
        (["llama3-8b", "--r", "0"], "--r: expected an integer from 1"),
        (["llama3-8b", "--sequence", "many"], "Invalid value for '--sequence'"),
        (["llama3-8b", "--targets", "wq"], "--targets: 'wq' is no linear layer; accepted: "),
        (["llama3-8b", "--adapter", "no/such"], "no/such: No such file"),
        (["llama3-8b", "--fit", "48"], "--fit: expected a size like 48GB"),
        (["llama3-8b", "--dtype", "fp16"], "--dtype: expected one of bf16, fp32, got 'fp16'"),
        (["llama3-8b", "--adapter-dtype", "nf4"], "--adapter-dtype: expected one of bf16, fp32"),
        (["llama3-8b", "--base", "int8"], "--base: expected one of bf16, fp32, nf4, fp4, mxfp4"),
        (
            ["llama3-8b", "--devices", "8"],
            "--devices: expected 1 unless the model is shared by",
        ),
        (["llama3-8b", "--shard", "fsdp2"], "--devices: fsdp2 needs at least 2, got 1"),
        (["llama3-8b", "--no-reshard"], "--reshard: an option of shard fsdp2"),
        ([], "Missing argument"),
    ],
)
def test_bad_input_is_one_line_and_status_2(arguments, complaint, capfd, monkeypatch):
    monkeypatch.chdir(ROOT)
    refused(capfd, complaint, "plan", *arguments)


def test_adapters_of_a_config_are_planned(tmp_path, capfd):
    path = tmp_path / "adapter_config.json"
    config = LoraConfig(r=4, target_modules=["q_proj"], inference_mode=True)  # as PEFT saves it
    config.save_pretrained(tmp_path)
    asked = ["plan", "qwen2.5-0.5b", "--sequence", "8", "--adapter", str(tmp_path), "--json"]
    found = json.loads(told(capfd, *asked))
    assert found["plan"]["trainable"] == 24 * 4 * 2 * 896
    for option in ("--r=4", "--targets=q_proj", "--dropout=0"):
        name = option.partition("=")[0]
        refused(capfd, f"{name}: has no effect with --adapter", *asked, option)
    refused(capfd, "--adapter: expected none with method full", *asked, "--method", "full")
    path.write_text("{}")
    refused(capfd, f"--adapter: {path.parent}: expected a PEFT config with a peft_type", *asked)


def test_compaction_of_adalora_is_told(tmp_path, capfd):
    config = {**LLAMA_CONFIG, "model_type": "qwen2", "num_key_value_heads": 4}
    (tmp_path / "config.json").write_text(json.dumps(config))
    asked = ["plan", str(tmp_path), "--method", "adalora", "--r", "8", "--target-r", "4"]
    said = told(capfd, *asked, "--sequence", "16")
    assert max(map(len, said.splitlines())) <= 80
    assert "pruned to 4 of 8 triplets a layer, and compacted" in " ".join(said.split())
    assert re.search(r"optimizer states, MB .* (49\.\d|50\.0)%", said)
    assert ("a step at least" in said) == torch.cuda.is_available()  # the device is not here
    found = told_json(capfd, *asked, "--sequence", "16")["compaction"]
    assert found["pruned"]["trainable"] == 2 * found["compacted"]["trainable"]
    assert found["pruned"]["flops"] > found["compacted"]["flops"] > 0
    refused(capfd, "--target-r: expected an integer from 1 to 8", *asked[:-1], "9")


def test_several_devices_are_told_of_each(tmp_path, capfd, monkeypatch):
    config = {**LLAMA_CONFIG, "num_hidden_layers": 2, "num_key_value_heads": 4}
    (tmp_path / "config.json").write_text(json.dumps(config))
    asked = ["plan", str(tmp_path), "--sequence", "16", "--r", "4", "--devices", "4"]
    asked += ["--shard", "fsdp2", "--param-dtype", "bfloat16", "--fit", "1MB"]
    said = told(capfd, *asked)
    assert max(map(len, said.splitlines())) <= 80
    text = " ".join(said.split())
    assert "sequence 16 on each of 4 devices by fsdp2, gathered in bf16" in text
    assert "of a step, on each of 4 devices:" in text
    assert re.search(r"gathered weights . 0\.\d\d . 0\.\d\d . - ", text)
    assert re.search(r"all-gather, backward . 0\.\d\d . 0\.\d\d", text)
    assert "fits 1.00 MB" in text
    monkeypatch.setenv("COLUMNS", "40")
    narrow = told(capfd, *asked)
    assert max(map(len, narrow.splitlines())) <= 40
    assert {"optimizer", "communication", "activations"} <= set(narrow.split())  # words are whole
    report = told_json(capfd, *asked[:-2])
    assert report["training"]["devices"] == 4
    moved = report["plan"]["communication"]
    layers = moved["all-gather, backward"]
    assert layers["calls"] == 2 and layers["sent"] == layers["bytes"] * 3 // 4
    monkeypatch.setenv("COLUMNS", "80")
    text = " ".join(told(capfd, *asked[:-6], "--shard", "zero3").split())
    assert re.search(r"all-gather, forward . 0\.\d\d . 0\.\d\d", text)
    assert moved["reduce-scatter, backward"]["bytes"] > 0
