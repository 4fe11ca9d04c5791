"""PEFT's LoRA over weights that transformers splits among processes: tensor parallelism.

transformers keeps such a weight as a DTensor and wraps the forward of its layer; PEFT does the same
to the factor that is split with it. Process p has of them

    colwise   W_p [N/P, K], lora_A [r, K], lora_B_p [N/P, r]
              y_p = x W_p^T + s (x lora_A^T) lora_B_p^T
    rowwise   W_p [N, K/P], lora_A_p [r, K/P], lora_B [N, r]
              y = sum_p x_p W_p^T + s (x_p lora_A_p^T) lora_B^T

Either is the op of a whole layer on what is here. colwise the gradients of x and lora_A are summed
over the processes, rowwise y and the gradient of lora_B (PEFT sums base and update one by one).

All processes must choose alike, since PEFT's forward meets the others at other points: whether this
module serves depends on the layer's state alone, never on what was measured. Where torch's own
operations are faster, or nothing was tried yet, they compute the part between the same sums.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from peftkern.backends import dispatch
from peftkern.formats.nf4 import ArgumentError
from peftkern.functional import lora_linear
from peftkern.functional.arguments import WEIGHT_DTYPES, autocast_dtype
from peftkern.integrations.peft import trial, written_inputs
from peftkern.integrations.peft.fallback import (
    GLOBAL_HOOKS,
    Fallback,
    PatchedForward,
    active_names,
    hooked,
    refused,
    unusual_call,
    unusual_dropout,
    unusual_tensor,
)

PLAN = "_hf_tp_plan"  # attribute of base layers, by PEFT or transformers
_WRAPPER = "TensorParallelLayer.install_forward.<locals>.tp_forward"
_CELLS = ("self", "mesh", "original_forward")  # of it
_STYLES = {"ColwiseParallel": "colwise", "RowwiseParallel": "rowwise"}


class Split(NamedTuple):
    """How a layer is split, among which processes; names of its active adapters."""

    colwise: bool
    group: dist.ProcessGroup
    names: list[str]


def split_of(layer: Any) -> Split | Fallback | None:
    """Read how a layer is split, or the reason against serving it; None if transformers did not."""
    base = layer._modules["base_layer"]
    style = _style_of(base)
    if style is None:
        return None
    kind, group = style
    names = active_names(layer)
    if layer.disable_adapters or layer.merged_adapters or not names:
        return Fallback("tensor parallel: adapters are disabled or merged, or none is active")
    reasons = (_unusual_adapter(layer, name, style) for name in names)
    reason = next(filter(None, reasons), None)
    if reason is None and any(GLOBAL_HOOKS):
        reason = "global module hooks"
    return Split(kind == "colwise", group, names) if reason is None else Fallback(reason)


def _unusual_adapter(layer: Any, name: str, style: tuple[str, dist.ProcessGroup]) -> str | None:
    """Return the reason against serving an adapter of a layer that is split in this style."""
    if name in layer.lora_variant or layer.lora_bias.get(name):
        return "tensor parallel: more than plain LoRA"
    A, B = (layer._modules[key]._modules[name] for key in ("lora_A", "lora_B"))
    role, (part, all_of) = ("lora_A", (B, A)) if style[0] == "colwise" else ("lora_B", (A, B))
    if _style_of(part) != style or type(all_of) is not nn.Linear:
        return "tensor parallel: lora_A or lora_B is not split as the base is"
    drop = layer._modules["lora_dropout"]._modules[name]
    reason = unusual_dropout(drop) or unusual_tensor(**{role: all_of.weight})
    device = layer._modules["base_layer"].weight.device
    return reason or hooked(device, lora_dropout=drop, **{role: all_of})


def _style_of(module: nn.Module) -> tuple[str, dist.ProcessGroup] | None:
    """Return "colwise" or "rowwise" and the processes, if transformers wrapped a linear layer so.

    Only with plain tensors in and out, and nothing but the class's own forward inside.
    """
    wrapper = module.__dict__.get("forward")
    if type(module) is not nn.Linear or getattr(wrapper, "__qualname__", None) != _WRAPPER:
        return None
    cells = dict(zip(wrapper.__code__.co_freevars, wrapper.__closure__ or (), strict=True))
    if not cells.keys() >= set(_CELLS):
        return None
    style, mesh, inner = (cells[key].cell_contents for key in _CELLS)
    kind = _STYLES.get(type(style).__name__)
    if kind is None or not style.use_local_output or mesh.ndim != 1:
        return None
    whole, split = (style.input_layouts, style.output_layouts)[:: 1 if kind == "colwise" else -1]
    plain = getattr(inner, "__func__", None) is nn.Linear.forward and inner.__self__ is module
    if not (whole.is_replicate() and split.is_shard(-1) and plain) or _hooks(module):
        return None
    return kind, mesh.get_group()


def _hooks(module: nn.Module) -> bool:
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
    )


def answer(layer: Any, x: Tensor) -> Tensor | Fallback | None:
    """Compute a split layer, or give the reason for PEFT's forward; None if it is not split."""
    compiling = torch.compiler.is_compiling()
    split = split_of(layer)
    if not isinstance(split, Split):
        return split
    base = layer._modules["base_layer"]
    reason = unusual_call(x, compiling)
    if reason is None and compiling:
        reason = "tensor parallel: compiled"
    dtype, cast = base.weight.dtype, autocast_dtype(x)
    if reason is None and (
        dtype not in WEIGHT_DTYPES or not (x.dtype is dtype or cast is not None)
    ):
        reason = f"input is {x.dtype}, base weight is {dtype}"
    if reason is None and base.weight.requires_grad:
        reason = "base weight is trained"
    if reason is not None:
        return Fallback(reason)
    try:
        return _computed(layer, x, split, cast)
    except ArgumentError as error:  # before anything was computed
        return refused(error)


def _computed(layer: Any, x: Tensor, split: Split, cast: torch.dtype | None) -> Tensor | Fallback:
    base = layer._modules["base_layer"]
    drops = [layer._modules["lora_dropout"]._modules[name] for name in split.names]
    p = max(drop.p if drop.training and type(drop) is nn.Dropout else 0.0 for drop in drops)
    if p and len(drops) > 1:
        return Fallback("tensor parallel: dropout of several adapters")
    weight, bias = base.weight.to_local(), base.bias
    if bias is not None:
        bias = bias.to_local()
    found = _factors(layer, split)
    if isinstance(found, Fallback):
        return found
    A, B, scaling = found
    if split.colwise:
        x, A = _SummedGradient.apply(x, split.group), _SummedGradient.apply(A, split.group)
    else:
        B = _SummedGradient.apply(B, split.group)
    part = (x, weight, bias if split.colwise else None, A, B, scaling, p)
    y = _own_part(layer, part, cast)
    if split.colwise:
        return y
    y = _Sum.apply(y, split.group)
    return y if bias is None else y + bias.to(y.dtype)


def _factors(layer: Any, split: Split) -> tuple[Tensor, Tensor, float] | Fallback:
    """Return what is here of lora_A and lora_B, and scaling; of several adapters as of one."""
    named = layer._modules["lora_A"]._modules, layer._modules["lora_B"]._modules
    pairs = [[modules[name].weight for modules in named] for name in split.names]
    for A, B in pairs:
        if A.dtype not in WEIGHT_DTYPES or not A.dtype is B.dtype is pairs[0][0].dtype:
            return Fallback(f"lora_A is {A.dtype}, lora_B is {B.dtype}")
    here = [(A, B.to_local()) if split.colwise else (A.to_local(), B) for A, B in pairs]
    scalings = [layer.scaling[name] for name in split.names]
    if len(here) == 1:
        return *here[0], scalings[0]
    B = [B * scaling for (_, B), scaling in zip(here, scalings, strict=True)]
    return torch.cat([A for A, _ in here]), torch.cat(B, dim=1), 1.0


def _own_part(layer: Any, part: tuple, cast: torch.dtype | None) -> Tensor:
    """Compute what is here by our op, or by torch's where those are faster."""
    x, weight, _, A, B, _, p = part
    N, K = weight.shape
    dtypes = (x.dtype, weight.dtype, A.dtype, cast, A.requires_grad or B.requires_grad)
    key = ("lora_linear", "LoRA in tensor parallel", N, K, A.shape[0], *dtypes)
    reason = trial.settled(lambda: _Part(*part[1:], layer.training), x, key)
    if reason is None:
        if A.requires_grad and written_inputs.only_ours_saves(x, A, p, cast):
            return written_inputs.answered(layer, x, lambda x: _fused(x, *part[1:]))
        return _fused(*part)
    dispatch.record_fallback("lora_linear", reason)
    return _plain(*part)


def _fused(
    x: Tensor, weight: Tensor, bias: Tensor | None, A: Tensor, B: Tensor, scaling: float, p: float
) -> Tensor:
    return lora_linear(x, weight, A, B, scaling=scaling, bias=bias, dropout_p=p)


def _plain(
    x: Tensor, weight: Tensor, bias: Tensor | None, A: Tensor, B: Tensor, scaling: float, p: float
) -> Tensor:
    """Compute a part as PEFT computes a layer."""
    y = F.linear(x, weight, bias)
    x = F.dropout(x if torch.is_autocast_enabled(x.device.type) else x.to(A.dtype), p)
    return (y + F.linear(F.linear(x, A), B) * scaling).to(y.dtype)


class _Part(PatchedForward, nn.Module):
    """What a process has of a layer as a layer of its own, on which both sides are tried."""

    op = "lora_linear"

    def __init__(
        self,
        weight: Tensor,
        bias: Tensor | None,
        A: Tensor,
        B: Tensor,
        scaling: float,
        p: float,
        training: bool,
    ) -> None:
        super().__init__()
        self.lora_A = nn.Parameter(A.detach().clone(), A.requires_grad)
        self.lora_B = nn.Parameter(B.detach().clone(), B.requires_grad)
        self._frozen, self._options = (weight, bias), (scaling, p)
        self.train(training)

    def _fused(self, x: Tensor, args: tuple, kwargs: dict) -> Tensor:
        return _fused(x, *self._frozen, self.lora_A, self.lora_B, *self._options)

    def peer_forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return _plain(x, *self._frozen, self.lora_A, self.lora_B, *self._options)


class _SummedGradient(torch.autograd.Function):
    """Tensor that is the same in all processes, whose gradient is the sum of theirs."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        grad = grad.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(grad, group=ctx.group)
        return grad, None


class _Sum(torch.autograd.Function):
    """Sum of a tensor over processes; each of them has its gradient whole."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, group: dist.ProcessGroup) -> Tensor:
        total = tensor.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total, group=group)
        return total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None
