"""Frozen NF4 experts of a transformers model on kernels, which read the stored weights.

transformers' own ways to run experts decode whole stacks (grouped_mm), or an expert at a time in a
loop (eager), and keep what they decoded for backward. It has a registry for others, asked at each
call, in which this module puts its own: a name, which nobody takes unless asked to.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator

from torch import Tensor, nn
from transformers import PreTrainedModel

from peftkern.backends import dispatch
from peftkern.layers.expert_stack import stacks_of
from peftkern.layers.experts import ends_in_norm, experts_forward

__all__ = ["serve_nf4_experts", "stop_serving"]
try:
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
except ImportError:  # before 5.0, whose experts are modules of their own
    ALL_EXPERTS_FUNCTIONS = None


class _Registered(str):
    """A name whose unpickling imports this module, which makes it known to transformers."""


IMPLEMENTATION = _Registered("peftkern")
_DEFAULT = "grouped_mm"  # of transformers, and what runs experts that are not in NF4
_BEFORE = "_peftkern_experts_before"  # a model's choices until then


def serve_nf4_experts(model: nn.Module) -> list[str]:
    """Run NF4 experts of the transformers models in `model` on kernels; return their names.

    Their `experts_implementation` becomes "peftkern", where it was transformers' default. Classes
    that do not ask for it (Llama4, JetMoE) decode their weights as they read them.
    """
    served: list[str] = []
    for base, names in _servable(model):
        chosen = _choices(base)
        if _DEFAULT in chosen.values():
            ours = {k: IMPLEMENTATION if v == _DEFAULT else v for k, v in chosen.items()}
            base.__dict__.setdefault(_BEFORE, chosen)
            base.set_experts_implementation(ours)
        served += names
    return served


def nf4_experts(model: nn.Module) -> list[str]:
    """Return the names of the experts that `serve_nf4_experts` would serve, or does."""
    return [name for _, names in _servable(model) for name in names]


def _servable(model: nn.Module) -> Iterator[tuple[PreTrainedModel, list[str]]]:
    """Yield the models of transformers that have NF4 experts for us, with the names of these."""
    for path, base in models_of(model) if ALL_EXPERTS_FUNCTIONS is not None else ():
        chosen = _choices(base).values()
        names = [name for name, module in base.named_modules() if _reason(module) is None]
        if names and (_DEFAULT in chosen or IMPLEMENTATION in chosen) and _takes_ours(base):
            yield base, [f"{path}.{name}".lstrip(".") for name in names]


def _choices(base: PreTrainedModel) -> dict[str, str | None]:
    """Return what `set_experts_implementation` restores; not every 5 has a method for that."""
    parts = {key: getattr(base.config, key, None) for key in base.config.sub_configs}
    parts = {"": base.config, **parts}
    return {k: part._experts_implementation for k, part in parts.items() if part is not None}


def _takes_ours(base: PreTrainedModel) -> bool:
    """Return whether this transformers takes a name that was registered; the first of 5 do not."""
    try:
        base.get_correct_experts_implementation(IMPLEMENTATION)
    except ValueError:
        return False
    return True


def is_serving(module: nn.Module) -> bool:
    """Return whether `serve_nf4_experts` has changed a model of transformers."""
    return _BEFORE in module.__dict__


def stop_serving(model: nn.Module, keep: Collection[nn.Module] = ()) -> None:
    """Undo `serve_nf4_experts`, but for some models."""
    for _, base in models_of(model):
        if base in keep:
            continue
        before = base.__dict__.pop(_BEFORE, None)
        if before is not None:
            base.set_experts_implementation(before)


def models_of(model: nn.Module) -> Iterator[tuple[str, PreTrainedModel]]:
    """Yield (name, model) of the outermost models of transformers."""
    found: list[str] = []
    for name, module in model.named_modules():
        inside = any(not outer or f"{name}.".startswith(f"{outer}.") for outer in found)
        if not inside and isinstance(module, PreTrainedModel):
            found.append(name)
            yield name, module


def _reason(experts: nn.Module) -> str | None:
    """Return the reason to run experts as transformers does."""
    if not (hasattr(experts, "config") and hasattr(experts, "has_gate")):  # of its decorator
        return "no fused experts that ask for an implementation"
    if ends_in_norm(experts):
        return "the experts end in a norm"
    if len(stacks_of(experts)) != 2:  # PEFT's fold among others
        return "the experts are not in 4 bits"
    return None


def _forward(
    self: nn.Module, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor
) -> Tensor:
    """Run experts [T, K] as transformers' other functions do, and in the dtype that they do."""
    reason = _reason(self)
    if reason is not None:
        dispatch.record_fallback("lora_experts", reason)
        function = ALL_EXPERTS_FUNCTIONS[_DEFAULT]
        return function(self, hidden_states, top_k_index, top_k_weights)
    x = hidden_states.to(self.down_proj.dtype)
    return experts_forward(self, x, top_k_index, top_k_weights).to(hidden_states.dtype)


if ALL_EXPERTS_FUNCTIONS is not None:
    ALL_EXPERTS_FUNCTIONS.register(IMPLEMENTATION, _forward)
