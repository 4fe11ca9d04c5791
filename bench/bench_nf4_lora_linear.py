"""QLoRA's linear layer (NF4 weight, nested absmax, LoRA r=16) as users have it: real PEFT modules.

peftkern is PEFT's `lora.Linear4bit` after `peftkern.patch`. Its peers hold the same weight and the
same adapters (PEFT's default: fp32): the unpatched layer in training mode, where bitsandbytes
dequantises the weight and multiplies; in eval mode, where bitsandbytes repacks the weight once and
multiplies straight from it (machines with AVX512-BF16); PEFT's `lora.Linear` over the dense weight;
and the dense layer without LoRA.

python bench/bench_nf4_lora_linear.py [--only forward-M1] [--seconds 2]
"""

from __future__ import annotations

import sys

import pytest
import torch
from bitsandbytes.functional import has_avx512bf16
from peers import (
    forward,
    forward_backward,
    linear,
    linear4bit,
    lora_oracle,
    lora_pool,
    nf4_weight64,
)
from suite import OURS, Case, Options, Spec, Target, Variant, benchmark_ids, main, run_benchmark
from torch import nn

BNB, BNB_EVAL = "bitsandbytes + PEFT", "bitsandbytes + PEFT, eval"
DENSE_LORA, DENSE = "dense + PEFT", "dense"


def build(options: Options, m: int, dtype: torch.dtype, train: bool, names: tuple) -> Case:
    torch.manual_seed(0)
    n, k, r = options.n, options.k, options.r
    weight = (torch.randn(n, k) / k**0.5).to(dtype)
    x = torch.randn(m, k).to(dtype).requires_grad_(train)
    dy = torch.randn(m, n).to(dtype) if train else None
    quantised, dense = linear4bit(weight), linear(weight)
    packed = n * k // 2 + n * k // 64  # codes and the bytes of nested absmax
    copies, dense_copies = options.copies(packed), options.copies(weight.nbytes)

    def pool(name: str) -> list[nn.Module]:
        if name == DENSE:
            return [linear(weight) for _ in range(dense_copies)]
        if name == DENSE_LORA:
            return lora_pool(dense, dense_copies, r=r, patched=False, train=train)
        # Training mode keeps bitsandbytes from repacking, also without gradients.
        layers = lora_pool(quantised, copies, r=r, patched=name == OURS, train=train or name == BNB)
        if name == BNB_EVAL:  # repack every copy now, not while the clock runs
            repack = forward(layers, torch.zeros(1, k, dtype=dtype))
            for i in range(copies):
                repack(i)
        return layers

    def variant(name: str) -> Variant:
        layers = pool(name)
        base = weight.double() if name in (DENSE, DENSE_LORA) else weight4
        oracle = lora_oracle(x, base, None if name == DENSE else layers[0], dy)
        return Variant(forward_backward(layers, x, dy) if train else forward(layers, x), oracle)

    weight4 = nf4_weight64(quantised.weight)
    adapters = 4 * r * (n + k)
    lora_flops = 2 * m * r * (n + k)
    flops = 2 * m * n * k + lora_flops
    traffic = packed + adapters + m * (n + k) * dtype.itemsize
    if train:  # dX; dS and dB, dX's share and dA; W and dy again, dx, both adapters' gradients
        flops += 2 * m * n * k + 2 * lora_flops
        traffic += packed + 3 * adapters + m * (n + 2 * k) * dtype.itemsize
    return Case({name: variant(name) for name in names}, traffic, flops, dtype)


def spec(name: str, m: int, dtype: torch.dtype, train: bool, *targets: Target) -> Spec:
    names = (OURS, BNB, BNB_EVAL, DENSE_LORA, DENSE)
    if train or not has_avx512bf16():
        names = tuple(n for n in names if n != BNB_EVAL)
    return Spec(name, lambda options: build(options, m, dtype, train, names), names, BNB, targets)


BF16, FP32 = torch.bfloat16, torch.float32
SPECS = [
    spec(
        "nf4_lora_linear/forward-M1/bf16",
        1,
        BF16,
        False,
        Target(BNB, 25.0),
        Target(DENSE_LORA, 2.5),
    ),
    spec(
        "nf4_lora_linear/forward-M16/bf16",
        16,
        BF16,
        False,
        Target(BNB, 8.0),
        Target(DENSE_LORA, 1.0),
    ),
    spec(
        "nf4_lora_linear/forward-M256/bf16",
        256,
        BF16,
        False,
        Target(BNB, 1.7),
        Target(DENSE, 1 / 1.15),
    ),
    spec("nf4_lora_linear/forward+backward-M1024/bf16", 1024, BF16, True, Target(BNB, 1.25)),
    spec(
        "nf4_lora_linear/forward-M256/fp32", 256, FP32, False, Target(BNB, 2.0), Target(DENSE, 1.0)
    ),
]


@pytest.mark.parametrize(("spec", "name"), benchmark_ids(SPECS))
def test_nf4_lora_linear(benchmark, spec: Spec, name: str, options: Options) -> None:
    run_benchmark(benchmark, spec, name, options)


if __name__ == "__main__":
    sys.exit(main("nf4_lora_linear", SPECS))
