"""RoSA: a linear layer plus a low-rank and a sparse update, and the mask of the sparse one.

mask = SparseMask.from_indices(rows, columns, weight.shape)
y = rosa_linear(x, weight, lora_A, lora_B, values, mask, scaling=2.0)
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from peftkern.backends import ops
from peftkern.formats.block_weight import QuantizedWeight
from peftkern.functional.arguments import (
    cast_for_autocast,
    check_factors,
    check_float,
    check_frozen,
    check_linear,
    check_stored,
    check_values,
    draw_keep,
    fold_scaling,
    mismatch,
)
from peftkern.functional.autograd import (
    batchable,
    dense,
    differentiable_gradients,
    forced_backend,
    gradients,
    product,
    save_for_backward,
    saved_tensors,
    use_backend,
    wanted,
)

__all__ = ["SparseMask", "rosa_linear"]
_INTEGERS = (torch.int32, torch.int64)


@dataclass(frozen=True)
class SparseMask:
    """Mask of a sparse [N, K]: its places row after row, and the same column after column.

    crow [N + 1] and col [nnz]: the columns of row n are col[crow[n] : crow[n + 1]], ascending.
    ccol [K + 1] and row [nnz] are those of the transposed matrix, whose entry j is entry order[j].
    All of them are int32, or int64 where a size needs it or the caller gave int64.
    """

    shape: tuple[int, int]
    crow: Tensor
    col: Tensor
    ccol: Tensor
    row: Tensor
    order: Tensor

    @classmethod
    def from_indices(
        cls,
        rows: Tensor,
        columns: Tensor,
        shape: tuple[int, int],
        dtype: torch.dtype | None = None,
    ) -> SparseMask:
        """Make a mask of places in any order; it has them sorted by row, then by column.

        Args: rows and columns [nnz], int32 or int64; shape (N, K); dtype of the indices, int32 or
            int64, by default int32 if N, K and nnz allow it.
        Raises: ValueError on an index out of range, a place that comes twice, or a wrong dtype.
        """
        _check_shape(shape)
        N, K = shape
        for name, index, limit in (("rows", rows, N), ("columns", columns, K)):
            check_values(name, index)
            if index.dim() != 1 or index.dtype not in _INTEGERS or len(index) != len(rows):
                raise ValueError(
                    f"{name}: expected [nnz] int32 or int64, as many rows as columns, got "
                    f"{list(index.shape)} {index.dtype}"
                )
            if len(index) and not 0 <= int(index.min()) <= int(index.max()) < limit:
                raise ValueError(
                    f"{name}: expected indices from 0 to {limit - 1}, got {int(index.min())} to "
                    f"{int(index.max())}"
                )
        flat = (rows.long() * K + columns.long()).sort().values
        if len(flat) and (flat.diff() == 0).any():
            raise ValueError("rows, columns: expected every place once, got one twice")
        smallest = torch.int32 if max(N, K, len(flat)) < 2**31 else torch.int64
        dtype = smallest if dtype is None else dtype
        if dtype not in _INTEGERS or (dtype is torch.int32 and smallest is torch.int64):
            raise ValueError(f"dtype: expected {smallest} or int64, got {dtype}")
        row, col = flat // max(K, 1), flat % max(K, 1)
        order = (col * N + row).argsort()
        parts = (_starts(row, N), col, _starts(col, K), row[order], order)
        return cls((N, K), *(part.to(dtype) for part in parts))

    @classmethod
    def from_csr(cls, crow: Tensor, col: Tensor, shape: tuple[int, int]) -> SparseMask:
        """Make a mask of compressed rows, whose columns ascend.

        Raises: as `from_indices`, and ValueError if crow does not ascend from 0 to nnz or the
            columns of a row do not ascend: values belong to entries by their order.
        """
        _check_shape(shape)
        N = shape[0]
        for name, index in (("crow", crow), ("col", col)):
            check_values(name, index)
            if index.dim() != 1 or index.dtype not in _INTEGERS or index.dtype is not crow.dtype:
                raise ValueError(
                    f"{name}: expected 1-d int32 or int64, both alike, got {list(index.shape)} "
                    f"{index.dtype}"
                )
        if len(crow) != N + 1 or crow[0] != 0 or crow[-1] != len(col) or (crow.diff() < 0).any():
            raise ValueError(f"crow: expected {N + 1} numbers that ascend from 0 to {len(col)}")
        rows = torch.repeat_interleave(torch.arange(N, device=crow.device), crow.diff().long())
        mask = cls.from_indices(rows, col, shape, col.dtype)
        if not torch.equal(mask.col, col):
            raise ValueError("col: expected the columns of each row to ascend")
        return mask

    @property
    def nnz(self) -> int:
        return len(self.col)

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        return self.crow, self.col, self.ccol, self.row, self.order

    def flat(self) -> Tensor:
        """Return the places as indices into the flattened [N, K], int64, ascending."""
        N, K = self.shape
        row = torch.repeat_interleave(
            torch.arange(N, device=self.col.device), self.crow.diff().long()
        )
        return row * K + self.col

    def to_dense(self, values: Tensor) -> Tensor:
        """Return [N, K] with values [nnz] in their places and zero elsewhere."""
        N, K = self.shape
        return values.new_zeros(N * K).index_put((self.flat(),), values).view(N, K)


def rosa_linear(
    x: Tensor,
    weight: Tensor | QuantizedWeight,
    lora_A: Tensor,
    lora_B: Tensor,
    values: Tensor,
    mask: SparseMask,
    *,
    scaling: float | Tensor,
    bias: Tensor | None = None,
    dropout_p: float = 0.0,
) -> Tensor:
    """Apply a linear layer plus a low-rank and a sparse update.

    y = x @ (weight + S).T + scaling * (dropout(x) @ lora_A.T) @ lora_B.T + bias

    Args: x, lora_A, lora_B, scaling, bias, dropout_p as in `lora_linear`; weight [N, K] in the
        dtype of x, or in NF4, frozen; S [N, K] has values [nnz], any float dtype, at the places of
        mask, which is on the device of x. Autocast leaves the values alone.
    Returns: [..., N], dtype of x: x @ S.T is summed in float32 (float64 for float64), added to what
        `lora_linear` or `nf4_lora_linear` gives and rounded once more.
    Raises: ValueError naming both sides on a shape, dtype or device mismatch, and if weight
        requires a gradient.
    Gradients: x, lora_A, lora_B, bias, values (dy.T @ x at the places of mask alone), a tensor
        scaling; twice differentiable where x is saved. It is saved once, and only if lora_A or
        values require a gradient; the sparse part makes no tensor of the size of weight.
        Error bound: kernels/NUMERICS.md#rosa
    Source: Nikdan et al. 2024, arXiv:2401.04679
    """
    check_float("x", x)
    quantized = isinstance(weight, QuantizedWeight)
    if not quantized:
        check_frozen(weight)
    dense_weight = None if quantized else weight
    x, dense_weight, lora_A, lora_B, bias = cast_for_autocast(x, dense_weight, lora_A, lora_B, bias)
    if quantized:
        check_stored("weight", x, weight)
        base, layout = weight.tensors, weight.layout
        if isinstance(bias, Tensor) and bias.is_floating_point():
            bias = bias.to(x.dtype)
    else:
        base, layout = (dense_weight,), ()
        if weight.dim() != 2 or dense_weight.dtype is not x.dtype or weight.device != x.device:
            raise mismatch("weight", f"[N, K] {x.dtype} on {x.device} like x", dense_weight)
    check_linear(x, *weight.shape, bias, dropout_p)
    check_factors(*weight.shape, x.device, lora_A, lora_B)
    if not isinstance(mask, SparseMask):
        raise mismatch("mask", "a SparseMask", mask)
    if mask.shape != tuple(weight.shape) or mask.col.device != x.device:
        raise ValueError(
            f"mask: expected {list(weight.shape)} on {x.device} like weight, got "
            f"{list(mask.shape)} on {mask.col.device}"
        )
    check_float("values", values)
    if values.shape != (mask.nnz,) or values.device != x.device:
        raise mismatch("values", f"[{mask.nnz}] on {x.device} for this mask", values)
    lora_B, scaling = fold_scaling(lora_B, scaling, x)
    values = values.to(torch.float64 if x.dtype is torch.float64 else torch.float32)
    keep = draw_keep(x, dropout_p)
    args = (x, lora_A, lora_B, bias, values, scaling, keep, dropout_p)
    trained = (x, lora_A, lora_B, bias, values)
    needs = tuple(t is not None and t.requires_grad for t in trained)
    if torch.is_grad_enabled() and any(needs):
        return _RoSALinear.apply(*args, needs, layout, *mask.tensors, *base)
    return _forward(*args, mask.crow, mask.col, base, layout)[0]


def _forward(x, lora_A, lora_B, bias, values, scaling, keep, dropout_p, crow, col, base, layout):
    y, S = product(x, base, layout, lora_A, lora_B, bias, scaling, keep, dropout_p)
    ops.rosa_spmm_(y, x, values, crow, col, None)
    return y, S


class _RoSALinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx, x, lora_A, lora_B, bias, values, scaling, keep, dropout_p, needs, layout, *rest
    ):
        crow, col, ccol, row, order, *base = rest
        args = (x, lora_A, lora_B, bias, values, scaling, keep, dropout_p)
        y, S = _forward(*args, crow, col, base, layout)
        need_dx, need_dA, need_dB, _, need_dvalues = needs
        read = (
            x if need_dA or need_dvalues else None,
            S if need_dB else None,
            keep if need_dx or need_dA else None,
            lora_A,
            lora_B,
            values if need_dx else None,
            crow,
            col,
            *((ccol, row, order) if need_dx else (None, None, None)),
        )
        save_for_backward(ctx, read, base if need_dx or layout else (None,))
        ctx.layout = layout
        ctx.scaling, ctx.dropout_p, ctx.needs = scaling, dropout_p, needs
        ctx.backend = None if x.is_cpu else forced_backend()
        return y

    @staticmethod
    @batchable
    def backward(ctx, dy):
        unused = [None] * (len(ctx.needs_input_grad) - len(ctx.needs))
        if torch.is_grad_enabled():  # create_graph
            return *_differentiable_backward(dy, *saved_tensors(ctx), ctx=ctx), *unused
        x, S, keep, lora_A, lora_B, values, crow, col, ccol, row, order, *base = saved_tensors(ctx)
        need_dx, need_dA, *_, need_dvalues = ctx.needs
        dy, dvalues = dy.contiguous(), None
        with use_backend(ctx.backend):
            options = (lora_A, lora_B, ctx.scaling, keep, ctx.dropout_p, list(ctx.needs[:4]))
            grads = gradients(dy, x if need_dA else None, S, base, ctx.layout, *options)
            if need_dx:
                ops.rosa_spmm_(grads[0], dy, values, ccol, row, order)
            if need_dvalues:
                dvalues = ops.rosa_sddmm(dy, x, crow, col)
        dx, dA, dB, dbias = wanted(grads, ctx.needs[:4])
        return dx, dA, dB, dbias, dvalues, *unused


def _differentiable_backward(
    dy: Tensor,
    x: Tensor | None,
    S: Tensor | None,
    keep: Tensor | None,
    lora_A: Tensor,
    lora_B: Tensor,
    values: Tensor | None,
    crow: Tensor,
    col: Tensor,
    ccol: Tensor | None,
    row: Tensor | None,
    order: Tensor | None,
    *base: Tensor | None,
    ctx: Any,
) -> list[Tensor | None]:
    """Run `_RoSALinear.backward` on dense matrices, to be differentiated once more."""
    weight = dense(base, ctx.layout, dy.dtype) if ctx.needs[0] else None
    needs = ctx.needs[:4]
    args = (lora_A, lora_B, ctx.scaling, keep, ctx.dropout_p, needs)
    grads = differentiable_gradients(dy, x, S, weight, *args)
    dx, dA, dB, dbias = wanted(grads, needs)
    N, K = dy.shape[-1], lora_A.shape[1]
    acc = torch.promote_types(dy.dtype, torch.float32)
    flat = torch.repeat_interleave(crow.diff().long()) * K + col
    if ctx.needs[0]:
        sparse = values.new_zeros(N * K).index_put((flat,), values).view(N, K)
        dx = (dx + dy.to(acc) @ sparse.to(acc)).to(dx.dtype)
    dvalues = None
    if ctx.needs[4]:
        dW = dy.reshape(-1, N).to(acc).t() @ x.reshape(-1, K).to(acc)
        dvalues = dW.reshape(-1)[flat]
    return [dx, dA, dB, dbias, dvalues]


def _check_shape(shape: Any) -> None:
    sizes = shape if isinstance(shape, (tuple, list)) else ()
    if len(sizes) != 2 or not all(hasattr(size, "__index__") for size in sizes):
        raise mismatch("shape", "(N, K)", shape)


def _starts(index: Tensor, count: int) -> Tensor:
    """Return the start of each of `count` ascending numbers' entries, and the end of the last."""
    counts = torch.bincount(index, minlength=count)
    return torch.cat([counts.new_zeros(1), counts.cumsum(0)])
