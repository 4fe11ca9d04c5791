"""Model, batches and loss of a Python file: `peftkern ranks FILE.py`."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

from torch import Tensor, nn

from peftkern.tools.checkpoints.checkpoint import CheckpointError

_NAME = "peftkern_ranks_program"  # of the module, which is not "__main__"


class Program(NamedTuple):
    """What a file defines; batches: None if there are none to learn from."""

    model: nn.Module
    batches: Any
    loss: Callable[[nn.Module, Any], Tensor] | None


def run_program(path: Path, *, learns: bool) -> Program:
    """Run a file and its model(), and batches() if ranks are to be learned from data.

    loss(model, batch) may be missing: then the model has to return its loss.

    Raises: CheckpointError for a file that does not define them; what its own code raises.
    """
    module = _imported(path)
    needed = ("model", "batches") if learns else ("model",)
    missing = [f"{name}()" for name in needed if not callable(getattr(module, name, None))]
    if missing:
        expected = " and ".join(f"{name}()" for name in needed)
        raise CheckpointError(f"{path}: expected functions {expected}, got no {missing[0]}")
    loss = getattr(module, "loss", None)
    if loss is not None and not callable(loss):
        raise CheckpointError(
            f"{path}: loss: expected a function of (model, batch), got {type(loss).__name__}"
        )
    model = module.model()
    if not isinstance(model, nn.Module):
        came = type(model).__name__
        raise CheckpointError(f"{path}: model(): expected a torch.nn.Module, got {came}")
    return Program(model, module.batches() if learns else None, loss)


def _imported(path: Path) -> ModuleType:
    """Import a file as Python runs it: what lies beside it can be imported, too."""
    if not path.is_file():
        what = "a folder" if path.is_dir() else "nothing"
        raise CheckpointError(f"{path}: expected a Python file, got {what}")
    spec = importlib.util.spec_from_file_location(_NAME, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[_NAME] = module  # where dataclasses and pickle look it up
    sys.path.insert(0, str(path.resolve().parent))
    spec.loader.exec_module(module)
    return module
