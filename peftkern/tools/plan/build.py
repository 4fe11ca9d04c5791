"""Models without memory: built on the meta device as a user builds them, then made of fake tensors.

transformers makes the base, its own rules say which linear layers bitsandbytes gets, PEFT adds the
adapters, `peftkern.patch` swaps classes. Fake tensors are a CPU's: torch without CUDA has no others.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import bitsandbytes as bnb
import peft
import torch
import transformers
from bitsandbytes.functional import QuantState, create_dynamic_map, get_4bit_type
from torch import Tensor, nn
from transformers.integrations.bitsandbytes import replace_with_bnb_linear
from transformers.quantizers.base import HfQuantizer

from peftkern.layers.nf4_stack import NF4Stack, refusal, set_nf4_parameter
from peftkern.layers.quantize import expert_parameters

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
_BLOCK, _NESTED_BLOCK = 64, 256  # bitsandbytes' defaults
_AUTO = ("CausalLM", "Seq2SeqLM", "ImageTextToText", "MaskedLM")
_SCHEDULE = {"total_step": 100, "tinit": 5, "tfinal": 5}  # AdaLoRA has to be told one


def base_model(config: Any, training: Any) -> nn.Module:
    """Return the frozen model of a config on the meta device, in training's dtype.

    Raises: ValueError for a config of no model that trains on tokens and labels.
    """
    config = copy.deepcopy(config)
    for part in (config, config.get_text_config()):
        part.use_cache = False
    eager = {"attn_implementation": "eager"} if training.attention == "eager" else {}
    with torch.device("meta"):
        model = _auto(config)._from_config(config, dtype=DTYPES[training.dtype], **eager)
    return model.requires_grad_(False)


def _auto(config: Any) -> type:
    """Return the class of the model: that which the config names, or the first of a head's kind."""
    for name in config.architectures or ():
        if name.startswith("Bert") or hasattr(transformers, name):
            return getattr(transformers, name)
    for kind in _AUTO:
        known = getattr(transformers, f"AutoModelFor{kind}")._model_mapping
        if type(config) in known:
            found = known[type(config)]
            return found[0] if isinstance(found, tuple) else found
    raise ValueError(f"model_type: {config.model_type} has no head that trains on labels")


def quantize(model: nn.Module, training: Any) -> None:
    """Put bitsandbytes' layers in the place of linear ones, and stacks in NF4 in that of experts."""
    skip = HfQuantizer.get_modules_to_not_convert(model)
    chosen = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
    how = transformers.BitsAndBytesConfig(
        **chosen,
        bnb_4bit_use_double_quant=training.double_quant,
        bnb_4bit_compute_dtype=DTYPES[training.dtype],
    )
    replace_with_bnb_linear(model, modules_to_not_convert=skip, quantization_config=how)
    model.is_loaded_in_4bit = True  # as transformers does, and PEFT asks
    for module in model.modules():
        if isinstance(module, bnb.nn.Linear4bit):
            _quantize_layer(module, training)
        for name in expert_parameters(module):
            weight = module._parameters[name]
            if refusal(tuple(weight.shape), _BLOCK) is None:
                stack = NF4Stack.empty(tuple(weight.shape), dtype=weight.dtype, device="meta")
                set_nf4_parameter(module, name, stack)


def _quantize_layer(layer: Any, training: Any) -> None:
    """Give a layer the weight that bitsandbytes makes on a device; its table alone has values."""
    weight = layer.weight
    blocks = -(-weight.numel() // _BLOCK)
    nested = {}
    if training.double_quant:
        code = create_dynamic_map()
        absmax = torch.empty(-(-blocks // _NESTED_BLOCK), device="meta")
        state2 = QuantState(absmax, code=code, blocksize=_NESTED_BLOCK, dtype=torch.float32)
        nested = {"offset": torch.empty((), device="meta"), "state2": state2}
    kind = torch.uint8 if nested else torch.float32
    how = {"blocksize": _BLOCK, "quant_type": "nf4", "dtype": DTYPES[training.dtype]}
    absmax = torch.empty(blocks, dtype=kind, device="meta")
    code = get_4bit_type("nf4", device="cpu")
    layer.quant_state = QuantState(absmax, weight.shape, code, **how, **nested)
    packed = torch.empty((weight.numel() + 1) // 2, 1, dtype=torch.uint8, device="meta")
    options = {"compress_statistics": training.double_quant, "quant_type": "nf4"}
    layer.weight = bnb.nn.Params4bit(
        packed, quant_state=layer.quant_state, bnb_quantized=True, module=layer, **options
    )


def add_adapters(model: nn.Module, training: Any) -> nn.Module:
    """Prepare a base for training and wrap it, as `training` says."""
    checkpointing = training.checkpointing
    with torch.device("meta"):
        if training.prepare_kbit:
            model = peft.prepare_model_for_kbit_training(model, checkpointing)
        if checkpointing:
            model.gradient_checkpointing_enable()
            model.enable_input_require_grads()
        if training.method == "full":
            return model.requires_grad_(True).train()
        wide = training.adapter_dtype == "fp32"
        return peft.get_peft_model(
            model, _peft_config(model, training), autocast_adapter_dtype=wide
        ).train()


def _peft_config(model: nn.Module, training: Any) -> Any:
    if training.adapter is not None:
        return peft.get_peft_config(dict(training.adapter))
    targets, parameters = _targets(model, training.targets)
    common = {"target_modules": targets, "lora_dropout": training.dropout}
    if training.method == "adalora":
        return peft.AdaLoraConfig(init_r=training.r, target_r=1, **_SCHEDULE, **common)
    experts = {"target_parameters": parameters} if parameters else {}
    dora = training.method == "dora"
    return peft.LoraConfig(r=training.r, use_dora=dora, **common, **experts)


def _targets(model: nn.Module, wanted: tuple[str, ...]) -> tuple[list[str], list[str]]:
    """Return names of linear layers and of parameters of experts, of one layer or of all.

    Raises: ValueError naming what the model has, for a name that is none of these.
    """
    head = model.get_output_embeddings()
    linears, experts = set(), set()
    for name, module in model.named_modules():
        if isinstance(module, (nn.Linear, transformers.Conv1D)) and module is not head:
            linears.add(name.rpartition(".")[2])
        experts.update(expert_parameters(module))
        experts.update(k for k, p in module._parameters.items() if isinstance(p, NF4Stack))
    if wanted == ("all-linear",):
        wanted = tuple(sorted(linears | experts))
    unknown = [name for name in wanted if name not in linears | experts]
    if unknown or not wanted:
        names = f"all-linear or some of {', '.join(sorted(linears | experts))}"
        raise ValueError(f"targets: expected {names}, got {', '.join(unknown) or 'none'}")
    return [n for n in wanted if n in linears], [n for n in wanted if n in experts - linears]


def make_fake(model: nn.Module) -> None:
    """Replace the meta tensors of a model; call it under a FakeTensorMode.

    A parameter of bitsandbytes becomes a plain one with its attributes: the class cannot hold a
    fake tensor.
    """
    made: dict[int, Tensor] = {}

    def fake(tensor: Tensor) -> Tensor:
        if not tensor.is_meta:
            return tensor
        if isinstance(tensor, NF4Stack):
            how = {"blocksize": tensor.blocksize, "dtype": tensor.dtype}
            return NF4Stack.empty(tuple(tensor.shape), **how, device="cpu")
        return torch.empty_strided(tensor.size(), tensor.stride(), dtype=tensor.dtype)

    for module in model.modules():
        for name, tensor in [*module._parameters.items(), *module._buffers.items()]:
            if tensor is None:
                continue
            if id(tensor) not in made:
                made[id(tensor)] = _like(tensor, fake)
            own = module._parameters if name in module._parameters else module._buffers
            own[name] = made[id(tensor)]
        for name, value in vars(module).items():
            if isinstance(value, Tensor):
                module.__dict__[name] = made.setdefault(id(value), fake(value))


def _like(tensor: Tensor, fake: Any) -> Tensor:
    if not isinstance(tensor, nn.Parameter) or isinstance(tensor, NF4Stack):
        return fake(tensor)
    attributes = {} if type(tensor) is nn.Parameter else vars(tensor)
    with torch._C.DisableTorchFunctionSubclass():
        made = nn.Parameter(fake(tensor), requires_grad=tensor.requires_grad)
    for name, value in attributes.items():
        setattr(made, name, value)
    for state in (getattr(made, "quant_state", None), getattr(made, "quant_state2", None)):
        for part in (state, getattr(state, "state2", None)):
            for name, value in vars(part).items() if part is not None else ():
                if isinstance(value, Tensor):
                    setattr(part, name, fake(value))
    return made


def tensors(model: nn.Module) -> Iterator[tuple[str, nn.Module, Tensor]]:
    """Yield (name, module, tensor) of all that a model holds, what lies beside 4-bit weights too."""
    for path, module in model.named_modules():
        for name, tensor in [*module._parameters.items(), *module._buffers.items()]:
            if isinstance(tensor, NF4Stack):
                yield from ((f"{path}.{name}", module, t) for t in (tensor._packed, tensor._absmax))
            elif tensor is not None:
                yield f"{path}.{name}", module, tensor
                state = getattr(tensor, "quant_state", None)
                for part in (state, getattr(state, "state2", None)):
                    values = () if part is None else vars(part).values()
                    yield from ((f"{path}.{name}", module, v) for v in values if _is_tensor(v))


def _is_tensor(value: Any) -> bool:
    return isinstance(value, Tensor)
