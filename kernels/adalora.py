"""AdaLoRA's importance and allocation on a GPU: three launches for a whole model, no host sync.

One program per piece of a lora_A row, or of some lora_B rows, updates both EMAs and leaves the sum
of their product; a second launch does the same for lora_E and adds up each layer's sums in order; a
third counts for every triplet how many are better, and zeroes lora_E where too many are. Tensors
are found through a table of addresses. Bytes per element: parameter and gradient once, both EMAs
read and written (16); ranking compares n^2 pairs of n triplets, 7 M for LLaMA-7B at rank 12.
"""

from __future__ import annotations

import functools
from itertools import accumulate

import torch
import triton
import triton.language as tl
from torch import Tensor

from peftkern.backends.pointers import address_table
from peftkern.kernels.configs import ceil_div, next_power
from peftkern.kernels.launch import guard

DTYPES = {torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}
RANK_MAX = 256
_TILE = 1024  # elements of a program
_RANKED = 64  # triplets that a program ranks, and that it compares them with at once
_FIELDS = tl.constexpr(8)  # of a layer: r, K, N, E, A and B in the EMAs, sums of A, sums of B


@triton.jit
def _ema_product(
    w_ptr,
    g_ptr,
    ipt_ptr,
    unc_ptr,
    offset,
    mask,
    beta1,
    beta2,
    W_TYPE: tl.constexpr,
    G_TYPE: tl.constexpr,
):
    """Update both EMAs at some elements of a parameter and return their product.

    A missing gradient counts as 0. Where the sensitivity is not finite the EMAs keep their values
    and the product is NaN.
    """
    w = tl.load(w_ptr.to(tl.pointer_type(W_TYPE)) + offset, mask=mask, other=0.0)
    has_gradient = mask & (g_ptr != 0)
    g = tl.load(g_ptr.to(tl.pointer_type(G_TYPE)) + offset, mask=has_gradient, other=0.0)
    sensitivity = tl.where(has_gradient, tl.abs(w.to(tl.float32) * g.to(tl.float32)), 0.0)
    finite = sensitivity < float("inf")
    ipt = beta1 * tl.load(ipt_ptr + offset, mask=mask, other=0.0) + (1 - beta1) * sensitivity
    unc = tl.load(unc_ptr + offset, mask=mask, other=0.0)
    unc = beta2 * unc + (1 - beta2) * tl.abs(sensitivity - ipt)
    tl.store(ipt_ptr + offset, ipt, mask=mask & finite)
    tl.store(unc_ptr + offset, unc, mask=mask & finite)
    return tl.where(mask, tl.where(finite, ipt * unc, float("nan")), 0.0)


@triton.jit
def _adalora_importance_kernel(
    addresses_ptr,
    layers_ptr,
    pieces_ptr,
    ipt_ptr,
    unc_ptr,
    sums_ptr,
    beta1,
    beta2,
    W_TYPE: tl.constexpr,
    G_TYPE: tl.constexpr,
    TILE: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """Sum the products of a piece of lora_A[j, :], or of the columns of some rows of lora_B."""
    piece = pieces_ptr + tl.program_id(0) * 3
    layer = tl.load(piece + 1)
    index = tl.load(piece + 2)
    small = index.to(tl.int32)  # a division of 64 bits is a call
    field = layers_ptr + layer * _FIELDS
    r = tl.load(field)
    # addresses: lora_E, lora_A, lora_B and their gradients of every layer in turn
    address = addresses_ptr + layer * 6
    if tl.load(piece) == 0:
        K = tl.load(field + 1)
        tiles = tl.cdiv(K.to(tl.int32), TILE)
        column = small % tiles * TILE + tl.arange(0, TILE)
        first = tl.load(field + 4)
        product = _ema_product(
            tl.load(address + 1),
            tl.load(address + 4),
            ipt_ptr + first,
            unc_ptr + first,
            small // tiles * K + column,
            column < K,
            beta1,
            beta2,
            W_TYPE,
            G_TYPE,
        )
        tl.store(sums_ptr + tl.load(field + 6) + index, tl.sum(product, 0))
    else:
        N = tl.load(field + 2)
        row = index * (TILE // BLOCK_R) + tl.arange(0, TILE // BLOCK_R)
        rank = tl.arange(0, BLOCK_R)
        first_b = tl.load(field + 5)
        product_b = _ema_product(
            tl.load(address + 2),
            tl.load(address + 5),
            ipt_ptr + first_b,
            unc_ptr + first_b,
            row[:, None] * r + rank[None, :],
            (row < N)[:, None] & (rank < r)[None, :],
            beta1,
            beta2,
            W_TYPE,
            G_TYPE,
        )
        place = tl.load(field + 7) + index * r + rank
        tl.store(sums_ptr + place, tl.sum(product_b, 0), mask=rank < r)


@triton.jit
def _adalora_scores_kernel(
    addresses_ptr,
    layers_ptr,
    first_ptr,
    ipt_ptr,
    unc_ptr,
    sums_ptr,
    scores_ptr,
    beta1,
    beta2,
    W_TYPE: tl.constexpr,
    G_TYPE: tl.constexpr,
    TILE: tl.constexpr,
    TILE_R: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """Compute score_j = s(E_j) + mean_k s(A_jk) + mean_n s(B_nj), one layer per program."""
    layer = tl.program_id(0)
    field = layers_ptr + layer * _FIELDS
    r, K, N = tl.load(field), tl.load(field + 1), tl.load(field + 2)
    rank = tl.arange(0, BLOCK_R)
    mask = rank < r
    address = addresses_ptr + layer * 6
    first = tl.load(field + 3)
    score = _ema_product(
        tl.load(address),
        tl.load(address + 3),
        ipt_ptr + first,
        unc_ptr + first,
        rank,
        mask,
        beta1,
        beta2,
        W_TYPE,
        G_TYPE,
    )
    tiles = tl.cdiv(K, TILE)
    sums_a = sums_ptr + tl.load(field + 6)
    total_a = tl.zeros((BLOCK_R,), tl.float32)
    for t in range(tiles):
        total_a += tl.load(sums_a + rank * tiles + t, mask=mask, other=0.0)
    sums_b = sums_ptr + tl.load(field + 7)
    total_b = tl.zeros((BLOCK_R,), tl.float32)
    for t in range(tl.cdiv(N, TILE_R)):
        total_b += tl.load(sums_b + t * r + rank, mask=mask, other=0.0)
    score += total_a / K.to(tl.float32) + total_b / N.to(tl.float32)
    tl.store(scores_ptr + tl.load(first_ptr + layer) + rank, score, mask=mask)


@triton.jit(do_not_specialize=["count", "budget"])
def _adalora_allocate_kernel(
    scores_ptr,
    addresses_ptr,
    layer_ptr,
    first_ptr,
    mask_ptr,
    count,
    budget,
    THRESHOLD: tl.constexpr,
    E_TYPE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Keep a triplet if fewer than `budget` are better: greater, or equal and earlier.

    THRESHOLD: if at most `budget` are greater or equal, unless the greatest score is zero. NaN is
    the greatest of all; a threshold that is NaN prunes nothing.
    """
    mine = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = mine < count
    score = tl.load(scores_ptr + mine, mask=inside, other=0.0)[:, None]
    better = tl.zeros((BLOCK,), tl.int32)
    equal = tl.zeros((BLOCK,), tl.int32)
    undefined = tl.zeros((BLOCK,), tl.int32)
    greatest = tl.full((BLOCK,), float("-inf"), tl.float32)
    for start in range(0, count, BLOCK):
        theirs = start + tl.arange(0, BLOCK)
        in_theirs = (theirs < count)[None, :]
        other = tl.load(scores_ptr + theirs, mask=theirs < count, other=float("-inf"))[None, :]
        same = ((other == score) | ((other != other) & (score != score))) & in_theirs
        greater = ((other > score) | ((other != other) & (score == score))) & in_theirs
        earlier = same & (theirs[None, :] < mine[:, None])
        better += tl.sum((greater | earlier).to(tl.int32), 1)
        equal += tl.sum((same & ~earlier).to(tl.int32), 1)
        undefined += tl.sum(((other != other) & in_theirs).to(tl.int32), 1)
        greatest = tl.maximum(greatest, tl.max(tl.where(in_theirs, other, float("-inf")), 1))
    keep = better < budget
    if THRESHOLD:
        above = (better + equal <= budget) | (undefined > budget)
        keep = tl.where((greatest == 0.0) & (undefined == 0), keep, above)
    keep = keep | (budget >= count)
    tl.store(mask_ptr + mine, keep.to(tl.int8), mask=inside)
    layer = tl.load(layer_ptr + mine, mask=inside, other=0)
    place = mine - tl.load(first_ptr + layer, mask=inside, other=0)
    e_ptr = tl.load(addresses_ptr + layer, mask=inside, other=0).to(tl.pointer_type(E_TYPE))
    tl.store(e_ptr + place, tl.zeros((BLOCK,), tl.float32).to(E_TYPE), mask=inside & ~keep)


def refusal_importance(
    exp_avg_ipt: Tensor, params: list[Tensor], grads: list[Tensor | None]
) -> str | None:
    """Return the refusal of adalora_importance_, None if the kernels take the call."""
    if exp_avg_ipt.dtype is not torch.float32:
        return f"the EMAs are {exp_avg_ipt.dtype}"
    rank = max(A.shape[0] for A in params[1::3])
    if rank > RANK_MAX:
        return f"the rank is {rank}, above {RANK_MAX}"
    present = [grad for grad in grads if grad is not None]
    return _one_dtype("params", params) or _one_dtype("grads", present)


def refusal_allocate(scores: Tensor, lora_E: list[Tensor]) -> str | None:
    """Return the refusal of adalora_allocate_, None if the kernels take the call."""
    if scores.dtype is not torch.float32:
        return f"scores are {scores.dtype}"
    return _one_dtype("lora_E", lora_E)


def _one_dtype(name: str, tensors: list[Tensor]) -> str | None:
    dtypes = {tensor.dtype for tensor in tensors}
    if len(dtypes) > 1 or not dtypes <= DTYPES.keys():
        return f"{name} are {', '.join(sorted(map(str, dtypes)))}"
    return None


def adalora_importance_(
    exp_avg_ipt: Tensor,
    exp_avg_unc: Tensor,
    params: list[Tensor],
    grads: list[Tensor | None],
    beta1: float,
    beta2: float,
) -> Tensor:
    device = exp_avg_ipt.device
    pairs = zip(params[1::3], params[2::3], strict=True)
    shapes = tuple((*A.shape, B.shape[0]) for A, B in pairs)
    layers, pieces, first, sums_numel = _plan(shapes, device)
    ranks = [r for r, _, _ in shapes]
    params, grads = _contiguous(params), _contiguous(grads)
    tensors = [t for i in range(0, len(params), 3) for t in (*params[i : i + 3], *grads[i : i + 3])]
    addresses = address_table(tensors, device)
    sums = torch.empty(sums_numel, dtype=torch.float32, device=device)
    scores = torch.empty(sum(ranks), dtype=torch.float32, device=device)
    if not len(scores):
        return scores
    block_r = next_power(max(ranks))
    present = next((grad for grad in grads if grad is not None), exp_avg_ipt)
    types = {"W_TYPE": DTYPES[params[0].dtype], "G_TYPE": DTYPES[present.dtype]}
    emas = (exp_avg_ipt, exp_avg_unc)
    with guard(exp_avg_ipt):
        _adalora_importance_kernel[(len(pieces),)](
            addresses,
            layers,
            pieces,
            *emas,
            sums,
            beta1,
            beta2,
            TILE=_TILE,
            BLOCK_R=block_r,
            num_warps=8,
            **types,
        )
        _adalora_scores_kernel[(len(ranks),)](
            addresses,
            layers,
            first,
            *emas,
            sums,
            scores,
            beta1,
            beta2,
            TILE=_TILE,
            TILE_R=_TILE // block_r,
            BLOCK_R=block_r,
            num_warps=1,
            **types,
        )
    return scores


def adalora_allocate_(
    scores: Tensor, lora_E: list[Tensor], budget: int, threshold_ties: bool
) -> Tensor:
    mask = torch.empty(scores.shape, dtype=torch.bool, device=scores.device)
    if not len(scores):
        return mask
    layer, first = _owners(tuple(E.numel() for E in lora_E), scores.device)
    with guard(scores):
        _adalora_allocate_kernel[(ceil_div(len(scores), _RANKED),)](
            scores.contiguous(),
            address_table(lora_E, scores.device),
            layer,
            first,
            mask.view(torch.int8),
            len(scores),
            budget,
            THRESHOLD=threshold_ties,
            E_TYPE=DTYPES[lora_E[0].dtype],
            BLOCK=_RANKED,
            num_warps=8,
        )
    return mask


@functools.lru_cache(maxsize=16)
def _plan(
    shapes: tuple[tuple[int, int, int], ...], device: torch.device
) -> tuple[Tensor, Tensor, Tensor, int]:
    """Build the tables for layers of (r, K, N): fields, pieces, first scores; count the sums."""
    rows = _TILE // next_power(max(r for r, _, _ in shapes))
    layers, pieces, element, total = [], [], 0, 0
    for i, (r, K, N) in enumerate(shapes):
        pieces_a, pieces_b = r * ceil_div(K, _TILE), ceil_div(N, rows) if r else 0
        starts = (element, element + r, element + r + r * K)
        layers.append((r, K, N, *starts, total, total + pieces_a))
        pieces += [(0, i, j) for j in range(pieces_a)] + [(1, i, j) for j in range(pieces_b)]
        element += r * (1 + K + N)
        total += pieces_a + pieces_b * r
    first = [0, *accumulate(r for r, _, _ in shapes)][:-1]
    tables = (torch.tensor(t, dtype=torch.int64) for t in (layers, pieces, first))
    return (*(table.to(device) for table in tables), total)


@functools.lru_cache(maxsize=16)
def _owners(sizes: tuple[int, ...], device: torch.device) -> tuple[Tensor, Tensor]:
    """Return the layer of each triplet, and the first triplet of each layer."""
    layer = torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes))
    first = torch.tensor([0, *accumulate(sizes)][:-1])
    return layer.to(device), first.to(device)


def _contiguous(tensors: list[Tensor | None]) -> list[Tensor | None]:
    return [t if t is None or t.is_contiguous() else t.contiguous() for t in tensors]
