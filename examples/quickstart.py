"""QLoRA in a loop of your own: a small Llama over NF4, adapters by PEFT, kernels by peftkern."""

from pydoc_data.topics import topics  # Python's language reference: text that is always there

import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

import peftkern

torch.manual_seed(0)
sizes = {"vocab_size": 256, "hidden_size": 256, "intermediate_size": 704, "num_hidden_layers": 2}
model = LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=4)).bfloat16()
peftkern.quantize_(model)  # or load in 4 bits with BitsAndBytesConfig, or leave the base dense
model = get_peft_model(model, LoraConfig(r=16, target_modules="all-linear"))
print(peftkern.patch(model))  # the one line; peftkern.unpatch(model) undoes it

text = torch.tensor(list("\n".join(topics.values()).encode()))
optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=1e-3)
for step in range(20):
    ids = text[step * 512 : (step + 1) * 512].view(4, 128)
    loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    print(f"step {step + 1}: loss {loss.item():.3f}")
print(peftkern.stats())  # who served which operation, and why anything fell back
