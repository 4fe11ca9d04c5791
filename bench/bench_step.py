"""One training step (forward, backward, AdamW) of a few Llama-3-8B layers: PEFT, and patched.

Four decoder layers with random weights, LoRA r=16 on every linear layer, batches of 1x2048 tokens;
the base is NF4 by bitsandbytes where that runs, else bfloat16. Both models start from the same
numbers; the loss of the first step is what is compared before the clock runs. Tokens per second
are tokens over the median; peak memory is what a step holds beyond the model.

python bench/bench_step.py --device cuda
"""

from __future__ import annotations

import sys

import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

import peftkern
from peftkern.benchmark.peers import bitsandbytes_missing, linear4bit
from peftkern.benchmark.suite import OURS, Case, Options, Spec, Variant, main

PEFT = "PEFT"
BF16 = torch.bfloat16
TOKENS, LAYERS, VOCABULARY = 2048, 4, 8192


def llama(options: Options, nf4: bool) -> nn.Module:
    """Layers of Llama-3-8B's shape: heads of 128, four of them to a key, K 3.5 times as wide."""
    hidden = options.k
    heads = max(1, hidden // 128)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=hidden,
        intermediate_size=hidden * 7 // 2,
        num_hidden_layers=LAYERS,
        num_attention_heads=heads,
        num_key_value_heads=max(1, heads // 4),
        max_position_embeddings=TOKENS,
        use_cache=False,
    )
    torch.manual_seed(0)
    with torch.device(options.device):
        model = LlamaForCausalLM(config).to(BF16)
    if nf4:
        for layer in model.model.layers:
            for part in (layer.self_attn, layer.mlp):
                for name, linear in list(part.named_children()):
                    if isinstance(linear, nn.Linear):
                        setattr(part, name, linear4bit(linear.weight.detach()))
    return model


def stepper(options: Options, nf4: bool, patched: bool) -> Variant:
    model = llama(options, nf4)
    torch.manual_seed(1)
    targets = r".*\.(q|k|v|o|gate|up|down)_proj"
    config = LoraConfig(r=options.r, lora_alpha=2 * options.r, target_modules=targets)
    model = get_peft_model(model, config).train()
    generator = torch.Generator().manual_seed(2)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:  # zero in a new adapter, which would hide its errors
            noise = torch.randn(parameter.shape, generator=generator) * 0.01
            parameter.data.copy_(noise)
    if patched:
        peftkern.patch(model)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-5)
    ids = torch.randint(VOCABULARY, (8, 1, options.m(TOKENS)), generator=generator)
    batches = ids.to(options.device)

    def call(i: int) -> torch.Tensor:
        loss = model(input_ids=batches[i % 8], labels=batches[i % 8]).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    with torch.no_grad():
        first = model(input_ids=batches[0], labels=batches[0]).loss.double()
    return Variant(call, (first,))


def build(options: Options, nf4: bool) -> Case:
    peft = stepper(options, nf4, patched=False)
    ours = stepper(options, nf4, patched=True)
    hidden, m = options.k, options.m(TOKENS)
    weights = LAYERS * hidden * hidden * 13 + VOCABULARY * hidden  # q, o, k and v, gate, up, down
    traffic = 2 * weights * (0.516 if nf4 else 2.0)
    variants = {OURS: Variant(ours.call, peft.oracle), PEFT: peft}
    return Case(variants, int(traffic), 4 * m * weights, BF16)


def gpu_specs(device: torch.device) -> list[Spec]:
    bases = ("nf4", "bf16") if bitsandbytes_missing(device) is None else ("bf16",)
    return [
        Spec(
            f"step/{LAYERS}-layers-{TOKENS}-tokens/{base}",
            lambda options, base=base: build(options, base == "nf4"),
            (OURS, PEFT),
            PEFT,
            shape=(4096, 4096),
        )
        for base in bases
    ]


if __name__ == "__main__":
    sys.exit(main("step", [], gpu_specs))
