"""`register_layer`: LoRA layers that are not PEFT's own are patched, too."""

from __future__ import annotations

import inspect
import types
from collections.abc import Callable
from typing import Any

from torch import nn

from peftkern.integrations.parts import LoRAParts
from peftkern.integrations.peft import adalora_layers, experts, lora, other_bases
from peftkern.integrations.peft.fallback import PatchedForward
from peftkern.integrations.peft.own_layers import SWAPS, OwnLayer, Remade

__all__ = ["LoRAParts", "register_layer"]

_PEFT = {**lora.SWAPS, **adalora_layers.SWAPS}  # classes of which a subclass may be registered
SWAPS.update({**_PEFT, **experts.SWAPS, **other_bases.SWAPS})
# What PEFT's forward asks of its layer, and ours does not or expects to be PEFT's.
_INHERITED = ("forward", "_check_forward_args", "_cast_input_dtype", "_mixed_batch_forward")
_INHERITED += ("active_adapter", "active_adapters", "disable_adapters", "merged", "get_base_layer")


def register_layer(
    cls: type[nn.Module], read: Callable[[Any], LoRAParts | str] | None = None
) -> None:
    """Let `patch` serve the LoRA layers of a class that is not PEFT's own.

    y = base(x) + bias + scaling * (dropout(x) @ lora_A.T) @ lora_B.T

        peftkern.register_layer(LoRALinear, read=lambda layer: peftkern.LoRAParts(
            layer.weight, layer.lora_a.weight, layer.lora_b.weight,
            scaling=layer.alpha / layer.rank, dropout=layer.dropout, bias=layer.bias))

    Layers of exactly this class are served from the next `patch` on, which holds each against its
    parts: a layer whose forward gives another output, another gradient or another dropout than the
    formula, or whose parts are none, is skipped with the reason. Stats, trust, fallbacks, `unpatch`
    and state dicts are as for PEFT's layers; a pickled layer is one of `cls`, patched where `cls`
    is registered when it is loaded. A class that is registered again gets the new function.

    Args:
        cls: a class of modules whose forward takes x alone.
        read: called with a layer at each of its calls, and in a compiled graph: gives the parts of
            the layer as it is now, or a reason in words for its own forward ("adapters are
            merged"). What it raises is such a reason, too. None for a subclass of PEFT's
            `lora.Linear`, `lora.Linear4bit`, `adalora.SVDLinear` or `adalora.SVDLinear4bit` whose
            forward, and what that asks of the layer, is PEFT's.
    Raises: TypeError if `cls` is no class of modules or `read` cannot be called; ValueError if
        `read` is missing, naming what `cls` does its own way, or if `cls` is PEFT's own.
    """
    if not (isinstance(cls, type) and issubclass(cls, nn.Module)):
        came = cls.__name__ if isinstance(cls, type) else type(cls).__name__
        raise TypeError(f"cls: expected a subclass of torch.nn.Module, got {came}")
    served = (_PEFT, experts.SWAPS, other_bases.SWAPS)
    if any(cls in kinds for kinds in served) or issubclass(cls, PatchedForward):
        raise ValueError(f"cls: {cls.__name__} is served already")
    if read is None:
        bases, own = (Remade, _peft_class(cls)), {}
    elif callable(read):
        bases, own = (OwnLayer,), {"read_parts": staticmethod(read)}
    else:
        raise TypeError(f"read: expected a callable, got a {type(read).__name__}")
    own |= {"original": cls, "__module__": cls.__module__, "__doc__": cls.__doc__}
    SWAPS[cls] = types.new_class(
        cls.__name__, (*bases, cls), exec_body=lambda body: body.update(own)
    )


def _peft_class(cls: type) -> type:
    """Return our class for the class of PEFT whose forward a subclass has.

    Raises: ValueError if there is none.
    """
    parent = next((kind for kind in cls.__mro__ if kind in _PEFT), None)
    if parent is None:
        raise ValueError(
            f"read: expected a function, for {cls.__name__} is no subclass of "
            f"{', '.join(f'{kind.__module__}.{kind.__name__}' for kind in _PEFT)}"
        )
    for name in _INHERITED:
        ours, theirs = (inspect.getattr_static(kind, name, None) for kind in (cls, parent))
        if ours is not theirs:
            raise ValueError(
                f"read: expected a function, for {cls.__name__} has a {name} of its own, not that "
                f"of PEFT's {parent.__name__}"
            )
    return _PEFT[parent]
