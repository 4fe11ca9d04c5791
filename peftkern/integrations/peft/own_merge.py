"""Merges of PEFT's adapters into peftkern's own 4-bit layers, to whose bytes PEFT cannot add."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from peftkern.formats.table import FORMATS
from peftkern.integrations.peft.fingerprint import fingerprint
from peftkern.layers.base import linear_like
from peftkern.layers.quantized_linear import QuantizedLinear


class OwnBaseMerge:
    """Mixin of patched layers that PEFT merges into their base.

    Over `NF4Linear` and `BlockLinear` a merge quantizes again and warns of the error. The bytes
    from before are kept meanwhile, and `unmerge` puts them back.
    """

    base_layer: nn.Module

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        base = self.base_layer
        if not isinstance(base, QuantizedLinear):
            super().merge(safe_merge, adapter_names)
            return
        kept, merged = self.__dict__.get("frozen_weight"), list(self.merged_adapters)
        if not merged:
            frozen = _stored(base)
        else:  # what is there has adapters in it already
            frozen = None if kept is None or kept[1] != _fingerprint(base) else kept[0]
        dense = self._with_dense_base(super().merge, safe_merge, adapter_names)
        self.__dict__.pop("frozen_weight", None)
        if self.merged_adapters != merged:
            _requantize(base, dense)
        if frozen is not None and self.merged:
            self.__dict__["frozen_weight"] = (frozen, _fingerprint(base))

    def unmerge(self) -> None:
        base = self.base_layer
        if (
            not isinstance(base, QuantizedLinear) or not self.merged
        ):  # PEFT's DoRA unmerges within `merge`
            super().unmerge()
            return
        kept = self.__dict__.pop("frozen_weight", None)
        if kept is None or kept[1] != _fingerprint(base):  # other weights came since
            _requantize(base, self._with_dense_base(super().unmerge))
        else:
            base.load_state_dict(kept[0])
            for name in self.merged_adapters:
                self._caches.pop(f"{name}-weight_norm", None)  # of DoRA
            self.merged_adapters.clear()

    def _with_dense_base(self, function: Callable[..., None], *args: Any) -> nn.Linear:
        """Let PEFT change a dense base layer, which it returns, while `base_layer` stays.

        Raises: what PEFT raises, or ValueError if the weights are not finite then: nothing has
        changed.
        """
        base, merged = self.base_layer, list(self.merged_adapters)
        dense = linear_like(base, base.dequantize().float())
        self.base_layer = dense
        try:
            function(*args)
            if not torch.isfinite(dense.weight).all():
                raise ValueError(
                    "4 bits have no infinity and no NaN: expected adapters that are finite"
                )
        except BaseException:
            self.merged_adapters[:] = merged
            raise
        finally:
            self.base_layer = base
        return dense


def _fingerprint(base: QuantizedLinear) -> tuple[int, ...]:
    return fingerprint([v for k, v in base.state_dict().items() if k != "bias"])


def _stored(base: QuantizedLinear) -> dict[str, Tensor]:
    """Return a layer's state, which loading into the layer does not write to."""
    return {k: v.clone() if k == "bias" else v for k, v in base.state_dict().items()}


@torch.no_grad()
def _requantize(base: QuantizedLinear, dense: nn.Linear) -> None:
    before, weight = base.dequantize().float(), base.quantized_weight
    state = dense.state_dict()
    base.load_state_dict({**state, "weight": state["weight"].to(weight.dtype)})
    moved, error = dense.weight - before, base.dequantize().float() - dense.weight
    warnings.warn(
        f"a weight was quantized to {FORMATS[weight.layout[0]].name.upper()} again: what was added "
        f"has norm {moved.norm().item():.3g}, the rounding error has {error.norm().item():.3g}",
        stacklevel=3,
    )
