"""Linear layers over groups of rows with low-rank updates, in C++: dense products and adapters.

Forward and backward are one call of C++ each way round: the product of a group's weight, the update
and the bias are summed in float32 and rounded once. Where another function has computed the product
(of an NF4 weight), the same call adds the update to its float32 result.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from peftkern.backends import kept
from peftkern.backends.cpu.module import isa_and_threads, library, refusal_dense
from peftkern.backends.cpu.nf4_grouped_products import backward_product, forward_product
from peftkern.backends.decoded import refusal_format
from peftkern.backends.pointers import DTYPE_CODES, address, dtype_code, fresh, optional, strided

_NO_FACTOR = (0, 0, 0, 0, 0, 0)


def refusal_forward(x: Tensor, lora_A: Tensor | None, lora_B: Tensor | None) -> str | None:
    """Refuse dtypes and devices."""
    return refusal_dense(x) or _refusal_factors(lora_A, lora_B)


def refusal_backward(dy: Tensor, lora_A: Tensor | None, lora_B: Tensor | None) -> str | None:
    """Refuse what forward refuses."""
    return refusal_forward(dy, lora_A, lora_B)


def refusal_nf4_forward(
    x: Tensor, layout: list[int], lora_A: Tensor | None, lora_B: Tensor | None
) -> str | None:
    """Refuse formats, empty weights, blocks that cross them, dtypes and devices."""
    return _refusal_stack(layout) or refusal_forward(x, lora_A, lora_B)


def refusal_nf4_backward(
    dy: Tensor, layout: list[int], lora_A: Tensor | None, lora_B: Tensor | None
) -> str | None:
    """Refuse what forward refuses."""
    return refusal_nf4_forward(dy, layout, lora_A, lora_B)


def _refusal_stack(layout: list[int]) -> str | None:
    _, blocksize, _, E, N, K = layout
    if 0 in (E, N, K):
        return "the weight is empty"
    if N * K % blocksize:
        return "blocks cross the groups' weights"
    return refusal_format("cpu", layout)


def _refusal_factors(*factors: Tensor | None) -> str | None:
    for factor in factors:
        if factor is not None and factor.dtype not in DTYPE_CODES:
            return f"the factors are {factor.dtype}"
    return None


class Groups(NamedTuple):
    """Sorted rows and the groups they fall into, as C++ takes them."""

    R: int
    E: int
    T: int  # rows of the activation
    offsets: Tensor  # int32 [E]
    rows: Tensor | None  # int32 [R]
    fields: tuple[int, ...]  # R, E, T and the addresses of both


class Factors(NamedTuple):
    """A stack [E, r, columns] of any strides, or `collected`: of the groups with rows alone."""

    stack: Tensor
    collected: bool

    def fields(self, name: str, groups: Groups, columns: int) -> tuple[int, ...]:
        count = min(groups.E, groups.R) if self.collected else groups.E
        shape = (count, self.stack.shape[1], columns)
        return *strided(name, self.stack, shape), int(self.collected)


def groups_of(x: Tensor, offsets: Tensor, rows: Tensor | None) -> Groups:
    """Describe the groups of x [T, K], read through `rows` or as it is."""
    T, E = x.shape[0], offsets.shape[0]
    R = T if rows is None else rows.shape[0]
    rows, offsets = None if rows is None else rows.contiguous(), offsets.contiguous()
    offsets_at = address("offsets", offsets, torch.int32, E)
    rows_at = optional("rows", rows, torch.int32, R)
    return Groups(R, E, T, offsets, rows, (R, E, T, offsets_at, rows_at))


def grouped_linear_forward(
    x: Tensor,
    rows: Tensor | None,
    offsets: Tensor,
    weight: Tensor | None,
    transposed: bool,
    lora_A: Tensor | None,
    lora_B: Tensor | None,
    bias: Tensor | None,
    scaling: float,
) -> tuple[Tensor, Tensor]:
    groups = groups_of(x, offsets, rows)
    N = lora_B.shape[1] if weight is None else weight.shape[2 if transposed else 1]
    return forward(x, groups, N, weight, transposed, None, lora_A, lora_B, bias, scaling)


def grouped_linear_backward(
    dy: Tensor,
    offsets: Tensor,
    x: Tensor | None,
    rows: Tensor | None,
    S: Tensor | None,
    weight: Tensor | None,
    transposed: bool,
    lora_A: Tensor | None,
    lora_B: Tensor | None,
    scaling: float,
    needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    K = 0
    if weight is not None:
        K = weight.shape[1 if transposed else 2]
    elif lora_A is not None:
        K = lora_A.shape[2]
    factors = (lora_A, lora_B, scaling)
    return backward(dy, offsets, x, rows, S, K, weight, transposed, None, *factors, needs)


def nf4_grouped_linear_forward(
    x: Tensor,
    rows: Tensor | None,
    offsets: Tensor,
    w: list[Tensor],
    layout: list[int],
    transposed: bool,
    lora_A: Tensor | None,
    lora_B: Tensor | None,
    bias: Tensor | None,
    scaling: float,
) -> tuple[Tensor, Tensor]:
    groups, N = groups_of(x, offsets, rows), layout[5 if transposed else 4]
    bare, wide = lora_A is None and bias is None, _float32_of_half(x)
    dtype = wide.dtype if bare else torch.float32
    base = torch.empty((groups.R, N), dtype=dtype, device="cpu")
    forward_product(wide, groups.rows, groups.offsets, w, layout, transposed, base)
    if bare:
        return base.to(x.dtype), torch.empty(0, dtype=torch.float32, device="cpu")
    return forward(x, groups, N, None, False, base, lora_A, lora_B, bias, scaling)


def nf4_grouped_linear_backward(
    dy: Tensor,
    offsets: Tensor,
    x: Tensor | None,
    rows: Tensor | None,
    S: Tensor | None,
    w: list[Tensor],
    layout: list[int],
    transposed: bool,
    lora_A: Tensor | None,
    lora_B: Tensor | None,
    scaling: float,
    needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    K, base = layout[4 if transposed else 5], None
    if needs[0]:
        base = torch.empty((len(dy), K), dtype=torch.float32, device="cpu")
        backward_product(_float32_of_half(dy), offsets.contiguous(), w, layout, transposed, base)
    factors = (lora_A, lora_B, scaling)
    return backward(dy, offsets, x, rows, S, K, None, False, base, *factors, needs)


def _float32_of_half(x: Tensor) -> Tensor:
    """Return x without gaps, and what no NF4 product takes, float16, in float32."""
    return x.contiguous().float() if x.dtype is torch.float16 else x.contiguous()


def one_group(x: Tensor, weight: Tensor) -> Tensor:
    """Compute x @ weight.T for all rows of x; the weight [N, K] may be a transposed view."""
    (M, _), N = x.shape, weight.shape[0]
    groups = groups_of(x, torch.tensor([M], dtype=torch.int32), None)
    y = torch.empty((M, N), dtype=x.dtype, device="cpu")
    _linear(x, groups, N, weight[None], False, None, None, None, None, 1.0, 1.0, y)
    return y


def forward(
    x: Tensor,
    groups: Groups,
    N: int,
    weight: Tensor | None,
    transposed: bool,
    base: Tensor | None,
    lora_A: Tensor | None,
    lora_B: Tensor | None,
    bias: Tensor | None,
    scaling: float,
) -> tuple[Tensor, Tensor]:
    """Compute y = x W^T + base + scaling * S B^T + bias and S = x A^T.

    Args: base, float32 [R, N] or None, a product that another function has computed.
    """
    y = torch.empty((groups.R, N), dtype=x.dtype, device="cpu")
    a, b = _factor(lora_A, groups), _lora_B(lora_B, groups)
    S = _linear(x, groups, N, weight, transposed, base, bias, a, b, 1.0, scaling, y)
    return y, S


def backward(
    dy: Tensor,
    offsets: Tensor,
    x: Tensor | None,
    rows: Tensor | None,
    S: Tensor | None,
    K: int,
    weight: Tensor | None,
    transposed: bool,
    base: Tensor | None,
    lora_A: Tensor | None,
    lora_B: Tensor | None,
    scaling: float,
    needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Compute dx = dy W + base + dS A with dS = scaling * dy B, dA, dB and dbias.

    Args: base, float32 [R, K] or None, a product that another function has computed.
    """
    dy = dy.contiguous()
    groups = groups_of(dy, offsets, None)
    E, R, N = groups.E, groups.R, dy.shape[1]
    dx, dA, dB, dbias = (dy.new_empty(0) for _ in range(4))
    need_dx, need_dA, need_dB, need_dbias = needs
    need_dA, need_dB = need_dA and lora_A is not None, need_dB and lora_B is not None
    if need_dx or need_dA:
        if need_dx:
            dx = torch.empty((R, K), dtype=dy.dtype, device="cpu")
        a, b = _lora_B(lora_B, groups), _factor(lora_A, groups)
        weight = weight if need_dx else None
        outputs = dx if need_dx else None
        dS = _linear(dy, groups, K, weight, not transposed, base, None, a, b, scaling, 1.0, outputs)
        del a, b, base  # copies as large as the gradients below
    if need_dA:
        dA = _gradient(lora_A, x, groups_of(x, offsets, rows), dS)
    if need_dB:
        dB = _gradient(lora_B, dy, groups, S, scaling, turned=True)
    if need_dbias:
        dbias = torch.empty((E, N), dtype=dy.dtype, device="cpu")
        ones = torch.ones((R, 1), dtype=torch.float32, device="cpu")
        _outer_(dbias.unsqueeze(1), dy, groups, ones)
    return dx, dA, dB, dbias


def _linear(
    x: Tensor,
    groups: Groups,
    N: int,
    weight: Tensor | None,
    transposed: bool,
    base: Tensor | None,
    bias: Tensor | None,
    a: Factors | None,
    b: Factors | None,
    s_scale: float,
    scaling: float,
    y: Tensor | None,
) -> Tensor:
    """Compute y in place, if it is given, and return s = s_scale x a^T.

    Args: a, b, of K and of N columns, or None; transposed, of rows along y's.
    """
    x, K, R, E = x.contiguous(), x.shape[1], groups.R, groups.E
    r = 0 if a is None else a.stack.shape[1]
    s = torch.empty((R, r) if r else 0, dtype=torch.float32, device="cpu")
    bias = None if bias is None else bias.contiguous()
    weight, transposed = _rows_together(weight, transposed)
    library().grouped_linear(
        *isa_and_threads(),
        groups.fields,
        *(N, K, r),
        address("x", x, x.dtype, groups.T * K),
        dtype_code("x", x),
        _weight(weight, E, (K, N) if transposed else (N, K), x.dtype, transposed),
        optional("base", base, torch.float32, R * N),
        optional("bias", bias, x.dtype, E * N),
        _NO_FACTOR if a is None else a.fields("a", groups, K),
        _NO_FACTOR if b is None else b.fields("b", groups, N),
        *(s_scale, scaling),
        fresh(s),
        fresh(y),
    )
    return s


def _gradient(
    factor: Tensor, x: Tensor, groups: Groups, s: Tensor, scale: float = 1.0, turned: bool = False
) -> Tensor:
    """Return scale * s^T x of each group, [E, r, K] or turned, with the strides of a factor."""
    gradient = torch.empty_like(factor)
    _outer_(gradient, x, groups, s, scale, turned)
    return gradient


def _outer_(
    g: Tensor,
    x: Tensor,
    groups: Groups,
    s: Tensor,
    scale: float = 1.0,
    turned: bool = False,
) -> None:
    """Write g [E, r, K], or [E, K, r] if turned, with scale * s^T x of each group."""
    x, s = x.contiguous(), s.contiguous()
    target = g.transpose(1, 2) if turned else g
    r, K = target.shape[1:]
    library().grouped_outer(
        *isa_and_threads(),
        groups.fields,
        *(K, r),
        address("x", x, x.dtype, groups.T * K),
        dtype_code("x", x),
        address("s", s, torch.float32, groups.R * r),
        scale,
        Factors(target, False).fields("g", groups, K),
    )


def _lora_B(lora_B: Tensor | None, groups: Groups) -> Factors | None:
    """Return lora_B as `_factor` does; what was collected of few groups serves both passes.

    Collecting a few reads nearly all cache lines of the whole stack.
    """
    found = kept.find()
    if found is not None:
        return Factors(found.transpose(1, 2), True)
    factors = _factor(lora_B, groups, turned=True)
    if factors is not None and factors.collected and 4 * groups.R <= groups.E:
        kept.leave(factors.stack.transpose(1, 2))
    return factors


def _factor(factor: Tensor | None, groups: Groups, turned: bool = False) -> Factors | None:
    """Return a stack of factors whose ranks or columns lie together."""
    if factor is None:
        return None
    collected = False
    if not _adjacent(factor):
        collected = _groups_innermost(factor)
        factor = _collected(factor, groups) if collected else factor.contiguous()
    return Factors(factor.transpose(1, 2) if turned else factor, collected)


def _collected(factor: Tensor, groups: Groups) -> Tensor:
    """Copy the groups that have rows out of a stack where groups lie innermost."""
    stack = factor.new_empty((min(groups.E, groups.R), *factor.shape[1:]))
    library().grouped_collect(
        isa_and_threads()[1],
        groups.fields,
        math.prod(factor.shape[1:]),
        dtype_code("factor", factor),
        fresh(factor),
        fresh(stack),
    )
    return stack


def _adjacent(stack: Tensor) -> bool:
    return min(stack.stride()[1:]) == 1


def _groups_innermost(stack: Tensor) -> bool:
    """Return whether a stack [E, rows, columns] lies as [rows, columns, E]."""
    E, _, columns = stack.shape
    return stack.stride() == (1, columns * E, E)


def _rows_together(weight: Tensor | None, transposed: bool) -> tuple[Tensor | None, bool]:
    """Return a weight whose last dimension lies together, turned or copied, and if it is turned."""
    if weight is None or weight.stride(2) == 1 or weight.shape[2] == 1:
        return weight, transposed
    turned = weight.transpose(1, 2)
    if turned.stride(2) == 1 or turned.shape[2] == 1:
        return turned, not transposed
    return weight.contiguous(), transposed


def _weight(
    weight: Tensor | None, E: int, shape: tuple[int, int], dtype: torch.dtype, transposed: bool
) -> tuple[int, int, int, int]:
    """Return a weight as C++ takes it; one for all groups if its first dimension is 1."""
    if weight is None:
        return 0, 0, 0, 0
    if weight.dtype is not dtype:
        raise ValueError(f"weight: expected {dtype} like x, got {weight.dtype}")
    at, _, group, row, _ = strided("weight", weight, (weight.shape[0], *shape))
    if weight.shape[0] not in (1, E):
        raise ValueError(f"weight: expected 1 or {E} groups, got {weight.shape[0]}")
    return at, int(transposed), group if weight.shape[0] > 1 else 0, row
