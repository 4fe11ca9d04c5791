"""Checkpoints loaded into 4-bit linear layers and NF4 experts, and saved from them.

    model = AutoModelForCausalLM.from_pretrained(name, quantization_config=NF4ExpertsConfig())
    model.save_pretrained(folder)
    AutoModelForCausalLM.from_pretrained(folder)  # once NF4ExpertsConfig was imported

A model that `peftkern.quantize_` has quantized in place is saved and loaded in the same way.

transformers' own `load_in_4bit` leaves fused experts, most of a mixture's weights, in 16 bits. Here
they are quantized while the checkpoint is read: one expert at a time where it has a tensor for each
(Qwen3-MoE, Mixtral, DeepSeek, ...), so that a load needs the memory of the quantized model and of
two experts. Linear layers become bitsandbytes' Linear4bit, as there. The experts run on kernels.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from bitsandbytes.nn import Linear4bit
from torch import Tensor, nn
from transformers import BitsAndBytesConfig, PreTrainedModel
from transformers.core_model_loading import (
    ConversionOps,
    WeightConverter,
    log_conversion_errors,
)
from transformers.pytorch_utils import Conv1D
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.quantizer_bnb_4bit import Bnb4BitHfQuantizer
from transformers.quantizers.quantizers_utils import get_module_from_name, should_convert_module

from peftkern.integrations.frozen_experts import models_of, serve_nf4_experts
from peftkern.integrations.transformers.conversions import (
    fuses_experts,
    make_experts_dense,
    reversible,
)
from peftkern.layers.expert_stack import set_stack, stacks_of
from peftkern.layers.nf4 import NF4Linear
from peftkern.layers.nf4_stack import METHOD, NF4Stack, absmax_name
from peftkern.layers.quantize import expert_parameters

__all__ = ["NF4ExpertsConfig"]
# With these as own keys a saved config would be read back as bitsandbytes', whatever its method.
_BNB_KEYS = ("load_in_4bit", "load_in_8bit", "_load_in_4bit", "_load_in_8bit")


@register_quantization_config(METHOD)
class NF4ExpertsConfig(BitsAndBytesConfig):
    """Config of `from_pretrained` for NF4 in linear layers and fused experts.

    Args:
        experts_blocksize: of the experts; bitsandbytes has 64 for linear layers.
        bnb_4bit_compute_dtype, bnb_4bit_use_double_quant, llm_int8_skip_modules, ...: of
            BitsAndBytesConfig; modules that are skipped keep their experts, too.
    """

    def __init__(self, experts_blocksize: int = 64, **bitsandbytes: Any) -> None:
        chosen = {k: v for k, v in bitsandbytes.items() if k not in ("quant_method", *_BNB_KEYS)}
        chosen |= {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
        super().__init__(**chosen)
        self.quant_method = METHOD
        self.experts_blocksize = experts_blocksize

    def to_dict(self) -> dict[str, Any]:
        """Return the fields for config.json."""
        return {key: value for key, value in super().to_dict().items() if key not in _BNB_KEYS}

    def to_diff_dict(self) -> dict[str, Any]:
        """Return all fields: defaults may change."""
        return self.to_dict()


@register_quantizer(METHOD)
class NF4ExpertsQuantizer(Bnb4BitHfQuantizer):
    """bitsandbytes' quantizer, and NF4 for the parameters of fused experts."""

    def param_needs_quantization(self, model: PreTrainedModel, param_name: str, **_: Any) -> bool:
        """Return whether a parameter is quantized while it is loaded."""
        module, name = get_module_from_name(model, param_name)
        if name in stacks_of(module) or name in expert_parameters(module):
            return _is_converted(_places(param_name), self.modules_to_not_convert)
        return super().param_needs_quantization(model, param_name)

    def get_quantize_ops(self) -> ConversionOps:
        return _Quantize(super().get_quantize_ops(), self.quantization_config.experts_blocksize)

    def update_weight_conversions(self, weight_conversions: list, *model: PreTrainedModel) -> list:
        """Let converters that fuse one tensor per expert do so an expert at a time.

        model: not given by transformers 5.20 and before.
        """
        updated = super().update_weight_conversions(weight_conversions, *model)
        if self.pre_quantized:
            return updated
        return [_one_by_one(c) if fuses_experts(c) else c for c in updated]

    def _process_model_before_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> None:
        super()._process_model_before_weight_loading(model, **kwargs)
        self.packed: list[tuple[nn.Module, str, NF4Stack]] = []
        for path, module in model.named_modules():
            for name in expert_parameters(module):
                if self.param_needs_quantization(model, f"{path}.{name}"):
                    stack = self._stack_like(module._parameters[name], f"{path}.{name}")
                    if self.pre_quantized:
                        self.packed.append((module, name, stack))
                        # The checkpoint has two plain tensors, which are read into these.
                        module._parameters[name] = nn.Parameter(stack._packed, requires_grad=False)
                        module.register_buffer(absmax_name(name), stack._absmax)

    def _stack_like(self, weight: Tensor, name: str) -> NF4Stack:
        """Return one on the meta device.

        Raises: ValueError, naming it, if such weights cannot be kept in NF4.
        """
        options = {"blocksize": self.quantization_config.experts_blocksize, "dtype": weight.dtype}
        try:
            return NF4Stack.empty(tuple(weight.shape), **options, device="meta")
        except ValueError as error:
            raise ValueError(f"{name}: {error}; llm_int8_skip_modules leaves it dense") from error

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> Any:
        for module, name, stack in self.packed:
            absmax, packed = module._buffers.pop(absmax_name(name)), module._parameters[name]
            if not all(getattr(part, "_is_hf_initialized", False) for part in (packed, absmax)):
                raise ValueError(f"{name}, {absmax_name(name)}: missing from the checkpoint")
            parts = (packed.detach(), absmax)
            set_stack(module, name, NF4Stack(*parts, tuple(stack.shape), stack.dtype))
        self.packed = []
        for module in model.modules():
            for name, stack in stacks_of(module).items():
                set_stack(module, name, stack)
        model._weight_conversions = reversible(model)
        serve_nf4_experts(model)
        return super()._process_model_after_weight_loading(model, **kwargs)

    def get_state_dict_and_metadata(self, model: PreTrainedModel) -> tuple[None, dict]:
        """Let the config say what is in NF4 as the model is now; saving then goes on as ever."""
        if not getattr(model, "_hf_peft_config_loaded", False):  # else the adapter alone is saved
            self._describe(model)
        return super().get_state_dict_and_metadata(model)

    def _describe(self, model: PreTrainedModel) -> None:
        config, kept = self.quantization_config, model._keep_in_fp32_modules
        in_nf4, dense = _in_nf4_and_dense(model)
        skip = self.get_modules_to_not_convert(model, config.llm_int8_skip_modules, kept)
        if _wrong(in_nf4, dense, skip) is not None:
            config.llm_int8_skip_modules = sorted(name for name, *_ in dense)
            skip = self.get_modules_to_not_convert(model, config.llm_int8_skip_modules, kept)
        wrong = _wrong(in_nf4, dense, skip)
        if wrong is not None:
            raise ValueError(
                f"{wrong}: expected a name by which transformers can tell what is in NF4; it fits "
                "the end or the beginning of another one"
            )
        blocksizes = {stack.blocksize for m in model.modules() for stack in stacks_of(m).values()}
        if len(blocksizes) > 1:
            raise ValueError(
                "experts_blocksize: expected experts of one blocksize to be saved, got "
                f"{sorted(blocksizes)}"
            )
        if blocksizes:
            (config.experts_blocksize,) = blocksizes
            model._weight_conversions = reversible(model)

    def _dequantize(self, model: PreTrainedModel, dtype: torch.dtype | None = None) -> Any:
        if any(isinstance(module, Linear4bit) for module in model.modules()):
            model = super()._dequantize(model, dtype=dtype)
        for path, module in list(model.named_modules()):
            if isinstance(module, NF4Linear):
                model.set_submodule(path, module.to_linear().to(dtype))
        make_experts_dense(model, dtype)
        return model


def describe(model: nn.Module) -> None:
    """Let the transformers models in `model` be saved with the NF4 weights that they have.

    A model that was quantized by another method stays described by it.
    """
    for _, base in models_of(model):
        found = getattr(base, "hf_quantizer", None)
        chosen = {"bnb_4bit_compute_dtype": base.dtype}
        if found is not None:
            chosen = found.quantization_config.to_dict()
            if chosen.get("bnb_4bit_quant_type") != "nf4":
                continue
        if any(stacks_of(module) for module in base.modules()):
            config = NF4ExpertsConfig(**chosen)
        elif found is None:
            config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", **chosen)
        else:
            config = found.quantization_config
        base.hf_quantizer = NF4ExpertsQuantizer(config, pre_quantized=True)
        own = copy.copy(base.config)  # a dense model may have the same one
        own.quantization_config = config
        for module in [m for m in base.modules() if vars(m).get("config") is base.config]:
            module.config = own


_Places = tuple[str, ...]  # names, none of which a pattern may fit if what has them is converted


def _in_nf4_and_dense(model: nn.Module) -> tuple[list[_Places], list[_Places]]:
    """Return what is in NF4, and what a quantizer would put there by itself."""
    in_nf4: list[_Places] = []
    dense: list[_Places] = []
    for path, module in model.named_modules():
        if isinstance(module, NF4Linear | Linear4bit):
            in_nf4.append((path,))
        elif type(module) is nn.Linear or isinstance(module, Conv1D):
            dense.append((path,))
        in_nf4 += [_places(f"{path}.{name}") for name in stacks_of(module)]
        dense += [_places(f"{path}.{name}") for name in expert_parameters(module)]
    return in_nf4, dense


def _places(parameter: str) -> _Places:
    return parameter, parameter.rpartition(".")[0]


def _is_converted(places: _Places, skip: list[str]) -> bool:
    return all(should_convert_module(name, skip) for name in places)


def _wrong(in_nf4: list[_Places], dense: list[_Places], skip: list[str]) -> str | None:
    """Return the first name for which patterns say the contrary of what is so."""
    lost = [places for places in in_nf4 if not _is_converted(places, skip)]
    lost += [places for places in dense if _is_converted(places, skip)]
    return lost[0][0] if lost else None


class _Quantize(ConversionOps):
    """Quantization of a fused parameter that the checkpoint has as it is; linear layers as ever."""

    def __init__(self, linear: ConversionOps, blocksize: int) -> None:
        self.linear, self.blocksize = linear, blocksize

    def convert(
        self, input_dict: dict[str, Any], model: nn.Module, **kwargs: Any
    ) -> dict[str, Any]:
        """Quantize each parameter: {its full name: dense weights, or a list of them}."""
        result = {}
        for name, value in input_dict.items():
            module, own = get_module_from_name(model, name)
            if own in expert_parameters(module):
                weight = value[0] if isinstance(value, list) else value
                stack = NF4Stack.from_dense(weight, blocksize=self.blocksize)
                result[name] = nn.Parameter(stack, requires_grad=False)
            else:
                result |= self.linear.convert({name: value}, model=model, **kwargs)
        return result


class _ExpertConverter(WeightConverter):
    """Converter that reads, fuses and quantizes one expert at a time."""

    def convert(
        self,
        layer_name: str,
        model: Any = None,
        config: Any = None,
        hf_quantizer: Any = None,
        loading_info: Any = None,
    ) -> dict[str, Tensor]:
        """Return {full name: the parameter in NF4}, or dense as ever if it is to stay so."""
        if not isinstance(self.quantization_operation, _Quantize):
            return super().convert(layer_name, model, config, hf_quantizer, loading_info)
        sources = dict(self.collected_tensors)
        self.collected_tensors.clear()
        with log_conversion_errors(layer_name, loading_info, (len(sources), layer_name), self):
            shape = tuple(model.get_parameter(layer_name).shape)
            stack = None
            for expert in range(shape[0]):
                (weight,) = self._fused(sources, expert, model, config)
                if stack is None:  # the first one tells the dtype and the device
                    options = {"dtype": weight.dtype, "device": weight.device}
                    blocksize = self.quantization_operation.blocksize
                    stack = NF4Stack.empty(shape, blocksize=blocksize, **options)
                stack.set_expert(expert, weight)
        return {layer_name: nn.Parameter(stack, requires_grad=False)}

    def _fused(
        self, sources: dict[str, list[Callable[[], Tensor]]], expert: int, model: Any, config: Any
    ) -> Tensor:
        """Run the operations on the tensors of one expert: [1, N, K]."""
        tensors: Any = {pattern: [read[expert]()] for pattern, read in sources.items()}
        for operation in self.operations:
            tensors = operation.convert(
                tensors,
                source_patterns=self.source_patterns,
                target_patterns=self.target_patterns,
                model=model,
                config=config,
            )
        (fused,) = tensors.values()
        return fused


def _one_by_one(converter: WeightConverter) -> WeightConverter:
    patterns = (converter._original_source_patterns, converter._original_target_patterns)
    one = _ExpertConverter(*(p.copy() for p in patterns), converter.operations, converter.force_cpu)
    one.scope_prefix, one.base_model_prefix = converter.scope_prefix, converter.base_model_prefix
    return one
