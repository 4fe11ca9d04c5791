"""One training step of a model of fake tensors, and the same step with more layers.

Layers of a stack are alike, so what a step holds in a segment (the first layer of a kind, the last
one, those next to them, what lies outside) is linear in the number of layers: it is run with two of
each kind and with three, and extended to all of them exactly. Every layer of a model of few is run.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterator
from copy import copy
from functools import partial
from typing import Any
from unittest import mock

import torch
from peft.tuners.lora import dora
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily
from transformers import Conv1D
from transformers.utils import import_utils

from peftkern import patch
from peftkern.backends import dispatch, trust
from peftkern.tools.plan import build
from peftkern.tools.plan.sharding import Engine, Kinds, Trace, engine_of
from peftkern.tools.plan.tracker import (
    ACTIVATIONS,
    CHECKPOINTS,
    FIXED,
    TEMPORARIES,
    Tracker,
)
from peftkern.tools.plan.work import IMPORTANCE, STEP

_MIN_8BIT, _BLOCK_8BIT = 4096, 256  # of bitsandbytes' 8-bit optimizers
_RUN = 2  # layers of a kind that are run at least


class Steps:
    """Step of a config under a training, for any batch and sequence: models are built once."""

    def __init__(self, config: Any, training: Any) -> None:
        self.config, self.training = config, training.computed()
        self.engine = engine_of(training, config.get_text_config().hidden_size)
        self.mode = FakeTensorMode(allow_non_fake_inputs=True)
        self.kinds = _kinds(build.base_model(config, self.training))
        self.base = {kind: min(_RUN, len(found)) for kind, found in self.kinds.items()}
        self._models: dict[Any, tuple] = {}

    def trace(self, batch: int, sequence: int) -> Trace:
        """Return the bytes of each segment of the whole model's step."""
        missing = {kind: len(found) - self.base[kind] for kind, found in self.kinds.items()}
        longer = {
            kind: self._run({**self.base, kind: self.base[kind] + 1}, batch, sequence)
            for kind, count in missing.items()
            if count
        }
        start = self._run(self.base, batch, sequence)  # the last one: the engine extends it
        total = {segment: Counter(parts) for segment, parts in start.items()}
        saved = {kind: Counter() for kind in longer}
        for kind, more in longer.items():
            for segment, parts in total.items():
                step = Counter(more[segment])
                step.subtract(start[segment])
                for part, nbytes in step.items():
                    parts[part] += missing[kind] * nbytes
                if segment[0] == "backward":
                    saved[kind] = max(saved[kind], step, key=Counter.total)
        for more in longer.values():
            total |= _between(total, more)
        self.engine.extend(total, self.kinds, saved)
        return total

    def _run(self, counts: dict[Any, int], batch: int, sequence: int) -> Trace:
        key = tuple(counts.items())
        with self.mode, _as_if_run(self.training):
            if key not in self._models:
                self._models[key] = self._built(counts)
            run = _Run(self._models[key], self.training, self.engine, batch, sequence)
            return run.trace

    def _built(self, counts: dict[Any, int]) -> tuple[nn.Module, Counter, int]:
        with unset_fake_temporarily():
            model = build.base_model(self.config, self.training)
            _truncate(model, self.kinds, counts)
            parameters = sum(p.numel() for p in model.parameters())
            adapters = build.peft_config(model, self.training)
            if self.training.quantized:
                build.quantize(model, self.training)
        build.make_fake(model)
        head, own = model.get_output_embeddings(), [t for _, _, t in build.tensors(model)]
        model = build.add_adapters(model, self.training, adapters)
        fixed = _fixed(model, head, {id(t) for t in own}, self.engine)
        if self.training.patched and self.training.method != "full":
            with unset_fake_temporarily():  # tables of 4-bit weights are real, and compared
                patch(model)
        return model, fixed, parameters


def _between(total: Trace, more: Trace) -> Trace:
    """Return the segments of layers that are neither the first nor the last of their kind.

    FSDP2 holds most in these: a buffer of the layer before and one of the layer after. Of many such
    layers the one next to the last or to the first has the peak, and to its segment in a run of few
    layers the others add what they add to that of its neighbor.
    """
    found: Trace = {}
    for segment, parts in more.items():
        place = segment[-1] if isinstance(segment, tuple) else None
        if not (isinstance(place, tuple) and place[-1] == "between"):
            continue
        for side in ("first", "last"):
            neighbor = (*segment[:-1], (place[0], side))
            if neighbor in total:
                added = Counter(total[neighbor])
                added.subtract(more[neighbor])
                added.update(parts)
                found[(*segment, side)] = added
    return found


class _Run:
    """One step under a tracker; `trace` is what it found."""

    def __init__(
        self, built: tuple, training: Any, engine: Engine, batch: int, sequence: int
    ) -> None:
        self.model, fixed, parameters = built
        self.training, self.engine = training, engine
        ids = torch.zeros(batch, sequence, dtype=torch.long)
        vocabulary = self.model.get_output_embeddings().weight.shape[0]
        cuda = training.device == "cuda"
        self.tracker = Tracker(cuda, large=batch * sequence * vocabulary)
        for _, _, tensor in build.tensors(self.model):
            self.tracker.add(tensor)
        self.tracker.add(ids)
        trained = [p for p in self.model.parameters() if p.requires_grad]
        self.trace: Trace = {"fixed": Counter(fixed)}
        self.trace["counts"] = Counter(
            parameters=parameters, trainable=sum(p.numel() for p in trained)
        )
        handles = [p.register_post_accumulate_grad_hook(engine.gradient) for p in trained]
        for layer in self.model.modules():
            label = vars(layer).get("plan_label")
            if label is None:
                continue
            before, after = partial(self._before, label), partial(self._after, label)
            handles.append(layer.register_forward_pre_hook(before, with_kwargs=True))
            handles.append(layer.register_forward_hook(after, always_call=True))
        try:
            with self.tracker:
                self._step(ids)
        finally:
            for handle in handles:
                handle.remove()
            engine.end()
            for p in trained:
                p.grad = None
            if self.training.adaptive:
                self.model.base_model.rankallocator.reset_ipt()
        self.trace |= {segment: Counter(parts) for segment, parts in self.tracker.peaks.items()}
        self.trace["work"] = self.tracker.work
        self.trace["communication"] = Counter(engine.communication)

    def _step(self, ids: Tensor) -> None:
        bf16 = torch.autocast("cpu", torch.bfloat16, enabled=self.training.autocast)
        self.tracker.doing = STEP
        self.tracker.enter(("forward", "start"), ACTIVATIONS)
        self.engine.begin(self.model, self.tracker, self.trace["fixed"])
        with bf16, build.said_of_the_model():
            loss = self.model(input_ids=ids, labels=ids).loss
        self.engine.after(None)
        self.tracker.enter(("backward", "start"), TEMPORARIES)
        self.engine.before_backward(None)
        loss.backward()
        del loss
        self.engine.finish_backward()
        fixed = self.trace["fixed"]
        self.tracker.enter(None, FIXED)
        trained = self.engine.trained()
        before = self.tracker.live[FIXED]
        if self.training.adaptive:
            self.tracker.doing = IMPORTANCE
            self.model.base_model.rankallocator.update_ipt(self.model.base_model)
            fixed["importance"] = self.tracker.live[FIXED] - before
            before = self.tracker.live[FIXED]
        self.tracker.doing = None
        optimizer = _optimizer(trained, self.training)
        if optimizer is None:
            states = [state_bytes(p.numel(), self.training.optimizer) for p in trained]
            fixed["optimizer states"] = sum(states)
            for p, held in zip(trained, states, strict=True):  # read and written, as p; a gradient
                moved = 2 * held + 3 * p.numel() * p.element_size()
                self.tracker.work[STEP, 0, moved] += 1
        else:
            optimizer.step()
            fixed["optimizer states"] = self.tracker.live[FIXED] - before
        self.tracker.enter(("optimizer", "start"), TEMPORARIES)
        if optimizer is not None:
            self.tracker.doing = STEP
            optimizer.step()
            self.tracker.doing = None

    def _before(self, label: Any, layer: nn.Module, args: tuple, kwargs: dict) -> None:
        phase = self.tracker.segment[0]
        self.tracker.enter((phase, label), ACTIVATIONS, in_layer=True)
        if phase == "forward" and self.training.checkpointing:
            self.tracker.move(_first(args, kwargs), CHECKPOINTS)
        self.engine.before(layer)
        given = _first(args, kwargs)
        if phase == "forward" and given.requires_grad:
            given.register_hook(lambda grad: self.engine.close(layer))

    def _after(self, label: Any, layer: nn.Module, args: tuple, out: Any) -> None:
        if self.tracker.segment[0] == "backward":  # a checkpoint was computed again
            self.tracker.enter(("backward", label), TEMPORARIES, in_layer=True)
            return
        self.tracker.enter(("forward", "after", label), ACTIVATIONS)
        self.engine.after(layer)
        first = out[0] if isinstance(out, tuple) else out
        if isinstance(first, Tensor) and first.requires_grad:
            first.register_hook(partial(self._backward, label, layer))

    def _backward(self, label: Any, layer: nn.Module, grad: Tensor) -> None:
        self.engine.close()
        self.tracker.enter(("backward", label), TEMPORARIES, in_layer=True)
        self.engine.before_backward(layer)


def _first(args: tuple, kwargs: dict) -> Tensor:
    """Return the first tensor that a layer is given."""
    return next(t for t in (*args, *kwargs.values()) if isinstance(t, Tensor))


def _optimizer(trained: list[Tensor], training: Any) -> torch.optim.Optimizer | None:
    """Return torch's optimizer; None for bitsandbytes', whose states are counted."""
    if training.optimizer == "sgd":
        return torch.optim.SGD(trained, lr=1e-3)
    if training.optimizer == "adamw":
        return torch.optim.AdamW(trained, lr=1e-3, foreach=training.device == "cuda")
    return None


def state_bytes(numel: int, optimizer: str) -> int:
    """Return bytes of the states that bitsandbytes' optimizer has of one tensor."""
    if optimizer.endswith("8bit") and numel >= _MIN_8BIT:
        return 2 * (numel + -(-numel // _BLOCK_8BIT) * 4)
    return 2 * numel * 4


def _fixed(model: nn.Module, head: Any, own: set[int], engine: Engine) -> Counter:
    """Return bytes by part that a device holds of a model whose base has the tensors `own`."""
    parts: Counter = Counter()
    seen = set()
    for name, module, tensor in build.tensors(model):
        if id(tensor) in seen:
            continue
        seen.add(id(tensor))
        weight = not name.endswith(".bias") and tensor.dim() > 0
        if id(tensor) not in own:
            part = "adapters"
        elif isinstance(module, nn.Embedding):
            part = "embeddings"
        elif module is head and weight:
            part = "lm_head"
        elif isinstance(module, (nn.Linear, Conv1D)) and not name.endswith(".bias"):
            part = "linear layers"
        elif "expert" in type(module).__name__.lower():
            part = "experts"
        elif "router" in type(module).__name__.lower() or name.endswith("mlp.gate.weight"):
            part = "routers"
        else:
            part = "norms, biases"
        parts[part] += engine.held(tensor)
    return parts


def _stacks(model: nn.Module) -> Iterator[tuple[str, nn.ModuleList]]:
    """Yield the outermost lists of several layers."""
    found: list[str] = []
    for name, module in model.named_modules():
        inside = any(name.startswith(f"{outer}.") for outer in found)
        several = isinstance(module, nn.ModuleList) and len(module) > 1
        if several and not inside and next(module[0].parameters(), None) is not None:
            found.append(name)
            yield name, module


def _kinds(model: nn.Module) -> Kinds:
    """Return the indices of the layers of each kind in each list."""
    kinds: Kinds = {}
    for name, layers in _stacks(model):
        for i, layer in enumerate(layers):
            kinds.setdefault((name, _kind(layer)), []).append(i)
    return kinds


def _kind(layer: nn.Module) -> tuple:
    """Return what layers that are alike have in common: classes, shapes, settings."""
    found: list = []
    for name, module in layer.named_modules():
        shapes = tuple((k, tuple(p.shape)) for k, p in module._parameters.items() if p is not None)
        simple = {
            k: v
            for k, v in vars(module).items()
            if isinstance(v, (str, bool, int, float)) and "idx" not in k and k != "layer_id"
        }
        found.append((name, type(module), shapes, tuple(simple.items())))
    return tuple(found)


def _truncate(model: nn.Module, kinds: Kinds, counts: dict[Any, int]) -> None:
    """Keep so many layers of each kind, the last one and the first ones, so that the whole list's
    last layer stays the last; each has its kind and its place among them as a label, and its place
    in the whole list."""
    for name, layers in list(_stacks(model)):
        kept = []
        for kind, found in kinds.items():
            if kind[0] == name:
                ids = found[: counts[kind] - 1] + found[-1:]
                kept += [(i, kind, j == 0, j == len(ids) - 1) for j, i in enumerate(ids)]
        kept.sort(key=lambda one: one[0])
        chosen = nn.ModuleList()
        for i, kind, first, last in kept:
            layers[i].plan_label = (kind, "first" if first else "last" if last else "between")
            layers[i].plan_place = (name, i)
            chosen.append(layers[i])
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, chosen)


def _dense(module: nn.Module) -> Tensor:
    """Dequantize for DoRA, where PEFT asks for the class of the weight."""
    state = getattr(module.weight, "quant_state", None)
    if state is None:
        return module.weight
    from bitsandbytes.functional import dequantize_4bit

    return dequantize_4bit(module.weight.data, state)


def _native_dropout(
    input: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False
) -> Tensor:
    """Dropout as a GPU has it, with a mask of bytes."""
    return torch.native_dropout(input, p, training)[0] if p and training else input


@contextlib.contextmanager
def _as_if_run(training: Any) -> Iterator[None]:
    """Let libraries take fake tensors for real ones of the device.

    Kernels are not tried, as nothing would be measured; transformers takes fake tensors for a
    trace, in which it makes masks that a run does without.
    """
    with contextlib.ExitStack() as stack:
        stack.enter_context(trust.use_mode("always"))
        stack.enter_context(mock.patch.object(dora, "dequantize_module_weight", _dense))
        stack.enter_context(mock.patch.object(dora, "deepcopy", copy))  # of a layer, to read it
        not_fake = mock.patch.object(import_utils, "is_fake_tensor", lambda x: False, create=True)
        stack.enter_context(not_fake)
        if training.device == "cuda":
            stack.enter_context(dispatch.use_backend("triton"))
            native = mock.patch.object(nn.functional, "dropout", _native_dropout)
            stack.enter_context(native)
        yield
