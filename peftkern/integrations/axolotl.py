"""Axolotl: a plug-in that has the LoRA layers of a run served by peftkern.

plugins:
  - peftkern.integrations.axolotl.PeftKernPlugin
peftkern:
  exclude: [lm_head]
"""

from __future__ import annotations

import logging
from typing import Any

from axolotl.integrations.base import BasePlugin
from pydantic import BaseModel, ConfigDict
from torch import nn
from transformers import Trainer

from peftkern.integrations.peft import patch
from peftkern.integrations.transformers.callbacks import MonitorCallback, PeftKernCallback

__all__ = ["PeftKernArgs", "PeftKernOptions", "PeftKernPlugin"]
logger = logging.getLogger("peftkern")

# Axolotl's own kernels for LoRA. They read the weights of the layers and never call them.
FUSED = ("lora_mlp_kernel", "lora_qkv_kernel", "lora_o_kernel", "lora_embedding_kernel")


class PeftKernOptions(BaseModel):
    """Options below `peftkern:` in the YAML; all but `monitor` are those of `peftkern.patch`.

    monitor: file for the records of `MonitorCallback`, whose numbers also reach Axolotl's log.
    """

    model_config = ConfigDict(extra="forbid")

    include: list[str] | None = None
    exclude: list[str] | None = None
    strict: bool | None = None
    monitor: str | None = None


class PeftKernArgs(BaseModel):
    """Keys that the plug-in adds to Axolotl's configuration."""

    peftkern: PeftKernOptions | None = None


class PeftKernPlugin(BasePlugin):
    """Plug-in that patches the model of a run, as `peftkern.patch`.

    It patches when Axolotl has loaded the model and its adapter, and when the trainer is made:
    those of preference training make the adapter themselves. Axolotl turns its own `lora_*_kernel`
    options on where they are not in the YAML; with this plug-in it leaves them off, and options
    that the YAML turns on are a warning.
    """

    def register(self, cfg: dict[str, Any]) -> None:
        """Keep Axolotl from choosing its own kernels where the YAML does not name them."""
        if all(cfg.get(name) is None for name in FUSED):
            cfg.update(dict.fromkeys(FUSED, False))

    def get_input_args(self) -> str:
        """Return the name of the model of the options."""
        return f"{__name__}.{PeftKernArgs.__name__}"

    def post_model_load(self, cfg: Any, model: nn.Module) -> None:
        """Patch the model, with its adapter if it has that by now."""
        fused = [name for name in FUSED if cfg.get(name)]
        if fused:
            logger.warning(
                "peftkern: %s: these kernels of Axolotl read the weights past the patched layers, "
                "which then serve nothing; set them to false",
                ", ".join(fused),
            )
        patch(model, **_options(cfg))

    def add_callbacks_pre_trainer(self, cfg: Any, model: nn.Module) -> list[PeftKernCallback]:
        """Return the callback that patches the trainer's model and says what it found."""
        return [PeftKernCallback(**_options(cfg))]

    def post_trainer_create(self, cfg: Any, trainer: Trainer) -> None:
        """Attach the monitor, in front of the reporters."""
        file = (cfg.get("peftkern") or {}).get("monitor")
        if file is not None:
            MonitorCallback.attach(trainer, jsonl=file)


def _options(cfg: Any) -> dict[str, Any]:
    """Return the options of `peftkern.patch` that the YAML gives."""
    given = cfg.get("peftkern") or {}
    names = PeftKernOptions.model_fields.keys() - {"monitor"}
    return {name: given[name] for name in names if given.get(name) is not None}
