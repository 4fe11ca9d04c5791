"""Llama-shaped stacks that train: random weights, PEFT's adapters, an optimizer, a batch.

Nothing is downloaded, and an NF4 base is never dense: its packed bytes are drawn on the device
where they stay, so that a stack takes no more memory than the trained model does. `plan.Training`
says how a stack is trained, so that `plan.plan` predicts the memory of the very same thing.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from peft import AdaLoraConfig, LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

import peftkern
from peftkern.layers import NF4Linear
from peftkern.tools.bench.base_layers import linear, random_nf4
from peftkern.tools.bench.data import nf4_values64
from peftkern.tools.bench.peers import nf4_layer
from peftkern.tools.plan.plan import Training
from peftkern.tools.plan.presets import linears

Config = dict[str, Any]  # fields of a config.json: of a preset, scaled
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
KINDS = ("lora_A", "lora_B", "lora_E")
# AdaLoRA in the middle of its schedule, where it allocates at every step.
ADALORA_STEPS, ADALORA_START = 1_000_000, 500_000
VOCABULARY_OVER_HIDDEN = 32  # of Llama 3; a narrow toy need not spend its time on the vocabulary


def nf4_weight64(layer: nn.Module) -> Tensor:
    """Dequantize a layer's weight in float64 and plain torch."""
    weight = layer.nf4 if isinstance(layer, NF4Linear) else None
    if weight is None:
        weight = peftkern.NF4Weight.from_bitsandbytes(layer.weight)
    return nf4_values64(weight, 0, weight.numel).view(weight.shape)


def scaled(model: Config, hidden: int, layers: int) -> Config:
    """Scale to another width with the same proportions, and to at most so many layers."""
    model = {**model, "num_hidden_layers": min(layers, model["num_hidden_layers"])}
    if hidden == model["hidden_size"]:
        return model
    heads = max(1, hidden // model["head_dim"])
    kv_heads = heads * model["num_key_value_heads"] // model["num_attention_heads"]
    return model | {
        "hidden_size": hidden,
        "num_attention_heads": heads,
        "num_key_value_heads": max(1, kv_heads),
        "head_dim": hidden // heads,
        "intermediate_size": hidden * model["intermediate_size"] // model["hidden_size"],
        "vocab_size": min(model["vocab_size"], VOCABULARY_OVER_HIDDEN * hidden),
    }


def stack(
    model: Config, training: Training, device: torch.device, tick: Callable[[], None]
) -> nn.Module:
    """Build a frozen LlamaForCausalLM of this shape, its weights drawn on the device.

    tick: called after every layer; an exception from it ends the construction.
    """
    dtype = DTYPES[training.dtype]
    config = LlamaConfig(
        **model,
        max_position_embeddings=max(8192, training.sequence),
        attn_implementation=training.attention,
        use_cache=False,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
    )
    with torch.device("meta"):
        net = LlamaForCausalLM(config)
    generator = torch.Generator(device).manual_seed(0)

    def drawn(*shape: int, std: float) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=device).normal_(0, std, generator=generator)

    def ones(norm: nn.Module) -> None:
        norm.weight = nn.Parameter(torch.ones(config.hidden_size, dtype=dtype, device=device))

    def dense(n: int, k: int) -> nn.Module:
        return linear(drawn(n, k, std=k**-0.5))

    body = net.model
    body.embed_tokens.weight = nn.Parameter(drawn(config.vocab_size, config.hidden_size, std=1.0))
    net.lm_head = dense(config.vocab_size, config.hidden_size)
    with device:
        body.rotary_emb = type(body.rotary_emb)(config)  # has no weight, but frequencies
    ones(body.norm)
    for layer in body.layers:
        ones(layer.input_layernorm)
        ones(layer.post_attention_layernorm)
        for part in (layer.self_attn, layer.mlp):
            for name, (k, n) in linears(model).items():
                if not hasattr(part, name):
                    continue
                if training.base == "nf4":
                    setattr(part, name, nf4_layer(random_nf4(n, k, dtype, generator)))
                else:
                    setattr(part, name, dense(n, k))
        tick()
    net.is_loaded_in_4bit = training.base == "nf4"  # what transformers sets, and PEFT asks for
    return net.requires_grad_(False)


def twin(net: nn.Module) -> nn.Module:
    """Copy the tree of modules but share the weights of `net`, so that adapters and hooks of one
    are not in the other, and the weights are in memory once."""
    shared = [*net.parameters(), *net.buffers()]
    for module in net.modules():  # what NF4 keeps beside the packed bytes: bitsandbytes, then ours
        shared += [module.__dict__[k] for k in ("quant_state", "_quant") if k in module.__dict__]
    return copy.deepcopy(net, {id(one): one for one in shared if one is not None})


class Trainer:
    """Training loop of a stack on one batch: a wrong gradient shows in the next loss.

    model, training: its shape, and how it is trained. `lr` is AdamW's. keep_first: a copy of the
    first step's gradients, for `first`. over: a `stack` whose weights to share, which stays as it
    is; drawn here if not given. tick: see `stack`.
    """

    def __init__(
        self,
        model: Config,
        training: Training,
        device: torch.device,
        *,
        lr: float,
        keep_first: bool = False,
        over: nn.Module | None = None,
        tick: Callable[[], None] = lambda: None,
    ) -> None:
        net = stack(model, training, device, tick) if over is None else twin(over)
        if training.checkpointing:
            net.gradient_checkpointing_enable()
            net.enable_input_require_grads()
        self.adalora = training.method == "adalora"
        torch.manual_seed(1)
        self.model = get_peft_model(net, _peft_config(model, training)).train()
        generator = torch.Generator(device).manual_seed(2)
        for name, parameter in self.model.named_parameters():
            if ".lora_" not in name:
                continue
            if ".lora_A" not in name:  # zero in a new adapter, which would hide its errors
                parameter.data.normal_(0, 0.01, generator=generator)
            parameter.data = parameter.data.to(DTYPES[training.adapter_dtype])
        self.report = peftkern.patch(self.model) if training.patched else None
        ids = (training.batch, training.sequence)
        self.ids = torch.randint(model["vocab_size"], ids, device=device, generator=generator)
        trained = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = _optimizer(training.optimizer)(trained, lr=lr)
        self.keep_first = keep_first
        self.losses: list[Tensor] = []
        self.first_gradients: tuple[Tensor, ...] = ()

    def step(self, i: int = 0) -> Tensor:
        """Run forward, backward, the optimizer and AdaLoRA's allocation; return the loss."""
        loss = loss_and_backward(self.model, self.ids)
        if self.keep_first and not self.losses:
            self.first_gradients = gradients(self.model)
        self.optimizer.step()
        if self.adalora:
            self.model.base_model.update_and_allocate(ADALORA_START + len(self.losses))
        self.optimizer.zero_grad(set_to_none=True)
        self.losses.append(loss)
        return loss

    def first(self) -> tuple[Tensor, ...]:
        """Return the loss and the gradients of the first step; the gradients are released."""
        found, self.first_gradients = self.first_gradients, ()
        return self.losses[0], *found

    def curve(self, steps: int) -> Tensor:
        """Return the losses of the first steps, after running those that are missing."""
        while len(self.losses) < steps:
            self.step()
        return torch.stack(self.losses[:steps])

    def exact(self) -> tuple[Tensor, ...]:
        """Compute the results of `first` in float64 on the exact values of an NF4 weight.

        To be called before any step. transformers computes RMSNorm, rotary angles and the loss in
        float32 whatever the model is in, which is 2^16 times as fine as what is compared with it.
        """
        wide = copy.deepcopy(self.model)
        for module in wide.modules():
            base = getattr(module, "base_layer", None)
            if isinstance(base, nn.Linear):
                nf4 = isinstance(base, NF4Linear) or hasattr(base.weight, "quant_state")
                weight = nf4_weight64(base) if nf4 else base.weight.detach().double()
                module.base_layer = linear(weight)
        wide.double()
        loss = loss_and_backward(wide, self.ids)
        return loss, *gradients(wide)


def loss_and_backward(model: nn.Module, ids: Tensor) -> Tensor:
    loss = model(input_ids=ids, labels=ids).loss  # the outputs, logits among them, end here
    loss.backward()
    return loss.detach()


def gradients(model: nn.Module) -> tuple[Tensor, ...]:
    """Concatenate the gradients of all lora_A, of all lora_B and of all lora_E."""
    found: dict[str, list[Tensor]] = {kind: [] for kind in KINDS}
    for name, parameter in model.named_parameters():
        for kind in KINDS:
            if f".{kind}" in name:
                found[kind].append(parameter.grad.detach().flatten())
    return tuple(torch.cat(parts) for parts in found.values() if parts)


def _peft_config(model: Config, training: Training) -> LoraConfig:
    common = {
        "lora_alpha": 2 * training.r,
        "lora_dropout": training.dropout,
        "target_modules": list(linears(model)),
        "task_type": "CAUSAL_LM",
    }
    if training.method != "adalora":
        return LoraConfig(r=training.r, **common)
    return AdaLoraConfig(
        init_r=training.r,
        target_r=max(1, training.r // 2),
        tinit=1,
        tfinal=1,
        total_step=ADALORA_STEPS,
        **common,
    )


def _optimizer(name: str) -> type[torch.optim.Optimizer]:
    if name == "adamw":
        return torch.optim.AdamW
    import bitsandbytes as bnb

    return {"adamw-32bit": bnb.optim.AdamW32bit, "paged-adamw": bnb.optim.PagedAdamW32bit}[name]
