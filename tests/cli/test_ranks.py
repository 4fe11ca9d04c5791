"""`peftkern ranks` as a user meets it: what it prints, and what PEFT and `init` make of that."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_folders import changing, load_tensors, save_llama, save_moe
from command_line import refused, told, told_json
from framework_runs import letters_llama, letters_tokenizer
from merged_folders import make_model, save_base
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora.layer import LoraLayer
from transformers import AutoModelForCausalLM


def ranks_in(model: torch.nn.Module) -> dict[str, int]:
    return {
        name.removeprefix("base_model.model."): m.r["default"]
        for name, m in model.named_modules()
        if isinstance(m, LoraLayer)
    }


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("ranks") / "src"
    letters_llama().save_pretrained(folder, max_shard_size="60KB")
    letters_tokenizer().save_pretrained(folder)
    return folder


def test_what_is_printed_is_a_config_that_peft_takes(source, tmp_path, capsys):
    page = tmp_path / "ranks.html"
    said = told(capsys, "ranks", source, "--rank", 4, "--alpha", 8, "--html", page)
    table, _, program = said.partition("from peft import LoraConfig")
    assert "of |W|^2" in table and "excess" in table and "ranks by weights: " in table
    session: dict[str, Any] = {}
    exec("from peft import LoraConfig" + program, session)
    given = ranks_in(
        get_peft_model(AutoModelForCausalLM.from_pretrained(source), session["config"])
    )
    record = told_json(capsys, "ranks", source, "--rank", 4, "--alpha", 8)
    assert {layer["name"]: layer["rank"] for layer in record["layers"]} == given
    assert record["spent"] <= record["budget"] and len(set(given.values())) > 1
    for name in given:
        assert name.removeprefix("model.layers.") in table
    text = page.read_text(encoding="utf-8")
    assert text.count("<svg") >= 4 and "LoraConfig(" in text and "layers.1" in text


def test_nf4_and_dense_checkpoints_agree(source, tmp_path, capsys):
    nf4 = tmp_path / "nf4"
    told(capsys, "quantize", source, nf4)
    decoded = told_json(capsys, "ranks", nf4, "--rank", 4)
    dense = told_json(capsys, "ranks", source, "--rank", 4)
    for ours, theirs in zip(decoded["layers"], dense["layers"], strict=True):
        assert (ours["name"], ours["shape"]) == (theirs["name"], theirs["shape"])
        assert ours["S"] == pytest.approx(theirs["S"], rel=0.1)  # NF4's error
        assert ours["S"] != theirs["S"]
    config = LoraConfig(**decoded["config"])
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(nf4), config)
    assert ranks_in(model) == {layer["name"]: layer["rank"] for layer in decoded["layers"]}


def test_weights_that_are_kept_transposed(tmp_path, capsys):
    save_base(tmp_path / "src", make_model("GPT2", "LMHeadModel", num_hidden_layers=1))
    told(capsys, "quantize", tmp_path / "src", tmp_path / "nf4")
    records = [told_json(capsys, "ranks", tmp_path / name, "--rank", 4) for name in ("src", "nf4")]
    for name, record in zip(("src", "nf4"), records, strict=True):
        shapes = {la["name"].rpartition(".")[2]: la["shape"] for la in record["layers"]}
        assert shapes == {"c_attn": [192, 64], "c_proj": [64, 256], "c_fc": [256, 64]}
        assert record["config"].get("fan_in_fan_out", False) == (name == "src")


@pytest.mark.parametrize("by", ["activations", "gradients", "gora"])
def test_texts_choose_ranks(source, tmp_path, capsys, by):
    texts = tmp_path / "texts.txt"
    texts.write_text("the quick brown fox\n\njumps over the lazy dog\n")
    options = ("--by", by, "--data", texts, "--rank", 4, "--min-rank", 0, "--length", 16)
    record = told_json(capsys, "ranks", source, *options)
    assert record["by"] == by and record["unit"] == "rank"
    assert record["spent"] <= record["budget"] == 4 * len(record["layers"])
    few = told_json(
        capsys,
        "ranks",
        source,
        *options,
        "--budget",
        700,
        "--cost",
        "parameters",
        "--memory",
        "10KB",
    )
    assert few["parameters"] <= 700
    get_peft_model(AutoModelForCausalLM.from_pretrained(source), LoraConfig(**few["config"]))


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss"])  # experts one by one, and stacked
def test_experts_of_a_checkpoint(tmp_path, capsys, family):
    folder = tmp_path / "src"
    model = save_moe(folder, family)
    stacks = {name: p for name, p in model.named_parameters() if name.endswith("gate_up_proj")}
    command = ("--rank", 4, "--alpha", 8, "--target", "gate_up_proj", "--target", "q_proj")
    command += ("--cost", "parameters")
    said = told(capsys, "ranks", folder, *command)
    table, _, program = said.partition("from peft import LoraConfig")
    session: dict[str, Any] = {}
    exec("from peft import LoraConfig" + program, session)
    record = told_json(capsys, "ranks", folder, *command)
    layers = {layer["name"]: layer for layer in record["layers"]}
    assert set(stacks) < set(layers) and len(layers) == 4
    assert [name for name in layers if "layers.0." in name] == [*layers][:2]
    for name, parameter in stacks.items():
        S = torch.linalg.svdvals(parameter.detach().double()).square().sum(0).sqrt()[:8]
        assert layers[name]["S"] == pytest.approx(S.tolist(), rel=1e-4)
        shape = parameter.shape[1:] if family == "qwen3_moe" else parameter.shape[:0:-1]
        assert layers[name]["shape"] == [*shape] and layers[name]["experts"] == 4
        assert f"4x{shape[0]}x{shape[1]}" in table
    adapted = get_peft_model(AutoModelForCausalLM.from_pretrained(folder), session["config"])
    given = {
        f"{name}.gate_up_proj" if name.endswith("experts") else name: rank
        for name, rank in ranks_in(adapted).items()
    }
    assert given == {name: layer["rank"] for name, layer in layers.items()}
    trained = sum(p.numel() for p in adapted.parameters() if p.requires_grad)
    assert trained == record["parameters"] <= record["budget"] == record["uniform_parameters"]
    alone = told_json(capsys, "ranks", folder, "--rank", 2, "--target", "experts.gate_up_proj")
    assert {layer["name"] for layer in alone["layers"]} == set(stacks)
    get_peft_model(AutoModelForCausalLM.from_pretrained(folder), LoraConfig(**alone["config"]))
    file = tmp_path / "ranks.json"
    for number, one in enumerate((record, alone)):  # `init` starts experts of these ranks
        file.write_text(json.dumps(one))
        out = tmp_path / f"dst{number}"
        told(capsys, "init", "pissa", folder, out, "--ranks", file)
        base = AutoModelForCausalLM.from_pretrained(out)
        started = ranks_in(PeftModel.from_pretrained(base, out / "adapter"))
        wanted = {layer["name"].removesuffix(".gate_up_proj"): layer["rank"]
                  for layer in one["layers"]}  # fmt: skip
        assert started == wanted


@pytest.mark.parametrize("number", ["-1", "4", "5"])
def test_experts_that_are_numbered_otherwise(tmp_path, capfd, number):
    """Which of two an expert is, nothing tells; one more than the model has is none of its; and
    what comes after a gap is not the one that is missing."""
    folder = tmp_path / "src"
    save_moe(folder, "qwen3_moe")
    with changing(folder / "model.safetensors") as tensors:
        for name in [name for name in tensors if ".experts.3." in name]:
            value = tensors[name].clone() if number == "4" else tensors.pop(name)
            tensors[name.replace(".experts.3.", f".experts.{number}.")] = value
    complaint = "tensors of each of 4 experts, numbered from 0, got "
    refused(capfd, complaint, "ranks", folder, "--target", "down_proj")


@pytest.mark.parametrize("by", ["activations", "gradients"])
def test_experts_of_texts_and_of_a_program(tmp_path, capsys, monkeypatch, by):
    monkeypatch.setattr(sys, "path", [*sys.path])
    folder, texts = tmp_path / "src", tmp_path / "texts.txt"
    save_moe(folder, "qwen3_moe", torch.float32, vocab_size=128)
    letters_tokenizer().save_pretrained(folder)
    texts.write_text("the quick brown fox")
    program = tmp_path / "train.py"
    program.write_text(
        "from transformers import AutoModelForCausalLM, AutoTokenizer\n"
        f"source = {str(folder)!r}\n"
        "def model(): return AutoModelForCausalLM.from_pretrained(source)\n"
        "def batches():\n"
        "    tokenizer = AutoTokenizer.from_pretrained(source)\n"
        "    found = tokenizer('the quick brown fox', return_tensors='pt')\n"
        "    return [{**found, 'labels': found['input_ids']}]\n"
    )
    options = ("--by", by, "--rank", 2, "--target", "down_proj")
    by_texts = told_json(capsys, "ranks", folder, *options, "--data", texts)
    assert told_json(capsys, "ranks", program, *options)["layers"] == by_texts["layers"]
    assert {layer["experts"] for layer in by_texts["layers"]} == {4}
    assert by_texts["config"]["target_parameters"] == ["experts.down_proj"]


PROGRAM = """
import torch
from torch import nn
from width_of_it import WIDTH


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(WIDTH, 48), nn.Linear(48, WIDTH)
        self.attention = nn.MultiheadAttention(WIDTH, 2)  # which reads its out_proj's weight

    def forward(self, x):
        return self.second(self.first(x).relu())


def model():
    return Net()


def batches():
    while True:  # --texts takes some
        yield torch.randn(16, WIDTH)


def loss(model, batch):
    return model(batch).square().mean()
"""


@pytest.mark.parametrize("by", ["weights", "activations", "gradients", "gora"])
def test_a_file_of_python_serves_any_model(tmp_path, capsys, monkeypatch, by):
    monkeypatch.setattr(sys, "path", [*sys.path])
    file, page = tmp_path / "train.py", tmp_path / "ranks.html"
    (tmp_path / "width_of_it.py").write_text("WIDTH = 32")
    file.write_text(PROGRAM)
    some = () if by == "weights" else ("--texts", 2)
    record = told_json(capsys, "ranks", file, "--by", by, "--rank", 4, *some, "--html", page)
    assert record["by"] == by and record["source"] == str(file)
    assert {la["name"]: la["shape"] for la in record["layers"]} == {
        "first": [48, 32],
        "second": [32, 48],
    }
    assert record["spent"] <= record["budget"] == 8 and "first" in page.read_text()
    session: dict[str, Any] = {"__name__": "session"}
    exec(PROGRAM, session)
    model = get_peft_model(session["model"](), LoraConfig(**record["config"]))
    assert ranks_in(model) == {layer["name"]: layer["rank"] for layer in record["layers"]}
    one = told_json(capsys, "ranks", file, "--by", by, "--rank", 4, *some, "--target", "second")
    assert [layer["name"] for layer in one["layers"]] == ["second"]


def test_a_file_of_python_that_lacks_something_is_one_line(tmp_path, capfd):
    file = tmp_path / "train.py"
    for text, by, complaint in (
        ("", "weights", f"{file}: expected functions model(), got no model()"),
        ("model = 3", "weights", f"{file}: expected functions model(), got no model()"),
        ("def model(): pass", "gora", "expected functions model() and batches(), got no batches()"),
        ("def model(): return 3", "weights", "model(): expected a torch.nn.Module, got int"),
        ("model = batches = int\nloss = 3", "gora", "loss: expected a function of (model, batch)"),
        ("import torch\nmodel = torch.nn.ReLU", "weights", "model(): holds no linear layer"),
    ):
        file.write_text(text)
        refused(capfd, complaint, "ranks", file, "--by", by)
    start = "import torch\ndef model(): return torch.nn.Sequential(torch.nn.Linear(8, 8))\n"
    for text, by, complaint in (
        ("def batches(): return 3", "activations", "batches: expected a list of batches"),
        ("def batches(): return []", "activations", "batches: expected at least one, got none"),
        ("def batches(): return [torch.ones(2, 8)]", "gora", "loss: expected a function of (model"),
    ):
        file.write_text(start + text)
        refused(capfd, complaint, "ranks", file, "--by", by)
    given = ("ranks", file, "--by", "gora")
    refused(capfd, "--data: expected none beside", *given, "--data", file)
    for option in ("--texts=1", "--length=8", "--memory=1GB"):
        complaint = f"{option.partition('=')[0]}: has no effect on --by weights"
        refused(capfd, complaint, "ranks", file, option)
    refused(capfd, "--texts: expected at least 1, got 0", *given, "--texts", 0)
    refused(capfd, "no.py: expected a Python file, got nothing", "ranks", tmp_path / "no.py")


@pytest.mark.parametrize("method", ["pissa", "loftq", "eva"])
def test_init_starts_an_adapter_of_these_ranks(source, tmp_path, capsys, method):
    ranks, texts = tmp_path / "ranks.json", tmp_path / "texts.txt"
    texts.write_text("the quick brown fox\njumps over the lazy dog\n")
    record = told_json(capsys, "ranks", source, "--rank", 4, "--alpha", 6, "--target", "q_proj")
    ranks.write_text(json.dumps(record))
    data = ("--data", texts) if method == "eva" else ()
    arguments = ("init", method, source, tmp_path / "dst", "--ranks", ranks, *data)
    told(capsys, *arguments)
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "dst")
    model = PeftModel.from_pretrained(base, tmp_path / "dst" / "adapter")
    wanted = {layer["name"]: layer["rank"] for layer in record["layers"]}
    assert ranks_in(model) == wanted
    saved = load_tensors(tmp_path / "dst" / "adapter")
    assert len(saved) == 2 * len(wanted)
    for module in model.modules():
        if isinstance(module, LoraLayer):
            assert module.scaling["default"] == pytest.approx(1.5)


def test_init_takes_targets_that_are_a_regular_expression(source, tmp_path, capsys):
    """As `ranks` writes them where one name ends in another."""
    ranks = tmp_path / "ranks.json"
    pattern = r"model\.layers\.0\.self_attn\.(q|v)_proj|model\.layers\.1\..*down_proj"
    ranks.write_text(json.dumps({"r": 3, "target_modules": pattern}))
    arguments = ("init", "pissa", source, tmp_path / "dst", "--ranks", ranks)
    told(capsys, *arguments)
    names = {f"model.layers.0.self_attn.{name}_proj" for name in "qv"}
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "dst")
    model = PeftModel.from_pretrained(base, tmp_path / "dst" / "adapter")
    assert ranks_in(model) == dict.fromkeys(names | {"model.layers.1.mlp.down_proj"}, 3)


def test_bad_input_is_one_line(source, tmp_path, capfd):
    texts = tmp_path / "texts.txt"
    texts.write_text("\n")
    for complaint, *arguments in (
        ("--by: expected one of weights, activations, gradients, gora, got 'x'", "--by", "x"),
        ("--cost: expected one of rank, parameters, bytes, flops, got 'ms'", "--cost", "ms"),
        ("--data: expected a file of texts for gradients", "--by", "gradients"),
        ("--data: expected none: weights need no texts", "--data", texts),
        (f"--data: {texts}: expected a text on each line", "--by", "gora", "--data", texts),
        (f"--data: {tmp_path / 'no'}: No such file", "--by", "gora", "--data", tmp_path / "no"),
        ("--rank: expected an integer of at least 1, got 0", "--rank", 0),
        ("--min-rank: expected at most", "--min-rank", 4000, "--rank", 4000),
        ("--max-rank: expected an integer", "--max-rank", -1),
        ("--budget: expected at least", "--budget", 10),
        ("--alpha: expected a number above 0", "--alpha", "nan"),
        ("--target: no linear layer is called 'qq'", "--target", "qq"),
        ("--html: ", "--html", tmp_path / "no" / "page.html"),
    ):
        refused(capfd, complaint, "ranks", source, *arguments)
    refused(capfd, "expected a folder with config.json", "ranks", tmp_path / "none")
    gpt, bad = save_llama(tmp_path / "bad"), tmp_path / "ranks.json"
    with changing(gpt / "model.safetensors") as tensors:
        tensors["model.layers.0.mlp.up_proj.weight"][1, 1] = float("nan")
    refused(capfd, "layers.0.mlp.up_proj: weight: expected finite values", "ranks", gpt)
    with changing(gpt / "model.safetensors") as tensors:
        tensors["model.layers.0.mlp.up_proj.weight"] = torch.zeros(64, 96)
    refused(capfd, "up_proj.weight: shape [64, 96] does not fit [96, 64]", "ranks", gpt)
    refused(capfd, "does not fit [96, 64]", "init", "pissa", gpt, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    out = ("init", "pissa", source, tmp_path / "out", "--ranks", bad)
    for text, complaint in (
        ("[]", "--ranks: "),
        ('{"r": 4, "target_parameters": "a.b"}', "target_parameters: expected a list of names"),
        (
            '{"r": 4, "target_parameters": ["a.b"], "target_modules": "c"}',
            "target_modules: expected a list beside target_parameters, got 'c'",
        ),
        ('{"r": 4, "target_parameters": ["a.b"]}', "no linear layer is called 'a.b'"),
        ('{"r": 4}', "target_modules: expected a list of names"),
        ('{"r": 4, "target_modules": ["q_proj"], "rank_pattern": {"a": 0}}', "rank_pattern"),
        ('{"r": 4, "target_modules": ["nothing"]}', "no linear layer is called 'nothing'"),
        ('{"r": 4, "target_modules": "no.*"}', "no linear layer is called 'no.*'"),
        ('{"r": 4, "target_modules": "("}', "target_modules: expected a list of names, or a reg"),
    ):
        bad.write_text(text)
        refused(capfd, complaint, *out)
    refused(capfd, "--alpha: expected none beside --ranks, got 3.0", *out, "--alpha", 3)
