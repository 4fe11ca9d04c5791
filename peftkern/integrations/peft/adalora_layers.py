"""AdaLoRA's layers under `peftkern.patch`, and where they are in a model."""

from __future__ import annotations

from typing import Any

import torch
from peft.import_utils import is_bnb_4bit_available
from peft.tuners.adalora.layer import AdaLoraLayer, SVDLinear
from peft.tuners.adalora.model import AdaLoraModel
from torch import Tensor, nn

from peftkern.integrations.peft.engines import Part
from peftkern.integrations.peft.fallback import (
    Fallback,
    active_names,
    hooked,
    unusual_dropout,
    unusual_tensor,
)
from peftkern.integrations.peft.own_merge import OwnBaseMerge
from peftkern.integrations.peft.serve import Adapter, Base, PatchedLayer, fused
from peftkern.layers.svd import fold_diagonal
from peftkern.methods.processes import stepped_by_deepspeed


class SVDLayer(PatchedLayer):
    """Mixin of patched layers that keep an adapter as PEFT's AdaLoRA does, with a diagonal."""

    def _is_plain(self, name: str) -> bool:
        return False

    def _parts(self, names: list[str]) -> list[Part]:
        dropouts = self._modules["lora_dropout"]._modules
        return super()._parts(names) + [Part("lora_dropout", dropouts, name) for name in names]

    def _read_adapter(self, names: list[str], device: torch.device) -> Adapter | Fallback:
        A, E, B, drop = self._tensors_of(names[0])
        reason = (
            unusual_tensor(lora_A=A, lora_E=E, lora_B=B)
            or unusual_dropout(drop)
            or hooked(device, lora_dropout=drop)
        )
        scaling = self.scaling[names[0]]
        if reason is None and isinstance(scaling, Tensor) and scaling.dim():
            reason = "scaling is no number"  # but one of each output
        return Adapter(A, B, drop) if reason is None else Fallback(reason)

    def _fuse_first(self, name: str, adapter: Adapter, base: Base) -> Tensor:
        E = self._modules["lora_E"]._parameters[name]
        A = fold_diagonal(adapter.lora_A, E, self._scaling(name))
        return fused(base, A, adapter.lora_B, 1.0, adapter.dropout_p)

    def _add_adapter(
        self, result: Tensor, x: Tensor, name: str, base: Base | None = None
    ) -> tuple[Tensor, Tensor]:
        A, E, B, drop = self._tensors_of(name)
        x = self._adapter_input(x, A.dtype)
        update = drop(x) @ (A * E).to(A.dtype).T @ B.T
        return (result + update * self._scaling(name)).to(result.dtype), x

    def peer_forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Compute as PEFT does; a lora_E wider than lora_A, which PEFT cannot take, as it would."""
        names = active_names(self)
        if self.disable_adapters or self.merged or not any(map(self._is_wide, names)):
            return super().peer_forward(x, *args, **kwargs)
        result = self._modules["base_layer"](x, *args, **kwargs)
        for name in names:
            result, x = self._add_adapter(result, x, name)
        return result

    def _is_wide(self, name: str) -> bool:
        A, E, _, _ = self._tensors_of(name)
        return E.dtype is not A.dtype

    def _tensors_of(self, name: str) -> tuple[Tensor, Tensor, Tensor, nn.Module]:
        """Return lora_A, lora_E, lora_B and the dropout module of an adapter."""
        modules = self._modules
        return (
            modules["lora_A"]._parameters[name],
            modules["lora_E"]._parameters[name],
            modules["lora_B"]._parameters[name],
            modules["lora_dropout"]._modules[name],
        )

    def _scaling(self, name: str) -> Tensor:
        ranknum = self._modules["ranknum"]._parameters[name]
        return self.scaling[name] / (ranknum.detach() + 1e-5)


class PatchedSVDLinear(OwnBaseMerge, SVDLayer, SVDLinear):
    """PEFT's `adalora.SVDLinear` with the base layer and its first adapter as one op."""

    original, op = SVDLinear, "lora_linear"

    def get_delta_weight(self, adapter: str) -> Tensor:
        """Return the update of the weight; PEFT's own method takes one dtype alone."""
        if not self._is_wide(adapter):
            return super().get_delta_weight(adapter)
        A, E, B, _ = self._tensors_of(adapter)
        update = B.to(E.dtype) @ fold_diagonal(A, E, self._scaling(adapter))
        return update.T if self.fan_in_fan_out else update


SWAPS: dict[type, type] = {SVDLinear: PatchedSVDLinear}

if is_bnb_4bit_available():
    from peft.tuners.adalora.bnb import SVDLinear4bit

    class PatchedSVDLinear4bit(SVDLayer, SVDLinear4bit):
        """PEFT's `adalora.SVDLinear4bit` with the base layer and its first adapter as one op."""

        original, op, four_bit = SVDLinear4bit, "nf4_lora_linear", True

    SWAPS[SVDLinear4bit] = PatchedSVDLinear4bit


def find_tuner(model: nn.Module | None) -> AdaLoraModel | None:
    """Return the AdaLoRA model in training inside a model, or None."""
    modules = () if model is None else model.modules()
    trained = (m for m in modules if isinstance(m, AdaLoraModel) and hasattr(m, "rankallocator"))
    return next(trained, None)


def layers_of(tuner: AdaLoraModel) -> dict[str, AdaLoraLayer]:
    """Return the layers of the adapter in training by their names in the base model."""
    name = tuner.trainable_adapter_name
    return {
        path: module
        for path, module in tuner.model.named_modules()
        if isinstance(module, AdaLoraLayer) and name in module.lora_E
    }


def parameters_of(tuner: AdaLoraModel) -> list[nn.Parameter]:
    """Return the triplets of the adapter in training, of all layers."""
    name = tuner.trainable_adapter_name
    groups = ("lora_E", "lora_A", "lora_B")
    return [getattr(layer, g)[name] for layer in layers_of(tuner).values() for g in groups]


def widen_diagonals(tuner: AdaLoraModel) -> None:
    """Keep lora_E of patched layers in float32, where lora_A and lora_B may have 16 bits.

    TRL casts all that is trained over a 4-bit base to bfloat16. A diagonal in bfloat16 stops moving
    at |E| = 2^8 learning rates. Do it before the optimizer takes its first step and before DDP.
    DeepSpeed has a master of each in float32, and places for them that are not to be left.
    """
    name = tuner.trainable_adapter_name
    for layer in layers_of(tuner).values():
        if isinstance(layer, SVDLayer) and not stepped_by_deepspeed(layer.lora_E[name]):
            for group in (layer.lora_E, layer.ranknum):
                if group[name].dtype in (torch.bfloat16, torch.float16):
                    group[name].data = group[name].data.float()


def freeze_ranknum(layer: nn.Module) -> None:
    """Take the `ranknum` of an AdaLoRA layer out of training; another layer has none."""
    if isinstance(layer, AdaLoraLayer):
        for ranknum in layer.ranknum.values():
            ranknum.requires_grad_(False)
