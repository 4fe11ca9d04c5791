"""`peftkern explain` as a user meets it, and the sample arguments below it."""

from __future__ import annotations

import resource

import pytest
import torch
from command_line import refused, told, told_json

import peftkern
from peftkern.backends import ops
from peftkern.tools.doctor.sample_calls import FUNCTIONS, Sample, explain, ops_of, sample_of


def test_says_who_serves_and_why_not_the_others(capfd):
    case = ("nf4_lora_linear", "16x4096x4096", "--device", "cpu", "--r", "64")
    out = told(capfd, "explain", *case)
    rows = [line.strip().split(maxsplit=2) for line in out.splitlines()]
    assert ["nf4_lora_linear_forward", "triton", "cannot: tensors are on cpu"] in rows
    assert rows.count(["cpu", "chosen"]) == 2
    assert "nf4_lora_linear 16x4096x4096 bf16, rank 64 fp32, on cpu" in out
    assert "threads" in out and max(map(len, out.splitlines())) <= 80


def test_verdicts_have_room_in_a_narrow_terminal(capfd, monkeypatch):
    monkeypatch.setenv("COLUMNS", "40")
    out = told(capfd, "explain", "nf4_lora_linear", "16x256x256", "--device", "cpu")
    assert max(map(len, out.splitlines())) <= 40 and "chosen" in out and "…" not in out


def test_dora_is_explained_over_both_kinds_of_weight(capfd):
    answer = told_json(capfd, "explain", "dora_linear", "16x4096x4096", "--device", "cpu")
    rows = {(row["op"], row["backend"]): row["verdict"] for row in answer["rows"]}
    for op in ("dora_norm", "nf4_dora_norm"):
        assert rows[op, "triton"] == "cannot: tensors are on cpu"
        assert rows[op, "cpu"] == rows["lora_linear_forward", "cpu"] == "chosen"


def test_json_says_the_same(capfd):
    shape = ("lora_linear", "1x4096x4096", "--dtype", "fp64", "--mode", "no-grad")
    answer = told_json(capfd, "explain", *shape, "--device", "cpu")
    assert (answer["dtype"], answer["mode"], answer["device"]) == ("fp64", "no-grad", "cpu")
    assert [(row["op"], row["backend"], row["verdict"]) for row in answer["rows"]] == [
        ("lora_linear_forward", "triton", "cannot: tensors are on cpu"),
        ("lora_linear_forward", "cpu", "cannot: the dtype is torch.float64"),
        ("lora_linear_forward", "torch", "chosen"),
        ("lora_linear_forward", "reference", "can"),
    ]
    assert "stays with PEFT" in answer["note"]


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["nf4", "1x2x3"], "op: expected one of adalora_allocate_, "),
        (["lora_linear", "2x3"], "shape: expected MxNxK for lora_linear, like 16x4096x4096"),
        (["low_rank_svd", "1x2x3"], "shape: expected NxK for low_rank_svd, like 4096x4096"),
        (["lora_linear", "1x2xthree"], "shape: expected MxNxK"),
        (["lora_linear", "0x2x3"], "M: expected a positive number, got 0"),
        (["lora_linear", "1x9000000000000x9000000000000"], "fewer than 2^63 elements"),
        (["lora_linear", "1x2x3", "--r", "0"], "--r: expected a positive number, got 0"),
        (["lora_linear", "1x2x3", "--dtype", "int8"], "--dtype: expected one of bf16, fp16"),
        (["lora_linear", "1x2x3", "--adapter-dtype", "x"], "--adapter-dtype: expected one of"),
        (["lora_linear", "1x2x3", "--mode", "training"], "--mode: expected one of forward, "),
        (["lora_linear", "1x2x3", "--device", "tpu9"], "--device: expected cpu, cuda or cuda:N"),
        (["lora_linear", "1x2x3", "--device", "meta"], "--device: expected cpu, cuda or cuda:N"),
        (["lora_linear", "1x2x3", "--device", "cpu:1"], "--device: expected cpu, cuda or cuda:N"),
    ],
)
def test_bad_input_is_one_line(arguments, complaint, capfd):
    refused(capfd, complaint, "explain", *arguments)


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_gpu_that_is_not_here_is_one_line(capfd):
    complaint = f"--device cuda: torch {torch.__version__} sees no GPU"
    refused(capfd, complaint, "explain", "lora_linear", "1x2x3", "--device", "cuda")


@pytest.mark.parametrize("op", sorted(ops.SCHEMAS))
def test_every_op_has_sample_arguments_that_it_takes(op):
    """Small ones, made dense: the real op runs on them, on the back end that was told."""
    sample = Sample(M=3, N=4, K=8, r=2)
    schema = getattr(torch.ops.peftkern, op).default._schema
    args = [_dense(value) for value in sample.arguments(op)]
    for i, argument in enumerate(schema.arguments):
        if argument.name == "crow":  # of all samples the only one whose values are checked
            args[i] = torch.arange(len(args[i]), dtype=args[i].dtype)
    chosen = peftkern.explain(op, *sample.arguments(op)).chosen(op)
    assert chosen == "cpu"
    peftkern.reset_stats()
    getattr(torch.ops.peftkern, op)(*args)
    assert peftkern.stats().calls == {(op, chosen): 1}


def _dense(value):
    if isinstance(value, list):
        return [_dense(item) for item in value]
    return value.clone() if isinstance(value, torch.Tensor) else value


@pytest.mark.parametrize("name", [*FUNCTIONS, *ops.SCHEMAS])
def test_every_function_is_explained(name):
    prefixes = ("lora_", "nf4_linear", "nf4_lora", "dora_linear", "rosa_", "grouped", "nf4_grouped")
    prefixes += ("swiglu", "gram_", "nf4_gram")
    with_rows = name.startswith(prefixes)
    sample = sample_of(name, "5x6x7" if with_rows else "6x7")
    assert (5 if with_rows else 1, 6, 7) == (sample.M, sample.N, sample.K)
    explanation = explain(name, sample)
    assert {row[0] for row in explanation.rows} == set(ops_of(name))


def test_no_memory_is_taken():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    explanation = explain("nf4_lora_linear", sample_of("nf4_lora_linear", "99999x99999x99999"))
    assert explanation.chosen("nf4_lora_linear_backward") == "cpu"
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 32 << 10  # KiB


def test_modes():
    assert ops_of("lora_linear", "forward") == ops_of("lora_linear", "no-grad")
    assert ops_of("lora_linear", "backward") == ("lora_linear_backward",)
    assert len(ops_of("lora_linear")) == 2
    assert ops_of("low_rank_svd", "backward") == ("low_rank_svd",)
    assert len(ops_of("quantize_nf4", "forward")) == 2
    backward = ("lora_linear_backward", "nf4_lora_linear_backward")
    assert ops_of("dora_linear", "backward") == backward  # the norm is a constant there
    assert set(ops_of("dora_linear", "no-grad")) == {*ops_of("dora_linear")} - {*backward}


def test_argument_that_nothing_stands_for_is_named(monkeypatch):
    monkeypatch.setattr(Sample, "value", lambda self, name: {}[name])
    with pytest.raises(LookupError, match="no sample of its argument 'weight'"):
        Sample(M=1, N=1, K=1).arguments("nf4_quantize")
