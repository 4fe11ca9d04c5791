"""Trust as the doctor tells it: verdicts of this machine, demotions, and the state of the cache."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from peftkern.backends import trust
from peftkern.backends.cpu import crossovers
from peftkern.formats.json_files import read_json


@dataclass(frozen=True)
class ClassVerdict:
    """Verdict on a class of layers or calls; ratio: the winner's worst, ours over the other's."""

    name: str
    side: str
    ratio: float | None
    why: str


@dataclass(frozen=True)
class Trusted:
    """Verdicts about one device. state: of the file, in words; None if all is well."""

    device: str
    file: str
    state: str | None
    right: int
    demoted: dict[str, str]
    classes: list[ClassVerdict]


@dataclass(frozen=True)
class Trust:
    """Trust on this machine. forgettable: files of verdicts in the folder, old ones among them."""

    mode: str
    folder: str
    forgettable: int
    crossovers: dict[str, int]
    crossovers_are: str
    devices: list[Trusted]


def look(devices: list[torch.device]) -> Trust:
    """Read the verdicts about these devices.

    Raises: ValueError if PEFTKERN_TRUST or PEFTKERN_CPU_ISA names nothing that there is.
    """
    sizes, source = crossovers.effective()
    return Trust(
        mode=trust.mode(),
        folder=str(trust.cache_folder() / "trust"),
        forgettable=len(trust.files()),
        crossovers=sizes,
        crossovers_are=source,
        devices=[_of(device) for device in devices],
    )


def _of(device: torch.device) -> Trusted:
    ledger = trust.ledger(device)
    demoted = {k: v for k, v in ledger.programs.items() if v != trust.RIGHT}
    classes = [
        ClassVerdict(name, verdict["side"], ratio_of(verdict), str(verdict.get("why") or ""))
        for name, verdict in ledger.classes.items()
    ]
    return Trusted(
        device=str(device),
        file=str(ledger.path),
        state=_state(ledger.path),
        right=len(ledger.programs) - len(demoted),
        demoted=demoted,
        classes=sorted(classes, key=lambda one: -(one.ratio or 0.0)),
    )


def ratio_of(verdict: dict[str, Any]) -> float | None:
    """Return the worst ratio of a verdict over passes and clocks; of back ends the winner's."""
    ratios = verdict.get("ratios")
    if not isinstance(ratios, dict):
        return None
    if verdict["side"] not in (trust.OURS, trust.PEER):  # a back end; the first has no ratio
        ratios = {"": ratios.get(verdict["side"], {})}
    found = [
        x for clocks in ratios.values() for x in clocks.values() if isinstance(x, (int, float))
    ]
    return max((x for x in found if math.isfinite(x)), default=None)


def _state(path: Path) -> str | None:
    """Return what is wrong with a file of verdicts, or with the folder that it would be in."""
    if path.exists():
        try:
            data = read_json(path)
            if not all(isinstance(data[name], dict) for name in ("programs", "classes")):
                raise ValueError("no verdicts")
        except (OSError, ValueError, LookupError, TypeError):
            return "damaged: nothing in it counts"
    folder = path.parent
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    if not os.access(folder, os.W_OK):
        return f"read-only: {folder} cannot be written, so that verdicts end with the process"
    return None
