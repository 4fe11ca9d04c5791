"""Kernels for parameter-efficient fine-tuning: low-rank updates over dense and NF4 weights.

    model = get_peft_model(base, LoraConfig(...))
    report = peftkern.patch(model)

Importing this package imports nothing, torch not either: each name below brings its module when it
is first used, and what needs peft, transformers, bitsandbytes or triton imports them then. The ops
`torch.ops.peftkern.*` exist from the first use on, or from `import peftkern.functional`.
"""

from __future__ import annotations

import functools
import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from peftkern.backends.counts import on_fallback, reset_stats, stats
    from peftkern.backends.device import BackendUnavailableError
    from peftkern.backends.dispatch import use_backend
    from peftkern.formats.block_weight import BlockWeight
    from peftkern.formats.nf4 import NF4Weight
    from peftkern.functional.block_formats import quantize_int4, quantize_mxfp4, quantize_nvfp4
    from peftkern.functional.explain import explain
    from peftkern.functional.grouped_linear import grouped_lora_linear, route
    from peftkern.functional.lora_experts import ExpertLinear, lora_experts
    from peftkern.functional.lora_linear import lora_linear
    from peftkern.functional.nf4 import dequantize, dequantize_nf4, quantize_fp4, quantize_nf4
    from peftkern.functional.nf4_lora_linear import nf4_linear, nf4_lora_linear
    from peftkern.integrations.parts import LoRAParts
    from peftkern.integrations.peft.adalora_export import export_lora
    from peftkern.integrations.peft.adapter_tools import add_weighted_adapter
    from peftkern.integrations.peft.initialize import InitReport, initialize_
    from peftkern.integrations.peft.patch import is_patched, patch, patched, unpatch
    from peftkern.integrations.peft.register import register_layer
    from peftkern.integrations.peft.report import PatchReport
    from peftkern.integrations.peft.to_lora import convert_to_lora
    from peftkern.integrations.quantize import quantize_

__version__ = "0.1.0"
__all__ = [
    "BackendUnavailableError",
    "BlockWeight",
    "ExpertLinear",
    "InitReport",
    "LoRAParts",
    "NF4Weight",
    "PatchReport",
    "add_weighted_adapter",
    "convert_to_lora",
    "dequantize",
    "dequantize_nf4",
    "explain",
    "export_lora",
    "grouped_lora_linear",
    "initialize_",
    "is_patched",
    "lora_experts",
    "lora_linear",
    "nf4_linear",
    "nf4_lora_linear",
    "on_fallback",
    "patch",
    "patched",
    "quantize_",
    "quantize_fp4",
    "quantize_int4",
    "quantize_mxfp4",
    "quantize_nf4",
    "quantize_nvfp4",
    "register_layer",
    "reset_stats",
    "route",
    "stats",
    "unpatch",
    "use_backend",
]


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
    "BlockWeight": "formats.block_weight",
    "LoRAParts": "integrations.parts",
    "NF4Weight": "formats.nf4",
    "on_fallback": "backends.counts",
    "quantize_": "integrations.quantize",
    "reset_stats": "backends.counts",
    "stats": "backends.counts",
    "use_backend": "backends.dispatch",
}
_OF_PEFT = {  # which PEFT has to be there for
    "InitReport": "initialize",
    "PatchReport": "report",
    "add_weighted_adapter": "adapter_tools",
    "convert_to_lora": "to_lora",
    "initialize_": "initialize",
    "export_lora": "adalora_export",
    "is_patched": "patch",
    "patch": "patch",
    "patched": "patch",
    "register_layer": "register",
    "unpatch": "patch",
}


def __getattr__(name: str) -> Any:
    if name in _MODULES or name in _FLOORS:
        return importlib.import_module(f"peftkern.{name}")
    if name not in __all__:
        raise AttributeError(f"module 'peftkern' has no attribute {name!r}")
    if name not in _OF_PEFT:
        home = importlib.import_module(f"peftkern.{_HOMES.get(name, 'functional')}")
        return globals().setdefault(name, getattr(home, name))
    from peftkern.integrations.packages import needed_by

    try:
        with needed_by(f"peftkern.{name}"):
            home = importlib.import_module(f"peftkern.integrations.peft.{_OF_PEFT[name]}")
    except ImportError as error:
        return functools.partial(_raise, error)  # who only looks at all names needs no PEFT
    return globals().setdefault(name, getattr(home, name))


def _raise(error: ImportError, *args: Any, **kwargs: Any) -> None:
    raise error


def __dir__() -> list[str]:
    """List the public names, for completion."""
    return sorted([*__all__, *_MODULES, *(name for name in globals() if name.startswith("__"))])
