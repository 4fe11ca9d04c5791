"""Factors of a checkpoint's layers, made while its files are written, and their adapter.

The factors of a file of weights are kept beside it in the work folder, so that a stopped run goes
on from there; at the end they are one adapter, in the folder `adapter` of the new checkpoint.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from torch import Tensor

from peftkern.formats.nf4 import NF4Weight
from peftkern.formats.rank_patterns import PREFIX
from peftkern.functional.panels import full_float32
from peftkern.methods.initialization.factors import Factors, check_finite, subtract_update_
from peftkern.methods.initialization.from_weights import from_weights
from peftkern.methods.initialization.loftq import Storage, relative_error
from peftkern.methods.initialization.report import InitReport, LayerStart
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
    _tensors: dict[str, Tensor] = field(default_factory=dict)

    @property
    def identity(self) -> dict[str, Any]:
        """What a run must have in common with one that it resumes."""
        return {
            **self.request.identity(),
            "targets": sorted(t.module for t in self.targets.values()),
        }

    @property
    def nbytes(self) -> int:
        """Size of the factors, which are there twice for a moment."""
        sizes = (self.request.rank_of(t.module) * sum(t.shape) for t in self.targets.values())
        return 2 * 4 * sum(sizes)

    @torch.no_grad()
    def rewrite(self, unit: Unit, weight: Tensor) -> tuple[NF4Weight | Tensor, float | None] | None:
        """Start a layer; return what its weight becomes, and its error."""
        target = self.targets.get(unit.name)
        if target is None:
            return None
        weight = weight.to(self.device)
        turned = target.transposed and not unit.quantized
        rows = weight.T if turned else weight
        try:
            with full_float32(), torch.autocast(weight.device.type, enabled=False):
                factors, base, error = self._start(rows, target.module)
        except ValueError as error:
            raise CheckpointError(f"{unit.name}: {error}") from error
        scaling = self.request.scaling_of(target.module)
        self.layers.append(LayerStart.of(target.module, factors, scaling, error))
        for side in ("lora_A", "lora_B"):
            key = f"{PREFIX}{target.module}.{side}.weight"
            self._tensors[key] = getattr(factors, side).cpu().contiguous()
        return (weight.cpu() if base is None else base), error

    def _start(self, weight: Tensor, module: str) -> tuple[Factors, NF4Weight | None, float | None]:
        """Return the factors, the base unless it is the weight itself, and the error."""
        request = self.request
        rank, scaling = request.rank_of(module), request.scaling_of(module)
        check_finite(weight)
        how = {"steps": request.steps, **request.svd_options}
        ((factors, base),) = from_weights(
            request.method, [weight], rank, scaling, self.storage, **how
        )
        if base is not None:
            return factors, base, relative_error(weight, base, factors, scaling)
        return factors, None, subtract_update_(weight, *factors[:2], scaling)

    def keep(self, work: Path, file: str) -> None:
        """Store the factors of a file's layers, and what is known of them."""
        path = work / _WORK / file
        path.parent.mkdir(exist_ok=True)
        modules = {key.removeprefix(PREFIX).rpartition(".lora_")[0] for key in self._tensors}
        layers = [asdict(layer) for layer in self.layers if layer.name in modules]
        staging.save_tensors(self._tensors, path, {"layers": json.dumps(layers)})
        self._tensors = {}

    def complete(self, work: Path, folder: Path) -> None:
        """Write the adapter; `layers` are then those of all files, in the order of the targets."""
        tensors, layers = {}, {}
        for path in sorted((work / _WORK).iterdir()):
            with open_safetensors(path) as file:
                tensors |= {name: file.get_tensor(name) for name in file.offset_keys()}
                for layer in json.loads(file.metadata()["layers"]):
                    layers[layer["name"]] = LayerStart(**{**layer, "shape": tuple(layer["shape"])})
        self.layers = [layers[target.module] for target in self.targets.values()]
        adapter = folder / ADAPTER
        adapter.mkdir(exist_ok=True)
        staging.save_tensors(tensors, adapter / "adapter_model.safetensors", {"format": "pt"})
        config = self.request.complete(self.config)
        config.base_model_name_or_path = self.base
        config.inference_mode = True
        config.save_pretrained(adapter)
        staging.sync_file(adapter / "adapter_config.json")

    def report(self) -> InitReport:
        return InitReport(self.request.method, tuple(self.layers))
