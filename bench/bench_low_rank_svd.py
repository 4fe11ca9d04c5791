"""SVD of 224 low-rank updates, the adapters of a LLaMA-7B, against torch's ways to compute it.

The composition is QR of both factors, SVD of the r x r product, and two products, on tensors that
were stacked beforehand: batched, which needs layers of one shape; `from-lists` stacks them, too. In
the case `out` both write to tensors that they are given, and no page of memory is new.
The dense SVD of one update is timed once and its time multiplied by the number of layers.

Counted at 4096x4096 and r=16: factors of 117 MB, read once, and vectors of 117 MB, written once
(ours reads the factors twice). float64 FLOPs: r^2 per row for the Gram matrix, whose other half is
mirrored, and 2 r^2 to rotate; they count twice, as float64 has half the rate of float32.

On a GPU there are two more peers: the composition whose cores go to cuSOLVER's `gesvda` instead of
`gesvdj`, and one of float32 Gram matrices and batched eigh, which is right for the well-conditioned
factors here and not for others. "peftkern cuda" is the CUDA back end, where it is built. The cases
`cores` time the small SVD alone, in float64, beside torch.linalg.svd with both drivers and an eigh
of the cores' Gram matrices, which squares their condition number.

python bench/bench_low_rank_svd.py [--device cuda] [--only r16] [--seconds 2]
"""

from __future__ import annotations

import functools
import sys

import torch
from specs import Case, Options, Spec, Target, Variant, of_problem
from suite import benchmark_test, main
from torch import Tensor

from peftkern.backends.cuda.low_rank_svd import JACOBI_SWEEPS, jacobi_svd
from peftkern.backends.cuda.module import refusal_device
from peftkern.backends.device import triton_interpreted
from peftkern.functional.low_rank_svd import low_rank_svd as ours_out
from peftkern.tools.bench.adalora import ADDRESSES
from peftkern.tools.bench.base_layers import Layer, Tensors
from peftkern.tools.bench.cases import Problem
from peftkern.tools.bench.low_rank_svd import SVD as Parts
from peftkern.tools.bench.low_rank_svd import WAITS, build_by, composition, named
from peftkern.tools.bench.providers import on_backend
from peftkern.tools.bench.record import OURS

LAYERS = 224
STACKED, LISTS = "torch QR+QR+SVD, stacked", "torch QR+QR+SVD, from lists"
GESVDA, EIGH = "torch QR+QR+gesvda, stacked", "torch Gram+eigh, stacked"
CUDA = "peftkern cuda"
SVD, SVD_GESVDA, GRAM_EIGH = "torch.linalg.svd", "torch.linalg.svd, gesvda", "torch Gram+eigh"
DENSE = f"dense torch SVD, one x {LAYERS}"


def gram_composition(B: Tensor, A: Tensor, vectors: bool) -> tuple[Tensor | None, ...]:
    """Compute the SVD from square roots of both Gram matrices and eigh of the Gram of their core.

    This squares the condition number twice: the fastest that batched operators can do.
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


def gesvda(B: Tensor, A: Tensor, vectors: bool) -> Parts:
    driver = "gesvda" if B.is_cuda else None  # torch has it on a GPU alone
    return composition(B, A, vectors, driver)


def from_lists(B: list[Tensor], A: list[Tensor], vectors: bool) -> Parts:
    return composition(torch.stack(B), torch.stack(A), vectors)


def composition_out(B: Tensor, A: Tensor, out: list[Tensor]) -> Parts:
    """Compose the SVD in the memory that `room` has made."""
    Q_B, R_B, Q_A, R_A, core, left, S, right, U, Vh = out
    torch.linalg.qr(B, out=(Q_B, R_B))
    torch.linalg.qr(A.mT, out=(Q_A, R_A))
    torch.matmul(R_B, R_A.mT, out=core)
    torch.linalg.svd(core, out=(left, S, right))
    torch.matmul(Q_B, left, out=U)
    torch.matmul(right, Q_A.mT, out=Vh)
    return U, S, Vh


def room(B: Tensor, A: Tensor) -> list[Tensor]:
    (layers, m, r), n = B.shape, A.shape[2]
    small = (r, r)
    shapes = ((m, r), small, (n, r), small, small, small, (r,), small, (m, r), (r, n))
    return [B.new_zeros(layers, *shape) for shape in shapes]


def into_out(problem: Problem, tensors: Tensors, copies: int, ours: bool) -> list[Layer]:
    """Build SVDs with results in given memory: peftkern's, or the composition."""

    def layer() -> Layer:
        B, A = tensors["B"].clone(), tensors["A"].clone()
        call = functools.partial(composition_out, B, A, room(B, A))
        if ours:
            B, A = list(B.unbind()), list(A.unbind())
            call = functools.partial(ours_out, B, A, out=ours_out(B, A))
        why = ADDRESSES if ours else WAITS
        return Layer(call, collect=lambda svd: named(problem, svd), no_graph=why)

    return [layer() for _ in range(copies)]


def dense_svd(problem: Problem, tensors: Tensors, copies: int) -> list[Layer]:
    """Build the SVD of the first layer's update as a whole."""
    update, r = tensors["B"][0] @ tensors["A"][0], problem.r

    def run() -> Parts:
        U, S, Vh = torch.linalg.svd(update, full_matrices=False)
        return U[None, :, :r], S[None, :r], Vh[None, :r]

    return [Layer(run, collect=lambda svd: named(problem, svd), multiplied=LAYERS)]


PROVIDERS = {
    OURS: "peftkern",
    CUDA: on_backend("cuda"),
    STACKED: "composed",
    LISTS: build_by(from_lists, WAITS, lists=True),
    GESVDA: build_by(gesvda, WAITS),
    EIGH: build_by(gram_composition, WAITS),
    DENSE: dense_svd,
}


# With results in memory that was there before, which torch's ways can do, too.
INTO_OUT = {OURS: functools.partial(into_out, ours=True)}
INTO_OUT |= {STACKED: functools.partial(into_out, ours=False)}


def build(
    options: Options, r: int, vectors: bool, names: tuple[str, ...], into_out: bool = False
) -> Case:
    layers = LAYERS
    if triton_interpreted():  # which takes seconds for each layer, minutes for large ranks
        layers, r = 2, min(r, 4)
    op = "low_rank_svd" if vectors else "low_rank_svdvals"
    problem = Problem(op, "", layers, options.n, options.k, r, "float32", "forward")
    providers = INTO_OUT if into_out else PROVIDERS
    return of_problem(options, problem, {name: providers[name] for name in names})


def build_cores(options: Options, r: int, names: tuple[str, ...]) -> Case:
    """Build SVDs of [LAYERS, r, r]. The floor counts bytes alone: the number of sweeps varies."""
    torch.manual_seed(0)
    size = 8 * LAYERS * r * r  # of the cores; both vectors are written
    pool = [
        torch.randn(LAYERS, r, r, dtype=torch.float64, device=options.device)
        for _ in range(options.copies(size))
    ]
    dense = torch.linalg.svdvals(pool[0].cpu()).to(options.device)
    oracle = (dense, pool[0])

    def ours(i: int) -> tuple:
        return jacobi_svd(pool[i % len(pool)], JACOBI_SWEEPS, True)[:3]

    def torch_svd(i: int, driver: str | None = None) -> tuple:
        U, S, Vh = torch.linalg.svd(pool[i % len(pool)], driver=driver)
        return S, U, Vh.mT

    def gram_eigh(i: int) -> tuple:
        cores = pool[i % len(pool)]
        values, V = torch.linalg.eigh(cores.mT @ cores)
        S, V = values.clamp(min=1e-300).sqrt().flip(-1), V.flip(-1)
        return S, (cores @ V) / S[:, None, :], V

    def result(svd: tuple) -> tuple[Tensor, Tensor]:
        S, left, right = svd
        return S, left * S[:, None, :] @ right.mT

    calls = {
        OURS: ours,
        SVD: torch_svd,
        SVD_GESVDA: lambda i: torch_svd(i, "gesvda"),
        GRAM_EIGH: gram_eigh,
    }
    variants = {
        name: Variant(calls[name], oracle, result, no_graph=None if name == OURS else WAITS)
        for name in names
    }
    return Case(variants, 3 * size, 0, torch.float64)


def spec(
    r: int,
    vectors: bool,
    *targets: Target,
    names: tuple[str, ...],
    into_out: bool = False,
    **more,
) -> Spec:
    kind = "-out" if into_out else "" if vectors else "-values"
    label = f"low_rank_svd/{LAYERS}-layers-r{r}{kind}/fp32"
    build_it = functools.partial(build, r=r, vectors=vectors, names=names, into_out=into_out)
    return Spec(label, build_it, names, STACKED, targets, **more)


THREE = (OURS, STACKED, LISTS)
SPECS = [
    spec(16, True, Target(STACKED, 5.0), Target(DENSE, 1000.0), names=(*THREE, DENSE)),
    spec(16, True, Target(STACKED, 5.0), names=(OURS, STACKED), into_out=True),
    spec(64, True, Target(STACKED, 1.0), names=THREE),
    spec(16, False, names=THREE),
]


def gpu_specs(device: torch.device) -> list[Spec]:
    has_cuda = device.type == "cuda" and refusal_device(device) is None
    names = (OURS, *([CUDA] if has_cuda else []), STACKED, LISTS, GESVDA, EIGH)

    def core_spec(r: int, at_least: float) -> Spec:
        peers = (SVD, SVD_GESVDA, GRAM_EIGH)
        targets = tuple(Target(peer, at_least) for peer in peers)
        name = f"low_rank_svd/{LAYERS}-cores-r{r}/fp64"
        variants = (OURS, *peers)
        return Spec(name, lambda o: build_cores(o, r, variants), variants, SVD, targets)

    def gpu_spec(r: int, vectors: bool, *targets: Target) -> Spec:
        return spec(r, vectors, *targets, names=names, shape=(4096, 4096))

    return [
        gpu_spec(16, True, Target(STACKED, 20.0)),
        gpu_spec(64, True, Target(STACKED, 5.0)),
        gpu_spec(16, False),
        *([core_spec(16, 5.0), core_spec(64, 2.0), core_spec(128, 1.0)] if has_cuda else []),
        *([gpu_spec(128, True, Target(STACKED, 1.0))] if has_cuda else []),
    ]


test_low_rank_svd = benchmark_test(SPECS)

if __name__ == "__main__":
    sys.exit(main("low_rank_svd", SPECS, gpu_specs))
