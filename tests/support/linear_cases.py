"""The linear functions over dense and NF4 weights: inputs, PEFT's formula, and their checks."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from tolerances import assert_as_accurate_as_torch
from torch import Tensor

import peftkern
from peftkern import NF4Weight

F64, F32, F16, BF16 = torch.float64, torch.float32, torch.float16, torch.bfloat16
SHAPES = [  # M, N, K, r: one, primes, 2^k and its neighbours, more rows than columns and less
    (1, 1, 1, 1),
    (1, 64, 128, 16),
    (5, 13, 17, 3),
    (16, 129, 63, 8),
    (33, 31, 257, 1),
    (257, 40, 96, 5),
]
DTYPES = [(F32, F32), (BF16, F32), (F16, F32), (BF16, BF16), (F16, F16), (F32, BF16)]
KINDS = ["lora_linear", "nf4_lora_linear"]


@dataclass(frozen=True)
class Operands:
    """Inputs of one call; `weight` is dense."""

    x: Tensor
    weight: Tensor
    lora_A: Tensor
    lora_B: Tensor
    bias: Tensor | None
    scaling: float
    dropout_p: float
    dy: Tensor
    seed: int = 5

    def to(self, dtype: torch.dtype) -> Operands:
        names = ("x", "weight", "lora_A", "lora_B", "bias", "dy")
        moved = {name: getattr(self, name) for name in names}
        return replace(self, **{k: v if v is None else v.to(dtype) for k, v in moved.items()})


@dataclass(frozen=True)
class NF4Operands(Operands):
    """`weight`: the values of `w` rounded to the dtype that the kernels compute in."""

    w: NF4Weight | None = None


def operands(
    shape: tuple[int, int, int, int],
    dtype: torch.dtype,
    adapter_dtype: torch.dtype,
    *,
    weight: Tensor | None = None,
    bias: bool = True,
    dropout_p: float = 0.0,
) -> Operands:
    M, N, K, r = shape
    return Operands(
        x=torch.randn(M, K).to(dtype),
        weight=torch.randn(N, K).to(dtype) if weight is None else weight,
        lora_A=(torch.randn(r, K) / K**0.5).to(adapter_dtype),
        lora_B=(torch.randn(N, r) / r**0.5).to(adapter_dtype),
        bias=torch.randn(N).to(dtype) if bias else None,
        scaling=1.5,
        dropout_p=dropout_p,
        dy=torch.randn(M, N).to(dtype),
    )


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
    w = peftkern.quantize_nf4(dense, blocksize=blocksize, double_quant=double_quant)
    weight = peftkern.dequantize_nf4(w, dtype)
    return NF4Operands(**vars(operands(shape, dtype, adapter_dtype, weight=weight, **options)), w=w)


def operands_of(kind: str, shape: tuple[int, int, int, int], *dtypes, **options) -> Operands:
    draw = operands if kind == "lora_linear" else nf4_operands
    return draw(shape, *dtypes, **options)


def ours(o: Operands, x: Tensor, A: Tensor, B: Tensor, bias: Tensor | None) -> Tensor:
    """The public function, on whatever back end serves."""
    options = {"scaling": o.scaling, "bias": bias, "dropout_p": o.dropout_p}
    if isinstance(o, NF4Operands):
        return peftkern.nf4_lora_linear(x, o.w, A, B, **options)
    return peftkern.lora_linear(x, o.weight, A, B, **options)


def peft_formula(o: Operands, x: Tensor, A: Tensor, B: Tensor, bias: Tensor | None) -> Tensor:
    """PEFT's lora.Linear.forward: the base, then the update in the adapter's dtype, then one cast.

    The mask is drawn in float32 whatever the dtype, as all of them draw the same one.
    """
    y = F.linear(x, o.weight, bias)
    dropped = x.to(A.dtype)
    if o.dropout_p:
        torch.manual_seed(o.seed)
        noise = torch.empty(x.shape).bernoulli_(1 - o.dropout_p)
        dropped = dropped * noise.to(A.dtype).div_(1 - o.dropout_p)
    return (y + F.linear(F.linear(dropped, A), B) * o.scaling).to(y.dtype)


def with_gradients(o: Operands, function) -> dict[str, Tensor]:
    """Output and gradients of function(o, x, A, B, bias), from the seed of `o`."""
    leaves = {"x": o.x, "A": o.lora_A, "B": o.lora_B, "bias": o.bias}
    leaves = {k: None if v is None else v.detach().requires_grad_() for k, v in leaves.items()}
    torch.manual_seed(o.seed)
    y = function(o, *leaves.values())
    y.backward(o.dy)
    grads = {f"d{k}": leaf.grad for k, leaf in leaves.items() if leaf is not None}
    return {"y": y.detach(), **grads}


def trials(shape: tuple[int, int, int, int]) -> int:
    """Draws that give each result 32 values or so: of one, eager torch is exact now and then."""
    M, N, K, r = shape
    return min(16, -(-32 // min(M * N, M * r, r * K, N)))


def check_accuracy(cases: list[Operands], function) -> None:
    """Every result of `function`, over all cases of one shape, is as accurate as PEFT's formula."""
    got = [with_gradients(o, function) for o in cases]
    eager = [with_gradients(o, peft_formula) for o in cases]
    oracle = [with_gradients(o.to(F64), peft_formula) for o in cases]
    assert got[0].keys() == oracle[0].keys()
    for name in got[0]:
        results = (torch.stack([run[name] for run in runs]) for runs in (got, eager, oracle))
        assert_as_accurate_as_torch(*results)


def layouts(tensor: Tensor) -> dict[str, Tensor]:
    """The same values [M, K] behind other strides and addresses."""
    M, K = tensor.shape
    wide = torch.full((M + 2, 2 * K + 3), float("nan"), dtype=tensor.dtype)
    wide[1:-1, 1 : 2 * K : 2] = tensor
    shifted = torch.cat((tensor.new_zeros(1), tensor.reshape(-1)))[1:].view(M, K)
    assert shifted.is_contiguous() and shifted.data_ptr() % 16
    return {
        "transposed": tensor.t().contiguous().t(),
        "sliced": wide[1:-1, 1 : 2 * K : 2],
        "misaligned": shifted,
        "3-d": tensor.reshape(1, M, K),
    }
