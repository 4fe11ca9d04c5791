"""AdaLoRA's work per step beside PEFT's and foreach operators, as cases of `peftkern bench`.

adalora_update: importance, its two EMAs, the scores and the mask of all layers. The foreach
operators run each element-wise step once for all layers: the best that torch's own can do.
adalora_orthogonality: PEFT's loss |P P^T - I| over all factors, and its gradients.
"""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace

import torch
from torch import Tensor, nn

import peftkern
from peftkern.tools.bench.base_layers import Layer, Tensors, has
from peftkern.tools.bench.cases import Problem

STEP, TOTAL = 500, 1000  # in the middle of the schedule, with a mask at every step
BETA = 0.85
LIST = "the rank pattern is a list on the host"
ADDRESSES = "a graph would read addresses from host memory that torch reuses"


def target_r(problem: Problem) -> int:
    return max(1, problem.r // 3)


def shapes(problem: Problem) -> list[tuple[int, int]]:
    """Return the shapes of lora_E, lora_A, lora_B of every layer in turn."""
    r = problem.r
    return [shape for n, k in problem.layer_sizes for shape in ((r, 1), (r, k), (n, r))]


def inputs(problem: Problem, draw: Callable[..., Tensor]) -> Tensors:
    """Draw all factors and their gradients, the slopes, each as one flat tensor."""
    parts = [draw(*shape) * (0.02 if i % 3 else 1.0) for i, shape in enumerate(shapes(problem))]
    factors = torch.cat([part.flatten() for part in parts])
    return {"factors": factors, "slopes": draw(factors.numel())}


def views(problem: Problem, flat: Tensor) -> list[Tensor]:
    sizes = [rows * columns for rows, columns in shapes(problem)]
    return [p.view(s) for p, s in zip(flat.split(sizes), shapes(problem), strict=True)]


def results(problem: Problem, tensors: Tensors) -> Tensors:
    """Run both in plain torch and the dtype of the tensors."""
    factors = views(problem, tensors["factors"].clone())
    if problem.op == "adalora_update":
        state = Foreach(problem, factors, views(problem, tensors["slopes"]))
        return state.named(state.update())
    matrices = [p.requires_grad_() for i, p in enumerate(factors) if i % 3]
    eye = torch.eye(problem.r, dtype=matrices[0].dtype, device=matrices[0].device)
    grams = [p @ p.T if i % 2 == 0 else p.T @ p for i, p in enumerate(matrices)]
    loss = 0.5 * torch.stack([torch.linalg.norm(gram - eye) for gram in grams]).mean()
    gradients = torch.autograd.grad(loss, matrices)
    return {"loss": loss.detach(), "gradients": torch.cat([g.flatten() for g in gradients])}


class Bases(nn.Module):
    """Linear layers whose weight is one expanded zero: nothing here multiplies by it."""

    def __init__(self, problem: Problem, device: torch.device) -> None:
        super().__init__()
        sizes = problem.layer_sizes
        self.layers = nn.ModuleList(nn.Linear(1, 1, bias=False) for _ in sizes)
        for layer, (n, k) in zip(self.layers, sizes, strict=True):
            layer.in_features, layer.out_features = k, n
            zero = torch.zeros(1, 1, device=device)
            layer.weight = nn.Parameter(zero.expand(n, k), requires_grad=False)

    def forward(self) -> SimpleNamespace:
        return SimpleNamespace(loss=torch.zeros(()))


def fill(problem: Problem, params: list[Tensor], tensors: Tensors) -> None:
    """Give the parameters, lora_E, lora_A, lora_B of every layer in turn, values and gradients."""
    drawn = (views(problem, tensors[name]) for name in ("factors", "slopes"))
    for p, value, gradient in zip(params, *drawn, strict=True):
        p.data.copy_(value)
        p.grad = gradient.clone()


def triplets(tuner: nn.Module) -> list[Tensor]:
    groups = [(m.lora_E, m.lora_A, m.lora_B) for m in tuner.model.layers]
    return [group["default"] for layer in groups for group in layer]


def _tuner(problem: Problem, tensors: Tensors, patched: bool) -> nn.Module:
    from peft import AdaLoraConfig, get_peft_model

    config = AdaLoraConfig(
        target_modules=r"layers\.\d+",
        init_r=problem.r,
        total_step=TOTAL,
        target_r=target_r(problem),
    )
    model = get_peft_model(Bases(problem, tensors["factors"].device), config)
    fill(problem, triplets(model.base_model), tensors)
    if patched and len(peftkern.patch(model).patched) != problem.M + 1:
        raise RuntimeError("peftkern.patch left layers out")
    return model.base_model


def peft(problem: Problem, tensors: Tensors, copies: int, patched: bool = False) -> list[Layer]:
    of = _update_layer if problem.op == "adalora_update" else _loss_layer
    return [of(_tuner(problem, tensors, patched)) for _ in range(copies)]


def _update_layer(tuner: nn.Module) -> Layer:
    def named(_: object) -> Tensors:
        allocator, pattern = tuner.rankallocator, tuner.peft_config["default"].rank_pattern
        mask = torch.tensor([kept for part in pattern.values() for kept in part]).double()
        names = sorted(allocator.exp_avg_ipt)
        importance = torch.cat([allocator.exp_avg_ipt[name].flatten() for name in names])
        return {"mask": mask.to(importance.device), "importance": importance}

    return Layer(lambda: tuner.update_and_allocate(STEP), collect=named, no_graph=LIST)


def _loss_layer(tuner: nn.Module) -> Layer:
    matrices = [p for i, p in enumerate(triplets(tuner)) if i % 3]

    def run() -> tuple[Tensor, ...]:
        loss = tuner().loss
        return loss.detach(), *torch.autograd.grad(loss, matrices)

    def named(found: tuple[Tensor, ...]) -> Tensors:
        loss, *gradients = found
        return {"loss": loss, "gradients": torch.cat([g.flatten() for g in gradients])}

    return Layer(run, collect=named)


def by_name(parts: list[Tensor]) -> Tensor:
    """Return lora_E, lora_A, lora_B of the layers in the order of PEFT's sorted names."""
    groups = ("lora_E", "lora_A", "lora_B")
    names = [f"layers.{i}.{group}.default" for i in range(len(parts) // 3) for group in groups]
    ordered = sorted(zip(names, parts, strict=True), key=lambda pair: pair[0])
    return torch.cat([part.flatten() for _, part in ordered])


def allocator(problem: Problem, tensors: Tensors, copies: int) -> list[Layer]:
    """Build peftkern's own allocator over the same triplets without PEFT: it never waits for a
    GPU, as PEFT's list of kept ranks makes it do."""
    from peftkern.layers import SVDLinear
    from peftkern.methods.adalora import RankAllocator

    def layer() -> Layer:
        model = Bases(problem, tensors["factors"].device)
        model.layers = nn.ModuleList(SVDLinear(one, r=problem.r) for one in model.layers)
        own = RankAllocator(model, target_r=target_r(problem), total_step=TOTAL, ties="peft")
        fill(problem, [p for m in model.layers for p in (m.lora_E, m.lora_A, m.lora_B)], tensors)

        def run() -> tuple[Tensor, Tensor]:
            return own.update_and_allocate(STEP)[1], own.importance.exp_avg_ipt

        def named(found: tuple[Tensor, Tensor]) -> Tensors:
            mask, importance = found
            return {"mask": mask.double(), "importance": by_name(views(problem, importance))}

        return Layer(run, collect=named, no_graph=ADDRESSES)

    return [layer() for _ in range(copies)]


class Foreach:
    """The update by foreach operators, with its state."""

    def __init__(self, problem: Problem, params: list[Tensor], gradients: list[Tensor]) -> None:
        self.problem, self.params, self.gradients = problem, params, gradients
        self.importance, self.uncertainty = (
            [torch.zeros_like(p) for p in params] for _ in range(2)
        )
        first, last = problem.r * problem.M, target_r(problem) * problem.M
        self.budget = int((first - last) * (1 - STEP / TOTAL) ** 3 + last)

    @torch.no_grad()
    def update(self) -> Tensor:
        now = torch._foreach_mul(self.params, self.gradients)
        torch._foreach_abs_(now)
        torch._foreach_mul_(self.importance, BETA)
        torch._foreach_add_(self.importance, now, alpha=1 - BETA)
        torch._foreach_sub_(now, self.importance)
        torch._foreach_abs_(now)
        torch._foreach_mul_(self.uncertainty, BETA)
        torch._foreach_add_(self.uncertainty, now, alpha=1 - BETA)
        scores = triplet_scores(torch._foreach_mul(self.importance, self.uncertainty))
        out = scores.numel() - self.budget
        keep = scores > scores.kthvalue(out).values if out else torch.ones_like(scores).bool()
        masks = keep.to(self.params[0].dtype).split(self.problem.r)
        torch._foreach_mul_(self.params[::3], [mask.view(-1, 1) for mask in masks])
        return keep

    def named(self, keep: Tensor) -> Tensors:
        return {"mask": keep.double(), "importance": by_name(self.importance)}


def triplet_scores(s: list[Tensor]) -> Tensor:
    found = zip(s[::3], s[1::3], s[2::3], strict=True)
    return torch.cat([E.view(-1) + (A.mean(1) + B.mean(0)) for E, A, B in found])


def composed(problem: Problem, tensors: Tensors, copies: int) -> list[Layer]:
    drawn = [views(problem, tensors[name]) for name in ("factors", "slopes")]

    def layer() -> Layer:
        state = Foreach(problem, *([part.clone() for part in parts] for parts in drawn))
        return Layer(state.update, collect=state.named)

    return [layer() for _ in range(copies)]


def ours(problem: Problem, tensors: Tensors, copies: int) -> list[Layer]:
    if problem.op == "adalora_update" and not has("peft"):
        return allocator(problem, tensors, copies)
    return peft(problem, tensors, copies, patched=True)
