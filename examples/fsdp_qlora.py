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
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig, LlamaConfig

import peftkern

options = argparse.ArgumentParser()
options.add_argument("--model", help="folder or name; by default a small random Llama")
name, folder = options.parse_args().model, tempfile.TemporaryDirectory()
torch.manual_seed(0)
text, bf16 = "\n".join(topics.values()), torch.bfloat16
ids = list(text.encode()) if name is None else AutoTokenizer.from_pretrained(name)(text).input_ids
if name is None:  # in every process, for transformers does not know of the others yet
    name, sizes = folder.name, {"vocab_size": 256, "hidden_size": 256, "intermediate_size": 704}
    config = LlamaConfig(**sizes, num_hidden_layers=2, num_attention_heads=4)
    AutoModelForCausalLM.from_config(config).save_pretrained(name)

accelerator = Accelerator(cpu=not torch.cuda.is_available())
nf4 = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}
nf4 |= {"bnb_4bit_compute_dtype": bf16, "bnb_4bit_quant_storage": bf16}  # FSDP shards one dtype
nf4 = BitsAndBytesConfig(**nf4)
model = AutoModelForCausalLM.from_pretrained(name, quantization_config=nf4, dtype=bf16)
model = get_peft_model(model, LoraConfig(r=16, target_modules="all-linear"))
accelerator.print(peftkern.patch(model))  # in every process, before anything is sharded
by_accelerate = accelerator.distributed_type == DistributedType.FSDP
if not by_accelerate:  # under torchrun, or on CPUs, where accelerate does not shard: as it would
    policy = MixedPrecisionPolicy(param_dtype=bf16, reduce_dtype=torch.float32)
    for unit in (*model.get_base_model().model.layers, model):
        fully_shard(unit, mp_policy=policy)
optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=1e-3)
if by_accelerate:
    model, optimizer = accelerator.prepare(model, optimizer)

rows = torch.tensor(ids, device=accelerator.device).unfold(0, 128, 128)
own = rows[accelerator.process_index :: accelerator.num_processes]
for step, ids in enumerate(own[:40].split(4), start=1):
    loss = model(input_ids=ids, labels=ids).loss
    accelerator.backward(loss)
    optimizer.step()
    optimizer.zero_grad()
    accelerator.print(f"step {step}: loss {accelerator.reduce(loss.detach(), 'mean').item():.3f}")

whole = StateDictOptions(full_state_dict=True, cpu_offload=True, ignore_frozen_params=True)
state = get_model_state_dict(model, options=whole)
if accelerator.is_main_process:
    model.save_pretrained(folder.name, state_dict=state)
accelerator.print(peftkern.stats())
