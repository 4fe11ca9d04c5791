"""`combine` of adapters that PEFT saved: PEFT loads what is written, and finds the weighted sum."""

from __future__ import annotations

from dataclasses import replace

import adapters as cases
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.utils import merge_utils
from tolerances import SVD_RECONSTRUCTION
from torch import Tensor

from peftkern.methods.sparse_sums import METHODS
from peftkern.tools.adapters import AdapterError, from_model, read_adapter
from peftkern.tools.adapters.combine import Combination, combine

WEIGHTS = [0.7, -0.4]
PLAIN = [case for case in cases.CASES if "dora" not in case]
SAVED = ("modules_to_save", "token rows", "biases")  # which have no sum


def sums(models: list[PeftModel]) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for model, weight in zip(models, WEIGHTS, strict=True):
        for name, delta in cases.deltas(model).items():
            found[name] = found.get(name, 0) + weight * delta.double()
    return found


def assert_updates(model: PeftModel, expected: dict[str, Tensor]) -> None:
    got = cases.deltas(model)
    assert got.keys() == expected.keys()
    for name, delta in got.items():
        assert (delta - expected[name]).norm() <= SVD_RECONSTRUCTION * expected[name].norm(), name


@pytest.mark.parametrize("case", [case for case in PLAIN if case not in SAVED])
def test_cat_is_the_sum(case, tmp_path):
    models = [cases.make(case, seed=seed) for seed in (0, 1)]
    found, losses = combine(list(map(from_model, models)), WEIGHTS, Combination("cat"))
    expected = {name: total for name, total in sums(models).items() if total.any()}
    assert_updates(cases.reload(found, tmp_path / "b"), expected)
    for name, total in expected.items():
        assert losses[name].lost == 0 and losses[name].kept == losses[name].rank
        assert losses[name].energy == pytest.approx(total.square().sum().item(), rel=1e-5)


@pytest.mark.parametrize("case", ["patterns", "rslora", "experts", "convolutions", "embedding"])
@pytest.mark.parametrize("rank", [3, None])
def test_svd_is_the_best_of_the_sum(case, rank, tmp_path):
    models = [cases.make(case, seed=seed) for seed in (0, 1)]
    found, losses = combine(list(map(from_model, models)), WEIGHTS, Combination(rank=rank))
    expected = {}
    kept = rank or max(update.rank for update in from_model(models[0]).updates.values())
    for name, total in sums(models).items():
        flat = total if "experts" in name else total.flatten(1)
        U, S, Vh = torch.linalg.svd(flat, full_matrices=False)
        cut = (U[..., :kept] * S[..., None, :kept]) @ Vh[..., :kept, :]
        expected[name] = cut.reshape(total.shape)
        error = ((total - expected[name]).norm() / total.norm()).item()
        assert losses[name].error == pytest.approx(error, abs=1e-4)
    loaded = cases.deltas(cases.reload(found, tmp_path / "b"))
    for name, delta in loaded.items():
        assert (delta - expected[name]).norm() <= SVD_RECONSTRUCTION * sums(models)[name].norm()


@pytest.mark.parametrize("method", METHODS)
def test_sparsified_sums(method, tmp_path):
    """Against PEFT's own of dense updates, which draw in the order of the names."""
    models = [cases.make("patterns", seed=seed) for seed in (0, 1)]
    how = Combination(method, rank=12, density=0.5, seed=3)
    found, losses = combine(list(map(from_model, models)), WEIGHTS, how)
    held = list(map(cases.deltas, models))
    torch.manual_seed(3)
    expected = {
        name: getattr(merge_utils, method)([d[name] for d in held], torch.tensor(WEIGHTS), 0.5)
        for name in sorted(held[0])
    }
    assert_updates(cases.reload(found, tmp_path / "b"), expected)  # rank 12 is full here
    again, _ = combine(list(map(from_model, models)), WEIGHTS, how)
    for key, update in found.updates.items():
        assert torch.equal(update.lora_A, again.updates[key].lora_A)
    cut, losses = combine(list(map(from_model, models)), WEIGHTS, replace(how, rank=2))
    for name, dense in expected.items():
        sigma = torch.linalg.svdvals(dense.double())
        error = (sigma[2:].norm() / sigma.norm()).item()
        assert losses[name].error == pytest.approx(error, abs=1e-4)
        assert cut.updates[name].rank == 2


def test_experts_are_sparsified_one_by_one(tmp_path):
    models = [cases.make("experts", seed=seed) for seed in (0, 1)]
    how = Combination("magnitude_prune", rank=8, density=0.3)
    found, _ = combine(list(map(from_model, models)), WEIGHTS, how)
    held = list(map(cases.deltas, models))
    expected = {
        name: torch.stack([
            merge_utils.magnitude_prune([d[name][e] for d in held], torch.tensor(WEIGHTS), 0.3)
            for e in range(cases.EXPERTS)
        ])
        for name in held[0]
    }  # fmt: skip
    assert_updates(cases.reload(found, tmp_path / "b"), expected)


def test_modules_of_one_alone_and_other_ranks(tmp_path):
    models = [cases.make("power of two"), cases.make("convolutions", seed=1)]
    found, _ = combine(list(map(from_model, models)), WEIGHTS, Combination("cat"))
    assert_updates(cases.reload(found, tmp_path / "b"), sums(models))


def test_biases_of_lora_B(tmp_path):
    models = [cases.make("lora_bias"), cases.make("linear", seed=1)]
    found, _ = combine(list(map(from_model, models)), WEIGHTS)
    loaded = cases.reload(found, tmp_path / "b")
    layer, other = (m.base_model.model.layers[0] for m in (models[0], loaded))
    want = 0.7 * layer.q_proj.scaling["default"] * layer.q_proj.lora_B["default"].bias
    torch.testing.assert_close(other.q_proj.lora_B["default"].bias, want)
    assert not other.o_proj.lora_B["default"].bias.any()


@pytest.mark.parametrize("case", SAVED)
def test_replaced_tensors_are_carried_if_they_are_equal(case, tmp_path):
    cases.save(case, tmp_path / "a")
    one = read_adapter(tmp_path / "a")
    plain = from_model(cases.make("linear", seed=1))
    for others in ([one, plain], [plain, one], [one, one]):
        found, _ = combine(others, WEIGHTS)
        assert found.extras.keys() == one.extras.keys()
        loaded = cases.reload(found, tmp_path / str(len(list(tmp_path.iterdir()))))
        state = loaded.state_dict()
        for name, tensor in read_adapter(tmp_path / "a").extras.items():
            assert any(torch.equal(tensor, held) for held in state.values()), name
    name = next(iter(one.extras))
    changed = replace(one, extras={**one.extras, name: one.extras[name] + 1})
    with pytest.raises(AdapterError, match=r"replaces a tensor of the base by other values"):
        combine([one, changed], WEIGHTS)


def test_what_has_no_sum_is_refused(tmp_path):
    plain = from_model(cases.make("linear"))
    with pytest.raises(
        AdapterError, match=r"layers\.0\.q_proj: DoRA's magnitude divides by the no"
    ):
        combine([plain, from_model(cases.make("dora"))], WEIGHTS)
    config = LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights="olora")
    changed = from_model(get_peft_model(cases.Tiny(), config))
    with pytest.raises(AdapterError, match="init_lora_weights 'olora': its factors hold a part of"):
        combine([plain, changed], WEIGHTS)
    for field, value, words in (
        ("alora_invocation_tokens", [1, 2], "aLoRA applies after its invocation tokens alone, so"),
        ("bias", "some", "expected one of none, lora_only, all, got 'some'"),
    ):
        other = replace(plain, source="other", config={**plain.config, field: value})
        with pytest.raises(AdapterError, match=f"other: {field}: {words}"):
            combine([plain, other], WEIGHTS)
    with pytest.raises(AdapterError, match="weights: expected one for each of 2 adapters"):
        combine([plain, plain], [1.0])
    update = plain.updates["layers.0.q_proj"]
    wide = replace(update, lora_A=torch.zeros(4, 9))
    other = replace(plain, source="wide", updates={update.key: wide})
    with pytest.raises(
        AdapterError, match=r"wide: layers\.0\.q_proj: expected an update of linear"
    ):
        combine([plain, other], WEIGHTS)
    rows = [from_model(cases.make("token rows")) for _ in range(2)]
    rows[1].config["trainable_token_indices"] = {"embed_tokens": [1, 5]}
    with pytest.raises(AdapterError, match=r"trainable_token_indices: .* another adapter has"):
        combine(rows, WEIGHTS)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"method": "mean"}, "method: expected one of svd, cat, ties"),
        ({"rank": 0}, "rank: expected at least 1, got 0"),
    ],
)
def test_bad_arguments(change, message):
    with pytest.raises(ValueError, match=message):
        Combination(**change)


def test_a_density_is_needed():
    with pytest.raises(AdapterError, match=r"density: expected a number in \(0, 1\], got None"):
        combine([from_model(cases.make("linear"))], [1.0], Combination("ties"))
