"""`peftkern bench --model`: training steps of models of many kinds, and sides that go wrong.

Its workers are called here without processes, but for one run as a user has it.
"""

from __future__ import annotations

import contextlib
import csv
import dataclasses
import io
import itertools
import json
import math
import re
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from command_line import refused
from peft.tuners.lora import LoraLayer

import peftkern
from peftkern.backends.cpu import crossovers
from peftkern.cli import main
from peftkern.tools import models
from peftkern.tools.bench import record as records
from peftkern.tools.bench import training_run, training_worker
from peftkern.tools.bench.data import nf4_values64
from peftkern.tools.bench.processes import WorkerError, WorkerGoneError, WorkerSlowError
from peftkern.tools.bench.record import OURS
from peftkern.tools.bench.training_step import Options, plan, planned_bytes
from peftkern.tools.bench.training_worker import Worker

SIZES = {"vocab_size": 256, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
SIZES |= {"num_attention_heads": 4, "num_key_value_heads": 2}
GPT2 = {"vocab_size": 256, "n_embd": 64, "n_layer": 2, "n_head": 4}
T5 = {"vocab_size": 256, "d_model": 64, "d_kv": 16, "d_ff": 128, "num_layers": 2, "num_heads": 4}
MIXTURE = {**SIZES, "head_dim": 16, "num_experts": 4, "num_experts_per_tok": 2}
MIXTURE |= {"moe_intermediate_size": 32}
CONFIGS = {
    "llama": SIZES,
    "qwen3": {**SIZES, "head_dim": 16},
    "qwen3_moe": MIXTURE,
    "gemma3_text": {**SIZES, "head_dim": 16},
    "phi3": {**SIZES, "pad_token_id": 0},
    "gpt2": GPT2,  # has dropout, and Conv1D
    "t5": T5,
}
OPTIONS = Options(
    model="", method="lora", base=None, targets="all-linear", batch=2, sequence=24,
    checkpointing=False, layers=None, steps=3,
)  # fmt: skip


def saved(folder, kind: str, **more: object) -> str:
    path = folder / kind
    path.mkdir(exist_ok=True)
    (path / "config.json").write_text(json.dumps({"model_type": kind, **CONFIGS[kind], **more}))
    return str(path)


def worker(name: str, job) -> Worker:
    started = Worker(name)
    started.start(dataclasses.asdict(job.step), threads=1)
    return started


@pytest.fixture(autouse=True)
def everything_serves(monkeypatch):
    """Kernels serve in processes of their own and in this one, however small a layer is."""
    monkeypatch.setenv("PEFTKERN_TRUST", "always")
    with crossovers.use(**dict.fromkeys(crossovers.COUNTED, 0)):
        yield


def sides(job, wrong=lambda model: None) -> tuple[training_run.TrainingBench, Worker]:
    """Both have run their first steps and were compared; `wrong` may spoil ours."""
    bench = training_run.TrainingBench(job, threads=1, budget=60)
    for name in (training_run.PEFT, OURS):
        side = worker(name, job)
        if name == OURS:
            wrong(side.model)
        else:
            noise = side.losses(job.step.steps, noise=True)["losses"]
        found = side.losses(job.step.steps)
        bench.losses[name], bench.resolution = found["losses"], found["resolution"]
    bench._judge(noise)
    return bench, side


@pytest.mark.parametrize("base", ["fp32", "nf4"])
@pytest.mark.parametrize("kind", CONFIGS)
def test_models_of_every_kind_learn_as_with_peft(kind, base, tmp_path):
    options = dataclasses.replace(OPTIONS, model=saved(tmp_path, kind), base=base)
    job = plan(options, "4", "fp32", "cpu", seed=0)
    bench, ours = sides(job)
    row, losses = bench.rows[OURS], bench.losses[OURS]
    assert row.wrong is None and row.error_max <= training_run.FLOOR, bench.said
    assert losses[0] != losses[-1] and job.work[1] > 0
    assert all(".lora_" in name for name, p in ours.model.named_parameters() if p.requires_grad)
    served = {op for op, _ in peftkern.stats().calls}
    assert any(op.startswith("nf4_lora_linear") for op in served) == (base == "nf4")
    assert any(op.startswith("grouped") for op in served) == (kind == "qwen3_moe")


@pytest.mark.parametrize("method", ["adalora", "dora"])
def test_other_methods_learn_as_with_peft(method, tmp_path):
    job = tiny_job(tmp_path, method=method, base="nf4", dtype="fp32")
    assert job.facts["name"].startswith(f"training_step/llama-nf4-{method}/2x24/")
    assert f"--method {method} " in job.command(threads=1, budget=9.0)
    bench, ours = sides(job)
    assert bench.rows[OURS].wrong is None, bench.said
    served = {op for op, _ in peftkern.stats().calls}
    assert any(method in op or "dora" in op for op in served)
    assert sum(f".lora_{'E' if method == 'adalora' else 'magnitude'}" in n
               for n, _ in ours.model.named_parameters()) == 14  # fmt: skip


def test_preset_is_a_model_and_its_memory_is_planned():
    options = dataclasses.replace(OPTIONS, model="llama3.2-1b", layers=1, sequence=8)
    job = plan(options, "4", "bf16", "cpu", seed=0)
    assert job.facts["name"] == "training_step/llama3.2-1b-bf16-1-layers/2x8/r4/bfloat16"
    assert not job.step.weights and "1 of 16 layers (--layers)" in job.said
    ours, theirs = (planned_bytes(job.step, patched) for patched in (True, False))
    assert 0 < ours <= theirs  # what the vocabulary's logits take alone
    assert ours > 2 * 8 * 128256 * 4
    other = dataclasses.replace(job.step, base="fp16", dtype="float16")
    assert planned_bytes(other, True) is None


def half_the_update(model) -> None:
    for module in model.modules():
        if isinstance(module, LoraLayer):
            module.scaling["default"] /= 2


def wrong_gradient(model) -> None:
    for name, parameter in model.named_parameters():
        if ".lora_B" in name:
            parameter.register_hook(torch.neg)


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("wrong", [half_the_update, wrong_gradient])
def test_wrong_updates_and_gradients_show(wrong, dtype, tmp_path):
    bench, _ = sides(tiny_job(tmp_path, dtype=dtype, steps=training_run.COMPARED), wrong)
    assert bench.rows[OURS].wrong.startswith("losses differ from PEFT's by ")


def test_loss_that_is_no_number_is_wrong(tmp_path):
    bench = training_run.TrainingBench(tiny_job(tmp_path), threads=1, budget=60)
    bench.losses, bench.resolution = {"peft": [6.0, math.nan], OURS: [6.0, 6.0]}, 1e-7
    bench._judge([6.0, 6.0])
    assert bench.rows["peft"].wrong == "loss nan at step 2" and bench.rows[OURS].wrong is None


def tiny_job(folder, kind: str = "llama", r: str = "4", dtype: str | None = None, **more: object):
    options = dataclasses.replace(OPTIONS, model=saved(folder, kind), **more)
    return plan(options, r, dtype, "cpu", seed=0)


def test_options_decide_what_is_built(tmp_path):
    job = tiny_job(tmp_path, layers=1, targets="q_proj,up_proj", checkpointing=True)
    assert job.facts["name"] == (
        "training_step/llama-bf16-1-layers-checkpointing-q_proj+up_proj/2x24/r4/bfloat16"
    )
    assert "1 of 2 layers (--layers)" in job.said and job.step.base == "bf16"
    assert job.work[1] == 3 * tiny_job(tmp_path, layers=1).work[1] // 2
    words = job.command(threads=2, budget=60.0).split()
    assert words[:2] == ["peftkern", "bench"] and "--base=" not in words
    side = worker(OURS, job)
    assert side.model.get_base_model().is_gradient_checkpointing
    layers = side.model.get_base_model().model.layers
    assert len(layers) == 1 and layers[0].self_attn.k_proj.weight.dtype is torch.bfloat16
    adapted = {
        n.split(".lora_")[0].split(".")[-1]
        for n, _ in side.model.named_parameters()
        if ".lora_" in n
    }
    assert adapted == {"q_proj", "up_proj"}
    config = models.read_config(saved(tmp_path, "gemma3_text"))
    assert models.set_layers(config, 1) == 2 and len(config.layer_types) == 1


@pytest.mark.parametrize("missing", [False, True])
def test_weights_of_a_folder_are_loaded_and_quantized(missing, tmp_path, monkeypatch):
    """By bitsandbytes, or by ours where it does not run; experts stay dense."""
    if missing:
        monkeypatch.setattr(training_worker, "bitsandbytes_missing", lambda device: "on purpose")
    path = saved(tmp_path, "qwen3_moe")
    model = models.empty_model(models.read_config(path), torch.float32, buffers=True)
    torch.manual_seed(3)
    models.draw_weights(model, torch.device("cpu")).save_pretrained(path)
    job = tiny_job(tmp_path, "qwen3_moe", base="nf4", dtype="bf16")
    assert (
        job.step.weights and job.said[1] == "experts stay in bfloat16, as transformers leaves them"
    )
    net = training_worker.base_model(job.step, torch.device("cpu"))
    layer = net.model.layers[0].self_attn.q_proj
    assert type(layer).__name__ == ("NF4Linear" if missing else "Linear4bit")
    wanted = model.model.layers[0].self_attn.q_proj.weight
    weight = layer.nf4 if missing else peftkern.NF4Weight.from_bitsandbytes(layer.weight)
    values = nf4_values64(weight, 0, weight.numel).view(weight.shape)
    assert (values - wanted).abs().max() < 0.2 * wanted.abs().max()
    experts = net.model.layers[0].mlp.experts.gate_up_proj
    assert torch.equal(experts, model.model.layers[0].mlp.experts.gate_up_proj.bfloat16())


def test_config_decides_how_weights_are_quantized(tmp_path):
    nf4 = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    saved(tmp_path, "llama", quantization_config=nf4, dtype="float16")
    options = dataclasses.replace(OPTIONS, model=str(tmp_path / "llama"))
    job = plan(options, "4", None, "cpu", seed=0)
    assert (job.step.base, job.step.dtype) == ("nf4", "float16")
    dense = plan(dataclasses.replace(options, base="bf16"), "4", None, "cpu", seed=0)
    assert (dense.step.base, dense.step.dtype) == ("bf16", "bfloat16")
    net = training_worker.base_model(dense.step, torch.device("cpu"))
    assert type(net.model.layers[0].mlp.up_proj) is torch.nn.Linear


class Side:
    """In the place of a process: its answers by command, an error to raise among them."""

    answers: ClassVar[dict[str, dict[str, object]]] = {}

    def __init__(self, name: str, module: str = "") -> None:
        self.name, self.stopped = name, False

    def ask(self, deadline: float, doing: str, do: str, **more: object) -> object:
        usual = {
            "start": {},
            "losses": {"losses": [6.0, 5.0], "resolution": 1e-7, "calls": {}, "said": []},
            "memory": {"peak_bytes": 100, "held_bytes": 1000, "free_bytes": 10**9},
            "run": {"samples": [0.25 if self.name == "peft" else 0.125]},
            "roof": {"copy": 1e9, "bfloat16": 1e12},
        }
        order.append((self.name, do))
        answer = self.answers.get(self.name, {}).get(do, usual[do])
        if isinstance(answer, Exception):
            raise answer
        return answer

    def stop(self) -> None:
        order.append((self.name, "stop"))


order: list[tuple[str, str]] = []


@pytest.fixture
def measured(tmp_path, monkeypatch):
    """Run a job with such sides; return its case."""

    def run(**answers: dict) -> dict:
        order.clear()
        monkeypatch.setattr(Side, "answers", answers)
        monkeypatch.setattr(training_run, "Process", Side)
        monkeypatch.setattr(training_run, "planned_bytes", lambda step, patched: None)
        job = tiny_job(tmp_path)
        with training_run.TrainingBench(job, threads=1, budget=60) as bench:
            record = bench.run()
        record |= {"command": "", "not_installed": {}}
        records.check(json.loads(json.dumps(record)))
        return record["cases"][0]

    return run


def test_steps_are_timed_in_turns(measured):
    case = measured()
    ours, theirs = case["providers"][OURS], case["providers"]["peft"]
    assert list(case["providers"]) == [OURS, "peft"] and case["against"] == "peft"
    assert (ours["median_ms"], theirs["median_ms"]) == (125.0, 250.0)
    assert ours["tokens_s"] == 48 / 0.125 and ours["held_bytes"] == 1000
    assert (ours["error_max"], case["op"], case["M"], case["N"]) == (0.0, "training_step", 48, None)
    runs = [name for name, do in order if do == "run"]
    assert len(runs) == 2 * OPTIONS.steps
    assert all(set(pair) == {OURS, "peft"} for pair in zip(runs[::2], runs[1::2], strict=True))


def test_sides_that_do_not_fit_together_run_one_after_the_other(measured):
    case = measured(peft={"memory": {"peak_bytes": 1, "held_bytes": 10**9, "free_bytes": 10**9}})
    assert case["providers"][OURS]["median_ms"] and case["providers"]["peft"]["median_ms"]
    assert order.index(("peft", "stop")) < order.index((OURS, "start"))
    assert any(said.startswith("one side after the other, not in turns: ") for said in case["said"])


def test_side_that_fails_is_a_row_that_says_so(measured):
    """PEFT's may lack the memory that ours does not need; then there is nothing to compare with."""
    case = measured(peft={"losses": WorkerGoneError("killed by SIGKILL")})
    assert case["providers"]["peft"]["failed"] == "killed by SIGKILL"
    assert case["providers"][OURS]["median_ms"] == 125.0 and case["against"] is None
    assert "losses were not compared: PEFT has none" in case["said"]
    case = measured(peftkern={"run": WorkerSlowError("no answer")})
    assert case["providers"][OURS]["failed"] == "60 s ended while step 1 of 3 (--budget)"
    assert case["providers"]["peft"]["median_ms"] == 250.0
    wrong = {"losses": [6.0, 5.5], "resolution": 1e-7, "calls": {}, "said": []}
    row = measured(peftkern={"losses": wrong})["providers"][OURS]
    assert row["wrong"] == "losses differ from PEFT's by 0.1; bound 1e-05" and not row["median_ms"]


def test_peft_that_is_too_slow_leaves_time_for_ours(measured):
    case = measured(peft={"losses": WorkerSlowError("no answer")})
    theirs = case["providers"]["peft"]
    assert theirs["failed"] is theirs["median_ms"] is None and theirs["at_least_ms"] > 0
    assert case["providers"][OURS]["median_ms"] == 125.0 and case["against"] == "peft"
    assert "losses were not compared: PEFT has none" in case["said"]
    assert [do for name, do in order if name == OURS].count("losses") == 1


def test_budget_that_ends_is_a_row_that_says_so(measured, monkeypatch):
    clock = itertools.count()
    monkeypatch.setattr(training_run.time, "monotonic", lambda: 8.0 * next(clock))
    for row in measured()["providers"].values():
        assert re.fullmatch(r"only [012] of 3 steps within 60 s \(--budget\)", row["failed"])
    with pytest.raises(WorkerError, match=r"^--budget: 60 s ended before anything was measured$"):
        measured(referee={"roof": WorkerSlowError("no answer")})


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> tuple[str, dict, Path]:
    """What a user sees: QLoRA of a mixture of experts, in processes."""
    folder, said = tmp_path_factory.mktemp("run"), io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(said):
        patch.setenv("COLUMNS", "160")
        patch.setenv("PEFTKERN_TRUST", "always")
        patch.delenv("TRITON_INTERPRET", raising=False)
        names = ("json", "csv", "html")
        files = [f"--{name}={folder / 'new'}.{name}" for name in names]
        model = ["--model", saved(folder, "qwen3_moe"), "--base=nf4", "--r=4", "--steps=3"]
        sizes = ["--sequence=24", "--batch=2", "--budget=10m", "--threads=1", "--device=cpu"]
        assert main(["bench", *model, *sizes, *files, "--repro"]) == 0, said.getvalue()
    return said.getvalue(), json.loads((folder / "new.json").read_text()), folder


def test_run_is_a_record_like_any_other(run):
    _, record, folder = run
    assert records.read(folder / "new.json") == record
    (case,) = record["cases"]
    for row in case["providers"].values():
        assert row["wrong"] is None and row["failed"] is None
        assert len(row["samples_ms"]) == 3 and row["tokens_s"] > 0
        assert 0 < row["peak_bytes"] < row["held_bytes"]
    lines = list(csv.DictReader(io.StringIO((folder / "new.csv").read_text())))
    assert [line["provider"] for line in lines] == [OURS, "peft"]
    assert "training_step" in (folder / "new.html").read_text()
    earlier = f"--compare={folder / 'new.json'}"
    assert main(["bench", f"--from={folder / 'new.json'}", earlier]) == 0


def test_run_says_what_was_built_and_how_losses_compare(run):
    said, record, _ = run
    assert "training_step qwen3_moe-nf4 48 tokens, r=4, bf16, full" in said
    for column in ("steps/s", "tokens/s", "held MB", "planned MB", "speed-up"):
        assert column in said
    for line in (
        "Qwen3MoeForCausalLM, 107,392 parameters, random weights, random tokens in batches of 2 x",
        "experts stay in bfloat16, as transformers leaves them",
        "peftkern.patch: 10 patched (lora.Linear4bit 8, lora.ParamWrapper 2), 0 skipped",
        "losses of 3 steps: ",
    ):
        assert line in said
    command = record["cases"][0]["command"]
    assert command in said and "--base nf4 --targets all-linear --batch 2" in command


def test_wrong_input_is_one_line(capfd, tmp_path):
    llama = saved(tmp_path, "llama")

    def config(name: str, text: str) -> str:
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(text)
        return str(tmp_path / name)

    gptq = json.dumps(
        {"model_type": "llama", **SIZES, "quantization_config": {"quant_method": "gptq"}}
    )
    huge = json.dumps({"model_type": "llama", **SIZES, "hidden_size": 1 << 22})
    get = "download config.json first: hf download meta-llama/Llama-3-8B config.json --local-dir"
    for complaint, *options in (
        (get, "meta-llama/Llama-3-8B"),
        (f"--model: {tmp_path}: expected a config.json", tmp_path),
        ("expected JSON in UTF-8", config("text", "{")),
        ("expected the config of a transformers model", config("list", "[]")),
        ("does not recognize this architecture", config("new", '{"model_type": "frobnicate"}')),
        (
            "does not learn from tokens alone: no AutoModelForCausalLM",
            config("vit", '{"model_type": "vit"}'),
        ),
        ("--base: the config names gptq; without weights", config("gptq", gptq)),
        ("GB; --layers measures fewer layers", config("huge", huge)),
        ("--base: 'int8' is not one of nf4, bf16", llama, "--base=int8"),
        ("--base: with --model one value, got nf4, bf16", llama, "--base=nf4,bf16"),
        ("--dtype: fp32, but --base is bf16", llama, "--base=bf16", "--dtype=fp32"),
        ("--method: 'vera' is not one of lora, adalora, dora", llama, "--method=vera"),
        ("--targets: experts have no dora", saved(tmp_path, "qwen3_moe"), "--method=dora"),
        ("--r: with --model one value, got 4, 8", llama, "--r=4,8"),
        (
            "--targets: 'w1' is no linear layer; accepted: all-linear, down_proj",
            llama,
            "--targets=w1",
        ),
        ("--sequence: expected 2 to", llama, "--sequence=1"),
        ("--sequence: 4096: the model takes at most 2048 tokens", llama, "--sequence=4096"),
        ("--layers: expected 1 to", llama, "--layers=0"),
    ):
        refused(capfd, complaint, "bench", "--device=cpu", "--model", *options)
    refused(
        capfd, "--op: has no effect with --model", "bench", "--model", llama, "--op=lora_linear"
    )
    refused(capfd, "--steps: needs --model", "bench", "--steps=3")
