"""Measures tiles on this GPU and writes kernels/tuned/<arch>.json: `make tune`.

For the linear layers of Llama-3-8B, Llama-2-7B, LLaMA-65B and Qwen2.5-7B, M from 1 to 8192 and
ranks 8, 16 and 64, every kernel starts from its counted tiles and walks, one field at a time, to
whatever neighbour is faster by more than noise. A candidate that does not compile, needs more than
the device has, or gives other numbers than the counted tiles is out. The table is written after
each problem and an interrupted run goes on where it stopped; `--again` measures all of it anew.
Last comes `nf4_fused_rows`: up to how many rows the fused NF4 kernel beats dequantising and cuBLAS.

python bench/tune.py [--budget 480] [--shapes 4096x4096 --rows 1 8 --ranks 16]
Under Triton's interpreter `--device cpu` goes through the same motions, for a tiny problem.
"""

from __future__ import annotations

import argparse
import datetime
import functools
import json
import math
import statistics
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

import peftkern
from peftkern.benchmark import gpu_timer, machine
from peftkern.benchmark.timer import measure
from peftkern.benchmark.tolerances import FLOOR_MAX, FLOOR_RMS, RATIO, errors
from peftkern.device import triton_interpreted

MODELS = {  # (N, K) of every linear layer, the most common model first
    "Llama-3-8B": ((4096, 4096), (14336, 4096), (4096, 14336), (1024, 4096)),
    "Llama-2-7B": ((11008, 4096), (4096, 11008)),  # and 4096x4096
    "Qwen2.5-7B": ((3584, 3584), (18944, 3584), (3584, 18944), (512, 3584)),
    "LLaMA-65B": ((8192, 8192), (22016, 8192), (8192, 22016)),
}
SHAPES = tuple(dict.fromkeys(shape for shapes in MODELS.values() for shape in shapes))
ROWS = (1, 8, 32, 8192, 512, 4096, 128, 16, 2048, 1024, 256, 64, 2, 4)  # most wanted first
RANKS = (16, 64, 8)
FIELDS = {  # what each kernel reads of its tiles
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
GAIN = 1.02  # how much faster a candidate has to be: less is noise
ROTATE = 256 << 20  # bytes of inputs to cycle through, beyond the L2 cache
MOST_COPIES = 32
SCALING = 0.5


@functools.lru_cache(maxsize=1)
def nf4_weight(n: int, k: int, device: torch.device) -> peftkern.NF4Weight:
    torch.manual_seed(0)
    weight = torch.randn(n, k, device=device, dtype=torch.bfloat16)
    return peftkern.quantize_nf4(weight / k**0.5)


def pieces(w: peftkern.NF4Weight) -> tuple:
    nested = (w.nested_absmax, w.nested_code, w.nested_offset)
    return (w.packed, w.absmax, *nested, w.blocksize, w.nested_blocksize)


def problems(shapes: list, rows: list, ranks: list) -> Iterator[tuple]:
    """(problem, N, K) as the launchers ask for them, each once, most wanted first."""
    from peftkern.kernels.configs import NF4_FUSED_ROWS_MAX, Problem

    seen = set()
    for m in rows:
        for r in ranks:
            for n, k in shapes:
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
                wanted.append(Problem("dora_norm", 1, n, k, r, 16))
                wanted.append(Problem("nf4_dora_norm", 1, n, k, r, 16))
                for problem in wanted:
                    if problem.key() not in seen:
                        seen.add(problem.key())
                        yield problem, n, k


def runner(problem, n: int, k: int, device: torch.device) -> Callable[[int], tuple]:
    """call(i): the launch that the problem stands for, on the i-th of many equal inputs."""
    from peftkern.kernels import dora, lora_linear, nf4, nf4_lora_linear

    torch.manual_seed(0)
    m, r, kernel = problem.M, problem.r, problem.kernel

    def pool(*shape: int, scale: float = 1.0, dtype: torch.dtype = torch.bfloat16) -> list[Tensor]:
        first = (torch.randn(shape, device=device) * scale).to(dtype)
        copies = min(MOST_COPIES, max(2, ROTATE // max(1, first.nbytes)))
        return [first.clone() for _ in range(copies if device.type == "cuda" else 1)]

    def of(tensors: list, i: int):
        return tensors[i % len(tensors)]

    f32 = torch.float32
    a = pool(r, k, scale=k**-0.5, dtype=f32)[0]
    b = pool(n, r, scale=0.1, dtype=f32)[0]
    if kernel == "lora_forward":
        xs = pool(m, k)
        return lambda i: lora_linear.update_forward(of(xs, i), a, b, None, SCALING, None, 0.0)
    if kernel == "lora_backward_sb":
        dys, s = pool(m, n), pool(m, r, dtype=f32)[0]
        needs = [True, True, True, False]
        return lambda i: lora_linear.gradients_sb(of(dys, i), s, b, SCALING, needs)
    if kernel == "lora_backward_xa":
        xs, ds, dtype = pool(m, k), pool(m, r, dtype=f32)[0], torch.bfloat16
        both = (True, True)
        return lambda i: lora_linear.gradients_xa(of(xs, i), a, ds, None, 0.0, both, dtype)
    if kernel == "epilogue":
        parts, s, y = pool(4, m, n, dtype=f32), pool(4, m, r, dtype=f32)[0], pool(m, n)[0]
        scales = (1.0, SCALING)

        def epilogue(i: int) -> tuple:
            args = (of(parts, i), s, b.t(), None, None, 0.0, scales, None, y)
            lora_linear.update_epilogue(*args)
            return (y.clone() if device.type == "cpu" else y,)

        return epilogue
    if kernel == "nf4_quantize":
        weights = pool(n, k)
        return lambda i: nf4.nf4_quantize(of(weights, i), 64)
    if kernel == "dora_norm":
        weights = pool(n, k, scale=k**-0.5)
        return lambda i: (dora.dora_norm(of(weights, i), a, b, SCALING),)

    first = pieces(nf4_weight(n, k, device))
    copies = min(MOST_COPIES, ROTATE // first[0].nbytes) if device.type == "cuda" else 0
    packed = [(first[0].clone(), *first[1:]) for _ in range(max(1, copies))]
    if kernel == "nf4_dequantize":
        return lambda i: (nf4.nf4_dequantize(*of(packed, i), [n, k], torch.bfloat16),)
    if kernel == "nf4_dora_norm":
        rest = ([n, k], torch.bfloat16, a, b, SCALING)
        return lambda i: (dora.nf4_dora_norm(*of(packed, i), *rest),)
    if kernel == "nf4_forward":
        x = pool(m, k)[0]
        rest = (n, a, b, None, SCALING, None, 0.0)
        return lambda i: nf4_lora_linear._fused_forward(x, of(packed, i), *rest)
    dy = pool(m, n)[0]
    rest = (k, None, None, None, 0.0)
    return lambda i: (nf4_lora_linear._fused_backward(dy, of(packed, i), *rest),)


def seconds_of(calls: dict[str, Callable[[int], object]], device: torch.device) -> dict[str, float]:
    """The median of each, in turns; on a GPU of replayed graphs, which leave the host out."""
    if device.type == "cpu":
        return {name: t.median for name, t in measure(calls, seconds=0.0).items()}
    once = dict.fromkeys(calls, 0.0)
    timings, refused = gpu_timer.measure_graphs(calls, seconds=0.004, calls=once)
    if refused:
        raise RuntimeError(f"not capturable: {refused}")
    return {name: timing.median for name, timing in timings.items()}


def checked(call: Callable[[int], tuple]) -> tuple[Tensor, ...]:
    """What a call returns, over memory that torch fills with NaN in this mode."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        return tuple(tensor.clone() for tensor in call(0) if tensor is not None)
    finally:
        torch.use_deterministic_algorithms(before, warn_only=True)


def same(got: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> bool:
    """Within the rounding of the activations, RATIO times: sums run in another order."""
    bounds = RATIO * FLOOR_RMS[torch.bfloat16], RATIO * FLOOR_MAX[torch.bfloat16]
    pairs = [errors(g, e) for g, e in zip(got, expected, strict=True)]
    return all(rms <= bounds[0] and most <= bounds[1] for rms, most in pairs)


def neighbours(config, name: str, kernel: str) -> Iterator:
    """Configs for a kernel that differ in one field: half and double, or a stage fewer and more."""
    value = getattr(config, name)
    steps = (value - 1, value + 1) if name == "num_stages" else (value // 2, value * 2)
    for step in steps:
        candidate = replace(config, **{name: step})
        if step >= 1 and candidate.valid(kernel):
            yield candidate


def search(problem, n: int, k: int, device: torch.device, left: Callable[[], float]) -> tuple:
    """The best config found, its time, the counted one's, and what was wrong with others."""
    from peftkern.kernels.configs import choose
    from peftkern.kernels.launch import forced, processors

    counted = choose(problem, processors(device))
    run = runner(problem, n, k, device)

    def with_config(config) -> Callable[[int], tuple]:
        def call(i: int) -> tuple:
            with forced(problem.kernel, config):
                return run(i)

        return call

    expected = checked(with_config(counted))
    best, ratio, rejected, tried = counted, 1.0, Counter(), {counted}
    for name in FIELDS[problem.kernel]:
        for candidate in neighbours(best, name, problem.kernel):
            if candidate in tried or left() <= 0:
                continue
            tried.add(candidate)
            try:
                if not same(checked(with_config(candidate)), expected):
                    rejected["other numbers"] += 1
                    continue
                pair = {"best": with_config(best), "new": with_config(candidate)}
                times = seconds_of(pair, device)
            except Exception as error:  # the compiler's many ways to refuse
                if device.type == "cuda":
                    torch.cuda.synchronize()  # raises again if the device itself is lost
                rejected[type(error).__name__] += 1
                continue
            if times["best"] > GAIN * times["new"]:
                best, ratio = candidate, ratio * times["best"] / times["new"]
    return best, ratio, rejected


def fused_rows(shapes: list, device: torch.device, rows: tuple[int, ...]) -> tuple[int, dict]:
    """Up to which M the fused NF4 kernel is no slower on average, and the ratios behind it."""
    from peftkern.kernels import lora_linear, nf4, nf4_lora_linear
    from peftkern.kernels.configs import Problem

    def composed(x: Tensor, weight: tuple, n: int, *adapters) -> tuple:
        y, s = lora_linear.update_forward(x, *adapters)
        dense = nf4.nf4_dequantize(*weight, [n, x.shape[1]], x.dtype)
        return y.addmm_(x, dense.t()), s

    ratios, best = {}, 0
    for m in rows:
        measured = []
        for n, k in shapes:
            weight = pieces(nf4_weight(n, k, device))
            copies = min(MOST_COPIES, max(1, ROTATE // weight[0].nbytes))
            pool = [(weight[0].clone(), *weight[1:]) for _ in range(copies)]
            problem = Problem("lora_forward", m, n, k, 16, 16)
            x = torch.randn(m, k, device=device).to(torch.bfloat16)
            a = torch.randn(problem.r, k, device=device) / k**0.5
            rest = (n, a, torch.randn(n, problem.r, device=device), None, SCALING, None, 0.0)
            calls = {
                "fused": lambda i, p=pool, x=x, rest=rest: nf4_lora_linear._fused_forward(
                    x, p[i % len(p)], *rest
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


def begin(path: Path, device: torch.device, args: argparse.Namespace) -> dict:
    """The table so far if this device and these versions wrote it, else an empty one."""
    facts = machine.describe(torch.get_num_threads(), device, args.commit)
    head = {
        "device": facts["gpu"]["name"] if facts["gpu"] else facts["cpu"],
        "versions": {name: facts["versions"][name] for name in ("torch", "triton", "peftkern")},
    }
    table = {**head, "commit": facts["commit"], "configs": {}, "gains": {}}
    if path.exists() and not args.again:
        old = json.loads(path.read_text(encoding="utf-8"))
        if all(old.get(key) == value for key, value in head.items()):
            table |= {**old, "commit": facts["commit"]}
    return table


def parse(argv: list[str] | None) -> argparse.Namespace:
    def shape(text: str) -> tuple[int, int]:
        n, k = map(int, text.split("x"))
        return n, k

    parser = argparse.ArgumentParser(prog="tune.py")
    add = parser.add_argument
    add("--device", choices=("cuda", "cpu"), default="cuda")
    add("--budget", type=float, default=480.0, help="seconds (480)")
    add("--shapes", type=shape, nargs="+", default=list(SHAPES), help="NxK")
    add("--rows", type=int, nargs="+", default=list(ROWS), help="M")
    add("--ranks", type=int, nargs="+", default=list(RANKS), help="r")
    add("--kernels", choices=tuple(FIELDS), nargs="+", default=list(FIELDS))
    add("--again", action="store_true", help="forget what the table holds")
    add("--out", type=Path, default=machine.ROOT / "kernels" / "tuned", help="folder of the tables")
    add("--commit", default="", help="what to record where the tree carries no history")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    end = time.monotonic() + args.budget
    try:
        device = machine.device_named(args.device)
    except machine.DeviceError as error:
        print(f"tune.py: error: {error}", file=sys.stderr)
        return 2
    if device.type == "cpu" and not triton_interpreted():
        print("tune.py: error: device cpu needs TRITON_INTERPRET=1", file=sys.stderr)
        return 2
    tune(args, device, lambda: end - time.monotonic())
    return 0


def tune(args: argparse.Namespace, device: torch.device, left: Callable[[], float]) -> None:
    from peftkern.kernels.configs import NF4_FUSED_ROWS_MAX, as_entry
    from peftkern.kernels.launch import arch

    path = args.out / f"{arch(device)}.json"
    table, rejected, done, missed = begin(path, device, args), Counter(), 0, 0
    # The crossover comes first: it decides more than any tile, and takes a few seconds.
    if "nf4_fused_rows" not in table and "nf4_forward" in args.kernels:
        rows = (16, 32, 48, 64, 96, 128, 192, NF4_FUSED_ROWS_MAX)
        rows = rows if device.type == "cuda" else tuple(args.rows)
        table["nf4_fused_rows"], table["fused_ratios"] = fused_rows(args.shapes[:3], device, rows)
        save(path, table)
    for problem, n, k in problems(args.shapes, args.rows, args.ranks):
        if problem.kernel not in args.kernels or problem.key() in table["configs"]:
            continue
        if left() <= 0:
            missed += 1
            continue
        best, ratio, refused = search(problem, n, k, device, left)
        rejected += refused
        if left() <= 0:  # cut short: not a finished search
            missed += 1
            continue
        table["configs"][problem.key()] = as_entry(best)
        table["gains"][problem.key()] = round(ratio, 3)
        save(path, table)
        done += 1
    gains = table["gains"].values()
    mean = math.exp(statistics.fmean(map(math.log, gains))) if gains else 1.0
    print(f"{done} problems measured, {missed} left for another run; written: {path}")
    print(f"faster than the counted tiles by {mean:.3f}x on average (geometric)")
    for reason, count in rejected.most_common():
        print(f"candidates rejected, {reason}: {count}")


def save(path: Path, table: dict) -> None:
    now = datetime.datetime.now(datetime.timezone.utc)
    table["date"] = now.isoformat(timespec="seconds")
    machine.write_json(path, table, indent=1)


if __name__ == "__main__":
    sys.exit(main())
