"""`resize` of adapters that PEFT saved: PEFT loads what is written, and finds the best there is."""

from __future__ import annotations

import itertools

import adapters as cases
import pytest
import torch
from peft import LoraConfig, get_peft_model
from tolerances import SVD_RECONSTRUCTION
from torch import Tensor

from peftkern.methods.low_rank_algebra import total_error
from peftkern.methods.rank_rules import RankRule
from peftkern.tools.adapters import AdapterError, from_model, read_adapter
from peftkern.tools.adapters.resize import resize

PLAIN = [case for case in cases.CASES if "dora" not in case]


def best(dense: Tensor, rank: int) -> Tensor:
    """The best approximation of a weight's update, of a convolution as a matrix."""
    flat = (
        dense.double().flatten(1) if dense.dim() != 3 or dense.shape[0] != cases.EXPERTS else dense
    )
    U, S, Vh = torch.linalg.svd(flat.double(), full_matrices=False)
    return ((U[..., :rank] * S[..., None, :rank]) @ Vh[..., :rank, :]).reshape(dense.shape)


@pytest.mark.parametrize("case", PLAIN)
def test_peft_loads_the_best_of_a_rank(case, tmp_path):
    model = cases.save(case, tmp_path / "a")
    found, losses = resize(read_adapter(tmp_path / "a"), RankRule("rank", 2))
    before, after = cases.deltas(model), cases.deltas(cases.reload(found, tmp_path / "b"))
    before = {name: delta for name, delta in before.items() if name in losses}  # AdaLoRA's pruned
    assert after.keys() == before.keys() == losses.keys()
    for name, delta in before.items():
        want = best(delta, 2)
        assert (after[name] - want).norm() <= SVD_RECONSTRUCTION * delta.norm(), name
        lost = (delta - want).norm() / delta.norm()
        assert losses[name].error == pytest.approx(lost.item(), abs=1e-4)
        assert losses[name].kept == min(2, losses[name].rank)


@pytest.mark.parametrize("case", ["modules_to_save", "token rows", "biases", "lora_bias"])
def test_all_else_is_carried(case, tmp_path):
    model = cases.save(case, tmp_path / "a")
    found, _ = resize(read_adapter(tmp_path / "a"), RankRule("energy", 1.0))
    loaded = cases.reload(found, tmp_path / "b")
    states = zip(model.state_dict().items(), loaded.state_dict().items(), strict=True)
    checked = 0
    for (name, want), (_, got) in states:
        if "lora_A" not in name and "lora_B" not in name:
            assert torch.equal(got, want), name
            checked += name.endswith((".bias", "default.weight")) or "tokens_delta" in name
    assert checked
    if case == "lora_bias":
        layer, other = (m.base_model.model.layers[0].q_proj for m in (model, loaded))
        want = layer.scaling["default"] * layer.lora_B["default"].bias
        torch.testing.assert_close(other.lora_B["default"].bias, want)


def test_dora_keeps_its_magnitudes(tmp_path):
    """Cut to half of the rank, where PEFT divides by the norm of the weight with what is left."""
    model = cases.save("dora", tmp_path / "a")
    found, _ = resize(read_adapter(tmp_path / "a"), RankRule("rank", 2))
    loaded = cases.reload(found, tmp_path / "b")
    before, after = cases.deltas(model), cases.deltas(loaded)
    for name, layer in loaded.base_model.model.named_modules():
        if name in before:
            source = model.base_model.model.get_submodule(name)
            want = best(before[name], 2)
            assert (after[name] - want).norm() <= SVD_RECONSTRUCTION * before[name].norm(), name
            magnitude = layer.lora_magnitude_vector["default"].weight
            assert torch.equal(magnitude, source.lora_magnitude_vector["default"].weight)
            base, x = layer.get_base_layer(), torch.randn(3, layer.in_features)
            rows = base.weight + want.float()
            expected = x @ (rows * (magnitude / rows.norm(dim=1))[:, None]).T
            expected = expected if base.bias is None else expected + base.bias
            torch.testing.assert_close(layer(x), expected, rtol=1e-4, atol=1e-5)
    assert torch.isfinite(loaded(torch.arange(cases.VOCABULARY))).all()


def test_a_live_model(tmp_path):
    model = cases.make("patterns")
    found, losses = resize(from_model(model), RankRule("average_rank", 2))
    assert sum(loss.kept for loss in losses.values()) == 2 * len(losses)
    reloaded = cases.deltas(cases.reload(found, tmp_path / "b"))
    before = cases.deltas(model)
    lost = sum((before[name] - reloaded[name]).square().sum() for name in before)
    total = sum(delta.square().sum() for delta in before.values())
    assert total_error(list(losses.values())) == pytest.approx(
        (lost / total).sqrt().item(), abs=1e-4
    )


@pytest.mark.parametrize(
    ("rule", "itemsize"), itertools.product([("budget_bytes", 900), ("ratio", 2.0)], [2, 4])
)
def test_ranks_differ_by_layer_and_peft_reads_them(rule, itemsize, tmp_path):
    model = cases.save("rslora", tmp_path / "a")
    found, losses = resize(read_adapter(tmp_path / "a"), RankRule(*rule), itemsize=itemsize)
    after = cases.deltas(cases.reload(found, tmp_path / "b"))
    for name, delta in cases.deltas(model).items():
        want = best(delta, losses[name].kept)
        assert (after[name] - want).norm() <= SVD_RECONSTRUCTION * delta.norm()
    if rule[0] == "budget_bytes":
        sizes = [u.lora_A.numel() + u.lora_B.numel() for u in found.updates.values()]
        assert itemsize * sum(sizes) <= 900


def test_an_adapter_of_a_changed_base_is_refused(tmp_path):
    config = LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights="pissa")
    get_peft_model(cases.Tiny(), config).save_pretrained(tmp_path / "a")
    with pytest.raises(AdapterError, match=r": init_lora_weights 'pissa': its factors hold a part"):
        resize(read_adapter(tmp_path / "a"), RankRule("rank", 2))


def test_what_is_not_finite_is_named(tmp_path):
    model = cases.make("linear")
    with torch.no_grad():
        model.base_model.model.layers[1].o_proj.lora_A["default"].weight[0, 0] = torch.inf
    with pytest.raises(AdapterError, match=r"layers\.1\.o_proj: its update is not finite"):
        resize(from_model(model), RankRule("rank", 2))


def test_a_budget_below_one_rank_is_refused():
    with pytest.raises(AdapterError, match="budget_bytes: expected at least 320, one rank in each"):
        resize(from_model(cases.make("linear")), RankRule("budget_bytes", 100))
