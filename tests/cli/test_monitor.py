"""`peftkern monitor` as a user meets it, over a run of the Trainer."""

from __future__ import annotations

import contextlib
import json
import os
import pty
import re
import signal
import subprocess
import sys

import pytest
from command_line import refused, told, told_json
from monitor_runs import LAYERS, STEPS, record_adalora, start, step, write
from paths import ROOT
from tolerances import HANG_SECONDS

from peftkern.tools.monitor import terminal


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return record_adalora(tmp_path_factory.mktemp("adalora") / "run.jsonl")


def test_a_run_is_told_in_80_columns(run, capfd, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    said = told(capfd, "monitor", run)
    lines = said.splitlines()
    assert lines[0].startswith(f"run.jsonl  finished, at step {STEPS}")
    assert max(map(len, lines)) <= 80
    assert {"loss", "fallbacks per step"} < {*re.split(r"\n| {2,}", said)} and "█" in said
    rows = [line.split() for line in lines]
    assert ["steps", str(STEPS)] in rows
    assert f"adalora_orthogonality_forward on cpu {STEPS} (1 per step)".split() in rows
    (mean,) = [row for row in rows if row[:3] == ["q_proj", "6", "to"]]
    assert float(mean[3]) < 6
    assert re.search(r"28 triplets kept since step \d+, budget 28; 5\d were pruned", said)
    assert "lora_linear: small dense product" in said


def test_json_is_the_same_as_numbers(run, capfd):
    said = told_json(capfd, "monitor", run)
    (facts,), comparison = said["runs"], said["comparison"]
    assert (facts["steps"], facts["last_step"], facts["finished"]) == (STEPS, STEPS, True)
    assert comparison is None
    records = [json.loads(line) for line in run.read_text().splitlines()]
    ranks = [r for r in records if r["type"] == "ranks"]
    assert facts["ranks"] == ranks[-1]["ranks"] and len(facts["ranks"]) == LAYERS
    assert sum(ranks[0]["ranks"].values()) == 6 * LAYERS
    assert sum(facts["ranks"].values()) <= 2 * LAYERS
    assert facts["masks"][-1]["kept"] == facts["masks"][-1]["budget"] == 2 * LAYERS
    assert facts["values"]["loss"]["last"] == [r for r in records if "loss" in r][-1]["loss"]


def test_two_runs_stand_side_by_side(run, tmp_path, capfd, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    other = write(tmp_path / "run.jsonl", start(), *(step(i) for i in (1, 2, 3)))
    said = told(capfd, "monitor", run, other)
    assert "over 3 steps" in said and "ratio" in said
    assert max(map(len, said.splitlines())) <= 80
    said = told_json(capfd, "monitor", run, other)
    assert len(said["runs"]) == 2 and said["comparison"]["loss"]["steps"] == 3


def test_a_run_without_steps_says_so(tmp_path, capfd):
    for records in ([], [start()]):
        path = write(tmp_path / "run.jsonl", *records)
        assert told(capfd, "monitor", path).startswith("run.jsonl  no steps yet, not finished")
        assert told_json(capfd, "monitor", path, path)["runs"][0]["step_seconds"] is None


def test_a_run_is_followed_until_ctrl_c(tmp_path):
    path = write(tmp_path / "run.jsonl", start(), step(1))
    ours, theirs = pty.openpty()
    command = [sys.executable, "-m", "peftkern", "monitor", "--follow", str(path)]
    environment = {**os.environ, "TERM": "xterm", "COLUMNS": "80", "LINES": "40"}
    process = subprocess.Popen(command, cwd=ROOT, stdout=theirs, env=environment)
    os.close(theirs)
    seen = b""
    for number in (1, 7):
        while f"at step {number}".encode() not in seen:
            seen += os.read(ours, 4096)
        with path.open("a") as file:
            file.write(json.dumps(step(7)) + "\n")
    process.send_signal(signal.SIGINT)
    with contextlib.suppress(OSError):  # the other side is closed
        while os.read(ours, 4096):  # a terminal that nobody reads is full after a few pictures
            pass
    os.close(ours)
    assert process.wait(HANG_SECONDS) == 0


def test_a_followed_run_is_a_line_per_record_in_a_pipe_until_it_ends(tmp_path, capfd, monkeypatch):
    path = write(tmp_path / "run.jsonl", start(), step(1))
    coming = iter([step(7, loss=0.125), step(8, loss=None), {"type": "summary"}])

    def sleep(seconds: float) -> None:
        with path.open("a") as file:
            file.write(json.dumps(next(coming)) + "\n")

    monkeypatch.setattr(terminal.time, "sleep", sleep)
    *_, first, second = told(capfd, "monitor", "--follow", path).splitlines()
    assert first.startswith("run.jsonl  step 7  500 ms/step  20 tokens/s  loss 0.125")
    assert "step 8" in second and "loss nan" in second


def test_files_are_written_beside_what_is_told(run, tmp_path, capfd):
    html, svg = tmp_path / "run.html", tmp_path / "run.svg"
    assert (
        told_json(capfd, "monitor", run, "--html", html, "--svg", svg)["runs"][0]["steps"] == STEPS
    )
    assert html.read_text().startswith("<!DOCTYPE html>") and svg.read_text().startswith("<svg")


def test_bad_input_is_one_line(tmp_path, capfd):
    good, bad = write(tmp_path / "good", start()), write(tmp_path / "bad", {"a": 1})
    refused(capfd, "no: No such file or directory", "monitor", tmp_path / "no")
    refused(capfd, "expected a file", "monitor", tmp_path)
    refused(capfd, "bad: expected the JSON lines", "monitor", good, bad)
    for option in ("--html", "--svg"):
        complaint = f"{option}: {tmp_path / 'no' / 'x'}: there is no folder"
        refused(capfd, complaint, "monitor", good, option, tmp_path / "no" / "x")
    refused(capfd, "--follow: accepted without", "monitor", good, "--follow", "--json")
