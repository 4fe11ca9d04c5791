"""PEFT's LoRA over transformers' tensor parallelism: two gloo processes with a part of each weight
train as one process that is not patched, each layer is served, what is whole stays the same."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from engine_runs import adamw_of, batch_of
from engines import CURVE, STEPS, in_ranks
from peft import LoraConfig
from peft_models import add_lora, fallbacks, fill_adapters, served_by_us
from rows import TP_ROWS
from tolerances import BF16_LOSS_RTOL, LOGITS
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor
from transformers import BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM

import peftkern
from peftkern.backends import trust

pytest.importorskip("transformers.distributed.tensor_parallel")
from transformers.distributed import DistributedConfig

pytestmark = pytest.mark.usefixtures("small_layers")
LAYERS = 14
SIZES = {"vocab_size": 64, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
SIZES |= {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64}
SIZES |= {"attention_bias": True, "mlp_bias": True, "attn_implementation": "eager"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A tiny Llama with biases, on disk, and the adapter that every test starts with."""
    folder = tmp_path_factory.mktemp("llama")

    def save(rank: int) -> dict[str, Tensor]:
        torch.manual_seed(0)
        base = LlamaForCausalLM(LlamaConfig(**SIZES))
        for name, p in base.named_parameters():
            if name.endswith("bias"):
                nn.init.normal_(p, std=0.1)
        base.save_pretrained(folder)
        return base.config.vocab_size

    in_ranks(save, 1, folder / "ranks")
    return folder


def whole_model(folder: Path, **config: Any) -> nn.Module:
    model = add_lora(LlamaForCausalLM.from_pretrained(folder), **config)
    fill_adapters(model)
    return model.train()


def split_base(folder: Path, **options: Any) -> nn.Module:
    options["distributed_config"] = DistributedConfig(tp_size=2)
    return LlamaForCausalLM.from_pretrained(folder, attn_implementation="eager", **options)


def split_model(folder: Path, **config: Any) -> nn.Module:
    """The same over two processes: PEFT draws the adapters of a process by its parts."""
    wanted = dict(whole_model(folder, **config).named_parameters())
    model = add_lora(split_base(folder), **config)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_" in name:
                value = wanted[name].detach()
                if isinstance(p, DTensor):
                    value = distribute_tensor(value, p.device_mesh, p.placements)
                p.copy_(value)
    return model.train()


def as_peft_means(model: nn.Module) -> nn.Module:
    """Let PEFT 0.21.2 train alone over transformers 5.23, which asks lora_A for all features."""
    for name, module in model.named_modules():
        if ".lora_A." in name:
            module.in_features = module.weight.shape[1]
    return model


def losses_of(model: nn.Module, steps: int, autocast: bool = False) -> Tensor:
    optimizer = adamw_of(model)
    found = []
    for step in range(1, steps + 1):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            loss = model(**batch_of(step)).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        found.append(loss.detach())
    return torch.stack(found)


def whole_adapters(model: nn.Module) -> dict[str, Tensor]:
    named = {n: p.detach() for n, p in model.named_parameters() if "lora_" in n}
    return {n: p.full_tensor() if isinstance(p, DTensor) else p for n, p in named.items()}


def train(rank: int, folder: Path, config: dict[str, Any], how: str) -> dict[str, Any]:
    torch.manual_seed(0)
    model = split_model(folder, **config)
    report = str(peftkern.patch(model))
    peftkern.reset_stats()
    torch.manual_seed(3)
    mode = "always" if how == "served" else how
    with trust.use_mode(mode):
        losses = losses_of(model, STEPS if how == "served" else 3)
    found = {"losses": losses, "report": report, "served": served_by_us()}
    found |= {"fallbacks": fallbacks(), "adapters": whole_adapters(model)}
    return found


def alone(rank: int, folder: Path) -> tuple[Tensor, dict[str, Tensor]]:
    model = whole_model(folder)
    return losses_of(model, STEPS), whole_adapters(model)


@pytest.fixture(scope="module")
def expected(folder, tmp_path_factory) -> tuple[Tensor, dict[str, Tensor]]:
    return in_ranks(alone, 1, tmp_path_factory.mktemp("alone"), folder)[0]


def test_processes_train_as_one(folder, expected, tmp_path):
    losses, adapters = expected
    ours, theirs = in_ranks(train, 2, tmp_path, folder, {}, "served")
    for found in (ours, theirs):
        torch.testing.assert_close(found["losses"], losses, **CURVE)
        assert found["served"] == STEPS * LAYERS and found["fallbacks"] == {}
        assert "fall back" not in found["report"], found["report"]
    for name, tensor in adapters.items():
        assert torch.equal(ours["adapters"][name], theirs["adapters"][name]), name
        torch.testing.assert_close(ours["adapters"][name], tensor, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("mode", ["readonly", "off"])
def test_a_trial_meets_no_other_process(folder, expected, tmp_path, monkeypatch, mode):
    """What a process finds faster changes how it computes its part, not when it meets another."""
    monkeypatch.setenv("PEFTKERN_CACHE", str(tmp_path / "cache"))
    trust.reset()
    for found in in_ranks(train, 2, tmp_path / "ranks", folder, {}, mode):
        torch.testing.assert_close(found["losses"], expected[0][:3], **CURVE)
        assert all("the layer's own forward serves" in reason for reason in found["fallbacks"])
        assert bool(found["fallbacks"]) or mode == "readonly"


def beside_peft(rank: int, folder: Path, autocast: bool, config: dict) -> list[Tensor]:
    """Losses of PEFT's own forward and of ours, from one state of torch's generator."""
    found = []
    for patched in (False, True):
        model = as_peft_means(split_model(folder, **config))
        if patched:
            peftkern.patch(model)
            peftkern.reset_stats()
        torch.manual_seed(3)
        found.append(losses_of(model, 3, autocast))
    assert served_by_us() == 3 * LAYERS and fallbacks() == {}
    return found


@pytest.mark.parametrize(("autocast", "dropout"), [(True, 0.0), (False, 0.3)])
def test_as_peft_over_tensor_parallelism(folder, tmp_path, autocast, dropout):
    config = {"lora_dropout": dropout}
    tolerance = {"rtol": BF16_LOSS_RTOL, "atol": 0} if autocast else CURVE
    for theirs, ours in in_ranks(beside_peft, 2, tmp_path, folder, autocast, config):
        torch.testing.assert_close(ours, theirs, **tolerance)


def with_two(model: nn.Module, dropout: float = 0.0) -> nn.Module:
    """Another adapter, of the same values over whole and split weights, active beside the first."""
    config = LoraConfig(r=2, target_modules=["q_proj", "down_proj"], lora_dropout=dropout)
    model.add_adapter("other", config)
    model.base_model.set_adapter(["default", "other"])
    torch.manual_seed(5)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if ".other." in name:
                value = torch.randn(p.shape) / 8
                split = isinstance(p, DTensor)
                p.copy_(distribute_tensor(value, p.device_mesh, p.placements) if split else value)
    return model.train()


def two_adapters(rank: int, folder: Path) -> dict[str, Any]:
    """Losses over split weights of both, and what is counted where their dropout is on."""
    model = with_two(split_model(folder))
    peftkern.patch(model)
    peftkern.reset_stats()
    found = {"losses": losses_of(model, STEPS), "served": served_by_us(), "fallbacks": fallbacks()}
    model = as_peft_means(with_two(split_model(folder), dropout=0.5))
    peftkern.patch(model)
    peftkern.reset_stats()
    model(**batch_of(1))
    return found | {"dropout": fallbacks(), "adapters": whole_adapters(model)}


def two_alone(rank: int, folder: Path) -> Tensor:
    return losses_of(with_two(whole_model(folder)), STEPS)


def test_two_adapters_train_as_in_one_process(folder, tmp_path):
    (expected,) = in_ranks(two_alone, 1, tmp_path / "alone", folder)
    for found in in_ranks(two_adapters, 2, tmp_path / "ranks", folder):
        torch.testing.assert_close(found["losses"], expected, **CURVE)
        assert found["served"] == STEPS * LAYERS and found["fallbacks"] == {}
        assert found["dropout"] == {"tensor parallel: dropout of several adapters": 4}


def quantized(rank: int, folder: Path) -> None:
    """Weights in 4 bits that are split: bitsandbytes' are refused by PEFT, ours by quantize_."""
    base = split_base(folder, quantization_config=BitsAndBytesConfig(load_in_4bit=True))
    with pytest.raises(AttributeError, match="has no attribute 'compress_statistics'"):
        add_lora(base)
    with pytest.raises(ValueError, match="q_proj: expected a whole weight, got a DTensor"):
        peftkern.quantize_(split_base(folder))


def test_weights_in_4_bits_are_refused(folder, tmp_path):
    in_ranks(quantized, 2, tmp_path, folder)


def other_states(rank: int, folder: Path) -> dict[str, Any]:
    """What is counted in other states, and logits of PEFT alone and patched."""
    found: dict[str, Any] = {}

    def compare(name: str, model: nn.Module) -> None:
        theirs = model(**batch_of(1)).logits.detach()
        with peftkern.patched(model) as report:
            peftkern.reset_stats()
            ours = model(**batch_of(1)).logits.detach()
            found[name] = theirs, ours, served_by_us(), fallbacks()
            assert set(report.falling_back.values()) == set(fallbacks())

    model = as_peft_means(split_model(folder)).eval()
    with torch.no_grad():
        compare("LoRA, no gradients", model)
        with model.disable_adapter():
            compare("LoRA, adapters disabled", model)
    with pytest.raises(RuntimeError, match=r"mixed torch.Tensor and DTensor"):
        split_model(folder, use_dora=True)  # PEFT's own limit
    return found


def test_other_states_are_pefts(folder, tmp_path):
    """Fallbacks are counted as the rows have it, and every result is that of PEFT alone."""
    reasons = {row.method: row.outcome for row in TP_ROWS}
    for found in in_ranks(other_states, 2, tmp_path, folder):
        for name, (theirs, ours, served, fallen) in found.items():
            torch.testing.assert_close(ours, theirs, **LOGITS)
            if name in reasons:
                assert fallen == {reasons[name]: LAYERS} and served == 0, (name, fallen)
            else:
                assert served == LAYERS and fallen == {}
