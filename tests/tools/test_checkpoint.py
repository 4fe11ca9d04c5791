"""Reading checkpoint folders: what comes back lies within the files, all else is one clear line."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_folders import (
    load_tensors,
    raw_safetensors,
    save_llama,
    save_tensors,
    write_index,
)
from hypothesis import example, given
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor

from peftkern.tools.quantize.checkpoint import (
    DTYPES,
    CheckpointError,
    read_checkpoint,
    read_tensors,
)

TWO = {"a.weight": torch.arange(12.0).view(3, 4), "b": torch.arange(5, dtype=torch.int64)}
# Entries that are right, for headers with one thing wrong.
A = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
B = {"dtype": "U8", "shape": [4], "data_offsets": [8, 12]}
DATA = bytes(range(12))


def refused(folder: Path, *words: str) -> None:
    with pytest.raises(CheckpointError) as caught:
        read_checkpoint(folder)
    message = str(caught.value)
    assert all(word in message for word in words), message
    assert "\n" not in message


def raw(tensor: Tensor) -> bytes:
    return bytes(tensor.reshape(-1).view(torch.uint8).tolist())


@pytest.mark.parametrize("sharded", [False, True])
def test_tensors_are_those_of_safetensors(tmp_path, sharded):
    found = read_checkpoint(save_llama(tmp_path, sharded=sharded))
    assert len(found.files) > 1 if sharded else len(found.files) == 1
    expected = load_tensors(tmp_path)
    assert expected.keys() == found.tensors.keys()
    infos = found.tensors.values()
    for info, got in zip(infos, read_tensors(infos), strict=True):
        assert got.dtype is expected[info.name].dtype and torch.equal(got, expected[info.name])
        assert info.nbytes == got.numel() * got.element_size()
    assert found.nbytes == sum(len(raw(tensor)) for tensor in expected.values())
    assert found.config["model_type"] == "llama"


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=str)
def test_every_dtype_and_an_empty_tensor(tmp_path, dtype):
    tensors = {"x": torch.arange(6).to(dtype), "none": torch.empty(0, 3, dtype=dtype)}
    found = read_checkpoint(save_tensors(tmp_path, {"model.safetensors": tensors}))
    for name, expected in tensors.items():
        (got,) = read_tensors([found.tensors[name]])
        assert got.dtype is dtype and torch.equal(got, expected)


def test_not_a_folder(tmp_path):
    refused(tmp_path / "x", "expected a folder", "nothing")
    (tmp_path / "m.gguf").write_bytes(b"GGUF")
    refused(tmp_path / "m.gguf", "GGUF is not read", "a file")


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("pytorch_model.bin", "pickles"),
        ("m.Q4_K_M.gguf", "GGUF"),
        ("model-00001-of-00002.safetensors", "without their index"),
        ("readme.txt", "neither"),
    ],
)
def test_no_safetensors_checkpoint(tmp_path, name, words):
    (tmp_path / name).write_bytes(b"")
    (tmp_path / "config.json").write_text("{}")
    refused(tmp_path, words)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (None, "expected config.json beside the weights, got none"),
        ("[1]", "JSON object"),
        ('{"quantization_config": {"quant_method": "gptq"}}', "already quantized ('gptq')"),
        ('{"quantization_config": 3}', "already quantized (3)"),
    ],
)
def test_config_that_cannot_be_used(tmp_path, text, words):
    save_tensors(tmp_path, {"model.safetensors": TWO})
    (tmp_path / "config.json").unlink()
    if text is not None:
        (tmp_path / "config.json").write_text(text)
    refused(tmp_path, words)


@pytest.mark.parametrize(
    ("name", "tensor", "words"),
    [
        ("a.weight.absmax", torch.zeros(2), "already quantized"),
        ("a.qweight", torch.zeros(2, dtype=torch.int32), "already quantized"),
        ("a.SCB", torch.zeros(2), "already quantized"),
        ("a.weight.quant_state.bitsandbytes__nf4", torch.zeros(2), "already quantized"),
        ("a.weight", torch.zeros(2).to(torch.float8_e4m3fn), "F8_E4M3"),
        ("a.weight", torch.zeros(2, dtype=torch.complex64), "C64"),
        ("a\x1b[2J", torch.zeros(2), "can be printed"),
    ],
)
def test_tensor_that_cannot_be_used(tmp_path, name, tensor, words):
    refused(save_tensors(tmp_path, {"model.safetensors": {name: tensor}}), words)


def test_weights_of_another_framework(tmp_path):
    save_tensors(tmp_path, {"model.safetensors": TWO})
    save_file(TWO, tmp_path / "model.safetensors", metadata={"format": "tf"})
    refused(tmp_path, "expected weights of PyTorch", "'tf'")


@pytest.mark.parametrize(
    ("changes", "data", "length", "words"),
    [
        ({}, DATA[:-1], None, "damaged"),
        ({}, DATA + b"x", None, "damaged"),
        ({}, DATA, 10**6, "damaged"),
        ({}, DATA, 2**63, "damaged"),
        ({"data_offsets": [4, 8]}, DATA, None, "damaged"),
        ({"data_offsets": [9, 13]}, DATA + b"x", None, "damaged"),
        ({"data_offsets": [-4, 8]}, DATA, None, "damaged"),
        ({"shape": [2**40, 2**40]}, DATA, None, "damaged"),
        ({"dtype": "NF4"}, DATA, None, "damaged"),
        (None, b"", None, "no tensors"),
    ],
)
def test_file_that_lies(tmp_path, changes, data, length, words):
    header = {} if changes is None else {"a": A, "b": {**B, **changes}}
    refused_file(tmp_path, raw_safetensors(header, data, length), words)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "damaged"),
        (raw_safetensors(b"{" + b"[" * 5000, b""), "damaged"),
        (b"version https://git-lfs.github.com/spec/v1", "damaged"),
        (raw_safetensors(f'{{"a": {A}, "a": {A}}}'.replace("'", '"').encode(), DATA[:8]), "model"),
    ],
)
def test_file_of_another_kind_or_with_a_name_twice(tmp_path, content, words):
    refused_file(tmp_path, content, words)


def refused_file(folder: Path, content: bytes, words: str) -> None:
    save_tensors(folder, {"model.safetensors": TWO})
    (folder / "model.safetensors").write_bytes(content)
    refused(folder, words, str(folder))


def test_index_and_shards_disagree(tmp_path):
    one, two = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
    x, y = torch.zeros(2), torch.ones(3)
    save_tensors(tmp_path, {one: {"x": x}, two: {"y": y}})
    assert set(read_checkpoint(tmp_path).tensors) == {"x", "y"}
    write_index(tmp_path, {"x": one, "y": one, "z": two})
    refused(tmp_path, "'y' is in", one, "does not have it")
    write_index(tmp_path, {"x": one, "y": two, "z": two})
    refused(tmp_path, "'z' is in", two)
    save_file({"x": x, "y": y}, tmp_path / two)
    write_index(tmp_path, {"x": one, "y": two})
    refused(tmp_path, "'x': in both", one, two)
    (tmp_path / two).unlink()
    refused(tmp_path, two, "No such file")


@pytest.mark.parametrize(
    "weight_map",
    [
        *(None, {}, [], {"x": 3}, {"x": "pytorch_model.bin"}),
        *({"x": f"{folder}model.safetensors"} for folder in ("../", "/etc/", "sub/", "..\\")),
        *({"x": f"{stem}.safetensors"} for stem in ("", ".", "a\0", "a\n")),
    ],
)
def test_index_with_names_that_are_not_plain(tmp_path, weight_map):
    save_tensors(tmp_path, {"model-1.safetensors": TWO})
    write_index(tmp_path, weight_map)
    refused(tmp_path, "model.safetensors.index.json: expected")


@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
def test_link_to_outside(tmp_path, name):
    outside = save_tensors(tmp_path / "outside", {"model.safetensors": TWO})
    folder = save_tensors(tmp_path / "folder", {"model.safetensors": TWO})
    (folder / name).unlink()
    (folder / name).symlink_to(outside / name)
    refused(folder, name, "a link to outside")
    (folder / name).unlink()
    (folder / name).symlink_to(folder / name)
    refused(folder, name)


def test_links_of_a_hub_cache_are_followed(tmp_path):
    cache = tmp_path / "models--some--model"
    folder = save_tensors(cache / "snapshots" / "0123", {"model.safetensors": TWO})
    blob = cache / "blobs" / "beef"
    blob.parent.mkdir()
    os.replace(folder / "model.safetensors", blob)
    (folder / "model.safetensors").symlink_to("../../blobs/beef")
    assert torch.equal(*read_tensors([read_checkpoint(folder).tensors["b"]]), TWO["b"])


@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir])  # opening a pipe would wait for ever
def test_pipe_and_folder_instead_of_a_file(tmp_path, make):
    path = save_tensors(tmp_path, {"model.safetensors": TWO}) / "model.safetensors"
    path.unlink()
    make(path)
    refused(tmp_path, "expected a file")


def test_file_that_shrinks_after_the_check(tmp_path):
    found = read_checkpoint(save_tensors(tmp_path, {"model.safetensors": TWO}))
    reading = read_tensors(found.tensors.values())  # "b" first: its elements are larger
    next(reading)
    os.truncate(tmp_path / "model.safetensors", 200)
    for rest in (reading, read_tensors([found.tensors["b"]])):
        with pytest.raises(CheckpointError, match=r"model\.safetensors: changed while it was read"):
            next(rest)


numbers = st.one_of(st.integers(-4, 40), st.integers(-(2**70), 2**70), st.floats(), st.booleans())
junk = st.one_of(st.none(), numbers, st.text(max_size=4), st.lists(numbers, max_size=3))
entries = st.fixed_dictionaries(
    {},
    optional={
        "dtype": st.one_of(st.sampled_from([*DTYPES, "F8_E5M2", "F4", "C64"]), junk),
        "shape": st.one_of(st.lists(st.integers(0, 12), max_size=3), junk),
        "data_offsets": st.one_of(st.lists(st.integers(0, 16), min_size=2, max_size=2), junk),
        "extra": junk,
    },
)
names = st.one_of(st.sampled_from(["a", "b", "a.weight", "__metadata__"]), st.text(max_size=3))


@st.composite
def files(draw: st.DrawFn) -> bytes:
    """A right file with something wrong in its header, its length or its bytes, or nothing."""
    header: dict[str, Any] = {"a": dict(A), "b": dict(B)}
    for _ in range(draw(st.integers(0, 2))):
        change = draw(entries)
        name = draw(names)
        header[name] = {**header.get(name, draw(st.sampled_from([A, B, {}]))), **change}
    if draw(st.booleans()):
        header = draw(st.one_of(st.just(header), st.dictionaries(names, entries, max_size=3), junk))
    data = bytearray(raw_safetensors(header, DATA))
    for _ in range(draw(st.integers(0, 2))):
        at = draw(st.integers(0, len(data) - 1))
        kind = draw(st.sampled_from(["flip", "cut", "insert"]))
        if kind == "flip":
            data[at] ^= draw(st.integers(1, 255))
        elif kind == "cut":
            del data[at : at + draw(st.integers(1, 9))]
        else:
            data[at:at] = draw(st.binary(min_size=1, max_size=9))
        data = data or bytearray(b"\0")
    return bytes(data)


@given(files())
@example(raw_safetensors({"a": A, "b": B}, DATA))
@example(raw_safetensors({"a": {**A, "shape": [2, 0]}}, b""))
def test_any_file_is_refused_or_lies_within_itself(content):
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "config.json").write_text("{}")
        (folder / "model.safetensors").write_bytes(content)
        try:
            found = read_checkpoint(folder)
        except CheckpointError:
            return
        infos = found.tensors.values()
        at = len(content) - found.nbytes  # they fill the file in their order
        for info, tensor in zip(infos, read_tensors(infos), strict=True):
            assert tensor.shape == info.shape and tensor.dtype is DTYPES[info.dtype]
            assert raw(tensor) == content[at : at + info.nbytes]
            at += info.nbytes


@given(st.one_of(junk, st.dictionaries(st.text(max_size=4), st.one_of(st.text(), junk))))
def test_any_index_is_refused_or_names_files_of_the_folder(weight_map):
    with tempfile.TemporaryDirectory() as name:
        folder = save_tensors(Path(name) / "in", {"model-1.safetensors": TWO})
        save_tensors(Path(name), {"model.safetensors": TWO})
        write_index(folder, weight_map)
        try:
            found = read_checkpoint(folder)
        except CheckpointError:
            return
        assert all(path.parent == folder for path in found.files)
