"""Small PEFT models that the tests of the drop-in share: real classes, milliseconds to run."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import bitsandbytes as bnb
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.pytorch_utils import Conv1D

import peftkern
from peftkern.backends.cpu import crossovers

K, N = 64, 96
EXACTLY = {"rtol": 0, "atol": 0}
VOCABULARY = 64
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def take_small_layers(set_attribute: Callable[[object, str, Any], None] = setattr) -> None:
    """Patched dense layers compute small products too, not PEFT: the models here are tiny.

    The fixture `small_layers` does it for a test, a script of a process of its own does it itself.
    """
    set_attribute(crossovers, "crossover", lambda name: 0)


class Net(nn.Module):
    """One linear layer called `proj`."""

    def __init__(self, proj: nn.Module) -> None:
        super().__init__()
        self.proj = proj

    def forward(self, x: Tensor, **kwargs: Any) -> Tensor:
        return self.proj(x, **kwargs)


def make_linear(dtype: torch.dtype = torch.float32, bias: bool = True) -> nn.Linear:
    torch.manual_seed(1)
    return nn.Linear(K, N, bias=bias).to(dtype).requires_grad_(False)


def make_conv1d(dtype: torch.dtype = torch.float32) -> Conv1D:
    torch.manual_seed(1)
    layer = Conv1D(N, K).to(dtype).requires_grad_(False)
    nn.init.normal_(layer.bias)
    return layer


def make_linear4bit(
    dtype: torch.dtype = torch.float32,
    *,
    bias: bool = True,
    compute_dtype: torch.dtype | None = None,
    double_quant: bool = True,
    quant_type: str = "nf4",
    quant_storage: torch.dtype = torch.uint8,
) -> bnb.nn.Linear4bit:
    dense = make_linear(dtype, bias)
    layout = {"quant_type": quant_type, "quant_storage": quant_storage}
    layout |= {"compute_dtype": compute_dtype, "compress_statistics": double_quant}
    layer = bnb.nn.Linear4bit(K, N, bias=bias, **layout)
    layer.load_state_dict(dense.state_dict())
    return layer.to(dtype).to("cpu").requires_grad_(False)  # the second quantizes


def lora_net(
    proj: nn.Module, *, adapter_dtype: torch.dtype | None = None, seed: int = 2, **config: Any
) -> PeftModel:
    """A PeftModel around Net(proj) whose adapter already contributes to the output."""
    net = Net(proj)
    net.is_loaded_in_4bit = isinstance(proj, bnb.nn.Linear4bit)
    torch.manual_seed(seed)
    settings = {"r": 4, "lora_alpha": 6, "target_modules": ["proj"], **config}
    model = get_peft_model(net, LoraConfig(**settings))
    fill_adapters(model)
    if adapter_dtype is not None:
        for name, p in model.named_parameters():
            if "lora_" in name:
                p.data = p.data.to(adapter_dtype)
    return model


def fill_adapters(model: nn.Module, seed: int = 3) -> None:
    """PEFT starts lora_B (and its bias) at zero, which would hide a wrong update."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_B" in name:
                p.normal_(std=0.1)


def step_and_frozen(model: nn.Module) -> list[Tensor]:
    """Loss, gradient of the input, output without adapters, and the gradients of a step."""
    x = torch.randn(5, K, generator=torch.Generator().manual_seed(0)).requires_grad_()
    loss = model(x).square().mean()
    loss.backward()
    with model.disable_adapter():
        frozen = model(x)
    return [loss, x.grad, frozen, *(p.grad for p in model.parameters() if p.requires_grad)]


def layer_of(model: nn.Module) -> nn.Module:
    """The LoRA layer of `lora_net`."""
    return model.base_model.model.proj


def tiny_llama(dtype: torch.dtype = torch.float32, seed: int = 0) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    sizes = {"vocab_size": VOCABULARY, "hidden_size": 64, "intermediate_size": 128}
    sizes |= {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = LlamaConfig(**sizes, max_position_embeddings=64, attn_implementation="eager")
    return LlamaForCausalLM(config).to(dtype)


def add_lora(model: nn.Module, **config: Any) -> PeftModel:
    settings = {"r": 4, "lora_alpha": 8, "target_modules": TARGETS, "task_type": "CAUSAL_LM"}
    torch.manual_seed(5)
    return get_peft_model(model, LoraConfig(**{**settings, **config}))


def text_batch(rows: int = 4, length: int = 16, seed: int = 7) -> dict[str, Tensor]:
    """Token ids with something to learn: arithmetic progressions modulo the vocabulary."""
    generator = torch.Generator().manual_seed(seed)
    start = torch.randint(VOCABULARY, (rows, 1), generator=generator)
    step = torch.randint(1, 4, (rows, 1), generator=generator)
    ids = (start + step * torch.arange(length)) % VOCABULARY
    return {"input_ids": ids, "labels": ids}


def logits(model: nn.Module) -> Tensor:
    """Of `text_batch`, in eval mode."""
    with torch.no_grad():
        return model.eval()(input_ids=text_batch()["input_ids"]).logits


def patched_copy(model: nn.Module) -> nn.Module:
    twin = copy.deepcopy(model)
    peftkern.patch(twin)
    return twin


def served_by_us() -> int:
    """Forward calls that reached a peftkern op since the last `peftkern.reset_stats()`."""
    forward = ("lora_linear_forward", "nf4_lora_linear_forward")
    return sum(n for (op, _), n in peftkern.stats().calls.items() if op in forward)


def fallbacks() -> dict[str, int]:
    """Reasons for which a patched layer went to PEFT's forward since the last reset."""
    layers = ("lora_linear", "nf4_lora_linear")
    return {why: n for (op, why), n in peftkern.stats().fallbacks.items() if op in layers}


def assert_falls_back(model: nn.Module, reason: str, **kwargs: Any) -> None:
    """The patched model gives PEFT's own result and gradients, and says why.

    An NF4 base that PEFT calls is multiplied by our kernel all the same.
    """
    exactly = {} if isinstance(layer_of(model).get_base_layer(), bnb.nn.Linear4bit) else EXACTLY
    twin = copy.deepcopy(model)
    report = peftkern.patch(twin)
    assert len(report.patched) == 1
    peftkern.reset_stats()
    outputs = []
    for net in (model, twin):
        x = torch.randn(4, K, generator=torch.Generator().manual_seed(4)).requires_grad_()
        torch.manual_seed(5)
        y = net(x, **kwargs)
        grad = torch.autograd.grad(y.sum(), x)[0] if y.requires_grad else None
        outputs.append((y, grad))
    (expected, expected_grad), (got, got_grad) = outputs
    torch.testing.assert_close(got, expected, **exactly)
    if expected_grad is not None:
        torch.testing.assert_close(got_grad, expected_grad, **exactly)
    assert fallbacks() == {reason: 1}
    assert served_by_us() == 0 or not exactly
