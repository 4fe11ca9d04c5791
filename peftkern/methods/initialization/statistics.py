"""Statistics of what flows through layers: a few batches, hooks, one group of layers at a time.

A statistic may be as large as the weight or larger. Layers are taken in groups whose statistics
fit into a given memory, and the batches run once for each group. Layers that get the same input
(q, k, v; gate, up) share one statistic.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor, nn

from peftkern.layers.quantize import with_progress

Forward = Callable[[Any], Any]  # runs the model on a batch
Rows = Callable[[Tensor], Tensor]  # the rows [T, n] of an input [..., n] that count


@contextlib.contextmanager
def named(name: str) -> Iterator[None]:
    """Put a layer's name before the message of a ValueError."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error


class Statistic(Protocol):
    """Statistic of the inputs of a layer, batch by batch."""

    def add(self, x: Tensor) -> None: ...


S = TypeVar("S", bound=Statistic)


@torch.no_grad()
def equal_inputs(modules: Mapping[str, nn.Module], forward: Forward, batch: Any) -> dict[str, str]:
    """Run one batch; return of each layer the first that gets the same inputs."""
    digests: dict[str, bytes] = {}

    def look(name: str, x: Tensor) -> None:
        if not x.numel():  # which tells nothing of other batches
            return
        data = x.detach().reshape(-1).view(torch.uint8).cpu().numpy()
        digests[name] = digests.get(name, b"") + hashlib.blake2b(data, digest_size=16).digest()

    with _inputs(modules, look):
        forward(batch)
    leaders: dict[bytes, str] = {}
    return {
        name: leaders.setdefault(digests[name], name) if name in digests else name
        for name in modules
    }


@torch.no_grad()
def input_statistics(
    modules: Mapping[str, nn.Module],
    forward: Forward,
    batches: Sequence[Any],
    new: Callable[[str], S],
    rows: Callable[[Any], Rows],
) -> dict[str, S]:
    """Run all batches; return a statistic of each layer's inputs.

    Args: new(name) makes one; rows(batch) says which of the inputs' rows count.
    """
    statistics = {name: new(name) for name in modules}

    def look(name: str, x: Tensor, chosen: Rows) -> None:
        with named(name):
            statistics[name].add(chosen(x))

    for batch in with_progress(batches, f"inputs of {len(modules)} layers"):
        chosen = rows(batch)
        with _inputs(modules, functools.partial(look, chosen=chosen)):
            forward(batch)
    return statistics


@contextlib.contextmanager
def _inputs(
    modules: Mapping[str, nn.Module], look: Callable[[str, Tensor], None]
) -> Iterator[None]:
    """Show `look` the input of each layer while it runs."""
    with contextlib.ExitStack() as hooks:
        for name, module in modules.items():
            hook = module.register_forward_pre_hook(
                lambda module, args, kwargs, name=name: look(name, _input_of(args, kwargs)),
                with_kwargs=True,
            )
            hooks.callback(hook.remove)
        yield


def _input_of(args: tuple, kwargs: dict[str, Any]) -> Tensor:
    """Return the first tensor of a call."""
    return next(value for value in (*args, *kwargs.values()) if isinstance(value, Tensor))


def weight_gradients(
    modules: Mapping[str, nn.Module],
    loss: Callable[[Any], Tensor],
    batches: Sequence[Any],
) -> dict[str, Tensor]:
    """Run and differentiate all batches; return the mean of each layer's weight gradient, float32.

    gradient = sum dY^T X [m, n] of each layer whose loss reaches it. No weight has to require a
    gradient, so it may be quantized: a layer's output starts the graph where nothing before did.
    """
    sums: dict[str, Tensor] = {}

    def add(name: str, x: Tensor, dy: Tensor) -> None:
        dy, x = dy.reshape(-1, dy.shape[-1]).float(), x.reshape(-1, x.shape[-1]).float()
        if name not in sums:
            sums[name] = dy.new_zeros(dy.shape[1], x.shape[1])
        sums[name].addmm_(dy.T, x)

    def watch(name: str) -> Callable:
        def hook(module: nn.Module, args: tuple, kwargs: dict[str, Any], output: Tensor) -> Tensor:
            if not torch.is_grad_enabled():  # a checkpointed block, which runs again
                return output
            if not output.requires_grad:
                output = output.detach().requires_grad_().clone()  # no leaf: it may be changed
            x = _input_of(args, kwargs).detach()
            output.register_hook(lambda dy: add(name, x, dy))
            return output

        return hook

    with contextlib.ExitStack() as hooks, torch.enable_grad():
        for name, module in modules.items():
            hook = module.register_forward_hook(watch(name), with_kwargs=True)
            hooks.callback(hook.remove)
        for batch in with_progress(batches, f"gradients of {len(modules)} layers"):
            value = loss(batch)
            if value.requires_grad:  # else it depends on none of these
                value.backward()
    return {name: total.div_(len(batches)) for name, total in sums.items()}


def parameter_gradients(
    parameters: Mapping[str, Tensor], loss: Callable[[Any], Tensor], batches: Sequence[Any]
) -> dict[str, Tensor]:
    """Run and differentiate all batches; return the mean gradient of each parameter, float32.

    Zeros where the loss does not depend on it. What accumulates in `.grad` stays as it is.
    """
    sums = {name: torch.zeros_like(p, dtype=torch.float32) for name, p in parameters.items()}
    with contextlib.ExitStack() as restored, torch.enable_grad():
        for parameter in parameters.values():
            restored.callback(parameter.requires_grad_, parameter.requires_grad)
            parameter.requires_grad_(True)
        for batch in with_progress(batches, f"gradients of {len(parameters)} parameters"):
            value = loss(batch)
            if not value.requires_grad:
                continue
            found = torch.autograd.grad(value, list(parameters.values()), allow_unused=True)
            for total, gradient in zip(sums.values(), found, strict=True):
                if gradient is not None:
                    total.add_(gradient)
    return {name: total.div_(len(batches)) for name, total in sums.items()}


def groups(sizes: Mapping[str, int], most: int) -> Iterator[list[str]]:
    """Yield names in groups of at most `most` bytes in all; a larger one is a group of its own."""
    group: list[str] = []
    for name, size in sizes.items():
        if group and sum(sizes[other] for other in group) + size > most:
            yield group
            group = []
        group.append(name)
    if group:
        yield group
