"""Quantum-PEFT: a low-rank update whose orthonormal factors cost a logarithmic number of angles.

An orthogonal matrix of 2^q rows is written as a circuit on q qubits: a rotation RY of every qubit,
then L layers, each of CZ signs and RY rotations on the pairs (0,1), (2,3), ... and then on the
pairs (1,2), (3,4), ...: (2 L + 1) q - 2 L angles. Its first r columns are the factor. Rotations
that act at the same time on different qubits are one small orthogonal matrix (at most 64 x 64), so
that a layer is a few matrix products over [2^q, r], not a pass for every gate.

The backward pass undoes each product with its transpose instead of storing what came out of it.

Source: Koike-Akino et al. 2025, arXiv:2503.05431
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from peftkern.functional.arguments import check_tensor, integer
from peftkern.layers.base import (
    check_update,
    dropout_p,
    low_rank_forward,
    low_rank_update,
    merged,
)
from peftkern.layers.frozen_base import OverFrozenBase

__all__ = ["QuantumPEFTLinear", "orthonormal_columns"]
_QUBITS = 6  # that one matrix acts on at most: 64 x 64


def angle_count(size: int, layers: int) -> int:
    """Return the number of angles of an orthogonal matrix with `size` rows.

    (2 L + 1) log2(size) - 2 L for a power of two; other sizes take two circuits of the next lower
    power of two, which overlap and reach every row together. Two rows have one angle, one row none.
    """
    qubits = size.bit_length() - 1
    one = (2 * layers + 1) * qubits - 2 * layers if qubits > 1 else qubits
    return one if size == 1 << qubits else 2 * one


def orthonormal_columns(angles: Tensor, size: int, r: int) -> Tensor:
    """Compute the first r columns [size, r] of the orthogonal matrix that the angles describe.

    Args: angles [angle_count(size, L)] for some L >= 0, float32 or float64; 1 <= r <= size.
    Returns: [size, r], dtype of the angles, U.T @ U = 1 to rounding. Zero angles and L = 0 give the
        first columns of the identity.
    Raises: ValueError naming the argument if the number of angles fits no L, or r no matrix.
    Gradients: angles; twice differentiable; nothing but the result and the small matrices is saved.
    """
    size = integer("size", size, 1)
    r, qubits = integer("r", r, 1, size), size.bit_length() - 1
    check_tensor("angles", angles)
    if angles.dtype not in (torch.float32, torch.float64) or angles.dim() != 1:
        wanted = "[n] float32 or float64, since rounded angles turn by too much"
        raise ValueError(f"angles: expected {wanted}, got {list(angles.shape)} {angles.dtype}")
    layers = _layers_of(angles.numel(), size)
    columns = torch.eye(size, r, dtype=angles.dtype, device=angles.device)
    with torch.autocast(angles.device.type, enabled=False):
        low = 1 << qubits
        if size == low:
            return _Circuit.apply(columns, 0, qubits, *_matrices(angles, qubits, layers))
        first, second = angles.chunk(2)
        top = _Circuit.apply(columns, 0, qubits, *_matrices(first, qubits, layers))
        return _Circuit.apply(top, size - low, qubits, *_matrices(second, qubits, layers))


class QuantumPEFTLinear(OverFrozenBase):
    """Frozen linear layer plus an update of rank r with a logarithmic number of parameters.

    y = base(x) + lora_alpha / r * ((dropout(x) @ V) * singular_values) @ U.T

    U [N, r] and V [K, r] are `orthonormal_columns` of angles_U and angles_V, computed at each call:
    6 L + 3 products of at most 64 x 64 with [N, r] for up to 4096 rows.

    Args:
        base: nn.Linear, or a layer of `peftkern.layers` with an NF4 weight; it is taken over and
            frozen.
        r: rank, at most the smaller side of the weight. layers: L; more describe more matrices.
        lora_alpha, lora_dropout: as in LoRA.

    Angles start normal with standard deviation 1, `singular_values` [r] at zero: the update starts
    at nothing. All are float32 whatever the base. Parameters: angle_count(N, L) + angle_count(K, L)
    + r.
    Source: Koike-Akino et al. 2025, arXiv:2503.05431
    """

    def __init__(
        self,
        base: nn.Linear,
        *,
        r: int = 8,
        layers: int = 1,
        lora_alpha: float = 16,
        lora_dropout: float = 0.0,
    ) -> None:
        super().__init__(base)
        r = check_update(r, lora_alpha, lora_dropout)
        K, N = base.in_features, base.out_features
        if r > min(N, K):
            raise ValueError(f"r: expected at most {min(N, K)}, the smaller side, got {r}")
        layers = integer("layers", layers)
        self.layers, self.lora_dropout = layers, lora_dropout
        self.scaling = lora_alpha / r
        factory = {"dtype": torch.float32, "device": base.weight.device}
        self.angles_U = nn.Parameter(torch.empty(angle_count(N, layers), **factory))
        self.angles_V = nn.Parameter(torch.empty(angle_count(K, layers), **factory))
        self.singular_values = nn.Parameter(torch.empty(r, **factory))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw random singular vectors, and zero the singular values."""
        nn.init.normal_(self.angles_U)
        nn.init.normal_(self.angles_V)
        nn.init.zeros_(self.singular_values)

    @property
    def r(self) -> int:
        return self.singular_values.numel()

    def factors(self) -> tuple[Tensor, Tensor]:
        """Return lora_A [r, K] = diag(singular_values) @ V.T and lora_B [N, r] = U."""
        U = orthonormal_columns(self.angles_U, self.out_features, self.r)
        V = orthonormal_columns(self.angles_V, self.in_features, self.r)
        return (V * self.singular_values).T, U

    def _forward(self, x: Tensor) -> Tensor:
        lora_A, lora_B = self.factors()
        options = {"dropout_p": dropout_p(self)}
        return low_rank_forward(self.base, x, lora_A, lora_B, scaling=self.scaling, **options)

    def merge(self) -> nn.Linear:
        """Make a dense nn.Linear that computes the same, without the update's cost."""
        with torch.no_grad():
            return merged(self.base, low_rank_update(*self.factors(), self.scaling))

    def extra_repr(self) -> str:
        return f"r={self.r}, layers={self.layers}, scaling={self.scaling:g}"


class _Circuit(torch.autograd.Function):
    """Product of small orthogonal matrices with a block of 2^qubits rows of x, from `start` on.

    Each matrix acts on some neighboring qubits.
    """

    @staticmethod
    def forward(ctx, x, start, qubits, positions, *matrices):
        out = x.clone()
        block = out[start : start + (1 << qubits)]
        for position, matrix in zip(positions, matrices, strict=True):
            block.copy_(_apply(matrix, block, position))
        ctx.save_for_backward(out, *matrices)
        ctx.start, ctx.rows, ctx.positions = start, 1 << qubits, positions
        return out

    @staticmethod
    def backward(ctx, grad):
        # As its forward pass, whatever autocast is on where backward is called.
        with torch.autocast(grad.device.type, enabled=False):
            dx, gradients = _Circuit._backward(ctx, grad)
        return dx, None, None, None, *gradients

    @staticmethod
    def _backward(ctx, grad):
        out, *matrices = ctx.saved_tensors
        rows = slice(ctx.start, ctx.start + ctx.rows)
        state, dx = out[rows], grad.clone()
        upstream = grad[rows]
        gradients = []
        for position, matrix in zip(reversed(ctx.positions), reversed(matrices), strict=True):
            state = _apply(matrix.T, state, position)  # what went in
            gradients.append(_outer(upstream, state, matrix.shape[0], position))
            upstream = _apply(matrix.T, upstream, position)
        dx[rows] = upstream
        return dx, reversed(gradients)


def _apply(matrix: Tensor, state: Tensor, position: int) -> Tensor:
    """Apply a matrix to the qubits from `position` on; qubit 0 is a row number's highest bit."""
    split = state.reshape(1 << position, matrix.shape[0], -1)
    return torch.matmul(matrix, split).view(state.shape)


def _outer(upstream: Tensor, state: Tensor, size: int, position: int) -> Tensor:
    """Compute the gradient [size, size] of a matrix that `_apply` took."""
    up, st = (t.reshape(1 << position, size, -1) for t in (upstream, state))
    return torch.matmul(up, st.transpose(1, 2)).sum(0)


def _matrices(angles: Tensor, qubits: int, layers: int) -> list:
    """Return (positions, matrix, matrix, ...) of a circuit, in the order in which they act."""
    if qubits == 0:
        return [()]
    # In float64, since rounded rotations change lengths, and their products by ever more.
    half = angles.double() / 2
    cos, sin = half.cos(), half.sin()
    rotations = torch.stack([cos, -sin, sin, cos], dim=1).view(-1, 2, 2).unbind()
    signs = half.new_ones(4)  # made there: copied from the host, they would make it wait
    signs.narrow(0, 3, 1).neg_()
    used = 0
    positions: list[int] = []
    matrices: list[Tensor] = []

    def act(first: int, count: int, entangle: bool) -> None:
        """Append CZ on neighboring pairs if `entangle`, then RY on `count` qubits from `first`."""
        nonlocal used
        for start in range(first, first + count, _QUBITS):
            members = min(_QUBITS, first + count - start)
            matrix = rotations[used]
            for i in range(1, members):
                matrix = torch.kron(matrix, rotations[used + i])
            if entangle:
                diagonal = signs
                for _ in range(members // 2 - 1):
                    diagonal = torch.kron(diagonal, signs)
                matrix = matrix * diagonal  # the signs act first: they scale columns
            used += members
            positions.append(start)
            matrices.append(matrix.to(angles.dtype))

    act(0, qubits, False)
    if qubits > 1:
        for _ in range(layers):
            act(0, qubits - qubits % 2, True)
            act(1, (qubits - 1) // 2 * 2, True)
    return [tuple(positions), *matrices]


def _layers_of(count: int, size: int) -> int:
    """Return L of a number of angles."""
    qubits = size.bit_length() - 1
    one = count if size == 1 << qubits else count / 2
    per_layer = 2 * qubits - 2
    layers = (one - qubits) / per_layer if per_layer > 0 else 0
    if layers < 0 or layers != int(layers) or count != angle_count(size, int(layers)):
        wanted = f"{angle_count(size, 0)} + L * {angle_count(size, 1) - angle_count(size, 0)}"
        raise ValueError(f"angles: expected {wanted} of them for {size} rows, got {count}")
    return int(layers)
