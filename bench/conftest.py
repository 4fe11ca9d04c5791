"""`pytest bench/ --benchmark-only` runs the same cases under pytest-benchmark."""

from __future__ import annotations

import pytest
import torch
from specs import CPU, Options

from peftkern.tools.bench.machine import rotation


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--size", type=int, default=4096, help="rows and columns of the weight")


@pytest.fixture(scope="session")
def options(request: pytest.FixtureRequest) -> Options:
    size = request.config.getoption("--size")
    return Options(n=size, k=size, rotate=min(rotation(None, CPU), 32 * size * size))


@pytest.fixture(autouse=True)
def no_gradients_left() -> None:
    torch.manual_seed(0)
