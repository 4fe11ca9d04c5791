"""AdaLoRA under transformers' Trainer: the budget moves to the layers that need rank.

The Trainer alone never calls `update_and_allocate`, so that no rank would ever change:
AdaLoraCallback does, after every optimizer step. The model is small and random; put yours in its
place.
"""

import tempfile
from pydoc_data.topics import topics  # Python's language reference: text that is always there

import torch
from peft import AdaLoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

import peftkern
from peftkern.integrations.transformers import AdaLoraCallback, PeftKernCallback

STEPS = 40
torch.manual_seed(0)
sizes = {"vocab_size": 256, "hidden_size": 256, "intermediate_size": 704, "num_hidden_layers": 2}
model = LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=4)).bfloat16()
peftkern.quantize_(model)
config = AdaLoraConfig(
    init_r=12,
    target_r=4,  # on average over the layers
    total_step=STEPS,
    tinit=5,  # steps before the budget begins to shrink
    tfinal=10,  # steps after it has arrived
    deltaT=5,
    target_modules="all-linear",
    task_type="CAUSAL_LM",
)
model = get_peft_model(model, config)

text = torch.tensor(list("\n".join(topics.values()).encode()))
rows = [{"input_ids": ids, "labels": ids} for ids in text[: STEPS * 512].view(-1, 128)]
folder = tempfile.TemporaryDirectory()
arguments = TrainingArguments(
    output_dir=folder.name,
    per_device_train_batch_size=4,
    max_steps=STEPS,
    learning_rate=2e-3,
    logging_steps=10,
    save_strategy="no",
    report_to=[],
)
callbacks = [PeftKernCallback(), AdaLoraCallback()]
Trainer(model, arguments, train_dataset=rows, callbacks=callbacks).train()
for name, kept in model.peft_config["default"].rank_pattern.items():
    print(f"rank {sum(kept):2d}  {name}")
print(peftkern.stats())
