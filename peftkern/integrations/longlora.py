"""LongLoRA's attention in a transformers model: sparse while it trains, full when it does not.

    enable_shifted_sparse_attention(model, group_size=2048)
    ...  # train on long sequences
    disable_shifted_sparse_attention(model)

It works on every model whose attention goes through transformers' AttentionInterface (Llama,
Mistral, Qwen2, ...). Nothing is replaced: the model's `attn_implementation` is set to one that this
module registers, and set back.
"""

from __future__ import annotations

import functools
from typing import Any

from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from peftkern.methods.longlora import shifted_sparse_attention

_PREFIX = "peftkern_shifted_sparse_"


def enable_shifted_sparse_attention(model: nn.Module, group_size: int) -> None:
    """Train with `shifted_sparse_attention`; evaluate, generate and prefill with full attention.

    Args: model, a transformers model or a PEFT model over one; group_size, an even number of tokens
        (the paper: a quarter of the length that is trained). Called again, it sets another size.
    Raises: ValueError on a wrong group size, or if the model's attention cannot be chosen.
    """
    if type(group_size) is not int or group_size < 2 or group_size % 2:
        raise ValueError(f"group_size: expected an even number of at least 2, got {group_size!r}")
    base = _transformers_model(model)
    name = f"{_PREFIX}{group_size}"
    AttentionInterface.register(name, functools.partial(_attention, group_size=group_size))
    AttentionMaskInterface.register(name, sdpa_mask)
    before = base.config._attn_implementation
    base.set_attn_implementation(name)
    if base.config._attn_implementation != name:
        raise ValueError(f"model: {type(base).__name__} does not let its attention be chosen")
    if not before.startswith(_PREFIX):
        base._peftkern_attention_before = before


def disable_shifted_sparse_attention(model: nn.Module) -> None:
    """Give the model the attention back that it had before `enable_shifted_sparse_attention`."""
    base = _transformers_model(model)
    before = base.__dict__.pop("_peftkern_attention_before", None)
    if before is not None:
        base.set_attn_implementation(before)


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    *,
    group_size: int,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """What transformers calls in every layer; [B, T, H, D] as it expects."""
    if not module.training or query.shape[2] != key.shape[2]:
        options = {"dropout": dropout, "scaling": scaling, "is_causal": is_causal}
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, **options, **kwargs
        )
    if is_causal is None:
        is_causal = getattr(module, "is_causal", True)
    y = shifted_sparse_attention(
        query,
        key,
        value,
        group_size,
        attention_mask=attention_mask,
        is_causal=is_causal and attention_mask is None,  # the mask says what is causal, too
        scale=scaling,
        dropout_p=dropout,
    )
    return y.transpose(1, 2).contiguous(), None


def _transformers_model(model: nn.Module) -> nn.Module:
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    if not hasattr(base, "set_attn_implementation"):
        raise ValueError(f"model: expected a transformers or PEFT model, got {type(model)}")
    return base
