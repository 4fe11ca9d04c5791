"""Extraction of updates of experts: a pair for each of a stack, which share the largest rank.

A file holds the stack of a parameter [E, m, n] whole, or the rows of each expert in tensors of its
own (gate and up, one after the other); one expert is in memory at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from peftkern.functional.low_rank_svd import LoraFactors
from peftkern.methods.low_rank_algebra import Loss
from peftkern.tools.adapters.adapter import Update
from peftkern.tools.checkpoints.architecture import (
    Load,
    expert_tensors,
    stacks_experts,
    transposes_experts,
)
from peftkern.tools.checkpoints.checkpoint import TensorInfo, read_tensors

Cut = Callable[[Tensor, Tensor], tuple[LoraFactors, Tensor, float, float]]


class Stack(NamedTuple):
    """Tensors of one parameter of experts: `whole`, or the `rows` of each expert.

    turned: the stored matrices are [n, m] of the update's [m, n].
    """

    module: str
    parameter: str
    turned: bool
    whole: str = ""
    rows: tuple[tuple[str, ...], ...] = ()

    @property
    def names(self) -> list[str]:
        return [self.whole] if self.whole else [name for one in self.rows for name in one]

    def read(self, tensors: dict[str, TensorInfo]) -> Iterator[Tensor]:
        """Yield the matrices [m, n] of the experts, one after the other."""
        if self.whole:
            (matrices,) = (iter(one) for one in read_tensors([tensors[self.whole]], {self.whole}))
        else:
            matrices = (
                torch.cat([read_tensor(tensors[name]) for name in one]) for one in self.rows
            )
        yield from (matrix.T if self.turned else matrix for matrix in matrices)


def find_stack(model: nn.Module, target: str, loads: Sequence[Load]) -> Stack | None:
    """Return the stack that these tensors are loaded into; None if they are rearranged otherwise.

    Args: target: name of the parameter [E, m, n], or [E, n, m] of updates [m, n].
    Raises: CheckpointError as `expert_tensors`.
    """
    first, (module, _, parameter) = loads[0], target.rpartition(".")
    turned = bool(getattr(model.get_submodule(module), "is_transposed", False))
    if first.converter is None:
        return Stack(module, parameter, turned, first.info.name)
    if transposes_experts(first.converter):
        stored = first.info.shape != tuple(model.get_parameter(target).shape)
        return Stack(module, parameter, turned != stored, first.info.name)
    if not stacks_experts(first.converter):
        return None
    found = expert_tensors(target, loads, len(model.get_parameter(target)))
    rows = tuple(tuple(info.name for info in infos) for infos in found)
    return Stack(module, parameter, turned, rows=rows)


def stack_update(
    stack: Stack, base: dict[str, TensorInfo], tuned: dict[str, TensorInfo], cut: Cut
) -> tuple[Update, Loss, float, float] | None:
    """Return a stack's update, its loss, the edge of noise and the base's energy; None if the same.

    Args: cut: of one expert's weights before and after.
    """
    pairs, spectra, edges, energy, weight = [], [], [], 0.0, 0.0
    shape = (0, 0)
    for before, after in zip(stack.read(base), stack.read(tuned), strict=True):
        shape = tuple(before.shape)
        weight += before.float().square().sum().item()
        if torch.equal(before, after):
            pairs.append(LoraFactors(torch.zeros(shape[0], 0), torch.zeros(0, shape[1])))
            continue
        pair, S, norm, edge = cut(before, after)
        edges.append(edge)
        pairs.append(pair)
        spectra.append(S)
        energy += norm**2
    if not spectra:
        return None
    rank = max(len(S) for S in spectra)
    lora_B = torch.stack([F.pad(B, (0, rank - B.shape[1])) for B, _ in pairs])
    lora_A = torch.stack([F.pad(A, (0, 0, 0, rank - A.shape[0])) for _, A in pairs])
    kept = sum(S.double().square().sum().item() for S in spectra)
    top = max(S[0].item() for S in spectra)
    loss = Loss(min(shape), rank, energy, max(energy - kept, 0.0), top, None)
    update = Update(stack.module, stack.parameter, "experts", lora_A, lora_B, 1.0)
    return update, loss, max(edges), weight


def read_tensor(info: TensorInfo) -> Tensor:
    """Read one tensor. Raises: CheckpointError if its file has changed since it was checked."""
    [[tensor]] = map(list, read_tensors([info]))
    return tensor
