"""LoRA over several devices by DeepSpeed: ZeRO-3 shards the weights, peftkern serves each layer.

torchrun --nproc-per-node 2 examples/zero3_lora.py --model FOLDER
DS_ACCELERATOR=cpu torchrun --nproc-per-node 2 examples/zero3_lora.py  # a random model, on CPUs
"""

import argparse
import tempfile
from pathlib import Path
from pydoc_data.topics import topics  # Python's language reference: text that is always there

import torch
from peft import LoraConfig, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    Trainer,
    TrainingArguments,
)

import peftkern
from peftkern.integrations.transformers import PeftKernCallback

options = argparse.ArgumentParser()
options.add_argument("--model", help="folder or name; by default a small random Llama")
model_name = options.parse_args().model
folder = tempfile.TemporaryDirectory()
arguments = TrainingArguments(  # before the model, which transformers then loads in shards
    output_dir=folder.name,
    deepspeed=str(Path(__file__).with_suffix(".json")),
    per_device_train_batch_size=4,
    max_steps=10,
    learning_rate=1e-3,
    bf16=True,
    use_cpu=not torch.cuda.is_available(),
    logging_steps=1,
    save_strategy="no",
    report_to=[],
)
torch.manual_seed(0)
text = "\n".join(topics.values())
if model_name is None:
    sizes = {"vocab_size": 256, "hidden_size": 256, "intermediate_size": 704}
    config = LlamaConfig(**sizes, num_hidden_layers=2, num_attention_heads=4)
    model, ids = LlamaForCausalLM._from_config(config, dtype=torch.bfloat16), list(text.encode())
else:
    model = AutoModelForCausalLM.from_pretrained(model_name, dtype=torch.bfloat16)
    ids = AutoTokenizer.from_pretrained(model_name)(text)["input_ids"]
model = get_peft_model(model, LoraConfig(r=16, target_modules="all-linear"))

tokens = torch.tensor(ids[: 80 * 128]).view(-1, 128)
rows = [{"input_ids": row, "labels": row} for row in tokens]
trainer = Trainer(model, arguments, train_dataset=rows, callbacks=[PeftKernCallback()])
trainer.train()
trainer.save_model()  # the adapter, whole
if trainer.is_world_process_zero():
    print(peftkern.stats())
