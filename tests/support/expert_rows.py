"""Rows that reach each expert of a model, as transformers' own experts take them, in float64."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from expert_models import expert_parameters
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

Batch = Mapping[str, Any]
Found = dict[str, list[Tensor]]  # of each weight the rows of each expert


@torch.no_grad()
def routed_rows(model: nn.Module, batches: Iterable[Batch]) -> Found:
    """Return the inputs of each expert of each stack, but those of padding."""
    twin = copy.deepcopy(model).double()
    of_a_batch = {"llama4_text": _of_llama4, "jetmoe": _of_jetmoe}
    read = of_a_batch.get(model.config.model_type, _of_loops)
    found = [read(twin, batch, batch["attention_mask"].flatten().bool()) for batch in batches]
    return {
        name: [torch.cat(rows) for rows in zip(*(one[name] for one in found), strict=True)]
        for name in expert_parameters(model)
    }


@contextlib.contextmanager
def _looking(
    model: nn.Module, kind: str, look: Callable[[str, nn.Module, tuple], None]
) -> Iterator:
    """Call look(name, module, args) before each call of modules whose class's name ends so."""
    with contextlib.ExitStack() as hooks:
        for name, module in model.named_modules():
            if type(module).__name__.endswith(kind):
                hook = module.register_forward_pre_hook(
                    lambda module, args, name=name: look(name, module, args)
                )
                hooks.callback(hook.remove)
        yield


class _Products(TorchFunctionMode):
    """Rows that meet each matrix of stacked parameters, by the name of the stack and expert."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.rows: dict[tuple[str, int], Tensor] = {}
        self.places = {
            matrix.data_ptr(): (name, expert)
            for name in expert_parameters(model)
            for expert, matrix in enumerate(model.get_parameter(name))
        }

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function in (F.linear, Tensor.matmul, Tensor.__matmul__):
            place = self.places.get(args[1].data_ptr())
            if place is not None:
                assert place not in self.rows
                self.rows[place] = args[0]
        return function(*args, **(kwargs or {}))


def _of_loops(model: nn.Module, batch: Batch, counts: Tensor) -> Found:
    ids: dict[str, Tensor] = {}
    model.set_experts_implementation("eager")

    def look(name: str, experts: nn.Module, args: tuple) -> None:
        ids[name] = args[1]

    with _looking(model, "Experts", look), _Products(model) as products:
        model(**batch)
    found = {}
    for name in expert_parameters(model):
        weight, experts = model.get_parameter(name), model.get_submodule(name.rpartition(".")[0])
        columns = weight.shape[1 if experts.is_transposed else 2]
        found[name] = [weight.new_zeros(0, columns) for _ in weight]
    for (name, expert), x in products.rows.items():
        tokens = (ids[name.rpartition(".")[0]] == expert).T.nonzero()[:, 1]  # as the loop has
        assert len(tokens) == len(x)
        found[name][expert] = x[counts[tokens]]
    return found


def _of_llama4(model: nn.Module, batch: Batch, counts: Tensor) -> Found:
    found: Found = {}

    def look(name: str, experts: nn.Module, args: tuple) -> None:
        x = args[0].view(experts.num_experts, -1, experts.hidden_size)
        gate, up = (x @ experts.gate_up_proj).chunk(2, -1)
        chosen = [counts & mine.any(1) for mine in x]  # the others' are zeros
        for own, rows in (("gate_up_proj", x), ("down_proj", up * experts.act_fn(gate))):
            pairs = zip(rows, chosen, strict=True)
            found[f"{name}.{own}"] = [mine[these] for mine, these in pairs]

    with _looking(model, "Llama4TextExperts", look):
        model(**batch)
    return found


def _of_jetmoe(model: nn.Module, batch: Batch, counts: Tensor) -> Found:
    found: Found = {}
    routed: list[Tensor] = []

    def look(name: str, linear: nn.Module, args: tuple) -> None:
        x, sizes = args
        pairs = zip(x.split(sizes), routed[-1].split(sizes), strict=True)
        found[f"{name}.weight"] = [mine[counts[tokens]] for mine, tokens in pairs]

    def route(name: str, router: nn.Module, args: tuple) -> None:
        routed.append(type(router).forward(router, *args)[1])

    experts = _looking(model, "JetMoeParallelExperts", look)
    with experts, _looking(model, "JetMoeTopKGating", route):
        model(**batch)
    return found
