"""Compaction of AdaLoRA: triplets that the mask has pruned leave the model in training.

Parameters, gradients and the optimizer's states become as small as the budget, and steps as fast.
What wraps the model in DistributedDataParallel gets new buckets; what cannot be compacted stays as
it is, with a warning, and trains on.
"""

from __future__ import annotations

import gc
import warnings
import weakref
from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
from peft.tuners.adalora import layer as peft_layer
from peft.tuners.adalora.model import AdaLoraModel
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from peftkern.integrations.peft.adalora import PatchedAdaLoraModel, PatchedRankAllocator
from peftkern.integrations.peft.adalora_layers import find_tuner, layers_of
from peftkern.methods.adalora import Triplets
from peftkern.methods.compaction import (
    check_states,
    forget_misfits_,
    grow_triplets_,
    shrink_triplets_,
)
from peftkern.methods.processes import held_by_deepspeed

__all__ = ["Compaction", "compact_"]

FINAL = "final"


class Compaction:
    """Moments of a training at which pruned triplets leave it.

    Args: compact, "final": when the last mask is drawn, after which none revives anyway; a step:
        also with every mask that is drawn from that step on, so that what it prunes is gone for
        good, where later masks could have let it revive; None: never, as in PEFT.
    """

    def __init__(self, compact: str | int | None) -> None:
        known = compact is None or compact == FINAL or (type(compact) is int and compact > 0)
        if not known:
            raise ValueError(f'compact: expected "final", a step or None, got {compact!r}')
        self._compact = compact
        self._seen: Any = None  # the rank pattern that has been looked at
        self._refused = False

    def after(
        self, tuner: AdaLoraModel, step: int, optimizer: torch.optim.Optimizer | None
    ) -> bool:
        """Compact, where it is time, after a step whose mask is in place; return whether it was."""
        config = tuner.peft_config[tuner.trainable_adapter_name]
        last = config.total_step - config.tfinal
        if self._compact is None or self._refused or self._seen is config.rank_pattern:
            return False
        if step < (last if self._compact == FINAL else min(self._compact, last)):
            return False
        self._seen = config.rank_pattern
        try:
            compact_(tuner, optimizer)
        except ValueError as error:
            self._refused = True
            warnings.warn(f"AdaLoRA keeps what it has pruned in memory: {error}", stacklevel=2)
            return False
        return True


def compact_(model: nn.Module, optimizer: torch.optim.Optimizer | None = None) -> dict[str, int]:
    """Drop the triplets that the rank_pattern has pruned from a patched AdaLoRA model.

    Parameters keep their identity and shrink, with their gradients and the optimizer's states; the
    adapter that is saved, and the outputs, are the same as before. A gradient norm to clip and the
    orthogonality loss no longer count what was dropped, and it can no longer revive. Where
    DistributedDataParallel wraps the model all processes have to call this.

    Args: model, a PeftModel or the AdaLoraModel in it; optimizer, torch's, bitsandbytes' or
        accelerate's around one; without it its states would keep their size and not fit any more.
    Returns: {layer: rank}.
    Raises: ValueError if the model is not patched or sharded, if pruned triplets have come back
        since the mask was drawn, or naming a state of the optimizer, or what of
        DistributedDataParallel, that cannot shrink. The model is then as it was.
    """
    tuner = find_tuner(model)
    allocator = getattr(tuner, "rankallocator", None)
    if type(tuner) is not PatchedAdaLoraModel or not isinstance(allocator, PatchedRankAllocator):
        raise ValueError("model: expected an AdaLoRA model in training after peftkern.patch(model)")
    pattern = tuner.peft_config[tuner.trainable_adapter_name].rank_pattern
    if not pattern:
        raise ValueError("model: nothing is pruned yet, there is no rank_pattern")
    layers = allocator.triplets(tuner.model)
    _check_whole(layers)
    keep = _kept(allocator, pattern, layers)
    if not all(bool(kept.all()) for kept in keep.values()):
        optimizer = getattr(optimizer, "optimizer", optimizer)  # accelerate's holds torch's
        check_states(optimizer, layers.values())
        wrappers = wrappers_of(tuner)
        _drop(allocator, layers, keep, optimizer)
        for wrapper in wrappers:
            rebuild(wrapper)
        if optimizer is not None:
            watch_states(tuner, optimizer)
    ranks = {}
    for name, layer in allocator.layers_of(tuner.model):
        ranks[name] = layer.r[allocator.adapter_name] = layers[name][0].shape[0]
    return ranks


def expand_(model: nn.Module) -> None:
    """Undo the compaction of an AdaLoRA model that PEFT is to have back: outputs stay the same.

    PEFT knows layers of init_r triplets alone; those that were dropped come back as zeros. States
    of an optimizer start anew where sizes differ, with a warning before its next step.
    Raises: ValueError as `compact_`, of what keeps the parameters' sizes.
    """
    allocator = getattr(model, "rankallocator", None)
    rows = getattr(allocator, "rows", None)
    if not isinstance(model, PatchedAdaLoraModel) or rows is None:
        return
    layers = allocator.triplets(model.model)
    _check_whole(layers)
    wrappers = wrappers_of(model)
    for name, layer in allocator.layers_of(model.model):
        here = torch.tensor(rows[name], dtype=torch.bool, device=layers[name][0].device)
        grow_triplets_(*layers[name], here)
        layer.r[allocator.adapter_name] = len(here)
    allocator.rows = allocator._pattern = None
    allocator.reset_ipt()  # PEFT begins to average it anew, as it does after its last mask
    for wrapper in wrappers:
        rebuild(wrapper)
    look_again(model)


def _triplets(tuner: AdaLoraModel) -> list[Triplets]:
    """Return the triplets of all layers, whether the allocator is patched (still) or not."""
    name = tuner.trainable_adapter_name
    layers = layers_of(tuner).values()
    return [(layer.lora_E[name], layer.lora_A[name], layer.lora_B[name]) for layer in layers]


class _Watch:
    """Look at the states of an optimizer before its next step, if shapes may have changed: `due`.

    Loading a checkpoint changes shapes, and so do those of states that are loaded: of another step.
    """

    def __init__(self, tuner: AdaLoraModel, optimizer: torch.optim.Optimizer) -> None:
        self._tuner, self.optimizer, self.due = weakref.ref(tuner), weakref.ref(optimizer), False
        optimizer.register_step_pre_hook(self._before_step)

    def _before_step(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        tuner, due, self.due = self._tuner(), self.due, False
        if tuner is None or not due:
            return
        count = forget_misfits_(optimizer, _triplets(tuner))
        if count:
            warnings.warn(
                f"AdaLoRA: the optimizer's states of {count} parameters are of another number of "
                "triplets: they start anew",
                stacklevel=2,
            )


_watches: weakref.WeakKeyDictionary[AdaLoraModel, _Watch] = weakref.WeakKeyDictionary()


def watch_states(tuner: AdaLoraModel, optimizer: torch.optim.Optimizer) -> None:
    """Let an optimizer forget before its next step, and the next one after loading, what is of
    other shapes; and pass over layers without triplets."""
    if peft_layer.deepspeed_config() is not None or _any_held(_triplets(tuner)):
        return  # its parameters are empty while it holds them
    optimizer = getattr(optimizer, "optimizer", optimizer)
    watch = _watches.get(tuner)
    if watch is None or watch.optimizer() is not optimizer:
        _watches[tuner] = watch = _Watch(tuner, optimizer)
    watch.due = True
    leave_out_empty(tuner, optimizer)


def look_again(tuner: AdaLoraModel) -> None:
    """Have the optimizer that is watched, if there is one, looked at after a checkpoint's load."""
    watch = _watches.get(tuner)
    optimizer = None if watch is None else watch.optimizer()
    if optimizer is not None:
        watch_states(tuner, optimizer)


def leave_out_empty(tuner: AdaLoraModel, optimizer: torch.optim.Optimizer) -> None:
    """Let steps of the optimizer pass over the layers that have no triplet left, if there are any.

    bitsandbytes would launch kernels of no blocks, which CUDA refuses.
    """
    known = getattr(optimizer, "_optimizer_step_pre_hooks", {}).values()
    if any(not E.numel() for E, _, _ in _triplets(tuner)) and _forget_empty not in known:
        optimizer.register_step_pre_hook(_forget_empty)


def _forget_empty(optimizer: torch.optim.Optimizer, *_: Any) -> None:
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if parameter.grad is not None and not parameter.numel():
                parameter.grad = None


def _drop(
    allocator: PatchedRankAllocator,
    layers: dict[str, Triplets],
    keep: dict[str, torch.Tensor],
    optimizer: torch.optim.Optimizer | None,
) -> None:
    """Let triplets go, from the importance as well; names and places are those of before."""
    importance = allocator._importance
    if importance is not None:
        importance.compact_(layers, list(keep.values()))
    rows = {name: allocator.of_all(name, kept.tolist()) for name, kept in keep.items()}
    for name, triplets in layers.items():
        shrink_triplets_(*triplets, keep[name], optimizer)
    allocator.rows, allocator._pattern = rows, None
    if importance is not None:
        allocator.share_ipt(importance, layers)


def _check_whole(layers: dict[str, Triplets]) -> None:
    """Raise ValueError unless all of every parameter is here."""
    if peft_layer.deepspeed_config() is not None or _any_held(layers.values()):
        raise ValueError("model: DeepSpeed holds the parameters")
    for E, A, B in layers.values():
        sharded = any(hasattr(p, "full_tensor") for p in (E, A, B))
        if sharded or A.dim() != 2 or E.shape[:1] != A.shape[:1] or B.shape[1:] != A.shape[:1]:
            raise ValueError("model: FSDP has sharded the parameters")
        if any(getattr(p, "_fsdp_flattened", False) for p in (E, A, B)):  # FSDP1, NO_SHARD as well
            raise ValueError("model: FSDP holds the parameters in a flat one")


def _any_held(triplets: Iterable[Triplets]) -> bool:
    return any(held_by_deepspeed(E) for E, _, _ in triplets)


def _kept(
    allocator: PatchedRankAllocator, pattern: dict, layers: dict[str, Triplets]
) -> dict[str, torch.Tensor]:
    """Return the mask of each layer. Raises: ValueError if what it prunes is not zero (now)."""
    keep = {}
    for name, (E, _, _) in layers.items():
        keep[name] = torch.tensor(
            allocator.kept(pattern, name, layers), dtype=torch.bool, device=E.device
        )
    alive = torch.cat([E.detach()[~keep[name]].flatten() for name, (E, _, _) in layers.items()])
    if bool(alive.any()):
        raise ValueError(
            "model: triplets that the mask had pruned have come back since; compact right after "
            "update_and_allocate has drawn a mask, or from step total_step - tfinal on"
        )
    return keep


def wrappers_of(tuner: AdaLoraModel) -> list[DistributedDataParallel]:
    """Find what wraps a model in DistributedDataParallel, of which the model itself knows nothing.

    Raises: ValueError if one has what cannot be made anew.
    """
    if not (dist.is_available() and dist.is_initialized()):
        return []
    alive = (o for o in gc.get_objects() if issubclass(type(o), DistributedDataParallel))
    found = [ddp for ddp in alive if any(module is tuner for module in ddp.modules())]
    for ddp in found:
        what = None
        if ddp._get_ddp_logging_data().get("comm_hook"):
            what = "a communication hook"
        elif ddp.mixed_precision is not None:
            what = "mixed precision of its own"
        elif ddp.process_group is not dist.group.WORLD:
            what = "a process group of its own"
        elif getattr(ddp, "_delay_all_reduce_all_params", False):
            what = "parameters with a delayed reduction"
        if what is not None:
            raise ValueError(f"model: DistributedDataParallel with {what} keeps its buckets")
    return found


def rebuild(ddp: DistributedDataParallel) -> None:
    """Give a wrapper buckets for the parameters as they are, in the way of its own pickling.

    The old ones, with their hooks on the parameters, go first.
    """
    state = ddp.__getstate__()
    del ddp.reducer, ddp.logger
    ddp.__setstate__(state)
    ddp._has_rebuilt_buckets = False
    ddp._static_graph_delay_allreduce_enqueued = False  # the first step of buckets reduces late
