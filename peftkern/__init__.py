"""Kernels for parameter-efficient fine-tuning: low-rank updates over dense and NF4 weights.

    model = get_peft_model(base, LoraConfig(...))
    report = peftkern.patch(model)

Importing this package imports nothing, torch not either: each name below brings its module when it
is first used, and what needs peft, transformers, bitsandbytes or triton imports them then. The ops
`torch.ops.peftkern.*` exist from the first use on, or from `import peftkern.functional`.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterable
    from contextlib import AbstractContextManager
    from types import ModuleType

    from torch import nn

    from peftkern.backends.counts import on_fallback, reset_stats, stats
    from peftkern.backends.device import BackendUnavailableError
    from peftkern.backends.dispatch import use_backend
    from peftkern.formats.nf4 import NF4Weight
    from peftkern.functional import (
        ExpertLinear,
        dequantize_nf4,
        explain,
        grouped_lora_linear,
        lora_experts,
        lora_linear,
        nf4_linear,
        nf4_lora_linear,
        quantize_nf4,
        route,
    )
    from peftkern.integrations.peft.patch import PatchReport
    from peftkern.integrations.quantize import quantize_

__version__ = "0.1.0"
__all__ = [
    "BackendUnavailableError",
    "ExpertLinear",
    "NF4Weight",
    "dequantize_nf4",
    "explain",
    "grouped_lora_linear",
    "is_patched",
    "lora_experts",
    "lora_linear",
    "nf4_linear",
    "nf4_lora_linear",
    "on_fallback",
    "patch",
    "patched",
    "quantize_",
    "quantize_nf4",
    "reset_stats",
    "route",
    "stats",
    "unpatch",
    "use_backend",
]


def patch(
    model: nn.Module,
    *,
    include: Iterable[str] | None = None,
    exclude: Iterable[str] | None = None,
    dry_run: bool = False,
    strict: bool = False,
) -> PatchReport:
    """Make the LoRA layers of a PEFT model run on peftkern; see `peftkern.integrations.peft`."""
    options = {"include": include, "exclude": exclude, "dry_run": dry_run, "strict": strict}
    return _integration("patch").patch(model, **options)


def unpatch(model: nn.Module) -> list[str]:
    """Undo `patch` and name the layers; see `peftkern.integrations.peft`."""
    return _integration("unpatch").unpatch(model)


def is_patched(model: nn.Module) -> bool:
    """Return True if a layer, or any layer of a model, runs peftkern's forward."""
    return _integration("is_patched").is_patched(model)


def patched(
    model: nn.Module,
    *,
    include: Iterable[str] | None = None,
    exclude: Iterable[str] | None = None,
    strict: bool = False,
) -> AbstractContextManager[PatchReport]:
    """Patch a model for the length of a `with` block; see `peftkern.integrations.peft`."""
    options = {"include": include, "exclude": exclude, "strict": strict}
    return _integration("patched").patched(model, **options)


def _integration(function: str) -> ModuleType:
    from peftkern.integrations.packages import needed_by

    with needed_by(f"peftkern.{function}"):
        return importlib.import_module("peftkern.integrations.peft")


# What is imported when it is first accessed: modules, and public names that are not functional's.
_MODULES = (
    "adalora",
    "dora",
    "importance",
    "integrations",
    "layers",
    "low_rank_svd",
    "methods",
    "monitor",
    "sparse",
)
_FLOORS = ("backends", "formats", "functional")  # not for users, and therefore not listed
_HOMES = {
    "BackendUnavailableError": "backends.device",
    "NF4Weight": "formats.nf4",
    "on_fallback": "backends.counts",
    "quantize_": "integrations.quantize",
    "reset_stats": "backends.counts",
    "stats": "backends.counts",
    "use_backend": "backends.dispatch",
}


def __getattr__(name: str) -> Any:
    if name in _MODULES or name in _FLOORS:
        return importlib.import_module(f"peftkern.{name}")
    if name not in __all__:
        raise AttributeError(f"module 'peftkern' has no attribute {name!r}")
    home = importlib.import_module(f"peftkern.{_HOMES.get(name, 'functional')}")
    return globals().setdefault(name, getattr(home, name))


def __dir__() -> list[str]:
    """List the public names, for completion."""
    return sorted([*__all__, *_MODULES, *(name for name in globals() if name.startswith("__"))])
