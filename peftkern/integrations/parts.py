"""Parts of a LoRA layer, as `peftkern.register_layer` has them read."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor, nn

from peftkern.formats.block_weight import QuantizedWeight

__all__ = ["LoRAParts"]


class LoRAParts(NamedTuple):
    """Parts of a LoRA layer as it is at this call.

    y = base(x) + bias + scaling * (dropout(x) @ lora_A.T) @ lora_B.T

    base: the frozen weight [N, K], dense, an NF4Weight or a BlockWeight; or the frozen layer, an
        nn.Linear, `peftkern.layers.NF4Linear` or bitsandbytes' Linear4bit, which brings its own
        bias.
    lora_A [r, K], lora_B [N, r]: None both where the layer gives what its base gives.
    scaling: a number or a 0-dim tensor.
    dropout: an nn.Dropout or nn.Identity that belongs to the layer, or a probability, which counts
        in training mode alone.
    bias: [N], of a base that is a weight.
    """

    base: Tensor | QuantizedWeight | nn.Module
    lora_A: Tensor | None
    lora_B: Tensor | None
    scaling: float | Tensor = 1.0
    dropout: nn.Module | float = 0.0
    bias: Tensor | None = None
