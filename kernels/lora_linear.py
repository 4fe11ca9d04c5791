"""LoRA over a dense weight on a GPU: two launches forward, backward one read of each activation.

The base products are cuBLAS's. Forward, `update_forward` fills y with the update and the bias, and
cuBLAS adds x @ weight.T into it (beta = 1, whose read of y hides under its arithmetic). Base-first
would read and write y once more. Backward, `gradients_xa` writes the update's share of dx, and
cuBLAS adds dy @ weight into that. Bytes: `low_rank_update.py`.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from peftkern.kernels.launch import rows_of
from peftkern.kernels.low_rank_update import gradients_sb, gradients_xa, refusal, update_forward


def refusal_forward(
    x: Tensor, weight: Tensor, lora_A: Tensor, lora_B: Tensor, keep: Tensor | None
) -> str | None:
    return refusal(x, tuple(weight.shape), lora_A, lora_B, keep)


def refusal_backward(dy: Tensor, lora_A: Tensor, lora_B: Tensor, keep: Tensor | None) -> str | None:
    return refusal(dy, (lora_B.shape[0], lora_A.shape[1]), lora_A, lora_B, keep)


def lora_linear_forward(
    x: Tensor,
    weight: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    bias: Tensor | None,
    scaling: float,
    keep: Tensor | None,
    dropout_p: float,
) -> tuple[Tensor, Tensor]:
    rows = rows_of(x, weight.shape[1])
    y, S = update_forward(rows, lora_A, lora_B, bias, scaling, keep, dropout_p)
    if y.shape[0]:
        y.addmm_(rows, weight.t())
    return y.view(*x.shape[:-1], y.shape[1]), S.view(*x.shape[:-1], S.shape[1])


def lora_linear_backward(
    dy: Tensor, x: Tensor | None, S: Tensor | None, weight: Tensor | None, *adapter: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    lora_A, lora_B, *_, (need_dx, _, _, _) = adapter
    rows = rows_of(dy, lora_B.shape[0])
    _, dx, *gradients = update_gradients(rows, x, S, *adapter)
    if need_dx:
        if rows.shape[0]:
            dx.addmm_(rows, weight)
        dx = dx.view(*dy.shape[:-1], lora_A.shape[1])
    empty = dy.new_empty(0)
    return tuple(empty if grad is None else grad for grad in (dx, *gradients))


def update_gradients(
    dy: Tensor,
    x: Tensor | None,
    S: Tensor | None,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: float,
    keep: Tensor | None,
    dropout_p: float,
    needs: list[bool],
    with_dx: bool = True,
) -> tuple[Tensor | None, ...]:
    """Return dS, the update's share of dx [M, K] (with_dx), dA, dB and dbias, as wanted."""
    dS, dB, dbias = gradients_sb(dy, S, lora_B, scaling, needs)
    wanted = (needs[0] and with_dx, needs[1])
    dx, dA = gradients_xa(x, lora_A, dS, keep, dropout_p, wanted, dy.dtype)
    return dS, dx, dA, dB, dbias
