"""Conversions of a checkpoint's weights that loading experts in 4 bits shares with saving them."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    Concatenate,
    MergeModulelist,
    PrefixChange,
    Transpose,
    WeightConverter,
)

from peftkern.integrations.frozen_experts import stop_serving
from peftkern.layers.expert_stack import stacks_of


def fuses_experts(converter: Any) -> bool:
    """Return whether a converter makes one parameter of a tensor per expert, each by itself."""
    if not isinstance(converter, WeightConverter) or len(converter.target_patterns) != 1:
        return False
    first, *others = converter.operations
    return (isinstance(first, MergeModulelist) and first.dim == 0) and all(
        (isinstance(op, Concatenate) and op.dim != 0)
        or (isinstance(op, Transpose) and 0 not in (op.dim0, op.dim1))
        for op in others
    )


def make_experts_dense(model: PreTrainedModel, dtype: torch.dtype | None) -> None:
    """Decode all stacks of experts, and let transformers run them again."""
    for module in model.modules():
        for name, stack in stacks_of(module).items():
            dense = stack.dequantize().to(dtype).contiguous()
            module._parameters[name] = nn.Parameter(dense, requires_grad=False)
    stop_serving(model)


def reversible(model: PreTrainedModel) -> list:
    """Return the conversions that saving is to undo, of those that loading does or would do."""
    found = getattr(model, "_weight_conversions", None)
    if found is None:  # made of a config: as transformers then does it
        mapping = get_model_conversion_mapping(model, add_legacy=False)
        found = [c for c in mapping if not isinstance(c, PrefixChange)]
    return [c for c in found if _is_reversible(c)]


def _is_reversible(converter: Any) -> bool:
    """Return whether saving is to undo what a converter has done.

    Not so where it would cut packed bytes into experts or turn them, or make dense weights of 4-bit
    ones.
    """
    operations = getattr(converter, "operations", ())
    turns = any("experts" in pattern for pattern in converter.target_patterns) and any(
        isinstance(op, Transpose) for op in operations
    )
    quantizes = any(hasattr(op, "hf_quantizer") for op in operations)
    return not (fuses_experts(converter) or turns or quantizes)
