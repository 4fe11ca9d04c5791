"""Adapter layers that `initialize_` can start: their weights, and how factors get into them."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Mapping
from copy import copy
from dataclasses import dataclass
from typing import Any

from peft import PeftModel
from peft.tuners.lora.layer import LoraLayer
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from peftkern.formats.block_weight import QuantizedWeight
from peftkern.formats.nf4 import NF4Weight
from peftkern.formats.rank_patterns import PREFIX
from peftkern.functional import dequantize
from peftkern.functional.arguments import WEIGHT_DTYPES, check_dense, mismatch
from peftkern.functional.truncated_svd import Weight
from peftkern.integrations.peft.serve import BNB_TYPES
from peftkern.layers.quantized_linear import QuantizedLinear
from peftkern.methods.initialization.factors import Factors, subtract_update_
from peftkern.methods.initialization.loftq import Storage, quantize_residual, relative_error
from peftkern.methods.initialization.report import LayerStart
from peftkern.methods.initialization.statistics import named


@dataclass(frozen=True)
class Layer:
    """Adapter on a linear layer.

    name: in the base model. weight [m, n]: what the method starts from; a view of the base's own,
    or for a base in 4 bits what it was quantized from, if that is known. storage: how a base in 4
    bits is quantized; None for a dense one. asked: rank that `set_rank` is to give it.
    """

    name: str
    module: LoraLayer
    adapter_name: str
    weight: Weight
    storage: Storage | None
    asked: int | None = None

    @property
    def base(self) -> nn.Module:
        return self.module.get_base_layer()

    @property
    def rank(self) -> int:
        return self.asked or self.module.r[self.adapter_name]

    @property
    def scaling(self) -> float:
        if self.asked is None:
            return self.module.scaling[self.adapter_name]
        alpha, rank = self.module.lora_alpha[self.adapter_name], self.asked
        return alpha / (math.sqrt(rank) if self.module.use_rslora[self.adapter_name] else rank)

    def take(self, factors: Factors) -> LayerStart:
        """Write factors, and to the base what they leave of the weight."""
        factors = self.write(factors)
        if self.storage is None:
            error = subtract_update_(self.weight, factors.lora_A, factors.lora_B, self.scaling)
        else:
            base = quantize_residual(self.weight, factors, self.scaling, self.storage)
            error = relative_error(self.weight, base, factors, self.scaling)
            _set_quantized(self.base, base)
        return self._started(factors, error)

    def take_quantized(self, factors: Factors, base: QuantizedWeight) -> LayerStart:
        """Write factors, and a base that is quantized already: dense, if the layer's own is."""
        factors = self.write(factors)
        error = relative_error(self.weight, base, factors, self.scaling)
        if self.storage is None:
            self.weight.copy_(dequantize(base, self.weight.dtype))
        else:
            _set_quantized(self.base, base)
        return self._started(factors, error)

    def write(self, factors: Factors) -> Factors:
        """Write factors; return them as they are in the adapter's dtype."""
        lora_A = self.module.lora_A[self.adapter_name].weight.data.copy_(factors.lora_A)
        lora_B = self.module.lora_B[self.adapter_name].weight.data.copy_(factors.lora_B)
        return factors._replace(lora_A=lora_A.float(), lora_B=lora_B.float())

    def _started(self, factors: Factors, error: float) -> LayerStart:
        variant = self.module.lora_variant.get(self.adapter_name)
        if variant is not None:  # DoRA: magnitudes of the weight that the factors are part of
            variant.init(self.module, adapter_name=self.adapter_name)
        return LayerStart.of(self.name, factors, self.scaling, error)


def find_layers(
    model: PeftModel, adapter_name: str, weights: Mapping[str, Tensor], *, keeps_base: bool
) -> tuple[list[Layer], dict[str, str]]:
    """Find the layers that can be started, and of the others of the adapter {name: reason}.

    keeps_base: the method leaves the bases alone.
    Raises: ValueError if there are none, or for `weights` that do not fit.
    """
    users: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        users.setdefault(id(parameter), []).append(name.removeprefix(PREFIX))
    layers, skipped = [], {}
    for full_name, module in model.named_modules():
        if not isinstance(module, LoraLayer) or adapter_name not in module.r:
            continue
        name = full_name.removeprefix(PREFIX)
        reason = _refusal(module, adapter_name)
        tied = [] if reason else [n for n in users[id(module.get_base_layer().weight)]
                                  if not n.startswith(f"{name}.")]  # fmt: skip
        if tied and not keeps_base:
            reason = f"its weight is {tied[0]}, too, which would change with it"
        if reason:
            skipped[name] = reason
        else:
            with named(name):
                layers.append(_layer(name, module, adapter_name, weights))
    if not layers:
        why = "; ".join(f"{name}: {reason}" for name, reason in list(skipped.items())[:3])
        raise ValueError(f"model: expected linear layers with an adapter {adapter_name!r}, "
                         f"got {why or 'none'}")  # fmt: skip
    unused = sorted(set(weights) - {f"{layer.name}.weight" for layer in layers if layer.storage})
    if weights and len(unused) == len(weights):
        raise ValueError(f"weights: expected those of layers in 4 bits, got {unused[:3]}")
    return layers, skipped


def _refusal(module: LoraLayer, adapter_name: str) -> str | None:
    """Return why an adapter cannot be started, or None."""
    base = module.get_base_layer()
    if adapter_name not in module.lora_A or not isinstance(base, (nn.Linear, Conv1D)):
        return f"{type(base).__name__}, expected a linear layer"
    if module.merged:
        return "its adapters are merged"
    if adapter_name in module.lora_variant and not module.use_dora[adapter_name]:
        return f"{type(module.lora_variant[adapter_name]).__name__} has factors of its own"
    weight = base.weight
    if weight.is_meta or module.lora_A[adapter_name].weight.is_meta:
        return "it has no values yet, it is on the meta device"
    plain = type(weight.data) is Tensor and weight.dtype in WEIGHT_DTYPES and weight.dim() == 2
    if not plain and not isinstance(base, (*BNB_TYPES, QuantizedLinear)):
        return f"a weight in another format, {type(weight.data).__name__} of {weight.dtype}"
    return None


def _layer(name: str, module: LoraLayer, adapter_name: str, weights: Mapping[str, Tensor]) -> Layer:
    base = module.get_base_layer()
    if not isinstance(base, (*BNB_TYPES, QuantizedLinear)):
        weight = base.weight.data
        weight = weight.T if module.fan_in_fan_out else weight
        return Layer(name, module, adapter_name, weight, None)
    own = isinstance(base, QuantizedLinear)
    w = base.quantized_weight if own else NF4Weight.from_bitsandbytes(base.weight)
    weight = weights.get(f"{name}.weight", w)
    if weight is not w:
        check_dense("weights", weight)
        if weight.shape != w.shape:
            raise mismatch("weights", f"a tensor of shape {list(w.shape)}", weight)
        weight = weight.detach().to(w.device)
    return Layer(name, module, adapter_name, weight, Storage.of(w))


def _set_quantized(base: nn.Module, w: QuantizedWeight) -> None:
    """Give a 4-bit layer another weight of the same format."""
    if isinstance(base, QuantizedLinear):
        base._set_stored(w)
        return
    from bitsandbytes.nn import Params4bit

    old = base.weight
    state = {key.removeprefix("weight."): t for key, t in w.state_dict("").items()}
    packed = state.pop("weight").view(-1).view(old.dtype).view(-1, 1)
    base.weight = Params4bit.from_prequantized(
        packed, state, requires_grad=False, device=old.device, module=base
    )


def set_rank(model: PeftModel, adapter_name: str, rank: Any) -> None:
    """Give all layers of an adapter the same rank, as if its config had said so."""
    config = model.peft_config[adapter_name]
    config.r, config.rank_pattern = rank, {}
    settings = copy(config)
    settings.init_lora_weights = True
    with kept_dtypes(model):
        for module in model.modules():
            if isinstance(module, LoraLayer) and adapter_name in module.r:
                alpha = module.lora_alpha[adapter_name]
                module.update_layer(adapter_name, r=rank, lora_alpha=alpha, config=settings)


@contextlib.contextmanager
def kept_dtypes(model: PeftModel) -> Iterator[None]:
    """Give parameters their dtypes again: `update_layer` makes a layer's those of its base."""
    before = {name: p.dtype for name, p in model.named_parameters()}
    yield
    for name, parameter in model.named_parameters():
        if parameter.dtype is not before.get(name, parameter.dtype):
            parameter.data = parameter.data.to(before[name])
