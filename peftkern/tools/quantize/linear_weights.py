"""Tensors of a checkpoint that transformers would quantize with bitsandbytes.

transformers itself decides: its quantizer prepares a model without memory for its weights (on the
meta device), and its loader's rules say which tensor of the checkpoint belongs to which layer.
"""

from __future__ import annotations

import contextlib
import json
import re
import statistics
from collections.abc import Sequence
from typing import Any

import bitsandbytes as bnb
import torch
import transformers
from torch import nn
from transformers import AutoConfig, BitsAndBytesConfig, PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key
from transformers.pytorch_utils import Conv1D
from transformers.quantizers.auto import AutoHfQuantizer
from transformers.quantizers.quantizers_utils import should_convert_module

from peftkern.formats.json_files import brief
from peftkern.tools.quantize.checkpoint import DTYPES, Checkpoint, CheckpointError, TensorInfo

_COUNT = re.compile(r"(layers?|experts|blocks)$")  # num_hidden_layers, n_layer, n_routed_experts
_MOST_MODULES = 10_000


def find_linear_weights(
    checkpoint: Checkpoint,
    *,
    skip: Sequence[str] = (),
    double_quant: bool = True,
    compute_dtype: str | None = None,
) -> tuple[dict[str, bool], dict[str, Any]]:
    """Find the tensors that transformers would turn into Linear4bit, and the matching config.

    Of each, whether it is kept transposed, as in Conv1D. These are the weights of nn.Linear and
    Conv1D except the output embeddings, weights tied to them, and those that the model keeps in
    float32. The excluded names stand in the config, so that every version of transformers excludes
    the same.

    Args: skip, more modules to exclude: full names, their beginnings or endings; compute_dtype, the
        dtype of most of the weights by default.
    Raises: CheckpointError if transformers does not know the architecture, if the tensors do not
        fit it, if a name in skip fits no layer, or if a layer's weight is assembled on loading.
    """
    with contextlib.ExitStack() as stack:
        stack.callback(transformers.logging.set_verbosity, transformers.logging.get_verbosity())
        transformers.logging.set_verbosity_error()
        model = _meta_model(checkpoint)
        sources = _sources(model, checkpoint)
        config = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=double_quant,
            bnb_4bit_quant_storage=torch.uint8,
            llm_int8_skip_modules=_left_out(model, skip),
        )
        quantizer = AutoHfQuantizer.from_config(config, pre_quantized=True)
        quantizer.preprocess_model(model, device_map={"": "cpu"}, dtype=torch.bfloat16)

    linear: dict[str, bool] = {}
    for module_name, module in model.named_modules():
        info = sources.get(f"{module_name}.weight")
        if not isinstance(module, bnb.nn.Linear4bit) or info is None:
            continue  # a layer without weights in the checkpoint, as a new head, is initialized
        if not isinstance(info, TensorInfo):
            raise CheckpointError(
                f"{module_name}: transformers puts its weight together from other tensors "
                f"({info!r}); save_pretrained() the model with this version of it first"
            )
        transposed = issubclass(module.source_cls, Conv1D)
        shape = (module.out_features, module.in_features)
        if info.shape != (shape[::-1] if transposed else shape):
            raise CheckpointError(
                f"{info.name}: shape {list(info.shape)} does not fit {list(shape)} of config.json"
            )
        linear[info.name] = transposed
    if not linear:
        raise CheckpointError(
            f"{checkpoint.folder}: no tensor is the weight of a linear layer of "
            f"{type(model).__name__} that may be quantized"
        )
    most = statistics.mode(sorted(checkpoint.tensors[name].dtype for name in linear))
    compute = DTYPES[most] if compute_dtype is None else getattr(torch, compute_dtype)
    config.bnb_4bit_compute_dtype = compute
    return linear, json.loads(config.to_json_string(use_diff=False))


def _meta_model(checkpoint: Checkpoint) -> PreTrainedModel:
    """Build the architecture that config.json names, from transformers' own code only."""
    architectures = checkpoint.config.get("architectures")
    name = architectures[0] if isinstance(architectures, list) and architectures else None
    known = getattr(transformers, name, None) if isinstance(name, str) else None
    if not (isinstance(known, type) and issubclass(known, PreTrainedModel)):
        raise CheckpointError(
            f"{checkpoint.folder}: transformers {transformers.__version__} has no architecture "
            f"{brief(name)}, and code of a checkpoint is not run"
        )
    _check_counts(checkpoint.config)
    try:
        config = AutoConfig.from_pretrained(
            checkpoint.folder, trust_remote_code=False, local_files_only=True
        )
        with torch.device("meta"):
            return known(config)
    except Exception as error:  # a config can make its model raise anything
        raise CheckpointError(
            f"{checkpoint.folder}: transformers cannot build {name} from config.json: {error}"
        ) from error


def _check_counts(config: Any) -> None:
    """Bound the counts: every layer becomes an object, even on meta; a billion do not fit."""
    for key, value in config.items():
        if isinstance(value, dict):
            _check_counts(value)
        elif _COUNT.search(key) and isinstance(value, int | float) and not value <= _MOST_MODULES:
            raise CheckpointError(
                f"config.json: {brief(key)}: expected at most {_MOST_MODULES}, got {brief(value)}"
            )


def _sources(model: PreTrainedModel, checkpoint: Checkpoint) -> dict[str, TensorInfo | str]:
    """Map parameter names to the tensor loaded into each, or to the pattern of several."""
    transforms = get_model_conversion_mapping(model)
    renamings = [t for t in transforms if isinstance(t, WeightRenaming)]
    converters = [t for t in transforms if isinstance(t, WeightConverter)]
    parameters = model.state_dict()
    prefix = model.base_model_prefix
    sources: dict[str, TensorInfo | str] = {}
    for name, info in checkpoint.tensors.items():
        target, pattern = rename_source_key(name, renamings, converters, prefix, parameters)
        if target not in parameters and name in parameters:
            target, pattern = rename_source_key(name, [], [], prefix, parameters)
        if pattern is None:
            sources[target] = info
            continue
        converter = next(c for c in converters if pattern in c.source_patterns)
        for wanted in converter.target_patterns:  # one tensor may become several
            sources[target.replace(converter.target_patterns[0], wanted)] = name
    return sources


def _left_out(model: PreTrainedModel, skip: Sequence[str]) -> list[str]:
    layers = [n for n, m in model.named_modules() if isinstance(m, (nn.Linear, Conv1D))]
    for name in skip:
        with contextlib.suppress(re.error):
            if not all(should_convert_module(layer, [name]) for layer in layers):
                continue
        examples = ", ".join(dict.fromkeys(layer.rpartition(".")[2] for layer in layers))
        raise CheckpointError(f"skip: no linear layer is called {name!r}; there are {examples}")
    quantizer = AutoHfQuantizer.from_config(BitsAndBytesConfig(load_in_4bit=True))
    names = quantizer.get_modules_to_not_convert(
        model, list(skip), model._keep_in_fp32_modules, add_default_skips=True
    )
    return sorted(names)
