"""RoSA's sparse products against the dense ones that they stand for, over the density of the mask.

`sddmm`: the gradient of the values, dy.T @ x at the mask's places alone; `dense dW` makes all of it
and gathers. `forward`: y = x (W + S).T; `dense W + S` writes the sum for each call, as the values
have changed since the last, and multiplies once; `torch.sparse` adds a CSR product to x W.T. Where
the ratio falls below 1 lies the density from which on the dense way is the faster one.

python bench/bench_rosa.py [--device cuda] [--only sddmm] [--seconds 2]
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from peftkern import ops
from peftkern.benchmark.suite import (
    OURS,
    Case,
    Options,
    Spec,
    Variant,
    benchmark_ids,
    main,
    run_benchmark,
)
from peftkern.sparse import SparseMask

DENSE_DW, DENSE_SUM, TORCH_SPARSE = "dense dW", "dense W + S", "torch.sparse"
BF16, FP32 = torch.bfloat16, torch.float32
DENSITIES = (0.001, 0.01, 0.05, 0.2)


@dataclass(frozen=True)
class Work:
    m: int
    dtype: torch.dtype
    density: float


@dataclass(frozen=True)
class Inputs:
    """Copies enough to leave the caches, and one mask and its values."""

    x: list[Tensor]
    dy: list[Tensor]
    mask: SparseMask
    values: Tensor

    @classmethod
    def drawn(cls, options: Options, work: Work) -> Inputs:
        torch.manual_seed(0)
        n, k, m, device = options.n, options.k, options.m(work.m), options.device
        flat = torch.randperm(n * k)[: max(1, round(work.density * n * k))].to(device)
        mask = SparseMask.from_indices(flat // k, flat % k, (n, k))
        x, dy = (torch.randn(m, size, device=device).to(work.dtype) for size in (k, n))
        copies = options.copies(x.nbytes + dy.nbytes)
        values = torch.randn(mask.nnz, device=device) / 4
        return cls(
            [x.clone() for _ in range(copies)], [dy.clone() for _ in range(copies)], mask, values
        )

    def call(self, function: Callable[[Tensor, Tensor], Tensor]) -> Callable[[int], Tensor]:
        return lambda i: function(self.x[i % len(self.x)], self.dy[i % len(self.dy)])


def build_sddmm(options: Options, work: Work) -> Case:
    inputs = Inputs.drawn(options, work)
    mask, flat = inputs.mask, inputs.mask.flat()
    x, dy = inputs.x[0], inputs.dy[0]
    oracle = ((dy.double().T @ x.double()).view(-1)[flat],)
    functions = {
        OURS: lambda x, dy: ops.rosa_sddmm(dy, x, mask.crow, mask.col),
        DENSE_DW: lambda x, dy: (dy.T @ x).view(-1)[flat],
    }
    variants = {name: Variant(inputs.call(f), oracle) for name, f in functions.items()}
    return Case(variants, x.nbytes + dy.nbytes + 8 * mask.nnz, 2 * len(x) * mask.nnz, work.dtype)


def build_forward(options: Options, work: Work, names: tuple[str, ...]) -> Case:
    inputs = Inputs.drawn(options, work)
    mask, values, flat = inputs.mask, inputs.values, inputs.mask.flat()
    n, k, x = options.n, options.k, inputs.x[0]
    weight = (torch.randn(n, k, device=x.device) / k**0.5).to(work.dtype)
    oracle = (x.double() @ (weight.double() + mask.to_dense(values).double()).T,)

    def ours(x: Tensor, _: Tensor) -> Tensor:
        y = F.linear(x, weight)
        ops.rosa_spmm_(y, x, values, mask.crow, mask.col, None)
        return y

    def dense_sum(x: Tensor, _: Tensor) -> Tensor:
        total = weight.clone()
        total.view(-1)[flat] += values.to(weight.dtype)
        return F.linear(x, total)

    def torch_sparse(x: Tensor, _: Tensor) -> Tensor:
        S = torch.sparse_csr_tensor(mask.crow, mask.col, values, mask.shape)
        return F.linear(x, weight) + (S @ x.T).T

    functions = {OURS: ours, DENSE_SUM: dense_sum, TORCH_SPARSE: torch_sparse}
    variants = {name: Variant(inputs.call(functions[name]), oracle) for name in names}
    traffic = weight.nbytes + x.nbytes + inputs.dy[0].nbytes + 8 * mask.nnz
    return Case(variants, traffic, 2 * len(x) * (n * k + mask.nnz), work.dtype)


def spec(kind: str, m: int, dtype: torch.dtype, density: float) -> Spec:
    label = f"rosa/{kind}-M{m}-{density:.1%}/{'bf16' if dtype is BF16 else 'fp32'}"
    work = Work(m, dtype, density)
    if kind == "sddmm":
        build, names = (lambda options: build_sddmm(options, work)), (OURS, DENSE_DW)
    else:  # torch.sparse has no product of bfloat16 on a CPU
        names = (OURS, DENSE_SUM, TORCH_SPARSE) if dtype is FP32 else (OURS, DENSE_SUM)
        build = lambda options: build_forward(options, work, names)  # noqa: E731
    return Spec(label, build, names, names[1])


SPECS = [
    *(spec("sddmm", 512, dtype, share) for dtype in (BF16, FP32) for share in DENSITIES),
    *(spec("forward", 512, dtype, share) for dtype in (BF16, FP32) for share in DENSITIES),
    spec("forward", 1, FP32, 0.01),
]


@pytest.mark.parametrize(("spec", "name"), benchmark_ids(SPECS))
def test_rosa(benchmark, spec: Spec, name: str, options: Options) -> None:
    run_benchmark(benchmark, spec, name, options)


if __name__ == "__main__":
    sys.exit(main("rosa", SPECS))
