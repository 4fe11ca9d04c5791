"""Adapters that somebody else made, wrong in every way: one line that names file and tensor."""

from __future__ import annotations

import json
import pickle
import struct

import pytest
import torch
from adapters import CONFIG, MODEL, make, save
from checkpoint_folders import changing, configure
from safetensors.torch import load_file, save_file

from peftkern.tools.adapters import AdapterError, read_adapter, write_adapter

pytestmark = pytest.mark.filterwarnings("ignore")
Q = "base_model.model.layers.0.q_proj."
EXPERTS = "base_model.model.layers.0.experts"


def refused(path, *words: str, **how) -> str:
    """Return the complaint, which is one line with the words."""
    with pytest.raises(AdapterError) as caught:
        read_adapter(path, **how)
    said = str(caught.value)
    assert len(said.splitlines()) == 1 and said.isprintable(), said
    for word in words:
        assert word in said, said
    return said


@pytest.fixture
def folder(tmp_path):
    save("linear", tmp_path / "a")
    return tmp_path / "a"


def change(folder, **tensors) -> None:
    """Replace tensors, by the end of their names after Q; None removes one."""
    with changing(folder / MODEL) as state:
        for name, tensor in tensors.items():
            state.pop(name, None)
            if tensor is not None:
                state[name] = tensor


def test_files_that_are_none(tmp_path, folder):
    refused(tmp_path / "none", "none", "got nothing")
    (tmp_path / "empty").mkdir()
    refused(tmp_path / "empty", MODEL, "got an empty one")
    (tmp_path / "p").mkdir()
    (tmp_path / "p" / "adapter_model.bin").write_bytes(pickle.dumps({}))
    refused(tmp_path / "p", "adapter_model.bin", "pickle", "runs code")
    refused(tmp_path / "p" / "adapter_model.bin", "pickle")
    (folder / CONFIG).unlink()
    refused(folder, MODEL, f"lora_A.weight: expected {CONFIG} with a peft_type")


@pytest.mark.parametrize("text", ["", "[]", "{", '{"peft_type": "IA3"}', "{}", "[" * 100_000])
def test_configs_that_are_none(folder, text):
    (folder / CONFIG).write_text(text)
    refused(folder, CONFIG)


def test_files_that_are_cut_off_at_any_byte(folder):
    data = (folder / MODEL).read_bytes()
    header = 8 + struct.unpack("<Q", data[:8])[0]
    for length in {0, 1, 7, 8, 9, header - 1, header, header + 1, len(data) - 1}:
        (folder / MODEL).write_bytes(data[:length])
        refused(folder, MODEL, "damaged, cut off or not safetensors")
    (folder / MODEL).write_bytes(b"\xff" * 8 + data[8:])
    refused(folder, MODEL, "damaged")


def test_a_name_that_comes_twice(folder):
    data = (folder / MODEL).read_bytes()
    length = struct.unpack("<Q", data[:8])[0]
    header = json.loads(data[8 : 8 + length])
    entries = [f"{json.dumps(k)}:{json.dumps(v)}" for k, v in header.items() if "meta" not in k]
    text = ("{" + ",".join([*entries, entries[0]]) + "}").encode()
    (folder / MODEL).write_bytes(struct.pack("<Q", len(text)) + text + data[8 + length :])
    refused(folder, MODEL, "twice")
    change_by_name = {f"{Q}lora_A": torch.zeros(4, 8)}  # AdaLoRA's name for it
    save("linear", folder)
    change(folder, **change_by_name)
    refused(folder, f"{Q}lora_A", "factors of two methods")


@pytest.mark.parametrize(
    ("name", "tensor", "words"),
    [
        ("lora_A.weight", None, "without its lora_A.weight"),
        ("lora_B.weight", None, "without its lora_B.weight"),
        ("lora_A.weight", torch.zeros(4), "no pair of factors"),
        ("lora_A.weight", torch.zeros(()), "no pair of factors"),
        ("lora_A.weight", torch.zeros(4, 8, 1), "no pair of factors"),
        ("lora_A.weight", torch.zeros(3, 8), "expected one rank, got [3, 8] and [12, 4]"),
        ("lora_A.weight", torch.zeros(4, 0), "are empty"),
        ("lora_A.weight", torch.zeros(4, 8, dtype=torch.int32), "floating point"),
        ("lora_A.default.weight", torch.zeros(4, 8), "no tensor of LoRA"),
        ("lora_diag", torch.zeros(4), "no tensor of LoRA"),
        ("lora_E", torch.zeros(4, 1), "two methods"),
        ("lora_magnitude_vector", torch.zeros(12), "use_dora is not set"),
        ("lora_B.bias", torch.zeros(12), "lora_bias is not set"),
        ("base_layer.lora_A.weight", torch.zeros(4, 8), "without its lora_B.weight"),
    ],
)
def test_tensors_that_do_not_fit(folder, name, tensor, words):
    change(folder, **{Q + name: tensor})
    refused(folder, MODEL, Q, words)


def test_names_of_no_adapter(folder):
    state = load_file(folder / MODEL)
    save_file({"some.weight": torch.zeros(2, 2)}, folder / "other.safetensors")
    (folder / "apart").mkdir()
    (folder / "other.safetensors").rename(folder / "apart" / "other.safetensors")
    refused(folder / "apart" / "other.safetensors", "some.weight: expected tensors as one of")
    save_file({"lora_A.weight": torch.zeros(2, 2)}, folder / MODEL)
    refused(folder, "lora_A.weight", "begins with base_model.model.")
    save_file({"base_model.model.x.weight": torch.zeros(2, 2)}, folder / MODEL)
    refused(folder, "x.weight", "no tensor is of a LoRA adapter")
    save_file(state | {"base_model.model.a\nb": torch.zeros(2)}, folder / MODEL)
    refused(folder, r"a\nb", "can be printed")
    save_file(state | {"x": torch.zeros(2, dtype=torch.float8_e4m3fn)}, folder / MODEL)
    refused(folder, MODEL, "'x' has dtype")
    save_file({}, folder / MODEL)
    refused(folder, MODEL, "holds no tensors")


@pytest.mark.parametrize(
    ("field", "value", "words"),
    [
        ("r", 8, "has rank 4, the config says 8"),
        ("r", 0, "above 0"),
        ("r", "4", "expected a number"),
        ("r", True, "expected a number"),
        ("r", 4.5, "an integer above 0"),
        ("lora_alpha", None, "expected a number"),
        ("lora_alpha", float("nan"), "expected a number"),
        ("rank_pattern", {"q_proj": 2}, "the config says 2"),
        ("rank_pattern", {"q_proj": "x"}, "expected a number"),
        ("rank_pattern", {"(": 4}, "no regular expression"),
        ("rank_pattern", {"(?i)q_proj": 4}, "rank_pattern: '(?i)q_proj' is no regular expression"),
        ("rank_pattern", [1], "rank_pattern: expected an object"),
        ("target_modules", "(", "no regular expression"),
        ("target_modules", [1], "expected names"),
        ("use_dora", True, "use_dora is set, and it has none"),
        ("lora_bias", True, "lora_bias is set, and it has none"),
        ("peft_type", "ADALORA", "not of peft_type ADALORA"),
        ("peft_type", "LOHA", "peft_type: expected one of LORA, ADALORA, got 'LOHA'"),
        ("use_qalora", True, "use_qalora"),
        ("use_bdlora", {"a": 1}, "use_bdlora"),
        ("kasa_config", {"a": 1}, "kasa_config"),
        ("arrow_config", {"a": 1}, "arrow_config"),
        ("layer_replication", [[0, 1]], "layer_replication"),
    ],
)
def test_configs_that_do_not_fit(folder, field, value, words):
    configure(folder, CONFIG, **{field: value})
    refused(folder, words)


def test_links_to_elsewhere(tmp_path, folder):
    (tmp_path / "b").mkdir()
    for name in (MODEL, CONFIG):
        (tmp_path / "b" / name).symlink_to(folder / name)
    refused(tmp_path / "b", MODEL, "outside")


def test_experts_that_cannot_be_told_apart(tmp_path):
    save("experts", tmp_path / "a")
    config = json.loads((tmp_path / "a" / CONFIG).read_text())
    configure(tmp_path / "a", CONFIG, target_parameters=["experts.down_proj"])
    refused(tmp_path / "a", EXPERTS, "updates of 2 parameters", "names down_proj")
    configure(tmp_path / "a", CONFIG, target_parameters=["experts.ours", "experts.theirs"])
    refused(tmp_path / "a", EXPERTS, "whose order nothing in the file tells")
    configure(tmp_path / "a", CONFIG, target_parameters=None)
    refused(tmp_path / "a", EXPERTS, "target_parameters names no parameter")
    configure(tmp_path / "a", CONFIG, **config | {"lora_B_layout": "other"})
    refused(tmp_path / "a", "lora_B_layout: expected one of rank_major, grouped_by_expert")


def test_what_is_not_finite_is_not_written(tmp_path, folder):
    tensor = load_file(folder / MODEL)[f"{Q}lora_B.weight"]
    tensor[3, 2] = float("nan")
    change(folder, **{f"{Q}lora_B.weight": tensor})
    adapter = read_adapter(folder)
    with pytest.raises(AdapterError, match=r"layers\.0\.q_proj\.lora_B: holds NaN or infinity"):
        write_adapter(adapter, tmp_path / "b")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a"]
    tensor[3, 2] = 1e30
    change(folder, **{f"{Q}lora_B.weight": tensor})
    with pytest.raises(AdapterError, match=r"q_proj\.lora_B\.weight: beyond torch\.float16"):
        write_adapter(read_adapter(folder), tmp_path / "b", dtype=torch.float16)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a"]
    with pytest.raises(AdapterError, match="dtype: expected one of"):
        write_adapter(read_adapter(folder), tmp_path / "b", dtype=torch.int8)


def test_models_without_the_adapter():
    from peftkern.tools.adapters import from_model

    with pytest.raises(AdapterError, match="adapter 'other': the model has default"):
        from_model(make("linear"), "other")
    with pytest.raises(AdapterError, match="no adapter"):
        from_model(torch.nn.Linear(2, 2))
