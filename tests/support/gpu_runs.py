"""What the tests on a GPU ask of every family: late operands, graphs, launches, a patched layer."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import pytest
import torch
from linear_cases import BF16
from tolerances import GOLDEN_RTOL
from torch import Tensor, nn

import peftkern

Result = TypeVar("Result")
CUDA = "cuda"
NEEDS_GPU = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def on_a_busy_stream(
    call: Callable[[], Result], late: list[Tensor], sources: list[Tensor]
) -> Result:
    """The result of a call on another stream, on which alone the operands arrive, and late."""
    slow = torch.randn(4096, 4096, device=CUDA)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(20):
            slow = slow @ slow / 64
        torch._foreach_copy_(late, sources)
        result = call()
    torch.cuda.current_stream().wait_stream(stream)
    return result


@contextmanager
def nothing_waits() -> Iterator[None]:
    """What waits for the device raises."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def capture(call: Callable[[], Result]) -> tuple[torch.cuda.CUDAGraph, Result]:
    """A graph of the call after three warm-ups, and the tensors that a replay writes to."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = call()
    return graph, result


def launches(call: Callable[[], object]) -> list[str]:
    """Names of the kernels that a call launches, once everything is compiled and remembered."""
    torch.use_deterministic_algorithms(False)  # which fills new memory: a launch each
    for _ in range(3):
        call()
    torch.cuda.synchronize()
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profile:
        call()
        torch.cuda.synchronize()
    on_gpu = [e.name for e in profile.events() if e.device_type is torch.autograd.DeviceType.CUDA]
    return [name for name in on_gpu if not name.startswith(("Memcpy", "Memset"))]


# PEFT


class Net(nn.Module):
    """One linear layer called `proj`."""

    def __init__(self, proj: nn.Module) -> None:
        super().__init__()
        self.proj = proj

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(x)


def bf16_linear() -> nn.Linear:
    return nn.Linear(1024, 512, dtype=BF16, device=CUDA).requires_grad_(False)


def linear4bit(double_quant: bool) -> nn.Module:
    bnb = pytest.importorskip("bitsandbytes")
    dense = nn.Linear(1024, 512, dtype=BF16)
    options = {"compress_statistics": double_quant, "quant_type": "nf4"}
    proj = bnb.nn.Linear4bit(1024, 512, compute_dtype=BF16, **options)
    proj.load_state_dict(dense.state_dict())
    return proj.to(BF16).to(CUDA).requires_grad_(False)  # which quantizes


def assert_patched_is_the_same(proj: nn.Module, ops: set[str], **config: Any) -> None:
    """PEFT's output and gradients before and after the patch, by Triton's `ops`, no fallback."""
    peft = pytest.importorskip("peft")
    net = Net(proj)
    net.is_loaded_in_4bit = any(op.startswith("nf4_") for op in ops)
    config = peft.LoraConfig(r=8, lora_alpha=16, target_modules=["proj"], **config)
    model = peft.get_peft_model(net, config).to(CUDA)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    torch.manual_seed(3)
    with torch.no_grad():
        for name, p in trained.items():
            if "magnitude" in name:
                p.mul_(torch.empty_like(p).uniform_(0.8, 1.25))
            else:
                p.normal_(std=0.05)
    x = torch.randn(64, 1024, device=CUDA, dtype=BF16, requires_grad=True)

    def results() -> list[Tensor]:
        y = model(x)
        return [y, *torch.autograd.grad(y.float().square().mean(), [x, *trained.values()])]

    wanted = results()
    assert len(peftkern.patch(model).patched) == 1
    peftkern.reset_stats()
    got = results()
    assert set(peftkern.stats().calls) == {(op, "triton") for op in ops}
    assert peftkern.stats().fallbacks == {}
    for a, b in zip(got, wanted, strict=True):
        rtol = GOLDEN_RTOL[BF16]
        torch.testing.assert_close(a, b, rtol=rtol, atol=rtol * b.abs().max().item())
