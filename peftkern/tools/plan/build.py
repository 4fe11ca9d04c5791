"""Models without memory: built on the meta device as a user builds them, then made of fake tensors.

transformers makes the base, its own rules say which linear layers bitsandbytes gets, `BlockLinear`
stands for those in formats that bitsandbytes has not, PEFT adds the adapters, `peftkern.patch`
swaps classes. Fake tensors are a CPU's: torch without CUDA has no others.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator
from typing import Any
from unittest import mock

import peft
import torch
from torch import Tensor, nn

from peftkern.formats.block_weight import BlockWeight
from peftkern.formats.table import NUMBERS, fields
from peftkern.layers import BlockLinear
from peftkern.layers.expert_stack import ExpertStack, set_stack
from peftkern.layers.mxfp4_stack import MXFP4Stack
from peftkern.layers.nf4_stack import NF4Stack, refusal
from peftkern.layers.quantize import expert_parameters
from peftkern.layers.quantized_linear import QuantizedLinear
from peftkern.tools.models import adapter_targets, auto_class, replace_linear_layers

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
_NESTED_BLOCK = 256  # of bitsandbytes
_SHIPPED_IN_MXFP4 = "gpt_oss"  # whose experts alone are quantized in its checkpoints
_SCHEDULE = {"total_step": 100, "tinit": 5, "tfinal": 5}  # AdaLoRA has to be told one


@contextlib.contextmanager
def said_of_the_model() -> Iterator[None]:
    """Turn what a model raises into one line: of sizes in its config that do not fit each other, of
    an adapter on a layer whose results are not those of a linear one."""
    try:
        yield
    except Exception as error:  # of any kind
        said = f"{type(error).__name__}: {' '.join(str(error).split())}"
        raise ValueError(f"model: a step of it does not run: {said}") from error


def base_model(config: Any, training: Any) -> nn.Module:
    """Return the frozen model of a config on the meta device, in training's dtype.

    Raises: ValueError for a config of no model that trains on tokens and labels.
    """
    auto, config = auto_class(config, "model"), copy.deepcopy(config)
    for part in (config, config.get_text_config()):
        part.use_cache = False
    eager = {"attn_implementation": "eager"} if training.attention == "eager" else {}
    with torch.device("meta"), said_of_the_model():
        model = auto.from_config(config, dtype=DTYPES[training.dtype], **eager)
    return model.requires_grad_(False)


def quantize(model: nn.Module, training: Any) -> None:
    """Put quantized layers in the place of linear ones, stacks in that of experts.

    Raises: ValueError for experts that no format of training's base is for.
    """
    kind = model.config.get_text_config().model_type
    _quantize_experts(model, training, kind)
    if training.of_bitsandbytes:
        _quantize_by_bitsandbytes(model, training)
    elif kind != _SHIPPED_IN_MXFP4 or training.base != "mxfp4":
        _quantize_in_blocks(model, training)


def _quantize_experts(model: nn.Module, training: Any, kind: str) -> None:
    for module in list(model.modules()):
        for name in expert_parameters(module):
            if training.is_sharded:
                raise ValueError(
                    f"base: experts in {training.base} are whole on each device, as with "
                    f"shard ddp, for fully_shard would make them dense; got {training.shard}"
                )
            weight = module._parameters[name]
            shape, options = tuple(weight.shape), {"dtype": weight.dtype, "device": "meta"}
            if training.base == "mxfp4" and kind == _SHIPPED_IN_MXFP4:
                turned = bool(module.is_transposed)
                set_stack(module, name, MXFP4Stack.empty(shape, turned=turned, **options))
            elif training.base != "nf4":
                raise ValueError(
                    f"base: experts are kept in nf4, or those of gpt-oss in mxfp4, got "
                    f"{training.base} for {kind}"
                )
            elif refusal(shape, training.blocks) is None:
                stack = NF4Stack.empty(shape, blocksize=training.blocks, **options)
                set_stack(module, name, stack)


def _quantize_in_blocks(model: nn.Module, training: Any) -> None:
    """Put `BlockLinear`s in the place of linear layers whose rows are whole blocks."""

    def quantized(N: int, K: int, bias: nn.Parameter | None) -> nn.Module:
        layout = (NUMBERS[training.base], training.blocks, 0, N, K)
        try:
            parts = {
                name: torch.empty(length, dtype=dtype, device="meta")
                for name, dtype, length in fields(layout)
            }
        except ValueError as error:
            raise ValueError(f"base: {training.base} does not fit a layer: {error}") from error
        dtype, blocksize = DTYPES[training.dtype], training.blocks
        how = {"shape": (N, K), "dtype": dtype, "blocksize": blocksize}
        return BlockLinear.from_weight(BlockWeight(format=training.base, **parts, **how), bias)

    replace_linear_layers(model, quantized)


def _quantize_by_bitsandbytes(model: nn.Module, training: Any) -> None:
    import bitsandbytes as bnb
    from transformers import BitsAndBytesConfig
    from transformers.integrations.bitsandbytes import replace_with_bnb_linear
    from transformers.quantizers.base import HfQuantizer

    skip = HfQuantizer.get_modules_to_not_convert(model)
    how = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=training.base,
        bnb_4bit_use_double_quant=training.double_quant,
        bnb_4bit_compute_dtype=DTYPES[training.dtype],
    )
    replace_with_bnb_linear(model, modules_to_not_convert=skip, quantization_config=how)
    model.is_loaded_in_4bit = True  # as transformers does, and PEFT asks
    for module in model.modules():
        if isinstance(module, bnb.nn.Linear4bit):
            _quantize_layer(module, training)


def _quantize_layer(layer: Any, training: Any) -> None:
    """Give a layer the weight that bitsandbytes makes on a device; its table alone has values."""
    from bitsandbytes.functional import QuantState, create_dynamic_map, get_4bit_type
    from bitsandbytes.nn import Params4bit

    weight = layer.weight
    kind, blocksize = training.base, training.blocks
    blocks = -(-weight.numel() // blocksize)
    nested = {}
    if training.double_quant:
        code = create_dynamic_map()
        absmax = torch.empty(-(-blocks // _NESTED_BLOCK), device="meta")
        state2 = QuantState(absmax, code=code, blocksize=_NESTED_BLOCK, dtype=torch.float32)
        nested = {"offset": torch.empty((), device="meta"), "state2": state2}
    scales = torch.uint8 if nested else torch.float32
    how = {"blocksize": blocksize, "quant_type": kind, "dtype": DTYPES[training.dtype]}
    absmax = torch.empty(blocks, dtype=scales, device="meta")
    code = get_4bit_type(kind, device="cpu")
    layer.quant_state = QuantState(absmax, weight.shape, code, **how, **nested)
    packed = torch.empty((weight.numel() + 1) // 2, 1, dtype=torch.uint8, device="meta")
    options = {"compress_statistics": training.double_quant, "quant_type": kind}
    if layer.bias is not None:
        layer.bias.data = layer.bias.data.to(DTYPES[training.dtype])
    layer.weight = Params4bit(
        packed, quant_state=layer.quant_state, bnb_quantized=True, module=layer, **options
    )


def add_adapters(model: nn.Module, training: Any, config: Any) -> nn.Module:
    """Prepare a base for training and wrap it; config: its `peft_config`.

    Raises: ValueError in one line for adapters that PEFT cannot give it.
    """
    checkpointing = training.checkpointing
    if training.prepare_kbit:
        model = peft.prepare_model_for_kbit_training(model, checkpointing)
    if checkpointing:
        model.gradient_checkpointing_enable()
        model.enable_input_require_grads()
    if config is None:
        return model.requires_grad_(True).train()
    wide = training.adapter_dtype == "fp32"
    try:
        with mock.patch.object(nn.Module, "to", _to):
            model = peft.get_peft_model(model, config, autocast_adapter_dtype=wide)
    except (TypeError, ValueError) as error:
        raise ValueError(f"adapter: {' '.join(str(error).split())}") from error
    for parameter in model.parameters():  # PEFT leaves them float32 over 4-bit weights
        if parameter.requires_grad and not wide:
            parameter.data = parameter.data.to(torch.bfloat16)
    return model.train()


def _to(module: nn.Module, *args: Any, **kwargs: Any) -> nn.Module:
    """Cast a module of fake tensors, whose device stays; Module.to would swap them."""
    dtype = torch._C._nn._parse_to(*args, **kwargs)[1]
    for parameter in module.parameters() if dtype is not None else ():
        if parameter.is_floating_point():
            parameter.data = parameter.data.to(dtype)
    return module


def peft_config(model: nn.Module, training: Any) -> Any:
    """Return the PEFT config of a training for a base that is not quantized yet, None for full.

    Raises: ValueError in one line for adapters that the model cannot have.
    """
    if training.method == "full":
        return None
    if training.adapter is not None:
        try:
            # which an adapter that was saved sets; a plan is one of training
            return peft.get_peft_config({**training.adapter, "inference_mode": False})
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"adapter: PEFT has no such config: {error}") from error
    modules, experts = adapter_targets(model, ",".join(training.targets))
    common = {"target_modules": modules, "lora_dropout": training.dropout}
    if experts and training.method in ("adalora", "dora"):
        names = sorted({name.rpartition(".")[2] for name in experts})
        raise ValueError(
            f"targets: experts' {', '.join(names)} have adapters of lora and qlora alone, not of "
            f"{training.method}; name linear layers"
        )
    if training.method == "adalora":
        # Without a task PEFT's forward goes past AdaLoraModel's, which has the orthogonality loss.
        adaptive = {"init_r": training.r, "target_r": 1, "task_type": "CAUSAL_LM", **_SCHEDULE}
        return peft.AdaLoraConfig(**adaptive, **common)
    parameters = {"target_parameters": experts} if experts else {}
    dora = training.method == "dora"
    return peft.LoraConfig(r=training.r, use_dora=dora, **common, **parameters)


def make_fake(model: nn.Module) -> None:
    """Replace the meta tensors of a model; call it under a FakeTensorMode.

    A parameter of bitsandbytes becomes a plain one with its attributes: the class cannot hold a
    fake tensor.
    """
    made: dict[int, Tensor] = {}

    def fake(tensor: Tensor) -> Tensor:
        if not tensor.is_meta:
            return tensor
        if isinstance(tensor, ExpertStack):
            return tensor.like(*map(fake, tensor.parts))
        return torch.empty_strided(tensor.size(), tensor.stride(), dtype=tensor.dtype)

    for module in model.modules():
        for name, tensor in [*module._parameters.items(), *module._buffers.items()]:
            if tensor is None:
                continue
            if id(tensor) not in made:
                made[id(tensor)] = _like(tensor, fake)
            own = module._parameters if name in module._parameters else module._buffers
            own[name] = made[id(tensor)]
        beside = module._quant if isinstance(module, QuantizedLinear) else {}
        for values in (vars(module), beside):
            for name, value in values.items():
                if isinstance(value, Tensor):
                    values[name] = made.setdefault(id(value), fake(value))


def _like(tensor: Tensor, fake: Any) -> Tensor:
    if not isinstance(tensor, nn.Parameter) or isinstance(tensor, ExpertStack):
        return fake(tensor)
    attributes = {} if type(tensor) is nn.Parameter else vars(tensor)
    with torch._C.DisableTorchFunctionSubclass():
        made = nn.Parameter(fake(tensor), requires_grad=tensor.requires_grad)
    for name, value in attributes.items():
        setattr(made, name, value)
    for state in _states(made):
        state.update({name: fake(t) for name, t in state.items() if isinstance(t, Tensor)})
    return made


def _states(weight: Tensor) -> Iterator[dict[str, Any]]:
    """Yield the attributes of what a weight of bitsandbytes has beside its codes: of its state, and
    of that of absmax; to change them is to change the weight."""
    state = getattr(weight, "quant_state", None)
    yield from (vars(one) for one in (state, getattr(state, "state2", None)) if one is not None)


def tensors(model: nn.Module) -> Iterator[tuple[str, nn.Module, Tensor]]:
    """Yield (name, module, tensor) of all that a model holds, also beside 4-bit weights."""
    for path, module in model.named_modules():
        for name, tensor in [*module._parameters.items(), *module._buffers.items()]:
            if isinstance(tensor, ExpertStack):
                yield from ((f"{path}.{name}", module, part) for part in tensor.parts)
            elif tensor is not None:
                yield f"{path}.{name}", module, tensor
                for values in _states(tensor):
                    found = (value for value in values.values() if isinstance(value, Tensor))
                    yield from ((f"{path}.{name}", module, value) for value in found)
        if isinstance(module, QuantizedLinear):
            found = (value for value in module._quant.values() if isinstance(value, Tensor))
            yield from ((f"{path}.weight", module, value) for value in found)
