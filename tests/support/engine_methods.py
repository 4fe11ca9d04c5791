"""Methods of layers, each with a model to train in several processes and what its steps call."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from engine_runs import mean_over_ranks
from engines import STEPS
from method_models import Net, batches, fill_, peft_net
from torch import Tensor, nn

from peftkern.layers import LoRALinear, SVDLinear
from peftkern.methods import (
    DeltaLoRALinear,
    DeltaLoRAScheduler,
    DyLoRALinear,
    InPlaceDeltaLoRA,
    LoRAFAOptimizer,
    LoRAProAdamW,
    QuantumPEFTLinear,
    RoSALinear,
    RoSAScheduler,
    lora_pro_hook,
    sample_rank,
)
from peftkern.methods.adalora import RankAllocator

F32 = torch.float32
WARMUP = 6  # of RoSA, and the step with which Delta-LoRA starts


def net_of(make: Callable[[nn.Linear], nn.Module]) -> nn.Module:
    torch.manual_seed(1)
    net = Net(F32).requires_grad_(False)
    net.up, net.down = make(net.up), make(net.down)
    fill_(net)
    for name, p in net.named_parameters():
        if name.endswith("lora_E"):
            nn.init.normal_(p)
    return net


def adamw(model: nn.Module) -> torch.optim.Optimizer:
    trained = [p for p in model.parameters() if p.requires_grad]
    return torch.optim.AdamW(trained, lr=1e-2, foreach=False)


def peft() -> nn.Module:
    model = peft_net(F32)
    fill_(model)
    return model


class Method(NamedTuple):
    """A model, its optimizer, and what is called after each of its steps."""

    model: Callable[[], nn.Module]
    optimizer: Callable[[nn.Module], torch.optim.Optimizer] = adamw
    after: Callable[[nn.Module], Callable[[int], Any]] = lambda model: lambda step: None
    unused: bool = False  # whether parameters go without gradients


def allocating(model: nn.Module) -> Callable[[int], Any]:
    model.allocator = RankAllocator(model, target_r=2, total_step=STEPS, tinit=4, tfinal=8)
    return model.allocator.update_and_allocate


def scheduled(model: nn.Module, kind: type, *arguments: Any, **options: Any) -> Callable:
    schedule = kind(model, *arguments, **options)
    return lambda step: schedule.step()


def sampling(model: nn.Module) -> Callable[[int], Any]:
    """A rank for every step: the first process's, whatever the seeds."""
    rank = dist.get_rank() if dist.is_initialized() else 0
    torch.manual_seed(7 + rank)
    sample_rank(model)
    return lambda step: sample_rank(model)


def projected(model: nn.Module) -> torch.optim.Optimizer:
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=1e-2, momentum=0.9)
    optimizer.register_step_pre_hook(lora_pro_hook(model))
    return optimizer


METHODS = {
    "AdaLoRA (RankAllocator)": Method(
        lambda: net_of(lambda linear: SVDLinear(linear, r=6)), after=allocating
    ),
    "LoRA-FA": Method(peft, functools.partial(LoRAFAOptimizer, lr=1e-2)),
    "LoRA-Pro": Method(peft, functools.partial(LoRAProAdamW, lr=1e-2)),
    "LoRA-Pro (hook)": Method(peft, projected),
    "RoSA": Method(
        lambda: net_of(lambda linear: RoSALinear(linear, r=4, density=0.05)),
        after=functools.partial(
            scheduled, kind=RoSAScheduler, warmup_steps=WARMUP, collect_steps=2, candidates=40
        ),
        unused=True,
    ),
    "DyLoRA": Method(
        lambda: net_of(lambda linear: DyLoRALinear(linear, r=4)), after=sampling, unused=True
    ),
    "Delta-LoRA": Method(
        lambda: net_of(lambda linear: DeltaLoRALinear(linear, r=4)),
        after=functools.partial(scheduled, kind=DeltaLoRAScheduler, start_step=WARMUP),
    ),
    "Delta-LoRA (in place)": Method(
        lambda: net_of(lambda linear: LoRALinear.from_linear(linear, r=4)),
        after=functools.partial(scheduled, kind=InPlaceDeltaLoRA, start_step=WARMUP),
    ),
    "Quantum-PEFT": Method(lambda: net_of(lambda linear: QuantumPEFTLinear(linear, r=4))),
}


def losses_of(
    method: Method,
    engine: nn.Module,
    model: nn.Module,
    rank: int,
    world: int,
    optimizer: Any = None,
    backward: Callable[[Tensor], None] = Tensor.backward,
) -> Tensor:
    """Train; a process takes its share of each batch, one alone them all in turn."""
    optimizer = optimizer or method.optimizer(model)
    after = method.after(model)
    found = []
    for step, (x, target) in enumerate(batches(STEPS, F32), 1):
        losses = []
        for part in range(2) if world == 1 else [rank]:
            rows = slice(8 * part, 8 * part + 8)
            loss = (engine(x[rows]) - target[rows]).square().mean()
            if hasattr(model, "allocator"):
                loss = loss + 0.5 * model.allocator.orthogonality_loss()
            losses.append(loss / (3 - world))
            backward(losses[-1])
        optimizer.step()
        after(step)
        optimizer.zero_grad()
        found.append(sum(losses).detach())
    return mean_over_ranks(found) if world > 1 else torch.stack(found)
