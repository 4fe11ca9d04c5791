"""RoSA's sparse products against the dense ones that they replace, over the density of the mask.

Where the ratio falls below 1 lies the density from which on the dense way is the faster one.
torch.sparse adds a CSR product to x W.T, or samples dy.T @ x. On a GPU `torch, in chunks` is the
fallback without kernels: it synchronizes with the host. What the others do:
peftkern/tools/bench/rosa.py.

python bench/bench_rosa.py [--device cuda] [--only sddmm] [--seconds 2]
"""

from __future__ import annotations

import itertools
import sys

import torch
import torch.nn.functional as F
from specs import Spec, Target, spec_of
from suite import benchmark_test, main
from torch import Tensor

from peftkern.tools.bench import rosa
from peftkern.tools.bench.base_layers import Tensors
from peftkern.tools.bench.cases import Problem
from peftkern.tools.bench.providers import on_backend
from peftkern.tools.bench.record import OURS

TORCH_SPARSE, IN_CHUNKS = "torch.sparse", "torch, in chunks"
DENSITIES = (0.001, 0.01, 0.05, 0.2)


def csr(tensors: Tensors, values: Tensor, shape: tuple[int, int]) -> Tensor:
    return torch.sparse_csr_tensor(tensors["crow"], tensors["col"], values, shape)


def sparse_gradient(tensors: Tensors, x: Tensor, dy: Tensor) -> Tensor:
    S = csr(tensors, tensors["mask_values"], (dy.shape[1], x.shape[1]))
    return torch.sparse.sampled_addmm(S, dy.T, x, beta=0.0).values()


def sparse_forward(tensors: Tensors, x: Tensor, dy: Tensor) -> Tensor:
    weight = tensors["weight"]
    S = csr(tensors, tensors["mask_values"].to(x.dtype), weight.shape)
    return F.linear(x, weight) + (S @ x.T).T


def spec(
    kind: str,
    m: int,
    dtype: str,
    density: float,
    device: str = "cpu",
    targets: tuple[Target, ...] = (),
    more: tuple[str, ...] = (),
) -> Spec:
    name = f"rosa/{kind}-M{m}-{density:.1%}/{'bf16' if dtype == 'bfloat16' else 'fp32'}"
    sizes = (f"rosa_{kind}", "", m, 4096, 4096, None, dtype, "forward")
    problem = Problem(*sizes, density=density)
    peers = {OURS: "peftkern", rosa.DENSE[problem.op]: "composed"}
    # torch.sparse has no product of bfloat16 on a CPU, and samples none of it anywhere.
    if TORCH_SPARSE in more or (kind == "forward" and (dtype == "float32" or device == "cuda")):
        peers[TORCH_SPARSE] = rosa.build_by(sparse_gradient, sparse_forward)
    if IN_CHUNKS in more:
        peers[IN_CHUNKS] = on_backend("reference")
    return spec_of(name, problem, peers, *targets)


SPECS = [
    spec(kind, 512, dtype, share)
    for kind in ("sddmm", "forward")
    for dtype in ("bfloat16", "float32")
    for share in DENSITIES
]
SPECS.append(spec("forward", 1, "float32", 0.01))


def gpu_specs(device: torch.device) -> list[Spec]:
    """Return cases at training densities and one beyond the crossover; the target is at 0.1%."""
    specs = []
    for kind in ("sddmm", "forward"):
        for m, share in itertools.product((512, 4096), (0.001, 0.01, 0.05)):
            targets = (Target(IN_CHUNKS, 1.0),)
            if kind == "sddmm" and share == 0.001:
                targets += (Target(rosa.DENSE["rosa_sddmm"], 1.0),)
            specs.append(spec(kind, m, "bfloat16", share, device.type, targets, (IN_CHUNKS,)))
    sampled = spec("sddmm", 512, "float32", 0.01, device.type, (), (TORCH_SPARSE, IN_CHUNKS))
    few = [spec("forward", m, "bfloat16", 0.01, device.type, (), (IN_CHUNKS,)) for m in (1, 32)]
    return [*specs, sampled, spec("forward", 512, "float32", 0.01, device.type), *few]


test_rosa = benchmark_test(SPECS)

if __name__ == "__main__":
    sys.exit(main("rosa", SPECS, gpu_specs))
