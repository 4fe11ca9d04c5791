"""Host time of a QLoRA layer: what a call costs before, between and after its kernels.

A step of few tokens is as long as the host takes to launch it. PEFT's layer over bitsandbytes and
the same layer patched run in turn on one thread, with tensors so small that kernels take little:
decoding (one row, no gradient) and a training step (forward and backward). On "cpu" both run their
C++ kernels. On "gpu" Triton's launches are made for a GPU that is not there (faked_gpu.py), while
PEFT's kernels run as on "cpu": ours is a lower bound, and PEFT's number holds its kernels.

Calls are those of Python functions, which no other work on the machine changes.

python bench/bench_host_time.py [--seconds 4] [--json out.json]
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from unittest import mock

if __name__ == "__main__":  # before any library reads it
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from faked_gpu import faked_gpu
from torch import nn

from peftkern.backends import correctness, trust
from peftkern.tools.bench.peers import lora_pool, nf4_linear

SIZE, RANK, BF16 = 64, 8, torch.bfloat16
WARM, BATCH = 40, 20  # calls before the clock runs, calls of one reading


@dataclass(frozen=True)
class Setting:
    """A call of a layer; gpu: with Triton's launches, in training those for many rows."""

    name: str
    gpu: bool
    train: bool
    autocast: bool = False
    dropout: float = 0.0


SETTINGS = tuple(
    Setting(f"{'gpu' if gpu else 'cpu'}/{name}", gpu, *rest)
    for gpu in (True, False)
    for name, *rest in (
        ("decode", False),
        ("decode-autocast", False, True),
        ("train", True),
        ("train-autocast", True, True),
        ("train-autocast-dropout", True, True, 0.1),
    )
)


@contextlib.contextmanager
def autocast(wanted: bool) -> Iterator[None]:
    """Enable autocast for the CPU, where the tensors are, and CUDA, which PEFT's layer asks for.

    Casts are not kept: in training a step begins with none, and casts each parameter once.
    """
    before = torch.is_autocast_enabled("cuda")
    torch.set_autocast_enabled("cuda", wanted)
    try:
        with torch.autocast("cpu", BF16, enabled=wanted, cache_enabled=False):
            yield
    finally:
        torch.set_autocast_enabled("cuda", before)


def call_of(layer: nn.Module, setting: Setting) -> Callable[[], object]:
    """Return a step of one layer, which leaves gradients in the places of an optimizer."""
    x = torch.randn(1, SIZE, requires_grad=setting.train)  # float32: what a norm gives, also there
    dy = torch.randn(1, SIZE)
    leaves = (x, *(p for p in layer.parameters() if p.requires_grad))

    def train() -> object:
        for leaf in leaves:
            leaf.grad = None
        layer(x).backward(dy)

    def decode() -> object:
        with torch.no_grad():
            return layer(x)

    return train if setting.train else decode


def calls_of(call: Callable[[], object]) -> int:
    """Count the calls of Python functions; backward passes on a CPU run in this thread, too."""
    count = 0

    def note(frame: FrameType, event: str, argument: object) -> None:
        nonlocal count
        count += event == "call"

    sys.setprofile(note)
    try:
        call()
    finally:
        sys.setprofile(None)
    return count


def seconds_of(call: Callable[[], object]) -> float:
    """Return this thread's time on a core: what it waits for others is not the call's."""
    start = time.thread_time()
    for _ in range(BATCH):
        call()
    return (time.thread_time() - start) / BATCH


def layers(setting: Setting) -> dict[bool, nn.Module]:
    """Build the layer, patched and not, over one weight; bitsandbytes does not repack it."""
    torch.manual_seed(0)
    base = nf4_linear(torch.randn(SIZE, SIZE, dtype=BF16 if setting.autocast else torch.float32))
    how = {"r": RANK, "train": True, "dropout": setting.dropout}
    return {patched: lora_pool(base, 1, patched=patched, **how)[0] for patched in (False, True)}


@contextlib.contextmanager
def trusted() -> Iterator[None]:
    """Let every program and class be one that this machine trusts, as in a run that is under way.

    A GPU that is not there gives no right results, and so small a layer might be PEFT's.
    """
    ours = {"side": trust.OURS}
    with (
        trust.use_mode("readonly"),
        mock.patch.object(correctness, "wrong", lambda *args: None),
        mock.patch.object(trust.Ledger, "adopt", lambda self, name: ours),
    ):
        trust.reset()
        yield
    trust.reset()


@contextlib.contextmanager
def world(setting: Setting) -> Iterator[None]:
    gpu = contextlib.nullcontext()
    if setting.gpu:
        gpu = faked_gpu(fused=not setting.train)
    # oneDNN takes 30 us to begin a product of 16-bit numbers.
    mkldnn = torch.backends.mkldnn.flags(enabled=False, allow_tf32=False)
    with trusted(), gpu, autocast(setting.autocast), mkldnn:
        yield


def measure(setting: Setting, seconds: float) -> dict[str, float]:
    """Take turns for so long: least and median microseconds of a call, and its Python calls."""
    pair = layers(setting)
    with world(setting):
        calls = {patched: call_of(layer, setting) for patched, layer in pair.items()}
        for call in calls.values():
            for _ in range(WARM):
                call()
        counts = {patched: calls_of(call) for patched, call in calls.items()}
        taken: dict[bool, list[float]] = {False: [], True: []}
        end = time.perf_counter() + seconds
        while time.perf_counter() < end:
            for patched, call in calls.items():
                taken[patched].append(1e6 * seconds_of(call))
    ratios = [ours / theirs for theirs, ours in zip(*taken.values(), strict=True)]
    least = {patched: min(values) for patched, values in taken.items()}
    return {
        "peft_us": least[False],
        "ours_us": least[True],
        "ratio_of_least": least[True] / least[False],
        "median_ratio": statistics.median(ratios),
        "peft_calls": counts[False],
        "ours_calls": counts[True],
    }


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="bench_host_time.py")
    parser.add_argument("--seconds", type=float, default=4.0, help="for each setting")
    parser.add_argument("--only", default="", help="settings whose name begins with this")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    found = {}
    print(f"{'':28} {'PEFT us':>8} {'ours us':>8} {'least':>6} {'median':>6}  Python calls")
    for setting in SETTINGS:
        if not setting.name.startswith(args.only):
            continue
        row = found[setting.name] = measure(setting, args.seconds)
        print(
            f"{setting.name:28} {row['peft_us']:8.1f} {row['ours_us']:8.1f} "
            f"{row['ratio_of_least']:6.2f} {row['median_ratio']:6.2f}  "
            f"{row['peft_calls']} -> {row['ours_calls']}",
            flush=True,
        )
    if args.json:
        args.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
