"""Models that are small enough for quick tests."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch


@pytest.fixture(autouse=True)
def take_small_layers(small_layers: None) -> None:
    """Patched dense layers compute small products too."""


@pytest.fixture
def one_thread() -> None:
    """Products this small cost more to share out than to compute."""
    torch.set_num_threads(1)


@pytest.fixture
def form_the_product_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """As layers of real sizes do under DoRA; functional/test_dora.py tests the other way."""
    monkeypatch.setattr("peftkern.functional.dora._forms_again", lambda x, weights: True)


@pytest.fixture
def own_layers_registered() -> Iterator[None]:
    """The layers of own_layers.py are patched; what a test registers goes with it."""
    from own_layers import LoRALinear, Over, read, read_over

    import peftkern
    from peftkern.integrations.peft.own_layers import SWAPS

    before = dict(SWAPS)
    peftkern.register_layer(LoRALinear, read)
    peftkern.register_layer(Over, read=read_over)
    yield
    SWAPS.clear()
    SWAPS.update(before)
