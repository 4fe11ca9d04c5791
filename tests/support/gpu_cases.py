"""What the tests of the Triton kernels share: interpreted on a CPU, or compiled on a GPU."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

import linear_cases
import torch
from block_weights import every_pair_weight, numpy_values, random_weight_of
from grouped_cases import Grouped
from linear_cases import Operands, operands, trials
from linear_cases import ours as ours
from nf4_weights import every_byte_weight
from tolerances import assert_as_accurate_as_torch
from torch import Tensor

import peftkern
from peftkern.backends import ops
from peftkern.formats.block_weight import QuantizedWeight

GRADIENTS = ("dx", "dA", "dB", "dbias")
RESULTS = ("y", *GRADIENTS)
EVERY = (True, True, True, True)


@dataclass(frozen=True)
class NF4Operands(linear_cases.NF4Operands):
    """In another dtype the weight is the exact one, not rounded to the dtype of x on the way."""

    def to(self, dtype: torch.dtype) -> NF4Operands:
        with peftkern.use_backend("reference"):  # the only one that knows float64
            return replace(super().to(dtype), weight=peftkern.dequantize_nf4(self.w, dtype))


def on_device(o: Operands, device: str) -> Operands:
    """The same operands on a device."""
    moved = {
        k: v.to(device) for k, v in vars(o).items() if isinstance(v, (Tensor, QuantizedWeight))
    }
    return replace(o, **moved)


def dense_cases(
    shape: tuple[int, int, int, int], *dtypes: torch.dtype, device: str = "cpu", **options
) -> list[Operands]:
    """As many draws of a shape as `check_accuracy` needs."""
    drawn = (operands(shape, *dtypes, **options) for _ in range(trials(shape)))
    return [on_device(o, device) for o in drawn]


def nf4_operands(shape: tuple[int, int, int, int], *dtypes, **options) -> NF4Operands:
    with peftkern.use_backend("reference"):
        return NF4Operands(**vars(linear_cases.nf4_operands(shape, *dtypes, **options)))


def nf4_cases(
    shape: tuple[int, int, int, int], *dtypes: torch.dtype, device: str = "cpu", **options
) -> list[NF4Operands]:
    drawn = (nf4_operands(shape, *dtypes, **options) for _ in range(trials(shape)))
    return [on_device(o, device) for o in drawn]


def format_operands(
    name: str, shape: tuple[int, int, int, int], *dtypes: torch.dtype
) -> NF4Operands:
    """A draw over a weight in any format."""
    w = random_weight_of(name, shape[1:3], dtypes[0])
    return NF4Operands(**vars(operands(shape, *dtypes, weight=numpy_values(w, dtypes[0]))), w=w)


def in_format(o: Grouped, name: str) -> Grouped:
    """The same operands over weights in any format."""
    w = random_weight_of(name, tuple(o.weight.shape), o.weight.dtype)
    return replace(o, w=w, weight=numpy_values(w, o.weight.dtype))


def every_scale_weight(name: str, dtype: torch.dtype) -> QuantizedWeight:
    """Every code beside every scale that the format can store, or those at the ends of float32."""
    if name in ("nf4", "fp4"):
        return every_byte_weight(64, True, dtype, name)
    return every_pair_weight(name, dtype)


def run_ops(
    o: Operands, keep: Tensor | None = None, needs: tuple[bool, ...] = EVERY, lora: bool = True
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


def check_finite(o: Operands, keep: Tensor | None = None) -> dict[str, Tensor]:
    """Triton's results, which are finite where the reference's are."""
    with peftkern.use_backend("triton"):
        got = run_ops(o, keep)
    with peftkern.use_backend("reference"):
        wanted = run_ops(o, keep)
    for name in wanted:
        assert torch.equal(got[name].isfinite(), wanted[name].isfinite()), name
    return got


def check_subsets(
    o: Operands, subsets: Iterable[tuple[bool, ...]], keep: Tensor | None = None
) -> None:
    """Only the gradients that are asked for are computed, with the bits of all at once."""
    full = run_ops(o, keep)
    for needs in subsets:
        got = run_ops(o, keep, needs)
        for name, needed in zip(GRADIENTS, needs, strict=True):
            assert same_bits(got[name], full[name]) if needed else got[name].shape == (0,)


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
