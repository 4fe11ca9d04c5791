"""Adapter layers that `initialize_` can start: their weights, and how factors get into them."""

from __future__ import annotations

import contextlib
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from copy import copy
from dataclasses import dataclass, replace
from typing import Any

from peft import LoraConfig, PeftModel
from peft.tuners.lora import EvaConfig
from peft.tuners.lora.layer import LoraLayer, ParamWrapper
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from peftkern.formats.block_weight import QuantizedWeight
from peftkern.formats.nf4 import NF4Weight
from peftkern.formats.rank_patterns import PREFIX
from peftkern.functional import dequantize
from peftkern.functional.arguments import WEIGHT_DTYPES, check_dense, mismatch
from peftkern.functional.truncated_svd import Weight
from peftkern.integrations.peft.serve import BNB_TYPES
from peftkern.layers.expert_stack import ExpertStack
from peftkern.layers.names import shortened
from peftkern.layers.quantized_linear import QuantizedLinear
from peftkern.methods.initialization.factors import Factors, subtract_update_
from peftkern.methods.initialization.from_weights import groups
from peftkern.methods.initialization.loftq import Storage, quantize_residual, relative_error
from peftkern.methods.initialization.report import LayerStart
from peftkern.methods.initialization.statistics import named


@dataclass(frozen=True)
class Layer:
    """Adapter on a stack of matrices [m, n]: one of a linear layer, or those of all experts.

    name: in the base model; of experts, that of their parameter. matrices: what the method starts
    from; views of the base's own, or for a base in 4 bits what it was quantized from, if that is
    known. turned: they are [n, m], as experts in 4 bits are kept where others see them so. storage:
    how a base in 4 bits is quantized; None for a dense one. asked: rank that `set_rank` is to give
    it.
    """

    name: str
    module: LoraLayer
    adapter_name: str
    matrices: Sequence[Weight] | Tensor
    storage: Storage | None
    turned: bool = False
    asked: int | None = None

    @property
    def base(self) -> nn.Module:
        return self.module.get_base_layer()

    @property
    def weight(self) -> Weight:
        """Weight of a linear layer."""
        return self.matrix(0)

    @property
    def shape(self) -> tuple[int, int]:
        sizes = tuple(self.matrices[0].shape)
        return sizes[::-1] if self.turned else sizes

    def matrix(self, index: int) -> Weight:
        return self.matrices[index].to(parameter_of(self.module).device)

    def groups(self) -> Iterator[range]:
        """Yield the indices of the matrices that are worked on at once."""
        return groups(len(self.matrices), self.shape)

    @property
    def rank(self) -> int:
        return self.asked or self.module.r[self.adapter_name]

    @property
    def scaling(self) -> float:
        if self.asked is None:
            return self.module.scaling[self.adapter_name]
        alpha, rank = self.module.lora_alpha[self.adapter_name], self.asked
        return alpha / (math.sqrt(rank) if self.module.use_rslora[self.adapter_name] else rank)

    def take(self, index: int, factors: Factors, base: QuantizedWeight | None = None) -> LayerStart:
        """Write the factors of a matrix, and to the base what they leave of it.

        Args: base: that in 4 bits, if it is there already; dense, if the layer's own is.
        """
        weight, factors = self.matrix(index), self.write(factors, index)
        if base is None and self.storage is None:
            error = subtract_update_(weight, factors.lora_A, factors.lora_B, self.scaling)
        else:
            if base is None:
                base = quantize_residual(weight, factors, self.scaling, self.storage)
            error = relative_error(weight, base, factors, self.scaling)
            if self.storage is None:
                weight.copy_(dequantize(base, weight.dtype))
            elif isinstance(self.module, ParamWrapper):
                self.module.get_param().put_expert(index, base)
            else:
                _set_quantized(self.base, base)
        start = LayerStart.of(self.name, factors, self.scaling, error)
        return replace(start, shape=self.shape)

    def write(self, factors: Factors, index: int = 0) -> Factors:
        """Write the factors of a matrix; return them as they are in the adapter's dtype."""
        place = self._place(index)
        lora_A, lora_B, *_ = place.T if self.turned else place
        lora_A.copy_(factors.lora_A)
        lora_B.copy_(factors.lora_B)
        return factors._replace(lora_A=lora_A.float(), lora_B=lora_B.float())

    def take_inputs(self, index: int, directions: Tensor, turned: bool | None = None) -> None:
        """Let a matrix's update read directions [k, n] of the inputs, and start at zero.

        An expert's update has more ranks than that if few rows reach it: they start as they were
        drawn.
        Args: turned, whether experts are [E, in, out], which PEFT is not told of all that are: its
            lora_B is then what reads.
        """
        lora_A, lora_B, *_ = self._place(index)
        k = len(directions)
        lora_B.zero_()
        if not k:
            return
        if turned is not None and turned != _is_transposed(self.module):
            lora_B[:, :k].copy_(directions.T)
            lora_A[:k].zero_()
        else:
            lora_A[:k].copy_(directions)

    def _place(self, index: int) -> Factors:
        """Return views of PEFT's factors: its lora_A [E * r, n] has those of one expert after
        another, and column j * E + e of its lora_B [m, r * E] is column j of expert e's."""
        count = len(self.matrices)
        all_A, all_B = (
            side[self.adapter_name].weight.data for side in (self.module.lora_A, self.module.lora_B)
        )
        lora_A = all_A.unflatten(0, (count, -1))[index]
        return Factors(lora_A, all_B.unflatten(1, (-1, count))[..., index], 0.0)

    def complete(self, starts: Sequence[LayerStart]) -> LayerStart:
        """Return the start of the layer, all of whose matrices have been started."""
        variant = self.module.lora_variant.get(self.adapter_name)
        if variant is not None:  # DoRA: magnitudes of the weight that the factors are part of
            variant.init(self.module, adapter_name=self.adapter_name)
        return LayerStart.of_stack(starts)


def parameter_of(module: LoraLayer) -> Tensor:
    """Return the parameter that an adapter is on."""
    if isinstance(module, ParamWrapper):
        return module.get_param()
    return module.get_base_layer().weight


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
        path = full_name.removeprefix(PREFIX)
        name = _name(path, module)
        reason = _refusal(module, adapter_name)
        tied = [] if reason else [n for n in users[id(parameter_of(module))]
                                  if not n.startswith(f"{path}.")]  # fmt: skip
        if tied and not keeps_base:
            reason = f"its weight is {tied[0]}, too, which would change with it"
        if reason:
            skipped[name] = reason
        else:
            with named(name):
                layers.append(_layer(name, module, adapter_name, weights))
    if not layers:
        why = shortened([f"{name}: {reason}" for name, reason in skipped.items()], 3, "; ")
        raise ValueError(f"model: expected linear layers or experts with an adapter "
                         f"{adapter_name!r}, got {why or 'none'}")  # fmt: skip
    used = {_parameter_name(la.name, la.module) for la in layers if la.storage}
    unused = sorted(set(weights) - used)
    if weights and len(unused) == len(weights):
        raise ValueError(f"weights: expected those of layers in 4 bits, got {unused[:3]}")
    return layers, skipped


def _name(path: str, module: LoraLayer) -> str:
    """Return the name of what an adapter is on; wrappers of one module are around each other."""
    if not isinstance(module, ParamWrapper):
        return path
    owner = re.sub(r"(\.base_layer)+$", "", path)
    return f"{owner}.{module.parameter_name}"


def _parameter_name(name: str, module: LoraLayer) -> str:
    return name if isinstance(module, ParamWrapper) else f"{name}.weight"


def _refusal(module: LoraLayer, adapter_name: str) -> str | None:
    """Return why an adapter cannot be started, or None."""
    base, wraps = module.get_base_layer(), isinstance(module, ParamWrapper)
    linear = isinstance(base, (nn.Linear, Conv1D))
    if adapter_name not in module.lora_A or not (wraps or linear):
        return f"{type(base).__name__}, expected a linear layer"
    if module.merged:
        return "its adapters are merged"
    if adapter_name in module.lora_variant and not module.use_dora[adapter_name]:
        return f"{type(module.lora_variant[adapter_name]).__name__} has factors of its own"
    weight = parameter_of(module)
    if weight.is_meta or module.lora_A[adapter_name].weight.is_meta:
        return "it has no values yet, it is on the meta device"
    plain = type(weight.data) is Tensor and weight.dtype in WEIGHT_DTYPES
    plain = plain and weight.dim() in ((2, 3) if wraps else (2,))
    quantized = isinstance(weight, ExpertStack) if wraps else _is_quantized(base)
    if not plain and not quantized:
        return f"a weight in another format, {type(weight.data).__name__} of {weight.dtype}"
    if weight.dim() == 3 and len(weight) == 1 and _is_transposed(module):
        return "there is one expert, whose update PEFT does not transpose"
    return None


def _is_quantized(base: nn.Module) -> bool:
    return isinstance(base, (*BNB_TYPES, QuantizedLinear))


def _is_transposed(module: LoraLayer) -> bool:
    """Return whether others see the weight as [n, m], or each expert's."""
    if isinstance(module, ParamWrapper):
        swapped = getattr(module, "_did_swap_in_out_features", False)  # PEFT's flag of [E, m, n]
        return module.get_param().dim() == 3 and not swapped
    return module.fan_in_fan_out


def _layer(name: str, module: LoraLayer, adapter_name: str, weights: Mapping[str, Tensor]) -> Layer:
    weight, transposed, turned = parameter_of(module), _is_transposed(module), False
    if isinstance(weight, ExpertStack):
        matrices = [weight.expert(index) for index in range(len(weight))]
        shape, turned = tuple(weight.shape), transposed != weight.turned
    elif not isinstance(module, ParamWrapper) and _is_quantized(module.get_base_layer()):
        matrices = [_quantized_weight(module.get_base_layer())]
        shape = matrices[0].shape
    else:
        matrices = weight.data if weight.dim() == 3 else weight.data[None]
        return Layer(name, module, adapter_name, matrices.mT if transposed else matrices, None)
    storage = Storage.of(matrices[0])
    given = weights.get(_parameter_name(name, module))
    if given is not None:
        check_dense("weights", given)
        if given.shape != shape:
            raise mismatch("weights", f"a tensor of shape {list(shape)}", given)
        given = given.detach() if given.dim() == 3 else given.detach()[None]
        matrices = given.mT if getattr(weight, "turned", False) else given
    return Layer(name, module, adapter_name, matrices, storage, turned)


def _quantized_weight(base: nn.Module) -> QuantizedWeight:
    own = isinstance(base, QuantizedLinear)
    return base.quantized_weight if own else NF4Weight.from_bitsandbytes(base.weight)


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


def set_stack_ranks(
    model: PeftModel, config: LoraConfig, ranks: Sequence[tuple[Layer, int]], *, alone: bool
) -> None:
    """Give adapters of experts these ranks, and the scalings that EVA has for them; take those of
    rank 0 away.

    Args: alone: no patterns of config are of other layers.
    """
    settings = copy(config)
    settings.init_lora_weights = True
    eva = config.eva_config or EvaConfig()
    for layer, rank in ranks:
        module, name = layer.module, layer.adapter_name
        if rank in (0, module.r[name]):
            continue
        alpha = module.lora_alpha[name]
        alpha *= rank / module.r[name] if eva.adjust_scaling_factors else 1
        module.update_layer(name, r=rank, lora_alpha=alpha, config=settings)
    dropped = {layer.module for layer, rank in ranks if not rank}
    for parent in list(model.modules()) if dropped else ():
        for name, child in parent._modules.items():
            while child in dropped:
                child = child.base_layer
            parent._modules[name] = child
    if alone:
        config.rank_pattern, config.alpha_pattern = {}, {}
    kept = {
        _name(path.removeprefix(PREFIX), module): module
        for path, module in model.named_modules()
        if isinstance(module, ParamWrapper)
    }
    for name, module in kept.items():
        for values, default, pattern in (
            (module.r, config.r, config.rank_pattern),
            (module.lora_alpha, config.lora_alpha, config.alpha_pattern),
        ):
            (value,) = values.values()  # there is one adapter
            if value != default:
                pattern[name] = value
    if dropped:
        config.target_parameters = list(kept)


@contextlib.contextmanager
def kept_dtypes(model: PeftModel) -> Iterator[None]:
    """Give parameters their dtypes again: `update_layer` makes a layer's those of its base."""
    before = {name: p.dtype for name, p in model.named_parameters()}
    yield
    for name, parameter in model.named_parameters():
        if parameter.dtype is not before.get(name, parameter.dtype):
            parameter.data = parameter.data.to(before[name])
