"""Patterns of a config and the names that they match, as PEFT matches them."""

from __future__ import annotations

import itertools

from peft.utils.other import get_pattern_key

from peftkern.formats.rank_patterns import pattern_key

NAMES = ["q", "a.q", "a.b.q_proj", "b.q_proj", "b.gate_up", "up", "layers.1.up", "layers.11.up"]
NAMES += ["aXq", "x.layers.1.up", "c.1", "c.d1"]
PATTERNS = ["q", "a.q", "^b.q_proj", r"a\.b\.q_proj", "_proj", "up", r"layers\.\d.up", "gate_up|q"]
PATTERNS += [r"layers.1\.up", ".*up", r"^layers\.1\.up", "q_proj", r"c.\d", r".\d1", "a.*", "1"]


def test_the_first_pattern_that_matches_is_the_one_of_peft():
    for first, second in itertools.permutations(PATTERNS, 2):
        for name in NAMES:
            ours, theirs = (
                pattern_key((first, second), name),
                get_pattern_key((first, second), name),
            )
            assert ours == theirs, (first, second, name)
