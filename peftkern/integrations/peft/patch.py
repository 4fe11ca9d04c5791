"""Class swaps that drop peftkern into a PEFT model, and undo it.

`patch` gives every layer whose class is exactly one of PEFT's `lora.Linear`, `lora.Linear4bit`,
`lora.ParamWrapper`, `adalora.SVDLinear` or `adalora.SVDLinear4bit` a subclass of that class in
which `forward` alone differs, so keys, saving, loading, merging and adapter switching stay PEFT's
own code; but for merging over NF4 weights of peftkern's own, to which PEFT cannot add. Layers of
other classes are swapped if those were registered (`register_layer`).
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Collection, Iterable, Iterator
from typing import Any, NamedTuple

import torch
from peft.tuners.adalora.layer import AdaLoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from peftkern.backends import dispatch, trust
from peftkern.integrations.frozen_experts import (
    is_serving,
    nf4_experts,
    serve_nf4_experts,
    stop_serving,
)
from peftkern.integrations.peft import (
    adalora,
    adalora_compact,
    engines,
    experts,
    other_bases,
    read_check,
    trial,
)
from peftkern.integrations.peft.adalora_layers import freeze_ranknum
from peftkern.integrations.peft.bypass import FirstForward, bypassed
from peftkern.integrations.peft.fallback import (
    PatchedForward,
    kept_forward,
    own_class,
    set_class,
)
from peftkern.integrations.peft.own_layers import UNCHECKED, OwnLayer
from peftkern.integrations.peft.register import SWAPS
from peftkern.integrations.peft.report import PatchReport, counted
from peftkern.integrations.peft.serve import BNB_TYPES
from peftkern.layers.names import Chosen, shortened
from peftkern.layers.quantize import level_of_the_caller

if BNB_TYPES:
    from peftkern.integrations.peft import bitsandbytes as bnb

__all__ = ["PatchReport", "is_patched", "patch", "patched", "unpatch"]

_USUAL_ROWS = 512  # below which a dense layer that does not pay is worth a word in the report
_NAMED = 5  # layers that an error names
_INFERENCE_ONLY = ("Mxfp4GptOssExperts",)  # by name: transformers makes them where kernels are


class _Plan(NamedTuple):
    """Modules that change their class, and the report so far.

    swaps: adapter layers by name, with the class that each gets. inner: wrappers inside one of
    them. bases: bitsandbytes' layers. tuners: AdaLoRA models. unchecked: registered layers without
    an adapter to check. stacks: whether NF4 experts are served.
    """

    swaps: dict[str, tuple[nn.Module, type]]
    inner: list[nn.Module]
    bases: list[nn.Module]
    tuners: list[nn.Module]
    unchecked: list[nn.Module]
    stacks: bool
    report: PatchReport


def patch(
    model: nn.Module,
    *,
    include: Iterable[str] | None = None,
    exclude: Iterable[str] | None = None,
    dry_run: bool = False,
    strict: bool = False,
    release: bool = False,
) -> PatchReport:
    """Make the LoRA and AdaLoRA layers of a PEFT model run on peftkern, in place and reversibly.

    Takes a PeftModel, the model inside it, any module that holds LoRA layers, or one such layer.
    Layers that are patched already stay so. Layers that PEFT adds later (an adapter with new target
    modules) need another call. bitsandbytes' 4-bit layers inside it are swapped, too, so that none
    of them is repacked for its CPU inference. While adapters are merged into a 4-bit weight, or
    experts in NF4, the frozen one is kept beside it.

    What fused kernels of Axolotl, Unsloth and the like read past its layer is named in the report,
    with a warning. So is, once the model was called, that no layer was.

    Args:
        include: only layers whose name in `model` has one of these as consecutive dotted parts
            ("q_proj", "layers.0", "self_attn.q_proj"), as in `quantize_`; None takes all.
        exclude: never those whose name has one of these.
        dry_run: change nothing; the report tells what would be patched, and why the rest not.
        strict: raise if a layer with an adapter that include and exclude leave in would not be
            served; then nothing has changed.
        release: let layers of HQQ, GPT-QModel and torchao whose codes are packed anew go without
            their own, which would take as much memory again. Whatever reads them, a state dict
            too, gets them bit for bit; `unpatch` puts them back, and has to come before the model
            moves to another device.

    NF4 experts without an adapter are served all if one of them is chosen.

    Returns: the report; `print` shows it in one line.
    Raises: TypeError if `model` is not a torch.nn.Module, or include or exclude is a string;
        ValueError if an entry of `include` is in no name, or `strict` and naming layers that would
        not be served.
    """
    plan = _plan(model, Chosen.of(include, exclude))
    report = plan.report
    report.dry_run = dry_run
    if not (dry_run or strict):
        _swap(model, plan)
    _describe(model, plan)
    if strict:
        _refuse(report.unserved)
    if strict and not dry_run:
        _swap(model, plan)
    if release and not dry_run:
        for module, _ in plan.swaps.values():
            if isinstance(module, other_bases.OtherBase):
                other_bases.release(module)
    if report.patched and not (dry_run or report.bypassed):
        FirstForward.watch(model)
    for warning in report.warnings:
        warnings.warn(warning, stacklevel=level_of_the_caller())
    return report


def unpatch(model: nn.Module) -> list[str]:
    """Give every patched layer its own class back; returns the names of the adapter layers.

    AdaLoRA's layers that were compacted have init_r triplets again, those that were dropped as
    zeros. Layers that are merged over NF4 weights of peftkern's own keep those from before, which
    PEFT cannot take its adapters out of: a warning names them, and `patch` finds those weights
    again. Units of FSDP2 stay units.
    Raises: TypeError if `model` is not a torch.nn.Module; ValueError for layers that were compacted
        and sharded since: then nothing has changed.
    """
    return _unpatch(model, keep=())


def is_patched(model: nn.Module) -> bool:
    """Return True if a layer, or any layer of a model, runs peftkern's forward.

    Raises: TypeError if `model` is not a torch.nn.Module.
    """
    return any(map(_is_ours, _modules(model)))


@contextlib.contextmanager
def patched(
    model: nn.Module,
    *,
    include: Iterable[str] | None = None,
    exclude: Iterable[str] | None = None,
    strict: bool = False,
) -> Iterator[PatchReport]:
    """Patch a model for the length of a `with` block, which gets the report.

    At its end, with an exception or not, what was patched before is patched, and nothing else.

    Args and raises: as `patch`.
    """
    before = {
        module: type(module)
        for module in _modules(model)
        if _is_ours(module) or is_serving(module) or FirstForward.watches(module)
    }
    trained = [
        (ranknum, ranknum.requires_grad)
        for module in model.modules()
        if isinstance(module, AdaLoraLayer)
        for ranknum in module.ranknum.values()
    ]
    try:
        yield patch(model, include=include, exclude=exclude, strict=strict)
    finally:
        _unpatch(model, keep=before)
        for module, kind in before.items():
            if type(module) is not kind:  # a wrapper that was the outermost
                set_class(module, kind)
        for ranknum, requires_grad in trained:
            ranknum.requires_grad_(requires_grad)


def _plan(model: nn.Module, chosen: Chosen) -> _Plan:
    """Find what to swap, without changing anything.

    Raises: ValueError if an entry of `include` is in no name.
    """
    plan, everything = _Plan({}, [], [], [], [], False, PatchReport()), chosen == Chosen(None, ())
    report, wrapped, names = plan.report, set(), []
    for name, module in _adapter_layers(model):
        names.append(name)
        if module in wrapped:  # a wrapper inside another one
            wrapped.add(module._modules["base_layer"])
            plan.inner.append(module)
            continue
        kind = own_class(module)
        original = _original(kind)
        against = chosen.reason_against(name) if kind is original else None
        if against is not None:
            report.left_out[name] = against
        elif original not in SWAPS:
            report.skipped[name] = f"{_label(kind)} has no kernel"
        elif kind is original and kept_forward(module) is None:
            report.skipped[name] = "forward is replaced on the instance"
        elif kind is original and SWAPS[original].own_forward is not original.forward:
            report.skipped[name] = "forward is replaced on the class"
        elif (wrong := _other_parts(module, SWAPS[original], plan)) is not None:
            report.skipped[name] = wrong
        else:
            plan.swaps[name] = module, SWAPS[original]
            report.patched.append(name)
            report.kinds[_label(original)] += 1
            inside = module._modules.get("base_layer")
            wrapped.update(module.children() if inside is None else (inside,))
    for name, module in model.named_modules():
        if adalora.is_tuner(module) and (everything or _has_svd(plan)):
            plan.tuners.append(module)
            report.patched.append(name)
            report.kinds["adalora.AdaLoraModel"] += 1
        if type(module) in BNB_TYPES:
            names.append(name)
            if chosen.reason_against(name) is None:
                plan.bases.append(module)
                if module not in wrapped and bnb.runs_kernel(module):
                    report.without_adapter.append(name)
    stacks = list(nf4_experts(model))
    unknown = chosen.unknown(names + stacks)
    if unknown is not None:
        raise ValueError(f"include: no layer with an adapter has {unknown!r} in its name")
    served = any(chosen.reason_against(name) is None for name in stacks)
    if served:
        report.without_adapter += [n for n in stacks if model.get_submodule(n) not in wrapped]
    return plan._replace(stacks=served)


def _other_parts(module: nn.Module, kind: type, plan: _Plan) -> str | None:
    """Return how a registered layer differs from its parts; None of one that is patched already."""
    if own_class(module) is kind or not issubclass(kind, OwnLayer):
        return None
    try:
        if not read_check.has_adapter(module, kind.read_parts):
            plan.unchecked.append(module)
            return None
    except read_check.WrongPartsError as error:
        return str(error)
    return read_check.disagreement(module, kind.original, kind.read_parts)


def _has_svd(plan: _Plan) -> bool:
    return any(isinstance(module, AdaLoraLayer) for module, _ in plan.swaps.values())


def _swap(model: nn.Module, plan: _Plan) -> None:
    """Do what was planned."""
    for module, kind in plan.swaps.values():
        set_class(module, kind)
        freeze_ranknum(module)
    for module in plan.unchecked:
        module.__dict__[UNCHECKED] = None
    for module in plan.inner:
        experts.patch_inner(module)
    for module in plan.tuners:
        adalora.patch_model(module)
    for module in plan.bases:
        bnb.patch_base(module)
    if plan.stacks:
        serve_nf4_experts(model)


def _unpatch(model: nn.Module, keep: Collection[nn.Module]) -> list[str]:
    """Undo `patch`, but for the modules to keep."""
    restored, merged = [], []
    for module in _modules(model):  # first, for it may refuse
        if module not in keep:
            adalora_compact.expand_(module)
    for name, module in _adapter_layers(model):
        kind = own_class(module)
        if module in keep or _original(kind) is kind:
            continue
        if "frozen_weight" in module.__dict__:
            if getattr(module, "four_bit", False):  # from which PEFT subtracts
                del module.frozen_weight
            else:
                merged.append(name)
        if isinstance(module, PatchedForward):
            restored.append(name)
        set_class(module, module.original)
        module.__dict__.pop(UNCHECKED, None)
    if merged:
        warnings.warn(
            f"{', '.join(merged)}: merged into 4-bit weights, which PEFT cannot undo: unmerge "
            "before `unpatch`, or `patch` again before `unmerge`",
            stacklevel=level_of_the_caller(),
        )
    below = {m.get_base_layer() for m in keep if isinstance(m, other_bases.OtherBase)}
    for name, module in model.named_modules():
        if module in keep or module in below:
            continue
        if adalora.unpatch_model(module):
            restored.append(name)
        if BNB_TYPES:
            bnb.unpatch_base(module)
        FirstForward.forget(module)
        other_bases.forget(module)
    stop_serving(model, keep)
    return restored


def _describe(model: nn.Module, plan: _Plan) -> None:
    """Fill in the state of the layers, as it is with their new classes, and what serves them."""
    report, devices, classes = plan.report, set(), set()
    if BNB_TYPES:
        bnb.read_quant_maps(model)
    for name, (module, kind) in plan.swaps.items():
        seen = _as(kind, module).outlook()
        devices.add(seen.device.type)
        if seen.reason is not None:
            report.falling_back[name] = seen.reason
        if seen.rows == 0 or seen.rows > _USUAL_ROWS:
            report.small[name] = seen.rows
        if seen.key is not None and seen.rows and dispatch.unserved(seen.device) is None:
            classes.add((seen.key, seen.device))
    if trust.mode() != "always" and dispatch.forced_backend() is None:
        report.unmeasured = sum(trial.unmeasured(*one) for one in classes)
    for kind in sorted(devices - {"meta"}):
        report.backends[kind], missing = dispatch.serving(torch.device(kind))
        if missing is not None:
            report.warnings.append(f"{report.backends[kind]} serves: {missing}")
    inference = sum(type(module).__name__ in _INFERENCE_ONLY for module in model.modules())
    if inference:
        report.warnings.append(
            f"{inference} modules of experts are laid out for kernels of transformers that have no "
            "gradients: what is below them learns wrongly"
        )
    names = {module: name for name, (module, _) in plan.swaps.items()}
    report.bypassed = {names[m]: by for m, by in bypassed(model) if m in names}
    if report.bypassed:
        report.warnings.append(
            f"{len(report.bypassed)} of the patched layers are never called, for fused kernels "
            f"read their weights: {counted(report.bypassed.values())}; switch those off for "
            "peftkern to serve the layers"
        )
    dense = engines.dense_experts(model)
    if dense is not None:
        report.warnings.append(dense)
    stored = bnb.in_bytes(model) if BNB_TYPES else 0
    if stored and engines.asks_for_fsdp(model):
        report.warnings.append(
            f"{stored} 4-bit weights are stored as uint8, which FSDP does not shard well: FSDP1 "
            "raises, accelerate leaves them whole on every device, and before it did, FSDP2 "
            "trained on wrong weights; load them with bnb_4bit_quant_storage=torch.bfloat16, or "
            "the dtype of mixed precision"
        )


def _as(kind: type, module: nn.Module) -> Any:
    """Return a module that shares all attributes and has another class."""
    twin = object.__new__(kind)
    object.__setattr__(twin, "__dict__", module.__dict__)
    return twin


def _refuse(unserved: dict[str, str]) -> None:
    """Raise the error of `strict` if there is a layer to name."""
    if not unserved:
        return
    said = [f"{name} ({reason})" for name, reason in unserved.items()]
    raise ValueError(
        f"strict: {len(unserved)} layers with an adapter would not be served, and nothing was "
        f"changed: {shortened(said, _NAMED)}"
    )


def _is_ours(module: nn.Module) -> bool:
    return isinstance(
        module, (PatchedForward, experts.InnerParamWrapper, adalora.PatchedAdaLoraModel)
    )


def _original(kind: type) -> type:
    """Return the class that a layer had before it was patched."""
    ours = issubclass(kind, (PatchedForward, experts.InnerParamWrapper))
    return kind.original if ours else kind


def _modules(model: nn.Module) -> Iterator[nn.Module]:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
    return model.modules()


def _adapter_layers(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    _modules(model)
    kinds = (BaseTunerLayer, *SWAPS)
    for name, module in model.named_modules():
        if isinstance(module, kinds):
            yield name, module


def _label(kind: type) -> str:
    """Name a class for the report: lora.Linear4bit for peft.tuners.lora.bnb.Linear4bit."""
    parts = kind.__module__.split(".")
    family = parts[2] if parts[:2] == ["peft", "tuners"] and len(parts) > 2 else parts[0]
    return f"{family}.{kind.__name__}"
