"""Delta-LoRA: the telescoped and the written form against each other and a plain transcription."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from method_models import (
    ALPHA,
    RANK,
    K,
    N,
    batches,
    net_of,
    our_net,
    peft_net,
    relative_difference,
    train,
    twins,
)
from tolerances import (
    AUTOCAST_RTOL,
    DELTA_LORA_NEAREST_KEEPS,
    DELTA_LORA_STOCHASTIC,
    METHODS_RTOL,
    errors,
)
from torch import Tensor, nn

import peftkern
from peftkern.layers import LoRALinear, NF4Linear
from peftkern.methods import DeltaLoRALinear, DeltaLoRAScheduler, InPlaceDeltaLoRA, delta_lora
from peftkern.methods.delta_lora import round_stochastically
from peftkern.methods.pairs import find_pairs

F64, F32, BF16 = torch.float64, torch.float32, torch.bfloat16
LAM, START, STEPS = 2.0, 5, 20
SCALING = ALPHA / RANK
RTOL = METHODS_RTOL[F64]


def delta(linear: nn.Linear, **options) -> DeltaLoRALinear:
    options = {"r": RANK, "lora_alpha": ALPHA, "lam": LAM, "adapter_dtype": F64, **options}
    return DeltaLoRALinear(linear, **options)


def layers(net: nn.Module) -> list[nn.Module]:
    return [pair.layer for pair in find_pairs(net)]


def copy_factors(source: nn.Module, target: nn.Module) -> None:
    with torch.no_grad():
        for a, b in zip(find_pairs(source), find_pairs(target), strict=True):
            b.lora_A.copy_(a.lora_A)
            b.lora_B.copy_(a.lora_B)


def adamw(net: nn.Module) -> torch.optim.AdamW:
    return torch.optim.AdamW([p for p in net.parameters() if p.requires_grad], lr=1e-2)


def run(net: nn.Module, schedule, data, optimizer=None) -> list[float]:
    return train(net, optimizer or adamw(net), data, schedule)


class Plain(nn.Module):
    """The paper's algorithm: W is a constant in the graph and changes between steps."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        for name in ("up", "down"):
            layer = net.get_submodule(name)
            base = layer.base
            dense = peftkern.dequantize_nf4(base.nf4, F64) if hasattr(base, "nf4") else base.weight
            self.register_buffer(f"{name}_W", dense.detach().clone())
            self.register_buffer(f"{name}_b", base.bias.detach().double())
            for factor in ("lora_A", "lora_B"):
                value = getattr(layer, factor).detach().clone()
                self.register_parameter(f"{name}_{factor[-1]}", nn.Parameter(value))
        self.last_step, self.before = 0, None

    def apply_layer(self, name: str, x: Tensor) -> Tensor:
        W, b, A, B = (getattr(self, f"{name}_{part}") for part in "WbAB")
        return x @ W.T + b + SCALING * (x @ A.T) @ B.T

    def forward(self, x: Tensor) -> Tensor:
        return self.apply_layer("down", torch.tanh(self.apply_layer("up", x)))

    @torch.no_grad()
    def step(self) -> None:
        self.last_step += 1
        now = {n: getattr(self, f"{n}_B") @ getattr(self, f"{n}_A") for n in ("up", "down")}
        if self.last_step > START:
            for name, product in now.items():
                getattr(self, f"{name}_W").add_(LAM * SCALING * (product - self.before[name]))
        self.before = now


def test_both_forms_equal_the_paper_over_a_training_run():
    telescoped, written = net_of(delta), our_net()
    copy_factors(telescoped, written)
    plain = Plain(telescoped)
    data = batches(STEPS)
    curves = [
        run(telescoped, DeltaLoRAScheduler(telescoped, START), data),
        run(written, InPlaceDeltaLoRA(written, lam=LAM, start_step=START), data),
    ]
    wanted = run(plain, plain, data)
    for curve in curves:
        assert all(math.isclose(a, b, rel_tol=RTOL) for a, b in zip(curve, wanted, strict=True))
    for name in ("up", "down"):
        first, second = telescoped.get_submodule(name), written.get_submodule(name)
        A, B, W = (getattr(plain, f"{name}_{part}") for part in "ABW")
        assert relative_difference((first.lora_A, first.lora_B), (A, B)) < RTOL
        assert relative_difference((second.lora_A, second.lora_B), (A, B)) < RTOL
        assert relative_difference([second.weight], [W]) < RTOL
        merged = W + SCALING * B @ A
        assert relative_difference([first.merge().weight], [merged]) < RTOL
        # It did something: the weight went lam times as far as the product since the start.
        moved = first.merge().weight - first.base.weight - SCALING * first.lora_B @ first.lora_A
        assert moved.norm() > 0.1 * (SCALING * B @ A).norm()


def test_gradients_are_those_at_the_scaling_alone():
    """Not at (1 + lam) * scaling, which differentiating the telescoped value would give."""
    torch.manual_seed(3)
    layer = delta(nn.Linear(K, N, dtype=F64))
    nn.init.normal_(layer.lora_B)
    layer.start()
    with torch.no_grad():
        layer.lora_A += torch.randn_like(layer.lora_A)
        layer.lora_B += torch.randn_like(layer.lora_B)
    x, G = torch.randn(7, K, dtype=F64, requires_grad=True), torch.randn(7, N, dtype=F64)
    layer(x).backward(G)
    A, B, start_A, start_B = layer.lora_A, layer.lora_B, layer.start_A, layer.start_B
    W = layer.base.weight + LAM * SCALING * (B @ A - start_B @ start_A)
    expected = (SCALING * (G @ B).T @ x, SCALING * G.T @ (x @ A.T), G @ (W + SCALING * B @ A))
    assert relative_difference((A.grad, B.grad, x.grad), expected) < RTOL


@pytest.mark.parametrize("double_quant", [True, False])
def test_nf4_base(double_quant):
    def make(linear: nn.Linear) -> DeltaLoRALinear:
        return delta(NF4Linear.from_linear(linear, double_quant=double_quant))

    net = net_of(make, F32)
    packed = [layer.base.weight.clone() for layer in layers(net)]
    plain = Plain(net)
    data = batches(STEPS)
    ours = run(net, DeltaLoRAScheduler(net, START), data)
    theirs = run(plain, plain, data)
    assert all(math.isclose(a, b, rel_tol=RTOL) for a, b in zip(ours, theirs, strict=True))
    for layer, before in zip(layers(net), packed, strict=True):
        assert torch.equal(layer.base.weight, before)
        dense = layer.merge()
        assert type(dense) is nn.Linear and dense.weight.dtype is F32
    x = data[0][0]
    merged = copy.deepcopy(net)
    merged.up, merged.down = net.up.merge(), net.down.merge()
    difference = relative_difference([merged(x.float())], [net(x).float()])
    assert difference < METHODS_RTOL[F32]


def test_nothing_changes_at_the_start_and_until_it():
    net, reference = net_of(delta), our_net()
    copy_factors(net, reference)
    schedule = DeltaLoRAScheduler(net, START)
    data = batches(START)
    run(net, schedule, data[:-1])
    assert not any(layer.started for layer in layers(net))
    run(reference, DeltaLoRAScheduler(net_of(delta), STEPS), data[:-1])
    x = data[0][0]
    assert torch.equal(net(x), reference(x))
    before = net(x)
    schedule.step()
    assert all(layer.started for layer in layers(net))
    assert relative_difference([net(x)], [before]) < RTOL
    with pytest.raises(ValueError, match="started already"):
        net.up.start()
    at_once = DeltaLoRAScheduler(net_of(delta), 0)
    assert all(layer.started for layer in at_once.layers.values())


def test_lam_zero_is_lora():
    net, reference = net_of(lambda linear: delta(linear, lam=0.0)), our_net()
    copy_factors(net, reference)
    data = batches(STEPS)
    ours = run(net, DeltaLoRAScheduler(net, 0), data)
    theirs = run(reference, DeltaLoRAScheduler(net_of(delta)), data)
    assert all(math.isclose(a, b, rel_tol=RTOL) for a, b in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("written", [False, True])
def test_resume_from_a_state_dict(written):
    def make() -> nn.Module:
        return our_net() if written else net_of(delta)

    schedule_of = InPlaceDeltaLoRA if written else DeltaLoRAScheduler
    data = batches(STEPS)
    straight, resumed = twins(make())
    run(straight, schedule_of(straight, start_step=START), data)
    optimizer, schedule = adamw(resumed), schedule_of(resumed, start_step=START)
    run(resumed, schedule, data[:10], optimizer)
    states = copy.deepcopy([one.state_dict() for one in (resumed, optimizer, schedule)])
    again = make()
    again.load_state_dict(states[0])
    optimizer, schedule = adamw(again), schedule_of(again, start_step=1)
    optimizer.load_state_dict(states[1])
    schedule.load_state_dict(states[2])
    run(again, schedule, data[10:], optimizer)
    for p, q in zip(again.state_dict().values(), straight.state_dict().values(), strict=True):
        assert torch.equal(p, q)


def test_states_of_other_models():
    net = net_of(delta)
    fresh = copy.deepcopy(net.state_dict())
    assert not any("start" in key for key in fresh)
    DeltaLoRAScheduler(net, 0)
    started = net.state_dict()
    assert {"up.start_A", "up.start_B", "up.base.weight"} <= set(started)
    with pytest.raises(RuntimeError, match=r"up\.start_B"):
        net.load_state_dict({k: v for k, v in started.items() if k != "up.start_B"})
    net.load_state_dict(fresh)
    assert not net.up.started
    schedule = InPlaceDeltaLoRA(our_net(), start_step=0)
    state = schedule.state_dict()
    state["written"]["other:None"] = state["written"].pop("up:None")
    with pytest.raises(ValueError, match="other layers: other:None, up:None"):
        schedule.load_state_dict(state)


@pytest.mark.parametrize("config", [{}, {"use_rslora": True}])
def test_in_place_on_a_peft_layer(config):
    model = peft_net(**config)
    (pair, _) = find_pairs(model)
    first = model.base_model.model.up.base_layer.weight.detach().clone()
    schedule = InPlaceDeltaLoRA(model, lam=LAM, start_step=START)
    data = batches(STEPS)
    run(model, schedule, data[:START])
    start = (pair.lora_B @ pair.lora_A).detach().clone()
    run(model, schedule, data[START:])
    expected = first + LAM * pair.scaling * (pair.lora_B @ pair.lora_A - start)
    assert relative_difference([model.base_model.model.up.base_layer.weight], [expected]) < RTOL
    x = data[0][0]
    before = model(x)
    merged = model.merge_and_unload()
    assert relative_difference([merged(x)], [before]) < RTOL


def test_in_place_on_conv1d():
    from peft import LoraConfig, get_peft_model
    from transformers.pytorch_utils import Conv1D

    model = nn.Sequential(Conv1D(N, K)).double()
    first = model[0].weight.detach().clone()
    config = LoraConfig(r=2, target_modules=["0"], fan_in_fan_out=True, init_lora_weights=False)
    model = get_peft_model(model, config).double()
    schedule = InPlaceDeltaLoRA(model, start_step=0)
    (pair,) = find_pairs(model)
    before = (pair.lora_B @ pair.lora_A).detach()
    with torch.no_grad():
        pair.lora_A.add_(torch.randn_like(pair.lora_A))
    schedule.step()
    expected = first + (2 * pair.scaling * (pair.lora_B @ pair.lora_A - before)).T
    assert relative_difference([pair.layer.base_layer.weight], [expected]) < RTOL


def kept(rounding: str) -> tuple[float, float]:
    """Of the change that a bf16 weight was to take: what share arrived, and how far off it is.

    The sizes are those of some rows of a language model: 4096 inputs, weights of 0.02, a learning
    rate of 5e-5.
    """
    torch.manual_seed(0)
    linear = nn.Linear(4096, 32, dtype=BF16)
    nn.init.normal_(linear.weight, std=0.02)
    layer = LoRALinear.from_linear(linear, r=8, lora_alpha=16)
    first = layer.weight.float()
    optimizer = torch.optim.AdamW([layer.lora_A, layer.lora_B], lr=5e-5)
    schedule = InPlaceDeltaLoRA(layer, start_step=START, rounding=rounding)
    x, target = torch.randn(64, 4096).to(BF16), torch.randn(64, 32).to(BF16)
    for step in range(60):
        (layer(x) - target).float().square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        if step == START - 1:
            start = (layer.lora_B @ layer.lora_A).detach()
    wanted = 2.0 * layer.scaling * ((layer.lora_B @ layer.lora_A).detach() - start)
    got = layer.weight.float() - first
    share = (got * wanted).sum() / wanted.square().sum()
    return share.item(), ((got - wanted).norm() / wanted.norm()).item()


def test_nearest_rounding_loses_the_update_and_stochastic_does_not():
    share, off = kept("nearest")
    print(f"nearest: {share:.1%} of the update arrived, {off:.1%} off")
    assert share < DELTA_LORA_NEAREST_KEEPS
    share, off_stochastic = kept("stochastic")
    print(f"stochastic: {share:.1%} of the update arrived, {off_stochastic:.1%} off")
    assert abs(share - 1) < DELTA_LORA_STOCHASTIC
    assert off_stochastic < off


def test_stochastic_rounding_is_right_on_average():
    x = torch.tensor([1.0, 1.0 + 2**-10, -3.3, 1e-39, -0.0, 1e30]).repeat(20_000, 1)
    generator = torch.Generator().manual_seed(0)
    y = round_stochastically(x, generator).double()
    neighbors = x[0].bfloat16().double()
    mean, exact = y.mean(0), x[0].double()
    # The mean of 20,000 draws is off by their spread / sqrt(20,000), six times that at most here.
    spread = y.std(0) / math.sqrt(len(x))
    assert ((mean - exact).abs() <= 6 * spread).all()
    assert (y[:, 0] == 1.0).all() and (y[:, 4] == 0.0).all()
    assert torch.unique(y[:, 1]).tolist() == [1.0, 1.0078125]
    assert ((y[0] - neighbors).abs() <= 2**-7 * neighbors.abs() + 1e-40).all()
    odd = torch.tensor([math.nan, math.inf, -math.inf])
    assert torch.equal(round_stochastically(odd).isnan(), odd.isnan())
    assert round_stochastically(odd)[1:].tolist() == [math.inf, -math.inf]
    with pytest.raises(ValueError, match=r"x: expected torch\.float32"):
        round_stochastically(x.double())


def test_compile():
    net = net_of(lambda linear: delta(linear, adapter_dtype=F32), F32)
    for layer in layers(net):
        nn.init.normal_(layer.lora_B, std=0.1)
        layer.start()
        nn.init.normal_(layer.lora_B, std=0.1)
    x = torch.randn(5, K)
    grads = []
    for module in (net, torch.compile(net, fullgraph=True, backend="aot_eager")):
        net.zero_grad()
        y = module(x)
        y.square().sum().backward()
        grads.append([y.detach(), *(p.grad.clone() for p in net.parameters() if p.requires_grad)])
    torch.testing.assert_close(*grads)


def test_arguments_are_checked():
    linear = nn.Linear(4, 4)
    half = LoRALinear(4, 4, r=2, dtype=torch.float16)
    packed = nn.ModuleDict({"proj": peftkern.layers.NF4LoRALinear(64, 64, r=2)})
    merged = peft_net()
    merged.base_model.model.up.merge()
    for make, says in (
        (lambda: DeltaLoRALinear(linear, lam=-1.0), "^lam: expected"),
        (lambda: DeltaLoRALinear(linear, lam=math.inf), "^lam: expected"),
        (lambda: DeltaLoRAScheduler(linear), "model: expected DeltaLoRALinear layers"),
        (
            lambda: DeltaLoRAScheduler(delta(linear), -1),
            "start_step: expected an integer of at least 0",
        ),
        (lambda: InPlaceDeltaLoRA(our_net(), rounding="up"), "rounding: expected one of"),
        (lambda: InPlaceDeltaLoRA(half), r"^: expected a dense weight \[4, 4\].*float16"),
        (lambda: InPlaceDeltaLoRA(packed), "^proj: expected a dense .*DeltaLoRALinear works"),
        (lambda: InPlaceDeltaLoRA(merged), "the adapter is merged"),
    ):
        with pytest.raises(ValueError, match=says):
            make()


@pytest.mark.parametrize("dtype", [F32, BF16])
def test_telescoped_value_in_low_precision_and_under_autocast(dtype):
    """Both products count, times lam, in 16-bit factors and under autocast too."""
    layer = delta(nn.Linear(256, 64, dtype=dtype), adapter_dtype=dtype)
    nn.init.normal_(layer.lora_B, std=0.1)
    layer.start()
    nn.init.normal_(layer.lora_A, std=0.1), nn.init.normal_(layer.lora_B, std=0.1)
    x = torch.randn(9, 256, dtype=dtype)
    names = ("base.weight", "base.bias", "lora_A", "lora_B", "start_A", "start_B")
    W, b, A, B, start_A, start_B = (layer.state_dict()[name].double() for name in names)
    W = W + SCALING * B @ A + LAM * SCALING * (B @ A - start_B @ start_A)
    wanted = x.double() @ W.T + b
    assert errors(layer(x), wanted)[1] <= (AUTOCAST_RTOL if dtype is BF16 else METHODS_RTOL[F32])
    with torch.autocast("cpu", BF16):
        y = layer(x)
    assert y.dtype is BF16 and errors(y, wanted)[1] <= AUTOCAST_RTOL


def test_factors_in_16_bits_are_summed_in_float32():
    """At the start the two products cancel: what is left is small, and rounding would hide it."""
    layer = delta(nn.Linear(64, 32, dtype=BF16), adapter_dtype=BF16, lam=2.0)
    nn.init.normal_(layer.lora_B)
    layer.start()
    A, B = layer._factors()
    products = [b.double() @ a.double() for a, b in zip(A.chunk(2), B.chunk(2, 1), strict=True)]
    assert torch.equal(sum(products), layer.lora_B.double() @ layer.lora_A.double())


@pytest.mark.parametrize("rows", [1, 3, 100])
def test_in_place_writes_every_block_of_rows(monkeypatch, rows):
    monkeypatch.setattr(delta_lora, "_CHUNK", rows * K)
    layer = our_net().up
    schedule, first = InPlaceDeltaLoRA(layer, lam=LAM, start_step=0), layer.weight.detach().clone()
    nn.init.normal_(layer.lora_B)
    schedule.step()
    expected = first + LAM * SCALING * layer.lora_B @ layer.lora_A
    assert relative_difference([layer.weight], [expected]) < RTOL


def test_a_step_that_raises_writes_nothing_and_may_be_taken_again():
    model = peft_net(init_lora_weights=False)
    schedule = InPlaceDeltaLoRA(model, lam=LAM, start_step=0)
    up, down = model.base_model.model.up, model.base_model.model.down
    pair = find_pairs(model)[0]
    first, before = up.base_layer.weight.detach().clone(), (pair.lora_B @ pair.lora_A).detach()
    nn.init.normal_(pair.lora_B)
    down.merge()
    with pytest.raises(ValueError, match="the adapter is merged"):
        schedule.step()
    down.unmerge()
    assert torch.equal(up.base_layer.weight, first) and schedule.last_step == 0
    schedule.step()
    expected = first + LAM * pair.scaling * (pair.lora_B @ pair.lora_A - before)
    assert relative_difference([up.base_layer.weight], [expected]) < RTOL


@pytest.mark.parametrize("wrong", [math.nan, math.inf, 1e300])
def test_in_place_never_writes_what_is_not_finite(wrong):
    """Neither in a later step nor in the one that it starts from."""
    net = our_net()
    schedule = InPlaceDeltaLoRA(net, lam=LAM, start_step=0)
    weights = [layer.weight.detach().clone() for layer in layers(net)]
    with torch.no_grad():
        net.up.lora_B.fill_(0.5)
        kept = net.down.lora_B.clone()
        net.down.lora_B[0, 0] = wrong
        net.down.lora_A[0, 0] = 1e10
    says = r"^down: the change .* is not finite"
    with pytest.raises(ValueError, match=f"{says}; nothing was written"):
        schedule.step()
    with pytest.raises(ValueError, match=says):
        InPlaceDeltaLoRA(net, start_step=0)
    late = InPlaceDeltaLoRA(net, start_step=1)
    with pytest.raises(ValueError, match=says):
        late.step()
    for layer, weight in zip(layers(net), weights, strict=True):
        assert torch.equal(layer.weight, weight)
    with torch.no_grad():
        net.down.lora_B.copy_(kept)
    late.step()  # its start: nothing to write yet
    assert torch.equal(net.up.weight, weights[0])
    schedule.step()
    assert all(layer.weight.isfinite().all() for layer in layers(net))
    assert not torch.equal(net.up.weight, weights[0])
