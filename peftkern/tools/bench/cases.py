"""Problems of `peftkern bench`, with the bytes and FLOPs that each needs at least."""

from __future__ import annotations

import collections
import dataclasses
import functools
import os
import random
from collections.abc import Iterable
from dataclasses import dataclass

from peftkern.tools.bench.shapes import Shape

MODES = ("forward", "backward", "full", "no-grad", "memory")
DTYPES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}
ITEMSIZE = {"bfloat16": 2, "float16": 2, "float32": 4}
SCALING = 2.0  # lora_alpha / r


@dataclass(frozen=True)
class Op:
    """Operands of an op: NF4 or dense weight, rows of activations, an adapter, a weight and an
    adapter for each group of rows. `against`: its baselines, the most relevant first."""

    nf4: bool
    rows: bool
    lora: bool
    against: tuple[str, ...]
    grouped: bool = False

    @property
    def modes(self) -> tuple[str, ...]:
        """Applicable modes: an op without gradients has no backward."""
        return MODES if self.rows else ("forward", "memory")


OPS = {
    "nf4_lora_linear": Op(True, True, True, ("bitsandbytes", "peft", "frozen")),
    "lora_linear": Op(False, True, True, ("peft", "frozen")),
    "nf4_linear": Op(True, True, False, ("bitsandbytes", "frozen")),
    "nf4_dequantize": Op(True, False, False, ("bitsandbytes", "torch")),
    "grouped_linear": Op(False, True, True, ("peft", "grouped_mm", "frozen"), grouped=True),
}
# Defaults: training, where most time is spent, within a minute.
FIRST_SHAPES = {"cpu": "llama3-8b-q_proj", "cuda": "llama3-8b"}
FIRST_ROWS = {"cpu": 256, "cuda": 4096}
FIRST_GROUPED = {"cpu": "256x512x512x32", "cuda": "qwen3-30b-a3b"}


@dataclass(frozen=True)
class Problem:
    """Complete description of a case: with the seed it decides every number of its tensors.

    x [M, K] and weight [N, K] of `dtype`; lora_A [r, K] and lora_B [N, r] in float32 as PEFT keeps
    them. M, r and E are None where the op has none; with E the weight is [E, N, K], lora_A [E * r,
    K] and lora_B [N, r * E].
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

    @property
    def kind(self) -> Op:
        return OPS[self.op]

    @property
    def name(self) -> str:
        sizes = [f"M{self.M}"] if self.M else []
        sizes += [f"r{self.r}"] if self.r else []
        return "/".join([self.op, self.shape, *sizes, self.dtype, self.mode])

    @property
    def trains(self) -> bool:
        """True if a call runs backward; the memory of an op with gradients is that of training."""
        return self.kind.rows and self.mode in ("backward", "full", "memory")

    @property
    def goes_forward(self) -> bool:
        return self.mode != "backward"

    @property
    def weight_bytes(self) -> int:
        """Bytes of the weight as stored: codes and nested absmax, or dense."""
        size = (self.E or 1) * self.N * self.K
        return size // 2 + size // 64 if self.kind.nf4 else size * ITEMSIZE[self.dtype]

    @property
    def group_sizes(self) -> list[int]:
        """Rows of each group: drawn for each row, alike, so that few rows leave groups empty."""
        return _group_sizes(self.M, self.E)

    def work(self) -> tuple[int, int]:
        """Return lower bounds of bytes moved and operations done."""
        m, n, k, r, item = self.M or 0, self.N, self.K, self.r or 0, ITEMSIZE[self.dtype]
        if not self.kind.rows:
            return self.weight_bytes + n * k * item, 0
        groups = self.E or 1
        hit = sum(size > 0 for size in self.group_sizes) if self.E else 1  # of which W is read
        weight = hit * self.weight_bytes // groups
        adapters, update = 4 * r * (n + k), 2 * m * r * (n + k)
        traffic = flops = 0
        if self.goes_forward:
            traffic += weight + hit * adapters + m * (n + k) * item
            flops += 2 * m * n * k + update
        if self.trains:  # W, dy, x and dx; the adapters and the gradients, of all groups
            traffic += weight + (2 * hit + groups) * adapters
            traffic += m * (n + (2 if r else 1) * k) * item
            flops += 2 * m * n * k + 2 * update
        return traffic, flops

    def needed_memory(self) -> int:
        """Return a lower bound: the weight drawn in float32, once dense, and the activations."""
        size = (self.E or 1) * self.N * self.K
        return size * (4 + ITEMSIZE[self.dtype]) + 12 * (self.M or 0) * (self.N + self.K)

    def as_dict(self) -> dict:
        return dataclasses.asdict(self)


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
) -> list[Problem]:
    """List every applicable combination once, ops in turn; `modes` None: training where there are
    gradients, else forward; `rows` None: a default for the mode and the device.

    Raises: ValueError naming the option if a mode fits none of the ops, or the memory is too small.
    """
    ops, found = list(ops), {}
    for mode in modes or ():
        if all(mode not in OPS[op].modes for op in ops):
            raise ValueError(f"--mode: {', '.join(ops)} has no {mode}")
    for shape in shapes:
        for op in ops:
            kind = OPS[op]
            if kind.grouped != bool(shape.E):
                continue
            for mode in modes or (("full",) if kind.rows else ("forward",)):
                if mode not in kind.modes:
                    continue
                label = shape.name
                if not kind.rows:
                    label = f"{shape.N}x{shape.K}" if shape.M else label
                    given: Iterable[int | None] = (None,)
                elif shape.M:
                    given = (shape.M,)
                else:
                    given = rows or (1 if mode == "no-grad" else FIRST_ROWS[device],)
                for m in given:
                    for dtype in dtypes:
                        for r in ranks if kind.lora else (None,):
                            sizes = (m, shape.N, shape.K, r, dtype, mode, shape.E)
                            problem = Problem(op, label, *sizes)
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
