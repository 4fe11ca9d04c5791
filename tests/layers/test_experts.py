"""Experts for plain torch: against PEFT, transformers and dense weights."""

from __future__ import annotations

import copy
import io

import pytest
import torch
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict
from torch import Tensor, nn
from transformers import (
    GptOssConfig,
    MixtralConfig,
    NemotronHConfig,
)
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts
from transformers.models.mixtral.modeling_mixtral import MixtralExperts
from transformers.models.nemotron_h.modeling_nemotron_h import NemotronHExperts

import peftkern
from peftkern.functional.lora_experts import swiglu
from peftkern.layers import Experts, LoRAExperts, NF4Experts, NF4Stack
from peftkern.layers.experts import experts_forward, gate_of

E, K, INNER, T, TOP = 4, 32, 16, 11, 2
SIZES = {"hidden_size": K, "intermediate_size": INNER, "num_experts_per_tok": TOP}
NEMOTRON = {"hidden_size": K, "moe_intermediate_size": INNER, "n_routed_experts": E}
FAMILIES = {
    "mixtral": lambda: MixtralExperts(MixtralConfig(**SIZES, num_local_experts=E)),
    "gpt_oss": lambda: GptOssExperts(GptOssConfig(**SIZES, num_local_experts=E)),
    "nemotron_h": lambda: NemotronHExperts(NemotronHConfig(**NEMOTRON)),
}


def family(name: str) -> nn.Module:
    torch.manual_seed(0)
    experts = FAMILIES[name]()
    experts.config._experts_implementation = "eager"
    for parameter in experts.parameters():
        nn.init.normal_(parameter, std=0.2)
    return experts.requires_grad_(False)


def routed() -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(1)
    ids = torch.rand(T, E).topk(TOP).indices
    ids[ids == 2] = 3  # no token comes to expert 2, some twice to 3
    return torch.randn(T, K, requires_grad=True), ids, torch.rand(T, TOP, requires_grad=True)


def filled(layer: LoRAExperts) -> LoRAExperts:
    torch.manual_seed(2)
    for factor in layer.lora_B.values():
        nn.init.normal_(factor, std=0.3)
    return layer


def close(found: Tensor, wanted: Tensor) -> None:
    assert found.shape == wanted.shape and (found - wanted).norm() <= 1e-5 * wanted.norm()


def assert_same_gradients(found: Tensor, wanted: Tensor, inputs: tuple[Tensor, ...]) -> None:
    grads = [torch.autograd.grad(y.square().sum(), inputs) for y in (found, wanted)]
    for ours, theirs in zip(*grads, strict=True):
        close(ours, theirs)


def test_which_gate_is_swiglu():
    """Transformers' own with SiLU: kernels take its place."""
    assert gate_of(family("mixtral")) is swiglu
    assert gate_of(Experts.from_experts(family("mixtral"))) is swiglu
    for name in ("gpt_oss", "nemotron_h"):
        assert gate_of(family(name)) is not swiglu
    swish = family("mixtral")
    swish.act_fn = nn.SiLU()
    assert gate_of(swish) is swiglu


class OtherSiLU(nn.SiLU):
    pass


class OtherExperts(MixtralExperts):
    def _apply_gate(self, gate_up_out: Tensor) -> Tensor:
        return super()._apply_gate(gate_up_out)


def _own_gate(experts: nn.Module) -> None:
    experts._apply_gate = lambda u: u.chunk(2, dim=-1)[0]


def _own_forward(experts: nn.Module) -> None:
    experts.act_fn.forward = torch.relu


CHANGES = {
    "another activation": lambda experts: setattr(experts, "act_fn", nn.GELU()),
    "a class of its own": lambda experts: setattr(experts, "act_fn", OtherSiLU()),
    "a method of a subclass": lambda experts: setattr(experts, "__class__", OtherExperts),
    "a gate of the module": _own_gate,
    "a forward of the activation": _own_forward,
    "a hook": lambda experts: experts.act_fn.register_forward_hook(lambda *args: None),
    "a hook before": lambda experts: experts.act_fn.register_forward_pre_hook(lambda *args: None),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_gate_that_is_changed_is_called(change):
    experts = family("mixtral")
    CHANGES[change](experts)
    assert gate_of(experts) == experts._apply_gate


def test_a_hook_of_all_modules_sees_the_activation():
    with torch.nn.modules.module.register_module_forward_hook(lambda *args: None):
        assert gate_of(family("mixtral")) is not swiglu


@pytest.mark.parametrize("name", FAMILIES)
def test_experts_are_those_of_transformers(name):
    theirs = family(name)
    hidden, ids, weights = routed()
    wanted = theirs(hidden, ids, weights)
    close(experts_forward(theirs, hidden, ids, weights), wanted)
    ours = Experts.from_experts(theirs)
    found = ours(hidden, ids, weights)
    close(found, wanted)
    assert_same_gradients(found, wanted, (hidden, weights))


@pytest.mark.parametrize("name", FAMILIES)
def test_nf4_experts_are_the_dequantized_ones(name):
    theirs = family(name)
    before = {n: p.clone() for n, p in theirs.named_parameters()}
    ours = NF4Experts.from_experts(theirs)
    dense = copy.deepcopy(theirs)
    for own, parameter in ours.named_parameters():
        if parameter.dim() == 3:
            assert isinstance(parameter, NF4Stack)
            dense._parameters[own] = nn.Parameter(parameter.dequantize(), requires_grad=False)
    hidden, ids, weights = routed()
    close(ours(hidden, ids, weights), dense(hidden, ids, weights))
    assert all(torch.equal(p, before[n]) for n, p in theirs.named_parameters())
    assert "up_proj=(4, " in repr(ours)
    twin = NF4Experts.from_experts(family(name))
    file = io.BytesIO()
    torch.save(ours.state_dict(), file)
    file.seek(0)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.data.zero_() if parameter.dim() < 3 else None
    twin.load_state_dict(torch.load(file))
    assert torch.equal(twin(hidden, ids, weights), ours(hidden, ids, weights))
    assert torch.equal(copy.deepcopy(ours)(hidden, ids, weights), ours(hidden, ids, weights))


class Model(nn.Module):
    def __init__(self, experts: nn.Module) -> None:
        super().__init__()
        self.experts = experts

    def forward(self, *args: Tensor) -> Tensor:
        return self.experts(*args)


@pytest.mark.parametrize("targets", [("gate_up_proj", "down_proj"), ("down_proj",)])
@pytest.mark.parametrize("name", ["mixtral", "gpt_oss"])
def test_state_and_results_are_those_of_peft(name, targets):
    config = LoraConfig(
        r=3,
        lora_alpha=6,
        target_modules=[],
        target_parameters=[f"experts.{target}" for target in targets],
        init_lora_weights=False,
    )
    peft = get_peft_model(Model(family(name)), config)
    state = get_peft_model_state_dict(peft)
    ours = LoRAExperts(family(name), r=3, lora_alpha=6, targets=targets)
    prefix = "base_model.model.experts."
    ours.load_peft_state_dict(state, prefix)
    exported = ours.peft_state_dict(prefix)
    assert exported.keys() == state.keys()
    assert all(torch.equal(exported[key], value) for key, value in state.items())

    inputs = routed()
    wanted, found = peft(*inputs), ours(*inputs)
    close(found, wanted)
    wanted.square().sum().backward()
    found.square().sum().backward()
    grads = {n: p.grad for n, p in peft.named_parameters() if p.requires_grad}
    for factors in (ours.lora_A, ours.lora_B):
        for factor in factors.values():
            factor.data.copy_(factor.grad)
    exported = ours.peft_state_dict(prefix)
    assert len(grads) == len(exported)
    for key, grad in grads.items():
        close(exported[key.replace(".default", "")], grad)
    with pytest.raises(ValueError, match=r"lora_A.weight: expected \[12, "):
        ours.load_peft_state_dict({k: v[1:] for k, v in exported.items()}, prefix)


@pytest.mark.parametrize("blocksize", [None, 64])
@pytest.mark.parametrize("name", FAMILIES)
def test_merged_experts_compute_the_same(name, blocksize):
    layer = filled(LoRAExperts.from_experts(family(name), blocksize=blocksize, r=4))
    assert isinstance(layer.experts, NF4Experts) == (blocksize is not None)
    before = {key: value.clone() for key, value in layer.state_dict().items()}
    merged = layer.merge()
    assert not any(isinstance(p, NF4Stack) for p in merged.parameters())
    inputs = routed()
    close(merged(*inputs), layer(*inputs))
    assert all(torch.equal(value, before[key]) for key, value in layer.state_dict().items())
    assert merged.state_dict().keys() == layer.experts._parameters.keys()


@pytest.mark.parametrize("name", FAMILIES)
def test_dropout_is_on_the_updates_inputs_alone(name):
    layer = filled(LoRAExperts(family(name), r=4, lora_dropout=0.5))
    inputs = routed()
    evaluated = layer.eval()(*inputs)
    layer.train()
    assert torch.equal(layer(*inputs), layer(*inputs)) is False
    layer.lora_dropout = 1e-9  # keeps all, through the path of dropout
    found = layer(*inputs)
    close(found, evaluated)
    factors = [*layer.lora_A.values(), *layer.lora_B.values()]
    assert_same_gradients(found, evaluated, (*inputs[::2], *factors))
    assert layer(*[part[:0] for part in inputs]).shape == (0, evaluated.shape[1])
    layer.lora_dropout = 0.5
    with torch.no_grad():
        mean = torch.stack([layer(*inputs) for _ in range(400)]).mean(0)
        for factor in layer.lora_B.values():
            factor.zero_()
        frozen = layer.experts(*inputs)
        close(layer(*inputs), frozen)
    # The down projection is linear in what is dropped; through the gate the mean moves.
    assert (mean - evaluated).norm() < (frozen - evaluated).norm()


def test_a_new_layer_changes_nothing_and_trains_its_factors_alone():
    experts = family("mixtral").requires_grad_(True)
    layer = LoRAExperts(experts, r=2)
    inputs = routed()
    close(layer(*inputs), family("mixtral")(*inputs))
    trained = {name for name, p in layer.named_parameters() if p.requires_grad}
    assert trained == {f"lora_{f}.{n}_proj" for f in "AB" for n in ("gate_up", "down")}
    assert layer.lora_A["gate_up_proj"].abs().max() <= K**-0.5
    assert "r=2, scaling=8, lora_dropout=0" in repr(layer)


def test_quantize_takes_the_experts_under_an_update():
    layer = filled(LoRAExperts(family("mixtral"), r=2))
    names = peftkern.quantize_(nn.ModuleDict({"mlp": layer}))
    assert names == ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    inputs = routed()
    close(layer(*inputs), layer.merge()(*inputs))


def test_what_is_no_module_of_experts_is_refused():
    with pytest.raises(TypeError, match=r"experts: expected Experts .* got Linear"):
        LoRAExperts(nn.Linear(2, 2))
    with pytest.raises(ValueError, match="targets: expected some of"):
        LoRAExperts(family("mixtral"), targets=["up_proj"])
    with pytest.raises(ValueError, match="r: expected an integer of at least 1"):
        LoRAExperts(family("mixtral"), r=0)
    normed = family("mixtral")
    normed.has_post_expert_norm = True
    with pytest.raises(TypeError, match="got MixtralExperts"):
        Experts.from_experts(normed)
    with pytest.raises(ValueError, match="up, down: expected"):
        Experts(torch.randn(2, 4, 4), torch.randn(3, 4, 2))
    with pytest.raises(ValueError, match="two tensors or none"):
        Experts(torch.randn(2, 4, 4), torch.randn(2, 4, 2), up_bias=torch.randn(2, 4))


def test_two_stacks_in_one_graph():
    """Kernels read both in a compiled module, forward and backward."""
    torch.manual_seed(0)
    frozen = NF4Experts(torch.randn(E, 2 * INNER, K) / 8, torch.randn(E, K, INNER) / 4)
    layer = LoRAExperts(frozen, r=4)
    hidden, index = torch.randn(T, K), torch.randint(E, (T, TOP))
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    results = []
    for run in (layer, compiled):
        x = hidden.clone().requires_grad_()
        y = run(x, index, torch.full((T, TOP), 0.5))
        results.append((y, *torch.autograd.grad(y.sum(), x)))
    torch.testing.assert_close(*results)  # a graph has the gate in torch's own operations
