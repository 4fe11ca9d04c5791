"""One DyLoRA run against a run for each rank: distance to a known update.

A linear layer is to become another one, weight + update of rank 4, from random inputs. The table
gives |W + dW_b - target| for every rank b: the least that any update of rank b reaches
(Eckart-Young), a LoRA run of that rank, one DyLoRA run (all ranks of a step trained, or the last
alone), DyLoRA with the paper's scaling lora_alpha / b, and LoRA of rank 4 cut to its first b ranks.

    python bench/studies/dylora_ranks.py        # about ten seconds
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import torch
from torch import nn

from peftkern.methods import DyLoRALinear, sample_rank, set_rank
from peftkern.tools import tables

SIZE, ROWS, LR = 32, 64, 0.02
VALUES = torch.tensor([4.0, 2.0, 1.0, 0.5])  # singular values of the update
RANKS = range(1, len(VALUES) + 1)


def fit(steps: int, prepare: Callable[[DyLoRALinear], object], **options: bool) -> list[float]:
    """Train with the rank that `prepare` sets before each step; return the distance per rank."""
    torch.manual_seed(0)
    base = nn.Linear(SIZE, SIZE, bias=False)
    U, V = (torch.linalg.qr(torch.randn(SIZE, len(VALUES)))[0] for _ in range(2))
    target = base.weight.detach() + U @ torch.diag(VALUES) @ V.T
    layer = DyLoRALinear(base, r=len(VALUES), lora_alpha=len(VALUES), **options)
    optimizer = torch.optim.Adam(layer.parameters(), lr=LR)
    for _ in range(steps):
        prepare(layer)
        x = torch.randn(ROWS, SIZE)
        (layer(x) - x @ target.T).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    distances = []
    for rank in RANKS:
        set_rank(layer, rank)
        distances.append((layer.merge().weight - target).norm().item())
    return distances


def sampling(train_last_only: bool = False) -> Callable[[DyLoRALinear], object]:
    generator = torch.Generator().manual_seed(0)
    options = {"generator": generator, "train_last_only": train_last_only}
    return lambda layer: sample_rank(layer, **options)


def columns(steps: int) -> dict[str, list[float]]:
    """Return {column: distance at each rank}; a run for each rank takes a share of the steps."""
    share = max(1, steps // len(VALUES))
    return {
        "least": [VALUES[rank:].norm().item() for rank in RANKS],
        "own run": [
            fit(share, lambda layer, rank=rank: set_rank(layer, rank))[rank - 1] for rank in RANKS
        ],
        "DyLoRA": fit(steps, sampling()),
        "DyLoRA, last rank": fit(steps, sampling(train_last_only=True)),
        "DyLoRA, alpha / b": fit(steps, sampling(), scale_by_rank=True),
        "LoRA, cut": fit(steps, lambda layer: None),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description="DyLoRA against a run for each rank")
    parser.add_argument("--steps", type=int, default=1200, help="of the optimizer (1200)")
    args = parser.parse_args()
    if args.steps < 1:
        parser.error(f"--steps: expected a positive number, got {args.steps}")
    found = columns(args.steps)
    table = tables.table("rank", *found, numbers=True)
    for rank, row in zip(RANKS, zip(*found.values(), strict=True), strict=True):
        table.add_row(str(rank), *(f"{distance:.3f}" for distance in row))
    tables.section(tables.console(), "Distance to the target", table)


if __name__ == "__main__":
    main()
