"""Tensors of a checkpoint that are quantized: weights of linear layers, and of experts.

transformers itself decides on linear layers: its quantizer prepares a model without memory for its
weights (on the meta device). Its loader's rules say which tensor of the checkpoint belongs to which
layer, and which tensors are the experts of one stack [E, N, K].
"""

from __future__ import annotations

import contextlib
import json
import re
import statistics
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import bitsandbytes as bnb
import torch
from torch import nn
from transformers import BitsAndBytesConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D
from transformers.quantizers.auto import AutoHfQuantizer
from transformers.quantizers.quantizers_utils import should_convert_module
from transformers.utils.quantization_config import QuantizationConfigMixin

from peftkern.formats.nf4 import STATE_KEYS
from peftkern.integrations.transformers.block_linear import BlockLinearConfig, PlannedLinear
from peftkern.integrations.transformers.mxfp4_experts import FAMILY, MXFP4ExpertsConfig
from peftkern.integrations.transformers.nf4_experts import NF4ExpertsConfig
from peftkern.layers.quantize import expert_parameters
from peftkern.tools.adapters.extract_experts import find_stack
from peftkern.tools.checkpoints.architecture import (
    Load,
    by_target,
    check_shape,
    find_loads,
    is_turned,
    load_targets,
    meta_model,
)
from peftkern.tools.checkpoints.checkpoint import DTYPES, Checkpoint, CheckpointError
from peftkern.tools.quantize.file_plan import Choice, Stack
from peftkern.tools.quiet import quiet

# What OpenAI's own config leaves dense beside the output embeddings.
_DENSE_IN_GPT_OSS = ("model.layers.*.self_attn", "model.layers.*.mlp.router", "model.embed_tokens")


def find_weights(
    checkpoint: Checkpoint,
    *,
    skip: Sequence[str] = (),
    stack: bool = True,
    format: str = "nf4",
    blocksize: int = 64,
    double_quant: bool = True,
    compute_dtype: str | None = None,
) -> tuple[Choice, dict[str, Any]]:
    """Find the tensors to quantize, and the config that says so.

    These are the weights that transformers would turn into Linear4bit, nn.Linear and Conv1D except
    the output embeddings, weights tied to them, and those that the model keeps in float32; and the
    experts that peftkern would keep in NF4. The config is bitsandbytes', or peftkern's if there are
    stacks. The excluded names stand in it, so that every version of transformers excludes the same.

    In FP4 the config is bitsandbytes', in MXFP4, NVFP4 and INT4 `BlockLinearConfig`, and experts
    are not stacked. Of gpt-oss in MXFP4 the experts alone are chosen, as OpenAI ships it, and the
    config is transformers' own.

    Args: skip, more modules to exclude: full names, their beginnings or endings; stack, make one
        tensor of those that are an expert each, else they are quantized like linear layers;
        blocksize, of stacks and of INT4; compute_dtype, the dtype of most of the weights by
        default, where the config has one.
    Raises: CheckpointError if transformers does not know the architecture, if the tensors do not
        fit it, if a name in skip fits no layer, or if a layer's weight is assembled on loading.
    """
    with quiet():
        model = meta_model(checkpoint)
        loads = list(find_loads(model, checkpoint))
        skip = _left_out(model, skip)
        stacks, dense = _expert_weights(model, loads, skip)
        config = _config(model, format, blocksize, sorted([*skip, *dense]), double_quant)
        quantizer = AutoHfQuantizer.from_config(config, pre_quantized=True)
        quantizer.preprocess_model(model, device_map={"": "cpu"}, dtype=torch.bfloat16)

    linear = _linear_weights(model, loads)
    if not stack:
        apart = [s for s in stacks.values() if len(checkpoint.tensors[s.sources[0]].shape) == 2]
        stacks = {name: s for name, s in stacks.items() if s not in apart}
        linear |= {source: False for s in apart for source in s.sources}
    if format != "nf4" and not isinstance(config, MXFP4ExpertsConfig):
        stacks = {}
    found = Choice(linear, stacks, tuple(getattr(quantizer, "unfit", ())))
    names = [*linear, *(source for s in stacks.values() for source in s.sources)]
    if not names:
        why = ""
        if found.unfit:
            why = f"; the rows of {found.unfit[0]} are no whole blocks of {blocksize} values"
        raise CheckpointError(
            f"{checkpoint.folder}: no tensor is the weight of a linear layer of "
            f"{type(model).__name__} that may be quantized to {format}{why}"
        )
    if isinstance(config, BitsAndBytesConfig):
        if stacks:
            own = {k: v for k, v in config.to_dict().items() if k.startswith(("bnb", "llm"))}
            config = NF4ExpertsConfig(experts_blocksize=blocksize, **own)
        most = statistics.mode(sorted(checkpoint.tensors[name].dtype for name in names))
        compute = DTYPES[most] if compute_dtype is None else getattr(torch, compute_dtype)
        config.bnb_4bit_compute_dtype = compute
    return found, json.loads(config.to_json_string(use_diff=False))


def _config(
    model: PreTrainedModel, format: str, blocksize: int, skip: list[str], double_quant: bool
) -> QuantizationConfigMixin:
    """Return the config by which a model is loaded whose linear layers are in a format."""
    if format == "mxfp4" and model.config.get_text_config().model_type == FAMILY:
        return MXFP4ExpertsConfig(sorted({*skip, *_DENSE_IN_GPT_OSS}))
    if format not in STATE_KEYS:
        return BlockLinearConfig(format, blocksize, skip)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=format,
        bnb_4bit_use_double_quant=double_quant,
        bnb_4bit_quant_storage=torch.uint8,
        llm_int8_skip_modules=skip,
    )


def _linear_weights(model: PreTrainedModel, loads: Iterable[Load]) -> dict[str, bool]:
    """Find the weights of the layers that the quantizer has prepared."""
    sources: dict[str, Load] = {}
    for load in loads:  # a converter may make several parameters of one tensor
        targets = [load.target] if load.converter is None else load_targets(load)
        sources |= dict.fromkeys(targets, load)
    linear: dict[str, bool] = {}
    for module_name, module in model.named_modules():
        load = sources.get(f"{module_name}.weight")
        if not isinstance(module, bnb.nn.Linear4bit | PlannedLinear) or load is None:
            continue  # a layer without weights in the checkpoint, as a new head, is initialized
        if load.converter is not None:
            raise CheckpointError(
                f"{module_name}: transformers puts its weight together from other tensors "
                f"({load.info.name!r}); save_pretrained() the model with this version of it first"
            )
        transposed = issubclass(module.source_cls, Conv1D)
        shape = (module.out_features, module.in_features)
        check_shape(load.info, shape[::-1] if transposed else shape)
        linear[load.info.name] = transposed
    return linear


def _expert_weights(
    model: PreTrainedModel, loads: Iterable[Load], skip: Sequence[str]
) -> tuple[dict[str, Stack], list[str]]:
    """Find the stacks of experts, and those that stay dense without being skipped: which loading
    rearranges, so that blocks would not stay whole.

    Raises: CheckpointError for tensors that are not those of the model's experts.
    """
    parts, stacks, dense = by_target(loads), {}, []
    for module_name, module, name in _stacks(model):
        target = f"{module_name}.{name}"
        if not all(should_convert_module(one, skip) for one in (module_name, target)):
            continue
        found = find_stack(model, target, parts[target]) if target in parts else None
        if found is None:
            dense.append(target)
            continue
        infos, turned = [load.info for load in parts[target]], is_turned(module)
        E, N, K = shape = tuple(module.get_parameter(name).shape)
        transposed = infos[0].shape == (E, K, N) and found.turned != turned
        whole = (E, K, N) if transposed else shape
        for info in infos:
            check_shape(info, whole if found.whole else (N * E // len(infos), K))
        stacks[target] = Stack(shape, tuple(found.names), transposed, turned and bool(found.whole))
    return stacks, dense


def _stacks(model: PreTrainedModel) -> Iterator[tuple[str, nn.Module, str]]:
    """Yield the module, by name and itself, and the name of each parameter that is a stack."""
    for module_name, module in model.named_modules():
        for name in expert_parameters(module):
            yield module_name, module, name


def _left_out(model: PreTrainedModel, skip: Sequence[str]) -> list[str]:
    layers = [n for n, m in model.named_modules() if isinstance(m, (nn.Linear, Conv1D))]
    for module_name, _, name in _stacks(model):
        layers += [module_name, f"{module_name}.{name}"]
    for name in skip:
        with contextlib.suppress(re.error):
            if name and not all(should_convert_module(layer, [name]) for layer in layers):
                continue
        examples = ", ".join(dict.fromkeys(layer.rpartition(".")[2] for layer in layers))
        raise CheckpointError(f"skip: no linear layer is called {name!r}; there are {examples}")
    quantizer = AutoHfQuantizer.from_config(BitsAndBytesConfig(load_in_4bit=True))
    names = quantizer.get_modules_to_not_convert(
        model, list(skip), model._keep_in_fp32_modules, add_default_skips=True
    )
    return sorted(names)
