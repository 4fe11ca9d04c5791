"""LoRA and NF4 layers for plain torch.

Each is an `nn.Linear` in everything but its forward, so that code which looks for linear layers
(PEFT's target_modules among it) finds them. `quantize_` swaps the linear layers of a model.

    layer = NF4LoRALinear.from_linear(linear, r=16, lora_alpha=32)
    quantize_(model)  # then get_peft_model(model, LoraConfig(...)) and patch(model)
"""

from __future__ import annotations

import dataclasses
import math
import sys
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from peftkern.frozen_linear import (
    DENSE_TYPES,
    check_update,
    dropout_p,
    linear_like,
    low_rank_update,
    merged,
    serves_as_base,
)
from peftkern.functional import (
    dequantize_nf4,
    lora_linear,
    nf4_linear,
    nf4_lora_linear,
    quantize_nf4,
)
from peftkern.nf4 import NF4Weight
from peftkern.svd_linear import SVDLinear as SVDLinear

_QUANT_FIELDS = tuple(f.name for f in dataclasses.fields(NF4Weight) if f.name != "packed")
_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
_ADAPTERS = ("lora_A", "lora_B")  # quantising an adapter would end its training


class _Adapter:
    """What the two LoRA layers share: lora_A [r, K], lora_B [N, r], scaling and dropout."""

    def _add_adapter(
        self,
        device: torch.device | str | None,
        r: int = 8,
        lora_alpha: float = 16,
        lora_dropout: float = 0.0,
        adapter_dtype: torch.dtype = torch.float32,
    ) -> None:
        check_update(r, lora_dropout)
        self.r = r
        self.lora_alpha = lora_alpha
        self.scaling = lora_alpha / r
        self.lora_dropout = lora_dropout
        factory = {"dtype": adapter_dtype, "device": device}
        self.lora_A = nn.Parameter(torch.empty(r, self.in_features, **factory))
        self.lora_B = nn.Parameter(torch.empty(self.out_features, r, **factory))
        self.reset_lora_parameters()

    def reset_lora_parameters(self) -> None:
        """lora_A as nn.Linear draws its weight and lora_B zero: the update starts at nothing."""
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))
        nn.init.zeros_(self.lora_B)

    def merge(self) -> nn.Linear:
        """A new dense nn.Linear that computes the same, in the dtype the weight had, without the
        update's cost."""
        with torch.no_grad():
            return merged(self, low_rank_update(self.lora_A, self.lora_B, self.scaling))

    def extra_repr(self) -> str:
        return (
            f"{super().extra_repr()}, r={self.r}, scaling={self.scaling:g}, "
            f"lora_dropout={self.lora_dropout:g}"
        )


class LoRALinear(_Adapter, nn.Linear):
    """A frozen linear layer plus a trained low-rank update.

    y = x @ weight.T + scaling * (dropout(x) @ lora_A.T) @ lora_B.T + bias

    Args:
        in_features, out_features: K and N.
        r: rank. lora_alpha: scaling = lora_alpha / r; `scaling` may be changed at any time.
        lora_dropout: on the input of the update, in training only.
        bias: whether there is a bias; it is frozen, as is the weight.
        dtype: of weight and bias. adapter_dtype: of lora_A and lora_B.

    State dict: `weight`, `bias`, `lora_A`, `lora_B`.
    Source: Hu et al. 2021, eq. 3, arXiv:2106.09685
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        r: int = 8,
        lora_alpha: float = 16,
        lora_dropout: float = 0.0,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        adapter_dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__(in_features, out_features, bias=bias, device=device, dtype=dtype)
        self.requires_grad_(False)
        self._add_adapter(device, r, lora_alpha, lora_dropout, adapter_dtype)

    @classmethod
    def from_linear(cls, linear: nn.Linear, **update: Any) -> LoRALinear:
        """The same layer with an update; it takes over the weight and bias, and freezes them.

        Args: update: r, lora_alpha, lora_dropout and adapter_dtype, as above.
        """
        _check_linear(linear)
        layer = _bare(cls, linear.in_features, linear.out_features, linear.training)
        layer.weight, layer.bias = linear.weight, linear.bias
        layer.requires_grad_(False)
        layer._add_adapter(linear.weight.device, **update)
        return layer

    def forward(self, x: Tensor) -> Tensor:
        options = {"scaling": self.scaling, "bias": self.bias, "dropout_p": dropout_p(self)}
        return lora_linear(x, self.weight, self.lora_A, self.lora_B, **options)


@serves_as_base
class NF4Linear(nn.Linear):
    """A frozen linear layer whose weight is kept in NF4: y = x @ dequantize(weight).T + bias.

    Args:
        in_features, out_features: K and N.
        bias: whether there is a bias.
        blocksize, double_quant: of the format, see `peftkern.quantize_nf4`.
        dtype: of the weight that is quantised and of the bias.

    `weight` holds the packed bytes, uint8 [numel / 2, 1], and `nf4` is the whole weight. The state
    dict has bitsandbytes' keys: either side loads the other's. A dense checkpoint loads too: it is
    quantised on the way. Casting the module (`.half()`, `.to(torch.bfloat16)`) changes the bias
    alone. Merging a PEFT adapter into it raises: dequantise first (`to_linear`).
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
        weight = self.weight.detach()
        self._set_nf4(quantize_nf4(weight, blocksize=blocksize, double_quant=double_quant))
        self.requires_grad_(False)

    @classmethod
    def from_linear(
        cls, linear: nn.Linear, *, blocksize: int = 64, double_quant: bool = True
    ) -> NF4Linear:
        """Quantise a linear layer; the bias is taken over and frozen, the weight is left alone."""
        _check_linear(linear)
        w = quantize_nf4(linear.weight.detach(), blocksize=blocksize, double_quant=double_quant)
        return cls._from_nf4(w, linear.bias, linear.training)

    @classmethod
    def _from_nf4(cls, w: NF4Weight, bias: nn.Parameter | None, training: bool) -> NF4Linear:
        layer = _bare(cls, w.shape[1], w.shape[0], training)
        layer.bias = bias
        layer._set_nf4(w)
        layer.requires_grad_(False)
        return layer

    @property
    def nf4(self) -> NF4Weight:
        """The weight as it is now; shares memory with the layer."""
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

    def forward(self, x: Tensor) -> Tensor:
        return nf4_linear(x, self.nf4, self.bias)

    def to_linear(self) -> nn.Linear:
        """A new nn.Linear with the dequantised weight, in the dtype it had."""
        return linear_like(self, dequantize_nf4(self.nf4))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> NF4Linear:
        super()._apply(fn, recurse)
        for name, value in self._quant.items():
            if isinstance(value, Tensor):
                moved = fn(value)
                self._quant[name] = moved if moved.dtype is value.dtype else value.to(moved.device)
        return self

    def _save_to_state_dict(self, destination: dict, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        quantised = self.nf4.state_dict(prefix)
        quantised.pop(f"{prefix}weight")  # super() has written it, as a parameter if asked for
        destination.update(quantised)

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
            try:
                self._load_nf4(ours, prefix)
            except ValueError as error:
                error_msgs.append(f"{prefix}{error}" if prefix not in str(error) else str(error))
        # The weight is dealt with: show the rest of the module to nn.Module alone.
        rest = {k: v for k, v in state_dict.items() if k not in ours}
        absent: list[str] = []
        super()._load_from_state_dict(
            rest, prefix, local_metadata, strict, absent, unexpected_keys, error_msgs
        )
        missing_keys += [key for key in absent if key != name or name not in ours]

    def _load_nf4(self, state: dict[str, Tensor], prefix: str) -> None:
        dense = state[f"{prefix}weight"]
        device = self.weight.device
        if len(state) == 1 and dense.is_floating_point():
            quant = self._quant
            w = quantize_nf4(
                dense.detach().to(device),
                blocksize=quant["blocksize"],
                double_quant=quant["nested_absmax"] is not None,
            )
        else:
            w = NF4Weight.from_state_dict(state, prefix).to(device)
        self._set_nf4(w)

    def extra_repr(self) -> str:
        absmax = "nested" if self._quant["nested_absmax"] is not None else "plain"
        return f"{super().extra_repr()}, blocksize={self._quant['blocksize']}, absmax={absmax}"


class NF4LoRALinear(_Adapter, NF4Linear):
    """A frozen linear layer in NF4 plus a trained low-rank update (QLoRA).

    y = x @ dequantize(weight).T + scaling * (dropout(x) @ lora_A.T) @ lora_B.T + bias

    Args: as `NF4Linear` and `LoRALinear`. State dict: bitsandbytes' keys, `lora_A` and `lora_B`.
    Source: Dettmers et al. 2023, eq. 5, arXiv:2305.14314
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        r: int = 8,
        lora_alpha: float = 16,
        lora_dropout: float = 0.0,
        bias: bool = True,
        blocksize: int = 64,
        double_quant: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        adapter_dtype: torch.dtype = torch.float32,
    ) -> None:
        quant = {"blocksize": blocksize, "double_quant": double_quant}
        super().__init__(in_features, out_features, bias, **quant, device=device, dtype=dtype)
        self._add_adapter(device, r, lora_alpha, lora_dropout, adapter_dtype)

    @classmethod
    def from_linear(
        cls,
        linear: nn.Linear,
        *,
        blocksize: int = 64,
        double_quant: bool = True,
        **update: Any,
    ) -> NF4LoRALinear:
        """Quantise a linear layer, or take over an NF4Linear as it is, and add an update.

        Args: update: r, lora_alpha, lora_dropout and adapter_dtype, as in `LoRALinear`.
        """
        if type(linear) is NF4Linear:
            w = linear.nf4
        else:
            _check_linear(linear)
            w = quantize_nf4(linear.weight.detach(), blocksize=blocksize, double_quant=double_quant)
        layer = cls._from_nf4(w, linear.bias, linear.training)
        layer._add_adapter(w.device, **update)
        return layer

    def forward(self, x: Tensor) -> Tensor:
        options = {"scaling": self.scaling, "bias": self.bias, "dropout_p": dropout_p(self)}
        return nf4_lora_linear(x, self.nf4, self.lora_A, self.lora_B, **options)


def quantize_(
    model: nn.Module,
    *,
    blocksize: int = 64,
    double_quant: bool = True,
    include: Iterable[str] | None = None,
    exclude: Iterable[str] = ("lm_head",),
) -> list[str]:
    """Replace the nn.Linear layers of a model by NF4Linear, in place.

    Args:
        include: only layers whose name has one of these as consecutive dotted parts ("q_proj",
            "layers.0", "mlp.up_proj"); None takes all.
        exclude: never layers whose name has one of these. PEFT's lora_A and lora_B, subclasses of
            nn.Linear, and weights that are not float32, float16 or bfloat16 always stay.

    Returns: names of the layers that were replaced.
    Raises: TypeError unless `model` is a module that holds layers; ValueError when an entry of
        `include` is in no layer's name.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
    if type(model) is nn.Linear:
        raise TypeError("model: an nn.Linear cannot replace itself; use NF4Linear.from_linear")
    wanted = None if include is None else _patterns("include", include)
    skip = (*_patterns("exclude", exclude), *_ADAPTERS)

    places: dict[nn.Linear, list[tuple[nn.Module, str]]] = {}  # one layer may hang in several
    seen, names = [], []
    for path, parent in model.named_modules():
        for name, child in parent._modules.items():
            if type(child) is not nn.Linear:
                continue
            seen.append(f"{path}.{name}".lstrip("."))
            chosen = (
                wanted is None or _has_parts(seen[-1], wanted)
            ) and child.weight.dtype in _DTYPES
            if chosen and not _has_parts(seen[-1], skip):
                places.setdefault(child, []).append((parent, name))
                names.append(seen[-1])
    for pattern in wanted or ():
        if not any(_has_parts(path, (pattern,)) for path in seen):
            raise ValueError(f"include: no nn.Linear has {pattern!r} in its name")

    for _ in _with_progress(range(len(places)), "Quantising to NF4"):
        child, owners = places.popitem()  # nothing here keeps a dense weight that is done with
        layer = NF4Linear.from_linear(child, blocksize=blocksize, double_quant=double_quant)
        for parent, name in owners:
            setattr(parent, name, layer)
    return names


def _patterns(argument: str, value: Iterable[str]) -> tuple[str, ...]:
    if isinstance(value, str):
        raise TypeError(f"{argument}: expected names in a list or tuple, got the string {value!r}")
    return tuple(value)


def _has_parts(path: str, patterns: Iterable[str]) -> bool:
    return any(f".{pattern}." in f".{path}." for pattern in patterns)


def _with_progress(steps: Iterable, description: str) -> Iterable:
    """The steps, with a progress bar where somebody may be watching."""
    if not sys.stderr.isatty():
        return steps
    from rich.console import Console
    from rich.progress import track

    return track(steps, description, console=Console(stderr=True), transient=True)


def _check_linear(linear: Any) -> None:
    if type(linear) not in DENSE_TYPES:
        raise TypeError(f"linear: expected an nn.Linear, got {type(linear).__name__}")


def _bare(cls: type, in_features: int, out_features: int, training: bool) -> Any:
    """A layer of that class with no parameters yet: nn.Linear's __init__ would draw a weight."""
    layer = cls.__new__(cls)
    nn.Module.__init__(layer)
    layer.register_parameter("weight", None)  # the order that nn.Linear's state dict has
    layer.register_parameter("bias", None)
    layer.in_features, layer.out_features = in_features, out_features
    layer.training = training
    return layer
