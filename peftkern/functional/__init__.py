"""The public differentiable functions, a file per family."""

from peftkern.functional.block_formats import quantize_int4, quantize_mxfp4, quantize_nvfp4
from peftkern.functional.explain import explain
from peftkern.functional.grouped_linear import grouped_lora_linear, route
from peftkern.functional.lora_experts import ExpertLinear, lora_experts
from peftkern.functional.lora_linear import lora_linear
from peftkern.functional.nf4 import dequantize, dequantize_nf4, quantize_fp4, quantize_nf4
from peftkern.functional.nf4_lora_linear import nf4_linear, nf4_lora_linear

__all__ = [
    "ExpertLinear",
    "dequantize",
    "dequantize_nf4",
    "explain",
    "grouped_lora_linear",
    "lora_experts",
    "lora_linear",
    "nf4_linear",
    "nf4_lora_linear",
    "quantize_fp4",
    "quantize_int4",
    "quantize_mxfp4",
    "quantize_nf4",
    "quantize_nvfp4",
    "route",
]
