"""ms-swift: the callback "peftkern", which an external plug-in registers by importing this module.

echo 'import peftkern.integrations.swift' > use_peftkern.py
swift sft --external_plugins use_peftkern.py --callbacks peftkern ...
"""

from __future__ import annotations

from peft.tuners.lora import LoraLayer
from swift.callbacks import callbacks_map
from swift.tuners.peft import keep_device_forward
from torch import nn
from transformers import TrainerState

from peftkern.integrations.transformers.callbacks import PeftKernCallback

__all__ = ["SwiftCallback"]


class SwiftCallback(PeftKernCallback):
    """Callback that patches the trainer's model, as `PeftKernCallback`.

    ms-swift gives every lora_A and lora_B a forward that moves its input to the weight's device.
    Where that is the base layer's, it does nothing, and the class's own forward is put back: a
    layer whose parts have forwards of their own is PEFT's to compute.
    """

    def _patch(self, model: nn.Module, state: TrainerState) -> None:
        for layer in model.modules():
            if isinstance(layer, LoraLayer):
                _drop_forwards(layer)
        super()._patch(model, state)


def _drop_forwards(layer: LoraLayer) -> None:
    device = layer.get_base_layer().weight.device
    for lora in (*layer.lora_A.values(), *layer.lora_B.values()):
        own = getattr(lora.__dict__.get("forward"), "__func__", None)
        if own is keep_device_forward and lora.weight.device == device:
            lora.forward = lora.__dict__.pop("forward_origin")


callbacks_map["peftkern"] = SwiftCallback
