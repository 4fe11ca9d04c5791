"""What an inspection says of an adapter: numbers beside a dense float64 SVD, words, pages."""

from __future__ import annotations

import json
import xml.etree.ElementTree as ET
from dataclasses import replace

import pytest
import torch
from adapters import CASES, EXPERTS, delta, deltas, make, save
from checkpoint_folders import configure

from peftkern.tools.adapters import from_model, page, read_adapter
from peftkern.tools.adapters.inspect import inspect, labels, rows
from peftkern.tools.adapters.terminal import cells, remarks

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.mark.parametrize("case", CASES)
def test_numbers_are_those_of_a_dense_svd(case):
    model = make(case)
    adapter, dense = from_model(model), deltas(model)
    found = inspect(adapter)
    total = 0.0
    for one in found.spectra:
        update = adapter.updates[one.key]
        like = dense[one.key]
        whole = delta(update, like)
        whole = whole if one.expert is None else whole[one.expert]
        sigma = torch.linalg.svdvals(whole.flatten(1) if one.kind == "conv" else whole)
        rank = int((sigma > 1e-9 * sigma.max()).sum()) if update.rank else 0
        assert one.true_rank == rank
        assert one.sigma[:rank] == pytest.approx(sigma[:rank].tolist(), rel=1e-5)
        assert one.energy == pytest.approx(whole.square().sum().item(), rel=1e-5)
        assert one.stable_rank == pytest.approx(
            (sigma.square().sum() / sigma[0] ** 2).item() if rank else 0, rel=1e-5
        )
        share = sigma[:rank] / sigma[:rank].sum()
        effective = torch.special.entr(share).sum().exp().item() if rank else 0
        assert one.effective_rank == pytest.approx(effective, rel=1e-5)
        total += one.energy
    assert found.norm == pytest.approx(total**0.5)
    assert len(found.spectra) == sum(len(one.pairs()) for one in adapter.updates.values())


def test_a_rank_that_is_not_used_is_seen():
    adapter = from_model(make("linear"))
    update = adapter.updates["layers.1.o_proj"]
    B = update.lora_B.clone()
    B[:, 2] = 0
    B[:, 3] = B[:, 1]
    A = update.lora_A.clone()
    A[3] = A[1]
    changed = {**adapter.updates, update.key: replace(update, lora_A=A, lora_B=B)}
    ranks = {one.key: one.true_rank for one in inspect(replace(adapter, updates=changed)).spectra}
    assert ranks.pop("layers.1.o_proj") == 2 and set(ranks.values()) == {4}


def test_what_is_not_finite_is_counted_and_spoils_no_other_number(tmp_path):
    adapter = from_model(make("modules_to_save"))
    update = adapter.updates["layers.0.q_proj"]
    B = update.lora_B.clone()
    B[0, 0], B[3, 1] = float("nan"), float("inf")
    head = "base_model.model.lm_head.weight"
    extras = {**adapter.extras, head: adapter.extras[head] / 0}
    changed = {**adapter.updates, update.key: replace(update, lora_B=B)}
    adapter = replace(adapter, updates=changed, extras=extras)
    found = inspect(adapter)
    assert found.not_finite == {
        "layers.0.q_proj.lora_B": 2,
        head: adapter.extras[head].numel(),
    }
    bad = [one.key for one in found.spectra if one.energy != one.energy]
    assert bad == ["layers.0.q_proj"]
    record = found.as_dict()
    json.dumps(record, allow_nan=False)
    assert next(one for one in record["updates"] if one["key"] == bad[0])["energy"] is None
    assert "nan" not in page.html(found).partition("Every update")[0]


def test_rows_put_modules_together():
    found = inspect(from_model(make("experts and attention")))
    kinds = labels(one.key for one in found.spectra)
    listed = {row.name: row for row in rows(found.spectra, lambda one: kinds[one.key])}
    assert listed.keys() == {"q_proj", "gate_up_proj", "down_proj"}
    assert listed["q_proj"].count == 2 and listed["down_proj"].count == 2 * EXPERTS
    assert sum(row.share for row in listed.values()) == pytest.approx(1)
    assert listed["down_proj"].rank == (3, 3) and listed["q_proj"].rank == (2, 2)
    assert cells(listed["q_proj"])[:3] == ["12x8", "2", "2"]


def test_labels_tell_modules_of_one_name_apart():
    names = ["a.layers.0.q_proj", "a.layers.11.q_proj", "b.blocks.3.q_proj", "b.blocks.3.fc1"]
    found = labels([*names, "m.experts.7.up", "q_proj"])
    assert list(found.values()) == [
        "layers.*.q_proj", "layers.*.q_proj", "blocks.*.q_proj", "fc1", "up", "q_proj",
    ]  # fmt: skip
    assert labels(["x.fc", "y.fc"]) == {"x.fc": "x.fc", "y.fc": "y.fc"}


def test_remarks_say_what_a_merge_and_a_reader_run_into(tmp_path):
    save("linear", tmp_path / "a")
    changes = {
        "init_lora_weights": "pissa_niter_4",
        "alora_invocation_tokens": [1, 2],
        "rank_pattern": {"v_proj": 3},
        "target_modules": ["q_proj", "o_proj", "k_proj"],
        "modules_to_save": ["score"],
        "trainable_token_indices": [3],
    }
    configure(tmp_path / "a", "adapter_config.json", **changes)
    adapter = read_adapter(tmp_path / "a")
    table = {"base_model.model.embed_tokens.base_layer.weight": torch.zeros(11, 8)}
    said = list(remarks(inspect(replace(adapter, extras=table))))
    assert said == [
        "a table of the base inside, which loading puts in its place: "
        "base_model.model.embed_tokens.base_layer.weight [11, 8]",
        "no plain merge: alora_invocation_tokens: aLoRA applies after its invocation tokens alone",
        "no plain merge: init_lora_weights: pissa_niter_4 changed the base, the update is of "
        "that one",
        "without effect: rank_pattern: v_proj",
        "without effect: target_modules: k_proj",
        "without effect: modules_to_save: score",
        "without effect: trainable_token_indices",
    ]


@pytest.mark.parametrize("case", ["patterns", "experts and attention", "embedding", "adalora"])
def test_a_page_shows_maps_spectra_and_every_update(case):
    found = inspect(from_model(make(case)))
    text = page.html(found)
    assert text == page.html(found)
    kinds = set(labels(one.key for one in found.spectra).values())
    drawn = {
        kind for kind, _ in page.layer_charts.spectra([(s.key, s.sigma) for s in found.spectra])
    }
    assert drawn == kinds
    assert len(page.maps(found.spectra)) == 2
    assert text.count("<svg") == 4 + len(kinds)
    for key in found.adapter.updates:
        assert f">{key}<" in text
    for part in text.split("<svg")[1:]:
        ET.fromstring("<svg" + part.partition("</svg>")[0] + "</svg>")


def test_a_page_of_modules_without_layers_has_no_map():
    found = inspect(from_model(make("embedding")))
    assert page.maps([one for one in found.spectra if one.key == "embed_tokens"]) == []


def test_names_smuggle_nothing_into_a_page():
    adapter = from_model(make("linear"))
    update = adapter.updates["layers.0.q_proj"]
    hostile = replace(update, module="layers.0.<script>alert(1)</script>")
    config = {**adapter.config, "base_model_name_or_path": "<img src=x>"}
    adapter = replace(adapter, config=config, updates={hostile.key: hostile}, source="<b>")
    text = page.html(inspect(adapter))
    assert "<img" not in text and "<b>" not in text and text.count("<script") == 1
