"""Models, batches and one process without peftkern, for trainings in several processes."""

from __future__ import annotations

import contextlib
import hashlib
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import expert_models
import torch
import torch.distributed as dist
from adalora_models import adalora_llama, quantize_4bit_
from engines import STEPS
from peft_models import add_lora, fill_adapters, text_batch, tiny_llama
from torch import Tensor, nn

import peftkern

ROWS = 8  # of a batch
OPS = ("lora_linear_forward", "nf4_lora_linear_forward", "grouped_linear_forward")


def model_of(method: str) -> nn.Module:
    """A PeftModel in training, its adapters away from zero, where Adam divides by rounding."""
    if method == "experts":
        return expert_models.add_experts_lora(expert_models.tiny_moe()).train()
    if method == "AdaLoRA":
        schedule = {"total_step": STEPS, "tinit": 4, "tfinal": 8, "deltaT": 2}
        model = adalora_llama(**schedule)
    elif method == "QLoRA (bitsandbytes)":
        model = add_lora(quantize_4bit_(tiny_llama()))
    else:
        model = add_lora(tiny_llama(), use_dora=method == "DoRA")
    fill_adapters(model)
    return model.train()


def products_of(model: nn.Module) -> int:
    """Calls of our ops in one forward pass: one of each layer with an adapter, two of experts."""
    return sum(name.endswith("lora_A") for name, _ in model.named_modules())


def products_served() -> int:
    """Forward calls of our ops since the last `peftkern.reset_stats()`; none has fallen back."""
    counted = peftkern.stats()
    assert counted.fallbacks == {}, counted.fallbacks
    return sum(n for (op, _), n in counted.calls.items() if op in OPS)


def batch_of(step: int, rows: slice = slice(None)) -> dict[str, Tensor]:
    return {name: ids[rows] for name, ids in text_batch(ROWS, seed=step).items()}


def share_of(rank: int, world: int, count: int = 1) -> Iterator[slice]:
    """Rows of a rank, in `count` batches of one size."""
    size = ROWS // world // count
    for i in range(count):
        start = rank * (ROWS // world) + i * size
        yield slice(start, start + size)


def adamw_of(model: nn.Module) -> torch.optim.AdamW:
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=2e-3)


def curve_alone(
    model: nn.Module,
    parts: Callable[[int], list[tuple[float, slice]]] = lambda step: [(1.0, slice(None))],
    cast: Callable[[], contextlib.AbstractContextManager] = contextlib.nullcontext,
    steps: int = STEPS,
) -> Tensor:
    """Losses of so many steps in one process without peftkern.

    Args: parts of a step: rows of its batch, and with what weight their loss counts.
    """
    optimizer = adamw_of(model)
    adalora = hasattr(model.base_model, "update_and_allocate")
    found = []
    for step in range(1, steps + 1):
        with cast():
            loss = sum(weight * model(**batch_of(step, rows)).loss for weight, rows in parts(step))
        loss.backward()
        optimizer.step()
        if adalora:
            model.base_model.update_and_allocate(step)
        optimizer.zero_grad()
        found.append(loss.detach())
    return torch.stack(found)


def mean_over_ranks(losses: list[Tensor]) -> Tensor:
    total = torch.stack(losses)
    dist.all_reduce(total)
    return total / dist.get_world_size()


def named(name: str, run: Callable[..., Any], *arguments: Any) -> Any:
    """Call `run(*arguments)`; what it raises says for what."""
    try:
        return run(*arguments)
    except Exception as error:
        error.add_note(name)
        raise


def saved(model: nn.Module, folder: Path) -> str:
    """Digest of the adapter that this rank saves."""
    own = Path(tempfile.mkdtemp(dir=folder))
    model.save_pretrained(own)
    return hashlib.sha256((own / "adapter_model.safetensors").read_bytes()).hexdigest()


def assert_equal_adapters(model: nn.Module, folder: Path) -> None:
    """Every rank saves the same adapter, bit for bit."""
    digests: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(digests, saved(model, folder))
    assert len(set(digests)) == 1, "ranks saved other adapters"
