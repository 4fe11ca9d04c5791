"""Layers to try: those of named shapes, or the distinct ones of a model's decoder."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import NamedTuple

from peftkern.tools.bench.shapes import Shape

BASES = ("dense", "nf4")


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

    from peftkern.tools import models

    config = models.read_config(path)
    dtype = models.dtype_of(config)
    model = models.empty_model(config, torch.bfloat16)
    layers, fused = models.linear_layers(model), models.expert_weights(model)
    names, parameters = models.adapter_targets(model, targets)
    shapes: dict[tuple[int, int], Shape] = {}
    for name in names:
        N, K = models.sizes(layers[name])
        shapes.setdefault((N, K), Shape(f"{name.rpartition('.')[2]} {N}x{K}", N, K))
    experts = [f"{name.rpartition('.')[2]} {list(fused[name].shape)}" for name in parameters]
    experts = list(dict.fromkeys(experts))
    if not shapes:
        raise ValueError(f"--targets: {path}: {', '.join(experts)}, which only a training tries")
    quantized = models.quantization(config) or {}
    return ModelLayers(list(shapes.values()), experts, dtype, bool(quantized.get("load_in_4bit")))


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


@dataclass(frozen=True)
class RowSweep:
    """Products with an NF4 weight of more and more rows: the most for which the path of few rows
    takes less time is `few_rows` of `backends/cpu/crossovers.py`."""

    name: str
    sizes: tuple[int, ...] = (2, 3, 5, 7, 9, 13, 17, 25, 33, 49, 65)


def sweeps(dtype: str, r: int, adapter_dtype: str, bases: Iterable[str]) -> list[Sweep | RowSweep]:
    """Return what is measured for `backends/cpu/crossovers.py`."""
    from peftkern.backends.cpu import crossovers

    layer = Case("crossover 1024x1024", 1024, 1024, "dense", r, 256, dtype, adapter_dtype)
    found = []
    if "dense" in bases:
        found = [
            Sweep("dense", layer, tuple(1 << power for power in range(15, 22))),
            Sweep("dora", replace(layer, dora=True), tuple(1 << p for p in range(12, 21, 2))),
        ]
    if "nf4" in bases:
        found += [
            RowSweep(crossovers.few_rows_name(name, dtype == "fp32"))
            for name in crossovers.FEW_ROWS
        ]
    return found
