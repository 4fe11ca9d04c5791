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

import warnings
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from peft.tuners.adalora import layer as peft_layer
from peft.tuners.adalora.layer import AdaLoraLayer, RankAllocator
from peft.tuners.adalora.model import AdaLoraModel
from torch import Tensor, nn

from peftkern.backends import dispatch
from peftkern.functional.adalora import adalora_allocate_, orthogonality_loss
from peftkern.integrations.peft import zero
from peftkern.integrations.peft.adalora_layers import SVDLayer
from peftkern.integrations.peft.fallback import kept_forward, own_class, set_class
from peftkern.methods.adalora import (
    BudgetSchedule,
    Importance,
    Triplets,
    apply_mask_,
    flat,
    mean_scores,
    whole_layers,
)
from peftkern.methods.processes import (
    are_plain,
    check_not_flat,
    is_sharded,
    whole,
    with_gradient,
)
from peftkern.methods.rank_budget import RankLimits

__all__: list[str] = []

_STEPS_UNALLOCATED = 3  # optimizer steps without a call from which on that is no accident


class DrawnMask(NamedTuple):
    """What a mask was drawn from: the budget, and the scores of all triplets, on the CPU."""

    budget: float
    layers: list[str]
    ranks: list[int]
    scores: Tensor

    def layer_importance(self) -> dict[str, float]:
        """Return the mean score of each layer's triplets."""
        return mean_scores(self.layers, self.ranks, self.scores)


class PatchedRankAllocator(RankAllocator):
    """PEFT's `RankAllocator` with one op for the importance of all layers and one for the mask.

    `exp_avg_ipt` and `exp_avg_unc` are still there under PEFT's names, as views.
    """

    ties = "peft"
    limits: RankLimits | None = None  # of `adalora_budget.set_budget`: costs, floors and caps
    limits_loaded = False  # with a checkpoint, whose limits stay
    drawn: DrawnMask | None = None  # the last one; another object for each
    _importance: Importance | None = None
    _layers: list[tuple[str, AdaLoraLayer]] | None = None
    # What the triplets of `_layers` are in, asked for each time: parameters are replaced.
    _places: Sequence[tuple[str, list[dict[str, nn.Parameter]]]] = ()
    _pattern: tuple[Any, Tensor] | None = None  # rank_pattern, and the same as a tensor
    rows: dict[str, list[bool]] | None = None  # of init_r triplets those that were not dropped

    def budget_schedule(self, step: int) -> tuple[float, bool]:
        """Return PEFT's budget in triplets, or that of the limits in their unit."""
        if self.limits is None:
            return super().budget_schedule(step)
        budgets, config = (self.limits.init_budget, self.limits.target_budget), self.peft_config
        times = config.total_step, config.tinit, config.tfinal, config.deltaT
        return BudgetSchedule(*budgets, *times)(step)

    def update_ipt(self, model: nn.Module) -> None:
        layers = self.triplets(model)
        if not are_plain(flat(layers.values())):
            if not zero.is_within_step() and zero.held(E for E, _, _ in layers.values()):
                if peft_layer.deepspeed_config() is None:  # PEFT fails there
                    raise ValueError(
                        "grads: DeepSpeed holds them; make AdaLoraSteps(model, optimizer, steps) "
                        "after deepspeed.initialize, which allocates within engine.step()"
                    )
                dispatch.record_fallback("adalora_importance_", "DeepSpeed holds the gradients")
                self._importance = None
                super().update_ipt(model)
                return
            for name, (E, _, _) in layers.items():
                check_not_flat(f"{name}.lora_E", E, "AdaLoRA")
            layers = whole_layers(layers)
        if self._importance is None:
            self.adopt_ipt(layers)
        self._importance.update_(layers)

    def mask_to_budget(self, model: nn.Module, budget: float) -> dict[str, list[bool]]:
        importance = self._importance
        if importance is None or importance.scores is None:
            if self.limits is not None:
                raise ValueError("budget: expected the importance of a step before the first mask")
            return super().mask_to_budget(model, budget)
        layers = self.triplets(model)
        lora_E = [E for E, _, _ in layers.values()]
        if not importance.scores.is_cpu:  # rank_pattern is a list: it waits for the device anyway
            importance.check_finite(layers)
        gathered = [with_gradient(E) for E in lora_E]
        limits = {} if self.limits is None else self.limits.of(list(layers))
        scores, ranks = importance.scores, [E.shape[0] for E in lora_E]
        mask = adalora_allocate_(scores, gathered, max(budget, 0), ties=self.ties, **limits)
        if any(map(is_sharded, lora_E)):
            apply_mask_(lora_E, mask)
        self.drawn = DrawnMask(budget, list(layers), ranks, scores.cpu())
        pattern, kept, at = {}, mask.tolist(), 0
        for name, rank in zip(layers, ranks, strict=True):
            key = f"{name}.lora_E.{self.adapter_name}"
            pattern[key] = self.of_all(name, kept[at : at + rank])
            at += rank
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
            mask = [kept for name in layers for kept in self.kept(rank_pattern, name, layers)]
            mask = torch.tensor(mask, dtype=torch.bool, device=lora_E[0].device)
            self._pattern = (rank_pattern, mask)
        apply_mask_(lora_E, self._pattern[1])

    def of_all(self, name: str, kept: list[bool]) -> list[bool]:
        """Return the pattern of all init_r triplets, as PEFT knows it, of those that are here."""
        if self.rows is None:
            return kept
        left = iter(kept)
        return [here and next(left) for here in self.rows[name]]

    def kept(self, rank_pattern: dict, name: str, layers: dict[str, Triplets]) -> list[bool]:
        """Return the pattern of a layer's triplets that are here.

        Saving takes the adapter's name out of the keys.
        """
        key = f"{name}.lora_E"
        kept = rank_pattern[key if key in rank_pattern else f"{key}.{self.adapter_name}"]
        kept = [bool(alive) for alive in kept]
        rows = layers[name][0].shape[0]
        if self.rows is not None and len(kept) == len(self.rows[name]):
            kept = [alive for alive, here in zip(kept, self.rows[name], strict=True) if here]
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
            groups = "lora_E", "lora_A", "lora_B"
            self._places = [
                (path, [layer._modules[group]._parameters for group in groups])
                for path, layer in self._layers
            ]
        return self._layers

    def triplets(self, model: nn.Module) -> dict[str, Triplets]:
        """Return {layer: (lora_E, lora_A, lora_B)}: what the layers' dictionaries hold now."""
        self.layers_of(model)
        name = self.adapter_name
        return {path: (E[name], A[name], B[name]) for path, (E, A, B) in self._places}

    def adopt_ipt(self, layers: dict[str, Triplets]) -> None:
        """Make one buffer for each EMA, with what PEFT's dictionaries hold so far."""
        importance = Importance(layers, self.beta1, self.beta2)
        held = self.exp_avg_ipt, self.exp_avg_unc
        self.share_ipt(importance, layers)
        views = self.exp_avg_ipt, self.exp_avg_unc
        if all(key in held[0] for key in views[0]):
            for known, buffers in zip(held, views, strict=True):
                for key, view in buffers.items():
                    view.copy_(known[key])
            importance.rescore(layers)

    def share_ipt(self, importance: Importance, layers: dict[str, Triplets]) -> None:
        """Take buffers of these layers over, and give PEFT's dictionaries views of them."""
        shapes = [p.shape for triplet in layers.values() for p in triplet]
        sizes = [shape.numel() for shape in shapes]
        keys = [
            f"{path}.{group}.{self.adapter_name}"
            for path in layers
            for group in ("lora_E", "lora_A", "lora_B")
        ]
        for attribute in ("exp_avg_ipt", "exp_avg_unc"):
            parts = getattr(importance, attribute).split(sizes)
            views = {k: p.view(s) for k, p, s in zip(keys, parts, shapes, strict=True)}
            setattr(self, attribute, views)
        self.ipt = {}
        self._importance = importance

    def release_ipt(self) -> None:
        """Leave behind what PEFT's own update expects to find."""
        self.ipt = dict(self.exp_avg_ipt)
        ours = ("_importance", "_layers", "_places", "_pattern", "ties", "limits")
        for attribute in (*ours, "limits_loaded", "drawn"):
            self.__dict__.pop(attribute, None)


class PatchedAdaLoraModel(AdaLoraModel):
    """PEFT's `AdaLoraModel` with one op for the orthogonality loss of all layers.

    It warns when optimizer steps go by in which nobody calls `update_and_allocate`: the model then
    trains as plain LoRA of rank init_r, and PEFT says nothing.
    """

    _seen: tuple[int, int] | None = (0, -1)  # steps, version of a parameter; None: enough of it

    def update_and_allocate(self, global_step: int) -> None:
        self._seen = None
        super().update_and_allocate(global_step)

    def resize_modules_by_rank_pattern(self, rank_pattern: dict, adapter_name: str) -> None:
        """Make room for an adapter to load; PEFT takes it out of init_r triplets, all still here.

        Where compaction has dropped some the rest is replaced: all of it is loaded next.
        """
        allocator = getattr(self, "rankallocator", None)
        if getattr(allocator, "rows", None) is None or adapter_name != allocator.adapter_name:
            super().resize_modules_by_rank_pattern(rank_pattern, adapter_name)
            return
        config = self.peft_config[adapter_name]
        for name, kept in rank_pattern.items():
            layer = self.model.get_submodule(name.partition(".lora_E")[0])
            ranknum = layer.ranknum[adapter_name]
            layer.update_layer(adapter_name, int(sum(kept)), config.lora_alpha, config=config)
            layer.ranknum[adapter_name].data.copy_(ranknum)
        allocator.rows = None

    def resize_state_dict_by_rank_pattern(
        self, rank_pattern: dict, state_dict: dict[str, Tensor], adapter_name: str
    ) -> dict[str, Tensor]:
        """Leave out of an adapter to save what is pruned; PEFT counts what was dropped, too."""
        allocator = getattr(self, "rankallocator", None)
        rows = getattr(allocator, "rows", None)
        if rows is not None and adapter_name == allocator.adapter_name:
            layers = allocator.triplets(self.model)
            rank_pattern = {
                f"{name}.lora_E": allocator.kept(rank_pattern, name, layers) for name in layers
            }
        return super().resize_state_dict_by_rank_pattern(rank_pattern, state_dict, adapter_name)

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
                self._expect_allocation(next(iter(triplets))[0])
                factors = ([whole(t[i]) for t in triplets] for i in (1, 2))
                loss = orthogonality_loss(*factors)
                outputs.loss += weight * loss
        return outputs

    def _expect_allocation(self, parameter: Tensor) -> None:
        """Count by a parameter's version the steps that an optimizer has taken; warn after some."""
        if self._seen is None or not self.training or torch.compiler.is_compiling():
            return
        steps, version = self._seen
        if parameter._version == version:
            return
        self._seen = steps + 1, parameter._version
        if steps < _STEPS_UNALLOCATED:
            return
        self._seen = None
        if not self.peft_config[self.trainable_adapter_name].rank_pattern:
            warnings.warn(
                f"AdaLoRA: {steps} optimizer steps and no update_and_allocate: no rank changes, "
                "this trains as LoRA of rank init_r. Give the Trainer AdaLoraCallback() of "
                "peftkern.integrations.transformers, or make AdaLoraSteps(model, optimizer, steps) "
                "of peftkern.integrations.peft.adalora_steps before a loop of your own",
                stacklevel=2,
            )

    def _unusual_state(self) -> str | None:
        allocator = self.rankallocator
        if not isinstance(allocator, PatchedRankAllocator):
            return f"rankallocator is {type(allocator).__name__}"
        # DeepSpeed's third stage leaves an empty tensor of each parameter that it holds elsewhere.
        for name, (_, lora_A, _) in allocator.triplets(self.model).items():
            if lora_A.dim() != 2:
                check_not_flat(f"{name}.lora_A", lora_A, "AdaLoRA")
                return "parameters are sharded"
        return None


PatchedAdaLoraModel.__name__ = AdaLoraModel.__name__  # what repr shows


def is_tuner(module: nn.Module) -> bool:
    """Return whether a module is an AdaLoraModel that can be patched, or is."""
    kinds = (AdaLoraModel, PatchedAdaLoraModel)
    return own_class(module) in kinds and kept_forward(module) is not None


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
    if own_class(module) is not PatchedAdaLoraModel:
        return False
    set_class(module, AdaLoraModel)
    for layer in module.modules():
        if isinstance(layer, AdaLoraLayer) and not isinstance(layer, SVDLayer):
            for name, E in layer.lora_E.items():  # PEFT takes one dtype
                E.data = E.data.to(layer.lora_A[name].dtype)
    allocator = getattr(module, "rankallocator", None)
    if type(allocator) is PatchedRankAllocator:
        allocator.release_ipt()
        allocator.__class__ = RankAllocator
    return True
