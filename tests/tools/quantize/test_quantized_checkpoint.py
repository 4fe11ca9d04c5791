"""Writing NF4 checkpoints: the bytes, what is no weight, memory."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
import torch
from checkpoint_folders import load_tensors, save_tensors
from processes import run_code
from quantized_folders import CONFIG, SMALL, SMALL_LINEAR, convert_small, refused
from safetensors.torch import load_file

import peftkern
from peftkern.formats.nf4 import BLOCKSIZES, STATE_BYTES, STATE_KEY, NF4Weight
from peftkern.tools.quantize.file_plan import Size


@pytest.mark.parametrize("double_quant", [True, False])
@pytest.mark.parametrize("shard_bytes", [1, 1500, 10**9])
def test_every_tensor_is_written(tmp_path, small, double_quant, shard_bytes):
    out = tmp_path / "out"
    options = {"blocksize": 32, "double_quant": double_quant, "shard_bytes": shard_bytes}
    summary = convert_small(small, out, **options)
    got = load_tensors(out)
    errors = []
    for name, tensor in SMALL.items():
        if name not in SMALL_LINEAR:
            assert got[name].dtype is tensor.dtype and torch.equal(got.pop(name), tensor)
            continue
        dense = tensor.T.contiguous() if SMALL_LINEAR[name] else tensor
        expected = peftkern.quantize_nf4(dense, blocksize=32, double_quant=double_quant)
        prefix = name.removesuffix("weight")
        w = NF4Weight.from_state_dict(got, prefix)
        assert (w.shape, w.dtype, w.blocksize) == (tuple(dense.shape), tensor.dtype, 32)
        for key, value in expected.state_dict(prefix).items():
            written = got.pop(key)
            if key.endswith(STATE_KEY):
                assert bytes(written.tolist()).rstrip(b" ") == bytes(value.tolist())
            else:
                assert written.dtype is value.dtype and torch.equal(written, value)
        difference = peftkern.dequantize_nf4(w).double() - dense.double()
        errors.append((difference.norm() / dense.double().norm()).item())
    assert got == {}
    assert summary.largest_error == pytest.approx(max(errors), rel=1e-6)
    assert summary.plan.quantized.tensors == 3
    before, after = (sum(t.nbytes for t in x.values()) for x in (SMALL, load_tensors(out)))
    parameters = sum(tensor.numel() for tensor in SMALL.values())
    assert summary.plan.total == Size(len(SMALL), parameters, before, after)
    weights = sorted(path.name for path in out.glob("*.safetensors"))
    assert weights == sorted(summary.plan.files)
    assert len(weights) in {1: [len(SMALL)], 1500: [2, 3], 10**9: [1]}[shard_bytes]
    if len(weights) > 1:
        weight_map = {key: path for path in weights for key in load_file(out / path)}
        index = {"metadata": {"total_size": after}, "weight_map": weight_map}
        assert json.loads((out / "model.safetensors.index.json").read_text()) == index
    before, config = (json.loads((at / "config.json").read_text()) for at in (small, out))
    assert config == {**before, "quantization_config": CONFIG}
    for path in weights:
        check_alignment((out / path).read_bytes())
        assert (out / path).stat().st_mode == (out / "config.json").stat().st_mode


def check_alignment(data: bytes) -> None:
    """Tensors lie at multiples of their element size."""
    length = int.from_bytes(data[:8], "little")
    assert length % 8 == 0
    sizes = {"F32": 4, "F16": 2, "BF16": 2, "I64": 8, "U8": 1, "BOOL": 1}
    for entry in json.loads(data[8 : 8 + length]).values():
        assert "dtype" not in entry or entry["data_offsets"][0] % sizes[entry["dtype"]] == 0


@pytest.mark.parametrize("shape", [(2**40, 2**22 - 1), (0, 5), (1, 1)])
def test_state_fits_its_room(shape):
    """The longest sizes and numbers that there are; nothing of such a weight is in memory."""
    empty = dict.fromkeys(("absmax", "nested_absmax", "nested_code"), torch.empty(0))
    settings = {
        "blocksize": 4096,
        "nested_blocksize": 256,
        "dtype": torch.bfloat16,
        "quant_type": "nf4",
    }
    offset, packed = torch.tensor(-1.1754943508222875e-38), torch.empty(0, dtype=torch.uint8)
    w = SimpleNamespace(
        shape=shape, device="cpu", packed=packed, nested_offset=offset, **settings, **empty
    )
    assert len(NF4Weight.state_dict(w)[f"weight.{STATE_KEY}"]) <= STATE_BYTES


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_weight_that_nf4_cannot_hold(tmp_path, value):
    weight = torch.randn(8, 16)
    weight[3, 5] = value
    tensors = {"a.weight": torch.randn(8, 8), "w.weight": weight}
    source = save_tensors(tmp_path / "src", {"model.safetensors": tensors})
    linear = dict.fromkeys(tensors, False)
    refused(r"w\.weight: holds NaN or infinity", source, tmp_path / "out", linear=linear)
    assert not (tmp_path / "out").exists()


def test_zero_and_empty_weights(tmp_path):
    tensors = {"zero.weight": torch.zeros(8, 16), "empty.weight": torch.zeros(0, 16)}
    source = save_tensors(tmp_path / "src", {"model.safetensors": tensors})
    summary = convert_small(source, tmp_path / "out", linear=dict.fromkeys(tensors, False))
    assert summary.largest_error == 0
    got = load_tensors(tmp_path / "out")
    for name, tensor in tensors.items():
        w = NF4Weight.from_state_dict(got, name.removesuffix("weight"))
        assert torch.equal(peftkern.dequantize_nf4(w), tensor)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"linear": {"none.weight": False}}, "no such tensor"),
        ({"linear": {"steps": False}}, r"two dimensions.*I64 \[5\]"),
        ({"blocksize": 65}, f"expected one of {BLOCKSIZES[0]}, "),
        ({"shard_bytes": 0}, "shard_bytes: expected at least 1"),
    ],
)
def test_arguments_that_make_no_sense(tmp_path, small, options, words):
    refused(words, small, tmp_path / "out", **options)
    (small / "tokenizer.json").symlink_to("/etc/passwd")
    refused(r"tokenizer\.json: a link to outside", small, tmp_path / "out")
    assert not (tmp_path / "out").exists()


MEASURE = """
import sys
from peftkern.tools.checkpoints.checkpoint import read_checkpoint
from peftkern.tools.quantize.file_plan import Choice, Options
from peftkern.tools.quantize.quantized_checkpoint import quantize_checkpoint

def peak():
    with open("/proc/self/status") as file:  # ru_maxrss is inherited from the test's process
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith("VmHWM"))

def run(source, destination):
    checkpoint = read_checkpoint(source)
    linear = {name: False for name in checkpoint.tensors if "kept" not in name}
    options = Options(shard_bytes=5_000_000)
    quantize_checkpoint(checkpoint, destination, Choice(linear), {}, options)

run(sys.argv[1], sys.argv[2] + "-warm")
before = peak()
run(sys.argv[3], sys.argv[2])
print(peak() - before)
"""


def test_memory_is_that_of_one_file_and_one_tensor(tmp_path):
    """Peak RSS of a process, over that after a small run: four times the largest tensor covers the
    file with two weights in 4 bits or one tensor that is kept, a weight and the pieces that are
    compared; all that is written is more than that."""
    shape, count = (1024, 4096), 24
    tensors = {f"{i}.weight": torch.randn(shape).bfloat16() for i in range(count)}
    tensors["kept"] = torch.zeros(shape, dtype=torch.bfloat16)
    large = save_tensors(tmp_path / "large", {"model.safetensors": tensors})
    warm = save_tensors(tmp_path / "warm", {"model.safetensors": {"a.weight": torch.ones(64, 64)}})
    # What is freed goes back to the system, as it does with the tensors of real models.
    back = {"MALLOC_MMAP_THRESHOLD_": "1000000"}
    grown = int(run_code(MEASURE, warm, tmp_path / "out", large, **back))
    largest = 2 * shape[0] * shape[1]
    assert largest < grown < 4 * largest
    written = sum(path.stat().st_size for path in (tmp_path / "out").glob("*.safetensors"))
    assert written > 7 * largest
