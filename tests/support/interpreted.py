"""Triton's interpreter under guard: every address that a kernel reads or writes is looked at.

The interpreter reads raw memory, so a mask that lets one lane past the end of a tensor shows in no
result until it crashes. Here it shows at once.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from tolerances import DETERMINISM_RUNS
from torch import Tensor

from peftkern.backends.device import triton_interpreted

pytest.importorskip("triton")

from triton.runtime import interpreter

# Of a test module: its tests run in the interpreter or not at all.
INTERPRETED = [
    pytest.mark.skipif(not triton_interpreted(), reason="tests/gpu runs them compiled"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning:triton"),
    pytest.mark.filterwarnings("ignore::RuntimeWarning:triton"),  # NumPy's, of NaN and overflow
]
# The same, and Triton serves every op, at addresses that are checked.
INSIDE_TENSORS = [*INTERPRETED, pytest.mark.usefixtures("triton_inside_its_tensors")]
# How often a call is repeated for its bits: on one thread the interpreter has no order to change.
RUNS = [3, pytest.param(DETERMINISM_RUNS, marks=pytest.mark.long)]


def span(tensor: Tensor) -> tuple[int, int]:
    """First byte of a tensor, and the one behind its last."""
    if tensor.numel() == 0:
        return tensor.data_ptr(), tensor.data_ptr()
    last = sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True))
    return tensor.data_ptr(), tensor.data_ptr() + (last + 1) * tensor.element_size()


def outside(addresses: np.ndarray, spans: list[tuple[int, int]]) -> np.ndarray:
    """Those addresses that lie in none of the spans."""
    addresses = addresses.astype(np.int64)
    for first, end in spans:
        if not len(addresses):
            break
        addresses = addresses[(addresses < first) | (addresses >= end)]
    return addresses


@contextlib.contextmanager
def bounds_checked() -> Iterator[None]:
    """Inside, an access outside of the tensors that a launch was given is an AssertionError."""
    spans: list[tuple[int, int]] = []
    load = interpreter.InterpreterBuilder.create_masked_load
    store = interpreter.InterpreterBuilder.create_masked_store
    arguments = interpreter.GridExecutor._init_args_hst

    def checked_arguments(self, args, kwargs):
        found = arguments(self, args, kwargs)
        spans[:] = [span(arg) for arg in found[0] if isinstance(arg, torch.Tensor)]
        return found

    def check(ptrs, mask, what):
        taken = np.broadcast_to(mask.data.astype(bool), ptrs.data.shape)
        wrong = outside(ptrs.data[taken], spans)
        assert not len(wrong), f"{what} of {len(wrong)} addresses outside of every tensor"

    def checked_load(self, ptrs, mask, *rest):
        check(ptrs, mask, "load")
        return load(self, ptrs, mask, *rest)

    def checked_store(self, ptrs, value, mask, *rest):
        check(ptrs, mask, "store")
        return store(self, ptrs, value, mask, *rest)

    interpreter.InterpreterBuilder.create_masked_load = checked_load
    interpreter.InterpreterBuilder.create_masked_store = checked_store
    interpreter.GridExecutor._init_args_hst = checked_arguments
    try:
        yield
    finally:
        interpreter.InterpreterBuilder.create_masked_load = load
        interpreter.InterpreterBuilder.create_masked_store = store
        interpreter.GridExecutor._init_args_hst = arguments
