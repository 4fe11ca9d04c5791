"""Reading checkpoint folders: what comes back lies within the files, all else is one clear line."""

from __future__ import annotations

import itertools
import os
import tempfile
from functools import partial
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
from safetensors.torch import save, save_file
from torch import Tensor

from peftkern.tools.checkpoints.checkpoint import (
    DTYPES,
    SINGLE,
    CheckpointError,
    read_checkpoint,
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
    """Of a model, and in every dtype, empty ones too."""
    save_llama(tmp_path, sharded=sharded)
    if not sharded:
        shapes = {"x": (6,), "none": (0, 3), "one": ()}
        every = itertools.product(shapes.items(), DTYPES.items())
        tensors = {f"{x}.{code}": torch.ones(shape).to(t) for (x, shape), (code, t) in every}
        save_file(tensors, tmp_path / SINGLE)
    found, expected = read_checkpoint(tmp_path), load_tensors(tmp_path)
    assert (len(found.files) > 1) == sharded and found.config["model_type"] == "llama"
    assert expected.keys() == found.tensors.keys()
    infos = found.tensors.values()
    for info in infos:
        got = info.read()
        assert got.dtype is expected[info.name].dtype and torch.equal(got, expected[info.name])
        assert info.nbytes == got.nbytes
    assert found.nbytes == sum(tensor.nbytes for tensor in expected.values())
    stacks = [name for name, tensor in expected.items() if tensor.numel() and tensor.dim()]
    for name in stacks:
        assert list(map(raw, found.tensors[name].items())) == list(map(raw, expected[name]))


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("pytorch_model.bin", "pickles"),
        ("m.Q4_K_M.gguf", "GGUF"),
        ("model-00001-of-00002.safetensors", "without their index"),
        ("readme.txt", "neither"),
    ],
)
def test_no_folder_of_safetensors(tmp_path, name, words):
    (tmp_path / name).write_bytes(b"")
    (tmp_path / "config.json").write_text("{}")
    refused(tmp_path, words)
    what = " GGUF is not read;" * name.endswith("gguf") + " expected a folder"
    refused(tmp_path / name, f"{name}:{what}", "got a file")
    refused(tmp_path / "x", "expected a folder", "got nothing")


def of_two(**changes: Any) -> dict[str, Any]:
    return {"a": A, "b": {**B, **changes}}


TWICE = f'{{"a": {A}, "a": {A}}}'.replace("'", '"').encode()
BROKEN = [  # instead of a file of a folder that can be read
    ("config.json", None, "expected config.json beside the weights, got none"),
    ("config.json", b"[1]", "JSON object"),
    ("config.json", b'{"quantization_config": {"quant_method": "gptq"}}', "quantized ('gptq')"),
    ("config.json", b'{"quantization_config": 3}', "already quantized (3)"),
    *(
        (SINGLE, save({name: tensor}), words)
        for name, tensor, words in (
            ("a.weight.absmax", torch.zeros(2), "already quantized"),
            ("a.qweight", torch.zeros(2, dtype=torch.int32), "already quantized"),
            ("a.SCB", torch.zeros(2), "already quantized"),
            ("a.weight.quant_state.bitsandbytes__nf4", torch.zeros(2), "already quantized"),
            ("a.weight", torch.zeros(2).to(torch.float8_e4m3fn), "F8_E4M3"),
            ("a.weight", torch.zeros(2, dtype=torch.complex64), "C64"),
            ("a\x1b[2J", torch.zeros(2), "can be printed"),
            ("9" * 1025, torch.zeros(2), "of at most 1024 characters"),
        )
    ),
    (SINGLE, save(TWO, {"format": "tf"}), "expected weights of PyTorch, got format 'tf'"),
    (SINGLE, raw_safetensors({}, b""), "no tensors"),
    (SINGLE, raw_safetensors(TWICE, DATA[:8]), "a name twice"),
    *(
        (SINGLE, content, "damaged")
        for content in (
            *(raw_safetensors(of_two(), data) for data in (DATA[:-1], DATA + b"x")),
            *(raw_safetensors(of_two(), DATA, length) for length in (10**6, 2**63)),
            *(raw_safetensors(of_two(data_offsets=at), DATA) for at in ([4, 8], [-4, 8])),
            raw_safetensors(of_two(data_offsets=[9, 13]), DATA + b"x"),
            raw_safetensors(of_two(shape=[2**40, 2**40]), DATA),
            raw_safetensors(of_two(dtype="NF4"), DATA),
            *(b"", raw_safetensors(b"{" + b"[" * 5000, b"")),
            b"version https://git-lfs.github.com/spec/v1",
        )
    ),
]


@pytest.mark.parametrize(("name", "content", "words"), BROKEN)
def test_file_that_cannot_be_used(tmp_path, name, content, words):
    folder = save_tensors(tmp_path, {SINGLE: TWO})
    (folder / name).unlink()
    if content is not None:
        (folder / name).write_bytes(content)
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


def add_one(path: Path) -> None:
    save_file({name: tensor + 1 for name, tensor in TWO.items()}, path)


@pytest.mark.parametrize("change", [partial(os.truncate, length=100), os.utime, add_one])
def test_file_that_is_written_to_after_the_check(tmp_path, change):
    found = read_checkpoint(save_tensors(tmp_path, {SINGLE: TWO}))
    parts = found.tensors["a.weight"].items()
    next(parts)
    change(tmp_path / SINGLE)
    for read in (found.tensors["a.weight"].read, found.tensors["b"].read, partial(next, parts)):
        with pytest.raises(CheckpointError, match=r"model\.safetensors: changed while it was read"):
            read()


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
        at = draw(st.integers(0, len(data)))
        data[at : at + draw(st.integers(0, 9))] = draw(st.binary(max_size=9))
    return bytes(data)


@given(files())
@example(raw_safetensors({"a": A, "b": B}, DATA))
@example(raw_safetensors({"a": {**A, "shape": [2, 0]}}, b""))
def test_any_file_is_refused_or_lies_within_itself(content):
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "config.json").write_text("{}")
        (folder / SINGLE).write_bytes(content)
        try:
            found = read_checkpoint(folder)
        except CheckpointError:
            return
        at = len(content) - found.nbytes  # they fill the file in their order
        for info in found.tensors.values():
            tensor = info.read()
            assert tensor.shape == info.shape and tensor.dtype is DTYPES[info.dtype]
            assert raw(tensor) == content[at : at + info.nbytes]
            at += info.nbytes


@given(st.one_of(junk, st.dictionaries(st.text(max_size=4), st.one_of(st.text(), junk))))
def test_any_index_is_refused_or_names_files_of_the_folder(weight_map):
    with tempfile.TemporaryDirectory() as name:
        folder = save_tensors(Path(name) / "in", {"model-1.safetensors": TWO})
        save_tensors(Path(name), {SINGLE: TWO})
        write_index(folder, weight_map)
        try:
            found = read_checkpoint(folder)
        except CheckpointError:
            return
        assert all(path.parent == folder for path in found.files)
