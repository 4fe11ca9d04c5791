"""LoRA-FA: what is saved for backward, the corrected gradient, and the optimizer against PEFT's."""

from __future__ import annotations

import copy
import math

import pytest
import torch
import torch.distributed as dist
from method_models import (
    ALPHA,
    RANK,
    Count,
    K,
    N,
    backward,
    batches,
    our_net,
    peft_net,
    relative_difference,
    train,
    twins,
)
from peft import LoraConfig
from peft.optimizers import create_lorafa_optimizer
from tolerances import LORA_FA_PEFT_RTOL, METHODS_RTOL, errors
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import peftkern
from peftkern.layers import LoRALinear, NF4LoRALinear
from peftkern.methods import LoRAFAOptimizer, freeze_lora_A, lora_fa_gradients
from peftkern.methods.pairs import find_pairs

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
    trained = [[p.requires_grad for p in model.parameters()] for model in (ours, theirs)]
    assert trained[0] == trained[1]


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
    B, A, wide = torch.ones(2, 1), torch.ones(1, 2), torch.ones(3, 2)
    for lists, says in (
        (([B, B], [A, A], [1.0, 0.0]), "scaling of layer 1: expected a number other than 0"),
        (([B], [wide], [1.0]), r"expected \[N, r\] and \[r, K\], got \[2, 1\] and \[3, 2\]"),
        (([B], [A], [1.0, 1.0]), "scaling: expected one of each .*, 2 of scaling"),
    ):
        with pytest.raises(ValueError, match=says):
            lora_fa_gradients(*lists)


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


def test_a_model_that_ddp_has_already_is_refused():
    """Whose gradients of lora_A it would wait for; integrations/engines has what it trains."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        with pytest.raises(ValueError, match="model: DistributedDataParallel has it already"):
            LoRAFAOptimizer(DistributedDataParallel(our_net()))
    finally:
        dist.destroy_process_group()
