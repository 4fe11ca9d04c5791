"""What the tests of both linear functions share: PEFT's formula in torch calls, and its inputs."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from tolerances import assert_as_accurate_as_torch
from torch import Tensor

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


@dataclass(frozen=True)
class Operands:
    """Inputs of one call; `weight` is dense (for NF4: what the packed weight stands for)."""

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
    """How often to draw a shape: in a result of one value eager torch is exact now and then."""
    return max(1, 16 // min(shape))


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
