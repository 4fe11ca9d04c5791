"""Contests: the fastest back end of an op, and where PEFT's own layer beats the patched one.

`bench/tune.py` writes the answers into its table; dispatch and the integrations obey it. A back end
has to beat the default of dispatch by more than noise, and PEFT's layer the patched one. Single
calls are timed: the host's launch time counts, as for a user.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator

import torch
from tiles import GAIN, ROTATE, SCALING, copies_of, in_turn, nf4_weight, same
from torch import Tensor

import peftkern
from peftkern.backends import dispatch
from peftkern.kernels.configs import Problem
from peftkern.tools.bench import gpu_timer
from peftkern.tools.bench.timer import measure
from peftkern.tools.doctor.sample_calls import Sample

OPS = tuple(op for op in dispatch.MEASURABLE if not op.endswith("_out"))  # these have no own record
LAYERS = ("nf4_lora_linear", "lora_linear")  # as `dispatch.is_slower` names them
MODES = ("training", "inference")
PAIRS = 224  # of an SVD: the linear layers of a LLaMA-7B
SECONDS = 0.01  # for each contender
LAYERS_ROTATE = 128 << 20  # bytes of layers: making them takes longer than measuring them
BF16 = torch.bfloat16

Calls = dict[str, Callable[[int], object]]


def contests(
    shapes: list, rows: list, ranks: list, device: torch.device
) -> Iterator[tuple[str, Problem, Callable[[], Calls]]]:
    """Yield (section of the table, problem, contenders' builder), each once, the back ends of a
    layer before the layer.

    The contender that comes first keeps its place unless another is faster.
    """
    from peftkern.tools.bench.peers import bitsandbytes_missing

    seen = set()
    lack = bitsandbytes_missing(device) is not None  # then there is no 4-bit layer to compare with
    for r, m, n, k in in_turn(shapes, rows, ranks):
        for op in OPS:
            problem = problem_for(op, m, n, k, r)
            if problem.key() not in seen:
                seen.add(problem.key())
                yield "back_ends", problem, lambda a=(op, m, n, k, r): back_ends(*a, device)
        for op, mode in itertools.product(LAYERS[1:] if lack else LAYERS, MODES):
            problem = Problem(f"{op}/{mode}", m, n, k, r, 16)
            yield "layers", problem, lambda a=(op, mode, m, n, k, r): layers(*a, device)


def problem_for(op: str, m: int, n: int, k: int, r: int) -> Problem:
    """Return the problem that dispatch derives from such a call; for an SVD, from PAIRS pairs."""
    if op == "low_rank_svd":
        return Problem(op, PAIRS, n, k, r, 32)
    return dispatch.problem_of(op, Sample(m, n, k, r).arguments(op))


def back_ends(op: str, m: int, n: int, k: int, r: int, device: torch.device) -> Calls:
    """Build the op on every back end that accepts the call, in dispatch's order."""
    pool = arguments(op, m, n, k, r, device)
    rows = dispatch.explain({op: pool[0]}).rows
    names = [name for _, name, verdict in rows if verdict in ("chosen", "can")]
    if op == "low_rank_svd" and len(names) > 1:
        names.remove("reference")  # takes seconds, and is the last fallback anyway
    run = getattr(torch.ops.peftkern, op)

    def on(name: str) -> Callable[[int], object]:
        def call(i: int) -> object:
            with peftkern.use_backend(name):
                return run(*pool[i % len(pool)])

        return call

    return {name: on(name) for name in names}


def arguments(op: str, m: int, n: int, k: int, r: int, device: torch.device) -> list[tuple]:
    """Build arguments of equal calls, on enough copies of large tensors to exceed the caches."""
    torch.manual_seed(0)
    rotate = ROTATE if device.type == "cuda" else 0

    def drawn(*shape: int, scale: float = 1.0, dtype: torch.dtype = BF16) -> Tensor:
        return (torch.randn(shape, device=device) * scale).to(dtype)

    def clones(tensor: Tensor, also: int = 0) -> list[Tensor]:
        return [tensor.clone() for _ in range(copies_of(tensor.nbytes + also, rotate))]

    f32 = torch.float32
    A, B = drawn(r, k, scale=k**-0.5, dtype=f32), drawn(n, r, scale=0.1, dtype=f32)
    if op == "low_rank_svd":
        pairs = [[t.clone() for _ in range(PAIRS)] for t in (B, A)]
        return [(*pairs, [SCALING] * PAIRS, True, "accurate")]
    if op == "nf4_quantize":
        return [(weight, 64) for weight in clones(drawn(n, k))]
    update, needs = (SCALING, None, 0.0), [True, True, True, False]
    if "nf4" not in op:
        weights = clones(drawn(n, k, scale=k**-0.5))
        if op == "dora_norm":
            return [(weight, A, B, SCALING) for weight in weights]
        if op == "lora_linear_forward":
            return [(drawn(m, k), weight, A, B, None, *update) for weight in weights]
        S = drawn(m, r, dtype=f32)
        return [(drawn(m, n), drawn(m, k), S, W, A, B, *update, needs) for W in weights]
    first, *rest = nf4_weight(n, k, device).tensors
    layout = nf4_weight(n, k, device).layout
    activations = 2 * m * (k if op.endswith("forward") else n + k) if "linear" in op else 0
    weights = [((packed, *rest), layout) for packed in clones(first, activations)]
    if op == "nf4_dequantize":
        return [(*weight, BF16) for weight in weights]
    if op == "nf4_dora_norm":
        return [(*weight, BF16, A, B, SCALING) for weight in weights]
    if op == "nf4_lora_linear_forward":
        return [(drawn(m, k), *weight, A, B, None, *update) for weight in weights]
    S = drawn(m, r, dtype=f32)
    return [(drawn(m, n), drawn(m, k), S, *W, A, B, *update, needs) for W in weights]


def layers(op: str, mode: str, m: int, n: int, k: int, r: int, device: torch.device) -> Calls:
    """Build PEFT's layer, patched and not, over equal weights."""
    from peftkern.tools.bench import cases, peers, worker
    from peftkern.tools.bench.base_layers import Layer, linear

    torch.manual_seed(0)
    weight = (torch.randn(n, k, device=device) * k**-0.5).to(BF16)
    train = mode == "training"
    layer = peers.nf4_linear(weight) if op.startswith("nf4") else linear(weight)
    rotate = LAYERS_ROTATE if device.type == "cuda" else 0
    copies = copies_of(n * k // 2 if op.startswith("nf4") else weight.nbytes, rotate)
    tensors = {
        name: torch.randn(m, size, device=device).to(BF16) for name, size in (("x", k), ("dy", n))
    }
    how = "full" if train else "no-grad"
    problem = cases.Problem(op, "", m, n, k, r, "bfloat16", how)

    def of(patched: bool) -> Callable[[int], object]:
        pool = peers.lora_pool(layer, copies, r=r, patched=patched, train=train)
        made = [Layer(one, peers.adapter_of(one)) for one in pool]
        setup, call, _ = worker.calls(problem, made, tensors, copies)
        return lambda i: call(setup())

    return {"peftkern": of(True), "PEFT": of(False)}


def held(calls: Calls, op: str, device: torch.device) -> tuple[str, dict[str, float], list[str]]:
    """Return (winner, milliseconds of each, exclusions with reasons); one alone wins untimed.

    Results are checked against the reference, or the first where that is no contender. Layers are
    checked by the benches: PEFT rounds differently.
    Raises: RuntimeError if nobody is left.
    """
    given, out = {}, []
    for name, call in calls.items():  # also the call that compiles
        try:
            given[name] = results(call(0), op)
        except Exception as error:  # only the one that fails is out, say of memory
            if device.type == "cuda":
                torch.cuda.synchronize()  # raises again if the device itself is lost
            out.append(f"{name}: {gpu_timer.first_line(error)}")
    if "/" not in op and given:
        right = given.get("reference", next(iter(given.values())))
        wrong = [name for name, tensors in given.items() if not same(tensors, right, 2)]
        given = {name: tensors for name, tensors in given.items() if name not in wrong}
        out += [f"{name} gave other numbers" for name in wrong]
    if not given:
        raise RuntimeError("; ".join(out))
    fair = {name: calls[name] for name in given}
    if len(fair) == 1:
        return next(iter(fair)), {}, out
    del given
    if device.type == "cuda":
        timings = gpu_timer.measure_events(fair, seconds=SECONDS)
    else:
        timings = measure(fair, seconds=0.0)
    times = {name: round(timing.median * 1e3, 6) for name, timing in timings.items()}
    default = next(iter(times))
    best = min(times, key=times.__getitem__)
    return (best if times[default] > GAIN * times[best] else default), times, out


def results(got: object, op: str) -> tuple[Tensor, ...]:
    """Return the results to compare: of an SVD the singular values, as vectors are not unique."""
    tensors = got if isinstance(got, (tuple, list)) else (got,)
    return (tensors[1],) if op == "low_rank_svd" else tuple(t for t in tensors if t.numel())
