"""Cases of AdaLoRA's importance for the tests of the interpreted and of the compiled kernels."""

from __future__ import annotations

import torch
from linear_cases import F32
from tolerances import FLOOR_MAX
from torch import Tensor

import peftkern
from peftkern.backends import ops

SHAPES = [(3, 70, 33), (8, 2500, 1100), (1, 4, 9), (5, 64, 64), (0, 8, 8), (17, 1024, 31)]


def layers(shapes, dtype: torch.dtype, grad_dtype: torch.dtype) -> tuple[list, list, int]:
    """E, A and B of layers (r, K, N), their gradients (one is missing), and how many elements."""
    sizes = [size for r, K, N in shapes for size in ((r, 1), (r, K), (N, r))]
    params = [torch.randn(size).to(dtype) for size in sizes]
    grads = [torch.randn(size).to(grad_dtype) for size in sizes]
    grads[len(grads) // 2] = None
    return params, grads, sum(p.numel() for p in params)


def importance(backend: str, params, grads, ipt: Tensor, unc: Tensor) -> tuple[Tensor, ...]:
    ipt, unc = ipt.clone(), unc.clone()
    with peftkern.use_backend(backend):
        scores = ops.adalora_importance_(ipt, unc, params, grads, 0.85, 0.9)
    return scores, ipt, unc


def assert_near(got: tuple[Tensor, ...], wanted: tuple[Tensor, ...]) -> None:
    torch.testing.assert_close(got, wanted, rtol=FLOOR_MAX[F32], atol=FLOOR_MAX[F32])


def random_scores(kind: str, total: int) -> Tensor:
    """Of `kind` any, ties or zero, or with a share of them nan or inf."""
    scores = torch.rand(total)
    if kind == "ties":
        return torch.randint(0, 3, (total,)).float()
    if kind == "zero":
        return scores.zero_()
    if kind != "any":
        scores[torch.rand(total) < 0.3] = float(kind)
    return scores


def check_allocation(
    scores: Tensor, lora_E: list[Tensor], budget: int, threshold: bool, device: str = "cpu"
) -> None:
    """Mask and lora_E as the reference has them."""
    results = []
    for name, place in (("triton", device), ("reference", "cpu")):
        mine = [E.to(place, copy=True) for E in lora_E]
        with peftkern.use_backend(name):
            mask = ops.adalora_allocate_(scores.to(place), mine, budget, threshold)
        results.append([t.cpu() for t in (mask, *mine)])
    for got, wanted in zip(*results, strict=True):
        assert torch.equal(got, wanted)
