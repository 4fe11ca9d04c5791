"""Tuner of this GPU, which writes kernels/tuned/<arch>.json: `make tune`.

For the linear layers of Llama-3-8B, Llama-2-7B, Qwen2.5-7B and LLaMA-65B, M from 1 to 8192 and
ranks up to 16 (which share tiles) and 64, in this order:

- `nf4_fused_rows`: up to how many rows the fused NF4 kernel beats dequantizing and cuBLAS;
- `configs`: the tiles of every Triton kernel (tiles.py);
- `back_ends`, `layers`: which back end serves an op fastest, and where PEFT's own layer is faster
  than the patched one (contests.py). They get the last third of the time.

The table is written as it grows and a run resumes where another stopped; `--again` measures it all
again.

python bench/tune.py [--budget 480] [--shapes 4096x4096 --rows 1 8 --ranks 16]
Under Triton's interpreter `--device cpu` goes through the same motions, for a tiny problem.
"""

from __future__ import annotations

import argparse
import datetime
import hashlib
import json
import os
import statistics
import sys
import time
import traceback
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import torch
from contests import OPS, contests, held
from tiles import FIELDS, Search, Workers, fused_rows, problems, search

from peftkern.backends.device import arch, triton_interpreted
from peftkern.kernels import configs
from peftkern.kernels.launch import forget_plans
from peftkern.tools.bench import gpu_timer, machine
from peftkern.tools.bench.shapes import PRESETS

MODELS = ("llama3-8b", "llama2-7b", "qwen2.5-7b", "llama-65b")  # the most common first
PROJECTIONS = ("q_proj", "gate_proj", "down_proj", "k_proj")  # one of each size
SHAPES = tuple(dict.fromkeys(PRESETS[model][name] for model in MODELS for name in PROJECTIONS))
ROWS = (1, 8, 32, 8192, 512, 4096, 128, 16, 2048, 1024, 256, 64, 2, 4)  # most wanted first
RANKS = (16, 64)
FUSED_ROWS = (16, 32, 48, 64, 96, 128, 192, configs.NF4_FUSED_ROWS_MAX)
BATCH = 16  # problems searched in step: enough candidates for every compiling process
MOST_WORKERS = 12  # processes that compile; each takes about half a GB of the GPU for itself
FOR_CONTESTS = 1 / 3  # of the time
LAYER_TILES = ("lora_forward", "nf4_forward")  # of every row and shape; the others follow from them
SECTIONS = ("configs", "gains", "back_ends", "layers", "milliseconds")


def begin(path: Path, args: argparse.Namespace) -> dict:
    """Load the table if this device, versions and kernels wrote it, else an empty one."""
    facts = machine.describe(torch.get_num_threads(), args.device, args.commit)
    head = {
        "device": facts["gpu"]["name"] if facts["gpu"] else facts["cpu"],
        "versions": {name: facts["versions"][name] for name in ("torch", "triton", "peftkern")},
        "kernels": fingerprint(),
    }
    table = {**head, "commit": facts["commit"], **{section: {} for section in SECTIONS}}
    for old in (path, configs.TUNED / path.name):
        if old.exists() and not args.again:
            found = json.loads(old.read_text(encoding="utf-8"))
            if all(found.get(key) == value for key, value in head.items()):
                return table | {**found, "commit": facts["commit"]}
    return table


def fingerprint() -> str:
    """Hash the sources of all GPU kernels: measurements of others are void."""
    folders = (machine.ROOT / "kernels", machine.ROOT / "csrc" / "cuda")
    files = sorted(path for folder in folders for path in folder.glob("*.[pc]*"))
    return hashlib.sha256(b"".join(path.read_bytes() for path in files)).hexdigest()[:16]


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
    add("--kernels", choices=tuple(FIELDS), nargs="*", default=list(FIELDS), help="tiles of these")
    names = (*OPS, "layers")
    add("--contests", choices=names, nargs="*", default=list(names), help="and contests of these")
    add("--again", action="store_true", help="forget what the table holds")
    add("--out", type=Path, default=configs.TUNED, help="folder of the tables")
    add("--commit", default="", help="what to record where the tree carries no history")
    args = parser.parse_args(argv)
    args.device = machine.device_named(args.device)
    return args


def main(argv: list[str] | None = None) -> int:
    os.environ.setdefault("PEFTKERN_TRUST", "always")  # kernels are what is measured
    try:
        args = parse(argv)
    except machine.DeviceError as error:
        print(f"tune.py: error: {error}", file=sys.stderr)
        return 2
    if args.device.type == "cpu" and not triton_interpreted():
        print("tune.py: error: device cpu needs TRITON_INTERPRET=1", file=sys.stderr)
        return 2
    end = time.monotonic() + args.budget
    path = args.out / f"{arch(args.device)}.json"
    table = begin(path, args)
    reserved = FOR_CONTESTS * args.budget if args.contests else 0.0
    status = 0
    try:
        tune_tiles(args, table, path, lambda: end - reserved - time.monotonic())
    except Exception:  # the contests are still worth holding
        traceback.print_exc()
        status = 1
    hold_contests(args, table, path, lambda: end - time.monotonic())
    print(f"written: {path}")
    return status


def tune_tiles(
    args: argparse.Namespace, table: dict, path: Path, left: Callable[[], float]
) -> None:
    device = args.device
    # The crossover comes first: it decides more than any tile, and takes a few seconds.
    if "nf4_fused_rows" not in table and "nf4_forward" in args.kernels:
        on_gpu = device.type == "cuda"  # where it has to hold for all shapes
        rows, shapes = (FUSED_ROWS, SHAPES[:3]) if on_gpu else (tuple(args.rows), args.shapes[:3])
        table["nf4_fused_rows"], table["fused_ratios"] = fused_rows(list(shapes), device, rows)
        save(path, table)
    wanted = [
        task
        for task in problems(args.shapes, args.rows, args.ranks)
        if task[0].kernel in args.kernels and task[0].key() not in table["configs"]
    ]
    rejected, done = Counter(), 0
    cores = min(MOST_WORKERS, len(os.sched_getaffinity(0)) - 1)
    workers = Workers(device, cores if device.type == "cuda" else 0)
    try:
        for start in range(0, len(wanted), BATCH):
            searches = [Search.of(*task, device) for task in wanted[start : start + BATCH]]
            finished, refused = search(searches, workers, left)
            rejected += refused
            if not finished:
                break
            for s in searches:
                table["configs"][s.problem.key()] = configs.as_entry(s.best)
                table["gains"][s.problem.key()] = round(s.ratio, 3)
            save(path, table)
            done += len(searches)
    finally:
        workers.close()
    gains = table["gains"].values()
    mean = statistics.geometric_mean(gains) if gains else 1.0
    print(f"tiles: {done} problems measured, {len(wanted) - done} left for another run")
    print(f"faster than the counted tiles by {mean:.3f}x on average (geometric)")
    for reason, count in rejected.most_common():
        print(f"candidates rejected, {reason}: {count}")


def hold_contests(
    args: argparse.Namespace, table: dict, path: Path, left: Callable[[], float]
) -> None:
    device = args.device
    use(table, arch(device))
    done, missed, failed = Counter(), 0, Counter()
    tiles = problems(args.shapes, args.rows, args.ranks)
    untuned = {
        (p.r, p.M, n, k)
        for p, n, k in tiles
        if p.kernel in args.kernels and p.kernel in LAYER_TILES and p.key() not in table["configs"]
    }
    for section, problem, prepare in contests(args.shapes, args.rows, args.ranks, device):
        op = problem.kernel
        known, shape = table[section].get(problem.class_key(), {}), f"{problem.N}x{problem.K}"
        if (op if section == "back_ends" else section) not in args.contests or shape in known:
            continue
        # With tiles that still change, a contest would have to be repeated.
        if left() <= 0 or (problem.r, problem.M, problem.N, problem.K) in untuned:
            missed += 1
            continue
        try:
            winner, times, out = held(prepare(), op, device)
        except Exception as error:  # a contest that fails must not lose the others
            if device.type == "cuda":
                torch.cuda.synchronize()  # raises again if the device itself is lost
            failed[f"{op}: {gpu_timer.first_line(error)}"] += 1
            continue
        failed.update(f"{op}: {why}" for why in out)
        table[section][problem.class_key()] = {**known, shape: winner}
        table["milliseconds"][problem.key()] = times
        done[winner] += 1
        configs.fastest.cache_clear()  # the layer after it is served by the winner
        save(path, table)
    said = ", ".join(f"{name} {count}" for name, count in done.most_common()) or "none"
    print(f"contests: {sum(done.values())} held, {missed} left for another run; won by: {said}")
    for what, count in failed.most_common():
        print(f"not compared, {what}: {count}")


def use(table: dict, name: str) -> None:
    """Apply the table's tiles and back ends to this process, but leave no layer to PEFT."""
    for cached in (configs.load, configs.chosen, configs.fastest, configs.layer_of):
        cached.cache_clear()
    configs.load(name).update({**table, "layers": {}})
    forget_plans()


def save(path: Path, table: dict) -> None:
    now = datetime.datetime.now(datetime.timezone.utc)
    table["date"] = now.isoformat(timespec="seconds")
    machine.write_json(path, table, indent=1)


if __name__ == "__main__":
    sys.exit(main())
