"""`peftkern.initialize_`: start the adapters of a PEFT model from its weights, or from data."""

from __future__ import annotations

import contextlib
import itertools
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from copy import copy
from dataclasses import replace
from typing import Any

import torch
from peft import LoraConfig, PeftModel, PeftType, get_peft_model
from peft.tuners.lora import EvaConfig, LoraGAConfig
from peft.tuners.lora.layer import ParamWrapper
from torch import Tensor, nn

from peftkern.formats.block_weight import QuantizedWeight
from peftkern.formats.rank_patterns import PREFIX
from peftkern.functional.arguments import mismatch
from peftkern.functional.panels import full_float32
from peftkern.functional.truncated_svd import check_options
from peftkern.integrations.peft.experts import shown_weight
from peftkern.integrations.peft.init_data import (
    NO_GRADIENT,
    NOT_SEEN,
    DataRuns,
    Directions,
    start_eva,
)
from peftkern.integrations.peft.init_layers import Layer, find_layers, set_rank
from peftkern.integrations.peft.patch import is_patched
from peftkern.layers.names import shortened
from peftkern.layers.quantize import level_of_the_caller, with_progress
from peftkern.methods.initialization.expert_statistics import Shown
from peftkern.methods.initialization.factors import (
    Factors,
    check_finite,
    check_rank,
    check_scaling,
)
from peftkern.methods.initialization.from_weights import FROM_WEIGHTS, STEPS, from_weights
from peftkern.methods.initialization.loftq import Storage
from peftkern.methods.initialization.report import InitReport, LayerStart
from peftkern.methods.initialization.statistics import named

__all__ = ["initialize_"]

FROM_DATA = ("corda", "eva", "lora_ga")
METHODS = (*FROM_WEIGHTS, *FROM_DATA)
OF_EXPERTS = (*FROM_WEIGHTS, "eva")
PLAIN = Storage(double_quant=False)  # of a base that stays dense, as in PEFT's LoftQ


def initialize_(
    model: nn.Module,
    method: str,
    lora_config: LoraConfig | None = None,
    *,
    rank: int | None = None,
    tol: float = 1e-3,
    certify: bool = True,
    adapter_name: str = "default",
    batches: Iterable[Any] | None = None,
    loss: Callable[[nn.Module, Any], Tensor] | None = None,
    weights: Mapping[str, Tensor] | None = None,
    steps: int | None = None,
    seed: int = 0,
    statistics_bytes: int = 4 << 30,
) -> InitReport:
    """Start the LoRA adapters of a PEFT model from its weights or from data, in place.

        model = get_peft_model(base, LoraConfig(...))
        print(peftkern.initialize_(model, "pissa"))

    Before `peftkern.patch` and before the optimizer is made. A layer's base becomes weight -
    scaling * B A, so that the model computes what it did; of "eva" it stays, and B is zero. One
    layer is worked on at a time, by panels of rows; only "corda" and "lora_ga" hold a dense matrix.
    Fused experts with adapters by `target_parameters` start by the first four methods and by "eva",
    each expert for itself; all of a parameter have one rank.

    The adapter belongs to that changed base. Saved as usual (init_lora_weights is True
    afterwards, so that loading does not start it once more), it loads in any PEFT on the base
    saved beside it, `model.unload().save_pretrained(...)`; or PEFT converts it to an adapter of
    twice the rank for the original one: `save_pretrained(..., path_initial_model_for_weight_
    conversion=...)` with the adapter as it was before training, which mixes up those of experts.

    Args:
        model: of PEFT's; or a plain one with `lora_config`, which `get_peft_model` takes first:
            `report.model`.
        method: "pissa", "olora", or "qpissa" and "loftq" for a base in 4 bits; "corda" (the mode
            "ipm"), "eva" and "lora_ga" from batches. Settings beyond these arguments are those of
            the adapter's config: eva_config, lora_ga_config, loftq_iter of loftq_config.
        rank: of all layers, instead of their own.
        tol: how far the error may be from the least possible for the rank, relative: where the
            iteration stops, an estimate; certify, report a bound that holds as well.
        batches: a few, which are run once or more; each is given to the model as keywords if it is
            a mapping, as positions if it is a tuple or a list, else as the only argument.
        loss: of (model, batch) for "lora_ga", by default the loss that the model returns.
        weights: {name of a base parameter: its dense weight}, for a base in 4 bits: what its
            layers were quantized from, of experts as the model has them. "loftq" needs them there.
        steps: of "loftq", by default those of loftq_config, or 5.
        seed: of what is drawn at random.
        statistics_bytes: memory for the covariances of "corda" or gradients of "lora_ga"; the
            batches are run once for each group of layers that fits into it.

    A base in 4 bits (of bitsandbytes, `NF4Linear`, `BlockLinear`; experts in NF4 or MXFP4) is
    quantized anew, in its format, by every method but "eva". Layers that a method has no use for
    (embeddings, convolutions, weights that are tied to another layer's) stay as they are, and so do
    those that get no gradient for "lora_ga"; the report names them.

    Returns: the report; `print` shows it in one line.
    Raises: TypeError or ValueError naming the argument, or the layer; nothing has changed then. Nor
        has it where the model or the loss raises on a batch.
    """
    _check_arguments(method, rank, steps)
    seed = check_options(tol, certify, seed)
    batches = listed_batches(batches, needed=method in FROM_DATA, by=method)
    _check_model(model, method, lora_config, adapter_name)
    options = {"tol": tol, "certify": certify, "seed": seed}
    with torch.no_grad(), full_float32():
        with with_adapters(model, lora_config, adapter_name) as model:
            config = model.peft_config[adapter_name]
            iterations = steps or (config.loftq_config or {}).get("loftq_iter", STEPS)
            found, skipped = find_layers(
                model, adapter_name, weights or {}, keeps_base=method == "eva"
            )
            _check_experts(method, found)
            stacks: dict[str, Shown] = {}
            if method == "eva":
                found, stacks = _seen(model, found, skipped)
            layers = [replace(layer, asked=rank) for layer in found]
            _check_layers(method, layers, iterations)
            runs = DataRuns(model, batches, loss, statistics_bytes, options)
            factors, directions = {}, {}
            if method == "eva":
                directions = runs.eva(layers, stacks, config.eva_config or EvaConfig())
            elif method == "corda":
                factors = runs.corda(layers)
            elif method == "lora_ga":
                factors = runs.lora_ga(layers, config.lora_ga_config or LoraGAConfig())
        if rank is not None:
            set_rank(model, adapter_name, rank)
            layers = found
        if method == "eva":
            started, dropped = start_eva(model, layers, stacks, directions)
            _tell_unreached(directions)
            return InitReport(method, started, {**skipped, **dropped}, model)
        if method == "lora_ga":
            layers = _reached(layers, factors, skipped)
        steps_left = [(layer, group) for layer in layers for group in layer.groups()]
        starts: dict[str, list[LayerStart]] = {layer.name: [] for layer in layers}
        for layer, group in with_progress(steps_left, f"{method}: {len(layers)} layers"):
            starts[layer.name] += _start(layer, group, method, factors, iterations, options)
        started = tuple(layer.complete(starts[layer.name]) for layer in layers)
    config.init_lora_weights = True
    return InitReport(method, started, skipped, model)


def _reached(
    layers: list[Layer], factors: Mapping[str, Factors], skipped: dict[str, str]
) -> list[Layer]:
    """Return the layers that got a gradient; note the others in `skipped`, and warn once."""
    unreached = [layer.name for layer in layers if layer.name not in factors]
    skipped |= dict.fromkeys(unreached, NO_GRADIENT)
    if unreached:
        warnings.warn(
            f"lora_ga: no gradient reaches {shortened(unreached, 3)}: left at the default "
            "initialization",
            stacklevel=level_of_the_caller(),
        )
    return [layer for layer in layers if layer.name in factors]


@contextlib.contextmanager
def with_adapters(
    model: nn.Module, lora_config: LoraConfig | None, adapter_name: str, *, keep: bool = True
) -> Iterator[PeftModel]:
    """Give a plain model the adapters of a config; take them away again on an error, or after."""
    if lora_config is None:
        yield model
        return
    required = {name: p.requires_grad for name, p in model.named_parameters()}
    config, adapted, done = copy(lora_config), None, False
    config.init_lora_weights = True
    try:
        adapted = get_peft_model(model, config, adapter_name)
        yield adapted
        done = keep
    finally:
        if not done:
            if adapted is not None:
                adapted.unload()
            for name, parameter in model.named_parameters():
                parameter.requires_grad_(required[name])


def _start(
    layer: Layer,
    group: Sequence[int],
    method: str,
    factors: Mapping[str, Factors],
    iterations: int,
    options: dict[str, Any],
) -> list[LayerStart]:
    """Start some matrices of a layer, from their weights or with the factors found from data."""
    weights = [layer.matrix(index) for index in group]
    with named(layer.name), torch.autocast(weights[0].device.type, enabled=False):
        if method in FROM_WEIGHTS:
            how = {"steps": iterations, "turned": layer.turned, **options}
            storage = layer.storage or PLAIN
            made = from_weights(method, weights, layer.rank, layer.scaling, storage, **how)
        else:
            made = [(factors[layer.name], None)]
        return [layer.take(index, *one) for index, one in zip(group, made, strict=True)]


def _check_arguments(method: Any, rank: Any, steps: Any) -> None:
    if method not in METHODS:
        raise mismatch("method", f"one of {METHODS}", method)
    for name, value in (("rank", rank), ("steps", steps)):
        if value is not None and (type(value) is not int or value < 1):
            raise mismatch(name, "an integer of at least 1, or None", value)


def listed_batches(batches: Any, *, needed: bool, by: str, most: int | None = None) -> list[Any]:
    """Return the batches, the first `most`, as a list; they run more than once."""
    if not needed and batches is not None:
        raise mismatch("batches", f"None: {by!r} needs no data", batches)
    if needed and (
        isinstance(batches, (str, Tensor, Mapping)) or not isinstance(batches, Iterable)
    ):
        raise mismatch("batches", f"a list of batches, which {by!r} learns from", batches)
    found = [] if batches is None else list(itertools.islice(batches, most))
    if needed and not found:
        raise ValueError("batches: expected at least one, got none")
    return found


def _check_model(model: Any, method: str, given: Any, adapter_name: str) -> None:
    """Raise TypeError or ValueError unless the model has or is given a config that fits."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
    if is_patched(model):
        raise ValueError("model: expected one that is not patched yet: initialize_, then patch")
    if given is None and not isinstance(model, PeftModel):
        came = type(model).__name__
        raise TypeError(f"model: expected a PeftModel, or lora_config with a plain one, got {came}")
    if given is not None and isinstance(model, PeftModel):
        raise ValueError("lora_config: expected None for a model of PEFT's, which has its own")
    configs = {adapter_name: given} if given is not None else model.peft_config
    config, names = configs.get(adapter_name), list(configs)
    if not isinstance(config, LoraConfig) or config.peft_type != PeftType.LORA:
        if given is not None:
            raise mismatch("lora_config", "a LoraConfig", given)
        raise ValueError(f"adapter_name: expected LoRA's of {names}, got {adapter_name!r}")
    if len(names) > 1:
        raise ValueError(f"model: expected one adapter, got {names}, which share the base")
    corda = config.corda_config
    if method == "corda" and corda is not None and corda.corda_method != "ipm":
        raise mismatch("corda_method", "'ipm'", corda.corda_method)


def _check_experts(method: str, layers: list[Layer]) -> None:
    """Raise ValueError for adapters of parameters, unless the method starts those."""
    names = [layer.name for layer in layers if isinstance(layer.module, ParamWrapper)]
    if names and method not in OF_EXPERTS:
        expected = f"one of {OF_EXPERTS} for target_parameters ({names[0]})"
        raise mismatch("method", expected, method)


def _seen(
    model: PeftModel, layers: Sequence[Layer], skipped: dict[str, str]
) -> tuple[list[Layer], dict[str, Shown]]:
    """Return the layers whose inputs can be seen, and of those that are experts their weights;
    note the others in `skipped`. Raises: ValueError if none can."""
    found, stacks = [], {}
    for layer in layers:
        if isinstance(layer.module, ParamWrapper):
            path, _, own = f"{PREFIX}{layer.name}".rpartition(".")
            parent = model.get_submodule(path.rpartition(".")[0])
            shown = shown_weight(layer.base, own, parent)
            if shown is None:
                skipped[layer.name] = NOT_SEEN
                continue
            stacks[layer.name] = shown
        found.append(layer)
    if not found:
        name, reason = next(iter(skipped.items()))
        raise ValueError(f"{name}: {reason}")
    return found, stacks


def _tell_unreached(directions: Mapping[str, Directions]) -> None:
    """Warn once of experts that no batch runs through."""
    unreached = []
    for name, (rank, of_each, _) in directions.items():
        without = [str(expert) for expert, one in enumerate(of_each) if not len(one)]
        if rank and without:
            unreached.append(f"{name} {', '.join(without)}")
    if unreached:
        warnings.warn(
            f"eva: no batch runs through experts of {shortened(unreached, 3, '; ')}: "
            "left at the default initialization",
            stacklevel=level_of_the_caller(),
        )


def _check_layers(method: str, layers: list[Layer], iterations: Any) -> None:
    """Raise ValueError for a layer that the method cannot start, or a config's loftq_iter."""
    if method == "loftq" and (type(iterations) is not int or iterations < 1):
        raise mismatch("loftq_iter", "an integer of at least 1", iterations)
    for layer in layers:
        with named(layer.name):
            check_rank(layer.rank, layer.shape, half=method == "lora_ga")
            check_scaling(layer.scaling)
            known = not isinstance(layer.matrices[0], QuantizedWeight)
            if method == "loftq" and not known:
                raise ValueError("weights: expected what the base in 4 bits was quantized from")
        for index in range(len(layer.matrices)):
            with named(layer.name if len(layer.matrices) == 1 else f"{layer.name}[{index}]"):
                check_finite(layer.matrix(index))
