"""Factors of a checkpoint's layers, made while its files are written, and their adapter.

The factors of a file of weights are kept beside it in the work folder, so that a stopped run goes
on from there; at the end they are one adapter, in the folder `adapter` of the new checkpoint.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from torch import Tensor

from peftkern.formats.nf4 import NF4Weight
from peftkern.formats.rank_patterns import PREFIX
from peftkern.functional.panels import full_float32
from peftkern.methods.initialization.factors import (
    Factors,
    check_finite,
    check_scaling,
    subtract_update_,
)
from peftkern.methods.initialization.from_weights import from_weights, groups
from peftkern.methods.initialization.loftq import Storage, relative_error
from peftkern.methods.initialization.report import InitReport, LayerStart
from peftkern.tools.adapters.experts import ungroup, wrapper
from peftkern.tools.checkpoints import staging
from peftkern.tools.checkpoints.checkpoint import CheckpointError, open_safetensors
from peftkern.tools.initialize.request import Request, Target
from peftkern.tools.quantize.file_plan import Unit

ADAPTER = "adapter"  # folder of the output
_WORK = "factors"  # folder of the work folder


@dataclass
class Starts:
    """Rewriter of `quantize_checkpoint`: starts the targets, by the names of their weights.

    storage: of weights in NF4, None for a dense checkpoint. base: path for the adapter's config.
    """

    request: Request
    targets: dict[str, Target]
    config: LoraConfig
    base: str
    storage: Storage | None = None
    device: str = "cpu"
    layers: list[LayerStart] = field(default_factory=list)
    _factors: dict[str, list[Factors]] = field(default_factory=dict)

    @property
    def identity(self) -> dict[str, Any]:
        """What a run must have in common with one that it resumes."""
        return {
            **self.request.identity(),
            "targets": sorted({target.name for target in self.targets.values()}),
        }

    @property
    def nbytes(self) -> int:
        """Size of the factors, which are there twice for a moment."""
        targets = self.targets.values()
        sizes = (t.count * self.request.rank_of(t.name) * sum(t.shape) for t in targets)
        return 2 * 4 * sum(sizes)

    @torch.no_grad()
    def rewrite(self, unit: Unit, weight: Tensor) -> tuple[NF4Weight | Tensor, float | None] | None:
        """Start a layer, or an expert of one; return what its weight becomes, and its error."""
        target = self.targets.get(unit.name)
        if target is None:
            return None
        weight = weight.to(self.device)
        transposed = target.transposed and not unit.quantized
        shape = target.shape[::-1] if target.turned else target.shape
        matrices = (weight.mT if transposed else weight).view(-1, *shape)
        bases: list[NF4Weight | None] = []
        with full_float32(), torch.autocast(weight.device.type, enabled=False):
            for group in groups(len(matrices), shape):
                bases += self._start(unit.name, target, matrices, group)
        errors = [one.error for one in self.layers[-len(bases) :] if one.error is not None]
        return (weight.cpu() if bases[0] is None else bases[0]), max(errors, default=None)

    def _start(
        self, unit: str, target: Target, matrices: Tensor, group: Sequence[int]
    ) -> list[NF4Weight | None]:
        """Start some matrices; return the bases in NF4 that there may be."""
        request, weights = self.request, [matrices[index] for index in group]
        rank, scaling = request.rank_of(target.name), request.scaling_of(target.name)
        storage = self.storage
        if storage is not None and target.parameter:
            storage = replace(storage, double_quant=False)  # as stacks are
        how = {"steps": request.steps, "turned": target.turned, **request.svd_options}
        try:
            for index, weight in zip(group, weights, strict=True):
                where = unit if len(matrices) == 1 else f"{unit}[{index}]"
                check_finite(weight)
            check_scaling(scaling)
            found = from_weights(request.method, weights, rank, scaling, storage, **how)
        except ValueError as error:
            raise CheckpointError(f"{where}: {error}") from error
        for weight, (factors, base) in zip(weights, found, strict=True):
            if base is None:
                error = subtract_update_(weight, *factors[:2], scaling)
            else:
                error = relative_error(weight, base, factors, scaling)
            factors = factors.T if target.turned else factors
            self._factors.setdefault(unit, []).append(factors)
            self.layers.append(LayerStart.of(target.name, factors, scaling, error))
        return [base for _, base in found]

    def keep(self, work: Path, file: str) -> None:
        """Store the factors of a file's layers, and what is known of them."""
        path = work / _WORK / file
        path.parent.mkdir(exist_ok=True)
        tensors = {
            f"{unit}.{side}": torch.stack([getattr(one, side) for one in found]).cpu()
            for unit, found in self._factors.items()
            for side in ("lora_A", "lora_B")
        }
        layers = json.dumps([asdict(layer) for layer in self.layers])
        staging.save_tensors(tensors, path, {"layers": layers})
        self._factors, self.layers = {}, []

    def complete(self, work: Path, folder: Path) -> None:
        """Write the adapter; `layers` are then those of all files, in the order of the targets."""
        found: dict[str, Tensor] = {}
        starts: dict[str, list[LayerStart]] = {}
        for path in sorted((work / _WORK).iterdir()):
            with open_safetensors(path) as file:
                found |= {name: file.get_tensor(name) for name in file.offset_keys()}
                for layer in json.loads(file.metadata()["layers"]):
                    start = LayerStart(**{**layer, "shape": tuple(layer["shape"])})
                    starts.setdefault(start.name, []).append(start)
        units: dict[str, list[str]] = {}
        for unit, target in self.targets.items():
            units.setdefault(target.name, []).append(unit)
        self.layers = [LayerStart.of_stack(starts[name]) for name in units]
        tensors = {}
        for key, name in self._keys().items():
            A, B = (
                torch.cat([found.pop(f"{unit}.{side}") for unit in units[name]])
                for side in ("lora_A", "lora_B")
            )
            for side, factor in zip("AB", ungroup(A, B), strict=True):
                tensors[f"{PREFIX}{key}.lora_{side}.weight"] = factor.contiguous()
        adapter = folder / ADAPTER
        adapter.mkdir(exist_ok=True)
        staging.save_tensors(tensors, adapter / "adapter_model.safetensors", {"format": "pt"})
        config = self.request.complete(self.config)
        config.base_model_name_or_path = self.base
        config.inference_mode = True
        config.save_pretrained(adapter)
        staging.sync_file(adapter / "adapter_config.json")

    def _keys(self) -> dict[str, str]:
        """Return {module that PEFT puts an adapter into: name of its target}."""
        parameters: dict[str, set[str]] = {}
        for target in self.targets.values():
            parameters.setdefault(target.module, set()).add(target.parameter)
        return {
            wrapper(t.module, t.parameter, parameters[t.module]): t.name
            for t in self.targets.values()
        }

    def report(self) -> InitReport:
        return InitReport(self.request.method, tuple(self.layers))
