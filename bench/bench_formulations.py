"""Formulations of a layer with an adapter on a GPU, compared before a kernel is written for one.

`update-...`: base-first is F.linear, then addmm of the update; skinny-first writes the update, and
the base product adds into it (beta = 1); bordered is one product over [x | S] and [W | sB], whose
inner dimension is 64 longer, with buffers that are concatenated already. All get S for free.
`skinny-...`: x @ A.T, which reads x once and does next to nothing else: its share of the floor is
the share of the copy bandwidth that it reaches. Ours runs with sixteen outputs, as it has to write
some.
`product-...`: a dense product alone, by the Triton kernels of triton_gemm.py beside cuBLAS. Ours is
the persistent one with TMA descriptors: cuBLAS's ratio is the share of cuBLAS that it reaches.
`lut`: NF4 weights decoded per clock and SM by each kind of lookup table (lut.py, lut.cu), where
there is an nvcc.

python bench/bench_formulations.py --device cuda [--only skinny]
"""

from __future__ import annotations

import sys

import lut
import torch
import torch.nn.functional as F
from specs import Case, Options, Question, Spec, Variant
from suite import main

import peftkern
from peftkern.tools.bench.record import OURS

BASE_FIRST, SKINNY_FIRST = "base-first", "skinny-first"
BORDERED, DENSE = "bordered", "dense"
SKINNY = "x @ A.T"
CUBLAS, SQUARE = "cuBLAS", "TMA, 128x128"
POINTERS, SQUARE_POINTERS = "pointers, 128x256", "pointers, 128x128"
BORDER = 64
BF16 = torch.bfloat16


def randn(options: Options, *shape: int, scale: float = 1.0) -> torch.Tensor:
    return (torch.randn(shape, device=options.device) * scale).to(BF16)


def update(options: Options, rows: int, r: int) -> Case:
    torch.manual_seed(0)
    m, n, k = options.m(rows), options.n, options.k
    copies = options.copies(2 * (n * k + m * k))
    weights = [randn(options, n, k, scale=k**-0.5)] * copies
    weights = [weight.clone() for weight in weights]
    xs = [randn(options, m, k)] * copies
    a, b = randn(options, r, k, scale=k**-0.5), randn(options, n, r, scale=0.1)
    xs = [x.clone() for x in xs]
    s = F.linear(xs[0], a)
    borders = (F.pad(s, (0, BORDER - r)), F.pad(b, (0, BORDER - r)))
    wide_xs = [torch.cat((x, borders[0]), 1) for x in xs]
    wide_weights = [torch.cat((weight, borders[1]), 1) for weight in weights]
    base = xs[0].double() @ weights[0].double().T
    exact = base + xs[0].double() @ a.double().T @ b.double().T
    given = base + s.double() @ b.double().T

    @torch.no_grad()
    def ours(i: int) -> torch.Tensor:
        return peftkern.lora_linear(xs[i % copies], weights[i % copies], a, b, scaling=1.0)

    def base_first(i: int) -> torch.Tensor:
        return F.linear(xs[i % copies], weights[i % copies]).addmm_(s, b.t())

    def skinny_first(i: int) -> torch.Tensor:
        return F.linear(s, b).addmm_(xs[i % copies], weights[i % copies].t())

    variants = {
        OURS: Variant(ours, (exact,)),
        BASE_FIRST: Variant(base_first, (given,)),
        SKINNY_FIRST: Variant(skinny_first, (given,)),
        BORDERED: Variant(
            lambda i: F.linear(wide_xs[i % copies], wide_weights[i % copies]), (given,)
        ),
        DENSE: Variant(lambda i: F.linear(xs[i % copies], weights[i % copies]), (base,)),
    }
    traffic = 2 * (n * k + m * (n + k))
    return Case(variants, traffic, 2 * m * (n * k + r * (n + k)), BF16)


def skinny(options: Options, rows: int, r: int) -> Case:
    torch.manual_seed(0)
    m, k, n = options.m(rows), options.k, 16
    copies = options.copies(2 * m * k)
    x = randn(options, m, k)
    xs = [x.clone() for _ in range(copies)]
    a, b = randn(options, r, k, scale=k**-0.5), randn(options, n, r, scale=0.1)
    weight = torch.zeros(n, k, dtype=BF16, device=options.device)
    s = x.double() @ a.double().T

    def ours(i: int) -> torch.Tensor:
        args = (xs[i % copies], weight, a, b, None, 1.0, None, 0.0)
        return peftkern.backends.ops.lora_linear_forward(*args)[1]

    variants = {
        OURS: Variant(ours, (s,)),
        SKINNY: Variant(lambda i: F.linear(xs[i % copies], a), (s,)),
    }
    return Case(variants, 2 * m * k, 2 * m * k * r, BF16)


def product(options: Options, rows: int) -> Case:
    """Build a dense product: OURS is triton_gemm's best guess; its other tile and the kernel
    without TMA are peers."""
    import triton_gemm as gemm  # imports Triton, which a CPU may lack

    torch.manual_seed(0)
    m, n, k = options.m(rows), options.n, options.k
    copies = options.copies(2 * (n * k + m * k))
    xs = [randn(options, m, k) for _ in range(copies)]
    weights = [randn(options, n, k, scale=k**-0.5) for _ in range(copies)]
    exact = (xs[0].double() @ weights[0].double().T,)

    def triton(run, tile) -> Variant:
        return Variant(lambda i: run(xs[i % copies], weights[i % copies], tile), exact)

    variants = {
        OURS: triton(gemm.descriptors, gemm.WIDE),
        SQUARE: triton(gemm.descriptors, gemm.SQUARE),
        POINTERS: triton(gemm.pointers, gemm.WIDE),
        SQUARE_POINTERS: triton(gemm.pointers, gemm.SQUARE),
        CUBLAS: Variant(lambda i: F.linear(xs[i % copies], weights[i % copies]), exact),
    }
    return Case(variants, 2 * (n * k + m * (n + k)), 2 * m * n * k, BF16)


def gpu_specs(device: torch.device) -> list[Spec | Question]:
    names, two = (OURS, BASE_FIRST, SKINNY_FIRST, BORDERED, DENSE), (OURS, SKINNY)
    updates = [
        Spec(
            f"formulations/update-r{r}-M{m}-{n}x4096/bf16",
            lambda options, m=m, r=r: update(options, m, r),
            names,
            BASE_FIRST,
            shape=(n, 4096),
        )
        for m, n, r in ((8192, 4096, 16), (8192, 14336, 16), (8192, 4096, 64), (512, 4096, 16))
    ]
    reads = [
        Spec(
            f"formulations/skinny-r{r}-M8192-K{k}/bf16",
            lambda options, r=r: skinny(options, 8192, r),
            two,
            SKINNY,
            shape=(16, k),
        )
        for r, k in ((16, 4096), (64, 4096), (16, 14336))
    ]
    products = [
        Spec(
            f"formulations/product-M{m}-{n}x{k}/bf16",
            lambda options, m=m: product(options, m),
            (OURS, SQUARE, POINTERS, SQUARE_POINTERS, CUBLAS),
            CUBLAS,
            shape=(n, k),
        )
        for m, n, k in ((4096, 4096, 4096), (8192, 4096, 4096), (8192, 4096, 14336))
    ]
    tables = Question("formulations/lut/bf16", lut.ask)
    return [updates[0], *reads[:2], *products, tables, *updates[1:], *reads[2:]]


if __name__ == "__main__":
    sys.exit(main("formulations", [], gpu_specs))
