"""Stacks of experts, parameters [E, m, n], of a model and of the file that it is saved in."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn
from transformers import PreTrainedModel

from peftkern.tools.adapters.extract_experts import Stack, find_stack
from peftkern.tools.checkpoints.architecture import by_target, find_loads
from peftkern.tools.checkpoints.checkpoint import Checkpoint, CheckpointError
from peftkern.tools.initialize.request import (
    DTYPES,
    ends_in,
    expert_shape,
    fits,
    parameter_names,
)


def stack_names(model: nn.Module, names: Sequence[str]) -> list[str]:
    """Return those of `names`, whole or ends, that parameters [E, m, n] have."""
    return [name for name in names if _stacks(model, [name])]


def stack_targets(model: nn.Module, names: Sequence[str]) -> list[str] | None:
    """Return target_parameters of the parameters [E, m, n] with these names; None without any."""
    return parameter_names(model, set(_stacks(model, names))) or None


def _stacks(model: nn.Module, names: Sequence[str]) -> list[str]:
    """Return the parameters [E, m, n] that have one of these names, whole or as an end."""
    found = (name for name, parameter in model.named_parameters() if parameter.dim() == 3)
    return [name for name in found if any(ends_in(name, one) for one in names)]


def find_stacks(
    checkpoint: Checkpoint, model: PreTrainedModel, names: Sequence[str]
) -> dict[str, Stack]:
    """Find the stacks with these names, and the tensors that they are made of.

    Args: model, `meta_model` of the checkpoint.
    Raises: CheckpointError for one that is not in the file, or not as matrices of floats.
    """
    if not names:
        return {}
    loads, stacks = by_target(find_loads(model, checkpoint)), {}
    for name in _stacks(model, names):
        parts = loads.get(name, [])
        stack = find_stack(model, name, parts) if parts else None
        dtypes = {load.info.dtype for load in parts}
        if stack is None or not dtypes <= {*DTYPES}:
            came = f"of {', '.join(sorted(dtypes))}" if dtypes else "that it does not hold"
            raise CheckpointError(
                f"{checkpoint.folder}: {name}: expected experts of {', '.join(DTYPES)} as "
                f"transformers saves them, got tensors {came}"
            )
        shape = expert_shape(model.get_submodule(stack.module), stack.parameter)
        if not fits(stack, checkpoint.tensors, shape):
            raise CheckpointError(
                f"{checkpoint.folder}: {name}: expected {shape[0]} experts {list(shape[1:])}, "
                f"got {len(parts)} tensors that are not them"
            )
        stacks[name] = stack
    return stacks
