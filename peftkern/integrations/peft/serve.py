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

import warnings
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
from torch.nn.modules import module as nn_module
from transformers.pytorch_utils import Conv1D

from peftkern.backends import dispatch
from peftkern.formats.nf4 import ArgumentError, NF4Weight
from peftkern.functional import lora_linear, nf4_linear, nf4_lora_linear
from peftkern.functional.dora import dora_linear, dora_norm
from peftkern.integrations.peft.tensors import (
    parameter,
    refusal,
    unusual_call,
    unusual_input,
    unusual_tensor,
)
from peftkern.layers import NF4Linear

_BNB_TYPES: tuple[type, ...] = ()
if is_bnb_4bit_available():
    from peft.tuners.lora.bnb import Linear4bit

    from peftkern.integrations.peft import bitsandbytes as bnb

    _BNB_TYPES = bnb.LINEAR_TYPES

_DENSE_CPU_MINIMUM = dispatch.DENSE_CPU_MINIMUM
# Values of a dense weight from which DoRA is faster here (bench/bench_dora.py): below, PEFT is.
_DORA_CPU_MINIMUM = 1 << 17
_USUAL_ROWS = 512  # below which a dense layer that does not pay is worth a word in the report
_DENSE = (nn.Linear, Conv1D)
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_BASES = frozenset((*_BNB_TYPES, *_DENSE, NF4Linear))
Adapter = tuple[Tensor, Tensor, nn.Module, Tensor | None]  # lora_A, lora_B, dropout, lora_B's bias
Base = tuple[Tensor, Tensor | NF4Weight, Tensor | None]  # x as the base takes it, weight, bias


class PatchedLayer:
    """What patched classes share, each a subclass of PEFT's class `original`."""

    original: type
    op: str  # under which a fallback is counted

    def __init_subclass__(cls) -> None:
        cls.__name__ = cls.original.__name__  # what repr shows; pickle goes by __qualname__

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if not isinstance(self, PatchedLayer):  # a hook has kept this method over `unpatch`
            return type(self).forward(self, x, *args, **kwargs)
        served = serve(self, x, args, kwargs)
        if isinstance(served, Tensor):
            return served
        dispatch.record_fallback(self.op, served)
        return self.original.forward(self, x, *args, **kwargs)


class PatchedLinear(PatchedLayer, lora.Linear):
    """PEFT's `lora.Linear` with the base layer and its first adapter as one op."""

    original, op = lora.Linear, "lora_linear"

    def _add_adapter(self, result: Tensor, x: Tensor, name: str) -> tuple[Tensor, Tensor]:
        x = self._cast_input_dtype(x, self.lora_A[name].weight.dtype)
        output = self.lora_B[name](self.lora_A[name](self.lora_dropout[name](x)))
        return result + output * self.scaling[name], x


if is_bnb_4bit_available():

    class PatchedLinear4bit(PatchedLayer, Linear4bit):
        """PEFT's `lora.Linear4bit` with the base layer and its first adapter as one op.

        PEFT merges by quantizing anew, and what it subtracts from that later is not what was there
        before: the frozen weight is kept while adapters are merged, and `unmerge` puts it back.
        """

        original, op = Linear4bit, "nf4_lora_linear"

        def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
            with bnb.rewriting:
                base = self.get_base_layer()
                kept = self.__dict__.get("frozen_weight") if self.merged else None
                frozen = bnb.FrozenWeight(base)
                try:
                    # Autograd saves no weight that was made in inference mode.
                    with torch.inference_mode(False), torch.no_grad():
                        super().merge(safe_merge, adapter_names)
                finally:
                    frozen.mark_quantized()
                    if kept is None or kept.replaced(frozen.weight):
                        kept = frozen
                    if self.merged:
                        kept.expect(base.weight)
                        self.__dict__["frozen_weight"] = kept

        def unmerge(self) -> None:
            with bnb.rewriting:  # of several threads the first restores, the others find it done
                base = self.get_base_layer()
                frozen = self.__dict__.pop("frozen_weight", None)
                if frozen is None or not self.merged or frozen.replaced(base.weight):
                    super().unmerge()
                    return
                frozen.restore(base)
                for name in self.merged_adapters:
                    self._caches.pop(f"{name}-weight_norm", None)  # of DoRA
                self.merged_adapters.clear()

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
    from peftkern.integrations.peft import adalora

    return {**_SWAPS, **adalora.SWAPS}


@dataclass
class PatchReport:
    """What `patch` did.

    patched: names of the layers that run peftkern's forward now, those of an earlier call included.
    skipped: {name: reason} of PEFT layers that were left alone.
    falling_back: {name: reason} of patched layers whose present state sends them to PEFT's forward;
        it is looked at again at every call.
    kinds: how many layers of each PEFT class were patched.
    without_adapter: names of bitsandbytes' layers with no patched adapter that are served as well.
    small: {name: rows} of patched dense layers on a CPU that PEFT computes as fast below so many
        rows (batch times sequence), if those are more than 512; 0 for any number of them.
    backends: {device type: what serves there}.
    warnings: what the user should put right; `patch` gives them as warnings, too.
    """

    patched: list[str] = field(default_factory=list)
    skipped: dict[str, str] = field(default_factory=dict)
    falling_back: dict[str, str] = field(default_factory=dict)
    kinds: Counter[str] = field(default_factory=Counter)
    without_adapter: list[str] = field(default_factory=list)
    small: dict[str, int] = field(default_factory=dict)
    backends: dict[str, str] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)

    def as_dict(self) -> dict[str, Any]:
        """The fields as lists, dictionaries, strings and integers, fit for json.dumps."""
        return {
            "patched": list(self.patched),
            "skipped": dict(self.skipped),
            "falling_back": dict(self.falling_back),
            "kinds": dict(self.kinds),
            "without_adapter": list(self.without_adapter),
            "small": dict(self.small),
            "backends": dict(self.backends),
            "warnings": list(self.warnings),
        }

    def __str__(self) -> str:
        if self.patched or self.skipped:
            text = f"{len(self.patched)} patched"
            if self.kinds:
                text += f" ({_counts(self.kinds)})"
            text += f", {len(self.skipped)} skipped"
            if self.skipped:
                text += f": {_counts(Counter(self.skipped.values()))}"
        else:
            text = "0 patched: the model has no PEFT adapter layers"
        if self.without_adapter:
            text += f"; {len(self.without_adapter)} 4-bit layers without an adapter served, too"
        if self.falling_back:
            reasons = _counts(Counter(self.falling_back.values()))
            text += f"; {len(self.falling_back)} of the patched fall back for now: {reasons}"
        if self.small:
            rows = max(self.small.values())
            pays = f"from {rows:,} rows (batch x sequence) on" if rows else "in none of them"
            text += f"; {len(self.small)} are small dense layers: kernels pay {pays}"
        for device, backend in self.backends.items():
            text += f"; on {device}: {backend}"
        for warning in self.warnings:
            text += f"; WARNING: {warning}"
        return text


def patch(model: nn.Module) -> PatchReport:
    """Make the LoRA and AdaLoRA layers of a PEFT model run on peftkern, in place and reversibly.

    Takes a PeftModel, the model inside it, any module that holds LoRA layers, or one such layer.
    Layers that are patched already stay so. Layers that PEFT adds later (an adapter with new target
    modules) need another call. bitsandbytes' 4-bit layers inside it are swapped, too, so that none
    of them is repacked for its CPU inference. While adapters are merged into a 4-bit weight, the
    frozen one is kept beside it.

    Raises: TypeError if `model` is not a torch.nn.Module.
    """
    from peftkern.integrations.peft import adalora

    report = PatchReport()
    swaps = _swaps()
    originals = {patched: original for original, patched in swaps.items()}
    bases = set()
    for name, module in _adapter_layers(model):
        kind = type(module)
        original = originals.get(kind, kind)
        if original not in swaps:
            report.skipped[name] = f"{_label(kind)} has no kernel"
            continue
        if kind is original and not _drop_own_forward(module):
            report.skipped[name] = "forward is replaced on the instance (accelerate's hooks?)"
            continue
        module.__class__ = swaps[original]
        adalora.freeze_ranknum(module)
        report.patched.append(name)
        report.kinds[_label(original)] += 1
        bases.add(module._modules["base_layer"])
    for name, module in model.named_modules():
        if adalora.patch_model(module):
            report.patched.append(name)
            report.kinds["adalora.AdaLoraModel"] += 1
        if _BNB_TYPES and bnb.patch_base(module) and module not in bases and bnb.is_served(module):
            report.without_adapter.append(name)
    _describe(model, report)
    for warning in report.warnings:
        warnings.warn(warning, stacklevel=3)
    return report


def unpatch(model: nn.Module) -> list[str]:
    """Give every patched layer its own class back; returns the names of the adapter layers.

    Raises: TypeError if `model` is not a torch.nn.Module.
    """
    from peftkern.integrations.peft import adalora

    restored = []
    originals = {patched: original for original, patched in _swaps().items()}
    for name, module in _adapter_layers(model):
        original = originals.get(type(module))
        if original is not None:
            module.__class__ = original
            module.__dict__.pop("frozen_weight", None)
            restored.append(name)
    for name, module in model.named_modules():
        if adalora.unpatch_model(module):
            restored.append(name)
        if _BNB_TYPES:
            bnb.unpatch_base(module)
    return restored


def _drop_own_forward(layer: nn.Module) -> bool:
    """Whether calling the layer calls its class's forward, once what hooks left behind is gone."""
    own = layer.__dict__.get("forward")
    if own is None:
        return True
    if getattr(own, "__self__", None) is not layer:
        return False
    if own.__func__ not in (type(layer).forward, PatchedLayer.forward):
        return False
    del layer.forward  # accelerate's remove_hook_from_module puts the method there
    return True


def _describe(model: nn.Module, report: PatchReport) -> None:
    """Fill in what the patched layers would do now, and where."""
    devices = set()
    for name in report.patched:
        layer = model.get_submodule(name)
        if not isinstance(layer, PatchedLayer):
            continue
        reason = _reason_now(layer)
        if reason is not None:
            report.falling_back[name] = reason
        base = layer.get_base_layer()
        device = base.weight.device
        devices.add(device.type)
        if device.type == "cpu" and type(base) in _DENSE:
            rows = _rows_to_pay(layer)
            if rows == 0 or rows > _USUAL_ROWS:
                report.small[name] = rows
    for kind in sorted(devices - {"meta"}):
        report.backends[kind], missing = dispatch.serving(torch.device(kind))
        if missing is not None:
            report.warnings.append(f"{report.backends[kind]} serves: {missing}")


def _reason_now(layer: Any) -> str | None:
    """Why a patched layer would go to PEFT whatever its input, as it is now."""
    names = _active_names(layer)
    reason = _unusual_state(layer, names)
    base = layer._modules["base_layer"]
    if reason is None and type(base) in _BNB_TYPES:
        try:
            NF4Weight.from_bitsandbytes(base.weight)
        except ArgumentError as error:
            reason = str(error)
    if reason is None and type(base) in _DENSE:
        reason = _switched_off(layer)
    if reason is None and names:
        adapter = _read_adapter(layer, names)
        reason = adapter if isinstance(adapter, str) else None
    return reason


def _rows_to_pay(layer: Any) -> int:
    """Rows from which `_is_small` says no; 0 if there is no such number."""
    K, N = layer.in_features, layer.out_features
    if layer.lora_variant:
        return 1 if N * K >= _DORA_CPU_MINIMUM else 0
    return max(-(-_DENSE_CPU_MINIMUM // max(K + N, 1)), 1)


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


def serve(layer: Any, x: Tensor, args: tuple, kwargs: dict) -> Tensor | str:
    """The layer's output, or why PEFT's forward has to give it. Nothing is changed in that case.

    Raises: TruncatedWeightError, where bitsandbytes would read on.
    """
    if args or kwargs:
        given = sorted(k for k, v in kwargs.items() if v is not None)
        if args or given:
            return f"extra arguments: {', '.join(given) or 'positional'}"
    if _is_small(layer, x):  # asked first: to such a product every check is a loss
        return "small dense product: PEFT's own operations are as fast"
    names = _active_names(layer)
    reason = _unusual_state(layer, names) or unusual_input(x) or unusual_call()
    if reason is not None:
        return reason
    adapter = _read_adapter(layer, names) if names else None
    if isinstance(adapter, str):
        return adapter
    if not (x.is_cpu or torch.compiler.is_compiling()):  # in a graph, the op itself falls back
        unserved = dispatch.unserved(x.device)
        if unserved is not None and dispatch.forced_backend() is None:
            return unserved
    autocast = torch.is_autocast_enabled(x.device.type)
    base_layer = layer._modules["base_layer"]
    base = _read_base(base_layer, x, autocast)
    if isinstance(base, str):
        return base
    unfused = "no active adapter"
    if names:
        A, B = adapter[:2]
        unfused = _unfused(A, B, x, base[0].dtype, autocast, layer.cast_input_dtype_enabled)
    if unfused is None and _is_slower(layer, names[0], A, base):
        return "PEFT's own operations measured faster for this shape"

    off = _switched_off(layer)
    try:
        if off is not None:
            result = _base_alone(layer, names, adapter, base, unfused is None)
            names = []
        elif unfused is None:
            result = _with_first(layer, names[0], adapter, base)
        else:
            result = _frozen(*base)
    except ArgumentError as error:  # before anything was computed: PEFT has its own word for it
        return refusal(error)
    if result is None:
        return off or unfused
    if type(base_layer) in _BNB_TYPES and result.dtype is not x.dtype:
        result = result.to(x.dtype)  # bitsandbytes returns its input's dtype
    out_dtype = result.dtype
    if names and unfused is None:
        if adapter[3] is not None:  # LoraConfig(lora_bias=True)
            result = result + adapter[3] * layer.scaling[names[0]]
        names = names[1:]
    for name in names:
        if name in layer.lora_variant:
            result, x = _add_dora(layer, result, x, name, *base[1:])
        else:
            result, x = layer._add_adapter(result, x, name)
    return result if result.dtype is out_dtype else result.to(out_dtype)


def _with_first(layer: Any, name: str, adapter: Adapter, base: Base) -> Tensor:
    """The base and its first adapter in one op."""
    base_x, weight, bias = base
    A, B, drop, _ = adapter
    A, scaling = _reader(layer).factor(layer, name, A)
    dropout_p = drop.p if drop.training and type(drop) is nn.Dropout else 0.0
    options = {"scaling": scaling, "bias": bias, "dropout_p": dropout_p}
    if name not in layer.lora_variant:
        linear = nf4_lora_linear if isinstance(weight, NF4Weight) else lora_linear
        return linear(base_x, weight, A, B, **options)
    if not layer.training:  # where DoRA's own forward looks
        options["dropout_p"] = 0.0
    return dora_linear(base_x, weight, A, B, _magnitude(layer, name).weight, **options)


def _frozen(x: Tensor, weight: Tensor | NF4Weight, bias: Tensor | None) -> Tensor | None:
    """The base alone, where it has no operation of torch's own."""
    return nf4_linear(x, weight, bias) if isinstance(weight, NF4Weight) else None


def _base_alone(
    layer: Any, names: list[str], adapter: Adapter | None, base: Base, fused: bool
) -> Tensor | None:
    """The base of a layer whose adapters are switched off, in the bits of an update of zero.

    On a CPU the product without an update has them. Elsewhere that depends on the kernel, so that
    the update is made zero. DoRA agrees to rounding only: its magnitude is PEFT's norm, and it is
    divided by ours.
    """
    base_x, weight, bias = base
    if not fused or dispatch.runs_on_cpu(base_x) or not _is_plain(layer, names[0]):
        return _frozen(*base)
    linear = nf4_lora_linear if isinstance(weight, NF4Weight) else lora_linear
    A, B = (factor.detach() for factor in adapter[:2])
    options = {"scaling": layer.scaling[names[0]], "bias": bias}
    return linear(base_x, weight, A, torch.zeros_like(B), **options)


def _is_plain(layer: Any, name: str) -> bool:
    """Whether an adapter is LoRA and nothing more: neither DoRA nor AdaLoRA."""
    return _reader(layer) is LoRAReader and name not in layer.lora_variant


def _is_slower(layer: Any, name: str, A: Tensor, base: Base) -> bool:
    """Whether PEFT was measured faster for this shape; see `dispatch.is_slower`."""
    if torch.compiler.is_compiling() or not _is_plain(layer, name):
        return False
    x, weight, _ = base
    op = "nf4_lora_linear" if isinstance(weight, NF4Weight) else "lora_linear"
    return dispatch.is_slower(op, x, tuple(weight.shape), A.shape[0], layer.training)


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
    if layer.disable_adapters and layer.merged:
        return "adapters are merged and disabled"  # PEFT's forward takes them out of the weight
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


def _switched_off(layer: Any) -> str | None:
    """Why the layer gives what its base gives, though it may have active adapters."""
    if layer.disable_adapters:
        return "adapters are disabled"
    return "adapters are merged" if layer.merged else None


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
        A, B = parameter(lora_A, "weight"), parameter(lora_B, "weight")
        reason = unusual_tensor("lora_A", A) or unusual_tensor("lora_B", B)
        if reason is None:
            biased = parameter(lora_A, "bias") is not None
            reason = "lora_A has a bias" if biased else unusual_dropout(drop)
        return (A, B, drop, parameter(lora_B, "bias")) if reason is None else reason

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


def _read_base(base: nn.Module, x: Tensor, autocast: bool) -> Base | str:
    """The base as it is at this call, or why it has to be called."""
    kind = type(base)
    if kind in _BNB_TYPES:
        weight = bnb.read_weight(base, x)
        if isinstance(weight, str):
            return weight
        return bnb.compute_input(base, x), weight, parameter(base, "bias")
    if kind is NF4Linear:
        return x, base.nf4, base.bias

    weight, bias = parameter(base, "weight"), parameter(base, "bias")
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
