"""Baselines of tests/cli/test_bench.py, as a user writes them: `bench_providers:right`."""

from __future__ import annotations

import os
import sys
import time

import torch.nn.functional as F
from torch import Tensor

from peftkern.tools.bench.cases import SCALING, Problem
from peftkern.tools.bench.providers import Layer


def layers(tensors: dict[str, Tensor], copies: int, factor: float) -> list[Layer]:
    def layer() -> Layer:
        weight = tensors["weight"].clone()
        a, b = (tensors[name].clone().requires_grad_() for name in ("lora_A", "lora_B"))

        def run(x: Tensor) -> Tensor:
            update = F.linear(F.linear(x.to(a.dtype), a), b) * SCALING
            return (F.linear(x, weight) + factor * update).to(x.dtype)

        return Layer(run, (a, b))

    return [layer() for _ in range(copies)]


def right(problem: Problem, tensors: dict[str, Tensor], copies: int) -> list[Layer]:
    print("libraries print to standard output", flush=True)
    return layers(tensors, copies, 1.0)


def wrong(problem: Problem, tensors: dict[str, Tensor], copies: int) -> list[Layer]:
    """As if alpha was left out of the scaling: plausible, and wrong."""
    return layers(tensors, copies, 0.5)


def raising(problem: Problem, tensors: dict[str, Tensor], copies: int) -> list[Layer]:
    raise RuntimeError(f"no kernel for {problem.op}\nand a second line")


def crashing(problem: Problem, tensors: dict[str, Tensor], copies: int) -> list[Layer]:
    """As a fault in native code ends a process: in the second call, when the clock runs."""
    calls = []

    def run(x: Tensor) -> Tensor:
        calls.append(x)
        if len(calls) > 4:
            print("Fatal: out of bounds", file=sys.stderr, flush=True)
            os.abort()
        return good[0].run(x)

    good = layers(tensors, 1, 1.0)
    return [Layer(run, good[0].adapter)]


def hanging(problem: Problem, tensors: dict[str, Tensor], copies: int) -> list[Layer]:
    time.sleep(3600)
    return []


def sleeping(problem: Problem, tensors: dict[str, Tensor], copies: int) -> list[Layer]:
    """As slow as a product that torch runs in one thread."""
    good = layers(tensors, 1, 1.0)

    def run(x: Tensor) -> Tensor:
        time.sleep(3600)
        return good[0].run(x)

    return [Layer(run, good[0].adapter)]
