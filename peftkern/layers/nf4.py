"""Frozen linear layer in NF4 for plain torch, and as PEFT's base layer.

Users find it as `peftkern.layers.NF4Linear`.
"""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable

import torch
from torch import Tensor, nn

from peftkern.formats.nf4 import NF4Weight
from peftkern.functional import dequantize_nf4, quantize_nf4
from peftkern.layers.base import (
    NamedErrors,
    bare_linear,
    check_linear,
    linear_like,
    low_rank_forward,
)

__all__ = ["NF4Linear"]
_QUANT_FIELDS = tuple(f.name for f in dataclasses.fields(NF4Weight) if f.name != "packed")


class NF4Linear(NamedErrors, nn.Linear):
    """Frozen linear layer whose weight is kept in NF4: y = x @ dequantize(weight).T + bias.

    Args:
        in_features, out_features: K and N.
        bias: whether there is a bias.
        blocksize, double_quant: of the format, see `peftkern.quantize_nf4`.
        dtype: of the weight that is quantized and of the bias.

    `weight` holds the packed bytes, uint8 [numel / 2, 1], and `nf4` is the whole weight. The state
    dict has bitsandbytes' keys: either side loads the other's. A dense checkpoint loads too: it is
    quantized on the way. Casting the module (`.half()`, `.to(torch.bfloat16)`) changes the bias
    alone. Merging a PEFT adapter into it raises: dequantize first (`to_linear`).

    PEFT's methods that add to what the layer puts out, or change what goes in, train over it (LoRA,
    DoRA, AdaLoRA, VeRA, C3A, IA3, OFT, ...). Those that read or write the dense weight do not, and
    PEFT's errors then speak of uint8 or of shapes, not of this layer: LoRA that starts from the
    weight (PiSSA, OLoRA, CorDA, LoftQ, orthogonal), LoHa, LoKr, HRA, SHiRA, DeLoRA, OSF and others.
    UniLoRA and VeLoRA take the weight's dtype for their own and are wrong without an error. Use
    `to_linear` for them, or bitsandbytes' Linear4bit where PEFT knows that.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        blocksize: int = 64,
        double_quant: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(in_features, out_features, bias=bias, device=device, dtype=dtype)
        self._set_nf4(quantized(self.weight, blocksize=blocksize, double_quant=double_quant))
        self.requires_grad_(False)

    @classmethod
    def from_linear(
        cls, linear: nn.Linear, *, blocksize: int = 64, double_quant: bool = True
    ) -> NF4Linear:
        """Quantize a linear layer; the bias is taken over and frozen, the weight is left alone."""
        check_linear(linear)
        w = quantized(linear.weight, blocksize=blocksize, double_quant=double_quant)
        return cls._from_nf4(w, linear.bias, linear.training)

    @classmethod
    def _from_nf4(cls, w: NF4Weight, bias: nn.Parameter | None, training: bool) -> NF4Linear:
        layer = bare_linear(cls, w.shape[1], w.shape[0], training)
        layer.bias = bias
        layer._set_nf4(w)
        layer.requires_grad_(False)
        return layer

    @property
    def nf4(self) -> NF4Weight:
        """NF4 weight as it is now; shares memory with the layer."""
        return NF4Weight(packed=self.weight.detach(), **self._quant)

    def _set_nf4(self, w: NF4Weight) -> None:
        if w.shape != (self.out_features, self.in_features):
            raise ValueError(
                f"weight: expected shape {(self.out_features, self.in_features)}, got {w.shape}"
            )
        self.weight = nn.Parameter(w.packed.view(-1, 1), requires_grad=False)
        # Not buffers: DDP would broadcast them at every forward and a cast of the module would
        # round them.
        self._quant = {name: getattr(w, name) for name in _QUANT_FIELDS}

    def _forward(self, x: Tensor) -> Tensor:
        return low_rank_forward(self, x)

    def dequantize(self) -> Tensor:
        """Return the dense weight [N, K] as it is now, in the dtype it had."""
        return dequantize_nf4(self.nf4)

    @property
    def W_q(self) -> nn.Parameter:
        """`weight`, under the name by which PEFT tells that `dequantize` gives the dense one."""
        return self.weight

    def to_linear(self) -> nn.Linear:
        """Make an nn.Linear with the dequantized weight, in the dtype it had."""
        return linear_like(self, self.dequantize())

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> NF4Linear:
        super()._apply(fn, recurse)
        for name, value in self._quant.items():
            if isinstance(value, Tensor):
                moved = fn(value)
                self._quant[name] = moved if moved.dtype is value.dtype else value.to(moved.device)
        return self

    def _save_to_state_dict(self, destination: dict, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        state = self.nf4.state_dict(prefix)
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
                self._load_nf4(ours, prefix, assign)
            except ValueError as error:
                error_msgs.append(f"{prefix}{error}" if prefix not in str(error) else str(error))
        # The weight is dealt with: show the rest of the module to nn.Module alone.
        rest = {k: v for k, v in state_dict.items() if k not in ours}
        absent: list[str] = []
        super()._load_from_state_dict(
            rest, prefix, local_metadata, strict, absent, unexpected_keys, error_msgs
        )
        missing_keys += [key for key in absent if key != name or name not in ours]

    def _load_nf4(self, state: dict[str, Tensor], prefix: str, assign: bool) -> None:
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
            w = quantized(
                dense if assign else dense.to(device),
                blocksize=self._quant["blocksize"],
                double_quant=self._quant["nested_absmax"] is not None,
            )
        else:
            with torch.inference_mode(False):  # as in `quantized`
                w = NF4Weight.from_state_dict(state, prefix)
                w = w if assign else _copied(w, device)
        self._set_nf4(w)

    def extra_repr(self) -> str:
        absmax = "nested" if self._quant["nested_absmax"] is not None else "plain"
        return f"{super().extra_repr()}, blocksize={self._quant['blocksize']}, absmax={absmax}"


def quantized(weight: Tensor, *, blocksize: int, double_quant: bool) -> NF4Weight:
    """Quantize a weight so that even under torch.inference_mode it can be trained with."""
    with torch.inference_mode(False), torch.no_grad():
        return quantize_nf4(weight.detach(), blocksize=blocksize, double_quant=double_quant)


def _copied(w: NF4Weight, device: torch.device) -> NF4Weight:
    fields = {f.name: getattr(w, f.name) for f in dataclasses.fields(w)}
    tensors = {name: value for name, value in fields.items() if isinstance(value, Tensor)}
    copies = {name: value.to(device, copy=True) for name, value in tensors.items()}
    return dataclasses.replace(w, **copies)
