"""What the frozen linear layers over a 4-bit weight share: moves, casts and state dicts."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from peftkern.formats.block_weight import QuantizedWeight
from peftkern.functional import dequantize
from peftkern.layers.base import NamedErrors, bare_linear, linear_like, low_rank_forward
from peftkern.layers.state_keys import KeyLookup, any_key


class QuantizedLinear(NamedErrors, nn.Linear):
    """Frozen linear layer y = x @ dequantize(weight).T + bias over a value of `kind`.

    `weight` is a parameter of its packed bytes, `_quant` has the other fields. A subclass says what
    shape the bytes have, and how they are written, read and made of a dense weight.
    """

    kind: ClassVar[type]
    _quant: dict[str, Any]
    _fqn_modifiers, _any_key = KeyLookup(["weight"]), any_key

    @property
    def quantized_weight(self) -> QuantizedWeight:
        """Weight as it is now; shares memory with the layer."""
        return self.kind(packed=self.weight.detach(), **self._quant)

    @classmethod
    def _from_stored(cls, w: QuantizedWeight, bias: nn.Parameter | None, training: bool) -> Any:
        layer = bare_linear(cls, w.shape[1], w.shape[0], training)
        layer.bias = bias
        layer._set_stored(w)
        layer.requires_grad_(False)
        return layer

    def _set_stored(self, w: QuantizedWeight) -> None:
        if w.shape != (self.out_features, self.in_features):
            raise ValueError(
                f"weight: expected shape {(self.out_features, self.in_features)}, got {w.shape}"
            )
        self.weight = nn.Parameter(self._bytes(w), requires_grad=False)
        # Not buffers: DDP would broadcast them at every forward and a cast of the module would
        # round them.
        names = (f.name for f in dataclasses.fields(w) if f.name != "packed")
        self._quant = {name: getattr(w, name) for name in names}

    def _bytes(self, w: QuantizedWeight) -> Tensor:
        """Give the packed bytes the shape of the parameter."""
        raise NotImplementedError

    def _state(self, prefix: str) -> dict[str, Tensor]:
        """Return the state dict of the weight."""
        raise NotImplementedError

    def _read(self, state: dict[str, Tensor], prefix: str) -> QuantizedWeight:
        """Read such a state dict without copying it."""
        raise NotImplementedError

    def _quantized(self, dense: Tensor) -> QuantizedWeight:
        """Quantize a dense weight as the layer's is."""
        raise NotImplementedError

    def _forward(self, x: Tensor) -> Tensor:
        return low_rank_forward(self, x)

    def dequantize(self) -> Tensor:
        """Return the dense weight [N, K] as it is now, in the dtype it had."""
        return dequantize(self.quantized_weight)

    @property
    def W_q(self) -> nn.Parameter:
        """`weight`, under the name by which PEFT tells that `dequantize` gives the dense one."""
        return self.weight

    def to_linear(self) -> nn.Linear:
        """Make an nn.Linear with the dequantized weight, in the dtype it had."""
        return linear_like(self, self.dequantize())

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> QuantizedLinear:
        super()._apply(fn, recurse)
        for name, value in self._quant.items():
            if isinstance(value, Tensor):
                moved = fn(value)
                self._quant[name] = moved if moved.dtype is value.dtype else value.to(moved.device)
        return self

    def _save_to_state_dict(self, destination: dict, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        state = self._state(prefix)
        state.pop(f"{prefix}weight")  # super() has written it, as a parameter if asked for
        destination.update(state)

    def _load_from_state_dict(
        self,
        state_dict: dict,
        prefix: str,
        local_metadata: dict,
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        name = f"{prefix}weight"
        ours = {k: v for k, v in state_dict.items() if k == name or k.startswith(f"{name}.")}
        if name in ours:
            assign = local_metadata.get("assign_to_params_buffers", False)
            try:
                self._load_stored(ours, prefix, assign)
            except ValueError as error:
                error_msgs.append(f"{prefix}{error}" if prefix not in str(error) else str(error))
        # The weight is dealt with: show the rest of the module to nn.Module alone.
        rest = {k: v for k, v in state_dict.items() if k not in ours}
        absent: list[str] = []
        super()._load_from_state_dict(
            rest, prefix, local_metadata, strict, absent, unexpected_keys, error_msgs
        )
        missing_keys += [key for key in absent if key != name or name not in ours]

    def _load_stored(self, state: dict[str, Tensor], prefix: str, assign: bool) -> None:
        """Take the tensors themselves if `assign`, as nn.Module does, else copies on its device."""
        dense, device = state[f"{prefix}weight"], self.weight.device
        if device.type == "meta" and not (assign or dense.is_meta):
            warnings.warn(
                f"{prefix}weight: not loaded, for this layer has no memory (it is on the meta "
                "device) and nothing can be copied into it; pass assign=True",
                stacklevel=2,
            )
            return
        if len(state) == 1 and dense.is_floating_point():
            w = self._quantized(dense if assign else dense.to(device))
        else:
            with trainable():
                w = self._read(state, prefix)
                w = w if assign else _copied(w, device)
        self._set_stored(w)


def trainable() -> torch.inference_mode:
    """Make tensors that can be trained with, even under torch.inference_mode."""
    return torch.inference_mode(False)


def _copied(w: QuantizedWeight, device: torch.device) -> QuantizedWeight:
    fields = {f.name: getattr(w, f.name) for f in dataclasses.fields(w)}
    tensors = {name: value for name, value in fields.items() if isinstance(value, Tensor)}
    copies = {name: value.to(device, copy=True) for name, value in tensors.items()}
    return dataclasses.replace(w, **copies)
