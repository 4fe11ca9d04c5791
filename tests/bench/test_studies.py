"""The studies of bench/studies/, run as a user runs them, on sizes that take seconds."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
from paths import STUDIES
from processes import run_python_over, without
from scripts import run_here

TINY_MOE = ["--hidden", "64", "--layers", "1", "--experts", "4", "--top", "2", "--seq", "16"]


def test_mixture_of_experts_trains_over_nf4(tmp_path: Path) -> None:
    """Dense experts in 16 bits beside stacks in NF4: the losses begin and end alike."""
    out = tmp_path / "moe.json"
    options = [*TINY_MOE, "--steps", "4", "--pretrain", "3", "--dtype", "fp32", "--json", out]
    status, said, error = run_here("bench/studies/moe_qlora.py", *options)
    assert status == 0, said + error
    assert "peftkern, NF4 experts" in said and "tokens per second" in said
    record = json.loads(out.read_text())
    dense, packed = (record["runs"][name] for name in ("peft", "peftkern"))
    assert dense["trainable"] == packed["trainable"] > 0
    assert packed["losses"][0] == pytest.approx(dense["losses"][0], rel=0.02)
    assert record["summary"]["ratio"] == pytest.approx(1.0, abs=0.1)
    assert packed["report"]["skipped"] == {} and len(packed["report"]["patched"]) == 5
    for wrong, says in (
        (["--hidden", "100"], "--hidden: 100 is not a multiple of 64"),
        (["--top", "5"], "--top: 5 of 4 experts"),
        (["--text", "no/such/file"], "no/such/file: No such file"),
    ):
        status, _, error = run_here("bench/studies/moe_qlora.py", *TINY_MOE, *wrong)
        assert status == 2 and says in error, error


def test_adalora_budget_finds_the_planted_ranks(tmp_path: Path) -> None:
    plot = tmp_path / "budget.svg"
    script = "bench/studies/adalora_budget.py"
    status, said, error = run_here(script, "--steps", "300", "--plot", plot)
    assert status == 0, said + error
    assert "The planted ranks were found" in said
    assert plot.read_text().lstrip().startswith("<?xml")


def test_adalora_budget_says_when_it_fails(tmp_path: Path) -> None:
    """Twenty steps are too few to find anything."""
    script, plot = "bench/studies/adalora_budget.py", tmp_path / "b.png"
    status, out, _ = run_here(script, "--steps", "20", "--plot", plot)
    assert status == 1 and "Not found" in out and plot.exists()
    for wrong, says in (("b.gif", "a .png or .svg file"), ("no/b.png", "no is not a folder")):
        status, _, error = run_here(script, "--plot", wrong)
        assert status == 2 and "--plot: " in error and says in error


def test_adalora_compaction_is_measured_beside_its_plan(tmp_path: Path) -> None:
    """Sizes of seconds; times are a matter of the machine, so either verdict is one."""
    script, out = "bench/studies/adalora_compaction.py", tmp_path / "c.json"
    sizes = ["--hidden", "64", "--layers", "2", "--r", "8", "--target-r", "4", "--sequence", "16"]
    status, said, error = run_here(script, *sizes, "--steps", "2", "--json", out)
    assert status in (0, 1) and "off the plan's" in said, error
    record = json.loads(out.read_text())
    for side in (record["plan"], record["measured"]):
        assert 0.3 < side["compacted"]["bytes"] / side["pruned"]["bytes"] < 0.7
    status, _, error = run_here(script, "--r", "4", "--target-r", "5")
    assert status == 2 and "at most --r" in error


def test_adalora_budget_without_matplotlib(tmp_path: Path) -> None:
    """Known before the training; no picture is drawn, unless it is asked for."""
    site = without(tmp_path / "site", "matplotlib")
    script = str(STUDIES / "adalora_budget.py")
    done = run_python_over(site, script, "--steps", "20")
    assert done.returncode == 1 and "Traceback" not in done.stderr, done.stderr
    said = "no picture: matplotlib is not installed (pip install matplotlib)"
    assert done.stdout.splitlines()[-1] == said
    done = run_python_over(site, script, "--plot", str(tmp_path / "b.png"))
    assert done.returncode == 2 and done.stdout == ""
    says = "error: --plot: needs matplotlib, which is not installed: pip install matplotlib"
    assert done.stderr.splitlines()[-1].endswith(says)


def test_rank_choice_spends_the_same_budget_in_every_way(tmp_path: Path) -> None:
    out, plot = tmp_path / "ranks.json", tmp_path / "ranks.svg"
    script, ways = "bench/studies/rank_choice.py", "uniform LoRA,AdaLoRA,gradients"
    status, said, error = run_here(
        script, "--steps", 20, "--ways", ways, "--json", out, "--plot", plot
    )
    assert status == 0, said + error
    assert "planted: 36 ranks, 20 steps" in said and "ranks where none was planted" in said
    assert plot.read_text().lstrip().startswith("<?xml")
    runs = {one["name"]: one for one in json.loads(out.read_text())["runs"]}
    assert list(runs) == ways.split(",")
    assert {sum(one["ranks"].values()) for one in runs.values()} == {36}
    for name in ("uniform LoRA", "gradients"):  # twenty steps are enough to learn something
        assert runs[name]["loss"] < 0.8 * runs[name]["losses"][0]


def test_rank_choice_of_a_pretrained_encoder(tmp_path: Path) -> None:
    from framework_runs import letters_tokenizer
    from transformers import BertConfig, BertModel

    sizes = {"vocab_size": 128, "hidden_size": 32, "intermediate_size": 64}
    sizes |= {"num_hidden_layers": 1, "num_attention_heads": 2, "max_position_embeddings": 64}
    BertModel(BertConfig(**sizes)).save_pretrained(tmp_path / "bert")
    letters_tokenizer().save_pretrained(tmp_path / "bert")
    script, out = "bench/studies/rank_choice.py", tmp_path / "ranks.json"
    options = ["--steps", 10, "--ways", "gradients", "--json", out, "--plot", tmp_path / "r.png"]
    status, said, error = run_here(script, "--model", tmp_path / "bert", *options)
    assert status == 0, said + error
    assert "bert, before training" in said
    (only,) = json.loads(out.read_text())["runs"]
    assert sum(only["ranks"].values()) == 4 * 6
    for wrong, says in (
        (["--ways", "luck"], "--ways: expected some of uniform LoRA, AdaLoRA"),
        (["--steps", 1], "--steps: at least 10"),
        (["--model", tmp_path], "--model: expected a folder with config.json"),
        (["--json", "no/such/file"], "--json: no/such is not a folder"),
    ):
        status, _, error = run_here(script, *wrong)
        assert status == 2 and says in error, error


SMALL = ["--hidden", "128", "--layers", "1", "--seq", "32", "--batch", "2", "--pretrain", "1"]


def test_methods_trains_every_method(tmp_path: Path) -> None:
    out = tmp_path / "methods.json"
    status, said, error = run_here("bench/studies/methods.py", *SMALL, "--steps", 2, "--json", out)
    assert status == 0, error
    record = json.loads(out.read_text())
    runs = record["methods"]
    assert {"full fine-tuning", "LoRA", "LoRA-FA", "LoRA-Pro", "Delta-LoRA"} <= set(runs)
    others = {"DyLoRA", "Quantum-PEFT", "LongLoRA"}
    assert others | {"DoRA", "DoRA (NF4)", "RoSA", "RoSA (NF4)"} <= set(runs)
    for name, figures in runs.items():
        assert name in said
        assert all(math.isfinite(value) and value > 0 for value in figures.values())
        assert figures["loss"] != record["loss_before"]
    lora, fa, full = (runs[n] for n in ("LoRA", "LoRA-FA", "LoRA-Pro (full moments)"))
    assert fa["trainable"] < lora["trainable"] < runs["full fine-tuning"]["trainable"]
    assert fa["optimizer_bytes"] < lora["optimizer_bytes"] < full["optimizer_bytes"]
    assert fa["peak_bytes"] < lora["peak_bytes"]
    assert list(tmp_path.iterdir()) == [out]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--only", "LoRE"], "'LoRE'"),
        (["--steps", "0"], "--steps: expected at least 1, got 0"),
        (["--hidden", "100"], "--hidden: 100 is not a multiple of 64"),
        (["--hidden", "64", "--only", "LongLoRA"], "--hidden 64: not with LongLoRA"),
        (["--text", "no/such/file"], "no/such/file: No such file"),
        (["--json", "no/such/folder/x"], "--json: no/such/folder"),
    ],
)
def test_methods_refuses_bad_options(arguments: list[str], says: str) -> None:
    status, out, error = run_here("bench/studies/methods.py", *SMALL, *arguments)
    assert status == 2 and out == ""
    assert says in error and "Traceback" not in error


@pytest.mark.parametrize(
    ("script", "options", "wrong", "words"),
    [
        ("dylora_ranks", ["--steps", "4"], ["--steps", "0"], ["own run", "LoRA, cut"]),
        *(
            ("planted_regression", ["--steps", "3", "--optimizer", o], ["--lr", "0"], ["LoRA-Pro"])
            for o in ("sgd", "adamw")
        ),
    ],
)
def test_small_studies_print_their_tables(script, options, wrong, words) -> None:
    status, out, error = run_here(f"bench/studies/{script}.py", *options)
    assert status == 0, error
    assert all(word in out for word in words)
    assert run_here(f"bench/studies/{script}.py", *wrong)[0] == 2
