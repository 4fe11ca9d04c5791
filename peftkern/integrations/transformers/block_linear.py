"""Checkpoints loaded into linear layers in MXFP4, NVFP4 or INT4, and saved from them.

    peftkern quantize --format int4 llama llama-int4
    from peftkern.integrations.transformers import BlockLinearConfig  # registers the method
    model = AutoModelForCausalLM.from_pretrained("llama-int4")
    peftkern.patch(get_peft_model(model, LoraConfig(...)))

There is no standard for plain linear layers in these formats, so that the keys are `BlockLinear`'s
own (kernels/FORMATS.md), and the method of config.json is this module's. A checkpoint in 16 bits is
quantized while it is read: `quantization_config=BlockLinearConfig("mxfp4")`.
"""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.core_model_loading import ConversionOps
from transformers.pytorch_utils import Conv1D
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.quantizers.quantizers_utils import get_module_from_name, should_convert_module
from transformers.utils.quantization_config import QuantizationConfigMixin

from peftkern.formats.block_weight import METHOD, PARTS, BlockWeight, chosen_blocksize
from peftkern.integrations.transformers.conversions import reversible
from peftkern.layers.block import BlockLinear, block_quantized
from peftkern.layers.nf4 import NF4Linear

__all__ = ["BlockLinearConfig"]


@register_quantization_config(METHOD)
class BlockLinearConfig(QuantizationConfigMixin):
    """Config of `from_pretrained` for linear layers in MXFP4, NVFP4 or INT4.

    Args:
        format: "mxfp4", "nvfp4" or "int4".
        blocksize: of INT4, 32, 64, 128 (the default) or 256; the others have one.
        modules_to_not_convert: names, or their beginnings or endings, of layers that stay dense;
            None for those that transformers leaves by default: output embeddings, tied weights.

    Layers whose rows are no multiple of the block size stay dense, and so do fused experts.
    Raises: ValueError naming the argument.
    """

    def __init__(
        self,
        format: str = "mxfp4",
        blocksize: int | None = None,
        modules_to_not_convert: list[str] | None = None,
        **_: Any,
    ) -> None:
        self.quant_method = METHOD
        self.format = format
        self.blocksize = chosen_blocksize(format, blocksize)
        self.modules_to_not_convert = modules_to_not_convert

    def to_diff_dict(self) -> dict[str, Any]:
        """Return all fields: defaults may change."""
        return self.to_dict()


class PlannedLinear(nn.Linear):
    """Layer that is to be a BlockLinear: its packed bytes are loaded as a plain parameter.

    source_cls: class of the layer whose place it has. stored: the weight, once it is read.
    """

    source_cls: type
    stored: BlockWeight | None

    @classmethod
    def of(cls, layer: nn.Module, packed: bool) -> PlannedLinear:
        """Plan for a layer on the meta device. Args: packed, the checkpoint has bytes for it."""
        N, K = matrix_of(layer)
        options = {"device": "meta", "dtype": layer.weight.dtype}
        planned = cls(K, N, layer.bias is not None, **options)
        planned.source_cls, planned.dtype, planned.stored = type(layer), layer.weight.dtype, None
        if packed:
            data = torch.empty(N, K // 2, dtype=torch.uint8, device="meta")
            planned.weight = nn.Parameter(data, requires_grad=False)
        return planned.requires_grad_(False)

    def take(self, w: BlockWeight) -> nn.Parameter:
        """Keep a weight until the layer is made; return what becomes the parameter."""
        self.stored = w
        return nn.Parameter(w.packed.view(w.shape[0], -1), requires_grad=False)

    def made(self) -> BlockLinear:
        w = dataclasses.replace(self.stored, packed=self.weight.detach())
        return BlockLinear.from_weight(w, self.bias).train(self.training)


@register_quantizer(METHOD)
class BlockLinearQuantizer(HfQuantizer):
    """Reads, makes and writes models whose linear layers are `BlockLinear`s."""

    quantization_config: BlockLinearConfig
    serialized_names: ClassVar = {"weight": ["weight", *(f"weight.{part}" for part in PARTS)]}

    @property
    def quantized_element_size(self) -> float:
        """Bytes of a value, by which memory is estimated."""
        return 0.5

    @property
    def is_trainable(self) -> bool:
        """True: the layers' products have gradients of their input, and adapters theirs."""
        return True

    def is_serializable(self) -> bool:
        return True

    def param_needs_quantization(self, model: PreTrainedModel, param_name: str, **_: Any) -> bool:
        module, name = get_module_from_name(model, param_name)
        return isinstance(module, PlannedLinear) and name == "weight"

    def get_quantize_ops(self) -> ConversionOps:
        return _Quantize(self)

    def get_load_operations(self) -> dict[str, type[ConversionOps]]:
        return {"deserialize": _Read}

    def _process_model_before_weight_loading(self, model: PreTrainedModel, **_: Any) -> None:
        config = self.quantization_config
        self.modules_to_not_convert = self.get_modules_to_not_convert(
            model, config.modules_to_not_convert, model._keep_in_fp32_modules
        )
        self.unfit: list[str] = []  # layers that the format cannot have
        for path, module in list(model.named_modules()):
            linear = type(module) is nn.Linear or isinstance(module, Conv1D)
            if not linear or not should_convert_module(path, self.modules_to_not_convert):
                continue
            if matrix_of(module)[1] % config.blocksize:
                self.unfit.append(path)
            else:
                model.set_submodule(path, PlannedLinear.of(module, self.pre_quantized))

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **_: Any) -> Any:
        for path, module in list(model.named_modules()):
            if isinstance(module, PlannedLinear):
                if module.stored is None:
                    raise ValueError(f"{path}.weight: missing from the checkpoint")
                model.set_submodule(path, module.made())
        model._weight_conversions = reversible(model)
        return model

    def get_state_dict_and_metadata(self, model: PreTrainedModel) -> tuple[None, dict]:
        """Leave it to the model's own state dict, which has the tensors of each layer.

        Raises: ValueError for a model of which no config could tell what is in which format.
        """
        own = (self.quantization_config.format, self.quantization_config.blocksize)
        for name, module in model.named_modules():
            if isinstance(module, NF4Linear):
                found = module.quant_type
            elif isinstance(module, BlockLinear):
                w = module.quantized_weight
                found = None if (w.format, w.blocksize) == own else f"{w.format}, {w.blocksize}"
            else:
                continue
            if found is not None:
                raise ValueError(
                    f"{name} is in {found}, the model in {own[0]} in blocks of {own[1]}, which no "
                    "config describes: save the adapter, and quantize again after loading"
                )
        return None, {}

    def _dequantize(self, model: PreTrainedModel, dtype: Any = None) -> Any:
        if isinstance(dtype, str):  # as a config has it once it was saved
            dtype = getattr(torch, dtype)
        for path, module in list(model.named_modules()):
            if isinstance(module, BlockLinear):
                model.set_submodule(path, module.to_linear().to(dtype))
        return model


class _Operation(ConversionOps):
    """What makes the weight of one layer; with `hf_quantizer`, saving does not undo it."""

    def __init__(self, hf_quantizer: BlockLinearQuantizer) -> None:
        self.hf_quantizer = hf_quantizer


class _Read(_Operation):
    """Tensors of a checkpoint, taken as they are."""

    def convert(
        self, input_dict: dict[str, Any], model: nn.Module, full_layer_name: str, **_: Any
    ) -> dict[str, Tensor]:
        """Return {"weight": the packed bytes} of {source name: [tensor]}."""
        module, _ = get_module_from_name(model, full_layer_name)
        state = {name: v[0] if isinstance(v, list) else v for name, v in input_dict.items()}
        if not isinstance(module, PlannedLinear):  # every "weight" comes here, and is not cast
            return {name: value.to(module.weight.dtype) for name, value in state.items()}
        config = self.hf_quantizer.quantization_config
        shape = (module.out_features, module.in_features)
        options = {"shape": shape, "dtype": module.dtype, "blocksize": config.blocksize}
        parts = {part: state.get(f"weight.{part}") for part in PARTS}
        try:
            w = BlockWeight(config.format, state.get("weight"), **parts, **options)
        except ValueError as error:
            raise ValueError(f"{full_layer_name}: {error}") from error
        return {"weight": module.take(w)}


class _Quantize(_Operation):
    """Quantization of layers from a checkpoint in 16 bits."""

    def convert(self, input_dict: dict[str, Any], model: nn.Module, **_: Any) -> dict[str, Tensor]:
        """Quantize each weight: {its full name: dense values, or a list of them}."""
        config, result = self.hf_quantizer.quantization_config, {}
        for name, value in input_dict.items():
            module, _ = get_module_from_name(model, name)
            weight = value[0] if isinstance(value, list) else value
            if issubclass(module.source_cls, Conv1D):
                weight = weight.T.contiguous()
            w = block_quantized(weight, config.format, config.blocksize)
            result[name] = module.take(w)
        return result


def matrix_of(layer: nn.Module) -> tuple[int, int]:
    """Return N and K of a linear layer, or of transformers' Conv1D."""
    shape = tuple(layer.weight.shape)
    return shape[::-1] if isinstance(layer, Conv1D) else shape
