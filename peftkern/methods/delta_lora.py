"""Delta-LoRA: the frozen weight follows the change of the low-rank product.

After step K of training, W <- W + lam * scaling * (B' A' - B A) at each step, A' and B' being what
the optimizer made of A and B. The sum over steps telescopes:

    W_T = W_0 + lam * scaling * (B_T A_T - B_K A_K)

so `DeltaLoRALinear` never writes to W, and works on NF4 as on anything; `InPlaceDeltaLoRA` writes,
for layers that are there already, PEFT's among them.

    for layer in ...: DeltaLoRALinear(linear, r=8)        # in the linear layer's place
    schedule = DeltaLoRAScheduler(model, start_step=500)
    ...
    optimizer.step()
    schedule.step()

The paper has no dropout in the update, and neither has this.
Source: Zi et al. 2023, arXiv:2309.02411
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from peftkern.functional.arguments import integer, number
from peftkern.layers.base import (
    LowRankFactors,
    check_update,
    low_rank_forward,
    low_rank_update,
    merged,
)
from peftkern.layers.frozen_base import OverFrozenBase
from peftkern.methods.pairs import AdapterPair, current_pairs, find_pairs
from peftkern.methods.processes import (
    agree,
    check_readable,
    is_sharded,
    of_first,
    part_of,
    several,
    whole,
)

__all__ = ["DeltaLoRALinear", "DeltaLoRAScheduler", "InPlaceDeltaLoRA"]
ROUNDINGS = ("stochastic", "nearest")
_WRITABLE = (torch.bfloat16, torch.float32, torch.float64)
_CHUNK = 1 << 22  # elements of the weight that are written at once


class DeltaLoRALinear(LowRankFactors, OverFrozenBase):
    """Frozen linear layer plus a low-rank update that its weight follows, in telescoped form.

    y = base(x) + s * (1 + lam) * (x @ lora_A.T) @ lora_B.T - lam * s * (x @ start_A.T) @ start_B.T

    with s = lora_alpha / r; before `start()` as with lam = 0. Gradients are those that the paper's
    W + s * lora_B @ lora_A has, in which W is a constant: for lora_A and lora_B at s, not at
    s * (1 + lam), and for x of the whole.

    Args:
        base: nn.Linear, or a layer of `peftkern.layers` with an NF4 weight; it is taken over and
            frozen.
        r, lora_alpha: as in `peftkern.layers.LoRALinear`. lam: how far the weight follows.
        adapter_dtype: of lora_A [r, K] and lora_B [N, r].

    State dict: `base.*`, `lora_A`, `lora_B`, and after the start `start_A` and `start_B`, which are
    buffers: who saves the trained parameters alone loses them, and with them the function.
    Source: Zi et al. 2023, eq. 4 and algorithm 1, arXiv:2309.02411
    """

    start_A: Tensor | None
    start_B: Tensor | None

    def __init__(
        self,
        base: nn.Linear,
        *,
        r: int = 8,
        lora_alpha: float = 16,
        lam: float = 2.0,
        adapter_dtype: torch.dtype = torch.float32,
    ) -> None:
        r = check_update(r, lora_alpha)
        _check_lam(lam)
        super().__init__(base)
        self.r, self.lora_alpha, self.lam = r, lora_alpha, lam
        self.scaling = lora_alpha / r
        self._add_factors(r, adapter_dtype, base.weight.device)
        self.register_buffer("start_A", None)
        self.register_buffer("start_B", None)
        self.reset_lora_parameters()

    @property
    def started(self) -> bool:
        return self.start_A is not None

    def start(self) -> None:
        """Let the weight follow the product from now on; the output does not change by this.

        Raises: ValueError if it has started: what the weight has followed so far would be lost; and
            under FSDP1 and DeepSpeed's ZeRO-3, which hold the factors in pieces.
        """
        if self.started:
            raise ValueError("start: this layer has started already")
        check_readable([("lora_A", self.lora_A), ("lora_B", self.lora_B)], "Delta-LoRA")
        self.start_A = whole(self.lora_A.detach()).clone()
        self.start_B = whole(self.lora_B.detach()).clone()

    def _forward(self, x: Tensor) -> Tensor:
        return low_rank_forward(self.base, x, *self._factors(), scaling=self.scaling)

    def _factors(self) -> tuple[Tensor, Tensor]:
        """Return one pair of rank 2 r in place of the two: its product is all that W_0 lacks."""
        if self.start_A is None:
            return self.lora_A, self.lora_B
        # lora_A meets (1 + lam) * lora_B, in backward too: undone there. lora_B meets lora_A.
        lora_A = _ScaledGradient.apply(self.lora_A, 1 / (1 + self.lam))
        # 16-bit factors are summed in float32: the two products nearly cancel at first.
        wide = torch.promote_types(self.lora_B.dtype, torch.float32)
        lora_B, start_B = self.lora_B.to(wide), self.start_B.to(wide)
        lora_B = lora_B + self.lam * lora_B.detach()
        return torch.cat([lora_A, self.start_A]), torch.cat([lora_B, -self.lam * start_B], dim=1)

    def merge(self) -> nn.Linear:
        """Make a dense nn.Linear that computes the same, in the dtype the weight had."""
        with torch.no_grad():
            return merged(self.base, low_rank_update(*self._factors(), self.scaling))

    def _load_from_state_dict(self, state_dict: dict, prefix: str, *args: Any) -> None:
        if f"{prefix}lora_A" in state_dict:  # the state of a layer that has started or has not
            started = any(f"{prefix}{name}" in state_dict for name in ("start_A", "start_B"))
            for name, factor in (("start_A", self.lora_A), ("start_B", self.lora_B)):
                setattr(self, name, torch.zeros_like(factor.detach()) if started else None)
        super()._load_from_state_dict(state_dict, prefix, *args)

    def extra_repr(self) -> str:
        return f"r={self.r}, scaling={self.scaling:g}, lam={self.lam:g}, started={self.started}"


class _ScaledGradient(torch.autograd.Function):
    """Copy of a tensor, whose gradient is multiplied by a number."""

    @staticmethod
    def forward(ctx, tensor, factor):
        ctx.factor = factor
        return tensor.clone()

    @staticmethod
    def backward(ctx, grad):
        return grad * ctx.factor, None


class DeltaLoRAScheduler:
    """Start of a model's DeltaLoRALinear layers after `start_step` steps of the optimizer.

    Call `step()` after each optimizer step.
    Raises: ValueError if there is no such layer, or on a negative start_step (0: start at once).
    """

    def __init__(self, model: nn.Module, start_step: int = 500) -> None:
        self.layers = {n: m for n, m in model.named_modules() if isinstance(m, DeltaLoRALinear)}
        if not self.layers:
            raise ValueError("model: expected DeltaLoRALinear layers, found none")
        for name, layer in self.layers.items():
            check_readable([(f"{name}.lora_B", layer.lora_B)], "Delta-LoRA", model)
        self.start_step, self.last_step = integer("start_step", start_step), 0
        self._start()

    def step(self) -> None:
        self.last_step += 1
        self._start()

    def _start(self) -> None:
        if self.last_step >= self.start_step:
            for layer in self.layers.values():
                if not layer.started:
                    layer.start()

    def state_dict(self) -> dict[str, int]:
        """Return where it stands; what the layers have taken down is in their own state."""
        return {"start_step": self.start_step, "last_step": self.last_step}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        self.start_step, self.last_step = state["start_step"], state["last_step"]


class InPlaceDeltaLoRA:
    """Delta-LoRA that writes each change of the low-rank product into the layer's dense weight.

    W <- W + lam * scaling * (B' A' - B A) at each `step()` after the first `start_step`, to be
    called after each optimizer step. The forward pass stays that of the layer, LoRA's own. Weights
    change: saving the adapter alone does not save what was trained.

    Args:
        model: holds LoRALinear layers, or PEFT's LoRA layers, over dense weights in bfloat16,
            float32 or float64 (for others, and for 4 bits, there is `DeltaLoRALinear`).
        lam, start_step: as in `DeltaLoRALinear` and `DeltaLoRAScheduler`.
        rounding: how a bfloat16 weight is written. A step's change is mostly below half of the last
            bit of the weight, so "nearest" loses most of it; "stochastic" rounds up or down with
            the probability that makes the mean right.
        generator: of the random bits; torch's own by default, and where several processes train one
            of its own, seeded by the first. Given, it has to be in one state in all of them.
        adapter: the name of the PEFT adapter to treat so; all trained ones by default.

    A step writes to all weights or, if it raises, to none; it may then be taken again.
    Raises: TypeError or ValueError naming the argument, or the layer that cannot be written to; and
        from `step()` a ValueError naming the layers whose change is not finite, which would stay in
        the weights for good.
    Source: Zi et al. 2023, algorithm 1, arXiv:2309.02411
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        lam: float = 2.0,
        start_step: int = 500,
        rounding: str = "stochastic",
        generator: torch.Generator | None = None,
        adapter: str | None = None,
    ) -> None:
        _check_lam(lam)
        if rounding not in ROUNDINGS:
            raise ValueError(f"rounding: expected one of {ROUNDINGS}, got {rounding!r}")
        self.pairs = find_pairs(model, adapter)
        for pair in self.pairs:
            _dense_weight(pair)
        self.lam, self.rounding, self.generator = lam, rounding, generator
        if several() and rounding == "stochastic":
            self.generator = _shared(generator, self.pairs[0].lora_B.device)
        self.start_step, self.last_step = integer("start_step", start_step), 0
        self._written: list[tuple[Tensor, Tensor]] = []  # A and B as the weights contain them
        if self.start_step == 0:
            self._follow()

    def _copies(self) -> list[tuple[Tensor, Tensor]]:
        return [
            (whole(p.lora_A.detach()).clone(), whole(p.lora_B.detach()).clone()) for p in self.pairs
        ]

    @torch.no_grad()
    def step(self) -> None:
        if self.last_step + 1 >= self.start_step:
            self._follow()
        self.last_step += 1

    @torch.no_grad()
    def _follow(self) -> None:
        """Write what happened to the products since they were last written; at first, nothing."""
        self.pairs = list(current_pairs(self.pairs))
        weights = [_dense_weight(pair) for pair in self.pairs]
        changes = list(zip(self.pairs, weights, self._written or self._copies(), strict=True))
        wrong = [~_norm(*self._change(*change)).isfinite() for change in changes]
        wrong = torch.stack([w.to(wrong[0].device) for w in wrong]).tolist()
        if any(wrong):
            names = ", ".join(p.name for p, w in zip(self.pairs, wrong, strict=True) if w)
            raise ValueError(
                f"{names}: the change of lora_B @ lora_A is not finite; nothing was written"
            )
        for pair, weight, before in changes if self._written else ():
            left, right = self._change(pair, weight, before)
            if is_sharded(weight):  # by rows
                left, weight = part_of(left, weight).to_local(), weight.to_local()
            rows = max(1, _CHUNK // max(1, weight.shape[1]))
            for some, change in zip(weight.split(rows), left.split(rows), strict=True):
                self._write(some, some.to(left.dtype) + change @ right)
        self._written = self._copies()

    def _change(
        self, pair: AdapterPair, weight: Tensor, before: tuple[Tensor, Tensor]
    ) -> tuple[Tensor, Tensor]:
        """Return two factors of lam * scaling * (B' A' - B A), [N, 2 r] and [2 r, K].

        Their product is no difference of two nearly equal ones.
        """
        wide = torch.promote_types(weight.dtype, torch.float32)
        after = whole(pair.lora_A), whole(pair.lora_B)
        A, B, new_A, new_B = (t.to(wide) for t in (*before, *after))
        left = torch.cat([new_B - B, B], dim=1) * (self.lam * pair.scaling)
        return left, torch.cat([new_A, new_A - A])

    def _write(self, weight: Tensor, value: Tensor) -> None:
        if weight.dtype is torch.bfloat16 and self.rounding == "stochastic":
            value = round_stochastically(value, self.generator)
        weight.copy_(value)

    def state_dict(self) -> dict[str, Any]:
        """Return what `load_state_dict` needs to go on; the weights are the model's to save."""
        names = (f"{p.name}:{p.adapter}" for p in self.pairs)
        return {
            "start_step": self.start_step,
            "last_step": self.last_step,
            "written": dict(zip(names, self._written, strict=False)),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where `state_dict` was taken.

        Raises: ValueError naming the layers if they are others.
        """
        names = [f"{p.name}:{p.adapter}" for p in self.pairs]
        written = state["written"]
        if written and set(written) != set(names):
            other = sorted(set(written) ^ set(names))
            raise ValueError(f"state: other layers: {', '.join(other)}")
        self.start_step, self.last_step = state["start_step"], state["last_step"]
        self._written = []
        for pair, name in zip(self.pairs, names, strict=True):
            if written:
                A, B = written[name]
                device = pair.lora_A.device
                self._written.append((A.to(device, copy=True), B.to(device, copy=True)))


def round_stochastically(x: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """Round float32 to bfloat16, up or down with the probability that makes the mean x.

    The 16 bits that are dropped are the probability of going up in size. NaN and Inf stay.
    Raises: ValueError unless x is float32.
    """
    if x.dtype is not torch.float32:
        raise ValueError(f"x: expected torch.float32, got {x.dtype}")
    noise = torch.randint(1 << 16, x.shape, generator=generator, dtype=torch.int32, device=x.device)
    bits = (x.contiguous().view(torch.int32) + noise) & -(1 << 16)
    return torch.where(torch.isfinite(x), bits.view(torch.float32), x).bfloat16()


def _norm(left: Tensor, right: Tensor) -> Tensor:
    """Return a bound of the entries of left @ right; NaN or Inf if one of the two holds it."""
    return left.norm() * right.norm()


def _dense_weight(pair: AdapterPair) -> Tensor:
    """Return the weight [N, K] that a pair updates, to be written to."""
    layer = pair.layer
    if getattr(layer, "merged", False):
        raise ValueError(f"{pair.name}: the adapter is merged into the weight; unmerge it first")
    weight = getattr(getattr(layer, "base_layer", layer), "weight", None)
    if getattr(layer, "fan_in_fan_out", False) and weight is not None:
        weight = weight.mT
    if (
        weight is not None
        and is_sharded(weight)
        and not all(place.is_replicate() or place.is_shard(0) for place in weight.placements)
    ):
        raise ValueError(
            f"{pair.name}: expected a weight sharded by its rows, got {weight.placements}; "
            "DeltaLoRALinear works without writing to it"
        )
    shape = (pair.lora_B.shape[0], pair.lora_A.shape[1])
    if weight is None or weight.shape != shape or weight.dtype not in _WRITABLE:
        came = "none" if weight is None else f"{list(weight.shape)} {weight.dtype}"
        raise ValueError(
            f"{pair.name}: expected a dense weight {list(shape)} of one of {_WRITABLE}, got {came};"
            " DeltaLoRALinear works without writing to it"
        )
    return weight.detach()


def _shared(generator: torch.Generator | None, device: torch.device) -> torch.Generator:
    """Return a generator that draws the same in all processes.

    Raises: ValueError if the one that is given does not.
    """
    if generator is None:
        seed = int(torch.randint(1 << 62, ()))
        return torch.Generator(device).manual_seed(of_first(seed, device))
    if not agree(generator.get_state().numpy().tobytes(), device):
        raise ValueError(
            "generator: expected one state in all processes, got others: weights that are rounded "
            "by it would part; seed it alike, or give none"
        )
    return generator


def _check_lam(lam: float) -> None:
    if not 0.0 <= number("lam", lam) < math.inf:
        raise ValueError(f"lam: expected a finite number of at least 0, got {lam}")
