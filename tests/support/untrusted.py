"""Training steps of a patched layer in a process of its own, over a kernel with a fault.

python untrusted.py FAULT STEPS   -> JSON: losses, fallbacks, demoted, sides
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
import warnings
from collections.abc import Callable
from typing import Any

import torch
from peft_models import K, lora_net, make_linear4bit

import peftkern
from peftkern.backends import contest, trust
from peftkern.backends.cpu import nf4_lora_linear as family

FORWARD, BACKWARD = "nf4_lora_linear_forward", "nf4_lora_linear_backward"
SECONDS = 0.02


def fault(name: str) -> None:
    """Put a fault into the CPU's kernels, before dispatch has asked for them."""
    op = BACKWARD if name.startswith("backward") else FORWARD
    run = getattr(family, op)
    calls = 0

    def faulty(*args: Any) -> Any:
        nonlocal calls
        calls += 1
        if name == "raises":
            raise RuntimeError("no such instruction\nand more")
        if name == "no memory":
            raise torch.OutOfMemoryError("out of memory")
        if name == "crashes":
            os.kill(os.getpid(), signal.SIGSEGV)
        if name == "hangs":
            time.sleep(1e4)
        if name == "slow":
            time.sleep(SECONDS)
        result = run(*args)
        if name in ("tail row", "backward"):
            result[0][-1] += 1.0
        if name == "call 100" and calls == 100:
            result[0][-1] += 1.0
        return result

    if name != "none":
        setattr(family, op, faulty)


def steps(count: int, patched: bool = True, dropout: float = 0.0) -> list[float]:
    """Return the losses of some steps of gradient descent."""
    model = lora_net(make_linear4bit(), lora_dropout=dropout).train()
    if patched:
        peftkern.patch(model)
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(parameters, lr=0.05)
    generator = torch.Generator().manual_seed(3)
    losses = []
    for _ in range(count):
        x = torch.randn(20, K, generator=generator)
        loss = model(x).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def report(run: Callable[[], list[float]]) -> dict[str, Any]:
    """Run, and describe what trust made of it."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        losses = run()
    ledger = trust.ledger(torch.device("cpu"))
    return {
        "losses": losses,
        "fallbacks": [reason for _, reason in peftkern.stats().fallbacks],
        "calls": [f"{op} {name}" for op, name in peftkern.stats().calls],
        "demoted": {k: v for k, v in ledger.programs.items() if v != trust.RIGHT},
        "sides": {name: verdict["side"] for name, verdict in ledger.classes.items()},
        "warned": [str(w.message) for w in caught if w.category is trust.Distrusted],
    }


if __name__ == "__main__":
    fault(sys.argv[1])
    if "ours wins" in sys.argv:
        contest.SLOWER = float("inf")
    print(json.dumps(report(lambda: steps(int(sys.argv[2])))))
