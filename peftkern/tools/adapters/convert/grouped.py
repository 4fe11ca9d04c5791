"""Adapters with experts in three dimensions: `experts.gate_up_proj.lora_A.weight` [E, r, n].

    name     PEFT's, with the fused parameter as if it were a module
    tensors  lora_A [E, r, n], lora_B [E, m, r]; of all other modules as PEFT has them

SGLang and vLLM work on these stacks, Megatron-Bridge exports them. A side that all experts share
is [1, ...]: it is repeated.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import Tensor

from peftkern.formats.rank_patterns import PREFIX
from peftkern.tools.adapters import experts, peft_keys
from peftkern.tools.adapters.adapter import Adapter, AdapterError, Update
from peftkern.tools.adapters.source import CONFIG, Source

A, B = ".lora_A.weight", ".lora_B.weight"


def recognizes(source: Source) -> bool:
    return "peft_type" in (source.config or {}) and any(_stacked(source, n) for n in source.tensors)


def _stacked(source: Source, name: str) -> bool:
    return name.endswith((A, B)) and ".experts." in name and source.tensors[name].ndim == 3


def read(source: Source, _: str | None = None) -> Adapter:
    """Return the adapter.

    Raises: AdapterError naming the tensor, as PEFT's reader does.
    """
    stacks: dict[str, dict[str, Tensor]] = {}
    tensors = {}
    for name, tensor in source.tensors.items():
        if _stacked(source, name):
            suffix = A if name.endswith(A) else B
            stacks.setdefault(name.removesuffix(suffix), {})[suffix] = tensor
        else:
            tensors[name] = tensor
    parameters: dict[str, list[str]] = {}
    for stack in stacks:
        module, _, parameter = stack.rpartition(".")
        parameters.setdefault(module, []).append(parameter)
    targets = [name.removeprefix(PREFIX) for name in stacks]
    for stack, parts in stacks.items():
        module, _, parameter = stack.rpartition(".")
        lora_A, lora_B = experts.ungroup(*_pair(stack, parts, str(source.path)))
        wrapper = experts.wrapper(module, parameter, parameters[module])
        tensors |= {wrapper + A: lora_A, wrapper + B: lora_B}
    config = {**source.config, "target_parameters": targets}
    where, beside = str(source.path), str(source.path.with_name(CONFIG))
    found = peft_keys.parse(tensors, config, where, config_source=beside, layout="peft")
    return replace(found, notes=("experts in three dimensions", *found.notes[1:]))


def _pair(stack: str, parts: dict[str, Tensor], source: str) -> tuple[Tensor, Tensor]:
    """Return lora_A [E, r, n] and lora_B [E, m, r]."""
    for suffix in (A, B):
        if suffix not in parts:
            raise AdapterError(f"{source}: {stack}{suffix}: expected it in the file, [E, ...]")
    lora_A, lora_B = parts[A], parts[B]
    count = max(lora_A.shape[0], lora_B.shape[0])
    fits = {lora_A.shape[0], lora_B.shape[0]} <= {1, count} and lora_A.shape[1] == lora_B.shape[2]
    if not fits or 0 in (*lora_A.shape, *lora_B.shape):
        raise AdapterError(
            f"{source}: {stack}: expected lora_A [E, r, n] and lora_B [E, m, r], got "
            f"{list(lora_A.shape)} and {list(lora_B.shape)}"
        )
    return lora_A.expand(count, -1, -1), lora_B.expand(count, -1, -1)


def named(update: Update) -> dict[str, Tensor]:
    """Return the tensors of an update of experts."""
    name = f"{PREFIX}{update.module}.{update.parameter}"
    return {name + A: update.lora_A, name + B: update.lora_B}


def config(adapter: Adapter) -> dict[str, Any]:
    """Return a config whose target_modules name the fused parameters, too."""
    fields = dict.fromkeys(("target_parameters", "layers_to_transform", "layers_pattern"))
    return {**adapter.config, **fields, "target_modules": list(adapter.updates)}
