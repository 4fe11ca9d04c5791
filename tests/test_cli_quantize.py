"""`peftkern quantize` as a user meets it: real processes, what they print, what they leave."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from checkpoint_folders import contents, save_llama
from transformers import AutoModelForCausalLM

from peftkern.nf4_checkpoint import WORK

ROOT = Path(__file__).resolve().parents[1]


def command(*arguments: object) -> dict:
    return {
        "args": [sys.executable, "-m", "peftkern", "quantize", *map(str, arguments)],
        "cwd": ROOT,
        "text": True,
        "stdout": subprocess.PIPE,
        "stderr": subprocess.PIPE,
    }


def run(*arguments: object) -> subprocess.CompletedProcess:
    return subprocess.run(**command(*arguments), timeout=300)


def test_a_checkpoint_is_quantised_and_described(tmp_path):
    source = save_llama(tmp_path / "src", torch.float32, sharded=True)
    (source / "tokenizer.json").write_text("{}")
    done = run(
        source, tmp_path / "dst", "--shard-size", "30KB", "--no-double-quant", "--skip", "v_proj"
    )
    assert (done.returncode, done.stderr) == (0, "")
    lines = done.stdout.splitlines()
    assert lines[0] == "12 tensors quantised, 9 kept"
    assert "MB before" in lines[1] and "bits per parameter" in lines[1]
    assert lines[2].startswith("largest relative error ") and lines[2].endswith("proj.weight")
    assert "read back, checksums agree" in lines[3]
    assert lines[4:] == [f"{tmp_path / 'dst'}: written"]
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


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        (["--shard-size", "5X"], "--shard-size: expected a size as 5GB or 500MiB, got '5X'"),
        (["--device", "cuda:99"], "GPUs, got 'cuda:99'"),
        (["--skip", "nonsense"], "no linear layer is called 'nonsense'"),
    ],
)
def test_bad_input_is_one_line_and_leaves_nothing(tmp_path, options, complaint):
    source = save_llama(tmp_path / "src")
    done = run(source, tmp_path / "dst", *options)
    assert done.returncode == 2
    assert done.stdout == ""
    assert complaint in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert not (tmp_path / "dst").exists()


def test_damaged_source_is_one_line_and_leaves_nothing(tmp_path):
    source = save_llama(tmp_path / "src")
    os.truncate(source / "model.safetensors", 5000)
    done = run(source, tmp_path / "dst")
    assert done.returncode == 2
    assert "model.safetensors: damaged, cut off or not safetensors" in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert not (tmp_path / "dst").exists()


@pytest.fixture(scope="module")
def larger(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One that takes long enough to be stopped in the middle."""
    size = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 4}
    return save_llama(tmp_path_factory.mktemp("larger") / "src", torch.float32, **size)


@pytest.fixture(scope="module")
def whole(larger: Path) -> dict[str, bytes]:
    """What becomes of it in one go."""
    assert run(larger, larger.parent / "whole").returncode == 0
    return contents(larger.parent / "whole")


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGKILL])
def test_stopped_by_a_signal_it_goes_on(tmp_path, larger, whole, how):
    out = tmp_path / "dst"
    with subprocess.Popen(**command(larger, out)) as process:
        journal = out / WORK / "journal"
        deadline = time.monotonic() + 240
        while not (journal.exists() and journal.stat().st_size > 100):
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.002)
        process.send_signal(how)
        stdout, stderr = process.communicate(timeout=60)
    assert stdout == ""
    if how is signal.SIGINT:
        assert process.returncode == 130
        # Behind it stands what the frame says of Ctrl-C, which depends on typer's version.
        assert stderr.startswith("peftkern: stopped; the same command goes on from here\n")
        assert "Traceback" not in stderr
    assert [path.name for path in out.iterdir()] == [WORK]
    done = run(larger, out)
    assert (done.returncode, done.stderr) == (0, "")
    assert "by an earlier run)" in done.stdout.splitlines()[0]
    assert contents(out) == whole
