"""PEFT's LoRA layers on peftkern, with or without DoRA.

With DoRA, a first adapter that can be fused with the base goes to `dora_linear`; for any other,
PEFT's operations run with the norms from `dora_norm`.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from peft.import_utils import is_bnb_4bit_available
from peft.tuners import lora
from peft.tuners.lora import dora
from peft.tuners.lora.dora import DoraLinearLayer
from peft.tuners.lora.variants import DoraLinearVariant
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from peftkern.formats.block_weight import QuantizedWeight
from peftkern.functional import nf4_linear
from peftkern.functional.dora import dora_linear, dora_norm
from peftkern.integrations.peft.engines import Part
from peftkern.integrations.peft.fallback import (
    Fallback,
    hooked,
    parameters_of,
    unusual_dropout,
    unusual_tensor,
)
from peftkern.integrations.peft.own_merge import OwnBaseMerge
from peftkern.integrations.peft.serve import Adapter, Base, PatchedLayer, fused


class LoRALayer(PatchedLayer):
    """Mixin of patched layers that keep an adapter as PEFT's LoRA does, in modules."""

    def _is_plain(self, name: str) -> bool:
        return name not in self.lora_variant

    def _parts(self, names: list[str]) -> list[Part]:
        parts = super()._parts(names)
        for name in names:
            roles = ["lora_dropout", "lora_A", "lora_B"]
            if name in self.lora_variant:
                roles.append("lora_magnitude_vector")
            groups = ((role, self._modules[role]._modules) for role in roles)
            parts += [Part(role, group, name) for role, group in groups if name in group]
        return parts

    def _read_adapter(self, names: list[str], device: torch.device) -> Adapter | Fallback:
        for name in names if self.lora_variant else ():
            reason = self._unusual_variant(name, device)
            if reason is not None:
                return Fallback(reason)
        lora_A, lora_B, drop = self._modules_of(names[0])
        for role, linear in (("lora_A", lora_A), ("lora_B", lora_B)):
            if type(linear) is not nn.Linear:
                return Fallback(f"{role} is {type(linear).__name__}")
        A, bias_of_A = parameters_of(lora_A)
        B, bias = parameters_of(lora_B)
        reason = hooked(device, lora_A=lora_A, lora_B=lora_B, lora_dropout=drop)
        reason = reason or unusual_tensor(lora_A=A, lora_B=B) or unusual_dropout(drop)
        if reason is None and bias_of_A is not None:
            reason = "lora_A has a bias"
        return Adapter(A, B, drop, bias) if reason is None else Fallback(reason)

    def _fuse_first(self, name: str, adapter: Adapter, base: Base) -> Tensor:
        A, B, scaling, dropout_p = adapter[0], adapter[1], self.scaling[name], adapter.dropout_p
        if name not in self.lora_variant:
            return fused(base, A, B, scaling, dropout_p)
        x, weight, bias = base
        return dora_linear(
            x if x.dim() > 1 else x.unsqueeze(0),  # PEFT's magnitude is a row, and so is its y
            weight,
            A,
            B,
            self._magnitude(name).weight,
            scaling=scaling,
            bias=bias,
            dropout_p=dropout_p if self.training else 0.0,  # where DoRA's own forward looks
        )

    def _add_adapter(
        self, result: Tensor, x: Tensor, name: str, base: Base
    ) -> tuple[Tensor, Tensor]:
        lora_A, lora_B, drop = self._modules_of(name)
        x = self._adapter_input(x, lora_A.weight.dtype)
        if name in self.lora_variant:
            total = self._with_dora(result, x, name, base)
            return total.to(result.dtype) if self._rounds() else total, x
        update = lora_B(lora_A(drop(x))) * self.scaling[name]
        return result + (update.to(result.dtype) if self._rounds() else update), x

    def _with_dora(self, result: Tensor, x: Tensor, name: str, base: Base) -> Tensor:
        """Add a DoRA adapter to what the layer has given so far."""
        lora_A, lora_B, drop = self._modules_of(name)
        _, weight, bias = base
        scaling = self.scaling[name]
        norm = dora_norm(weight, lora_A.weight, lora_B.weight, scaling=scaling)
        c = (self._magnitude(name).weight / norm).view(1, -1)
        if type(drop) is nn.Identity or not self.training:
            dropped, product = x, result if bias is None else result - bias
        else:
            dropped = drop(x)
            if isinstance(weight, QuantizedWeight):
                product = nf4_linear(dropped, weight)
            else:
                product = F.linear(dropped, weight.to(dropped.dtype))
        return result + (c - 1) * product + c * (lora_B(lora_A(dropped)) * scaling)

    def _rounds(self) -> bool:
        """Return whether PEFT rounds each update to the dtype of the sum so far."""
        return self.four_bit and not torch.is_autocast_enabled()

    def _modules_of(self, name: str) -> tuple[nn.Module, nn.Module, nn.Module]:
        """Return lora_A, lora_B and lora_dropout; `_modules` is ten times faster than a dot."""
        modules = self._modules
        return (
            modules["lora_A"]._modules[name],
            modules["lora_B"]._modules[name],
            modules["lora_dropout"]._modules[name],
        )

    def _magnitude(self, name: str) -> nn.Module:
        return self._modules["lora_magnitude_vector"]._modules[name]

    def _unusual_variant(self, name: str, device: torch.device) -> str | None:
        """Return what our ops do not express of an adapter's variant; None for plain LoRA."""
        if name not in self.lora_variant:
            return None
        if type(self.lora_variant[name]) is not DoraLinearVariant:
            return f"lora_variant {type(self.lora_variant[name]).__name__}"
        magnitude = self._magnitude(name)
        if type(magnitude) is not DoraLinearLayer:
            return f"lora_magnitude_vector is {type(magnitude).__name__}"
        base = type(self._modules["base_layer"])
        if base is Conv1D:
            return "DoRA over Conv1D"
        if getattr(dora, "ENABLE_DORA_CACHING", False) and not magnitude.training:  # PEFT 0.19
            if base is nn.Linear:  # 4-bit weights PEFT dequantizes at each call all the same
                return "DoRA's norms are cached"
        elif getattr(magnitude, "_dora_cache", None):  # PEFT's forward clears it, too
            magnitude._dora_cache.clear()
        weight = magnitude.weight
        if weight.device != self._modules["lora_A"]._modules[name].weight.device:
            return f"lora_magnitude_vector is on {weight.device}"  # ephemeral_gpu_offload
        return hooked(device, lora_magnitude_vector=magnitude) or unusual_tensor(
            lora_magnitude_vector=weight
        )


class PatchedLinear(OwnBaseMerge, LoRALayer, lora.Linear):
    """PEFT's `lora.Linear` with the base layer and its first adapter as one op."""

    original, op = lora.Linear, "lora_linear"


SWAPS: dict[type, type] = {lora.Linear: PatchedLinear}

if is_bnb_4bit_available():
    from peft.tuners.lora.bnb import Linear4bit

    from peftkern.integrations.peft.bitsandbytes import FrozenWeight, rewriting

    class PatchedLinear4bit(LoRALayer, Linear4bit):
        """PEFT's `lora.Linear4bit` with the base layer and its first adapter as one op.

        PEFT merges by quantizing anew, and what it subtracts from that later is not what was there
        before: the frozen weight is kept while adapters are merged, and `unmerge` puts it back.
        """

        original, op, four_bit = Linear4bit, "nf4_lora_linear", True

        def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
            with rewriting:
                base = self.get_base_layer()
                kept = self.__dict__.get("frozen_weight") if self.merged else None
                frozen = FrozenWeight(base)
                try:
                    # Autograd saves no weight that was made in inference mode.
                    with torch.inference_mode(False), torch.no_grad():
                        super().merge(safe_merge, adapter_names)
                finally:
                    frozen.mark_quantized()
                    if kept is None or kept.replaced(frozen.weight):
                        kept = frozen
                    if self.merged:
                        kept.expect(base.weight)
                        self.__dict__["frozen_weight"] = kept

        def unmerge(self) -> None:
            with rewriting:  # of several threads the first restores, the others find it done
                base = self.get_base_layer()
                frozen = self.__dict__.pop("frozen_weight", None)
                if frozen is None or not self.merged or frozen.replaced(base.weight):
                    super().unmerge()
                    return
                frozen.restore(base)
                for name in self.merged_adapters:
                    self._caches.pop(f"{name}-weight_norm", None)  # of DoRA
                self.merged_adapters.clear()

    SWAPS[Linear4bit] = PatchedLinear4bit
