"""Layers to try: those of named shapes, or the distinct ones of a model's decoder."""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

from peftkern.tools.bench.shapes import Shape

BASES = ("dense", "nf4")
DTYPES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}


@dataclass(frozen=True)
class Case:
    """A layer as a training meets it: base and adapter, and the rows of one call.

    dtype: of x, of a dense weight and of 4-bit products. autocast: under torch.autocast to bf16.
    """

    label: str
    N: int
    K: int
    base: str
    r: int
    rows: int
    dtype: str = "bf16"
    adapter_dtype: str = "fp32"
    autocast: bool = False
    dora: bool = False

    @property
    def cost(self) -> int:
        """Work of building the layer and of calling it, in products of a weight and a row."""
        return self.N * self.K * (self.rows + (256 if self.base == "nf4" else 16))

    @property
    def title(self) -> str:
        """Words for a table and a bar."""
        more = f"{' DoRA' if self.dora else ''}{' autocast' if self.autocast else ''}"
        return f"{self.label} {self.base} r={self.r} {self.dtype}{more}, {self.rows} rows"


def ordered(
    shapes: Iterable[Shape],
    bases: Iterable[str],
    ranks: Iterable[int],
    rows: Iterable[int],
    dtypes: Iterable[str],
    adapter_dtype: str,
    autocast: bool,
) -> list[Case]:
    """Return a case of each class, the cheap ones first; rows of one power of two are a class."""
    classes = {count.bit_length(): count for count in sorted(rows)}
    found = [
        Case(shape.name, shape.N, shape.K, base, r, count, dtype, adapter_dtype, autocast)
        for shape in shapes
        for base in bases
        for r in ranks
        for dtype in dtypes
        for count in classes.values()
    ]
    return sorted(found, key=lambda case: case.cost)


class ModelLayers(NamedTuple):
    """Distinct layers of a model, its dtype ("bf16", ...), and if it is in 4 bits.

    experts: the weights of fused experts, in words; only a training tries them.
    """

    shapes: list[Shape]
    experts: list[str]
    dtype: str
    four_bit: bool


def model_layers(path: str, targets: str) -> ModelLayers:
    """Read the distinct linear layers and experts of a model from its config alone.

    Args: path, a config.json or its folder; targets, "all-linear" (all but the output embeddings,
        as PEFT takes it) or names of modules.
    Raises: OSError or ValueError in one line if there is no config, or no layer of those names.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.pytorch_utils import Conv1D

    from peftkern.layers.quantize import expert_parameters

    folder = Path(path)
    folder = folder.parent if folder.name == "config.json" else folder
    if not (folder / "config.json").is_file():
        raise ValueError(f"--model: {path}: expected a config.json, or the folder of one")
    config = AutoConfig.from_pretrained(os.fspath(folder), local_files_only=True)
    quantized = getattr(config, "quantization_config", None) or {}
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    head = model.get_output_embeddings()
    names = None if targets == "all-linear" else {name.strip() for name in targets.split(",")}
    shapes: dict[tuple[int, int], Shape] = {}
    experts: dict[str, None] = {}
    for name, module in model.named_modules():
        last = name.rpartition(".")[2]
        for own in expert_parameters(module):
            if names is None or own in names:
                experts[f"{own} {list(module._parameters[own].shape)}"] = None
        if module is head or not isinstance(module, (torch.nn.Linear, Conv1D)):
            continue
        if names is None or last in names:
            N, K = module.weight.shape[:: -1 if isinstance(module, Conv1D) else 1]
            shapes.setdefault((N, K), Shape(f"{last} {N}x{K}", N, K))
    if not shapes:
        other = f", but {', '.join(experts)}, which only a training tries" if experts else ""
        raise ValueError(f"--targets: {path} has no linear layers of the names {targets!r}{other}")
    known = {f"torch.{long}": short for short, long in DTYPES.items()}
    dtype = known.get(str(config.dtype), "bf16")
    four_bit = isinstance(quantized, dict) and bool(quantized.get("load_in_4bit"))
    return ModelLayers(list(shapes.values()), list(experts), dtype, four_bit)


@dataclass(frozen=True)
class Sweep:
    """Layers of growing size, the smallest of which that pays is a CPU's crossover."""

    name: str
    first: Case
    sizes: tuple[int, ...]

    def case(self, size: int) -> Case:
        """Return the layer of a size: values of x and y for "dense", of the weight for "dora"."""
        if self.name == "dense":
            return replace(self.first, rows=size // (self.first.N + self.first.K))
        side = 1 << (size.bit_length() // 2)
        return replace(self.first, label=f"crossover {side}x{side}", N=side, K=side)


def sweeps(dtype: str, r: int, adapter_dtype: str) -> list[Sweep]:
    """Return what is measured for `backends/cpu/crossovers.py`."""
    layer = Case("crossover 1024x1024", 1024, 1024, "dense", r, 256, dtype, adapter_dtype)
    return [
        Sweep("dense", layer, tuple(1 << power for power in range(15, 22))),
        Sweep("dora", replace(layer, dora=True), tuple(1 << power for power in range(12, 21, 2))),
    ]
