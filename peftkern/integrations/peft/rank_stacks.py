"""Parameters that PEFT's `target_parameters` names: what ranks of experts [E, m, n] are worth."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from statistics import fmean
from typing import Any

from torch import Tensor, nn

from peftkern.functional.arguments import WEIGHT_DTYPES
from peftkern.integrations.peft.experts import shown_weight
from peftkern.integrations.peft.init_data import NO_GRADIENT, NOT_SEEN, DataRuns, counted_rows
from peftkern.methods.initialization.expert_statistics import Shown
from peftkern.methods.rank_choice import (
    LayerSpectrum,
    gora_importance,
    input_spectrum,
    matrix_spectra,
    stacked,
)


@dataclass(frozen=True)
class Stack:
    """A parameter [E, m, n], or [m, n], by its name in the model.

    turned: [E, n, m], of those that PEFT knows to be so. shown: if what flows through it can be
    seen.
    """

    name: str
    parameter: Tensor
    turned: bool
    shown: Shown | None = None

    @property
    def packed(self) -> bool:
        """Whether it is in 4 bits, and no gradient of it is autograd's."""
        return type(self.parameter) is not nn.Parameter

    @property
    def shape(self) -> tuple[int, int]:
        m, n = self.parameter.shape[-2:]
        return (n, m) if self.turned else (m, n)

    def matrices(self, values: Tensor) -> Iterator[Tensor]:
        """Yield the matrix [m, n] of each expert, of the parameter or of what has its shape."""
        stack = values if values.dim() == 3 else values[None]
        for expert in range(len(stack)):  # one at a time of those in 4 bits
            yield stack[expert].T if self.turned else stack[expert]


def find_stacks(
    model: nn.Module, targets: Collection[str], by: str
) -> tuple[list[Stack], dict[str, str]]:
    """Find the parameters of a plain model that `target_parameters` names, as PEFT matches them.

    Returns: those that ranks can be chosen for, and of the others {name: reason}.
    Raises: ValueError for a name that no parameter has.
    """
    found, skipped, used = [], {}, set()
    for path, module in model.named_modules():
        parent = model.get_submodule(path.rpartition(".")[0])
        for own, parameter in module.named_parameters(recurse=False):
            name = f"{path}.{own}"
            ends = {one for one in targets if name == one or name.endswith(f".{one}")}
            used |= ends
            if not ends:
                continue
            shown = shown_weight(module, own, parent)
            reason = _refusal(parameter, by, shown is not None)
            if reason:
                skipped[name] = reason
            else:
                turned = parameter.dim() == 3 and bool(getattr(module, "is_transposed", False))
                found.append(Stack(name, parameter, turned, shown))
    unknown = sorted(set(targets) - used)
    if unknown:
        raise ValueError(f"target_parameters: no parameter is called {unknown[0]!r}")
    return found, skipped


def _refusal(parameter: Tensor, by: str, seen: bool) -> str | None:
    """Return why no rank can be chosen for a parameter, or None.

    Args: seen, whether what flows through it can be.
    """
    if by == "activations" and not seen:
        return NOT_SEEN
    if parameter.is_meta:
        return "it has no values yet, it is on the meta device"
    if parameter.dim() not in (2, 3) or parameter.dtype not in WEIGHT_DTYPES:
        return f"{list(parameter.shape)} of {parameter.dtype}, expected matrices of floats"
    if by != "weights" and type(parameter) is not nn.Parameter and not seen:
        return f"{type(parameter).__name__} has no gradient"
    return None


def stack_spectra(
    by: str, stacks: Sequence[Stack], runs: DataRuns, count: int
) -> Iterator[LayerSpectrum]:
    """Yield what ranks of the parameters are worth: one rank for all experts of each."""
    if by == "weights":
        weights = ((one.name, W) for one in stacks for W in one.matrices(one.parameter))
        yield from matrix_spectra(weights, count, **runs.options)
        return
    if by == "activations":
        yield from _input_spectra(stacks, runs, count)
        return
    for stack, gradient in finite(_gradients(stacks, runs)):
        matrices = list(stack.matrices(gradient))
        if by == "gora":
            pairs = zip(stack.matrices(stack.parameter), matrices, strict=True)
            parts = [gora_importance(stack.name, W, G) for W, G in pairs]
            norm = fmean(part.norm for part in parts)
            found = replace(parts[0], norm=norm, experts=len(parts))
        else:
            named = ((stack.name, G) for G in matrices)
            (found,) = matrix_spectra(named, count, **runs.options)
        yield replace(found, unreached=_unreached(matrices))


def _input_spectra(stacks: Sequence[Stack], runs: DataRuns, count: int) -> Iterator[LayerSpectrum]:
    """Yield what principal components of the rows routed to each expert explain, added up."""
    named = {stack.name: stack for stack in stacks}
    shown = {name: stack.shown for name, stack in named.items()}
    for name, experts in runs.expert_components(shown, dict.fromkeys(named, count), counted_rows):
        parts = [input_spectrum(name, named[name].shape, one) for one in experts]
        without = [str(expert) for expert, one in enumerate(parts) if one.unreached]
        if without and len(without) < len(parts):
            why = f"no batch runs through its experts {', '.join(without)}"
        else:
            why = parts[0].unreached
        yield replace(stacked(parts), unreached=why)


def _gradients(stacks: Sequence[Stack], runs: DataRuns) -> Iterator[tuple[Stack, Tensor]]:
    """Yield the stacks with their gradients, those in 4 bits by what flows through them."""
    dense = [stack for stack in stacks if not stack.packed]
    found = runs.parameter_gradients({stack.name: stack.parameter for stack in dense})
    yield from zip(dense, found, strict=True)
    packed = {stack.name: stack for stack in stacks if stack.packed}
    for name, gradient in runs.expert_gradients({name: one.shown for name, one in packed.items()}):
        yield packed[name], gradient.mT if packed[name].shown.turned else gradient


def _unreached(gradients: Sequence[Tensor]) -> str:
    """Return in words which experts get no gradient."""
    without = [str(expert) for expert, one in enumerate(gradients) if not one.any()]
    if len(without) == len(gradients):
        return NO_GRADIENT
    return f"the loss does not depend on its experts {', '.join(without)}" if without else ""


def finite(found: Iterable[tuple[Any, Tensor]]) -> Iterator[tuple[Any, Tensor]]:
    """Yield layers or stacks with their gradients. Raises: ValueError on NaN or Inf."""
    for one, gradient in found:
        if not gradient.isfinite().all():
            raise ValueError(f"{one.name}: batches: expected finite gradients, got NaN or Inf")
        yield one, gradient


def names_of(model: nn.Module) -> Iterator[str]:
    """Yield the names of modules, each followed by those of its own parameters."""
    for path, module in model.named_modules():
        yield path
        yield from (f"{path}.{own}" for own, _ in module.named_parameters(recurse=False))
