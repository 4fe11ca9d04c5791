"""Search for tiles that are faster than the counted ones; `bench/tune.py` says for what.

The search of a problem starts from its counted tiles and walks, one field at a time, to whatever
neighbor is faster by more than noise. A candidate that does not compile, needs more than the
device has, or gives other numbers than the counted tiles is out. Many problems walk in step: for
each field all candidates are compiled and checked by several processes, on a GPU that nobody
measures meanwhile, and then timed by this process alone. Compiling takes a second or more, timing
some hundredths, and problems of different shapes share what is compiled.
"""

from __future__ import annotations

import functools
import itertools
import multiprocessing
import statistics
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace

import graphs
import torch
from torch import Tensor

import peftkern
from peftkern.backends.tolerances import FLOOR_MAX, FLOOR_RMS, RATIO, errors
from peftkern.kernels.configs import Problem, TileConfig, choose
from peftkern.tools.bench import gpu_timer
from peftkern.tools.bench.timer import measure

FIELDS = {  # of its tiles that each kernel reads
    "lora_forward": ("block_m", "block_n", "block_k", "splits", "num_warps", "num_stages"),
    "lora_backward_sb": ("block_m", "block_n", "splits", "num_warps", "num_stages"),
    "lora_backward_xa": ("block_m", "block_k", "splits", "num_warps", "num_stages"),
    "nf4_forward": ("block_m", "block_n", "splits", "num_warps", "num_stages"),
    "nf4_backward": ("block_m", "block_n", "splits", "num_warps", "num_stages"),
    "epilogue": ("block_m", "block_n", "num_warps", "num_stages"),
    "nf4_dequantize": ("block_n", "num_warps"),
    "nf4_quantize": ("block_n", "num_warps"),
    "dora_norm": ("block_n", "block_k", "num_warps", "num_stages"),
    "nf4_dora_norm": ("block_n", "num_warps", "num_stages"),
}
GAIN = 1.02  # minimum speed-up of a candidate: less is noise
ROTATE = 256 << 20  # bytes of inputs to cycle through, beyond the L2 cache
MOST_COPIES = 32
TASK_SECONDS = 60.0  # of a process for one candidate, including the wait in the queue
SLOW_SECONDS = 1e-4  # calls of more fill a graph with fewer
SCALING = 0.5


def in_turn(shapes: list, rows: list, ranks: list) -> Iterator[tuple[int, int, int, int]]:
    """Yield (r, M, N, K): for one rank all rows of four weights, a model, before the next four."""
    for r, start in itertools.product(ranks, range(0, len(shapes), 4)):
        for m, (n, k) in itertools.product(rows, shapes[start : start + 4]):
            yield r, m, n, k


def problems(shapes: list, rows: list, ranks: list) -> Iterator[tuple[Problem, int, int]]:
    """Yield (problem, N, K) as the launchers ask for them, each once, most wanted first."""
    from peftkern.kernels.configs import NF4_FUSED_ROWS_MAX

    seen, last = set(), []
    for r, m, n, k in in_turn(shapes, rows, ranks):
        wanted = [
            Problem("lora_forward", m, n, k, r, 16),
            Problem("lora_backward_sb", m, n, 1, r, 16),
            Problem("lora_backward_xa", m, 1, k, r, 16),
        ]
        if m <= NF4_FUSED_ROWS_MAX:
            wanted.append(Problem("nf4_forward", m, n, k, r, 16))
            wanted.append(Problem("nf4_backward", m, n, k, 1, 16))
            wanted.append(Problem("epilogue", m, n, 1, r, 16))
        wanted.append(Problem("nf4_dequantize", 1, n * k, 64, 1, 16))
        wanted.append(Problem("nf4_quantize", 1, n * k, 64, 1, 16))
        last += [(Problem(name, 1, n, k, r, 16), n, k) for name in ("dora_norm", "nf4_dora_norm")]
        for task in [(problem, n, k) for problem in wanted]:
            if task[0].key() not in seen:
                seen.add(task[0].key())
                yield task
    yield from {task[0].key(): task for task in last}.values()


@functools.lru_cache(maxsize=1)
def nf4_weight(n: int, k: int, device: torch.device) -> peftkern.NF4Weight:
    torch.manual_seed(0)
    weight = torch.randn(n, k, device=device, dtype=torch.bfloat16)
    return peftkern.quantize_nf4(weight / k**0.5)


def copies_of(nbytes: int, rotate: int) -> int:
    return min(MOST_COPIES, max(1, rotate // max(1, nbytes)))


def runner(
    problem: Problem, n: int, k: int, device: torch.device, rotate: int = 0
) -> Callable[[int], tuple]:
    """Return call(i), the problem's launch on the i-th of equal inputs.

    Together they are as large as `rotate`.
    """
    from peftkern.kernels import dora, low_rank_update, nf4, nf4_lora_linear

    torch.manual_seed(0)
    m, r, kernel = problem.M, problem.r, problem.kernel

    def pool(*shape: int, scale: float = 1.0, dtype: torch.dtype = torch.bfloat16) -> list[Tensor]:
        first = (torch.randn(shape, device=device) * scale).to(dtype)
        return [first.clone() for _ in range(copies_of(first.nbytes, rotate))]

    def of(tensors: list, i: int):
        return tensors[i % len(tensors)]

    f32 = torch.float32
    a = pool(r, k, scale=k**-0.5, dtype=f32)[0]
    b = pool(n, r, scale=0.1, dtype=f32)[0]
    if kernel == "lora_forward":
        xs = pool(m, k)
        return lambda i: low_rank_update.update_forward(of(xs, i), a, b, None, SCALING, None, 0.0)
    if kernel == "lora_backward_sb":
        dys, s = pool(m, n), pool(m, r, dtype=f32)[0]
        needs = [True, True, True, False]
        return lambda i: low_rank_update.gradients_sb(of(dys, i), s, b, SCALING, needs)
    if kernel == "lora_backward_xa":
        xs, ds, dtype = pool(m, k), pool(m, r, dtype=f32)[0], torch.bfloat16
        both = (True, True)
        return lambda i: low_rank_update.gradients_xa(of(xs, i), a, ds, None, 0.0, both, dtype)
    if kernel == "epilogue":
        parts, s, y = pool(4, m, n, dtype=f32), pool(4, m, r, dtype=f32)[0], pool(m, n)[0]
        scales = (1.0, SCALING)

        def epilogue(i: int) -> tuple:
            args = (of(parts, i), s, b.t(), None, None, 0.0, scales, None, y)
            low_rank_update.update_epilogue(*args)
            return (y.clone() if device.type == "cpu" else y,)

        return epilogue
    if kernel == "nf4_quantize":
        weights = pool(n, k)
        return lambda i: nf4.nf4_quantize(of(weights, i), 64)
    if kernel == "dora_norm":
        weights = pool(n, k, scale=k**-0.5)
        return lambda i: (dora.dora_norm(of(weights, i), a, b, SCALING),)

    weight = nf4_weight(n, k, device)
    copies = copies_of(weight.packed.nbytes, rotate)
    packed = [((t[0].clone(), *t[1:]), weight.layout) for t in [weight.tensors] * copies]
    if kernel == "nf4_dequantize":
        return lambda i: (nf4.nf4_dequantize(*of(packed, i), torch.bfloat16),)
    if kernel == "nf4_dora_norm":
        rest = (torch.bfloat16, a, b, SCALING)
        return lambda i: (dora.nf4_dora_norm(*of(packed, i), *rest),)
    if kernel == "nf4_forward":
        x = pool(m, k)[0]
        rest = (a, b, None, SCALING, None, 0.0)
        return lambda i: nf4_lora_linear.fused_forward(x, *of(packed, i), *rest)
    dy = pool(m, n)[0]
    rest = (None, None, None, 0.0)
    return lambda i: (nf4_lora_linear.fused_backward(dy, *of(packed, i), *rest),)


def seconds_of(calls: dict[str, Callable[[int], object]], device: torch.device) -> dict[str, float]:
    """Return the median of each, in turns; on a GPU of replayed graphs, without the host."""
    if device.type == "cpu":
        return {name: t.median for name, t in measure(calls, seconds=0.0).items()}
    one = {
        name: min(gpu_timer.turn(call, 3, itertools.count().__next__))
        for name, call in calls.items()
    }
    timings, refused = graphs.measure_graphs(calls, seconds=0.004, calls=one, slow=SLOW_SECONDS)
    if refused:
        raise RuntimeError(f"not capturable: {refused}")
    return {name: timing.median for name, timing in timings.items()}


def checked(call: Callable[[int], tuple]) -> tuple[Tensor, ...]:
    """Return a call's results, over memory that torch fills with NaN in this mode."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        return tuple(tensor.clone() for tensor in call(0) if tensor is not None)
    finally:
        torch.use_deterministic_algorithms(before, warn_only=True)


def same(got: tuple[Tensor, ...], expected: tuple[Tensor, ...], sides: int = 1) -> bool:
    """Compare within RATIO times the rounding of the activations: sums run in another order.

    Two sides that round on different ways have twice that.
    """
    bounds = [sides * RATIO * floor[torch.bfloat16] for floor in (FLOOR_RMS, FLOOR_MAX)]
    pairs = [errors(g, e) for g, e in zip(got, expected, strict=True)]
    return all(rms <= bounds[0] and most <= bounds[1] for rms, most in pairs)


def neighbors(config: TileConfig, name: str, kernel: str) -> Iterator[TileConfig]:
    """Yield configs that differ in one field: half and double, or a stage fewer and more."""
    value = getattr(config, name)
    steps = (value - 1, value + 1) if name == "num_stages" else (value // 2, value * 2)
    for step in steps:
        candidate = replace(config, **{name: step})
        if step >= 1 and candidate.valid(kernel):
            yield candidate


@dataclass(eq=False)
class Search:
    """Walk of one problem, from its counted tiles to the best found so far."""

    problem: Problem
    n: int
    k: int
    counted: TileConfig
    best: TileConfig
    ratio: float = 1.0  # speed-up over the counted tiles
    tried: set[TileConfig] = field(default_factory=set)

    @classmethod
    def of(cls, problem: Problem, n: int, k: int, device: torch.device) -> Search:
        from peftkern.kernels.launch import traits

        on = traits(device)
        counted = choose(problem, on.processors, None, on.cores)
        return cls(problem, n, k, counted, counted, tried={counted})

    def candidates(self, step: int) -> list[TileConfig]:
        """Return neighbors in the step-th field that were not tried yet."""
        names = FIELDS[self.problem.kernel][step : step + 1]
        kernel = self.problem.kernel
        new = [c for name in names for c in neighbors(self.best, name, kernel)]
        new = [candidate for candidate in new if candidate not in self.tried]
        self.tried.update(new)
        return new


@functools.lru_cache(maxsize=1)
def expected(problem: Problem, n: int, k: int, counted: TileConfig, device: torch.device) -> tuple:
    """Return the problem's runner, and its results with the counted tiles."""
    run = runner(problem, n, k, device)
    return run, checked(with_tiles(run, problem.kernel, counted))


def with_tiles(
    run: Callable[[int], tuple], kernel: str, config: TileConfig
) -> Callable[[int], tuple]:
    from peftkern.kernels.launch import forced

    def call(i: int) -> tuple:
        with forced(kernel, config):
            return run(i)

    return call


def refused(
    problem: Problem, n: int, k: int, counted: TileConfig, config: TileConfig, device: torch.device
) -> str | None:
    """Return why tiles are no candidate: they do not run here, or give other numbers."""
    try:
        run, right = expected(problem, n, k, counted, device)
        got = checked(with_tiles(run, problem.kernel, config))
        return None if same(got, right) else "other numbers"
    except Exception as error:  # compilers raise many types
        if device.type == "cuda":
            torch.cuda.synchronize()  # raises again if the device itself is lost
            torch.cuda.empty_cache()
        return type(error).__name__


class Workers:
    """Pool of processes that compile and check candidates; without processes the caller does."""

    def __init__(self, device: torch.device, count: int) -> None:
        self.device, self.count, self.pool = device, count, None
        self._start()

    def _start(self) -> None:
        if self.count:
            spawn = multiprocessing.get_context("spawn")  # a forked child cannot use the device
            self.pool = spawn.Pool(self.count)

    def refused(self, trials: list[tuple[Search, TileConfig]]) -> list[str | None]:
        """Return `refused` of every candidate, each distinct program compiled once."""
        tasks = [(s.problem, s.n, s.k, s.counted, config, self.device) for s, config in trials]
        if self.pool is None:
            return [refused(*task) for task in tasks]
        # Shapes share programs: the first of each is compiled before the others need it.
        program = {(t[0].kernel, t[0].r, t[4]): i for i, t in reversed(list(enumerate(tasks)))}
        first = sorted(program.values())
        rest = sorted(set(range(len(tasks))) - set(first))
        answers: dict[int, str | None] = {}
        for indices in (first, rest):
            answers |= self._asked({i: tasks[i] for i in indices})
        return [answers[i] for i in range(len(tasks))]

    def _asked(self, tasks: dict[int, tuple]) -> dict[int, str | None]:
        """Collect answers; a candidate that hangs, or kills its process or device, is out.

        All processes are replaced then, and those whose answers were on their way are asked again.
        """
        answers: dict[int, str | None] = {}
        while len(answers) < len(tasks):
            left = [i for i in tasks if i not in answers]
            waiting = {i: self.pool.apply_async(refused, tasks[i]) for i in left}
            for i, asked in waiting.items():
                try:
                    answers[i] = asked.get(TASK_SECONDS)
                except Exception as error:
                    answers[i] = f"lost: {type(error).__name__}"
                    done = {
                        j: one for j, one in waiting.items() if j not in answers and one.ready()
                    }
                    answers |= {j: one.get() for j, one in done.items() if one.successful()}
                    self.close()
                    self._start()
                    break
        return answers

    def close(self) -> None:
        if self.pool is not None:
            self.pool.terminate()
            self.pool.join()


def search(
    searches: list[Search], workers: Workers, left: Callable[[], float]
) -> tuple[bool, Counter[str]]:
    """Run all searches to convergence. Returns: whether time sufficed; refusals by reason."""
    device, rejected = workers.device, Counter()
    for step in range(max(len(FIELDS[s.problem.kernel]) for s in searches)):
        if left() <= 0:
            return False, rejected
        trials = [(s, candidate) for s in searches for candidate in s.candidates(step)]
        reasons = workers.refused(trials)
        rejected.update(reason for reason in reasons if reason is not None)
        right = [trial for trial, reason in zip(trials, reasons, strict=True) if reason is None]
        for s, group in itertools.groupby(right, key=lambda trial: trial[0]):
            rotate = ROTATE if device.type == "cuda" else 0
            run = runner(s.problem, s.n, s.k, device, rotate)
            for _, candidate in group:
                if left() <= 0:
                    return False, rejected
                pair = {
                    "best": with_tiles(run, s.problem.kernel, s.best),
                    "new": with_tiles(run, s.problem.kernel, candidate),
                }
                try:
                    times = seconds_of(pair, device)
                except Exception as error:  # not capturable, or no memory for a graph
                    if device.type == "cuda":
                        torch.cuda.synchronize()  # raises again if the device itself is lost
                    rejected[f"not timed: {type(error).__name__}"] += 1
                    continue
                if times["best"] > GAIN * times["new"]:
                    s.best, s.ratio = candidate, s.ratio * times["best"] / times["new"]
    return left() > 0, rejected


def fused_rows(shapes: list, device: torch.device, rows: tuple[int, ...]) -> tuple[int, dict]:
    """Return up to which M the fused NF4 kernel is no slower on average, and the ratios."""
    from peftkern.kernels import low_rank_update, nf4, nf4_lora_linear

    def composed(x: Tensor, weight: tuple, *adapters) -> tuple:
        y, s = low_rank_update.update_forward(x, *adapters)
        dense = nf4.nf4_dequantize(*weight, x.dtype)
        return y.addmm_(x, dense.t()), s

    ratios, best = {}, 0
    for m in rows:
        measured = []
        for n, k in shapes:
            weight = nf4_weight(n, k, device)
            copies = copies_of(weight.packed.nbytes, ROTATE if device.type == "cuda" else 0)
            pool = [((t[0].clone(), *t[1:]), weight.layout) for t in [weight.tensors] * copies]
            problem = Problem("lora_forward", m, n, k, 16, 16)
            x = torch.randn(m, k, device=device).to(torch.bfloat16)
            a = torch.randn(problem.r, k, device=device) / k**0.5
            rest = (a, torch.randn(n, problem.r, device=device), None, SCALING, None, 0.0)
            calls = {
                "fused": lambda i, p=pool, x=x, rest=rest: nf4_lora_linear.fused_forward(
                    x, *p[i % len(p)], *rest
                ),
                "composed": lambda i, p=pool, x=x, rest=rest: composed(x, p[i % len(p)], *rest),
            }
            times = seconds_of(calls, device)
            measured.append(times["composed"] / times["fused"])
        ratios[str(m)] = round(statistics.geometric_mean(measured), 3)
        if ratios[str(m)] < 1.0:
            break
        best = m
    return best, ratios
