"""What each of several devices holds and sends in a step: DDP, FSDP2, ZeRO-3, by their own rules.

An engine's events happen at the places of the step where the real one has its hooks, and what it
takes there is a tensor of the traced step: so a peak is that of activations, gradients and gathered
weights at one moment. Every device runs the same step on a batch of its own, and the first one, of
which the plan is, holds the largest shards.

Sources: torch.nn.parallel.DistributedDataParallel (torch/csrc/distributed/c10d/reducer.cpp),
torch.distributed.fsdp.fully_shard (_fsdp_param_group.py, _fsdp_collectives.py) of torch 2.13;
deepspeed/runtime/zero/stage3.py of DeepSpeed 0.19.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from math import ceil
from typing import Any

import torch
from torch import Tensor, nn

from peftkern.tools.plan.gathering import (
    AFTER,
    BACKWARD,
    FORWARD,
    WITHIN,
    Gathering,
    Limits,
    Owner,
    Recorder,
    expanded,
)
from peftkern.tools.plan.tracker import BUFFERS, FIXED, GATHERED, GRADIENTS, Tracker

__all__ = ["ALL_GATHER", "ALL_REDUCE", "BROADCAST", "REDUCE_SCATTER", "Engine", "engine_of", "sent"]
ALL_GATHER, REDUCE_SCATTER = "all-gather", "reduce-scatter"
ALL_REDUCE, BROADCAST = "all-reduce", "broadcast"
OPTIMIZER = "optimizer"  # a phase
_DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
Trace = dict[Any, Counter]  # {segment: bytes by part}
Kinds = dict[Any, list[int]]  # {(name of the list, kind of layer): indices}


def sent(collective: str, nbytes: int, devices: int) -> int:
    """Return the bytes that each device sends for a collective over `nbytes`, by a ring.

    (N - 1) / N of what is gathered or scattered, twice that of what is all-reduced, which is both;
    a broadcast passes all of it on. Latency, and what a tree or a switch saves, is in none.
    Source: Patarasuk and Yuan, Bandwidth optimal all-reduce algorithms, 2009; nccl-tests' "busbw"
    """
    if collective == BROADCAST:
        return nbytes
    return (2 if collective == ALL_REDUCE else 1) * nbytes * (devices - 1) // devices


class Engine:
    """One device, with nothing to share; and the events of a step, for those of several.

    `communication` counts {(collective, phase, "bytes" or "calls"): number} of a step.
    """

    def __init__(self, training: Any, hidden: int) -> None:
        self.training, self.devices, self.hidden = training, training.devices, hidden
        self.communication: Counter[tuple[str, str, str]] = Counter()

    def held(self, tensor: Tensor) -> int:
        """Return the bytes of a model's tensor that stay on a device."""
        return tensor.numel() * tensor.element_size()

    def begin(self, model: nn.Module, tracker: Tracker, fixed: Counter) -> None:
        """Take a model before its forward pass."""
        self.model, self.tracker = model, tracker
        self.communication.clear()

    def trained(self) -> list[Tensor]:
        """Return what the optimizer updates, with gradients after the backward pass."""
        return [p for p in self.model.parameters() if p.requires_grad]

    def before(self, layer: nn.Module) -> None:
        """Before the forward pass of a layer, also where a checkpoint computes it again."""

    def after(self, layer: nn.Module | None) -> None:
        """After the forward pass of a layer, the first time; None: of the whole model."""

    def before_backward(self, layer: nn.Module | None) -> None:
        """Before the backward pass of a layer; None: of the whole model."""

    def close(self, layer: nn.Module | None = None) -> None:
        """After the backward pass of a layer, or of whichever it was: another's comes next."""

    def finish_backward(self) -> None:
        """After the backward pass of the whole model."""

    def end(self) -> None:
        """Leave the model, also after a step that failed."""

    def gradient(self, parameter: Tensor) -> None:
        """At a parameter's gradient, which is complete."""
        self.tracker.move(parameter.grad, GRADIENTS)

    def extend(self, trace: Trace, kinds: Kinds, saved: dict[Any, Counter]) -> None:
        """Add to the trace of a whole model what is no sum over its layers.

        Args: kinds, the indices of the layers of each (list, kind); saved, what a layer of a kind
        of which not all were run holds from its forward to its backward pass.
        """

    def _count(self, collective: str, phase: str, nbytes: int) -> None:
        self.communication[collective, phase, "bytes"] += nbytes
        self.communication[collective, phase, "calls"] += 1

    def _take(self, nbytes: int, part: str) -> Tensor:
        """Make memory of so many bytes in the traced step."""
        with self.tracker.filed(part):
            return torch.empty(nbytes, dtype=torch.uint8)


class DDP(Engine):
    """Whole copies; gradients of what is trained are all-reduced in buckets.

    A bucket is memory beside the gradients (`gradient_as_bucket_view` is off, as it is unless asked
    for), and buffers are broadcast before each forward pass. How many buckets is not counted.
    """

    def begin(self, model: nn.Module, tracker: Tracker, fixed: Counter) -> None:
        super().begin(model, tracker, fixed)
        nbytes = sum(p.numel() * p.element_size() for p in self.trained())
        fixed["buckets of DDP"] = nbytes
        self.communication[ALL_REDUCE, BACKWARD, "bytes"] = nbytes
        buffers = {id(b): b.numel() * b.element_size() for b in model.buffers()}
        self.communication[BROADCAST, FORWARD, "bytes"] = sum(buffers.values())


class _Unit:
    """Parameters that FSDP2 gathers together, and what of them is here."""

    def __init__(self, module: nn.Module, seen: set[int]) -> None:
        self.layer, self.parameters = module, list(_new(module, seen))
        self.arriving: Tensor | None = None
        self.whole: Tensor | None = None
        self.done = False


class FSDP2(Engine):
    """`fully_shard` of every decoder layer, then of the model, whose unit is what is left.

    Parameters are cut along their first dimension into pieces of as many rows on each device; where
    they do not come out even the last pieces are padded. A unit is gathered into one buffer and
    copied out of it: before its forward pass, freed afterwards unless `reshard` is off, and again
    before its backward pass, in which the next unit's buffer is on its way already. The rest of the
    model, embeddings and head, is gathered once. Gradients of what is trained are reduced into
    shards at a layer's end. 4-bit weights are stored as the training's dtype (`quant_storage`), and
    their scales, which are no parameters, are whole on every device.
    """

    def __init__(self, training: Any, hidden: int) -> None:
        super().__init__(training, hidden)
        wide = _DTYPES["fp32"]
        self.frozen_dtype = wide if training.prepare_kbit else _DTYPES[training.dtype]
        full = training.method == "full"
        self.trained_dtype = _DTYPES[training.dtype if full else training.adapter_dtype]
        self.reduce_dtype = _DTYPES.get(training.reduce_dtype)

    def _stored(self, parameter: Tensor) -> torch.dtype:
        """Return the dtype of a parameter's shards: the traced step has it in param_dtype."""
        if self.training.param_dtype is None or not parameter.is_floating_point():
            return parameter.dtype
        return self.trained_dtype if parameter.requires_grad else self.frozen_dtype

    def _rows(self, parameter: Tensor) -> int:
        """Return the rows of the first device's shard, which are those of every padded one."""
        return ceil(parameter.shape[0] / self.devices)

    def _piece(self, parameter: Tensor) -> int:
        """Return the elements of a padded shard; of packed 4-bit codes the bytes."""
        if parameter.is_floating_point():
            return self._rows(parameter) * (parameter.numel() // max(parameter.shape[0], 1))
        storage = _DTYPES[self.training.dtype].itemsize
        stored = ceil(parameter.numel() * parameter.element_size() / storage)
        return ceil(stored / self.devices) * storage

    def held(self, tensor: Tensor) -> int:
        if not isinstance(tensor, nn.Parameter):
            return super().held(tensor)
        return self._piece(tensor) * self._stored(tensor).itemsize

    def begin(self, model: nn.Module, tracker: Tracker, fixed: Counter) -> None:
        super().begin(model, tracker, fixed)
        seen: set[int] = set()
        layers = [m for m in model.modules() if "plan_label" in vars(m)]
        self.units = {layer: _Unit(layer, seen) for layer in layers}
        self.rest = _Unit(model, seen)
        self.shards: dict[int, nn.Parameter] = {}
        for p in super().trained():
            with tracker.filed(FIXED):
                piece = torch.empty(self._rows(p), *p.shape[1:], dtype=self._stored(p))
            self.shards[id(p)] = nn.Parameter(piece)
        self.order: list[_Unit] = []
        self.in_backward = False
        self.last_buffer = self.reducing = self.open = None
        self._gather(self.rest, FORWARD)
        self._copy_out(self.rest)

    def trained(self) -> list[Tensor]:
        return list(self.shards.values())

    def before(self, layer: nn.Module) -> None:
        if self.in_backward:  # of a checkpoint: it is gathered for the backward pass
            return
        self._gather(self.units[layer], FORWARD)
        self._copy_out(self.units[layer])

    def after(self, layer: nn.Module | None) -> None:
        if layer is None:
            self.in_backward, self.last_buffer = True, None
            return
        unit = self.units[layer]
        self.order.append(unit)
        if self.training.reshard:
            unit.whole = None

    def before_backward(self, layer: nn.Module | None) -> None:
        if layer is None:
            place = len(self.order)
        else:
            self.open = self.units[layer]
            self._gather(self.open, BACKWARD)
            self._copy_out(self.open)
            place = self.order.index(self.open)
        if place > 0:
            self._gather(self.order[place - 1], BACKWARD)  # ahead of its turn

    def close(self, layer: nn.Module | None = None) -> None:
        if self.open is not None and layer in (None, self.open.layer):
            self._reduce(self.open)
            self.open = None

    def finish_backward(self) -> None:
        self.close()
        for unit in (self.rest, *self.units.values()):  # those whose input needs no gradient
            self._reduce(unit)
        self.reducing = None

    def _gather(self, unit: _Unit, phase: str) -> None:
        if unit.whole is not None or unit.arriving is not None or not unit.parameters:
            return
        nbytes = sum(self._piece(p) * p.element_size() for p in unit.parameters)
        cast = self._take(nbytes, BUFFERS) if self.training.param_dtype else None
        unit.arriving = self._take(self.devices * nbytes, BUFFERS)
        del cast
        self._count(ALL_GATHER, phase, self.devices * nbytes)

    def _copy_out(self, unit: _Unit) -> None:
        """Make a unit's parameters whole; in the forward pass its buffer stays until those of the
        next one are, too."""
        if unit.arriving is None:
            return
        sizes = (self.devices * self._piece(p) * p.element_size() for p in unit.parameters)
        unit.whole = self._take(sum(self.tracker.rounded(n) for n in sizes), GATHERED)
        self.last_buffer = None if self.in_backward else unit.arriving
        unit.arriving = None

    def _reduce(self, unit: _Unit) -> None:
        """Free a unit's parameters, and put its gradients' sums into the shards."""
        if unit.done:
            return
        unit.done, unit.whole, self.reducing = True, None, None
        given = [p for p in unit.parameters if p.grad is not None]
        if not given:
            return
        numel = sum(self._piece(p) for p in given)
        dtype = self.reduce_dtype or given[0].grad.dtype
        nbytes = numel * dtype.itemsize
        self.reducing = self._take(self.devices * nbytes, BUFFERS)
        for p in given:
            p.grad = None
        self._count(REDUCE_SCATTER, BACKWARD, self.devices * nbytes)
        stored = self._stored(given[0])
        with self.tracker.filed(GRADIENTS):
            sums = torch.empty(numel, dtype=dtype)
            sums = sums if dtype == stored else torch.empty(numel, dtype=stored)
        for p, part in zip(given, sums.split([self._piece(p) for p in given]), strict=True):
            shard = self.shards[id(p)]
            shard.grad = part.view(shard.shape)


class ZeRO3(Engine):
    """DeepSpeed's stage 3, with the sizes that transformers fills in for "auto".

    Everything is cast to the training's dtype. A parameter is cut into equal pieces of its
    elements; a small one is whole on every device as well, gathered after the optimizer's step. The
    others are gathered and dropped at every module's call as `gathering` replays it. Gradients go
    through a bucket of hidden_size^2 elements into shards that stay; the optimizer has a copy of
    its shards in float32.
    """

    def __init__(self, training: Any, hidden: int) -> None:
        super().__init__(training, hidden)
        self.limits = Limits.of(hidden)
        self.recorder: Recorder | None = None
        self.gathers: list[tuple[str, int]] = []  # of the last step, each one's phase and bytes

    def _piece(self, parameter: Tensor) -> int:
        return ceil(parameter.numel() / self.devices)

    def _stays(self, parameter: Tensor) -> bool:
        """Return whether a parameter is whole on every device."""
        return parameter.numel() <= self.limits.small

    def held(self, tensor: Tensor) -> int:
        if not isinstance(tensor, nn.Parameter):
            return super().held(tensor)
        whole = tensor.numel() if self._stays(tensor) else 0
        return (self._piece(tensor) + whole) * tensor.element_size()

    def begin(self, model: nn.Module, tracker: Tracker, fixed: Counter) -> None:
        super().begin(model, tracker, fixed)
        trained = super().trained()
        item = _DTYPES[self.training.dtype].itemsize
        pieces = sum(map(self._piece, trained))
        if self.training.dtype != "fp32":
            fixed["master weights"] = 4 * pieces
        fixed["gradients' shards"] = item * pieces
        fixed["bucket of gradients"] = item * self.hidden**2
        with tracker.filed(FIXED):
            self.flat = torch.empty(pieces)
        self.communication[REDUCE_SCATTER, BACKWARD, "bytes"] = item * self.devices * pieces
        stay = (p for p in model.parameters() if self._stays(p))
        nbytes = sum(self.devices * self._piece(p) * p.element_size() for p in stay)
        self.communication[ALL_GATHER, OPTIMIZER, "bytes"] = nbytes
        self.recorder = Recorder(model, tracker, self.limits)

    def end(self) -> None:
        if self.recorder is not None:
            self.recorder.remove()

    def after(self, layer: nn.Module | None) -> None:
        if layer is None:
            self.recorder.phase = BACKWARD

    def finish_backward(self) -> None:
        self.tracker.mark(None)

    def trained(self) -> list[Tensor]:
        """One flat shard in float32, and its gradient of the same dtype."""
        flat = nn.Parameter(self.flat)
        with self.tracker.filed(GRADIENTS):
            flat.grad = torch.empty_like(self.flat)
        return [flat]

    def gradient(self, parameter: Tensor) -> None:
        parameter.grad = None  # into the bucket

    def extend(self, trace: Trace, kinds: dict[Any, list[int]], saved: dict[Any, Counter]) -> None:
        """Add what is gathered at each moment, of a layer that was not run at that of its like: the
        one of most bytes counts."""
        events = self.recorder.events()
        like, less = _likes({event.owner for event in events}, kinds, saved)
        events = expanded(events, like)
        gathering = Gathering(events, self.limits, self.devices, self.tracker.rounded)
        self.gathers = gathering.calls
        for phase, nbytes in self.gathers:
            trace["communication"][ALL_GATHER, phase, "bytes"] += nbytes
            trace["communication"][ALL_GATHER, phase, "calls"] += 1
        segments: dict[Any, list[Any]] = {}
        for segment in trace:
            segments.setdefault(segment[-1], []).append(segment)
        found: Trace = {}
        for event, *bytes_of in gathering.moments:
            for when, (weights, buffers) in zip((WITHIN, AFTER), bytes_of, strict=True):
                for segment in segments.get((*event.moment, when), ()):
                    parts = Counter(trace[segment])
                    parts.subtract(less.get(event.owner, {}))
                    parts.update({GATHERED: weights, BUFFERS: buffers})
                    found[segment] = max(parts, found.get(segment, parts), key=Counter.total)
        trace |= found


def _likes(
    run: set[Owner], kinds: Kinds, saved: dict[Any, Counter]
) -> tuple[dict[str, list[int]], dict[Owner, Counter]]:
    """Return for each list of layers the index of one that was run and is like each of them, and
    what less than that is held at one: what the layers between them save.
    """
    of: dict[str, dict[int, tuple[Any, int]]] = {}
    for (name, kind), found in kinds.items():
        for i in found:
            of.setdefault(name, {})[i] = (name, kind), i if (name, i) in run else found[-1]
    less: dict[Owner, Counter] = {}
    for name, layers in of.items():
        for i, (_, like) in layers.items():
            if like != i:
                less[name, i] = Counter()
                for between in range(i, like):
                    less[name, i].update(saved.get(layers[between][0], {}))
    return {name: [layers[i][1] for i in sorted(layers)] for name, layers in of.items()}, less


def _new(module: nn.Module, seen: set[int]) -> Iterator[nn.Parameter]:
    """Yield the parameters of a module that no other has had, and note them."""
    for parameter in module.parameters():
        if id(parameter) not in seen:
            seen.add(id(parameter))
            yield parameter


_ENGINES: dict[str | None, type[Engine]] = {
    None: Engine,
    "ddp": DDP,
    "fsdp2": FSDP2,
    "zero3": ZeRO3,
}


def engine_of(training: Any, hidden: int) -> Engine:
    """Return the engine of a training of a model of this hidden size."""
    return _ENGINES[training.shard](training, hidden)
