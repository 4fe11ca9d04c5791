"""Truncated SVD of a weight of decaying spectrum, PiSSA's, beside torch's ways to compute it.

The singular values are i^-0.5, about what weights of language models have. The error column is what
`TruncatedSVD.excess` estimates, the error of the approximation over that of the best one of its
rank, minus 1; as "max" the largest relative error of a singular value. The best one follows from
the planted spectrum, and after rounding to bf16 or NF4 from 12 sweeps over the decoded weight.

"niter_4" and "niter_16" are PEFT's: torch.svd_lowrank without columns beyond the rank, of a weight
in float32, to which bf16 is converted and NF4 decoded first. The dense SVD is timed once.

Counted are 5 sweeps of two products with 24 columns, and as many reads of the weight.

python bench/bench_truncated_svd.py [--device cuda] [--only fp32] [--seconds 2]
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable

import torch
from specs import Case, Options, Spec, Target, Variant
from suite import benchmark_test, main
from torch import Tensor

from peftkern.formats.nf4 import NF4Weight
from peftkern.functional.nf4 import dequantize_nf4, quantize_nf4
from peftkern.functional.truncated_svd import truncated_svd
from peftkern.tools.bench.record import OURS

TOL = 1e-5
SWEEPS = 5  # that TOL needs at r=16
CERTIFIED, FLOAT32 = "peftkern, certified", "peftkern, float32 weight"
SVD, NITER_4, NITER_16 = "dense torch SVD, one x 1", "torch niter_4", "torch niter_16"
PARTS = tuple[Tensor, Tensor, Tensor]


@functools.cache
def planted(m: int, n: int) -> tuple[Tensor, Tensor]:
    """Return a float32 weight [m, n] on the CPU and its singular values in float64."""
    generator, k = torch.Generator().manual_seed(0), min(m, n)
    U, V = (
        torch.linalg.qr(torch.randn(rows, k, generator=generator, dtype=torch.float32))[0]
        for rows in (m, n)
    )
    sigma = torch.arange(1, k + 1, dtype=torch.float64) ** -0.5
    return (U * sigma.float()) @ V.T, sigma


def ours(weight: Tensor | NF4Weight, r: int, certify: bool = False) -> PARTS:
    return truncated_svd(weight, r, tol=TOL, certify=certify)[:3]


def randomized(weight: Tensor | NF4Weight, r: int, niter: int) -> PARTS:
    if isinstance(weight, NF4Weight):
        weight = dequantize_nf4(weight, torch.float32)
    U, S, V = torch.svd_lowrank(weight.float(), q=r, niter=niter)
    return U, S, V.T


def dense(weight: Tensor, r: int) -> PARTS:
    U, S, Vh = torch.linalg.svd(weight, full_matrices=False)
    return U[:, :r], S[:r], Vh[:r]


CALLS: dict[str, Callable[..., PARTS]] = {
    OURS: ours,
    CERTIFIED: functools.partial(ours, certify=True),
    FLOAT32: ours,
    SVD: dense,
    NITER_4: functools.partial(randomized, niter=4),
    NITER_16: functools.partial(randomized, niter=16),
}


def build(options: Options, kind: str, names: tuple[str, ...]) -> Case:
    m, n = options.n, options.k
    r = min(options.r, m, n)
    values, sigma = planted(m, n)
    values = values.to(options.device)
    weight = {"fp32": values, "bf16": values.bfloat16()}.get(kind)
    exact, size = values, values.numel() * 4
    if kind == "nf4":
        weight = quantize_nf4(values)
        exact, size = dequantize_nf4(weight, torch.float32), weight.nbytes
    elif kind == "bf16":
        exact, size = weight.float(), weight.numel() * 2
    squared = exact.double().square().sum().item()
    top = sigma[:r].to(options.device)
    if kind != "fp32":
        top = truncated_svd(exact, r, sweeps=12).S.double()
    least = (squared - top.square().sum().item()) ** 0.5

    def errors(found: PARTS) -> tuple[float, float]:
        U, S, Vh = (part.double() for part in found)
        error = torch.linalg.vector_norm(exact.double() - (U * S) @ Vh).item()
        return abs(error / least - 1), ((S - top).abs() / top).amax().item()

    copies = options.copies(size)
    pool = (
        [weight] * copies
        if isinstance(weight, NF4Weight)
        else [weight.clone() for _ in range(copies)]
    )

    def variant(name: str) -> Variant:
        inputs = [values] * copies if name == FLOAT32 else pool
        return Variant(
            lambda i: CALLS[name](inputs[i % copies], r),
            errors=None if name == FLOAT32 else errors,
            multiplied=int(name == SVD),
            no_graph="the host reads when to stop",
        )

    flops = SWEEPS * 4 * m * n * (r + 8)
    variants = {name: variant(name) for name in names}
    return Case(variants, SWEEPS * size, flops, torch.float32)


def spec(kind: str, names: tuple[str, ...], *targets: Target) -> Spec:
    label, build_it = f"truncated_svd/r16/{kind}", functools.partial(build, kind=kind, names=names)
    return Spec(label, build_it, names, NITER_16, targets)


SPECS = [
    spec(
        "fp32",
        (OURS, CERTIFIED, SVD, NITER_4, NITER_16),
        Target(SVD, 50.0),
        Target(NITER_16, 2.0),
    ),
    spec("bf16", (OURS, NITER_16), Target(NITER_16, 2.0)),
    spec("nf4", (OURS, FLOAT32, NITER_16), Target(NITER_16, 2.0), Target(FLOAT32, 1 / 1.2)),
]

test_truncated_svd = benchmark_test(SPECS)

if __name__ == "__main__":
    sys.exit(main("truncated_svd", SPECS, lambda device: SPECS))
