"""AdaLoRA adapters as plain LoRA, which servers load that know nothing of AdaLoRA."""

from __future__ import annotations

import os
import re
import shutil
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel
from peft.tuners.adalora.layer import AdaLoraLayer
from peft.tuners.adalora.model import AdaLoraModel
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME
from peft.utils.save_and_load import get_peft_model_state_dict
from safetensors.torch import save_file
from torch import Tensor, nn

from peftkern.formats.json_files import read_json
from peftkern.formats.rank_patterns import PREFIX, rank_fields
from peftkern.integrations.peft.adalora_state import FILE

__all__ = ["export_lora"]

# Fields that say the same in both kinds of adapter.
_CARRIED = (
    "base_model_name_or_path", "bias", "fan_in_fan_out", "lora_dropout", "modules_to_save",
    "revision", "task_type", "trainable_token_indices",
)  # fmt: skip


def export_lora(
    model: PeftModel, folder: str | os.PathLike[str], adapter_name: str | None = None
) -> dict[str, int]:
    """Write an AdaLoRA adapter as a plain LoRA adapter with the same outputs.

    lora_A' = lora_E * lora_A, lora_B' = lora_B * scaling / (ranknum + 1e-5)

    of the triplets that are not zero. Each layer has its own rank, in rank_pattern, and the same in
    alpha_pattern, so that the scaling is 1 for readers of the patterns and of lora_alpha / r alone.
    Layers without any triplet are left out. The tensors are float32 (float64 if they were): a
    product of bfloat16 factors is none. modules_to_save, biases and token rows go along.

    Args: model, a PeftModel, patched or not; folder, made if it is not there, in which an earlier
        LoRA adapter is replaced; adapter_name, the active one if None.
    Returns: {layer: rank}, for the layers that are left out 0.
    Raises: ValueError if the adapter is not AdaLoRA's, if no triplet differs from zero, or if the
        folder is of another adapter, like AdaLoRA's own checkpoint.
    """
    tuner = getattr(model, "base_model", None)
    if not isinstance(tuner, AdaLoraModel):
        raise ValueError("model: expected a PeftModel with an AdaLoRA adapter")
    name = adapter_name or model.active_adapter
    if name not in model.peft_config:
        raise ValueError(f"adapter_name: {name!r} is not one of {sorted(model.peft_config)}")
    path = Path(folder)
    _check_folder(path)
    tensors, ranks = {}, {}
    for module, layer in tuner.model.named_modules():
        if isinstance(layer, AdaLoraLayer) and name in layer.lora_E:
            A, B = _plain_factors(layer, name)
            ranks[module] = len(A)
            if len(A):
                tensors[f"{PREFIX}{module}.lora_A.weight"] = A
                tensors[f"{PREFIX}{module}.lora_B.weight"] = B
    if not tensors:
        raise ValueError(f"adapter_name: all triplets of {name!r} are zero, there is no update")
    tensors |= _beside_triplets(model, name)
    _publish(path, tensors, _lora_config(model, name, ranks))
    return ranks


def _check_folder(path: Path) -> None:
    """Raise ValueError for a folder of another kind of adapter, whose files would be mixed."""
    held = read_json(path / CONFIG_NAME) if (path / CONFIG_NAME).is_file() else {}
    kind = held.get("peft_type") if isinstance(held, dict) else None
    if (path / FILE).exists() or kind not in (None, "LORA"):
        what = f"an adapter of peft_type {kind}" if kind not in (None, "LORA") else FILE
        raise ValueError(f"{path}: expected a new folder or one of a LoRA adapter, holds {what}")


def _publish(path: Path, tensors: dict[str, Tensor], config: LoraConfig) -> None:
    """Write to a folder beside, then put both files in place, the config last.

    Without it nothing loads.
    """
    path = Path(os.path.realpath(path))
    work = path.with_name(f".{path.name}.unfinished")
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    try:
        save_file(tensors, work / SAFETENSORS_WEIGHTS_NAME, {"format": "pt"})
        config.save_pretrained(str(work))
        path.mkdir(exist_ok=True)
        (path / CONFIG_NAME).unlink(missing_ok=True)
        for name in (SAFETENSORS_WEIGHTS_NAME, CONFIG_NAME):
            os.replace(work / name, path / name)
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _plain_factors(layer: AdaLoraLayer, name: str) -> tuple[Tensor, Tensor]:
    """Return lora_A and lora_B for a scaling of 1; of a convolution with its kernel's shape."""
    A, E, B = (
        getattr(layer, group)[name].detach().cpu() for group in ("lora_A", "lora_E", "lora_B")
    )
    wide = torch.promote_types(torch.promote_types(A.dtype, E.dtype), torch.float32)
    alive = E.flatten() != 0
    A, E, B = A[alive].to(wide), E[alive].to(wide), B[:, alive].to(wide)
    scaling = layer.scaling[name] / (layer.ranknum[name].item() + 1e-5)
    A, B = (A * E).contiguous(), (B * scaling).contiguous()
    base = layer.get_base_layer()
    if isinstance(base, nn.Conv2d):
        return A.view(len(A), -1, *base.kernel_size), B[:, :, None, None]
    return A, B


def _beside_triplets(model: PeftModel, name: str) -> dict[str, Tensor]:
    """Return what PEFT saves of an adapter beside its triplets: modules_to_save, biases, rows."""
    config = model.peft_config[name]
    pattern = config.rank_pattern
    # Of a state that it is given PEFT does not complain that ranks of 0 were lost shards.
    saved = get_peft_model_state_dict(model, model.state_dict(), name)
    config.rank_pattern = pattern  # of which PEFT renames the keys
    triplets = re.compile(r"\.lora_[AEB]$")
    return {k: v.cpu().contiguous() for k, v in saved.items() if not triplets.search(k)}


def _lora_config(model: PeftModel, name: str, ranks: dict[str, int]) -> LoraConfig:
    """Return a config for those ranks, each layer by its whole name."""
    config = model.peft_config[name]
    alive = {path: rank for path, rank in ranks.items() if rank}
    return LoraConfig(
        **rank_fields(alive),
        target_modules=list(alive),
        inference_mode=True,
        **{field: getattr(config, field) for field in _CARRIED},
    )
