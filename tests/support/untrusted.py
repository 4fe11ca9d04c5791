"""Training steps of a patched layer in a process of its own, over a kernel with a fault.

python untrusted.py FAULT STEPS   -> JSON: losses, fallbacks, demoted, sides
"""

from __future__ import annotations

import faulthandler
import multiprocessing
import os
import signal
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from peft_models import K, lora_net, make_linear4bit

import peftkern
from peftkern.backends import contest, dispatch, trust

FORWARD, BACKWARD = "nf4_lora_linear_forward", "nf4_lora_linear_backward"
SECONDS = 0.1  # of a slow kernel: PEFT's call takes less, also where others keep it waiting


def fault(name: str) -> None:
    """Put a fault into the CPU's kernels of this process."""
    op = BACKWARD if name.startswith("backward") else FORWARD
    (candidate,) = (c for c in dispatch.CANDIDATES[op] if c.name == "cpu")
    run = candidate.run
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
        if name == "tail row":
            result[0][-1] += 1.0
        if name == "backward":
            result[1][-1] += 1.0  # dA, which every step wants
        if name == "call 100" and calls == 100:
            result[0][-1] += 1.0
        return result

    if name != "none":
        candidate.__dict__["run"] = faulty


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
        x = torch.randn(20, K, generator=generator).requires_grad_()  # as a trial asks for
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


class Child:
    """Steps in a forked child, which has imported everything: `report` once it has ended."""

    def __init__(
        self,
        folder: Path,
        fault_name: str,
        count: int = 6,
        rank: int | None = None,
        store: Path | None = None,
        **variables: str,
    ) -> None:
        context = multiprocessing.get_context("fork")
        self._out, out = context.Pipe(duplex=False)
        arguments = (
            out,
            {"PEFTKERN_CACHE": str(folder), **variables},
            fault_name,
            count,
            rank,
            store,
        )
        self.process = context.Process(target=_child, args=arguments)
        self.process.start()
        out.close()

    def report(self) -> dict[str, Any]:
        found = self._out.recv()
        self.process.join()
        return found


def _child(
    out: Any,
    variables: dict[str, str],
    fault_name: str,
    count: int,
    rank: int | None,
    store: Path | None,
) -> None:
    os.environ.update(variables)
    torch.set_num_threads(1)  # OpenMP's threads have not come along
    faulthandler.disable()  # pytest's, which few users have
    peftkern.reset_stats()
    trust.reset()
    fault(fault_name)
    with trust.use_mode("auto"):
        if fault_name == "call 100" or rank == 0:
            contest.SLOWER = float("inf")
        if rank is None:
            out.send(report(lambda: steps(count)))
            return
        where = {"init_method": f"file://{store}", "rank": rank, "world_size": 2}
        torch.distributed.init_process_group("gloo", **where)
        for turn in range(2):  # one after the other: the second finds the verdict of the first
            if turn == rank:
                out.send(report(lambda: steps(count)))
            torch.distributed.barrier()
        torch.distributed.destroy_process_group()
