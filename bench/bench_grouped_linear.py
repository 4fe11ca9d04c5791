"""Experts of a mixture with LoRA on both of their layers, as users have them: real PEFT modules.

peftkern is PEFT's `lora.ParamWrapper` over transformers' fused experts after `peftkern.patch`. Its
peers: the unpatched wrapper, which adds each update to the weights of all experts; the same experts
with each layer as three `F.grouped_mm` (base, A, B), which anyone can write; and the frozen experts
without LoRA (transformers' grouped_mm).

python bench/bench_grouped_linear.py [--only E64-K1024-I512-T1] [--rows 256] [--seconds 2]
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from suite import OURS, Case, Options, Spec, Target, Variant, benchmark_test, main
from torch import Tensor, nn
from transformers import Qwen3MoeConfig
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

import peftkern
from peftkern.tools.bench.data import grouped_mm
from peftkern.tools.bench.peers import Layers

PEFT, COMPOSED, FROZEN = "PEFT", "three grouped_mm", "frozen"
NAMES = (OURS, PEFT, COMPOSED, FROZEN)
BF16 = torch.bfloat16
SCALING = 2.0
Run = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Work:
    """E experts of width I between K and K; each of T tokens has `top` of them; backward or not."""

    E: int
    K: int
    width: int
    top: int
    T: int
    train: bool

    @property
    def name(self) -> str:
        direction = "forward+backward" if self.train else "forward"
        sizes = f"E{self.E}-K{self.K}-I{self.width}-top{self.top}-T{self.T}"
        return f"grouped_linear/{direction}-{sizes}/bf16"


@dataclass(frozen=True)
class Routed:
    """Inputs of the experts: tokens, the experts of each and their weights."""

    x: Tensor
    index: Tensor
    weights: Tensor


def make_experts(work: Work, device: torch.device) -> nn.Module:
    sizes = {"hidden_size": work.K, "moe_intermediate_size": work.width, "num_experts": work.E}
    config = Qwen3MoeConfig(**sizes, num_experts_per_tok=work.top)
    config._experts_implementation = "grouped_mm"
    experts = Qwen3MoeExperts(config).to(device, BF16)
    for weight in experts.parameters():
        nn.init.normal_(weight, std=weight.shape[-1] ** -0.5)
    return experts.requires_grad_(False)


def make_routed(work: Work, tokens: int, device: torch.device) -> Routed:
    x = torch.randn(tokens, work.K, device=device).to(BF16).requires_grad_(work.train)
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


def by_expert(A: Tensor, B: Tensor, E: int) -> tuple[Tensor, Tensor]:
    """PEFT's factors as [E, r, K] and [E, N, r]."""
    r = A.shape[0] // E
    return A.view(E, r, -1), B.view(-1, r, E).permute(2, 0, 1)


def composed(experts: nn.Module, factors: tuple, routed: Routed) -> Run:
    """Build the experts of three grouped products to a layer, sorted as transformers does."""
    E, top = experts.num_experts, routed.index.shape[1]

    def adapted(x: Tensor, weight: Tensor, A: Tensor, B: Tensor, offsets: Tensor) -> Tensor:
        A, B = (factor.to(x.dtype).contiguous() for factor in by_expert(A, B, E))
        update = grouped_mm(grouped_mm(x, A, offsets), B, offsets)
        return grouped_mm(x, weight, offsets) + update * SCALING

    def run(x: Tensor) -> Tensor:
        ids, order = routed.index.reshape(-1).sort(stable=True)
        offsets = torch.bincount(ids, minlength=E).cumsum(0).to(torch.int32)
        rows = x[order // top]
        gate, up = adapted(rows, experts.gate_up_proj, *factors[:2], offsets).chunk(2, dim=-1)
        y = adapted(F.silu(gate) * up, experts.down_proj, *factors[2:], offsets)
        y = y * routed.weights.reshape(-1, 1)[order]
        back = torch.empty_like(order)
        back[order] = torch.arange(len(order), device=x.device)
        return y[back].view(*routed.index.shape, -1).sum(dim=1).to(x.dtype)

    return run


def oracle(
    experts: nn.Module, factors: tuple | None, routed: Routed, dy: Tensor | None
) -> tuple[Tensor, ...]:
    """Run the experts one by one in float64: y, and with dy the gradients."""
    x = routed.x.detach().double().requires_grad_(dy is not None)
    leaves = [factor.detach().double().requires_grad_(dy is not None) for factor in factors or ()]
    E = experts.num_experts
    pairs = [by_expert(*leaves[i : i + 2], E) for i in (0, 2)] if factors else None
    parts = [[factor.unbind() for factor in pair] for pair in pairs or ()]
    y = torch.zeros_like(x)

    def layer(x: Tensor, weight: Tensor, e: int, number: int) -> Tensor:
        out = x @ weight[e].double().T
        if not parts:
            return out
        A, B = parts[number]
        return out + SCALING * (x @ A[e].T) @ B[e].T

    for e in range(E):
        token, slot = (routed.index == e).nonzero(as_tuple=True)
        if len(token):
            gate, up = layer(x[token], experts.gate_up_proj, e, 0).chunk(2, dim=-1)
            out = layer(F.silu(gate) * up, experts.down_proj, e, 1)
            y = y.index_add(0, token, out * routed.weights[token, slot].double()[:, None])
    if dy is None:
        return (y,)
    return y.detach(), *torch.autograd.grad(y, [x, *leaves], dy.double())


def build(options: Options, work: Work) -> Case:
    torch.manual_seed(0)
    device, tokens, r = options.device, options.m(work.T), options.r
    experts, routed = make_experts(work, device), make_routed(work, tokens, device)
    dy = torch.randn(tokens, work.K, device=device).to(BF16) if work.train else None
    size = sum(weight.nbytes for weight in experts.parameters())
    copies = options.copies(size)

    def variant(name: str) -> Variant:
        if name == FROZEN:
            layers, factors = [copy.deepcopy(experts) for _ in range(copies)], [()] * copies
        else:
            layers, factors = wrap(experts, copies, r)
        expected = oracle(experts, factors[0] or None, routed, dy)
        if name == COMPOSED:
            bases = [layer.base_layer.base_layer for layer in layers]
            runs = [composed(*pair, routed) for pair in zip(bases, factors, strict=True)]
        else:
            if name == OURS:
                holder = nn.ModuleList(layers)
                report = peftkern.patch(holder)
                layers = list(holder)
                if len(report.patched) != copies:
                    raise RuntimeError(f"peftkern.patch left experts out: {report}")
            runs = [lambda x, one=one: one(x, routed.index, routed.weights) for one in layers]

        def call(i: int) -> object:
            if not work.train:
                with torch.no_grad():
                    return runs[i % copies](routed.x)
            y = runs[i % copies](routed.x)
            return y.detach(), *torch.autograd.grad(y, [routed.x, *factors[i % copies]], dy)

        return Variant(call, expected)

    return Case({name: variant(name) for name in NAMES}, *counted(work, routed, size, r), BF16)


def counted(work: Work, routed: Routed, size: int, r: int) -> tuple[int, int]:
    """Return lower bounds of bytes and operations; only weights of experts with a row are read."""
    rows, hit = routed.index.numel(), len(routed.index.unique())
    passes = 2 if work.train else 1
    widths = 2 * work.K + 3 * work.width  # in and out of both layers
    adapters = 4 * r * widths
    traffic = passes * hit * (size // work.E + adapters) + 2 * len(routed.x) * 2 * work.K
    flops = (
        passes * 6 * rows * work.width * work.K + (3 if work.train else 1) * 2 * rows * r * widths
    )
    if work.train:
        traffic += 2 * len(routed.x) * work.K * 2 + work.E * adapters
    return traffic, flops


SIZES = [(8, 1024, 2048, 2, 256), (128, 512, 256, 8, 256), (64, 1024, 512, 8, 256)]
SIZES += [(64, 1024, 512, 8, tokens) for tokens in (1, 16, 2048)]
SPECS = [
    Spec(work.name, lambda options, work=work: build(options, work), NAMES, COMPOSED,
         (Target(PEFT, 1.0), Target(COMPOSED, 1.0)))
    for size in SIZES
    for train in (False, True)
    for work in [Work(*size, train)]
]  # fmt: skip

test_grouped_linear = benchmark_test(SPECS)

if __name__ == "__main__":
    sys.exit(main("grouped_linear", SPECS))
