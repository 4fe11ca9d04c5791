"""Starting values of LoRA from a weight beside the exact decompositions that PEFT computes.

OLoRA: the QR decomposition of all columns, of which the first r count. In the case "layer" both
ways subtract the update from the weight, too, in place; scaling = 2 makes that a reflection, so
that the second call undoes the first and every call has the same work.

LoftQ, 5 steps: quantize, SVD of what the NF4 base misses; the exact loop runs once. The errors
shown are |W - Q - s B A| / |W|.

Counted for OLoRA: the weight is read once, 2 m n r FLOPs; for the layer it is read and written once
more, with as many FLOPs; for LoftQ: 4 m n (r + 8) FLOPs for each sweep.

python bench/bench_initialization.py [--only olora] [--seconds 2]
"""

from __future__ import annotations

import sys
from collections.abc import Callable

import torch
from specs import Case, Options, Spec, Target, Variant
from suite import benchmark_test, main
from torch import Tensor

from peftkern.formats.nf4 import NF4Weight
from peftkern.functional import dequantize_nf4, quantize_nf4
from peftkern.methods.initialization.factors import Factors, olora, subtract_update_
from peftkern.methods.initialization.loftq import LOFTQ_SWEEPS, Storage, loftq, relative_error
from peftkern.tools.bench.record import OURS

QR, SVD = "torch QR of all columns", "exact loop, torch SVD"
SCALING, STEPS, RANK = 2.0, 5, 16
PLAIN = Storage(double_quant=False)


def rank_of(options: Options) -> int:
    return min(RANK, options.n, options.k)


def weight_of(options: Options, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(options.n, options.k, generator=generator).to(options.device)


def build_factors(options: Options) -> Case:
    r, weight = rank_of(options), weight_of(options)
    Q, R = torch.linalg.qr(weight.double())
    pool = [weight.clone() for _ in range(options.copies(weight.nbytes))]
    oracle = (Q[:, :r], R[:r])

    def ours(i: int) -> tuple[Tensor, Tensor]:
        lora_A, lora_B, *_ = olora(pool[i % len(pool)], r)
        return lora_B, lora_A

    def whole(i: int) -> tuple[Tensor, Tensor]:
        Q, R = torch.linalg.qr(pool[i % len(pool)])
        return Q[:, :r], R[:r]

    m, n = weight.shape
    variants = {OURS: Variant(ours, oracle), QR: Variant(whole, oracle, multiplied=1)}
    return Case(variants, weight.nbytes, 2 * m * n * r, torch.float32)


def build_layer(options: Options) -> Case:
    r, weight = rank_of(options), weight_of(options)
    Q, _ = torch.linalg.qr(weight[:, :r].double())
    oracle = (weight.double() - SCALING * Q @ (Q.T @ weight.double()),)

    def ours(weight: Tensor) -> None:
        lora_A, lora_B, *_ = olora(weight, r)
        subtract_update_(weight, lora_A, lora_B, SCALING)

    def whole(weight: Tensor) -> None:
        Q, R = torch.linalg.qr(weight)
        weight -= SCALING * Q[:, :r] @ R[:r]

    def variant(change: Callable[[Tensor], None], multiplied: int = 0) -> Variant:
        pool = [weight.clone() for _ in range(1 if multiplied else options.copies(weight.nbytes))]

        def call(i: int) -> Tensor:
            change(pool[i % len(pool)])
            return pool[i % len(pool)]

        return Variant(call, oracle, multiplied=multiplied)

    m, n = weight.shape
    variants = {OURS: variant(ours), QR: variant(whole, multiplied=1)}
    return Case(variants, 3 * weight.nbytes, 4 * m * n * r, torch.float32)


def build_loftq(options: Options) -> Case:
    r, weight = rank_of(options), weight_of(options)

    def ours(i: int) -> tuple[Factors, NF4Weight]:
        return loftq([weight], r, SCALING, PLAIN, steps=STEPS)[0]

    def exact(i: int) -> tuple[Factors, NF4Weight]:
        update = torch.zeros_like(weight)
        for _ in range(STEPS):
            base = quantize_nf4(weight - update, double_quant=False)
            U, S, Vh = torch.linalg.svd(weight - dequantize_nf4(base), full_matrices=False)
            root = (S[:r] / SCALING).sqrt()
            factors = Factors(root[:, None] * Vh[:r], U[:, :r] * root, 0.0)
            update = SCALING * factors.lora_B @ factors.lora_A
        return factors, base

    def errors(found: tuple[Factors, NF4Weight]) -> tuple[float, float]:
        error = relative_error(weight, found[1], found[0], SCALING)
        return error, error

    m, n = weight.shape
    variants = {
        OURS: Variant(ours, errors=errors),
        SVD: Variant(exact, errors=errors, multiplied=1),
    }
    return Case(variants, weight.nbytes, STEPS * LOFTQ_SWEEPS * 4 * m * n * (r + 8), torch.float32)


def spec(name: str, build: Callable[[Options], Case], peer: str, *targets: float) -> Spec:
    label, names = f"initialization/{name}/fp32", (OURS, peer)
    bounds = tuple(Target(peer, target) for target in targets)
    return Spec(label, build, names, peer, bounds, peer_wrong=1.0)


SPECS = [
    spec("olora-r16", build_factors, QR, 150.0),
    spec("olora-r16-layer", build_layer, QR),
    spec("loftq-r16", build_loftq, SVD, 40.0),
]

test_initialization = benchmark_test(SPECS)

if __name__ == "__main__":
    sys.exit(main("initialization", SPECS))
