"""Ranks of fused experts by what flows through them: the rows that are routed to each."""

from __future__ import annotations

import math

import pytest
import torch
from accelerate.hooks import AlignDevicesHook, add_hook_to_module
from expert_models import VOCABULARY, E, K, expert_net, expert_parameters, inputs, tiny_moe
from expert_rows import routed_rows
from peft import LoraConfig
from torch import Tensor, nn

import peftkern
from peftkern.integrations.peft.rank_report import RankReport
from peftkern.layers import Experts
from peftkern.layers.expert_stack import ExpertStack

GENERATOR = torch.Generator().manual_seed(0)
TOKENS = torch.randint(3, VOCABULARY, (2, 3, 24), generator=GENERATOR)
MASK = torch.ones_like(TOKENS[0])
MASK[1, 15:] = MASK[2, 3:] = 0
BATCHES = [
    {"input_ids": tokens, "labels": tokens, "attention_mask": mask}
    for tokens, mask in zip(TOKENS, (MASK, MASK.roll(1, 0)), strict=True)
]
# [E, N, K]; [E, K, N] and biases; no gate; all tokens to every expert; a module for each weight
FAMILIES = ["Qwen3Moe", "GptOss", "NemotronH", "Llama4Text", "JetMoe"]
WIDEST = 48  # input of a weight
WHOLE = {"max_rank": WIDEST}  # as many components as there are inputs, which loses nothing


def suggested(model: nn.Module, by: str = "activations", **options) -> RankReport:
    parameters = sorted({".".join(name.split(".")[-2:]) for name in expert_parameters(model)})
    config = LoraConfig(r=4, lora_alpha=8, target_modules=[], target_parameters=parameters)
    return peftkern.suggest_ranks(model, config, by, **{"batches": BATCHES, **options})


def spectrum_of(experts: list[Tensor]) -> Tensor:
    """Return the singular values of each expert's centered rows, squares added up."""
    total = torch.zeros(WIDEST, dtype=torch.float64)
    for x in filter(len, experts):
        S = torch.linalg.svdvals(x - x.mean(0))
        total[: len(S)] += S.square()
    return total.sqrt()


@pytest.mark.parametrize("family", FAMILIES)
def test_spectra_are_those_of_the_rows_that_the_loop_gives_each_expert(family):
    base = tiny_moe(family)
    expected = routed_rows(base, BATCHES)
    whole, few = suggested(base, **WHOLE), suggested(base, max_rank=6)
    assert whole.skipped == {} and {layer.name for layer in whole.layers} == expected.keys()
    for layer, short in zip(whole.layers, few.layers, strict=True):
        S = spectrum_of(expected[layer.name])
        parameter = base.get_parameter(layer.name)
        m, n = parameter.shape[:0:-1] if family == "GptOss" else parameter.shape[1:]
        assert layer.shape == (m, n) and layer.experts == len(parameter) == E
        got = torch.zeros_like(S)  # beyond as many as any expert has rows
        got[: len(layer.S)] = torch.tensor(layer.S)
        torch.testing.assert_close(got, S, rtol=1e-4, atol=1e-4 * S[0].item())
        kept = S[: layer.rank].square().sum() / S.square().sum()
        assert layer.kept == pytest.approx(kept.item(), rel=1e-4)
        # With few components, what those of earlier batches leave out is lost, but no more.
        assert len(short.S) == 6 and short.S[0] == pytest.approx(layer.S[0], rel=0.05)
        assert all(a <= b * (1 + 1e-4) for a, b in zip(short.S, layer.S, strict=False))


def test_stacks_in_groups_and_behind_hooks_have_the_same_spectra():
    base = tiny_moe()
    together = suggested(base)
    hooked = tiny_moe()
    for module in [m for m in hooked.modules() if hasattr(m, "gate_up_proj")]:
        add_hook_to_module(module, AlignDevicesHook("cpu", io_same_device=True))
    forwards = [module.forward for module in hooked.modules()]
    assert suggested(hooked).as_dict() == together.as_dict()
    # Experts that are not looked at run as transformers runs them, which rounds elsewhere.
    apart = suggested(base, statistics_bytes=1)
    assert apart.ranks == together.ranks
    for one, other in zip(apart.layers, together.layers, strict=True):
        assert pytest.approx(other.S, rel=1e-4) == one.S
    for before, module in zip(forwards, hooked.modules(), strict=True):
        assert module.forward == before
    assert not any("forward" in vars(module) for module in base.modules())
    with pytest.raises(IndexError):
        suggested(base, batches=[{"input_ids": TOKENS[0] + VOCABULARY}])
    assert not any("forward" in vars(module) for module in base.modules())


def test_experts_without_tokens_are_named():
    base = tiny_moe()
    with torch.no_grad():
        for layer in base.model.layers:
            layer.mlp.gate.weight.zero_()  # which sends all tokens to the same two
    report = suggested(base)
    for why in report.unreached.values():
        assert why.startswith("no batch runs through its experts ") and why.count(",") == E - 3
    assert set(report.unreached) == set(expert_parameters(base))
    for name in report.unreached:
        layer = next(one for one in report.layers if one.name == name)
        assert layer.experts == E and layer.S[0] > 0


@pytest.mark.parametrize("by", ["activations", "gradients", "gora"])
@pytest.mark.parametrize("family", ["Qwen3Moe", "GptOss", "Llama4Text", "JetMoe"])
def test_experts_in_nf4_are_ranked_as_what_they_decode_to(by, family):
    packed, decoded = tiny_moe(family), tiny_moe(family)
    peftkern.quantize_(packed, include=["experts"], exclude=["router"])  # a layer, of JetMoE
    with torch.no_grad():
        for name, p in packed.named_parameters():
            if isinstance(p, ExpertStack):
                decoded.get_parameter(name).copy_(p.dequantize())
    before = {name: p.requires_grad for name, p in packed.named_parameters()}
    ours, theirs = (suggested(model, by, statistics_bytes=1 << 13) for model in (packed, decoded))
    assert ours.skipped == {} and ours.ranks == theirs.ranks
    for one, other in zip(ours.layers, theirs.layers, strict=True):
        assert one.kept == pytest.approx(other.kept, rel=1e-4)
        assert pytest.approx(other.S, rel=1e-4, abs=1e-4 * max(other.S, default=0)) == one.S
        assert one.shape == other.shape and one.unreached == other.unreached
    assert before == {name: p.requires_grad for name, p in packed.named_parameters()}
    assert all(p.grad is None for p in packed.parameters())


class Mixture(nn.Module):
    """Experts of plain torch and a router."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.router = nn.Linear(K, E)
        self.experts = Experts(torch.randn(E, 16, K), torch.randn(E, K, 8))

    def forward(self, x: Tensor) -> Tensor:
        weights, index = self.router(x).softmax(-1).topk(2)
        return self.experts(x, top_k_weights=weights, top_k_index=index)


def test_experts_of_plain_torch_called_by_keywords():
    net, x = Mixture(), torch.randn(200, K, generator=GENERATOR)
    config = LoraConfig(r=4, target_modules=["router"], target_parameters=["gate_up_proj"])
    report = peftkern.suggest_ranks(net, config, "activations", batches=[x], **WHOLE)
    index = net.router(x).topk(2).indices
    S = spectrum_of([x[(index == expert).any(1)].double() for expert in range(E)])
    (layer,) = (one for one in report.layers if one.name == "experts.gate_up_proj")
    assert pytest.approx(S[:K].tolist(), rel=1e-4) == layer.S
    assert math.isclose(sum(s * s for s in layer.S), S.square().sum(), rel_tol=1e-5)


@pytest.mark.parametrize("by", ["activations", "gradients"])
def test_experts_that_are_not_seen(by):
    net = expert_net("step3p7").unload()
    peftkern.quantize_(net)
    config = LoraConfig(target_modules=[], target_parameters=expert_parameters(net))
    says = {"activations": "the inputs of a parameter are not seen, as those of a layer are"}
    says = f"experts.gate_up_proj: {says.get(by, 'NF4Stack has no gradient')}"
    with pytest.raises(ValueError, match=says):
        peftkern.suggest_ranks(net, config, by, batches=[inputs()])
