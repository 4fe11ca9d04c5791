"""`peftkern.suggest_ranks`: the rank of each layer of a LoRA adapter, before it is trained."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from copy import copy
from typing import Any

import torch
from peft import LoraConfig, PeftModel
from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
from peft.utils.constants import DUMMY_TARGET_MODULES
from torch import Tensor, nn

from peftkern.functional.arguments import mismatch
from peftkern.functional.panels import full_float32
from peftkern.functional.truncated_svd import check_options
from peftkern.integrations.peft.init_data import NO_GRADIENT, DataRuns, counted_rows
from peftkern.integrations.peft.init_layers import Layer, find_layers
from peftkern.integrations.peft.initialize import listed_batches, with_adapters
from peftkern.integrations.peft.rank_report import RankReport, ranked_config
from peftkern.integrations.peft.rank_stacks import find_stacks, finite, names_of, stack_spectra
from peftkern.layers.quantize import with_progress
from peftkern.methods.rank_choice import (
    SOURCES,
    LayerSpectrum,
    LoraBudget,
    choose_layer_ranks,
    gora_importance,
    input_spectrum,
    matrix_spectra,
)

__all__ = ["suggest_ranks"]

_ADAPTER = "default"
_FRESH = {  # fields of the adapter that only shows which layers are targets
    "r": 1,
    "bias": "none",
    "init_lora_weights": True,
    "modules_to_save": None,
    "target_parameters": None,
    "trainable_token_indices": None,
    "use_dora": False,
}


def suggest_ranks(
    model: nn.Module,
    lora_config: LoraConfig,
    by: str = "weights",
    *,
    budget: float | None = None,
    cost: str | Mapping[str, float] = "rank",
    min_rank: int = 1,
    max_rank: int | None = None,
    relative: bool | None = None,
    batches: Iterable[Any] | None = None,
    loss: Callable[[nn.Module, Any], Tensor] | None = None,
    tol: float = 1e-3,
    certify: bool = True,
    seed: int = 0,
    statistics_bytes: int = 4 << 30,
) -> RankReport:
    """Choose the rank of each layer of a LoRA adapter, within the budget of LoRA of one rank.

        report = peftkern.suggest_ranks(base, LoraConfig(r=16, ...), "gradients", batches=batches)
        model = get_peft_model(base, report.config)      # print(report.python()) to paste it

    The model is as it was afterwards. What a rank is worth, by "weights" (singular values of the
    weight, dense or NF4, in panels: memory of one layer), "activations" (the variance of the inputs
    that it explains, as in EVA), "gradients" (singular values of the weight's gradient) or "gora"
    (mean |weight * gradient|), stands in `peftkern.methods.rank_choice`; `allocate_rank` then gives
    the budget to the ranks that are worth most for what they cost. All experts of a parameter that
    target_parameters names have one rank (PEFT can say no more), worth the sum over them; their
    inputs are the rows that are routed to each. Layers that the batches do not reach get
    `min_rank`; the report names them: `report.unreached`.

    The config works with `initialize_` as it is: "pissa", "olora" and "lora_ga" start layers of
    any rank; for "eva" add eva_config=EvaConfig(rho=1), which keeps the ranks.

    Args:
        model: a plain one, before `get_peft_model`; loaded in 4 bits, if it is to be.
        lora_config: r is the rank whose cost is not exceeded; the targets, the scaling and the rest
            stay as they are.
        by: "weights"; or from batches "activations", "gradients", "gora".
        budget: what all layers may cost together, instead of r of each, in units of `cost`.
        cost: of one rank of a layer, as `allocate_rank` names them: "rank", each costs 1;
            "parameters", m + n, of each expert; "bytes", "flops"; or {layer: number}.
        min_rank: that every layer gets; with 0 layers may drop out of target_modules.
        max_rank: that no layer exceeds, by default 2 r, as in EVA.
        relative: whether singular values count as shares of their layer's, by default those of
            weights and inputs, but not of gradients.
        batches: a few, which are run once or more; each is given to the model as keywords if it is
            a mapping, as positions if it is a tuple or a list, else as the only argument.
        loss: of (model, batch) for gradients, by default the loss that the model returns.
        tol, certify, seed: of `truncated_svd`; certify bounds the error of the spectra.
        statistics_bytes: memory for gradients, and for the inputs of experts; the batches are run
            once for each group of layers that fits into it.
    Returns: the report; `print` shows it in one line.
    Raises: TypeError or ValueError naming the argument, or the layer.
    """
    if by not in SOURCES:
        raise mismatch("by", f"one of {SOURCES}", by)
    if relative not in (None, True, False):
        raise mismatch("relative", "True, False or None", relative)
    seed = check_options(tol, certify, seed)
    _check_model(model, lora_config)
    wanted = LoraBudget(lora_config.r, budget, cost, min_rank, max_rank)
    found = listed_batches(batches, needed=by != "weights", by=by)
    options = {"tol": tol, "certify": certify, "seed": seed}
    probe = _probe(model, lora_config)
    stacks, left = find_stacks(model, lora_config.target_parameters or (), by)
    order = {name: place for place, name in enumerate(names_of(model))}
    with torch.no_grad(), full_float32(), with_adapters(model, probe, _ADAPTER, keep=False) as peft:
        layers, skipped = [], {}
        if probe.target_modules != DUMMY_TARGET_MODULES:
            layers, skipped = find_layers(peft, _ADAPTER, {}, keeps_base=True)
        skipped |= left
        if not layers and not stacks:
            name, reason = next(iter(skipped.items()))
            raise ValueError(f"{name}: {reason}")
        runs = DataRuns(peft, found, loss, statistics_bytes, options)
        spectra = [*_spectra(by, layers, runs, wanted.count),
                   *stack_spectra(by, stacks, runs, wanted.count)]  # fmt: skip
        if by != "weights" and all(one.unreached and not one.norm for one in spectra):
            runs_through = "batches: expected to run through"
            what = runs_through if by == "activations" else "loss: expected to depend on"
            raise ValueError(f"{what} a layer of the adapter, got none")
        probed = peft.peft_config[_ADAPTER]
    config = copy(lora_config)
    if layers:
        config.target_modules, config.fan_in_fan_out = probed.target_modules, probed.fan_in_fan_out
    spectra.sort(key=lambda one: order[one.name])
    parameters = [*(stack.name for stack in stacks), *left]
    return make_report(by, spectra, config, wanted, relative, skipped, parameters)


def make_report(
    by: str,
    spectra: Sequence[LayerSpectrum],
    config: LoraConfig,
    budget: LoraBudget,
    relative: bool | None,
    skipped: Mapping[str, str],
    parameters: Collection[str] = (),
) -> RankReport:
    """Choose the ranks of layers with these spectra, and the config for them.

    Args: parameters: names of those that `target_parameters` names.
    """
    layers, total = choose_layer_ranks(spectra, budget, by, relative)
    ranks = {layer.name: layer.rank for layer in layers}
    if not any(ranks.values()):
        raise ValueError(f"budget: expected enough for one rank of a layer, got {total:g}")
    unit = budget.cost if isinstance(budget.cost, str) else "cost"
    chosen = ranked_config(config, ranks, tuple(skipped), parameters)
    uniform = sum(
        layer.experts * min(budget.rank, *layer.shape) * sum(layer.shape) for layer in layers
    )
    return RankReport(by, tuple(layers), chosen, total, unit, uniform, dict(skipped))


def _spectra(
    by: str, layers: Sequence[Layer], runs: DataRuns, count: int
) -> Iterator[LayerSpectrum]:
    """Yield what ranks of the layers are worth, in the order of the layers."""
    if by == "activations":
        components = runs.components(layers, dict.fromkeys(_names(layers), count), counted_rows)
        for layer in layers:
            shape = (layer.weight.shape[0], layer.weight.shape[1])
            yield input_spectrum(layer.name, shape, components[layer.name])
    elif by in ("gora", "gradients"):
        gradients = finite(runs.gradients(layers, training=False))
        if by == "gora":
            found = (gora_importance(la.name, la.weight, G) for la, G in gradients)
        else:
            found = matrix_spectra(((la.name, G) for la, G in gradients), count, **runs.options)
        reached = {one.name: one for one in found}
        for layer in layers:
            name, shape = layer.name, (layer.weight.shape[0], layer.weight.shape[1])
            yield reached.get(name) or LayerSpectrum.without_data(name, shape, NO_GRADIENT)
    else:
        weights = ((layer.name, layer.weight) for layer in layers)
        yield from with_progress(matrix_spectra(weights, count, **runs.options), "spectra")


def _names(layers: Sequence[Layer]) -> list[str]:
    return [layer.name for layer in layers]


def _probe(model: nn.Module, config: LoraConfig) -> LoraConfig:
    """Return a config with the same target modules, whose adapter changes nothing and is small."""
    found = copy(config)
    for name, value in _FRESH.items():
        setattr(found, name, value)
    if config.target_parameters and not config.target_modules:
        kind = getattr(getattr(model, "config", None), "model_type", None)
        known = TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING.get(kind)
        own = known if config.target_modules is None else None  # as PEFT completes the config
        found.target_modules = own or DUMMY_TARGET_MODULES
    return found


def _check_model(model: Any, config: Any) -> None:
    """Raise TypeError or ValueError unless the model is plain and the config is of plain LoRA."""
    if isinstance(model, PeftModel):
        raise ValueError("model: expected one without adapters, before get_peft_model; "
                         "model.unload() returns it")  # fmt: skip
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
    if type(config) is not LoraConfig:
        raise mismatch("lora_config", "a LoraConfig", config)
    for name in ("rank_pattern", "alpha_pattern", "layer_replication"):
        if getattr(config, name, None):
            raise mismatch("lora_config", f"one without {name}", getattr(config, name))
