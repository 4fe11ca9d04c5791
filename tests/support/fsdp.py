"""Models in units of FSDP, by hand and as accelerate makes them, on CPUs with gloo."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from adalora_models import quantize_4bit_
from peft.utils.other import fsdp_auto_wrap_policy
from peft_models import add_lora, fill_adapters, tiny_llama
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.fsdp.wrap import ModuleWrapPolicy

TARGETS = ("q_proj", "down_proj")
ADAPTED = 2 * len(TARGETS)  # layers of two decoder layers
FACTORS = ("lora_A.default", "lora_B.default", "lora_magnitude_vector.default")


def small_llama(
    dtype: torch.dtype = torch.float32, storage: torch.dtype | None = None, **config: Any
) -> nn.Module:
    """A Llama with few adapters, over 4-bit layers if their storage is given."""
    base = tiny_llama(dtype)
    if storage is not None:
        quantize_4bit_(base, quant_storage=storage)
    model = add_lora(base, target_modules=list(TARGETS), **config)
    fill_adapters(model)
    return model


def _shard(model: nn.Module, names: tuple[str, ...], options: dict[str, Any]) -> nn.Module:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    inner = [module for name, module in model.named_modules() if name.endswith(names)]
    for module in (*inner, *model.base_model.model.model.layers, model):
        fully_shard(module, mesh=mesh, **options)
    return model


def in_leaves(model: nn.Module, **options: Any) -> nn.Module:
    """FSDP2: each base layer and factor a unit, and each decoder layer around them."""
    return _shard(model, ("base_layer", *FACTORS), options)


def in_factors(model: nn.Module, **options: Any) -> nn.Module:
    """FSDP2: each factor a unit, as PEFT's policy wraps, and each decoder layer around them."""
    return _shard(model, FACTORS, options)


def in_layers(model: nn.Module, **options: Any) -> nn.Module:
    """FSDP2: each decoder layer a unit."""
    return _shard(model, (), options)


def in_one(model: nn.Module, **options: Any) -> nn.Module:
    """FSDP2: the model one unit."""
    return fully_shard(model, mesh=init_device_mesh("cpu", (dist.get_world_size(),)), **options)


def flat(model: nn.Module, policy: Callable | None = None, **options: Any) -> nn.Module:
    """FSDP1, wrapped as PEFT's policy says if no other is given."""
    options = {"use_orig_params": True, "device_id": torch.device("cpu"), **options}
    policy = policy or fsdp_auto_wrap_policy(model)
    return FullyShardedDataParallel(model, auto_wrap_policy=policy, **options)


def flat_layers(model: nn.Module, **options: Any) -> nn.Module:
    """FSDP1: frozen and trained parameters of a decoder layer in one."""
    kind = type(model.base_model.model.model.layers[0])
    return flat(model, ModuleWrapPolicy({kind}), **options)


def accelerated(
    model: nn.Module,
    version: int,
    peft_policy: bool = False,
    mixed_precision: str | None = None,
    ram_efficient: bool = False,
) -> nn.Module:
    """A model as accelerate prepares it. It takes FSDP for GPUs alone, so it is told in here."""
    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=version,
        auto_wrap_policy="transformer_based_wrap",
        transformer_cls_names_to_wrap=["LlamaDecoderLayer"],
        cpu_ram_efficient_loading=ram_efficient,
        **({"use_orig_params": True} if version == 1 else {}),
    )
    accelerator = Accelerator(cpu=True, mixed_precision=mixed_precision)
    if mixed_precision is not None:
        plugin.set_mixed_precision(mixed_precision)
    AcceleratorState._shared_state["fsdp_plugin"] = plugin
    for state in (PartialState, AcceleratorState):
        state._shared_state["distributed_type"] = DistributedType.FSDP
    os.environ["ACCELERATE_USE_FSDP"] = "true"
    if peft_policy:  # as the Trainer does
        plugin.auto_wrap_policy = fsdp_auto_wrap_policy(model)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad])
    return accelerator.prepare(model, optimizer)[0]
