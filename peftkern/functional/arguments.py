"""Arguments of the public functions: checks, casts under autocast, scaling, dropout.

An argument that does not fit is one line that names it, what was expected and what came. A call
that is right pays for comparisons alone.
"""

from __future__ import annotations

import numbers
import operator
from typing import Any

import torch
from torch import Tensor

from peftkern.formats.block_weight import BlockWeight, QuantizedWeight
from peftkern.formats.nf4 import ArgumentError, NF4Weight

WEIGHT_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
DTYPES = (*WEIGHT_DTYPES, torch.float64)
# Others go by their type.
_PRINTED = (numbers.Number, str, torch.dtype, NF4Weight, BlockWeight, type(None))
_PRINTED_LENGTH = 120
_LARGEST = 2**63 - 1  # of what C++ and tensors count in
_TENSORS = frozenset((Tensor, torch.nn.Parameter))
# FSDP1 makes one parameter of many, of which a process has a part.
IN_FLAT_PARAMETER = "FullyShardedDataParallel holds it in pieces of a flat parameter"
SHARD_OTHERWISE = (
    "shard the model by fully_shard (accelerate: fsdp_version: 2), or train under "
    "DistributedDataParallel"
)


def mismatch(name: str, expected: str, value: Any) -> ArgumentError:
    """Return the error of an argument, whatever it is."""
    return ArgumentError(f"{name}: expected {expected}, got {_what_came(name, value)}")


def check_float(name: str, tensor: Any, dtypes: tuple[torch.dtype, ...] = DTYPES) -> None:
    if not isinstance(tensor, Tensor) or tensor.dtype not in dtypes:
        raise mismatch(name, f"a tensor of one of {dtypes}", tensor)
    if tensor.layout is not torch.strided or tensor.is_nested:
        raise mismatch(name, "a dense tensor", tensor)


def check_tensor(name: str, value: Any) -> None:
    if not isinstance(value, Tensor):
        raise mismatch(name, "a tensor", value)
    if value.layout is not torch.strided or value.is_nested:
        raise mismatch(name, "a dense tensor", value)


def check_values(name: str, value: Any) -> None:
    """Check for a tensor that is read on the host."""
    check_tensor(name, value)
    if value.is_meta:
        raise mismatch(name, "a tensor with values", value)


def is_listed(values: Any) -> bool:
    """Return True for a list and whatever else gives value after value, but no tensor."""
    return not isinstance(values, (Tensor, str)) and hasattr(values, "__iter__")


def tensor_list(name: str, values: Any, *, optional: bool = False) -> list[Any]:
    """Return a sequence of tensors as a list, None among them if `optional`."""
    if not is_listed(values):
        raise mismatch(name, "a list of tensors", values)
    found = list(values)
    if {*map(type, found)} <= _TENSORS:  # one question for hundreds
        return found
    for i, value in enumerate(found):
        if not isinstance(value, Tensor) and not (optional and value is None):
            raise mismatch(f"{name}[{i}]", "a tensor", value)
    return found


def check_each_dense(**lists: list[Any]) -> None:
    """Name what is not dense in lists of tensors, None among them, of which something has raised.

    To ask before would be two passes over hundreds of tensors.
    """
    for name, tensors in lists.items():
        for i, tensor in enumerate(tensors):
            if tensor is not None:
                check_tensor(f"{name}[{i}]", tensor)


def check_dense(name: str, weight: Any) -> None:
    """Check for a tensor that is not the packed bytes of a quantized weight."""
    if (
        not isinstance(weight, Tensor)
        or weight.layout is not torch.strided
        or weight.is_nested
        or _is_params4bit(weight)
    ):
        raise mismatch(name, "a dense tensor", weight)


def check_frozen(weight: Any) -> None:
    """Check for a dense weight that is not trained: its gradient is never computed."""
    check_dense("weight", weight)
    if weight.requires_grad and torch.is_grad_enabled():
        if flat_parameter_of(weight) is not None:
            raise ArgumentError(
                f"weight: expected a frozen tensor alone: {IN_FLAT_PARAMETER} with trained ones; "
                f"{SHARD_OTHERWISE}"
            )
        raise ArgumentError("weight: expected a frozen tensor, got one that requires a gradient")


def flat_parameter_of(view: Tensor) -> Any:
    """Return FSDP1's flat parameter that a tensor with a gradient is a view of, None if of none."""
    node = view.grad_fn
    while node is not None and not hasattr(node, "variable"):
        node = node.next_functions[0][0] if node.next_functions else None
    flat = getattr(node, "variable", None)
    return flat if hasattr(flat, "_param_infos") else None


def check_quantized(name: str, weight: Any) -> None:
    if type(weight) is not NF4Weight and not isinstance(weight, QuantizedWeight):
        kinds = "an NF4Weight or BlockWeight, as quantize_nf4 and its kin make of a dense tensor"
        raise mismatch(name, kinds, weight)


def check_linear(x: Tensor, N: int, K: int, bias: Any, dropout_p: Any) -> None:
    """Check the inputs of a linear layer of a weight [N, K]; its update: `check_factors`."""
    if x.dim() == 0 or x.shape[-1] != K:
        raise mismatch("x", f"[..., {K}] for a weight [{N}, {K}]", x)
    if bias is not None and (
        not isinstance(bias, Tensor)
        or bias.is_nested
        or bias.layout is not torch.strided
        or bias.shape != (N,)
        or bias.dtype is not x.dtype
        or bias.device != x.device
    ):
        raise mismatch("bias", f"[{N}] {x.dtype} on {x.device}", bias)
    if type(dropout_p) is not float or not 0.0 <= dropout_p <= 1.0:
        check_probability("dropout_p", dropout_p)


def check_stored(name: str, x: Tensor, w: QuantizedWeight) -> None:
    """Check for a weight [N, K] on the device of x."""
    if len(w.shape) != 2 or w.packed.device != x.device:
        raise mismatch(name, f"shape (N, K) on {x.device} like x", w)


def check_factors(N: int, K: int, device: torch.device, lora_A: Any, lora_B: Any) -> None:
    wrong = not isinstance(lora_A, Tensor) or lora_A.is_nested or lora_A.dim() != 2
    if wrong or lora_A.shape[1] != K or lora_A.device != device:
        raise mismatch("lora_A", f"[r, {K}] on {device} for a weight [{N}, {K}]", lora_A)
    r = lora_A.shape[0]
    wrong = not isinstance(lora_B, Tensor) or lora_B.is_nested or lora_B.shape != (N, r)
    if wrong or lora_B.device != device:
        raise mismatch("lora_B", f"[{N}, {r}] on {device} for lora_A [{r}, {K}]", lora_B)
    for name, factor in (("lora_A", lora_A), ("lora_B", lora_B)):
        if factor.dtype not in DTYPES or factor.layout is not torch.strided:
            check_float(name, factor)


def check_probability(name: str, p: Any) -> None:
    if not isinstance(p, (float, numbers.Real)) or not 0.0 <= p <= 1.0:
        raise mismatch(name, "a probability in [0, 1]", p)


def number(name: str, value: Any) -> float:
    """Return a scalar of Python, numpy or a symbolic shape as a float; text is none."""
    if not isinstance(value, (str, bytes)):
        try:
            return float(value)
        except (TypeError, ValueError, RuntimeError):  # more than one value
            pass
    raise mismatch(name, "a number or a 0-dim tensor", value)


def integer(name: str, value: Any, low: int = 0, high: int = _LARGEST) -> int:
    """Return an integer of Python, numpy or a tensor as an int; a float is none, nor is True."""
    try:
        found = low - 1 if isinstance(value, bool) else operator.index(value)
    except (TypeError, RuntimeError):  # as a tensor of several says
        found = low - 1
    if low <= found <= high:
        return found
    most = f" and at most {high}" if high < _LARGEST or found > high else ""
    raise mismatch(name, f"an integer of at least {low}{most}", value)


def needs_gradient(*tensors: Tensor | None) -> tuple[bool, ...] | None:
    """Return which tensors want a gradient, or None if there is no backward pass at all."""
    if not torch.is_grad_enabled():
        return None
    needs = [False] * len(tensors)
    for i, tensor in enumerate(tensors):
        if tensor is not None and tensor.requires_grad:
            needs[i] = True
    return tuple(needs) if True in needs else None


def is_symbol(scaling: float) -> bool:
    """Return whether a scaling of a graph may change, which no op takes.

    With its value instead, a graph is compiled anew for every one of a schedule.
    """
    return not torch.fx.experimental.symbolic_shapes.has_static_value(scaling)


def fold_scaling(lora_B: Tensor, scaling: float | Tensor, x: Tensor) -> tuple[Tensor, float]:
    """Return lora_B and a number; a tensor goes into lora_B: the host never waits for its value.

    So does a symbol of a graph, whose value no op takes.
    """
    if isinstance(scaling, Tensor):
        if scaling.dim() != 0:
            raise mismatch("scaling", "a number or a 0-dim tensor", scaling)
    elif type(scaling) is not float or not (torch.compiler.is_compiling() and is_symbol(scaling)):
        return lora_B, number("scaling", scaling)
    wide = torch.float64 if x.dtype is torch.float64 else torch.float32
    return lora_B.to(wide) * scaling, 1.0


def draw_keep(x: Tensor, dropout_p: float) -> Tensor | None:
    """Draw a dropout mask as nn.Dropout does on a CPU, in its order; elsewhere a mask's seed.

    The seed is drawn on the device, so the host does not wait, a CUDA graph draws a new one at each
    replay, and checkpointing, which restores the generator, draws the same one again.
    """
    if dropout_p == 0.0:
        return None
    if not x.is_cpu:
        return torch.randint(2**63 - 1, (1,), dtype=torch.int64, device=x.device)
    return torch.empty_like(x, dtype=torch.bool).bernoulli_(1.0 - dropout_p)


def cast_for_autocast(x: Tensor, *others: Tensor | None) -> tuple[Tensor | None, ...]:
    """Cast as autocast casts the arguments of F.linear; float64, and what is no tensor, stays."""
    dtype = autocast_dtype(x)
    if dtype is None:
        return x, *others
    return tuple([autocast_to(dtype, tensor) for tensor in (x, *others)])


def autocast_to(dtype: torch.dtype, tensor: Any) -> Any:
    """Cast as autocast does where its dtype is `dtype`."""
    if not isinstance(tensor, Tensor) or tensor.dtype is dtype or tensor.dtype not in WEIGHT_DTYPES:
        return tensor
    return tensor.to(dtype=dtype)  # by its keyword torch finds it sooner


def late_cast(
    dtype: torch.dtype,
    lora_A: Tensor | None,
    lora_B: Tensor | None,
    needs: tuple[bool, ...] | None,
) -> tuple[Tensor | None, Tensor | None, torch.dtype | None]:
    """Cast factors as autocast does, or leave that to an autograd function, without a node each.

    Returns: lora_A, lora_B, and the dtype to which they are still to be cast, or None.
    """
    if needs is not None and not torch.compiler.is_compiling():
        return lora_A, lora_B, dtype
    return autocast_to(dtype, lora_A), autocast_to(dtype, lora_B), None


def autocast_dtype(x: Tensor) -> torch.dtype | None:
    """Return the dtype that autocast gives x's operations, None where it is off for its device."""
    kind = x.device.type
    if kind == "meta" or not torch.is_autocast_enabled(kind):  # torch raises for "meta"
        return None
    return torch.get_autocast_dtype(kind)


def _is_params4bit(value: Any) -> bool:
    """Return whether a bitsandbytes weight is quantized; before that it is dense."""
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
