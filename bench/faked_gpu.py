"""A GPU that is not there: Triton compiles for it and launches nothing.

Inside `faked_gpu` tensors of the CPU stand for those of a GPU: dispatch gives them to Triton's
launchers, which choose, specialize, compile and launch as on the device; only the last call, the
one into CUDA's driver, is a C function that does nothing. Results are memory as it came. What this
leaves out of the host's time: Triton's C launcher, torch's device guard, and the look into the
table that `make tune` writes, so that the time is a lower bound.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from peftkern.backends import dispatch
from peftkern.functional import lora_linear, nf4_lora_linear
from peftkern.kernels import launch
from peftkern.kernels import nf4_lora_linear as kernels
from peftkern.kernels.aot import PROCESSORS, TARGETS
from peftkern.kernels.launch import Traits

ARCH = "sm90"
_ignore = "".format  # a C function that takes any arguments and makes nothing of them


class _Launcher:
    """What `triton.backends.nvidia.driver.CudaLauncher` does in Python before its C function."""

    def __init__(self, src: Any, metadata: Any) -> None:
        self.num_ctas = getattr(metadata, "num_ctas", 1)
        self.global_scratch_size = metadata.global_scratch_size
        self.profile_scratch_size = metadata.profile_scratch_size
        self.launch_cooperative_grid = metadata.launch_cooperative_grid
        self.launch_pdl = metadata.launch_pdl
        self.launch = _ignore

    def __call__(self, gridX, gridY, gridZ, stream, function, *args) -> None:
        _, launch_metadata, enter, leave, *_ = args

        def allocate_scratch(size: int) -> None:
            if size > 0:
                raise NotImplementedError("a kernel with scratch memory")

        scratch = allocate_scratch(self.global_scratch_size)
        profile = allocate_scratch(self.profile_scratch_size)
        options = (self.launch_cooperative_grid, self.launch_pdl, scratch, profile)
        if enter is not None:  # as the C function asks
            enter(launch_metadata)
        self.launch(gridX, gridY, gridZ, stream, function, *options, *args)
        if leave is not None:
            leave(launch_metadata)


class _Utils:
    @staticmethod
    def get_device_properties(device: int) -> dict[str, int]:
        return {"max_shared_mem": 227 << 10}

    @staticmethod
    def load_binary(*args: Any) -> tuple[int, int, int, int, int]:
        return 1, 1, 32, 0, 1024  # module, function, registers, spills, threads


class _Driver:
    """Stand-in for the driver of a GPU that is asked to launch, too."""

    launcher_cls, utils = _Launcher, _Utils

    def get_current_target(self) -> GPUTarget:
        return TARGETS[ARCH]

    def get_current_device(self) -> int:
        return -1  # as tensors of the CPU say

    def get_current_stream(self, device: int) -> int:
        return 0


def _seed(x: Tensor, dropout_p: float) -> Tensor | None:
    """Draw what `draw_keep` draws on a GPU."""
    return torch.randint(2**63 - 1, (1,), dtype=torch.int64) if dropout_p else None


@contextlib.contextmanager
def faked_gpu(*, fused: bool = True) -> Iterator[None]:
    """Take tensors of the CPU for an H200's; fused: if NF4 kernels for few rows serve."""
    if os.environ.get("TRITON_INTERPRET") == "1":
        raise RuntimeError("TRITON_INTERPRET: expected Triton's compiler, got its interpreter")
    gpu = Traits.of_gpu(ARCH, PROCESSORS, hip=False)
    with contextlib.ExitStack() as stack:
        for candidates in dispatch.CANDIDATES.values():
            for candidate in candidates:
                if candidate.name == "triton":
                    stack.enter_context(mock.patch.object(candidate, "device", "cpu"))
        stack.enter_context(mock.patch.object(launch, "_traits", lambda device: gpu))
        if not fused:
            stack.enter_context(mock.patch.object(kernels, "_fused", lambda *args: False))
        for module in (lora_linear, nf4_lora_linear):
            stack.enter_context(mock.patch.dict(module.__globals__, draw_keep=_seed))
        driver.set_active(_Driver())
        stack.callback(driver.set_active, None)
        yield
