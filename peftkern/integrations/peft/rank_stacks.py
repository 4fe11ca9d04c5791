"""Parameters that PEFT's `target_parameters` names: what ranks of experts [E, m, n] are worth."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from statistics import fmean
from typing import Any

from torch import Tensor, nn

from peftkern.functional.arguments import WEIGHT_DTYPES
from peftkern.integrations.peft.init_data import NO_GRADIENT, DataRuns
from peftkern.methods.rank_choice import LayerSpectrum, gora_importance, matrix_spectra


@dataclass(frozen=True)
class Stack:
    """A parameter [E, m, n], or [m, n], by its name in the model; turned: [E, n, m]."""

    name: str
    parameter: Tensor
    turned: bool

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
        for own, parameter in module.named_parameters(recurse=False):
            name = f"{path}.{own}"
            ends = {one for one in targets if name == one or name.endswith(f".{one}")}
            used |= ends
            reason = _refusal(parameter, by) if ends else None
            if reason:
                skipped[name] = reason
            elif ends:
                turned = parameter.dim() == 3 and bool(getattr(module, "is_transposed", False))
                found.append(Stack(name, parameter, turned))
    unknown = sorted(set(targets) - used)
    if unknown:
        raise ValueError(f"target_parameters: no parameter is called {unknown[0]!r}")
    return found, skipped


def _refusal(parameter: Tensor, by: str) -> str | None:
    """Return why no rank can be chosen for a parameter, or None."""
    if by == "activations":
        return "the inputs of a parameter are not seen, as those of a layer are"
    if parameter.is_meta:
        return "it has no values yet, it is on the meta device"
    if parameter.dim() not in (2, 3) or parameter.dtype not in WEIGHT_DTYPES:
        return f"{list(parameter.shape)} of {parameter.dtype}, expected matrices of floats"
    if by != "weights" and type(parameter) is not nn.Parameter:
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
    gradients = runs.parameter_gradients({stack.name: stack.parameter for stack in stacks})
    for stack, gradient in finite(zip(stacks, gradients, strict=True)):
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
