"""Methods of parameter-efficient fine-tuning on the kernels of this package, a module for each.

    from peftkern.methods import LoRAProAdamW

Names are looked up when they are first used; importing this package imports none of them.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from peftkern.layers.dora import DoRALinear
    from peftkern.methods.adalora import BudgetSchedule, RankAllocator
    from peftkern.methods.delta_lora import DeltaLoRALinear, DeltaLoRAScheduler, InPlaceDeltaLoRA
    from peftkern.methods.dylora import DyLoRALinear, sample_rank, set_rank
    from peftkern.methods.longlora import shifted_sparse_attention
    from peftkern.methods.lora_fa import LoRAFAOptimizer, freeze_lora_A, lora_fa_gradients
    from peftkern.methods.lora_pro import LoRAProAdamW, lora_pro_gradients, lora_pro_hook
    from peftkern.methods.quantum_peft import QuantumPEFTLinear, orthonormal_columns
    from peftkern.methods.rank_budget import RankBudget, RankLimits
    from peftkern.methods.rosa import RoSALinear, RoSAScheduler, density_report

_MODULE_OF = {
    "BudgetSchedule": "adalora",
    "DeltaLoRALinear": "delta_lora",
    "DeltaLoRAScheduler": "delta_lora",
    "DyLoRALinear": "dylora",
    "InPlaceDeltaLoRA": "delta_lora",
    "LoRAFAOptimizer": "lora_fa",
    "LoRAProAdamW": "lora_pro",
    "QuantumPEFTLinear": "quantum_peft",
    "RankAllocator": "adalora",
    "RankBudget": "rank_budget",
    "RankLimits": "rank_budget",
    "RoSALinear": "rosa",
    "RoSAScheduler": "rosa",
    "density_report": "rosa",
    "freeze_lora_A": "lora_fa",
    "lora_fa_gradients": "lora_fa",
    "lora_pro_gradients": "lora_pro",
    "lora_pro_hook": "lora_pro",
    "orthonormal_columns": "quantum_peft",
    "sample_rank": "dylora",
    "set_rank": "dylora",
    "shifted_sparse_attention": "longlora",
}
__all__ = sorted(["DoRALinear", *_MODULE_OF])


def __getattr__(name: str) -> Any:
    if name == "DoRALinear":  # a layer without a policy
        return importlib.import_module("peftkern.layers.dora").DoRALinear
    if name in _MODULE_OF:
        return getattr(importlib.import_module(f"{__name__}.{_MODULE_OF[name]}"), name)
    if name in _MODULE_OF.values():
        return importlib.import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, *_MODULE_OF.values()})
