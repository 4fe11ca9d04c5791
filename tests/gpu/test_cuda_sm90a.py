"""The CUDA kernels that are for compute capability 9.0 alone, on a GPU."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from cuda_cases import OP, check, forward, with_splits
from gpu_cases import nf4_cases, nf4_operands, on_device, same_bits
from gpu_runs import CUDA, NEEDS_GPU, capture, on_a_busy_stream
from linear_cases import BF16, F16, F32
from tolerances import DETERMINISM_RUNS
from torch import Tensor

import peftkern
from peftkern.backends.cuda import nf4_lora_linear as cuda

pytestmark = NEEDS_GPU


@pytest.fixture(autouse=True)
def cuda_serves() -> Iterator[None]:
    if reason := cuda.refusal_sm90a(torch.device(CUDA)):
        pytest.skip(reason)
    peftkern.reset_stats()
    with peftkern.use_backend("cuda"):
        yield
    peftkern.reset_stats()


@pytest.mark.parametrize("dtype", [BF16, F16], ids=str)
@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("M", [33, 64, 65, 128, 129, 256, 257, 300, 512])
def test_every_tile_of_rows(M, double_quant, dtype):
    for N, K, r in ((37, 192, 5), (1000, 1088, 16)):
        check(nf4_cases((M, N, K, r), dtype, F32, double_quant=double_quant, device=CUDA))
    assert peftkern.stats().calls[OP, "cuda"]


@pytest.mark.parametrize("shape", [(128, 4096, 4096, 16), (512, 14336, 4096, 64)], ids=str)
@pytest.mark.parametrize("lora", [True, False])
def test_layers_of_models(shape, lora):
    check(nf4_cases(shape, BF16, F32, device=CUDA), lora)


@pytest.mark.parametrize(("r", "adapter"), [(1, F32), (33, F16), (256, BF16)])
def test_ranks_and_adapters(adapter, r):
    check(nf4_cases((70, 300, 640, r), BF16, adapter, device=CUDA))


@pytest.mark.parametrize("M", [64, 128, 512])
def test_equal_bits_every_time(M):
    """Under load: other products keep the GPU busy between the runs."""
    o = on_device(nf4_operands((M, 4096, 4096, 16), BF16, F32), CUDA)
    y, S = forward(o)
    noise = torch.randn(1024, 1024, device=CUDA)
    for _ in range(DETERMINISM_RUNS - 1):
        noise = noise @ noise / 32
        again = forward(o)
        assert same_bits(again[0], y) and same_bits(again[1], S)


def test_graph_replays_what_it_recorded_on_new_contents():
    o = on_device(nf4_operands((100, 600, 1024, 16), BF16, F32), CUDA)
    graph, (y, S) = capture(lambda: forward(o))
    o.x.copy_(torch.randn_like(o.x))
    graph.replay()
    wanted = forward(o)
    assert same_bits(y, wanted[0]) and same_bits(S, wanted[1])


@pytest.mark.parametrize("splits", [1, 4])
def test_on_another_stream_and_in_a_graph(splits):
    """Every launch begins while the one before, which makes what it needs, still runs.

    Three calls in a row, each with another x: their workspace holds what the call before has left.
    """
    torch.use_deterministic_algorithms(False)  # which fills new memory
    o = on_device(nf4_operands((100, 600, 4096, 16), BF16, F32), CUDA)

    def run(x: Tensor) -> tuple[Tensor, Tensor]:
        return with_splits(replace(o, x=x), splits, prefill=True)

    xs = [o.x, o.x.flip(0), o.x.roll(1, 0)]
    wanted = [run(x) for x in xs]
    late = [torch.zeros_like(x) for x in xs]
    got = on_a_busy_stream(lambda: [run(x) for x in late], late, xs)
    for results, right in zip(got, wanted, strict=True):
        assert all(same_bits(a, b) for a, b in zip(results, right, strict=True))
    graph, recorded = capture(lambda: [run(x) for x in late])
    torch._foreach_copy_(late, xs[::-1])
    for _ in range(DETERMINISM_RUNS):
        graph.replay()
    for results, right in zip(recorded, wanted[::-1], strict=True):
        assert all(same_bits(a, b) for a, b in zip(results, right, strict=True))
