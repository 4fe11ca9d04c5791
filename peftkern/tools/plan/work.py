"""Work of a training step: the FLOPs of its products, and the bytes that its ops read and write.

Every op that is dispatched counts by itself, a fused one of peftkern as one. At given rates an op
takes as long as the slower of the two: a roofline of each op, not of the step, for a product with
a thin factor waits for memory where the base's waits for arithmetic.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_iter
from torch.utils.flop_counter import flop_registry

from peftkern.backends.schemas import operands
from peftkern.tools.plan.rates import Rates

__all__ = ["IMPORTANCE", "STEP", "Work", "work_of"]

STEP, IMPORTANCE = "step", "importance"  # what an op belongs to
_FLASH = "_scaled_dot_product_flash_attention"
_AS_OF = {  # torch has no formula of these
    f"aten::{_FLASH}_for_cpu": getattr(torch.ops.aten, _FLASH),
    f"aten::{_FLASH}_for_cpu_backward": getattr(torch.ops.aten, f"{_FLASH}_backward"),
}
_NOTHING_MOVED = ("empty", "new_empty", "_unsafe_view", "_local_scalar_dense", "detach")


@dataclass(frozen=True)
class Work:
    """Sum over the ops of a step, {(what it belongs to, FLOPs, bytes): number of such ops}."""

    ops: Mapping[tuple[str, int, int], int]

    @property
    def flops(self) -> int:
        return sum(count * flops for (_, flops, _), count in self.ops.items())

    @property
    def nbytes(self) -> int:
        return sum(count * nbytes for (_, _, nbytes), count in self.ops.items())

    def seconds(self, rates: Rates) -> float:
        """Return the time of all ops, one after the other."""
        return sum(count * rates.seconds(f, b) for (_, f, b), count in self.ops.items())

    def without(self, part: str) -> Work:
        return Work({key: count for key, count in self.ops.items() if key[0] != part})


def work_of(func: Any, args: tuple, kwargs: dict[str, Any], out: Any) -> tuple[int, int]:
    """Return the FLOPs of an op's products and the bytes that it reads and writes."""
    if func.is_view or func._schema.name.removeprefix("aten::").startswith(_NOTHING_MOVED):
        return 0, 0
    written = [*_tensors(out), *_tensors(_written(func, args))]
    nbytes = sum(_nbytes(t) for t in _tensors((args, kwargs)))
    nbytes += sum({id(t): _nbytes(t) for t in written}.values())
    return _flops(func, args, kwargs, out), nbytes


def _tensors(values: Any) -> Iterator[Tensor]:
    return (value for value in tree_iter(values) if isinstance(value, Tensor))


def _nbytes(tensor: Tensor) -> int:
    """Return the bytes of a tensor, of an expanded one those that there are."""
    return min(tensor.numel() * tensor.element_size(), tensor.untyped_storage().nbytes())


def _written(func: Any, args: tuple) -> list[Any]:
    given = zip(func._schema.arguments, args, strict=False)
    return [a for known, a in given if known.alias_info is not None and known.alias_info.is_write]


def _flops(func: Any, args: tuple, kwargs: dict[str, Any], out: Any) -> int:
    if func.namespace != "peftkern":
        formula = flop_registry.get(_AS_OF.get(func._schema.name, func.overloadpacket))
        return 0 if formula is None else formula(*args, **kwargs, out_val=out)
    op = func._schema.name.removeprefix("peftkern::")
    given = dict(zip(operands(op), args, strict=True))
    if op.startswith("adalora_orthogonality"):
        # Of a Gram matrix, which is symmetric, one triangle; of its gradient all products.
        factors = [(min(f.shape), f.numel()) for f in [*given["lora_A"], *given["lora_B"]]]
        forward = op.endswith("forward")
        return sum((r + 1 if forward else 2 * r) * numel for r, numel in factors)
    if op.endswith("linear_forward"):
        N, K, r = out[0].shape[-1], given["x"].shape[-1], _rank(given)
        return 2 * (out[0].numel() // max(N, 1)) * (N * K + r * (N + K))
    if op.endswith("linear_backward"):
        dy, x, (dx, dA, dB, _) = given["dy"], given["x"], out
        N, r = dy.shape[-1], _rank(given)
        rows, K = dy.numel() // max(N, 1), dx.shape[-1] if dx.numel() else x.shape[-1]
        products = N * K + r * K if dx.numel() else 0
        products += r * N if dx.numel() or dA.numel() else 0  # dy @ lora_B
        products += r * K if dA.numel() else 0
        return 2 * rows * (products + (r * N if dB.numel() else 0))
    return 0


def _rank(given: dict[str, Any]) -> int:
    lora_A = given.get("lora_A")
    return 0 if lora_A is None else prod(lora_A.shape) // max(lora_A.shape[-1], 1)
