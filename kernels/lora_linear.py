"""LoRA over a dense weight on a GPU: two launches forward, backward one read of each activation.

The base products are cuBLAS's. Forward, `update_forward` fills y with the update and the bias, and
cuBLAS adds x @ weight.T into it (beta = 1, whose read of y hides under its arithmetic). Base-first
would read and write y once more. Backward, `gradients_xa` writes the update's share of dx, and
cuBLAS adds dy @ weight into that. Bytes: `low_rank_update.py`.
"""

from __future__ import annotations

from torch import Tensor

from peftkern.kernels.launch import rows_of
from peftkern.kernels.low_rank_update import gradients_sb, gradients_xa, refusal, update_forward


def refusal_forward(x: Tensor, weight: Tensor, *args: object) -> str | None:
    lora_A, lora_B, _, _, keep, _ = args
    return refusal(x, tuple(weight.shape), lora_A, lora_B, keep)


def refusal_backward(dy: Tensor, *args: object) -> str | None:
    _, _, _, lora_A, lora_B, _, keep, _, _ = args
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
    dy: Tensor,
    x: Tensor | None,
    S: Tensor | None,
    weight: Tensor | None,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: float,
    keep: Tensor | None,
    dropout_p: float,
    needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    rows = rows_of(dy, lora_B.shape[0])
    dS, dB, dbias = gradients_sb(rows, S, lora_B, scaling, needs)
    need_dx, need_dA = needs[:2]
    dx, dA = gradients_xa(x, lora_A, dS, keep, dropout_p, (need_dx, need_dA), dy.dtype)
    if need_dx:
        if rows.shape[0]:
            dx.addmm_(rows, weight)
        dx = dx.view(*dy.shape[:-1], lora_A.shape[1])
    empty = dy.new_empty(0)
    return tuple(empty if grad is None else grad for grad in (dx, dA, dB, dbias))
