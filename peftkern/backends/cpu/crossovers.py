"""Crossovers on a CPU: sizes from which a kernel pays, by kind of CPU.

dense: values of x and y together from which a patched dense layer is no slower than PEFT's own;
    below, a call costs more than the copies it saves.
dora: values of a dense weight from which the same holds of a layer with DoRA.
few_rows_bf16, few_rows_fp32, few_rows_backward_bf16, few_rows_backward_fp32: rows of x, or of dy,
    up to which products with an NF4 weight take the path of few rows (`few_rows`).

What `peftkern tune` measured on this machine comes first, then the row of its kind of CPU.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator

import torch

from peftkern.backends import trust
from peftkern.backends.cpu import module as cpu
from peftkern.backends.device import cpu_maker

# By (maker, instruction set in use); bench/bench_lora_linear.py, bench/bench_dora.py, 2026-11.
MEASURED = {("GenuineIntel", "amx_bf16"): {"dense": 1 << 19, "dora": 1 << 17}}
# Everywhere else, AMD's Zen 4 among it. Counted, not measured: on both sides stand a call's time
# in Python and a copy of x and y, so that the sizes measured above are the nearest guess.
COUNTED = {"dense": 1 << 19, "dora": 1 << 17}

# By instruction set: scalar, AVX2, AVX-512, and for bfloat16 x AVX512-BF16, AMX. Up to so many rows
# of x, dot products, which decode the weight once for every eight rows, take less time than panels,
# which decode it once and multiply sixteen rows at a time; up to so many rows of dy, sums of weight
# rows, for which no tiles are written. Measured on a Xeon with AMX, 2026-11, 2048x2048; AMX itself
# forward on 2048x4096; AVX2 on an EPYC 7003, 4096x4096, where other formats than NF4 gain most.
FEW_ROWS = {"few_rows": (24, 32, 24, 28, 3), "few_rows_backward": (12, 20, 16, 6, 4)}
_AVX512 = 2  # serves float32 on those after it, too

# Multiply-adds from which a patched layer in training takes less time than PEFT's where torch has
# no products of the dtype: they take 6 ns each in dy @ weight (EPYC 7003, 2026-11).
WITHOUT_PRODUCTS = {"dense": 1 << 18, "dora": 1 << 20}

_found: dict[str, int] = {}


def crossover(name: str) -> int:
    """Return a crossover in force on this machine; the ledger is read once."""
    if name not in _found:
        if torch.compiler.is_compiling():  # a graph reads no files; `patch` has read them
            return COUNTED[name]
        _found.update(effective()[0])
    return _found[name]


@functools.cache  # asked by every product
def few_rows(name: str, isa: int, dtype: torch.dtype) -> int:
    """Return up to how many rows, float32 or bfloat16, an NF4 product takes the path of few rows.

    name: a key of FEW_ROWS; isa: the code of an instruction set. The one place that chooses between
    the two paths; any number gives results within the same bounds.
    """
    if not _found:
        crossover("dense")
    wide = dtype is torch.float32
    tuned = _found.get(few_rows_name(name, wide))
    return FEW_ROWS[name][min(isa, _AVX512) if wide else isa] if tuned is None else tuned


@functools.cache
def few_rows_name(name: str, wide: bool) -> str:
    return f"{name}_{'fp32' if wide else 'bf16'}"


def effective() -> tuple[dict[str, int], str]:
    """Return the crossovers of this machine, and their source in words."""
    tuned = {}
    if trust.mode() != "always":
        tuned = trust.ledger(torch.device("cpu")).crossovers
    missing = cpu.cpu_module()[1]
    kind = (cpu_maker(), "none" if missing else cpu.cpu_isa())
    source = "measured" if kind in MEASURED else "counted"
    shipped = MEASURED.get(kind, COUNTED)
    by_user = "; `peftkern tune` on this machine: " + ", ".join(sorted(tuned)) if tuned else ""
    return shipped | tuned, f"{source} for {' '.join(kind)}{by_user}"


@trust.on_reset
def _forget() -> None:
    _found.clear()
    few_rows.cache_clear()


@contextlib.contextmanager
def use(**sizes: int) -> Iterator[None]:
    """Put crossovers in force for the length of a `with` block."""
    before = dict(_found)
    _found.update(effective()[0] | sizes)
    few_rows.cache_clear()
    try:
        yield
    finally:
        _forget()
        _found.update(before)
