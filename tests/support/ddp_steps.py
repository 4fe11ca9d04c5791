"""A process of a DistributedDataParallel run, forked from one that has imported everything."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from peftkern.layers import LoRALinear
from peftkern.methods import LoRAFAOptimizer

STEPS, ROWS = 3, 8


def model() -> nn.Module:
    torch.manual_seed(0)
    net = nn.Sequential(LoRALinear(12, 10, r=2), nn.Tanh(), LoRALinear(10, 6, r=2)).double()
    for layer in (net[0], net[2]):
        nn.init.normal_(layer.lora_B)
    return net


def train(net: nn.Module, optimizer: torch.optim.Optimizer, part: slice) -> None:
    """Some steps, on those rows of each batch."""
    generator = torch.Generator().manual_seed(1)
    for _ in range(STEPS):
        x, target = (torch.randn(ROWS, n, generator=generator).double() for n in (12, 6))
        (net(x[part]) - target[part]).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()


def trained(net: nn.Module) -> list[Tensor]:
    return [p.detach().clone() for p in net.parameters() if p.requires_grad]


def process(rank: int, world: int, folder: Path) -> None:
    """Trains on its share of the rows and leaves what came out in a file."""
    torch.set_num_threads(1)  # OpenMP's threads have not come along
    start = f"file://{folder}/rendezvous"
    dist.init_process_group("gloo", init_method=start, rank=rank, world_size=world)
    net = model()
    optimizer = LoRAFAOptimizer(net, lr=1e-2)
    share = ROWS // world
    part = slice(rank * share, (rank + 1) * share)
    train(DistributedDataParallel(net), optimizer, part)
    torch.save(trained(net), folder / f"{rank}.pt")
    try:
        LoRAFAOptimizer(DistributedDataParallel(model()))
    except ValueError as error:
        (folder / f"{rank}.txt").write_text(str(error))
    dist.destroy_process_group()
