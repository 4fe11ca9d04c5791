"""Stack of expert weights in NF4 that other code takes for a dense tensor.

The parameter of a module of fused experts (`gate_up_proj` [E, N, K]) becomes an `NF4Stack` of the
same shape and dtype. What reads it reads dense values: one expert of `stack[e]`, the gathered ones
of `stack[ids]`, all of them of anything else; kernels take `stack.nf4`, where nothing is dense.

Its module's state dict holds plain tensors: see `kernels/FORMATS.md`.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only

from peftkern.formats.nf4 import BLOCKSIZES, ArgumentError, NF4Weight
from peftkern.functional import dequantize_nf4
from peftkern.layers.nf4 import quantized

__all__ = ["NF4Stack"]
aten = torch.ops.aten
_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
_PARTS = ("_packed", "_absmax")
_LOST = "subtracting does not bring back what was there before (a patched model keeps that): "


class NF4Stack(Tensor):
    """Frozen weights [E, N, K] in NF4, whose blocks do not cross experts.

    Args:
        packed: uint8 [E, N * K / 2]: an expert's bytes are those of `quantize_nf4` of it alone.
        absmax: float32 [E, N * K / blocksize], never nested.
        shape: (E, N, K), or (E, K, N) where a model keeps its weights so.
        dtype: that others take the values for. A cast changes it alone: the bytes stay.

    `add_`, `sub_` and `copy_`, by which adapters are merged and checkpoints loaded, quantize the
    experts that change again, one at a time, and warn of the error. Anything else that would write
    raises.
    Raises: ValueError naming the argument that does not fit.
    """

    _packed: Tensor
    _absmax: Tensor

    @staticmethod
    def __new__(
        cls,
        packed: Tensor,
        absmax: Tensor | None = None,
        shape: tuple[int, ...] = (),
        dtype: torch.dtype | None = None,
        *,
        requires_grad: bool = False,
    ) -> NF4Stack:
        if isinstance(packed, NF4Stack):  # as accelerate makes a parameter of what it has moved
            absmax, shape, dtype = packed._absmax, tuple(packed.shape), packed.dtype
            packed = packed._packed
        if absmax is None or dtype is None or requires_grad:
            raise TypeError(
                "NF4Stack: expected packed, absmax, shape and dtype, or another stack, and no "
                "requires_grad; experts in NF4 cannot be offloaded part by part"
            )
        _check_parts(packed, absmax, shape)
        options = {"dtype": dtype, "device": packed.device, "requires_grad": False}
        return Tensor._make_wrapper_subclass(cls, shape, **options)

    def __init__(self, packed: Tensor, absmax: Tensor | None = None, *_: Any, **__: Any) -> None:
        if isinstance(packed, NF4Stack):
            packed, absmax = packed._packed, packed._absmax
        self._packed, self._absmax = packed, absmax

    @classmethod
    def empty(
        cls,
        shape: tuple[int, ...],
        *,
        blocksize: int = 64,
        dtype: torch.dtype,
        device: torch.device | str | None = None,
    ) -> NF4Stack:
        """Make a stack without values, for `set_expert`."""
        reason = refusal(shape, blocksize)
        if reason is not None:
            raise ArgumentError(reason)
        experts, numel = shape[0], math.prod(shape[1:])
        with torch.inference_mode(False):  # so that even there it can be trained with
            packed = torch.empty(experts, numel // 2, dtype=torch.uint8, device=device)
            absmax = torch.empty(experts, numel // blocksize, dtype=torch.float32, device=device)
        return cls(packed, absmax, tuple(shape), dtype)

    @classmethod
    def from_dense(cls, weight: Tensor, *, blocksize: int = 64) -> NF4Stack:
        """Quantize float32, float16 or bfloat16 weights [E, N, K], an expert at a time.

        Bit for bit what `quantize_nf4` of each expert gives, and bitsandbytes of the whole.
        """
        if weight.dtype not in _DTYPES:
            raise ArgumentError(f"weight: expected one of {_DTYPES}, got {weight.dtype}")
        options = {"dtype": weight.dtype, "device": weight.device}
        stack = cls.empty(tuple(weight.shape), blocksize=blocksize, **options)
        for expert in range(len(stack)):
            stack.set_expert(expert, weight.detach()[expert])
        return stack

    @property
    def blocksize(self) -> int:
        return 2 * self._packed.shape[1] // max(self._absmax.shape[1], 1)

    @property
    def nf4(self) -> NF4Weight:
        """NF4 weight of shape (E, N, K) as it is now; shares memory with this."""
        return expert_weight(self)

    @property
    def data(self) -> Tensor:
        return Tensor.data.__get__(self)

    @data.setter
    def data(self, value: Tensor) -> None:
        if not isinstance(value, NF4Stack):
            raise TypeError(f"data: expected an NF4Stack, got {type(value).__name__}")
        Tensor.data.__set__(self, value)
        self._packed, self._absmax = value._packed, value._absmax

    def dequantize(self, expert: int | None = None) -> Tensor:
        """Return the dense weights [E, N, K], or those of one expert, [N, K]."""
        if expert is None:
            return dequantize_nf4(self.nf4, self.dtype)
        return self._decoded(self._packed[expert], self._absmax[expert])

    @torch.no_grad()
    def set_expert(self, expert: int, weight: Tensor) -> None:
        """Quantize one expert's weight [N, K] into its place."""
        if weight.shape != self.shape[1:]:
            raise ArgumentError(f"weight: expected {self.shape[1:]}, got {tuple(weight.shape)}")
        w = quantized(weight, blocksize=self.blocksize, double_quant=False)
        self._packed[expert].copy_(w.packed)
        self._absmax[expert].copy_(w.absmax)

    def share_memory_(self) -> NF4Stack:
        """Move both parts to memory that processes share, as of a tensor with a storage."""
        for part in _PARTS:
            getattr(self, part).share_memory_()
        return self

    def is_shared(self) -> bool:
        return all(getattr(self, part).is_shared() for part in _PARTS)

    def _decoded(self, packed: Tensor, absmax: Tensor) -> Tensor:
        """Return dense values of any number of experts: parts [..., n] give [..., N, K]."""
        shape = (*packed.shape[:-1], *self.shape[1:])
        return dequantize_nf4(_weight(self, packed, absmax, shape), self.dtype)

    def __repr__(self, **kwargs: Any) -> str:
        return (
            f"NF4Stack(shape={tuple(self.shape)}, blocksize={self.blocksize}, dtype={self.dtype}, "
            f"device='{self.device}')"
        )

    def __tensor_flatten__(self) -> tuple[list[str], tuple]:
        return list(_PARTS), (self.dtype,)

    @classmethod
    def __tensor_unflatten__(
        cls, parts: Mapping[str, Tensor], context: tuple, size: Any, stride: Any
    ) -> NF4Stack:
        return cls(*(parts[name] for name in _PARTS), tuple(size), context[0])

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    @torch.compiler.disable  # what a graph leaves to Python has no graph of its own in here
    def __torch_dispatch__(
        cls, function: Any, types: Any, args: tuple = (), kwargs: Mapping | None = None
    ) -> Any:
        kwargs = kwargs or {}
        handler = _HANDLERS.get(function)
        if handler is not None:
            return handler(function, *args, **kwargs)
        return _on_dense(function, *args, **kwargs)


def expert_weight(parameter: Tensor) -> Tensor | NF4Weight:
    """Return a parameter of fused experts as kernels take it.

    From its parts: what a graph reads of a subclass by property is another object at each call.
    """
    if not isinstance(parameter, NF4Stack):
        return parameter
    return _weight(parameter, parameter._packed, parameter._absmax, tuple(parameter.shape))


def _weight(stack: NF4Stack, packed: Tensor, absmax: Tensor, shape: tuple[int, ...]) -> NF4Weight:
    dtype = stack.dtype if stack.dtype in _DTYPES else torch.float32
    blocksize = 2 * stack._packed.shape[1] // max(stack._absmax.shape[1], 1)
    sizes = tuple(int(size) for size in shape)  # a graph for each: kernels take no symbols
    return NF4Weight(packed.reshape(-1), absmax.reshape(-1), sizes, int(blocksize), dtype)


def refusal(shape: tuple[int, ...], blocksize: int) -> str | None:
    """Return the reason for which a weight of this shape cannot be an NF4Stack."""
    if len(shape) != 3:
        return f"weight: expected [experts, N, K], got shape {list(shape)}"
    if blocksize not in BLOCKSIZES:
        return f"blocksize: expected one of {BLOCKSIZES}, got {blocksize!r}"
    if math.prod(shape[1:]) % blocksize:
        return (
            f"weight: expected experts of a multiple of {blocksize} values, so that no block is "
            f"shared by two of them, got {shape[1]} x {shape[2]}"
        )
    return None


def _check_parts(packed: Tensor, absmax: Tensor, shape: tuple[int, ...]) -> None:
    values = math.prod(shape[1:])
    fits = len(shape) == 3 and packed.dtype is torch.uint8 and absmax.dtype is torch.float32
    fits = fits and packed.shape == (shape[0], values // 2) and absmax.dim() == 2
    blocks = absmax.shape[-1]
    if not fits or len(absmax) != shape[0] or (blocks and values % blocks) or blocks * 2 > values:
        raise ArgumentError(
            f"shape: {list(shape)} does not fit packed {packed.dtype} {list(packed.shape)} and "
            f"absmax {absmax.dtype} {list(absmax.shape)}"
        )
    reason = refusal(shape, values // blocks) if blocks else None
    if reason is not None:
        raise ArgumentError(reason)


def _on_dense(function: Any, *args: Any, **kwargs: Any) -> Any:
    """Call a function that reads stacks on their dense values; refuse one that writes to them."""
    schema = function._schema
    for position, argument in enumerate(schema.arguments):
        value = args[position] if position < len(args) else kwargs.get(argument.name)
        writes = argument.alias_info is not None and argument.alias_info.is_write
        if writes and any(isinstance(leaf, NF4Stack) for leaf in tree_leaves(value)):
            raise NotImplementedError(
                f"{schema.name}: expected a dense tensor to write to, got weights kept in NF4"
            )
    args, kwargs = tree_map_only(NF4Stack, NF4Stack.dequantize, (args, kwargs))
    return function(*args, **kwargs)


def _on_parts(function: Any, stack: NF4Stack, *args: Any, dtype: Any = None, **kwargs: Any) -> Any:
    """Copy, move, share or cast a stack; a cast to another float type keeps the bytes."""
    if dtype is not None and not dtype.is_floating_point:
        return function(stack.dequantize(), *args, dtype=dtype, **kwargs)
    parts = [function(part, *args, **kwargs) for part in (stack._packed, stack._absmax)]
    return NF4Stack(*parts, tuple(stack.shape), dtype or stack.dtype)


def _select(function: Any, stack: NF4Stack, dim: int = 0, *args: Any) -> Tensor:
    """Take experts along the first dimension: they alone are decoded."""
    if dim % 3:
        return function(stack.dequantize(), dim, *args)
    return stack._decoded(*(function(part, 0, *args) for part in (stack._packed, stack._absmax)))


def _index(function: Any, stack: NF4Stack, indices: list) -> Tensor:
    """Gather experts by ids of any shape: they alone are decoded."""
    by_id = isinstance(stack, NF4Stack) and len(indices) == 1
    if not by_id or indices[0].dtype not in (torch.int32, torch.int64):
        return _on_dense(function, stack, indices)
    return stack._decoded(*(function(part, indices) for part in (stack._packed, stack._absmax)))


def _set(function: Any, stack: Tensor, source: Tensor) -> Tensor:
    """Let a stack take its own memory, as registering a parametrization does."""
    return stack if stack is source else _on_dense(function, stack, source)


def _copy(function: Any, target: Tensor, source: Tensor, non_blocking: bool = False) -> Tensor:
    if not isinstance(target, NF4Stack):
        return _on_dense(function, target, source, non_blocking)
    same = isinstance(source, NF4Stack) and source.shape == target.shape
    if same and source.blocksize == target.blocksize:
        for name in _PARTS:
            function(getattr(target, name), getattr(source, name), non_blocking)
        return target
    return _requantize(target, source, function)


def _add(function: Any, stack: Tensor, other: Tensor, *, alpha: float = 1) -> Tensor:
    """Add to a stack, or subtract from it, as merging and unmerging an adapter do."""
    if not (isinstance(stack, NF4Stack) and isinstance(other, Tensor)):
        return _on_dense(function, stack, other, alpha=alpha)
    said = _LOST if function is aten.sub_.Tensor else ""
    return _requantize(stack, other, lambda w, new: function(w, new, alpha=alpha), said)


def _requantize(stack: NF4Stack, other: Tensor, write: Callable, said: str = "") -> NF4Stack:
    """Write to dense experts, quantize again those that change, and warn of the error.

    One that is given the values that it reads as keeps its bytes: DDP copies a model onto itself.
    Raises: ValueError, before anything is written, if `other` is not finite or does not fit.
    """
    other = other.expand(stack.shape)
    if not all(torch.isfinite(other[expert]).all() for expert in range(len(stack))):
        raise ValueError("NF4 has no infinity and no NaN: expected finite values to be stored")
    changed, moved, error = 0, 0.0, 0.0
    for expert in range(len(stack)):
        before = stack.dequantize(expert).float()
        after = write(before.clone(), other[expert].to(before))
        if torch.equal(before, after):
            continue
        stack.set_expert(expert, after)
        now = stack.dequantize(expert).float()
        changed += 1
        moved += (after - before).double().square().sum().item()
        error += (now - after).double().square().sum().item()
    if changed:
        warnings.warn(
            f"{said}{changed} of {len(stack)} experts were quantized to NF4 again: what was added "
            f"has norm {math.sqrt(moved):.3g}, the rounding error has {math.sqrt(error):.3g}",
            stacklevel=2,
        )
    return stack


_HANDLERS = {
    aten.alias.default: _on_parts,
    aten.clone.default: _on_parts,
    aten.detach.default: _on_parts,
    aten.empty_like.default: _on_parts,
    aten._to_copy.default: _on_parts,
    aten.select.int: _select,
    aten.slice.Tensor: _select,
    aten.index.Tensor: _index,
    aten.set_.source_Tensor: _set,
    aten.copy_.default: _copy,
    aten.add_.Tensor: _add,
    aten.sub_.Tensor: _add,
}


def set_nf4_parameter(module: nn.Module, name: str, stack: NF4Stack) -> None:
    """Put a stack in the place of a module's parameter, and let its state dict say what it is."""
    module._parameters[name] = nn.Parameter(stack, requires_grad=False)
    if _write_parts not in module._state_dict_hooks.values():
        module.register_state_dict_post_hook(_write_parts)
        module.register_load_state_dict_pre_hook(_read_parts)


def absmax_name(name: str) -> str:
    """Return the key of the absmax of a parameter: "gate_up_absmax" of "gate_up_proj".

    That of "weight" is "absmax": transformers takes "weight_absmax" for bitsandbytes' key.
    """
    return "absmax" if name == "weight" else f"{name.removesuffix('_proj')}_absmax"


def stacks_of(module: nn.Module) -> dict[str, NF4Stack]:
    """Return the module's own parameters that are kept in NF4."""
    return {name: p for name, p in module._parameters.items() if isinstance(p, NF4Stack)}


def _write_parts(module: nn.Module, state: dict, prefix: str, local_metadata: dict) -> None:
    """Write each stack as two plain tensors, in place of one that only torch.save would take."""
    for name in stacks_of(module):
        stack = state.get(f"{prefix}{name}")
        if isinstance(stack, NF4Stack):
            state[f"{prefix}{name}"] = stack._packed
            state[f"{prefix}{absmax_name(name)}"] = stack._absmax


def _read_parts(module: nn.Module, state: dict, prefix: str, *rest: Any) -> None:
    """Make stacks of what a checkpoint has for them; nn.Module then copies or assigns these."""
    errors = rest[-1]
    for name, old in stacks_of(module).items():
        if f"{prefix}{name}" not in state:
            continue
        try:
            new = _read_stack(state, prefix, name, old)
        except ValueError as error:
            errors.append(f"{prefix}{name}: {error}")
            new = old
        state[f"{prefix}{name}"] = new
        if new.blocksize != old.blocksize:
            options = {"blocksize": new.blocksize, "dtype": old.dtype, "device": old.device}
            set_nf4_parameter(module, name, NF4Stack.empty(tuple(old.shape), **options))


def _read_stack(state: dict, prefix: str, name: str, old: NF4Stack) -> NF4Stack:
    """Read a stack as this module writes it, as bitsandbytes does, or dense."""
    value = state[f"{prefix}{name}"]
    if isinstance(value, NF4Stack):
        return value
    absmax = state.pop(f"{prefix}{absmax_name(name)}", None)
    if absmax is not None:
        return NF4Stack(value, absmax, tuple(old.shape), old.dtype)
    companions = {k: state.pop(k) for k in list(state) if k.startswith(f"{prefix}{name}.")}
    if companions:
        start = len(prefix) + len(name)
        w = NF4Weight.from_state_dict(
            {"weight": value, **{f"weight{k[start:]}": v for k, v in companions.items()}}
        )
        if w.nested:
            raise ArgumentError("absmax: expected float32, got one that is nested")
        if w.quant_type != "nf4":
            raise ArgumentError(f"quant_type: expected 'nf4', got {w.quant_type!r}")
        parts = (part.view(old.shape[0], -1) for part in w.tensors)
        return NF4Stack(*parts, w.shape, old.dtype)
    return NF4Stack.from_dense(value.to(old.dtype), blocksize=old.blocksize)
