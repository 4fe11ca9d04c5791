"""Codes of another library's layer that exist in peftkern's packing alone.

A `Repacked` stands where the library's tensor stood: of its shape and dtype, without memory of its
own. Whatever reads it gets that tensor, made again bit for bit; `copy_` to it packs what comes.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only

from peftkern.formats.int4_layouts import Packing

aten = torch.ops.aten


class Repacked(Tensor):
    """A tensor of codes, made of `packed` when it is read.

    Args: packed, of a `BlockWeight`; packing, how it is made of these; shape and dtype, that it
        had; parameter, whether it stands for one.
    """

    packed: Tensor
    packing: Packing

    @staticmethod
    def __new__(
        cls,
        packed: Tensor,
        packing: Packing,
        shape: tuple[int, ...],
        dtype: torch.dtype,
        parameter: bool,
    ) -> Repacked:
        own = {"dtype": dtype, "device": packed.device, "requires_grad": False}
        self = Tensor._make_wrapper_subclass(cls, shape, **own)
        self.packed, self.packing, self._is_param = packed, packing, parameter
        return self

    def __init__(self, *_: Any) -> None:
        pass

    def original(self) -> Tensor:
        """Make the tensor that this stands for."""
        return self.packing.unpack(self.packed, tuple(self.shape))

    def whole(self) -> Tensor:
        """Make what stood here: a parameter, or a tensor."""
        made = self.original()
        return nn.Parameter(made, requires_grad=False) if self._is_param else made

    def write_(self, source: Tensor) -> None:
        """Take other codes, of the same shape and dtype on the same device."""
        if isinstance(source, Repacked):
            source = source.original()
        given, own = ((t.dtype, t.device, t.shape) for t in (source, self))
        if given != own:
            raise NotImplementedError(
                f"codes that `patch(release=True)` has packed: expected {own[0]} {list(own[2])} on "
                f"{own[1]}, got {given[0]} {list(given[2])} on {given[1]}; `unpatch` first"
            )
        self.packed.copy_(self.packing.pack(source))

    @property
    def data(self) -> Tensor:
        return self.original()

    @data.setter
    def data(self, value: Tensor) -> None:
        self.write_(value)

    def __deepcopy__(self, memo: dict) -> Tensor:
        return memo.setdefault(id(self), self.whole())

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self.whole().__reduce_ex__(protocol)

    def __repr__(self, **_: Any) -> str:
        return f"Repacked(shape={tuple(self.shape)}, dtype={self.dtype}, device='{self.device}')"

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    @torch.compiler.disable
    def __torch_dispatch__(
        cls, function: Any, types: Any, args: tuple = (), kwargs: Mapping | None = None
    ) -> Any:
        if function is aten.copy_.default and isinstance(args[0], Repacked):
            args[0].write_(args[1])
            return args[0]
        kwargs = kwargs or {}
        for position, argument in enumerate(function._schema.arguments):
            value = args[position] if position < len(args) else kwargs.get(argument.name)
            writes = argument.alias_info is not None and argument.alias_info.is_write
            if writes and any(isinstance(leaf, Repacked) for leaf in tree_leaves(value)):
                raise NotImplementedError(
                    f"{function._schema.name}: expected a tensor to write to, got codes that "
                    "`patch(release=True)` has packed; `unpatch` first"
                )
        args, kwargs = tree_map_only(Repacked, Repacked.original, (args, kwargs))
        return function(*args, **kwargs)


def write_originals(module: nn.Module, state: dict, prefix: str, _: dict) -> None:
    """Put originals into a state dict: some layers put their parameters there as they are."""
    for name, value in state.items():
        if isinstance(value, Repacked) and name.startswith(prefix):
            state[name] = value.whole()
