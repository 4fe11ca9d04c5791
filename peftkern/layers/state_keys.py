"""Keys of a state dict that name no attribute, as torch.distributed.checkpoint looks them up.

It resolves every key of a model's state dict part by part, and fails on `weight.absmax` of a 4-bit
layer: a parameter has no absmax, nor has the shard of one. What a module calls `_fqn_modifiers`
maps a part to an attribute of the module in which it looks first; there, every name is found.
"""

from __future__ import annotations

from collections.abc import Iterable

__all__ = ["KeyLookup", "any_key"]


class _AnyKey:
    """Object that has every attribute: itself."""

    def __getattr__(self, name: str) -> _AnyKey:
        if name.startswith(("__", "_fqn")):  # what is asked of modules
            raise AttributeError(name)
        return self


any_key = _AnyKey()


class KeyLookup:
    """`_fqn_modifiers` of a module that has `any_key` as `_any_key`: its own or its class's.

    Args: parts, of keys that begin with one of these the rest is found.
    """

    def __init__(self, parts: Iterable[str] = ()) -> None:
        self.parts = set(parts)

    def __call__(self) -> dict[str, str]:
        return dict.fromkeys(self.parts, "_any_key")
