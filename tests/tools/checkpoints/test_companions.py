"""Which files go with a checkpoint into its copy: on the layouts of real repositories."""

from __future__ import annotations

import ast
import itertools
import os
from pathlib import Path

import pytest
import torch
import transformers
from checkpoint_folders import save_tensors
from hypothesis import given
from hypothesis import strategies as st

from peftkern.tools.checkpoints.checkpoint import (
    SINGLE,
    CheckpointError,
    read_checkpoint,
)
from peftkern.tools.checkpoints.companions import Companions, find_companions, is_weights

TENSORS = {"a.weight": torch.zeros(2, 2)}


def folder_with(folder: Path, *names: str) -> Path:
    save_tensors(folder, {"model.safetensors": TENSORS})
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(name)
    return folder


def companions(folder: Path) -> Companions:
    return find_companions(read_checkpoint(folder))


LAYOUTS = {  # what is copied, and what is left behind
    "Marian": (
        "source.spm target.spm vocab.json generation_config.json",
        "pytorch_model.bin pytorch_model.bin.index.json tf_model.h5 rust_model.ot",
    ),
    "Llama": (
        "LICENSE USE_POLICY.md original/params.json original/tokenizer.model",
        "original/consolidated.00.pth .gitattributes .cache/",
    ),
    "Mistral": (
        "tokenizer.model.v3 params.json tekken.json",
        "consolidated.safetensors consolidated.safetensors.index.json",
    ),
    "sentence-transformers": (
        "modules.json sentence_bert_config.json 1_Pooling/config.json 2_Dense/config.json "
        "2_Dense/model.safetensors 2_Dense/pytorch_model.bin openvino/openvino_model.xml",
        "onnx/model.onnx onnx/model.onnx_data onnx/model_O1.onnx.data openvino/openvino_model.bin "
        "model.fp16.safetensors",
    ),
    "a model within the model": (
        "audio/config.json audio/model-1.safetensors audio/model.safetensors.index.json",
        "metal/model.bin model-Q4_K_M.gguf flax_model.msgpack.index.json",
    ),
    "adapters below, and one without its config": (
        "vision-lora/adapter_config.json vision-lora/adapter_model.safetensors",
        "vision-lora/optimizer.pt adapter_model.bin",
    ),
    "adapter of the model, and training": (
        "adapter_config.json adapter_model.safetensors adapter_model.bin",
        "optimizer.pt training_args.bin checkpoint-500/ global_step500/",
    ),
    "other names": (
        "additional_chat_templates/rag.jinja bpe.codes vocab.bpe vocab.bin prophetnet.tokenizer "
        "COPYING LICENCE a_name\nof_two_lines deep/er/and/deeper/file modeling_own.py",
        "__pycache__/ code/__pycache__/ MODEL.BIN",
    ),
}


@pytest.mark.parametrize("kind", LAYOUTS)
def test_files_of_repositories(tmp_path, kind):
    copied, left = (names.split(" ") for names in LAYOUTS[kind])
    files = [f"{name}file" if name.endswith("/") else name for name in left]
    found = companions(folder_with(tmp_path / "src", *copied, *files))
    assert (list(found.copied), list(found.left)) == (sorted(copied), sorted(left))
    assert found.nbytes == sum(len(name.encode()) for name in copied)


def test_shards_and_index_of_the_checkpoint_itself_are_neither(tmp_path):
    shards = {f"model-{i}.safetensors": {f"{i}": torch.zeros(1)} for i in range(2)}
    folder = save_tensors(tmp_path, shards)
    assert companions(folder).copied == ()
    assert companions(folder).left == ()
    save_tensors(folder, {"model.safetensors": TENSORS})  # which transformers prefers
    assert companions(folder).left == (*shards, "model.safetensors.index.json")


def test_every_file_that_a_tokenizer_of_transformers_reads_is_copied():
    root = Path(transformers.__file__).parent / "models"
    found = {"tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"}
    for path in root.glob("*/tokenization_*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == (
                "VOCAB_FILES_NAMES"
            ):
                values = node.value.values if isinstance(node.value, ast.Dict) else []
                found |= {v.value for v in values if isinstance(v, ast.Constant)}
    assert {"vocab.json", "source.spm", "bpe.codes"} <= found
    assert [name for name in found if is_weights(name) or name.startswith(".")] == []


def test_links(tmp_path):
    """As the hub's cache has them, and those that would lead elsewhere or round and round."""
    cache = tmp_path / "models--some--model"
    folder = folder_with(cache / "snapshots" / "0123", "1_Pooling/config.json")
    (cache / "blobs").mkdir()
    for name in ("1_Pooling/config.json", SINGLE):
        blob = cache / "blobs" / Path(name).name
        os.replace(folder / name, blob)
        (folder / name).symlink_to(os.path.relpath(blob, (folder / name).parent))
    (folder / "1_Pooling" / "round").symlink_to("..")
    (folder / "logs").symlink_to("/var")
    (folder / "again.json").symlink_to("config.json")
    (folder / "extra.bin").symlink_to("/etc/passwd")
    found = companions(folder)
    (info,) = read_checkpoint(folder).tensors.values()
    assert torch.equal(info.read(), *TENSORS.values())
    assert found.copied == ("1_Pooling/config.json", "again.json")
    assert found.left == ("1_Pooling/round/", "extra.bin", "logs/")


NONE = {  # instead of a file: a link, or a pipe, whose opening would wait for ever, or a folder
    **{"/etc/passwd": "a link to outside of the folder", "none": "No such file"},
    **{"": "Too many levels of symbolic links", "pipe": "expected a file"},
}


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        *itertools.product([SINGLE, "config.json", "below/tokenizer.json"], NONE),
        *((name, "folder") for name in (SINGLE, "config.json")),
    ],
)
def test_no_file_or_one_of_elsewhere_is_refused(tmp_path, name, kind):
    path = folder_with(tmp_path, "below/file") / name
    path.unlink(missing_ok=True)
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    else:
        path.symlink_to(kind or path.name)
    with pytest.raises(CheckpointError, match=f"{name}: {NONE.get(kind, 'expected a file')}"):
        companions(tmp_path)


parts = st.sampled_from(["a", "config.json", "model", "1_Pooling", "checkpoint-3", "b.bin"])
suffixes = st.sampled_from(["", ".json", ".safetensors", ".bin", ".onnx", ".txt", ".index.json"])


@given(st.lists(st.tuples(st.lists(parts, min_size=1, max_size=3), suffixes), max_size=6))
def test_every_file_is_copied_or_named_and_none_twice(tmp_path_factory, paths):
    folder = folder_with(tmp_path_factory.mktemp("any") / "src")
    for names, suffix in paths:
        path = folder.joinpath(*names[:-1], names[-1] + suffix)
        if path.name != "config.json" and not any(p.is_file() for p in path.parents):
            path.parent.mkdir(parents=True, exist_ok=True)
            if not path.exists():
                path.write_text("")
    files = {str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file()}
    found = companions(folder)
    whole = tuple(name for name in found.left if name.endswith("/"))
    told = {name for name in files if name in found.left or name.startswith(whole)}
    own = {"config.json", "model.safetensors"}
    assert told | set(found.copied) | own == files
    assert not told & set(found.copied) and not own & (told | set(found.copied))
    assert len(set(found.copied)) == len(found.copied) and len(set(found.left)) == len(found.left)
