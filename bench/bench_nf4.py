"""Quantize and dequantize NF4 (nested absmax, blocks of 64) against bitsandbytes.

Traffic of 4096x4096: the packed weight is 8.4 MB of codes and 0.26 MB of absmax; the dense one is
33.6 MB in bf16 and 67.1 MB in fp32. So dequantizing to bf16 moves 42.2 MB, whatever the method.

bitsandbytes' CPU back end takes no `out`: it always returns a new tensor, whose 33.6 MB the system
has to map and zero page by page. `into-out` sets peftkern writing into a given tensor beside that;
`new-output` lets both allocate. On a GPU torch's allocator hands out the same memory again, and the
larger weight is 14336x4096: 30.3 MB packed, 117.4 MB dense.

python bench/bench_nf4.py [--device cuda] [--only dequantize] [--seconds 2]
"""

from __future__ import annotations

import copy
import sys

import torch
from suite import OURS, Case, Options, Spec, Target, Variant, benchmark_test, main

import peftkern
from peftkern.backends.cuda.module import refusal_device
from peftkern.layers import NF4Linear
from peftkern.tools.bench.peers import bitsandbytes_missing, nf4_linear, nf4_weight64

BNB, TORCH, CUDA = "bitsandbytes", "plain torch", "peftkern cuda"
COPY = "copy, same traffic"


def weights(options: Options, dtype: torch.dtype, copies: int) -> list[torch.Tensor]:
    torch.manual_seed(0)
    weight = torch.randn(options.n, options.k, dtype=dtype, device=options.device)
    weight /= options.k**0.5
    return [weight.clone() for _ in range(copies)]


def copy_of(traffic: int, options: Options) -> Variant:
    """Build a copy that reads half of these bytes and writes the other half."""
    copies = options.copies(traffic)
    shape = (2, traffic // 2)
    pool = [torch.ones(shape, dtype=torch.uint8, device=options.device) for _ in range(copies)]

    def call(i: int) -> torch.Tensor:
        source, target = pool[i % copies]
        return target.copy_(source)

    return Variant(call)


def dequantize(options: Options, dtype: torch.dtype, preallocated: bool, names: tuple) -> Case:
    (weight,) = weights(options, dtype, 1)
    first = nf4_linear(weight)
    oracle = (nf4_weight64(first),)
    read = peftkern.NF4Weight.from_bitsandbytes
    ours = first.nf4 if isinstance(first, NF4Linear) else read(first.weight)
    traffic = ours.nbytes + weight.nbytes
    copies = options.copies(traffic)
    outs = [torch.zeros_like(weight) for _ in range(copies)] if preallocated else [None] * copies
    pool = [copy.deepcopy(ours) for _ in range(copies)]

    def call_ours(i: int) -> torch.Tensor:
        return peftkern.dequantize_nf4(pool[i % copies], dtype, out=outs[i % copies])

    def call_torch(i: int) -> torch.Tensor:
        with peftkern.use_backend("reference"):
            return call_ours(i)

    def call_cuda(i: int) -> torch.Tensor:
        with peftkern.use_backend("cuda"):
            return call_ours(i)

    variants = {OURS: Variant(call_ours, oracle)}
    if CUDA in names:
        variants[CUDA] = Variant(call_cuda, oracle)
    if BNB in names:
        from bitsandbytes.functional import dequantize_4bit

        theirs = [copy.deepcopy(first.weight) for _ in range(copies)]

        def call_theirs(i: int) -> torch.Tensor:
            return dequantize_4bit(theirs[i % copies].data, theirs[i % copies].quant_state)

        variants[BNB] = Variant(call_theirs, oracle)
    if TORCH in names:
        variants[TORCH] = Variant(call_torch, oracle)
    variants[COPY] = copy_of(traffic, options)
    return Case(variants, traffic, 0, dtype)


def quantize(options: Options, dtype: torch.dtype, names: tuple, double_quant: bool = True) -> Case:
    pool = weights(options, dtype, options.copies(options.n * options.k * dtype.itemsize))
    oracle = (pool[0].double(),)

    def call_ours(i: int) -> peftkern.NF4Weight:
        return peftkern.quantize_nf4(pool[i % len(pool)], double_quant=double_quant)

    def call_torch(i: int) -> peftkern.NF4Weight:
        with peftkern.use_backend("reference"):
            return call_ours(i)

    def call_cuda(i: int) -> peftkern.NF4Weight:
        with peftkern.use_backend("cuda"):
            return call_ours(i)

    def values(w: peftkern.NF4Weight) -> torch.Tensor:
        return peftkern.dequantize_nf4(w, torch.float32)

    variants = {OURS: Variant(call_ours, oracle, values)}
    if CUDA in names:
        variants[CUDA] = Variant(call_cuda, oracle, values)
    if BNB in names:
        import bitsandbytes.functional as bnb

        def call_theirs(i: int) -> tuple:
            weight = pool[i % len(pool)]
            options = {"quant_type": "nf4", "compress_statistics": double_quant}
            return bnb.quantize_4bit(weight, **options)

        variants[BNB] = Variant(call_theirs, oracle, lambda pair: bnb.dequantize_4bit(*pair))
    if TORCH in names:
        variants[TORCH] = Variant(call_torch, oracle, values)
    packed = call_ours(0).nbytes
    return Case(variants, pool[0].nbytes + packed, 0, dtype)


BF16, FP32 = torch.bfloat16, torch.float32
LOSSY = 0.12  # error of normal weights rounded to 4 bits, with a margin
SPECS = [
    Spec(
        "nf4/dequantize/bf16/into-out",
        lambda options: dequantize(options, BF16, preallocated=True, names=(OURS, BNB, COPY)),
        (OURS, BNB, COPY),
        BNB,
        (Target(BNB, 6.0), Target(COPY, 0.7)),
    ),
    Spec(
        "nf4/dequantize/bf16/new-output",
        lambda options: dequantize(options, BF16, preallocated=False, names=(OURS, BNB, COPY)),
        (OURS, BNB, COPY),
        BNB,
    ),
    Spec(
        "nf4/dequantize/fp32/into-out",
        lambda options: dequantize(options, FP32, preallocated=True, names=(OURS, BNB, COPY)),
        (OURS, BNB, COPY),
        BNB,
    ),
    Spec(
        "nf4/quantize/bf16",
        lambda options: quantize(options, BF16, (OURS, BNB)),
        (OURS, BNB),
        BNB,
        (Target(BNB, 20.0),),
        LOSSY,
    ),
    Spec(
        "nf4/quantize/fp32",
        lambda options: quantize(options, FP32, (OURS, BNB)),
        (OURS, BNB),
        BNB,
        (Target(BNB, 20.0),),
        LOSSY,
    ),
]


def has_cuda_kernels(device: torch.device) -> bool:
    return device.type == "cuda" and refusal_device(device) is None


def gpu_specs(device: torch.device) -> list[Spec]:
    """Return the cases, those with a target first; without bitsandbytes torch is the judge."""
    peer = BNB if bitsandbytes_missing(device) is None else TORCH
    ours = (OURS, CUDA) if has_cuda_kernels(device) else (OURS,)
    names = (*ours, peer, COPY)

    def dequantized(shape: tuple[int, int], dtype: torch.dtype, *targets: Target) -> Spec:
        label = f"nf4/dequantize-{shape[0]}x{shape[1]}/{'bf16' if dtype is BF16 else 'fp32'}"
        targets = tuple(target for target in targets if target.peer in names)
        return Spec(
            label,
            lambda options: dequantize(options, dtype, True, names),
            names,
            peer,
            targets,
            shape=shape,
        )

    def quantized(kind: str, names: tuple, double_quant: bool) -> Spec:
        return Spec(
            f"nf4/{kind}-14336x4096/bf16",
            lambda options: quantize(options, BF16, names, double_quant),
            names,
            peer,
            (),
            LOSSY,
            (14336, 4096),
        )

    return [
        dequantized((14336, 4096), BF16, Target(COPY, 0.85), Target(BNB, 2.0)),
        dequantized((4096, 4096), BF16),
        dequantized((14336, 4096), FP32),
        # No kernel for a GPU takes the absmax of absmax: it is not interpreted, nor CUDA's alone.
        *([quantized("quantize", (OURS, peer), True)] if device.type == "cuda" else []),
        quantized("quantize-plain", (*ours, peer), False),
    ]


test_nf4 = benchmark_test(SPECS)

if __name__ == "__main__":
    sys.exit(main("nf4", SPECS, gpu_specs))
