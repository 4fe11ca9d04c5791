"""LoRA on fused experts: values and gradients of patched models are PEFT's, in every family."""

from __future__ import annotations

import copy

import pytest
import torch
from expert_models import (
    ALONE,
    FAMILIES,
    LAYOUTS,
    REFUSED,
    E,
    K,
    add_experts_lora,
    assert_as_near_as_peft,
    assert_like_peft,
    expert_net,
    fallbacks,
    fill_lora_B,
    inputs,
    oracle_of,
    outputs_and_gradients,
    patched_copy,
    served,
    tiny_moe,
    wrapper_of,
    wrappers_of,
)
from peak_memory import LargestTensor
from peft import LoraConfig
from tolerances import assert_as_accurate_as_torch

import peftkern

pytestmark = pytest.mark.usefixtures("one_thread")
F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
IDS = torch.randint(3, 60, (2, 9), generator=torch.Generator().manual_seed(8))
every_layout = pytest.mark.parametrize("folder", LAYOUTS)


@pytest.mark.parametrize("family", FAMILIES)
def test_families_like_peft(family):
    """Logits and every gradient, those of routers and of the embedding among them."""
    model = add_experts_lora(tiny_moe(family))
    for name, p in model.named_parameters():
        others = any(part in name for part in (".gate.", "router.", "embed_tokens."))
        p.requires_grad_(p.requires_grad or (others and ".experts." not in name))
    wrappers = [n for n in dict(model.named_modules()) if n.endswith(".experts")]
    assert_like_peft(model, IDS, layers=len(wrappers))


@pytest.mark.parametrize(("family", "name"), REFUSED.items())
def test_families_that_are_left_to_peft(family, name):
    model = add_experts_lora(tiny_moe(family))
    twin = patched_copy(model)
    expected = outputs_and_gradients(model, IDS)
    peftkern.reset_stats()
    got = outputs_and_gradients(twin, IDS)
    assert served() == 0 and list(fallbacks()) == [f"base_layer is {name}"]
    assert all(torch.equal(got[name], value) for name, value in expected.items())


@pytest.mark.parametrize("folder", ALONE)
@pytest.mark.parametrize("implementation", ["eager", "grouped_mm", "batched_mm"])
def test_implementations_like_peft(folder, implementation):
    assert_like_peft(expert_net(folder, implementation=implementation), *inputs())


@every_layout
@pytest.mark.parametrize(
    ("dtype", "adapter_dtype", "weights_dtype"),
    [(BF16, None, F32), (BF16, BF16, BF16), (BF16, F32, BF16), (F16, F32, F32)],
    ids=str,
)
def test_half_precision_is_nearer_to_float64(folder, dtype, adapter_dtype, weights_dtype):
    model = expert_net(folder, dtype=dtype, adapter_dtype=adapter_dtype)
    wrapper_of(model).get_base_layer().limit = 9.0  # at a clamp the last bit decides a gradient
    x, index, weights = inputs(40, dtype)
    weights = weights.to(weights_dtype)
    assert_as_near_as_peft(model, oracle_of(model), x, index, weights)


@pytest.mark.parametrize("hidden", [F32, BF16])
def test_grouped_mm_takes_the_dtype_of_the_weights(hidden):
    """Whatever autocast says; the result has the dtype of the hidden states."""
    for dtype in (F32, BF16):
        model = expert_net(dtype=dtype, adapter_dtype=F32)
        x, index, weights = inputs(dtype=hidden)
        oracle = oracle_of(model)(x.to(dtype).double(), index, weights.double())
        with torch.autocast("cpu", BF16):
            eager = model(x, index, weights)
            peftkern.reset_stats()
            got = patched_copy(model)(x, index, weights)
        assert served() == 1 and got.dtype is hidden
        assert_as_accurate_as_torch(got, eager, oracle)


@every_layout
@pytest.mark.parametrize("place", [0, 1])
def test_one_of_two_parameters(folder, place):
    up = "up_proj" if folder == "nemotron_h" else "gate_up_proj"
    name = (up, "down_proj")[place]
    model = expert_net(folder, target_parameters=[f"experts.{name}"])
    assert wrapper_of(model).parameter_name == name
    assert_like_peft(model, *inputs())


def test_ranks_and_scalings_by_pattern():
    settings = {"rank_pattern": {"experts.down_proj": 7}, "alpha_pattern": {"experts.down_proj": 3}}
    for use_rslora in (False, True):
        model = expert_net(use_rslora=use_rslora, r=3, lora_alpha=5, **settings)
        ranks = {wrapper.r["default"] for wrapper in wrappers_of(model)}
        assert ranks == {3, 7}
        assert_like_peft(model, *inputs())


@pytest.mark.parametrize("active", [["default"], ["other"], ["default", "other"]])
def test_several_adapters(active):
    model = expert_net()
    names = model.peft_config["default"].target_parameters
    other = LoraConfig(r=2, lora_alpha=3, target_modules=[], target_parameters=names)
    model.add_adapter("other", other)
    fill_lora_B(model)
    model.base_model.set_adapter(active)
    assert_like_peft(model, *inputs())


@every_layout
def test_layout_of_the_factors(folder):
    """Row e*r + j of lora_A and column j*E + e of lora_B add their product to expert e alone."""
    r, generator = 3, torch.Generator().manual_seed(9)
    for _ in range(4):
        model = expert_net(folder, r=r, lora_alpha=6)
        plain = copy.deepcopy(model)
        experts = wrapper_of(plain).get_base_layer()
        for wrapper in wrappers_of(model):
            A, B = wrapper.lora_A["default"].weight, wrapper.lora_B["default"].weight
            e, j = (int(torch.randint(n, (), generator=generator)) for n in (E - 2, r))
            with torch.no_grad():
                row, column = A[e * r + j].clone(), B[:, j * E + e].clone()
                A.zero_(), B.zero_()
                A[e * r + j], B[:, j * E + e] = row, column
                update = 2 * column[:, None] * row
                update = update.t() if experts.is_transposed else update
                getattr(experts, wrapper.parameter_name)[e] += update
        peftkern.patch(model)
        given = inputs()
        with plain.disable_adapter():
            torch.testing.assert_close(model(*given), plain(*given))


def test_experts_without_tokens_have_zero_gradients():
    """Not None: optimizers go on to decay them, as with PEFT."""
    twin = patched_copy(expert_net())
    outputs_and_gradients(twin, *inputs())
    for wrapper in wrappers_of(twin):
        A, B = (getattr(wrapper, name)["default"].weight.grad for name in ("lora_A", "lora_B"))
        per_expert = A.view(E, -1).abs().sum(1), B.view(-1, E).abs().sum(0)
        for sums in per_expert:
            assert torch.equal(sums > 0, torch.arange(E) < 4)


@every_layout
def test_no_tokens(folder):
    twin = patched_copy(expert_net(folder))
    peftkern.reset_stats()
    found = outputs_and_gradients(twin, *inputs(0))
    assert served() == 1 and found["y"].shape == (0, K)
    assert all(not grad.any() for grad in found.values()) and len(found) == 3 + 4


@pytest.mark.parametrize("implementation", ["eager", "grouped_mm", "batched_mm"])
def test_rows_of_other_ranks(implementation):
    """Ids from E on mark them under expert parallelism, with a weight of zero."""
    model = expert_net(implementation=implementation)
    wrapper_of(model).get_base_layer()._is_expert_parallel = True
    x, index, weights = inputs()
    away = torch.zeros_like(index, dtype=torch.bool)
    away[:5, 0] = away[3:8] = True
    assert_like_peft(model, x, index.where(~away, E), weights.where(~away, 0.0))


def test_arguments_by_keyword():
    model = expert_net("gpt_oss")
    x, index, weights = inputs()
    twin = patched_copy(model)
    expected = wrapper_of(model)(x, top_k_index=index, top_k_weights=weights)
    for names in (("top_k_index", "top_k_weights"), ("router_indices", "routing_weights")):
        peftkern.reset_stats()
        given = dict(zip(names, (index, weights), strict=True))
        got = wrapper_of(twin)(x, **dict(reversed(given.items())))
        torch.testing.assert_close(got, expected)
        assert served() == 1 and fallbacks() == {}


def test_expert_weights_are_never_made_again():
    """No tensor of the size of a stack in a step, where PEFT makes five."""
    twin = patched_copy(expert_net(r=2))
    sizes = {p.numel() for p in wrapper_of(twin).get_base_layer().parameters()}
    given = inputs(4)
    copies = copy.deepcopy(twin)  # before, as it copies the stack
    with LargestTensor() as largest:
        outputs_and_gradients(copies, *given)
    assert 0 < largest.numel < min(sizes)
