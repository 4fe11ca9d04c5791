"""PEFT's LoRA layer over a dense weight, patched and not, and the plain dense layer.

On a CPU the low-rank update costs a few percent of the dense product, so there is little to win.

python bench/bench_lora_linear.py [--only forward-M1] [--seconds 2]
"""

from __future__ import annotations

import sys

import pytest
import torch
from peers import forward, forward_backward, linear, lora_oracle, lora_pool
from suite import OURS, Case, Options, Spec, Variant, benchmark_ids, main, run_benchmark

PEFT, DENSE = "PEFT", "dense"
NAMES = (OURS, PEFT, DENSE)


def build(options: Options, m: int, dtype: torch.dtype, train: bool) -> Case:
    torch.manual_seed(0)
    n, k, r = options.n, options.k, options.r
    weight = (torch.randn(n, k) / k**0.5).to(dtype)
    x = torch.randn(m, k).to(dtype).requires_grad_(train)
    dy = torch.randn(m, n).to(dtype) if train else None
    dense, copies = linear(weight), options.copies(weight.nbytes)

    def variant(name: str) -> Variant:
        if name == DENSE:
            layers = [linear(weight) for _ in range(copies)]
        else:
            layers = lora_pool(dense, copies, r=r, patched=name == OURS, train=train)
        oracle = lora_oracle(x, weight.double(), None if name == DENSE else layers[0], dy)
        return Variant(forward_backward(layers, x, dy) if train else forward(layers, x), oracle)

    passes = 2 if train else 1
    flops = passes * 2 * m * n * k + (3 if train else 1) * 2 * m * r * (n + k)
    adapters = (4 if train else 1) * 4 * r * (n + k)
    activations = m * (2 * n + 3 * k if train else n + k) * dtype.itemsize
    traffic = passes * weight.nbytes + adapters + activations
    return Case({name: variant(name) for name in NAMES}, traffic, flops, dtype)


def spec(name: str, m: int, dtype: torch.dtype, train: bool) -> Spec:
    return Spec(name, lambda options: build(options, m, dtype, train), NAMES, PEFT)


BF16, FP32 = torch.bfloat16, torch.float32
SPECS = [
    spec("lora_linear/forward-M1/bf16", 1, BF16, False),
    spec("lora_linear/forward-M256/bf16", 256, BF16, False),
    spec("lora_linear/forward+backward-M1024/bf16", 1024, BF16, True),
    spec("lora_linear/forward-M256/fp32", 256, FP32, False),
]


@pytest.mark.parametrize(("spec", "name"), benchmark_ids(SPECS))
def test_lora_linear(benchmark, spec: Spec, name: str, options: Options) -> None:
    run_benchmark(benchmark, spec, name, options)


if __name__ == "__main__":
    sys.exit(main("lora_linear", SPECS))
