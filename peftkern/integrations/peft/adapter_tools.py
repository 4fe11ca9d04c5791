"""PEFT's `add_weighted_adapter` and `convert_to_lora` on live models, by exact low-rank algebra.

    add_weighted_adapter(model, ["one", "two"], [0.7, 0.3], "both", combination_type="svd")
    config, state_dict = convert_to_lora(model, rank=16)

Both take PEFT's arguments, and models that are patched or not. What differs is what PEFT gets
wrong or forms densely for no reason; each docstring lists it.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from peft import PeftModel
from peft.tuners.lora import LoraConfig, LoraLayer, LoraModel
from peft.utils import ModulesToSaveWrapper
from torch import Tensor, nn

from peftkern.functional.low_rank_svd import LoraFactors
from peftkern.methods.low_rank_algebra import best_pair, concatenate, truncate
from peftkern.methods.rank_rules import RankRule
from peftkern.methods.sparse_sums import METHODS, SIGNS, sparse_sum

__all__ = ["add_weighted_adapter"]

EXACT = ("svd", "cat", "linear")
COMBINATIONS = (*EXACT, *METHODS, *(f"{method}_svd" for method in METHODS))


class Term(NamedTuple):
    """Part of one adapter in a layer's sum: weight * scaling * lora_B @ lora_A, lora_B's bias."""

    lora_B: Tensor
    lora_A: Tensor
    scaling: float
    weight: float
    bias: Tensor | None


@torch.no_grad()
def add_weighted_adapter(
    model: PeftModel | LoraModel,
    adapters: Sequence[str],
    weights: Sequence[float],
    adapter_name: str,
    combination_type: str = "svd",
    svd_rank: int | None = None,
    svd_clamp: float | None = None,
    svd_full_matrices: bool = True,
    svd_driver: str | None = None,
    density: float | None = None,
    majority_sign_method: str = "total",
) -> None:
    """Add an adapter that is a weighted sum of adapters of a live PEFT model, as PEFT's does.

    svd: the sum, cut to svd_rank (default: the largest rank of the adapters). cat: the exact sum,
    of the sum of all ranks. ties, dare_linear, dare_ties and magnitude_prune: `sparse_sum` of the
    updates, cut like svd. Like PEFT's, the new adapter has a scaling of 1, lora_A with orthonormal
    rows (but of cat), is frozen, not active, and an adapter of that name is left as it is.

    Where PEFT is right the result is the same up to rounding and the signs of singular vectors, and
    up to DARE's random choices, which are the next of torch's generator. It differs otherwise:

    - rslora: PEFT's update is sqrt(rank) too large, as the new config keeps use_rslora.
    - linear, ties, dare_*, magnitude_prune: PEFT sums or sparsifies A and B apart, and the product
      has terms across adapters; here they are svd and the *_svd types.
    - DoRA, other variants than plain LoRA, and token rows (trainable_token_indices) are refused;
      PEFT leaves them out.
    - lora_bias: biases are summed; PEFT leaves zeros.
    - One adapter: combination_type and svd_rank hold; PEFT takes linear.
    - A rank above min(m, n) is filled up with zeros; PEFT fails.
    - layers_to_transform and exclude_modules of the first adapter do not drop layers of others.
    - modules_to_save in one of the adapters: the new one has its values; PEFT's has the base's.
    - PiSSA and other initializations that change the base do not run again.
    - Only the new adapter is frozen, not each whose name its name is a part of.
    - Any ranks go together; svd_full_matrices and svd_driver have no effect, as no m x n matrix is
      formed but for ties, dare_* and magnitude_prune. Weights that are not one for each adapter and
      a missing density are ValueErrors.

    Raises: ValueError naming the argument or the layer, also for what PEFT refuses: unknown names,
        target_parameters, modules_to_save in several. The model is as before then,
        as after any other error.
    """
    tuner = model.base_model if isinstance(model, PeftModel) else model
    if adapter_name in tuner.peft_config:
        return
    adapters, weights = list(adapters), [float(weight) for weight in weights]
    _check_request(tuner, adapters, weights, combination_type, density, majority_sign_method)
    *_, targets = tuner._check_add_weighted_adapter(adapters, "cat", svd_rank)
    configs = [tuner.peft_config[name] for name in adapters]
    ranks = [max(config.r, *(config.rank_pattern or {}).values(), 1) for config in configs]
    rank = sum(ranks) if combination_type == "cat" else svd_rank or max(ranks)
    layers = {n: m for n, m in tuner.model.named_modules() if isinstance(m, LoraLayer)}
    terms = {name: _terms(name, layer, adapters, weights) for name, layer in layers.items()}
    terms = {name: found for name, found in terms.items() if found}
    if combination_type in EXACT:
        factors = _exact(terms, None if combination_type == "cat" else rank)
    else:
        method = combination_type.removesuffix("_svd")
        factors = _sparse(terms, method, rank, density, majority_sign_method)
    if svd_clamp is not None and combination_type != "cat":
        factors = {name: _clamped(pair, svd_clamp) for name, pair in factors.items()}
    if any(config.layers_to_transform or config.exclude_modules for config in configs):
        targets = set(terms)
    active = tuner.active_adapter
    try:
        _inject(tuner, configs, adapter_name, rank, targets)
        for name, layer in layers.items():
            _write(layer, adapter_name, factors.get(name), terms.get(name, ()))
        _copy_saved_modules(tuner.model, adapters, adapter_name)
    except BaseException:
        if adapter_name in tuner.peft_config:
            tuner.delete_adapter(adapter_name)
        tuner.active_adapter = active  # of which PEFT makes a list
        raise


def _check_request(
    tuner: LoraModel,
    adapters: list[str],
    weights: list[float],
    combination_type: str,
    density: float | None,
    signs: str,
) -> None:
    if combination_type not in COMBINATIONS:
        raise ValueError(
            f"combination_type: expected one of {', '.join(COMBINATIONS)}, got {combination_type!r}"
        )
    if len(weights) != len(adapters):
        raise ValueError(f"weights: expected {len(adapters)}, got {len(weights)}")
    for name in adapters:
        if getattr(tuner.peft_config.get(name), "trainable_token_indices", None):
            raise ValueError(f"{name}: token rows replace those of the base and have no sum")
    if combination_type not in EXACT and (density is None or not 0 < density <= 1):
        raise ValueError(f"density: expected a number in (0, 1], got {density}")
    if signs not in SIGNS:
        raise ValueError(f"majority_sign_method: expected one of {', '.join(SIGNS)}, got {signs!r}")


def _terms(
    name: str, layer: LoraLayer, adapters: Sequence[str], weights: Sequence[float]
) -> list[Term]:
    """Return the updates of a layer, flattened to matrices as PEFT keeps the factors.

    Raises: ValueError naming the layer for what is not scaling * B A.
    """
    found = []
    for adapter, weight in zip(adapters, weights, strict=True):
        pair = factors_of(layer, adapter)
        if pair is None:
            continue
        if adapter in layer.lora_variant:
            kind = type(layer.lora_variant[adapter]).__name__
            raise ValueError(
                f"{name}: adapter {adapter!r} is more than scaling * B A ({kind}); such adapters"
                " have no weighted sum"
            )
        if pair[0].shape[1] != pair[1].shape[0]:
            raise ValueError(f"{name}: a grouped convolution, whose update is not B A")
        scaling = layer.scaling[adapter]
        bias = getattr(layer.lora_B[adapter], "bias", None) if adapter in layer.lora_B else None
        lora_B, lora_A = (factor.detach().flatten(1) for factor in pair)
        found.append(Term(lora_B, lora_A, scaling, weight, bias))
    return found


def factors_of(layer: LoraLayer, adapter: str) -> tuple[nn.Parameter, nn.Parameter] | None:
    """Return lora_B and lora_A of an adapter of a layer, None if it has none."""
    if adapter in layer.lora_A:
        return layer.lora_B[adapter].weight, layer.lora_A[adapter].weight
    if adapter in layer.lora_embedding_A:
        return layer.lora_embedding_B[adapter], layer.lora_embedding_A[adapter]
    return None


Factors = dict[str, LoraFactors]


def _exact(terms: dict[str, list[Term]], rank: int | None) -> Factors:
    """Return the sum of each layer's terms, cut to a rank if there is one."""
    sums = {
        name: concatenate([(t.lora_B, t.lora_A, t.weight * t.scaling) for t in found])
        for name, found in terms.items()
    }
    if rank is None:
        return sums
    by_device: dict[torch.device, list[str]] = {}
    for name, pair in sums.items():
        by_device.setdefault(pair.lora_B.device, []).append(name)
    found: Factors = {}
    for names in by_device.values():
        lora_B, lora_A = zip(*(sums[name] for name in names), strict=True)
        rule = RankRule("rank", rank)
        cut, _ = truncate(lora_B, lora_A, [1.0] * len(names), rule, names=names)
        found |= zip(names, map(singular_form, cut), strict=True)
    return found


def _sparse(
    terms: dict[str, list[Term]], method: str, rank: int, density: float, signs: str
) -> Factors:
    """Return the sum of each layer's sparsified terms, cut to a rank, one dense layer at a time."""
    found = {}
    for name, of_layer in terms.items():
        updates = [functools.partial(_dense, term) for term in of_layer]
        weights = [term.weight for term in of_layer]
        total = sparse_sum(method, updates, weights, density, signs=signs)
        found[name] = singular_form(best_pair(total, rank)[0])
    return found


def _dense(term: Term) -> Tensor:
    return (term.lora_B.float() @ term.lora_A.float()).mul_(term.scaling)


def singular_form(pair: LoraFactors) -> LoraFactors:
    """Return U S and Vh of U sqrt(S) and sqrt(S) Vh."""
    root = pair.lora_A.norm(dim=1)
    return LoraFactors(pair.lora_B * root, pair.lora_A / torch.where(root > 0, root, 1.0)[:, None])


def _clamped(pair: LoraFactors, quantile: float) -> LoraFactors:
    """Clamp both factors to +- a quantile of all their elements, as kohya's svd_merge_lora does."""
    high = torch.quantile(torch.cat([pair.lora_B.flatten(), pair.lora_A.flatten()]), quantile)
    return LoraFactors(pair.lora_B.clamp(-high, high), pair.lora_A.clamp(-high, high))


def _inject(
    tuner: LoraModel, configs: Sequence[LoraConfig], name: str, rank: int, targets: str | set[str]
) -> None:
    """Add an adapter of a scaling of 1 to the model."""
    saved = {module for config in configs for module in config.modules_to_save or ()}
    tuner.peft_config[name] = replace(
        configs[0],
        **{"r": rank, "lora_alpha": rank, "rank_pattern": {}, "alpha_pattern": {}},
        **{"use_rslora": False, "init_lora_weights": True},
        **{"layers_to_transform": None, "layers_pattern": None, "exclude_modules": None},
        target_modules=targets,
        lora_bias=any(config.lora_bias for config in configs),
        modules_to_save=sorted(saved) or None,
    )
    tuner.inject_adapter(tuner.model, name)


def _write(layer: LoraLayer, name: str, pair: LoraFactors | None, terms: Sequence[Term]) -> None:
    """Put a layer's factors into the new adapter, filled up with zeros, and freeze it."""
    parameters = factors_of(layer, name)
    if parameters is None:
        if pair is not None:
            raise RuntimeError(f"{name}: PEFT added no adapter to a layer that has one of the sum")
        return
    for parameter, factor in zip(parameters, pair or (None, None), strict=True):
        filled = torch.zeros_like(parameter, dtype=terms[0].lora_A.dtype if terms else None)
        if factor is not None:
            rows, columns = factor.shape
            filled.flatten(1)[:rows, :columns] = factor
        parameter.data = filled
        parameter.requires_grad_(False)
    bias = layer.lora_B[name].bias if name in layer.lora_B else None
    if bias is not None:
        bias.zero_().requires_grad_(False)
        for term in terms:
            if term.bias is not None:
                bias.add_(term.bias, alpha=term.weight * term.scaling)


def _copy_saved_modules(model: nn.Module, adapters: Sequence[str], name: str) -> None:
    """Copy what modules_to_save of the only adapter that has a module holds, to the new one."""
    for module in model.modules():
        if isinstance(module, ModulesToSaveWrapper) and name in module.modules_to_save:
            module.modules_to_save[name].requires_grad_(False)
            for adapter in adapters:
                if adapter in module.modules_to_save:
                    held = module.modules_to_save[adapter].state_dict()
                    module.modules_to_save[name].load_state_dict(held)
