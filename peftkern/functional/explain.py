"""Verdicts of dispatch on calls of the public functions."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from peftkern.backends import dispatch, ops
from peftkern.formats.block_weight import QuantizedWeight
from peftkern.formats.nf4 import NESTED_BLOCKSIZE
from peftkern.functional.arguments import (
    check_dense,
    check_factors,
    check_float,
    check_quantized,
    check_tensor,
    mismatch,
)

__all__ = ["explain"]


def explain(op_name: str, *args: Any, **kwargs: Any) -> dispatch.Explanation:
    """Explain which back end would serve a call, and why others would not; computes nothing.

    Args: op_name, `lora_linear`, `nf4_linear`, `nf4_lora_linear`, `dora_linear`, `quantize_nf4` or
        `dequantize`, and its arguments, or an op of `torch.ops.peftkern` and its positional ones.
    Returns: an object whose str() is a table.
    Raises: ValueError listing the names if there is none like this, or naming an argument of
        another kind.
    """
    if isinstance(op_name, str) and op_name in ops.SCHEMAS:
        _check_op_arguments(op_name, args)
        return dispatch.explain({op_name: args})
    expand = _EXPLAINED.get(op_name) if isinstance(op_name, str) else None
    if expand is None:
        raise mismatch("op_name", f"one of {sorted([*_EXPLAINED, *ops.SCHEMAS])}", op_name)
    return dispatch.explain(expand(*args, **kwargs))


def _check_op_arguments(op: str, args: tuple[Any, ...]) -> None:
    """Check that there are as many as in the schema, with tensors where it has tensors."""
    parameters = getattr(torch.ops.peftkern, op).default._schema.arguments
    if len(args) != len(parameters):
        raise ValueError(f"{op}: expected {len(parameters)} arguments, got {len(args)}")
    for parameter, value in zip(parameters, args, strict=True):
        name, kind = parameter.name, str(parameter.type)
        listed = kind.startswith("List[")
        if "Tensor" not in kind:
            continue
        if listed and not isinstance(value, (list, tuple)):
            raise mismatch(name, "a list of tensors", value)
        for one in value if listed else [value]:
            if one is not None or "Optional" not in kind:
                check_tensor(name, one)


def _check_explained(x: Any, name: str, weight: Tensor | QuantizedWeight, bias: Any) -> None:
    """Check what a call checks but dtypes, which autocast may change; `check_factors` follows."""
    check_float("x", x)
    if len(weight.shape) != 2:
        raise mismatch(name, "shape (N, K)", weight)
    if bias is not None:
        check_tensor("bias", bias)


def _explain_lora_linear(x, weight, lora_A, lora_B, *, scaling, bias=None, dropout_p=0.0):
    check_dense("weight", weight)
    _check_explained(x, "weight", weight, bias)
    check_factors(*weight.shape, x.device, lora_A, lora_B)
    dy = x.new_empty(()).expand(*x.shape[:-1], weight.shape[0])
    forward = (x, weight, lora_A, lora_B, bias, 1.0, None, dropout_p)
    backward = (dy, x, None, weight, lora_A, lora_B, 1.0, None, dropout_p, (True,) * 4)
    return {"lora_linear_forward": forward, "lora_linear_backward": backward}


def _explain_nf4_lora_linear(x, w, lora_A, lora_B, *, scaling=1.0, bias=None, dropout_p=0.0):
    check_quantized("w", w)
    _check_explained(x, "w", w, bias)
    if lora_A is not None or lora_B is not None:
        check_factors(*w.shape, x.device, lora_A, lora_B)
    dy = x.new_empty(()).expand(*x.shape[:-1], w.shape[0])
    lora = (w.tensors, w.layout, lora_A, lora_B)
    return {
        "nf4_lora_linear_forward": (x, *lora, bias, 1.0, None, dropout_p),
        "nf4_lora_linear_backward": (dy, x, None, *lora, 1.0, None, dropout_p, (True,) * 4),
    }


def _explain_nf4_linear(x, w, bias=None):
    return _explain_nf4_lora_linear(x, w, None, None, bias=bias)


def _explain_quantize_nf4(weight, *, blocksize=64, double_quant=True):
    check_dense("weight", weight)
    calls = {"nf4_quantize": (weight, blocksize)}
    if double_quant:  # its absmax lies where the weight lies
        absmax = weight.new_empty(0, dtype=torch.float32)
        calls["nf4_quantize_absmax"] = (absmax, absmax, absmax, NESTED_BLOCKSIZE)
    return calls


def _explain_dequantize(w, dtype=None, out=None):
    check_quantized("w", w)
    if out is not None:
        check_tensor("out", out)
        return {"nf4_dequantize_out": (w.tensors, w.layout, out)}
    return {"nf4_dequantize": (w.tensors, w.layout, w.dtype if dtype is None else dtype)}


def _explain_dora_linear(x, weight, lora_A, lora_B, magnitude, *, scaling, **options):
    options.pop("recompute", None)  # forms a product of the forward pass again
    if isinstance(weight, QuantizedWeight):
        norm = (weight.tensors, weight.layout, weight.dtype, lora_A, lora_B, 1.0)
        layer = _explain_nf4_lora_linear(x, weight, lora_A, lora_B, scaling=scaling, **options)
        return {"nf4_dora_norm": norm, **layer}
    layer = _explain_lora_linear(x, weight, lora_A, lora_B, scaling=scaling, **options)
    return {"dora_norm": (weight, lora_A, lora_B, 1.0), **layer}


_EXPLAINED = {
    "dora_linear": _explain_dora_linear,
    "lora_linear": _explain_lora_linear,
    "nf4_linear": _explain_nf4_linear,
    "nf4_lora_linear": _explain_nf4_lora_linear,
    "quantize_nf4": _explain_quantize_nf4,
    "dequantize": _explain_dequantize,
    "dequantize_nf4": _explain_dequantize,
}
