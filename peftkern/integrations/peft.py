"""Drop peftkern into a PEFT model by swapping the class of its LoRA layers.

`patch` gives every layer whose class is exactly `peft.tuners.lora.Linear` or `Linear4bit` a
subclass of that class in which `forward` alone differs, so keys, saving, loading, merging and
adapter switching stay PEFT's own code. The new forward looks at the layer's state at every call
and keeps nothing of it: the plain case runs here, and anything unusual goes to PEFT's forward with
a reason that `peftkern.stats()` counts.

What PEFT computes, in its order: y = base_layer(x); for each active adapter x is cast to the dtype
of its lora_A and y = y + lora_B(lora_A(dropout(x))) * scaling; y is cast back to the dtype that the
base layer gave. Here the base and the first adapter are one op, which rounds once where PEFT rounds
after the base and again after the sum. With DoRA, a first adapter that can be fused with the base
goes to `dora_linear`; for any other, PEFT's operations run with the norms from `dora_norm`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from peft.import_utils import is_bnb_4bit_available
from peft.tuners import lora
from peft.tuners.lora.dora import DoraLinearLayer
from peft.tuners.lora.variants import DoraLinearVariant
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.modules import module as nn_module
from transformers.pytorch_utils import Conv1D

from peftkern import dispatch
from peftkern.dora import dora_linear, dora_norm
from peftkern.functional import lora_linear, nf4_linear, nf4_lora_linear
from peftkern.layers import NF4Linear
from peftkern.nf4 import NF4Weight

_BNB_TYPES: tuple[type, ...] = ()
if is_bnb_4bit_available():
    from peft.tuners.lora.bnb import Linear4bit

    from peftkern.integrations import bitsandbytes as bnb

    _BNB_TYPES = bnb.LINEAR_TYPES

_DENSE_CPU_MINIMUM = dispatch.DENSE_CPU_MINIMUM
# Values of a dense weight from which DoRA is faster here (bench/bench_dora.py): below, PEFT is.
_DORA_CPU_MINIMUM = 1 << 17
_DENSE = (nn.Linear, Conv1D)
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_PLAIN = (Tensor, nn.Parameter)
_BASES = frozenset((*_BNB_TYPES, *_DENSE, NF4Linear))
Adapter = tuple[Tensor, Tensor, nn.Module, Tensor | None]


class PatchedLinear(lora.Linear):
    """PEFT's `lora.Linear` with the base layer and its first adapter as one op."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        served = serve(self, x, args, kwargs)
        if isinstance(served, Tensor):
            return served
        count_fallback("lora_linear", served)
        return super().forward(x, *args, **kwargs)

    def _add_adapter(self, result: Tensor, x: Tensor, name: str) -> tuple[Tensor, Tensor]:
        x = self._cast_input_dtype(x, self.lora_A[name].weight.dtype)
        output = self.lora_B[name](self.lora_A[name](self.lora_dropout[name](x)))
        return result + output * self.scaling[name], x


if is_bnb_4bit_available():

    class PatchedLinear4bit(Linear4bit):
        """PEFT's `lora.Linear4bit` with the base layer and its first adapter as one op."""

        def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            served = serve(self, x, args, kwargs)
            if isinstance(served, Tensor):
                return served
            count_fallback("nf4_lora_linear", served)
            return super().forward(x, *args, **kwargs)

        def _add_adapter(self, result: Tensor, x: Tensor, name: str) -> tuple[Tensor, Tensor]:
            # Asks about CUDA's autocast whatever the device, as PEFT does.
            convert = not torch.is_autocast_enabled()
            if convert:
                x = self._cast_input_dtype(x, self.lora_A[name].weight.dtype)
            output = self.lora_B[name](self.lora_A[name](self.lora_dropout[name](x)))
            output = output * self.scaling[name]
            return result + (output.to(result.dtype) if convert else output), x


_SWAPS: dict[type, type] = {lora.Linear: PatchedLinear}
if is_bnb_4bit_available():
    _SWAPS[Linear4bit] = PatchedLinear4bit


def _swaps() -> dict[type, type]:
    """{PEFT's class: ours} of every kind of layer."""
    from peftkern.integrations import adalora

    return {**_SWAPS, **adalora.SWAPS}


@dataclass
class PatchReport:
    """What `patch` did.

    patched: names of the layers that run peftkern's forward now, those of an earlier call included.
    skipped: {name: reason} of PEFT layers that were left alone.
    falling_back: {name: reason} of patched layers whose present state sends them to PEFT's forward;
        it is looked at again at every call.
    kinds: how many layers of each PEFT class were patched.
    """

    patched: list[str] = field(default_factory=list)
    skipped: dict[str, str] = field(default_factory=dict)
    falling_back: dict[str, str] = field(default_factory=dict)
    kinds: Counter[str] = field(default_factory=Counter)

    def __str__(self) -> str:
        if not self.patched and not self.skipped:
            return "0 patched: the model has no PEFT adapter layers"
        text = f"{len(self.patched)} patched"
        if self.kinds:
            text += f" ({_counts(self.kinds)})"
        text += f", {len(self.skipped)} skipped"
        if self.skipped:
            text += f": {_counts(Counter(self.skipped.values()))}"
        if self.falling_back:
            reasons = _counts(Counter(self.falling_back.values()))
            text += f"; {len(self.falling_back)} of the patched fall back for now: {reasons}"
        return text


def patch(model: nn.Module) -> PatchReport:
    """Make the LoRA and AdaLoRA layers of a PEFT model run on peftkern, in place and reversibly.

    Takes a PeftModel, the model inside it, any module that holds LoRA layers, or one such layer.
    Layers that are patched already stay so. Layers that PEFT adds later (an adapter with new target
    modules) need another call.

    Raises: TypeError if `model` is not a torch.nn.Module.
    """
    from peftkern.integrations import adalora

    report = PatchReport()
    swaps = _swaps()
    originals = {patched: original for original, patched in swaps.items()}
    for name, module in _adapter_layers(model):
        kind = type(module)
        original = originals.get(kind, kind)
        if original not in swaps:
            report.skipped[name] = f"{_label(kind)} has no kernel"
            continue
        if "forward" in module.__dict__:
            report.skipped[name] = "forward is replaced on the instance (accelerate's hooks?)"
            continue
        module.__class__ = swaps[original]
        adalora.freeze_ranknum(module)
        report.patched.append(name)
        report.kinds[_label(original)] += 1
        names = _active_names(module)
        reason = _unusual_state(module, names)
        adapter = _read_adapter(module, names) if reason is None and names else None
        if reason is not None or isinstance(adapter, str):
            report.falling_back[name] = reason or adapter
    for name, module in model.named_modules():
        if adalora.patch_model(module):
            report.patched.append(name)
            report.kinds["adalora.AdaLoraModel"] += 1
    return report


def unpatch(model: nn.Module) -> list[str]:
    """Give every patched layer its own PEFT class back; returns the names of those layers.

    Raises: TypeError if `model` is not a torch.nn.Module.
    """
    from peftkern.integrations import adalora

    restored = []
    originals = {patched: original for original, patched in _swaps().items()}
    for name, module in _adapter_layers(model):
        original = originals.get(type(module))
        if original is not None:
            module.__class__ = original
            restored.append(name)
    restored += [name for name, module in model.named_modules() if adalora.unpatch_model(module)]
    return restored


def _adapter_layers(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
    for name, module in model.named_modules():
        if isinstance(module, BaseTunerLayer):
            yield name, module


def _label(kind: type) -> str:
    """ "lora.Linear4bit" for peft.tuners.lora.bnb.Linear4bit."""
    parts = kind.__module__.split(".")
    family = parts[2] if parts[:2] == ["peft", "tuners"] and len(parts) > 2 else parts[0]
    return f"{family}.{kind.__name__}"


def _counts(counter: Counter[str]) -> str:
    return ", ".join(f"{what} {count}" for what, count in counter.most_common())


def count_fallback(op: str, reason: str) -> None:
    if not torch.compiler.is_compiling():  # counting is no part of a compiled graph
        dispatch.record_fallback(op, reason)


def serve(layer: Any, x: Tensor, args: tuple, kwargs: dict) -> Tensor | str:
    """The layer's output, or why PEFT's forward has to give it. Nothing is changed in that case."""
    if args or kwargs:
        given = sorted(k for k, v in kwargs.items() if v is not None)
        if args or given:
            return f"extra arguments: {', '.join(given) or 'positional'}"
    if _is_small(layer, x):  # asked first: to such a product every check is a loss
        return "small dense product: PEFT's own operations are as fast"
    names = _active_names(layer)
    reason = _unusual_state(layer, names) or unusual_tensor("input", x)
    if reason is not None:
        return reason
    adapter = _read_adapter(layer, names) if names else None
    if isinstance(adapter, str):
        return adapter
    if torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0:
        return "torch.func transform"  # our autograd functions know the plain backward alone
    if not (x.is_cpu or torch.compiler.is_compiling()):  # in a graph, the op itself falls back
        unserved = dispatch.unserved(x.device)
        if unserved is not None and dispatch.forced_backend() is None:
            return unserved
    device = x.device.type
    autocast = torch.is_autocast_enabled(device)
    base_layer = layer._modules["base_layer"]
    base = _read_base(base_layer, x, autocast)
    if isinstance(base, str):
        return base
    base_x, weight, bias = base
    nf4 = isinstance(weight, NF4Weight)
    if names:
        A, B, drop, adapter_bias = adapter
        reader = _reader(layer)
        unfused = _unfused(A, B, x, base_x.dtype, autocast, layer.cast_input_dtype_enabled)
        plain = reader is LoRAReader and names[0] not in layer.lora_variant
        if unfused is None and plain and not torch.compiler.is_compiling():
            op = "nf4_lora_linear" if nf4 else "lora_linear"
            if dispatch.is_slower(op, base_x, tuple(weight.shape), A.shape[0], layer.training):
                return "PEFT's own operations measured faster for this shape"
    else:
        unfused = "no active adapter"
    if unfused is None:
        A, scaling = reader.factor(layer, names[0], A)
        dropout_p = drop.p if drop.training and type(drop) is nn.Dropout else 0.0
        options = {"scaling": scaling, "bias": bias, "dropout_p": dropout_p}
        if names[0] in layer.lora_variant:
            if not layer.training:  # where DoRA's own forward looks
                options["dropout_p"] = 0.0
            result = dora_linear(
                base_x, weight, A, B, _magnitude(layer, names[0]).weight, **options
            )
        else:
            result = (nf4_lora_linear if nf4 else lora_linear)(base_x, weight, A, B, **options)
    elif nf4:
        result = nf4_linear(base_x, weight, bias)
    else:
        return unfused
    if type(base_layer) in _BNB_TYPES:
        result = result.to(x.dtype)  # bitsandbytes returns its input's dtype
    out_dtype = result.dtype
    if unfused is None:
        if adapter_bias is not None:  # LoraConfig(lora_bias=True)
            result = result + adapter_bias * layer.scaling[names[0]]
        names = names[1:]
    for name in names:
        if name in layer.lora_variant:
            result, x = _add_dora(layer, result, x, name, weight, bias)
        else:
            result, x = layer._add_adapter(result, x, name)
    return result.to(out_dtype)


def _is_small(layer: Any, x: Tensor) -> bool:
    """Too little dense work to win back the cost of a call, unless a back end was asked for."""
    if type(layer._modules["base_layer"]) not in _DENSE or not x.is_cpu:
        return False
    K, N = layer.in_features, layer.out_features
    if layer.lora_variant:
        small = N * K < _DORA_CPU_MINIMUM
    else:
        small = x.numel() + x.numel() // max(K, 1) * N < _DENSE_CPU_MINIMUM
    if not small:
        return False
    return torch.compiler.is_compiling() or dispatch.forced_backend() is None


def _active_names(layer: Any) -> list[str]:
    """The active adapters that this layer has, in PEFT's order."""
    group = layer._modules["lora_A"]
    adapters = group._modules or group._parameters  # LoRA keeps modules, AdaLoRA parameters
    return [name for name in layer.active_adapters if name in adapters]


def _adapter(layer: Any, name: str) -> list[nn.Module]:
    """lora_A, lora_B and lora_dropout of one adapter; `_modules` is ten times faster than a dot."""
    modules = layer._modules
    return [modules[group]._modules[name] for group in ("lora_A", "lora_B", "lora_dropout")]


def _unusual_state(layer: Any, names: list[str]) -> str | None:
    """What in the layer's present state our ops do not express; None in the plain case."""
    if layer.disable_adapters:
        return "adapters are disabled"
    if layer.merged:
        return "adapters are merged"
    for name in names:
        if name in layer.lora_variant and type(layer.lora_variant[name]) is not DoraLinearVariant:
            return f"lora_variant {type(layer.lora_variant[name]).__name__}"
    if (
        nn_module._global_forward_hooks
        or nn_module._global_forward_pre_hooks
        or nn_module._global_backward_hooks
        or nn_module._global_backward_pre_hooks
    ):
        return "global module hooks"
    base = layer._modules["base_layer"]
    kind = type(base)
    if kind not in _BASES:
        return f"base_layer is {kind.__name__}"
    reason = _hooked("base_layer", base)
    if reason is None and kind in _BNB_TYPES:
        reason = bnb.unusual_weight(base)
    return reason


def _read_adapter(layer: Any, names: list[str]) -> Adapter | str:
    """The first adapter, or what in it, or in the magnitudes of all, our ops do not express.

    Those after the first are called as the modules they are.
    """
    adapter = _reader(layer).read(layer, names[0])
    if layer.lora_variant and not isinstance(adapter, str):
        for name in names:
            if name in layer.lora_variant and (reason := _unusual_magnitude(layer, name)):
                return reason
    return adapter


def _magnitude(layer: Any, name: str) -> nn.Module:
    return layer._modules["lora_magnitude_vector"]._modules[name]


def _unusual_magnitude(layer: Any, name: str) -> str | None:
    """What in an adapter's DoRA our ops do not express."""
    role, module = "lora_magnitude_vector", _magnitude(layer, name)
    if type(module) is not DoraLinearLayer:
        return f"{role} is {type(module).__name__}"
    if type(layer._modules["base_layer"]) is Conv1D:
        return "DoRA over Conv1D"
    if module.weight.device != layer._modules["lora_A"]._modules[name].weight.device:
        return f"{role} is on {module.weight.device}"  # ephemeral_gpu_offload
    return _hooked(role, module) or unusual_tensor(role, module.weight)


def _add_dora(
    layer: Any,
    result: Tensor,
    x: Tensor,
    name: str,
    weight: Tensor | NF4Weight,
    bias: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """A DoRA adapter on top of what the layer has given so far, and its input, as PEFT has them."""
    lora_A, lora_B, drop = _adapter(layer, name)
    scaling, magnitude = layer.scaling[name], _magnitude(layer, name).weight
    four_bit = type(layer._modules["base_layer"]) in _BNB_TYPES
    convert = not (four_bit and torch.is_autocast_enabled())  # CUDA's, whatever the device
    if convert:
        x = layer._cast_input_dtype(x, lora_A.weight.dtype)
    c = magnitude / dora_norm(weight, lora_A.weight, lora_B.weight, scaling=scaling)
    if type(drop) is nn.Identity or not layer.training:
        dropped, base = x, result if bias is None else result - bias
    else:
        dropped = drop(x)
        if isinstance(weight, NF4Weight):
            base = nf4_linear(dropped, weight)
        else:
            base = F.linear(dropped, weight.to(dropped.dtype))
    total = result + (c - 1) * base + c * (lora_B(lora_A(dropped)) * scaling)
    return total.to(result.dtype) if four_bit and convert else total, x


class LoRAReader:
    """What `serve` wants to know about one adapter of a layer that keeps it as PEFT's LoRA does.

    A patched class of another tuner names its own in `adapter_reader`.
    """

    @staticmethod
    def read(layer: Any, name: str) -> Adapter | str:
        """lora_A, lora_B, the dropout module and lora_B's bias, or what our ops do not express."""
        lora_A, lora_B, drop = _adapter(layer, name)
        for role, linear in (("lora_A", lora_A), ("lora_B", lora_B)):
            if type(linear) is not nn.Linear:
                return f"{role} is {type(linear).__name__}"
            reason = _hooked(role, linear)
            if reason is not None:
                return reason
        A, B = lora_A.weight, lora_B.weight
        reason = unusual_tensor("lora_A", A) or unusual_tensor("lora_B", B)
        if reason is None:
            reason = "lora_A has a bias" if lora_A.bias is not None else unusual_dropout(drop)
        return (A, B, drop, lora_B.bias) if reason is None else reason

    @staticmethod
    def factor(layer: Any, name: str, A: Tensor) -> tuple[Tensor, float]:
        """A and s of the update s * dropout(x) A^T B^T, from what `read` gave for A."""
        return A, layer.scaling[name]


def _reader(layer: Any) -> type:
    return getattr(type(layer), "adapter_reader", LoRAReader)


def unusual_dropout(drop: nn.Module) -> str | None:
    if type(drop) is not nn.Identity and (
        type(drop) is not nn.Dropout or drop.p == 1 or drop.inplace
    ):
        return f"lora_dropout is {drop}"
    return _hooked("lora_dropout", drop)


def _hooked(role: str, module: nn.Module) -> str | None:
    """Whether calling the module would do more than its forward, which reading it would skip."""
    if (
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
    ):
        return f"hooks on {role}"
    if "forward" in module.__dict__ or "_hf_hook" in module.__dict__:
        return f"forward of {role} is replaced"
    return None


def unusual_tensor(role: str, tensor: Tensor) -> str | None:
    """DTensor and other wrappers have to go through torch's operators."""
    kind = type(tensor)
    if kind not in _PLAIN and hasattr(kind, "__tensor_flatten__"):
        return f"{role} is {kind.__name__}"
    return None


def _read_base(
    base: nn.Module, x: Tensor, autocast: bool
) -> tuple[Tensor, Tensor | NF4Weight, Tensor | None] | str:
    """(x in the dtype the base computes in, weight, bias) as they are at this call, or a reason."""
    kind = type(base)
    if kind in _BNB_TYPES:
        weight = bnb.read_weight(base, x)
        if isinstance(weight, str):
            return weight
        return bnb.compute_input(base, x), weight, base.bias
    if kind is NF4Linear:
        return x, base.nf4, base.bias

    weight, bias = base.weight, base.bias
    reason = unusual_tensor("base weight", weight)
    if reason is not None:
        return reason
    if weight.requires_grad and torch.is_grad_enabled():
        return "base weight is trained"
    dtype = weight.dtype
    same = x.dtype is dtype and (bias is None or bias.dtype is dtype)
    if dtype not in _DTYPES or not (same or (autocast and x.dtype in _DTYPES)):
        return f"input is {x.dtype}, base weight is {dtype}"
    return x, weight.t() if kind is Conv1D else weight, bias


def _unfused(
    A: Tensor, B: Tensor, x: Tensor, base_dtype: torch.dtype, autocast: bool, cast_input: bool
) -> str | None:
    """Why one op for the base and the first adapter would not compute what PEFT computes."""
    dtype, x_dtype = A.dtype, x.dtype
    if B.dtype is not dtype or dtype not in _DTYPES:
        return f"lora_A is {dtype}, lora_B is {B.dtype}"
    if autocast:
        exact = (x_dtype, torch.float32, torch.get_autocast_dtype(x.device.type))
        return None if base_dtype in exact else f"base computes in {base_dtype} under autocast"
    if x_dtype is not base_dtype:
        return f"adapter input is {x_dtype}, base computes in {base_dtype}"
    if dtype is not x_dtype and (dtype is not torch.float32 or not cast_input):
        return f"adapter is {dtype}, its input {x_dtype}"
    return None
