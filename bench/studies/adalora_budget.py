"""AdaLoRA's budget on planted updates of unequal rank, which it has to find.

A teacher is a small transformer whose linear layers carry low-rank updates of planted ranks: some
none, some high. Students start without them and learn to give the teacher's outputs: AdaLoRA from
the same rank everywhere, pruned by the cubic schedule to as many triplets as were planted, and
LoRA with as many in equal parts.

    python bench/studies/adalora_budget.py                         # about a minute on two cores
    python bench/studies/adalora_budget.py --plot budget.svg --steps 1200

The picture needs matplotlib; without it none is drawn, and --plot is an error.

Exit status: 0, the planted ranks were found and AdaLoRA ended with the lower loss; 1, not; 2, bad
input.
"""

from __future__ import annotations

import argparse
import copy
import importlib.util
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from peftkern.layers import LoRALinear, SVDLinear
from peftkern.methods.adalora import RankAllocator

LAYERS, WIDTH, HEADS = 3, 64, 4
LINEAR = ("q", "k", "v", "o", "up", "down")
PLANTED = {  # per block, in the order of LINEAR; two per layer on average
    0: (0, 0, 6, 2, 0, 0),
    1: (0, 0, 0, 0, 8, 4),
    2: (0, 0, 4, 8, 2, 2),
}
PLOT = Path("adalora_budget.png")
INIT_R = 8
UPDATE = 1.0  # spectral norm of a planted update, against about 1.6 of the weight it changes
ORTHOGONAL = 0.1
# Maximum share of the budget in layers without planted rank.
MISPLACED = 0.25


class Block(nn.Module):
    """Attention and a feed-forward part, each behind a layer norm and added to its input."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(WIDTH, WIDTH) for _ in range(4))
        self.up, self.down = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        h = F.layer_norm(x, (WIDTH,))
        q, k, v = (
            m(h).unflatten(-1, (HEADS, -1)).transpose(1, 2) for m in (self.q, self.k, self.v)
        )
        x = x + self.o(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(F.layer_norm(x, (WIDTH,)))))


def transformer() -> nn.Sequential:
    return nn.Sequential(*(Block() for _ in range(LAYERS))).requires_grad_(False)


def names() -> dict[str, int]:
    """Return {layer: planted rank}."""
    return {f"{i}.{n}": r for i, row in PLANTED.items() for n, r in zip(LINEAR, row, strict=True)}


def plant(base: nn.Module) -> nn.Module:
    """Build the teacher: orthonormal updates of the planted ranks, all of the same strength."""
    teacher = copy.deepcopy(base)
    for name, r in names().items():
        weight = teacher.get_submodule(name).weight
        left, right = (torch.linalg.qr(torch.randn(n, r))[0] for n in weight.shape)
        weight += UPDATE * left @ right.T
    return teacher


def adapt(base: nn.Module, make) -> nn.Module:
    """Build a student: a copy of the base whose linear layers went through `make`."""
    student = copy.deepcopy(base)
    for name in names():
        parent, _, child = name.rpartition(".")
        owner = student.get_submodule(parent)
        setattr(owner, child, make(getattr(owner, child)))
    return student


def train(
    student: nn.Module,
    teacher: nn.Module,
    options: argparse.Namespace,
    allocator: RankAllocator | None,
    tick,
) -> tuple[list[float], list[dict[str, int]]]:
    """Train; return losses against the teacher, and the rank of every layer, at every step."""
    generator = torch.Generator().manual_seed(options.seed)
    parameters = [p for p in student.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=options.lr, weight_decay=0.0)
    decay = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, options.steps, options.lr / 20)
    losses, ranks = [], []
    for step in range(1, options.steps + 1):
        x = torch.randn(options.batch, 12, WIDTH, generator=generator)
        loss = F.mse_loss(student(x), teacher(x))
        losses.append(loss.item())
        if allocator is not None:
            loss = loss + ORTHOGONAL * allocator.orthogonality_loss()
        loss.backward()
        optimizer.step()
        decay.step()
        if allocator is not None:
            allocator.update_and_allocate(step)
            ranks.append({n: sum(kept) for n, kept in allocator.rank_pattern().items()})
        optimizer.zero_grad()
        tick()
    return losses, ranks


def report(options, planted, found, losses) -> bool:
    """Print the table of ranks and the verdict."""
    from rich.console import Console
    from rich.table import Table

    console = Console(width=None if sys.stdout.isatty() else 100, highlight=False)
    uniform = sum(planted.values()) // len(planted)
    grid = Table(title=f"Ranks: {sum(planted.values())} triplets for {len(planted)} layers")
    grid.add_column("layer")
    for title in ("planted", "AdaLoRA found", "uniform LoRA"):
        grid.add_column(title, justify="right")
    for name, r in planted.items():
        mark = "" if found[name] == r else "  [yellow]differs[/]"
        grid.add_row(name, str(r), f"{found[name]} {'█' * found[name]}{mark}", str(uniform))
    console.print(grid)
    budget = sum(planted.values())
    misplaced = sum(max(0, found[n] - r) for n, r in planted.items()) / budget
    tail = max(1, options.steps // 20)
    final = {name: sum(curve[-tail:]) / tail for name, curve in losses.items()}
    for name, value in final.items():
        console.print(f"loss of {name}, mean of the last {tail} steps: {value:.3g}")
    console.print(
        f"budget placed where it was not planted: {misplaced:.0%} (at most {MISPLACED:.0%})"
    )
    ok = misplaced <= MISPLACED and final["AdaLoRA"] < final["uniform LoRA"]
    console.print("[green]The planted ranks were found.[/]" if ok else "[red]Not found.[/]")
    return ok


def plot(path: Path, planted, ranks, losses) -> None:
    """Plot the budget over time, the found ranks, and both losses."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(15, 4.2), layout="constrained")
    moved, bars, curves = figure.subplots(1, 3)
    layers = list(planted)
    image = [[step[name] for step in ranks] for name in layers]
    shown = moved.imshow(image, aspect="auto", interpolation="nearest", cmap="viridis", vmin=0)
    figure.colorbar(shown, ax=moved, label="rank")
    moved.set(title="How the budget moved", xlabel="step")
    moved.set_yticks(range(len(layers)), layers, fontsize=7)
    places = range(len(layers))
    bars.barh([p - 0.2 for p in places], planted.values(), 0.4, label="planted")
    bars.barh([p + 0.2 for p in places], [ranks[-1][n] for n in layers], 0.4, label="found")
    bars.set(title="Planted and found ranks", xlabel="rank")
    bars.set_yticks(places, layers, fontsize=7)
    bars.invert_yaxis()
    bars.legend()
    for name, curve in losses.items():
        curves.semilogy(curve, label=name, linewidth=1)
    curves.set(title="Loss against the teacher", xlabel="step")
    curves.legend()
    figure.savefig(path, dpi=120)


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--steps", type=int, default=800, help="training steps (800)")
    parser.add_argument("--batch", type=int, default=32, help="sequences in a batch (32)")
    parser.add_argument("--lr", type=float, default=2e-2, help="learning rate at first (0.02)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--plot", type=Path, help=f"PNG or SVG ({PLOT})")
    options = parser.parse_args(argv)
    if options.steps < 20 or options.batch < 1:
        parser.error("--steps: at least 20; --batch: at least 1")
    can_plot = importlib.util.find_spec("matplotlib") is not None
    if options.plot is None:
        options.plot = PLOT if can_plot else None
        return options
    if not can_plot:
        parser.error("--plot: needs matplotlib, which is not installed: pip install matplotlib")
    if options.plot.suffix.lower() not in (".png", ".svg"):
        parser.error(f"--plot: expected a .png or .svg file, got {options.plot}")
    if not options.plot.parent.is_dir():
        parser.error(f"--plot: {options.plot.parent} is not a folder")
    return options


def main(argv: list[str] | None = None) -> int:
    from rich.progress import Progress

    options = parse(argv)
    torch.manual_seed(options.seed)
    planted = names()
    base = transformer()
    teacher = plant(base)
    average = sum(planted.values()) / len(planted)
    triplets = adapt(base, lambda linear: SVDLinear(linear, r=INIT_R, lora_alpha=4 * INIT_R))
    allocator = RankAllocator(
        triplets,
        target_r=average,
        total_step=options.steps,
        tinit=options.steps // 10,
        tfinal=options.steps // 3,
        deltaT=max(1, options.steps // 100),
    )
    uniform = adapt(
        base, lambda linear: LoRALinear.from_linear(linear, r=int(average), lora_alpha=8)
    )
    losses, ranks = {}, []
    with Progress(transient=True) as bars:
        for name, student in (("AdaLoRA", triplets), ("uniform LoRA", uniform)):
            bar = bars.add_task(name, total=options.steps)
            run = train(
                student,
                teacher,
                options,
                allocator if student is triplets else None,
                lambda bar=bar: bars.advance(bar),
            )
            losses[name] = run[0]
            ranks = ranks or run[1]
    found = allocator.compact_()
    ok = report(options, planted, found, losses)
    if options.plot is None:
        print("no picture: matplotlib is not installed (pip install matplotlib)")
    else:
        plot(options.plot, planted, ranks, losses)
        print(f"written: {options.plot}")
    return 0 if ok else 1


if __name__ == "__main__":
    sys.exit(main())
