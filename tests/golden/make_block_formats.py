"""Make the golden data of MXFP4, NVFP4 and INT4: what torchao 0.18 computes on a CPU.

    pip install torchao && python tests/golden/make_block_formats.py

Writes block_formats.safetensors beside this file: inputs, codes, scales and values. A name is that
of the input, the format, and what it is.
"""

from __future__ import annotations

import json
from importlib.metadata import version
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor
from torchao.prototype.mx_formats.config import ScaleCalculationMode
from torchao.prototype.mx_formats.mx_tensor import MXTensor
from torchao.prototype.mx_formats.nvfp4_tensor import NVFP4Tensor, per_tensor_amax_to_scale
from torchao.quantization.quant_primitives import (
    MappingType,
    choose_qparams_affine,
    dequantize_affine,
    quantize_affine,
)

HERE = Path(__file__).parent


def inputs() -> dict[str, Tensor]:
    """Weights as they are, halfway between codes, and of all sizes that float32 has."""
    torch.manual_seed(0)
    weight = torch.randn(4, 128) * 0.05
    ties = torch.randint(-32, 33, (4, 128)) / 4.0
    ties[:, ::16] = 6.0
    exponents = torch.randint(-149, 125, (4, 4, 1)).expand(4, 4, 32).reshape(4, 128)
    wide = torch.ldexp(torch.randn(4, 128), exponents)
    wide[0, :32] = 0.0
    wide[1, 5] = -0.0
    return {"weight": weight, "bf16": weight.bfloat16(), "ties": ties, "wide": wide}


def mxfp4(x: Tensor) -> dict[str, Tensor]:
    found = MXTensor.to_mx(x, torch.float4_e2m1fn_x2, 32, ScaleCalculationMode.FLOOR)
    packed, scale = found.qdata.view(torch.uint8), found.scale.view(torch.uint8)
    return {"packed": packed, "scale": scale, "values": found.dequantize(x.dtype)}


def nvfp4(x: Tensor) -> dict[str, Tensor]:
    tensor_scale = per_tensor_amax_to_scale(x.abs().amax())
    found = NVFP4Tensor.to_nvfp4(x, per_tensor_scale=tensor_scale)
    return {
        "packed": found.qdata.view(torch.uint8),
        "scale": found.scale.view(torch.uint8),
        "tensor_scale": tensor_scale,
        "values": found.dequantize(x.dtype),
    }


def int4(x: Tensor, mapping: MappingType) -> dict[str, Tensor]:
    limits = (0, 15)
    scale, zero = choose_qparams_affine(
        x, mapping, (1, 32), torch.uint8, *limits, scale_dtype=torch.float32
    )
    codes = quantize_affine(x, (1, 32), scale, zero, torch.uint8, *limits)
    values = dequantize_affine(codes, (1, 32), scale, zero, torch.uint8, *limits)
    return {"codes": codes, "scale": scale, "zero": zero, "values": values}


def main() -> None:
    tensors: dict[str, Tensor] = {}
    for name, x in inputs().items():
        tensors[name] = x
        results = {"mxfp4": mxfp4(x), "nvfp4": nvfp4(x)}
        if x.dtype is torch.float32:
            results["int4"] = int4(x, MappingType.ASYMMETRIC)
            results["int4_symmetric"] = int4(x, MappingType.SYMMETRIC)
        for kind, found in results.items():
            tensors.update({f"{name}.{kind}.{part}": value for part, value in found.items()})
    contiguous = {key: value.detach().contiguous().clone() for key, value in tensors.items()}
    versions = {package: version(package) for package in ("torch", "torchao")}
    metadata = {"versions": json.dumps(versions)}
    save_file(contiguous, HERE / "block_formats.safetensors", metadata=metadata)


if __name__ == "__main__":
    main()
