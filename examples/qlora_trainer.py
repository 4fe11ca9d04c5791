"""QLoRA under transformers' Trainer: bitsandbytes' 4-bit base, PEFT's adapters, one callback.

The model is small and random, so that nothing is downloaded; put your own folder in its place.
"""

import tempfile
from pydoc_data.topics import topics  # Python's language reference: text that is always there

import torch
from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training
from transformers import (
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    LlamaConfig,
    LlamaForCausalLM,
    Trainer,
    TrainingArguments,
)

import peftkern
from peftkern.integrations.transformers import MonitorCallback, PeftKernCallback

torch.manual_seed(0)
folder = tempfile.TemporaryDirectory()
sizes = {"vocab_size": 256, "hidden_size": 256, "intermediate_size": 704, "num_hidden_layers": 2}
LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=4)).save_pretrained(folder.name)

nf4 = BitsAndBytesConfig(
    load_in_4bit=True,
    bnb_4bit_quant_type="nf4",
    bnb_4bit_use_double_quant=True,
    bnb_4bit_compute_dtype=torch.bfloat16,
)
model = AutoModelForCausalLM.from_pretrained(
    folder.name, quantization_config=nf4, dtype=torch.bfloat16
)
checkpointing = {"use_reentrant": False}
model = prepare_model_for_kbit_training(model, gradient_checkpointing_kwargs=checkpointing)
model = get_peft_model(model, LoraConfig(r=16, lora_dropout=0.05, target_modules="all-linear"))

text = torch.tensor(list("\n".join(topics.values()).encode()))
rows = [{"input_ids": ids, "labels": ids} for ids in text[: 160 * 128].view(-1, 128)]
arguments = TrainingArguments(
    output_dir=folder.name,
    per_device_train_batch_size=4,
    max_steps=20,
    learning_rate=1e-3,
    bf16=True,
    use_cpu=not torch.cuda.is_available(),
    logging_steps=5,
    save_strategy="no",
    report_to=[],
)
trainer = Trainer(model, arguments, train_dataset=rows, callbacks=[PeftKernCallback()])
MonitorCallback.attach(trainer)  # tokens per second, step time and memory join the Trainer's log
trainer.train()
print(peftkern.stats())
