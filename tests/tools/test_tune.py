"""`peftkern tune`: real child processes that hang, crash and go on, on tiny layers."""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import subprocess
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from command_line import refused, told, told_json
from paths import ROOT
from peft_models import K, N, lora_net, make_linear4bit
from plan_configs import LLAMA_CONFIG
from tolerances import HANG_SECONDS
from waiting import wait_until

import peftkern
from peftkern.backends import journal, trust
from peftkern.backends.cpu import crossovers, nf4_lora_linear
from peftkern.integrations.peft import trial
from peftkern.tools.bench.cases import DTYPES
from peftkern.tools.bench.processes import Process, WorkerGoneError
from peftkern.tools.bench.shapes import parse_shapes
from peftkern.tools.bench.timer import Timing
from peftkern.tools.tune import cases, job, tune, worker
from peftkern.tools.tune.cases import Case
from peftkern.tools.tune.worker import Worker

CPU = torch.device("cpu")
CASE = Case("tiny", N, K, "nf4", 4, 5, "fp32")
# Faults of a child: Python runs a sitecustomize of PYTHONPATH before anything else.
FAULTS = """
import os, signal, sys, time
if "peftkern.tools.tune.worker" in sys.orig_argv:
    from peftkern.backends.cpu import nf4_lora_linear as family
    right = family.nf4_lora_linear_forward

    def faulty(x, *args):
        if x.shape[-1] == 128:
            open(f"{os.environ['PEFTKERN_CACHE']}.hangs-{os.getpid()}", "w").close()
            time.sleep(1e4)
        if x.shape[-1] == 192:
            os.kill(os.getpid(), signal.SIGSEGV)
        return right(x, *args)

    family.nf4_lora_linear_forward = faulty
"""


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A cache folder of the test's own."""
    monkeypatch.setenv("PEFTKERN_CACHE", str(tmp_path / "cache"))
    trust.reset()
    yield tmp_path / "cache" / "trust"
    trust.reset()


@pytest.fixture
def faults(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "sitecustomize.py").write_text(FAULTS)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), str(ROOT)]))


def asked(*found: Case, sweeps: tuple = (), **options: float) -> job.Job:
    times = {"budget": 1e4, "limit": HANG_SECONDS, **options}
    return job.Job(list(found), list(sweeps), "cpu", **times)


def kept(folder: Path) -> dict:
    (file,) = folder.glob("*.json")
    return json.loads(file.read_text())


def test_verdicts_are_what_a_layer_asks_for_and_a_second_run_knows_them(folder):
    sweep, _, *few = cases.sweeps("fp32", 4, "fp32", cases.BASES)
    few_rows = [replace(one, sizes=(1, 8)) for one in few]
    sweeps = (replace(sweep, sizes=(1 << 16, 1 << 18)), *few_rows)
    done = tune.run(asked(CASE, sweeps=sweeps))
    assert (done.not_reached, done.demoted, done.stopped) == ([], {}, False)
    row = next(row for row in done.rows if row.title == CASE.title)
    assert row.forward > 0 and row.training > 0 and not row.known
    assert row.side == (trust.OURS if max(row.forward, row.training) <= 1.02 else trust.PEER)
    file = kept(folder)
    assert file["classes"][row.name]["side"] == row.side
    assert file["crossovers"] == done.crossovers
    assert done.crossovers["dense"] in (1 << 16, 1 << 18, 1 << 19)
    for one in few_rows:  # panels pay from one row, from eight, or from more
        assert done.crossovers[one.name] in (0, 7, 15), done.crossovers
    ops = {name.split()[0] for name in file["programs"]}
    assert {"nf4_lora_linear_forward", "nf4_lora_linear_backward"} <= ops

    model = lora_net(make_linear4bit())
    with trust.use_mode("readonly"):
        assert peftkern.patch(model).unmeasured == 0
        peftkern.reset_stats()
        model(torch.randn(CASE.rows, K))  # the first call is decided
        assert trial.UNMEASURED not in {why for _, why in peftkern.stats().fallbacks}
        assert crossovers.crossover("dense") == done.crossovers["dense"]
        for one in few_rows:
            name = one.name.removesuffix("_fp32")
            assert crossovers.few_rows(name, 1, torch.float32) == done.crossovers[one.name]

    other = replace(CASE, rows=500)
    more = tune.run(asked(CASE, other, sweeps=sweeps, budget=1e-3))
    assert [(row.title, row.known) for row in more.rows] == [(CASE.title, True)]
    assert more.not_reached == [other.title] and more.crossovers == done.crossovers


@pytest.mark.parametrize("name", ["few_rows_fp32", "few_rows_backward_fp32"])
def test_panels_are_compared_with_the_path_of_few_rows(name, monkeypatch):
    """Each is what runs under its name; which takes less time is the machine's business."""
    taken = {}

    def measure(calls, seconds):
        for way, call in calls.items():
            call(0)
            taken[way] = most[-1]
        return {"panels": Timing((1.0,)), "few": Timing((4.0,))}

    most, own = [], crossovers.few_rows
    note = lambda *key: most.append(own(*key)) or most[-1]  # noqa: E731
    monkeypatch.setattr(nf4_lora_linear, "few_rows", note)
    monkeypatch.setattr(worker, "measure", measure)
    monkeypatch.setattr(worker, "SIDE", 64)
    assert Worker("cpu").panels(name, 3) == {"ratio": 0.25}
    assert taken == {"panels": 0, "few": 3}


class Waiting(Process):
    """A child whose time is over once it hangs: how long the others take does not matter."""

    def receive(self, deadline: float, doing: str) -> dict:
        hangs = Path(f"{os.environ['PEFTKERN_CACHE']}.hangs-{self.popen.pid}")
        while not (hangs.exists() or select.select([self.popen.stdout], [], [], 0.01)[0]):
            assert time.monotonic() < deadline
        return super().receive(time.monotonic() if hangs.exists() else deadline, doing)


def test_what_hangs_or_crashes_is_demoted_and_the_rest_goes_on(folder, faults, monkeypatch):
    monkeypatch.setattr(tune, "Process", Waiting)
    hangs, crashes = (replace(CASE, label=str(k), K=k) for k in (128, 192))
    done = tune.run(asked(hangs, crashes, CASE))
    assert [row.title for row in done.rows] == [hangs.title, crashes.title, CASE.title]
    assert all(row.forward > 0 for row in done.rows) and done.not_reached == []
    ended = "an earlier process ended during its first launch"
    slow, crash = (
        f"its trial did not end within {HANG_SECONDS} s",
        "Fatal Python error: Segmentation fault",
    )
    assert sorted(done.demoted.values()) == [f"{ended} ({crash})", f"{ended} ({slow})"]
    assert all(name.startswith("nf4_lora_linear_forward on cpu") for name in done.demoted)
    assert kept(folder)["programs"].items() >= done.demoted.items()
    assert not [path for path in folder.iterdir() if "first-launch" in path.name]


class Child:
    """A process that ends at every trial of the case "ends"."""

    sent: ClassVar[list[str]] = []
    known: ClassVar[dict] = {"class of tiny": {"side": trust.OURS, "ratios": {}}}

    def __init__(self, name: str, module: str) -> None:
        pass

    def ask(self, deadline: float, doing: str, do: str, **arguments: object) -> dict:
        label = arguments["case"]["label"] if "case" in arguments else ""
        self.sent.append(f"{do} {label}".strip())
        if do == "start":
            names = [f"class of {case['label']}" for case in arguments["cases"]]
            return {"names": names, "known": self.known, "crossovers": {}}
        if do == "measure" and label == "ends":
            raise WorkerGoneError("killed by SIGSEGV")
        verdict = {"class": f"class of {label}", "side": trust.PEER, "ratios": {}}
        return {} if do == "demoted" else verdict | {"why": str(arguments.get("why", ""))}

    def stop(self) -> None:
        self.sent.append("stop")


def test_layer_that_is_peft_s_in_any_case_says_why(monkeypatch):
    monkeypatch.setattr(trust, "_forced", "auto")
    case = Case("mixed", N, K, "dense", 4, 8, "fp32", "bf16")
    answer = Worker("cpu").measure(asdict(case), again=False, small=True)
    assert answer["side"] == trust.PEER and "ratios" not in answer
    assert answer["why"] == "adapter is torch.bfloat16, its input torch.float32"
    small = Worker("cpu").measure(asdict(replace(case, adapter_dtype="fp32")), False, False)
    assert small["why"].startswith("small dense product")


def test_class_that_ends_two_processes_is_peft_s(monkeypatch):
    monkeypatch.setattr(tune, "Process", Child)
    ends = replace(CASE, label="ends")
    done = tune.run(asked(ends, CASE))
    assert [(row.title, row.side, row.known) for row in done.rows] == [
        (CASE.title, trust.OURS, True),
        (ends.title, trust.PEER, False),
    ]
    assert done.rows[1].why == "its trial ended the process (killed by SIGSEGV)"
    one = ["start", "measure ends", "stop"]
    assert Child.sent == [*one, *one, "start", "give_up ends", "demoted", "stop"]
    Child.sent.clear()
    (again,) = tune.run(asked(CASE, again=True)).rows
    assert Child.sent == ["start", "measure tiny", "demoted", "stop"] and not again.known


def text(mark: Path) -> str:
    """What is in a mark, and nothing where its launch has ended in the meantime."""
    with contextlib.suppress(FileNotFoundError):
        return mark.read_text()
    return ""


def test_ctrl_c_leaves_what_is_decided(folder, faults):
    command = [sys.executable, "-m", "peftkern", "tune", "--base", "nf4", "--dtype", "fp32"]
    command += ["--shape", "64x64,96x128", "--rows", "4", "--r", "4", "--limit", "1h"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    hangs = " 96 128 "
    wait_until(lambda: list(folder.glob("*.json")) and kept(folder)["classes"])
    wait_until(lambda: any(hangs in text(mark) for mark in journal.files(folder)))
    process.send_signal(signal.SIGINT)
    out, error = process.communicate(timeout=HANG_SECONDS)
    assert process.returncode == 130 and error.endswith("peftkern: stopped\n")
    assert "Not reached within the budget (1):\n  96x128 nf4" in out
    (name,) = kept(folder)["classes"]
    assert " 64x64 " in name


def test_classes_are_distinct_and_cheap_ones_first():
    shapes = parse_shapes("llama3-8b,64x32,64x32", "--shape", "NK")
    found = cases.ordered(shapes, cases.BASES, [16], [1, 300, 511, 600], ["bf16"], "fp32", False)
    assert len(found) == len(shapes) * 2 * 3 and found[0].label == "64x32"
    assert {case.rows for case in found} == {1, 511, 600}
    assert [case.cost for case in found] == sorted(case.cost for case in found)


def test_layers_of_a_model_are_read_from_its_config(tmp_path):
    config = {**LLAMA_CONFIG, "num_key_value_heads": 2, "torch_dtype": "float16"}
    path = tmp_path / "config.json"
    path.write_text(json.dumps(config))
    shapes, experts, dtype, four_bit = cases.model_layers(str(path), "all-linear")
    assert [(shape.N, shape.K) for shape in shapes] == [(64, 64), (32, 64), (96, 64), (64, 96)]
    assert (experts, dtype, four_bit) == ([], "fp16", False)
    nf4 = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    path.write_text(json.dumps({**config, "quantization_config": nf4}))
    (shape,), *_, four_bit = cases.model_layers(str(tmp_path), "k_proj,v_proj")
    assert (shape.name, four_bit) == ("k_proj 32x64", True)
    path.write_text(json.dumps({"model_type": "gpt2", "n_embd": 48, "n_layer": 1, "n_head": 2}))
    shapes, _, dtype, _ = cases.model_layers(str(path), "c_attn")  # of Conv1D
    assert [(shape.N, shape.K) for shape in shapes] == [(144, 48)] and dtype in DTYPES


MIXTURE = {**LLAMA_CONFIG, "model_type": "qwen3_moe", "num_experts": 4, "num_key_value_heads": 2}
MIXTURE |= {"head_dim": 16, "moe_intermediate_size": 32}


def test_experts_of_a_model_are_skipped_and_named(capfd, folder, tmp_path, monkeypatch):
    """Whose trial is the training's; the router beside them is a parameter, too."""
    (tmp_path / "config.json").write_text(json.dumps(MIXTURE))
    words = ["gate_up_proj [4, 64, 64]", "down_proj [4, 64, 32]"]
    found = cases.model_layers(str(tmp_path), "all-linear")
    assert found.experts == words
    assert [(shape.N, shape.K) for shape in found.shapes] == [(64, 64), (32, 64)]
    assert cases.model_layers(str(tmp_path), "q_proj,down_proj").experts == words[1:]
    refused(
        capfd,
        "which only a training tries",
        "tune",
        "--model",
        tmp_path,
        "--targets",
        words[0].split()[0],
    )
    monkeypatch.setattr(tune._Campaign, "run", lambda campaign, end: None)
    said = told(capfd, "tune", "--model", tmp_path)
    assert "Experts were skipped: a patched model tries them itself, in training:" in said
    assert all(f"  {word}" in said.splitlines() for word in words)
    assert told_json(capfd, "tune", "--model", tmp_path)["experts"] == words


def test_bad_options_are_one_line(capfd, tmp_path, monkeypatch):
    for complaint, *options in (
        ("--shape: '64' is not one of llama2-7b", "--shape", "64"),
        ("--shape: '0x4' is not one of", "--shape", "0x4"),
        ("--base: 'fp4' is not one of dense, nf4", "--base", "fp4"),
        ("--model: it has shapes of its own", "--shape", "4x4", "--model", tmp_path),
        ("expected a config.json, or the folder of one", "--model", tmp_path),
        ("--limit: 'soon'", "--limit", "soon"),
    ):
        refused(capfd, complaint, "tune", *options)
    (tmp_path / "config.json").write_text(json.dumps(LLAMA_CONFIG))
    complaint = "'w1' is no linear layer; accepted: all-linear, down_proj"
    refused(capfd, complaint, "tune", "--model", tmp_path, "--targets", "w1")
    (tmp_path / "cache").write_text("")
    refused(capfd, "set PEFTKERN_CACHE to another", "tune", "--shape", "4x4")
    with trust.use_mode("readonly"):
        refused(capfd, "no verdict would be kept", "tune", "--shape", "4x4")
    monkeypatch.setenv("PEFTKERN_BACKEND", "cpu")
    refused(capfd, "a back end that is forced takes part in no contest", "tune")


def test_outcome_is_a_table_or_json(capfd, monkeypatch):
    right = tune.Row("a", "class a", trust.OURS, "", 0.5, 0.75, False)
    slow = tune.Row("b", "class b", trust.PEER, "small dense product", None, None, False)
    outcome = tune.Outcome([right, slow], {"dense": 65536}, {"p": "wrong"}, ["c"], False, "/f", 2.0)
    monkeypatch.setattr(tune, "run", lambda job, progress: outcome)
    assert told_json(capfd, "tune", "--shape", "4x4") == outcome.as_dict()
    out = told(capfd, "tune", "--shape", "4x4")
    assert ["a", "0.50", "0.75", "peftkern"] in [line.split() for line in out.splitlines()]
    assert "dense: kernels pay from 65,536 values on" in out and "demoted: p: wrong" in out
