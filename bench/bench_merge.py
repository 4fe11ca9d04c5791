"""Merging an adapter into a checkpoint of 2 GB, beside copying it and beside PEFT's merge.

63 linear layers of 4096x4096 in bf16, in 5 files, and an adapter of rank 16 for all of them. Ours
is the command: reading, checking, adding, writing, each file followed by fsync. The copies are
followed by fsync, too; "in the kernel" is sendfile. PEFT's is what merge_and_unload does of each
layer, as often, of one that is in memory already: neither reading nor writing is in it.

The result is compared with PEFT's bits.

python bench/bench_merge.py [--layers 1] [--seconds 5]
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import tempfile
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from safetensors import safe_open
from safetensors.torch import save_file
from specs import Case, Options, Spec, Target, Variant
from suite import benchmark_test, main
from torch import Tensor, nn
from transformers import LlamaConfig

from peftkern.tools.adapters import Adapter, Update, read_adapter, write_adapter
from peftkern.tools.bench.record import OURS
from peftkern.tools.checkpoints.checkpoint import read_checkpoint
from peftkern.tools.merge.merge import merge_checkpoint
from peftkern.tools.merge.plan import Options as MergeOptions

BLOCKS, BLOCKS_OF_FILE, VOCABULARY = 9, 2, 128
LINEAR = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj",
          "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")  # fmt: skip
COPY, KERNEL = "copy, read and write", "copy in the kernel"
PEFT = "PEFT, in memory"


def write_base(folder: Path, n: int, blocks: int) -> int:
    """Write a Llama checkpoint with square layers; return its bytes."""
    config = LlamaConfig(
        hidden_size=n, intermediate_size=n, num_hidden_layers=blocks, vocab_size=VOCABULARY,
        num_attention_heads=max(1, n // 128), dtype="bfloat16",
        architectures=["LlamaForCausalLM"],
    )  # fmt: skip
    config.save_pretrained(folder)
    torch.manual_seed(0)
    names: dict[str, str] = {}
    total = 0
    for first in range(0, blocks, BLOCKS_OF_FILE):
        tensors = {}
        for block in range(first, min(first + BLOCKS_OF_FILE, blocks)):
            prefix = f"model.layers.{block}"
            tensors |= {f"{prefix}.{name}.weight": torch.randn(n, n) / n**0.5 for name in LINEAR}
            for norm in ("input_layernorm", "post_attention_layernorm"):
                tensors[f"{prefix}.{norm}.weight"] = torch.ones(n)
        if first == 0:
            for table in ("model.embed_tokens", "lm_head"):
                tensors[f"{table}.weight"] = torch.randn(VOCABULARY, n)
            tensors["model.norm.weight"] = torch.ones(n)
        tensors = {name: tensor.bfloat16() for name, tensor in tensors.items()}
        file = f"model-{first:05d}.safetensors"
        save_file(tensors, folder / file, {"format": "pt"})
        names |= dict.fromkeys(tensors, file)
        total += (folder / file).stat().st_size
    index = {"metadata": {"total_size": total}, "weight_map": names}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return total


def write_lora(folder: Path, n: int, r: int, blocks: int) -> None:
    updates = {}
    for block in range(blocks):
        for linear in LINEAR:
            name = f"model.layers.{block}.{linear}"
            A, B = torch.randn(r, n) / n**0.5, torch.randn(n, r) / 100
            updates[name] = Update(name, "weight", "linear", A, B, 1.0)
    config = {"peft_type": "LORA", "r": r, "lora_alpha": r, "target_modules": list(updates)}
    write_adapter(Adapter(config, updates), folder)


def peft_layer(base: Path, lora: Path) -> nn.Module:
    """Make PEFT's layer of the first linear layer."""
    name = f"model.layers.0.{LINEAR[0]}"
    update = read_adapter(lora).updates[name]
    with safe_open(base / "model-00000.safetensors", "pt") as file:
        weight = file.get_tensor(f"{name}.weight")
    net = nn.Sequential(nn.Linear(*reversed(weight.shape), bias=False, dtype=torch.bfloat16))
    net[0].weight.data = weight
    r = len(update.lora_A)
    model = get_peft_model(net, LoraConfig(r=r, lora_alpha=r, target_modules=["0"]))
    layer = model.base_model.model[0]
    layer.lora_A["default"].weight.data = update.lora_A
    layer.lora_B["default"].weight.data = update.lora_B
    return layer


def copied(source: Path, target: Path, in_kernel: bool) -> Path:
    """Copy the files of a folder, each followed by fsync."""
    shutil.rmtree(target, ignore_errors=True)
    target.mkdir()
    for file in sorted(source.iterdir()):
        with open(file, "rb") as reader, open(target / file.name, "wb") as writer:
            if in_kernel:
                while os.sendfile(writer.fileno(), reader.fileno(), None, 1 << 26):
                    pass
            else:
                shutil.copyfileobj(reader, writer, 1 << 22)
            writer.flush()
            os.fsync(writer.fileno())
    return target


def first_weight(folder: Path) -> Tensor:
    name = f"model.layers.0.{LINEAR[0]}.weight"
    with safe_open(folder / "model-00000.safetensors", "pt") as file:
        return file.get_tensor(name).double()


def build(options: Options) -> Case:
    n, blocks = options.n, options.depth(BLOCKS)
    folder = tempfile.TemporaryDirectory()
    base, lora, target = (Path(folder.name) / name for name in ("base", "lora", "target"))
    base.mkdir()
    size = write_base(base, n, blocks)
    write_lora(lora, n, options.r, blocks)
    layer = peft_layer(base, lora)

    def ours(i: int, folder: tempfile.TemporaryDirectory = folder) -> Path:
        shutil.rmtree(target, ignore_errors=True)
        adapters = [(read_adapter(lora), 1.0)]
        merge_checkpoint(read_checkpoint(base), adapters, target, MergeOptions())
        return target

    def theirs(i: int) -> None:
        for _ in range(blocks * len(LINEAR)):
            layer.merge()
            layer.merged_adapters.clear()

    layer.merge()
    oracle = (layer.base_layer.weight.data.double(),)
    layer.merged_adapters.clear()
    variants = {
        OURS: Variant(ours, oracle, lambda path: (first_weight(path),)),
        KERNEL: Variant(lambda i: copied(base, target, True)),
        COPY: Variant(lambda i: copied(base, target, False)),
        PEFT: Variant(theirs),
    }
    return Case(variants, 2 * size, 0, torch.float32)


SPECS = [
    Spec("merge/2-GB/bf16", build, (OURS, KERNEL, COPY, PEFT), PEFT,
         (Target(PEFT, 4.0), Target(KERNEL, 1 / 1.5), Target(COPY, 1 / 1.5))),
]  # fmt: skip

test_merge = benchmark_test(SPECS)

if __name__ == "__main__":
    sys.exit(main("merge", SPECS))
