"""Crossovers of a CPU: shipped by kind, and what was measured on the user's machine before them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from peftkern.backends import trust
from peftkern.backends.cpu import crossovers

CPU = torch.device("cpu")
AMX = ("GenuineIntel", "amx_bf16")


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("PEFTKERN_CACHE", str(tmp_path))
    trust.reset()
    yield tmp_path
    trust.reset()


def as_kind(monkeypatch: pytest.MonkeyPatch, maker: str, isa: str) -> None:
    monkeypatch.setattr(crossovers, "cpu_maker", lambda: maker)
    monkeypatch.setattr(crossovers.cpu, "cpu_isa", lambda: isa)


def test_row_of_the_kind_or_the_counted_sizes(monkeypatch):
    monkeypatch.setitem(crossovers.MEASURED, AMX, {"dense": 5, "dora": 6})
    as_kind(monkeypatch, *AMX)
    assert crossovers.effective() == ({"dense": 5, "dora": 6}, "measured for GenuineIntel amx_bf16")
    for kind in (("AuthenticAMD", "avx512_bf16"), ("GenuineIntel", "avx2"), ("unknown", "scalar")):
        as_kind(monkeypatch, *kind)
        sizes, source = crossovers.effective()
        assert sizes == crossovers.COUNTED and source == f"counted for {' '.join(kind)}"


def test_every_row_has_the_counted_names():
    assert {frozenset(row) for row in crossovers.MEASURED.values()} == {
        frozenset(crossovers.COUNTED)
    }


def test_measured_here_comes_first_and_is_read_once():
    with trust.use_mode("auto"):
        trust.ledger(CPU).cross("dense", 12345)
        trust.ledger(CPU).approve("a program")
    trust.reset()
    with trust.use_mode("readonly"):
        assert crossovers.crossover("dense") == 12345
        assert crossovers.crossover("dora") == crossovers.effective()[0]["dora"]
        assert "`peftkern tune` on this machine: dense" in crossovers.effective()[1]
        trust.ledger(CPU).crossovers["dense"] = 1
        assert crossovers.crossover("dense") == 12345
    trust.reset()
    assert crossovers.crossover("dense") != 12345  # "always" reads no verdict


def test_damaged_sizes_do_not_count():
    path = trust.ledger(CPU).path
    path.parent.mkdir()
    for crossed in ({"dense": "many"}, [1], None):
        path.write_text(json.dumps({"programs": {}, "classes": {}, "crossovers": crossed}))
        assert trust.crossovers(path) == {}


def test_block_puts_sizes_in_force():
    before = crossovers.crossover("dense")
    with crossovers.use(dense=0):
        assert crossovers.crossover("dense") == 0 and crossovers.crossover("dora") > 0
    assert crossovers.crossover("dense") == before
