"""Experts of a mixture with LoRA on both of their layers, as users have them: real PEFT modules.

peftkern is PEFT's `lora.ParamWrapper` over transformers' fused experts after `peftkern.patch`. Its
peers: the unpatched wrapper, which adds each update to the weights of all experts; the same experts
with each layer as three `F.grouped_mm` (base, A, B), which anyone can write; and the frozen experts
without LoRA (transformers' grouped_mm).

On a GPU the sizes are those of models, and the experts are also in NF4 (`peftkern.quantize_`). PEFT
alone has no such experts; the other peers then keep theirs in bf16, with four times the bytes.

python bench/bench_grouped_linear.py [--device cuda] [--only E64-K1024-I512-top8-T1/] [--seconds 2]
"""

from __future__ import annotations

import copy
import functools
import math
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from peft import LoraConfig, get_peft_model
from specs import Case, Options, Spec, Target, Variant
from suite import benchmark_test, main
from torch import Tensor, nn
from transformers import GptOssConfig, Qwen3MoeConfig
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

import peftkern
from peftkern.layers.nf4_stack import NF4Stack
from peftkern.tools.bench.cases import SCALING
from peftkern.tools.bench.data import by_group, grouped_mm, grouped_update, nf4_values64
from peftkern.tools.bench.peers import Layers
from peftkern.tools.bench.record import OURS
from peftkern.tools.bench.shapes import EXPERT_PRESETS

PEFT, COMPOSED, FROZEN = "PEFT", "three grouped_mm", "frozen"
NAMES = (OURS, PEFT, COMPOSED, FROZEN)
NF4_NAMES = (OURS, COMPOSED, FROZEN)
BF16 = torch.bfloat16
Run = Callable[[Tensor, Tensor, Tensor], Tensor]  # x, experts of each token, their weights


@dataclass(frozen=True)
class Work:
    """E experts of width I between K and K; each of T tokens has `top` of them; backward or not.

    model: whose sizes these are; gpt-oss keeps its weights transposed and has biases. nf4: of ours.
    """

    E: int
    K: int
    width: int
    top: int
    T: int
    train: bool
    model: str = ""
    nf4: bool = False

    @property
    def name(self) -> str:
        direction = "nf4-" if self.nf4 else ""
        direction += "forward+backward" if self.train else "forward"
        sizes = self.model or f"E{self.E}-K{self.K}-I{self.width}-top{self.top}"
        return f"grouped_linear/{direction}-{sizes}-T{self.T}/bf16"

    def spec(self, names: tuple[str, ...], *targets: Target) -> Spec:
        """Return the case; the command line's n and k are the width and K."""
        build_it = functools.partial(build, work=self, names=names)
        return Spec(self.name, build_it, names, COMPOSED, targets, shape=(self.width, self.K))


@dataclass(frozen=True)
class Routed:
    """Inputs of the experts: tokens, the experts of each and their weights."""

    x: Tensor
    index: Tensor
    weights: Tensor


def make_experts(work: Work, options: Options) -> nn.Module:
    sizes = {"hidden_size": options.k, "num_experts": work.E, "num_local_experts": work.E}
    sizes |= {"moe_intermediate_size": options.n, "intermediate_size": options.n}
    transposed = work.model.startswith("gpt-oss")
    config = (GptOssConfig if transposed else Qwen3MoeConfig)(**sizes)
    config._experts_implementation = "grouped_mm"
    with options.device:
        experts = (GptOssExperts if transposed else Qwen3MoeExperts)(config).to(BF16)
    for weight in experts.parameters():
        nn.init.normal_(weight, std=weight.shape[-1] ** -0.5)
    return experts.requires_grad_(False)


def quantized(experts: nn.Module) -> nn.Module:
    pool = Layers([copy.deepcopy(experts)])
    with peftkern.use_backend(None):  # even if the case forces a back end
        peftkern.quantize_(pool)
    return pool.layers[0]


def stored_bytes(experts: nn.Module) -> int:
    stacks = [p.nf4.tensors if isinstance(p, NF4Stack) else (p,) for p in experts.parameters()]
    return sum(tensor.nbytes for tensors in stacks for tensor in tensors)


def make_routed(work: Work, options: Options) -> Routed:
    tokens, device = options.m(work.T), options.device
    x = torch.randn(tokens, options.k, device=device).to(BF16).requires_grad_(work.train)
    scores = torch.randn(tokens, work.E, device=device).softmax(dim=-1)
    weights, index = scores.topk(work.top)
    return Routed(x, index, (weights / weights.sum(dim=-1, keepdim=True)).to(BF16))


def wrap(experts: nn.Module, copies: int, r: int) -> tuple[list[nn.Module], list[tuple]]:
    """Return PEFT's wrappers, outermost ones, and their four factors: of gate and up, of down."""
    torch.manual_seed(1)
    names = [f"layers.{i}.{name}" for i in range(copies) for name in ("gate_up_proj", "down_proj")]
    config = LoraConfig(r=r, lora_alpha=SCALING * r, target_modules=[], target_parameters=names)
    pool = Layers([copy.deepcopy(experts) for _ in range(copies)])
    wrappers = list(get_peft_model(pool, config).base_model.model.layers)
    generator = torch.Generator().manual_seed(2)
    factors = [
        tuple(
            getattr(one, name)["default"].weight
            for one in (outer.base_layer, outer)
            for name in ("lora_A", "lora_B")
        )
        for outer in wrappers
    ]
    drawn = [
        torch.randn(f.shape, generator=generator) * s
        for f, s in zip(factors[0], (0.02, 0.1) * 2, strict=True)
    ]
    with torch.no_grad():
        for member in factors:
            for factor, values in zip(member, drawn, strict=True):
                factor.copy_(values)
    return wrappers, factors


def composed(experts: nn.Module, factors: tuple) -> Run:
    """Build the experts of three grouped products to a layer, sorted as transformers does."""
    E = experts.num_experts

    def adapted(x: Tensor, name: str, pair: tuple, offsets: Tensor, ids: Tensor) -> Tensor:
        weight = getattr(experts, name)
        y = grouped_mm(x, weight.mT if experts.is_transposed else weight, offsets)
        if experts.has_bias:
            y = y + getattr(experts, f"{name}_bias")[ids]
        return y + grouped_update(x, *pair, offsets)

    def run(x: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        ids, order = index.reshape(-1).sort(stable=True)
        ends = torch.arange(E, device=x.device)
        offsets = torch.searchsorted(ids, ends, right=True, out_int32=True)  # never waits for a GPU
        rows = x[order // index.shape[1]]
        inner = experts._apply_gate(adapted(rows, "gate_up_proj", factors[:2], offsets, ids))
        y = adapted(inner, "down_proj", factors[2:], offsets, ids)
        y = y * weights.reshape(-1, 1)[order]
        back = torch.empty_like(order)
        back[order] = torch.arange(len(order), device=x.device)
        return y[back].view(*index.shape, -1).sum(dim=1).to(x.dtype)

    return run


def oracle(
    experts: nn.Module, factors: tuple, routed: Routed, dy: Tensor | None
) -> tuple[Tensor, ...]:
    """Run the experts one by one in float64: y, and with dy the gradients."""
    x = routed.x.detach().double().requires_grad_(dy is not None)
    leaves = [factor.detach().double().requires_grad_(dy is not None) for factor in factors]
    E = experts.num_experts
    pairs = [by_group(*leaves[i : i + 2], E) for i in (0, 2)] if factors else None
    parts = [[factor.unbind() for factor in pair] for pair in pairs or ()]
    y = torch.zeros_like(x)

    def layer(x: Tensor, name: str, e: int, number: int) -> Tensor:
        weight = weight64(getattr(experts, name), e)
        out = x @ (weight if experts.is_transposed else weight.T)
        if experts.has_bias:
            out = out + getattr(experts, f"{name}_bias")[e].double()
        if not parts:
            return out
        A, B = parts[number]
        return out + SCALING * (x @ A[e].T) @ B[e].T

    for e in range(E):
        token, slot = (routed.index == e).nonzero(as_tuple=True)
        if len(token):
            inner = experts._apply_gate(layer(x[token], "gate_up_proj", e, 0))
            out = layer(inner, "down_proj", e, 1)
            y = y.index_add(0, token, out * routed.weights[token, slot].double()[:, None])
    if dy is None:
        return (y,)
    return y.detach(), *torch.autograd.grad(y, [x, *leaves], dy.double())


def weight64(weight: Tensor, e: int) -> Tensor:
    """Return the values of an expert that the stored ones stand for."""
    if not isinstance(weight, NF4Stack):
        return weight[e].double()
    values = math.prod(weight.shape[1:])
    return nf4_values64(weight.nf4, e * values, (e + 1) * values).view(weight.shape[1:])


def build(options: Options, work: Work, names: tuple[str, ...]) -> Case:
    torch.manual_seed(0)
    experts, routed = make_experts(work, options), make_routed(work, options)
    dy = torch.randn_like(routed.x) if work.train else None
    ours = quantized(experts) if work.nf4 else experts
    size = stored_bytes(ours)
    # Few tokens read few experts: others at the next call, else a cache would hold them.
    hit = len(routed.index.unique()) * (size // work.E)
    inputs = [routed, *(make_routed(work, options) for _ in range(options.copies(hit) - 1))]
    copies = options.copies(size)
    oracles: dict[tuple[bool, bool], tuple[Tensor, ...]] = {}

    def variant(name: str) -> Variant:
        base = ours if name == OURS else experts
        if name == FROZEN:
            layers, factors = [copy.deepcopy(base) for _ in range(copies)], [()] * copies
        else:
            layers, factors = wrap(base, copies, options.r)
        kind = base is experts, name == FROZEN
        if kind not in oracles:
            oracles[kind] = oracle(base, factors[0], routed, dy)
        if name == COMPOSED:
            layers = [
                composed(layer.base_layer.base_layer, f)
                for layer, f in zip(layers, factors, strict=True)
            ]
        elif name == OURS:
            holder = nn.ModuleList(layers)
            report = peftkern.patch(holder)
            if len(report.patched) != copies:
                raise RuntimeError(f"peftkern.patch left experts out: {report}")
            layers = list(holder)

        def call(i: int) -> object:
            given, number = inputs[i % len(inputs)], i % copies
            with torch.set_grad_enabled(work.train):
                y = layers[number](given.x, given.index, given.weights)
            if not work.train:
                return y
            return y.detach(), *torch.autograd.grad(y, [given.x, *factors[number]], dy)

        return Variant(call, oracles[kind])

    floor = counted(work, options, routed, size)
    return Case({name: variant(name) for name in names}, *floor, BF16)


def counted(work: Work, options: Options, routed: Routed, size: int) -> tuple[int, int]:
    """Return lower bounds of bytes and operations; only weights of experts with a row are read."""
    rows, hit = routed.index.numel(), len(routed.index.unique())
    width, K, r, passes = options.n, options.k, options.r, 2 if work.train else 1
    widths = 2 * K + 3 * width  # in and out of both layers
    adapters = 4 * r * widths
    traffic = passes * hit * (size // work.E + adapters) + 2 * len(routed.x) * 2 * K
    flops = passes * 6 * rows * width * K + (3 if work.train else 1) * 2 * rows * r * widths
    if work.train:
        traffic += 2 * len(routed.x) * K * 2 + work.E * adapters
    return traffic, flops


SIZES = [(8, 1024, 2048, 2, 256), (128, 512, 256, 8, 256), (64, 1024, 512, 8, 256)]
SIZES += [(64, 1024, 512, 8, tokens) for tokens in (1, 16, 2048)]
NEVER_SLOWER = (Target(PEFT, 1.0), Target(COMPOSED, 1.0))
# Of training: as many times as fast as PEFT, and what the frozen experts' time may be exceeded by.
PER_TOKENS = {1: (40, 1.2), 16: (8, 1.2), 256: (3.5, 1.15), 2048: (1.5, 1.1)}


def for_training(tokens: int) -> tuple[Target, ...]:
    peft, frozen = PER_TOKENS[tokens]
    return Target(PEFT, peft), Target(COMPOSED, 1.0), Target(FROZEN, 1 / frozen)


TOP = {"qwen3-30b-a3b": 8, "mixtral-8x7b": 2, "gpt-oss-20b": 4}
# A fourth of the bytes of the frozen bf16 experts: few tokens take less time, more not much longer.
FOR_NF4 = {1: (Target(FROZEN, 1.0),), 16: (Target(FROZEN, 1.0),), 256: (Target(FROZEN, 1 / 1.5),)}
SPECS = [
    Work(*size, train).spec(NAMES, *(for_training(size[-1]) if train else NEVER_SLOWER))
    for size in SIZES
    for train in (False, True)
]
SPECS += [
    Work(*size, train, nf4=True).spec(NF4_NAMES, *FOR_NF4[size[-1]])
    for size in SIZES
    if size[-1] in FOR_NF4
    for train in (False, True)
]


def gpu_specs(device: torch.device) -> list[Spec]:
    """Return the cases of a GPU: training and one token of every model before all else."""
    found = []
    for tokens in (256, 1, 16, 2048):
        for train in (True, False):
            for model, top in TOP.items():
                E, _, K = EXPERT_PRESETS[model]["gate_up_proj"]
                width = EXPERT_PRESETS[model]["down_proj"][2]
                work = Work(E, K, width, top, tokens, train, model)
                found.append(work.spec(NAMES, *NEVER_SLOWER))
                in_nf4 = replace(work, nf4=True)
                found.append(in_nf4.spec(NF4_NAMES, *FOR_NF4.get(tokens, ())))
    return found


test_grouped_linear = benchmark_test(SPECS)

if __name__ == "__main__":
    sys.exit(main("grouped_linear", SPECS, gpu_specs))
