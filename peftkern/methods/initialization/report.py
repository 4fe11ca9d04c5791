"""Report of an initialization: of each layer how much the factors keep, and what both miss."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from torch import nn

from peftkern.methods.initialization.factors import Factors

__all__ = ["InitReport"]


@dataclass(frozen=True)
class LayerStart:
    """Start of one layer.

    shape [m, n] and scaling of its update; error, |W - (base + update)| / |W|, of the weight that
    the layer had, None for a base that stays as it is or in float32, where it is rounding alone;
    energy, excess and certificate as in `Factors`. matrices: of a stack of experts as many as they
    are; error, excess and certificate are then the largest of one, energy the mean.
    """

    name: str
    shape: tuple[int, int]
    rank: int
    scaling: float
    error: float | None
    energy: float
    excess: float | None = None
    certificate: float | None = None
    matrices: int = 1

    @classmethod
    def of(cls, name: str, factors: Factors, scaling: float, error: float | None) -> LayerStart:
        shape = (len(factors.lora_B), factors.lora_A.shape[1])
        return cls(name, shape, len(factors.lora_A), scaling, error, *factors[2:])

    @classmethod
    def of_stack(cls, starts: Sequence[LayerStart]) -> LayerStart:
        """Return the start of a layer from those of its matrices."""
        largest = {
            name: max((v for one in starts if (v := getattr(one, name)) is not None), default=None)
            for name in ("error", "excess", "certificate")
        }
        energy = sum(one.energy for one in starts) / len(starts)
        return replace(starts[0], **largest, energy=energy, matrices=len(starts))


@dataclass(frozen=True)
class InitReport:
    """Report of `peftkern.initialize_` and `peftkern init`.

    layers: in the order of the model. skipped: {name: reason} of adapter layers left as they were.
    model: the PEFT model, a new one if `initialize_` was given a plain model; None for files.
    """

    method: str
    layers: tuple[LayerStart, ...]
    skipped: dict[str, str] = field(default_factory=dict)
    model: nn.Module | None = None

    @property
    def error(self) -> float | None:
        """Largest relative error of a layer, None if all bases are in float32."""
        return max((la.error for la in self.layers if la.error is not None), default=None)

    def as_dict(self) -> dict[str, Any]:
        """Return all but the model as values fit for json.dumps."""
        layers = [{**asdict(layer), "shape": list(layer.shape)} for layer in self.layers]
        return {"method": self.method, "layers": layers, "skipped": dict(self.skipped)}

    def __str__(self) -> str:
        energies = sorted(layer.energy for layer in self.layers)
        said = [
            f"{self.method}: {len(self.layers)} layers",
            f"energy kept {energies[0]:.1%} to {energies[-1]:.1%}",
        ]
        if self.error is not None:
            said.append(f"largest error {self.error:.2e}")
        bounds = [layer.certificate for layer in self.layers if layer.certificate is not None]
        if bounds:
            said.append(f"excess error at most {max(bounds):.1e}, of each with probability 0.999")
        if self.skipped:
            said.append(f"{len(self.skipped)} left as they were")
        return ", ".join(said)
