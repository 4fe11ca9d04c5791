"""Ranks of a distributed run: forked from this process, which has imported all that they need.

A rank computes with one thread and meets the others over gloo, by files alone, no port.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from accelerate.state import AcceleratorState, GradientState
from adalora_models import quantize_4bit_
from peft_models import add_lora, fallbacks, served_by_us, text_batch, tiny_llama
from torch import Tensor, nn

import peftkern

STEPS = 30
ROWS = 4  # of a batch, shared out among the ranks
LAYERS = 14  # with an adapter, of the tiny Llama: seven in each of two decoder layers
CURVE = {"rtol": 0, "atol": 1e-5}  # of 30 losses in float32 against one process without peftkern


def in_ranks(work: Callable[..., Any], count: int, folder: Path, *arguments: Any) -> list[Any]:
    """Call `work(rank, *arguments)` in so many processes; what each returned, by rank.

    Raises: torch.multiprocessing's exceptions, of a rank that raised or that a signal ended.
    """
    folder.mkdir(parents=True, exist_ok=True)
    mp.start_processes(
        _rank, args=(count, folder, work, arguments), nprocs=count, start_method="fork"
    )
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(count)]


def _rank(rank: int, count: int, folder: Path, work: Callable[..., Any], arguments: tuple) -> None:
    torch.set_num_threads(1)  # OpenMP's threads have not come along
    torch.manual_seed(0)
    # A Trainer that ran in the parent has left accelerate's state there: one process, no group.
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    # What accelerate and the Trainer read; they find the group made.
    numbers = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count}
    os.environ.update({name: str(value) for name, value in numbers.items()})
    store = f"file://{folder / 'store'}"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=count)
    warnings.filterwarnings("ignore", message=".*barrier.*|.*full_state_dict.*")
    peftkern.reset_stats()
    torch.save(work(rank, *arguments), folder / f"{rank}.pt")
    dist.destroy_process_group()


def lora_llama(**config: Any) -> nn.Module:
    """LoRA over a dense base, in every rank the same."""
    return add_lora(tiny_llama(), **config)


def qlora_llama(quant_storage: torch.dtype = torch.float32, **config: Any) -> nn.Module:
    """LoRA over bitsandbytes' NF4, stored in the dtype that FSDP shards."""
    return add_lora(quantize_4bit_(tiny_llama(), quant_storage=quant_storage), **config)


def nf4_llama(**config: Any) -> nn.Module:
    """LoRA over peftkern's own NF4 layers."""
    base = tiny_llama()
    peftkern.quantize_(base)
    return add_lora(base, **config)


def share(step: int) -> dict[str, Tensor]:
    """This rank's rows of the batch of a step; all of it in one process."""
    rank, count = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    batch = text_batch(rows=ROWS, seed=1000 + step)
    return {name: rows[rank::count] for name, rows in batch.items()}


def optimizer_of(model: nn.Module) -> torch.optim.AdamW:
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)


def train_step(model: nn.Module, optimizer: torch.optim.Optimizer, step: int) -> Tensor:
    """One step; the loss of the whole batch."""
    loss = model(**share(step)).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    loss = loss.detach()
    if dist.is_initialized():
        dist.all_reduce(loss)
        loss /= dist.get_world_size()
    return loss


def loss_curve(
    model: nn.Module, optimizer: torch.optim.Optimizer | None = None, steps: range = range(STEPS)
) -> Tensor:
    """Losses of those steps."""
    optimizer = optimizer or optimizer_of(model)
    return torch.stack([train_step(model, optimizer, step) for step in steps])


def outcome(calls: int) -> str:
    """What `stats()` says of all forward calls of patched layers: "served", or the one reason.

    Args: calls, of adapter layers since the last `peftkern.reset_stats()`.
    """
    reasons = fallbacks()
    counted = sum(reasons.values())
    if not reasons and served_by_us() == calls:
        return "served"
    if len(reasons) == 1 and counted == calls:
        return next(iter(reasons))
    return f"{served_by_us()} of {calls} calls served, {reasons or 'no reason given'}"
