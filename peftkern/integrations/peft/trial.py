"""Trials of patched layers against PEFT's own forward, on the user's own tensors.

A class of layers (op, weight, rank, power of two of rows, dtypes) is answered by PEFT until it was
tried: beside its first call our forward and backward run once, so that every program is checked,
and beside its second both sides are timed on copies. What a trial draws, saves or computes leaves
no trace in the user's step. Adapters that are switched off follow the verdict on the layer with
them, so that a reference pass and the policy it belongs to are served alike.
"""

from __future__ import annotations

import contextlib
import functools
import time
import weakref
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._device import DeviceContext
from torch.utils._pytree import tree_map_only

from peftkern.backends import contest, dispatch, programs, trust
from peftkern.backends.cpu import crossovers
from peftkern.backends.device import has_products
from peftkern.integrations.peft.engines import of_deepspeed
from peftkern.integrations.peft.fallback import Fallback, hooked

UNMEASURED = "the layer's own forward serves until this machine has measured such a layer"
IN_FLIGHT = "the layer's own forward serves until the training step that it began is over"
LEAST_ROWS = 128  # below, other kernels would be measured than those that run
_LEAST_ROWS_WITHOUT_PRODUCTS = 32  # where torch has no products of the dtype: PEFT's take seconds
keep_divided = False  # verdicts of rounds that disagree, too: `peftkern tune` was asked for one
ATTEMPTS = 3  # at a trial that found no memory
_PASSES = 24  # forward passes that the shortest contest takes about the time of

_peer_only: ContextVar[bool] = ContextVar("peftkern_peer_only", default=False)
_ours_only: ContextVar[bool] = ContextVar("peftkern_ours_only", default=False)


Beside = tuple[tuple, dict[str, Any]]  # what a call gives a layer beside x, a row for each of x's


class _Refused(Exception):
    """Fallback of the layer in the middle of a trial: its state has changed."""


class _Pending:
    """Step of a layer that PEFT has begun.

    It is over when the adapters have been written to, or when a backward pass has come by and left
    no gradient behind: some optimizers write past autograd's versions. A layer without adapters has
    none of these signs: its step is over when each forward has had its backward pass, or without a
    graph of its own (reentrant checkpointing) has been recomputed in one.
    """

    def __init__(self, layer: nn.Module) -> None:
        self.version, self.seen = _version(layer), False
        self.graphs = self.bare = 0  # forwards that wait for a backward pass, for a recomputation

    def watch(self, y: Tensor, training: bool) -> Tensor:
        """Notice the backward pass through a result."""
        if y.requires_grad:
            y.register_hook(self._see)
            self.graphs += training
        else:
            self.bare += training
        return y

    def _see(self, grad: Tensor) -> None:
        self.seen = True
        self.graphs = max(self.graphs - 1, 0)

    def recomputed(self) -> None:
        """Notice that a forward is computed again, in a backward pass."""
        self.seen = True
        self.bare = max(self.bare - 1, 0)

    def over(self, layer: nn.Module) -> bool:
        """Return whether no graph of that step is left to be recomputed."""
        if _version(layer) != self.version:
            return True
        adapters = _adapters(layer)
        if not adapters:
            return not (self.graphs or self.bare)
        return self.seen and all(p.grad is None for p in adapters)


def _adapters(layer: nn.Module) -> list[Tensor]:
    named = layer.named_parameters()
    return [p for name, p in named if not name.startswith(("base_layer", "weight", "bias"))]


def _version(layer: nn.Module) -> int:
    return sum(p._version for p in _adapters(layer) if not p.is_inference())


class LayerClass:
    """State of one class of layers in this process.

    reason: None where ours serves, else why PEFT does. decided: whether that is a verdict. pending:
    layers of which PEFT has answered a forward that may be recomputed, which has to be PEFT's, too.
    has_products: whether torch has those of all its dtypes here.
    """

    def __init__(self, full: tuple) -> None:
        *key, _, device = full
        self.name, self.device, (self.N, self.K) = name_of(full), device, key[2:4]
        dtypes = [part for part in key[5:] if isinstance(part, torch.dtype)]
        self.has_products = all(has_products(dtype, device) for dtype in dtypes)
        self.calls = self.failures = 0
        self.pending: weakref.WeakKeyDictionary[nn.Module, _Pending] = weakref.WeakKeyDictionary()
        self.decided, self.reason = False, UNMEASURED

    def adopt(self) -> None:
        """Take over the verdict of the cache or of another rank, if there is one."""
        verdict = trust.ledger(self.device).adopt(self.name)
        if verdict is not None:
            self.obey(verdict)

    def obey(self, verdict: dict[str, Any]) -> None:
        """Serve as a verdict says."""
        ours = verdict["side"] == trust.OURS
        self.decided = True
        self.reason = None if ours else f"the layer's own forward serves: {verdict.get('why', '')}"


_classes: dict[tuple, LayerClass] = {}
trust.on_reset(_classes.clear)


def refusal(
    layer: nn.Module, x: Tensor, key: tuple, *, complete: bool = True, alone: bool = False
) -> Fallback | None:
    """Return None where ours may answer this call, else the fallback, with its trial if one is due.

    Where torch has no products of the dtype, and PEFT's backward pass takes minutes, the trial is
    held before anybody answers.

    Args: key, (op, kind, N, K, rank, dtypes...), all that a class depends on but rows and device;
        complete, whether the call is all that a trial has to measure; alone, whether x is all that
        the call gives the layer.
    """
    if torch.compiler.is_compiling():
        trusted = _trusted_in_graph(*key, x.device.type, x.device.index)
        return None if trusted else Fallback("compiled before this machine measured such a layer")
    end = ((x.numel() // max(x.shape[-1], 1)).bit_length(), x.device)
    found = None if complete else _classes.get((*key[:-1], True, *end))  # PEFT freezes what is off
    found = found or _classes.get((*key, *end))
    if found is not None and found.reason is None and not found.pending:
        return None
    if trust.mode() == "always" or _ours_only.get() or dispatch.forced_backend() is not None:
        return None
    if found is None:
        found = _class_of((*key, *end))
    if alone and complete and layer.training and not found.has_products and _is_new(found):
        found.adopt()
        if not found.decided and trust.mode() != "off":
            _settle(layer, x, found)
    return _refusal(layer, found, complete)


def _is_new(found: LayerClass) -> bool:
    """Return whether nobody has answered a call of a class, nor recomputes one."""
    begun = found.decided or found.calls or found.pending
    return not begun and torch._C._current_graph_task_id() == -1


def _class_of(full: tuple) -> LayerClass:
    """Return the class of a whole key, with the verdict that is known of it when it is new."""
    found = _classes.get(full)
    if found is None:
        found = _classes.setdefault(full, LayerClass(full))
        found.adopt()
    return found


def settled(part: Callable[[], nn.Module], x: Tensor, key: tuple) -> str | None:
    """Return why ours may not answer a class, after a trial here and now if none was held.

    For layers whose own forward meets other processes, which a trial must not do: `part` makes a
    layer that computes both sides by itself. Args: key, as `refusal`'s.
    """
    if trust.mode() == "always" or dispatch.forced_backend() is not None:
        return None
    found = _class_of((*key, (x.numel() // max(x.shape[-1], 1)).bit_length(), x.device))
    if not found.decided:
        found.adopt()
    if not found.decided and trust.mode() != "off":
        _settle(part(), x, found)
    return found.reason


def _settle(layer: nn.Module, x: Tensor, found: LayerClass) -> None:
    """Hold the trial of a class here and now, if it goes unnoticed."""
    if not _possible(layer, x):
        return
    beside: Beside = ((), {})
    try:
        with aside(x.device):
            _rehearse(layer, x, beside)
            begin = time.perf_counter()
            with torch.no_grad():
                peer(layer, x.detach())
            _decide(layer, x, beside, found, time.perf_counter() - begin)
    except Exception as error:
        _give_up(found, error)


def _refusal(layer: nn.Module, found: LayerClass, complete: bool) -> Fallback | None:
    """Return the fallback of a class that is not ours, or not for this layer yet."""
    recomputed = torch._C._current_graph_task_id() != -1
    if not found.decided and complete and not recomputed:
        found.adopt()
    pending = found.pending.get(layer)
    if not found.decided:
        if pending is None:
            pending = found.pending[layer] = _Pending(layer)
        pending.seen = False
        if recomputed:
            pending.recomputed()
        due = complete and not recomputed and trust.mode() != "off"
        answer = functools.partial(answered_by_peer, found) if due else peer
        return Fallback(UNMEASURED, answer)
    if pending is not None:
        if recomputed:
            pending.recomputed()
            return Fallback(IN_FLIGHT, peer)
        if layer.training and not pending.over(layer):
            pending.seen = False  # of this forward no backward pass has come by
            return Fallback(
                IN_FLIGHT, lambda *call, **named: pending.watch(peer(*call, **named), True)
            )
        if layer.training:
            del found.pending[layer]
    return None if found.reason is None else Fallback(found.reason, peer)


@torch.compiler.assume_constant_result
def _trusted_in_graph(*key: Any) -> bool:
    """Return whether a graph may hold our op: trusted with some number of rows, refused with none.

    A graph is for any number of rows, and nothing is tried inside one.
    """
    *key, kind, index = key
    if trust.mode() == "always" or dispatch.forced_backend() is not None:
        return True
    sides = sides_of(tuple(key), torch.device(kind, index) if index is not None else kind)
    return sides == {trust.OURS}


def name_of(full: tuple) -> str:
    """Write a class as the ledger keeps it."""
    *layer, rows, _ = full
    dtypes = " ".join(str(part).removeprefix("torch.") for part in layer[5:])
    return f"{_layer_name(*layer[:5])} {dtypes} rows<{1 << rows}"


def _layer_name(op: str, kind: str, N: int, K: int, r: int) -> str:
    return f"{op}/{kind} {N}x{K} r={r}"


def unmeasured(layer_key: tuple, device: torch.device) -> bool:
    """Return whether no such layer has a verdict, whatever its dtypes and rows."""
    start = f"{_layer_name(*layer_key)} "
    return not any(name.startswith(start) for name in trust.ledger(device).classes)


def sides_of(key: tuple, device: torch.device | str) -> set[str]:
    """Return the sides of the verdicts on such layers, for any number of rows."""
    start = name_of((*key, 0, device)).split(" rows<")[0] + " "
    classes = trust.ledger(torch.device(device)).classes
    return {verdict["side"] for name, verdict in classes.items() if name.startswith(start)}


@contextlib.contextmanager
def only(side: ContextVar[bool]) -> Iterator[None]:
    """Let one side answer every patched layer inside, those below the layer that is called, too."""
    token = side.set(True)
    try:
        yield
    finally:
        side.reset(token)


def peer_answers() -> bool:
    """Return whether PEFT answers the layer that calls this one."""
    return not torch.compiler.is_compiling() and _peer_only.get()


def measuring() -> bool:
    """Return whether a trial calls our side, many times with one input."""
    return _ours_only.get()


def peer(layer: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """Run the forward that the layer had before `patch`, over a base that is not ours either."""
    with only(_peer_only):
        return layer.peer_forward(x, *args, **kwargs)


def answered_by_peer(tried: LayerClass, layer: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """Answer a call with PEFT's forward, and hold what is due of the trial beside it."""
    begin = time.perf_counter()
    y = peer(layer, x, *args, **kwargs)
    seconds = time.perf_counter() - begin
    if layer in tried.pending:
        tried.pending[layer].watch(y, layer.training)
    if tried.decided or not _possible(layer, x):
        return y
    tried.calls += 1
    try:
        with aside(x.device):
            beside = tree_map_only(Tensor, _own, (args, kwargs))
            if tried.calls == 1:
                _rehearse(layer, x, beside)
            else:
                _decide(layer, x, beside, tried, seconds)
    except _Refused:
        tried.calls -= 1
    except Exception as error:  # of ours: what the kernels raise, dispatch has answered already
        _give_up(tried, error)
    return y


def _own(tensor: Tensor) -> Tensor:
    """Return a tensor beside x without its graph, and so that a pass may save it."""
    return tensor.clone() if tensor.is_inference() else tensor.detach()


def _give_up(tried: LayerClass, error: Exception) -> None:
    """Leave a class to PEFT after a trial that failed; one without memory is held again."""
    if trust.out_of_memory(error):
        tried.failures += 1
        tried.calls -= 1
        if tried.failures == ATTEMPTS:
            tried.obey({"side": trust.PEER, "why": "no memory to measure ours beside it"})
        return
    text = f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0]}"
    tried.obey({"side": trust.PEER, "why": f"ours raised {text}"})
    trust.ledger(tried.device).demote(tried.name, f"raised {text}", keep=False)


def _possible(layer: nn.Module, x: Tensor) -> bool:
    """Return whether a trial would go unnoticed: nobody records, traces or captures operations.

    Nor does anybody hook into a module that the layer calls, say one of a second adapter. DeepSpeed
    hooks into all of them, those without a forward too; those that are called have been entered.
    """
    modes = torch.overrides._get_current_function_mode_stack()
    return not (
        programs.capturing(x.device)
        or torch._C._len_torch_dispatch_stack()
        or any(type(mode) is not DeviceContext for mode in modes)
        or type(x) not in (Tensor, nn.Parameter)
        or any(
            hooked(x.device, it=part)
            for part in layer.modules()
            if part is not layer and not of_deepspeed(part)
        )
    )


@contextlib.contextmanager
def aside(device: torch.device) -> Iterator[None]:
    """Keep generators, saved-tensor hooks and inference mode out of what runs inside."""
    cpu = torch.get_rng_state()
    gpu = torch.cuda.get_rng_state(device) if device.type == "cuda" else None
    try:
        with (
            torch.inference_mode(False),
            torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t: t),
        ):
            yield
    finally:
        torch.set_rng_state(cpu)
        if gpu is not None:
            torch.cuda.set_rng_state(gpu, device)


def _rehearse(layer: Any, x: Tensor, beside: Beside) -> None:
    """Run our side once in every way that it is timed in, so that its programs are checked."""
    for run in _passes(layer, x.detach().clone(), beside, _leaves(layer)).values():
        run(_ours)


def _ours(layer: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    with only(_ours_only):
        result = layer._fused(x, args, kwargs, compiling=False)
    if isinstance(result, Fallback):
        raise _Refused(result.reason)
    return result


def _leaves(layer: nn.Module) -> list[Tensor]:
    """Return what a backward pass gives gradients of; nothing where users hook into them."""
    leaves = [p for p in layer.parameters() if p.requires_grad]
    return [] if any(p._backward_hooks for p in leaves) else leaves


def _passes(
    layer: Any, x: Tensor, beside: Beside, leaves: list[Tensor]
) -> dict[str, Callable[..., Any]]:
    """Return the passes that count for a layer: forward, and with trained adapters backward."""
    args, kwargs = beside

    def forward(side: Callable[..., Tensor]) -> Tensor:
        with torch.no_grad():
            return side(layer, x, *args, **kwargs)

    def training(side: Callable[..., Tensor]) -> tuple:
        with torch.enable_grad():
            y = side(layer, x.requires_grad_(), *args, **kwargs)
            with torch.autocast(x.device.type, enabled=False):
                return torch.autograd.grad(y, [x, *leaves], y.detach(), allow_unused=True)

    return {"forward": forward, "training": training} if leaves else {"forward": forward}


def _decide(layer: Any, x: Tensor, beside: Beside, tried: LayerClass, seconds: float) -> None:
    """Time both sides, and record whose the class is."""
    rows = x.numel() // x.shape[-1]
    fit = int(rows * contest.BUDGET / (_PASSES * max(seconds, 1e-9)))
    if tried.has_products:
        least, to_pay = LEAST_ROWS, crossovers.crossover("dense") // (tried.N + tried.K) + 1
    else:
        least = _LEAST_ROWS_WITHOUT_PRODUCTS
        to_pay = crossovers.WITHOUT_PRODUCTS["dense"] // (tried.N * tried.K) + 1
    measured = min(rows, max(fit, least, to_pay))
    some = x.detach() if measured == rows else x.detach().reshape(rows, -1)[:measured]
    clock = contest.clock_of(x.device)
    beside = tree_map_only(Tensor, lambda t: t[:measured], beside)
    passes = _passes(layer, some.clone(), beside, _leaves(layer))
    ratios, unanimous = {}, True
    for name, run in passes.items():
        sides = {"PEFT": lambda run=run: run(peer), "ours": lambda run=run: run(_ours)}
        outcome = contest.outcomes(sides, clock, contest.BUDGET / len(passes))["ours"]
        ratios[name] = outcome.ratios
        unanimous &= outcome.unanimous
    slower = [
        f"{name} takes ours {ratio:.2f} times as long ({kind})"
        for name, kinds in ratios.items()
        for kind, ratio in kinds.items()
        if ratio > contest.SLOWER
    ]
    side, why = trust.PEER if slower else trust.OURS, ", ".join(slower)
    verdict = {"side": side, "why": why, "ratios": ratios, "rows": measured}
    ledger = trust.ledger(x.device)
    whole = bool(_leaves(layer)) or not any(p.requires_grad for p in layer.parameters())
    keep = programs.lasting() and whole and (unanimous or keep_divided)
    tried.obey(ledger.decide(tried.name, verdict, keep=keep))
