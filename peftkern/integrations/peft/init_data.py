"""Factors of a PEFT model's layers from batches that run through its base."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from peft import PeftModel
from peft.tuners.lora import EvaConfig, LoraGAConfig, initialize_lora_eva_weights
from peft.tuners.lora.layer import LoraLayer, ParamWrapper
from torch import Tensor, nn

from peftkern.formats.rank_patterns import PREFIX
from peftkern.functional.arguments import mismatch
from peftkern.integrations.peft.init_layers import Layer, kept_dtypes, set_stack_ranks
from peftkern.integrations.peft.serve import BNB_TYPES
from peftkern.layers.quantize import with_progress
from peftkern.methods.initialization.expert_statistics import (
    Stacks,
    expert_gradients,
    expert_input_statistics,
)
from peftkern.methods.initialization.factors import Factors
from peftkern.methods.initialization.from_data import (
    Covariance,
    PrincipalComponents,
    corda,
    explained_together,
    lora_ga,
    share_ranks,
)
from peftkern.methods.initialization.report import LayerStart
from peftkern.methods.initialization.statistics import (
    Rows,
    equal_inputs,
    groups,
    input_statistics,
    named,
    parameter_gradients,
    weight_gradients,
)

Loss = Callable[[nn.Module, Any], Tensor]
NO_GRADIENT = "the loss does not depend on it"
NOT_SEEN = "the inputs of a parameter are not seen, as those of a layer are"


class Directions(NamedTuple):
    """Directions [k, n] in the inputs of each matrix of a layer, which its lora_A starts from.

    rank: of the layer; an expert that fewer rows reach has fewer. energy: the share of all inputs'
    variance that they explain.
    """

    rank: int
    of_each: list[Tensor]
    energy: float


@dataclass(frozen=True)
class DataRuns:
    """Batches, the model that they run through, and the memory for what is made of them.

    options: of `truncated_svd`.
    """

    model: PeftModel
    batches: Sequence[Any]
    loss: Loss | None
    statistics_bytes: int
    options: dict[str, Any]

    def corda(self, layers: Sequence[Layer]) -> dict[str, Factors]:
        """Return CorDA's factors of each layer."""
        modules = {layer.name: layer.base for layer in layers}
        factors = {}
        with _base_alone(self.model, training=False):
            leaders = equal_inputs(modules, self._forward, self.batches[0])
            sizes = {leaders[la.name]: 4 * la.weight.shape[1] ** 2 for la in layers}
            for group in groups(sizes, self.statistics_bytes):
                chosen = {name: modules[name] for name in group}
                found = input_statistics(
                    chosen, self._forward, self.batches, lambda name: Covariance(), counted_rows
                )
                these = [layer for layer in layers if leaders[layer.name] in found]
                for layer in with_progress(these, "corda: products with covariances"):
                    with named(layer.name):
                        covariance = found[leaders[layer.name]].value()
                        how = (layer.rank, layer.scaling)
                        factors[layer.name] = corda(layer.weight, covariance, *how, **self.options)
                del found, covariance  # before those of the next group
        return factors

    def lora_ga(self, layers: Sequence[Layer], config: LoraGAConfig) -> dict[str, Factors]:
        """Return LoRA-GA's factors of each layer that the loss depends on."""
        how = {"direction": config.direction, "scale": config.scale, "gamma": config.stable_gamma}
        factors = {}
        for layer, gradient in self.gradients(layers, training=True):
            with named(layer.name):
                factors[layer.name] = lora_ga(
                    layer.weight, gradient, layer.rank, layer.scaling, **how, **self.options
                )
        if not factors:
            raise ValueError("loss: expected to depend on a layer of the adapter, on none it does")
        return factors

    def eva(
        self, layers: Sequence[Layer], stacks: Stacks, config: EvaConfig
    ) -> dict[str, Directions]:
        """Return the directions of EVA of each layer: none where none of them is chosen.

        Args: stacks, the weights of those layers that are experts.
        """
        counts = {layer.name: round(layer.rank * config.rho) for layer in layers}
        linear = [layer for layer in layers if layer.name not in stacks]
        rows = _rows_of(config)
        found = {n: [one] for n, one in self.components(linear, counts, rows).items()}
        found |= self.expert_components(stacks, counts, rows)
        explained = {}
        for name, parts in found.items():
            with named(name):
                explained[name] = explained_together(parts)
        if config.rho == 1:  # no redistribution: what rank_pattern says stays
            ranks = {la.name: min(la.rank, len(explained[la.name])) for la in layers}
        else:
            ranks = share_ranks(explained, sum(layer.rank for layer in layers))
        chosen = {}
        for name, rank in ranks.items():
            of_each = [principal.leading(rank, whiten=config.whiten) for principal in found[name]]
            chosen[name] = Directions(rank, of_each, float(explained[name][:rank].sum()))
        return chosen

    def gradients(
        self, layers: Sequence[Layer], *, training: bool
    ) -> Iterator[tuple[Layer, Tensor]]:
        """Yield each layer with the gradient of its weight [m, n], but those that get none;
        `statistics_bytes` of them are made by one run of the batches."""
        by_name = {layer.name: layer for layer in layers}
        sizes = {layer.name: 4 * layer.weight.shape[0] * layer.weight.shape[1] for layer in layers}
        with _base_alone(self.model, training=training):
            for group in groups(sizes, self.statistics_bytes):
                modules = {name: by_name[name].base for name in group}
                gradients = weight_gradients(modules, self._loss, self.batches)
                for name in with_progress(group, "gradients: directions"):
                    gradient = gradients.pop(name, None)
                    if gradient is not None and gradient.any():  # as NaN is, too
                        yield by_name[name], gradient

    def parameter_gradients(self, parameters: Mapping[str, Tensor]) -> Iterator[Tensor]:
        """Yield the gradient of each parameter, zeros if there is none, in groups as above."""
        sizes = {name: (4 + p.element_size()) * p.numel() for name, p in parameters.items()}
        with _base_alone(self.model, training=False):
            for group in groups(sizes, self.statistics_bytes):
                chosen = {name: parameters[name] for name in group}
                found = parameter_gradients(chosen, self._loss, self.batches)
                for name in with_progress(group, "gradients: directions"):
                    yield found.pop(name)

    def components(
        self,
        layers: Sequence[Layer],
        counts: Mapping[str, int],
        rows: Callable[[Any], Rows],
    ) -> dict[str, PrincipalComponents]:
        """Return the principal components of the inputs of each layer, `counts` of them at least.

        Layers with the same inputs share theirs; those that lead such a group come first.
        """
        if not layers:
            return {}
        modules = {layer.name: layer.base for layer in layers}
        with _base_alone(self.model, training=False):
            leaders = equal_inputs(modules, self._forward, self.batches[0])
            most: dict[str, int] = {}
            for layer in layers:
                leader, count = leaders[layer.name], counts[layer.name]
                most[leader] = max(most.get(leader, 0), min(count, layer.weight.shape[1]))
            found = input_statistics(
                {name: modules[name] for name in most},
                self._forward,
                self.batches,
                lambda name: PrincipalComponents(most[name], self.options["seed"]),
                rows,
            )
        order = (*most, *(name for name in modules if name not in most))
        return {name: found[leaders[name]] for name in order}

    def expert_gradients(self, stacks: Stacks) -> Iterator[tuple[str, Tensor]]:
        """Yield each weight of experts, by name, with its gradient [E, m, n].

        `statistics_bytes` of them are made by one run of the batches.
        """
        sizes = {name: 4 * one.weight.numel() for name, one in stacks.items()}
        with _base_alone(self.model, training=False):
            for group in groups(sizes, self.statistics_bytes):
                chosen = {name: stacks[name] for name in group}
                found = expert_gradients(chosen, self._loss, self.batches)
                for name in with_progress(group, "gradients: directions"):
                    yield name, found.pop(name)

    def expert_components(
        self, stacks: Stacks, counts: Mapping[str, int], rows: Callable[[Any], Rows]
    ) -> Iterator[tuple[str, list[PrincipalComponents]]]:
        """Yield each weight of experts, by name, with the principal components of the inputs of
        each expert, `counts` of them; in groups as above."""
        sizes = {}
        for name, one in stacks.items():
            E, *sides = one.weight.shape
            columns = sides[0 if one.turned else 1]
            sizes[name] = 4 * E * columns * min(counts[name], columns)
        with _base_alone(self.model, training=False):
            for group in groups(sizes, self.statistics_bytes):
                found = expert_input_statistics(
                    {name: stacks[name] for name in group},
                    self._forward,
                    self.batches,
                    lambda name: PrincipalComponents(counts[name], self.options["seed"]),
                    rows,
                )
                for name in group:
                    yield name, found.pop(name)

    def _forward(self, batch: Any) -> Any:
        device = next(p.device for p in self.model.parameters() if not p.is_meta)
        batch = _moved(batch, device)
        if isinstance(batch, Mapping):
            return self.model(**batch)
        return self.model(*batch) if isinstance(batch, (tuple, list)) else self.model(batch)

    def _loss(self, batch: Any) -> Tensor:
        if self.loss is not None:
            return self.loss(self.model, batch)
        output = self._forward(batch)
        loss = output.get("loss") if isinstance(output, Mapping) else None
        if loss is None:
            raise mismatch("loss", "a function of (model, batch), or a model and batches with "
                           "labels that return a loss", self.loss)  # fmt: skip
        return loss


def start_eva(
    model: PeftModel, layers: Sequence[Layer], stacks: Stacks, found: Mapping[str, Directions]
) -> tuple[tuple[LayerStart, ...], dict[str, str]]:
    """Start layers by EVA, each with its rank; those that get none lose their adapter."""
    config = model.peft_config[layers[0].adapter_name]
    linear = [layer for layer in layers if layer.name not in stacks]
    with kept_dtypes(model):
        if linear:
            _set_linear_ranks(model, linear, found)
        if stacks:
            ranked = [(la, found[la.name].rank) for la in layers if la.name in stacks]
            set_stack_ranks(model, config, ranked, alone=not linear)
    started, skipped = [], {}
    for layer in layers:
        rank, of_each, energy = found[layer.name]
        if not rank:
            skipped[layer.name] = "no direction of its inputs is among those that explain most"
            continue
        turned = stacks[layer.name].turned if layer.name in stacks else None
        for index, directions in enumerate(of_each):
            layer.take_inputs(index, directions, turned)
        start = LayerStart(layer.name, layer.shape, rank, layer.scaling, None, energy)
        started.append(replace(start, matrices=len(of_each)))
    return tuple(started), skipped


def _set_linear_ranks(
    model: PeftModel, layers: Sequence[Layer], found: Mapping[str, Directions]
) -> None:
    """Let PEFT give linear layers their ranks, and drop those that get none."""
    adapter_name = layers[0].adapter_name
    config = model.peft_config[adapter_name]
    own = config.eva_config
    config.init_lora_weights, config.eva_config = "eva", own or EvaConfig()
    state = {PREFIX + layer.name: found[layer.name].of_each[0] for layer in layers}
    with _without_parameters(model), _kept_factors(model, layers):
        initialize_lora_eva_weights(model, eva_state_dict=state, adapter_name=adapter_name)
    config.init_lora_weights, config.eva_config = True, own


@contextlib.contextmanager
def _without_parameters(model: PeftModel) -> Iterator[None]:
    """Take adapters of parameters away meanwhile: PEFT's EVA would take them for layers."""
    places = [
        (parent, name, child)
        for parent in model.modules()
        if not isinstance(parent, ParamWrapper)
        for name, child in parent._modules.items()
        if isinstance(child, ParamWrapper)
    ]
    for parent, name, child in places:
        parent._modules[name] = child.get_base_layer()
    try:
        yield
    finally:
        for parent, name, child in places:
            parent._modules[name] = child


@contextlib.contextmanager
def _kept_factors(model: PeftModel, started: Sequence[Layer]) -> Iterator[None]:
    """Give adapter layers that are not started their values again: PEFT draws them anew."""
    known = {layer.module for layer in started}
    others = [m for m in model.modules() if isinstance(m, LoraLayer) and m not in known]
    before = [
        {name: p.clone() for name, p in module.named_parameters() if name.startswith("lora_")}
        for module in others
    ]
    yield
    for module, values in zip(others, before, strict=True):
        module.load_state_dict(values, strict=False)


def counted_rows(batch: Any, label_mask_value: int | None = None) -> Rows:
    """Return what picks the rows of an input that count: no padding, and no masked labels."""
    batch = batch if isinstance(batch, Mapping) else {}
    masks: dict[torch.Size, Tensor] = {}  # by shape: a decoder's labels are not the encoder's
    if batch.get("attention_mask") is not None:
        mask = batch["attention_mask"].bool()
        masks[mask.shape] = mask
    if label_mask_value is not None and "labels" in batch:
        labelled = batch["labels"] != label_mask_value
        masks[labelled.shape] = labelled & masks.get(labelled.shape, labelled)

    def rows(x: Tensor) -> Tensor:
        x, mask = x.detach(), masks.get(x.shape[:-1])
        if mask is None and x.dim() == 2:  # tokens of all texts in one, as mixtures take them
            flat = (one.flatten() for one in masks.values() if one.numel() == len(x))
            mask = next(flat, None)
        return x.reshape(-1, x.shape[-1]) if mask is None else x[mask.to(x.device)]

    return rows


def _rows_of(config: EvaConfig) -> Callable[[Any], Rows]:
    value = config.label_mask_value if config.use_label_mask else None
    return lambda batch: counted_rows(batch, value)


@contextlib.contextmanager
def _base_alone(model: PeftModel, *, training: bool) -> Iterator[None]:
    """Run the model without its adapters, and without gradients of parameters."""
    modes = {module: module.training for module in model.modules()}
    required = {p: p.requires_grad for p in model.parameters()}
    adapted = any(isinstance(module, LoraLayer) for module in modes)  # else PEFT raises
    try:
        with model.disable_adapter() if adapted else contextlib.nullcontext():
            model.requires_grad_(False).train(training)
            for module in modes:
                if isinstance(module, BNB_TYPES):  # some CPUs' repack their weight to evaluate
                    module.training = True
            yield
    finally:
        for module, mode in modes.items():
            module.training = mode
        for parameter, wanted in required.items():
            parameter.requires_grad_(wanted)


def _moved(batch: Any, device: torch.device) -> Any:
    """Return a batch with its tensors on the model's device."""
    if isinstance(batch, Tensor):
        return batch.to(device)
    if isinstance(batch, Mapping):
        return {key: _moved(value, device) for key, value in batch.items()}
    return type(batch)(_moved(v, device) for v in batch) if type(batch) in (tuple, list) else batch
