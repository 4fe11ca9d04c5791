"""The public differentiable functions, a file for each family."""

from peftkern.functional.linear import (
    dequantize_nf4,
    explain,
    lora_linear,
    nf4_linear,
    nf4_lora_linear,
    quantize_nf4,
)

__all__ = [
    "dequantize_nf4",
    "explain",
    "lora_linear",
    "nf4_linear",
    "nf4_lora_linear",
    "quantize_nf4",
]
