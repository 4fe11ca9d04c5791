"""Factors of a PEFT model's layers from batches that run through its base."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.lora import EvaConfig, LoraGAConfig, initialize_lora_eva_weights
from peft.tuners.lora.layer import LoraLayer
from torch import Tensor, nn

from peftkern.formats.rank_patterns import PREFIX
from peftkern.functional.arguments import mismatch
from peftkern.integrations.peft.init_layers import Layer, kept_dtypes
from peftkern.integrations.peft.serve import BNB_TYPES
from peftkern.layers.quantize import with_progress
from peftkern.methods.initialization.expert_statistics import (
    expert_gradients,
    expert_input_statistics,
)
from peftkern.methods.initialization.factors import Factors
from peftkern.methods.initialization.from_data import (
    Covariance,
    PrincipalComponents,
    corda,
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

    def eva(self, layers: Sequence[Layer], config: EvaConfig) -> dict[str, Factors]:
        """Return EVA's factors of each layer, of rank 0 where none of its directions is chosen."""
        counts = {layer.name: round(layer.rank * config.rho) for layer in layers}
        found = self.components(layers, counts, _rows_of(config))
        explained = {}
        for name, principal in found.items():
            with named(name):
                explained[name] = principal.explained()
        if config.rho == 1:  # no redistribution: what rank_pattern says stays
            ranks = {la.name: min(la.rank, len(explained[la.name])) for la in layers}
        else:
            ranks = share_ranks(explained, sum(layer.rank for layer in layers))
        factors = {}
        for layer in layers:
            principal, rank = found[layer.name], ranks[layer.name]
            lora_A = principal.components[:rank]
            if config.whiten:
                root = principal.S[:rank].sqrt()[:, None]
                lora_A = torch.where(root > 0, lora_A / root, 0)
            lora_B = lora_A.new_zeros(layer.weight.shape[0], rank)
            energy = float(explained[layer.name][:rank].sum())
            factors[layer.name] = Factors(lora_A, lora_B, energy)
        return factors

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

    def expert_gradients(
        self, stacks: Mapping[str, nn.Module], sizes: Mapping[str, int]
    ) -> Iterator[tuple[str, Tensor]]:
        """Yield each weight of these modules of experts, by name, with its gradient [E, m, n].

        Args: sizes, bytes of each gradient, `statistics_bytes` of which are made by one run.
        """
        with _base_alone(self.model, training=False):
            for group in groups(sizes, self.statistics_bytes):
                chosen = {name: stacks[name] for name in group}
                found = expert_gradients(chosen, self._loss, self.batches)
                for name in with_progress(group, "gradients: directions"):
                    yield name, found.pop(name)

    def expert_components(
        self, stacks: Mapping[str, nn.Module], counts: Mapping[str, int], sizes: Mapping[str, int]
    ) -> Iterator[tuple[str, list[PrincipalComponents]]]:
        """Yield each weight of these modules of experts, by name, with the principal components of
        the inputs of each expert, `counts` of them.

        Args: sizes, bytes of a weight's, `statistics_bytes` of which are made by one run.
        """
        with _base_alone(self.model, training=False):
            for group in groups(sizes, self.statistics_bytes):
                found = expert_input_statistics(
                    {name: stacks[name] for name in group},
                    self._forward,
                    self.batches,
                    lambda name: PrincipalComponents(counts[name], self.options["seed"]),
                    counted_rows,
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
    model: PeftModel, layers: Sequence[Layer], factors: Mapping[str, Factors]
) -> tuple[tuple[LayerStart, ...], dict[str, str]]:
    """Start layers by EVA; PEFT gives them their ranks, and drops those that get none."""
    adapter_name = layers[0].adapter_name
    config = model.peft_config[adapter_name]
    own = config.eva_config
    config.init_lora_weights, config.eva_config = "eva", own or EvaConfig()
    state = {PREFIX + name: found.lora_A for name, found in factors.items()}
    with kept_dtypes(model), _kept_factors(model, layers):
        initialize_lora_eva_weights(model, eva_state_dict=state, adapter_name=adapter_name)
    config.init_lora_weights, config.eva_config = True, own
    started, skipped = [], {}
    for layer in layers:
        if not len(factors[layer.name].lora_A):
            skipped[layer.name] = "no direction of its inputs is among those that explain most"
            continue
        layer.write(factors[layer.name])
        started.append(LayerStart.of(layer.name, factors[layer.name], layer.scaling, None))
    return tuple(started), skipped


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
