"""`peftkern quantize` as a user meets it: what it prints, what it leaves."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from checkpoint_folders import contents, load_tensors, save_llama, save_moe
from command_line import refused, told, told_json
from paths import ROOT
from processes import killed
from tolerances import HANG_SECONDS
from transformers import AutoModelForCausalLM
from waiting import wait_until

from peftkern.cli import main
from peftkern.tools.checkpoints import staging
from peftkern.tools.checkpoints.staging import WORK
from peftkern.tools.quantize.quantized_checkpoint import MANIFEST


def test_a_checkpoint_is_quantized_and_described(tmp_path, capfd):
    source = save_llama(tmp_path / "src", torch.float32, sharded=True)
    (source / "tokenizer.json").write_text("{}")
    (source / "pytorch_model.bin").write_text("the same weights")
    (source / "onnx").mkdir()
    (source / "onnx" / "model.onnx").write_text("once more")
    options = ["--shard-size", "30KB", "--no-double-quant", "--skip", "v_proj"]
    lines = told(capfd, "quantize", source, tmp_path / "dst", *options).splitlines()
    assert lines[0] == "12 tensors quantized, 9 kept"
    assert "MB before" in lines[1] and "bits per parameter" in lines[1]
    assert lines[2].startswith("largest relative error ") and lines[2].endswith("proj.weight")
    assert "read back, checksums agree" in lines[3]
    assert lines[4:] == [
        "2 other files copied",  # generation_config.json is the other one
        "left behind: onnx/model.onnx, pytorch_model.bin",
        f"{tmp_path / 'dst'}: written",
    ]
    names = [f"{name}_proj.weight" for name in ("q", "k", "o", "gate", "up", "down")]
    tensors = load_tensors(source)
    share = sum(t.numel() for name, t in tensors.items() if name.endswith(tuple(names)))
    share /= sum(tensor.numel() for tensor in tensors.values())
    assert lines[1].endswith(f" in quantized tensors, which hold {share:.0%} of the parameters")
    before = sum(path.stat().st_size for path in source.glob("*.safetensors"))
    after = sum(path.stat().st_size for path in (tmp_path / "dst").glob("*.safetensors"))
    said = [float(part.split()[0]) * 1e6 for part in lines[1].split(":")[0].split(",")]
    assert said[0] == pytest.approx(before, rel=0.1) and said[1] == pytest.approx(after, rel=0.2)
    assert (tmp_path / "dst" / "tokenizer.json").read_text() == "{}"
    config = json.loads((tmp_path / "dst" / "config.json").read_text())["quantization_config"]
    assert config["bnb_4bit_compute_dtype"] == "float32"
    assert config["llm_int8_skip_modules"] == ["lm_head", "v_proj"]
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "dst")
    assert torch.isfinite(model.train()(torch.arange(8)[None]).logits).all()


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss"])
def test_experts_are_told(tmp_path, capsys, family):
    """In the source each expert has its tensors, or all of a layer have one."""
    save_moe(tmp_path / "src", family)
    arguments = ["quantize", tmp_path / "src", tmp_path / "dst"]
    options = ["--compute-dtype", "fp16" if family == "gpt_oss" else "float32"]  # short and full
    lines = told(capsys, *arguments, *options).splitlines()
    config = json.loads((tmp_path / "dst" / "config.json").read_text())["quantization_config"]
    assert config["bnb_4bit_compute_dtype"] == ("float16" if family == "gpt_oss" else "float32")
    tensors = load_tensors(tmp_path / "src")
    names = [name for name in tensors if ".experts." in name and not name.endswith("_bias")]
    count = sum(tensors[name].numel() for name in names)
    total = sum(tensor.numel() for tensor in tensors.values())
    assert lines[2] == (
        f"experts: {count / total:.0%} of the parameters, at 4.50 bits, are quantized: "
        "from peftkern.integrations.transformers import NF4ExpertsConfig before from_pretrained"
    )
    from peftkern.integrations.transformers import NF4ExpertsConfig  # noqa: F401

    AutoModelForCausalLM.from_pretrained(tmp_path / "dst")
    if family == "mixtral":
        line = told(capsys, *arguments, "--no-stack-experts", "--force").splitlines()[2]
        assert line.endswith("each as a linear layer, which no model of transformers 5 loads")


def test_most_parameters_that_would_stay_as_they_are(tmp_path, capsys):
    """Then nothing is written, unless it is wanted."""
    save_moe(tmp_path / "src", "mixtral")
    tensors = load_tensors(tmp_path / "src")
    experts = sum(tensor.numel() for name, tensor in tensors.items() if ".experts." in name)
    share = experts / sum(tensor.numel() for tensor in tensors.values())
    line = (
        f"experts: {share:.0%} of the parameters, at 16.00 bits, stay as they are (skipped, or "
        "rearranged when they are loaded)"
    )
    arguments = ["quantize", str(tmp_path / "src"), str(tmp_path / "dst"), "--skip", "experts"]
    capsys.readouterr()
    assert main(arguments) == 1
    said = capsys.readouterr()
    assert said.out == "" and not (tmp_path / "dst").exists()
    words = r"peftkern: (\d+)% of the parameters would stay as they are: [\d.]+ bits per parameter"
    found = re.match(words + " in all; ", said.err)
    assert found and 50 < int(found[1]) < 100
    assert said.err.endswith(f"; {line}; --partial writes it all the same\n")
    assert told(capsys, *arguments, "--partial").splitlines()[2] == line
    AutoModelForCausalLM.from_pretrained(tmp_path / "dst")


def test_a_dry_run_says_what_the_run_does_then(tmp_path, capsys):
    source, out = save_moe(tmp_path / "src", "mixtral"), tmp_path / "dst"
    arguments = ["quantize", str(tmp_path / "src")]
    planned = told(capsys, *arguments, "--dry-run").splitlines()
    assert planned[0] == "32 tensors to be quantized, 9 kept"
    share = source.lm_head.weight.numel() / sum(p.numel() for p in source.parameters())
    heads = [f"{share:.1%} {name}.weight" for name in ("lm_head", "model.embed_tokens")]
    assert planned[3].startswith(f"left as they are: {', '.join(heads)}, ")
    assert "% model.layers.*.block_sparse_moe.gate.weight, " in planned[3]
    assert planned[4:] == [
        "1 file to be written",
        "1 other file to be copied",
        "a dry run: nothing is written",
    ]
    dry = told_json(capsys, *arguments, "--dry-run")
    assert [path.name for path in tmp_path.iterdir()] == ["src"]
    record = told_json(capsys, *arguments, out)
    assert (dry.pop("written"), record.pop("written")) == (False, True)
    ((name, error),) = record.pop("largest_error").items()
    assert dry.pop("largest_error") == {} and name.endswith("weight") and 0 < error < 0.2
    assert dry == record
    tensors = load_tensors(out)
    assert record["total"]["bytes_after"] == sum(tensor.nbytes for tensor in tensors.values())
    assert record["files"] == {"model.safetensors": record["total"]["bytes_after"]}
    assert record["kept"]["model.layers.*.input_layernorm.weight"]["tensors"] == 2
    whole = contents(tmp_path)
    for options, status in (([], 2), (["--force"], 0), (["--force", "--skip", "experts"], 1)):
        assert main([*arguments, str(out), "--dry-run", *options]) == status
    assert contents(tmp_path) == whole


def test_layers_that_a_format_cannot_have_are_named(tmp_path, capsys):
    save_llama(tmp_path / "src", intermediate_size=72)
    arguments = ["quantize", str(tmp_path / "src"), "--dry-run", "--format", "nvfp4"]
    assert told(capsys, *arguments).splitlines()[2] == (
        "layers that stay dense, as their rows are not whole blocks: "
        "model.layers.0.mlp.down_proj, model.layers.1.mlp.down_proj"
    )


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        (["--shard-size", "5X"], "--shard-size: expected a size like 48GB (10^9)"),
        (["--shard-size", "0MB"], "--shard-size: expected a size like 48GB (10^9)"),
        (["--device", "cuda:99"], "--device cuda:99: "),
        (["--blocksize", "65"], "--blocksize: expected one of 32, 64, 128, "),
        (["--compute-dtype", "int8"], "--compute-dtype: expected one of bf16, fp16, fp32, got"),
        (["--format", "int5"], "--format: expected one of nf4, fp4, mxfp4, "),
        (["--format", "nvfp4", "--blocksize", "32"], "--blocksize: expected 16 in nvfp4, got 32"),
        (["--format", "int4", "--no-double-quant"], "--no-double-quant: expected with nf4 or fp4"),
        (["--format", "mxfp4", "--compute-dtype", "bf16"], "--compute-dtype: expected with nf4 or"),
        (["--skip", "nonsense"], "--skip: no linear layer is called 'nonsense'"),
        ([], "model.safetensors: damaged, cut off or not safetensors"),
    ],
)
def test_bad_input_is_one_line_and_leaves_nothing(tmp_path, capfd, options, complaint):
    source = save_llama(tmp_path / "src")
    if not options:
        os.truncate(source / "model.safetensors", 5000)
    refused(capfd, complaint, "quantize", source, tmp_path / "dst", *options)
    refused(capfd, "DST: expected a new folder to write, or --dry-run", "quantize", source)
    assert not (tmp_path / "dst").exists()


# The command, which halts at its third file, so that a signal always meets it in the middle.
HALTING = """
import sys, time
from peftkern import cli
from peftkern.tools.checkpoints import staging
save_file, begun = staging.save_file, []
def halting(*args, **options):
    begun.append(args)
    if len(begun) > 2:
        time.sleep(3600)
    save_file(*args, **options)
staging.save_file = halting
sys.exit(cli.main(sys.argv[1:]))
"""


def written(out: Path) -> dict:
    """The manifest of what is there so far."""
    manifest = out / WORK / MANIFEST
    return json.loads(manifest.read_text()) if manifest.exists() else {}


def stopped(arguments: list[str]) -> str:
    """What it says when Ctrl-C comes after two files, in a process of its own."""
    process = subprocess.Popen(
        [sys.executable, "-c", HALTING, *arguments],
        cwd=ROOT,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        # In the background of a shell, where tests may run, Ctrl-C would be ignored.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )

    def is_there() -> bool:
        assert process.poll() is None
        return len(written(Path(arguments[2]))) >= 2

    with process:
        wait_until(is_there)
        process.send_signal(signal.SIGINT)
        stdout, stderr = process.communicate(timeout=HANG_SECONDS)
    assert (stdout, process.returncode) == ("", 130)
    return stderr


def dies_at_its_third_file(arguments: list[str]) -> None:
    save_file, begun = staging.save_file, []

    def dying(*given, **options):
        begun.append(given)
        if len(begun) > 2:
            os.kill(os.getpid(), signal.SIGKILL)
        save_file(*given, **options)

    staging.save_file = dying
    main(arguments)


@pytest.mark.slow
def test_stopped_by_a_signal_it_goes_on(tmp_path, capsys):
    """Twice: by Ctrl-C, then, further on, killed."""
    source, options = save_llama(tmp_path / "src", torch.float32), ["--shard-size", "10KB"]
    assert main(["quantize", str(source), str(tmp_path / "whole"), *options]) == 0
    out = tmp_path / "dst"
    arguments = ["quantize", str(source), str(out), *options]
    said = stopped(arguments)
    first = written(out)
    assert [path.name for path in out.iterdir()] == [WORK]
    # Behind it stands what the frame says of Ctrl-C, which depends on typer's version.
    assert said.startswith("peftkern: stopped; the same command goes on from here\n")
    assert "Traceback" not in said
    assert killed(lambda: dies_at_its_third_file(arguments))
    second = written(out)
    assert [path.name for path in out.iterdir()] == [WORK]
    assert (len(first), len(second)) == (2, 4) and first.items() < second.items()
    assert "by an earlier run)" in told(capsys, *arguments).splitlines()[0]
    assert contents(out) == contents(tmp_path / "whole")
