"""Process in which layers are tried: `python -m peftkern.tools.tune.worker DEVICE PARENT`.

Commands come as JSON lines on standard input (`peftkern.tools.bench.worker.answer`):

    {"do": "start", "cases"}        -> {"names", "known", "crossovers", "folder"}
    {"do": "measure", "case", "again", "small"} -> {"class", "side", "why", "ratios", "rows"}
    {"do": "give_up", "case", "why"} -> the same: PEFT serves
    {"do": "panels", "name", "rows"} -> {"ratio"}
    {"do": "cross", "name", "size"} -> {}
    {"do": "demoted"}               -> {program: reason}

A layer is what a user has: PEFT's, patched, called until `integrations/peft/trial.py` has decided,
which keeps the verdict. The journal of a process that was ended in a first launch is read by the
next one when it starts.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import os
import sys
from collections.abc import Callable
from typing import Any

import torch

import peftkern
from peftkern.backends import trust
from peftkern.backends.cpu import crossovers
from peftkern.integrations.peft import fallback, serve, trial
from peftkern.tools.bench import peers
from peftkern.tools.bench.base_layers import linear
from peftkern.tools.bench.cases import DTYPES
from peftkern.tools.bench.timer import measure
from peftkern.tools.bench.worker import answer
from peftkern.tools.tune.cases import Case

# Of the products that `few_rows` is measured on: a weight of a model, in turn with others so that
# none is met in a core's own cache, and the time for both ways.
SIDE, COPIES, SECONDS = 2048, 4, 0.3


class Worker:
    """Implementation of the commands, one method each."""

    def __init__(self, device: str) -> None:
        self.device = torch.empty(0, device=device).device
        trial.keep_divided = True

    @property
    def ledger(self) -> trust.Ledger:
        return trust.ledger(self.device)

    def start(self, cases: list[dict]) -> dict:
        names = [name_of(Case(**case), self.device) for case in cases]
        return {
            "names": names,
            "known": {name: v for name, v in self.ledger.classes.items() if name in names},
            "crossovers": self.ledger.crossovers,
        }

    def demoted(self) -> dict:
        return {k: v for k, v in self.ledger.programs.items() if v != trust.RIGHT}

    def cross(self, name: str, size: int) -> dict:
        self.ledger.cross(name, size)
        return {}

    def panels(self, name: str, rows: int) -> dict:
        """Time NF4 products of so many rows both ways: panels over the path of few rows."""
        dtype = torch.float32 if name.endswith("fp32") else torch.bfloat16
        weights = [peftkern.quantize_nf4(torch.randn(SIDE, SIDE)) for _ in range(COPIES)]
        x = torch.randn(rows, SIDE, dtype=dtype, requires_grad="backward" in name)
        outputs = [peftkern.nf4_linear(x, weight) for weight in weights]

        def call(i: int) -> None:
            if x.requires_grad:
                torch.autograd.grad(outputs[i % COPIES], x, x, retain_graph=True)
            else:
                peftkern.nf4_linear(x, weights[i % COPIES])

        def forced(most: int) -> Callable[[int], None]:
            def run(i: int) -> None:
                with crossovers.use(**{name: most}):
                    call(i)

            return run

        with trust.use_mode("always"), peftkern.use_backend("cpu"):
            found = measure({"panels": forced(0), "few": forced(rows)}, seconds=SECONDS)
        return {"ratio": found["panels"].median / found["few"].median}

    def give_up(self, case: dict, why: str) -> dict:
        name = name_of(Case(**case), self.device)
        return {"class": name, **self.ledger.decide(name, {"side": trust.PEER, "why": why})}

    def measure(self, case: dict, again: bool, small: bool) -> dict:
        """Call a layer until its class is decided. small: whatever its size."""
        case = Case(**case)
        name = name_of(case, self.device)
        if again:
            self.ledger.classes.pop(name, None)
        layer, x = build(case, case.N, case.K, case.rows, self.device)
        sizes = dict.fromkeys(crossovers.COUNTED, 0) if small else {}
        with crossovers.use(**sizes), _autocast(case, self.device):
            for _ in range(2 + trial.ATTEMPTS):
                peftkern.reset_stats()
                layer(x)
                if name in self.ledger.classes:
                    return {"class": name, **self.ledger.classes[name]}
        reasons = [why for (op, why) in peftkern.stats().fallbacks if op == layer.op]
        why = "; ".join(reasons) or "it was not tried"
        return {"class": name, "side": trust.PEER, "why": why}


def name_of(case: Case, device: torch.device) -> str:
    """Return the class that the layer of a case belongs to, without building it."""
    small = dataclasses.replace(case, label="", N=64, K=64, rows=1)
    op, kind, _, _, *rest = _key(small, device)
    rows = case.rows.bit_length()
    return trial.name_of((op, kind, case.N, case.K, *rest, rows, device))


@functools.cache
def _key(case: Case, device: torch.device) -> tuple:
    """Return the key by which a layer of other sizes would be tried."""
    layer, x = build(case, case.N, case.K, case.rows, device)
    names, cast = fallback.active_names(layer), torch.bfloat16 if case.autocast else None
    dtype = getattr(torch, DTYPES[case.dtype])
    return serve.trial_key(layer, x, names, serve.read_state(layer, names, x.device), dtype, cast)


def build(case: Case, N: int, K: int, rows: int, device: torch.device) -> tuple[Any, torch.Tensor]:
    """Build a case's layer with random weights, patched, and its input."""
    dtype = getattr(torch, DTYPES[case.dtype])
    generator = torch.Generator(device).manual_seed(0)
    weight = torch.randn(N, K, device=device, dtype=dtype, generator=generator) * K**-0.5
    base = peers.nf4_linear(weight) if case.base == "nf4" else linear(weight)
    (layer,) = peers.lora_pool(
        base,
        1,
        r=case.r,
        patched=True,
        train=True,
        adapter_dtype=getattr(torch, DTYPES[case.adapter_dtype]),
        use_dora=case.dora,
    )
    x = torch.randn(rows, K, device=device, dtype=dtype, generator=generator)
    return layer, x.requires_grad_()


def _autocast(case: Case, device: torch.device) -> contextlib.AbstractContextManager:
    if not case.autocast:
        return contextlib.nullcontext()
    return torch.autocast(device.type, torch.bfloat16)


if __name__ == "__main__":
    os.environ["PEFTKERN_TRUST"] = "auto"
    answer(Worker(sys.argv[1]), int(sys.argv[2]))
