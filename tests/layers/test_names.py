"""Names of layers in what is told of many."""

from __future__ import annotations

import pytest

from peftkern.layers.names import shortened


@pytest.mark.parametrize(
    ("names", "separator", "said"),
    [
        ("", ", ", ""),
        ("a b", ", ", "a, b"),
        ("a b c", ", ", "a, b and 1 more"),
        ("a b c d", "; ", "a; b; and 2 more"),
    ],
)
def test_names_beyond_the_first_are_counted(names, separator, said):
    assert shortened(names.split(), 2, separator) == said
