"""gpt-oss's experts in MXFP4, as OpenAI ships them, trained over without making them bf16.

    config = MXFP4ExpertsConfig.of_checkpoint("openai/gpt-oss-20b")
    model = AutoModelForCausalLM.from_pretrained("openai/gpt-oss-20b", config=config)
    model = get_peft_model(model, LoraConfig(target_modules=["q_proj", "v_proj"],
        target_parameters=["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]))
    peftkern.patch(model)
    Trainer(model, ...).train()
    model.get_base_model().save_pretrained(folder)  # MXFP4 again, which transformers reads

transformers' own quantizer of MXFP4 has kernels for inference alone, so its `is_trainable` is
False, and without those kernels it makes the model bf16, four times as large. `of_checkpoint` is
the switch: it names the quantizer of this module in the config, which keeps blocks and scales as
they are in the file, and says that the model can be trained because its experts then run on kernels
with gradients. Nothing of transformers is changed; without the switch, its quantizer answers.

A checkpoint in bf16 becomes MXFP4 while it is read: `quantization_config=MXFP4ExpertsConfig()`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, Mxfp4Config, PreTrainedConfig, PreTrainedModel
from transformers.core_model_loading import ConversionOps
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.quantizer_mxfp4 import Mxfp4HfQuantizer
from transformers.quantizers.quantizers_utils import get_module_from_name, should_convert_module

from peftkern.integrations.frozen_experts import serve_nf4_experts
from peftkern.integrations.transformers.conversions import make_experts_dense, reversible
from peftkern.layers.expert_stack import set_stack, stacks_of
from peftkern.layers.mxfp4_stack import METHOD as _WRITTEN
from peftkern.layers.mxfp4_stack import SUFFIXES, MXFP4Stack
from peftkern.layers.nf4 import NF4Linear
from peftkern.layers.quantize import expert_parameters

__all__ = ["MXFP4ExpertsConfig"]
METHOD = "peftkern_mxfp4"
FAMILY = "gpt_oss"  # the one with such checkpoints


@register_quantization_config(METHOD)
class MXFP4ExpertsConfig(Mxfp4Config):
    """Config of `from_pretrained` for experts in MXFP4 that can be trained over.

    Args: modules_to_not_convert, of transformers' Mxfp4Config.
    """

    def __init__(self, modules_to_not_convert: list[str] | None = None, **_: Any) -> None:
        super().__init__(modules_to_not_convert)
        self.quant_method = METHOD

    @classmethod
    def of_checkpoint(cls, name: str, **options: Any) -> PreTrainedConfig:
        """Return a checkpoint's config, by which `from_pretrained` leaves MXFP4 as it is.

        Args: name, of a folder or a repository; options, of `AutoConfig.from_pretrained`.
        Raises: ValueError if the checkpoint is not in MXFP4.
        """
        config = AutoConfig.from_pretrained(name, **options)
        found = getattr(config, "quantization_config", None) or {}
        if found.get("quant_method") != _WRITTEN:
            raise ValueError(
                f"name: expected a checkpoint in MXFP4, got quant_method "
                f"{found.get('quant_method')!r}; one in 16 bits takes "
                "quantization_config=MXFP4ExpertsConfig()"
            )
        config.quantization_config = {**found, "quant_method": METHOD}
        return config

    def to_dict(self) -> dict[str, Any]:
        """Return the fields for config.json, which are those of transformers' own method."""
        return {**super().to_dict(), "quant_method": _WRITTEN}


@register_quantizer(METHOD)
class MXFP4ExpertsQuantizer(Mxfp4HfQuantizer):
    """transformers' quantizer of MXFP4 for experts that stay modules of their own class."""

    def validate_environment(self, *args: Any, **kwargs: Any) -> None:
        """Ask for nothing: the kernels are this library's, or plain torch."""

    @property
    def is_trainable(self) -> bool:
        """True: the experts' products have gradients of their input, and adapters theirs."""
        return True

    def param_needs_quantization(self, model: PreTrainedModel, param_name: str, **_: Any) -> bool:
        module, name = get_module_from_name(model, param_name)
        ours = name in stacks_of(module) or name in expert_parameters(module)
        path = param_name.rpartition(".")[0]
        return ours and should_convert_module(path, self.modules_to_not_convert)

    def get_quantize_ops(self) -> ConversionOps:
        return _Quantize(self)

    def get_load_operations(self) -> dict[str, type[ConversionOps]]:
        return {"deserialize": _View}

    def _process_model_before_weight_loading(self, model: PreTrainedModel, **_: Any) -> None:
        if model.config.get_text_config().model_type != FAMILY:
            raise ValueError(
                f"model: expected gpt-oss, whose checkpoints are in MXFP4, got "
                f"{model.config.model_type}; NF4ExpertsConfig takes others"
            )
        self.modules_to_not_convert = self.get_modules_to_not_convert(
            model, self.quantization_config.modules_to_not_convert, model._keep_in_fp32_modules
        )

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **_: Any) -> Any:
        for path, module in model.named_modules():
            for name, stack in stacks_of(module).items():
                set_stack(module, name, stack)
            for name in expert_parameters(module):
                if self.param_needs_quantization(model, f"{path}.{name}"):
                    names = " and ".join(name + suffix for suffix in SUFFIXES)
                    raise ValueError(f"{path}: {names} are missing from the checkpoint")
        model._weight_conversions = reversible(model)
        serve_nf4_experts(model)
        return model

    def get_state_dict_and_metadata(self, model: PreTrainedModel) -> tuple[None, dict]:
        """Leave it to the model's own state dict, which has blocks and scales.

        Raises: ValueError for a model of which no config could tell what is in which format.
        """
        for name, module in model.named_modules():
            if isinstance(module, NF4Linear):
                raise ValueError(
                    f"{name} is in NF4, the experts in MXFP4, which no config describes: save the "
                    "adapter, and quantize again after loading"
                )
        return None, {}

    def _dequantize(self, model: PreTrainedModel, dtype: torch.dtype | None = None) -> Any:
        make_experts_dense(model, dtype)
        return model


class _Operation(ConversionOps):
    """What makes the stack of one parameter; with `hf_quantizer`, saving does not undo it."""

    def __init__(self, hf_quantizer: MXFP4ExpertsQuantizer) -> None:
        self.hf_quantizer = hf_quantizer


class _View(_Operation):
    """Blocks and scales of a checkpoint, taken as they are."""

    def convert(
        self, input_dict: dict[str, Any], model: nn.Module, full_layer_name: str, **_: Any
    ) -> dict[str, Tensor]:
        """Return {full name: the parameter in MXFP4} of {source name: [tensor]}."""
        module, name = get_module_from_name(model, full_layer_name)
        missing = [name + suffix for suffix in SUFFIXES if name + suffix not in input_dict]
        if missing:
            raise ValueError(f"{full_layer_name}: {missing[0]} is missing from the checkpoint")
        parts = (_only(input_dict[name + suffix]) for suffix in SUFFIXES)
        weight = module._parameters[name]
        options = {"dtype": weight.dtype, "turned": bool(module.is_transposed)}
        stack = MXFP4Stack.from_blocks(*parts, **options)
        if stack.shape != weight.shape:
            raise ValueError(
                f"{full_layer_name}: expected blocks of experts {list(weight.shape)}, got those of "
                f"{list(stack.shape)}"
            )
        return {full_layer_name: nn.Parameter(stack, requires_grad=False)}


class _Quantize(_Operation):
    """Quantization of experts from a checkpoint in 16 bits, one at a time."""

    def convert(self, input_dict: dict[str, Any], model: nn.Module, **_: Any) -> dict[str, Tensor]:
        """Quantize each parameter: {its full name: dense weights, or a list of them}."""
        result = {}
        for name, value in input_dict.items():
            module, _ = get_module_from_name(model, name)
            stack = MXFP4Stack.from_dense(_only(value), turned=bool(module.is_transposed))
            result[name] = nn.Parameter(stack, requires_grad=False)
        return result


def _only(value: Any) -> Tensor:
    return value[0] if isinstance(value, list) else value
