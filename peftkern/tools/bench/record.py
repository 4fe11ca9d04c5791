"""Format of `peftkern bench --json` and of bench/results, field by field; files are checked.

A record is plain JSON. Every field is always written; what was not measured or does not apply is
null. Those of the classes named `Later...` may be missing in files of earlier versions. Units are
in the names: `_ms` milliseconds, `_s` seconds, `_bytes` bytes, `gb_s` 1e9 bytes per second,
`tflop_s` 1e12 floating-point operations per second.

A cell is good if `wrong`, `failed` and `at_least_ms` are null. Only then are there times, and what
follows from them; with mode "memory" there is `peak_bytes` alone. Ratios are not stored: they are
`providers[other].median_ms / providers["peftkern"].median_ms` of one case, never of two; with
`at_least_ms` in the place of the other's median they are lower bounds.
"""

from __future__ import annotations

from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, TypedDict, get_args, get_origin, get_type_hints, is_typeddict

from peftkern.formats.json_files import read_json

FORMAT = "peftkern bench 1"
OURS = "peftkern"


class LaterProvider(TypedDict, total=False):
    planned_bytes: int | None  # what `peftkern plan` predicts in the place of peak_bytes
    tokens_s: float | None  # of a training step: the case's tokens over the median
    held_bytes: int | None  # in it: by torch's allocator on a GPU, else by the whole process
    launches: int | None  # kernels of a call, on a GPU
    kernels: list[str] | None  # their names
    graph_ms: float | None  # median of a call in a replayed CUDA graph: without launches
    no_graph: str | None  # why it was not captured
    at_least_ms: float | None  # in the place of a time: its first call was stopped after so long


class Provider(LaterProvider):
    """Results of one implementation in one case."""

    label: str  # for people: "peft+bitsandbytes"
    median_ms: float | None  # of one call
    p20_ms: float | None
    p80_ms: float | None
    samples_ms: list[float]  # counted calls in their order, at most 200 spread over the run
    error_rms: float | None  # of the worst of its results, relative to the float64 oracle
    error_max: float | None  # largest difference over the oracle's largest value
    wrong: str | None  # why its result is wrong: "error 0.3 rms, 0.9 max; bound 0.0049 rms, ..."
    failed: str | None  # the first line of its error: it crashed, hung, or took too long
    note: str | None  # that it fell back, and why; why launches or memory were not measured
    peak_bytes: int | None  # peak of a call beyond the bytes allocated before it
    gb_s: float | None  # the case's counted bytes over the median
    tflop_s: float | None  # the case's counted operations over the median
    share_of_roof: float | None  # the case's floor_ms over the median; 1 is the roof


class Target(TypedDict):
    """What a case of bench/ should reach: a ratio to a peer, or a number of launches."""

    peer: str | None
    at_least: float | None  # the peer's time over ours
    launches_at_most: int | None
    measured: float | None
    met: bool | None  # None: a lower bound of the ratio, below at_least


class LaterCase(TypedDict, total=False):
    tokens: int | None  # of a training step
    said: list[str]  # of a training step: what was built, and how its losses compare
    targets: list[Target]
    served: dict[str, int]  # "op on back end" -> our calls that it took; of bench/ alone
    fell_back: dict[str, int]  # "op: reason" -> our calls that went to others


class Case(LaterCase):
    """One problem; every provider has the same weights, adapters and inputs."""

    name: str  # unique in a record: "lora_linear/llama3-8b-q_proj/M256/r16/bfloat16/full"
    op: str  # one of cases.OPS, "training_step", or the stem of a script of bench/
    shape: str  # "llama3-8b-q_proj", or "256x4096x4096" as it was given
    M: int | None  # rows of x, tokens of a step; null where an op has none (nf4_dequantize)
    N: int | None  # rows of the weight; null for a whole model
    K: int | None  # columns of the weight
    r: int | None  # LoRA rank; null where an op has none
    dtype: Literal["bfloat16", "float16", "float32", "float64"]  # of x and of the dense weight
    mode: str  # "forward", "backward", "full", "no-grad", "memory"
    bytes: int  # lower bound of the traffic: each operand and result once
    flops: int  # lower bound of the operations
    floor_ms: float  # max(bytes / roof.copy, flops / rows.product_rate): no call can be faster
    against: str | None  # the first good baseline of the op, else the first with a bound
    command: str  # that measures this case again
    providers: dict[str, Provider]  # by name, "peftkern" first; order of the table


class Roof(TypedDict, total=False):
    """Ceilings measured on this machine in this run; of the cases' dtypes."""

    copy: float  # bytes per second, read and written
    copy_bytes: int  # size of the copy; with its target, within the last-level cache or beyond
    bfloat16: float  # FLOP per second of a dense product; a roof in 16 bits if not below float32's
    float16: float
    float32: float


class Gpu(TypedDict):
    name: str
    capability: str  # "9.0"
    multiprocessors: int
    memory: int  # bytes
    l2_cache: int  # bytes
    cuda: str | None  # version of the runtime that torch was built with, or of ROCm's


class Environment(TypedDict):
    """Environment of a run: `machine.describe()`, and the variables."""

    cpu: str
    isa: str | None  # that the native kernels chose
    isas: list[str]  # that they could have
    gpu: Gpu | None
    interpreter: bool  # Triton's: times mean nothing
    threads: int
    last_level_cache: int  # bytes
    commit: str | None  # with + if the tree differed from it
    date: str  # ISO 8601, UTC
    python: str
    versions: dict[str, str | None]  # of packages; None: not installed
    load_average: list[float]  # over 1, 5 and 15 minutes, before the run
    variables: dict[str, str]  # of the environment: those set that change what is measured


class LaterRecord(TypedDict, total=False):
    bench: str | None  # the stem of a script of bench/; null of the command
    options: dict[str, int]  # sizes that a script's cases share: n, k, r, rotate
    failed: dict[str, str]  # case -> why it has no results at all
    answers: list[dict]  # findings of questions without peers: {"name", ...}


class Record(LaterRecord):
    """Record of a run."""

    format: str  # FORMAT
    command: str  # as typed
    device: str  # "cpu" or "cuda"
    seed: int
    budget_s: float | None
    elapsed_s: float
    environment: Environment
    roof: Roof
    cases: list[Case]
    not_reached: list[str]  # names of cases for which the budget had no time left
    not_installed: dict[str, str]  # baseline -> why it took no part ("not installed", ...)


LARGEST, SMALLEST = 1e30, 1e-30  # of numbers other than 0: results of two of them are finite


def read(path: Path) -> Record:
    """Read and check a record.

    Raises: OSError; ValueError naming the file and the first field that is not as described here.
    """
    found = read_json(path)
    if not isinstance(found, dict) or found.get("format") != FORMAT:
        raise ValueError(f"{path}: not a record of `peftkern bench --json` ({FORMAT!r})")
    try:
        check(found)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    return found


def check(record: object) -> None:
    """Check that each field is there, of its type, of plausible size and consistent.

    Raises: ValueError naming the first that is not.
    """
    _check_field("record", record, Record)
    if not record["environment"]["load_average"]:
        raise ValueError("record.environment.load_average: empty")
    for number, case in enumerate(record["cases"]):
        where = f"record.cases[{number}]"
        for field, key in (("against", case["against"] or OURS), ("providers", OURS)):
            if key not in case["providers"]:
                raise ValueError(f"{where}.{field}: there is no provider {key!r}")
        for key, amount in (("copy", case["bytes"]), (case["dtype"], case["flops"])):
            if amount and not record["roof"].get(key):
                raise ValueError(f"record.roof.{key}: missing, for {where}")
        for name, row in case["providers"].items():
            times = [row[key] for key in ("median_ms", "p20_ms", "p80_ms")]
            if not (all(times) or times == [None] * 3):
                raise ValueError(f"{where}.providers[{name!r}]: median, p20 and p80 are {times}")
            told = (row["wrong"], row["failed"], row.get("at_least_ms"))
            if times[0] and told != (None, None, None):
                raise ValueError(f"{where}.providers[{name!r}]: has a time, but is not good")


def _check_field(where: str, value: Any, kind: Any) -> None:
    """Check a field; `kind` as in the annotations above."""
    if get_origin(kind) is UnionType:
        if value is None:
            return
        (kind,) = (one for one in get_args(kind) if one is not NoneType)
    if is_typeddict(kind):
        _expect(where, value, isinstance(value, dict), "an object")
        for name, field in get_type_hints(kind).items():
            if name in value:
                _check_field(f"{where}.{name}", value[name], field)
            elif name in kind.__required_keys__:
                raise ValueError(f"{where}.{name}: missing")
    elif get_origin(kind) is list:
        _expect(where, value, isinstance(value, (list, tuple)), "a list")
        for number, one in enumerate(value):
            _check_field(f"{where}[{number}]", one, *get_args(kind))
    elif get_origin(kind) is dict:
        _expect(where, value, isinstance(value, dict), "an object")
        for name, one in value.items():
            _check_field(f"{where}[{name!r}]", one, get_args(kind)[1])
    elif kind is dict:
        _expect(where, value, isinstance(value, dict), "an object")
    elif get_origin(kind) is Literal:
        accepted = get_args(kind)
        _expect(where, value, value in accepted, f"one of {', '.join(accepted)}")
    elif kind in (int, float):
        right = isinstance(value, (int, kind)) and not isinstance(value, bool)
        right = right and (value == 0 or SMALLEST <= value <= LARGEST)
        wanted = "a whole number" if kind is int else "a number"
        _expect(where, value, right, f"{wanted}, 0 or from {SMALLEST:g} to {LARGEST:g}")
    else:
        _expect(where, value, isinstance(value, kind), {str: "text", bool: "a boolean"}[kind])


def _expect(where: str, value: object, right: bool, wanted: str) -> None:
    if not right:
        raise ValueError(f"{where}: expected {wanted}, got {repr(value)[:60]}")
