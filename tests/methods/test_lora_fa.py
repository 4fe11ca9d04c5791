"""LoRA-FA: what is saved for backward, the corrected gradient, and the optimizer against PEFT's."""

from __future__ import annotations

import copy
import math
import pickle

import ddp_steps
import pytest
import torch
from method_models import (
    ALPHA,
    RANK,
    Count,
    HostCopies,
    K,
    N,
    PlainAdamW,
    backward,
    batches,
    fill_,
    our_net,
    peft_net,
    relative_difference,
    train,
    twins,
)
from peft import LoraConfig
from peft.optimizers import create_lorafa_optimizer
from tolerances import LORA_FA_PEFT_RTOL, METHODS_RTOL, METHODS_STEPS_RTOL, errors
from torch import Tensor, nn

import peftkern
from peftkern.layers import LoRALinear, NF4LoRALinear
from peftkern.methods import (
    LoRAFAOptimizer,
    LoRAProAdamW,
    freeze_lora_A,
    lora_fa_gradients,
    lora_pro_gradients,
    pairs,
)
from peftkern.methods.pairs import find_pairs, scalings

F64 = torch.float64
SCALING = ALPHA / RANK


def saved_elements(layer: nn.Module, x: Tensor) -> list[int]:
    """Sizes of what a forward pass saves for backward beyond the layer's own tensors."""
    known = {p.untyped_storage().data_ptr() for p in layer.parameters()}
    if hasattr(layer, "nf4"):
        known |= {t.untyped_storage().data_ptr() for t in layer.nf4._tensors().values()}
    saved = {}

    def pack(tensor: Tensor) -> Tensor:
        address = tensor.untyped_storage().data_ptr()
        if address not in known:
            saved[address] = tensor.untyped_storage().nbytes() // tensor.element_size()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        y = layer(x)
    y.sum().backward()
    return sorted(saved.values())


@pytest.mark.parametrize("cls", [LoRALinear, NF4LoRALinear])
def test_frozen_lora_A_saves_tokens_times_rank(cls, backend):
    T, wide = 48, 256
    layer = cls.from_linear(nn.Linear(wide, 64), r=RANK)
    x = torch.randn(T, wide, requires_grad=True)
    before = saved_elements(layer, x)
    assert freeze_lora_A(nn.Sequential(layer)) == ["0"]
    after = saved_elements(layer, x)
    assert sum(before) == T * RANK + T * wide
    assert sum(after) == T * RANK
    assert layer.lora_A.grad is None and layer.lora_B.grad is not None


@pytest.mark.usefixtures("small_layers")
def test_frozen_lora_A_saves_little_in_a_patched_peft_model():
    import peft_models

    model = peft_models.lora_net(peft_models.make_linear())
    peftkern.patch(model)
    layer = peft_models.layer_of(model)
    x = torch.randn(32, peft_models.K, requires_grad=True)
    assert sum(saved_elements(layer, x)) == 32 * (4 + peft_models.K)
    freeze_lora_A(model)
    assert sum(saved_elements(layer, x)) == 32 * 4


def test_gradient_is_the_nearest_to_the_weights_own():
    """Least squares by another way: lstsq on scaling * X A = g."""
    A, g = torch.randn(RANK, K, dtype=F64), torch.randn(N, K, dtype=F64)
    (got,) = lora_fa_gradients([SCALING * g @ A.T], [A], [SCALING])
    expected = torch.linalg.lstsq(SCALING * A.T, g.T).solution.T
    assert relative_difference([got], [expected]) < METHODS_RTOL[F64]


def test_hundreds_of_layers_take_one_cholesky():
    layers = 300
    A = [torch.randn(RANK, (16, 24, 40)[i % 3], dtype=F64) for i in range(layers)]
    g = [torch.randn((20, 12)[i % 2], RANK, dtype=F64) for i in range(layers)]
    scaling = [0.5 + i for i in range(layers)]
    with Count() as count:
        got = lora_fa_gradients(g, A, scaling)
    assert count.calls["linalg_cholesky_ex"] == 1
    assert not {"linalg_svd", "_linalg_svd", "linalg_pinv", "_linalg_eigh"} & set(count.calls)
    assert count.calls["bmm"] <= 3 + 2  # Gram matrices by shape of A, products by shape of B
    expected = [g @ torch.linalg.inv(a @ a.T) / s**2 for g, a, s in zip(g, A, scaling, strict=True)]
    assert relative_difference(got, expected) < METHODS_RTOL[F64]


def test_dependent_rows_and_zero_take_the_pseudo_inverse():
    A = [torch.randn(RANK, K, dtype=F64) for _ in range(3)]
    A[1][2] = A[1][0] - 2 * A[1][3]
    A[2].zero_()
    G = [torch.randn(N, K, dtype=F64) for _ in A]
    got = lora_fa_gradients([g @ a.T for g, a in zip(G, A, strict=True)], A, [1.0] * 3)
    for g, a, result in zip(G, A, got, strict=True):
        projection = torch.linalg.pinv(a) @ a
        assert torch.allclose(result @ a, g @ projection, rtol=0, atol=METHODS_RTOL[F64] * K)


@pytest.mark.parametrize("kind", ["ours", "nf4", "peft"])
@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_steps_equal_a_plain_transcription(kind, weight_decay):
    model = peft_net() if kind == "peft" else our_net(nf4=kind == "nf4")
    ours, plain = twins(model)
    optimizer = LoRAFAOptimizer(ours, lr=1e-2, weight_decay=weight_decay)
    pairs = find_pairs(plain)
    by_hand = [PlainAdamW(pair.lora_B, weight_decay=weight_decay) for pair in pairs]
    for batch in batches(12):
        train(ours, optimizer, [batch])
        plain.zero_grad()
        backward(plain, batch)
        for pair, adamw in zip(pairs, by_hand, strict=True):
            A, g = pair.lora_A.detach(), pair.lora_B.grad
            adamw.step(g @ torch.linalg.inv(A @ A.T) / SCALING**2)
        got = [pair.lora_B for pair in find_pairs(ours)]
        assert relative_difference(got, [p.lora_B for p in pairs]) < METHODS_RTOL[F64]
    for a, b in zip(find_pairs(ours), pairs, strict=True):
        assert torch.equal(a.lora_A, b.lora_A)


@pytest.mark.parametrize("config", [{}, {"use_rslora": True}, {"rank_pattern": {"up": 7}}])
@pytest.mark.parametrize("dtype", [F64, torch.float32])
def test_peft_parity_step_by_step(dtype, config):
    theirs, ours = twins(peft_net(dtype, **config))
    options = {"r": RANK, "lora_alpha": ALPHA, "lr": 1e-2, "weight_decay": 0.1}
    their_optimizer = create_lorafa_optimizer(theirs, **options)
    optimizer = LoRAFAOptimizer(ours, lr=1e-2, weight_decay=0.1, eps=1e-6, peft_parity=True)
    for batch in batches(20, dtype):
        train(theirs, their_optimizer, [batch])
        train(ours, optimizer, [batch])
        difference = relative_difference(ours.parameters(), theirs.parameters())
        assert difference < LORA_FA_PEFT_RTOL[dtype]
    assert [p.requires_grad for p in ours.parameters()] == [
        p.requires_grad for p in theirs.parameters()
    ]


def test_default_is_nearer_to_the_formula_than_peft():
    """Eight bits of the corrected gradient are left where autocast multiplies it in bfloat16."""
    models = [peft_net(torch.float32) for _ in range(2)]
    oracle = peft_net(torch.float32).double()
    options = {"r": RANK, "lora_alpha": ALPHA, "lr": 1e-2}
    optimizers = [
        create_lorafa_optimizer(models[0], **options),
        LoRAFAOptimizer(models[1], lr=1e-2, eps=1e-6),
        LoRAFAOptimizer(oracle, lr=1e-2, eps=1e-6),
    ]
    (batch,) = batches(1, torch.float32)
    for model, optimizer in zip((*models, oracle), optimizers, strict=True):
        backward(model, tuple(t.to(next(model.parameters()).dtype) for t in batch))
        optimizer.step()
    state = optimizers[2].state[find_pairs(oracle)[0].lora_B]["exp_avg"]
    theirs = next(s for n, s in optimizers[0].state.items() if ".up." in n)["exp_avg_B"]
    ours = optimizers[1].state[find_pairs(models[1])[0].lora_B]["exp_avg"]
    assert errors(theirs, state)[0] > 1e-3
    assert errors(ours, state)[0] < METHODS_RTOL[torch.float32]


@pytest.mark.parametrize("case", ["use_dora", "lora_bias", "two adapters"])
def test_cases_that_peft_pairs_wrongly(case):
    """PEFT takes the LoRA parameters in twos, whatever they are, and fails in all three."""
    model = peft_net(**({} if case == "two adapters" else {case: True}))
    if case == "two adapters":
        model.add_adapter("other", LoraConfig(r=2, target_modules=["up", "down"]))
        model.double()
    theirs = copy.deepcopy(model)
    (batch,) = batches(1)
    optimizer = create_lorafa_optimizer(theirs, r=RANK, lora_alpha=ALPHA, lr=1e-2)
    backward(theirs, batch)
    with pytest.raises(TypeError, match="NoneType"):
        optimizer.step()

    before = copy.deepcopy(model)
    train(model, LoRAFAOptimizer(model, lr=1e-2), [batch])
    parameters = zip(model.named_parameters(), before.parameters(), strict=True)
    moved = {name for (name, p), q in parameters if not torch.equal(p, q)}
    prefix, weights = "base_model.model", {f"{n}.lora_B.default.weight" for n in ("up", "down")}
    assert {f"{prefix}.{name}" for name in weights} <= moved
    assert not any("lora_A" in name or "other" in name for name in moved)


def test_a_new_lora_A_and_a_new_scaling_are_seen():
    model = our_net()
    optimizer = LoRAFAOptimizer(model, lr=1e-2, betas=(0.0, 0.0))
    first, second = batches(2)
    train(model, optimizer, [first])
    with torch.no_grad():
        model.up.lora_A.mul_(3.0)
    model.down.scaling = 0.25
    backward(model, second)
    optimizer.step()
    for layer in (model.up, model.down):
        A, g = layer.lora_A.detach(), layer.lora_B.grad
        expected = g @ torch.linalg.inv(A @ A.T) / layer.scaling**2
        got = optimizer.state[layer.lora_B]["exp_avg"]
        assert relative_difference([got], [expected]) < METHODS_RTOL[F64]


def test_resume_from_a_state_dict_and_copies():
    data = batches(8)
    straight, resumed = twins(our_net())
    optimizer = LoRAFAOptimizer(straight, lr=1e-2)
    train(straight, optimizer, data)

    half = LoRAFAOptimizer(resumed, lr=1e-2)
    train(resumed, half, data[:4])
    states = pickle.loads(pickle.dumps((resumed.state_dict(), half.state_dict())))
    again = our_net()
    again.load_state_dict(states[0])
    third = LoRAFAOptimizer(again, lr=0.5)  # the state brings its own
    third.load_state_dict(states[1])
    copied, copied_optimizer = copy.deepcopy((again, third))
    for model, opt in ((again, third), (copied, copied_optimizer), (resumed, half)):
        train(model, opt, data[4:])
        for p, q in zip(model.parameters(), straight.parameters(), strict=True):
            assert torch.equal(p, q)


def test_closure_groups_and_other_parameters():
    (batch,) = batches(1)
    model, plain = twins(our_net())
    for net in (model, plain):
        net.down.bias.requires_grad_(True)
    groups = [
        {"params": [model.up.lora_B], "lr": 1e-3, "weight_decay": 0.5},
        {"params": [model.down.bias, model.down.lora_B]},
    ]
    optimizer = LoRAFAOptimizer(model, groups, lr=1e-2)
    fill_(model)
    plain.load_state_dict(model.state_dict())

    def closure():
        optimizer.zero_grad()
        return backward(model, batch)

    loss = optimizer.step(closure)
    assert loss.item() == backward(plain, batch).item()
    by_hand = {
        "up": PlainAdamW(plain.up.lora_B, lr=1e-3, weight_decay=0.5),
        "down": PlainAdamW(plain.down.lora_B),
    }
    for name, adamw in by_hand.items():
        A = getattr(plain, name).lora_A.detach()
        adamw.step(adamw.p.grad @ torch.linalg.inv(A @ A.T) / SCALING**2)
    PlainAdamW(plain.down.bias).step(plain.down.bias.grad)
    assert relative_difference(model.parameters(), plain.parameters()) < METHODS_RTOL[F64]


def test_grad_scaler_unscales_and_skips():
    data = batches(3, torch.float32)
    model, plain = twins(our_net(torch.float32))
    optimizer, reference = (LoRAFAOptimizer(m, lr=1e-2) for m in (model, plain))
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=100)
    for i, (x, target) in enumerate(data):
        x = x.clone()
        if i == 1:
            x[0, 0] = math.inf
        loss = (model(x) - target).square().mean()
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        if i != 1:
            train(plain, reference, [(x, target)])
    assert scaler.get_scale() == 2.0**9
    assert relative_difference(model.parameters(), plain.parameters()) < METHODS_RTOL[torch.float32]


def test_a_gradient_that_is_not_finite_stays_in_its_layer():
    (batch,) = batches(1)
    model, plain = twins(our_net())
    for net in (model, plain):
        net.up = net.down = None
        for name in "abc":  # of equal shapes: they share every product
            layer = LoRALinear.from_linear(nn.Linear(K, N, dtype=F64), adapter_dtype=F64)
            net.add_module(name, layer)
    plain.load_state_dict(model.state_dict())
    optimizer, reference = LoRAFAOptimizer(model), LoRAFAOptimizer(plain)
    for net in (model, plain):
        for name in "abc":
            net.get_submodule(name)(batch[0]).square().sum().backward()
    model.b.lora_B.grad[0, 0] = math.nan
    optimizer.step()
    reference.step()
    for name in "ac":
        got, expected = model.get_submodule(name).lora_B, plain.get_submodule(name).lora_B
        assert torch.equal(got, expected)
    assert model.b.lora_B.isnan().any()


def test_a_layer_without_a_gradient_stays():
    model = our_net()
    optimizer = LoRAFAOptimizer(model, lr=1e-2)
    before = copy.deepcopy(model.state_dict())
    backward(model, batches(1)[0])
    model.up.lora_B.grad = None
    optimizer.step()
    assert torch.equal(model.up.lora_B, before["up.lora_B"])
    assert not torch.equal(model.down.lora_B, before["down.lora_B"])


def test_bfloat16_factors():
    model = our_net(torch.bfloat16)
    optimizer = LoRAFAOptimizer(model, lr=1e-2)
    losses = train(model, optimizer, batches(1, torch.bfloat16) * 10)
    assert losses[-1] < losses[0]
    assert optimizer.state[model.up.lora_B]["exp_avg"].dtype is torch.bfloat16


def test_arguments_are_checked():
    with pytest.raises(TypeError, match=r"model: expected a torch\.nn\.Module, got list"):
        LoRAFAOptimizer([torch.ones(1)])
    with pytest.raises(ValueError, match="model: expected layers with a trained lora_B, found"):
        LoRAFAOptimizer(nn.Linear(3, 3))
    with pytest.raises(ValueError, match="of the adapter 'other'"):
        LoRAFAOptimizer(peft_net(), adapter="other")
    for options in ({"lr": -1.0}, {"eps": math.nan}, {"betas": (0.9, 1.0)}, {"weight_decay": -1}):
        with pytest.raises(ValueError, match=f"^{next(iter(options))}: expected"):
            LoRAFAOptimizer(our_net(), **options)
    with pytest.raises(ValueError, match="scaling of layer 1: expected a number other than 0"):
        lora_fa_gradients([torch.ones(2, 1)] * 2, [torch.ones(1, 2)] * 2, [1.0, 0.0])
    with pytest.raises(
        ValueError, match=r"expected \[N, r\] and \[r, K\], got \[2, 1\] and \[3, 2\]"
    ):
        lora_fa_gradients([torch.ones(2, 1)], [torch.ones(3, 2)], [1.0])
    with pytest.raises(ValueError, match=r"scaling: expected one of each .*, 2 of scaling"):
        lora_fa_gradients([torch.ones(2, 1)], [torch.ones(1, 2)], [1.0, 1.0])


def test_names_are_found_where_the_table_says():
    from peftkern import methods

    for name in methods.__all__:
        home = "peftkern.layers.dora" if name == "DoRALinear" else "peftkern.methods."
        assert getattr(methods, name).__module__.startswith(home)
    assert set(methods.__all__) <= set(dir(methods))
    with pytest.raises(AttributeError, match="has no attribute 'LoRE'"):
        _ = methods.LoRE


def test_a_refused_argument_leaves_lora_A_trained():
    model = our_net()
    for options in ({"lr": -1.0}, {"params": []}, {"adapter": "other"}):
        with pytest.raises(ValueError):
            LoRAFAOptimizer(model, **options)
    assert all(pair.lora_A.requires_grad for pair in find_pairs(model))
    optimizer = LoRAFAOptimizer(model)
    ours = [p for group in optimizer.param_groups for p in group["params"]]
    assert len(ours) == 2 and all(p.requires_grad for p in ours)


@pytest.mark.parametrize("peft_parity", [False, True])
def test_a_scaling_of_zero_is_named(peft_parity):
    model = our_net()
    optimizer = LoRAFAOptimizer(model, peft_parity=peft_parity)
    model.down.scaling = 0.0
    backward(model, batches(1)[0])
    with pytest.raises(ValueError, match="scaling of layer down: expected a number other than 0"):
        optimizer.step()


def test_a_shared_lora_B_is_refused_and_a_shared_lora_A_is_not():
    shared = nn.ModuleList(LoRALinear(8, 8, r=2) for _ in range(2))
    shared[1].lora_A = shared[0].lora_A
    LoRAFAOptimizer(shared)
    shared[1].lora_B = shared[0].lora_B
    with pytest.raises(ValueError, match="0 and 1 share a factor"):
        LoRAFAOptimizer(shared)


def test_two_processes_take_the_steps_of_one(tmp_path):
    """Under DistributedDataParallel, each with half of every batch."""
    torch.multiprocessing.spawn(ddp_steps.process, args=(2, str(tmp_path)), nprocs=2)
    net = ddp_steps.model()
    before = ddp_steps.trained(net)
    ddp_steps.train(net, LoRAFAOptimizer(net, lr=1e-2), slice(None))
    wanted = ddp_steps.trained(net)
    assert len(wanted) == 2 < len(before)
    for rank in range(2):
        got = torch.load(tmp_path / f"{rank}.pt")
        assert relative_difference(got, wanted) < METHODS_STEPS_RTOL
        refused = (tmp_path / f"{rank}.txt").read_text()
        assert refused.startswith("model: DistributedDataParallel has it already")


@pytest.mark.parametrize("optimizer", [LoRAFAOptimizer, LoRAProAdamW])
def test_steps_are_counted_in_float32_whatever_the_default(optimizer):
    """bfloat16 counts to 256."""
    model = our_net(torch.float32)
    torch.set_default_dtype(torch.bfloat16)
    try:
        made = optimizer(model)
        backward(model, batches(1, torch.float32)[0])
        made.step()
    finally:
        torch.set_default_dtype(torch.float32)
    assert made.state[model.up.lora_B]["step"].dtype is torch.float32


def test_nothing_is_copied_from_the_host():
    """Which would make it wait for a GPU at each step."""
    with HostCopies() as copies:
        like, tensor = torch.empty(1, device="cuda"), torch.ones((), device="cuda")
        scalings([1.5, 1.5, 2.0], like)
        scalings([1.5, tensor], like)
    assert copies.count == 0
    with HostCopies() as copies:
        torch.tensor([1.5, 2.0], device="cuda")
    assert copies.count == 1
    got = scalings([1.5, 1.5, 2.0], torch.empty(1))
    assert got.view(-1).tolist() == [1.5, 1.5, 2.0] and got.shape == (3, 1, 1)
    assert scalings([1.5, torch.tensor(2.0)], torch.empty(1)).view(-1).tolist() == [1.5, 2.0]


@pytest.mark.parametrize("count", [1, 2, 5])
def test_parts_of_a_group_are_all_there(monkeypatch, count):
    """Some layers at a time, as of large models, give what all at once give."""
    A = [torch.randn(RANK, K, dtype=F64) for _ in range(5)]
    B, gA, gB = (
        [torch.randn(*shape, dtype=F64) for _ in A] for shape in ((N, RANK), (RANK, K), (N, RANK))
    )
    scaling = [1.0, 2.0, 3.0, 4.0, 5.0]
    wanted = lora_fa_gradients(gB, A, scaling), *lora_pro_gradients(A, B, gA, gB, scaling)
    largest = 2 * (RANK * K + N * RANK)
    monkeypatch.setattr(pairs, "_CHUNK", count * largest)
    assert max(len(part) for part in pairs.chunks(A, B, gA, gB)) == count
    got = lora_fa_gradients(gB, A, scaling), *lora_pro_gradients(A, B, gA, gB, scaling)
    for mine, theirs in zip(got, wanted, strict=True):
        assert relative_difference(mine, theirs) < METHODS_RTOL[F64]
