"""The CUDA kernels in their emulation serve every op of these tests that asks for them."""

from __future__ import annotations

from collections.abc import Iterator
from types import ModuleType

import pytest

import peftkern


@pytest.fixture
def served_by_cuda(emulated_cuda: ModuleType) -> Iterator[None]:
    """Every op that a test calls has to run on the kernels under test, or be what they are held to.

    low_rank_svd is held to the CPU's, the others to the reference.
    """
    peftkern.reset_stats()
    yield
    assert {backend for _, backend in peftkern.stats().calls} <= {"cuda", "cpu", "reference"}
    peftkern.reset_stats()
