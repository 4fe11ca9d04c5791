"""Quantize and dequantize NF4 (nested absmax, blocks of 64) against bitsandbytes.

Traffic of 4096x4096: the packed weight is 8.4 MB of codes and 0.26 MB of absmax; the dense one is
33.6 MB in bf16 and 67.1 MB in fp32. So dequantizing to bf16 moves 42.2 MB, whatever the method.

bitsandbytes' CPU back end takes no `out`: it always returns a new tensor, whose 33.6 MB the system
has to map and zero page by page. `new-output` lets both allocate; `into-out` sets peftkern writing
into a given tensor beside that. On a GPU torch's allocator hands out the same memory again, and the
larger weight is 14336x4096: 30.3 MB packed, 117.4 MB dense.

python bench/bench_nf4.py [--device cuda] [--only dequantize] [--seconds 2]
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from dataclasses import replace

import torch
from suite import OURS, Case, Options, Spec, Target, Variant, benchmark_test, main, spec_of

import peftkern
from peftkern.backends.cuda.module import refusal_device
from peftkern.tools.bench.base_layers import Layer, Tensors
from peftkern.tools.bench.cases import Problem
from peftkern.tools.bench.peers import bitsandbytes_missing
from peftkern.tools.bench.providers import on_backend, packed, quantizers

BNB, TORCH, CUDA = "bitsandbytes", "plain torch", "peftkern cuda"
COPY = "copy, same traffic"
BF16, FP32 = "bfloat16", "float32"
PROVIDERS = {OURS: "peftkern", CUDA: on_backend("cuda"), BNB: "bitsandbytes", TORCH: "torch"}


def into_out(problem: Problem, tensors: Tensors, copies: int) -> list[Layer]:
    """Build peftkern's layers that write into a tensor of their own."""
    dtype = getattr(torch, problem.dtype)

    def layer(weight: peftkern.NF4Weight) -> Layer:
        out = torch.zeros(problem.N, problem.K, dtype=dtype, device=weight.device)
        return Layer(lambda: peftkern.dequantize_nf4(weight, dtype, out=out))

    return [layer(weight) for weight in packed(tensors, copies)]


INTO_OUT = {OURS: into_out, CUDA: on_backend("cuda", into_out)}
INTO_OUT |= {BNB: "bitsandbytes", TORCH: on_backend("reference", into_out)}


def copy_of(traffic: int, options: Options) -> Variant:
    """Build a copy that reads half of these bytes and writes the other half."""
    copies = options.copies(traffic)
    shape = (2, traffic // 2)
    pool = [torch.ones(shape, dtype=torch.uint8, device=options.device) for _ in range(copies)]

    def call(i: int) -> torch.Tensor:
        source, target = pool[i % copies]
        return target.copy_(source)

    return Variant(call)


def beside_a_copy(options: Options, build: Callable[[Options], Case]) -> Case:
    case = build(options)
    return replace(case, variants={**case.variants, COPY: copy_of(case.bytes, options)})


def dequantized(
    name: str,
    dtype: str,
    names: tuple[str, ...],
    *targets: Target,
    shape: tuple[int, int] | None = None,
) -> Spec:
    problem = Problem("nf4_dequantize", "", None, 4096, 4096, None, dtype, "forward")
    of = PROVIDERS if "new-output" in name else INTO_OUT
    peers = {name: of[name] for name in names}
    one = spec_of(f"nf4/dequantize{name}", problem, peers, judge=names[-1], shape=shape)
    build = functools.partial(beside_a_copy, build=one.build)
    return replace(one, build=build, names=(*names, COPY), targets=targets)


def quantized(
    name: str,
    dtype: str,
    names: tuple[str, ...],
    *targets: Target,
    plain: bool = False,
    shape: tuple[int, int] | None = None,
) -> Spec:
    """Return a case of nested absmax, or of a plain one."""
    problem = Problem("nf4_quantize", "", None, 4096, 4096, None, dtype, "forward")
    of = dict(PROVIDERS)
    if plain:
        ours, theirs = quantizers(double_quant=False)
        of = {OURS: ours, CUDA: on_backend("cuda", ours), BNB: theirs}
        of[TORCH] = on_backend("reference", ours)
    peers = {name: of[name] for name in names}
    return spec_of(f"nf4/quantize{name}", problem, peers, *targets, judge=names[-1], shape=shape)


TWO = (OURS, BNB)
SPECS = [
    dequantized("/bf16/new-output", BF16, TWO),
    dequantized("/bf16/into-out", BF16, TWO, Target(BNB, 6.0), Target(COPY, 0.7)),
    dequantized("/fp32/into-out", FP32, TWO),
    quantized("/bf16", BF16, TWO, Target(BNB, 20.0)),
    quantized("/fp32", FP32, TWO, Target(BNB, 20.0)),
]


def gpu_specs(device: torch.device) -> list[Spec]:
    """Return the cases, those with a target first; without bitsandbytes torch is the judge."""
    has_cuda = device.type == "cuda" and refusal_device(device) is None
    peer = BNB if bitsandbytes_missing(device) is None else TORCH
    ours = (OURS, CUDA) if has_cuda else (OURS,)
    wide, square = (14336, 4096), (4096, 4096)
    names, label = (*ours, peer), "-14336x4096"
    targets = (Target(COPY, 0.85), *([Target(BNB, 2.0)] if peer == BNB else []))
    return [
        dequantized(f"{label}/bf16", BF16, names, *targets, shape=wide),
        dequantized("-4096x4096/bf16", BF16, names, shape=square),
        dequantized(f"{label}/fp32", FP32, names, shape=wide),
        # No kernel for a GPU takes the absmax of absmax: it is not interpreted, nor CUDA's alone.
        *(
            [quantized(f"{label}/bf16", BF16, (OURS, peer), shape=wide)]
            if device.type == "cuda"
            else []
        ),
        quantized(f"-plain{label}/bf16", BF16, names, plain=True, shape=wide),
    ]


test_nf4 = benchmark_test(SPECS)

if __name__ == "__main__":
    sys.exit(main("nf4", SPECS, gpu_specs))
