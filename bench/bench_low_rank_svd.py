"""SVD of 224 low-rank updates, the adapters of a LLaMA-7B, beside torch's ways to get it.

The composition is QR of both factors, SVD of the r x r product, and two products, on tensors that
were stacked beforehand: batched, which needs layers of one shape; `from-lists` stacks them, too.
The dense SVD of one update is timed once and its time multiplied by the number of layers.

Counted at 4096x4096 and r=16: factors of 117 MB, read once, and vectors of 117 MB, written once
(ours reads the factors twice). float64 FLOPs: r^2 per row for the Gram matrix, whose other half is
mirrored, and 2 r^2 to rotate; they count twice, as float64 has half the rate of float32.

python bench/bench_low_rank_svd.py [--only r16] [--seconds 2]
"""

from __future__ import annotations

import sys

import pytest
import torch
from suite import OURS, Case, Options, Spec, Target, Variant, benchmark_ids, main, run_benchmark
from torch import Tensor

from peftkern.low_rank_svd import low_rank_svd, low_rank_svdvals

LAYERS = 224
STACKED, LISTS = "torch QR+QR+SVD, stacked", "torch QR+QR+SVD, from lists"
DENSE = f"dense torch SVD, one x {LAYERS}"
Factors = tuple[list[Tensor], list[Tensor]]


def composition(B: Tensor, A: Tensor, vectors: bool) -> tuple[Tensor | None, ...]:
    if not vectors:
        R_B, R_A = torch.linalg.qr(B, mode="r")[1], torch.linalg.qr(A.mT, mode="r")[1]
        return None, torch.linalg.svdvals(R_B @ R_A.mT), None
    (Q_B, R_B), (Q_A, R_A) = torch.linalg.qr(B), torch.linalg.qr(A.mT)
    U, S, Vh = torch.linalg.svd(R_B @ R_A.mT)
    return Q_B @ U, S, Vh @ Q_A.mT


def first_layer(svd: tuple, vectors: bool) -> tuple[Tensor, ...]:
    """What is compared: the singular values of layer 0 and, with vectors, the update itself."""
    U, S, Vh = svd[:3]
    if not vectors:
        return (S[0],)
    return S[0], (U[0].double() * S[0].double()) @ Vh[0].double()


def build(options: Options, r: int, vectors: bool, dense: bool) -> Case:
    torch.manual_seed(0)
    size = 4 * LAYERS * r * (options.n + options.k)
    pool: list[Factors] = [
        (
            [torch.randn(options.n, r) for _ in range(LAYERS)],
            [torch.randn(r, options.k) / options.k**0.5 for _ in range(LAYERS)],
        )
        for _ in range(options.copies(size))
    ]
    stacks = [(torch.stack(B), torch.stack(A)) for B, A in pool]
    update = pool[0][0][0].double() @ pool[0][1][0].double()
    sigma = composition(pool[0][0][0].double(), pool[0][1][0].double(), vectors=False)[1]
    oracle = (sigma, update) if vectors else (sigma,)

    def ours(i: int) -> tuple:
        B, A = pool[i % len(pool)]
        return low_rank_svd(B, A) if vectors else (None, low_rank_svdvals(B, A), None)

    def from_lists(i: int) -> tuple:
        B, A = pool[i % len(pool)]
        return composition(torch.stack(B), torch.stack(A), vectors)

    def result(svd: tuple) -> tuple[Tensor, ...]:
        return first_layer(svd, vectors)

    def dense_svd(i: int) -> tuple:
        U, S, Vh = torch.linalg.svd(update.float(), full_matrices=False)
        return U[None, :, :r], S[None, :r], Vh[None, :r]

    variants = {
        OURS: Variant(ours, oracle, result),
        STACKED: Variant(lambda i: composition(*stacks[i % len(pool)], vectors), oracle, result),
        LISTS: Variant(from_lists, oracle, result),
    }
    if dense:
        variants[DENSE] = Variant(dense_svd, oracle, result, multiplied=LAYERS)
    flops = 2 * (3 if vectors else 1) * LAYERS * r * r * (options.n + options.k)
    return Case(variants, size * (2 if vectors else 1), flops, torch.float32)


def spec(name: str, r: int, vectors: bool, *targets: Target, dense: bool = False) -> Spec:
    names = (OURS, STACKED, LISTS, *([DENSE] if dense else []))
    return Spec(name, lambda o: build(o, r, vectors, dense), names, STACKED, targets)


SPECS = [
    spec(
        "low_rank_svd/224-layers-r16/fp32",
        16,
        True,
        Target(STACKED, 5.0),
        Target(DENSE, 1000.0),
        dense=True,
    ),
    spec("low_rank_svd/224-layers-r64/fp32", 64, True, Target(STACKED, 1.0)),
    spec("low_rank_svd/224-layers-r16-values/fp32", 16, False),
]


@pytest.mark.parametrize(("spec", "name"), benchmark_ids(SPECS))
def test_low_rank_svd(benchmark, spec: Spec, name: str, options: Options) -> None:
    run_benchmark(benchmark, spec, name, options)


if __name__ == "__main__":
    sys.exit(main("low_rank_svd", SPECS))
