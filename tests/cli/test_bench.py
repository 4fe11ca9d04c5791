"""`peftkern bench` as a user runs it, on shapes that take seconds: real peers, real processes."""

from __future__ import annotations

import contextlib
import csv
import io
import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import bench_records as of
import psutil
import pytest
import torch
from command_line import refused
from paths import SUPPORT
from processes import environment
from waiting import wait_until

from peftkern.cli import main
from peftkern.tools.bench import command, instrument, report, runner
from peftkern.tools.bench.record import FORMAT, Case, Provider, Record
from peftkern.tools.bench.timer import number

TINY = ["--device=cpu", "--threads=1", "--shapes=24x64x128", "--r=4", "--seconds=0.1"]
BUDGET = 600.0  # seconds: seven processes import on one core, which others may use as well


def earlier(path: Path, name: str, peer: str, label: str, ratio: float) -> Path:
    """As if that peer had taken so many times as long as ours in an earlier run."""
    one = of.case(of.provider("peftkern", 1.0), of.provider(label, ratio), against=peer)
    one["providers"][peer] = one["providers"].pop(label)
    path.write_text(json.dumps(of.record(one | {"name": name})))
    return path


def run_tiny(columns: int, *arguments: str) -> tuple[int, str]:
    """Run the command in this process, its workers in theirs; its status and output."""
    said = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(said):
        patch.delenv("TRITON_INTERPRET", raising=False)
        patch.setenv("COLUMNS", str(columns))  # of the terminal, where this test has one
        return main(["bench", *TINY, *arguments]), said.getvalue()


@pytest.fixture(scope="module")
def peers(tmp_path_factory) -> tuple[str, Record, Path]:
    """All ops beside the peers that the tests' environment has, and an earlier run that was worse
    than this one can be: its output, record and files."""
    folder = tmp_path_factory.mktemp("bench")
    case = "nf4_dequantize/64x128/bfloat16/forward"
    old = earlier(folder / "old.json", case, "bitsandbytes", "bitsandbytes", 1e-3)
    status, said = run_tiny(
        80,
        "--op=nf4_lora_linear,lora_linear,nf4_linear,nf4_dequantize",
        "--baselines=frozen,peft,bitsandbytes",
        f"--json={folder / 'new.json'}",
        f"--csv={folder / 'new.csv'}",
        f"--html={folder / 'new.html'}",
        f"--compare={old}",
        "--repro",
        f"--budget={BUDGET:g}",
    )
    assert status == 0, said
    return said, json.loads((folder / "new.json").read_text()), folder


@pytest.fixture(scope="module")
def rivals(tmp_path_factory) -> tuple[int, str, Record]:
    """One case beside baselines of every kind of misbehavior, and an earlier run that was better
    than this one can be: its status, output and record.

    One of them would hang for an hour in its build, one in its first call. When the others have
    answered, the patience with them is over.
    """
    folder = tmp_path_factory.mktemp("rivals")
    names = ["sleeping", "right", "wrong", "raising", "crashing", "hanging"]
    case = "lora_linear/24x64x128/M24/r4/bfloat16/full"
    right = "bench_providers:right"
    arguments = ["--op=lora_linear", f"--json={folder / 'new.json'}", f"--budget={BUDGET:g}"]
    arguments.append(f"--baselines={','.join(f'bench_providers:{name}' for name in names)}")
    arguments.append(f"--compare={earlier(folder / 'old.json', case, right, right, 1e6)}")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(SUPPORT)  # where bench_providers is
        patch.setattr(instrument, "PATIENCE", 3 / BUDGET)
        patch.setattr(instrument, "FIRST_CALLS", 24 / BUDGET)
        status, said = run_tiny(200, *arguments)
    return status, said, json.loads((folder / "new.json").read_text())


def test_every_provider_is_right_and_timed(peers):
    _, record, _ = peers
    assert set(Record.__annotations__) == set(record)
    assert record["format"] == FORMAT
    assert record["not_reached"] == []
    assert [list(case["providers"]) for case in record["cases"]] == [
        ["peftkern", "frozen", "peft", "bitsandbytes"],
        ["peftkern", "frozen", "peft"],
        ["peftkern", "frozen", "bitsandbytes"],
        ["peftkern", "bitsandbytes"],
    ]
    against = ["bitsandbytes", "peft", "bitsandbytes", "bitsandbytes"]
    assert [case["against"] for case in record["cases"]] == against
    assert record["roof"]["copy_bytes"] == 1 << 20  # small, as these shapes are: in a cache
    for case in record["cases"]:
        assert set(Case.__annotations__) == set(case)
        roof = record["roof"]
        products = max(roof["bfloat16"], roof["float32"])
        floor = max(case["bytes"] / roof["copy"], case["flops"] / products)
        assert case["floor_ms"] == pytest.approx(1e3 * floor)
        for name, row in case["providers"].items():
            where = f"{case['name']} {name}"
            assert set(Provider.__annotations__) == set(row), where
            assert row["wrong"] is None and row["failed"] is None, where
            assert 0 < row["error_rms"] < 0.01, where
            assert row["p20_ms"] <= row["median_ms"] <= row["p80_ms"], where
            assert min(row["samples_ms"]) <= row["median_ms"] <= max(row["samples_ms"]), where
            assert len(row["samples_ms"]) >= 7, where
            assert row["gb_s"] == pytest.approx(case["bytes"] / row["median_ms"] / 1e6), where
            assert row["share_of_roof"] == pytest.approx(case["floor_ms"] / row["median_ms"])
            assert row["peak_bytes"] > 0, where
    dequantized = record["cases"][3]["providers"]["peftkern"]
    assert dequantized["peak_bytes"] == 64 * 128 * 2  # the result and nothing else


def test_output_is_a_table_of_80_columns(peers):
    said, record, _ = peers
    table, _, commands = said.partition("To measure one of them again:")
    assert max(map(len, table.splitlines())) <= 80
    for word in ("speed-up", "of roof", "peak MB", "[p20-p80]", "peft+bitsandbytes", "roof:"):
        assert word in table
    assert "WRONG" not in table and "FAILED" not in table
    for case in record["cases"]:
        assert case["command"] in commands
    assert f"torch {torch.__version__}" in commands


def test_file_that_cannot_be_written_costs_no_result(peers, tmp_path, capfd):
    _, record, _ = peers
    others = dict.fromkeys(("csv", "html", "earlier"))
    path = tmp_path / "file" / "new.json"
    path.parent.touch()
    outputs = command.Outputs(json=path, fail_if=0.05, repro=False, **others)
    with pytest.raises(command.BenchError, match=r"^not written: .*file"):
        command.tell(record, outputs)
    assert "peftkern beside those that do the same" in capfd.readouterr().out


def test_csv_has_a_line_per_case_and_provider(peers):
    _, record, folder = peers
    with open(folder / "new.csv", newline="") as file:
        lines = list(csv.DictReader(file))
    rows = [(c, n, row) for c in record["cases"] for n, row in c["providers"].items()]
    assert len(lines) == len(rows)
    for line, (case, name, row) in zip(lines, rows, strict=True):
        assert (line["case"], line["provider"]) == (case["name"], name)
        assert float(line["median_ms"]) == row["median_ms"]
    names = {path.name for path in folder.iterdir()}
    assert names == {"new.csv", "new.html", "new.json", "old.json"}


def test_a_report_of_an_earlier_record_is_the_same_file(peers, tmp_path, capfd):
    _, record, folder = peers
    written = (folder / "new.html").read_text(encoding="utf-8")
    old = folder / "old.json"
    assert written == report.render(record, json.loads(old.read_text()))
    again = tmp_path / "again.html"
    given = (f"--from={folder / 'new.json'}", f"--compare={old}", f"--html={again}")
    assert main(["bench", *given]) == 0
    assert "speed-up" in capfd.readouterr().out
    assert again.read_text(encoding="utf-8") == written


def test_a_wrong_provider_shows_no_time_and_a_broken_one_costs_nobody_else(rivals):
    """A hanging one costs the run its patience and no more."""
    _, said, record = rivals
    (case,) = record["cases"]
    rows = {name.partition(":")[2]: row for name, row in case["providers"].items()}
    assert rows["right"]["median_ms"] > 0, rows
    assert case["providers"]["peftkern"]["median_ms"] > 0
    assert "bound 0.03 rms" in (rows["wrong"]["wrong"] or ""), rows
    assert rows["raising"]["failed"] == "RuntimeError: no kernel for lora_linear"
    assert rows["crashing"]["failed"] == "killed by SIGABRT: Fatal: out of bounds"
    assert rows["hanging"]["failed"].endswith("while building the layers")
    assert record["budget_s"] == BUDGET and record["elapsed_s"] < BUDGET
    _never_answers(case, rows["sleeping"], said)
    lines = said.splitlines()
    for name in ("wrong", "raising", "crashing", "hanging"):
        assert rows[name]["median_ms"] is None and rows[name]["samples_ms"] == []
        (line,) = [line for line in lines if line.startswith(f"bench_providers:{name} ")]
        assert line.split()[1:] == ["WRONG" if name == "wrong" else "FAILED"]
        assert any(line.startswith(("WRONG", "FAILED")) and name in line for line in lines)


def _never_answers(case: dict, row: dict, said: str) -> None:
    """Of it a lower bound is known, and that is told as one."""
    assert row["median_ms"] is row["failed"] is row["wrong"] is None and row["samples_ms"] == []
    least = row["at_least_ms"]
    assert 1e3 * runner.LEAST <= least < 1e3 * BUDGET
    times = number(least / case["providers"]["peftkern"]["median_ms"])
    (line,) = [one for one in said.splitlines() if one.startswith("bench_providers:sleeping ")]
    assert line.split()[1:] == [">", number(least), ">", f"{times}x"]
    assert f": > {number(least / 1e3)} s a call" in " ".join(said.split())


def test_a_budget_for_nothing_is_one_clear_line(tmp_path, capfd, monkeypatch):
    monkeypatch.chdir(SUPPORT)
    options = ["--baselines=bench_providers:right", f"--json={tmp_path / 'new.json'}"]
    complaint = "error: --budget: 0.1 s ended before anything was measured\n"
    refused(capfd, complaint, "bench", *TINY, *options, "--budget=0.1s")
    assert list(tmp_path.iterdir()) == []


def test_compare_fails_when_slower_and_only_then(peers, rivals):
    """Both have an earlier record, the one of a slower, the other of a faster peftkern."""
    better, (status, worse, _) = peers[0], rivals
    assert "0 of 1 cases slower by more than 5.0%" in better
    assert "not compared: not in the earlier record" in " ".join(better.split())
    assert status == 1
    assert "ratio to bench_providers:right" in worse and "SLOWER" in worse
    assert "1 of 1 cases slower by more than 5.0%" in worse


def test_workers_die_with_a_killed_parent(tmp_path):
    command = [sys.executable, "-m", "peftkern", "bench", *TINY, "--op=lora_linear"]
    command += ["--baselines=bench_providers:hanging", "--budget=120s"]
    parent = subprocess.Popen(
        command,
        cwd=SUPPORT,
        env=environment(TMPDIR=str(tmp_path)),  # nobody is left to remove its files
        stdout=subprocess.DEVNULL,
    )
    try:
        # The one that forks the others, and the referee.
        below = psutil.Process(parent.pid).children
        wait_until(lambda: len(below(recursive=True)) >= 2)
        time.sleep(1)  # into their work
        workers = below(recursive=True)
    finally:
        parent.send_signal(signal.SIGKILL)
        parent.wait()
    wait_until(lambda: not any(map(is_running, workers)))


def is_running(process: psutil.Process) -> bool:
    """A zombie is not: whoever adopted it has only not asked yet."""
    with contextlib.suppress(psutil.NoSuchProcess):
        return process.status() != psutil.STATUS_ZOMBIE
    return False


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--op", "nonsense"], "--op: 'nonsense' is not one of nf4_lora_linear, lora_linear"),
        (["--op", ""], "--op: '' has an empty entry"),
        (["--shapes", ""], "--shapes: '' has an empty entry"),
        (["--op", "grouped_linear", "--shapes", ""], "--shapes: '' has an empty entry"),
        (["--rows", ""], "--rows: '' has an empty entry"),
        (["--dtype", ""], "--dtype: '' has an empty entry"),
        (["--mode", ""], "--mode: '' has an empty entry"),
        (["--baselines", ""], "--baselines: '' has an empty entry"),
        (["--budget", ""], "--budget: ''; accepted: a time up to a day"),
        (["--device", ""], "--device: '' has an empty entry"),
        (["--compare", "", "--fail-if", ""], "--compare: .: expected a file of JSON, got a folder"),
        (["--from", "no/such.json"], "--from: no/such.json: No such file or directory"),
        (["--from", "waiting.py"], "--from: waiting.py: expected JSON in UTF-8"),
        (["--from", "waiting.py", "--op", "x"], "--from: measures nothing, so that --op"),
        (["--from", "waiting.py", "--json", "x.json"], "so that --json has no effect"),
        (["--shapes", "12x12"], "--shapes: '12x12' is not one of llama2-7b"),
        (["--shapes", "0x8x8"], "MxNxK (256x4096x4096), each from 1 to"),
        (["--shapes", "8x16777216x16777216"], "this machine has"),
        (["--op", "grouped_linear,lora_linear"], "--op: grouped_linear has shapes of its own"),
        (["--op", "grouped_linear", "--shapes", "8x8x8"], "is not one of qwen3-30b-a3b, mixtral"),
        (["--rows", "none"], "--rows: 'none'; accepted: whole numbers"),
        (["--dtype", "int8"], "--dtype: 'int8' is not one of bf16"),
        (["--mode", "sideways"], "--mode: 'sideways' is not one of forward"),
        (["--op", "nf4_dequantize", "--mode", "full"], "--mode: nf4_dequantize has no full"),
        (["--r", "0"], "--r: '0'; accepted: whole numbers from 1 to 4096"),
        (["--baselines", "nobody"], "--baselines: nobody: unknown; accepted: auto, frozen"),
        (["--baselines", "no_such_module:build"], "there is no module no_such_module"),
        (["--baselines", "torch", "--op", "lora_linear"], "torch: has nothing to compare for"),
        (["--baselines", "auto,peft"], "--baselines: auto: unknown"),
        (["--budget", "soon"], "--budget: 'soon'; accepted: a time up to a day"),
        (["--threads", "0"], "--threads: expected 1 to"),
        (["--seed", "-1"], "--seed: expected 0 to"),
        (["--device", "tpu"], "--device: 'tpu' is not one of cpu, cuda"),
        (["--json", "no/such/folder/x.json"], "there is no folder no/such/folder"),
        (["--html", "no/such/folder/x.html"], "--html: no/such/folder/x.html: there is no folder"),
        (["--csv", "."], "--csv: . is a folder"),
        (["--html", "."], "--html: . is a folder"),
        (["--csv", "/dev/null"], "--csv: /dev/null is a link or a device"),
        (["--json", "/dev/stdout"], "--json: /dev/stdout is a link or a device"),
        (["--compare", "no/such.json"], "--compare: no/such.json: No such file or directory"),
        (["--compare", "waiting.py"], "--compare: waiting.py: expected JSON in UTF-8"),
        (["--fail-if", "5%"], "--fail-if: needs --compare"),
    ],
)
def test_bad_input_is_one_line_before_anything_runs(arguments, complaint, capfd, monkeypatch):
    monkeypatch.chdir(SUPPORT)
    monkeypatch.setattr(command, "execute", lambda plan: pytest.fail("it ran"))
    refused(capfd, complaint, "bench", *arguments)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_absent_gpu_is_one_clear_line(capfd):
    refused(
        capfd, f"--device cuda: torch {torch.__version__} sees no GPU", "bench", "--device=cuda"
    )


def test_compare_with_other_cases_is_refused_before_anything_runs(peers, capfd):
    *_, folder = peers
    compare = f"--compare={folder / 'new.json'}"
    complaint = "has none of these cases; it has lora_linear/24x64x128"
    refused(capfd, complaint, "bench", *TINY, "--op=lora_linear", "--dtype=fp32", compare)
