"""Arguments that do not fit: one line that names the argument, what was expected and what came.

A call that is right pays for comparisons alone; words are found when one is wrong.
"""

from __future__ import annotations

import numbers
from typing import Any

import torch
from torch import Tensor

from peftkern.formats.nf4 import ArgumentError, NF4Weight

WEIGHT_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
DTYPES = (*WEIGHT_DTYPES, torch.float64)
_PRINTED = (numbers.Number, str, torch.dtype, NF4Weight, type(None))  # others go by their type
_PRINTED_LENGTH = 120


def mismatch(name: str, expected: str, value: Any) -> ArgumentError:
    """The error of an argument, whatever it is."""
    return ArgumentError(f"{name}: expected {expected}, got {_what_came(name, value)}")


def check_float(name: str, tensor: Any, dtypes: tuple[torch.dtype, ...] = DTYPES) -> None:
    if not isinstance(tensor, Tensor) or tensor.dtype not in dtypes:
        raise mismatch(name, f"a tensor of one of {dtypes}", tensor)
    if tensor.layout is not torch.strided or tensor.is_nested:
        raise mismatch(name, "a dense tensor", tensor)


def check_tensor(name: str, value: Any) -> None:
    if not isinstance(value, Tensor):
        raise mismatch(name, "a tensor", value)


def is_listed(values: Any) -> bool:
    """Whether it is a list or whatever else gives one value after the other, but no tensor."""
    return not isinstance(values, (Tensor, str)) and hasattr(values, "__iter__")


def tensor_list(name: str, values: Any, *, optional: bool = False) -> list[Any]:
    """What a sequence of tensors holds, None among them if `optional`."""
    if not is_listed(values):
        raise mismatch(name, "a list of tensors", values)
    found = list(values)
    for i, value in enumerate(found):
        if not isinstance(value, Tensor) and not (optional and value is None):
            raise mismatch(f"{name}[{i}]", "a tensor", value)
    return found


def check_dense(name: str, weight: Any) -> None:
    """A tensor, and not the packed bytes of a quantised weight."""
    if (
        not isinstance(weight, Tensor)
        or weight.layout is not torch.strided
        or _is_params4bit(weight)
    ):
        raise mismatch(name, "a dense tensor", weight)


def check_frozen(weight: Any) -> None:
    """A dense weight that is not trained: its gradient is never computed."""
    check_dense("weight", weight)
    if weight.requires_grad and torch.is_grad_enabled():
        raise ArgumentError("weight: expected a frozen tensor, got one that requires a gradient")


def check_nf4(name: str, weight: Any) -> None:
    if not isinstance(weight, NF4Weight):
        raise mismatch(name, "an NF4Weight, as quantize_nf4 makes of a dense tensor", weight)


def check_linear(x: Tensor, N: int, K: int, bias: Any, dropout_p: Any) -> None:
    """What a linear layer of a weight [N, K] takes; `check_factors` is for its update."""
    if x.dim() == 0 or x.shape[-1] != K:
        raise mismatch("x", f"[..., {K}] for a weight [{N}, {K}]", x)
    if bias is not None and (
        not isinstance(bias, Tensor)
        or bias.shape != (N,)
        or bias.dtype is not x.dtype
        or bias.device != x.device
    ):
        raise mismatch("bias", f"[{N}] {x.dtype} on {x.device}", bias)
    check_probability("dropout_p", dropout_p)


def check_factors(N: int, K: int, device: torch.device, lora_A: Any, lora_B: Any) -> None:
    wrong = not isinstance(lora_A, Tensor) or lora_A.dim() != 2 or lora_A.shape[1] != K
    if wrong or lora_A.device != device:
        raise mismatch("lora_A", f"[r, {K}] on {device} for a weight [{N}, {K}]", lora_A)
    r = lora_A.shape[0]
    if not isinstance(lora_B, Tensor) or lora_B.shape != (N, r) or lora_B.device != device:
        raise mismatch("lora_B", f"[{N}, {r}] on {device} for lora_A [{r}, {K}]", lora_B)
    check_float("lora_A", lora_A)
    check_float("lora_B", lora_B)


def check_probability(name: str, p: Any) -> None:
    if not isinstance(p, (float, numbers.Real)) or not 0.0 <= p <= 1.0:
        raise mismatch(name, "a probability in [0, 1]", p)


def number(name: str, value: Any) -> float:
    """A scalar of Python, numpy or a symbolic shape as a float; text is none."""
    if not isinstance(value, (str, bytes)):
        try:
            return float(value)
        except (TypeError, ValueError, RuntimeError):  # more than one value
            pass
    raise mismatch(name, "a number or a 0-dim tensor", value)


def _is_params4bit(value: Any) -> bool:
    """A bitsandbytes weight that is quantised; before that it is as dense as any other."""
    return type(value).__name__ == "Params4bit" and getattr(value, "quant_state", None) is not None


def _what_came(name: str, value: Any) -> str:
    if _is_params4bit(value):
        return f"a bitsandbytes Params4bit: NF4Weight.from_bitsandbytes({name}) converts it"
    if isinstance(value, Tensor) and value.is_nested:
        return "a nested tensor"
    if isinstance(value, Tensor) and value.layout is not torch.strided:
        return f"{list(value.shape)} {value.dtype} in {value.layout}"
    if isinstance(value, Tensor):
        return f"{list(value.shape)} {value.dtype} on {value.device}"
    if not isinstance(value, _PRINTED):
        return f"a {type(value).__name__}"
    text = repr(value)
    return text if len(text) <= _PRINTED_LENGTH else f"{text[: _PRINTED_LENGTH - 3]}..."
