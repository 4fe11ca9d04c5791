"""Distance of LoRA and LoRA-Pro from full fine-tuning on a planted regression, step by step.

A linear layer is to become another one, weight + update, from random inputs. Each method starts
at the same weight with the same learning rate; the table gives its loss, and how far its weight is
from the one that full fine-tuning has at that step, next to the size of the planted update.

    python bench/studies/planted_regression.py                     # seconds
    python bench/studies/planted_regression.py --optimizer adamw --lr 0.005
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from peftkern.layers import LoRALinear
from peftkern.methods import LoRAProAdamW, lora_pro_hook

N, K, RANK, PLANTED, ROWS = 32, 24, 4, 3, 256
FULL = "full fine-tuning"
LR = {"sgd": 1.0, "adamw": 5e-3}


@dataclass
class Curve:
    """Losses and updates of the weight before each step."""

    losses: list[float] = field(default_factory=list)
    updates: list[Tensor] = field(default_factory=list)


def sgd(layer: nn.Module, lr: float) -> torch.optim.Optimizer:
    return torch.optim.SGD([p for p in layer.parameters() if p.requires_grad], lr=lr)


def pro_sgd(layer: nn.Module, lr: float) -> torch.optim.Optimizer:
    optimizer = sgd(layer, lr)
    optimizer.register_step_pre_hook(lora_pro_hook(layer))
    return optimizer


def adamw(layer: nn.Module, lr: float) -> torch.optim.Optimizer:
    trained = [p for p in layer.parameters() if p.requires_grad]
    return torch.optim.AdamW(trained, lr=lr, weight_decay=0.0)


METHODS = {
    "sgd": {FULL: sgd, "LoRA": sgd, "LoRA-Pro": pro_sgd},
    "adamw": {
        FULL: adamw,
        "LoRA": adamw,
        "LoRA-Pro": lambda layer, lr: LoRAProAdamW(layer, lr=lr),
        "LoRA-Pro, full moments": lambda layer, lr: LoRAProAdamW(layer, lr=lr, full_moments=True),
    },
}


def train(optimizer: str, lr: float, steps: int, seed: int = 0) -> tuple[dict[str, Curve], Tensor]:
    """Train; return the curve of every method, and the planted update."""
    curves = {}
    for name, make in METHODS[optimizer].items():
        torch.manual_seed(seed)
        draw = {"dtype": torch.float64}
        linear = nn.Linear(K, N, bias=False, **draw)
        start = linear.weight.detach().clone()
        planted = 0.2 * torch.randn(N, PLANTED, **draw) @ torch.randn(PLANTED, K, **draw)
        x = torch.randn(ROWS, K, **draw)
        target = x @ (start + planted).T
        layer: nn.Module = linear
        if name != FULL:
            layer = LoRALinear.from_linear(
                linear, r=RANK, lora_alpha=2 * RANK, adapter_dtype=torch.float64
            )
        stepper = make(layer, lr)
        curve = curves[name] = Curve()
        for _ in range(steps):
            loss = (layer(x) - target).square().mean() / 2
            curve.losses.append(loss.item())
            update = (
                linear.weight - start
                if name == FULL
                else layer.scaling * layer.lora_B @ layer.lora_A
            )
            curve.updates.append(update.detach())
            loss.backward()
            stepper.step()
            stepper.zero_grad()
    return curves, planted


def distances(curves: dict[str, Curve], planted: Tensor) -> dict[str, list[float]]:
    """Return |update - that of full fine-tuning|_F / |planted|_F at every step."""
    full = curves[FULL].updates
    return {
        name: [
            ((a - b).norm() / planted.norm()).item()
            for a, b in zip(curve.updates, full, strict=True)
        ]
        for name, curve in curves.items()
    }


def main(argv: list[str] | None = None) -> int:
    from peftkern.tools import tables

    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--optimizer", choices=sorted(METHODS), default="sgd")
    parser.add_argument("--lr", type=float, help="learning rate (1 for sgd, 0.005 for adamw)")
    parser.add_argument("--steps", type=int, default=60, help="training steps (60)")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(argv)
    lr = LR[options.optimizer] if options.lr is None else options.lr
    if options.steps < 1 or not lr > 0:
        parser.error("--steps: at least 1; --lr: above 0")
    curves, planted = train(options.optimizer, lr, options.steps, options.seed)
    apart = distances(curves, planted)
    columns = ["step"]
    for name in curves:
        columns += [f"{name}\nloss", *(["from full\nfine-tuning"] if name != FULL else [])]
    grid = tables.table(*columns, numbers=True)
    for step in sorted({*range(0, options.steps, max(1, options.steps // 10)), options.steps - 1}):
        row = [str(step)]
        for name, curve in curves.items():
            row.append(f"{curve.losses[step]:.3g}")
            if name != FULL:
                row.append(f"{apart[name][step]:.3f}")
        grid.add_row(*row)
    title = f"Planted regression, {options.optimizer} at {lr:g}"
    tables.section(tables.console(None if sys.stdout.isatty() else 100), title, grid)
    return 0


if __name__ == "__main__":
    sys.exit(main())
