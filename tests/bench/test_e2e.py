"""The end-to-end bench at toy dimensions: stacks, checks against float64, memory, answers."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import bench_e2e
import gpu
import pytest
import specs
import stacks
import suite
import torch
from scripts import run_here
from tolerances import NF4_RANDOM_STD_RTOL, PLAN_RTOL

import peftkern
from peftkern.tools.bench import memory, peers
from peftkern.tools.bench.record import OURS
from peftkern.tools.bench.rows import new_record
from peftkern.tools.plan.plan import PRESETS, Training, plan

CPU = torch.device("cpu")
TOY = specs.Options(n=64, k=64, r=4, rows=24, layers=2)
ROOF = {"copy": 1e9, "bfloat16": 1e9, "float32": 1e9}
GPU_SPECS = {spec.short_name: spec for spec in bench_e2e.gpu_specs(CPU)}
STEPS = [spec for spec in GPU_SPECS.values() if isinstance(spec, specs.Spec)]
FIT = GPU_SPECS["llama-65b-r64-512-tokens-48GB-bf16-adapters/nf4"]


def toy(spec):
    return replace(spec, shape=(64, 64))


def run(spec: specs.Spec) -> dict:
    record = new_record({}, ROOF)
    assert suite.InProcess(record, TOY, 0.0).run_case(toy(spec), math.inf, lambda *_: None)
    return record["cases"][0]


# At toy sizes the others differ from these in their names alone.
WHOLE = [spec for spec in STEPS if "llama3-8b" in spec.name and "-2048-" in spec.name]


@pytest.mark.parametrize("spec", [*bench_e2e.SPECS, *WHOLE], ids=lambda spec: spec.name)
def test_every_step_is_right_and_measured(spec):
    record = run(spec)
    assert record["tokens"] == 24 and record["op"] == "training_step" and record["N"] is None
    assert record["served"] or "small dense product" in str(record["fell_back"])
    for name in (OURS, bench_e2e.PEFT):
        row = record["providers"][name]
        assert row["wrong"] is None
        assert row["tokens_s"] == pytest.approx(24e3 / row["median_ms"])
        assert row["peak_bytes"] > 0 and row["planned_bytes"] > 0
        assert row["graph_ms"] is None and row["launches"] is None


def with_gradients_times(factor: int, spec: specs.Spec, first: int | None = None) -> specs.Spec:
    """The gradients of our first lora_B, or of all, wrong on purpose."""

    def build(options):
        case = spec.build(options)
        trainer = case.variants[OURS].call.__self__
        factors = [p for name, p in trainer.model.named_parameters() if ".lora_B" in name]
        for parameter in factors[:first]:
            parameter.register_hook(lambda gradient: factor * gradient)
        return case

    return replace(spec, build=build)


def test_a_wrong_gradient_has_no_time():
    rows = run(with_gradients_times(2, bench_e2e.SPECS[0], first=1))["providers"]
    assert rows[OURS]["wrong"] and rows[OURS]["median_ms"] is None
    assert rows[bench_e2e.PEFT]["wrong"] is None


def test_a_wrong_gradient_shows_in_the_losses_of_a_whole_model():
    """Where float64 has no room: gradients of the other sign."""
    assert run(with_gradients_times(-1, STEPS[0]))["providers"][OURS]["wrong"]


def test_whole_models_come_in_every_length_the_most_wanted_first():
    names = [spec.short_name for spec in bench_e2e.gpu_specs(CPU)]
    cases = [f"{m}-{n}" for m in ("qlora", "lora") for n in (512, 2048, 8192)]
    for case in cases:
        assert any(name.startswith(f"llama3-8b-{case}-tokens/") for name in names)
    assert names[0] == "llama3-8b-qlora-2048-tokens/nf4" and len(set(names)) == len(names)


@pytest.mark.parametrize("nf4", ["bitsandbytes", "peftkern"])
@pytest.mark.parametrize("method", ["qlora", "lora"])
def test_both_variants_share_one_base_and_nothing_else(method, nf4, monkeypatch):
    if nf4 == "peftkern":
        monkeypatch.setattr(peers, "bitsandbytes_missing", lambda device: "on purpose")
    model = stacks.scaled(PRESETS["llama3-8b"], 64, 2)
    training = Training(method, r=4, sequence=8, device="cpu")
    bases = bench_e2e.Bases()
    base = bases.get(model, training, CPU)
    assert bases.get(model, replace(training, sequence=9), CPU) is base
    before = {name: value.clone() for name, value in base.state_dict().items()}
    names = set(dict(base.named_modules()))
    patched, plain = (
        stacks.Trainer(model, replace(training, patched=p), CPU, lr=1e-3, over=base)
        for p in (True, False)
    )
    pairs = [dict(trainer.model.named_parameters()) for trainer in (patched, plain)]
    assert pairs[0].keys() == pairs[1].keys()
    for name, ours in pairs[0].items():
        assert (ours is pairs[1][name]) == (".lora_" not in name), name
    assert len(patched.report.patched) == 14 and plain.report is None
    assert patched.curve(3)[2] < patched.losses[0]
    kinds = {type(module).__name__ for module in plain.model.modules()}
    assert not plain.losses and not any("Patched" in kind for kind in kinds)
    assert set(dict(base.named_modules())) == names and not base.model.embed_tokens._forward_hooks
    after = base.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(before[n], after[n]) for n in after)
    bases.get(model, replace(training, method="lora", base="fp32", dtype="fp32"), CPU)
    assert bases.net is not base


def test_longer_cases_ask_for_more_time():
    at_size = specs.Options(n=4096, k=4096)
    names = [f"llama3-8b-qlora-{tokens}-tokens/nf4" for tokens in (512, 2048, 8192)]
    needed = [GPU_SPECS[name].seconds(at_size) for name in names]
    assert sorted(needed) == needed and 15 < needed[0] < 30 and needed[2] < 90


@pytest.mark.parametrize("patched", [False, True], ids=["PEFT", "patched"])
def test_predicted_memory_is_beside_the_measured(patched):
    """Long enough that the activations and not one layer's scratch make the peak."""
    model = stacks.scaled(PRESETS["llama3-8b"], 128, 2)
    training = Training(
        "qlora", r=4, sequence=128, checkpointing=False, patched=patched, device="cpu"
    )
    trainer = stacks.Trainer(model, training, CPU, lr=1e-3)
    trainer.step()
    measured = memory.peak_bytes(trainer.step, CPU)
    planned = bench_e2e.beyond_the_model(plan(model, training))
    assert planned == pytest.approx(measured, rel=PLAN_RTOL)


@pytest.mark.parametrize("preset", ["llama3-8b", "llama-65b"])
def test_presets_keep_their_shape_and_toys_their_proportions(preset):
    model = PRESETS[preset]
    assert stacks.scaled(model, model["hidden_size"], model["num_hidden_layers"]) == model
    small = stacks.scaled(model, 256, 3)
    keys = ("hidden_size", "num_hidden_layers", "num_attention_heads", "head_dim")
    assert [small[key] for key in keys] == [256, 3, 2, 128]
    assert small["intermediate_size"] * model["hidden_size"] == 256 * model["intermediate_size"]
    assert stacks.scaled(model, 7, 1)["num_attention_heads"] == 1


def test_random_weights_are_nf4_of_the_size_that_keeps_activations():
    weight = stacks.random_nf4(256, 512, torch.bfloat16, torch.Generator().manual_seed(0))
    values = peftkern.dequantize_nf4(weight).float()
    assert weight.nested and values.shape == (256, 512)
    assert values.std().item() == pytest.approx(512**-0.5, rel=NF4_RANDOM_STD_RTOL)
    layer = stacks.nf4_layer(weight)
    assert torch.equal(peftkern.NF4Weight.from_bitsandbytes(layer.weight).packed, weight.packed)


def asked(seconds: float | None = None, **how: object) -> dict:
    noted: dict = {}
    options = specs.sized(toy(FIT), TOY)
    bench_e2e.does_it_fit(options, seconds, lambda **facts: noted.update(facts), **how)
    return noted


def test_a_step_that_fits_is_measured():
    noted = asked(adapter="bf16")
    assert noted["fits"] is True and noted["reached"] == "step 2"
    assert len(noted["losses"]) == len(noted["step_s"]) == bench_e2e.STEPS
    assert noted["losses"][1] < noted["losses"][0]
    assert 0 < noted["planned_bytes"] < bench_e2e.CAP
    assert noted["peak_bytes"] > noted["planned_bytes"] / 2


def test_a_step_that_does_not_fit_is_an_answer_and_other_errors_are_none():
    assert asked(adapter="fp32", cap=1)["fits"] is False
    error = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.\nMore")
    noted: dict = {}

    def run() -> None:
        raise error

    bench_e2e.answer(run, CPU, 1, lambda **facts: noted.update(facts))
    said = "OutOfMemoryError: CUDA out of memory. Tried to allocate 2 GiB."
    assert noted == {"fits": False, "stopped": said}
    error = ValueError("on purpose")
    with pytest.raises(ValueError, match="on purpose"):
        bench_e2e.answer(run, CPU, 1, lambda **facts: None)


def test_a_step_without_time_is_no_answer():
    noted = asked(adapter="bf16", seconds=0.0)
    assert noted["fits"] is None and noted["stopped"] == "no time left after 0 s"
    assert noted["reached"] == "nothing" and noted["planned_bytes"] > 0


@pytest.mark.skipif(torch.cuda.is_available(), reason="the interpreter is off beside a GPU")
def test_the_gpu_part_runs_under_the_interpreter(tmp_path):
    """As gpu.py starts it, with the question and what it notes in the record."""
    assert "e2e" in gpu.SHARES
    options = ["--device", "cpu", "--only", "bf16-adapters", "--n", "32", "--k", "32"]
    options += ["--rows", "2", "--layers", "1", "--seconds", "0", "--budget", "500"]
    options += ["--rotate-mb", "0", "--out", tmp_path, "--commit", "abc"]
    status, out, error = run_here("bench/bench_e2e.py", *options)
    assert status == 0, error
    assert f"{FIT.name}: fits into 48 GB; peak" in out
    (path,) = tmp_path.glob("*-interpreter/e2e.json")
    (answer,) = json.loads(path.read_text())["answers"]
    assert answer["name"] == FIT.name and answer["fits"] is True and answer["reached"] == "step 2"
