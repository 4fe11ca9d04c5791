"""Arguments of every op, and a module over both linear functions, as torch asks for them."""

from __future__ import annotations

import torch
from linear_cases import KINDS
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import peftkern
from peftkern import NF4Weight
from peftkern.backends import reference
from peftkern.formats.nf4 import dynamic_map
from peftkern.functional.dora import dora_linear
from peftkern.functional.rosa import SparseMask, rosa_linear

N, K, R = 24, 70, 4


def stored(double_quant: bool = True) -> tuple:
    w = peftkern.quantize_nf4(torch.randn(N, K), double_quant=double_quant)
    return w.tensors, w.layout


def forward_operands(dtype: torch.dtype = torch.bfloat16, dropout_p: float = 0.25) -> tuple:
    x = torch.randn(2, 3, K, dtype=dtype)
    keep = torch.empty_like(x, dtype=torch.bool).bernoulli_(1 - dropout_p) if dropout_p else None
    return x, torch.randn(R, K), torch.randn(N, R), torch.randn(N, dtype=dtype), keep


def svd_room(*sizes: tuple[int, int, int]) -> tuple:
    """Zeros for the SVD of pairs of sizes (m, r, n): U, S, Vh, rank and info."""
    widths = [(m, min(m, r, n), n) for m, r, n in sizes]
    return (
        [torch.zeros(m, k) for m, k, _ in widths],
        [torch.zeros(k) for _, k, _ in widths],
        [torch.zeros(k, n) for _, k, n in widths],
        *(torch.zeros(len(sizes), dtype=torch.int64) for _ in range(2)),
    )


def op_cases() -> dict[str, list[tuple]]:
    """Arguments of every op: with and without each optional one."""
    torch.manual_seed(0)
    x, A, B, bias, keep = forward_operands()
    weight = torch.randn(N, K, dtype=x.dtype)
    dy, S = torch.randn(2, 3, N, dtype=x.dtype), torch.randn(2, 3, R)
    every, none = [True] * 4, [False] * 4
    absmax = torch.rand(600)
    code = torch.tensor(dynamic_map())
    return {
        "nf4_quantize": [(torch.randn(N, K, dtype=d), 64) for d in (x.dtype, torch.float32)],
        "nf4_quantize_absmax": [(absmax, absmax.mean(), code, 256)],
        "nf4_dequantize": [(*stored(q), torch.float16) for q in (True, False)],
        "nf4_dequantize_out": [(*stored(q), torch.zeros(N, K)) for q in (True, False)],
        "lora_linear_forward": [
            (x, weight, A, B, bias, 2.0, keep, 0.25),
            (x[0], weight, A, B, None, 2.0, None, 0.0),
        ],
        "lora_linear_backward": [
            (dy, x, S, weight, A, B, 2.0, keep, 0.25, every),
            (dy, None, S, weight, A, B, 2.0, None, 0.0, [True, False, True, False]),
            (dy, x, None, None, A, B, 2.0, None, 0.0, [False, True, False, False]),
            (dy, None, None, None, A, B, 2.0, None, 0.0, none),
        ],
        "nf4_lora_linear_forward": [
            (x, *stored(), A, B, bias, 2.0, keep, 0.25),
            (x, *stored(False), None, None, None, 1.0, None, 0.0),
        ],
        "dora_norm": [(weight, A, B, 2.0), (weight.float(), A, B.bfloat16(), 0.5)],
        "nf4_dora_norm": [
            (*stored(q), dtype, A, B, 2.0)
            for q, dtype in ((True, torch.bfloat16), (False, torch.float32))
        ],
        "gram_product": [(weight, A, True, True), (weight.float(), A, False, False)],
        "nf4_gram_product": [(*stored(q), A, q, not q) for q in (True, False)],
        "low_rank_svd": [
            ([B, B.bfloat16()], [A, A], [2.0, -1.0], True, "accurate"),
            ([B, torch.randn(3, 5)], [A.bfloat16(), torch.randn(5, 2)], [1.0, 1.0], True, "fast"),
            ([B], [A], [1.0], False, "accurate"),
        ],
        "low_rank_svd_out": [
            ([B, B.bfloat16()], [A, A], [2.0, -1.0], "accurate", *svd_room((N, R, K), (N, R, K))),
            ([A.T, B], [B.T, A], [1.0, 0.5], "fast", *svd_room((K, R, N), (N, R, K))),
        ],
        "nf4_lora_linear_backward": [
            (dy, x, S, *stored(), A, B, 2.0, keep, 0.25, every),
            (dy, None, None, *stored(False), None, None, 1.0, None, 0.0, [True, *none[1:]]),
        ],
        **grouped_op_cases(),
        **swiglu_op_cases(),
        **adalora_op_cases(),
        **rosa_op_cases(),
    }


def grouped_op_cases() -> dict[str, list[tuple]]:
    """Four groups, one empty, and a row of none; x as it is and read through rows."""
    E, N, K = 4, 24, 48
    x, dtype = torch.randn(5, K).bfloat16(), torch.bfloat16
    rows = torch.randint(5, (9,), dtype=torch.int32)
    ends = torch.tensor([2, 2, 7, 8], dtype=torch.int32)
    weight, bias = torch.randn(E, N, K).to(dtype), torch.randn(E, N).to(dtype)
    w = peftkern.quantize_nf4(torch.randn(E, N, K), double_quant=False)
    A, B = torch.randn(E, R, K), torch.randn(N, R, E).permute(2, 0, 1)
    dy, S, every = torch.randn(9, N).to(dtype), torch.randn(9, R), [True] * 4
    dx_alone = [True, False, False, False]
    few = ends.clamp(max=5)
    index = torch.randint(E + 1, (9, 2))  # E: of no group
    return {
        "route": [(index, None, E), (index.int(), torch.rand(9, 2).to(dtype), E)],
        "grouped_linear_forward": [
            (x, rows, ends, weight, False, A, B, bias, 2.0),
            (x, None, few, weight.mT.contiguous(), True, None, None, None, 1.0),
            (x, rows, ends, None, False, A, B, None, 2.0),
        ],
        "grouped_linear_backward": [
            (dy, ends, x, rows, S, weight, False, A, B, 2.0, every),
            (dy, ends, None, None, None, weight[:1], False, None, None, 1.0, dx_alone),
            (dy, ends, x, rows, S, None, False, A, B, 2.0, [*every[:3], False]),
        ],
        "nf4_grouped_linear_forward": [
            (x, rows, ends, w.tensors, w.layout, False, A, B, bias, 2.0),
        ],
        "nf4_grouped_linear_backward": [
            (dy, ends, x, rows, S, w.tensors, w.layout, False, A, B, 2.0, every),
        ],
    }


def swiglu_op_cases() -> dict[str, list[tuple]]:
    """Rows that no vector's length divides, in two dtypes."""
    u, w, da = torch.randn(7, 66), torch.rand(7), torch.randn(7, 33)
    half = torch.bfloat16
    return {
        "swiglu_forward": [(u, w), (u.to(half), w.to(half))],
        "swiglu_backward": [
            (da, u, w, True, True),
            (da.to(half), u.to(half), w.to(half), True, False),
            (da.to(half), u.to(half), w, False, True),
        ],
    }


def adalora_op_cases() -> dict[str, list[tuple]]:
    """Two layers of different shapes and ranks; one gradient is missing."""
    layers = [[torch.randn(r, 1), torch.randn(r, K), torch.randn(N, r)] for r in (R, 3)]
    params = [p for layer in layers for p in layer]
    numel = sum(p.numel() for p in params)
    grads = [torch.randn_like(p) for p in params]
    lora_E, lora_A, lora_B = (params[i::3] for i in range(3))
    _, residual, factors = reference.adalora_orthogonality_forward(lora_A, lora_B, False)
    return {
        "adalora_importance_": [
            (torch.rand(numel), torch.rand(numel), params, g, 0.85, 0.9)
            for g in (grads, [*grads[:-1], None])
        ],
        "adalora_allocate_": [
            (torch.rand(R + 3), [E.clone() for E in lora_E], 5, ties) for ties in (False, True)
        ],
        "adalora_orthogonality_forward": [(lora_A, lora_B, squared) for squared in (False, True)],
        "adalora_orthogonality_backward": [(torch.tensor(0.5), residual, factors, lora_A, lora_B)],
    }


def rosa_op_cases() -> dict[str, list[tuple]]:
    """Indices of both widths; the product with the matrix and with its transpose."""
    x, y, values = torch.randn(2, 3, K), torch.randn(2, 3, N), torch.randn(50)
    flat = torch.randperm(N * K)[:50]
    narrow, wide = (
        SparseMask.from_indices(flat // K, flat % K, (N, K), dtype)
        for dtype in (torch.int32, torch.int64)
    )
    return {
        "rosa_sddmm": [
            (y.to(d), x.to(d), m.crow, m.col)
            for d, m in ((x.dtype, narrow), (torch.bfloat16, wide))
        ],
        "rosa_spmm_": [
            (y.clone(), x, values, narrow.crow, narrow.col, None),
            (x.clone(), y, values, wide.ccol, wide.row, wide.order),
        ],
    }


LAYERS = [*KINDS, "dora_linear", "nf4_dora_linear", "rosa_linear", "nf4_rosa_linear"]


class Layer(nn.Module):
    """A linear function over registered tensors, as a user's module would hold them."""

    def __init__(self, kind: str, dtype: torch.dtype = torch.float32, dropout_p: float = 0.0):
        super().__init__()
        self.kind, self.dropout_p, self.scaling = kind, dropout_p, 2.0
        weight = torch.randn(N, K, dtype=dtype)
        self.lora_A = nn.Parameter(torch.randn(R, K) / K**0.5)
        self.lora_B = nn.Parameter(torch.randn(N, R))
        self.bias = nn.Parameter(torch.randn(N, dtype=dtype))
        self.register_buffer("weight", weight)
        self.w = peftkern.quantize_nf4(weight)
        if kind.endswith("dora_linear"):
            self.magnitude = nn.Parameter(torch.rand(N) + K**0.5)
        if kind.endswith("rosa_linear"):
            self.values = nn.Parameter(torch.randn(50))
            flat = torch.randperm(N * K)[:50]
            self.mask = SparseMask.from_indices(flat // K, flat % K, (N, K))

    @property
    def frozen(self) -> Tensor | NF4Weight:
        return self.w if self.kind.startswith("nf4_") else self.weight

    def forward(self, x: Tensor) -> Tensor:
        arguments = (x, self.frozen, self.lora_A, self.lora_B)
        options = {"scaling": self.scaling, "bias": self.bias, "dropout_p": self.dropout_p}
        if self.kind.endswith("dora_linear"):
            return dora_linear(*arguments, self.magnitude, **options)
        if self.kind.endswith("rosa_linear"):
            return rosa_linear(*arguments, self.values, self.mask, **options)
        return getattr(peftkern, self.kind)(*arguments, **options)


class Checkpointed(nn.Module):
    """A layer whose forward pass runs again in the backward pass."""

    def __init__(self, inner: nn.Module, reentrant: bool) -> None:
        super().__init__()
        self.inner, self.reentrant = inner, reentrant

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(self.inner, x, use_reentrant=self.reentrant)


def run(layer: nn.Module, x: Tensor) -> tuple[Tensor, ...]:
    """Output and every gradient, from the same seed."""
    torch.manual_seed(1)
    x = x.clone().requires_grad_()
    for parameter in layer.parameters():
        parameter.grad = None
    y = layer(x)
    y.float().square().sum().backward()
    return (y.detach(), x.grad, *(p.grad for p in layer.parameters()))
