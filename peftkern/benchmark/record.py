"""What `peftkern bench --json` writes, field by field: the one description of the format.

A record is plain JSON. Every field is always there; what was not measured or does not apply is
null. Units are in the names: `_ms` milliseconds, `_s` seconds, `_bytes` bytes, `gb_s` 1e9 bytes per
second, `tflop_s` 1e12 floating-point operations per second.

A cell is good if `wrong` and `failed` are null. Only then are there times, and what follows from
them; with mode "memory" there is `peak_bytes` alone. Ratios are not stored: they are
`providers[other].median_ms / providers["peftkern"].median_ms` of one case, never of two.
"""

from __future__ import annotations

from typing import TypedDict

FORMAT = "peftkern bench 1"
OURS = "peftkern"


class Provider(TypedDict):
    """What one implementation did in one case."""

    label: str  # for people: "peft+bitsandbytes"
    median_ms: float | None  # of one call
    p20_ms: float | None
    p80_ms: float | None
    samples_ms: list[float]  # every counted call, in the order in which they were made
    error_rms: float | None  # of the worst of its results, relative to the float64 oracle
    error_max: float | None  # largest difference over the oracle's largest value
    wrong: str | None  # why its result is wrong: "error 0.3 rms, 0.9 max; bound 0.0049 rms, ..."
    failed: str | None  # the first line of its error: it crashed, hung, or took too long
    note: str | None  # that it fell back, and why
    peak_bytes: int | None  # what a call holds at its peak beyond what was there before it
    gb_s: float | None  # the case's counted bytes over the median
    tflop_s: float | None  # the case's counted operations over the median
    share_of_roof: float | None  # the case's floor_ms over the median; 1 is the roof


class Case(TypedDict):
    """One problem; every provider has the same weights, adapters and inputs."""

    name: str  # unique in a record: "lora_linear/llama3-8b-q_proj/M256/r16/bfloat16/full"
    op: str  # one of cases.OPS
    shape: str  # "llama3-8b-q_proj", or "256x4096x4096" as it was given
    M: int | None  # rows of x; null where an op has none (nf4_dequantize)
    N: int  # rows of the weight
    K: int  # columns of the weight
    r: int | None  # LoRA rank; null where an op has none
    dtype: str  # of x and of the dense weight: "bfloat16", "float16", "float32"
    mode: str  # "forward", "backward", "full", "no-grad", "memory"
    bytes: int  # that the work has to move at least: each operand and result once
    flops: int  # that the work has to do at least
    floor_ms: float  # max(bytes / roof.copy, flops / roof[dtype]): no call can be faster
    against: str | None  # the baseline that speaks for the case: the first good one of its op's
    command: str  # that measures this case again
    providers: dict[str, Provider]  # by name, "peftkern" first; order of the table


class Roof(TypedDict, total=False):
    """Ceilings measured on this machine in this run; of the dtypes that the cases have."""

    copy: float  # bytes per second, read and written, of a copy far beyond the caches
    bfloat16: float  # FLOP per second of a dense matrix product
    float16: float
    float32: float


class Record(TypedDict):
    """A whole run."""

    format: str  # FORMAT
    command: str  # as typed
    device: str  # "cpu" or "cuda"
    seed: int
    budget_s: float
    elapsed_s: float
    environment: dict  # machine.describe(): cpu, isa, gpu {name, capability, memory, ...} or null,
    #   threads, last_level_cache, commit, date, python, versions {package: version or null},
    #   load_average, and variables {name: value}: those set that change what is measured
    roof: Roof
    cases: list[Case]
    not_reached: list[str]  # names of cases for which the budget had no time left
    not_installed: dict[str, str]  # baseline -> why it took no part ("not installed", ...)
