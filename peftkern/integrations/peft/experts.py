"""LoRA on fused experts, PEFT's `target_parameters`, as grouped products.

PEFT keeps a factor of all experts in one matrix: row e*r + j of lora_A [E*r, K] is row j of expert
e, column j*E + e of lora_B [N, r*E] its column j. At each call it adds scaling * B A to the weights
[E, N, K] of all experts, and in a backward pass it makes a gradient of that size. Here both
products read the factors where they are, and nothing of that size is made.

One module of experts has a wrapper for each parameter that is adapted, one around the other; the
outermost is the one that is patched, and it answers for all of them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from peft.tuners import lora
from torch import Tensor, nn

from peftkern.formats.block_weight import QuantizedWeight
from peftkern.formats.nf4 import ArgumentError
from peftkern.formats.table import FORMATS
from peftkern.functional.arguments import SHARD_OTHERWISE, WEIGHT_DTYPES
from peftkern.functional.lora_experts import ExpertLinear, lora_experts
from peftkern.integrations import frozen_experts
from peftkern.integrations.peft import trial, written_inputs
from peftkern.integrations.peft.engines import in_a_call, in_flat_parameters
from peftkern.integrations.peft.fallback import (
    GLOBAL_HOOKS,
    Fallback,
    Outlook,
    PatchedForward,
    active_names,
    hooked,
    refused,
    set_class,
    unusual_call,
    unusual_tensor,
)
from peftkern.integrations.peft.fingerprint import fingerprint
from peftkern.integrations.peft.serve import switched_off
from peftkern.layers.expert_stack import WHOLE_EXPERTS, ExpertStack, expert_weight, is_transposed
from peftkern.layers.experts import Experts, ends_in_norm, gate_of, weight_names
from peftkern.methods.initialization.expert_statistics import WITHOUT_FLAGS, Shown

try:
    from transformers.integrations.moe import use_experts_implementation
except ImportError:  # before 5.0, whose experts are modules of their own
    _CODE = None
else:
    # What the decorator puts in the place of the forward of every class: the experts that have it
    # compute what their flags say, as transformers' own functions rely on.
    _CODE = use_experts_implementation(type("Experts", (nn.Module,), {})).forward.__code__

_OWN_LOOP = "eager"  # of each class, by F.linear
# These cast x to the dtype of the weights, and know no autocast.
_CAST_THEMSELVES = ("grouped_mm", frozen_experts.IMPLEMENTATION)
_IMPLEMENTATIONS = (_OWN_LOOP, *_CAST_THEMSELVES, "batched_mm")
_ROUTING = (("top_k_index", "router_indices"), ("top_k_weights", "routing_weights"))


class Stack(NamedTuple):
    """Experts of one module with their active adapters.

    up: gate and up projection in one, or the up projection where there is no gate.
    key: (op, kind, N, K, r), the part of a trial's key that no input has a say in.
    """

    up: ExpertLinear
    down: ExpertLinear
    gate: Callable[[Tensor], Tensor]
    transposed: bool
    implementation: str
    key: tuple


class _Frozen(NamedTuple):
    """Experts from before adapters were merged, and what tells that the merged ones are there."""

    stack: ExpertStack
    merged: tuple[int, ...]  # fingerprint

    @classmethod
    def of(cls, stack: ExpertStack, merged: ExpertStack) -> _Frozen:
        return cls(stack, _fingerprint(merged))

    def replaced(self, now: ExpertStack) -> bool:
        """Return whether the merged ones were written to or replaced, but for a move or a cast."""
        return _fingerprint(now) != self.merged


def _fingerprint(stack: ExpertStack) -> tuple[int, ...]:
    return fingerprint(list(stack.parts))


class InnerParamWrapper(lora.ParamWrapper):
    """PEFT's `lora.ParamWrapper`, after which experts in 4 bits are what they were before merging.

    A merge quantizes them again, and what is subtracted from that later is not what was there. The
    stored bytes, half a byte and a scale of 4 bytes for each block of weights, are kept beside the
    merged ones while adapters are merged, and `unmerge` puts them back.
    """

    original = lora.ParamWrapper

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        param, frozen = self.get_param(), self.__dict__.pop("frozen_weight", None)
        if frozen is not None and (not self.merged or frozen.replaced(param)):
            frozen = None
        if not self.merged and isinstance(param, ExpertStack):  # else adapters are in it already
            with torch.inference_mode(False), torch.no_grad():
                frozen = _Frozen(param.data, ())
                param.data = param.data.clone()
        try:
            super().merge(safe_merge, adapter_names)
        finally:
            if frozen is not None and self.merged:
                self.__dict__["frozen_weight"] = _Frozen.of(frozen.stack, param)
            elif frozen is not None:
                param.data = frozen.stack

    def unmerge(self) -> None:
        frozen, param = self.__dict__.pop("frozen_weight", None), self.get_param()
        if frozen is None or not self.merged or frozen.replaced(param):
            super().unmerge()
            return
        with torch.inference_mode(False), torch.no_grad():
            param.data = frozen.stack.to(param.device, param.dtype)
        self.merged_adapters.clear()


InnerParamWrapper.__name__ = "ParamWrapper"  # what repr shows


class PatchedParamWrapper(PatchedForward, InnerParamWrapper):
    """PEFT's `lora.ParamWrapper` with the experts below it and their adapters as grouped ops."""

    original, op = lora.ParamWrapper, "lora_experts"

    def _fused(self, x: Tensor, args: tuple, kwargs: dict, compiling: bool) -> Tensor | Fallback:
        reason = unusual_call(x, compiling)
        if reason is not None:
            return Fallback(reason)
        stack = read_stack(self, x.device)
        if isinstance(stack, Fallback):
            return stack
        routing = _routing(args, kwargs)
        if isinstance(routing, Fallback):
            return routing
        reason = _other_products(stack, x)
        if reason is not None:
            return Fallback(reason)
        refusal = trial.refusal(self, x, _trial_key(stack, x, *routing))
        if refusal is not None:
            return refusal
        A = stack.up.lora_A
        if A is not None and A.requires_grad and x.dtype is stack.up.weight.dtype:
            # Ours saves x, PEFT the rows of each expert.
            return written_inputs.answered(self, x, lambda x: _served(stack, x, *routing))
        return _served(stack, x, *routing)

    def peer_forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        flat = in_flat_parameters(self)  # PEFT would leave views that cannot be asked
        try:
            return super().peer_forward(x, *args, **kwargs)
        except RuntimeError as error:
            if not flat:
                raise
            raise RuntimeError(
                "experts: PEFT adds adapters to their weights, which FullyShardedDataParallel "
                f"gives it in views or pieces of a flat parameter; {SHARD_OTHERWISE}, or "
                f"{WHOLE_EXPERTS}"
            ) from error

    def outlook(self) -> Outlook:
        device = self.get_param().device
        stack = read_stack(self, device)
        if isinstance(stack, Fallback):
            return Outlook(device, in_a_call(stack.reason, self))
        return Outlook(device, None, key=stack.key)


SWAPS: dict[type, type] = {lora.ParamWrapper: PatchedParamWrapper}


def patch_inner(module: nn.Module) -> None:
    """Swap the class of a wrapper inside one that is patched."""
    if isinstance(module, lora.ParamWrapper):
        set_class(module, InnerParamWrapper)


def read_stack(layer: Any, device: torch.device) -> Stack | Fallback:
    """Read the experts below a wrapper, if our ops express their state, whatever the input.

    Args: device, of the input.
    """
    for hooks in GLOBAL_HOOKS:
        if hooks:
            return Fallback("global module hooks")
    wrappers = {layer.parameter_name: layer}
    experts = layer._modules["base_layer"]
    while isinstance(experts, lora.ParamWrapper):
        reason = hooked(device, base_layer=experts)
        if reason is not None:
            return Fallback(reason)
        wrappers[experts.parameter_name] = experts
        experts = experts._modules["base_layer"]
    reason = _unusual_experts(experts, wrappers, device)
    reason = reason or next(filter(None, map(switched_off, wrappers.values())), None)
    if reason is not None:
        return Fallback(reason)
    implementation = experts.config._experts_implementation or _OWN_LOOP
    if implementation not in _IMPLEMENTATIONS:
        return Fallback(f"experts_implementation is {implementation}")

    names = ("gate_up_proj" if experts.has_gate else "up_proj", "down_proj")
    linears, adapters = [], 0
    for name in names:
        wrapper = wrappers.pop(name, None)
        active = [] if wrapper is None else active_names(wrapper)
        linear = _linear(experts, name, wrapper, active)
        if isinstance(linear, Fallback):
            return linear
        linears.append(linear)
        adapters = max(adapters, len(active))
    if wrappers:
        return Fallback(f"target parameter {next(iter(wrappers))}")
    up, down = linears
    if not adapters:
        return Fallback("no active adapter")
    if up.weight.dtype is not down.weight.dtype or up.weight.dtype not in WEIGHT_DTYPES:
        return Fallback(f"experts are {up.weight.dtype} and {down.weight.dtype}")
    try:
        transposed = is_transposed(experts, *names)
    except ArgumentError as error:
        return refused(error)
    key = _key(up, down, transposed, implementation, adapters)
    return Stack(up, down, gate_of(experts), transposed, implementation, key)


def _unusual_experts(
    experts: nn.Module, wrapped: dict[str, nn.Module], device: torch.device
) -> str | None:
    """Return the reason to call the experts and not to compute what their flags say."""
    own = experts._parameters
    if "parametrizations" in experts._modules:
        return "base_layer is parametrized"
    for name in wrapped:
        if own[name].dim() != 3:  # the weight of a router
            return f"{name} has {own[name].dim()} dimensions"
        if len(own[name]) == 1:  # for which PEFT has another layout
            return "there is one expert"
    if not (_asks(experts) and hasattr(experts, "has_gate")):  # a flag since 5.3
        return f"base_layer is {type(experts).__name__}"
    if ends_in_norm(experts):
        return "the experts end in a norm"
    children = {name: child for name, child in experts._modules.items() if child is not None}
    reason = hooked(device, experts=experts, **children)
    plain = {name: p for name, p in own.items() if not (p is None or isinstance(p, ExpertStack))}
    reason = reason or unusual_tensor(**plain)
    if reason is not None or not torch.is_grad_enabled():
        return reason
    return "base weight is trained" if any(p.requires_grad for p in experts.parameters()) else None


def _asks(experts: nn.Module) -> bool:
    """Return whether experts ask for an implementation of what their flags say."""
    return getattr(type(experts).forward, "__code__", None) is _CODE


def shown_weight(module: nn.Module, own: str, parent: nn.Module) -> Shown | None:
    """Return a weight [E, m, n] of a module of experts, if what flows through it can be seen.

    Args: parent, the module that has the experts.
    """
    kind, router = type(module), None
    if "parametrizations" in module._modules or module._parameters[own].dim() != 3:
        return None
    if _asks(module) or kind.forward is Experts.forward:
        try:
            names = weight_names(module)
            is_transposed(module, *names)
        except (TypeError, ValueError):
            return None
    elif kind.__module__.startswith("transformers."):
        names = WITHOUT_FLAGS.get(kind.__name__, ())
        router = getattr(parent, "router", None) if names == ("weight",) else None
    else:
        return None
    return Shown(module, own, router) if own in names else None


def _linear(
    experts: nn.Module, name: str, wrapper: lora.ParamWrapper | None, active: list[str]
) -> ExpertLinear | Fallback:
    """Read one projection, and the active adapters of its wrapper as one of all their ranks."""
    parameter = experts._parameters[name]
    weight = expert_weight(parameter)
    bias = experts._parameters[f"{name}_bias"] if experts.has_bias else None
    if wrapper is None or not active:
        return ExpertLinear(weight, bias=bias)
    E, N, K = parameter.shape
    if experts.is_transposed:
        N, K = K, N
    found = []
    for adapter in active:
        A = wrapper._modules["lora_A"]._modules[adapter].weight
        B = wrapper._modules["lora_B"]._modules[adapter].weight
        reason = unusual_tensor(lora_A=A, lora_B=B)
        if reason is not None:
            return Fallback(reason)
        r = A.shape[0] // E
        if A.shape != (E * r, K) or B.shape != (N, r * E):
            return Fallback(f"adapter of {name} does not fit the experts")
        B = B.reshape(N, r, E).permute(2, 0, 1)
        found.append((A.reshape(E, r, K), B, wrapper.scaling[adapter]))
    if len(found) == 1:
        return ExpertLinear(weight, *found[0], bias)
    lora_A = torch.cat([A for A, _, _ in found], dim=1)
    lora_B = torch.cat([B * scaling for _, B, scaling in found], dim=2)
    return ExpertLinear(weight, lora_A, lora_B, 1.0, bias)


def _routing(args: tuple, kwargs: dict) -> tuple[Tensor, Tensor] | Fallback:
    """Bind the experts of each token and their weights, by position or by either of their names."""
    found, others = list(args), dict(kwargs)
    for names in _ROUTING[len(args) :]:
        found += [others.pop(name) for name in names if name in others]
    given = sorted(name for name, value in others.items() if value is not None)
    index, weights = found if len(found) == 2 else (None, None)
    if given or not (isinstance(index, Tensor) and isinstance(weights, Tensor)):
        return Fallback(f"extra arguments: {', '.join(given) or 'positional'}")
    reason = unusual_tensor(top_k_index=index, top_k_weights=weights)
    return (index, weights) if reason is None else Fallback(reason)


def _other_products(stack: Stack, x: Tensor) -> str | None:
    """Return the reason for which PEFT's products of this input are in another dtype than ours."""
    dtype = stack.up.weight.dtype
    if x.dim() != 2 or x.dtype not in WEIGHT_DTYPES:
        return f"input is {x.dtype} of {x.dim()} dimensions"
    if stack.implementation in _CAST_THEMSELVES:
        return None
    computed = x.dtype
    if torch.is_autocast_enabled(x.device.type):
        computed = torch.get_autocast_dtype(x.device.type)
    if computed is dtype:
        return None
    return f"{stack.implementation} computes in {computed}, experts are {dtype}"


def _served(stack: Stack, x: Tensor, index: Tensor, weights: Tensor) -> Tensor | Fallback:
    up, down, gate, transposed, *_ = stack
    try:
        hidden = x.to(up.weight.dtype)
        y = lora_experts(hidden, index, weights, up, down, gate=gate, transposed=transposed)
    except ArgumentError as error:  # before anything was computed: PEFT has its own word for it
        return refused(error)
    return y.to(x.dtype)


def _key(
    up: ExpertLinear, down: ExpertLinear, transposed: bool, implementation: str, adapters: int
) -> tuple:
    E, N, K = up.weight.shape
    if transposed:
        N, K = K, N
    width = down.weight.shape[1 if transposed else 2]
    ranks = [0 if linear.lora_A is None else linear.lora_A.shape[1] for linear in (up, down)]
    kind = f"LoRA on {E} experts of {width}, {implementation}"
    kind += ", transposed" if transposed else ""
    kind += "" if up.bias is None else ", bias"
    if isinstance(up.weight, QuantizedWeight):
        kind += f", {FORMATS[up.weight.layout[0]].name.upper()}"
    kind += "" if ranks[0] == ranks[1] else f", rank {ranks[1]} down"
    kind += f", {adapters} adapters" if adapters > 1 else ""
    return PatchedParamWrapper.op, kind, N, K, ranks[0]


def _trial_key(stack: Stack, x: Tensor, index: Tensor, weights: Tensor) -> tuple:
    """Return all that a trial's outcome depends on, but for the rows and the device."""
    factors = [f for linear in stack[:2] for f in linear[1:3] if f is not None]
    trained = any(f.requires_grad for f in factors)
    kind = x.device.type
    cast = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
    dtypes = (x.dtype, stack.up.weight.dtype, factors[0].dtype, weights.dtype, cast)
    return (*stack.key, f"top {index.shape[-1]}", *dtypes, trained)
