"""AdaLoRA's work per step against PEFT's and against the best of torch's foreach operators.

Per element: read the parameter, its gradient and two EMAs, write the EMAs: 24 bytes in float32.
The orthogonality loss reads every matrix forward and backward and writes its gradient: 12 bytes.

On a GPU peftkern is its own RankAllocator, which never synchronizes. Under PEFT (`patched PEFT`)
the mask has to become rank_pattern, a list on the host. The foreach operators are replayed there as
a CUDA graph over fixed tensors, the least that torch's own operators can take.

python bench/bench_adalora.py [--device cuda] [--only llama] [--seconds 2]
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import SimpleNamespace

import torch
from peft import AdaLoraConfig, get_peft_model
from suite import OURS, Case, Options, Spec, Target, Variant, benchmark_test, main
from torch import Tensor, nn

import peftkern
from peftkern.layers import SVDLinear
from peftkern.methods.adalora import RankAllocator
from peftkern.tools.bench import gpu_timer

PEFT, FOREACH = "PEFT", "foreach"
PATCHED, REPLAYED = "patched PEFT", "foreach in a CUDA graph"
R, TARGET_R = 12, 4
STEP, TOTAL = 500, 1000  # in the middle of the schedule, with a mask at every step
BETA = 0.85
Shapes = list[tuple[int, int]]  # N, K of every layer


def square(options: Options) -> Shapes:
    n, k = min(options.n, 1024), min(options.k, 1024)
    return [(n, k)] * (96 if n == k == 1024 else 4)


def llama(options: Options) -> Shapes:
    h = min(options.k, 4096)
    blocks, wide = 32 if h == 4096 else 1, 11008 * h // 4096
    return ([(h, h)] * 4 + [(wide, h)] * 2 + [(h, wide)]) * blocks


def models(options: Options, size: int) -> int:
    """Return the number of models to cycle through; thousands would take minutes to build."""
    return min(64, max(1, options.rotate // size))


class Layers(nn.Module):
    """Linear layers whose weight is one expanded zero: nothing here multiplies by it."""

    def __init__(self, shapes: Shapes, device: torch.device) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(1, 1, bias=False) for _ in shapes)
        for layer, (n, k) in zip(self.layers, shapes, strict=True):
            layer.in_features, layer.out_features = k, n
            zero = torch.zeros(1, 1, device=device)
            layer.weight = nn.Parameter(zero.expand(n, k), requires_grad=False)

    def forward(self) -> SimpleNamespace:
        return SimpleNamespace(loss=torch.zeros(()))


def peft_model(shapes: Shapes, device: torch.device, patched: bool) -> nn.Module:
    """Build an AdaLoRA model with the same triplets and gradients for every variant."""
    config = AdaLoraConfig(
        target_modules=r"layers\.\d+", init_r=R, total_step=TOTAL, target_r=TARGET_R
    )
    model = get_peft_model(Layers(shapes, device), config)
    fill(triplets(model.base_model))
    if patched and len(peftkern.patch(model).patched) != len(shapes) + 1:
        raise RuntimeError("peftkern.patch left layers out")
    return model.base_model


def torch_allocator(shapes: Shapes, device: torch.device) -> RankAllocator:
    """Build an allocator over the same triplets, gradients, schedule and ties without PEFT."""
    model = Layers(shapes, device)
    model.layers = nn.ModuleList(SVDLinear(layer, r=R) for layer in model.layers)
    allocator = RankAllocator(model, target_r=TARGET_R, total_step=TOTAL, ties="peft")
    fill([p for m in model.layers for p in (m.lora_E, m.lora_A, m.lora_B)])
    return allocator


def fill(params: list[nn.Parameter]) -> None:
    """lora_E, lora_A, lora_B of every layer in turn, and their gradients."""
    device = params[0].device
    generator = torch.Generator(device).manual_seed(0)
    for i, p in enumerate(params):
        p.data.normal_(std=0.02 if i % 3 else 1.0, generator=generator)
        p.grad = torch.randn(p.shape, generator=generator, device=device)


def triplets(tuner: nn.Module) -> list[Tensor]:
    """lora_E, lora_A, lora_B of every layer in turn."""
    layers = tuner.model.layers
    return [group["default"] for m in layers for group in (m.lora_E, m.lora_A, m.lora_B)]


def warmed(call: Callable[[int], object], copies: int) -> Callable[[int], object]:
    """Return `call` after each copy's first update, which makes the EMAs; 0 is the check's."""
    for i in range(1, copies):
        call(i)
    return call


def update_with_peft(tuners: list[nn.Module]) -> Variant:
    def call(i: int) -> nn.Module:
        tuner = tuners[i % len(tuners)]
        tuner.update_and_allocate(STEP)
        return tuner

    def result(tuner: nn.Module) -> tuple[Tensor, Tensor]:
        allocator, pattern = tuner.rankallocator, tuner.peft_config["default"].rank_pattern
        mask = torch.tensor([kept for part in pattern.values() for kept in part]).double()
        ipt = torch.cat([ipt.flatten() for _, ipt in sorted(allocator.exp_avg_ipt.items())])
        return mask.to(ipt.device), ipt

    why = "the rank pattern is a list on the host"
    return Variant(warmed(call, len(tuners)), oracle(tuners[0]), result, no_graph=why)


def update_with_allocator(allocators: list[RankAllocator], wanted: tuple[Tensor, ...]) -> Variant:
    def call(i: int) -> tuple[Tensor, Tensor]:
        allocator = allocators[i % len(allocators)]
        _, mask = allocator.update_and_allocate(STEP)
        return mask, allocator.importance.exp_avg_ipt

    sizes = [
        size
        for m in allocators[0].layers.values()
        for size in (m.lora_E.numel(), m.lora_A.numel(), m.lora_B.numel())
    ]

    def result(returned: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        mask, ipt = returned
        return mask.double(), by_name(list(ipt.split(sizes)))

    why = "a graph would read addresses from host memory that torch reuses"
    return Variant(warmed(call, len(allocators)), wanted, result, no_graph=why)


def triplet_scores(s: list[Tensor]) -> Tensor:
    triplets = zip(s[::3], s[1::3], s[2::3], strict=True)
    return torch.cat([E.view(-1) + (A.mean(1) + B.mean(0)) for E, A, B in triplets])


@torch.no_grad()
def foreach_update(params: list[Tensor], ipt: list[Tensor], unc: list[Tensor], budget: int):
    """Run every element-wise step as one foreach operator over all layers."""
    now = torch._foreach_mul(params, [p.grad for p in params])
    torch._foreach_abs_(now)
    torch._foreach_mul_(ipt, BETA)
    torch._foreach_add_(ipt, now, alpha=1 - BETA)
    torch._foreach_sub_(now, ipt)
    torch._foreach_abs_(now)
    torch._foreach_mul_(unc, BETA)
    torch._foreach_add_(unc, now, alpha=1 - BETA)
    scores = triplet_scores(torch._foreach_mul(ipt, unc))
    keep = scores > scores.kthvalue(scores.numel() - budget).values
    masks = keep.float().split(R)
    torch._foreach_mul_(params[::3], [mask.view(R, 1) for mask in masks])
    return keep


def update_with_foreach(tuners: list[nn.Module], graph: bool) -> Variant:
    budget = tuners[0].rankallocator.budget_schedule(STEP)[0]
    wanted = oracle(tuners[0])
    held = []
    for tuner in tuners:
        params = triplets(tuner)
        held.append((params, *([torch.zeros_like(p) for p in params] for _ in range(2))))
    replays = [replayed(*state, budget) for state in held] if graph else []

    def call(i: int) -> tuple[Tensor, list[Tensor]]:
        params, ipt, unc = held[i % len(held)]
        if graph:
            return replays[i % len(held)](), ipt
        return foreach_update(params, ipt, unc, budget), ipt

    def result(returned: tuple[Tensor, list[Tensor]]) -> tuple[Tensor, Tensor]:
        keep, ipt = returned
        return keep.double(), by_name(ipt)

    why = "a graph already" if graph else None
    return Variant(warmed(call, len(tuners)), wanted, result, no_graph=why)


def replayed(
    params: list[Tensor], ipt: list[Tensor], unc: list[Tensor], budget: int
) -> Callable[[], Tensor]:
    """Capture `foreach_update` as a graph; the state is restored afterwards."""
    lora_E = [E.detach().clone() for E in params[::3]]
    masks = []
    graph = gpu_timer.captured(
        lambda i: masks.append(foreach_update(params, ipt, unc, budget)), length=1
    )
    with torch.no_grad():
        torch._foreach_copy_(params[::3], lora_E)
        torch._foreach_zero_(ipt + unc)

    def replay() -> Tensor:
        graph.replay()
        return masks[-1]

    return replay


def by_name(parts: list[Tensor]) -> Tensor:
    """Return lora_E, lora_A, lora_B of the layers in the order of PEFT's sorted names."""
    groups = ("lora_E", "lora_A", "lora_B")
    names = [f"layers.{i}.{group}.default" for i in range(len(parts) // 3) for group in groups]
    ordered = sorted(zip(names, parts, strict=True), key=lambda pair: pair[0])
    return torch.cat([part.flatten() for _, part in ordered])


def oracle(tuner: nn.Module) -> tuple[Tensor, Tensor]:
    """Return the mask and the first EMA after one update, in float64."""
    params = triplets(tuner)
    ipt = [0.15 * (p.detach().double() * p.grad.double()).abs() for p in params]
    scores = triplet_scores([e * 0.15 * (e / 0.15 - e).abs() for e in ipt])
    budget = tuner.rankallocator.budget_schedule(STEP)[0]
    mask = torch.zeros_like(scores)
    mask[scores.topk(budget).indices] = 1
    return mask, by_name(ipt)


def build_update(options: Options, shapes: Shapes) -> Case:
    elements = sum(R * (1 + n + k) for n, k in shapes)
    copies = models(options, 16 * elements)
    pools = {
        name: [peft_model(shapes, options.device, name == OURS) for _ in range(copies)]
        for name in (OURS, PEFT, FOREACH)
    }
    variants = {name: update_with_peft(pools[name]) for name in (OURS, PEFT)}
    variants[FOREACH] = update_with_foreach(pools[FOREACH], graph=False)
    return Case(variants, 24 * elements, 9 * elements, torch.float32)


def build_gpu_update(options: Options, shapes: Shapes) -> Case:
    elements = sum(R * (1 + n + k) for n, k in shapes)
    copies, device = models(options, 16 * elements), options.device
    pools = {
        name: [peft_model(shapes, device, name == PATCHED) for _ in range(copies)]
        for name in (PATCHED, PEFT, REPLAYED)
    }
    variants = {name: update_with_peft(pools[name]) for name in (PATCHED, PEFT)}
    allocators = [torch_allocator(shapes, device) for _ in range(copies)]
    ours = update_with_allocator(allocators, variants[PEFT].oracle)
    foreach = update_with_foreach(pools[REPLAYED], graph=device.type == "cuda")
    return Case(
        {OURS: ours, **variants, REPLAYED: foreach}, 24 * elements, 9 * elements, torch.float32
    )


def loss_and_gradients(tuners: list[nn.Module]) -> Callable[[int], tuple[Tensor, ...]]:
    matrices = [[p for i, p in enumerate(triplets(tuner)) if i % 3] for tuner in tuners]

    def call(i: int) -> tuple[Tensor, ...]:
        loss = tuners[i % len(tuners)]().loss
        grads = torch.autograd.grad(loss, matrices[i % len(tuners)])
        return loss.detach(), *grads

    return call


def build_orthogonality(options: Options, shapes: Shapes) -> Case:
    elements = sum(R * (n + k) for n, k in shapes)
    copies = models(options, 4 * elements)
    pools = {
        name: [peft_model(shapes, options.device, name == OURS) for _ in range(copies)]
        for name in (OURS, PEFT)
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


def gpu_specs(device: torch.device) -> list[Spec]:
    """Return the cases of each step; on a GPU the orthogonality loss is torch's own."""
    return [
        Spec(
            "adalora/update_and_allocate-llama-7b/fp32",
            lambda options: build_gpu_update(options, llama(options)),
            (OURS, PATCHED, PEFT, REPLAYED),
            PEFT,
            (Target(PEFT, 50.0), Target(REPLAYED, 3.0)),
            shape=(4096, 4096),
            most_launches=4,
        )
    ]


test_adalora = benchmark_test(SPECS)

if __name__ == "__main__":
    sys.exit(main("adalora", SPECS, gpu_specs))
