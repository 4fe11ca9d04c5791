"""PEFT's LoRA layer over a dense weight, patched and not, and the plain dense layer.

On a CPU the low-rank update costs a few percent of the dense product, so there is little to win. On
a GPU PEFT's unfused passes over the activations are what there is to win: `dense` is the frozen
layer alone (forward, and the gradient of x), `PEFT, compiled` went through torch.compile.

python bench/bench_lora_linear.py [--device cuda] [--only forward-M1] [--seconds 2]
"""

from __future__ import annotations

import sys
from dataclasses import dataclass

import torch
from suite import OURS, Case, Options, Spec, Target, Variant, benchmark_test, main

from peftkern.tools.bench.peers import (
    compiled,
    forward,
    forward_backward,
    kept,
    linear,
    lora_oracle,
    lora_pool,
)

PEFT, COMPILED, DENSE = "PEFT", "PEFT, compiled", "dense"
NAMES = (OURS, PEFT, DENSE)
GPU_NAMES = (OURS, PEFT, COMPILED, DENSE)
BF16, FP32 = torch.bfloat16, torch.float32


@dataclass(frozen=True)
class Work:
    """Workload of the layers: rows, dtypes, backward pass or not, dropout, autocast."""

    m: int
    dtype: torch.dtype
    train: bool
    dropout: float = 0.0
    adapter_dtype: torch.dtype = FP32
    autocast: bool = False


def build(options: Options, work: Work, names: tuple) -> Case:
    torch.manual_seed(0)
    n, k, r, device = options.n, options.k, options.r, options.device
    m, dtype, train, adapter_dtype = options.m(work.m), work.dtype, work.train, work.adapter_dtype
    # On a CPU dropout's mask is a tensor, which the interpreted kernels do not take.
    dropout = work.dropout if device.type == "cuda" else 0.0
    weight = (torch.randn(n, k, device=device) / k**0.5).to(dtype)
    first = torch.randn(m, k, device=device).to(dtype)
    dy = torch.randn(m, n, device=device).to(dtype) if train else None
    dense, copies = linear(weight), options.copies(weight.nbytes)
    # A GPU's L2 cache would still hold much of a single x.
    xs = [first.clone().requires_grad_(train) for _ in range(copies if device.type != "cpu" else 1)]

    def variant(name: str) -> Variant:
        modules = [linear(weight) for _ in range(copies)] if name == DENSE else None
        keep = None
        if modules is None:
            modules = lora_pool(
                dense,
                copies,
                r=r,
                patched=name == OURS,
                train=train,
                dropout=dropout,
                adapter_dtype=adapter_dtype,
            )
            keep = kept(xs[0], dropout, name == OURS, adapter_dtype)
        layers = compiled(modules) if name == COMPILED else modules
        oracle = ()
        if not (name == COMPILED and dropout):  # torch.compile draws a mask of its own
            adapted = None if name == DENSE else modules[0]
            oracle = lora_oracle(xs[0], weight.double(), adapted, dy, keep, dropout)
        if train:
            return Variant(forward_backward(layers, xs, dy, modules, work.autocast), oracle)
        return Variant(forward(layers, xs, work.autocast), oracle)

    passes = 2 if train else 1
    flops = passes * 2 * m * n * k + (3 if train else 1) * 2 * m * r * (n + k)
    adapters = (4 if train else 1) * adapter_dtype.itemsize * r * (n + k)
    activations = m * (2 * n + 3 * k if train else n + k) * dtype.itemsize
    traffic = passes * weight.nbytes + adapters + activations
    return Case({name: variant(name) for name in names}, traffic, flops, dtype)


def spec(name: str, work: Work, names: tuple = NAMES, *targets: Target, **rest) -> Spec:
    label = f"lora_linear/{name}/{'bf16' if work.dtype is BF16 else 'fp32'}"
    return Spec(label, lambda options: build(options, work, names), names, PEFT, targets, **rest)


SPECS = [
    spec("forward-M1", Work(1, BF16, False)),
    spec("forward-M256", Work(256, BF16, False)),
    spec("forward+backward-M1024", Work(1024, BF16, True)),
    spec("forward-M256", Work(256, FP32, False)),
]


def gpu_specs(device: torch.device) -> list[Spec]:
    """Return the cases, those with a target first; PEFT's default adapters are fp32."""
    square, wide = {"shape": (4096, 4096)}, {"shape": (14336, 4096)}
    frozen, faster = Target(DENSE, 1 / 1.12), Target(PEFT, 1.3)
    few = {**square, "most_launches": 3}
    both, four = "forward+backward", GPU_NAMES
    train, train16 = Work(8192, BF16, True, 0.1), Work(8192, BF16, True, 0.1, BF16)
    return [
        spec(f"{both}-M8192-p0.1-4096x4096", train, four, frozen, **square),
        spec("forward-M512-4096x4096", Work(512, BF16, False), four, faster, **few),
        spec(f"{both}-M8192-p0.1-4096x4096-bf16-adapters", train16, four, frozen, **square),
        spec(
            "forward-M512-4096x4096-bf16-adapters",
            Work(512, BF16, False, 0.0, BF16),
            four,
            faster,
            **few,
        ),
        spec(f"{both}-M512-4096x4096", Work(512, BF16, True), four, faster, **square),
        spec(
            f"{both}-M8192-p0.1-4096x4096-autocast",
            Work(8192, BF16, True, 0.1, FP32, True),
            four,
            frozen,
            **square,
        ),
        spec("forward-M8192-4096x4096", Work(8192, BF16, False), NAMES, **few),
        spec(f"{both}-M8192-p0.1-14336x4096", train, NAMES, **wide),
        spec("forward-M1-4096x4096", Work(1, BF16, False), NAMES, **few),
    ]


test_lora_linear = benchmark_test(SPECS)

if __name__ == "__main__":
    sys.exit(main("lora_linear", SPECS, gpu_specs))
