"""QLoRA's linear layer (NF4 weight, nested absmax, LoRA r=16) as users have it: real PEFT modules.

peftkern is PEFT's `lora.Linear4bit` after `peftkern.patch`. Its peers hold the same weight and the
same adapters (PEFT's default: fp32): the unpatched layer in training mode, where bitsandbytes
dequantizes the weight and multiplies; in eval mode, where bitsandbytes repacks the weight once and
multiplies straight from it (machines with AVX512-BF16); PEFT's `lora.Linear` over the dense weight;
and the dense layer without LoRA.

On a GPU bitsandbytes does the same in both modes (one row without gradients takes its own kernel),
and torch.compile of the bitsandbytes layer is a peer.

python bench/bench_nf4_lora_linear.py [--device cuda] [--only forward-M1] [--seconds 2]
"""

from __future__ import annotations

import sys
from dataclasses import replace

import torch
from suite import OURS, Spec, Target, benchmark_test, main, spec_of
from torch import Tensor

from peftkern.backends.cuda.module import refusal_device
from peftkern.backends.cuda.nf4_lora_linear import refusal_sm90a
from peftkern.tools.bench import providers
from peftkern.tools.bench.cases import Problem
from peftkern.tools.bench.peers import bitsandbytes_missing

CUDA = "peftkern cuda"  # the same layer on that back end
BNB, BNB_EVAL = "bitsandbytes + PEFT", "bitsandbytes + PEFT, eval"
COMPILED = "bitsandbytes + PEFT, compiled"
DENSE_LORA, DENSE = "dense + PEFT", "dense"


def repacks_in_eval() -> bool:
    if bitsandbytes_missing(torch.device("cpu")) is not None:
        return False
    from bitsandbytes.functional import has_avx512bf16

    return has_avx512bf16()


def training_mode(problem: Problem, tensors: dict[str, Tensor], copies: int) -> list:
    """Build the layers that bitsandbytes does not repack, also without gradients."""
    return providers.bitsandbytes(replace(problem, mode="full"), tensors, copies)


PROVIDERS = {
    OURS: "peftkern",
    CUDA: providers.on_backend("cuda"),
    BNB: training_mode,
    BNB_EVAL: "bitsandbytes",
    COMPILED: "compile",
    DENSE_LORA: "peft",
    DENSE: "frozen",
}


def spec(
    name: str,
    m: int,
    *targets: Target,
    dtype: str = "bfloat16",
    without: tuple[str, ...] = (CUDA, COMPILED),
    **more,
) -> Spec:
    mode = "full" if "backward" in name else "no-grad"
    problem = Problem("nf4_lora_linear", "", m, 4096, 4096, 16, dtype, mode)
    if mode == "full" or not repacks_in_eval():
        without += (BNB_EVAL,)
    peers = {name: one for name, one in PROVIDERS.items() if name not in without}
    label = f"nf4_lora_linear/{name}/{'bf16' if dtype == 'bfloat16' else 'fp32'}"
    judge = BNB if BNB in peers else DENSE_LORA
    return spec_of(label, problem, peers, *targets, judge=judge, **more)


# Few rows: time grows with M, without a cliff.
FEW_ROWS = {1: (Target(BNB, 25.0), Target(DENSE_LORA, 2.5)), 2: (), 4: (), 8: ()}
FEW_ROWS |= {16: (Target(BNB, 8.0), Target(DENSE_LORA, 1.0)), 32: (), 64: ()}
FEW_ROWS |= {256: (Target(BNB, 1.7), Target(DENSE, 1 / 1.15))}
SPECS = [
    *(spec(f"forward-M{m}", m, *targets) for m, targets in FEW_ROWS.items()),
    spec("forward+backward-M1024", 1024, Target(BNB, 1.25)),
    spec("forward-M256", 256, Target(BNB, 2.0), Target(DENSE, 1.0), dtype="float32"),
]


PREFILL = (64, 128, 256, 512)  # rows between decoding and training


def gpu_specs(device: torch.device) -> list[Spec]:
    """Return the cases, those with a target first; without bitsandbytes dense PEFT is the judge."""
    has_bnb = bitsandbytes_missing(device) is None
    has_decode = device.type == "cuda" and refusal_device(device) is None
    has_prefill = has_decode and refusal_sm90a(device) is None

    def gpu_spec(m: int, shape: tuple[int, int], *targets: Target, train: bool = False) -> Spec:
        without = (BNB_EVAL,) if has_bnb else (BNB, BNB_EVAL, COMPILED)
        without += () if m in (32, 4096) else (COMPILED,)  # compiling is slow
        fits = not train and (has_prefill if m in PREFILL else has_decode and m <= 32)
        without += () if fits else (CUDA,)
        direction = "forward+backward" if train else "forward"
        name = f"{direction}-M{m}-{shape[0]}x{shape[1]}"
        return spec(name, m, *targets, without=without, shape=shape)

    square, wide, large = (4096, 4096), (14336, 4096), (28672, 8192)
    return [
        *(
            gpu_spec(m, shape, Target(BNB, least))
            for shape in (square, wide)
            for m, least in ((1, 2.0), (8, 3.0), (32, 3.0))
        ),
        *(gpu_spec(4096, shape, Target(DENSE, 1 / 1.12)) for shape in (square, wide)),
        gpu_spec(1, large),
        *(gpu_spec(16, shape) for shape in (square, wide)),
        gpu_spec(4096, square, train=True),
        *(gpu_spec(m, square) for m in PREFILL),
        gpu_spec(32, square, train=True),
    ]


test_nf4_lora_linear = benchmark_test(SPECS)

if __name__ == "__main__":
    sys.exit(main("nf4_lora_linear", SPECS, gpu_specs))
