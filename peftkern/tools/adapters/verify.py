"""Checks of an adapter: by itself, against the base it is for, against another one."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Iterator, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from peftkern.formats.rank_patterns import PREFIX
from peftkern.functional.low_rank_svd import low_rank_svdvals
from peftkern.layers.names import shortened
from peftkern.tools.adapters.adapter import (
    Adapter,
    AdapterError,
    Update,
    named_tensors,
    not_finite,
)
from peftkern.tools.checkpoints.checkpoint import CheckpointError, read_checkpoint
from peftkern.tools.checkpoints.decoded import decoded
from peftkern.tools.checkpoints.weights import find_weights, may_have_stacks

Shape = tuple[int, ...]
# Where a checkpoint has the tensors of a parameter of one expert, in the order of its rows.
_MIXTRAL = ".block_sparse_moe."  # transformers' "mlp" in files of Mixtral's kind
_PER_EXPERT = {
    "gate_up_proj": ((".mlp.", ("gate_proj", "up_proj")), (_MIXTRAL, ("w1", "w3"))),
    "up_proj": ((".mlp.", ("up_proj",)),),
    "down_proj": ((".mlp.", ("down_proj",)), (_MIXTRAL, ("w2",))),
}
_TOKENS = ".token_adapter.trainable_tokens_delta"
_TOLD = 3  # defects of a kind


class Check(NamedTuple):
    """Name of a check, whether it passed, and what it saw, in one line."""

    name: str
    passed: bool
    detail: str


def verify(
    adapter: Adapter,
    *,
    base: str | os.PathLike | None = None,
    against: Adapter | None = None,
    tol: float = 1e-6,
) -> list[Check]:
    """Check an adapter that was read: keys, shapes and config agree, or it would not have been.

    Args:
        base: folder of the model it is for, dense or in 4 bits, of which headers are read.
        against: an adapter that should say the same: every |D - D'|_F <= tol |D|_F, from the
            factors, all other tensors equal bit for bit.
    Raises: AdapterError for a base that cannot be read.
    """
    tensors = sum(1 for _ in named_tensors(adapter))
    checks = [
        Check("keys", True, f"{len(adapter.updates)} updates in {tensors} tensors fit the config"),
        _finite(adapter),
    ]
    if base is not None:
        checks += _fits(adapter, base)
    if against is not None:
        checks += _equal(adapter, against, tol)
    return checks


def _finite(adapter: Adapter) -> Check:
    bad = [name for name, tensor in named_tensors(adapter) if not_finite(tensor)]
    return _check("finite", bad, "no NaN and no infinity", "NaN or infinity in ")


def _check(name: str, bad: list[str], well: str, ill: str) -> Check:
    if not bad:
        return Check(name, True, well)
    return Check(name, False, f"{ill}{shortened(bad, _TOLD, '; ')}")


def _fits(adapter: Adapter, base: str | os.PathLike) -> Iterator[Check]:
    shapes = Shapes(_shapes_of(base))
    wrong = [why for update in adapter.updates.values() for why in _misfits(update, shapes)]
    count = len(adapter.updates)
    yield _check("base", wrong, f"has a weight of the right shape for all {count} updates", "")
    wrong = [
        why
        for name, tensor in adapter.extras.items()
        for why in _misfit(name, tensor.shape, shapes)
    ]
    if adapter.extras:
        count = len(adapter.extras)
        yield _check("other tensors", wrong, f"all {count} have their place in the base", "")


def _shapes_of(base: str | os.PathLike) -> dict[str, Shape]:
    """Return the shapes of a base's values, dense or in 4 bits. Raises: AdapterError."""
    try:
        checkpoint = read_checkpoint(base, quantized=True)
        if may_have_stacks(checkpoint):
            checkpoint = decoded(checkpoint)
        return {name: weight.shape for name, weight in find_weights(checkpoint).items()}
    except (CheckpointError, OSError) as error:
        raise AdapterError(str(error)) from None


class Shapes:
    """Shapes of a base by name, also where one of the two has one component more in front."""

    def __init__(self, shapes: Mapping[str, Shape]) -> None:
        self.shapes = shapes
        self.behind = {name.partition(".")[2]: name for name in shapes}

    def get(self, name: str) -> Shape | None:
        for one in (name, name.partition(".")[2], self.behind.get(name, "")):
            if one in self.shapes:
                return self.shapes[one]
        return None


def _misfits(update: Update, shapes: Shapes) -> Iterator[str]:
    """Say what is wrong with an update of a base, if something is."""
    m, n = update.size
    name = f"{update.module}.{update.parameter}"
    found = shapes.get(name)
    if update.kind == "experts":
        count = len(update.lora_A)
        fitting: tuple[Shape, ...] = ((count, m, n), (count, n, m))
        if found is None:
            found = _stacked(update, shapes)
    elif update.kind == "conv":
        fitting = ((m, *update.shape[1:]),)
    elif update.kind == "embedding":
        fitting = ((n, m),)
    else:  # a Conv1D has its weight the other way round
        fitting = ((m, n), (n, m), (1, m, n), (1, n, m))
    if found is None and update.module.endswith("lm_head"):
        return  # tied to the embedding: no tensor of its own
    if found is None:
        yield f"{name}: the base has none"
    elif found not in fitting:
        yield f"{name}: {list(found)} in the base, the update is of {list(fitting[0])}"


def _stacked(update: Update, shapes: Shapes) -> Shape | None:
    """Return the shape of a stack whose experts have tensors of their own in a checkpoint."""
    for inside, parts in _PER_EXPERT.get(update.parameter, ()):
        module = update.module.replace(".mlp.", inside)
        names = [f"{module}.{{}}.{part}.weight" for part in parts]
        found = [shapes.get(name.format(0)) for name in names]
        if None not in found:
            count = 1
            while None not in [shapes.get(name.format(count)) for name in names]:
                count += 1
            return count, sum(shape[0] for shape in found), *found[0][1:]
    return None


def _misfit(key: str, shape: Shape, shapes: Shapes) -> Iterator[str]:
    """Say what is wrong with another tensor: a table may have more rows than the base's."""
    name = key.removeprefix(PREFIX).replace(".base_layer.", ".")
    rows = name.endswith(_TOKENS)
    found = shapes.get(f"{name.removesuffix(_TOKENS)}.weight" if rows else name)
    table = rows or ".base_layer.weight" in key
    if found is None and not name.startswith("lm_head"):
        yield f"{key}: the base has none"
    elif found is not None and (found[1:] != tuple(shape[1:]) if table else found != tuple(shape)):
        yield f"{key}: {list(shape)}, {list(found)} in the base"


def _equal(adapter: Adapter, other: Adapter, tol: float) -> Iterator[Check]:
    ours, theirs = adapter.updates, other.updates
    apart = [f"{key} is in one only" for key in sorted(ours.keys() ^ theirs.keys())]
    both = [key for key in ours if key in theirs]
    fits = [key for key in both if _same_shape(ours[key], theirs[key])]
    apart += [f"{key} has another shape" for key in both if key not in set(fits)]
    yield _check("modules", apart, f"{len(both)} updates in both", "")
    errors = distances([(ours[key], theirs[key]) for key in fits])
    off = [(error, key) for error, key in zip(errors, fits, strict=True) if not error <= tol]
    largest = max(zip(errors, fits, strict=True), default=(0.0, "none"))
    yield _check(
        "products",
        [f"{key} {error:.2e}" for error, key in sorted(off, reverse=True)],
        f"largest relative difference {largest[0]:.2e}, of {largest[1]}",
        f"beyond {tol:g}: ",
    )
    rest = [dict(_others(one)) for one in (adapter, other)]
    names = rest[0].keys() | rest[1].keys()
    unlike = [name for name in sorted(names) if not _alike(rest[0].get(name), rest[1].get(name))]
    if names:
        yield _check("other tensors", unlike, f"{len(names)} equal bit for bit", "not equal: ")


def _same_shape(ours: Update, theirs: Update) -> bool:
    experts = [len(one.lora_A) if one.kind == "experts" else 1 for one in (ours, theirs)]
    return ours.size == theirs.size and experts[0] == experts[1]


def distances(pairs: Iterable[tuple[Update, Update]]) -> list[float]:
    """Compute |D - D'|_F / |D|_F of updates of the same weights, from their factors.

    0 where both are zero, infinite where D alone is.
    """
    pairs = list(pairs)
    differences = [_difference(*factors) for pair in pairs for factors in _factors(*pair)]
    owners = [owner for owner, pair in enumerate(pairs) for _ in pair[0].pairs()]
    wholes = [(B, A, ours.scaling) for ours, _ in pairs for B, A in ours.pairs()]
    energies = []
    for columns in (zip(*differences, strict=True), zip(*wholes, strict=True)):
        sums = [0.0] * len(pairs)
        found = low_rank_svdvals(*map(list, columns)) if pairs else []
        for owner, sigma in zip(owners, found, strict=True):
            sums[owner] += sigma.double().square().sum().item()
        energies.append(sums)
    sums = zip(*energies, strict=True)
    return [math.sqrt(d / w) if w else (math.inf if d else 0.0) for d, w in sums]


def _factors(ours: Update, theirs: Update) -> Iterator[tuple[Tensor, Tensor, Tensor, Tensor]]:
    """Yield B, A, B' and A' of each pair in float64, scalings multiplied in."""
    for (B, A), (C, E) in zip(ours.pairs(), theirs.pairs(), strict=True):
        yield B.double() * ours.scaling, A.double(), C.double() * theirs.scaling, E.double()


def _difference(B: Tensor, A: Tensor, C: Tensor, E: Tensor) -> tuple[Tensor, Tensor]:
    """Return the factors of B A - C E: where A is E, their difference is exact."""
    if torch.equal(A, E):
        return B - C, A
    return torch.cat([B, -C], 1), torch.cat([A, E])


def _others(adapter: Adapter) -> Iterator[tuple[str, Tensor]]:
    """Yield what is no factor: a bias with the scaling of its update."""
    for key, one in adapter.updates.items():
        if one.magnitude is not None:
            yield f"{key}.magnitude", one.magnitude.reshape(-1)
        if one.bias is not None:
            yield f"{key}.bias", (one.bias.double() * one.scaling).float()
    yield from adapter.extras.items()


def _alike(one: Tensor | None, other: Tensor | None) -> bool:
    if one is None or other is None or one.shape != other.shape:
        return False
    return torch.equal(one, other.to(one.dtype))
