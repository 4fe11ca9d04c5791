"""The end-to-end bench at toy dimensions: stacks, checks against float64, memory, answers."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import bench_e2e
import gpu
import pytest
import specs
import suite
import torch
from scripts import run_here
from tolerances import NF4_RANDOM_STD_RTOL, PLAN_RTOL

import peftkern
from peftkern.tools.bench import base_layers, peers, training_run
from peftkern.tools.bench.record import OURS
from peftkern.tools.bench.rows import new_record
from peftkern.tools.bench.training_worker import Worker
from peftkern.tools.plan.presets import PRESETS

CPU = torch.device("cpu")
TOY = specs.Options(n=64, k=64, r=4, rows=24, layers=2)
ROOF = {"copy": 1e9, "bfloat16": 1e9, "float32": 1e9}
GPU_CASES = {case.short_name: case for case in bench_e2e.gpu_cases(CPU)}
STEPS = [case for case in GPU_CASES.values() if isinstance(case, specs.Steps)]
FIT = GPU_CASES["llama-65b-r64-512-tokens-48GB-bf16-adapters/nf4"]


class Here:
    """A side's worker in this process."""

    def __init__(self, name: str, module: str = "") -> None:
        self.worker = Worker(name)

    def ask(self, deadline: float, doing: str, do: str, **more: object) -> dict:
        return json.loads(json.dumps(getattr(self.worker, do)(**more)))

    def stop(self) -> None:
        del self.worker


@pytest.fixture
def run(monkeypatch):
    """Run a case at the sizes of the options; return its record."""

    def run(case: specs.Steps, options: specs.Options = TOY) -> dict:
        monkeypatch.setattr(training_run, "Process", Here)
        record = new_record({}, ROOF)
        case = replace(case, shape=(options.n, options.k))
        assert suite.InProcess(record, options, 0.0).run_case(case, math.inf, lambda *_: None)
        return record["cases"][0]

    return run


# At toy sizes the others differ from these in their names alone.
WHOLE = [case for case in STEPS if "llama3-8b" in case.name and "-2048-" in case.name]


def first_of(cases: Iterable[specs.Steps]) -> list[Any]:
    """The first; the others, which differ in the method or in what is kept, are of CI."""
    first, *others = cases
    return [first, *(pytest.param(case, marks=pytest.mark.more) for case in others)]


@pytest.mark.parametrize("case", [*bench_e2e.CASES, *first_of(WHOLE)], ids=lambda case: case.name)
def test_every_step_is_right_and_measured(case, run):
    record = run(case)
    assert record["tokens"] == 24 and record["op"] == "training_step" and record["N"] is None
    assert record["served"] or "small dense product" in str(record["fell_back"])
    assert (record["name"], record["shape"], record["against"]) == (
        *(case.name, case.short_name),
        "PEFT",
    )
    assert ("adalora" in case.name) == any("adalora" in one for one in record["served"])
    for name in (OURS, "PEFT"):
        row = record["providers"][name]
        assert row["wrong"] is None and row["failed"] is None
        assert row["tokens_s"] == pytest.approx(24e3 / row["median_ms"])
        assert row["peak_bytes"] > 0 and row["planned_bytes"] > 0
        assert row["graph_ms"] is None and row["launches"] is None


def test_whole_models_come_in_every_length_the_most_wanted_first():
    names = [spec.short_name for spec in bench_e2e.gpu_cases(CPU)]
    cases = [f"{m}-{n}" for m in ("qlora", "lora") for n in (512, 2048, 8192)]
    for case in cases:
        assert any(name.startswith(f"llama3-8b-{case}-tokens/") for name in names)
    assert names[0] == "llama3-8b-qlora-2048-tokens/nf4" and len(set(names)) == len(names)


def test_longer_cases_ask_for_more_time():
    at_size = specs.Options(n=4096, k=4096)
    names = [f"llama3-8b-qlora-{tokens}-tokens/nf4" for tokens in (512, 2048, 8192)]
    needed = [GPU_CASES[name].seconds(at_size) for name in names]
    assert sorted(needed) == needed and 40 < needed[0] < 80 and needed[2] < 150


def test_predicted_memory_is_beside_the_measured(run):
    """Long enough that the activations and not one layer's scratch make the peak."""
    case = bench_e2e.few_layers("qlora", 128, 128)
    rows = run(case, specs.Options(n=128, k=128, r=4, rows=128, layers=2))["providers"]
    for row in rows.values():
        assert row["planned_bytes"] == pytest.approx(row["peak_bytes"], rel=PLAN_RTOL)


@pytest.mark.parametrize("preset", ["llama3-8b", "llama-65b"])
def test_presets_keep_their_shape_and_toys_their_proportions(preset):
    model = PRESETS[preset]
    assert bench_e2e.scaled(model, model["hidden_size"], model["num_hidden_layers"]) == model
    small = bench_e2e.scaled(model, 256, 3)
    keys = ("hidden_size", "num_hidden_layers", "num_attention_heads", "head_dim")
    assert [small[key] for key in keys] == [256, 3, 2, 128]
    assert small["intermediate_size"] * model["hidden_size"] == 256 * model["intermediate_size"]
    assert bench_e2e.scaled(model, 7, 1)["num_attention_heads"] == 1


def test_random_weights_are_nf4_of_the_size_that_keeps_activations():
    weight = base_layers.random_nf4(256, 512, torch.bfloat16, torch.Generator().manual_seed(0))
    values = peftkern.dequantize_nf4(weight).float()
    assert weight.nested and values.shape == (256, 512)
    assert values.std().item() == pytest.approx(512**-0.5, rel=NF4_RANDOM_STD_RTOL)
    layer = peers.nf4_layer(weight)
    assert torch.equal(peftkern.NF4Weight.from_bitsandbytes(layer.weight).packed, weight.packed)


def asked(seconds: float | None = None, **how: object) -> dict:
    noted: dict = {}
    options = specs.sized(replace(FIT, shape=(64, 64)), TOY)
    bench_e2e.does_it_fit(options, seconds, lambda **facts: noted.update(facts), **how)
    return noted


def test_a_step_that_fits_is_measured():
    noted = asked(adapter="bf16")
    assert noted["fits"] is True and noted["reached"] == "step 2"
    assert len(noted["losses"]) == len(noted["step_s"]) == bench_e2e.FIT_STEPS
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
