"""Stacks of expert weights in 4 bits that other code takes for a dense tensor.

The parameter of a module of fused experts (`gate_up_proj` [E, N, K]) becomes an `ExpertStack` of
the same shape and dtype. What reads it reads dense values: one expert of `stack[e]`, the gathered
ones of `stack[ids]`, all of them of anything else; kernels take `expert_weight(stack)`, where
nothing is dense.

Its module's state dict holds plain tensors: see `kernels/FORMATS.md`.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only

from peftkern.formats.block_weight import QuantizedWeight
from peftkern.formats.nf4 import ArgumentError
from peftkern.functional import dequantize
from peftkern.functional.arguments import WEIGHT_DTYPES, integer
from peftkern.layers.state_keys import KeyLookup, any_key

__all__ = ["ExpertStack"]
aten = torch.ops.aten
WHOLE_EXPERTS = (
    "leave experts whole on every device by ignored_states, with decoder layers as units"
)
_LOST = "subtracting does not bring back what was there before (a patched model keeps that): "


class ExpertStack(Tensor):
    """Frozen weights [E, N, K] in 4 bits, whose blocks do not cross experts.

    Args:
        packed: uint8 [E, N * K / 2], the codes of each expert.
        scale: [E, blocks of an expert], as the format stores them.
        shape: (E, N, K) as others see it.
        dtype: that others take the values for. A cast changes it alone: the bytes stay.
        turned: whether each expert's matrix is stored as [K, N].

    `add_`, `sub_` and `copy_`, by which adapters are merged and checkpoints loaded, quantize the
    experts that change again, one at a time, and warn of the error. Anything else that would write
    raises.
    Raises: ValueError naming the argument that does not fit.
    """

    PARTS: ClassVar[tuple[str, str]]  # attributes of the two tensors
    FORMAT: ClassVar[str]  # as a user is told
    turned: bool = False  # of one that was pickled before there were others, too

    @staticmethod
    def __new__(
        cls,
        packed: Tensor,
        scale: Tensor | None = None,
        shape: tuple[int, ...] = (),
        dtype: torch.dtype | None = None,
        turned: bool = False,
        *,
        requires_grad: bool = False,
    ) -> ExpertStack:
        if isinstance(packed, ExpertStack):  # as accelerate makes a parameter of what it has moved
            shape, dtype, turned = tuple(packed.shape), packed.dtype, packed.turned
            packed, scale = packed.parts
        if scale is None or dtype is None or requires_grad:
            raise TypeError(
                f"{cls.__name__}: expected {', '.join(name[1:] for name in cls.PARTS)}, shape and "
                f"dtype, or another stack, and no requires_grad; experts in {cls.FORMAT} cannot be "
                "offloaded part by part"
            )
        cls._check(packed, scale, shape, turned)
        options = {"dtype": dtype, "device": packed.device, "requires_grad": False}
        return Tensor._make_wrapper_subclass(cls, shape, **options)

    def __init__(
        self,
        packed: Tensor,
        scale: Tensor | None = None,
        shape: tuple[int, ...] = (),
        dtype: torch.dtype | None = None,
        turned: bool = False,
        **_: Any,
    ) -> None:
        if isinstance(packed, ExpertStack):
            turned, (packed, scale) = packed.turned, packed.parts
        self.turned = turned
        for name, part in zip(self.PARTS, (packed, scale), strict=True):
            setattr(self, name, part)

    @classmethod
    def _of_dense(cls, weight: Tensor, **how: Any) -> ExpertStack:
        """Quantize dense weights [E, N, K], an expert at a time; how: options of `empty`."""
        if weight.dtype not in WEIGHT_DTYPES:
            raise ArgumentError(f"weight: expected one of {WEIGHT_DTYPES}, got {weight.dtype}")
        stack = cls.empty(tuple(weight.shape), dtype=weight.dtype, device=weight.device, **how)
        for expert in range(len(stack)):
            stack.set_expert(expert, weight.detach()[expert])
        return stack

    @classmethod
    def _check(cls, packed: Tensor, scale: Tensor, shape: tuple[int, ...], turned: bool) -> None:
        """Check the parts against the shape. Raises: ArgumentError."""
        raise NotImplementedError

    @staticmethod
    def weight_of(
        stack: ExpertStack, packed: Tensor, scale: Tensor, shape: tuple[int, ...]
    ) -> QuantizedWeight:
        """Return the parts of some experts, of this shape as it is stored, as kernels take them.

        Static, for in a graph a tensor's method is an operation.
        """
        raise NotImplementedError

    def _quantized(self, weight: Tensor) -> QuantizedWeight:
        """Quantize the matrix of one expert as it is stored."""
        raise NotImplementedError

    def state(self, name: str) -> dict[str, Tensor]:
        """Return the entries of a state dict for a parameter of this name."""
        raise NotImplementedError

    def read(self, state: dict[str, Tensor], name: str) -> ExpertStack | None:
        """Take a parameter's entries out of a state dict; None if it has none.

        Raises: ValueError if they are no such stack.
        """
        raise NotImplementedError

    @property
    def parts(self) -> tuple[Tensor, Tensor]:
        """The tensors that it consists of: codes, then the scales of their blocks."""
        packed, scale = self.PARTS
        return getattr(self, packed), getattr(self, scale)

    @property
    def blocksize(self) -> int:
        packed, scale = self.parts
        return 2 * packed.shape[1] // max(scale.shape[1], 1)

    @property
    def data(self) -> Tensor:
        return Tensor.data.__get__(self)

    @data.setter
    def data(self, value: Tensor) -> None:
        if type(value) is not type(self):
            raise TypeError(
                f"data: expected an {type(self).__name__}, got {type(value).__name__}; "
                f"FullyShardedDataParallel shards no {self.FORMAT}: {WHOLE_EXPERTS}"
            )
        Tensor.data.__set__(self, value)
        self.turned = value.turned
        for name, part in zip(self.PARTS, value.parts, strict=True):
            setattr(self, name, part)

    def like(self, packed: Tensor, scale: Tensor, dtype: torch.dtype | None = None) -> ExpertStack:
        """Make a stack of the same shape of other parts."""
        return type(self)(packed, scale, tuple(self.shape), dtype or self.dtype, self.turned)

    def dequantize(self, expert: int | None = None) -> Tensor:
        """Return the dense weights [E, N, K], or those of one expert, [N, K]."""
        packed, scale = self.parts
        if expert is None:
            return self.decoded(packed, scale)
        expert = self._place(expert)
        return self.decoded(packed[expert], scale[expert])

    def _place(self, expert: Any) -> int:
        """Return which expert is meant: True, None or a slice would be all of them."""
        return integer("expert", expert, -len(self), len(self) - 1)

    def decoded(self, packed: Tensor, scale: Tensor) -> Tensor:
        """Return dense values of any number of experts: parts [..., n] give [..., N, K]."""
        matrix = self.shape[:0:-1] if self.turned else self.shape[1:]
        sizes = _sizes((*packed.shape[:-1], *matrix))
        dense = dequantize(self.weight_of(self, packed, scale, sizes), self.dtype)
        return dense.transpose(-1, -2) if self.turned else dense

    def expert(self, expert: int) -> QuantizedWeight:
        """Return one expert's matrix as it is stored; it shares its memory with the stack."""
        packed, scale = self.parts
        expert = self._place(expert)
        matrix = self.shape[:0:-1] if self.turned else self.shape[1:]
        return self.weight_of(self, packed[expert], scale[expert], _sizes(matrix))

    @torch.no_grad()
    def put_expert(self, expert: int, w: QuantizedWeight) -> None:
        """Copy a matrix as it is stored, in this format, into the place of one expert's."""
        expert = self._place(expert)
        for part, new in zip(self.parts, w.tensors, strict=True):
            part[expert].copy_(new)

    @torch.no_grad()
    def set_expert(self, expert: int, weight: Tensor) -> None:
        """Quantize one expert's weight [N, K] into its place."""
        if weight.shape != self.shape[1:]:
            raise ArgumentError(f"weight: expected {self.shape[1:]}, got {tuple(weight.shape)}")
        made = self._quantized(weight.t().contiguous() if self.turned else weight)
        self.put_expert(expert, made)

    def share_memory_(self) -> ExpertStack:
        """Move both parts to memory that processes share, as of a tensor with a storage."""
        for part in self.parts:
            part.share_memory_()
        return self

    def is_shared(self) -> bool:
        return all(part.is_shared() for part in self.parts)

    def __repr__(self, **kwargs: Any) -> str:
        return (
            f"{type(self).__name__}(shape={tuple(self.shape)}, blocksize={self.blocksize}, "
            f"dtype={self.dtype}, device='{self.device}')"
        )

    def __tensor_flatten__(self) -> tuple[list[str], tuple]:
        return list(self.PARTS), (self.dtype, self.turned)

    @classmethod
    def __tensor_unflatten__(
        cls, parts: Mapping[str, Tensor], context: tuple, size: Any, stride: Any
    ) -> ExpertStack:
        return cls(*(parts[name] for name in cls.PARTS), tuple(size), *context)

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


def expert_weight(parameter: Tensor) -> Tensor | QuantizedWeight:
    """Return a parameter of fused experts as kernels take it; see `is_transposed`.

    From its parts: what a graph reads of a subclass by property is another object at each call.
    """
    if not isinstance(parameter, ExpertStack):
        return parameter
    kind = type(parameter)
    packed, scale = kind.PARTS
    E, *matrix = parameter.shape
    shape = _sizes((E, *(matrix[::-1] if parameter.turned else matrix)))
    return kind.weight_of(parameter, getattr(parameter, packed), getattr(parameter, scale), shape)


def _sizes(shape: Iterable[int]) -> tuple[int, ...]:
    """Return sizes as numbers, of which there is a graph each: kernels take no symbols."""
    return tuple(map(int, shape))


def is_transposed(experts: nn.Module, *names: str) -> bool:
    """Return whether kernels are to take the weights of fused experts as [E, in, out].

    Raises: ArgumentError if one of them is stored so and the other is not.
    """
    turned = {getattr(experts._parameters[name], "turned", False) for name in names}
    if len(turned) != 1:
        raise ArgumentError("experts: expected weights that are all stored [E, N, K], or [E, K, N]")
    return bool(experts.is_transposed) != turned.pop()


def float_dtype(stack: ExpertStack) -> torch.dtype:
    """Return the dtype of a stack's values, or float32 where kernels have no such weights."""
    return stack.dtype if stack.dtype in WEIGHT_DTYPES else torch.float32


def _on_dense(function: Any, *args: Any, **kwargs: Any) -> Any:
    """Call a function that reads stacks on their dense values; refuse one that writes to them."""
    schema = function._schema
    for position, argument in enumerate(schema.arguments):
        value = args[position] if position < len(args) else kwargs.get(argument.name)
        writes = argument.alias_info is not None and argument.alias_info.is_write
        stacks = [leaf for leaf in tree_leaves(value) if isinstance(leaf, ExpertStack)]
        if writes and stacks:
            raise NotImplementedError(
                f"{schema.name}: expected a dense tensor to write to, got weights kept in "
                f"{stacks[0].FORMAT}"
            )
    args, kwargs = tree_map_only(ExpertStack, ExpertStack.dequantize, (args, kwargs))
    return function(*args, **kwargs)


def _on_parts(
    function: Any, stack: ExpertStack, *args: Any, dtype: Any = None, **kwargs: Any
) -> Any:
    """Copy, move, share or cast a stack; a cast to another float type keeps the bytes."""
    if dtype is not None and not dtype.is_floating_point:
        return function(stack.dequantize(), *args, dtype=dtype, **kwargs)
    return stack.like(*(function(part, *args, **kwargs) for part in stack.parts), dtype)


def _select(function: Any, stack: ExpertStack, dim: int = 0, *args: Any) -> Tensor:
    """Take experts along the first dimension: they alone are decoded."""
    if dim % 3:
        return function(stack.dequantize(), dim, *args)
    return stack.decoded(*(function(part, 0, *args) for part in stack.parts))


def _index(function: Any, stack: ExpertStack, indices: list) -> Tensor:
    """Gather experts by ids of any shape: they alone are decoded."""
    by_id = isinstance(stack, ExpertStack) and len(indices) == 1
    if not by_id or indices[0].dtype not in (torch.int32, torch.int64):
        return _on_dense(function, stack, indices)
    return stack.decoded(*(function(part, indices) for part in stack.parts))


def _set(function: Any, stack: Tensor, source: Tensor) -> Tensor:
    """Let a stack take its own memory, as registering a parametrization does."""
    return stack if stack is source else _on_dense(function, stack, source)


def _copy(function: Any, target: Tensor, source: Tensor, non_blocking: bool = False) -> Tensor:
    if not isinstance(target, ExpertStack):
        return _on_dense(function, target, source, non_blocking)
    same = type(source) is type(target) and source.shape == target.shape
    if same and (source.blocksize, source.turned) == (target.blocksize, target.turned):
        for ours, theirs in zip(target.parts, source.parts, strict=True):
            function(ours, theirs, non_blocking)
        return target
    return _requantize(target, source, function)


def _add(function: Any, stack: Tensor, other: Tensor, *, alpha: float = 1) -> Tensor:
    """Add to a stack, or subtract from it, as merging and unmerging an adapter do."""
    if not (isinstance(stack, ExpertStack) and isinstance(other, Tensor)):
        return _on_dense(function, stack, other, alpha=alpha)
    said = _LOST if function is aten.sub_.Tensor else ""
    return _requantize(stack, other, lambda w, new: function(w, new, alpha=alpha), said)


def _requantize(stack: ExpertStack, other: Tensor, write: Callable, said: str = "") -> ExpertStack:
    """Write to dense experts, quantize again those that change, and warn of the error.

    One that is given the values that it reads as keeps its bytes: DDP copies a model onto itself.
    Raises: ValueError, before anything is written, if `other` is not finite or does not fit.
    """
    other = other.expand(stack.shape)
    if not all(torch.isfinite(other[expert]).all() for expert in range(len(stack))):
        raise ValueError(
            f"{stack.FORMAT} has no infinity and no NaN: expected finite values to be stored"
        )
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
            f"{said}{changed} of {len(stack)} experts were quantized to {stack.FORMAT} again: what "
            f"was added has norm {math.sqrt(moved):.3g}, the rounding error has "
            f"{math.sqrt(error):.3g}",
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


def set_stack(module: nn.Module, name: str, stack: ExpertStack) -> None:
    """Put a stack in the place of a module's parameter, and let its state dict say what it is."""
    module._parameters[name] = nn.Parameter(stack, requires_grad=False)
    if _write_parts not in module._state_dict_hooks.values():
        module.register_state_dict_post_hook(_write_parts)
        module.register_load_state_dict_pre_hook(_read_parts)
    module.__dict__.setdefault("_any_key", any_key)
    lookup = module.__dict__.setdefault("_fqn_modifiers", KeyLookup())
    lookup.parts |= stack.state(name).keys() - {name}


def stacks_of(module: nn.Module) -> dict[str, ExpertStack]:
    """Return the module's own parameters that are stacks."""
    return {name: p for name, p in module._parameters.items() if isinstance(p, ExpertStack)}


def dense_now(module: nn.Module) -> list[str]:
    """Return the module's own parameters that were stacks and are dense: FSDP2's shards are."""
    if _write_parts not in module._state_dict_hooks.values():
        return []
    named = module._parameters.items()
    return [
        n for n, p in named if p is not None and p.dim() == 3 and not isinstance(p, ExpertStack)
    ]


def _write_parts(module: nn.Module, state: dict, prefix: str, local_metadata: dict) -> None:
    """Write each stack as plain tensors, in place of one that only torch.save would take."""
    for name in stacks_of(module):
        if isinstance(state.get(f"{prefix}{name}"), ExpertStack):
            state |= state.pop(f"{prefix}{name}").state(f"{prefix}{name}")


def _read_parts(module: nn.Module, state: dict, prefix: str, *rest: Any) -> None:
    """Make stacks of what a checkpoint has for them; nn.Module then copies or assigns these."""
    errors = rest[-1]
    for name, old in stacks_of(module).items():
        try:
            new = old.read(state, f"{prefix}{name}")
        except ValueError as error:
            errors.append(f"{prefix}{name}: {error}")
            new = old
        if new is None:
            continue
        state[f"{prefix}{name}"] = new
        if new.blocksize != old.blocksize:
            parts = (torch.empty_like(part, device=old.device) for part in new.parts)
            set_stack(module, name, old.like(*parts))
