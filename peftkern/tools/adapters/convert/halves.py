"""Two ways to hold an update of gate and up: of the fused parameter, or of each projection.

The fused parameter's rows are gate's, then up's, in every model of transformers but those that
interleave them (`gpt_oss`), which have no projections apart. Stacks of experts: lora_A [E, r, n],
lora_B [E, m, r].

Both ways lead back to the same tensors, bit for bit:
    shared    lora_A serves both, lora_B = [B_gate; B_up]: how a fused parameter is trained
    diagonal  lora_A = [A_gate; A_up], lora_B = diag(B_gate, B_up): how two projections are
"""

from __future__ import annotations

import torch
from torch import Tensor

Pair = tuple[Tensor, Tensor]


def split_halves(lora_A: Tensor, lora_B: Tensor) -> tuple[Pair, Pair]:
    """Return (lora_A, lora_B) of gate and of up.

    A lora_B with blocks of zeros where a diagonal one has them is taken apart along them; one that
    is zero everywhere is untrained, and shared.
    """
    rows, rank = lora_B.shape[-2] // 2, lora_A.shape[-2]
    half = rank // 2
    gate, up = lora_B[..., :rows, :], lora_B[..., rows:, :]
    crossed = gate[..., half:].any() or up[..., :half].any()
    if rank % 2 or crossed or not lora_B.any():
        return (lora_A, gate), (lora_A.clone(), up)  # files have each tensor once
    A_gate, A_up = lora_A[..., :half, :], lora_A[..., half:, :]
    return (A_gate, gate[..., :half]), (A_up, up[..., half:])


def fuse_halves(gate: Pair, up: Pair) -> Pair:
    """Return the pair of the fused parameter: shared if both have the same lora_A."""
    (A_gate, B_gate), (A_up, B_up) = gate, up
    if A_gate.dtype == A_up.dtype and torch.equal(A_gate, A_up):
        return A_gate, torch.cat([B_gate, B_up], dim=-2)
    zeros_up = B_gate.new_zeros(*B_gate.shape[:-1], B_up.shape[-1])
    zeros_gate = B_up.new_zeros(*B_up.shape[:-1], B_gate.shape[-1])
    upper = torch.cat([B_gate, zeros_up], dim=-1)
    lower = torch.cat([zeros_gate, B_up], dim=-1)
    return torch.cat([A_gate, A_up], dim=-2), torch.cat([upper, lower], dim=-2)
