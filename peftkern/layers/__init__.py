"""Layers for plain torch: drop-ins for nn.Linear, and mixtures of experts; `quantize_`.

layer = NF4LoRALinear.from_linear(linear, r=16, lora_alpha=32)
quantize_(model)  # then get_peft_model(model, LoraConfig(...)) and patch(model)
"""

from peftkern.layers.block import BlockLinear
from peftkern.layers.dora import DoRALinear
from peftkern.layers.experts import Experts, LoRAExperts, NF4Experts
from peftkern.layers.lora import LoRALinear, NF4LoRALinear, _keep_fused_paths_away
from peftkern.layers.mxfp4_stack import MXFP4Stack
from peftkern.layers.nf4 import NF4Linear
from peftkern.layers.nf4_stack import NF4Stack
from peftkern.layers.quantize import quantize_
from peftkern.layers.svd import SVDLinear

__all__ = [
    "BlockLinear",
    "DoRALinear",
    "Experts",
    "LoRAExperts",
    "LoRALinear",
    "MXFP4Stack",
    "NF4Experts",
    "NF4Linear",
    "NF4LoRALinear",
    "NF4Stack",
    "SVDLinear",
    "quantize_",
]
