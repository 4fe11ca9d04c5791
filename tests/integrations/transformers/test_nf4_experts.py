"""`NF4ExpertsConfig`: checkpoints become NF4 experts an expert at a time, are saved and loaded."""

from __future__ import annotations

import json
import weakref
from pathlib import Path

import bitsandbytes as bnb
import pytest
import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model, prepare_model_for_kbit_training
from safetensors.torch import load_file
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoModelForCausalLM, PreTrainedModel, core_model_loading
from transformers.quantizers import HfQuantizer

from peftkern.integrations.transformers import NF4ExpertsConfig
from peftkern.integrations.transformers.nf4_experts import NF4ExpertsQuantizer
from peftkern.layers.expert_stack import stacks_of
from peftkern.layers.nf4_stack import NF4Stack

SIZES = {"vocab_size": 32, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1}
SIZES |= {"num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 32}
LOCAL = SIZES | {"num_local_experts": 4, "num_experts_per_tok": 2}
FAMILIES = {
    "Qwen3Moe": SIZES | {"moe_intermediate_size": 32, "num_experts": 4, "num_experts_per_tok": 2},
    "Mixtral": LOCAL,
    "JetMoe": SIZES | {"kv_channels": 32, "num_local_experts": 4, "num_experts_per_tok": 2},
    "GptOss": LOCAL,  # one fused tensor in the checkpoint, [E, K, N]
}
IDS = torch.arange(12).view(2, 6)


def saved(family: str, folder: Path, **sizes: int) -> PreTrainedModel:
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(**FAMILIES[family] | sizes)
    model = getattr(transformers, f"{family}ForCausalLM")(config).bfloat16()
    model.save_pretrained(folder)
    return model


def stacks(model: PreTrainedModel) -> dict[str, NF4Stack]:
    modules = model.named_modules()
    return {f"{path}.{name}": s for path, m in modules for name, s in stacks_of(m).items()}


def load(folder: Path, **config: object) -> PreTrainedModel:
    options = {"bnb_4bit_compute_dtype": torch.bfloat16, **config}
    return AutoModelForCausalLM.from_pretrained(
        folder, quantization_config=NF4ExpertsConfig(**options), dtype=torch.bfloat16
    )


@pytest.mark.parametrize("family", ["Qwen3Moe", "Mixtral", "GptOss"])
def test_load_save_and_load(family, tmp_path):
    dense = saved(family, tmp_path / "dense")
    model = load(tmp_path / "dense", bnb_4bit_use_double_quant=True)
    found = stacks(model)
    assert [name.rsplit(".", 1)[1] for name in found] == ["gate_up_proj", "down_proj"]
    options = {"blocksize": 64, "quant_type": "nf4"}
    for name, stack in found.items():
        weight = dense.get_parameter(name)
        assert stack.dtype is torch.bfloat16 and not stack.requires_grad
        for expert in range(len(stack)):
            packed, state = bnb.functional.quantize_4bit(weight[expert], **options)
            assert torch.equal(stack._packed[expert], packed.view(-1))
            assert torch.equal(stack._absmax[expert], state.absmax)
    attention = model.model.layers[0].self_attn.q_proj
    assert isinstance(attention, bnb.nn.Linear4bit) and attention.weight.quant_state.nested
    assert model.is_loaded_in_4bit and model.hf_quantizer.is_trainable

    model.save_pretrained(tmp_path / "nf4")
    quantization = json.loads((tmp_path / "nf4" / "config.json").read_text())["quantization_config"]
    assert quantization["quant_method"] == "peftkern_nf4_experts"
    assert "load_in_4bit" not in quantization
    file = load_file(tmp_path / "nf4" / "model.safetensors")
    (packed,) = (file[key] for key in file if key.endswith("experts.gate_up_proj"))
    (absmax,) = (file[key] for key in file if key.endswith("experts.gate_up_absmax"))
    first = next(iter(found.values()))
    assert torch.equal(packed, first._packed) and torch.equal(absmax, first._absmax)

    again = AutoModelForCausalLM.from_pretrained(tmp_path / "nf4")
    assert again.dtype is torch.bfloat16 and stacks(again).keys() == found.keys()
    with torch.no_grad():
        assert torch.equal(again(IDS).logits, model(IDS).logits)
    again.save_pretrained(tmp_path / "again")
    assert load_file(tmp_path / "again" / "model.safetensors").keys() == file.keys()


def test_peft_trains_a_loaded_model_and_its_adapter_loads_again(tmp_path):
    saved("Qwen3Moe", tmp_path / "dense")
    targets = ["experts.gate_up_proj", "experts.down_proj"]
    config = LoraConfig(r=2, target_modules=["q_proj"], target_parameters=targets)
    model = prepare_model_for_kbit_training(load(tmp_path / "dense"))
    packed = [stack._packed.clone() for stack in stacks(model).values()]
    model = get_peft_model(model, config)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=1.0)
    losses = []
    for _ in range(3):
        optimizer.zero_grad()
        losses.append(model(input_ids=IDS, labels=IDS).loss)
        losses[-1].backward()
        optimizer.step()
    assert losses[2] < losses[0]
    found = stacks(model)
    assert all(torch.equal(s._packed, p) for s, p in zip(found.values(), packed, strict=True))
    model.save_pretrained(tmp_path / "adapter")
    base = prepare_model_for_kbit_training(load(tmp_path / "dense"))
    again = PeftModel.from_pretrained(base, tmp_path / "adapter")
    with torch.no_grad():
        assert torch.equal(again(IDS).logits, model.eval()(IDS).logits)


def test_parameters_called_weight_have_keys_of_their_own(tmp_path):
    saved("JetMoe", tmp_path / "dense")
    model = load(tmp_path / "dense")
    model.save_pretrained(tmp_path / "nf4")
    again = stacks(AutoModelForCausalLM.from_pretrained(tmp_path / "nf4"))
    assert len(again) == 4
    for name, stack in stacks(model).items():
        assert torch.equal(stack._packed, again[name]._packed)
        assert torch.equal(stack._absmax, again[name]._absmax)


def test_a_model_is_dequantized_whole(tmp_path):
    saved("GptOss", tmp_path)
    model = load(tmp_path)
    wanted = {name: stack.dequantize() for name, stack in stacks(model).items()}
    assert model.config._experts_implementation == "peftkern"
    model = model.dequantize()
    assert not stacks(model) and model.config._experts_implementation == "grouped_mm"
    assert all(torch.equal(model.get_parameter(name), value) for name, value in wanted.items())
    model(IDS)


def test_options_are_kept_and_modules_left_out(tmp_path):
    saved("Mixtral", tmp_path / "dense")
    model = load(tmp_path / "dense", experts_blocksize=128, llm_int8_skip_modules=["q_proj"])
    assert {stack.blocksize for stack in stacks(model).values()} == {128}
    model.save_pretrained(tmp_path / "nf4")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "nf4")
    assert {stack.blocksize for stack in stacks(again).values()} == {128}
    config = again.config.quantization_config
    assert config.experts_blocksize == 128 and config.llm_int8_skip_modules == ["q_proj"]
    dense = load(tmp_path / "dense", llm_int8_skip_modules=["experts"])
    assert not stacks(dense)


class LiveBytes(TorchDispatchMode):
    """Counts the bytes that the tensors made meanwhile hold, and the most they ever did."""

    def __init__(self) -> None:
        super().__init__()
        self.live, self.peak, self.known = 0, 0, {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor) and type(tensor) is Tensor and not tensor.is_meta:
                self.count(tensor.untyped_storage())
        return result

    def count(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key in self.known:
            return
        size = self.known[key] = storage.nbytes()
        self.live += size
        self.peak = max(self.peak, self.live)

        def freed() -> None:
            self.live -= size
            del self.known[key]

        weakref.finalize(storage, freed)


def test_a_load_needs_the_memory_of_two_experts_more_than_the_result(tmp_path, monkeypatch):
    many = {"num_experts": 16, "hidden_size": 256, "moe_intermediate_size": 128}
    dense = saved("Qwen3Moe", tmp_path, **many)
    whole = sum(dense.get_parameter(n).nbytes for n in stacks(load(tmp_path)))
    read = core_model_loading._materialize_copy
    # safetensors reads below torch's dispatcher: a copy makes it count
    monkeypatch.setattr(core_model_loading, "_materialize_copy", lambda *a: read(*a).clone())
    with LiveBytes() as memory:
        model = load(tmp_path)
        del dense
    final = sum(t.nbytes for p in stacks(model).values() for t in (p._packed, p._absmax))
    expert = whole / many["num_experts"]
    others = sum(p.nbytes for p in model.parameters() if not isinstance(p, NF4Stack))
    assert memory.peak < final + others + 2 * expert < final + others + whole


def test_what_does_not_fit_is_refused(tmp_path):
    saved("Mixtral", tmp_path, intermediate_size=33, hidden_size=32)
    with pytest.raises(ValueError, match=r"experts.down_proj: weight: .* multiple of 64 values"):
        load(tmp_path)


def test_a_checkpoint_without_the_bytes_is_refused(tmp_path):
    saved("Mixtral", tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["quantization_config"] = NF4ExpertsConfig().to_dict()
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises((RuntimeError, ValueError)):
        AutoModelForCausalLM.from_pretrained(tmp_path)


def test_a_load_by_transformers_that_gives_converters_alone(tmp_path, monkeypatch):
    """As 5.20 does: they still quantize an expert at a time."""
    saved("Mixtral", tmp_path)
    wanted = stacks(load(tmp_path))
    ours, updated = NF4ExpertsQuantizer, NF4ExpertsQuantizer.update_weight_conversions

    def alone(self: HfQuantizer, converters: list) -> list:
        return converters

    monkeypatch.setattr(HfQuantizer, "update_weight_conversions", alone)
    monkeypatch.setattr(
        ours, "update_weight_conversions", lambda self, converters, model: updated(self, converters)
    )
    found = stacks(load(tmp_path))
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name]._packed, wanted[name]._packed) for name in wanted)
