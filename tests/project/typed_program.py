"""A user's program, for mypy alone: `make lint` checks that the public API has the types it says.

Nothing runs it. `assert_type` fails on Any, too, which is what an untyped name would be.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

import peftkern
from peftkern import functional, layers, methods, monitor
from peftkern.integrations.transformers import MonitorCallback, PeftKernCallback
from peftkern.methods.adalora import RankAllocator

if TYPE_CHECKING:
    from typing_extensions import assert_type


def patches(model: nn.Module) -> None:
    report = peftkern.patch(model)
    assert_type(report.patched, list[str])
    assert_type(report.skipped, dict[str, str])
    assert_type(report.unserved, dict[str, str])
    assert_type(peftkern.patch(model, include=["q_proj"], dry_run=True), peftkern.PatchReport)
    with peftkern.patched(model, exclude=("lm_head",), strict=True) as told:
        assert_type(told, peftkern.PatchReport)
    assert_type(peftkern.is_patched(model), bool)
    assert_type(peftkern.unpatch(model), list[str])
    assert_type(peftkern.quantize_(model, blocksize=64, exclude=["lm_head"]), list[str])
    with peftkern.use_backend("torch"):
        assert_type(peftkern.stats().fallbacks, dict[tuple[str, str], int])
    peftkern.reset_stats()
    raise peftkern.BackendUnavailableError("cuda")


class LoRA(nn.Module):
    """A framework's own layer."""

    weight: Tensor
    A: Tensor
    B: Tensor


def told(op: str, reason: str) -> None:
    print(op, reason)


def registered() -> None:
    peftkern.register_layer(LoRA, read=lambda layer: peftkern.LoRAParts(layer.weight, None, None))
    peftkern.register_layer(LoRA)
    with peftkern.on_fallback(told) as handle:
        handle.remove()


def dense(x: Tensor, weight: Tensor, A: Tensor, B: Tensor) -> None:
    y = peftkern.lora_linear(x, weight, A, B, scaling=2.0, bias=None, dropout_p=0.1)
    assert_type(y, Tensor)
    assert_type(functional.lora_linear(x, weight, A, B, scaling=2.0), Tensor)


def nf4(x: Tensor, weight: Tensor, A: Tensor, B: Tensor) -> None:
    w = peftkern.quantize_nf4(weight, double_quant=False)
    assert_type(w, peftkern.NF4Weight)
    assert_type(w.state_dict(), dict[str, Tensor])
    assert_type(peftkern.dequantize_nf4(w, torch.float32), Tensor)
    assert_type(peftkern.nf4_linear(x, w), Tensor)
    assert_type(peftkern.nf4_lora_linear(x, w, A, B, scaling=2.0), Tensor)
    print(peftkern.explain("nf4_lora_linear", x, w, A, B, scaling=2.0))


def experts(x: Tensor, index: Tensor, weights: Tensor, up: Tensor, down: Tensor) -> None:
    routing = peftkern.route(index, 8)
    assert_type(routing.offsets, Tensor)
    assert_type(peftkern.grouped_lora_linear(x, up, routing.offsets), Tensor)
    one, other = peftkern.ExpertLinear(up), peftkern.ExpertLinear(down)
    assert_type(peftkern.lora_experts(x, index, weights, one, other), Tensor)


def modules(linear: nn.Linear) -> None:
    assert_type(layers.LoRALinear.from_linear(linear, r=8).merge(), nn.Linear)
    assert_type(layers.NF4LoRALinear.from_linear(linear, r=8), layers.NF4LoRALinear)
    assert_type(layers.NF4Linear.from_linear(linear).dequantize(), Tensor)


def trained_by(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    hook = methods.lora_pro_hook(model)
    assert_type(hook, Callable[[torch.optim.Optimizer, Any, Any], None])
    assert_type(methods.freeze_lora_A(model), list[str])
    assert_type(methods.sample_rank(model), int)
    assert_type(methods.LoRAFAOptimizer(model), methods.LoRAFAOptimizer)
    allocator = RankAllocator(model, total_step=100, target_r=4)
    assert_type(allocator.update_and_allocate(1)[0], float)


def watched() -> None:
    assert_type(PeftKernCallback(), PeftKernCallback)
    assert_type(MonitorCallback(jsonl="run.jsonl"), MonitorCallback)
    with monitor.TrainingMonitor(jsonl="run.jsonl") as watch:
        watch.step(tokens=512, loss=1.0)
        assert_type(watch.summary(), monitor.Summary)
