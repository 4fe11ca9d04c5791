"""Hugging Face transformers: callbacks of the Trainer, LongLoRA's attention, 4-bit experts."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from peftkern.integrations.frozen_experts import serve_nf4_experts, stop_serving
    from peftkern.integrations.transformers.block_linear import BlockLinearConfig
    from peftkern.integrations.transformers.callbacks import (
        AdaLoraCallback,
        MonitorCallback,
        PeftKernCallback,
    )
    from peftkern.integrations.transformers.mxfp4_experts import MXFP4ExpertsConfig
    from peftkern.integrations.transformers.nf4_experts import NF4ExpertsConfig

__all__ = [
    "AdaLoraCallback",
    "BlockLinearConfig",
    "MXFP4ExpertsConfig",
    "MonitorCallback",
    "NF4ExpertsConfig",
    "PeftKernCallback",
    "serve_nf4_experts",
    "stop_serving",
]


# Modules that are imported when one of their names is first asked for: the callbacks need PEFT,
# the configs need transformers 5, and register a quantizer there.
_MODULES = {
    "AdaLoraCallback": "peftkern.integrations.transformers.callbacks",
    "BlockLinearConfig": "peftkern.integrations.transformers.block_linear",
    "MXFP4ExpertsConfig": "peftkern.integrations.transformers.mxfp4_experts",
    "MonitorCallback": "peftkern.integrations.transformers.callbacks",
    "NF4ExpertsConfig": "peftkern.integrations.transformers.nf4_experts",
    "PeftKernCallback": "peftkern.integrations.transformers.callbacks",
    "serve_nf4_experts": "peftkern.integrations.frozen_experts",
    "stop_serving": "peftkern.integrations.frozen_experts",
}


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return getattr(importlib.import_module(_MODULES[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
