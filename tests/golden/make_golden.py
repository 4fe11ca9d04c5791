"""Make the golden data: what bitsandbytes 0.50.2 and PEFT 0.21.2 compute on a CPU.

    python tests/golden/make_golden.py

Writes nf4.safetensors, lora_linear.safetensors and nf4_lora_linear.safetensors beside this file;
each carries its cases and the versions in its metadata. The inputs are stored too, so reading them
needs neither library, nor the same random numbers.
"""

from __future__ import annotations

import json
from importlib.metadata import version
from pathlib import Path

import bitsandbytes as bnb
import torch
from peft.tuners.lora import LoraConfig
from peft.tuners.lora.bnb import Linear4bit
from peft.tuners.lora.layer import Linear
from safetensors.torch import save_file
from torch import Tensor, nn

HERE = Path(__file__).parent
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}

# Rows are whole blocks or odd: bitsandbytes' AVX-512 dequantise is wrong for other even rows.
NF4_CASES = [
    {"shape": [24, 64], "dtype": "float32", "blocksize": 64, "nested": False},
    {"shape": [300, 32], "dtype": "bfloat16", "blocksize": 32, "nested": True},
    {"shape": [7, 13], "dtype": "float16", "blocksize": 32, "nested": False},
    {"shape": [9, 257], "dtype": "bfloat16", "blocksize": 64, "nested": True},
    {"shape": [4, 512], "dtype": "float32", "blocksize": 256, "nested": True},
]
LORA_CASES = [
    {"M": 5, "N": 24, "K": 40, "r": 4, "dtype": "float32", "bias": True, "dropout_p": 0.0},
    {"M": 6, "N": 16, "K": 32, "r": 8, "dtype": "bfloat16", "bias": False, "dropout_p": 0.0},
    {"M": 7, "N": 20, "K": 48, "r": 4, "dtype": "float32", "bias": True, "dropout_p": 0.25},
]
NF4_LORA_CASES = [
    {"M": 5, "N": 32, "K": 64, "r": 4, "dtype": "float32", "bias": True, "dropout_p": 0.0},
    {"M": 9, "N": 48, "K": 128, "r": 8, "dtype": "bfloat16", "bias": True, "dropout_p": 0.0},
    {"M": 4, "N": 32, "K": 64, "r": 4, "dtype": "float32", "bias": False, "dropout_p": 0.25},
]
LORA_ALPHA = 12


def write(name: str, tensors: dict[str, Tensor], cases: list[dict]) -> None:
    versions = {package: version(package) for package in ("torch", "bitsandbytes", "peft")}
    metadata = {"cases": json.dumps(cases), "versions": json.dumps(versions)}
    contiguous = {key: value.detach().contiguous().clone() for key, value in tensors.items()}
    save_file(contiguous, HERE / name, metadata=metadata)


def nf4_case(case: dict) -> dict[str, Tensor]:
    """A weight, its bitsandbytes state and what bitsandbytes rebuilds from it."""
    weight = torch.randn(case["shape"]).mul_(0.05).to(DTYPES[case["dtype"]])
    packed, state = bnb.functional.quantize_4bit(
        weight,
        blocksize=case["blocksize"],
        compress_statistics=case["nested"],
        quant_type="nf4",
    )
    out = {"input": weight, "weight": packed}
    out |= {f"weight.{key}": value for key, value in state.as_dict(packed=True).items()}
    out["dequantized"] = bnb.functional.dequantize_4bit(packed, state)
    return out


def lora_case(case: dict, quantized: bool) -> dict[str, Tensor]:
    """One PEFT layer in training: inputs, the mask that dropout drew, output and gradients."""
    dtype = DTYPES[case["dtype"]]
    if quantized:
        base = bnb.nn.Linear4bit(
            case["K"], case["N"], bias=case["bias"], compute_dtype=dtype, quant_type="nf4"
        )
        base = base.to(dtype).to("cpu")
    else:
        base = nn.Linear(case["K"], case["N"], bias=case["bias"], dtype=dtype)
    config = LoraConfig(r=case["r"], lora_alpha=LORA_ALPHA, lora_dropout=case["dropout_p"])
    layer_class = Linear4bit if quantized else Linear
    layer = layer_class(base, "default", config=config, r=case["r"], lora_alpha=LORA_ALPHA)
    layer.train()
    lora_A, lora_B = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    nn.init.normal_(lora_B, std=0.3)
    x = torch.randn(case["M"], case["K"]).to(dtype).requires_grad_()
    dy = torch.randn(case["M"], case["N"]).to(dtype)

    torch.manual_seed(1)
    keep = torch.nn.functional.dropout(torch.ones(x.shape), case["dropout_p"]) != 0
    torch.manual_seed(1)
    y = layer(x)
    y.backward(dy)
    out = {"x": x, "dy": dy, "keep": keep, "lora_A": lora_A, "lora_B": lora_B}
    out |= {"y": y, "dx": x.grad, "dA": lora_A.grad, "dB": lora_B.grad}
    return out | dict(base.state_dict())


def main() -> None:
    for name, cases, make in (
        ("nf4.safetensors", NF4_CASES, nf4_case),
        ("lora_linear.safetensors", LORA_CASES, lambda case: lora_case(case, False)),
        ("nf4_lora_linear.safetensors", NF4_LORA_CASES, lambda case: lora_case(case, True)),
    ):
        torch.manual_seed(0)
        tensors = {}
        for i, case in enumerate(cases):
            tensors |= {f"{i}.{key}": value for key, value in make(case).items()}
        if name == "nf4.safetensors":
            tensors["code"] = bnb.functional.get_4bit_type("nf4", device="cpu")
            tensors["dynamic_map"] = bnb.functional.create_dynamic_map()
        write(name, tensors, [case | {"lora_alpha": LORA_ALPHA} for case in cases])
        print(name, (HERE / name).stat().st_size, "bytes")


if __name__ == "__main__":
    main()
