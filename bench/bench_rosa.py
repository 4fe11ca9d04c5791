"""RoSA's sparse products against the dense ones that they replace, over the density of the mask.

`sddmm`: the gradient of the values, dy.T @ x at the mask's places alone; `dense dW` makes all of it
and gathers. `forward`: y = x (W + S).T; `dense W + S` writes the sum for each call, as the values
have changed since the last, and multiplies once; `torch.sparse` adds a CSR product to x W.T, or
samples dy.T @ x. Where the ratio falls below 1 lies the density from which on the dense way is the
faster one. On a GPU `torch, in chunks` is the fallback without kernels: it synchronizes with the
host.

python bench/bench_rosa.py [--device cuda] [--only sddmm] [--seconds 2]
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from suite import OURS, Case, Options, Spec, Target, Variant, benchmark_test, main
from torch import Tensor

import peftkern
from peftkern.backends import ops
from peftkern.functional.rosa import SparseMask

DENSE_DW, DENSE_SUM, TORCH_SPARSE = "dense dW", "dense W + S", "torch.sparse"
IN_CHUNKS = "torch, in chunks"
BF16, FP32 = torch.bfloat16, torch.float32
DENSITIES = (0.001, 0.01, 0.05, 0.2)


@dataclass(frozen=True)
class Work:
    m: int
    dtype: torch.dtype
    density: float


@dataclass(frozen=True)
class Inputs:
    """Enough copies to exceed the caches, and one mask and its values."""

    x: list[Tensor]
    dy: list[Tensor]
    mask: SparseMask
    values: Tensor

    @classmethod
    def drawn(cls, options: Options, work: Work) -> Inputs:
        torch.manual_seed(0)
        n, k, m, device = options.n, options.k, options.m(work.m), options.device
        flat = torch.randperm(n * k, device=device)[: max(1, round(work.density * n * k))]
        mask = SparseMask.from_indices(flat // k, flat % k, (n, k))
        x, dy = (torch.randn(m, size, device=device).to(work.dtype) for size in (k, n))
        copies = options.copies(x.nbytes + dy.nbytes)
        values = torch.randn(mask.nnz, device=device) / 4
        return cls(
            [x.clone() for _ in range(copies)], [dy.clone() for _ in range(copies)], mask, values
        )

    def call(self, function: Callable[[Tensor, Tensor], Tensor]) -> Callable[[int], Tensor]:
        return lambda i: function(self.x[i % len(self.x)], self.dy[i % len(self.dy)])


def build_sddmm(options: Options, work: Work, names: tuple[str, ...]) -> Case:
    inputs = Inputs.drawn(options, work)
    mask, flat = inputs.mask, inputs.mask.flat()
    x, dy = inputs.x[0], inputs.dy[0]
    oracle = ((dy.double().T @ x.double()).view(-1)[flat],)

    def ours(x: Tensor, dy: Tensor) -> Tensor:
        return ops.rosa_sddmm(dy, x, mask.crow, mask.col)

    def sampled(x: Tensor, dy: Tensor) -> Tensor:
        S = torch.sparse_csr_tensor(mask.crow, mask.col, inputs.values, mask.shape)
        return torch.sparse.sampled_addmm(S, dy.T, x, beta=0.0).values()

    functions = {
        OURS: ours,
        DENSE_DW: lambda x, dy: (dy.T @ x).view(-1)[flat],
        TORCH_SPARSE: sampled,
        IN_CHUNKS: on_reference(ours),
    }
    variants = {name: Variant(inputs.call(functions[name]), oracle) for name in names}
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
        S = torch.sparse_csr_tensor(mask.crow, mask.col, values.to(x.dtype), mask.shape)
        return F.linear(x, weight) + (S @ x.T).T

    functions = {
        OURS: ours,
        DENSE_SUM: dense_sum,
        TORCH_SPARSE: torch_sparse,
        IN_CHUNKS: on_reference(ours),
    }
    variants = {name: Variant(inputs.call(functions[name]), oracle) for name in names}
    traffic = weight.nbytes + x.nbytes + inputs.dy[0].nbytes + 8 * mask.nnz
    return Case(variants, traffic, 2 * len(x) * (n * k + mask.nnz), work.dtype)


def on_reference(
    function: Callable[[Tensor, Tensor], Tensor],
) -> Callable[[Tensor, Tensor], Tensor]:
    def call(x: Tensor, dy: Tensor) -> Tensor:
        with peftkern.use_backend("reference"):
            return function(x, dy)

    return call


def spec(
    kind: str,
    m: int,
    dtype: torch.dtype,
    density: float,
    device: str = "cpu",
    targets: tuple[Target, ...] = (),
    more: tuple[str, ...] = (),
) -> Spec:
    label = f"rosa/{kind}-M{m}-{density:.1%}/{'bf16' if dtype is BF16 else 'fp32'}"
    work = Work(m, dtype, density)
    names = (OURS, DENSE_DW if kind == "sddmm" else DENSE_SUM)
    # torch.sparse has no product of bfloat16 on a CPU, and samples none of it anywhere.
    if kind == "forward" and (dtype is FP32 or device == "cuda"):
        names = (*names, TORCH_SPARSE)
    names += more
    build = build_sddmm if kind == "sddmm" else build_forward
    return Spec(label, lambda options: build(options, work, names), names, names[1], targets)


SPECS = [
    *(spec("sddmm", 512, dtype, share) for dtype in (BF16, FP32) for share in DENSITIES),
    *(spec("forward", 512, dtype, share) for dtype in (BF16, FP32) for share in DENSITIES),
    spec("forward", 1, FP32, 0.01),
]


def gpu_specs(device: torch.device) -> list[Spec]:
    """Return cases at training densities and one beyond the crossover; the target is at 0.1%."""
    specs = []
    for kind, dense in (("sddmm", DENSE_DW), ("forward", DENSE_SUM)):
        for m, share in itertools.product((512, 4096), (0.001, 0.01, 0.05)):
            targets = (Target(IN_CHUNKS, 1.0),)
            if kind == "sddmm" and share == 0.001:
                targets += (Target(dense, 1.0),)
            specs.append(spec(kind, m, BF16, share, device.type, targets, (IN_CHUNKS,)))
    sampled = spec("sddmm", 512, FP32, 0.01, device.type, (), (TORCH_SPARSE, IN_CHUNKS))
    few = [spec("forward", m, BF16, 0.01, device.type, (), (IN_CHUNKS,)) for m in (1, 32)]
    return [*specs, sampled, spec("forward", 512, FP32, 0.01, device.type), *few]


test_rosa = benchmark_test(SPECS)

if __name__ == "__main__":
    sys.exit(main("rosa", SPECS, gpu_specs))
