"""PEFT's DoRA layer, patched and not, and the frozen layer alone, over dense and NF4 weights.

PEFT multiplies an identity matrix by the update to get its norms, makes the dense weight in float32
for them, and keeps the outputs of both parts for the gradient of the magnitude. On a GPU the norms
alone are cases, too, beside plain torch on blocks of rows, which makes each block dense in float32.

python bench/bench_dora.py [--device cuda] [--only forward-M256] [--seconds 2]
"""

from __future__ import annotations

import copy
import itertools
import sys
from dataclasses import replace

import torch
from specs import Case, Options, Spec, Target, Variant, spec_of
from suite import benchmark_test, main
from torch import Tensor

import peftkern
from peftkern.functional.dora import dora_norm
from peftkern.tools.bench import providers
from peftkern.tools.bench.base_layers import Layer, Tensors
from peftkern.tools.bench.cases import Problem
from peftkern.tools.bench.peers import bitsandbytes_missing
from peftkern.tools.bench.record import OURS

BY_BLOCKS = "torch, blocks of rows"
PEFT, FROZEN = "PEFT", "frozen layer"


def frozen_nf4(problem: Problem, tensors: Tensors, copies: int) -> list[Layer]:
    """Build bitsandbytes' layer alone."""
    return providers.bitsandbytes(replace(problem, op="nf4_linear"), tensors, copies)


DENSE = {OURS: "peftkern", PEFT: "peft", FROZEN: "frozen"}
NF4 = {OURS: "peftkern", PEFT: "bitsandbytes"}
NF4[FROZEN] = providers.Provider(frozen_nf4, {}, adapted=False)


def build_norm(options: Options, nf4: bool) -> Case:
    """Build the case of the norms alone, of a weight in bfloat16 with float32 factors."""
    torch.manual_seed(0)
    n, k, r, device = options.n, options.k, options.r, options.device
    weight = (torch.randn(n, k, device=device) / k**0.5).to(torch.bfloat16)
    a, b = torch.randn(r, k, device=device) / k**0.5, torch.randn(n, r, device=device) * 0.1
    traffic = weight.nbytes
    if nf4:
        with peftkern.use_backend(None):  # even if the case forces a back end
            weight = peftkern.quantize_nf4(weight)
        traffic = weight.packed.nbytes + weight.absmax.nbytes
    copied = [copy.deepcopy(weight) for _ in range(options.copies(traffic))]

    def norms(i: int) -> Tensor:
        return dora_norm(copied[i % len(copied)], a, b, scaling=2.0)

    def by_blocks(i: int) -> Tensor:
        with peftkern.use_backend("reference"):
            return norms(i)

    with peftkern.use_backend("reference"):
        dense = peftkern.dequantize_nf4(weight) if nf4 else weight
    right = (torch.linalg.norm(dense.double() + 2 * b.double() @ a.double(), dim=1),)
    traffic += a.nbytes + b.nbytes + 4 * n
    variants = {OURS: Variant(norms, right), BY_BLOCKS: Variant(by_blocks, right)}
    return Case(variants, traffic, 2 * n * k * (r + 1), torch.float32)


def spec(
    name: str,
    m: int,
    *targets: Target,
    dtype: str = "bfloat16",
    shape: tuple[int, int] = (2048, 2048),
) -> Spec:
    nf4, mode = name.startswith("nf4"), "full" if "backward" in name else "no-grad"
    op = "nf4_dora_linear" if nf4 else "dora_linear"
    problem = Problem(op, "", m, *shape, 16, dtype, mode)
    label = f"dora/{name}-{shape[0]}x{shape[1]}/{'bf16' if dtype == 'bfloat16' else 'fp32'}"
    return spec_of(label, problem, NF4 if nf4 else DENSE, *targets, shape=shape)


SPECS = [
    spec("forward+backward-M256", 256, Target(PEFT, 2.0), dtype="float32"),
    spec("forward+backward-M256", 256, Target(PEFT, 2.0)),
    spec("nf4-forward+backward-M256", 256, Target(PEFT, 2.0)),
    spec("forward-M256", 256),
    spec("forward-M1", 1),
]


def gpu_specs(device: torch.device) -> list[Spec]:
    """Return the cases; NF4 needs bitsandbytes: PEFT has no DoRA over another packed weight."""
    kinds = (False, True) if bitsandbytes_missing(device) is None else (False,)
    square, wide = (4096, 4096), (14336, 4096)
    specs = []
    for shape, m, nf4 in itertools.product((square, wide), (512, 4096), kinds):
        name = f"{'nf4-' if nf4 else ''}forward+backward-M{m}"
        specs.append(spec(name, m, Target(PEFT, 1.0), shape=shape))
    for shape, nf4 in itertools.product((square, wide), (False, True)):
        specs.append(
            Spec(
                f"dora/{'nf4-' if nf4 else ''}norm-{shape[0]}x{shape[1]}/bf16",
                lambda options, nf4=nf4: build_norm(options, nf4),
                (OURS, BY_BLOCKS),
                BY_BLOCKS,
                (Target(BY_BLOCKS, 1.0),),
                shape=shape,
                most_launches=1,
            )
        )
    return specs


test_dora = benchmark_test(SPECS)

if __name__ == "__main__":
    sys.exit(main("dora", SPECS, gpu_specs))
