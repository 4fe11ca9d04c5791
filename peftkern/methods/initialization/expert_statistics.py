"""Statistics of what flows through fused experts: each expert's share of the rows.

The weights of all experts are parameters of one module, so nothing of a layer's hooks is there to
look on. Their modules run in parts instead, which show the inputs and products of each weight.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from peftkern.layers.experts import Experts, Part, experts_in_parts
from peftkern.layers.quantize import with_progress
from peftkern.methods.initialization.statistics import Forward, Rows, S, named

_LLAMA4 = "Llama4TextExperts"
# Experts of transformers that have no flags, by their class, and the names of their weights.
WITHOUT_FLAGS = {_LLAMA4: ("gate_up_proj", "down_proj"), "JetMoeParallelExperts": ("weight",)}


class Shown(NamedTuple):
    """A weight of a module of experts that shows what flows through it.

    own: its name in the module. router: of JetMoE's, which are not told of which tokens rows are.
    """

    module: nn.Module
    own: str
    router: nn.Module | None = None

    @property
    def weight(self) -> Tensor:
        return self.module._parameters[self.own]

    @property
    def turned(self) -> bool:
        """Whether it is [E, in, out]."""
        return getattr(self.module, "is_transposed", type(self.module).__name__ == _LLAMA4)


Stacks = Mapping[str, Shown]  # by the names of the weights in the model


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
    statistics = {name: [new(name) for _ in range(len(one.weight))] for name, one in stacks.items()}
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
    sums = {name: _zeros(one) for name, one in stacks.items()}

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


def _zeros(shown: Shown) -> Tensor:
    """Return zeros [E, m, n] for the gradient of a weight."""
    E, m, n = shown.weight.shape
    shape = (E, n, m) if shown.turned else (E, m, n)
    return torch.zeros(shape, dtype=torch.float32, device=shown.weight.device)


@contextlib.contextmanager
def _in_parts(stacks: Stacks, look: Callable[[str, Part, int], Tensor]) -> Iterator[None]:
    """Run the experts in parts, and go on with look(name, part, number of tokens) of each."""
    names: dict[nn.Module, dict[str, str]] = {}
    routed: dict[nn.Module, _Routed] = {}
    with contextlib.ExitStack() as restored:
        for name, (module, own, router) in stacks.items():
            names.setdefault(module, {})[own] = name
            if router is not None:
                routed[module] = _Routed()
                restored.callback(router.register_forward_hook(routed[module]).remove)
        for module, watched in names.items():
            # accelerate's hooks stay around it, which move the inputs.
            attribute = "_old_forward" if hasattr(module, "_hf_hook") else "forward"
            before = module.__dict__.get(attribute)
            signature = inspect.signature(getattr(module, attribute))
            forward = _Forward(module, watched, signature, look, routed.get(module))
            setattr(module, attribute, forward)
            if before is None:
                restored.callback(delattr, module, attribute)
            else:
                restored.callback(setattr, module, attribute, before)
        yield


class _Routed:
    """Hook of JetMoE's router: of which of how many tokens each sorted row is."""

    def __call__(self, module: nn.Module, args: tuple, output: tuple[Any, ...]) -> None:
        _, self.tokens, _, _, logits = output
        self.count = len(logits)


class _Forward:
    """Stands in the place of a module's forward."""

    def __init__(
        self,
        experts: nn.Module,
        names: Mapping[str, str],
        signature: inspect.Signature,
        look: Callable[[str, Part, int], Tensor],
        routed: _Routed | None,
    ) -> None:
        self.experts, self.names, self.signature, self.look = experts, names, signature, look
        self.routed = routed

    def __call__(self, *args: Any, **kwargs: Any) -> Tensor:
        """Run the experts on their arguments, which have other names in other classes."""
        given = self.signature.bind(*args, **kwargs).arguments.values()
        if self.routed is not None:
            return self._sorted(*given)
        return self._every_token(*given) if len(given) == 1 else self._chosen(*given)

    def _chosen(self, hidden: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        """Run fused experts on hidden states, ids and routing weights of tokens."""
        x = hidden.reshape(-1, hidden.shape[-1]).to(self.experts.down_proj.dtype)
        routing = (one.reshape(-1, one.shape[-1]) for one in (index, weights))
        change = functools.partial(self._change, count=len(x))
        return experts_in_parts(self.experts, x, *routing, change).view_as(hidden).to(hidden.dtype)

    def _every_token(self, hidden: Tensor) -> Tensor:
        """Run Llama 4's, each of which gets all tokens, times its scores [E * T, K]; those of
        tokens that chose other experts are zeros, and end as zeros."""
        up, down = (self.experts._parameters[name] for name in ("gate_up_proj", "down_proj"))
        same = Experts(up, down, gate=self._gate, transposed=True)
        E = len(down)
        x = hidden.reshape(-1, hidden.shape[-1]).to(down.dtype)
        count = len(x) // E
        mine = torch.arange(E, device=x.device).repeat_interleave(count)
        index = torch.where((x != 0).any(1), mine, E)[:, None]
        ones = x.new_ones(len(x), 1)

        def change(part: Part) -> Tensor:
            return self._change(part._replace(tokens=part.tokens % max(count, 1)), count)

        return experts_in_parts(same, x, index, ones, change).view_as(hidden).to(hidden.dtype)

    def _gate(self, u: Tensor) -> Tensor:
        gate, up = u.chunk(2, dim=-1)
        return up * self.experts.act_fn(gate)

    def _sorted(self, x: Tensor, sizes: Sequence[int]) -> Tensor:
        """Run one weight of JetMoE's on sorted rows, so many of each expert."""
        y = type(self.experts).forward(self.experts, x, sizes)
        offsets = torch.tensor(sizes, device=x.device).cumsum(0, dtype=torch.int32)
        part = Part("weight", x, None, self.routed.tokens, offsets, y)
        return self._change(part, self.routed.count)

    def _change(self, part: Part, count: int) -> Tensor:
        name = self.names.get(part.name)
        return part.y if name is None else self.look(name, part, count)
