"""Implementations that `peftkern bench` compares, each as its users have it.

A provider turns a case's tensors into copies of a layer (`Layer`): a function of x, or of nothing
where the op has no input, and the leaves whose gradients training asks for. Every copy holds the
same numbers in its own memory, because a model never meets the same weight twice in a row.

A user's own implementation is a baseline, too: `--baselines my_module:build` calls
`build(problem, tensors, copies)`, which returns such a list.
"""

from __future__ import annotations

import importlib
import importlib.machinery
import os
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

import peftkern
from peftkern.formats.block_weight import QuantizedWeight
from peftkern.formats.nf4 import STATE_KEYS
from peftkern.functional import dequantize
from peftkern.functional.dora import dora_linear
from peftkern.tools.bench import rosa
from peftkern.tools.bench.base_layers import Layer, Tensors, has, linear, prequantized
from peftkern.tools.bench.cases import OPS, SCALING, Problem
from peftkern.tools.bench.data import (
    OWN,
    by_group,
    grouped_mm,
    grouped_update,
    packed_weight,
    quantized_values,
)
from peftkern.tools.bench.record import OURS

Build = Callable[[Problem, Tensors, int], list[Layer]]


@dataclass(frozen=True)
class Provider:
    """Implementation. `labels`: display name per op; `packages`: its requirements; `adapted`: it
    computes the update, too."""

    build: Build
    labels: dict[str, str]
    packages: tuple[str, ...] = ()
    adapted: bool = True
    over_peft: bool = True  # its layers are PEFT's where there is PEFT
    dense: bool = False  # its weight is dense where the op's is packed
    in_auto: bool = True
    on_cpu: bool = True
    compiles: bool = False  # in its first call, which says nothing about the time of another

    def missing(self, device: str) -> str | None:
        """Return why it cannot take part, as far as is known without importing it."""
        for package in self.packages:
            if not has(package):
                return "not installed" if len(self.packages) == 1 else f"{package} is not installed"
        return None if self.on_cpu or device != "cpu" else "needs a GPU"

    def imports(self, ops: Iterable[str]) -> list[str]:
        """Return the modules that its layers of these ops take long to import."""
        # unsloth changes the packages imported after it.
        found = [package for package in self.packages if package != "unsloth"]
        if self.over_peft and has("peft") and any(OPS[op].ranked for op in ops):
            found.append("peftkern.tools.bench.peers")
        return found


def ours(problem: Problem, tensors: Tensors, copies: int) -> list[Layer]:
    """Build PEFT's layers after `peftkern.patch`; without PEFT the public functions."""
    if problem.op in OWN:
        return OWN[problem.op].ours(problem, tensors, copies)
    if problem.op == "nf4_quantize":
        return quantizers()[0](problem, tensors, copies)
    if not problem.kind.rows:
        weights = packed(tensors, copies)
        dtype = getattr(torch, problem.dtype)
        return [Layer(lambda w=w: dequantize(w, dtype)) for w in weights]
    if problem.E:
        return _grouped(tensors, copies, _grouped_ours)
    if not problem.kind.lora:
        return [Layer(lambda x, w=w: peftkern.nf4_linear(x, w)) for w in packed(tensors, copies)]
    if not has("peft"):
        return _functional(problem, tensors, copies)
    from peftkern.tools.bench import peers

    nf4 = problem.kind.nf4
    base = peers.packed_layer(packed(tensors, 1)[0]) if nf4 else linear(tensors["weight"])
    return _peft(base, problem, tensors, copies, patched=True)


def quantizers(double_quant: bool = True) -> tuple[Build, Build]:
    """Return the functions of peftkern and of bitsandbytes for the op nf4_quantize."""

    def build(call: Callable[[Tensor], object], values: Callable[[object], Tensor]) -> Build:
        def layers(problem: Problem, tensors: Tensors, copies: int) -> list[Layer]:
            return [
                Layer(lambda w=w: call(w), collect=lambda got: {"values": values(got)})
                for w in _clones(tensors["weight"], copies)
            ]

        return layers

    def theirs(weight: Tensor) -> tuple:
        from bitsandbytes.functional import quantize_4bit

        return quantize_4bit(weight, quant_type="nf4", compress_statistics=double_quant)

    def their_values(pair: tuple) -> Tensor:
        from bitsandbytes.functional import dequantize_4bit

        return dequantize_4bit(*pair)

    def ours(weight: Tensor) -> peftkern.NF4Weight:
        return peftkern.quantize_nf4(weight, double_quant=double_quant)

    return build(ours, quantized_values), build(theirs, their_values)


def _functional(problem: Problem, tensors: Tensors, copies: int) -> list[Layer]:
    nf4, names = problem.kind.nf4, ["lora_A", "lora_B"]
    call = peftkern.nf4_lora_linear if nf4 else peftkern.lora_linear
    if problem.kind.dora:
        call, names = dora_linear, [*names, "magnitude"]
    weights = packed(tensors, copies) if nf4 else _clones(tensors["weight"], copies)

    def layer(weight) -> Layer:
        leaves = tuple(tensors[name].clone().requires_grad_() for name in names)
        return Layer(lambda x: call(x, weight, *leaves, scaling=SCALING), leaves)

    return [layer(weight) for weight in weights]


def _grouped(tensors: Tensors, copies: int, run: Callable) -> list[Layer]:
    """Build layers that are functions of x and of tensors of their own."""

    def layer() -> Layer:
        leaves = tuple(tensors[name].clone().requires_grad_() for name in ("lora_A", "lora_B"))
        weight, offsets = tensors["weight"].clone(), tensors["offsets"]
        return Layer(lambda x: run(x, weight, offsets, *leaves), leaves)

    return [layer() for _ in range(copies)]


def _grouped_ours(x: Tensor, weight: Tensor, offsets: Tensor, a: Tensor, b: Tensor) -> Tensor:
    adapters = by_group(a, b, len(offsets))
    return peftkern.grouped_lora_linear(x, weight, offsets, *adapters, scaling=SCALING)


def _three_grouped_mm(x: Tensor, weight: Tensor, offsets: Tensor, a: Tensor, b: Tensor) -> Tensor:
    return grouped_mm(x, weight, offsets) + grouped_update(x, a, b, offsets)


def grouped_products(problem: Problem, tensors: Tensors, copies: int) -> list[Layer]:
    """Build the layer of three grouped products, as anyone can write it."""
    return _grouped(tensors, copies, _three_grouped_mm)


def composed(problem: Problem, tensors: Tensors, copies: int) -> list[Layer]:
    """Build what torch's own operators do best."""
    return OWN[problem.op].composed(problem, tensors, copies)


def frozen(problem: Problem, tensors: Tensors, copies: int) -> list[Layer]:
    """Build the dense layer without an adapter."""
    if problem.E:
        weights = _clones(tensors["weight"], copies)
        return [Layer(lambda x, w=w: grouped_mm(x, w, tensors["offsets"])) for w in weights]
    return [Layer(linear(tensors["weight"])) for _ in range(copies)]


def peft(problem: Problem, tensors: Tensors, copies: int) -> list[Layer]:
    if problem.op in OWN:
        return OWN[problem.op].peft(problem, tensors, copies)
    if problem.E:
        from peftkern.tools.bench import peers

        pool = peers.expert_pool(problem, tensors, copies)
        return [Layer(one, peers.adapter_of(one)) for one in pool]
    return _peft(linear(tensors["weight"]), problem, tensors, copies)


def bitsandbytes(problem: Problem, tensors: Tensors, copies: int) -> list[Layer]:
    if problem.op == "nf4_quantize":
        return quantizers()[1](problem, tensors, copies)
    if not problem.kind.rows:
        from bitsandbytes.functional import dequantize_4bit

        weights = [_bitsandbytes_layer(tensors).weight for _ in range(copies)]
        return [Layer(lambda w=w: dequantize_4bit(w.data, w.quant_state)) for w in weights]
    if problem.kind.lora:
        return _peft(_bitsandbytes_layer(tensors), problem, tensors, copies)
    layers = [_bitsandbytes_layer(tensors) for _ in range(copies)]
    return [Layer(layer.train(problem.mode != "no-grad")) for layer in layers]


def compiled(problem: Problem, tensors: Tensors, copies: int) -> list[Layer]:
    """Compile PEFT's layers: one compilation serves all copies."""
    from peftkern.tools.bench import peers

    layers = (bitsandbytes if problem.kind.nf4 else peft)(problem, tensors, copies)
    functions = peers.compiled([layer.run for layer in layers])
    return [Layer(f, layer.adapter) for f, layer in zip(functions, layers, strict=True)]


def unsloth(problem: Problem, tensors: Tensors, copies: int) -> list[Layer]:
    """Build PEFT's layer on unsloth's autograd function, which takes [batch, tokens, K]."""
    import unsloth  # noqa: F401  (first: it changes what the others import)
    from unsloth.kernels.fast_lora import LoRA_W
    from unsloth.kernels.utils import get_lora_parameters

    def through(layer: nn.Module) -> Callable[[Tensor], Tensor]:
        return lambda x: LoRA_W.apply(x[None], *get_lora_parameters(layer))[0]

    layers = (bitsandbytes if problem.kind.nf4 else peft)(problem, tensors, copies)
    return [Layer(through(layer.run), layer.adapter) for layer in layers]


def on_backend(name: str, build: Build = ours) -> Build:
    """Return the function of a provider whose layers run on one back end."""

    def forced(problem: Problem, tensors: Tensors, copies: int) -> list[Layer]:
        def over(run: Callable) -> Callable:
            def call(*given: Tensor) -> object:
                with peftkern.use_backend(name):
                    return run(*given)

            return call

        return [replace(one, run=over(one.run)) for one in build(problem, tensors, copies)]

    return forced


OVER_BITSANDBYTES = ("nf4_lora_linear", "nf4_dora_linear")
PROVIDERS = {
    OURS: Provider(ours, dict.fromkeys(OPS, OURS)),
    "frozen": Provider(
        frozen,
        dict.fromkeys(("nf4_lora_linear", "lora_linear"), "linear without LoRA")
        | dict.fromkeys(("dora_linear", "nf4_dora_linear"), "linear without DoRA")
        | {"nf4_linear": "dense linear", "grouped_linear": "grouped_mm without LoRA"},
        adapted=False,
        over_peft=False,
        dense=True,
    ),
    "peft": Provider(
        peft,
        dict.fromkeys(("lora_linear", "grouped_linear", "dora_linear"), "peft")
        | dict.fromkeys(("adalora_update", "adalora_orthogonality"), "peft")
        | {"nf4_lora_linear": "peft, dense weight"},
        ("peft",),
        dense=True,
    ),
    "grouped_mm": Provider(
        grouped_products, {"grouped_linear": "three grouped_mm"}, over_peft=False
    ),
    "composed": Provider(
        composed,
        rosa.DENSE
        | dict.fromkeys(("low_rank_svd", "low_rank_svdvals"), "torch QR+QR+SVD")
        | {"adalora_update": "foreach"},
        over_peft=False,
    ),
    "bitsandbytes": Provider(
        bitsandbytes,
        dict.fromkeys(("nf4_linear", "nf4_dequantize", "nf4_quantize"), "bitsandbytes")
        | dict.fromkeys(OVER_BITSANDBYTES if has("peft") else (), "peft+bitsandbytes"),
        ("bitsandbytes",),
    ),
    "compile": Provider(
        compiled,
        {"lora_linear": "torch.compile(peft)"}
        | ({"nf4_lora_linear": "torch.compile(peft+bnb)"} if has("bitsandbytes") else {}),
        ("peft",),
        compiles=True,
    ),
    "torch": Provider(
        on_backend("reference"),
        dict.fromkeys(("nf4_dequantize", "nf4_quantize"), "plain torch"),
        over_peft=False,
        in_auto=False,
    ),  # a peer that no user has would only flatter us
    "unsloth": Provider(
        unsloth,
        dict.fromkeys(("lora_linear", "nf4_lora_linear"), "unsloth"),
        ("unsloth",),
        on_cpu=False,
        compiles=True,
    ),
    # Its kernels are losses, norms and activations: none of these ops, which is worth reporting.
    "liger": Provider(frozen, {}, ("liger_kernel",)),
}
BASELINES = tuple(name for name in PROVIDERS if name != OURS)
ACCEPTED = f"auto, {', '.join(BASELINES)}, or module:function of your own"


def provider(name: str) -> Provider:
    """Return a built-in provider, or import that of a module."""
    if ":" not in name:
        return PROVIDERS[name]
    module, _, function = name.partition(":")
    build = getattr(importlib.import_module(module), function)
    return Provider(build, dict.fromkeys(OPS, name), over_peft=False)


# Those that read bitsandbytes' formats alone.
_OF_BITSANDBYTES = ("bitsandbytes", "compile", "unsloth")


def select(
    names: list[str], ops: list[str], device: str, format: str = "nf4"
) -> tuple[list[str], dict[str, str]]:
    """Select the baselines that take part, and the reasons against the others of "auto".

    Raises: ValueError naming --baselines if one that was named is unknown, is not installed, or has
        none of the ops.
    """
    if names == ["auto"]:
        auto = [name for name in BASELINES if PROVIDERS[name].in_auto]
        if format not in STATE_KEYS:
            auto = [name for name in auto if name not in _OF_BITSANDBYTES]
        absent = {name: why for name in auto if (why := _absent(name, ops, device))}
        # A baseline of other ops needs no mention.
        said = {
            name: why
            for name, why in absent.items()
            if PROVIDERS[name].missing(device) or not PROVIDERS[name].labels
        }
        return [name for name in auto if name not in absent], said
    for name in names:
        other = name in _OF_BITSANDBYTES and format not in STATE_KEYS
        if why := f"has no {format}" if other else _absent(name, ops, device):
            raise ValueError(f"--baselines: {name}: {why}; accepted: {ACCEPTED}")
    return names, {}


def _absent(name: str, ops: list[str], device: str) -> str | None:
    if ":" in name:
        module = name.partition(":")[0].partition(".")[0]
        path = [os.getcwd(), *sys.path]  # where the workers look, too
        found = importlib.machinery.PathFinder.find_spec(module, path)
        return None if found else f"there is no module {module}"
    if name not in BASELINES:
        return "unknown"
    one = PROVIDERS[name]
    if why := one.missing(device):
        return why
    return None if set(ops) & set(one.labels) else f"has nothing to compare for {', '.join(ops)}"


def _clones(tensor: Tensor, copies: int) -> list[Tensor]:
    return [tensor.clone() for _ in range(copies)]


def packed(tensors: Tensors, copies: int) -> list[QuantizedWeight]:
    def clone() -> QuantizedWeight:
        return packed_weight({n: t.clone() if "." in n else t for n, t in tensors.items()})

    return [clone() for _ in range(copies)]


def _bitsandbytes_layer(tensors: Tensors) -> nn.Module:
    """Build bitsandbytes' layer over the packed weight without quantizing again."""
    pieces = {name: t.clone() for name, t in tensors.items() if name.startswith("nf4.weight.")}
    weight = tensors["weight"]
    return prequantized(tensors["nf4.weight"].clone(), pieces, weight.shape, weight.dtype)


def _peft(
    base: nn.Module, problem: Problem, tensors: Tensors, copies: int, patched: bool = False
) -> list[Layer]:
    """Build PEFT's layers by `get_peft_model`, in eval mode where no gradient is wanted."""
    from peftkern.tools.bench import peers

    pool = peers.lora_pool(
        base,
        copies,
        r=problem.r,
        patched=patched,
        train=problem.mode != "no-grad",
        dropout=problem.dropout,
        adapter_dtype=getattr(torch, problem.adapter_dtype),
        adapters=(tensors["lora_A"], tensors["lora_B"]),
        magnitude=tensors.get("magnitude"),
    )
    return [Layer(one, peers.adapter_of(one)) for one in pool]
