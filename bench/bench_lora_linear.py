"""PEFT's LoRA layer over a dense weight, patched and not, and the plain dense layer.

On a CPU the low-rank update costs a few percent of the dense product, so there is little to win. On
a GPU PEFT's unfused passes over the activations are what there is to win: `dense` is the frozen
layer alone (forward, and the gradient of x), `PEFT, compiled` went through torch.compile.

python bench/bench_lora_linear.py [--device cuda] [--only forward-M1] [--seconds 2]
"""

from __future__ import annotations

import sys

import torch
from suite import OURS, Spec, Target, benchmark_test, main, spec_of

from peftkern.tools.bench.cases import Problem

PEFT, COMPILED, DENSE = "PEFT", "PEFT, compiled", "dense"
PROVIDERS = {OURS: "peftkern", PEFT: "peft", COMPILED: "compile", DENSE: "frozen"}
NAMES = (OURS, PEFT, DENSE)


def spec(
    name: str,
    m: int,
    *targets: Target,
    dtype: str = "bfloat16",
    names: tuple[str, ...] = NAMES,
    more: dict | None = None,
    **rest,
) -> Spec:
    """Return a case; `more`: dropout, dtype of the adapters, autocast of its problem."""
    mode = "full" if "backward" in name else "no-grad"
    problem = Problem("lora_linear", "", m, 4096, 4096, 16, dtype, mode, **(more or {}))
    label = f"lora_linear/{name}/{'bf16' if dtype == 'bfloat16' else 'fp32'}"
    return spec_of(label, problem, {name: PROVIDERS[name] for name in names}, *targets, **rest)


SPECS = [
    spec("forward-M1", 1),
    spec("forward-M256", 256),
    spec("forward+backward-M1024", 1024),
    spec("forward-M256", 256, dtype="float32"),
]


def gpu_specs(device: torch.device) -> list[Spec]:
    """Return the cases, those with a target first; PEFT's default adapters are fp32."""
    square, wide = {"shape": (4096, 4096)}, {"shape": (14336, 4096)}
    frozen, faster = Target(DENSE, 1 / 1.12), Target(PEFT, 1.3)
    few = {**square, "most_launches": 3}
    four, both = {"names": tuple(PROVIDERS)}, "forward+backward"
    dropout, narrow = {"dropout": 0.1}, {"adapter_dtype": "bfloat16"}
    train, train16 = {**four, "more": dropout}, {**four, "more": dropout | narrow}
    autocast = {**four, "more": {**dropout, "autocast": True}}
    return [
        spec(f"{both}-M8192-p0.1-4096x4096", 8192, frozen, **train, **square),
        spec("forward-M512-4096x4096", 512, faster, **four, **few),
        spec(f"{both}-M8192-p0.1-4096x4096-bf16-adapters", 8192, frozen, **train16, **square),
        spec("forward-M512-4096x4096-bf16-adapters", 512, faster, **four, more=narrow, **few),
        spec(f"{both}-M512-4096x4096", 512, faster, **four, **square),
        spec(f"{both}-M8192-p0.1-4096x4096-autocast", 8192, frozen, **autocast, **square),
        spec("forward-M8192-4096x4096", 8192, **few),
        spec(f"{both}-M8192-p0.1-14336x4096", 8192, more=dropout, **wide),
        spec("forward-M1-4096x4096", 1, **few),
    ]


test_lora_linear = benchmark_test(SPECS)

if __name__ == "__main__":
    sys.exit(main("lora_linear", SPECS, gpu_specs))
