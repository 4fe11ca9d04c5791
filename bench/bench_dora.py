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
from dataclasses import dataclass, replace

import torch
from peft import LoraConfig, get_peft_model
from suite import OURS, Case, Options, Spec, Target, Variant, benchmark_test, main
from torch import Tensor, nn

import peftkern
from peftkern.functional.dora import dora_norm
from peftkern.tools.bench.peers import (
    Layers,
    bitsandbytes_missing,
    forward,
    linear,
    nf4_linear,
    nf4_weight64,
)

BY_BLOCKS = "torch, blocks of rows"
PEFT, FROZEN = "PEFT", "frozen layer"
NAMES = (OURS, PEFT, FROZEN)
BF16, FP32 = torch.bfloat16, torch.float32


@dataclass(frozen=True)
class Work:
    """Workload of the layers: rows, dtype, backward pass or not, NF4 weight or not."""

    m: int
    dtype: torch.dtype
    train: bool = True
    nf4: bool = False


def pool(layer: nn.Module, copies: int, r: int, patched: bool) -> list[nn.Module]:
    """Build PEFT's DoRA layers over copies of `layer`, with the same numbers in each."""
    config = LoraConfig(r=r, lora_alpha=2 * r, use_dora=True, target_modules=r"layers\.\d+")
    model = get_peft_model(Layers([copy.deepcopy(layer) for _ in range(copies)]), config)
    if patched:
        report = peftkern.patch(model)
        if len(report.patched) != copies or report.falling_back:
            raise RuntimeError(f"peftkern.patch left layers out: {report}")
    for member in model.base_model.model.layers:
        torch.manual_seed(2)
        with torch.no_grad():
            a, b, magnitude = parameters(member)
            a.normal_(std=a.shape[1] ** -0.5)
            b.normal_(std=0.1)
            magnitude.mul_(torch.empty_like(magnitude).uniform_(0.8, 1.25))
    return list(model.base_model.model.layers)


def parameters(layer: nn.Module) -> list[Tensor]:
    groups = (layer.lora_A, layer.lora_B, layer.lora_magnitude_vector)
    return [group["default"].weight for group in groups]


def step(layers: list[nn.Module], xs: list[Tensor], dy: Tensor):
    """Return the output and the gradients of x, both factors and the magnitude; frozen: of x."""

    def call(i: int) -> tuple[Tensor, ...]:
        layer, x = layers[i % len(layers)], xs[i % len(xs)]
        y = layer(x)
        wanted = [x, *(parameters(layer) if hasattr(layer, "lora_A") else [])]
        return y.detach(), *torch.autograd.grad(y, wanted, dy)

    return call


def oracle(x: Tensor, weight: Tensor, layer: nn.Module | None, dy: Tensor | None):
    """Return in float64 the results of `forward` (no dy) or `step`; the norm is a constant."""
    x, dy = x.detach().double(), None if dy is None else dy.double()
    if layer is None:
        return (x @ weight.T,) if dy is None else (x @ weight.T, dy @ weight)
    a, b, magnitude = (p.detach().double() for p in parameters(layer))
    scaling = layer.scaling["default"]
    total = weight + scaling * b @ a
    norm = torch.linalg.norm(total, dim=1)
    z, c = x @ total.T, magnitude / norm
    if dy is None:
        return (z * c,)
    scaled = dy * c
    ds = scaling * scaled @ b
    return z * c, scaled @ total, ds.T @ x, scaling * scaled.T @ (x @ a.T), (dy * z).sum(0) / norm


def build(options: Options, work: Work) -> Case:
    torch.manual_seed(0)
    n, k, r, m, dtype = options.n, options.k, options.r, options.m(work.m), work.dtype
    weight = (torch.randn(n, k, device=options.device) / k**0.5).to(dtype)
    x = torch.randn(m, k, device=options.device).to(dtype)
    dy = torch.randn(m, n, device=options.device).to(dtype) if work.train else None
    base = nf4_linear(weight) if work.nf4 else linear(weight)
    values = nf4_weight64(base) if work.nf4 else weight.double()
    if work.nf4:  # every variant computes with the values in its own dtype
        values = values.to(dtype).double()
    copies = options.copies(weight.nbytes)
    # A GPU's L2 cache would still hold much of a single x.
    count = copies if options.device.type == "cuda" else 1
    xs = [x.clone().requires_grad_(work.train) for _ in range(count)]

    def variant(name: str) -> Variant:
        if name == FROZEN:
            layers = [copy.deepcopy(base) for _ in range(copies)]
        else:
            layers = pool(base, copies, r, name == OURS)
        right = oracle(x, values, None if name == FROZEN else layers[0], dy)
        return Variant(step(layers, xs, dy) if work.train else forward(layers, xs), right)

    # Dense products: forward, dx, and one again for the magnitude; skinny ones, and the norms.
    flops = (3 if work.train else 1) * 2 * m * n * k + 2 * n * k * (r + 1)
    flops += (4 if work.train else 1) * 2 * m * r * (n + k)
    traffic = (4 if work.train else 2) * (weight.nbytes if not work.nf4 else n * k * 9 // 16)
    traffic += m * (2 * n + 3 * k if work.train else n + k) * dtype.itemsize
    return Case({name: variant(name) for name in NAMES}, traffic, flops, dtype)


def build_norm(options: Options, nf4: bool) -> Case:
    """Build the case of the norms alone, of a weight in bfloat16 with float32 factors."""
    torch.manual_seed(0)
    n, k, r, device = options.n, options.k, options.r, options.device
    weight = (torch.randn(n, k, device=device) / k**0.5).to(BF16)
    a, b = torch.randn(r, k, device=device) / k**0.5, torch.randn(n, r, device=device) * 0.1
    traffic = weight.nbytes
    if nf4:
        with peftkern.use_backend(None):  # even if the case forces a back end
            weight = peftkern.quantize_nf4(weight)
        traffic = weight.packed.nbytes + weight.absmax.nbytes
        copied = [
            replace(weight, packed=weight.packed.clone()) for _ in range(options.copies(traffic))
        ]
    else:
        copied = [weight.clone() for _ in range(options.copies(traffic))]

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
    return Case(variants, traffic, 2 * n * k * (r + 1), FP32)


def spec(name: str, work: Work, *targets: Target, shape: tuple[int, int] = (2048, 2048)) -> Spec:
    label = f"dora/{name}-{shape[0]}x{shape[1]}/{'bf16' if work.dtype is BF16 else 'fp32'}"
    return Spec(label, lambda options: build(options, work), NAMES, PEFT, targets, shape=shape)


SPECS = [
    spec("forward+backward-M256", Work(256, FP32), Target(PEFT, 2.0)),
    spec("forward+backward-M256", Work(256, BF16), Target(PEFT, 2.0)),
    spec("nf4-forward+backward-M256", Work(256, BF16, nf4=True), Target(PEFT, 2.0)),
    spec("forward-M256", Work(256, BF16, train=False)),
    spec("forward-M1", Work(1, BF16, train=False)),
]


def gpu_specs(device: torch.device) -> list[Spec]:
    """Return the cases; NF4 needs bitsandbytes: PEFT has no DoRA over another packed weight."""
    kinds = (False, True) if bitsandbytes_missing(device) is None else (False,)
    square, wide = (4096, 4096), (14336, 4096)
    specs = []
    for shape, m, nf4 in itertools.product((square, wide), (512, 4096), kinds):
        name = f"{'nf4-' if nf4 else ''}forward+backward-M{m}"
        specs.append(spec(name, Work(m, BF16, nf4=nf4), Target(PEFT, 1.0), shape=shape))
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
