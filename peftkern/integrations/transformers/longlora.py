"""LongLoRA's attention in a transformers model: sparse while it trains, full when it does not.

    enable_shifted_sparse_attention(model, group_size=2048)
    ...  # train on long sequences
    disable_shifted_sparse_attention(model)

It works on every model whose attention goes through transformers' AttentionInterface (Llama,
Mistral, Qwen2, ...). Nothing is replaced: the model's `attn_implementation` is set to one that this
module registers, and set back. Causal self-attention becomes sparse; encoders, vision towers and
cross-attention stay full. Attention that is more than a softmax of products (a position bias as in
T5, a soft cap as in Gemma 2, sinks as in GPT-OSS) raises ValueError when it is called.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from peftkern.methods.longlora import shifted_sparse_attention

__all__ = ["disable_shifted_sparse_attention", "enable_shifted_sparse_attention"]
_PREFIX = "peftkern_shifted_sparse_"
_UNSUPPORTED = ("position_bias", "s_aux", "softcap")  # what changes the weights of an attention


def enable_shifted_sparse_attention(model: nn.Module, group_size: int) -> None:
    """Train with `shifted_sparse_attention`; evaluate, generate and prefill with full attention.

    Args: model, a transformers model or a PEFT model over one; group_size, an even number of tokens
        (the paper: a quarter of the length that is trained). Called again, it sets another size.
    Raises: ValueError on a wrong group size, or if the model's attention cannot be chosen or none
        of it is causal; the model is then as it was.
    """
    if type(group_size) is not int or group_size < 2 or group_size % 2:
        raise ValueError(f"group_size: expected an even number of at least 2, got {group_size!r}")
    base = _transformers_model(model)
    kind = type(base).__name__
    name = f"{_PREFIX}{group_size}"
    AttentionInterface.register(name, functools.partial(_attention, group_size=group_size))
    AttentionMaskInterface.register(name, sdpa_mask)
    before = [(config, config._attn_implementation) for config in _configs(base)]
    try:
        base.set_attn_implementation(name)
        for config in (base.config, base.config.get_text_config()):
            if config._attn_implementation != name:
                raise ValueError(f"model: {kind} does not let its attention be chosen")
        if not any(getattr(module, "is_causal", False) for module in base.modules()):
            raise ValueError(f"model: expected causal attention, which {kind} has none of")
    except Exception:
        _restore(before)
        raise
    base.__dict__.setdefault("_peftkern_attention_before", before)


def disable_shifted_sparse_attention(model: nn.Module) -> None:
    """Give the model the attention back that it had before `enable_shifted_sparse_attention`."""
    _restore(_transformers_model(model).__dict__.pop("_peftkern_attention_before", []))


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
    """Compute attention as transformers calls it in every layer: [B, T, H, D]."""
    for name in _UNSUPPORTED:
        if kwargs.get(name) is not None:
            raise ValueError(
                f"{name}: expected None, got {type(kwargs[name]).__name__} from "
                f"{type(module).__name__}; shifted sparse attention is for models without it"
            )
    # Without a mask an encoder's attention, or cross-attention, is called as a decoder's is: only
    # the module tells them apart.
    causal = getattr(module, "is_causal", False) and is_causal is not False
    if not (module.training and causal and query.shape[2] == key.shape[2]):
        options = {"dropout": dropout, "scaling": scaling, "is_causal": is_causal}
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, **options, **kwargs
        )
    y = shifted_sparse_attention(
        query,
        key,
        value,
        group_size,
        attention_mask=attention_mask,
        is_causal=attention_mask is None,  # the mask says what is causal, too
        scale=scaling,
        dropout_p=dropout,
    )
    return y.transpose(1, 2).contiguous(), None


def _configs(base: nn.Module) -> Iterator[Any]:
    """Yield the configurations of a model and of all its parts, each once, the whole first."""
    waiting = [m.config for m in base.modules() if hasattr(m, "set_attn_implementation")]
    seen: set[int] = set()
    while waiting:
        config = waiting.pop(0)
        if config is not None and id(config) not in seen:
            seen.add(id(config))
            yield config
            waiting += [getattr(config, name, None) for name in config.sub_configs]


def _restore(before: list[tuple[Any, str | None]]) -> None:
    for config, implementation in before:  # set in its parts, too, which come after it
        config._attn_implementation = implementation


def _transformers_model(model: nn.Module) -> nn.Module:
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    if not hasattr(base, "set_attn_implementation"):
        raise ValueError(f"model: expected a transformers or PEFT model, got {type(model)}")
    return base
