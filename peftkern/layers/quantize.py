"""In-place quantization of a model's linear layers and fused experts to NF4.

Users find it as `peftkern.quantize_`, which lets transformers save such a model, too.
"""

from __future__ import annotations

import sys
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import Any

from torch import nn

from peftkern.formats.nf4 import BLOCKSIZES
from peftkern.functional.arguments import WEIGHT_DTYPES
from peftkern.layers.expert_stack import set_stack, stacks_of
from peftkern.layers.names import Chosen, has_parts, shortened
from peftkern.layers.nf4 import NF4Linear
from peftkern.layers.nf4_stack import NF4Stack, refusal
from peftkern.layers.weight_readers import Read, reader_of

__all__ = ["quantize_"]
_ADAPTERS = ("lora_A", "lora_B")  # quantizing an adapter would end its training
_Places = dict[nn.Linear, list[tuple[nn.Module, str, str]]]  # parent, child's name, whole name
_Experts = dict[tuple[nn.Module, str], str]  # {(module, its parameter): whole name}
_NAMED = 3  # layers of a kind that a warning names


def quantize_(
    model: nn.Module,
    *,
    blocksize: int = 64,
    double_quant: bool = True,
    include: Iterable[str] | None = None,
    exclude: Iterable[str] | None = None,
) -> list[str]:
    """Keep the nn.Linear layers and the fused experts of a model in NF4, in place.

    An nn.Linear becomes an NF4Linear. A parameter [E, N, K] of a module whose class is called
    experts ("Qwen3MoeExperts.gate_up_proj") becomes an `NF4Stack`, an expert at a time: what reads
    it still reads dense values, and `patch` lets kernels read the stored ones. It makes no
    difference whether PEFT has wrapped the model before or wraps it afterwards.

    After `peftkern.quantize_`, `save_pretrained` of a model of transformers 5 writes these bytes
    and a config by which `from_pretrained` reads them: bitsandbytes', or if there are experts in
    NF4 `NF4ExpertsConfig`, which has to be imported before it is read.

    Args:
        double_quant: of linear layers; experts keep their absmax in float32.
        include: only layers and parameters whose name has one of these as consecutive dotted parts
            ("q_proj", "layers.0", "mlp.up_proj"); None takes all.
        exclude: never those whose name has one of these. None leaves out "lm_head", and of a model
            of transformers its output embeddings and the layer of its last parameter, as
            transformers does with bitsandbytes: such a head is often trained.

    PEFT's lora_A and lora_B, subclasses of nn.Linear, and weights that are not float32, float16 or
    bfloat16 always stay. So do, with one warning that names them, layers that would not work: whose
    weight is read by a module above them (`weight_readers`), is tied to another module's or is
    computed (weight_norm), and those that transformers keeps in float32. Experts stay that are
    tied, or whose values are no multiple of `blocksize`. A model most of whose
    weights are in no layer that could be replaced is warned about, too, unless `include` is given.

    Returns: names of the layers that were replaced, then of the experts' parameters.
    Raises: TypeError unless `model` is a module that holds layers; ValueError when an entry of
        `include` is in no name, or naming a layer that cannot be quantized.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
    if type(model) is nn.Linear:
        raise TypeError("model: an nn.Linear cannot replace itself; use NF4Linear.from_linear")
    chosen = Chosen.of(include, exclude, default=("lm_head",))
    chosen = chosen._replace(exclude=_ADAPTERS + chosen.exclude)
    heads = _heads(model) if exclude is None else set()
    places, experts, names = _chosen(model, chosen, heads)
    kept = _not_replaceable(model, places)
    reasons = {name: kept[child] for child in kept for _, _, name in places.pop(child)}
    kept.clear()
    reasons |= _experts_that_stay(model, experts, blocksize)
    steps = iter(with_progress(range(len(places) + len(experts)), "Quantizing to NF4"))
    for _ in zip(range(len(places)), steps, strict=False):
        child, owners = places.popitem()  # nothing here keeps a dense weight that is done with
        layer = _quantized(child, owners[0][2], blocksize, double_quant)
        for parent, child_name, _ in owners:
            setattr(parent, child_name, layer)
    for (module, name), _ in zip(experts, steps, strict=True):
        stack = NF4Stack.from_dense(module._parameters[name], blocksize=blocksize)
        set_stack(module, name, stack)
    _warn(reasons, _mostly_dense(model, heads, chosen.exclude) if include is None else None)
    return [name for name in names if name not in reasons]


def _chosen(
    model: nn.Module, chosen: Chosen, heads: set[nn.Module]
) -> tuple[_Places, _Experts, list[str]]:
    """Find the layers to quantize with the places they hang in, the experts, and all their names.

    Raises: ValueError if an entry of `include` is in no name, or a layer to quantize is sharded.
    """
    places: _Places = {}
    experts: _Experts = {}
    seen, names = [], []
    for path, parent in model.named_modules():
        for parameter in expert_parameters(parent):
            name = f"{path}.{parameter}".lstrip(".")
            seen.append(name)
            if chosen.reason_against(name) is None:
                experts[parent, parameter] = name
        for child_name, child in parent._modules.items():
            if type(child) is not nn.Linear:
                continue
            name = f"{path}.{child_name}".lstrip(".")
            seen.append(name)
            left_out = child in heads or child.weight.dtype not in WEIGHT_DTYPES
            if not left_out and chosen.reason_against(name) is None:
                if hasattr(child.weight, "full_tensor"):
                    raise ValueError(
                        f"{name}: expected a whole weight, got a {type(child.weight).__name__}: "
                        "quantize before fully_shard; over tensor parallelism nothing is in 4 bits"
                    )
                places.setdefault(child, []).append((parent, child_name, name))
                names.append(name)
    unknown = chosen.unknown(seen)
    if unknown is not None:
        raise ValueError(f"include: no nn.Linear has {unknown!r} in its name, nor have experts")
    return places, experts, names + list(experts.values())


def expert_parameters(module: nn.Module) -> list[str]:
    """Return the names of a module's own weights [E, N, K], if it is one of fused experts."""
    if "expert" not in type(module).__name__.lower():
        return []
    own = module._parameters.items()
    dense = {name: p for name, p in own if type(p) is nn.Parameter and p.dtype in WEIGHT_DTYPES}
    return [name for name, parameter in dense.items() if parameter.dim() == 3]


def _experts_that_stay(model: nn.Module, experts: _Experts, blocksize: int) -> dict[str, str]:
    """Take out of `experts` those that cannot be quantized; return the reasons by name."""
    if blocksize not in BLOCKSIZES:
        return {}  # an error of the first one that is quantized
    owners = _owners(model)
    in_float32 = _in_float32(model)
    reasons = {}
    for (module, parameter), name in experts.items():
        weight = module._parameters[parameter]
        if refusal(tuple(weight.shape), blocksize) is not None:
            reasons[name] = f"whose experts' sizes are no multiple of blocksize {blocksize}"
        elif owners[id(weight)] > 1:
            reasons[name] = "whose weight is tied to another module's"
        elif _has_prefix_and_parts(name, in_float32):
            reasons[name] = "that transformers keeps in float32"
    for place in [place for place, name in experts.items() if name in reasons]:
        del experts[place]
    return reasons


def _quantized(linear: nn.Linear, name: str, blocksize: int, double_quant: bool) -> NF4Linear:
    try:
        layer = NF4Linear.from_linear(linear, blocksize=blocksize, double_quant=double_quant)
    except (RuntimeError, TypeError, ValueError) as error:
        error.args = (f"{name}: {error}",)
        raise
    layer.qualified_name = name
    return layer


def _not_replaceable(model: nn.Module, places: _Places) -> dict[nn.Linear, str]:
    """Return the layers that NF4Linear cannot stand for, with the reason."""
    modules = dict(model.named_modules(remove_duplicate=False))
    owners = _owners(model)
    reads: dict[type, list[Read]] = {}
    in_float32 = _in_float32(model)

    def reason(linear: nn.Linear, name: str) -> str | None:
        weight = linear._parameters.get("weight")
        if weight is None:
            return "whose weight is computed (weight_norm, pruning)"
        if owners[id(weight)] > 1:
            return "whose weight is tied to another module's"
        reader = reader_of(name, modules, reads)
        if reader is not None:
            return f"whose weight {reader} reads"
        if _has_prefix_and_parts(name, in_float32):
            return "that transformers keeps in float32"
        return None

    found = {}
    for linear, where in places.items():
        reasons = [reason(linear, name) for _, _, name in where]
        if any(reasons):
            found[linear] = next(filter(None, reasons))
    return found


def _owners(model: nn.Module) -> Counter[int]:
    """Count the modules that have each parameter, by its id."""
    parameters = (p for module in model.modules() for p in module._parameters.values())
    return Counter(id(p) for p in parameters)


def _in_float32(model: nn.Module) -> list[tuple[str, tuple[str, ...]]]:
    """Return (name of a model of transformers, parts of names that it keeps in float32)."""
    models = _transformers_models(model)
    return [(name, tuple(module._keep_in_fp32_modules or ())) for name, module in models]


def _transformers_models(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """Yield (name, model) of the outermost models of transformers, told by what they have."""
    found: list[str] = []
    for name, module in model.named_modules():
        inside = any(not outer or f"{name}.".startswith(f"{outer}.") for outer in found)
        if not inside and hasattr(type(module), "_keep_in_fp32_modules"):
            found.append(name)
            yield name, module


def _heads(model: nn.Module) -> set[nn.Module]:
    """Return the output embeddings of transformers' models and their last parameters' owners."""
    heads = set()
    for _, module in _transformers_models(model):
        heads.add(module.get_output_embeddings())
        owners = [m for m in module.modules() if any(True for _ in m.parameters(recurse=False))]
        heads.update(owners[-1:])
    return heads


def _mostly_dense(
    model: nn.Module, heads: set[nn.Module], skip: Iterable[str]
) -> dict[str, int] | None:
    """Return {kind: numbers} of matrices not in NF4, if they are more than those that are.

    Embeddings and what was to be left out do not count.
    """
    in_nf4, dense = 0, Counter()
    for name, module in model.named_modules():
        if isinstance(module, NF4Linear):
            in_nf4 += module.in_features * module.out_features
        elif not (isinstance(module, nn.Embedding) or module in heads or has_parts(name, skip)):
            stacks = stacks_of(module)
            in_nf4 += sum(stack.numel() for stack in stacks.values())
            for own, parameter in module._parameters.items():
                if own in stacks or parameter is None or parameter.dim() < 2:
                    continue
                if parameter.is_floating_point():
                    dense[type(module).__name__] += parameter.numel()
    return dict(dense.most_common()) if dense.total() > in_nf4 else None


def _warn(reasons: dict[str, str], dense: dict[str, int] | None) -> None:
    """Warn once of all that stays as it is against what a user may expect."""
    said = []
    for reason, _ in Counter(reasons.values()).most_common():
        names = [name for name in reasons if reasons[name] == reason]
        said.append(f"layers {reason}: {shortened(names, _NAMED)}")
    if dense is not None:
        kinds = ", ".join(f"{count:,} in {kind}" for kind, count in dense.items())
        said.append(f"most of the weights (nn.Linear and fused experts alone become NF4): {kinds}")
    if said:
        told = f"quantize_ leaves as they are: {'; '.join(said)}"
        warnings.warn(told, stacklevel=level_of_the_caller())


def level_of_the_caller() -> int:
    """Return the `stacklevel` for the function that asks: of the first frame outside of here."""
    frame, level = sys._getframe(1), 1
    within = ("peftkern", "contextlib")
    while frame.f_back and frame.f_globals.get("__name__", "").partition(".")[0] in within:
        frame, level = frame.f_back, level + 1
    return level


def _has_prefix_and_parts(path: str, patterns: list[tuple[str, tuple[str, ...]]]) -> bool:
    under = [parts for prefix, parts in patterns if not prefix or path.startswith(f"{prefix}.")]
    return any(has_parts(path, parts) for parts in under)


def with_progress(steps: Iterable, description: str) -> Iterable:
    """Return the steps, with a progress bar where somebody may be watching."""
    if not sys.stderr.isatty():
        return steps
    from rich.console import Console
    from rich.progress import track

    return track(steps, description, console=Console(stderr=True), transient=True)
