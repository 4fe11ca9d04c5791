"""Problems of `peftkern bench`, with the bytes and FLOPs that each needs at least."""

from __future__ import annotations

import collections
import functools
import itertools
import os
import random
from collections.abc import Iterable
from dataclasses import dataclass

from peftkern.backends.tolerances import PEER_WRONG
from peftkern.tools.bench.shapes import Shape

MODES = ("forward", "backward", "full", "no-grad", "memory")
DTYPES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}
SHORT = {long: name for name, long in DTYPES.items()} | {"float64": "fp64"}  # of some records
ITEMSIZE = {"bfloat16": 2, "float16": 2, "float32": 4}
SCALING = 2.0  # lora_alpha / r
# Values of a weight for each byte of its scales.
SCALED_BY = {"nf4": 64, "fp4": 64, "mxfp4": 32, "nvfp4": 16, "int4": 16}
FACTS = ("op", "shape", "M", "N", "K", "r", "dtype", "mode")
WHOLE_LLAMA = "llama-7b"  # all linear layers of the model; K is its width


@dataclass(frozen=True)
class Op:
    """Operands of an op: NF4 or dense weight, rows of activations, an adapter, a weight and an
    adapter for each group of rows. `against`: its baselines, the most relevant first.

    Of an op that is no layer, `counts` says what M is ("rows" of its inputs, "layers" that it takes
    at once; None: it has none), and `results` names what it gives.
    """

    nf4: bool
    rows: bool
    lora: bool
    against: tuple[str, ...]
    grouped: bool = False
    dora: bool = False
    counts: str | None = None
    results: tuple[str, ...] = ("y",)
    dtypes: tuple[str, ...] = tuple(ITEMSIZE)
    peer_wrong: float = PEER_WRONG  # error from which a peer's result is wrong

    @property
    def modes(self) -> tuple[str, ...]:
        """Applicable modes: an op without gradients has no backward."""
        return MODES if self.rows else ("forward", "memory")

    @property
    def ranked(self) -> bool:
        return self.lora or self.counts == "layers"


def _of_layers(*results: str, against: tuple[str, ...]) -> Op:
    own = {"counts": "layers", "results": results, "dtypes": ("float32",)}
    return Op(False, False, False, against, **own)


OPS = {
    "nf4_lora_linear": Op(True, True, True, ("bitsandbytes", "peft", "frozen")),
    "lora_linear": Op(False, True, True, ("peft", "frozen")),
    "nf4_linear": Op(True, True, False, ("bitsandbytes", "frozen")),
    "nf4_dequantize": Op(True, False, False, ("bitsandbytes", "torch")),
    "nf4_quantize": Op(
        *(False, False, False, ("bitsandbytes", "torch")),
        results=("values",),
        peer_wrong=0.12,  # error of normal weights rounded to 4 bits, with a margin
    ),
    "grouped_linear": Op(False, True, True, ("peft", "grouped_mm", "frozen"), grouped=True),
    "dora_linear": Op(False, True, True, ("peft", "frozen"), dora=True),
    "nf4_dora_linear": Op(True, True, True, ("bitsandbytes", "frozen"), dora=True),
    "rosa_forward": Op(False, False, False, ("composed",), counts="rows"),
    "rosa_sddmm": Op(False, False, False, ("composed",), counts="rows", results=("values.grad",)),
    "low_rank_svd": _of_layers("S", "update", against=("composed",)),
    "low_rank_svdvals": _of_layers("S", against=("composed",)),
    "adalora_update": _of_layers("mask", "importance", against=("peft", "composed")),
    "adalora_orthogonality": _of_layers("loss", "gradients", against=("peft",)),
}
# Defaults: training, where most time is spent, within a minute.
FIRST_SHAPES = {"cpu": "llama3-8b-q_proj", "cuda": "llama3-8b"}
FIRST_ROWS = {"cpu": 256, "cuda": 4096}
FIRST_LAYERS = 32
FIRST_GROUPED = {"cpu": "256x512x512x32", "cuda": "qwen3-30b-a3b"}
DENSITY = 0.01  # of RoSA's mask


@dataclass(frozen=True)
class Problem:
    """Complete description of a case: with the seed it decides every number of its tensors.

    x [M, K] and weight [N, K] of `dtype`; lora_A [r, K] and lora_B [N, r] in float32 as PEFT keeps
    them. M, r and E are None where the op has none; with E the weight is [E, N, K], lora_A [E * r,
    K] and lora_B [N, r * E]. `density`: share of the places of RoSA's mask; `dropout`, the dtype of
    the adapters and `autocast` are the scripts' of bench/.
    """

    op: str
    shape: str
    M: int | None
    N: int
    K: int
    r: int | None
    dtype: str
    mode: str
    E: int | None = None
    density: float = DENSITY
    dropout: float = 0.0
    adapter_dtype: str = "float32"
    autocast: bool = False
    format: str = "nf4"  # of a weight in 4 bits

    @property
    def kind(self) -> Op:
        return OPS[self.op]

    @property
    def name(self) -> str:
        sizes = [f"M{self.M}"] if self.M else []
        sizes += [f"r{self.r}"] if self.r else []
        sizes += [f"{self.density:.1%}"] if self.op.startswith("rosa") else []
        other = [] if self.format == "nf4" else [self.format]
        return "/".join([self.op, *other, self.shape, *sizes, self.dtype, self.mode])

    @property
    def trains(self) -> bool:
        """True if a call runs backward; the memory of an op with gradients is that of training."""
        return self.kind.rows and self.mode in ("backward", "full", "memory")

    @property
    def goes_forward(self) -> bool:
        return self.mode != "backward"

    @property
    def weight_bytes(self) -> int:
        """Bytes of the weight as stored: codes and nested absmax, or dense; of an op that is no
        layer, of what a call reads."""
        if self.kind.counts == "layers":
            return 4 * self.elements * (4 if self.op == "adalora_update" else 1)
        if self.kind.counts:
            return self.M * (self.N + self.K) * ITEMSIZE[self.dtype]
        size = (self.E or 1) * self.N * self.K
        if not self.kind.nf4:
            return size * ITEMSIZE[self.dtype]
        return size // 2 + size // SCALED_BY[self.format]

    @property
    def layer_sizes(self) -> list[tuple[int, int]]:
        """N and K of each layer of an op over layers; those of a whole Llama come in blocks."""
        if self.shape != WHOLE_LLAMA:
            return [(self.N, self.K)] * self.M
        wide = 11008 * self.K // 4096
        block = [(self.K, self.K)] * 4 + [(wide, self.K)] * 2 + [(self.K, wide)]
        return block * (self.M // len(block))

    @property
    def elements(self) -> int:
        """Numbers in the factors of all layers; AdaLoRA's have singular values, too."""
        of_values = self.op == "adalora_update"
        return sum(self.r * (n + k + of_values) for n, k in self.layer_sizes)

    @property
    def group_sizes(self) -> list[int]:
        """Rows of each group: drawn for each row, alike, so that few rows leave groups empty."""
        return _group_sizes(self.M, self.E)

    def work(self) -> tuple[int, int]:
        """Return lower bounds of bytes moved and operations done."""
        m, n, k, r, item = self.M or 0, self.N, self.K, self.r or 0, ITEMSIZE[self.dtype]
        if self.kind.counts:
            return self._other_work()
        if not self.kind.rows:
            packed = n * k // 2 + n * k // SCALED_BY[self.format]
            return packed + n * k * item, 0
        groups = self.E or 1
        hit = sum(size > 0 for size in self.group_sizes) if self.E else 1  # of which W is read
        weight = hit * self.weight_bytes // groups
        adapters, update = ITEMSIZE[self.adapter_dtype] * r * (n + k), 2 * m * r * (n + k)
        traffic = flops = 0
        if self.kind.dora:  # the norms of all rows, once a call
            traffic, flops = weight, 2 * n * k * (r + 1)
        if self.goes_forward:
            traffic += weight + hit * adapters + m * (n + k) * item
            flops += 2 * m * n * k + update
        if self.trains:  # W, dy, x and dx; the adapters and the gradients, of all groups
            traffic += weight + (2 * hit + groups) * adapters
            traffic += m * (n + (2 if r else 1) * k) * item
            flops += 2 * m * n * k + 2 * update
        return traffic, flops

    def _other_work(self) -> tuple[int, int]:
        """Count an op that is no layer.

        AdaLoRA's update reads the parameter, its gradient and two EMAs, and writes the EMAs; its
        loss reads each matrix twice and writes a gradient. The SVD reads factors and writes
        vectors; r^2 float64 FLOPs a row make the Gram matrix, whose other half is mirrored, and
        2 r^2 rotate: they count twice, as float64 has half the rate of float32.
        """
        n, k, r, item = self.N, self.K, self.r or 0, ITEMSIZE[self.dtype]
        if self.op == "adalora_update":
            return 24 * self.elements, 9 * self.elements
        if self.op == "adalora_orthogonality":
            return 12 * self.elements, 8 * r * self.elements
        if self.kind.counts == "layers":
            vectors = self.op == "low_rank_svd"
            return self.weight_bytes * (1 + vectors), 2 * (1 + 2 * vectors) * r * self.elements
        nnz = max(1, round(self.density * n * k))
        if self.op == "rosa_sddmm":
            return self.weight_bytes + 8 * nnz, 2 * self.M * nnz
        return self.weight_bytes + n * k * item + 8 * nnz, 2 * self.M * (n * k + nnz)

    def needed_memory(self) -> int:
        """Return a lower bound: the weight drawn in float32, once dense, and the activations."""
        if self.kind.counts == "layers":
            return 2 * self.weight_bytes
        size = (self.E or 1) * self.N * self.K
        return size * (4 + ITEMSIZE[self.dtype]) + 12 * (self.M or 0) * (self.N + self.K)

    def facts(self) -> dict:
        """Return the fields of a record; the shape or the name tells the others."""
        return {key: getattr(self, key) for key in FACTS}


@functools.cache
def _group_sizes(rows: int, groups: int) -> list[int]:
    draw = random.Random(0)
    counts = collections.Counter(draw.randrange(groups) for _ in range(rows))
    return [counts[group] for group in range(groups)]


def problems(
    ops: Iterable[str],
    shapes: Iterable[Shape],
    dtypes: Iterable[str],
    modes: Iterable[str] | None,
    ranks: Iterable[int],
    rows: Iterable[int] | None,
    device: str,
    format: str = "nf4",
) -> list[Problem]:
    """List every applicable combination once, ops in turn; `modes` None: training where there are
    gradients, else forward; `rows` None: a default for the mode and the device.

    Raises: ValueError naming the option if a mode fits none of the ops, or the memory is too small.
    """
    ops, found = list(ops), {}
    for mode in modes or ():
        if all(mode not in OPS[op].modes for op in ops):
            raise ValueError(f"--mode: {', '.join(ops)} has no {mode}")
    for shape, op in itertools.product(shapes, ops):
        kind, label = OPS[op], shape.name
        if kind.grouped != bool(shape.E):
            continue
        own = {"format": format} if kind.nf4 else {}
        accepted = [dtype for dtype in dtypes if dtype in kind.dtypes] or kind.dtypes[:1]
        for mode in modes or (("full",) if kind.rows else ("forward",)):
            if mode not in kind.modes:
                continue
            given = rows or (1 if mode == "no-grad" else FIRST_ROWS[device],)
            if kind.counts == "layers":
                given = (FIRST_LAYERS,)
            if shape.M:
                given = (shape.M,)
            if not (kind.rows or kind.counts):
                label = f"{shape.N}x{shape.K}" if shape.M else label
                given = (None,)
            for m, dtype, r in itertools.product(
                given, accepted, ranks if kind.ranked else (None,)
            ):
                problem = Problem(op, label, m, shape.N, shape.K, r, dtype, mode, shape.E, **own)
                found.setdefault(problem.name, problem)
    free = available_memory()
    for problem in found.values():
        if free is not None and problem.needed_memory() > free:
            raise ValueError(
                f"--shapes: {problem.shape} with {problem.M or 0} rows needs more than "
                f"{problem.needed_memory() / 1e9:.1f} GB of memory, this machine has "
                f"{free / 1e9:.1f} GB available"
            )
    return list(found.values())


def available_memory() -> int | None:
    """Return the available bytes of the system; None where it does not say."""
    try:
        with open("/proc/meminfo", encoding="ascii") as file:
            sizes = dict(line.split(":", 1) for line in file)
        return int(sizes["MemAvailable"].split()[0]) << 10
    except (OSError, KeyError, ValueError, IndexError):
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
