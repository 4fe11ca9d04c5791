"""QLoRA's linear layer (NF4 weight, nested absmax, LoRA r=16) as users have it: real PEFT modules.

peftkern is PEFT's `lora.Linear4bit` after `peftkern.patch`. Its peers hold the same weight and the
same adapters (PEFT's default: fp32): the unpatched layer in training mode, where bitsandbytes
dequantizes the weight and multiplies; in eval mode, where bitsandbytes repacks the weight once and
multiplies straight from it (machines with AVX512-BF16); PEFT's `lora.Linear` over the dense weight;
and the dense layer without LoRA.

On a GPU bitsandbytes does the same in both modes (one row without gradients takes its own kernel),
and torch.compile of the bitsandbytes layer is a peer.

python bench/bench_nf4_lora_linear.py [--device cuda] [--only forward-M1] [--seconds 2]
"""

from __future__ import annotations

import sys

import torch
from suite import OURS, Case, Options, Spec, Target, Variant, benchmark_test, main
from torch import nn

import peftkern
from peftkern.backends.cuda.module import refusal_device
from peftkern.backends.cuda.nf4_lora_linear import refusal_sm90a
from peftkern.tools.bench.peers import (
    bitsandbytes_missing,
    compiled,
    forward,
    forward_backward,
    linear,
    lora_oracle,
    lora_pool,
    nf4_linear,
    nf4_weight64,
)

CUDA = "peftkern cuda"  # the same layer on that back end
BNB, BNB_EVAL = "bitsandbytes + PEFT", "bitsandbytes + PEFT, eval"
COMPILED = "bitsandbytes + PEFT, compiled"
DENSE_LORA, DENSE = "dense + PEFT", "dense"


def repacks_in_eval() -> bool:
    if bitsandbytes_missing(torch.device("cpu")) is not None:
        return False
    from bitsandbytes.functional import has_avx512bf16

    return has_avx512bf16()


def build(options: Options, m: int, dtype: torch.dtype, train: bool, names: tuple) -> Case:
    torch.manual_seed(0)
    n, k, r, device, m = options.n, options.k, options.r, options.device, options.m(m)
    weight = (torch.randn(n, k, device=device) / k**0.5).to(dtype)
    first = torch.randn(m, k, device=device).to(dtype)
    dy = torch.randn(m, n, device=device).to(dtype) if train else None
    quantized, dense = nf4_linear(weight), linear(weight)
    packed = n * k // 2 + n * k // 64  # codes and the bytes of nested absmax
    copies, dense_copies = options.copies(packed), options.copies(weight.nbytes)
    # A GPU's L2 cache would still hold much of a single x.
    count = options.copies(first.nbytes + packed) if device.type == "cuda" else 1
    xs = [first.clone().requires_grad_(train) for _ in range(count)]

    def pool(name: str) -> list[nn.Module]:
        if name == DENSE:
            return [linear(weight) for _ in range(dense_copies)]
        if name == DENSE_LORA:
            return lora_pool(dense, dense_copies, r=r, patched=False, train=train)
        # Training mode keeps bitsandbytes from repacking, also without gradients.
        peer = name in (BNB, COMPILED)
        layers = lora_pool(
            quantized, copies, r=r, patched=name in (OURS, CUDA), train=train or peer
        )
        if name == BNB_EVAL:  # repack every copy now, not while the clock runs
            repack = forward(layers, [torch.zeros(1, k, dtype=dtype, device=device)])
            for i in range(copies):
                repack(i)
        return layers

    def variant(name: str) -> Variant:
        modules = pool(name)
        layers = compiled(modules) if name == COMPILED else modules
        base = weight.double() if name in (DENSE, DENSE_LORA) else weight4
        oracle = lora_oracle(xs[0], base, None if name == DENSE else modules[0], dy)
        call = forward_backward(layers, xs, dy, modules) if train else forward(layers, xs)

        def call_cuda(i: int) -> object:
            with peftkern.use_backend("cuda"):
                return call(i)

        return Variant(call_cuda if name == CUDA else call, oracle)

    weight4 = nf4_weight64(quantized)
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
    if train or not repacks_in_eval():
        names = tuple(n for n in names if n != BNB_EVAL)
    return Spec(name, lambda options: build(options, m, dtype, train, names), names, BNB, targets)


BF16, FP32 = torch.bfloat16, torch.float32
# Few rows: time grows with M, without a cliff.
FEW_ROWS = {1: (Target(BNB, 25.0), Target(DENSE_LORA, 2.5)), 2: (), 4: (), 8: ()}
FEW_ROWS |= {16: (Target(BNB, 8.0), Target(DENSE_LORA, 1.0)), 32: (), 64: ()}
SPECS = [
    *(
        spec(f"nf4_lora_linear/forward-M{m}/bf16", m, BF16, False, *targets)
        for m, targets in FEW_ROWS.items()
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


PREFILL = (64, 128, 256, 512)  # rows between decoding and training


def gpu_specs(device: torch.device) -> list[Spec]:
    """Return the cases, those with a target first; without bitsandbytes dense PEFT is the judge."""
    has_bnb = bitsandbytes_missing(device) is None
    judge = BNB if has_bnb else DENSE_LORA
    on_gpu = device.type == "cuda"
    has_decode = on_gpu and refusal_device(device) is None
    has_prefill = has_decode and refusal_sm90a(device) is None

    def gpu_spec(m: int, shape: tuple[int, int], *targets: Target, train: bool = False) -> Spec:
        theirs = (BNB, COMPILED) if m in (32, 4096) else (BNB,)  # compiling is slow
        fits = not train and (has_prefill if m in PREFILL else has_decode and m <= 32)
        ours = (OURS, CUDA) if fits else (OURS,)
        names = (*ours, *(theirs if has_bnb else ()), DENSE_LORA, DENSE)
        direction = "forward+backward" if train else "forward"
        return Spec(
            f"nf4_lora_linear/{direction}-M{m}-{shape[0]}x{shape[1]}/bf16",
            lambda options: build(options, m, BF16, train, names),
            names,
            judge,
            tuple(target for target in targets if target.peer in names),
            shape=shape,
        )

    square, wide, large = (4096, 4096), (14336, 4096), (28672, 8192)
    return [
        *(
            gpu_spec(m, shape, Target(BNB, least))
            for shape in (square, wide)
            for m, least in ((1, 2.0), (8, 3.0), (32, 3.0))
        ),
        *(gpu_spec(4096, shape, Target(DENSE, 1 / 1.12)) for shape in (square, wide)),
        gpu_spec(1, large),
        *(gpu_spec(16, shape) for shape in (square, wide)),
        gpu_spec(4096, square, train=True),
        *(gpu_spec(m, square) for m in PREFILL),
        gpu_spec(32, square, train=True),
    ]


test_nf4_lora_linear = benchmark_test(SPECS)

if __name__ == "__main__":
    sys.exit(main("nf4_lora_linear", SPECS, gpu_specs))
