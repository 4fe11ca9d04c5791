"""What the tests of DoRA's norms on a GPU share: interpreted on a CPU, or compiled on a GPU."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from linear_cases import BF16, F16, F32
from tolerances import DORA_NORM_RTOL, assert_as_accurate_as_torch
from torch import Tensor

import peftkern
from peftkern import NF4Weight
from peftkern.functional.dora import dora_norm

ADAPTERS = [(F32, F32), (BF16, BF16), (F16, F16), (BF16, F32), (F32, F16)]


@dataclass(frozen=True)
class NormCase:
    """Arguments of `dora_norm`."""

    weight: Tensor | NF4Weight
    lora_A: Tensor
    lora_B: Tensor
    scaling: float = 0.7

    @property
    def arguments(self) -> tuple[Tensor | NF4Weight, Tensor, Tensor]:
        return self.weight, self.lora_A, self.lora_B

    def dense(self) -> Tensor:
        """The weight's values in its own type, from the reference."""
        if isinstance(self.weight, Tensor):
            return self.weight
        with peftkern.use_backend("reference"):
            return peftkern.dequantize_nf4(self.weight)


def norm_case(
    shape: tuple[int, int, int],
    dtype: torch.dtype,
    adapters: tuple[torch.dtype, torch.dtype],
    layout: tuple[int, bool] | None = None,
    device: str = "cpu",
) -> NormCase:
    """A draw of (N, K, r); layout: blocksize and double quantisation of an NF4 weight."""
    N, K, r = shape
    weight = torch.randn(N, K).to(dtype)
    if layout is not None:
        with peftkern.use_backend("reference"):
            weight = peftkern.quantize_nf4(weight, blocksize=layout[0], double_quant=layout[1])
    A, B = torch.randn(r, K).to(adapters[0]), torch.randn(N, r).to(adapters[1])
    return NormCase(weight.to(device), A.to(device), B.to(device))


def norm_cases(shape: tuple[int, int, int], *args, **options) -> list[NormCase]:
    """So many draws that torch is not exact by chance in a handful of norms."""
    return [norm_case(shape, *args, **options) for _ in range(max(1, 16 // shape[0]))]


def check_norms(cases: list[NormCase]) -> None:
    """Our norms are as accurate as the reference's in float32."""
    got, eager, oracle = [], [], []
    for case in cases:
        got.append(dora_norm(*case.arguments, scaling=case.scaling))
        with peftkern.use_backend("reference"):
            eager.append(dora_norm(*case.arguments, scaling=case.scaling))
        A, B = case.lora_A.double(), case.lora_B.double()
        oracle.append(torch.linalg.norm(case.dense().double() + case.scaling * B @ A, dim=1))
    assert_as_accurate_as_torch(torch.stack(got), torch.stack(eager), torch.stack(oracle))


def check_undone_weight(left: float, nf4: bool = False, device: str = "cpu") -> None:
    """The norms of rows of rank 2 that B A takes away but for a share: the sum cancels.

    Relative to what cancels: a row that the update undoes is known to its last bits only.
    """
    A, B = torch.randn(2, 512), torch.randn(24, 2)
    update = B.double() @ A.double()
    weight = dense = ((left - 1) * update).float()
    if nf4:
        weight = peftkern.quantize_nf4(dense, double_quant=False)
        dense = peftkern.dequantize_nf4(weight)
    oracle = torch.linalg.norm(dense.double() + update, dim=1)
    got = dora_norm(weight.to(device), A.to(device), B.to(device), scaling=1.0).cpu()
    size = torch.linalg.norm(dense.double(), dim=1)
    assert ((got.double() - oracle).abs() / size).max() <= DORA_NORM_RTOL


def check_finite(arguments: tuple) -> None:
    """Finite, Inf and NaN where the reference is, and somewhere not finite."""
    got = dora_norm(*arguments, scaling=1.5)
    with peftkern.use_backend("reference"):
        wanted = dora_norm(*arguments, scaling=1.5)
    assert torch.equal(got.isfinite(), wanted.isfinite()) and not got.isfinite().all()
    assert torch.equal(got.isnan(), wanted.isnan())
