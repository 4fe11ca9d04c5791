"""Writing NF4 checkpoints: the bytes, resuming, refusing, memory, and what transformers loads."""

from __future__ import annotations

import itertools
import json
import os
import resource
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import bitsandbytes as bnb
import pytest
import torch
from checkpoint_folders import LLAMA, contents, load_tensors, save_llama, save_tensors
from processes import run_code
from safetensors.torch import load_file
from tolerances import ABSMAX_CODE_BIN, ABSMAX_CODE_MISMATCH, DYNAMIC_MAP_RTOL, NF4_MAX_HALF_GAP
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    CLIPVisionConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaModel,
    LlavaConfig,
    LlavaModel,
    MixtralConfig,
    MixtralForCausalLM,
    T5Config,
    T5Model,
)

import peftkern
from peftkern.formats.nf4 import BLOCKSIZES, STATE_BYTES, STATE_KEY, NF4Weight, dynamic_map
from peftkern.tools.quantize import nf4_checkpoint
from peftkern.tools.quantize.checkpoint import CheckpointError, read_checkpoint
from peftkern.tools.quantize.file_plan import Choice, Options, Size
from peftkern.tools.quantize.linear_weights import find_weights
from peftkern.tools.quantize.nf4_checkpoint import MANIFEST, quantize_checkpoint
from peftkern.tools.quantize.staging import FILES, WORK

CONFIG = {"quant_method": "bitsandbytes"}
SMALL = {
    "one.weight": (torch.randn(24, 40) * 0.1).bfloat16(),
    "one.bias": torch.randn(7),
    "two.weight": torch.randn(5, 13),
    "norm": torch.randn(3).half(),
    "steps": torch.arange(5),
    "mask": torch.tensor([True, False, True]),
    "three.weight": torch.randn(33, 65).half(),
}
SMALL_LINEAR = {"one.weight": False, "two.weight": False, "three.weight": True}
# Of at most 1500 bytes: "one.weight" alone, "three.weight" alone, and the rest.
FILES_OF_SMALL = [f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)]


@pytest.fixture
def small(tmp_path: Path) -> Path:
    """Tensors of many dtypes and odd sizes, in two shards."""
    names = list(SMALL)
    shards = {
        "model-00001-of-00002.safetensors": {name: SMALL[name] for name in names[:3]},
        "model-00002-of-00002.safetensors": {name: SMALL[name] for name in names[3:]},
    }
    folder = save_tensors(tmp_path / "src", shards)
    (folder / "config.json").write_text('{"model_type": "none", "limit": [0.0, Infinity]}')
    return folder


def convert(source: Path, destination: Path, **options: Any) -> nf4_checkpoint.Summary:
    """As the command does it."""
    checkpoint = read_checkpoint(source)
    mine = {k: options.pop(k) for k in ("skip", "compute_dtype") if k in options}
    mine["blocksize"] = options.get("blocksize", 64)
    found = find_weights(checkpoint, double_quant=options.get("double_quant", True), **mine)
    return quantize_checkpoint(checkpoint, destination, *found, Options(**options))


def convert_small(source: Path, destination: Path, **options: Any):
    how = {name: options.pop(name) for name in ("force", "progress") if name in options}
    linear, checkpoint = options.pop("linear", SMALL_LINEAR), read_checkpoint(source)
    choice = Choice(linear)
    return quantize_checkpoint(checkpoint, destination, choice, CONFIG, Options(**options), **how)


def refused(words: str, *folders: Path, **options: Any) -> None:
    with pytest.raises(CheckpointError, match=words):
        convert_small(*folders, **options)


def stopped(calls: int, *folders: Path, error: Any = KeyboardInterrupt, **options: Any) -> None:
    """Ctrl-C, or that error, at a piece of work."""
    numbers = itertools.count()

    def progress(count: int, name: str) -> None:
        if next(numbers) == calls:
            raise error

    with pytest.raises(error):
        convert_small(*folders, progress=progress, **options)


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
    settings = {"blocksize": 4096, "nested_blocksize": 256, "dtype": torch.bfloat16}
    offset, packed = torch.tensor(-1.1754943508222875e-38), torch.empty(0, dtype=torch.uint8)
    w = SimpleNamespace(
        shape=shape, device="cpu", packed=packed, nested_offset=offset, **settings, **empty
    )
    assert len(NF4Weight.state_dict(w)[f"weight.{STATE_KEY}"]) <= STATE_BYTES


# Against transformers and bitsandbytes.


def on_the_fly(source: Path, cls: Any = AutoModelForCausalLM, **config: Any) -> nn.Module:
    config = {"bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": torch.float32, **config}
    settings = BitsAndBytesConfig(load_in_4bit=True, **config)
    return cls.from_pretrained(source, quantization_config=settings)


def four_bit(model: nn.Module) -> dict[str, bnb.nn.Linear4bit]:
    return {n: m for n, m in model.named_modules() if isinstance(m, bnb.nn.Linear4bit)}


def assert_same_model(got: nn.Module, expected: nn.Module) -> None:
    """The same layers in 4 bits, the same bytes, and then the same output, bit for bit.

    bitsandbytes' own CPU quantizer of a nested absmax looks codes up by bins, in a table that
    torch.linspace has made: what differs is bounded, and taken over before outputs are compared.
    """
    layers, others = four_bit(got), four_bit(expected)
    assert layers.keys() == others.keys() and layers
    state, other_state = got.state_dict(), expected.state_dict()
    assert state.keys() == other_state.keys()
    off, count = 0, 0
    for key, value in state.items():
        assert value.dtype is other_state[key].dtype, key
        if key.endswith("weight.absmax") and value.dtype is torch.uint8:
            code = torch.tensor(dynamic_map())
            mine, theirs = value.long(), other_state[key].long()
            same_bin = (code[mine] - code[theirs]).abs() <= ABSMAX_CODE_BIN
            assert (same_bin | ((mine - theirs).abs() <= 1)).all()
            off, count = off + int((mine != theirs).sum()), count + value.numel()
        elif key.endswith("weight.nested_quant_map"):
            torch.testing.assert_close(value, other_state[key], rtol=DYNAMIC_MAP_RTOL, atol=0)
        else:
            assert torch.equal(value, other_state[key]), key
    assert off <= ABSMAX_CODE_MISMATCH * count + 1
    for name, layer in layers.items():
        mine, theirs = layer.weight.quant_state, others[name].weight.quant_state
        theirs.absmax = mine.absmax
        if mine.nested:
            theirs.state2.code = mine.state2.code
    ids = torch.arange(2 * 9).view(2, 9) % 47
    more = {"decoder_input_ids": ids} if got.config.is_encoder_decoder else {}
    for model in (got, expected):
        model.train()  # in eval mode bitsandbytes repacks weights in place on some CPUs
    assert torch.equal(got(ids, **more)[0], expected(ids, **more)[0])


SOME = {"skip": ["model.layers.0.mlp", "v_proj"], "compute_dtype": "float16"}


@pytest.mark.parametrize(
    ("dtype", "sharded", "tied", "options"),
    [
        *((torch.float32, False, False, {}), (torch.float16, True, True, {})),
        *((torch.bfloat16, True, False, {}), (torch.bfloat16, False, True, {})),
        *((torch.bfloat16, False, False, {"double_quant": two, **SOME}) for two in (True, False)),
    ],
)
def test_transformers_loads_what_it_would_have_quantized(tmp_path, dtype, sharded, tied, options):
    """With every option, too."""
    source = save_llama(tmp_path / "src", dtype, sharded=sharded, tie_word_embeddings=tied)
    convert(source, tmp_path / "out", shard_bytes=30_000 if sharded else 10**9, **options)
    assert len(list((tmp_path / "out").glob("*.safetensors"))) > 1 or not sharded
    got = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert got.dtype is dtype and len(four_bit(got)) == (14 - 3 - 2 if options else 14)
    how = {
        "bnb_4bit_use_double_quant": options.get("double_quant", True),
        "bnb_4bit_compute_dtype": torch.float16 if options else dtype,
        "llm_int8_skip_modules": ["lm_head", *SOME["skip"]] if options else None,
    }
    config = got.hf_quantizer.quantization_config
    assert config.bnb_4bit_compute_dtype is how["bnb_4bit_compute_dtype"]
    assert_same_model(got, on_the_fly(source, **how))


def test_blocksize_reaches_the_loaded_model(tmp_path):
    source = save_llama(tmp_path / "src", torch.float32)
    convert(source, tmp_path / "out", blocksize=256)
    got = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    dense = AutoModelForCausalLM.from_pretrained(source)
    for name, layer in four_bit(got).items():
        state = layer.weight.quant_state
        assert state.blocksize == 256
        w = NF4Weight.from_bitsandbytes(layer.weight)
        weight = dense.get_submodule(name).weight
        error = (peftkern.dequantize_nf4(w) - weight).abs().max() / weight.abs().max()
        assert error < NF4_MAX_HALF_GAP
        assert state.dtype is torch.float32


GPT2 = {"vocab_size": 48, "n_positions": 32, "n_embd": 64, "n_layer": 2, "n_head": 2}
NO_DROPOUT = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
EXPERTS = {**LLAMA, "num_local_experts": 3, "intermediate_size": 32}
T5 = {"d_model": 64, "d_ff": 96, "d_kv": 16, "num_layers": 2, "num_heads": 4, "dropout_rate": 0}
VISION = {"image_size": 32, "patch_size": 16, "num_attention_heads": 4, "num_hidden_layers": 2}
VISION = CLIPVisionConfig(hidden_size=64, intermediate_size=96, **VISION)
PARTS = {"vision_config": VISION, "text_config": LlamaConfig(**LLAMA), "image_token_index": 47}
MODELS = {  # and how many of their weights are quantized
    "no head": (lambda: LlamaModel(LlamaConfig(**LLAMA)), 14),
    "Conv1D": (lambda: GPT2LMHeadModel(GPT2Config(**GPT2, **NO_DROPOUT)), 8),
    "fused experts": (lambda: MixtralForCausalLM(MixtralConfig(**EXPERTS)), 8),
    "encoder and decoder": (lambda: T5Model(T5Config(vocab_size=48, **T5)), 28),
    "vision": (lambda: LlavaModel(LlavaConfig(**PARTS)), 28),
}


@pytest.mark.parametrize("kind", MODELS)
def test_other_models(tmp_path, kind):
    """With transposed weights, experts that transformers fuses, layers kept in float32, two parts.

    Those without a head are loaded under prefixes that the tensors do not have.
    """
    make, quantized = MODELS[kind]
    torch.manual_seed(0)
    model = make()
    model.save_pretrained(tmp_path / "src")
    skip = ["experts"] if kind == "fused experts" else []
    summary = convert(tmp_path / "src", tmp_path / "out", double_quant=False, skip=skip)
    assert summary.plan.quantized.tensors == quantized
    got = type(model).from_pretrained(tmp_path / "out")
    assert_same_model(got, on_the_fly(tmp_path / "src", type(model)))


BESIDE = {  # what is copied; tests/tools/test_companions.py has the layouts of repositories
    *("tokenizer.json", "LICENSE", "USE_POLICY", "additional_chat_templates/tools.jinja"),
    *("1_Pooling/config.json", "2_Dense/config.json", "2_Dense/model.safetensors"),
}
NOT_BESIDE = {".gitattributes", ".git/", "original/consolidated.00.pth", "pytorch_model.bin"}


def add_files(folder: Path, names: set[str]) -> None:
    for name in names:
        path = folder / (f"{name}file" if name.endswith("/") else name)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"content of {name}")


def test_files_and_folders_are_there_whole_or_not_at_all(tmp_path, small, monkeypatch):
    """Copied or named; stopped while they are copied, and at every second file that is moved."""
    add_files(small, BESIDE | NOT_BESIDE)
    options = {"shard_bytes": 1500}
    summary = convert_small(small, tmp_path / "whole", **options)
    assert (set(summary.copied), set(summary.left)) == (BESIDE, NOT_BESIDE)
    copied = contents(tmp_path / "whole")
    own = {"config.json", "model.safetensors.index.json", *FILES_OF_SMALL}
    assert copied.keys() == own | BESIDE
    assert all(copied[name] == f"content of {name}".encode() for name in BESIDE)
    out, copyfile, replace = tmp_path / "out", shutil.copyfile, os.replace

    def stopping(source: Path, target: Path) -> None:
        copyfile(source, target)
        if Path(source).parent.name == "2_Dense":
            raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(shutil, "copyfile", stopping)
        convert_small(small, out, **options)
    assert [path.name for path in out.iterdir()] == [WORK]
    (small / "USE_POLICY").unlink()  # what a run before has copied goes with it
    (tmp_path / "whole" / "USE_POLICY").unlink()
    moves = 0

    def moving(source: Path, target: Path) -> None:
        nonlocal moves
        if WORK not in Path(target).parts:
            moves += 1
            if moves % 2 == 0:
                raise KeyboardInterrupt
        replace(source, target)

    monkeypatch.setattr(os, "replace", moving)
    for _ in range(40):
        try:
            convert_small(small, out, **options)
            break
        except KeyboardInterrupt:
            assert not (out / "config.json").exists()
    assert moves > len(BESIDE) + 4 and contents(out) == contents(tmp_path / "whole")


@pytest.mark.parametrize(
    "put",
    [
        lambda path: path.write_text("mine"),
        lambda path: path.symlink_to("../elsewhere"),
        lambda path: (path / "config.json").mkdir(parents=True),
    ],
    ids=["file", "link", "folder"],
)
def test_no_copy_goes_through_a_link_or_replaces_a_folder(tmp_path, small, put):
    add_files(small, {"1_Pooling/config.json"})
    out, elsewhere = tmp_path / "out", tmp_path / "elsewhere"
    convert_small(small, out)
    shutil.rmtree(out / "1_Pooling")
    elsewhere.mkdir()
    put(out / "1_Pooling")
    before = contents(tmp_path)
    refused(r"1_Pooling.*: expected a (folder|file) or nothing", small, out, force=True)
    assert contents(tmp_path) == before and list(elsewhere.iterdir()) == []


# Interruptions.


def test_stopped_anywhere_it_goes_on_to_the_same_bytes(tmp_path, small):
    """By Ctrl-C, once or twice, or by an error of the system."""
    options = {"shard_bytes": 1500}
    convert_small(small, tmp_path / "whole", **options)
    whole = contents(tmp_path / "whole")
    for calls in range(len(SMALL)):
        out, error = tmp_path / f"out{calls}", OSError if calls % 3 == 2 else KeyboardInterrupt
        stopped(calls, small, out, error=error, **options)
        assert [path.name for path in out.iterdir()] == [WORK]
        if calls % 2:  # once more, before it gets to the end
            stopped(1, small, out, **options)
        assert convert_small(small, out, **options).resumed == min(calls, 2)
        assert contents(out) == whole


# What is noted of the first file: nothing that can be read, or no note, or of another content.
NOTES = [1, ["0", 0.1], [[], 0.1, ""], ["0", {}, ""], ["0", float("nan"), ""], ["0", 0.1, None]]
NOTES = [json.dumps({FILES_OF_SMALL[0]: note}) for note in (*NOTES, ["0", 0.1, ""])]
MANIFESTS = ["[1]", "[" * 100_000, "\xff", *NOTES]


@pytest.mark.parametrize(
    "damage",
    ["flip", "truncate", "delete", "header", "metadata", "other", "cut manifest", *MANIFESTS],
    ids=lambda damage: damage[:40],
)
def test_what_was_lost_is_written_again(tmp_path, small, damage):
    """What is not the content that the manifest tells, too: other files, manifests of junk."""
    options = {"shard_bytes": 1500}
    convert_small(small, tmp_path / "whole", **options)
    out = tmp_path / "out"
    stopped(5, small, out, **options)
    first, second = (out / WORK / FILES / name for name in FILES_OF_SMALL[:2])
    manifest, data = out / WORK / MANIFEST, first.read_bytes()
    middle = len(data) // 2
    damaged = {
        "flip": data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :],
        "truncate": data[: len(data) * 2 // 3],
        "header": b"\0" * 100 + data[100:],
        "metadata": data.replace(b'{"format":"pt"}', b'{"format":"tf"}'),
        "other": second.read_bytes(),
    }
    if damage in damaged:
        first.write_bytes(damaged[damage])
    elif damage == "delete":
        first.unlink()
    elif damage == "cut manifest":
        os.truncate(manifest, 100)
    else:
        manifest.write_bytes(damage.encode("latin-1"))
    resumed = convert_small(small, out, **options).resumed
    assert resumed == (1 if damage in damaged or damage == "delete" else 0)
    assert contents(out) == contents(tmp_path / "whole")


def test_unfinished_run_with_other_options_or_source(tmp_path, small):
    """It is named, and by force started over."""
    add_files(small, BESIDE)
    out = tmp_path / "out"
    stopped(3, small, out)
    before = contents(out)
    for options, words in (
        ({"blocksize": 128}, "blocksize 64, not 128"),
        ({"double_quant": False}, "double_quant True, not False"),
        ({"shard_bytes": 7}, "shard_bytes 5000000000, not 7"),
        ({"linear": {"one.weight": False}}, "another choice of tensors"),
    ):
        refused(words, small, out, **options)
    shutil.copytree(small, tmp_path / "other")
    os.utime(tmp_path / "other" / "model-00001-of-00002.safetensors")
    refused("another source", tmp_path / "other", out)
    assert contents(out) == before
    (out / WORK / FILES / "2_Dense").mkdir(parents=True)
    (out / WORK / FILES / "2_Dense" / "old").write_text("of a run with other options")
    assert convert_small(small, out, blocksize=128, force=True).resumed == 0
    convert_small(small, tmp_path / "whole", blocksize=128)
    assert contents(out) == contents(tmp_path / "whole")


def test_second_process_is_refused(tmp_path, small):
    out = tmp_path / "out"
    convert_small(small, out, progress=lambda *_: refused("another process", small, out))
    assert (out / "config.json").exists()


@pytest.mark.parametrize("words", ["reads back differently", "File too large"])
def test_disk_that_returns_other_bytes_or_is_full(tmp_path, small, monkeypatch, words):
    out, save_file = tmp_path / "out", nf4_checkpoint.save_file

    def faulty(tensors: dict, path: Path, metadata: dict) -> None:
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (4000 if "large" in words else -1, limits[1]))
        try:
            save_file(tensors, path, metadata)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        data = bytearray(path.read_bytes())
        data[-3] ^= 1
        path.write_bytes(data)

    with monkeypatch.context() as patch, pytest.raises(OSError, match=words):
        patch.setattr(nf4_checkpoint, "save_file", faulty)
        convert_small(small, out)
    assert [path.name for path in out.iterdir()] == [WORK]
    assert convert_small(small, out).resumed == 0


# Refusals: nothing is left behind.


def test_destination_that_cannot_be_used(tmp_path, small):
    held = tmp_path / "held"
    held.mkdir()
    (held / "file").write_text("x")
    before = contents(tmp_path)
    refused("it holds 'file'", small, held)
    refused("got a file", small, held / "file")
    refused("this folder holds none", small, held, force=True)
    link = tmp_path / "link"
    link.symlink_to(small)
    for destination in (small, small / "below" / "it", tmp_path, link / "x"):
        refused("apart from the source", small, destination)
    link.unlink()
    assert contents(tmp_path) == before


def test_force_replaces_a_checkpoint_and_nothing_else(tmp_path, small):
    out = tmp_path / "out"
    convert_small(small, out, shard_bytes=1500)
    (out / "notes.txt").write_text("mine")
    refused("--force replaces", small, out)
    before = contents(out)
    stopped(4, small, out, force=True)
    after = contents(out)
    assert {name: after[name] for name in before} == before  # the old one until the new is complete
    convert_small(small, out, force=True)
    convert_small(small, tmp_path / "whole")
    assert contents(out) == {**contents(tmp_path / "whole"), "notes.txt": b"mine"}


def test_no_space(tmp_path, small, monkeypatch):
    usage = SimpleNamespace(total=10**12, used=10**12, free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    refused("GB of free space", small, tmp_path / "a" / "b")
    assert not (tmp_path / "a").exists()


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
        ({"blocksize": 65}, f"expected one of \\({BLOCKSIZES[0]}, "),
        ({"shard_bytes": 0}, "shard_bytes: expected at least 1"),
    ],
)
def test_arguments_that_make_no_sense(tmp_path, small, options, words):
    refused(words, small, tmp_path / "out", **options)
    (small / "tokenizer.json").symlink_to("/etc/passwd")
    refused(r"tokenizer\.json: a link to outside", small, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"architectures": ["NewForCausalLM"]}, "has no architecture 'NewForCausalLM'"),
        ({"architectures": None}, "has no architecture None"),
        ({"architectures": ["AutoModel"]}, "has no architecture 'AutoModel'"),
        ({"hidden_size": 128}, "does not fit"),
        ({"num_attention_heads": "many"}, "cannot build LlamaForCausalLM"),
        ({"num_hidden_layers": 10**9}, "'num_hidden_layers': expected at most 10000"),
        *(({"skip": name}, "skip: .*q_proj, .*down_proj") for name in ("no", "(", "embed_tokens")),
        ({"skip": r"model.layers.*"}, "no tensor is the weight of a linear layer"),
    ],
)
def test_config_or_names_to_skip_that_do_not_fit(tmp_path, change, words):
    source, skip = save_llama(tmp_path / "src"), [change["skip"]] if "skip" in change else []
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps({**config, **change}))
    with pytest.raises(CheckpointError, match=words):
        find_weights(read_checkpoint(source), skip=skip)


MEASURE = """
import sys
from peftkern.tools.quantize.checkpoint import read_checkpoint
from peftkern.tools.quantize.file_plan import Choice, Options
from peftkern.tools.quantize.nf4_checkpoint import quantize_checkpoint

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
