"""What the tests of the Triton kernels share: interpreted on a CPU, or compiled on a GPU."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from linear_cases import Operands, operands, trials
from tolerances import assert_as_accurate_as_torch
from torch import Tensor

import peftkern
from peftkern import NF4Weight
from peftkern.backends import ops

GRADIENTS = ("dx", "dA", "dB", "dbias")
RESULTS = ("y", *GRADIENTS)
EVERY = (True, True, True, True)


@dataclass(frozen=True)
class NF4Operands(Operands):
    """`weight` is what eager torch multiplies: the values of `w` rounded to the dtype of x.

    In another dtype the values are not rounded on the way, so the oracle's weight is the exact one.
    """

    w: NF4Weight | None = None

    def to(self, dtype: torch.dtype) -> NF4Operands:
        with peftkern.use_backend("reference"):  # the only one that knows float64
            return replace(super().to(dtype), weight=peftkern.dequantize_nf4(self.w, dtype))


def on_device(o: Operands, device: str) -> Operands:
    """The same operands on a device."""
    moved = {k: v.to(device) for k, v in vars(o).items() if isinstance(v, (Tensor, NF4Weight))}
    return replace(o, **moved)


def dense_cases(
    shape: tuple[int, int, int, int], *dtypes: torch.dtype, device: str = "cpu", **options
) -> list[Operands]:
    """As many draws of a shape as `check_accuracy` needs."""
    drawn = (operands(shape, *dtypes, **options) for _ in range(trials(shape)))
    return [on_device(o, device) for o in drawn]


def nf4_operands(
    shape: tuple[int, int, int, int],
    dtype: torch.dtype,
    adapter_dtype: torch.dtype,
    *,
    blocksize: int = 64,
    double_quant: bool = True,
    **options,
) -> NF4Operands:
    dense = torch.randn(shape[1], shape[2])
    with peftkern.use_backend("reference"):
        w = peftkern.quantize_nf4(dense, blocksize=blocksize, double_quant=double_quant)
        weight = peftkern.dequantize_nf4(w, dtype)
    o = operands(shape, dtype, adapter_dtype, weight=weight, **options)
    return NF4Operands(**vars(o), w=w)


def nf4_cases(
    shape: tuple[int, int, int, int], *dtypes: torch.dtype, device: str = "cpu", **options
) -> list[NF4Operands]:
    drawn = (nf4_operands(shape, *dtypes, **options) for _ in range(trials(shape)))
    return [on_device(o, device) for o in drawn]


def ours(o: Operands, x: Tensor, A: Tensor, B: Tensor, bias: Tensor | None) -> Tensor:
    """The public function on Triton; on a GPU backward remembers what forward was asked for."""
    options = {"scaling": o.scaling, "bias": bias, "dropout_p": o.dropout_p}
    if isinstance(o, NF4Operands):
        return peftkern.nf4_lora_linear(x, o.w, A, B, **options)
    return peftkern.lora_linear(x, o.weight, A, B, **options)


def run_ops(
    o: Operands,
    keep: Tensor | None = None,
    needs: tuple[bool, ...] = EVERY,
    lora: bool = True,
) -> dict[str, Tensor]:
    """Forward and backward op of `o` on the back end that is forced, with S between them.

    Triton reads the packed weight of NF4 operands, the reference `o.weight`.
    """
    adapters = (o.lora_A, o.lora_B) if lora else (None, None)
    packed = isinstance(o, NF4Operands) and o.x.dtype is not torch.float64
    weight = (o.w.tensors, o.w.layout) if packed else (o.weight,)
    forward = ops.nf4_lora_linear_forward if packed else ops.lora_linear_forward
    backward = ops.nf4_lora_linear_backward if packed else ops.lora_linear_backward
    options = (o.scaling, keep, o.dropout_p)
    y, S = forward(o.x, *weight, *adapters, o.bias, *options)
    read = (o.x if needs[1] else None, S if needs[2] else None)
    if not packed:
        weight = (o.weight if needs[0] else None,)
    grads = backward(o.dy, *read, *weight, *adapters, *options, list(needs))
    return {"y": y, "S": S, **dict(zip(GRADIENTS, grads, strict=True))}


def draw_seed(device: str = "cpu") -> Tensor:
    """What stands for dropout's mask on a GPU."""
    return torch.randint(2**63 - 1, (1,), dtype=torch.int64, device=device)


def check_ops_against_reference(cases: list[Operands], dropout_p: float = 0.0) -> None:
    """Every result of Triton's ops, S included, is as accurate as the reference's.

    Both are given the same seed, so a mask that differs in one element shows.
    """
    cases = [replace(o, dropout_p=dropout_p) for o in cases]
    keeps = [draw_seed(str(o.x.device)) if dropout_p else None for o in cases]
    runs = {}
    with peftkern.use_backend("triton"):
        runs["got"] = [run_ops(o, keep) for o, keep in zip(cases, keeps, strict=True)]
    with peftkern.use_backend("reference"):
        runs["eager"] = [run_ops(o, keep) for o, keep in zip(cases, keeps, strict=True)]
        exact = [o.to(torch.float64) for o in cases]
        runs["oracle"] = [run_ops(o, keep) for o, keep in zip(exact, keeps, strict=True)]
    for name in ("S", *RESULTS):
        if name == "dbias" and cases[0].bias is None:
            continue
        got, eager, oracle = (torch.stack([run[name] for run in run_]) for run_ in runs.values())
        assert_as_accurate_as_torch(got, eager, oracle)


def same_bits(got: Tensor, wanted: Tensor) -> bool:
    """Equality that tells -0.0 from 0.0."""
    integers = {1: torch.uint8, 2: torch.int16, 4: torch.int32}
    bits = [t.contiguous().view(integers[t.element_size()]) for t in (got, wanted)]
    return got.dtype is wanted.dtype and torch.equal(*bits)
