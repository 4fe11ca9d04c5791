"""What runs on a GPU machine, as far as it can be shown without one: limits, files, the search."""

from __future__ import annotations

import argparse
import contextlib
import functools
import json
import multiprocessing
import os
import subprocess
import sys
import tarfile
from collections import Counter
from dataclasses import replace
from multiprocessing.pool import AsyncResult, Pool

import contests
import folders
import gpu
import make_tables
import pytest
import specs
import suite
import tiles
import torch
import tune
from bench_records import case, provider
from bench_records import record as record_of
from processes import run_python
from scripts import run_here
from tolerances import HANG_SECONDS
from waiting import wait_until

from peftkern.backends import dispatch
from peftkern.kernels import configs
from peftkern.kernels.configs import KERNELS, Problem, TileConfig, as_entry, choose
from peftkern.kernels.launch import config_for, forced, traits
from peftkern.tools.bench import gpu_timer, machine, timer
from peftkern.tools.bench.record import OURS
from peftkern.tools.bench.timer import Timing

ROOT = machine.ROOT
CPU = torch.device("cpu")
interpreted = pytest.mark.skipif(torch.cuda.is_available(), reason="the interpreter is off")
PROBLEM = Problem("nf4_dequantize", 1, 4096, 64, 1, 16)


@pytest.fixture
def bench(tmp_path, monkeypatch):
    """Run specs as a bench script does; the record they leave behind, and the exit status."""
    monkeypatch.setattr(suite, "pin_threads", lambda threads: 1)
    monkeypatch.setattr(folders, "slug", lambda facts: "device")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    options = ["--n", "8", "--k", "8", "--seconds", "0", "--out", str(tmp_path)]

    def run(wanted: list, *more: str) -> int:
        return suite.main("fake", wanted, argv=[*options, *more])

    run.record = lambda: json.loads((tmp_path / "device" / "fake.json").read_text())
    return run


def spec(name: str, stop: type[BaseException] | None = None) -> specs.Spec:
    def build(options: specs.Options) -> specs.Case:
        if stop is not None:
            raise stop("on purpose")
        one = torch.ones(2)
        variants = {n: specs.Variant(lambda i: one, (one.double(),)) for n in (OURS, "peer")}
        return specs.Case(variants, 1, 1, torch.float32)

    return specs.Spec(f"fake/{name}", build, (OURS, "peer"), "peer")


def test_budget_ends_a_bench_between_cases(bench):
    assert bench([spec("a"), spec("b")], "--budget", "0") == 1  # nothing at all
    assert bench.record()["not_reached"] == ["fake/a", "fake/b"]
    assert bench([spec("a"), spec("b")], "--budget", "60") == 0
    assert [case["name"] for case in bench.record()["cases"]] == ["fake/a", "fake/b"]


def test_case_that_would_not_end_in_time_is_not_begun(bench):
    """A later one that has the time is; what fails stays a failure."""
    late = replace(spec("late"), seconds=lambda options: 100.0)
    assert bench([late, spec("b")], "--budget", "60") == 0
    assert bench.record()["not_reached"] == ["fake/late"]
    assert [case["name"] for case in bench.record()["cases"]] == ["fake/b"]
    assert bench([late, spec("broken", ValueError)], "--budget", "60") == 1
    assert list(bench.record()["failed"]) == ["fake/broken"]
    assert bench([late]) == 0 and not bench.record()["not_reached"]


def test_stopped_bench_leaves_what_it_measured_and_a_failed_case_costs_no_other(bench):
    with pytest.raises(KeyboardInterrupt):
        bench([spec("a"), spec("b", KeyboardInterrupt)])
    assert [case["name"] for case in bench.record()["cases"]] == ["fake/a"]
    assert bench([spec("a", ValueError), spec("b")]) == 1
    assert bench.record()["failed"] == {"fake/a": "ValueError: on purpose"}
    assert [case["name"] for case in bench.record()["cases"]] == ["fake/b"]


def test_json_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "new" / "record.json"
    machine.write_json(path, {"a": 1})

    def stop(*args: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", stop)
    with pytest.raises(KeyboardInterrupt):
        machine.write_json(path, {"a": 2})
    assert json.loads(path.read_text()) == {"a": 1}


@pytest.mark.parametrize(
    ("facts", "folder"),
    [
        ({"gpu": {"name": "NVIDIA H200"}}, "h200"),
        ({"gpu": {"name": "NVIDIA A100-SXM4-80GB"}}, "a100-sxm4-80gb"),
        ({"gpu": {"name": "AMD Instinct MI300X"}}, "instinct-mi300x"),
        ({}, "some-cpu-avx2-2-threads"),
        ({"interpreter": True}, "some-cpu-avx2-2-threads-interpreter"),
    ],
)
def test_folder_is_named_after_the_machine(facts, folder):
    cpu = {"gpu": None, "cpu": "Some CPU", "isa": "avx2", "threads": 2}
    assert folders.slug({**cpu, **facts}) == folder


def test_slow_calls_are_repeated_as_little_as_they_must():
    """What takes longer than the timer's patience has few samples, whatever the time."""
    taken = Counter()

    def turn(name: str) -> list[float]:
        taken[name] += 1
        return [gpu_timer.PATIENCE * 2 if name == "slow" else 0.01]

    turns = {name: functools.partial(turn, name) for name in ("slow", "quick")}
    timings = timer.in_turns(turns, seconds=0.5, few={"slow": gpu_timer.FEW})
    assert taken["slow"] == gpu_timer.FEW and taken["quick"] >= 50
    assert len(timings["slow"].samples) == gpu_timer.FEW


def test_record_keeps_some_samples_and_the_percentiles_of_all():
    timing = Timing(tuple(i * 1e-3 for i in range(1, 1001)))
    kept = timing.in_milliseconds()
    assert len(kept["samples_ms"]) == timer.MOST_SAMPLES
    assert kept["samples_ms"][:2] == [1.0, 6.0] and kept["median_ms"] == pytest.approx(500.5)
    assert len(Timing((1.0,) * 7).in_milliseconds()["samples_ms"]) == 7


def test_parts_run_in_the_order_asked_for_and_have_scripts():
    assert all((ROOT / "bench" / f"bench_{part}.py").exists() for part in gpu.BENCHES)
    assert gpu.parts("all") == list(gpu.SHARES)
    assert gpu.parts("tune,nf4") == ["tune", "nf4"]
    assert gpu.parts("all,sanitize") == [*gpu.SHARES, "sanitize"]
    with pytest.raises(argparse.ArgumentTypeError, match="no part 'nf5'; there are all, test"):
        gpu.parts("nf4,nf5")
    for page in ("Makefile", "CONTRIBUTING.md", "bench/README.md"):
        assert [part for part in gpu.BENCHES if part not in (ROOT / page).read_text()] == []


def test_interrupted_pytest_still_says_what_failed(tmp_path, monkeypatch):
    """Its log is there line by line, with the failures before the interrupt."""
    (tmp_path / "test_it.py").write_text(
        "import time\n\ndef test_a():\n    assert 1 == 2\n\ndef test_b():\n    time.sleep(3600)\n"
    )
    log = tmp_path / "log.txt"
    limit, wait = 5.0, subprocess.Popen.wait

    def wait_for_the_second_test(process, timeout=None):
        """Its time is up when it has got there."""
        if timeout != limit:
            return wait(process, timeout)
        wait_until(lambda: "::test_b" in log.read_text())
        return wait(process, 0.0)

    monkeypatch.setattr(subprocess.Popen, "wait", wait_for_the_second_test)
    monkeypatch.setattr(gpu, "GRACE", HANG_SECONDS)
    command = [sys.executable, "-m", "pytest", "-v", "-c", os.devnull, str(tmp_path)]
    assert gpu.run(command, limit, log) == 124
    assert "assert 1 == 2" in log.read_text() and "KeyboardInterrupt" in log.read_text()


def test_archive_holds_the_results(tmp_path):
    """Not itself, and before there is any result nothing."""
    archive = tmp_path / "new" / "results.tgz"
    gpu.pack(tmp_path / "out", archive)
    folder = tmp_path / "out" / "h200"
    folder.mkdir(parents=True)
    (folder / "nf4.json").write_text("{}")
    for path in (archive, inside := tmp_path / "out" / "results.tgz", inside):
        gpu.pack(tmp_path / "out", path)
        with tarfile.open(path) as file:
            assert [n for n in file.getnames() if n.startswith("out")] == ["out/h200/nf4.json"]
    assert [p.name for p in archive.parent.iterdir()] == ["results.tgz"]


def test_overrunning_part_is_stopped():
    sleep = "import subprocess, sys; subprocess.run([sys.executable, '-c', 'input()'])"
    assert gpu.run([sys.executable, "-c", f"{sleep}; import time; time.sleep(60)"], 1.0) == 124


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_absent_gpu_is_one_clear_error(capfd):
    missing = f"error: device cuda: torch {torch.__version__} sees no GPU"
    done = run_python("bench/gpu.py")
    assert done.returncode and "Traceback" not in done.stderr
    assert f"gpu.py: {missing}" in done.stderr
    assert tune.main([]) == 2
    assert f"tune.py: {missing}" in capfd.readouterr().err
    assert suite.main("fake", [], argv=["--device", "cuda"]) == 2
    assert f"bench_fake.py: {missing}" in capfd.readouterr().err


def make(*arguments: str) -> str:
    environment = {k: v for k, v in os.environ.items() if not k.startswith("MAKE")}
    command = ["make", "-n", *arguments]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_make_gpu_uses_the_machine_as_it_is():
    printed = make("gpu", "PART=nf4", "OUT=/some/where", "COMMIT=abc", "BUDGET=60")
    expected = 'bench/gpu.py --part nf4 --out "/some/where" --budget 60 --commit "abc"'
    assert expected in printed and "python3" in printed and "--archive" not in printed
    assert '--archive "/r.tgz"' in make("gpu", "ARCHIVE=/r.tgz")
    assert "pip" not in printed and "venv" not in printed
    assert "bench/tune.py" in make("tune") and "pip" not in make("tune")


more = functools.partial(pytest.param, marks=pytest.mark.more)


@interpreted
@pytest.mark.parametrize(
    ("part", "only", "peers"),
    [
        ("adalora", "llama", {"patched PEFT", "PEFT", "foreach in a CUDA graph"}),
        ("low_rank_svd", "r16-values", {"torch QR+QR+gesvda, stacked", "torch Gram+eigh, stacked"}),
        ("dora", "dora/forward+backward-M512-4096x4096", {"PEFT", "frozen layer"}),
        ("grouped_linear", "nf4-forward+backward-mixtral-8x7b-T1/", {"three grouped_mm", "frozen"}),
        ("rosa", "rosa/forward-M4096-5.0%", {"dense W + S", "torch, in chunks"}),
        more("dora", "nf4-forward+backward-M512-14336x4096", {"PEFT", "frozen layer"}),
        more("dora", "dora/nf4-norm-4096x4096", {"torch, blocks of rows"}),
        more("grouped_linear", "/forward-gpt-oss-20b-T1/", {"PEFT", "three grouped_mm", "frozen"}),
        more("rosa", "rosa/sddmm-M4096-5.0%", {"dense dW", "torch, in chunks"}),
        more("rosa", "rosa/sddmm-M512-1.0%/fp32", {"dense dW", "torch.sparse", "torch, in chunks"}),
    ],
)
def test_gpu_cases_are_right_under_the_interpreter(part, only, peers, tmp_path, monkeypatch):
    """One of each script's; CI has those of its other operations."""
    monkeypatch.setattr(timer, "MIN_SAMPLES", 1)  # the interpreter takes its time
    size = "64" if part == "dora" else "16"  # bitsandbytes on a CPU is wrong where rows cut blocks
    options = ["--device", "cpu", "--only", only, "--n", size, "--k", size, "--rows", "16"]
    options += ["--seconds", "0", "--rotate-mb", "0", "--out", tmp_path]
    status, _, error = run_here(f"bench/bench_{part}.py", *options)
    assert status == 0, error
    (path,) = tmp_path.glob(f"*-interpreter/{part}.json")
    (case,) = json.loads(path.read_text())["cases"]
    assert peers < case["providers"].keys()
    assert all(row["wrong"] is None and row["median_ms"] for row in case["providers"].values())
    assert case["served"] and not case["fell_back"]


def test_tuning_tries_only_tiles_that_a_table_may_hold():
    smallest = TileConfig(block_n=64)
    assert smallest.valid("epilogue")
    for kernel, sizes in (("epilogue", [128]), ("nf4_quantize", [32, 128])):
        assert [c.block_n for c in tiles.neighbors(smallest, "block_n", kernel)] == sizes


def test_forced_tiles_reach_one_kernel_only():
    counted = choose(PROBLEM, traits(CPU).processors)
    (other, *_) = tiles.neighbors(counted, "block_n", PROBLEM.kernel)
    with forced("nf4_dequantize", other):
        assert config_for(PROBLEM, CPU) == other
        elsewhere = Problem("nf4_quantize", 1, 4096, 64, 1, 16)
        assert config_for(elsewhere, CPU) == choose(elsewhere, traits(CPU).processors)
    assert config_for(PROBLEM, CPU) == counted


def test_search_takes_the_fastest_of_those_that_are_right(monkeypatch):
    """Smaller tiles give other numbers, more warps do not compile, fewer warps are faster."""
    counted = choose(PROBLEM, traits(CPU).processors)
    used = []

    def runner(problem, n, k, device, rotate=0):
        def call(i: int) -> tuple:
            used.append(config_for(problem, device))
            if used[-1].num_warps > counted.num_warps:
                raise ValueError("out of resources")
            return (torch.full((4,), float(used[-1].block_n >= counted.block_n)),)

        return call

    def seconds_of(calls, device):
        seen = {}
        for name, call in calls.items():
            call(0)
            seen[name] = float(used[-1].num_warps)
        return seen

    monkeypatch.setattr(tiles, "runner", runner)
    monkeypatch.setattr(tiles, "seconds_of", seconds_of)
    tiles.expected.cache_clear()
    walk = tiles.Search.of(PROBLEM, 64, 64, CPU)
    finished, rejected = tiles.search([walk], tiles.Workers(CPU, 0), lambda: 1.0)
    tiles.expected.cache_clear()
    assert finished
    assert (walk.best.num_warps, walk.best.block_n) == (counted.num_warps // 2, counted.block_n)
    assert walk.ratio == 2.0
    assert rejected == {"other numbers": 1, "ValueError": 1}
    walk = tiles.Search.of(PROBLEM, 64, 64, CPU)
    assert not tiles.search([walk], tiles.Workers(CPU, 0), lambda: 0.0)[0]
    assert walk.best == counted


TINY = ["--device", "cpu", "--shapes", "16x64", "--rows", "2", "--ranks", "4"]


@interpreted
def test_tuning_runs_and_resumes_under_the_interpreter(tmp_path, capsys):
    command = [*TINY, "--kernels", "nf4_dequantize", "epilogue", "--contests"]
    command += ["--out", str(tmp_path)]

    def said(*more: str) -> str:
        assert tune.main([*command, *more]) == 0
        return capsys.readouterr().out

    assert "0 problems measured, 2 left for another run" in said("--budget", "0")
    assert "2 problems measured, 0 left" in said()
    table = json.loads((tmp_path / "interpreter.json").read_text())
    assert {"device", "versions", "date", "commit", "configs"} <= table.keys()
    for problem in (
        Problem("nf4_dequantize", 1, 16 * 64, 64, 1, 16),
        Problem("epilogue", 2, 16, 1, 4, 16),
    ):
        assert problem.key() in table["configs"]
        assert choose(problem, 4, table["configs"]).valid()
    assert "0 problems measured, 0 left" in said()
    assert "2 problems measured" in said("--again")


@interpreted
def test_candidates_are_checked_in_processes_of_their_own(monkeypatch):
    """Those that are right, that do not compile and that were not asked, each in its place."""
    monkeypatch.setattr(tiles, "TASK_SECONDS", HANG_SECONDS)
    walk = tiles.Search.of(PROBLEM, 16, 64, CPU)
    trials = [(walk, walk.counted), (walk, replace(walk.counted, block_n=48))]
    with contextlib.closing(tiles.Workers(CPU, 1)) as workers:
        reasons = workers.refused([*trials, *trials])
    assert reasons[0] is None and reasons[1] is not None and reasons == [*reasons[:2], *reasons[:2]]


@interpreted
def test_contests_are_held_recorded_and_resumed(tmp_path, capsys):
    command = [*TINY, "--shapes", "32x64", "--kernels", "--contests", "nf4_lora_linear_forward"]
    command += ["low_rank_svd", "layers", "--out", str(tmp_path)]
    assert tune.main([*command, "--budget", "0"]) == 0
    assert "contests: 0 held, 6 left for another run" in capsys.readouterr().out
    assert tune.main(command) == 0
    said = capsys.readouterr().out
    assert "contests: 6 held, 0 left" in said and "not compared" not in said
    table = json.loads((tmp_path / "interpreter.json").read_text())
    winner = table["back_ends"]["nf4_lora_linear_forward/M2/r16/16-bit"]["32x64"]
    assert winner in ("cpu", "reference")
    assert table["back_ends"]["low_rank_svd/M256/r16/32-bit"] == {"32x64": "cpu"}
    for op in contests.LAYERS:
        for mode in contests.MODES:
            key = f"{op}/{mode}/M2/N32/K64/r16/16-bit"
            assert table["milliseconds"][key].keys() == {"peftkern", "PEFT"}
            assert table["layers"][f"{op}/{mode}/M2/r16/16-bit"]["32x64"] in ("peftkern", "PEFT")
    assert tune.main(command) == 0
    assert "contests: 0 held, 0 left" in capsys.readouterr().out


@pytest.mark.parametrize("op", contests.OPS)
def test_contests_call_ops_as_dispatch_knows_them(op):
    """Under the key that a real call has; and what a contender gives is compared."""
    (first, *_) = contests.arguments(op, 2, 16, 64, 4, CPU)
    problem = contests.problem_for(op, 2, 16, 64, 4)
    assert dispatch.problem_of(op, first) == problem
    calls = contests.back_ends(op, 2, 16, 64, 4, CPU)
    assert "cpu" in calls
    winner, times, out = contests.held(calls, op, CPU)
    assert winner in calls and times.keys() == (calls.keys() if len(calls) > 1 else set())
    assert not out


def gives(value: float):
    return lambda i: torch.full((3,), value)


def test_contest_leaves_out_who_gives_other_numbers():
    """Than the reference, if that takes part, else than the first; and who fails."""
    calls = {"a": gives(1.0), "b": gives(1.5), "c": lambda i: 1 / 0}
    assert contests.held(calls, "dora_norm", CPU) == (
        *("a", {}),
        ["c: ZeroDivisionError: division by zero", "b gave other numbers"],
    )
    _, times, out = contests.held({**calls, "reference": gives(1.5)}, "dora_norm", CPU)
    assert times.keys() == {"b", "reference"} and out[1:] == ["a gave other numbers"]
    with pytest.raises(RuntimeError, match="division by zero"):
        contests.held({"c": calls["c"]}, "lora_linear/training", CPU)


def test_contests_wait_for_the_tiles_they_depend_on(tmp_path, capsys):
    """Held before, they would have to be held again."""
    command = [*TINY, "--contests", "nf4_lora_linear_forward", "nf4_dequantize", "--budget", "0"]
    args, path = tune.parse(command), tmp_path / "t.json"
    table = tune.begin(path, args)
    tune.hold_contests(args, table, path, lambda: 1.0)
    assert "contests: 1 held, 1 left" in capsys.readouterr().out
    assert [key.split("/")[0] for key in table["back_ends"]] == ["nf4_dequantize"]
    for problem, n, k in tiles.problems(args.shapes, args.rows, args.ranks):
        table["configs"][problem.key()] = as_entry(tiles.Search.of(problem, n, k, CPU).counted)
    tune.hold_contests(args, table, path, lambda: 1.0)
    assert "contests: 1 held, 0 left" in capsys.readouterr().out
    configs.load.cache_clear()


def test_table_of_other_kernels_is_not_continued(tmp_path, monkeypatch):
    path, args = tmp_path / "interpreter.json", tune.parse(["--device", "cpu"])
    table = tune.begin(path, args)
    tune.save(path, {**table, "configs": {"some": {}}})
    assert tune.begin(path, args)["configs"] == {"some": {}}
    monkeypatch.setattr(tune, "fingerprint", lambda: "other")
    assert tune.begin(path, args)["configs"] == {}


def dies(problem, n, k, counted, config, device):
    """In place of `tiles.refused`: one candidate takes its process along, one never ends."""
    if config.num_warps == 1:
        os._exit(1)
    if config.num_warps == 2:
        raise RuntimeError("the device is lost")
    return None


def test_candidate_that_loses_its_process_costs_itself_alone(monkeypatch):
    results, apply_async, get = [], Pool.apply_async, AsyncResult.get

    def ask(pool, *task):
        results.append(apply_async(pool, *task))
        return results[-1]

    def get_in_time(result, timeout=None):
        """The time of one is up when all others that were asked with it have answered."""
        others = [r for r in results if r._pool is result._pool and r is not result]
        wait_until(lambda: result.ready() or all(r.ready() for r in others))
        return get(result, 0)

    monkeypatch.setattr(Pool, "apply_async", ask)
    monkeypatch.setattr(AsyncResult, "get", get_in_time)
    monkeypatch.setattr(tiles, "refused", dies)
    fork = multiprocessing.get_context("fork")  # quicker, and here no process uses torch
    monkeypatch.setattr(tiles.multiprocessing, "get_context", lambda method: fork)
    walk = tiles.Search.of(PROBLEM, 16, 64, CPU)
    trials = [(walk, replace(walk.counted, num_warps=n, num_stages=n)) for n in (4, 2, 1, 8)]
    with contextlib.closing(tiles.Workers(CPU, 2)) as workers:
        reasons = workers.refused(trials)
    assert reasons == [None, "lost: RuntimeError", "lost: TimeoutError", None]


def test_contest_is_won_by_more_than_noise(monkeypatch):
    def measured(calls, seconds):
        return {name: Timing((calls[name](0).item(),)) for name in calls}

    monkeypatch.setattr(contests, "measure", measured)
    for other, winner in ((0.99, "first"), (0.9, "other"), (1.1, "first")):
        calls = {"first": lambda i: torch.tensor(1.0), "other": lambda i, t=other: torch.tensor(t)}
        assert contests.held(calls, "lora_linear/training", CPU)[0] == winner


@interpreted
def test_every_kernel_can_be_tuned():
    """Its runner launches it under tiles that are forced: two counted ones give equal results."""
    seen = set()
    for problem, n, k in tiles.problems([(32, 64)], [3], [4]):
        counted = choose(problem, traits(CPU).processors)
        run = tiles.runner(problem, n, k, CPU)
        with forced(problem.kernel, counted):
            results = tiles.checked(lambda i, run=run: run(i)), tiles.checked(run)
        assert results[0] and tiles.same(*results)
        seen.add(problem.kernel)
    assert seen == set(tiles.FIELDS) == set(KERNELS)


def test_tables_show_a_gpu_with_device_and_versions_when_it_was_measured(tmp_path):
    assert "No results" in make_tables.section(tmp_path)
    gpu = {"name": "NVIDIA H200", "capability": "9.0", "multiprocessors": 132, "memory": 1 << 37}
    gpu |= {"l2_cache": 1 << 26, "cuda": "13.0"}
    more = {"launches": 2, "peak_bytes": 3_000_000, "share_of_roof": 0.5}
    rows = [
        provider("peftkern", 1.0, p20_ms=0.9, p80_ms=1.1, graph_ms=1.0, **more),
        provider("PEFT", 2.0, graph_ms=3.0, **more),
    ]
    of = dict.fromkeys(("peer", "at_least", "launches_at_most")) | {"measured": 2, "met": True}
    targets = [{**of, "peer": "PEFT", "at_least": 1.3}, {**of, "launches_at_most": 3}]
    record = record_of(case(*rows, targets=targets) | {"name": "lora_linear/a"}, gpu=gpu)
    record |= {"options": {"n": 4096, "k": 4096, "r": 16}, "answers": []}
    machine.write_json(tmp_path / "h200" / "lora_linear.json", record)
    text = make_tables.section(tmp_path)
    assert "NVIDIA H200, CUDA 13.0; commit 0123456789ab, 2026-11-24; torch 2.13.0, peftkern" in text
    assert "| a | 1 [0.9-1.1] | 50% | 1 | 2 (3 ✓) | 3 | 2, **2.00x** / 3.00x (1.3x ✓) |" in text
    record["environment"]["interpreter"] = True
    machine.write_json(tmp_path / "h200" / "lora_linear.json", record)
    assert "No results" in make_tables.section(tmp_path)
