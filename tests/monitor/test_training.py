"""TrainingMonitor: what it counts, what it writes, and what a step of it costs."""

from __future__ import annotations

import contextlib
import json
import math
import os
import pty
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch
from call_counts import calls_of
from gpu_runs import nothing_waits
from paths import ROOT
from tolerances import HANG_SECONDS

import peftkern
from peftkern.monitor import FIELDS, TrainingMonitor, scalars

CALLS_OF_A_STEP = 12  # Python and C functions; what a step without a record may call


@pytest.fixture
def linear():
    """One call of a kernel."""
    w, x = peftkern.quantize_nf4(torch.randn(64, 64)), torch.randn(2, 64)
    return lambda x=x: peftkern.nf4_linear(x, w)


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_record_counts_steps_tokens_time_and_calls(linear, clock):
    with TrainingMonitor("cpu", every=2) as monitor:
        for seconds in (0.25, 0.5):
            linear()
            clock.now += seconds
            monitor.step(tokens=100, loss=0.5)
        first = monitor.last
        linear(torch.zeros(2, 64, dtype=torch.float64))
        clock.now += 1.0
        monitor.step(tokens=7)
        assert monitor.last is first
    assert (first["step"], first["steps"], first["tokens"], first["loss"]) == (2, 2, 200, 0.5)
    assert (first["seconds"], first["step_seconds"]) == (0.75, 0.375)
    assert first["tokens_per_second"] == 200 / 0.75
    assert (first["kernel_calls"], first["reference_calls"], first["fallbacks"]) == (2, 0, 0)
    assert first["calls"] == {"nf4_lora_linear_forward on cpu": 2}
    last = monitor.last
    assert (last["step"], last["steps"], last["tokens"]) == (3, 1, 7)
    # Torch's own operations ask for the decoded weight by an op of its own.
    assert (last["kernel_calls"], last["reference_calls"], last["fallbacks"]) == (0, 2, 2)
    assert last["fallback_reasons"] == {
        f"{op}: cpu: the dtype is torch.float64": 1
        for op in ("nf4_lora_linear_forward", "nf4_dequantize")
    }
    summary = monitor.summary()
    assert (summary.steps, summary.tokens) == (3, 207)
    assert (summary.seconds, summary.step_seconds) == (1.75, 0.5)
    assert (summary.kernel_calls, summary.reference_calls, summary.fallbacks) == (2, 2, 2)
    assert 0.25 <= summary.step_seconds_p20 <= 0.5 <= summary.step_seconds_p80 <= 1.0
    assert "207 tokens" in str(summary) and "1 x nf4_lora_linear_forward: cpu" in str(summary)


def test_fields_are_those_that_records_have_and_seconds_the_host_s(linear):
    before = time.perf_counter()
    with TrainingMonitor("cpu") as monitor:
        linear()
        monitor.step(1)
        record = monitor.record()
    assert 0 < monitor.summary().seconds <= time.perf_counter() - before
    not_here = {name for name in FIELDS if name.startswith(("cuda_", "nvml_"))}
    assert record.keys() == FIELDS - not_here
    assert all(isinstance(value, (int, float)) for value in scalars(record).values())


def test_memory_of_the_process_is_the_system_s():
    monitor = TrainingMonitor("cpu")
    before = monitor.memory()
    assert before["process_rss_bytes"] == pytest.approx(psutil.Process().memory_info().rss, rel=0.1)
    block = bytearray(os.urandom(1) * (64 << 20))
    after = monitor.memory()
    del block
    assert after["process_rss_bytes"] - before["process_rss_bytes"] > 48 << 20
    assert monitor.memory()["process_peak_rss_bytes"] >= after["process_rss_bytes"]


def test_skipped_time_is_in_no_step(clock):
    with TrainingMonitor("cpu") as monitor:
        clock.now += 1.0
        monitor.step(1)
        clock.now += 100.0
        monitor.skip()
        clock.now += 2.0
        monitor.step(1)
    assert (monitor.summary().steps, monitor.summary().seconds) == (2, 3.0)


def test_counts_survive_a_reset_in_between(linear):
    linear()
    with TrainingMonitor("cpu", every=1) as monitor:
        linear()
        peftkern.reset_stats()
        linear()
        monitor.step()
    assert monitor.last["kernel_calls"] == 1


def test_a_step_without_a_record_calls_next_to_nothing():
    with TrainingMonitor("cpu", every=50) as monitor:
        for _ in range(49):
            called = calls_of(monitor.step, tokens=64)
            assert called[0] == "step"
            assert len(called) <= CALLS_OF_A_STEP, called
        monitor.step(tokens=64)
        assert monitor.last["steps"] == 50


def test_jsonl_holds_a_run_and_is_appended_to(tmp_path):
    path = tmp_path / "run.jsonl"
    for _ in range(2):
        with TrainingMonitor("cpu", jsonl=path, every=2) as monitor:
            for i in range(5):
                monitor.step(tokens=3, loss=math.nan if i == 1 else 1.5)
    records = lines(path)
    assert [r["type"] for r in records] == ["start", "step", "step", "step", "summary"] * 2
    assert [r["loss"] for r in records[1:3]] == [None, 1.5]
    assert [r["step"] for r in records[6:9]] == [2, 4, 5]
    assert records[0]["device"] == "cpu" and records[0]["nvml"] == "cpu is not an NVIDIA GPU"
    assert records[-1]["steps"] == 5 and records[-1]["process_peak_rss_bytes"] > 0


KILLED = """
import sys, peftkern.monitor
with peftkern.monitor.TrainingMonitor("cpu", jsonl=sys.argv[1], every=1) as monitor:
    while True:
        monitor.step(tokens=1)
        if monitor.steps == 20:
            print("ready", flush=True)
"""


def test_jsonl_is_valid_when_the_process_is_killed(tmp_path):
    path = tmp_path / "run.jsonl"
    command = [sys.executable, "-c", KILLED, str(path)]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert path.read_bytes().endswith(b"\n")
    records = lines(path)
    assert [r["step"] for r in records[1:21]] == list(range(1, 21))


def test_error_of_the_loop_passes_and_its_records_stay_behind_a_torn_line(tmp_path):
    path = tmp_path / "run.jsonl"
    path.write_text('{"type": "ste')
    with pytest.raises(ZeroDivisionError), TrainingMonitor("cpu", jsonl=path) as monitor:
        monitor.step()
        raise ZeroDivisionError
    torn, *rest = path.read_text().splitlines()
    assert torn == '{"type": "ste'
    assert [json.loads(line)["type"] for line in rest] == ["start", "step", "summary"]
    assert not monitor.running


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full, a full disk")
def test_full_disk_is_a_warning():
    monitor = TrainingMonitor("cpu", jsonl="/dev/full", every=1)
    with pytest.warns(UserWarning, match="no further records") as caught, monitor:
        monitor.step()
        monitor.step()
    assert len(caught) == 1
    assert monitor.summary().steps == 2


def test_wrong_options_and_steps_are_named(tmp_path):
    idle = TrainingMonitor("cpu", jsonl=tmp_path / "no" / "run.jsonl")
    with TrainingMonitor("cpu") as running:
        for call, error, complaint in (
            (lambda: TrainingMonitor(every=-1), ValueError, "every: expected"),
            (lambda: TrainingMonitor(every=2.0), ValueError, "every: expected"),
            (lambda: TrainingMonitor(device="gpu"), RuntimeError, "gpu"),
            (idle.step, RuntimeError, "start"),
            (idle.summary, RuntimeError, "start"),
            (idle.start, FileNotFoundError, r"run\.jsonl"),
            (lambda: running.step(torch.tensor(3)), TypeError, "tokens: .* the host would wait"),
            (lambda: running.step(loss=torch.ones(())), TypeError, "loss: .* the host would wait"),
            (lambda: running.step(seconds=3), ValueError, "seconds: a record has"),
        ):
            with pytest.raises(error, match=complaint):
                call()


LIVE = """
from peftkern.monitor import TrainingMonitor
with TrainingMonitor("cpu", every=1, live=True) as monitor:
    for i in range(3):
        print("printed", i)
        monitor.step(tokens=10, loss=0.25)
"""


def test_live_line_is_for_terminals():
    command = [sys.executable, "-c", LIVE]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=HANG_SECONDS)
    assert (done.returncode, done.stderr) == (0, "")
    ours, theirs = pty.openpty()
    environment = {**os.environ, "TERM": "xterm", "COLUMNS": "80"}
    process = subprocess.Popen(command, cwd=ROOT, stdout=theirs, stderr=theirs, env=environment)
    os.close(theirs)
    seen = b""
    with contextlib.suppress(OSError):  # the other side is closed
        while chunk := os.read(ours, 4096):
            seen += chunk
    os.close(ours)
    assert process.wait(HANG_SECONDS) == 0
    assert b"step 3" in seen and b"loss 0.25" in seen and b"printed 2" in seen


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_gpu_steps_are_timed_without_a_wait():
    x = torch.randn(2048, 2048, device="cuda")
    with TrainingMonitor("cuda", every=0) as monitor:
        torch.cuda.synchronize()
        with nothing_waits():
            for _ in range(20):
                x @ x
                monitor.step(tokens=2048)
            monitor.record()
            memory = monitor.memory()
    summary = monitor.summary()
    assert (summary.steps, summary.tokens) == (20, 20 * 2048)
    assert 0 < summary.step_seconds < 1
    assert 0 < memory["cuda_allocated_bytes"] <= memory["cuda_reserved_bytes"]
    assert memory["cuda_peak_allocated_bytes"] <= memory["cuda_peak_reserved_bytes"]
