"""Arithmetic of a merge, in the order of PEFT's `merge_and_unload`, for the same bits.

    W' = cast(float(W) + s * (B @ A))                            linear layers, convolutions
    W' = cast(float(W) + float(cast(s * (B @ A))))               embeddings, experts
    W' = cast(m / |T| * T),  T = float(W) + s * (B @ A)          DoRA, |T| by rows
    b' = cast(float(b) + s * bias)

The products and sums are float32, whatever the dtypes of the files. A panel of rows passes through
buffers that stay in a core's cache: the product is written, the weight is widened, added to and
rounded. Several adapters are added up before the one rounding.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from peftkern.tools.adapters import Update
from peftkern.tools.merge.edits import Edit
from peftkern.tools.merge.placement import Place

_EXPONENT = 128  # of the largest power of two that float32 holds
Product = tuple[Tensor, Tensor, float]  # left [M, r] @ right [r, N] * scaling


@dataclass(frozen=True)
class Added:
    """What is added to some rows of a stored matrix.

    rounded: to the dtype of the weight, before it is added. magnitude: of DoRA, by rows.
    """

    products: tuple[Product, ...]
    rounded: bool = False
    magnitude: Tensor | None = None


class Change(NamedTuple):
    """Sums over panels, D = T - W, by which a report tells what rounding left of an update.

    values: over how many the sums go, of those that were merged.
    """

    update: float = 0.0  # |D|^2
    total: float = 0.0  # |T|^2
    error: float = 0.0  # |T - Q(T)|^2
    kept: float = 0.0  # <Q(T) - Q(W), D>
    values: int = 0
    merged: int = 0

    def __add__(self, other: Change) -> Change:
        return Change(*(a + b for a, b in zip(self, other, strict=True)))

    @property
    def scaled(self) -> Change:
        """As if every value that was merged had been compared."""
        factor = self.merged / self.values if self.values else 1.0
        return Change(*(factor * one for one in self[:4]), self.values, self.merged)

    @property
    def survival(self) -> float:
        return self.kept / self.update if self.update else 1.0

    @property
    def relative_error(self) -> float:
        return math.sqrt(self.error / self.total) if self.total else 0.0

    @property
    def error_of_update(self) -> float:
        return math.sqrt(self.error / self.update) if self.update else 0.0


class Buffers:
    """Memory of one thread, for panels of any shape."""

    def __init__(self) -> None:
        self._memory: dict[str, Tensor] = {}
        self._taken: dict[str, tuple[tuple[Sequence[int], torch.dtype], Tensor]] = {}

    def take(self, name: str, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """Return memory that the next call of the same name returns again."""
        wanted, taken = (shape, dtype), self._taken.get(name)
        if taken is None or taken[0] != wanted:
            nbytes, memory = math.prod(shape) * dtype.itemsize, self._memory.get(name)
            if memory is None or len(memory) < nbytes:
                self._memory[name] = memory = torch.empty(nbytes, dtype=torch.uint8)
            taken = wanted, memory[:nbytes].view(dtype).view(*shape)
            self._taken[name] = taken
        return taken[1]


def in_panels(edit: Edit, place: Place) -> bool:
    """Return whether rows can be merged apart from the others: DoRA's norms of columns cannot, and
    a convolution's product is PEFT's convolution."""
    whole = any(
        (u.magnitude is not None and (u.kind != "linear" or edit.flipped or place.transposed))
        or u.kind == "conv"
        for u, _ in edit.updates
    )
    return bool(edit.updates) and not whole and edit.value is None and edit.rows is None


def added_to(edit: Edit, place: Place, expert: int | None) -> Added:
    """Take the part of a parameter's updates that belongs to the rows of a stored matrix.

    expert: of a stack, that the matrix is.
    """
    products, magnitude, rounded = [], None, False
    own = slice(place.row, place.row + place.rows) if place.expert == expert else slice(None)
    for update, weight in edit.updates:
        left, right = _factors(update, edit.flipped, expert)
        if place.transposed:
            left, right = right.T, left.T
        parts = (left[own].float().contiguous(), right.float().contiguous())
        products.append((*parts, update.scaling * weight))
        rounded = rounded or update.kind in ("embedding", "experts")
        if update.magnitude is not None:
            magnitude = update.magnitude.float().reshape(-1)[own]
    return Added(tuple(products), rounded, magnitude)


def _factors(update: Update, flipped: bool, expert: int | None) -> tuple[Tensor, Tensor]:
    A, B = update.lora_A, update.lora_B
    if update.kind == "experts":
        A, B = A[expert or 0], B[expert or 0]
    if flipped or update.kind == "embedding":
        return A.T, B.T
    return B, A


def merge_rows(rows: Tensor, first: int, added: Added, dtype: torch.dtype, buffers: Buffers):
    """Return the sum T of a panel [k, N] in float32 (float64 for such a weight), and it in `dtype`.

    first: number of its first row among those that `added` is for. Both lie in the buffers.
    """
    wide = torch.promote_types(rows.dtype, torch.float32)
    total = buffers.take("total", rows.shape, wide)
    total.copy_(rows)
    update = buffers.take("update", rows.shape, torch.float32)
    last = first + len(rows)
    (left, right, scaling), *others = added.products
    torch.mm(left[first:last], right, out=update)
    rounded = added.rounded and rows.dtype is dtype
    mantissa, exponent = math.frexp(scaling)
    if not others and not rounded and mantissa == 0.5 and exponent <= _EXPONENT:
        total.add_(update, alpha=scaling)  # a power of two: the product with it rounds nothing
    else:
        update.mul_(scaling)
        for left, right, scaling in others:
            one = buffers.take("another", rows.shape, torch.float32)
            update.add_(torch.mm(left[first:last], right, out=one), alpha=scaling)
        if rounded:
            short = buffers.take("short", rows.shape, dtype)
            update.copy_(short.copy_(update))
        total.add_(update)
    if added.magnitude is not None:
        norm = torch.linalg.norm(total, dim=1)
        total.mul_((added.magnitude[first:last] / norm).view(-1, 1))
    if wide is dtype:
        return total, total
    return total, buffers.take("result", rows.shape, dtype).copy_(total)


def merge_whole(weight: Tensor, edit: Edit, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return the sum T of a whole parameter, already replaced, and it in `dtype`."""
    total = weight
    for update, factor in edit.updates:
        delta = _delta(weight, update, edit.flipped) * (update.scaling * factor)
        if update.kind in ("embedding", "experts") and weight.dtype is dtype:
            delta = delta.to(dtype).float() if update.magnitude is None else delta
        if update.magnitude is None:
            total = total.float() + delta if total.dtype is not torch.float64 else total + delta
        else:
            total = _dora(weight, delta, update, edit.flipped)
    for vector, factor in edit.added:
        total = total.float() + vector.float() * factor
    if edit.rows is not None:
        numbers, values = edit.rows
        total = total.clone()
        total[numbers] = values.to(weight.dtype).to(total.dtype)
    return total, total.to(dtype)


def _delta(weight: Tensor, update: Update, flipped: bool) -> Tensor:
    """Return B @ A in the shape of the parameter."""
    A, B = update.lora_A.float(), update.lora_B.float()
    if update.kind == "conv":
        return _convolved(weight, A, B)
    if update.kind == "experts" and weight.dim() == 3:
        parts = [torch.mm(*_factors(update, flipped, e)) for e in range(len(A))]
        return torch.stack(parts)
    A, B = (A[0], B[0]) if A.dim() == 3 else (A, B)
    return (B @ A).T if flipped or update.kind == "embedding" else B @ A


def _convolved(weight: Tensor, A: Tensor, B: Tensor) -> Tensor:
    kernel = weight.shape[2:]
    if math.prod(kernel) == 1:
        return (B @ A).view(weight.shape)
    convolve = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}[len(kernel)]
    A = A.view(len(A), *weight.shape[1:]).transpose(0, 1)
    return convolve(A, B.view(*B.shape, *[1] * len(kernel))).transpose(0, 1)


def _dora(weight: Tensor, delta: Tensor, update: Update, flipped: bool) -> Tensor:
    """Scale rows, or the columns of an embedding and of Conv1D, to the magnitudes."""
    magnitude = update.magnitude.float().reshape(-1)
    if update.kind == "conv":
        dims = tuple(range(1, weight.dim()))
        norm = (weight + delta).norm(p=2, dim=dims, keepdim=True).reshape(-1)
        return (magnitude / norm).view(-1, *[1] * len(dims)) * (weight + delta)
    turned = flipped or update.kind == "embedding"
    by_rows = weight.T + delta.T if turned else weight + delta
    factor = magnitude / torch.linalg.norm(by_rows, dim=1)
    return factor.view(1, -1) * (weight + delta) if turned else factor[:, None] * by_rows


def measure(weight: Tensor, total: Tensor, stored: Tensor, dense: Tensor | None = None) -> Change:
    """Compare a panel before, merged and as it is stored.

    dense: the weight as it would be stored without an update; by default rounded like `stored`.
    """
    before = weight.float()
    plain = dense is None and weight.dtype is stored.dtype
    alone = weight.to(stored.dtype) if dense is None else dense
    rounded = before if plain else alone.float()
    update, after = total.float() - before, stored.float()
    error = total - after
    sums = (_dot(update, update), _dot(total, total), _dot(error, error))
    return Change(*sums, _dot(after - rounded, update), weight.numel(), weight.numel())


def _dot(one: Tensor, other: Tensor) -> float:
    """Return a sum over one panel, to about five digits."""
    found = torch.dot(one.reshape(-1), other.reshape(-1)).item()
    if math.isfinite(found):
        return found
    return torch.dot(one.reshape(-1).double(), other.reshape(-1).double()).item()


def is_finite(stored: Tensor) -> bool:
    """Return whether a merged panel is finite; the sum of one that is nearly always is, too."""
    return math.isfinite(stored.sum().item()) or bool(torch.isfinite(stored).all())
