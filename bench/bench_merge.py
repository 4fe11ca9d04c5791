"""Merging an adapter into a checkpoint of 2 GB, beside copying it and beside PEFT's merge.

63 linear layers of 4096x4096 in bf16, in 5 files, and an adapter of rank 16 for all of them.

"2-GB": ours is the command: reading, checking, adding, writing, each file followed by fsync. The
copies are followed by fsync, too; "in the kernel" is sendfile.
"63-layers": PEFT's is what merge_and_unload does of each layer, as often, of one that is in memory
already, in place. Ours is the command's arithmetic of panels, as often, of such a weight in place.

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

from peftkern.functional.panels import full_float32, parallel
from peftkern.tools.adapters import Adapter, Update, read_adapter, write_adapter
from peftkern.tools.bench.record import OURS
from peftkern.tools.checkpoints.checkpoint import read_checkpoint
from peftkern.tools.merge.arithmetic import Buffers
from peftkern.tools.merge.merge import merge_checkpoint
from peftkern.tools.merge.plan import Options as MergeOptions
from peftkern.tools.merge.plan import Unit
from peftkern.tools.merge.request import plan_merge
from peftkern.tools.merge.tensors import merged_panel, panels

BLOCKS, BLOCKS_OF_FILE, VOCABULARY = 9, 2, 128
LINEAR = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj",
          "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")  # fmt: skip
COPY, KERNEL, PEFT = "copy, read and write", "copy in the kernel", "PEFT"
FIRST = f"model.layers.0.{LINEAR[0]}"


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


def write_both(options: Options) -> tuple[tempfile.TemporaryDirectory, Path, Path, int]:
    """Write a base and an adapter; return their folder, which goes with its last user, and the
    bytes of the base."""
    folder = tempfile.TemporaryDirectory()
    base, lora = (Path(folder.name) / name for name in ("base", "lora"))
    base.mkdir()
    blocks = options.depth(BLOCKS)
    size = write_base(base, options.n, blocks)
    write_lora(lora, options.n, options.r, blocks)
    return folder, base, lora, size


def first_weight(folder: Path) -> Tensor:
    with safe_open(folder / "model-00000.safetensors", "pt") as file:
        return file.get_tensor(f"{FIRST}.weight")


def peft_layer(base: Path, lora: Path) -> nn.Module:
    """Make PEFT's layer of the first linear layer."""
    update, weight = read_adapter(lora).updates[FIRST], first_weight(base)
    net = nn.Sequential(nn.Linear(*reversed(weight.shape), bias=False, dtype=torch.bfloat16))
    net[0].weight.data = weight
    r = len(update.lora_A)
    model = get_peft_model(net, LoraConfig(r=r, lora_alpha=r, target_modules=["0"]))
    layer = model.base_model.model[0]
    layer.lora_A["default"].weight.data = update.lora_A
    layer.lora_B["default"].weight.data = update.lora_B
    return layer


def peft_bits(layer: nn.Module) -> Tensor:
    """Merge a copy of a layer's weight."""
    before = layer.base_layer.weight.data
    layer.base_layer.weight.data = before.clone()
    layer.merge()
    layer.merged_adapters.clear()
    merged, layer.base_layer.weight.data = layer.base_layer.weight.data, before
    return merged.double()


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


def build_files(options: Options) -> Case:
    folder, base, lora, size = write_both(options)
    target = Path(folder.name) / "target"

    def ours(i: int) -> Path:
        shutil.rmtree(target, ignore_errors=True)
        adapters = [(read_adapter(lora), 1.0)]
        merge_checkpoint(read_checkpoint(base), adapters, target, MergeOptions())
        return target

    oracle = (peft_bits(peft_layer(base, lora)),)
    variants = {
        OURS: Variant(ours, oracle, lambda path: (first_weight(path).double(),)),
        KERNEL: Variant(lambda i, folder=folder: copied(base, target, True)),
        COPY: Variant(lambda i: copied(base, target, False)),
    }
    return Case(variants, 2 * size, 0, torch.float32)


def build_memory(options: Options) -> Case:
    folder, base, lora, size = write_both(options)
    layer, before = peft_layer(base, lora), first_weight(base)
    weight = before.clone()
    plan = plan_merge(read_checkpoint(base), [(read_adapter(lora), 1.0)], MergeOptions())
    units = [unit for file in plan.files for unit in file.units if unit.edits]
    units.sort(key=lambda unit: unit.name != f"{FIRST}.weight")
    folder.cleanup()

    def merge(unit: Unit) -> None:
        buffers = Buffers()
        for panel in panels(unit):
            rows = weight[panel.first : panel.last]
            rows.copy_(merged_panel(panel, rows, weight.dtype, buffers)[0])

    def ours(i: int) -> None:
        with full_float32(), parallel(torch.device("cpu")) as run:
            list(run(merge, units))

    def once(_: object) -> tuple[Tensor]:
        weight.copy_(before)
        merge(units[0])
        return (weight.double(),)

    def theirs(i: int) -> None:
        for _ in units:
            layer.merge()
            layer.merged_adapters.clear()

    variants = {
        OURS: Variant(ours, (peft_bits(layer),), once),
        PEFT: Variant(theirs),
    }
    return Case(variants, 2 * size, 0, torch.float32)


SPECS = [
    Spec("merge/2-GB/bf16", build_files, (OURS, KERNEL, COPY), COPY,
         (Target(KERNEL, 1 / 1.5), Target(COPY, 1 / 1.5))),
    Spec("merge/63-layers/bf16", build_memory, (OURS, PEFT), PEFT, (Target(PEFT, 4.0),)),
]  # fmt: skip

test_merge = benchmark_test(SPECS)

if __name__ == "__main__":
    sys.exit(main("merge", SPECS))
