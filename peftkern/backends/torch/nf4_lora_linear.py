"""Linear layer over a quantized weight with a low-rank update: decoded, then as a dense one."""

from __future__ import annotations

from functools import partial

from peftkern.backends import ops
from peftkern.backends.reference import nf4_lora_linear as decoded
from peftkern.backends.torch.lora_linear import lora_linear_backward, lora_linear_forward

# The best back end for it decodes the weight.
nf4_lora_linear_forward = partial(
    decoded.nf4_lora_linear_forward, linear=lora_linear_forward, dequantize=ops.nf4_dequantize
)
nf4_lora_linear_backward = partial(
    decoded.nf4_lora_linear_backward, linear=lora_linear_backward, dequantize=ops.nf4_dequantize
)
