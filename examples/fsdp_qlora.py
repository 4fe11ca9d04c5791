"""QLoRA over several devices: FSDP2 shards bitsandbytes' 4-bit weights, peftkern serves each layer.

accelerate launch --config_file examples/fsdp_qlora.yaml examples/fsdp_qlora.py --model FOLDER
torchrun --nproc-per-node 2 examples/fsdp_qlora.py  # a random model, on GPUs or on CPUs
"""

import argparse
import tempfile
from pydoc_data.topics import topics  # Python's language reference: text that is always there

import torch
from accelerate import Accelerator, DistributedType
from peft import LoraConfig, get_peft_model
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    LlamaConfig,
    LlamaForCausalLM,
)

import peftkern

arguments = argparse.ArgumentParser()
arguments.add_argument("--model", help="folder or name; by default a small random Llama")
options = arguments.parse_args()
torch.manual_seed(0)
folder = tempfile.TemporaryDirectory()
sizes = {"vocab_size": 256, "hidden_size": 256, "intermediate_size": 704, "num_hidden_layers": 2}
if options.model is None:  # in every process, for transformers does not know of the others yet
    LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=4)).save_pretrained(folder.name)

accelerator = Accelerator(cpu=not torch.cuda.is_available())
nf4 = BitsAndBytesConfig(
    load_in_4bit=True,
    bnb_4bit_quant_type="nf4",
    bnb_4bit_use_double_quant=True,
    bnb_4bit_compute_dtype=torch.bfloat16,
    bnb_4bit_quant_storage=torch.bfloat16,  # what FSDP shards: of the dtype it computes in
)
model = AutoModelForCausalLM.from_pretrained(
    options.model or folder.name, quantization_config=nf4, dtype=torch.bfloat16
)
model = get_peft_model(model, LoraConfig(r=16, target_modules="all-linear"))
accelerator.print(peftkern.patch(model))  # in every process, before anything is sharded

by_accelerate = accelerator.distributed_type == DistributedType.FSDP
if not by_accelerate:  # under torchrun, or on CPUs, where accelerate does not shard: as it would
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    for unit in (*model.get_base_model().model.layers, model):
        fully_shard(unit, mp_policy=policy)
optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=1e-3)
if by_accelerate:
    model, optimizer = accelerator.prepare(model, optimizer)

text = "\n".join(topics.values())
ids = list(text.encode())
if options.model is not None:
    ids = AutoTokenizer.from_pretrained(options.model)(text)["input_ids"]
tokens = torch.tensor(ids, device=accelerator.device)
for step in range(10):
    batch = step * accelerator.num_processes + accelerator.process_index
    ids = tokens[batch * 512 : (batch + 1) * 512].view(4, 128)
    loss = model(input_ids=ids, labels=ids).loss
    accelerator.backward(loss)
    optimizer.step()
    optimizer.zero_grad()
    loss = accelerator.reduce(loss.detach(), "mean").item()
    accelerator.print(f"step {step + 1}: loss {loss:.3f}")

whole = StateDictOptions(full_state_dict=True, cpu_offload=True, ignore_frozen_params=True)
state = get_model_state_dict(model, options=whole)
if accelerator.is_main_process:
    model.save_pretrained(folder.name, state_dict=state)
accelerator.print(peftkern.stats())
