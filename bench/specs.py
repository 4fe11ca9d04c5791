"""Cases of the bench scripts: what is measured, beside what, at which size.

A case is one of `peftkern bench` (`spec_of`), or a set of functions that do the same work.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from peftkern.backends.dropout import philox_keep
from peftkern.backends.tolerances import PEER_WRONG
from peftkern.functional.arguments import draw_keep
from peftkern.tools.bench import data
from peftkern.tools.bench.cases import ITEMSIZE, Problem
from peftkern.tools.bench.providers import PROVIDERS, Build, Provider
from peftkern.tools.bench.record import OURS
from peftkern.tools.bench.training_step import Job
from peftkern.tools.bench.worker import calls

MOST_COPIES = 128  # of a layer; a call of so small a one takes longer than to evict it
CPU = torch.device("cpu")
SEED = 5  # of the random numbers of a checked call


@dataclass(frozen=True)
class Options:
    """Sizes of the problem. `rotate`: bytes of inputs that each variant cycles through; `rows`:
    maximum rows of activations; `layers`: maximum layers of a stack."""

    n: int = 4096
    k: int = 4096
    r: int = 16
    rotate: int = 256 << 20
    device: torch.device = CPU
    rows: int | None = None
    layers: int | None = None

    def copies(self, size: int) -> int:
        return max(2, -(-self.rotate // size))

    def m(self, rows: int) -> int:
        return rows if self.rows is None else min(rows, self.rows)

    def depth(self, layers: int) -> int:
        return layers if self.layers is None else min(layers, self.layers)


@dataclass(frozen=True)
class Variant:
    """Implementation to measure: `call(i)` runs on the i-th input. `result` turns its return value
    into tensors that compare with `oracle` (float64); no oracle: nothing to check. `multiplied`:
    too slow to repeat, so one call is timed and its time multiplied by this. `no_graph`: reason
    against a CUDA graph; a failed capture can break all that comes later. `errors` compares what
    `call` returns, in the place of `result` and `oracle`; `warm`: calls before the clock runs, of
    copies that do some work once."""

    call: Callable[[int], object]
    oracle: tuple[Tensor, ...] = ()
    result: Callable[[object], object] = lambda returned: returned
    multiplied: int = 0
    no_graph: str | None = None
    errors: Callable[[object], tuple[float, float]] | None = None
    warm: int = 0


@dataclass(frozen=True)
class Case:
    """Variants that do the same work: at least `bytes` of traffic and `flops` in `dtype`; `eager`:
    the error (rms, max) of plain torch, for the bound of ours where the judge is too slow."""

    variants: dict[str, Variant]
    bytes: int
    flops: int
    dtype: torch.dtype
    problem: Problem | None = None  # of `peftkern bench`, where it is one of its cases
    eager: Callable[[], tuple[float, float]] | None = None


@dataclass(frozen=True)
class Target:
    """Lower bound on the peer's time over peftkern's."""

    peer: str
    at_least: float


@dataclass(frozen=True)
class Named:
    """What is measured in its turn: `name` is "stem/case/dtype", `shape` its (n, k) where the
    command line gives none, `seconds` the estimated time: with less left it is not begun."""

    name: str
    shape: tuple[int, int] | None = field(default=None, kw_only=True)
    seconds: Callable[[Options], float] = field(default=lambda options: 0.0, kw_only=True)

    @property
    def short_name(self) -> str:
        return self.name.partition("/")[2]


@dataclass(frozen=True)
class Spec(Named):
    """Case to be built: `names` are its variants, `judge` the peer whose error bounds ours,
    `most_launches` the bound on kernels of a call of ours."""

    build: Callable[[Options], Case]
    names: tuple[str, ...]
    judge: str
    targets: tuple[Target, ...] = ()
    peer_wrong: float = PEER_WRONG
    most_launches: int | None = None


@dataclass(frozen=True)
class Question(Named):
    """Experiment without peers or a timer: `ask(options, seconds, note)` may take so many seconds
    (None: any number) and calls `note(name=value, ...)` with each finding at once."""

    ask: Callable[[Options, float | None, Callable[..., None]], None]


@dataclass(frozen=True)
class Steps(Named):
    """Training steps of a model, by PEFT and by ours in processes: `job(options, folder)` is what
    `peftkern bench --model` would measure, with its config in the folder."""

    job: Callable[[Options, Path], Job]


def kept(x: Tensor, problem: Problem, patched: bool) -> Tensor:
    """Return the mask of dropout in the first call after torch.manual_seed(SEED)."""
    torch.manual_seed(SEED)
    if patched:
        keep = draw_keep(x, problem.dropout)
        if keep.dtype is torch.bool:
            return keep
        return philox_keep(keep, *x.shape, problem.dropout)
    ones = torch.ones_like(x, dtype=getattr(torch, problem.adapter_dtype))
    return F.dropout(ones, problem.dropout) != 0


def of_problem(
    options: Options, problem: Problem, peers: Mapping[str, str | Build | Provider]
) -> Case:
    """Build a case of `peftkern bench` in this process, at the sizes of the options.

    peers: its variants by name, peftkern's first; each a provider, or the name of a provider of
    `peftkern bench`, or a function that builds its layers.
    """
    device, rows = options.device, problem.M
    rows = rows if problem.kind.counts == "layers" or rows is None else options.m(rows)
    # On a CPU dropout's mask is a tensor, which the interpreted kernels do not take.
    dropout = problem.dropout if device.type == "cuda" else 0.0
    problem = replace(problem, M=rows, dropout=dropout)
    tensors = data.inputs(problem, 0, device)
    right = {**tensors, **data.oracle_of(problem, tensors)}
    dense_bytes = problem.N * problem.K * ITEMSIZE[problem.dtype]

    def variant(name: str, provider: str | Build | Provider) -> Variant:
        one = PROVIDERS[provider] if isinstance(provider, str) else provider
        one = one if isinstance(one, Provider) else Provider(one, {})
        copies = options.copies(dense_bytes if one.dense else problem.weight_bytes)
        layers = one.build(problem, tensors, min(MOST_COPIES, copies))
        # A GPU's L2 cache would still hold much of a single x.
        setup, call, collect = calls(
            problem, layers, tensors, copies if device.type != "cpu" else 1
        )
        expected = right
        if problem.dropout and one.adapted:
            keep = kept(tensors["x"], problem, patched=name == OURS)
            expected = right | data.oracle_of(problem, tensors, keep)

        def errors(returned: object) -> tuple[float, float]:
            found = data.compare(problem, collect(returned), expected, one.adapted)
            return found["rms"], found["max"]

        checked = not (problem.dropout and provider == "compile")  # which draws a mask of its own
        return Variant(
            lambda i: call(setup()),
            errors=errors if checked else None,
            multiplied=layers[0].multiplied,
            no_graph=layers[0].no_graph,
            warm=0 if problem.trains else len(layers),
        )

    def eager() -> tuple[float, float]:
        found = data.eager_errors(problem, tensors, right)
        return found["rms"], found["max"]

    variants = {name: variant(name, provider) for name, provider in peers.items()}
    dtype = getattr(torch, problem.dtype)
    return Case(variants, *problem.work(), dtype, problem=problem, eager=eager)


def spec_of(
    name: str,
    problem: Problem,
    peers: Mapping[str, str | Build | Provider],
    *targets: Target,
    judge: str | None = None,
    **more: object,
) -> Spec:
    """Return the spec of such a case; the judge is the second of its variants."""
    names = tuple(peers)
    return Spec(
        name,
        lambda o: of_problem(o, replace(problem, N=o.n, K=o.k, r=problem.r and o.r), peers),
        names,
        judge or names[1],
        tuple(target for target in targets if target.peer in names),
        peer_wrong=problem.kind.peer_wrong,
        **more,
    )


def sized(spec: Named, options: Options) -> Options:
    """Replace the sizes of the options by those of a case that has its own."""
    return options if spec.shape is None else replace(options, n=spec.shape[0], k=spec.shape[1])
