"""SVD of 224 low-rank updates, the adapters of a LLaMA-7B, beside torch's ways to get it.

The composition is QR of both factors, SVD of the r x r product, and two products, on tensors that
were stacked beforehand: batched, which needs layers of one shape; `from-lists` stacks them, too.
The dense SVD of one update is timed once and its time multiplied by the number of layers.

Counted at 4096x4096 and r=16: factors of 117 MB, read once, and vectors of 117 MB, written once
(ours reads the factors twice). float64 FLOPs: r^2 per row for the Gram matrix, whose other half is
mirrored, and 2 r^2 to rotate; they count twice, as float64 has half the rate of float32.

On a GPU there are two more peers: the composition whose cores go to cuSOLVER's `gesvda` instead of
`gesvdj`, and one of float32 Gram matrices and batched eigh, which is right for the well-conditioned
factors here and not for others.

python bench/bench_low_rank_svd.py [--device cuda] [--only r16] [--seconds 2]
"""

from __future__ import annotations

import sys

import pytest
import torch
from torch import Tensor

from peftkern.benchmark.suite import (
    OURS,
    Case,
    Options,
    Spec,
    Target,
    Variant,
    benchmark_ids,
    main,
    run_benchmark,
)
from peftkern.device import triton_interpreted
from peftkern.low_rank_svd import low_rank_svd, low_rank_svdvals

LAYERS = 224
STACKED, LISTS = "torch QR+QR+SVD, stacked", "torch QR+QR+SVD, from lists"
GESVDA, EIGH = "torch QR+QR+gesvda, stacked", "torch Gram+eigh, stacked"
DENSE = f"dense torch SVD, one x {LAYERS}"
Factors = tuple[list[Tensor], list[Tensor]]


def composition(
    B: Tensor, A: Tensor, vectors: bool, driver: str | None = None
) -> tuple[Tensor | None, ...]:
    if not vectors:
        R_B, R_A = torch.linalg.qr(B, mode="r")[1], torch.linalg.qr(A.mT, mode="r")[1]
        return None, torch.linalg.svdvals(R_B @ R_A.mT, driver=driver), None
    (Q_B, R_B), (Q_A, R_A) = torch.linalg.qr(B), torch.linalg.qr(A.mT)
    U, S, Vh = torch.linalg.svd(R_B @ R_A.mT, driver=driver)
    return Q_B @ U, S, Vh @ Q_A.mT


def gram_composition(B: Tensor, A: Tensor, vectors: bool) -> tuple[Tensor | None, ...]:
    """Square roots of both Gram matrices, the core between them, and eigh of that core's Gram.

    It squares the condition number twice: what the fastest batched operators can do, and no more.
    """
    lambda_B, P_B = torch.linalg.eigh(B.mT @ B)
    lambda_A, P_A = torch.linalg.eigh(A @ A.mT)
    root_B, root_A = (t.clamp(min=1e-30).sqrt()[:, None, :] for t in (lambda_B, lambda_A))
    core = (P_B * root_B).mT @ (P_A * root_A)
    values, V = torch.linalg.eigh(core.mT @ core)
    S, V = values.clamp(min=1e-30).sqrt().flip(-1), V.flip(-1)
    if not vectors:
        return None, S, None
    U = (core @ V) / S[:, None, :]
    return B @ ((P_B / root_B) @ U), S, ((P_A / root_A) @ V).mT @ A


def first_layer(svd: tuple, vectors: bool) -> tuple[Tensor, ...]:
    """What is compared: the singular values of layer 0 and, with vectors, the update itself."""
    U, S, Vh = svd[:3]
    if not vectors:
        return (S[0],)
    return S[0], (U[0].double() * S[0].double()) @ Vh[0].double()


def build(options: Options, r: int, vectors: bool, names: tuple[str, ...]) -> Case:
    torch.manual_seed(0)
    layers = LAYERS
    if triton_interpreted():  # which takes seconds for each layer, minutes for large ranks
        layers, r = 2, min(r, 4)
    on_device = {"device": options.device}
    size = 4 * layers * r * (options.n + options.k)
    pool: list[Factors] = [
        (
            [torch.randn(options.n, r, **on_device) for _ in range(layers)],
            [torch.randn(r, options.k, **on_device) / options.k**0.5 for _ in range(layers)],
        )
        for _ in range(options.copies(size))
    ]
    stacks = [(torch.stack(B), torch.stack(A)) for B, A in pool]
    update = pool[0][0][0].double() @ pool[0][1][0].double()
    sigma = composition(pool[0][0][0].double(), pool[0][1][0].double(), vectors=False)[1]
    oracle = (sigma, update) if vectors else (sigma,)
    driver = "gesvda" if options.device.type == "cuda" else None  # which torch has nowhere else

    def ours(i: int) -> tuple:
        if options.device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            raise RuntimeError("a graph would read addresses from host memory that torch reuses")
        B, A = pool[i % len(pool)]
        return low_rank_svd(B, A) if vectors else (None, low_rank_svdvals(B, A), None)

    def from_lists(i: int) -> tuple:
        B, A = pool[i % len(pool)]
        return composition(torch.stack(B), torch.stack(A), vectors)

    def dense_svd(i: int) -> tuple:
        U, S, Vh = torch.linalg.svd(update.float(), full_matrices=False)
        return U[None, :, :r], S[None, :r], Vh[None, :r]

    calls = {
        OURS: ours,
        STACKED: lambda i: composition(*stacks[i % len(pool)], vectors),
        LISTS: from_lists,
        GESVDA: lambda i: composition(*stacks[i % len(pool)], vectors, driver),
        EIGH: lambda i: gram_composition(*stacks[i % len(pool)], vectors),
        DENSE: dense_svd,
    }

    def result(svd: tuple) -> tuple[Tensor, ...]:
        return first_layer(svd, vectors)

    variants = {
        name: Variant(calls[name], oracle, result, multiplied=LAYERS if name == DENSE else 0)
        for name in names
    }
    flops = 2 * (3 if vectors else 1) * layers * r * r * (options.n + options.k)
    return Case(variants, size * (2 if vectors else 1), flops, torch.float32)


def spec(name: str, r: int, vectors: bool, *targets: Target, dense: bool = False) -> Spec:
    names = (OURS, STACKED, LISTS, *([DENSE] if dense else []))
    return Spec(name, lambda o: build(o, r, vectors, names), names, STACKED, targets)


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


def gpu_specs(device: torch.device) -> list[Spec]:
    names = (OURS, STACKED, LISTS, GESVDA, EIGH)

    def gpu_spec(r: int, vectors: bool, *targets: Target) -> Spec:
        return Spec(
            f"low_rank_svd/{LAYERS}-layers-r{r}{'' if vectors else '-values'}/fp32",
            lambda o: build(o, r, vectors, names),
            names,
            STACKED,
            targets,
            shape=(4096, 4096),
        )

    return [
        gpu_spec(16, True, Target(STACKED, 20.0)),
        gpu_spec(64, True, Target(STACKED, 5.0)),
        gpu_spec(16, False),
    ]


@pytest.mark.parametrize(("spec", "name"), benchmark_ids(SPECS))
def test_low_rank_svd(benchmark, spec: Spec, name: str, options: Options) -> None:
    run_benchmark(benchmark, spec, name, options)


if __name__ == "__main__":
    sys.exit(main("low_rank_svd", SPECS, gpu_specs))
