"""AdaLoRA's half of `peftkern.patch`: the layers, the rank allocator, the orthogonality loss.

All three by class swap: PEFT's `SVDLinear` and `SVDLinear4bit`, an `AdaLoraModel` instance, and its
`rankallocator`. Keys, rank_pattern, saving, loading and merging stay PEFT's own code. Masks are
those of PEFT (`ties = "peft"`; set `model.base_model.rankallocator.ties = "exact"` for exactly the
budget at every step). Where this differs from PEFT on purpose:

- `ranknum` takes no part in training. PEFT makes it trainable for bf16 and 4-bit models, where it
  drifts from the rank, and never saves it, so that the drift is lost with the first reload. `patch`
  freezes it, for the layers that fall back too, and `unpatch` leaves it so: patch before DDP.
- The orthogonality loss counts the trainable adapter alone (PEFT: every adapter whose name contains
  its name), and autocast does not round its Gram matrices to 16 bits.
- The EMAs of 16-bit adapters are float32.
- target_r == init_r, which PEFT's kthvalue refuses, prunes nothing; a parameter without a gradient
  counts as one with a zero gradient (no gradient at all is an error); scores that are all zero keep
  the first triplets instead of none; a gradient that is not finite is an error naming the layer.
- An adapter that was loaded without being trainable gives a loss, without the orthogonality term.
"""

from __future__ import annotations

from typing import Any

import torch
from peft.import_utils import is_bnb_4bit_available
from peft.tuners.adalora import layer as peft_layer
from peft.tuners.adalora.layer import AdaLoraLayer, RankAllocator, SVDLinear
from peft.tuners.adalora.model import AdaLoraModel
from torch import Tensor, nn

from peftkern.backends import dispatch
from peftkern.functional.adalora import adalora_allocate_, orthogonality_loss
from peftkern.integrations.peft.fallback import (
    Fallback,
    hooked,
    kept_forward,
    set_class,
    unusual_dropout,
    unusual_tensor,
)
from peftkern.integrations.peft.serve import Adapter, Base, PatchedLayer, fused
from peftkern.layers.svd import fold_diagonal
from peftkern.methods.adalora import Importance, Triplets, apply_mask_, shrink_triplets_

__all__ = ["compact_"]


class SVDLayer(PatchedLayer):
    """Mixin of patched layers that keep an adapter as PEFT's AdaLoRA does, with a diagonal."""

    def _is_plain(self, name: str) -> bool:
        return False

    def _read_adapter(self, names: list[str], device: torch.device) -> Adapter | Fallback:
        A, E, B, drop = self._tensors_of(names[0])
        reason = (
            unusual_tensor(lora_A=A, lora_E=E, lora_B=B)
            or unusual_dropout(drop)
            or hooked(device, lora_dropout=drop)
        )
        return Adapter(A, B, drop) if reason is None else Fallback(reason)

    def _fuse_first(self, name: str, adapter: Adapter, base: Base) -> Tensor:
        E = self._modules["lora_E"]._parameters[name]
        A = fold_diagonal(adapter.lora_A, E, self._scaling(name))
        return fused(base, A, adapter.lora_B, 1.0, adapter.dropout_p)

    def _add_adapter(
        self, result: Tensor, x: Tensor, name: str, base: Base
    ) -> tuple[Tensor, Tensor]:
        A, E, B, drop = self._tensors_of(name)
        x = self._adapter_input(x, A.dtype)
        update = drop(x) @ (A * E).T @ B.T
        return (result + update * self._scaling(name)).to(result.dtype), x

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


class PatchedSVDLinear(SVDLayer, SVDLinear):
    """PEFT's `adalora.SVDLinear` with the base layer and its first adapter as one op."""

    original, op = SVDLinear, "lora_linear"


SWAPS: dict[type, type] = {SVDLinear: PatchedSVDLinear}

if is_bnb_4bit_available():
    from peft.tuners.adalora.bnb import SVDLinear4bit

    class PatchedSVDLinear4bit(SVDLayer, SVDLinear4bit):
        """PEFT's `adalora.SVDLinear4bit` with the base layer and its first adapter as one op."""

        original, op, four_bit = SVDLinear4bit, "nf4_lora_linear", True

    SWAPS[SVDLinear4bit] = PatchedSVDLinear4bit


def freeze_ranknum(layer: nn.Module) -> None:
    """Take the `ranknum` of an AdaLoRA layer out of training; another layer has none."""
    if isinstance(layer, AdaLoraLayer):
        for ranknum in layer.ranknum.values():
            ranknum.requires_grad_(False)


class PatchedRankAllocator(RankAllocator):
    """PEFT's `RankAllocator` with one op for the importance of all layers and one for the mask.

    `exp_avg_ipt` and `exp_avg_unc` are still there under PEFT's names, as views.
    """

    ties = "peft"
    _importance: Importance | None = None
    _layers: list[tuple[str, AdaLoraLayer]] | None = None
    _pattern: tuple[Any, Tensor] | None = None  # rank_pattern, and the same as a tensor

    def update_ipt(self, model: nn.Module) -> None:
        if peft_layer.deepspeed_config() is not None:
            dispatch.record_fallback("adalora_importance_", "DeepSpeed holds the gradients")
            self._importance = None
            super().update_ipt(model)
            return
        layers = self.triplets(model)
        if self._importance is None:
            self.adopt_ipt(layers)
        self._importance.update_(layers)

    def mask_to_budget(self, model: nn.Module, budget: int) -> dict[str, list[bool]]:
        importance = self._importance
        if importance is None or importance.scores is None:
            return super().mask_to_budget(model, budget)
        layers = self.triplets(model)
        lora_E = [E for E, _, _ in layers.values()]
        if not importance.scores.is_cpu:  # rank_pattern is a list: it waits for the device anyway
            importance.check_finite(layers)
        mask = adalora_allocate_(importance.scores, lora_E, max(budget, 0), ties=self.ties)
        parts = torch.split(mask.cpu(), [E.shape[0] for E in lora_E])
        names = [f"{name}.lora_E.{self.adapter_name}" for name in layers]
        pattern = {name: part.tolist() for name, part in zip(names, parts, strict=True)}
        self._pattern = (pattern, mask)
        return pattern

    def mask_using_rank_pattern(self, model: nn.Module, rank_pattern: dict | None) -> None:
        if not rank_pattern:
            raise ValueError(
                "rank_pattern: expected the pattern of step total_step - tfinal, got none; run "
                "that step, or load the adapter that was saved after it"
            )
        layers = self.triplets(model)
        lora_E = [E for E, _, _ in layers.values()]
        if self._pattern is None or self._pattern[0] is not rank_pattern:
            mask = [kept for name in layers for kept in self._kept(rank_pattern, name, layers)]
            mask = torch.tensor(mask, dtype=torch.bool, device=lora_E[0].device)
            self._pattern = (rank_pattern, mask)
        apply_mask_(lora_E, self._pattern[1])

    def _kept(self, rank_pattern: dict, name: str, layers: dict[str, Triplets]) -> list[bool]:
        """Return the pattern of one layer; saving takes the adapter's name out of the keys."""
        key = f"{name}.lora_E"
        kept = rank_pattern[key if key in rank_pattern else f"{key}.{self.adapter_name}"]
        kept = [bool(alive) for alive in kept]
        rows = layers[name][0].shape[0]
        if len(kept) != rows and sum(kept) == rows:
            return [True] * rows  # what is not kept has been dropped
        if len(kept) != rows:
            raise ValueError(f"rank_pattern: {len(kept)} entries for the {rows} triplets of {name}")
        return kept

    def reset_ipt(self) -> None:
        super().reset_ipt()
        self._importance = None

    def layers_of(self, model: nn.Module) -> list[tuple[str, AdaLoraLayer]]:
        """Return the layers of this adapter by name, found once: a walk takes milliseconds."""
        name = self.adapter_name
        if self._layers is None or any(
            name not in layer._modules["lora_A"]._parameters for _, layer in self._layers
        ):
            self._layers = [
                (path, module)
                for path, module in model.named_modules()
                if isinstance(module, AdaLoraLayer) and name in module.lora_A
            ]
        return self._layers

    def triplets(self, model: nn.Module) -> dict[str, Triplets]:
        """Return {layer: (lora_E, lora_A, lora_B)}; `_modules` is ten times faster than a dot."""
        name = self.adapter_name
        triplets = {}
        for path, layer in self.layers_of(model):
            groups = layer._modules
            triplets[path] = (
                groups["lora_E"]._parameters[name],
                groups["lora_A"]._parameters[name],
                groups["lora_B"]._parameters[name],
            )
        return triplets

    def adopt_ipt(self, layers: dict[str, Triplets]) -> None:
        """Make one buffer for each EMA, with what PEFT's dictionaries hold so far."""
        importance = Importance(layers, self.beta1, self.beta2)
        keys = [
            f"{path}.{group}.{self.adapter_name}"
            for path in layers
            for group in ("lora_E", "lora_A", "lora_B")
        ]
        shapes = [p.shape for triplet in layers.values() for p in triplet]
        sizes = [shape.numel() for shape in shapes]
        known = all(key in self.exp_avg_ipt for key in keys)
        for attribute in ("exp_avg_ipt", "exp_avg_unc"):
            held = getattr(self, attribute)
            parts = getattr(importance, attribute).split(sizes)
            views = {k: p.view(s) for k, p, s in zip(keys, parts, shapes, strict=True)}
            if known:
                for key, view in views.items():
                    view.copy_(held[key])
            setattr(self, attribute, views)
        self.ipt = {}
        if known:
            importance.rescore(layers)
        self._importance = importance

    def release_ipt(self) -> None:
        """Leave behind what PEFT's own update expects to find."""
        self.ipt = dict(self.exp_avg_ipt)
        for attribute in ("_importance", "_layers", "_pattern", "ties"):
            self.__dict__.pop(attribute, None)


class PatchedAdaLoraModel(AdaLoraModel):
    """PEFT's `AdaLoraModel` with one op for the orthogonality loss of all layers."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if not hasattr(self, "rankallocator"):  # loaded, not trained: PEFT fails on a loss
            return self.model.forward(*args, **kwargs)
        reason = self._unusual_state()
        if reason is not None:
            dispatch.record_fallback("adalora_orthogonality_forward", reason)
            return super().forward(*args, **kwargs)
        outputs = self.model.forward(*args, **kwargs)
        if isinstance(getattr(outputs, "loss", None), Tensor):
            weight = self.peft_config[self.trainable_adapter_name].orth_reg_weight
            if weight < 0:
                raise ValueError("orth_reg_weight should be greater than or equal to 0. ")
            triplets = self.rankallocator.triplets(self.model).values()
            if triplets:
                loss = orthogonality_loss([A for _, A, _ in triplets], [B for _, _, B in triplets])
                outputs.loss += weight * loss
        return outputs

    def _unusual_state(self) -> str | None:
        allocator = self.rankallocator
        if not isinstance(allocator, PatchedRankAllocator):
            return f"rankallocator is {type(allocator).__name__}"
        triplets = allocator.triplets(self.model).values()
        # DeepSpeed's third stage leaves an empty tensor of each parameter that it holds elsewhere.
        if any(lora_A.dim() != 2 for _, lora_A, _ in triplets):
            return "parameters are sharded"
        return None


def is_tuner(module: nn.Module) -> bool:
    """Return whether a module is an AdaLoraModel that can be patched, or is."""
    kinds = (AdaLoraModel, PatchedAdaLoraModel)
    return type(module) in kinds and kept_forward(module) is not None


def patch_model(module: nn.Module) -> None:
    """Swap an AdaLoraModel and its allocator."""
    set_class(module, PatchedAdaLoraModel)
    allocator = getattr(module, "rankallocator", None)
    if type(allocator) is RankAllocator:
        allocator.__class__ = PatchedRankAllocator
        if allocator.exp_avg_ipt:  # in the middle of training
            allocator.adopt_ipt(allocator.triplets(module.model))


def unpatch_model(module: nn.Module) -> bool:
    """Undo `patch_model`."""
    if type(module) is not PatchedAdaLoraModel:
        return False
    set_class(module, AdaLoraModel)
    allocator = getattr(module, "rankallocator", None)
    if type(allocator) is PatchedRankAllocator:
        allocator.release_ipt()
        allocator.__class__ = RankAllocator
    return True


def compact_(model: nn.Module, optimizer: torch.optim.Optimizer | None = None) -> dict[str, int]:
    """Drop the triplets that the final rank_pattern has pruned from a patched AdaLoRA model.

    Parameters keep their identity and shrink, with their gradients and the optimizer's state; see
    `RankAllocator.compact_`. Saving gives the same adapter as before. Do it after
    step total_step - tfinal and before wrapping in DDP.

    Args: model, a PeftModel or the AdaLoraModel in it. Returns: {layer name: rank}.
    Raises: ValueError if the model is not patched, or its rank_pattern is not final.
    """
    tuner = next((m for m in model.modules() if type(m) is PatchedAdaLoraModel), None)
    if tuner is None or not hasattr(tuner, "rankallocator"):
        raise ValueError("model: expected an AdaLoRA model in training after peftkern.patch(model)")
    allocator, name = tuner.rankallocator, tuner.trainable_adapter_name
    pattern = tuner.peft_config[name].rank_pattern
    if not pattern or allocator.exp_avg_ipt:
        raise ValueError("model: the rank_pattern is not final before step total_step - tfinal")
    layers = allocator.triplets(tuner.model)
    ranks = {}
    for path, module in allocator.layers_of(tuner.model):
        E, A, B = layers[path]
        keep = torch.tensor(allocator._kept(pattern, path, layers), device=E.device)
        shrink_triplets_(E, A, B, keep, optimizer)
        ranks[path] = module.r[name] = E.shape[0]
    allocator._pattern = None
    return ranks
