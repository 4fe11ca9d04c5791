"""Quantum-PEFT's factors against the circuit written gate by gate, and the layer against LoRA."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from method_models import HostCopies
from torch import Tensor, nn

import peftkern
from peftkern.layers import NF4Linear
from peftkern.methods.quantum_peft import (
    QuantumPEFTLinear,
    _matrices,
    angle_count,
    orthonormal_columns,
)


def gate(matrix: Tensor, first: int, qubits: int) -> Tensor:
    """A gate on neighboring qubits as a matrix on all of them; qubit 0 is the highest bit."""
    members = matrix.shape[0].bit_length() - 1
    eye = [torch.eye(1 << n, dtype=matrix.dtype) for n in (first, qubits - first - members)]
    return torch.kron(torch.kron(eye[0], matrix), eye[1])


def circuit(angles: Tensor, qubits: int, layers: int) -> Tensor:
    """The paper's circuit, a gate at a time: RY on every qubit, then CZ and RY on pairs."""
    left = list(angles)
    CZ = torch.diag(torch.tensor([1.0, 1.0, 1.0, -1.0], dtype=angles.dtype))

    def RY() -> Tensor:
        c, s = torch.cos(left[0] / 2), torch.sin(left.pop(0) / 2)
        return torch.stack([torch.stack([c, -s]), torch.stack([s, c])])

    U = torch.eye(1 << qubits, dtype=angles.dtype)
    for i in range(qubits):
        U = gate(RY(), i, qubits) @ U
    for _ in range(layers if qubits > 1 else 0):
        for first in (0, 1):
            for i in range(first, qubits - 1, 2):
                U = gate(CZ, i, qubits) @ U
                U = gate(RY(), i, qubits) @ U
                U = gate(RY(), i + 1, qubits) @ U
    assert not left
    return U


@pytest.mark.parametrize(
    ("qubits", "layers"), [*itertools.product((1, 2, 3, 4), (0, 1, 2)), (7, 2), (8, 1)]
)
def test_equals_the_circuit_with_gradients(qubits, layers):
    size = 1 << qubits
    angles = torch.randn(angle_count(size, layers), dtype=torch.float64, requires_grad=True)
    r = max(1, size // 2)
    got, wanted = orthonormal_columns(angles, size, r), circuit(angles, qubits, layers)[:, :r]
    torch.testing.assert_close(got, wanted, rtol=0, atol=1e-13)
    upstream = torch.randn_like(got)
    (mine,) = torch.autograd.grad(got, angles, upstream)
    (theirs,) = torch.autograd.grad(wanted, angles, upstream)
    torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-12)


@pytest.mark.parametrize("size", [3, 6, 12, 17])
def test_other_sizes_are_two_overlapping_circuits(size):
    angles = torch.randn(angle_count(size, 1), dtype=torch.float64, requires_grad=True)
    qubits = size.bit_length() - 1
    low = 1 << qubits
    whole = torch.eye(size, dtype=torch.float64)
    for rows, part in zip((slice(0, low), slice(size - low, size)), angles.chunk(2), strict=True):
        placed = torch.eye(size, dtype=torch.float64)
        placed[rows, rows] = circuit(part, qubits, 1)
        whole = placed @ whole
    got = orthonormal_columns(angles, size, size)
    torch.testing.assert_close(got, whole, rtol=0, atol=1e-13)
    assert torch.autograd.gradcheck(lambda a: orthonormal_columns(a, size, 2), angles)


@settings(max_examples=settings.default.max_examples // 5)
@given(size=st.integers(1, 300), layers=st.integers(0, 3), share=st.floats(0, 1))
def test_columns_are_orthonormal(size, layers, share):
    """Up to a rank of 64, as at the sizes of models below."""
    r = 1 + round(share * (min(size, 64) - 1))
    U = orthonormal_columns(10 * torch.randn(angle_count(size, layers)), size, r).double()
    assert (U.T @ U - torch.eye(r)).abs().max() <= 1e-6


@pytest.mark.parametrize("size", [4096, 5120, 14336])
def test_columns_are_orthonormal_at_the_sizes_of_models(size):
    U = orthonormal_columns(torch.randn(angle_count(size, 4)), size, 64).double()
    assert (U.T @ U - torch.eye(64)).abs().max() <= 1e-6


def test_number_of_angles_is_the_papers():
    for q in range(2, 16):
        for L in range(5):
            assert angle_count(1 << q, L) == (2 * L + 1) * q - 2 * L
    layer = QuantumPEFTLinear(nn.Linear(1024, 4096, bias=False), r=16, layers=2)
    trained = sum(p.numel() for p in layer.parameters() if p.requires_grad)
    assert trained == (5 * 10 - 4) + (5 * 12 - 4) + 16


def test_backward_stores_no_activation_of_the_circuit():
    size, r, layers = 1024, 8, 4
    angles = torch.randn(angle_count(size, layers), requires_grad=True)
    large = set()

    def pack(tensor: Tensor) -> Tensor:
        if tensor.numel() >= size * r:  # the small matrices have at most half of that
            large.add(tensor.data_ptr())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        U = orthonormal_columns(angles, size, r)
    assert large == {U.data_ptr()}


def test_nothing_is_copied_from_the_host():
    """Which would make it wait for a GPU at each call."""
    with HostCopies() as copies:
        _matrices(torch.empty(angle_count(4096, 1), device="cuda"), 12, 1)
    assert copies.count == 0


def reference(layer: QuantumPEFTLinear, weight: Tensor, x: Tensor) -> Tensor:
    U, V = (
        circuit(a.detach().double(), int(math.log2(n)), layer.layers)[:, : layer.r]
        for a, n in ((layer.angles_U, layer.out_features), (layer.angles_V, layer.in_features))
    )
    update = layer.scaling * U @ torch.diag(layer.singular_values.detach().double()) @ V.T
    return x.double() @ (weight.double() + update).T


@pytest.mark.parametrize("nf4", [False, True])
def test_layer_computes_the_formula_and_merges(nf4):
    linear = nn.Linear(64, 32, bias=False)
    base = NF4Linear.from_linear(linear) if nf4 else linear
    layer = QuantumPEFTLinear(base, r=4)
    x = torch.randn(5, 64)
    torch.testing.assert_close(layer(x), base(x))  # starts at nothing
    nn.init.normal_(layer.singular_values)
    weight = peftkern.dequantize_nf4(base.nf4) if nf4 else linear.weight
    wanted = reference(layer, weight, x)
    torch.testing.assert_close(layer(x).double(), wanted, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(layer.merge()(x).double(), wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("shape", [(33, 64), pytest.param((48, 65), marks=pytest.mark.long)])
def test_layer_learns_an_update_that_it_can_describe(shape):
    torch.manual_seed(3)
    linear = nn.Linear(shape[1], shape[0])
    teacher = QuantumPEFTLinear(nn.Linear(shape[1], shape[0]), r=2, lora_alpha=2)
    teacher.base.load_state_dict(linear.state_dict())
    nn.init.constant_(teacher.singular_values, 3.0)
    student = QuantumPEFTLinear(linear, r=2, lora_alpha=2)
    student.load_state_dict(teacher.state_dict())
    with torch.no_grad():
        for parameter in (student.angles_U, student.angles_V):
            parameter += 0.2 * torch.randn_like(parameter)
    student.singular_values.data.zero_()
    x = torch.randn(256, shape[1])
    target = teacher(x).detach()
    optimizer = torch.optim.Adam(student.parameters(), lr=0.03)
    losses = []
    for _ in range(150):
        loss = (student(x) - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.02 * losses[0]
    assert linear.weight.grad is None


def test_bfloat16_base_under_autocast_keeps_the_angles_in_float32():
    layer = QuantumPEFTLinear(nn.Linear(64, 64, dtype=torch.bfloat16), r=4)
    nn.init.normal_(layer.singular_values)
    x = torch.randn(3, 64, dtype=torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
        U = orthonormal_columns(layer.angles_U, 64, 4)
    assert (y.dtype, U.dtype) == (torch.bfloat16, torch.float32)
    assert (U.double().T @ U.double() - torch.eye(4)).abs().max() <= 1e-6
    upstream = torch.randn(64, 4)
    grads = []
    for inside in (False, True):  # training loops call backward in either place
        layer.angles_U.grad = None
        U = orthonormal_columns(layer.angles_U, 64, 4)
        with torch.autocast("cpu", torch.bfloat16, enabled=inside):
            U.backward(upstream)
        grads.append(layer.angles_U.grad)
    assert torch.equal(*grads)


def test_wrong_arguments_are_named():
    linear = nn.Linear(8, 4)
    for change, complaint in (
        ({"r": 5}, "r: expected at most 4"),
        ({"layers": -1}, "layers: expected"),
    ):
        with pytest.raises(ValueError, match=complaint):
            QuantumPEFTLinear(linear, **{"r": 2, **change})
    for angles, r, complaint in (
        (torch.zeros(5), 1, r"angles: expected 3 .* for 8 rows, got 5"),
        (torch.zeros(3).bfloat16(), 1, r"angles: expected .* float32"),
        (torch.zeros(3), 9, r"r: expected an integer of at least 1 and at most 8"),
    ):
        with pytest.raises(ValueError, match=complaint):
            orthonormal_columns(angles, 8, r)
