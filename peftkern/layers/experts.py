"""Mixtures of experts for plain torch: frozen in NF4, and with a low-rank update of each expert.

    layer = LoRAExperts(NF4Experts(gate_up_proj, down_proj), r=16, lora_alpha=32)
    y = layer(hidden, top_k_index, top_k_weights)

Modules of fused experts in transformers have the same parameters and flags, and may stand in the
place of `Experts` everywhere here.
"""

from __future__ import annotations

import copy
import itertools
import math
import sys
from collections.abc import Callable, Iterable, Mapping
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from peftkern.functional import ExpertLinear, grouped_lora_linear, lora_experts, route
from peftkern.functional.lora_experts import swiglu
from peftkern.layers.base import check_update, low_rank_update
from peftkern.layers.expert_stack import ExpertStack, expert_weight, is_transposed, set_stack
from peftkern.layers.nf4_stack import NF4Stack

__all__ = ["Experts", "LoRAExperts", "NF4Experts"]
Gate = Callable[[Tensor], Tensor]


class Experts(nn.Module):
    """Frozen experts: down_e(gate(up_e(x))), summed over each token's experts e by its weights.

    Args:
        up: [E, 2I, K], gate and up projection in one, or [E, I, K]; [E, K, 2I] if transposed;
            dense, or a stack in 4 bits.
        down: [E, K, I], or [E, I, K] if transposed.
        up_bias, down_bias: [E, 2I] and [E, K], both or none.
        gate: from [R, 2I], or [R, I], to [R, I].

    Parameters: `gate_up_proj`, or `up_proj` if it has no gate's half, `down_proj`, and their
    `..._bias`. `has_gate`, `has_bias` and `is_transposed` are those of transformers' experts.
    """

    def __init__(
        self,
        up: Tensor,
        down: Tensor,
        *,
        up_bias: Tensor | None = None,
        down_bias: Tensor | None = None,
        gate: Gate = swiglu,
        transposed: bool = False,
    ) -> None:
        super().__init__()
        if up.dim() != 3 or down.dim() != 3 or len(up) != len(down):
            raise ValueError(
                "up, down: expected [experts, out, in] of as many experts, got "
                f"{list(up.shape)} and {list(down.shape)}"
            )
        if (up_bias is None) != (down_bias is None):
            raise ValueError("up_bias, down_bias: expected two tensors or none, got one")
        inner = down.shape[1 if transposed else 2]
        self.has_gate = up.shape[2 if transposed else 1] == 2 * inner
        self.has_bias, self.is_transposed = up_bias is not None, transposed
        self._apply_gate = self.act_fn = gate
        name = up_name(self)
        for own, weight in ((name, up), ("down_proj", down)):
            self._set_weight(own, weight.detach())
        for own, bias in ((f"{name}_bias", up_bias), ("down_proj_bias", down_bias)):
            if bias is not None:
                setattr(self, own, nn.Parameter(bias.detach(), requires_grad=False))

    @classmethod
    def from_experts(cls, experts: nn.Module, **options: int) -> Experts:
        """Take the weights and the gate of a module of fused experts, which is left as it is."""
        up, down = weight_names(experts)
        empty = copy.copy(experts)  # whose gate keeps no weights alive
        empty._parameters = {}
        gate = empty._apply_gate if experts.has_gate else empty.act_fn
        own = experts._parameters
        biases = [own.get(f"{name}_bias") for name in (up, "down_proj")]
        kept = {"up_bias": biases[0], "down_bias": biases[1], "transposed": experts.is_transposed}
        return cls(own[up], own[down], gate=gate, **kept, **options)

    def _set_weight(self, name: str, weight: Tensor) -> None:
        if isinstance(weight, ExpertStack):
            set_stack(self, name, weight)
        else:
            setattr(self, name, nn.Parameter(weight, requires_grad=False))

    def forward(self, hidden: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """Return [T, K]. Args: hidden [T, K]; ids and routing weights [T, top]."""
        return experts_forward(self, hidden, top_k_index, top_k_weights)

    def extra_repr(self) -> str:
        shapes = {n: tuple(p.shape) for n, p in self._parameters.items() if p.dim() == 3}
        return ", ".join(f"{name}={shape}" for name, shape in shapes.items())


class NF4Experts(Experts):
    """Frozen experts whose weights are kept in NF4, as `NF4Stack`s.

    Args: those of `Experts`; weights may be stacks already. blocksize: of the others, which become
        stacks, an expert at a time.
    """

    def __init__(self, up: Tensor, down: Tensor, *, blocksize: int = 64, **experts: object) -> None:
        self.blocksize = blocksize
        super().__init__(up, down, **experts)

    def _set_weight(self, name: str, weight: Tensor) -> None:
        if not isinstance(weight, ExpertStack):
            weight = NF4Stack.from_dense(weight, blocksize=self.blocksize)
        super()._set_weight(name, weight)


class LoRAExperts(nn.Module):
    """Frozen experts plus a trained low-rank update of each.

    W_e + scaling * lora_B_e @ lora_A_e for each weight W of `targets`.

    Args:
        experts: `Experts`, `NF4Experts` or fused experts of transformers; they are frozen.
        r: rank for each expert. lora_alpha: scaling = lora_alpha / r.
        targets: of "gate_up_proj" (or "up_proj") and "down_proj"; None takes both.
        lora_dropout: on the input of the updates, in training only, drawn once for a token.
        adapter_dtype: of the factors.

    State dict: the experts' under `experts`, `lora_A.<target>` [E, r, K], `lora_B.<target>`
    [E, N, r]. `peft_state_dict` has PEFT's keys and layout.
    Source: Hu et al. 2021, arXiv:2106.09685, in each expert; PEFT's `target_parameters`
    """

    def __init__(
        self,
        experts: nn.Module,
        r: int = 8,
        lora_alpha: float = 16,
        targets: Iterable[str] | None = None,
        lora_dropout: float = 0.0,
        adapter_dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__()
        r = check_update(r, lora_alpha, lora_dropout)
        names = weight_names(experts)
        chosen = names if targets is None else tuple(targets)
        if not chosen or not set(chosen) <= set(names):
            raise ValueError(f"targets: expected some of {names}, got {chosen}")
        self.experts = experts.requires_grad_(False)
        self.r, self.lora_alpha, self.lora_dropout = r, lora_alpha, lora_dropout
        self.scaling = lora_alpha / r
        self.targets = tuple(name for name in names if name in chosen)
        self.lora_A, self.lora_B = nn.ParameterDict(), nn.ParameterDict()
        for name in self.targets:
            E, N, K = self._sizes(name)
            options = {"dtype": adapter_dtype, "device": experts._parameters[name].device}
            self.lora_A[name] = nn.Parameter(torch.empty(E, r, K, **options))
            self.lora_B[name] = nn.Parameter(torch.empty(E, N, r, **options))
        self.reset_lora_parameters()

    @classmethod
    def from_experts(
        cls, experts: nn.Module, *, blocksize: int | None = None, **update: object
    ) -> LoRAExperts:
        """Add an update to a copy of the experts in NF4, or to themselves without `blocksize`.

        Args: update: r, lora_alpha, targets, lora_dropout and adapter_dtype, as above.
        """
        if blocksize is not None:
            experts = NF4Experts.from_experts(experts, blocksize=blocksize)
        return cls(experts, **update)

    def reset_lora_parameters(self) -> None:
        """Draw lora_A as nn.Linear draws its weight, and zero lora_B: the update starts at zero."""
        for name in self.targets:
            bound = 1 / math.sqrt(max(1, self.lora_A[name].shape[2]))
            nn.init.uniform_(self.lora_A[name], -bound, bound)
            nn.init.zeros_(self.lora_B[name])

    def forward(self, hidden: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """Return [T, K]. Args: hidden [T, K]; ids and routing weights [T, top]."""
        updates = {n: (self.lora_A[n], self.lora_B[n], self.scaling) for n in self.targets}
        args = (hidden, top_k_index, top_k_weights, updates)
        if self.training and self.lora_dropout:
            return _with_dropout(self.experts, *args, p=self.lora_dropout)
        return experts_forward(self.experts, *args)

    @torch.no_grad()
    def merge(self) -> nn.Module:
        """Make experts with dense weights that compute the same, without the update's cost.

        All else is shared with the frozen ones. Each weight is summed in float32 or what is wider
        and rounded once.
        """
        merged = copy.copy(self.experts)
        if isinstance(merged, NF4Experts):
            merged.__class__ = Experts
        merged._parameters = dict(self.experts._parameters)
        for name in weight_names(merged):
            weight = merged._parameters[name]
            dense = torch.empty(weight.shape, dtype=weight.dtype, device=weight.device)
            for expert in range(len(dense)):
                dense[expert] = self._merged(name, weight[expert], expert)
            merged._parameters[name] = nn.Parameter(dense, requires_grad=False)
        return merged

    def _merged(self, name: str, weight: Tensor, expert: int) -> Tensor:
        if name not in self.targets:
            return weight
        A, B = self.lora_A[name][expert], self.lora_B[name][expert]
        update = low_rank_update(A, B, self.scaling)
        return weight.to(update.dtype) + (update.T if self.experts.is_transposed else update)

    def peft_state_dict(self, prefix: str = "") -> dict[str, Tensor]:
        """Return the factors in PEFT's keys and layout, of an adapter of the same targets.

        Args: prefix, of the experts in PEFT's names, with its dot.
        """
        state = {}
        for name, place in self._peft_places(prefix).items():
            A, B = self.lora_A[name].detach(), self.lora_B[name].detach()
            state[f"{place}lora_A.weight"] = A.reshape(-1, A.shape[2])
            state[f"{place}lora_B.weight"] = B.permute(1, 2, 0).reshape(B.shape[1], -1)
        return state

    @torch.no_grad()
    def load_peft_state_dict(self, state: Mapping[str, Tensor], prefix: str = "") -> None:
        """Read what `peft_state_dict` returns. Raises: KeyError, ValueError naming the key."""
        for name, place in self._peft_places(prefix).items():
            E, N, K = self._sizes(name)
            A, B = (state[f"{place}lora_{factor}.weight"] for factor in "AB")
            for key, came, shape in (("A", A, (E * self.r, K)), ("B", B, (N, self.r * E))):
                if came.shape != shape:
                    wrong = f"expected {list(shape)}, got {list(came.shape)}"
                    raise ValueError(f"{place}lora_{key}.weight: {wrong}")
            self.lora_A[name].copy_(A.view(E, self.r, K))
            self.lora_B[name].copy_(B.view(N, self.r, E).permute(2, 0, 1))

    def _peft_places(self, prefix: str) -> dict[str, str]:
        """Return PEFT's prefix for each target: the wrapper of the last one is the outermost."""
        last = len(self.targets) - 1
        return {n: prefix + "base_layer." * (last - i) for i, n in enumerate(self.targets)}

    def _sizes(self, name: str) -> tuple[int, int, int]:
        E, N, K = self.experts._parameters[name].shape
        return (E, K, N) if self.experts.is_transposed else (E, N, K)

    def extra_repr(self) -> str:
        return f"r={self.r}, scaling={self.scaling:g}, lora_dropout={self.lora_dropout:g}"


# Asked for only where it is imported: no experts of transformers come without it.
_TRANSFORMERS_GATE = "transformers.integrations.moe"
_Updates = Mapping[str, tuple[Tensor, Tensor, float]]


def up_name(experts: nn.Module) -> str:
    """Return the name of the first of the two weights of fused experts."""
    return "gate_up_proj" if experts.has_gate else "up_proj"


def ends_in_norm(experts: nn.Module) -> bool:
    """Return whether fused experts compute a norm of their own; the first of 5 have no flag."""
    return getattr(experts, "has_post_expert_norm", False)


def weight_names(experts: nn.Module) -> tuple[str, str]:
    """Return the names of the two weights of fused experts.

    Raises: TypeError if the module has other ones, computes more, or has no flags to tell it by.
    """
    flags = ("has_gate", "has_bias", "is_transposed")
    if all(hasattr(experts, flag) for flag in flags):
        names = (up_name(experts), "down_proj")
        has = all(experts._parameters.get(name) is not None for name in names)
        if has and not ends_in_norm(experts):
            return names
    raise TypeError(
        "experts: expected Experts or fused experts of transformers with gate_up_proj and "
        f"down_proj, got {type(experts).__name__}"
    )


def gate_of(experts: nn.Module) -> Gate:
    """Return the gate of fused experts, `swiglu` in the place of what computes exactly that."""
    if not experts.has_gate:
        return experts.act_fn
    return swiglu if _is_swiglu(experts._apply_gate) else experts._apply_gate


def _is_swiglu(gate: Gate) -> bool:
    """Return whether a gate is transformers' own with SiLU, and nobody looks on or has a say."""
    default = getattr(sys.modules.get(_TRANSFORMERS_GATE), "_default_apply_gate", None)
    if default is None or getattr(gate, "__func__", None) is not default:
        return False
    act = getattr(gate.__self__, "act_fn", None)
    silu = getattr(sys.modules.get("transformers.activations"), "SiLUActivation", nn.SiLU)
    if type(act) not in (nn.SiLU, silu) or "forward" in vars(act):
        return False
    hooks = (act._forward_hooks, act._forward_pre_hooks, act._backward_hooks)
    return not any((*hooks, act._backward_pre_hooks, nn.modules.module._has_any_global_hook()))


def experts_forward(
    experts: nn.Module,
    hidden: Tensor,
    top_k_index: Tensor,
    top_k_weights: Tensor,
    updates: _Updates | None = None,
) -> Tensor:
    """Run fused experts, dense or NF4, with {name of a weight: lora_A, lora_B, scaling}."""
    gate, linears = _read(experts)
    for name, (lora_A, lora_B, scaling) in (updates or {}).items():
        update = {"lora_A": lora_A, "lora_B": lora_B, "scaling": scaling}
        linears[name] = linears[name]._replace(**update)
    options = {"gate": gate, "transposed": is_transposed(experts, *linears)}
    return lora_experts(hidden, top_k_index, top_k_weights, *linears.values(), **options)


def _with_dropout(
    experts: nn.Module,
    hidden: Tensor,
    top_k_index: Tensor,
    top_k_weights: Tensor,
    updates: _Updates,
    p: float,
) -> Tensor:
    """Run the same with the updates on inputs of their own."""

    def update(part: Part) -> Tensor:
        if part.name not in updates:
            return part.y
        A, B, scaling = updates[part.name]
        how = {"scaling": scaling, "rows": part.rows}
        return part.y + grouped_lora_linear(F.dropout(part.x, p), None, part.offsets, A, B, **how)

    return experts_in_parts(experts, hidden, top_k_index, top_k_weights, update)


class Part(NamedTuple):
    """Products y [R, N] of one weight, by name; those of expert e end at offsets[e], int32 [E].

    Row i is that of x[rows[i]], or of x[i] if rows is None, and of the token tokens[i], int32 [R].
    From offsets[-1] on they are of no expert here.
    """

    name: str
    x: Tensor
    rows: Tensor | None
    tokens: Tensor
    offsets: Tensor
    y: Tensor

    def of_experts(self) -> list[slice]:
        """Return which rows are each expert's; a GPU is waited for once."""
        return [slice(*ends) for ends in itertools.pairwise([0, *self.offsets.tolist()])]

    def inputs(self, chosen: slice) -> Tensor:
        """Return the inputs [r, K] of some rows."""
        return self.x[chosen if self.rows is None else self.rows[chosen]]


def experts_in_parts(
    experts: nn.Module,
    hidden: Tensor,
    top_k_index: Tensor,
    top_k_weights: Tensor,
    change: Callable[[Part], Tensor],
) -> Tensor:
    """Run fused experts without updates, and go on with what `change` makes of each product."""
    gate, linears = _read(experts)
    num_experts = linears["down_proj"].weight.shape[0]
    tokens, offsets, inverse = route(top_k_index, num_experts)
    transposed = is_transposed(experts, *linears)

    def linear(name: str, x: Tensor, rows: Tensor | None) -> Tensor:
        frozen = linears[name]
        options = {"bias": frozen.bias, "transposed": transposed, "rows": rows}
        y = grouped_lora_linear(x, frozen.weight, offsets, **options)
        return change(Part(name, x, rows, tokens, offsets, y))

    up, down = linears
    y = linear(down, gate(linear(up, hidden, tokens)), None)
    of_tokens = y.index_select(0, inverse.view(-1)).view(*inverse.shape, y.shape[1])
    return (of_tokens * top_k_weights[..., None]).sum(1).to(hidden.dtype)


def _read(experts: nn.Module) -> tuple[Gate, dict[str, ExpertLinear]]:
    names = weight_names(experts)
    own = experts._parameters
    gate = gate_of(experts)
    biases = {name: own[f"{name}_bias"] if experts.has_bias else None for name in names}
    return gate, {n: ExpertLinear(expert_weight(own[n]), bias=biases[n]) for n in names}
