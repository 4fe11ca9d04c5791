"""The demo and the benchmarks, run as a user runs them, on sizes that take seconds."""

from __future__ import annotations

import functools
import importlib
import json
import math
import os
import time
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import specs
import suite
import torch
from paths import STUDIES
from processes import run_python
from scripts import run_here

from peftkern.backends import device
from peftkern.tools.bench import record as records
from peftkern.tools.bench import timer
from peftkern.tools.bench.record import OURS
from peftkern.tools.bench.rows import new_record

TINY = ["--hidden", "64", "--layers", "1", "--seq", "16", "--dtype", "fp32"]
TINY_BENCH = ["--n", "128", "--k", "128", "--layers", "2", "--seconds", "0"]
TINY_BENCH += ["--rotate-mb", "1", "--threads", "1"]
FP32_CURVES = 1e-5  # relative; float32 rounding over a handful of steps


run = functools.partial(run_python, COLUMNS="120")


@pytest.fixture(scope="module")
def local_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved Llama of 64 positions with its own tokenizer, one token per letter."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("model")
    letters = {chr(code): code for code in range(128)}
    tokenizer = Tokenizer(models.WordLevel(letters, unk_token="\0"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="\0").save_pretrained(folder)
    sizes = {"vocab_size": 128, "hidden_size": 64, "intermediate_size": 128}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "num_hidden_layers": 1}
    config = LlamaConfig(**sizes, **heads, max_position_embeddings=64)
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A folder that the bench of the demo wrote to, and what the demo said.

    Dropout is on: the curves agree only if both runs draw the same masks.
    """
    folder = tmp_path_factory.mktemp("results")
    options = [*TINY, "--steps", "8", "--dropout", "0.3", "--out", str(folder)]
    done = run("bench/bench_demo.py", *options)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder, done.stdout


def test_demo_compares_both_runs(results: tuple[Path, str]) -> None:
    folder, said = results
    assert "7 patched" in said
    assert "The loss curves agree" in said
    assert "Speed-up of the whole training step" in said

    (path,) = folder.glob("*/demo.json")
    record = records.read(path)
    (answer,), (step,) = record["answers"], record["cases"]
    runs, summary = answer["runs"], answer["summary"]
    assert step["op"] == "training_step" and step["providers"]["PEFT"]["tokens_s"] > 0
    assert step["providers"]["peftkern"]["median_ms"] == runs["peftkern"]["step_ms"]["median"]
    assert record["options"]["steps"] == summary["steps"] == 8
    for run in runs.values():
        assert len(run["losses"]) == len(run["step_seconds"]) == 8
        assert all(math.isfinite(loss) for loss in run["losses"])
        assert run["step_ms"]["p20"] <= run["step_ms"]["median"] <= run["step_ms"]["p80"]
        assert run["resident_peak_mb"] > 50
        assert run["tensor_peak_mb"] > 0
    assert runs["peft"]["losses"][0] != runs["peft"]["losses"][-1]
    assert summary["loss_max_rel_diff"] < FP32_CURVES
    assert len(runs["peftkern"]["report"]["patched"]) == 7
    assert runs["peftkern"]["report"]["skipped"] == {}
    assert "nf4_lora_linear_backward" in runs["peftkern"]["stats"]
    assert "report" not in runs["peft"]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--steps", "0"], "--steps: '0' is not a number of at least 1"),
        (["--steps", "many"], "--steps: 'many'"),
        (["--seq", "1"], "--seq"),
        (["--lr", "nan"], "--lr: 'nan'"),
        (["--dropout", "1"], "--dropout"),
        (["--hidden", "100"], "--hidden: 100 is not a multiple of 64"),
        (["--text", "no/such/file"], "no/such/file: No such file"),
        (["--text", "."], "Is a directory"),
        (["--model", "no/such/model"], "--model: no config.json in no/such/model"),
        (["--json", "no/such/folder/x"], "--json: no/such/folder/x: No such file"),
        (["--color"], "--color"),
    ],
)
def test_demo_refuses_bad_options_in_one_line(arguments: list[str], says: str) -> None:
    status, said, error = run_here("bench/studies/qlora_finetune.py", *arguments)
    assert (status, said) == (2, "")
    assert says in error and error.count("\n") == 1


@pytest.fixture
def finetune(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The demo as a module."""
    monkeypatch.syspath_prepend(str(STUDIES))
    return importlib.import_module("qlora_finetune")


def test_demo_uses_a_local_model_and_text(finetune, local_model: Path, tmp_path: Path) -> None:
    """In this process; what the demo does with two of them, the tests above have."""
    text, curves = tmp_path / "text", []
    text.write_text("the quick brown fox jumps over the lazy dog\n" * 9)
    words = ["--seq", "32", "--dtype", "fp32", "--text", str(text), "--model", str(local_model)]
    options = finetune.parse_options(words)
    for options.run in ("peft", "peftkern"):
        training = importlib.import_module("qlora_training").Training(options)
        curves.append([training.step()["loss"] for _ in range(3)])
    assert training.report.patched and curves[0][0] == pytest.approx(math.log(128), rel=0.1)
    assert curves[1] == pytest.approx(curves[0], rel=FP32_CURVES)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ([*TINY, "--text", "{tmp}/text"], "the text has only 16 tokens"),
        ([*TINY, "--text", "{tmp}/none"], "the text has only 0 tokens"),
        (["--model", "{tmp}"], "--model {tmp}: "),
        (["--model", "{model}", "--seq", "65"], "--seq 65: the model takes at most 64 positions"),
    ],
)
def test_demo_refuses_bad_contents(arguments, says, finetune, local_model, tmp_path) -> None:
    """In the process of a run; how the demo passes it on, the next test has."""
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "text").write_bytes(b"0123456789abcdef")
    (tmp_path / "none").touch()
    places = {"tmp": tmp_path, "model": local_model}
    options = finetune.parse_options([word.format(**places) for word in arguments])
    options.run = "peft"
    with pytest.raises(finetune.InputError) as caught:
        importlib.import_module("qlora_training").Training(options)
    assert says.format(tmp=tmp_path) in str(caught.value) and "\n" not in str(caught.value)


def test_demo_refuses_what_a_run_refuses_in_one_line(finetune, monkeypatch, capsys) -> None:
    """The one reason that a run finds before it has imported PEFT."""
    monkeypatch.setattr(finetune, "read_text", lambda path: b"")  # the demo would find it first
    assert finetune.main(["--text", "no/such/file"]) == 2
    error = capsys.readouterr().err
    assert error.endswith("no/such/file: No such file or directory\n") and error.count("\n") == 1


@pytest.mark.parametrize("late", [4.0, math.nan, math.inf])
def test_demo_notices_curves_that_part(late: float, finetune: ModuleType) -> None:
    compare = finetune.compare
    losses, steps = [5.0, 4.0, 3.0, 2.0, 2.0], [0.2, 0.2, 0.2, 0.1, 0.1]
    peft = {"losses": losses, "step_seconds": [2 * s for s in steps]}
    same = compare({"peft": peft, "peftkern": {"losses": losses, "step_seconds": steps}})
    assert same["losses_agree"] and same["loss_max_rel_diff"] == 0
    assert same["speedup"] == pytest.approx(2.0)
    parted = {"losses": [5.0, 4.0, 3.0, late, 2.0], "step_seconds": steps}
    summary = compare({"peft": peft, "peftkern": parted})
    assert not summary["losses_agree"] and summary["loss_max_rel_diff_step"] == 4


BENCHES = ("nf4", "nf4_lora_linear", "lora_linear")
MORE_BENCHES = ("dora", "rosa", "adalora", "low_rank_svd", "truncated_svd", "adapters")
SEVERAL = """
import runpy, sys
sys.path.insert(0, "bench")
stems, *options = sys.argv[1:]
for stem in stems.split(","):
    sys.argv = [f"bench/bench_{stem}.py", *options]
    try:
        runpy.run_path(sys.argv[0], run_name="__main__")
    except SystemExit as stop:
        assert not stop.code, (stem, stop.code)
"""


def check_record(stem: str, record: dict) -> None:
    assert record["environment"]["threads"] == 1
    assert record["roof"]["copy"] > 0
    for case in record["cases"]:
        assert case["name"].startswith(f"{stem}/")
        small = stem == "lora_linear" or (stem == "dora" and "nf4" not in case["name"])
        # Dense products this small are left to PEFT, but where torch has none of the dtype.
        if small and case["mode"] == "full":
            small = device.has_products(getattr(torch, case["dtype"]), specs.CPU)
        assert bool(case["fell_back"]) == small, case["name"]
        assert bool(case["served"]) != small, case["name"]
        for name, row in case["providers"].items():
            assert row["wrong"] is None and row["failed"] is None, case["name"]
            once = ", one x " in name  # and multiplied
            assert len(row["samples_ms"]) >= (1 if once else 7)
        for target in case["targets"]:
            peer = case["providers"][target["peer"]]["median_ms"]
            ratio = peer / case["providers"]["peftkern"]["median_ms"]
            assert target["measured"] == pytest.approx(ratio)
            assert target["met"] == (ratio >= target["at_least"])


@pytest.mark.parametrize(
    "benches", [BENCHES, pytest.param(BENCHES + MORE_BENCHES, marks=pytest.mark.more)]
)
def test_benchmarks_write_results_and_the_pages(benches, results, tmp_path: Path) -> None:
    """Those of the demo are there already."""
    (results, _), page = results, tmp_path / "docs" / "measurements.md"
    done = run("-c", SEVERAL, ",".join(benches), *TINY_BENCH, "--out", str(results))
    assert done.returncode == 0, done.stdout + done.stderr
    for stem in benches:
        (path,) = results.glob(f"*/{stem}.json")
        check_record(stem, records.read(path))

    page.parent.mkdir()
    for path in (page, tmp_path / "README.md"):
        path.write_text("# x\n<!-- results:begin -->\nold\n<!-- results:end -->\nrest\n")
    where = ["--root", tmp_path, "--results", results]
    assert run_here("bench/make_tables.py", *where, "--check")[0] == 1
    assert run_here("bench/make_tables.py", *where)[0] == 0
    texts = [path.read_text() for path in (tmp_path / "README.md", page)]
    for text in texts:
        assert text.startswith("# x\n")
        assert text.endswith("<!-- results:end -->\nrest\n")
        assert "\nold\n" not in text
    assert " 256 tokens, bf16 |" in texts[0]
    assert "| forward+backward-M1024/bf16 |" in text
    assert "| peak process memory, MB |" in text
    assert run_here("bench/make_tables.py", *where, "--check")[0] == 0
    page.write_text("no markers")
    assert run_here("bench/make_tables.py", *where)[0] == 2


QLORA = "e2e/qlora-4-layers-256-tokens/nf4"
DEQUANTIZE = "nf4/dequantize/bf16/into-out"


@pytest.mark.parametrize(
    ("bench", "only", "names"),
    [
        ("nf4", "into-out", {f"{DEQUANTIZE}/peftkern", f"{DEQUANTIZE}/bitsandbytes"}),
        pytest.param(
            *("e2e", "qlora", {f"{QLORA}/peftkern", f"{QLORA}/PEFT"}), marks=pytest.mark.long
        ),
    ],
)
def test_benchmarks_run_under_pytest_benchmark(bench, only, names, tmp_path, monkeypatch) -> None:
    out = tmp_path / "benchmark.json"
    # pytest-benchmark measures nothing when it believes to be a worker of xdist.
    for name in [name for name in os.environ if name.startswith("PYTEST_")]:
        monkeypatch.delenv(name)
    options = ["--benchmark-only", "--size=128", "--benchmark-max-time=0.01"]
    script = f"bench/bench_{bench}.py"
    done = run("-m", "pytest", script, "-k", only, *options, f"--benchmark-json={out}")
    assert done.returncode == 0, done.stdout
    assert names <= {test["param"] for test in json.loads(out.read_text())["benchmarks"]}


@pytest.mark.parametrize("damage", [math.nan, 0.1])
def test_benchmark_gives_no_time_to_a_wrong_result(damage: float) -> None:
    right = torch.linspace(1, 2, 64)
    wrong = right.clone()
    wrong[7] += damage

    def spec(ours: torch.Tensor, theirs: torch.Tensor):
        variants = {
            OURS: specs.Variant(lambda i: ours, (right.double(),)),
            "peer": specs.Variant(lambda i: theirs, (right.double(),)),
        }
        case = specs.Case(variants, 256, 0, torch.float32)
        targets = (specs.Target("peer", 0.0),)
        return specs.Spec("x/y", lambda options: case, tuple(variants), "peer", targets)

    roof = {"copy": 1e9, "float32": 1e9}
    record = new_record({}, roof)
    runner = suite.InProcess(record, specs.Options(), 0.0)
    runner.run_cases([spec(right, right), spec(wrong, right)], lambda *_: None)
    good, bad = record["cases"]
    assert good["targets"][0]["met"]
    assert "bound" in bad["providers"][OURS]["wrong"]
    assert bad["providers"][OURS]["median_ms"] is None
    assert bad["targets"][0]["measured"] is None
    assert bad["providers"]["peer"]["median_ms"] > 0


def test_a_peer_that_is_too_slow_for_its_slot_is_a_bound(tmp_path, monkeypatch) -> None:
    """Where torch has no products of a dtype; ours has its time, and a bound of its error.

    The time for a first call is over once that call hangs: how long the others take is the
    machine's business.
    """
    monkeypatch.setattr(suite, "has_products", lambda dtype, device: False)
    monkeypatch.setattr(suite, "PATIENCE", limit := 0.5)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    one, hanging = torch.ones(2), tmp_path / "hanging"

    def monotonic() -> float:
        if not hanging.exists():
            return 0.0
        hanging.unlink()
        return math.inf

    clock = SimpleNamespace(monotonic=monotonic, perf_counter=time.perf_counter, sleep=time.sleep)
    monkeypatch.setattr(suite, "time", clock)

    def hang(i: int) -> None:
        hanging.touch()
        time.sleep(3600)

    def spec(ours: torch.Tensor) -> specs.Spec:
        def variant(value: torch.Tensor, seconds: float) -> specs.Variant:
            return specs.Variant(lambda i: (time.sleep(seconds), value)[1], (one.double(),))

        variants = {OURS: variant(ours, 0.0), "hangs": specs.Variant(hang, (one.double(),))}
        variants["slow"] = variant(one, 0.15)  # of which three fit
        eager = lambda: (0.0, 0.0)  # noqa: E731
        case = specs.Case(variants, 8, 0, torch.float32, eager=eager)
        targets = (specs.Target("hangs", 1.0), specs.Target("hangs", 1e9))
        return specs.Spec("x/y", lambda options: case, tuple(variants), "hangs", targets)

    record = new_record({}, {"copy": 1e9, "float32": 1e9})
    runner = suite.InProcess(record, specs.Options(), 0.0)
    runner.run_cases([spec(one), spec(1.01 * one)], lambda *_: None)
    good, bad = record["cases"]
    hangs, slow = good["providers"]["hangs"], good["providers"]["slow"]
    assert hangs["at_least_ms"] == 1e3 * limit / torch.get_num_threads()
    assert hangs["median_ms"] is hangs["failed"] is hangs["wrong"] is None
    assert 1 <= len(slow["samples_ms"]) <= 3 and slow["median_ms"] >= 150
    assert good["against"] == "slow" and good["providers"][OURS]["median_ms"] > 0
    assert [(one["measured"], one["met"]) for one in good["targets"]] == [
        (None, True),
        (None, None),
    ]
    assert "bound" in bad["providers"][OURS]["wrong"]


def test_timer_numbers_the_calls_of_each_variant() -> None:
    seen: dict[str, list[int]] = {"a": [], "b": []}
    timings = timer.measure({name: seen[name].append for name in seen}, seconds=0.0)
    for name, numbers in seen.items():
        assert numbers == list(range(len(numbers)))
        assert timer.MIN_SAMPLES <= len(timings[name].samples) < len(numbers)
    with pytest.raises(ValueError, match="--threads: expected 1 to"):
        timer.pin_threads(0)
    timing = timer.Timing(tuple(float(i) for i in range(1, 11)))
    assert (timing.quantile(0.2), timing.median, timing.quantile(0.8)) == (3.0, 5.5, 9.0)
