"""Statistics of what flows through fused experts: each expert's share of the rows.

The weights of all experts are parameters of one module, so nothing of a layer's hooks is there to
look on. Their modules run in parts instead, which show the inputs and products of each weight.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from peftkern.layers.experts import Part, experts_in_parts
from peftkern.layers.quantize import with_progress
from peftkern.methods.initialization.statistics import Forward, Rows, S, named

Stacks = Mapping[str, nn.Module]  # names of weights, each with the module of experts it is of


@torch.no_grad()
def expert_input_statistics(
    stacks: Stacks,
    forward: Forward,
    batches: Sequence[Any],
    new: Callable[[str], S],
    rows: Callable[[Any], Rows],
) -> dict[str, list[S]]:
    """Run all batches; return of each weight a statistic of the inputs of each expert.

    Args: new(name) makes one; rows(batch) says which of the tokens' rows count.
    """
    statistics = {
        name: [new(name) for _ in module._parameters[_own(name)]] for name, module in stacks.items()
    }
    chosen: Rows

    def look(name: str, part: Part, tokens: int) -> Tensor:
        counts = torch.zeros(tokens, dtype=torch.bool, device=part.tokens.device)
        counts[chosen(torch.arange(tokens, device=counts.device)[:, None])[:, 0]] = True
        with named(name):
            for statistic, mine in zip(statistics[name], part.of_experts(), strict=True):
                statistic.add(part.inputs(mine)[counts[part.tokens[mine]]])
        return part.y

    with _in_parts(stacks, look):
        for batch in with_progress(batches, f"inputs of {len(stacks)} stacks of experts"):
            chosen = rows(batch)
            forward(batch)
    return statistics


def expert_gradients(
    stacks: Stacks, loss: Callable[[Any], Tensor], batches: Sequence[Any]
) -> dict[str, Tensor]:
    """Run and differentiate all batches; return the mean gradient of each weight, float32.

    gradient[e] = sum dY^T X [m, n] over the rows of expert e, zeros where the loss does not depend
    on it. The weights may be in 4 bits: none of them has to require a gradient.
    """
    sums = {name: _zeros(module, _own(name)) for name, module in stacks.items()}

    def add(name: str, part: Part, dy: Tensor) -> None:
        for total, mine in zip(sums[name], part.of_experts(), strict=True):
            total.addmm_(dy[mine].T.float(), part.inputs(mine).float())

    def look(name: str, part: Part, tokens: int) -> Tensor:
        y = part.y
        if not torch.is_grad_enabled():  # a checkpointed block, which runs again
            return y
        if not y.requires_grad:
            y = y.detach().requires_grad_().clone()  # no leaf: it may be changed
        seen = part._replace(x=part.x.detach(), y=part.y.new_empty(0))  # nothing of the graph
        y.register_hook(lambda dy: add(name, seen, dy))
        return y

    with _in_parts(stacks, look), torch.enable_grad():
        for batch in with_progress(batches, f"gradients of {len(stacks)} stacks of experts"):
            value = loss(batch)
            if value.requires_grad:  # else it depends on none of these
                value.backward()
    return {name: total.div_(len(batches)) for name, total in sums.items()}


def _own(name: str) -> str:
    return name.rpartition(".")[2]


def _zeros(experts: nn.Module, name: str) -> Tensor:
    """Return zeros [E, m, n] for the gradient of a weight."""
    weight = experts._parameters[name]
    E, m, n = weight.shape
    shape = (E, n, m) if experts.is_transposed else (E, m, n)
    return torch.zeros(shape, dtype=torch.float32, device=weight.device)


@contextlib.contextmanager
def _in_parts(stacks: Stacks, look: Callable[[str, Part, int], Tensor]) -> Iterator[None]:
    """Run the experts in parts, and go on with look(name, part, number of tokens) of each."""
    names: dict[nn.Module, dict[str, str]] = {}
    for name, module in stacks.items():
        names.setdefault(module, {})[_own(name)] = name
    with contextlib.ExitStack() as restored:
        for module, watched in names.items():
            # accelerate's hooks stay around it, which move the inputs.
            attribute = "_old_forward" if hasattr(module, "_hf_hook") else "forward"
            before = module.__dict__.get(attribute)
            signature = inspect.signature(getattr(module, attribute))
            setattr(module, attribute, _Forward(module, watched, signature, look))
            if before is None:
                restored.callback(delattr, module, attribute)
            else:
                restored.callback(setattr, module, attribute, before)
        yield


class _Forward:
    """Stands in the place of a module's forward."""

    def __init__(
        self,
        experts: nn.Module,
        names: Mapping[str, str],
        signature: inspect.Signature,
        look: Callable[[str, Part, int], Tensor],
    ) -> None:
        self.experts, self.names, self.signature, self.look = experts, names, signature, look

    def __call__(self, *args: Any, **kwargs: Any) -> Tensor:
        """Run the experts on hidden states, ids and routing weights of tokens, in this order."""
        hidden, index, weights = self.signature.bind(*args, **kwargs).arguments.values()
        x = hidden.reshape(-1, hidden.shape[-1]).to(self.experts.down_proj.dtype)
        routing = (one.reshape(-1, one.shape[-1]) for one in (index, weights))

        def change(part: Part) -> Tensor:
            name = self.names.get(part.name)
            return part.y if name is None else self.look(name, part, len(x))

        return experts_in_parts(self.experts, x, *routing, change).view_as(hidden).to(hidden.dtype)
