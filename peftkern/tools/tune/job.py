"""Options of `peftkern tune`, and the job that they ask for."""

from __future__ import annotations

from dataclasses import dataclass, field

from peftkern.backends import dispatch, trust
from peftkern.tools.bench.cases import DTYPES
from peftkern.tools.bench.shapes import LARGEST, chosen, numbers, parse_shapes, seconds
from peftkern.tools.tune import cases

FIRST_SHAPES = "llama3-8b"
MAX_RANK = 4096
ALL = "all-linear"


@dataclass(frozen=True)
class Options:
    """Options as typed; see `peftkern tune --help`."""

    shape: str | None
    model: str | None
    targets: str
    base: str | None
    rows: str
    r: str
    dtype: str | None
    adapter_dtype: str
    autocast: bool
    budget: str
    limit: str
    again: bool


@dataclass(frozen=True)
class Job:
    """Layers to try on a device, and the time for it in seconds: for all, and for a class.

    experts: those of the model, which are left to a training.
    """

    cases: list[cases.Case]
    sweeps: list[cases.Sweep | cases.RowSweep]
    device: str
    budget: float
    limit: float
    again: bool = False
    experts: list[str] = field(default_factory=list)


def plan(options: Options, device: str) -> Job:
    """Check the options. Raises: ValueError or OSError, one line, naming the option."""
    if dispatch.forced_backend() is not None:
        raise ValueError("PEFTKERN_BACKEND: a back end that is forced takes part in no contest")
    if trust.mode() == "readonly":
        raise ValueError("PEFTKERN_TRUST=readonly: no verdict would be kept; expected auto")
    if options.shape is not None and options.model is not None:
        raise ValueError("--model: it has shapes of its own, so that --shape has no place")
    bases, dtypes, experts = list(cases.BASES), ["bf16"], []
    known = tuple(DTYPES)
    if options.dtype is not None:
        dtypes = chosen("--dtype", options.dtype, known)
    budget, limit = seconds("--budget", options.budget), seconds("--limit", options.limit)
    rows = numbers("--rows", options.rows, LARGEST)
    ranks = numbers("--r", options.r, MAX_RANK)
    (adapter_dtype,) = chosen("--adapter-dtype", options.adapter_dtype, known)
    if options.model is None:
        if options.targets != ALL:
            raise ValueError("--targets: of the layers of --model, which is not given")
        shapes = parse_shapes(
            FIRST_SHAPES if options.shape is None else options.shape, "--shape", "NK"
        )
    else:
        shapes, experts, own, four_bit = cases.model_layers(options.model, options.targets)
        dtypes = dtypes if options.dtype is not None else [own]
        bases = ["nf4"] if four_bit else bases
    if options.base is not None:
        bases = chosen("--base", options.base, cases.BASES)
    found = cases.ordered(shapes, bases, ranks, rows, dtypes, adapter_dtype, options.autocast)
    on_cpu = device == "cpu"
    sweeps = cases.sweeps(dtypes[0], ranks[0], adapter_dtype, bases) if on_cpu else []
    return Job(found, sweeps, device, budget, limit, options.again, experts)
