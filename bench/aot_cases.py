"""Launches that `make aot` compiles: calls of the launchers on tensors without memory.

`resources.py` names each after its kernel and its case. What several cases launch is listed once,
under the first.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from peftkern.formats.table import NUMBERS, fields
from peftkern.kernels import (
    adalora,
    dora,
    grouped_linear,
    lora_linear,
    low_rank_svd,
    nf4,
    nf4_lora_linear,
    rosa,
)
from peftkern.kernels.aot import TARGETS
from peftkern.kernels.low_rank_update import gradients_sb, update_epilogue

NVIDIA = ("sm80", "sm90", "sm100")
F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16
I32, I64 = torch.int32, torch.int64
NAMES = {F32: "fp32", F16: "fp16", BF16: "bf16", I32: "i32", I64: "i64"}
N = K = 4096
SCALING = 2.0
# Bytes of a launch. Tiles without them read lora_B twice as often, or halve the occupancy, on every
# architecture; nothing was measured.
# The other two are new on Blackwell, whose tiles are those of before the other GPUs' were chosen.
KNOWN_SPILLS = {
    ("sm100", "epilogue/M8192/r256/fp32/adapters-fp32"): 8,
    ("sm100", "lora_backward_sb/M8192/r16/fp16/adapters-fp32/dropout/backward"): 8,
    ("sm100", "nf4_forward/M64/r256/bf16/adapters-bf16"): 8,
}


@dataclass(frozen=True)
class Case:
    """A call of a launcher, under a name that its kernels have in common."""

    name: str
    call: Callable[[], object]
    targets: tuple[str, ...] = tuple(TARGETS)


def meta(*shape: int, dtype: torch.dtype = BF16) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def nf4_weight(
    n: int, nested: bool = True, blocksize: int = 64, k: int = K
) -> tuple[list[Tensor], list[int]]:
    """Return tensors and layout of a packed weight [n, k]."""
    if not nested:
        return plain_weight("nf4", n, k, blocksize)
    blocks = n * k // blocksize
    packed = meta(n * k // 2, dtype=torch.uint8)
    inner = (meta(blocks // 256, dtype=F32), meta(256, dtype=F32), meta(dtype=F32))
    return [packed, meta(blocks, dtype=torch.uint8), *inner], [0, blocksize, 256, n, k]


def factors(
    r: int, dtype: torch.dtype, n: int = N, k: int = K
) -> tuple[Tensor | None, Tensor | None]:
    return (meta(r, k, dtype=dtype), meta(n, r, dtype=dtype)) if r else (None, None)


def dropout_of(wanted: bool) -> tuple[Tensor | None, float]:
    return (meta(1, dtype=I64), 0.1) if wanted else (None, 0.0)


def named(M: int, r: int, dtype: torch.dtype, adapter: torch.dtype, dropout: bool = False) -> str:
    return f"M{M}/r{r}/{NAMES[dtype]}/adapters-{NAMES[adapter]}{'/dropout' * dropout}"


def nf4_cases() -> Iterator[Case]:
    for dtype, blocksize, nested in [
        (BF16, 64, True),
        (F16, 64, False),
        (F32, 64, True),
        (BF16, 32, True),
        (BF16, 4096, True),
    ]:
        args = (*nf4_weight(14336, nested, blocksize), dtype)
        name = f"{NAMES[dtype]}/blocks-of-{blocksize}{'/nested' * nested}"
        yield Case(name, partial(nf4.nf4_dequantize, *args))
    for dtype, blocksize in [(BF16, 64), (F32, 64), (F32, 4096)]:
        dense = meta(14336, K, dtype=dtype)
        call = partial(nf4.nf4_quantize, dense, blocksize)
        yield Case(f"{NAMES[dtype]}/blocks-of-{blocksize}", call)


def lora_linear_cases() -> Iterator[Case]:
    for M, r, dtype, adapter, dropout in [
        (1, 16, BF16, F32, False),
        (512, 16, BF16, F32, False),
        (8192, 16, BF16, F32, True),
        (8192, 16, BF16, BF16, False),
        (1024, 32, BF16, F32, True),
        (1024, 64, BF16, F32, True),
        (8192, 32, BF16, F32, True),
        (8192, 64, BF16, F32, True),
        (8192, 64, BF16, BF16, True),
        (8192, 256, BF16, F32, True),
        (8192, 64, F16, F32, False),
        (8192, 64, F32, F32, True),
        (8192, 256, F32, F32, False),
    ]:
        x, weight, bias = meta(M, K, dtype=dtype), meta(N, K, dtype=dtype), meta(N, dtype=dtype)
        args = (x, weight, *factors(r, adapter), bias, SCALING, *dropout_of(dropout))
        call = partial(lora_linear.lora_linear_forward, *args)
        yield Case(named(M, r, dtype, adapter, dropout), call)
    for M, r, dtype, adapter, dropout in [
        (512, 16, BF16, F32, False),
        (8192, 16, BF16, F32, True),
        (8192, 16, BF16, BF16, True),
        (8192, 32, BF16, F32, True),
        (8192, 64, BF16, F32, True),
        (8192, 64, BF16, BF16, True),
        (8192, 16, F16, F32, True),
        (8192, 32, F16, F32, True),
        (8192, 64, F16, F32, True),
        (8192, 256, BF16, F32, True),
        (8192, 64, F32, F32, True),
        (8192, 256, F32, F32, True),
    ]:
        dy, x, S = meta(M, N, dtype=dtype), meta(M, K, dtype=dtype), meta(M, r, dtype=F32)
        args = (dy, x, S, meta(N, K, dtype=dtype), *factors(r, adapter), SCALING)
        call = partial(lora_linear.lora_linear_backward, *args, *dropout_of(dropout), [True] * 4)
        yield Case(named(M, r, dtype, adapter, dropout) + "/backward", call)
    dy, S, B = meta(8192, N, dtype=F16), meta(8192, 64, dtype=F32), factors(64, F32)[1]
    call = partial(gradients_sb, dy, S, B, SCALING, [False, False, True, True])
    yield Case(named(8192, 64, F16, F32), call)
    S, B, bias, y = meta(1, 8192, 256, dtype=F32), factors(256, BF16)[1], meta(N), meta(8192, N)
    call = partial(update_epilogue, None, S, B.t(), bias, None, 0.0, (1.0, SCALING), None, y)
    yield Case(named(8192, 256, BF16, BF16), call)


def nf4_lora_linear_cases() -> Iterator[Case]:
    wide = 14336  # of which more rows are fused
    for M, r, dtype, adapter, dropout in [
        (1, 16, BF16, F32, False),
        (1, 0, BF16, BF16, False),
        (8, 16, F16, F32, False),
        (32, 64, BF16, F32, True),
        (64, 16, BF16, F32, False),
        (64, 256, BF16, F32, False),
        (64, 256, BF16, BF16, False),
        (16, 16, F32, F32, True),
        (64, 64, F32, F32, False),
    ]:
        n = wide if M == 64 else N
        x, bias = meta(M, K, dtype=dtype), meta(n, dtype=dtype)
        adapters = factors(r, adapter, n)
        args = (x, *nf4_weight(n), *adapters, bias, SCALING, *dropout_of(dropout))
        call = partial(nf4_lora_linear.nf4_lora_linear_forward, *args)
        yield Case(named(M, r, dtype, adapter, dropout), call)
    needs = [True, False, False, False]  # gradients of factors are as over a dense weight
    for M, r, dtype in [(16, 0, BF16), (64, 64, BF16), (64, 0, F16), (64, 256, F32)]:
        dropout, weight = r > 0, nf4_weight(N, k=wide)
        args = (meta(M, N, dtype=dtype), None, None, *weight, *factors(r, F32, k=wide), SCALING)
        call = partial(nf4_lora_linear.nf4_lora_linear_backward, *args, *dropout_of(dropout), needs)
        yield Case(named(M, r, dtype, F32, dropout) + "/backward", call)


def low_rank_svd_cases() -> Iterator[Case]:
    for r in (16, 32, 64):
        for dtype in (BF16, F32):
            A, B = factors(r, dtype)
            call = partial(low_rank_svd.low_rank_svd, [B], [A], [SCALING], True, "accurate")
            yield Case(f"r{r}/{NAMES[dtype]}", call, NVIDIA)


def adalora_cases() -> Iterator[Case]:
    for r, dtype, grad_dtype in [
        (12, F32, F32),
        (64, BF16, BF16),
        (256, BF16, F32),
        (256, BF16, BF16),
    ]:
        shapes = ((r, 1), (r, K), (N, r))
        params = [meta(*shape, dtype=dtype) for shape in shapes]
        grads = [meta(*shape, dtype=grad_dtype) for shape in shapes]
        emas = [meta(r * (1 + K + N), dtype=F32) for _ in range(2)]
        call = partial(adalora.adalora_importance_, *emas, params, grads, 0.85, 0.9)
        yield Case(f"r{r}/{NAMES[dtype]}/gradients-{NAMES[grad_dtype]}", call)
    for dtype, threshold in [(F32, False), (BF16, True)]:
        lora_E = [meta(12, 1, dtype=dtype) for _ in range(100)]
        call = partial(adalora.adalora_allocate_, meta(1200, dtype=F32), lora_E, 600, threshold)
        yield Case(f"{NAMES[dtype]}/{'threshold' if threshold else 'exact'}", call)


def dora_cases() -> Iterator[Case]:
    for n, r, dtype, adapter, transposed in [
        (1024, 16, BF16, F32, False),
        (4096, 16, BF16, F32, False),
        (14336, 16, BF16, F32, False),
        (14336, 16, BF16, BF16, False),
        (14336, 16, BF16, F32, True),
        (14336, 32, F16, F32, False),
        (14336, 64, BF16, F32, False),
        (14336, 256, BF16, F32, False),
        (1024, 256, BF16, F32, False),
        (4096, 256, F16, F16, False),
        (14336, 16, F32, F32, False),
        (14336, 64, F32, F32, False),
        (14336, 256, F32, F32, False),
    ]:
        weight = meta(K, n, dtype=dtype).t() if transposed else meta(n, K, dtype=dtype)
        name = f"N{n}/r{r}/{NAMES[dtype]}/adapters-{NAMES[adapter]}{'/transposed' * transposed}"
        yield Case(name, partial(dora.dora_norm, weight, *factors(r, adapter, n), SCALING))
    for n, r, dtype, adapter, nested, blocksize in [
        (1024, 16, BF16, F32, True, 64),
        (4096, 16, BF16, F32, True, 64),
        (14336, 16, BF16, F32, True, 64),
        (14336, 64, BF16, F32, False, 64),
        (14336, 256, BF16, F32, True, 64),
        (512, 16, BF16, F32, True, 32),
        (14336, 16, F16, F16, True, 64),
        (14336, 64, F32, F32, True, 64),
    ]:
        args = (*nf4_weight(n, nested, blocksize), dtype, *factors(r, adapter, n), SCALING)
        name = f"N{n}/r{r}/{NAMES[dtype]}/adapters-{NAMES[adapter]}{'/plain' * (not nested)}"
        name += "" if blocksize == 64 else f"/blocks-of-{blocksize}"
        yield Case(name, partial(dora.nf4_dora_norm, *args))


def rosa_cases() -> Iterator[Case]:
    """Yield a tile of each size; rows of x beyond 1024 are summed in slabs."""
    nnz = N * K // 100
    for dtype, index, M in [
        (BF16, I32, 16),
        (BF16, I32, 32),
        (BF16, I32, 64),
        (BF16, I32, 4096),
        (BF16, I64, 128),
        (F16, I32, 64),
        (F32, I32, 16),
        (F32, I32, 128),
    ]:
        dy, x, values = meta(M, N, dtype=dtype), meta(M, K, dtype=dtype), meta(nnz, dtype=F32)
        crow, col = meta(N + 1, dtype=index), meta(nnz, dtype=index)
        name = f"{NAMES[dtype]}/{NAMES[index]}/tile-{min(M, 128)}"
        yield Case(name, partial(rosa.rosa_sddmm, dy, x, crow, col))
        yield Case(name, partial(rosa.rosa_spmm_, dy, x, values, crow, col, None))


def grouped_linear_cases() -> Iterator[Case]:
    """Yield tiles of 16, 32 and 128 rows; the factors, in float32, lie as PEFT keeps them."""
    E, n, k = 128, 1536, 2048
    for R, r, dtype, blocksize, ways in [
        (8, 16, BF16, 0, ["forward"]),
        (2048, 16, BF16, 64, ["forward", "dx"]),
        (8192, 16, BF16, 0, ["forward", "dx", "dA", "dB"]),
        (8192, 16, BF16, 64, ["forward", "dx"]),
        (8192, 16, BF16, 4096, ["forward"]),  # of which rows of 2048 are not whole blocks
        (8192, 64, F16, 0, ["forward", "dA", "dB"]),
        (8192, 16, F32, 64, ["forward", "dx"]),
    ]:
        kind, weight = "grouped_linear", (meta(E, n, k, dtype=dtype),)
        if blocksize:
            kind, weight = "nf4_grouped_linear", plain_weight("nf4", E, n, k, blocksize)
        x, rows, offsets = meta(R // 8, k, dtype=dtype), meta(R, dtype=I32), meta(E, dtype=I32)
        A, B = meta(E, r, k, dtype=F32), meta(n, r, E, dtype=F32).permute(2, 0, 1)
        forward = (x, rows, offsets, *weight, False, A, B, meta(E, n, dtype=dtype), SCALING)
        dy, S = meta(R, n, dtype=dtype), meta(R, r, dtype=F32)
        backward = (dy, offsets, x, rows, S, *weight, False, A, B, SCALING)
        needs = {"dx": [True, False, False, False], "dA": [False, True, False, False]}
        needs["dB"] = [False, False, True, True]
        for way in ways:
            op = getattr(grouped_linear, f"{kind}_{'backward' if way in needs else way}")
            args = (*backward, needs[way]) if way in needs else forward
            packed = f"/nf4-{blocksize}" if blocksize else ""
            yield Case(f"R{R}/r{r}/{NAMES[dtype]}{packed}/{way}", partial(op, *args))


def format_cases() -> Iterator[Case]:
    """Yield each kernel over the formats that compile it otherwise than NF4, and not by a table."""
    for name, blocksize, kinds in [
        ("mxfp4", 32, "dequantize forward grouped"),
        ("nvfp4", 16, "dequantize forward backward grouped norm"),
        ("int4", 64, "dequantize forward backward grouped"),
    ]:
        weight, stack = (plain_weight(name, *shape, blocksize) for shape in [(N, K), (8, N, K)])
        x, dropout, needs = meta(16, K), dropout_of(False), [True, False, False, False]
        forward = (x, *weight, *factors(16, F32), meta(N), SCALING, *dropout)
        backward = (x, None, None, *weight, *factors(0, F32), SCALING, *dropout, needs)
        experts = (
            meta(4096, K),
            None,
            meta(8, dtype=I32),
            *stack,
            False,
            None,
            None,
            None,
            SCALING,
        )
        calls = {
            "dequantize": partial(nf4.nf4_dequantize, *weight, BF16),
            "forward": partial(nf4_lora_linear.nf4_lora_linear_forward, *forward),
            "backward": partial(nf4_lora_linear.nf4_lora_linear_backward, *backward),
            "grouped": partial(grouped_linear.nf4_grouped_linear_forward, *experts),
            "norm": partial(dora.nf4_dora_norm, *weight, BF16, *factors(16, F32), SCALING),
        }
        for kind in kinds.split():
            yield Case(f"{name}/bf16", calls[kind])


def plain_weight(name: str, *sizes: int) -> tuple[list[Tensor], list[int]]:
    """Return tensors and layout of a weight in a format; sizes: its shape, then its blocksize."""
    *shape, blocksize = sizes
    layout = [NUMBERS[name], blocksize, 0, *shape]
    return [meta(field.length, dtype=field.dtype) for field in fields(layout)], layout


CASES = (
    *nf4_cases(),
    *lora_linear_cases(),
    *nf4_lora_linear_cases(),
    *low_rank_svd_cases(),
    *adalora_cases(),
    *dora_cases(),
    *rosa_cases(),
    *grouped_linear_cases(),
    *format_cases(),
)
