"""Request of an initialization: the method and its settings, and the layers of a checkpoint."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from copy import copy
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from typing import Any

from peft import EvaConfig, LoraConfig
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from peftkern.formats.rank_patterns import exact_targets, pattern_key
from peftkern.integrations.peft.initialize import OF_EXPERTS
from peftkern.layers.quantize import expert_parameters
from peftkern.methods.initialization.factors import check_rank
from peftkern.tools.adapters.extract_experts import Stack, find_stack
from peftkern.tools.checkpoints.architecture import (
    Load,
    by_target,
    check_shape,
    find_loads,
    is_turned,
    meta_model,
)
from peftkern.tools.checkpoints.checkpoint import Checkpoint, CheckpointError, TensorInfo
from peftkern.tools.checkpoints.decoded import DecodedInfo

DTYPES = ("F32", "F16", "BF16")


@dataclass(frozen=True)
class Request:
    """Method and settings; steps and seed as for `peftkern.initialize_`."""

    method: str
    rank: int = 16
    alpha: float | None = None
    rslora: bool = False
    tol: float = 1e-3
    certify: bool = True
    steps: int = 5
    seed: int = 0
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name, low in (("rank", 1), ("steps", 1), ("seed", 0)):
            if getattr(self, name) < low:
                came = getattr(self, name)
                raise CheckpointError(f"{name}: expected at least {low}, got {came}")
        if self.seed >= 1 << 63:
            raise CheckpointError(f"seed: expected an integer that fits 64 bits, got {self.seed}")
        for name, value in (("alpha", self.lora_alpha), ("tol", self.tol)):
            if not 0 < value < math.inf:
                raise CheckpointError(f"{name}: expected a number above 0, got {value}")

    @property
    def lora_alpha(self) -> float:
        return self.rank if self.alpha is None else self.alpha

    def rank_of(self, module: str) -> int:
        return self.rank_pattern.get(pattern_key(self.rank_pattern, module), self.rank)

    def scaling_of(self, module: str) -> float:
        rank, patterns = self.rank_of(module), self.alpha_pattern
        alpha = patterns.get(pattern_key(patterns, module), self.lora_alpha)
        return alpha / (math.sqrt(rank) if self.rslora else rank)

    def complete(self, config: LoraConfig) -> LoraConfig:
        """Return a config with these ranks, which says the targets already."""
        found = copy(config)
        found.r, found.lora_alpha, found.use_rslora = self.rank, self.lora_alpha, self.rslora
        found.rank_pattern, found.alpha_pattern = dict(self.rank_pattern), dict(self.alpha_pattern)
        if self.rank_pattern and self.method == "eva":
            found.eva_config = EvaConfig(rho=1.0)  # the ranks stay
        return found

    @property
    def svd_options(self) -> dict[str, Any]:
        return {"tol": self.tol, "certify": self.certify, "seed": self.seed}

    def identity(self) -> dict[str, Any]:
        """Return what decides the bytes that are written."""
        return asdict(self)


@dataclass(frozen=True)
class Target:
    """Linear layer of the model, or a parameter of experts: all matrices of it, or one expert's.

    transposed: the checkpoint keeps its weight as [n, m]. count: of matrices. sources: the tensors
    whose rows a matrix has, if they are several. turned: experts in 4 bits are written as [n, m].
    """

    module: str
    shape: tuple[int, int]
    transposed: bool
    parameter: str = ""
    count: int = 1
    sources: tuple[str, ...] = ()
    turned: bool = False

    @property
    def name(self) -> str:
        return f"{self.module}.{self.parameter}" if self.parameter else self.module


def find_targets(
    checkpoint: Checkpoint,
    names: Sequence[str] | str,
    rank_of: Callable[[str], int] = lambda module: 1,
    *,
    half: bool = False,
    method: str | None = None,
    model: PreTrainedModel | None = None,
    others: Collection[str] = (),
) -> tuple[dict[str, Target], LoraConfig]:
    """Find what is to be started, by the names of the weights, and a config that says so.

    Args: checkpoint, dense, or `decoded`; names, of layers, whole or their ends: "q_proj"; a string
        is a regular expression for whole names; none for all linear layers but the output
        embeddings. rank_of(layer), which it must have, or with `half` twice of it. method, that
        starts them: a name with a dot may then be that of a parameter of experts,
        "experts.down_proj". model: `meta_model` of the
        checkpoint, if there is one already. others: names of what is no linear layer; there may be
        none of theirs.
    Raises: CheckpointError naming a layer that does not exist, has no such rank, is tied, or that
        the method cannot start; as `expert_tensors`.
    """
    model = meta_model(checkpoint) if model is None else model
    loads = list(find_loads(model, checkpoint))
    linear = _linear_layers(model, loads)
    experts = _experts(model, loads)  # those that are not whole are refused, named or not
    head = model.get_output_embeddings()
    listed = () if isinstance(names, str) or method is None else names
    parameters = [name for name in listed if "." in name]
    found = {name: [t for t in experts if ends_in(experts[t].name, name)] for name in parameters}
    served = {*others, *(name for name, tensors in found.items() if tensors)}
    known = (".".join(target.name.split(".")[-2:]) for target in experts.values())
    modules = choose_modules(
        model, [target.module for target in linear.values()], names, served, known
    )
    chosen = {tensor: target for tensor, target in linear.items() if target.module in modules}
    of_experts = {tensor for tensors in found.values() for tensor in tensors}
    chosen |= {tensor: target for tensor, target in experts.items() if tensor in of_experts}
    if not chosen and not others:
        raise CheckpointError(f"{checkpoint.folder}: holds no linear layer")
    for target in chosen.values():
        if target.parameter and method not in OF_EXPERTS:
            accepted = ", ".join(OF_EXPERTS)
            raise CheckpointError(
                f"target: {target.name}: expected one of {accepted} to start experts, got {method}"
            )
        if model.get_submodule(target.module) is head and model.config.tie_word_embeddings:
            raise CheckpointError(
                f"target: the weight of {target.module} is the embeddings', too, which would change"
            )
        try:
            check_rank(rank_of(target.name), target.shape, half=half)
        except ValueError as error:
            raise CheckpointError(f"{target.name}: {error}") from None
    config = target_config(model, modules)
    named = {target.name for target in chosen.values() if target.parameter}
    config.target_parameters = parameter_names(model, named) or None
    config.fan_in_fan_out = any(t.transposed for t in chosen.values() if not t.parameter)
    return chosen, config


def keeps_transposed(checkpoint: Checkpoint, targets: Mapping[str, Target]) -> bool:
    """Return whether a loaded model keeps any of these layers as [n, m]: none that is in 4 bits."""
    return any(
        target.transposed and not target.parameter
        for name, target in targets.items()
        if not isinstance(checkpoint.tensors[name], DecodedInfo)
    )


def choose_modules(
    model: nn.Module,
    modules: Sequence[str],
    names: Sequence[str] | str,
    others: Collection[str] = (),
    known: Iterable[str] = (),
) -> list[str]:
    """Choose from linear layers by `names` and `others` as `find_targets` has them.

    Args: known, names besides those of the layers, for the error.
    Raises: CheckpointError naming one that no layer has.
    """
    wanted = _wanted(names)
    for name, fits in wanted.items():
        if name not in others and not any(fits(module) for module in modules):
            names_of = [*(module.rpartition(".")[2] for module in modules), *known]
            raise CheckpointError(
                f"target: no linear layer is called {name!r}; there are "
                f"{', '.join(dict.fromkeys(names_of))}"
            )
    if wanted:
        return [module for module in modules if any(fits(module) for fits in wanted.values())]
    head = model.get_output_embeddings() if isinstance(model, PreTrainedModel) else None
    return [module for module in modules if model.get_submodule(module) is not head]


def _wanted(names: Sequence[str] | str) -> dict[str, Callable[[str], Any]]:
    """Return {name or regular expression: whether it fits a module}."""
    if isinstance(names, str):
        return {names: re.compile(names).fullmatch}
    return {name: partial(ends_in, name=name) for name in names}


def _linear_layers(model: PreTrainedModel, loads: Sequence[Load]) -> dict[str, Target]:
    """Find the weights that are a linear layer's as they are."""
    found = {}
    for load in loads:
        name, _, parameter = load.target.rpartition(".")
        if load.converter is not None or parameter != "weight":
            continue
        module = model.get_submodule(name)
        if not isinstance(module, (nn.Linear, Conv1D)):
            continue
        shape = tuple(module.weight.shape)
        transposed = isinstance(module, Conv1D)
        check_shape(load.info, shape)
        if load.info.dtype in DTYPES:
            found[load.info.name] = Target(name, shape[::-1] if transposed else shape, transposed)
    order = {name: place for place, (name, _) in enumerate(model.named_modules())}
    return dict(sorted(found.items(), key=lambda item: order[item[1].module]))


def _experts(model: PreTrainedModel, loads: Sequence[Load]) -> dict[str, Target]:
    """Find the weights of fused experts: of each expert, or of all where one tensor has them."""
    parts, found = by_target(loads), {}
    for module, experts in model.named_modules():
        for parameter in expert_parameters(experts):
            loaded = parts.get(f"{module}.{parameter}")
            if loaded is None:
                continue
            E, m, n = expert_shape(experts, parameter)
            stack = find_stack(model, f"{module}.{parameter}", loaded)
            infos = {load.info.name: load.info for load in loaded}
            floats = {info.dtype for info in infos.values()} <= {*DTYPES}
            if stack is None or not floats or not fits(stack, infos, (E, m, n)):
                continue
            if E == 1 and is_turned(experts):
                continue  # PEFT does not transpose the update of one
            for rows in stack.rows or ((stack.whole,),):
                target = Target(module, (m, n), stack.turned, parameter, E if stack.whole else 1)
                found[rows[0]] = replace(target, sources=rows if len(rows) > 1 else ())
    return found


def expert_shape(experts: nn.Module, parameter: str) -> tuple[int, int, int]:
    """Return [E, m, n] of a parameter of experts, were it not turned."""
    E, *shape = experts.get_parameter(parameter).shape
    m, n = reversed(shape) if is_turned(experts) else shape
    return E, m, n


def fits(stack: Stack, infos: Mapping[str, TensorInfo], shape: tuple[int, int, int]) -> bool:
    """Return whether these tensors are a parameter of experts [E, m, n], were none turned."""
    E, m, n = shape
    if stack.whole:
        return infos[stack.whole].shape == ((E, n, m) if stack.turned else (E, m, n))
    rows = [sum(infos[name].shape[0] for name in one) for one in stack.rows]
    return rows == [m] * E and {infos[name].shape[1:] for name in stack.names} == {(n,)}


def target_config(model: nn.Module, modules: Sequence[str]) -> LoraConfig:
    """Return a config that targets these layers alone, by short names if those say it all."""
    short = {name.rpartition(".")[2] for name in modules}
    others = {n for n, _ in model.named_modules()} - set(modules)
    unique = not any(ends_in(name, end) for name in others for end in short)
    causal = isinstance(model, PreTrainedModel) and type(model).__name__.endswith("ForCausalLM")
    whole = short if unique else exact_targets(modules, others)
    return LoraConfig(
        target_modules=whole if isinstance(whole, str) else sorted(whole),
        task_type="CAUSAL_LM" if causal else None,
    )


def parameter_names(model: nn.Module, names: Collection[str]) -> list[str]:
    """Name these parameters alone, by short names if those say it all."""
    short = {".".join(name.split(".")[-2:]) for name in names}
    others = {name for name, _ in model.named_parameters()} - {*names}
    unique = not any(ends_in(name, end) for name in others for end in short)
    return sorted(short if unique else names)


def ends_in(module: str, name: str) -> bool:
    return module == name or module.endswith(f".{name}")
