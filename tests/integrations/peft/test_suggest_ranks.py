"""`peftkern.suggest_ranks`: known ranks found, the config in PEFT, the model left as it was."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from expert_models import VOCABULARY, tiny_moe
from peft import EvaConfig, LoraConfig, get_peft_model
from peft.tuners.lora.config import CordaConfig
from peft.tuners.lora.layer import LoraLayer, ParamWrapper
from peft_models import TARGETS, Net, make_conv1d, make_linear, make_linear4bit, tiny_llama
from started_models import BATCHES
from torch import Tensor, nn

import peftkern
from peftkern.formats.nf4 import NF4Weight
from peftkern.functional.nf4 import dequantize_nf4

EXPERT_BATCHES = [
    {"input_ids": tokens, "labels": tokens}
    for tokens in torch.randint(
        3, VOCABULARY, (2, 2, 12), generator=torch.Generator().manual_seed(0)
    )
]
PLANTED = {"0": 5, "1": 0, "2": 2, "3": 1}
SIZE = 24


class Parallel(nn.Module):
    """Layers beside each other, so that the gradient of each is its own."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(nn.Linear(SIZE, SIZE) for _ in PLANTED)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([layer(x) for layer in self.layers], -1)


def config(**settings) -> LoraConfig:
    own = {"r": 4, "lora_alpha": 8, "target_modules": list(TARGETS), "task_type": "CAUSAL_LM"}
    return LoraConfig(**{**own, **settings})


def ranks_in(model: nn.Module) -> dict[str, tuple[int, float]]:
    return {
        name.removeprefix("base_model.model."): (m.r["default"], m.scaling["default"])
        for name, m in model.named_modules()
        if isinstance(m, LoraLayer)
    }


def quantized_moe() -> nn.Module:
    """A mixture whose experts are in NF4, and nothing else."""
    model = tiny_moe()
    peftkern.quantize_(model, include=["experts"])
    return model


def loss_against(teacher: nn.Module):
    return lambda model, x: F.mse_loss(model(x), teacher(x))


def test_gradients_find_planted_ranks():
    base = Parallel()
    teacher = copy.deepcopy(base)
    with torch.no_grad():
        for layer, rank in zip(teacher.layers, PLANTED.values(), strict=True):
            layer.weight += torch.randn(SIZE, rank) @ torch.randn(rank, SIZE)
    report = peftkern.suggest_ranks(
        base,
        LoraConfig(r=2, lora_alpha=2, target_modules=["0", "1", "2", "3"]),
        "gradients",
        min_rank=0,
        max_rank=8,
        batches=[torch.randn(256, SIZE) for _ in range(2)],
        loss=loss_against(teacher),
    )
    assert report.ranks == {f"layers.{name}": rank for name, rank in PLANTED.items()}
    assert report.config.target_modules == {"layers.0", "layers.2", "layers.3"}
    assert (report.budget, report.spent, report.unit) == (8, 8, "rank")
    assert "1 without an adapter" in str(report) and "8 of a budget of 8 in rank" in str(report)
    assert set(ranks_in(get_peft_model(base, report.config))) == report.config.target_modules


def test_activations_choose_evas_ranks():
    base = tiny_llama()
    options = {"min_rank": 0, "max_rank": 8}
    report = peftkern.suggest_ranks(base, config(), "activations", batches=BATCHES, **options)
    model = get_peft_model(tiny_llama(), config())
    peftkern.initialize_(model, "eva", batches=BATCHES)
    eva = {name: rank for name, (rank, _) in ranks_in(model).items()}
    assert {name: rank for name, rank in report.ranks.items() if rank} == eva


@pytest.mark.parametrize("by", ["weights", "activations", "gradients", "gora"])
def test_the_printed_config_gives_peft_these_ranks_at_the_same_scaling(by):
    base = tiny_llama()
    before = {name: (p.clone(), p.requires_grad) for name, p in base.named_parameters()}
    kinds = [type(module) for module in base.modules()]
    data = {} if by == "weights" else {"batches": BATCHES}
    report = peftkern.suggest_ranks(base, config(), by, **data)
    assert [type(module) for module in base.modules()] == kinds
    assert not hasattr(base, "peft_config") and base.training == tiny_llama().training
    for name, p in base.named_parameters():
        assert torch.equal(p, before[name][0]) and p.requires_grad == before[name][1]
    session: dict = {}
    exec(report.python(), session)
    given = ranks_in(get_peft_model(base, session["config"]))
    assert {name: rank for name, (rank, _) in given.items()} == report.ranks
    assert {scaling for _, scaling in given.values()} == {2.0}
    assert len(set(report.ranks.values())) > 1
    uniform = ranks_in(get_peft_model(tiny_llama(), config()))
    assert report.spent <= report.budget and set(given) == set(uniform)
    assert report.as_dict()["config"]["rank_pattern"] == report.config.rank_pattern
    assert f"ranks by {by}: 14 layers" in str(report)


def test_a_base_in_nf4_has_the_spectra_of_what_it_decodes_to():
    packed = Net(make_linear4bit())
    decoded = Net(make_linear())
    nf4 = NF4Weight.from_bitsandbytes(packed.proj.weight)
    decoded.proj.weight.data = dequantize_nf4(nf4, torch.float32)
    asked = LoraConfig(r=4, target_modules=["proj"])
    ours, theirs = (peftkern.suggest_ranks(net, asked).layers[0] for net in (packed, decoded))
    assert pytest.approx(theirs.S, rel=1e-5) == ours.S and ours.shape == theirs.shape
    assert ours.certificate is not None
    for net in (packed, Net(make_conv1d())):
        batch = [torch.randn(8, net.proj.in_features if net is packed else 64)]
        for by in ("weights", "activations", "gradients"):
            data = {} if by == "weights" else {"batches": batch}
            found = peftkern.suggest_ranks(
                net, LoraConfig(r=2, target_modules=["proj"]), by,
                loss=lambda model, x: model(x).square().sum(), **data
            )  # fmt: skip
            assert found.layers[0].shape == (96, 64)
            get_peft_model(copy.deepcopy(net), found.config)


@pytest.mark.parametrize("by", ["activations", "gradients", "gora"])
def test_layers_that_no_data_reaches_are_named(by):
    class Branches(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.used, self.off, self.far = (nn.Linear(SIZE, SIZE) for _ in range(3))

        def forward(self, x: Tensor) -> Tensor:
            return self.used(x) + 0 * self.off(x).detach()

    asked = LoraConfig(r=2, target_modules=["used", "off", "far"])
    data = {"batches": [torch.randn(64, SIZE)], "loss": lambda m, b: m(b).square().sum()}
    why = "the loss does not depend on it"
    unreached = (
        {"off": why, "far": why} if by != "activations" else {"far": "no batch runs through it"}
    )
    report = peftkern.suggest_ranks(Branches(), asked, by, **data)
    assert report.unreached == unreached and {report.ranks[name] for name in unreached} == {1}
    assert f"{len(unreached)} not reached by the data" in str(report)
    told = {layer["name"]: layer["unreached"] for layer in report.as_dict()["layers"]}
    assert {name: what for name, what in told.items() if what} == unreached
    few = peftkern.suggest_ranks(Branches(), asked, by, min_rank=0, **data)
    assert few.config.target_modules == {"used", "off", "far"} - unreached.keys()
    data["loss"] = lambda m, b: m.far(b).sum()
    with pytest.raises(ValueError, match=r"expected to (depend on|run through) a layer"):
        one = LoraConfig(r=2, target_modules=["off" if by != "activations" else "far"])
        peftkern.suggest_ranks(Branches(), one, by, **data)


def test_rank_stabilized_scaling_keeps_its_alpha():
    report = peftkern.suggest_ranks(tiny_llama(), config(use_rslora=True), min_rank=0)
    assert report.config.alpha_pattern == {} and report.config.lora_alpha == 8
    for rank, scaling in ranks_in(get_peft_model(tiny_llama(), report.config)).values():
        assert scaling == pytest.approx(8 / rank**0.5)


@pytest.mark.parametrize("method", ["pissa", "olora", "lora_ga", "eva"])
def test_starts_take_the_ranks_as_they_are(method):
    report = peftkern.suggest_ranks(tiny_llama(), config())
    asked = report.config
    asked.eva_config = EvaConfig(rho=1.0) if method == "eva" else None
    data = {} if method in ("pissa", "olora") else {"batches": BATCHES}
    started = peftkern.initialize_(tiny_llama(), method, asked, **data)
    assert {n: rank for n, (rank, _) in ranks_in(started.model).items()} == report.ranks
    if method in ("pissa", "olora"):  # PEFT's own start
        asked.init_lora_weights = method
        model = get_peft_model(tiny_llama(), asked)
        assert {n: rank for n, (rank, _) in ranks_in(model).items()} == report.ranks


def test_other_settings_stay():
    asked = config(lora_dropout=0.1, bias="lora_only", modules_to_save=["lm_head"], use_dora=True)
    report = peftkern.suggest_ranks(tiny_llama(), asked, budget=3000, cost="parameters", max_rank=3)
    assert asked.rank_pattern == {} and asked.r == 4
    for name in ("lora_dropout", "bias", "modules_to_save", "use_dora", "task_type"):
        assert getattr(report.config, name) == getattr(asked, name)
        assert f"    {name}=" in report.python()
    assert max(report.ranks.values()) <= 3 and report.parameters <= 3000
    assert report.config.target_modules == set(TARGETS)
    chosen = peftkern.suggest_ranks(tiny_llama(), LoraConfig(r=2))  # PEFT knows Llama's targets
    assert chosen.config.target_modules == {"q_proj", "v_proj"}


EXPERTS = {"target_modules": ["q_proj"], "target_parameters": ["gate_up_proj", "down_proj"]}


def parameters_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: p for name, p in model.named_parameters() if p.dim() == 3}


def wrapped_ranks(model: nn.Module) -> dict[str, tuple[int, float]]:
    """Rank and scaling of each parameter that an adapter wraps, by its name."""
    return {
        f"{name.removeprefix('base_model.model.').replace('.base_layer', '')}.{m.parameter_name}": (
            m.r["default"],
            m.scaling["default"],
        )
        for name, m in model.named_modules()
        if isinstance(m, ParamWrapper)
    }


@pytest.mark.parametrize("family", ["Qwen3Moe", "GptOss"])  # [E, N, K], and [E, K, N]
@pytest.mark.parametrize("by", ["weights", "gradients"])
def test_experts_of_a_parameter_get_one_rank(by, family):
    base = tiny_moe(family)
    data = {} if by == "weights" else {"batches": EXPERT_BATCHES}
    report = peftkern.suggest_ranks(base, config(**EXPERTS), by, cost="parameters", **data)
    layers = {layer.name: layer for layer in report.layers}
    if by == "gradients":
        mean = sum(base(**batch).loss for batch in EXPERT_BATCHES) / len(EXPERT_BATCHES)
        mean.backward()
    for name, parameter in parameters_of(base).items():
        of = parameter.detach() if by == "weights" else parameter.grad
        S = torch.linalg.svdvals(of.double()).square().sum(0).sqrt()
        assert pytest.approx(S[:8].tolist(), rel=1e-4, abs=1e-6 * S[0].item()) == layers[name].S
        m, n = parameter.shape[1:] if family == "Qwen3Moe" else parameter.shape[:0:-1]
        assert layers[name].shape == (m, n) and layers[name].experts == len(parameter)
        assert layers[name].cost == len(parameter) * (m + n)
    assert report.spent == report.parameters <= report.budget == report.uniform
    session: dict = {}
    exec(report.python(), session)
    model = get_peft_model(base, session["config"])
    given = wrapped_ranks(model)
    assert {name: rank for name, (rank, _) in given.items()} == {
        name: report.ranks[name] for name in parameters_of(tiny_moe(family))
    }
    assert {scaling for _, scaling in given.values()} == {2.0} and len(set(given.values())) > 1
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert trained == report.parameters
    order = [name for name in layers if "layers.0." in name]
    assert order.index("model.layers.0.self_attn.q_proj") < len(order) - 1 and order[-1] in given


def test_gora_of_experts_is_the_mean_over_all():
    base = tiny_moe()
    report = peftkern.suggest_ranks(base, config(**EXPERTS), "gora", batches=EXPERT_BATCHES[:1])
    base(**EXPERT_BATCHES[0]).loss.backward()
    whole = sum((p * p.grad).abs().mean() for name, p in base.named_parameters()
                if name.endswith("q_proj.weight") or p.dim() == 3)  # fmt: skip
    for layer in report.layers:
        parameter = dict(base.named_parameters()).get(layer.name)
        if parameter is not None:
            share = (parameter * parameter.grad).abs().mean() / whole
            assert layer.kept == pytest.approx(share.item(), rel=1e-4)


def test_experts_alone_and_those_that_no_token_reaches():
    base = tiny_moe()
    with torch.no_grad():
        for layer in base.model.layers:
            layer.mlp.gate.weight.zero_()  # which sends all tokens to the same two
        base.model.layers[1].mlp.experts.down_proj.zero_()
    asked = config(target_modules=[], target_parameters=["gate_up_proj"])
    report = peftkern.suggest_ranks(base, asked, "gradients", batches=EXPERT_BATCHES, min_rank=0)
    first, second = (f"model.layers.{i}.mlp.experts.gate_up_proj" for i in range(2))
    assert report.unreached[second] == "the loss does not depend on it"
    assert report.unreached[first].startswith("the loss does not depend on its experts ")
    assert len(report.unreached[first].split(",")) == 4 and report.ranks[second] == 0
    assert report.config.target_parameters == [first] and not report.config.target_modules
    assert wrapped_ranks(get_peft_model(base, report.config)) == {first: (8, 2.0)}


def test_parameters_that_cannot_be_ranked_keep_rank_and_scaling():
    base = tiny_moe()
    asked = config(target_modules=["q_proj"], target_parameters=["mlp.gate.weight"])  # a router's
    report = peftkern.suggest_ranks(base, asked, "activations", budget=4, batches=EXPERT_BATCHES)
    assert set(report.skipped) == {f"model.layers.{i}.mlp.gate.weight" for i in range(2)}
    assert set(wrapped_ranks(get_peft_model(base, report.config)).values()) == {(4, 2.0)}


def test_experts_in_nf4_have_nearly_the_spectra_of_dense_ones():
    decoded = peftkern.suggest_ranks(quantized_moe(), config(**EXPERTS))
    dense = peftkern.suggest_ranks(tiny_moe(), config(**EXPERTS))
    assert decoded.skipped == dense.skipped == {}
    for ours, theirs in zip(decoded.layers, dense.layers, strict=True):
        assert pytest.approx(theirs.S, rel=0.2) == ours.S and ours.shape == theirs.shape


def test_a_dropped_layer_stays_so_though_its_name_ends_in_another_s():
    base = nn.ModuleDict({"a": nn.Linear(8, 8), "block": nn.ModuleDict({"a": nn.Linear(8, 8)})})
    nn.init.zeros_(base["block"]["a"].weight)
    asked = config(target_modules=["a"], task_type=None)
    report = peftkern.suggest_ranks(base, asked, min_rank=0)
    assert report.ranks == {"a": 8, "block.a": 0}
    assert ranks_in(get_peft_model(base, report.config)) == {"a": (8, 2.0)}


def test_settings_that_peft_names_elsewhere_are_imported_from_there():
    asked = config(init_lora_weights="corda", corda_config=CordaConfig(corda_method="kpm"))
    session: dict = {}
    exec(peftkern.suggest_ranks(tiny_llama(), asked).python(), session)
    assert session["config"].corda_config == asked.corda_config


def test_bad_arguments_are_told():
    base = tiny_llama()
    for arguments, says in (
        ({"by": "taste"}, "by: expected one of"),
        ({"by": "gradients"}, "batches: expected a list of batches, which 'gradients' learns"),
        ({"batches": BATCHES}, "batches: expected None: 'weights' needs no data"),
        ({"by": "activations", "batches": []}, "batches: expected at least one"),
        ({"budget": 10}, "budget: expected at least"),
        ({"budget": 0.5, "min_rank": 0}, "budget: expected enough for one rank"),
        ({"relative": "yes"}, "relative: expected True, False or None"),
        ({"tol": 0}, "tol: expected a positive number"),
        ({"lora_config": config(rank_pattern={"q_proj": 2})}, "without rank_pattern"),
        ({"lora_config": None}, "lora_config: expected a LoraConfig"),
        ({"model": get_peft_model(tiny_llama(), config())}, "model: expected one without adap"),
        ({"model": 3}, "model: expected a torch.nn.Module, got int"),
        ({"lora_config": config(target_parameters=["no"])}, "target_parameters: no parameter is"),
    ):
        given = {"model": base, "lora_config": config(), **arguments}
        with pytest.raises((TypeError, ValueError), match=says):
            peftkern.suggest_ranks(**given)
    with torch.no_grad():
        base.model.layers[1].mlp.up_proj.weight[0, 0] = float("inf")
    with pytest.raises(ValueError, match=r"layers\.1\.mlp\.up_proj: weight: expected finite"):
        peftkern.suggest_ranks(base, config())
    with pytest.raises(ValueError, match=r"proj: batches: expected finite"):
        peftkern.suggest_ranks(base, config(), "gradients", batches=BATCHES)
    assert not any(isinstance(module, LoraLayer) for module in base.modules())
