"""`peftkern monitor` as a user meets it, over a run of the Trainer."""

from __future__ import annotations

import json
import os
import pty
import signal
import subprocess
import sys

import pytest
from command_line import refused
from monitor_runs import LAYERS, STEPS, record_adalora, start, step, write
from paths import ROOT
from tolerances import HANG_SECONDS

from peftkern.cli import main

MONITOR = (sys.executable, "-m", "peftkern", "monitor")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return record_adalora(tmp_path_factory.mktemp("adalora") / "run.jsonl")


def test_a_run_is_told_in_80_columns(run, capfd, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    assert main(["monitor", str(run)]) == 0
    told = capfd.readouterr().out
    lines = told.splitlines()
    assert lines[0].startswith(f"run.jsonl  finished, at step {STEPS}")
    assert max(map(len, lines)) <= 80
    assert f"loss, steps 1 - {STEPS}" in told and "█" in told
    rows = [line.split() for line in lines]
    assert ["steps", str(STEPS)] in rows
    assert ["adalora_orthogonality_forward", "cpu", str(STEPS), "1"] in rows
    (mean,) = [row for row in rows if row[:3] == ["q_proj", "6", "to"]]
    assert float(mean[3]) < 6
    assert "lora_linear: small dense product" in told


def test_json_is_the_same_as_numbers(run, capfd):
    assert main(["monitor", "--json", str(run)]) == 0
    told = json.loads(capfd.readouterr().out)
    (facts,), comparison = told["runs"], told["comparison"]
    assert (facts["steps"], facts["last_step"], facts["finished"]) == (STEPS, STEPS, True)
    assert comparison is None
    records = [json.loads(line) for line in run.read_text().splitlines()]
    ranks = [r for r in records if r["type"] == "ranks"]
    assert facts["ranks"] == ranks[-1]["ranks"] and len(facts["ranks"]) == LAYERS
    assert sum(ranks[0]["ranks"].values()) == 6 * LAYERS
    assert sum(facts["ranks"].values()) <= 2 * LAYERS
    assert facts["values"]["loss"]["last"] == [r for r in records if "loss" in r][-1]["loss"]


def test_two_runs_stand_side_by_side(run, tmp_path, capfd, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    other = write(tmp_path / "run.jsonl", start(), *(step(i) for i in (1, 2, 3)))
    assert main(["monitor", str(run), str(other)]) == 0
    told = capfd.readouterr().out
    assert "over 3 steps" in told and "ratio" in told
    assert max(map(len, told.splitlines())) <= 80
    assert main(["monitor", str(run), str(other), "--json"]) == 0
    told = json.loads(capfd.readouterr().out)
    assert len(told["runs"]) == 2 and told["comparison"]["loss"]["steps"] == 3


def test_a_run_without_steps_says_so(tmp_path, capfd):
    for records in ([], [start()]):
        path = write(tmp_path / "run.jsonl", *records)
        assert main(["monitor", str(path)]) == 0
        assert capfd.readouterr().out.startswith("run.jsonl  no steps yet, not finished")
        assert main(["monitor", str(path), str(path), "--json"]) == 0
        assert json.loads(capfd.readouterr().out)["runs"][0]["step_seconds"] is None


@pytest.mark.parametrize("terminal", [True, False])
def test_a_run_is_followed_until_it_ends_or_ctrl_c(tmp_path, terminal):
    path = write(tmp_path / "run.jsonl", start(), step(1))
    ours, theirs = pty.openpty()
    environment = {**os.environ, "TERM": "xterm", "COLUMNS": "80", "LINES": "40"}
    output = theirs if terminal else subprocess.PIPE
    process = subprocess.Popen(
        [*MONITOR, "--follow", str(path)], cwd=ROOT, stdout=output, env=environment
    )
    os.close(theirs)
    source = ours if terminal else process.stdout.fileno()
    seen = b""

    def wait_for(text: bytes) -> None:
        nonlocal seen
        while text not in seen:
            seen += os.read(source, 4096)

    wait_for(b"at step 1")
    with path.open("a") as file:
        file.write(json.dumps(step(7, loss=0.125)) + "\n")
    wait_for(b"at step 7" if terminal else b"step 7  500 ms/step  20 tokens/s  loss 0.125")
    assert (b"\x1b" in seen) == terminal
    if terminal:
        process.send_signal(signal.SIGINT)
    else:
        with path.open("a") as file:
            file.write(json.dumps({"type": "summary"}) + "\n")
    assert process.wait(HANG_SECONDS) == 0
    os.close(ours)


def test_bad_input_is_one_line(tmp_path, capfd):
    good, bad = write(tmp_path / "good", start()), write(tmp_path / "bad", {"a": 1})
    refused(capfd, "no: No such file or directory", "monitor", tmp_path / "no")
    refused(capfd, "expected a file", "monitor", tmp_path)
    refused(capfd, "bad: expected the JSON lines", "monitor", good, bad)
    refused(capfd, "--json is not accepted", "monitor", good, "--follow", "--json")
