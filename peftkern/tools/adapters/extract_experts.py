"""Extraction of updates of experts: a pair for each of a stack, which share the largest rank.

A file holds the stack of a parameter [E, m, n] whole, or the rows of each expert in tensors of its
own (gate and up, one after the other); one expert is in memory at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from peftkern.functional.low_rank_svd import LoraFactors
from peftkern.methods.low_rank_algebra import Loss
from peftkern.tools.adapters.adapter import Update
from peftkern.tools.adapters.noise import quantized_rounding
from peftkern.tools.checkpoints.architecture import (
    Load,
    expert_tensors,
    is_turned,
    stacks_experts,
    transposes_experts,
)
from peftkern.tools.checkpoints.checkpoint import TensorInfo
from peftkern.tools.checkpoints.decoded import DecodedInfo

Found = tuple[LoraFactors, Tensor, float, float]
Cut = Callable[[Tensor, Tensor, Sequence[float]], Found | None]


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

    def shape(self, tensors: dict[str, TensorInfo]) -> tuple[int, int, int]:
        """Return [E, m, n]."""
        if self.whole:
            E, *matrix = tensors[self.whole].shape
        else:
            infos = [tensors[name] for name in self.rows[0]]
            E, *matrix = len(self.rows), sum(i.shape[0] for i in infos), infos[0].shape[1]
        m, n = reversed(matrix) if self.turned else matrix
        return E, m, n

    def read(self, tensors: dict[str, TensorInfo]) -> Iterator[Tensor]:
        """Yield the matrices [m, n] of the experts, one after the other."""
        if self.whole:
            matrices = tensors[self.whole].items()
        else:
            matrices = (torch.cat([tensors[name].read() for name in one]) for one in self.rows)
        yield from (matrix.T if self.turned else matrix for matrix in matrices)

    def roundings(self, tensors: dict[str, TensorInfo]) -> Iterator[float]:
        """Yield the energy of each expert's rounding to 4 bits, 0 where it is dense."""
        if self.whole:
            info = tensors[self.whole]
            yield from stored_roundings(info) or [0.0] * info.shape[0]
        for one in self.rows:
            yield sum(sum(stored_roundings(tensors[name])) for name in one)


def find_stack(model: nn.Module, target: str, loads: Sequence[Load]) -> Stack | None:
    """Return the stack that these tensors are loaded into; None if they are rearranged otherwise.

    Args: target: name of the parameter [E, m, n], or [E, n, m] of updates [m, n].
    Raises: CheckpointError as `expert_tensors`.
    """
    first, (module, _, parameter) = loads[0], target.rpartition(".")
    turned = is_turned(model.get_submodule(module))
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
    stacks: tuple[Stack, Stack], tensors: Sequence[dict[str, TensorInfo]], cut: Cut
) -> tuple[Update, Loss, float, float] | None:
    """Return a stack's update, its loss, the edge of noise and the base's energy; None if the same.

    Args: stacks and tensors: before and after. cut: of one expert's weights before and after, and
        the energies of their rounding to 4 bits; None for nothing but that.
    """
    stack = stacks[0]
    pairs, spectra, edges, energy, weight = [], [], [], 0.0, 0.0
    shape = (0, 0)
    of_each = list(zip(stacks, tensors, strict=True))
    values = [one.read(infos) for one, infos in of_each]
    roundings = [one.roundings(infos) for one, infos in of_each]
    for before, after, *energies in zip(*values, *roundings, strict=True):
        shape = tuple(before.shape)
        weight += before.float().square().sum().item()
        found = None if are_same(before, after) else cut(before, after, energies)
        if found is None:
            pairs.append(LoraFactors(torch.zeros(shape[0], 0), torch.zeros(0, shape[1])))
            continue
        pair, S, norm, edge = found
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


def are_same(before: Tensor, after: Tensor) -> bool:
    """Return whether two tensors have the same values, of whatever dtypes."""
    dtype = torch.promote_types(before.dtype, after.dtype)
    return torch.equal(before.to(dtype), after.to(dtype))


def stored_roundings(info: TensorInfo) -> Iterable[float]:
    """Return the energy of the rounding to 4 bits of each expert, or of all; () if it is dense."""
    return map(quantized_rounding, info.quantized()) if isinstance(info, DecodedInfo) else ()
