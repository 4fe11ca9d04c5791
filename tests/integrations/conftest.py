"""Models that are small enough for quick tests."""

from __future__ import annotations

import pytest


@pytest.fixture(autouse=True)
def take_small_layers(small_layers: None) -> None:
    """Patched dense layers compute small products too."""
