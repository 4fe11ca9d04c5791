"""Tensors of a checkpoint that are quantized: weights of linear layers, and of experts.

transformers itself decides on linear layers: its quantizer prepares a model without memory for its
weights (on the meta device). Its loader's rules say which tensor of the checkpoint belongs to which
layer, and which tensors are the experts of one stack [E, N, K].
"""

from __future__ import annotations

import contextlib
import itertools
import json
import re
import statistics
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import bitsandbytes as bnb
import torch
import transformers
from torch import nn
from transformers import AutoConfig, BitsAndBytesConfig, PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    Concatenate,
    MergeModulelist,
    Transpose,
    WeightConverter,
    WeightRenaming,
    rename_source_key,
)
from transformers.initialization import no_tie_weights
from transformers.pytorch_utils import Conv1D
from transformers.quantizers.auto import AutoHfQuantizer
from transformers.quantizers.quantizers_utils import should_convert_module

from peftkern.formats.json_files import brief
from peftkern.integrations.transformers.nf4_experts import NF4ExpertsConfig
from peftkern.layers.quantize import expert_parameters
from peftkern.tools.quantize.checkpoint import DTYPES, Checkpoint, CheckpointError, TensorInfo
from peftkern.tools.quantize.file_plan import Choice, Stack

_COUNT = re.compile(r"(layers?|experts|blocks)$")  # num_hidden_layers, n_layer, n_routed_experts
_MOST_MODULES = 10_000
_EXPERT = re.compile(r"experts\W+(\d+)\W")  # in the name of a tensor, or in a pattern for it


class Load(NamedTuple):
    """Tensor of the checkpoint, the first parameter that it is loaded into, and how; converter and
    its source pattern: None if it is loaded as it is."""

    info: TensorInfo
    target: str
    converter: WeightConverter | None
    pattern: str | None


def find_weights(
    checkpoint: Checkpoint,
    *,
    skip: Sequence[str] = (),
    stack: bool = True,
    blocksize: int = 64,
    double_quant: bool = True,
    compute_dtype: str | None = None,
) -> tuple[Choice, dict[str, Any]]:
    """Find the tensors to quantize, and the config that says so.

    These are the weights that transformers would turn into Linear4bit, nn.Linear and Conv1D except
    the output embeddings, weights tied to them, and those that the model keeps in float32; and the
    experts that peftkern would keep in NF4. The config is bitsandbytes', or peftkern's if there are
    stacks. The excluded names stand in it, so that every version of transformers excludes the same.

    Args: skip, more modules to exclude: full names, their beginnings or endings; stack, make one
        tensor of those that are an expert each, else they are quantized like linear layers;
        blocksize, of stacks; compute_dtype, the dtype of most of the weights by default.
    Raises: CheckpointError if transformers does not know the architecture, if the tensors do not
        fit it, if a name in skip fits no layer, or if a layer's weight is assembled on loading.
    """
    with contextlib.ExitStack() as context:
        context.callback(transformers.logging.set_verbosity, transformers.logging.get_verbosity())
        transformers.logging.set_verbosity_error()
        model = _meta_model(checkpoint)
        loads = list(_loads(model, checkpoint))
        skip = _left_out(model, skip)
        stacks, dense = _expert_weights(model, loads, skip)
        options = {
            "bnb_4bit_use_double_quant": double_quant,
            "bnb_4bit_quant_storage": torch.uint8,
            "llm_int8_skip_modules": sorted([*skip, *dense]),
        }
        config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", **options)
        quantizer = AutoHfQuantizer.from_config(config, pre_quantized=True)
        quantizer.preprocess_model(model, device_map={"": "cpu"}, dtype=torch.bfloat16)

    linear = _linear_weights(model, loads)
    if not stack:
        apart = [s for s in stacks.values() if len(checkpoint.tensors[s.sources[0]].shape) == 2]
        stacks = {name: s for name, s in stacks.items() if s not in apart}
        linear |= {source: False for s in apart for source in s.sources}
    if stacks:
        config = NF4ExpertsConfig(experts_blocksize=blocksize, **options)
    found = Choice(linear, stacks)
    names = [*linear, *(source for s in stacks.values() for source in s.sources)]
    if not names:
        raise CheckpointError(
            f"{checkpoint.folder}: no tensor is the weight of a linear layer of "
            f"{type(model).__name__} that may be quantized"
        )
    most = statistics.mode(sorted(checkpoint.tensors[name].dtype for name in names))
    compute = DTYPES[most] if compute_dtype is None else getattr(torch, compute_dtype)
    config.bnb_4bit_compute_dtype = compute
    return found, json.loads(config.to_json_string(use_diff=False))


def _linear_weights(model: PreTrainedModel, loads: Iterable[Load]) -> dict[str, bool]:
    """Find the weights of Linear4bit."""
    sources: dict[str, Load] = {}
    for load in loads:  # a converter may make several parameters of one tensor
        targets = [load.target] if load.converter is None else _targets(load)
        sources |= dict.fromkeys(targets, load)
    linear: dict[str, bool] = {}
    for module_name, module in model.named_modules():
        load = sources.get(f"{module_name}.weight")
        if not isinstance(module, bnb.nn.Linear4bit) or load is None:
            continue  # a layer without weights in the checkpoint, as a new head, is initialized
        if load.converter is not None:
            raise CheckpointError(
                f"{module_name}: transformers puts its weight together from other tensors "
                f"({load.info.name!r}); save_pretrained() the model with this version of it first"
            )
        transposed = issubclass(module.source_cls, Conv1D)
        shape = (module.out_features, module.in_features)
        _check_shape(load.info, shape[::-1] if transposed else shape)
        linear[load.info.name] = transposed
    return linear


def _expert_weights(
    model: PreTrainedModel, loads: Iterable[Load], skip: Sequence[str]
) -> tuple[dict[str, Stack], list[str]]:
    """Find the stacks of experts, and those that stay dense without being skipped: which loading
    rearranges, so that blocks would not stay whole.

    Raises: CheckpointError for tensors that are not those of the model's experts.
    """
    wanted = {
        f"{module_name}.{name}": tuple(parameter.shape)
        for module_name, name, parameter in _stacks(model)
        if all(should_convert_module(n, skip) for n in (module_name, f"{module_name}.{name}"))
    }
    parts: dict[str, list[Load]] = {}
    for load in loads:
        if load.target in wanted:
            parts.setdefault(load.target, []).append(load)
    stacks = {}
    for target, found in parts.items():
        converter = found[0].converter
        if converter is None or _transposes_experts(converter):
            info, (E, N, K) = found[0].info, wanted[target]
            transposed = converter is not None and info.shape == (E, K, N) != (E, N, K)
            _check_shape(info, (E, K, N) if transposed else (E, N, K))
            stacks[target] = Stack(wanted[target], (info.name,), transposed)
        elif _stacks_experts(converter):
            stacks[target] = _stacked(target, wanted[target], found)
    return stacks, [target for target in wanted if target not in stacks]


def _stacked(target: str, shape: tuple[int, ...], loads: Sequence[Load]) -> Stack:
    """Put the tensors in the order of their values in the stack."""
    patterns = loads[0].converter.source_patterns
    places = {
        (int(_EXPERT.search(load.info.name)[1]), patterns.index(load.pattern)): load.info
        for load in loads
    }
    E, N, K = shape
    expected = list(itertools.product(range(E), range(len(patterns))))
    if sorted(places) != expected:
        raise CheckpointError(
            f"{target}: expected {len(patterns)} tensors of each of {E} experts, got {len(places)}"
        )
    for info in places.values():
        _check_shape(info, (N // len(patterns), K))
    return Stack(shape, tuple(places[place].name for place in expected))


def _stacks(model: PreTrainedModel) -> Iterator[tuple[str, str, nn.Parameter]]:
    """Yield the module, name and value of each parameter that is a stack of experts."""
    for module_name, module in model.named_modules():
        for name in expert_parameters(module):
            yield module_name, name, module.get_parameter(name)


def _stacks_experts(converter: WeightConverter) -> bool:
    """Return whether experts [N, K] are stacked to [E, N, K], gate and up one after the other."""
    dims = {type(operation): operation.dim for operation in converter.operations
            if isinstance(operation, MergeModulelist | Concatenate)}  # fmt: skip
    plain = len(dims) == len(converter.operations) and all(
        _EXPERT.search(pattern.replace("*", "0")) for pattern in converter.source_patterns
    )
    return plain and dims in ({MergeModulelist: 0}, {MergeModulelist: 0, Concatenate: 1})


def _transposes_experts(converter: WeightConverter) -> bool:
    """Return whether experts [K, N] become [N, K] if they have to: what is written never has."""
    (operation,) = converter.operations if len(converter.operations) == 1 else (None,)
    turns = isinstance(operation, Transpose) and {operation.dim0, operation.dim1} == {1, 2}
    return turns and operation.check_dims


def _check_shape(info: TensorInfo, shape: tuple[int, ...]) -> None:
    if info.shape != shape:
        raise CheckpointError(
            f"{info.name}: shape {list(info.shape)} does not fit {list(shape)} of config.json"
        )


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
        with torch.device("meta"), no_tie_weights():  # as from_pretrained does
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


def _loads(model: PreTrainedModel, checkpoint: Checkpoint) -> Iterator[Load]:
    """Say of each tensor what transformers' loader does with it."""
    transforms = get_model_conversion_mapping(model)
    renamings = [t for t in transforms if isinstance(t, WeightRenaming)]
    converters = [t for t in transforms if isinstance(t, WeightConverter)]
    parameters = model.state_dict()
    prefix = model.base_model_prefix
    for name, info in checkpoint.tensors.items():
        target, pattern = rename_source_key(name, renamings, converters, prefix, parameters)
        if target not in parameters and name in parameters:
            target, pattern = rename_source_key(name, [], [], prefix, parameters)
        used = (c for c in converters if pattern in c.source_patterns)
        yield Load(info, target, None if pattern is None else next(used), pattern)


def _targets(load: Load) -> list[str]:
    first, *_ = patterns = load.converter.target_patterns
    return [load.target.replace(first, wanted) for wanted in patterns]


def _left_out(model: PreTrainedModel, skip: Sequence[str]) -> list[str]:
    layers = [n for n, m in model.named_modules() if isinstance(m, (nn.Linear, Conv1D))]
    for module_name, name, _ in _stacks(model):
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
