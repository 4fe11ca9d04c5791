"""Parameters that DeepSpeed's stage 3 gathers in a step, call by call.

DeepSpeed hooks every module: it gathers what a module has before the module runs and before its
backward pass, and what later modules need ahead of them, by the order of modules that it saw in an
earlier step. `Recorder` notes that order in a traced step, `expanded` repeats it for layers that
were not run, `Gathering` replays what is gathered, kept and dropped at each place of it.

Source: partitioned_param_coordinator.py, parameter_offload.py and partition_parameters.py in
deepspeed/runtime/zero of DeepSpeed 0.19.8.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from itertools import accumulate
from math import ceil
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from peftkern.tools.plan.tracker import Tracker

FORWARD, BACKWARD = "forward", "backward"
WITHIN, AFTER = "within", "after"  # an event
Owner = tuple[str, int] | None  # a layer's list and index; None: of no layer


class Limits(NamedTuple):
    """Settings of stage 3, in elements: what transformers fills in for "auto", else the defaults.

    live: gathered at once, from which on nothing is gathered ahead (`max_live_parameters`).
    ahead: gathered ahead by one module (`prefetch_bucket_size`). reuse: a parameter that is needed
    again within so many is kept (`max_reuse_distance`). small: of parameters that stay whole
    (`param_persistence_threshold`).
    """

    live: int
    ahead: int
    reuse: int
    small: int

    @classmethod
    def of(cls, hidden: int) -> Limits:
        """Return those of a model of this hidden size."""
        return cls(live=10**9, ahead=int(0.9 * hidden**2), reuse=10**9, small=10 * hidden)


class Weight(NamedTuple):
    """A parameter: its owner and name, elements and bytes of each; whether it is small enough to
    stay whole, and whether it is trained."""

    owner: Owner
    name: str
    numel: int
    itemsize: int
    stays: bool
    trained: bool

    def padded(self, devices: int) -> int:
        """Return the bytes of its equal pieces together."""
        return ceil(self.numel / devices) * devices * self.itemsize


class Event(NamedTuple):
    """A module that is entered or left: its owner, name and own parameters.

    phase: of the step. computes: for its forward pass, which in the backward phase is a
    checkpoint's, or for its backward pass. moment: the phase, owner and number of the event in the
    traced step that it repeats.
    """

    phase: str
    owner: Owner
    name: str
    enters: bool
    computes: str
    weights: tuple[Weight, ...]
    moment: tuple[str, Owner, int]

    def at(self, name: str, index: int) -> Event:
        """Return the same of another layer of a list; one that is of no layer of it as it is."""
        if self.owner is None or self.owner[0] != name:
            return self
        owner = name, index
        weights = (w._replace(owner=owner) if w.owner == self.owner else w for w in self.weights)
        return self._replace(owner=owner, weights=tuple(weights))


class _Told(torch.autograd.Function):
    """Pass a tensor on, and tell when its gradient comes back."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, tell: Callable[[], None]) -> Tensor:
        ctx.tell = tell
        return tensor.detach()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        ctx.tell()
        return gradient, None


class _Parameters(dict):
    """Parameters of a module, which tell when one is read."""

    def __init__(self, own: dict[str, Any], tell: Callable[[Tensor], None]) -> None:
        super().__init__(own)
        self.tell = tell

    def __getitem__(self, name: str) -> Any:
        found = super().__getitem__(name)
        if found is not None:
            self.tell(found)
        return found


class Recorder:
    """Hooks at the places where DeepSpeed has its own, for one traced step.

    Every event begins two moments of the tracker: WITHIN it, and AFTER it until the next one. A
    parameter that a module reads of another one, outside of its call, is the module's own as well.
    """

    def __init__(self, model: nn.Module, tracker: Tracker, limits: Limits) -> None:
        self.tracker, self.phase = tracker, FORWARD
        self._noted: list[tuple[nn.Module, bool, str, tuple[str, Owner, int]]] = []
        self._counts: Counter[tuple[str, Owner]] = Counter()
        self._awaited: Counter[nn.Module] = Counter()  # gradients of a module's inputs
        self._entered: list[nn.Module] = []  # and not left yet
        self._names: dict[nn.Module, tuple[Owner, str]] = {}
        self._weights: dict[nn.Module, dict[Weight, None]] = {}
        self._of: dict[int, Weight] = {}
        self._undo: list[Callable[[], Any]] = []
        owners: dict[str, Owner] = {}
        for name, module in model.named_modules():
            parent = name.rpartition(".")[0]
            owners[name] = owner = vars(module).get("plan_place", owners.get(parent))
            for key, p in module.named_parameters(recurse=False):
                numbers = p.numel(), p.element_size(), p.numel() <= limits.small
                weight = Weight(owner, f"{name}.{key}", *numbers, p.requires_grad)
                self._of.setdefault(id(p), weight)
            self._names[module] = owner, name
            own = (self._of[id(p)] for p in module.parameters(recurse=False))
            self._weights[module] = dict.fromkeys(own)
            self._hook(module)

    def events(self) -> list[Event]:
        """Return what has happened, in order."""
        return [
            Event(
                moment[0], *self._names[module], enters, computes, (*self._weights[module],), moment
            )
            for module, enters, computes, moment in self._noted
        ]

    def remove(self) -> None:
        """Take the hooks away."""
        for undo in self._undo:
            undo()

    def _hook(self, module: nn.Module) -> None:
        """Put hooks on a module, which are DeepSpeed's to whom asks, such as a patched layer."""

        def before(module: nn.Module, args: Any) -> Any:
            self._entered.append(module)
            self._note(module, FORWARD, enters=True)
            self._awaited[module] = 0
            return tree_map_only(Tensor, lambda t: self._given(module, t), args)

        def came() -> None:
            self._note(module, BACKWARD, enters=True)

        def after(module: nn.Module, args: Any, out: Any) -> Any:
            self._entered.pop()
            self._note(module, FORWARD, enters=False)
            return tree_map_only(Tensor, lambda t: _Told.apply(t, came), out)

        own = vars(module)
        plain, own["ds_id"] = module._parameters, len(self._names)
        own["_parameters"] = _Parameters(plain, self._read)
        before.__module__ = after.__module__ = "deepspeed.runtime.zero.parameter_offload"
        hooks = module.register_forward_pre_hook(before), module.register_forward_hook(after)
        self._undo += [hook.remove for hook in hooks]
        self._undo += [partial(own.pop, "ds_id"), partial(own.update, _parameters=plain)]

    def _read(self, parameter: Tensor) -> None:
        weight = self._of.get(id(parameter))
        if weight is None or self.phase != FORWARD or not self._entered:
            return
        if not any(weight in self._weights[module] for module in self._entered):
            self._weights[self._entered[-1]][weight] = None

    def _given(self, module: nn.Module, tensor: Tensor) -> Tensor:
        """Pass an input on; the module is left in the backward pass at the last one's gradient."""

        def came() -> None:
            self._awaited[module] -= 1
            if not self._awaited[module]:
                self._note(module, BACKWARD, enters=False)

        self._awaited[module] += tensor.requires_grad
        return _Told.apply(tensor, came)

    def _note(self, module: nn.Module, computes: str, enters: bool) -> None:
        owner, _ = self._names[module]
        moment = self.phase, owner, self._counts[self.phase, owner]
        self._counts[self.phase, owner] += 1
        self._noted.append((module, enters, computes, moment))
        self.tracker.mark((*moment, WITHIN))
        self.tracker.mark((*moment, AFTER))


def expanded(events: Iterable[Event], like: dict[str, list[int]]) -> list[Event]:
    """Return the events of a whole model: those of layers that were not run are others', repeated.

    Args: like, by list of layers for each of its layers the index of the one in `events`.
    """
    found: list[Event] = []
    events = list(events)
    for phase in (FORWARD, BACKWARD):
        part = [event for event in events if event.phase == phase]
        for name, indices in like.items():
            _repeat(part, name, indices)
        found += part
    return found


def _repeat(events: list[Event], name: str, indices: list[int]) -> None:
    """Put all layers of a list in the place of those that were run."""
    places = [i for i, event in enumerate(events) if event.owner and event.owner[0] == name]
    if not places:
        return
    here = slice(places[0], places[-1] + 1)
    blocks: dict[int, list[Event]] = {}
    for event in events[here]:
        if event.owner and event.owner[0] == name:
            block = blocks.setdefault(event.owner[1], [])
        block.append(event)
    first, *_, last = (*blocks, *blocks)
    order = range(len(indices)) if first <= last else reversed(range(len(indices)))
    events[here] = [event.at(name, i) for i in order for event in blocks[indices[i]]]


class _Gather:
    """A gather of parameters, into one buffer of each dtype."""

    def __init__(self, weights: list[Weight], buffer: int) -> None:
        self.weights, self.buffer = weights, buffer
        self.waiting = len(weights)
        self.arrived = False


class Moment(NamedTuple):
    """An event of a step, and the bytes of gathered weights and of buffers: the most within it, and
    what is left after it."""

    event: Event
    within: tuple[int, int]
    after: tuple[int, int]


class Gathering:
    """Replay of a step whose order of modules is known; `moments`, `calls`: what it found.

    calls: of every gather the phase and the bytes, padded, of all devices' pieces. Parameters that
    stay whole are none of it. rounded: bytes that an allocator gives for so many.
    """

    def __init__(
        self,
        events: Sequence[Event],
        limits: Limits,
        devices: int,
        rounded: Callable[[int], int] = int,
    ) -> None:
        self.limits, self.devices, self.rounded = limits, devices, rounded
        self.calls: list[tuple[str, int]] = []
        self.moments: list[Moment] = []
        self._entered = [event for event in events if event.enters]
        self._ahead = [(w, i) for i, event in enumerate(self._entered) for w in event.weights]
        self._place = 0  # in `_ahead`, which is read once
        numels = (sum(w.numel for w in event.weights) for event in self._entered)
        self._passed = [0, *accumulate(numels)]
        self._uses: dict[Weight, list[int]] = defaultdict(list)
        for weight, i in self._ahead:
            self._uses[weight].append(i)
        self._step = self._live = 0
        self._counted: dict[Weight, int] = {}  # the last use that a gather was for
        self._whole = {weight for weight in self._uses if weight.stays}
        self._arriving: dict[Weight, _Gather] = {}
        self._active: dict[Weight, set] = defaultdict(set)  # the modules that are in it
        # By module in its backward pass, the frozen weights that a checkpoint in it computes with
        self._open: dict[tuple[Owner, str], dict[Weight, None]] = {}
        self._held: dict[Weight, int] = {}
        self._bytes = [0, 0]  # of whole weights, of buffers
        for event in events:
            self._most = (0, 0)
            (self._enter if event.enters else self._leave)(event)
            self._note()
            self.moments.append(Moment(event, self._most, tuple(self._bytes)))

    def _note(self) -> None:
        self._most = max(self._most, tuple(self._bytes), key=sum)

    def _enter(self, event: Event) -> None:
        self._gather(event.phase, event.weights)
        module = event.owner, event.name
        if event.computes == BACKWARD:
            self._open.setdefault(module, {})
        for weight in event.weights:
            self._active[weight].add(module)
            if event.computes != event.phase and self._open and not weight.trained:
                innermost = next(reversed(self._open))
                self._open[innermost][weight] = None
                self._active[weight].add(innermost)
            if weight in self._arriving:
                self._wait(self._arriving.pop(weight))
        self._look_ahead(event)
        self._step += 1

    def _leave(self, event: Event) -> None:
        module = event.owner, event.name
        computed_again = {} if event.computes == FORWARD else self._open.pop(module, {})
        for weight in dict.fromkeys((*event.weights, *computed_again)):
            self._active[weight].discard(module)
            kept = weight.stays or (weight not in computed_again and self._is_kept(weight))
            if weight in self._whole and not self._active[weight] and not kept:
                self._whole.remove(weight)
                self._live -= weight.numel
                self._bytes[0] -= self._held.pop(weight)

    def _is_kept(self, weight: Weight) -> bool:
        """Return whether a parameter stays gathered for a later module."""
        if self._counted.get(weight, -1) > self._step:
            return True
        uses = self._uses[weight]
        following = bisect_left(uses, self._step)
        if following == len(uses):
            return False
        return self._passed[uses[following]] - self._passed[self._step] < self.limits.reuse

    def _look_ahead(self, event: Event) -> None:
        """Gather what the next modules need, as far as the limits let it."""
        new = {w for w in event.weights if self._counted.get(w, -1) < self._step}
        taken: set[Weight] = set()
        while self._place < len(self._ahead) and len(taken) < len(new):
            weight, use = self._next()
            self._counted[weight] = use
            taken.add(weight)
        most = min(self.limits.live - self._live, self.limits.ahead)
        wanted: dict[Weight, None] = {}
        numel = 0
        while self._place < len(self._ahead) and numel < most:
            weight, use = self._next()
            self._counted[weight] = max(self._counted.get(weight, -1), use)
            if not self._is_there(weight) and weight not in wanted:
                wanted[weight] = None
                numel += weight.numel
        self._gather(event.phase, wanted)

    def _next(self) -> tuple[Weight, int]:
        self._place += 1
        return self._ahead[self._place - 1]

    def _is_there(self, weight: Weight) -> bool:
        return weight in self._whole or weight in self._arriving

    def _gather(self, phase: str, weights: Iterable[Weight]) -> None:
        """Take a buffer for those that are not there yet, which is the weight if it is one."""
        missing = [weight for weight in weights if not self._is_there(weight)]
        if not missing:
            return
        self._live += sum(weight.numel for weight in missing)
        sizes: Counter[int] = Counter()  # a buffer for each dtype
        for weight in missing:
            sizes[weight.itemsize] += weight.padded(self.devices)
        self.calls += [(phase, nbytes) for nbytes in sizes.values()]
        gather = _Gather(missing, sum(map(self.rounded, sizes.values())))
        self._arriving |= dict.fromkeys(missing, gather)
        self._bytes[len(missing) > 1] += gather.buffer
        self._note()

    def _wait(self, gather: _Gather) -> None:
        """Make the weights of a gather whole; its buffer goes when each has been waited for."""
        several = len(gather.weights) > 1
        if not gather.arrived:
            gather.arrived = True
            self._whole.update(gather.weights)
            for weight in gather.weights:
                nbytes = self.rounded(weight.numel * weight.itemsize)
                self._held[weight] = nbytes if several else gather.buffer
                self._bytes[0] += nbytes if several else 0
            self._note()
        gather.waiting -= 1
        if several and not gather.waiting:
            self._bytes[1] -= gather.buffer
