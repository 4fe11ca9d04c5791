"""LoRA on fused experts is PEFT's until it was tried here, and a step is never served by both."""

from __future__ import annotations

import pytest
import torch
from expert_models import (
    K,
    add_experts_lora,
    expert_net,
    fallbacks,
    inputs,
    outputs_and_gradients,
    patched_copy,
    served,
    tiny_moe,
    wrapper_of,
)

import peftkern
from peftkern.backends import contest, trust
from peftkern.integrations.peft import trial

pytestmark = pytest.mark.usefixtures("one_thread", "own_trust")
CPU = torch.device("cpu")
IDS = torch.randint(3, 60, (2, 9), generator=torch.Generator().manual_seed(8))


@pytest.mark.parametrize("side", [trust.OURS, trust.PEER])
def test_two_calls_decide(side, monkeypatch: pytest.MonkeyPatch) -> None:
    """They are answered by PEFT, bit for bit; the class is kept for the next process."""
    monkeypatch.setattr(contest, "SLOWER", float("inf") if side == trust.OURS else 0.0)
    model = expert_net().train()
    twin = patched_copy(model)
    assert peftkern.patch(twin).unmeasured == 1
    given = inputs(200)  # more than a trial need measure
    expected = outputs_and_gradients(model, *given)
    for _ in range(2):
        peftkern.reset_stats()
        got = outputs_and_gradients(twin, *given)
        assert all(torch.equal(got[name], value) for name, value in expected.items())
        assert fallbacks() == {trial.UNMEASURED: 1}
    peftkern.reset_stats()
    got = outputs_and_gradients(twin, *given)
    assert served() == (side == trust.OURS) and bool(fallbacks()) is (side == trust.PEER)
    for name, value in expected.items():
        torch.testing.assert_close(got[name], value, rtol=1e-4, atol=1e-5)
    ((name, verdict),) = trust.ledger(CPU).classes.items()
    start = "lora_experts/LoRA on 6 experts of 16, grouped_mm 32x32 r=4 top 2 float32"
    assert name.startswith(start) and verdict["side"] == side
    assert verdict["ratios"].keys() == {"forward", "training"}
    trust.reset()
    assert peftkern.patch(twin).unmeasured == 0


def test_arguments_by_keyword_are_tried_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(contest, "SLOWER", float("inf"))
    wrapper = wrapper_of(patched_copy(expert_net()))
    x, index, weights = inputs()
    for expected in (0, 0, 1):
        peftkern.reset_stats()
        y = wrapper(x, top_k_weights=weights, top_k_index=index)
        y.sum().backward()
        wrapper.zero_grad()
        assert (not fallbacks()) == expected and y.shape == (20, K)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("mode", ["auto", "always"])
def test_checkpointed_training_is_pefts(
    reentrant: bool, mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A recomputation takes the side that its forward took, so that the gradients are of one."""
    monkeypatch.setattr(contest, "SLOWER", float("inf"))
    model = add_experts_lora(tiny_moe("Qwen3Moe")).train()
    expected = outputs_and_gradients(model, IDS)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    twin = patched_copy(model)
    with trust.use_mode(mode):
        for step in range(4):
            peftkern.reset_stats()
            got = outputs_and_gradients(twin, IDS)
            ours = step >= 1 or mode == "always"  # two calls in the first step, one a layer
            assert bool(fallbacks()) is not ours
            assert served() >= 4 * ours  # two layers, twice each
            assert got.keys() == expected.keys()
            for name, value in expected.items():
                torch.testing.assert_close(got[name], value, rtol=1e-4, atol=1e-5)


def test_a_fault_of_ours_costs_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """What raises in a trial is demoted by name, and PEFT goes on."""

    def faulty(*args, **kwargs):
        raise RuntimeError("no such instruction")

    model = expert_net().eval()
    twin = patched_copy(model)
    monkeypatch.setattr("peftkern.integrations.peft.experts.lora_experts", faulty)
    with pytest.warns(trust.Distrusted, match="no such instruction"):
        for _ in range(3):
            peftkern.reset_stats()
            assert torch.equal(twin(*inputs()), model(*inputs()))
    (reason,) = fallbacks()
    assert "ours raised RuntimeError: no such instruction" in reason


def test_a_trial_in_inference_mode(monkeypatch: pytest.MonkeyPatch) -> None:
    """What stands beside x there can be saved for the trial's backward pass, too."""
    monkeypatch.setattr(contest, "SLOWER", float("inf"))
    twin = patched_copy(expert_net().train())
    with torch.inference_mode():
        given = inputs(200)
        for _ in range(2):
            twin(*given)
    ((_, verdict),) = trust.ledger(CPU).classes.items()
    assert verdict["side"] == trust.OURS
