"""The kernel "peftkern" of LLaMA-Factory's v1, registered when this module is imported.

kernel_config:
  name: auto,peftkern
  exclude: [lm_head]
"""

from __future__ import annotations

from typing import Any

from llamafactory.v1.plugins.model_plugins.kernels.base import BaseKernel, KernelPlugin
from llamafactory.v1.utils.logging import get_logger
from torch import nn

from peftkern.integrations.peft import patch

__all__ = ["PeftKernKernel"]
logger = get_logger(__name__)
_OPTIONS = ("include", "exclude", "strict")  # of `patch`; kernels share one configuration


@KernelPlugin("peftkern").register()
class PeftKernKernel(BaseKernel):
    """Kernel that patches the model, as `peftkern.patch`, once LLaMA-Factory made the adapter."""

    @staticmethod
    def check_device() -> None:
        """Accept every device: PEFT computes what peftkern does not serve there."""

    @staticmethod
    def _apply(**kwargs: Any) -> nn.Module:
        model, config = kwargs["model"], kwargs.get("config") or {}
        report = patch(model, **{name: config[name] for name in _OPTIONS if name in config})
        logger.info_rank0(f"peftkern: {report}")
        return model
