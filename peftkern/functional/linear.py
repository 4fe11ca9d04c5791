"""The public functions: low-rank updated linear layers with gradients, and the NF4 codec.

Each checks its arguments, casts as autocast asks, draws dropout's mask from torch's generator and
calls an op; a thin autograd function owns the backward formula and saves only what it reads.
"""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from torch import Tensor

from peftkern.backends import dispatch, ops, reference
from peftkern.backends.device import autocast_enabled
from peftkern.formats.nf4 import BLOCKSIZES, NESTED_BLOCKSIZE, NF4Weight, dynamic_map
from peftkern.functional.arguments import (
    DTYPES,
    WEIGHT_DTYPES,
    check_dense,
    check_factors,
    check_float,
    check_frozen,
    check_linear,
    check_nf4,
    check_tensor,
    mismatch,
    number,
)
from peftkern.functional.autograd import differentiable_gradients, save_for_backward, saved_tensors


def lora_linear(
    x: Tensor,
    weight: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    *,
    scaling: float | Tensor,
    bias: Tensor | None = None,
    dropout_p: float = 0.0,
) -> Tensor:
    """Linear layer plus low-rank update.

    y = x @ weight.T + scaling * (dropout(x) @ lora_A.T) @ lora_B.T + bias

    Args: x [..., K] float16|bfloat16|float32|float64; weight [N, K], dtype of x, frozen; lora_A
        [r, K] and lora_B [N, r], any float dtype (PEFT keeps them in float32); scaling, a number
        or a 0-dim tensor (read on its device, never on the host); bias [N], dtype of x; dropout_p
        in [0, 1], drawn from torch's generator: on a CPU exactly as nn.Dropout draws it, elsewhere
        as a seed. Under autocast all of them are cast to its dtype, as F.linear does.
    Returns: [..., N], dtype of x; the update accumulates in float32 (float64 for float64).
    Raises: ValueError naming both sides on a shape, dtype or device mismatch, and if weight
        requires a gradient.
    Gradients: x, lora_A, lora_B, bias, a tensor scaling; twice differentiable unless
        lora_A is frozen. x is saved only if lora_A requires a gradient.
        Error bound: kernels/NUMERICS.md#lora_linear
    Source: Hu et al. 2021, eq. 3, arXiv:2106.09685
    """
    check_float("x", x)
    check_frozen(weight)
    x, weight, lora_A, lora_B, bias = _autocast(x, weight, lora_A, lora_B, bias)
    if weight.dim() != 2 or weight.dtype is not x.dtype or weight.device != x.device:
        raise mismatch("weight", f"[N, K] {x.dtype} on {x.device} like x", weight)
    check_linear(x, *weight.shape, bias, dropout_p)
    check_factors(*weight.shape, x.device, lora_A, lora_B)
    lora_B, scaling = _fold_scaling(lora_B, scaling, x)
    keep = _draw_keep(x, dropout_p)
    needs = _needs(x, lora_A, lora_B, bias)
    if needs is None:
        return ops.lora_linear_forward(x, weight, lora_A, lora_B, bias, scaling, keep, dropout_p)[0]
    return _LoRALinear.apply(x, weight, lora_A, lora_B, bias, scaling, keep, dropout_p, needs)


def nf4_linear(x: Tensor, w: NF4Weight, bias: Tensor | None = None) -> Tensor:
    """Linear layer over an NF4 weight that is never made dense.

    y = x @ dequantize(w).T + bias

    Args: x [..., K] float16|bfloat16|float32|float64; w of shape (N, K), frozen; bias [N], any
        float dtype, cast to that of x. Under autocast x and bias are cast to its dtype.
    Returns: [..., N], dtype of x; each weight is rounded to the dtype of x at most once and
        products accumulate in float32.
    Raises: ValueError naming both sides on a shape, dtype or device mismatch.
    Gradients: x, bias; twice differentiable.   Error bound: kernels/NUMERICS.md#nf4_lora_linear
    Source: Dettmers et al. 2023, arXiv:2305.14314
    """
    return _nf4_lora_linear(x, w, None, None, 1.0, bias, 0.0)


def nf4_lora_linear(
    x: Tensor,
    w: NF4Weight,
    lora_A: Tensor,
    lora_B: Tensor,
    *,
    scaling: float | Tensor,
    bias: Tensor | None = None,
    dropout_p: float = 0.0,
) -> Tensor:
    """Linear layer over an NF4 weight plus low-rank update: QLoRA.

    y = x @ dequantize(w).T + scaling * (dropout(x) @ lora_A.T) @ lora_B.T + bias

    Args: x, scaling, dropout_p, lora_A [r, K] and lora_B [N, r] as in `lora_linear`; w and bias as
        in `nf4_linear`.
    Returns: [..., N], dtype of x.
    Raises: ValueError naming both sides on a shape, dtype or device mismatch.
    Gradients: x, lora_A, lora_B, bias, a tensor scaling; twice differentiable unless
        lora_A is frozen. x is saved only if lora_A requires a gradient.
        Error bound: kernels/NUMERICS.md#nf4_lora_linear
    Source: Dettmers et al. 2023, eq. 5, arXiv:2305.14314
    """
    if lora_A is None or lora_B is None:
        raise ValueError("lora_A, lora_B: expected two tensors, got None; see nf4_linear")
    return _nf4_lora_linear(x, w, lora_A, lora_B, scaling, bias, dropout_p)


def quantize_nf4(weight: Tensor, *, blocksize: int = 64, double_quant: bool = True) -> NF4Weight:
    """Quantise a weight to NF4.

    Args: weight, any shape, float16|bfloat16|float32; blocksize 32, 64, ... or 4096; double_quant
        keeps absmax in 8 bits (in blocks of 256) instead of 32.
    Returns: NF4Weight of the same shape, dtype and device.
    Raises: ValueError on another dtype or blocksize.
    Gradients: none.   Source: Dettmers et al. 2023, arXiv:2305.14314
    """
    check_dense("weight", weight)
    check_float("weight", weight, WEIGHT_DTYPES)
    if type(blocksize) is not int or blocksize not in BLOCKSIZES:
        raise mismatch("blocksize", f"one of {BLOCKSIZES}", blocksize)
    packed, absmax = ops.nf4_quantize(weight.detach(), blocksize)
    shape = tuple(weight.shape)
    if not double_quant:
        return NF4Weight(packed, absmax, shape, blocksize, weight.dtype)
    offset = absmax.mean() if absmax.numel() else absmax.new_zeros(())
    code = torch.tensor(dynamic_map(), dtype=torch.float32, device=absmax.device)
    q, nested = ops.nf4_quantize_absmax(absmax, offset, code, NESTED_BLOCKSIZE)
    return NF4Weight(
        packed, q, shape, blocksize, weight.dtype, nested, code, offset, NESTED_BLOCKSIZE
    )


def dequantize_nf4(
    w: NF4Weight, dtype: torch.dtype | None = None, out: Tensor | None = None
) -> Tensor:
    """The dense values of an NF4 weight, bit for bit as bitsandbytes dequantises them.

    value = cast(NF4_CODE[code] * absmax): the product in float32, then one rounding.

    Args: dtype of the result, that of `out` or of the original weight by default; out, a tensor of
        the weight's shape on its device to write to, outside of autograd.
    Returns: a tensor of w.shape, `out` if that is given.
    Raises: ValueError naming both sides on a shape, dtype or device mismatch of `out`.
    Gradients: none.   Source: Dettmers et al. 2023, arXiv:2305.14314
    """
    check_nf4("w", w)
    if dtype is not None and (not isinstance(dtype, torch.dtype) or dtype not in DTYPES):
        raise mismatch("dtype", f"one of {DTYPES}", dtype)
    if out is None:
        return ops.nf4_dequantize(*_pieces(w), w.shape, w.dtype if dtype is None else dtype)
    check_float("out", out)
    wanted = out.dtype if dtype is None else dtype
    if out.shape != w.shape or out.dtype is not wanted or out.device != w.device:
        raise mismatch("out", f"{list(w.shape)} {wanted} on {w.device}", out)
    if out.requires_grad and torch.is_grad_enabled():
        raise ValueError("out: expected a tensor outside of autograd, got one that requires grad")
    ops.nf4_dequantize_out(*_pieces(w), out)
    # Autograd must see that what it may have saved is gone.
    if not torch.compiler.is_compiling() and not out.is_inference():
        torch.autograd.graph.increment_version(out)
    return out


def explain(op_name: str, *args: Any, **kwargs: Any) -> dispatch.Explanation:
    """Which back end would serve a call, and why the others would not; nothing is computed.

    Args: op_name, a function of this module or `dora_linear`, and its arguments, or an op of
        `torch.ops.peftkern` and its positional arguments.
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


class _LoRALinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, lora_A, lora_B, bias, scaling, keep, dropout_p, needs):
        y, S = ops.lora_linear_forward(x, weight, lora_A, lora_B, bias, scaling, keep, dropout_p)
        read = (*_read_in_backward(x, S, keep, needs), lora_A, lora_B)
        save_for_backward(ctx, read, (weight if needs[0] else None,))
        ctx.scaling, ctx.dropout_p, ctx.needs = scaling, dropout_p, needs
        ctx.backend = _forced_backend(x)
        return y

    @staticmethod
    def backward(ctx, dy):
        x, S, keep, lora_A, lora_B, weight = saved_tensors(ctx)
        args = (lora_A, lora_B, ctx.scaling, keep, ctx.dropout_p, ctx.needs)
        if torch.is_grad_enabled():
            grads = differentiable_gradients(dy, x, S, weight, *args)
        else:
            with _backend(ctx.backend):
                grads = ops.lora_linear_backward(dy, x, S, weight, *args)
        dx, dA, dB, dbias = _wanted(grads, ctx.needs)
        return dx, None, dA, dB, dbias, None, None, None, None


class _NF4LoRALinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, packed, absmax, nested_absmax, nested_code, nested_offset, *rest):
        tensors = (packed, absmax, nested_absmax, nested_code, nested_offset)
        *layout, lora_A, lora_B, bias, scaling, keep, dropout_p, needs = rest
        y, S = ops.nf4_lora_linear_forward(
            x, *tensors, *layout, lora_A, lora_B, bias, scaling, keep, dropout_p
        )
        save_for_backward(ctx, (*_read_in_backward(x, S, keep, needs), lora_A, lora_B), tensors)
        ctx.layout, ctx.scaling, ctx.dropout_p, ctx.needs = layout, scaling, dropout_p, needs
        ctx.backend = _forced_backend(x)
        return y

    @staticmethod
    def backward(ctx, dy):
        x, S, keep, lora_A, lora_B, *tensors = saved_tensors(ctx)
        args = (lora_A, lora_B, ctx.scaling, keep, ctx.dropout_p, ctx.needs)
        if torch.is_grad_enabled():
            weight = reference.nf4_dequantize(*tensors, *ctx.layout, dy.dtype)
            grads = differentiable_gradients(dy, x, S, weight, *args)
        else:
            with _backend(ctx.backend):
                grads = ops.nf4_lora_linear_backward(dy, x, S, *tensors, *ctx.layout, *args)
        dx, dA, dB, dbias = _wanted(grads, ctx.needs)
        return dx, *[None] * 8, dA, dB, dbias, None, None, None, None


def _forced_backend(x: Tensor) -> str | None:
    """What `use_backend` forces on a backward pass that torch runs in a thread of its own."""
    return None if x.is_cpu or torch.compiler.is_compiling() else dispatch.forced_backend()


def _backend(name: str | None) -> contextlib.AbstractContextManager:
    return contextlib.nullcontext() if name is None else dispatch.use_backend(name)


def _nf4_lora_linear(
    x: Tensor,
    w: NF4Weight,
    lora_A: Tensor | None,
    lora_B: Tensor | None,
    scaling: float | Tensor,
    bias: Tensor | None,
    dropout_p: float,
) -> Tensor:
    check_float("x", x)
    check_nf4("w", w)
    x, _, lora_A, lora_B, bias = _autocast(x, None, lora_A, lora_B, bias)
    shape = w.shape
    if len(shape) != 2 or w.packed.device != x.device:
        raise ValueError(f"w: expected shape (N, K) on {x.device} like x, got {w}")
    if isinstance(bias, Tensor) and bias.dtype is not x.dtype and bias.is_floating_point():
        bias = bias.to(x.dtype)
    check_linear(x, *shape, bias, dropout_p)
    if lora_B is not None:
        check_factors(*shape, x.device, lora_A, lora_B)
        lora_B, scaling = _fold_scaling(lora_B, scaling, x)
    keep = _draw_keep(x, dropout_p)
    needs = _needs(x, lora_A, lora_B, bias)
    args = (x, *_pieces(w), shape, lora_A, lora_B, bias, scaling, keep, dropout_p)
    if needs is None:
        return ops.nf4_lora_linear_forward(*args)[0]
    return _NF4LoRALinear.apply(*args, needs)


def _pieces(w: NF4Weight) -> tuple[Any, ...]:
    """The arguments by which every op takes an NF4 weight."""
    return (
        w.packed,
        w.absmax,
        w.nested_absmax,
        w.nested_code,
        w.nested_offset,
        w.blocksize,
        w.nested_blocksize,
    )


def _read_in_backward(
    x: Tensor, S: Tensor, keep: Tensor | None, needs: tuple[bool, ...]
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """What backward reads of x (for dA), S (for dB) and keep (for dx and dA)."""
    need_dx, need_dA, need_dB, _ = needs
    return (
        x if need_dA else None,
        S if need_dB else None,
        keep if need_dx or need_dA else None,
    )


def _wanted(grads: tuple[Tensor, ...], needs: tuple[bool, ...]) -> list[Tensor | None]:
    return [grad if need else None for grad, need in zip(grads, needs, strict=True)]


def _needs(
    x: Tensor, lora_A: Tensor | None, lora_B: Tensor | None, bias: Tensor | None
) -> tuple[bool, bool, bool, bool] | None:
    """Which of the four want a gradient; None if there is no backward pass at all."""
    if not torch.is_grad_enabled():
        return None
    needs = (
        x.requires_grad,
        lora_A is not None and lora_A.requires_grad,
        lora_B is not None and lora_B.requires_grad,
        bias is not None and bias.requires_grad,
    )
    return needs if any(needs) else None


def _fold_scaling(lora_B: Tensor, scaling: float | Tensor, x: Tensor) -> tuple[Tensor, float]:
    """A tensor scaling goes into lora_B, so that the host never waits for its value."""
    if not isinstance(scaling, Tensor):
        return lora_B, number("scaling", scaling)
    if scaling.dim() != 0:
        raise mismatch("scaling", "a number or a 0-dim tensor", scaling)
    wide = torch.float64 if x.dtype is torch.float64 else torch.float32
    return lora_B.to(wide) * scaling, 1.0


def _draw_keep(x: Tensor, dropout_p: float) -> Tensor | None:
    """What dropout keeps of x: on a CPU nn.Dropout's own mask, drawn in its order; else a seed.

    The seed is drawn on the device, so the host does not wait, a CUDA graph draws a new one at each
    replay, and checkpointing, which restores the generator, draws the same one again.
    """
    if dropout_p == 0.0:
        return None
    if not x.is_cpu:
        return torch.randint(2**63 - 1, (1,), dtype=torch.int64, device=x.device)
    return torch.empty_like(x, dtype=torch.bool).bernoulli_(1.0 - dropout_p)


def _autocast(x: Tensor, *others: Tensor | None) -> tuple[Tensor | None, ...]:
    """Cast as autocast casts the arguments of F.linear; float64, and what is no tensor, stays."""
    if not autocast_enabled(x.device.type):
        return x, *others
    dtype = torch.get_autocast_dtype(x.device.type)
    return tuple(
        t.to(dtype) if isinstance(t, Tensor) and t.dtype in WEIGHT_DTYPES else t
        for t in (x, *others)
    )


def _check_op_arguments(op: str, args: tuple[Any, ...]) -> None:
    """As many as the schema has, with tensors where it has tensors."""
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


def _check_explained(x: Any, name: str, weight: Tensor | NF4Weight, bias: Any) -> None:
    """What a call checks without dtypes, which autocast may change; `check_factors` follows."""
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
    check_nf4("w", w)
    _check_explained(x, "w", w, bias)
    if lora_A is not None or lora_B is not None:
        check_factors(*w.shape, x.device, lora_A, lora_B)
    dy = x.new_empty(()).expand(*x.shape[:-1], w.shape[0])
    lora = (*_pieces(w), w.shape, lora_A, lora_B)
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


def _explain_dequantize_nf4(w, dtype=None, out=None):
    check_nf4("w", w)
    if out is not None:
        check_tensor("out", out)
        return {"nf4_dequantize_out": (*_pieces(w), out)}
    return {"nf4_dequantize": (*_pieces(w), w.shape, w.dtype if dtype is None else dtype)}


def _explain_dora_linear(x, weight, lora_A, lora_B, magnitude, *, scaling, **options):
    options.pop("recompute", None)  # forms a product of the forward pass again
    if isinstance(weight, NF4Weight):
        norm = (*_pieces(weight), weight.shape, weight.dtype, lora_A, lora_B, 1.0)
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
    "dequantize_nf4": _explain_dequantize_nf4,
}
