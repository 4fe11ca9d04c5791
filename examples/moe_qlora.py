"""QLoRA of a mixture of experts: the experts in NF4, too, and a LoRA for each of them.

`load_in_4bit` leaves fused experts, most of such a model's weights, in 16 bits. `quantize_` does
not; neither does `from_pretrained(..., quantization_config=NF4ExpertsConfig())` for a checkpoint,
of `peftkern.integrations.transformers`. Needs transformers 5.
"""

from pydoc_data.topics import topics  # Python's language reference: text that is always there

import torch
from peft import LoraConfig, get_peft_model
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

import peftkern

torch.manual_seed(0)
config = Qwen3MoeConfig(
    vocab_size=256,
    hidden_size=256,
    moe_intermediate_size=128,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=64,
    num_experts=16,
    num_experts_per_tok=4,
)
model = Qwen3MoeForCausalLM(config).bfloat16()
print(f"in NF4: {len(peftkern.quantize_(model))} linear layers and stacks of experts")
lora = LoraConfig(
    r=8,
    target_modules=["q_proj", "k_proj", "v_proj", "o_proj"],
    target_parameters=["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
)
model = get_peft_model(model, lora)
print(peftkern.patch(model))

text = torch.tensor(list("\n".join(topics.values()).encode()))
optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=1e-3)
for step in range(20):
    ids = text[step * 256 : (step + 1) * 256].view(2, 128)
    loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    print(f"step {step + 1}: loss {loss.item():.3f}")
print(peftkern.stats())
