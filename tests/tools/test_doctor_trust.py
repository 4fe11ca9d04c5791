"""Trust in `peftkern doctor`: verdicts, demotions, the state of the cache, forgetting them."""

from __future__ import annotations

import importlib
import os
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from command_line import told, told_json
from rich.console import Console

from peftkern.backends import trust
from peftkern.tools.doctor import findings, trusted

CPU = torch.device("cpu")
cli = importlib.import_module("peftkern.cli.doctor")  # whose name the command has in peftkern.cli
RATIOS = {"forward": {"wall": 0.5}, "training": {"wall": 0.75}}


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("PEFTKERN_CACHE", str(tmp_path / "cache"))
    trust.reset()
    with trust.use_mode("auto"):
        yield tmp_path / "cache" / "trust"
    trust.reset()


@pytest.fixture
def ledger() -> trust.Ledger:
    """Verdicts as trainings leave them."""
    found = trust.ledger(CPU)
    found.approve("op a on cpu")
    found.approve("op b on cpu")
    with pytest.warns(trust.Distrusted):
        found.demote("op c on cpu", "wrong at call 10: y is off")
    found.decide("class one", {"side": trust.OURS, "why": "", "ratios": RATIOS, "rows": 8})
    slow = {"forward": {"wall": 1.5}}
    found.decide("class two", {"side": trust.PEER, "why": "forward is slow", "ratios": slow})
    found.decide("op a", {"side": "torch", "ratios": {"cuda": {"host": 2.0, "device": 3.0}}})
    return found


def shown(look: trusted.Trust) -> str:
    console = Console(width=200, highlight=False, markup=False)
    with console.capture() as printed:
        cli._print_trust(asdict(look), console)
    return printed.get()


def test_verdicts_and_demotions_are_told(ledger, folder):
    look = trusted.look([CPU])
    (cpu,) = look.devices
    assert (look.mode, look.folder, look.forgettable) == ("auto", str(folder), 1)
    assert (cpu.right, cpu.state) == (2, None)
    assert cpu.demoted == {"op c on cpu": "wrong at call 10: y is off"}
    assert [(c.name, c.side, c.ratio) for c in cpu.classes] == [
        ("class two", "PEFT", 1.5),
        ("class one", "peftkern", 0.75),
        ("op a", "torch", None),
    ]
    (finding,) = findings.trust_findings(look)
    assert (finding.severity, "--forget" in finding.cure) == ("note", True)
    assert finding.cause == "op c on cpu is demoted on cpu: wrong at call 10: y is off"
    lines = [" ".join(line.split()) for line in shown(look).splitlines()]
    assert "right 2" in lines and "class two PEFT 1.50 forward is slow" in lines
    assert "demoted op c on cpu: wrong at call 10: y is off" in lines


def test_many_classes_are_the_worst_ones(ledger):
    for number in range(20):
        ratios = {"forward": {"wall": 2.0 + number}}
        ledger.decide(f"many {number}", {"side": trust.PEER, "why": "slow", "ratios": ratios})
    text = shown(trusted.look([CPU]))
    assert "the worst; --json has 11 more" in text
    assert "many 19" in text and "many 8" in text and "many 7 " not in text


def test_damaged_and_read_only_caches_are_told(ledger, folder, monkeypatch):
    ledger.path.write_text("{")
    trust.reset()
    look = trusted.look([CPU])
    assert look.devices[0].state == "damaged: nothing in it counts" in shown(look)
    (finding,) = findings.trust_findings(look)
    assert finding.severity == "note" and "damaged" in finding.cause
    ledger.path.unlink()
    monkeypatch.setattr(os, "access", lambda *of: False)  # root may write anywhere
    look = trusted.look([CPU])
    (finding,) = findings.trust_findings(look)
    assert "read-only" in finding.cause and "PEFTKERN_CACHE" in finding.cure
    assert "read-only" in shown(look)


def test_nothing_measured_is_no_finding(folder):
    look = trusted.look([CPU])
    assert list(findings.trust_findings(look)) == [] and look.forgettable == 0
    assert ["right", "0"] in [line.split() for line in shown(look).splitlines()]
    assert list(findings.trust_findings(None)) == [] and not folder.exists()


def test_forget_says_what_it_removed(ledger, folder, capfd):
    (folder / "cpu-0.first-launch-1-0").write_text("mark")
    removed = {"files": 1, "programs": 3, "classes": 3, "folder": str(folder)}
    assert told_json(capfd, "doctor", "--forget") == removed
    assert list(folder.iterdir()) == [] and trust.ledger(CPU).programs == {}
    said = "removed 0 files of verdicts on 0 programs and 0 classes from"
    assert told(capfd, "doctor", "--forget").startswith(said)


def test_unknown_mode_is_wrong(monkeypatch):
    def unknown() -> str:
        raise ValueError("PEFTKERN_TRUST: expected one of ('auto',), got 'maybe'")

    monkeypatch.setattr(trust, "mode", unknown)
    (finding,) = (f for f in findings.environment_findings() if "PEFTKERN_TRUST" in f.cause)
    assert finding.severity == "wrong"
    assert finding.cure == "unset PEFTKERN_TRUST, or give it one of these"
