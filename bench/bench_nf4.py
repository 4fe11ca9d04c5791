"""Quantise and dequantise NF4 (nested absmax, blocks of 64) beside bitsandbytes.

Traffic of 4096x4096: the packed weight is 8.4 MB of codes and 0.26 MB of absmax; the dense one is
33.6 MB in bf16 and 67.1 MB in fp32. Dequantising to bf16 so moves 42.2 MB, whatever the method.

bitsandbytes' CPU back end takes no `out`: it always returns a new tensor, whose 33.6 MB the system
has to map and zero page by page. `into-out` sets peftkern writing into a given tensor beside that;
`new-output` lets both allocate.

python bench/bench_nf4.py [--only dequantise] [--seconds 2]
"""

from __future__ import annotations

import copy
import sys

import bitsandbytes.functional as bnb
import pytest
import torch
from peers import linear4bit, nf4_weight64
from suite import OURS, Case, Options, Spec, Target, Variant, benchmark_ids, main, run_benchmark

import peftkern

BNB = "bitsandbytes"
COPY = "copy, same traffic"


def weights(options: Options, dtype: torch.dtype, copies: int) -> list[torch.Tensor]:
    torch.manual_seed(0)
    weight = torch.randn(options.n, options.k, dtype=dtype) / options.k**0.5
    return [weight.clone() for _ in range(copies)]


def copy_of(traffic: int, options: Options) -> Variant:
    """Reads half of these bytes and writes the other half."""
    copies = options.copies(traffic)
    pool = [torch.ones(2, traffic // 2, dtype=torch.uint8) for _ in range(copies)]

    def call(i: int) -> torch.Tensor:
        source, target = pool[i % copies]
        return target.copy_(source)

    return Variant(call)


def dequantise(options: Options, dtype: torch.dtype, preallocated: bool) -> Case:
    (weight,) = weights(options, dtype, 1)
    first = linear4bit(weight).weight
    oracle = (nf4_weight64(first),)
    ours = peftkern.NF4Weight.from_bitsandbytes(first)
    traffic = ours.nbytes + weight.nbytes
    copies = options.copies(traffic)
    theirs = [copy.deepcopy(first) for _ in range(copies)]
    pool = [peftkern.NF4Weight.from_bitsandbytes(copy.deepcopy(first)) for _ in range(copies)]
    outs = [torch.zeros_like(weight) for _ in range(copies)] if preallocated else [None] * copies

    def call_ours(i: int) -> torch.Tensor:
        return peftkern.dequantize_nf4(pool[i % copies], dtype, out=outs[i % copies])

    def call_theirs(i: int) -> torch.Tensor:
        return bnb.dequantize_4bit(theirs[i % copies].data, theirs[i % copies].quant_state)

    variants = {
        OURS: Variant(call_ours, oracle),
        BNB: Variant(call_theirs, oracle),
        COPY: copy_of(traffic, options),
    }
    return Case(variants, traffic, 0, dtype)


def quantise(options: Options, dtype: torch.dtype) -> Case:
    pool = weights(options, dtype, options.copies(options.n * options.k * dtype.itemsize))
    oracle = (pool[0].double(),)

    def call_theirs(i: int) -> tuple:
        weight = pool[i % len(pool)]
        return bnb.quantize_4bit(weight, quant_type="nf4", compress_statistics=True)

    variants = {
        OURS: Variant(
            lambda i: peftkern.quantize_nf4(pool[i % len(pool)]),
            oracle,
            lambda w: peftkern.dequantize_nf4(w, torch.float32),
        ),
        BNB: Variant(call_theirs, oracle, lambda pair: bnb.dequantize_4bit(*pair)),
    }
    packed = peftkern.quantize_nf4(pool[0]).nbytes
    return Case(variants, pool[0].nbytes + packed, 0, dtype)


BF16, FP32 = torch.bfloat16, torch.float32
LOSSY = 0.12  # what rounding normal weights to 4 bits costs, and a bit more
SPECS = [
    Spec(
        "nf4/dequantise/bf16/into-out",
        lambda options: dequantise(options, BF16, preallocated=True),
        (OURS, BNB, COPY),
        BNB,
        (Target(BNB, 6.0), Target(COPY, 0.7)),
    ),
    Spec(
        "nf4/dequantise/bf16/new-output",
        lambda options: dequantise(options, BF16, preallocated=False),
        (OURS, BNB, COPY),
        BNB,
    ),
    Spec(
        "nf4/dequantise/fp32/into-out",
        lambda options: dequantise(options, FP32, preallocated=True),
        (OURS, BNB, COPY),
        BNB,
    ),
    Spec(
        "nf4/quantise/bf16",
        lambda options: quantise(options, BF16),
        (OURS, BNB),
        BNB,
        (Target(BNB, 20.0),),
        LOSSY,
    ),
    Spec(
        "nf4/quantise/fp32",
        lambda options: quantise(options, FP32),
        (OURS, BNB),
        BNB,
        (Target(BNB, 20.0),),
        LOSSY,
    ),
]


@pytest.mark.parametrize(("spec", "name"), benchmark_ids(SPECS))
def test_nf4(benchmark, spec: Spec, name: str, options: Options) -> None:
    run_benchmark(benchmark, spec, name, options)


if __name__ == "__main__":
    sys.exit(main("nf4", SPECS))
