"""AdaLoRA's per-step work beside PEFT's and beside the best that torch's foreach operators do.

Per element: read the parameter, its gradient and two EMAs, write the EMAs: 24 bytes in float32.
The orthogonality loss reads every matrix forward and backward and writes its gradient: 12 bytes.

python bench/bench_adalora.py [--only llama] [--seconds 2]
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch
from peft import AdaLoraConfig, get_peft_model
from suite import OURS, Case, Options, Spec, Target, Variant, benchmark_ids, main, run_benchmark
from torch import Tensor, nn

import peftkern

PEFT, FOREACH = "PEFT", "foreach"
R, STEP, TOTAL = 12, 500, 1000  # in the middle of the schedule, with a mask at every step
BETA = 0.85
Shapes = list[tuple[int, int]]  # N, K of every layer


def square(options: Options) -> Shapes:
    n, k = min(options.n, 1024), min(options.k, 1024)
    return [(n, k)] * (96 if n == k == 1024 else 4)


def llama(options: Options) -> Shapes:
    h = min(options.k, 4096)
    blocks, wide = 32 if h == 4096 else 1, 11008 * h // 4096
    return ([(h, h)] * 4 + [(wide, h)] * 2 + [(h, wide)]) * blocks


class Layers(nn.Module):
    """Linear layers whose weight is one zero seen as a matrix: nobody multiplies by it here."""

    def __init__(self, shapes: Shapes) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(1, 1, bias=False) for _ in shapes)
        for layer, (n, k) in zip(self.layers, shapes, strict=True):
            layer.in_features, layer.out_features = k, n
            layer.weight = nn.Parameter(torch.zeros(1, 1).expand(n, k), requires_grad=False)

    def forward(self) -> SimpleNamespace:
        return SimpleNamespace(loss=torch.zeros(()))


def peft_model(shapes: Shapes, patched: bool) -> nn.Module:
    """An AdaLoRA model with the same triplets and gradients for every variant."""
    config = AdaLoraConfig(target_modules=r"layers\.\d+", init_r=R, total_step=TOTAL, target_r=4)
    torch.manual_seed(0)
    model = get_peft_model(Layers(shapes), config)
    generator = torch.Generator().manual_seed(0)
    for name, p in model.named_parameters():
        if p.requires_grad:
            if "lora_E" in name:
                p.data.normal_(generator=generator)
            p.grad = torch.randn(p.shape, generator=generator)
    if patched and len(peftkern.patch(model).patched) != len(shapes) + 1:
        raise RuntimeError("peftkern.patch left layers out")
    return model.base_model


def triplets(tuner: nn.Module) -> list[Tensor]:
    """lora_E, lora_A, lora_B of every layer in turn."""
    layers = tuner.model.layers
    return [group["default"] for m in layers for group in (m.lora_E, m.lora_A, m.lora_B)]


def update_with_peft(tuners: list[nn.Module]) -> Variant:
    def call(i: int) -> nn.Module:
        tuner = tuners[i % len(tuners)]
        tuner.update_and_allocate(STEP)
        return tuner

    def result(tuner: nn.Module) -> tuple[Tensor, Tensor]:
        allocator, pattern = tuner.rankallocator, tuner.peft_config["default"].rank_pattern
        mask = torch.tensor([kept for part in pattern.values() for kept in part]).double()
        return mask, torch.cat([ipt.flatten() for _, ipt in sorted(allocator.exp_avg_ipt.items())])

    return Variant(call, oracle(tuners[0]), result)


def triplet_scores(s: list[Tensor]) -> Tensor:
    triplets = zip(s[::3], s[1::3], s[2::3], strict=True)
    return torch.cat([E.view(-1) + (A.mean(1) + B.mean(0)) for E, A, B in triplets])


@torch.no_grad()
def foreach_update(params: list[Tensor], ipt: list[Tensor], unc: list[Tensor], budget: int):
    """Every element-wise step as one foreach operator over all layers."""
    now = torch._foreach_mul(params, [p.grad for p in params])
    torch._foreach_abs_(now)
    torch._foreach_mul_(ipt, BETA)
    torch._foreach_add_(ipt, now, alpha=1 - BETA)
    torch._foreach_sub_(now, ipt)
    torch._foreach_abs_(now)
    torch._foreach_mul_(unc, BETA)
    torch._foreach_add_(unc, now, alpha=1 - BETA)
    s = torch._foreach_mul(ipt, unc)
    scores = torch.cat(
        [
            E.view(-1) + (A.mean(1) + B.mean(0))
            for E, A, B in zip(s[::3], s[1::3], s[2::3], strict=True)
        ]
    )
    keep = scores > scores.kthvalue(scores.numel() - budget).values
    masks = keep.float().split(R)
    torch._foreach_mul_(params[::3], [mask.view(R, 1) for mask in masks])
    return keep


def update_with_foreach(tuners: list[nn.Module]) -> Variant:
    budget = tuners[0].rankallocator.budget_schedule(STEP)[0]
    held = []
    for tuner in tuners:
        params = triplets(tuner)
        held.append((params, *([torch.zeros_like(p) for p in params] for _ in range(2))))

    def call(i: int) -> tuple[Tensor, list[Tensor]]:
        params, ipt, unc = held[i % len(held)]
        return foreach_update(params, ipt, unc, budget), ipt

    names = names_of(tuners[0])

    def result(returned: tuple[Tensor, list[Tensor]]) -> tuple[Tensor, Tensor]:
        keep, ipt = returned
        by_name = sorted(zip(names, ipt, strict=True), key=lambda pair: pair[0])
        return keep.double(), torch.cat([part.flatten() for _, part in by_name])

    return Variant(call, oracle(tuners[0]), result)


def names_of(tuner: nn.Module) -> list[str]:
    groups = ("lora_E", "lora_A", "lora_B")
    return [f"layers.{i}.{g}.default" for i in range(len(tuner.model.layers)) for g in groups]


def oracle(tuner: nn.Module) -> tuple[Tensor, Tensor]:
    """The mask and the first EMA after one update, in float64."""
    params = triplets(tuner)
    ipt = [0.15 * (p.detach().double() * p.grad.double()).abs() for p in params]
    s = [e * 0.15 * (e / 0.15 - e).abs() for e in ipt]
    scores = torch.cat(
        [
            E.view(-1) + (A.mean(1) + B.mean(0))
            for E, A, B in zip(s[::3], s[1::3], s[2::3], strict=True)
        ]
    )
    budget = tuner.rankallocator.budget_schedule(STEP)[0]
    mask = torch.zeros_like(scores)
    mask[scores.topk(budget).indices] = 1
    by_name = sorted(zip(names_of(tuner), ipt, strict=True), key=lambda pair: pair[0])
    return mask, torch.cat([part.flatten() for _, part in by_name])


def build_update(options: Options, shapes: Shapes) -> Case:
    elements = sum(R * (1 + n + k) for n, k in shapes)
    copies = max(1, options.rotate // (16 * elements))
    pools = {
        name: [peft_model(shapes, name == OURS) for _ in range(copies)]
        for name in (OURS, PEFT, FOREACH)
    }
    variants = {name: update_with_peft(pools[name]) for name in (OURS, PEFT)}
    variants[FOREACH] = update_with_foreach(pools[FOREACH])
    return Case(variants, 24 * elements, 9 * elements, torch.float32)


def loss_and_gradients(tuners: list[nn.Module]) -> Callable[[int], tuple[Tensor, ...]]:
    matrices = [[p for i, p in enumerate(triplets(tuner)) if i % 3] for tuner in tuners]

    def call(i: int) -> tuple[Tensor, ...]:
        loss = tuners[i % len(tuners)]().loss
        grads = torch.autograd.grad(loss, matrices[i % len(tuners)])
        return loss.detach(), *grads

    return call


def build_orthogonality(options: Options, shapes: Shapes) -> Case:
    elements = sum(R * (n + k) for n, k in shapes)
    copies = max(1, options.rotate // (4 * elements))
    pools = {
        name: [peft_model(shapes, name == OURS) for _ in range(copies)] for name in (OURS, PEFT)
    }
    matrices = [p for i, p in enumerate(triplets(pools[PEFT][0])) if i % 3]
    wide = [p.detach().double().requires_grad_() for p in matrices]
    grams = [p @ p.T if i % 2 == 0 else p.T @ p for i, p in enumerate(wide)]
    norms = [torch.linalg.norm(gram - torch.eye(R, dtype=torch.float64)) for gram in grams]
    loss = 0.5 * torch.stack(norms).mean()
    wanted = loss.detach(), *torch.autograd.grad(loss, wide)
    variants = {name: Variant(loss_and_gradients(pool), wanted) for name, pool in pools.items()}
    return Case(variants, 12 * elements, 8 * R * elements, torch.float32)


UPDATE = (OURS, PEFT, FOREACH)
SPECS = [
    Spec(
        "adalora/update_and_allocate-96x1024x1024/fp32",
        lambda options: build_update(options, square(options)),
        UPDATE,
        PEFT,
        (Target(PEFT, 6.0),),
    ),
    Spec(
        "adalora/update_and_allocate-llama-7b/fp32",
        lambda options: build_update(options, llama(options)),
        UPDATE,
        PEFT,
    ),
    Spec(
        "adalora/orthogonality-96x1024x1024/fp32",
        lambda options: build_orthogonality(options, square(options)),
        (OURS, PEFT),
        PEFT,
        (Target(PEFT, 3.0),),
    ),
    Spec(
        "adalora/orthogonality-llama-7b/fp32",
        lambda options: build_orthogonality(options, llama(options)),
        (OURS, PEFT),
        PEFT,
    ),
]


@pytest.mark.parametrize(("spec", "name"), benchmark_ids(SPECS))
def test_adalora(benchmark, spec: Spec, name: str, options: Options) -> None:
    run_benchmark(benchmark, spec, name, options)


if __name__ == "__main__":
    sys.exit(main("adalora", SPECS))
