"""LongLoRA's shifted sparse attention: long sequences at the cost of short ones, in training only.

Half of the heads attend within groups of G tokens, the other half within groups that lie G/2 tokens
further, so that information crosses the borders from layer to layer. With T tokens a head counts
about T * G / 2 pairs instead of T^2 / 2.

The groups of the shifted heads do not wrap around the end of the sequence: the first G/2 tokens are
a group of their own, as is what remains at the end. A causal model thus never sees its future.
Everything runs on torch's scaled_dot_product_attention over tensors that are reshaped, without a
mask where none is given. With one, heads of keys that serve several heads are repeated: on a GPU
torch has a kernel for both together, but one that makes all scores at once.
`peftkern.integrations.transformers.longlora` switches it on in a transformers model.

LongLoRA also trains embeddings and normalization layers: with PEFT, `LoraConfig(modules_to_save=
["embed_tokens", "input_layernorm", "post_attention_layernorm", "norm"])`.

Source: Chen et al. 2024, section 3.2, arXiv:2309.12307
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from peftkern.functional.arguments import (
    check_float,
    check_probability,
    check_tensor,
    mismatch,
    number,
)

__all__ = ["shifted_sparse_attention"]


def shifted_sparse_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    group_size: int,
    *,
    attention_mask: Tensor | None = None,
    is_causal: bool = True,
    scale: float | None = None,
    dropout_p: float = 0.0,
) -> Tensor:
    """Attend within groups of tokens, the second half of the heads in groups shifted by half.

    Head h lets token i attend to token j if both are in one group, j <= i if is_causal, and the
    mask allows it. Heads h < H/2: group(i) = i // G; the others: group(i) = (i + G/2) // G.

    Args: q [B, H, T, D]; k, v [B, H_kv, T, D], H a multiple of H_kv; group_size G, even, at least 2
        (the paper takes T/4); attention_mask, bool, True where a key may be seen: [B, T] keys that
        are no padding, or [B or 1, 1 or H, T, T]; scale, D^-0.5 by default; dropout_p of the
        attention weights.
    Returns: [B, H, T, D], dtype of q. A token that may attend to nothing gets zeros.
    Raises: ValueError naming the argument on a wrong shape, dtype or group size.
    Gradients: q, k, v.   Source: Chen et al. 2024, section 3.2, arXiv:2309.12307
    """
    _check(q, k, v, group_size)
    if scale is not None:
        scale = number("scale", scale)
    check_probability("dropout_p", dropout_p)
    mask = None if attention_mask is None else _mask4d(attention_mask, q)
    H, H_kv = q.shape[1], k.shape[1]
    if H_kv % 2:  # a head of keys would serve both halves
        k, v = (t.repeat_interleave(H // H_kv, dim=1) for t in (k, v))
    options = {"is_causal": is_causal, "scale": scale, "dropout_p": dropout_p}
    halves = []
    for half, first in enumerate((group_size, group_size // 2)):
        parts = (t.chunk(2, dim=1)[half] for t in (q, k, v))
        seen = mask if mask is None or mask.shape[1] == 1 else mask.chunk(2, dim=1)[half]
        halves.append(_grouped(*parts, seen, first, group_size, **options))
    return torch.cat(halves, dim=1)


def _grouped(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, first: int, size: int, **options: Any
) -> Tensor:
    """Attend in groups: one of `first` tokens, then full ones, then what remains."""
    T = q.shape[2]
    full = max(0, T - first) // size
    middle = first + full * size
    out = []
    for start, stop, count in ((0, min(first, T), 1), (first, middle, full), (middle, T, 1)):
        if start >= stop:
            continue
        group = (stop - start) // count
        parts = (t[:, :, start:stop].unflatten(2, (count, group)) for t in (q, k, v))
        tensors = (part.transpose(1, 2).flatten(0, 1) for part in parts)  # [B * count, H, g, D]
        seen = None if mask is None else _blocks(mask, start, count, group)
        y = _attend(*tensors, seen, **options)
        out.append(y.unflatten(0, (-1, count)).transpose(1, 2).flatten(2, 3))
    return torch.cat(out, dim=2) if out else q.clone()


def _attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    *,
    is_causal: bool,
    **options: float | None,
) -> Tensor:
    shared = q.shape[1] // k.shape[1]
    if mask is None:
        options |= {"is_causal": is_causal, "enable_gqa": shared > 1}
        return F.scaled_dot_product_attention(q, k, v, **options)
    if shared > 1:
        k, v = (t.repeat_interleave(shared, dim=1) for t in (k, v))
    if is_causal:
        mask = mask.tril()
    # The softmax of a row without keys is not a number, in the gradients too: let it see them all.
    some = mask.any(dim=-1, keepdim=True)
    y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask | ~some, **options)
    return y.masked_fill(~some, 0.0)


def _blocks(mask: Tensor, start: int, count: int, size: int) -> Tensor:
    """Return the blocks [B * count, H or 1, size, size] on a mask's diagonal, from `start` on."""
    stop = start + count * size
    square = mask[:, :, start:stop, start:stop]
    tiles = square.unflatten(3, (count, size)).unflatten(2, (count, size))
    blocks = tiles.diagonal(dim1=2, dim2=4)  # [B, H, size, size, count]
    return blocks.permute(0, 4, 1, 2, 3).flatten(0, 1)


def _mask4d(mask: Tensor, q: Tensor) -> Tensor:
    B, H, T, _ = q.shape
    check_tensor("attention_mask", mask)
    ok = mask.dtype is torch.bool and mask.device == q.device
    if ok and mask.shape == (B, T):
        return mask[:, None, None, :].expand(B, 1, T, T)
    ok = ok and mask.dim() == 4 and mask.shape[0] in (1, B) and mask.shape[1] in (1, H)
    if not ok or mask.shape[2:] != (T, T):
        wanted = f"bool [{B}, {T}] or [{B} or 1, 1 or {H}, {T}, {T}] on {q.device}"
        raise mismatch("attention_mask", wanted, mask)
    return mask.expand(B, *mask.shape[1:])


def _check(q: Tensor, k: Tensor, v: Tensor, group_size: int) -> None:
    if type(group_size) is not int or group_size < 2 or group_size % 2:
        raise mismatch("group_size", "an even number of at least 2", group_size)
    check_float("q", q)
    if q.dim() != 4 or q.shape[1] % 2:
        raise mismatch("q", "[B, H, T, D] with an even H", q)
    B, H, T, D = q.shape
    for name, t in (("k", k), ("v", v)):
        check_tensor(name, t)
        fits = t.dim() == 4 and t.shape[1] > 0 and H % t.shape[1] == 0
        if not fits or (t.shape[0], t.shape[2], t.shape[3]) != (B, T, D):
            raise mismatch(name, f"[{B}, a divisor of {H}, {T}, {D}] like q", t)
        if t.dtype is not q.dtype or t.device != q.device:
            raise mismatch(name, f"{q.dtype} on {q.device} like q", t)
    if k.shape != v.shape:
        raise mismatch("v", f"{list(k.shape)} like k", v)
