"""Tables and plots of README and docs/ are what bench/results/ says; else it would be found out."""

from __future__ import annotations

import json
from pathlib import Path

import make_plots
import make_tables
import pytest
from bench_records import case, provider
from bench_records import record as record_of

from peftkern.tools import charts
from peftkern.tools.bench import machine


def test_the_tables_and_plots_are_up_to_date(capsys):
    assert make_tables.main(["--check"]) == 0, "run `make docs`"
    assert make_plots.main(["--check"]) == 0, "run `make docs`"
    page = (machine.ROOT / "docs" / "measurements.md").read_text(encoding="utf-8")
    for device in make_tables.shown(machine.ROOT / "bench" / "results"):
        for theme in make_tables.THEMES:
            name = make_tables.plot_name(device, theme)
            assert f"(plots/{name}#gh-{theme}-mode-only)" in page
            assert (machine.ROOT / "docs" / "plots" / name).is_file()


def record(**medians: float) -> dict:
    """Of one machine: a case whose providers took these times, give or take a tenth."""
    more = dict.fromkeys(("graph_ms", "launches", "planned_bytes", "tokens_s", "peak_bytes"))
    rows = {
        n: provider(n, ms, p20_ms=0.9 * ms, p80_ms=1.1 * ms, **more) for n, ms in medians.items()
    }
    ours, *others = rows.values()
    one = case(ours, *others) | {"name": "nf4/a/bf16", "targets": [], "tokens": None}
    return record_of(one, bench="nf4", options={"n": 4, "k": 4, "r": 2}, answers=[])


@pytest.fixture
def results(tmp_path: Path) -> Path:
    folder = tmp_path / "results"
    machine.write_json(
        folder / "cpu" / "nf4.json", record(peftkern=2.0, fast=1.0, slow=6.0, same=2.1)
    )
    return folder


def test_losses_are_drawn_like_wins_and_noise_as_noise(results):
    (found,) = make_tables.shown(results).values()
    assert [(bar.label, bar.value, bar.color) for bar in make_plots.pairs(found["nf4"])] == [
        ("a/bf16 · fast", 0.5, "slower"),
        ("a/bf16 · slow", 3.0, "faster"),
        ("a/bf16 · same", 1.05, "level"),
    ]
    for name, text in make_plots.plots(results).items():
        for label in ("a/bf16 · fast", ">0.50x<", ">3.00x<", ">≈ 1.05x<"):
            assert label in text
        for kind in ("faster", "slower", "level"):
            assert f'fill="{charts.COLORS[kind]["dark" in name]}"' in text


def test_a_wrong_result_has_no_bar():
    wrong = record(peftkern=2.0, peer=4.0)
    wrong["cases"][0]["providers"]["peer"] = provider("peer", wrong="error 1 rms")
    assert make_plots.pairs(wrong) == []


def test_a_lower_bound_is_shown_as_one(results):
    slow = record(peftkern=2.0, peer=4.0)
    (one,) = slow["cases"]
    one["providers"]["peer"] = provider("peer", at_least_ms=9000.0)
    one["targets"] = [{"peer": "peer", "at_least": 25, "launches_at_most": None, "met": True}]
    one["targets"][0]["measured"] = None
    assert "stands a lower bound" not in make_tables.section(results)
    machine.write_json(results / "cpu" / "nf4.json", slow)
    text = make_tables.section(results)
    assert "| a/bf16 | 2 [1.8-2.2] |" in text and "| > 9000, **> 4500.00x** (25x ✓) |" in text
    assert "After a > stands a lower bound" in text
    ((bar,),) = (make_plots.pairs(found["nf4"]) for found in make_tables.shown(results).values())
    assert (bar.says, bar.value, bar.low, bar.color) == ("> 4500x", 4500.0, None, "faster")
    for isa in ("avx512", "avx2"):
        stopped = forced(isa, 2.0)
        name = "nf4_lora_linear/forward-M256/bf16"
        stopped["cases"][0] |= {"name": name}
        stopped["cases"][0]["providers"]["bitsandbytes + PEFT"] = one["providers"]["peer"]
        machine.write_json(results / f"cpu-{isa}" / "nf4_lora_linear.json", stopped)
    assert "| **> 4500.00x** |" in make_tables.section(results)
    assert "| avx2 | **> 4500.00x** |" in make_tables.summary(results)


def test_the_same_results_give_the_same_bytes_and_others_are_noticed(results, tmp_path, capsys):
    where = ["--results", str(results), "--out", str(tmp_path / "plots")]
    assert make_plots.main([*where, "--check"]) == 1  # missing
    assert make_plots.main(where) == 0
    written = {path: path.read_bytes() for path in (tmp_path / "plots").iterdir()}
    assert sorted(path.name for path in written) == ["cpu-dark.svg", "cpu-light.svg"]
    assert make_plots.main([*where, "--check"]) == 0
    for path in written:
        path.write_bytes(b"")
    assert make_plots.main([*where, "--check"]) == 1
    assert make_plots.main(where) == 0
    assert {path: path.read_bytes() for path in written} == written
    machine.write_json(results / "cpu" / "nf4.json", record(peftkern=2.0, fast=1.1))
    assert make_plots.main([*where, "--check"]) == 1


def test_what_was_run_in_the_interpreter_is_not_shown(results):
    path = results / "cpu" / "nf4.json"
    interpreted = json.loads(path.read_text())
    interpreted["environment"]["interpreter"] = True
    machine.write_json(path, interpreted)
    assert make_tables.shown(results) == {} == make_plots.plots(results)


def test_steps_and_answers_have_tables(results):
    steps = record(peftkern=200.0, PEFT=300.0)
    steps["bench"] = "e2e"
    for row in steps["cases"][0]["providers"].values():
        row |= {"tokens_s": 2048e3 / row["median_ms"]}
        row |= {"peak_bytes": 5_000_000, "planned_bytes": 4_000_000}
    steps["answers"] = [
        {"name": "e2e/big", "fits": True, "peak_bytes": 44.6e9, "planned_bytes": 44.6e9},
        {"name": "e2e/bigger", "fits": False, "planned_bytes": 50e9, "stopped": "out of memory"},
        {"name": "e2e/slow", "fits": None, "stopped": "no time left after 9 s", "step_s": [2.0]},
    ]
    machine.write_json(results / "cpu" / "e2e.json", steps)
    text = make_tables.section(results)
    assert "| a/bf16 | 200 [180-220] | 300, **1.50x** | 10240 | 5 (4) | 6827 | 5 (4) |" in text
    assert "| big | **fits** ✓ | 44.60 | 44.60 |  |" in text
    assert "| bigger | **does not fit** ✗ |  | 50.00 |  |" in text
    assert "| slow | no answer: no time left after 9 s |  |  | 2.0 |" in text


def forced(isa: str, ms: float) -> dict:
    """A record of the QLoRA layer on a machine that has more than this instruction set."""
    one = record(**{"peftkern": ms, "bitsandbytes + PEFT": 4 * ms})
    one["cases"][0]["name"] = f"nf4_lora_linear/forward-M{16 if isa == 'avx2' else 1}/bf16"
    one["environment"] |= {"isa": isa, "isas": ["scalar", "avx2", "avx512"]}
    return one


def test_instruction_sets_stand_side_by_side_and_stand_ins_have_no_section(results):
    for isa, ms in (("avx512", 2.0), ("avx2", 3.0)):
        machine.write_json(results / f"cpu-{isa}" / "nf4_lora_linear.json", forced(isa, ms))
    assert list(make_tables.shown(results)) == ["cpu", "cpu-avx512"]
    text = make_tables.section(results)
    assert "|  | avx2: ms | bnb x | bnb eval x | dense x | avx512: ms |" in text
    assert "| forward-M1/bf16 |  |  |  |  | 2 [1.8-2.2] | **4.00x** |  |  |" in text
    assert "| forward-M16/bf16 | 3 [2.7-3.3] | **4.00x** |  |  |  |  |  |  |" in text
    assert "cannot be held back" in text and "cpu-avx2-light" not in text


def test_readme_has_the_cases_that_every_instruction_set_has(results):
    assert make_tables.summary(results) == make_tables.NO_RESULTS
    for isa, ms in (("avx512", 2.0), ("avx2", 3.0)):
        one = forced(isa, ms)
        both = json.loads(json.dumps(one["cases"][0]))
        both["name"] = "nf4_lora_linear/forward-M256/fp32"
        dense = both["providers"]["bitsandbytes + PEFT"]
        both["providers"]["dense + PEFT"] = {**dense, "median_ms": 0.5 * ms}
        one["cases"].append(both)
        machine.write_json(results / f"cpu-{isa}" / "nf4_lora_linear.json", one)
    text = make_tables.summary(results)
    assert "|  | 256 tokens, fp32 |" in text
    for isa in ("avx2", "avx512"):  # one machine: its name is below
        assert f"| {isa} | **4.00x** (0.50x) |" in text
    assert "1 token," not in text and "16 tokens" not in text and "demo" not in text
    assert "on Some CPU, 2 threads: avx2 2026-11-24, avx512 2026-11-24." in text
    demo = record(peftkern=100.0, PEFT=150.0)
    machine.write_json(results / "cpu-avx512" / "demo.json", demo)
    text = make_tables.summary(results)
    assert "| 256 tokens, fp32 | step of `make demo` |" in text
    assert "| avx2 | **4.00x** (0.50x) | not measured |" in text
    assert "| avx512 | **4.00x** (0.50x) | **1.50x** |" in text
    other = forced("avx512", 2.0)
    other["environment"]["cpu"] = "Another CPU"
    machine.write_json(results / "other" / "nf4_lora_linear.json", other)
    text = make_tables.summary(results)
    assert (
        "| Some CPU, 2 threads, avx512 |" in text and "| Another CPU, 2 threads, avx512 |" in text
    )


def test_a_result_above_the_floor_is_explained(results):
    assert "Above 100%" not in make_tables.section(results)
    fast = record(peftkern=2.0, peer=4.0)
    fast["cases"][0]["providers"]["peftkern"]["share_of_roof"] = 1.3
    machine.write_json(results / "cpu" / "nf4.json", fast)
    assert "Above 100% of it" in make_tables.section(results)


def test_a_file_of_another_format_is_one_clear_line(results):
    machine.write_json(results / "cpu" / "rosa.json", {"bench": "rosa", "machine": {}, "cases": []})
    with pytest.raises(ValueError, match=r"rosa.json: not a record of `peftkern bench"):
        make_tables.section(results)
