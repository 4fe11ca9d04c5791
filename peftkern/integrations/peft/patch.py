"""Class swaps that drop peftkern into a PEFT model, and undo it.

`patch` gives every layer whose class is exactly one of PEFT's `lora.Linear`, `lora.Linear4bit`,
`lora.ParamWrapper`, `adalora.SVDLinear` or `adalora.SVDLinear4bit` a subclass of that class in
which `forward` alone differs, so keys, saving, loading, merging and adapter switching stay PEFT's
own code; but for merging over NF4 weights of peftkern's own, to which PEFT cannot add.
"""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from peftkern.backends import dispatch, trust
from peftkern.integrations.frozen_experts import serve_nf4_experts, stop_serving
from peftkern.integrations.peft import adalora, experts, lora, trial
from peftkern.integrations.peft.fallback import Fallback, kept_forward, set_class
from peftkern.integrations.peft.serve import (
    BNB_TYPES,
    DENSE_TYPES,
    Adapter,
    PatchedLayer,
    active_names,
    layer_key,
    read_state,
    rows_to_pay,
    switched_off,
)

if BNB_TYPES:
    from peftkern.integrations.peft import bitsandbytes as bnb

_SWAPS: dict[type, type] = {**lora.SWAPS, **adalora.SWAPS, **experts.SWAPS}  # {PEFT's class: ours}
_ORIGINALS = {patched: original for original, patched in _SWAPS.items()}
_USUAL_ROWS = 512  # below which a dense layer that does not pay is worth a word in the report


@dataclass
class PatchReport:
    """Report of what `patch` did.

    patched: names of the layers that run peftkern's forward now, those of an earlier call included;
        of the wrappers around one module of experts the outermost, which answers for all.
    skipped: {name: reason} of PEFT layers that were left alone.
    falling_back: {name: reason} of patched layers whose present state sends them to PEFT's forward;
        it is looked at again at every call.
    kinds: how many layers of each PEFT class were patched.
    without_adapter: names of bitsandbytes' layers, and of experts in NF4, with no patched adapter
        that are served as well.
    small: {name: rows} of patched dense layers on a CPU that PEFT computes as fast below so many
        rows (batch times sequence), if those are more than 512; 0 for any number of them.
    unmeasured: how many classes of patched layers (op, shape, rank, device) have no verdict yet.
    backends: {device type: what serves there}.
    warnings: what the user should put right; `patch` gives them as warnings, too.
    """

    patched: list[str] = field(default_factory=list)
    skipped: dict[str, str] = field(default_factory=dict)
    falling_back: dict[str, str] = field(default_factory=dict)
    kinds: Counter[str] = field(default_factory=Counter)
    without_adapter: list[str] = field(default_factory=list)
    small: dict[str, int] = field(default_factory=dict)
    unmeasured: int = 0
    backends: dict[str, str] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)

    def as_dict(self) -> dict[str, Any]:
        """Return the fields as lists, dictionaries, strings and integers, fit for json.dumps."""
        return {
            "patched": list(self.patched),
            "skipped": dict(self.skipped),
            "falling_back": dict(self.falling_back),
            "kinds": dict(self.kinds),
            "without_adapter": list(self.without_adapter),
            "small": dict(self.small),
            "unmeasured": self.unmeasured,
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
        if self.unmeasured:
            until = ": PEFT serves them"
            if trust.mode() != "off":
                until += " until each was tried (twice called)"
            text += f"; {_plural(self.unmeasured, 'class', 'classes')} unmeasured{until}"
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
    of them is repacked for its CPU inference. While adapters are merged into a 4-bit weight, or
    experts in NF4, the frozen one is kept beside it.

    Raises: TypeError if `model` is not a torch.nn.Module.
    """
    report = PatchReport()
    bases = set()
    for name, module in _adapter_layers(model):
        if module in bases:  # a wrapper inside another one
            bases.add(module._modules["base_layer"])
            experts.patch_inner(module)
            continue
        kind = type(module)
        original = _ORIGINALS.get(kind, kind)
        if original not in _SWAPS:
            report.skipped[name] = f"{_label(kind)} has no kernel"
            continue
        if kind is original and kept_forward(module) is None:
            report.skipped[name] = "forward is replaced on the instance"
            continue
        set_class(module, _SWAPS[original])
        adalora.freeze_ranknum(module)
        report.patched.append(name)
        report.kinds[_label(original)] += 1
        bases.add(module._modules["base_layer"])
    for name, module in model.named_modules():
        if adalora.patch_model(module):
            report.patched.append(name)
            report.kinds["adalora.AdaLoraModel"] += 1
        if BNB_TYPES and bnb.patch_base(module) and module not in bases and bnb.runs_kernel(module):
            report.without_adapter.append(name)
    for name in serve_nf4_experts(model):
        if model.get_submodule(name) not in bases:
            report.without_adapter.append(name)
    if BNB_TYPES:
        bnb.read_quant_maps(model)
    _describe(model, report)
    for warning in report.warnings:
        warnings.warn(warning, stacklevel=3)
    return report


def unpatch(model: nn.Module) -> list[str]:
    """Give every patched layer its own class back; returns the names of the adapter layers.

    Layers that are merged over NF4 weights of peftkern's own keep those from before, which PEFT
    cannot take its adapters out of: a warning names them, and `patch` finds those weights again.
    Raises: TypeError if `model` is not a torch.nn.Module.
    """
    restored, merged = [], []
    for name, module in _adapter_layers(model):
        original = _ORIGINALS.get(type(module))
        if original is None and type(module) is not experts.InnerParamWrapper:
            continue
        if "frozen_weight" in module.__dict__:
            if getattr(module, "four_bit", False):  # from which PEFT subtracts
                del module.frozen_weight
            else:
                merged.append(name)
        set_class(module, original or module.original)
        if original is not None:
            restored.append(name)
    if merged:
        warnings.warn(
            f"{', '.join(merged)}: merged into NF4 weights, which PEFT cannot undo: unmerge before "
            "`unpatch`, or `patch` again before `unmerge`",
            stacklevel=2,
        )
    for name, module in model.named_modules():
        if adalora.unpatch_model(module):
            restored.append(name)
        if BNB_TYPES:
            bnb.unpatch_base(module)
    stop_serving(model)
    return restored


def _describe(model: nn.Module, report: PatchReport) -> None:
    """Fill in the state of the patched layers and what serves their devices."""
    devices, classes = set(), set()
    for name in report.patched:
        layer = model.get_submodule(name)
        if isinstance(layer, experts.PatchedParamWrapper):
            device = layer.get_param().device
            devices.add(device.type)
            stack = experts.read_stack(layer, device)
            if isinstance(stack, Fallback):
                report.falling_back[name] = stack.reason
            elif dispatch.unserved(device) is None:
                classes.add((stack.key, device))
        if not isinstance(layer, PatchedLayer):
            continue
        base, names = layer.get_base_layer(), active_names(layer)
        device = base.weight.device
        state = read_state(layer, names, device)
        reason = _reason_now(layer, state)
        if reason is not None:
            report.falling_back[name] = reason
        devices.add(device.type)
        rows = 1
        if device.type == "cpu" and type(base) in DENSE_TYPES:
            rows = rows_to_pay(layer)
            if rows == 0 or rows > _USUAL_ROWS:
                report.small[name] = rows
        if reason is None and rows and dispatch.unserved(device) is None:
            classes.add((layer_key(layer, names, state), device))
    if trust.mode() != "always" and dispatch.forced_backend() is None:
        report.unmeasured = sum(trial.unmeasured(*one) for one in classes)
    for kind in sorted(devices - {"meta"}):
        report.backends[kind], missing = dispatch.serving(torch.device(kind))
        if missing is not None:
            report.warnings.append(f"{report.backends[kind]} serves: {missing}")


def _reason_now(layer: Any, state: Adapter | Fallback | None) -> str | None:
    """Return the reason for PEFT's forward whatever the input, as a patched layer is now."""
    if isinstance(state, Fallback):
        return state.reason
    base = layer._modules["base_layer"]
    if type(base) in BNB_TYPES:
        return bnb.unreadable(base)
    return switched_off(layer) if type(base) in DENSE_TYPES else None


def _adapter_layers(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
    for name, module in model.named_modules():
        if isinstance(module, BaseTunerLayer):
            yield name, module


def _label(kind: type) -> str:
    """Name a class for the report: lora.Linear4bit for peft.tuners.lora.bnb.Linear4bit."""
    parts = kind.__module__.split(".")
    family = parts[2] if parts[:2] == ["peft", "tuners"] and len(parts) > 2 else parts[0]
    return f"{family}.{kind.__name__}"


def _plural(count: int, one: str, many: str) -> str:
    return f"{count} {one if count == 1 else many}"


def _counts(counter: Counter[str]) -> str:
    return ", ".join(f"{what} {count}" for what, count in counter.most_common())
