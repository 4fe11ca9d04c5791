"""Which back end has to serve the tests on a GPU."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

import peftkern
from peftkern.backends.cuda.module import refusal_device


@pytest.fixture
def triton_serves() -> Iterator[None]:
    """No call of ours may go to the CPU's kernels by itself."""
    peftkern.reset_stats()
    yield
    assert [call for call in peftkern.stats().calls if call[1] == "cpu"] == []


@pytest.fixture
def cuda_serves() -> Iterator[None]:
    if reason := refusal_device(torch.device("cuda:0")):
        pytest.skip(reason)
    with peftkern.use_backend("cuda"):
        yield
