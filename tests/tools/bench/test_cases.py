"""How `peftkern bench` reads its lists, sizes and times: everything accepted is sound, and
everything else is one line that names the option."""

from __future__ import annotations

import json

import bench_records as of
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft.utils.integrations import dequantize_module_weight
from tolerances import FLOOR_MAX, FLOOR_RMS
from torch import nn

from peftkern.tools import models
from peftkern.tools.bench import adalora, base_layers, cases, compare, data, providers, shapes
from peftkern.tools.bench.record import FORMAT, OURS
from peftkern.tools.bench.record import read as read_record
from peftkern.tools.bench.rows import floor_seconds, product_rate
from peftkern.tools.bench.runner import Checked
from peftkern.tools.bench.shapes import LARGEST, PRESETS, Shape, parse_shapes
from peftkern.tools.bench.worker import calls
from peftkern.tools.plan import presets

SIZES = st.integers(1, LARGEST)
NAMES = st.sampled_from([*PRESETS, *(f"{p}-{layer}" for p in PRESETS for layer in PRESETS[p])])


def as_text(sizes: tuple[int, int, int]) -> str:
    return "x".join(map(str, sizes))


@given(SIZES, SIZES, SIZES)
def test_sizes_come_back(m, n, k):
    assert parse_shapes(f"{m}x{n}x{k}") == [Shape(f"{m}x{n}x{k}", n, k, m)]


@given(st.lists(NAMES | st.tuples(SIZES, SIZES, SIZES).map(as_text), min_size=1))
def test_each_size_is_measured_once(parts):
    found = parse_shapes(",".join(parts))
    sizes = [(shape.M, shape.N, shape.K) for shape in found]
    assert len(set(sizes)) == len(sizes) >= 1
    assert all(shape.N >= 1 and shape.K >= 1 for shape in found)


@given(st.text(max_size=40))
def test_any_text_is_a_shape_or_one_clear_line(text):
    try:
        found = parse_shapes(text)
    except ValueError as error:
        assert str(error).startswith("--shapes: ")
    else:
        assert all(1 <= size <= LARGEST for s in found for size in (s.N, s.K, s.M or 1))


@given(st.text(max_size=12))
def test_any_text_is_a_time_a_percentage_numbers_or_one_clear_line(text):
    for parse, option in ((shapes.seconds, "--budget"), (shapes.percent, "--fail-if")):
        try:
            assert 0 <= parse(option, text) <= 86400
        except ValueError as error:
            assert str(error).startswith(option)
    try:
        assert all(1 <= number <= 9 for number in shapes.numbers("--r", text, 9))
    except ValueError as error:
        assert str(error).startswith("--r")


@pytest.mark.parametrize(
    ("text", "value"), [("60", 60), ("90s", 90), ("1.5m", 90), ("2h", 7200), (" 1s ", 1)]
)
def test_times(text, value):
    assert shapes.seconds("--budget", text) == value


@pytest.mark.parametrize("text", ["", "0", "-1s", "nan", "inf", "1e3", "25h", "1 s s", "s"])
def test_what_is_no_time(text):
    with pytest.raises(ValueError, match="--budget"):
        shapes.seconds("--budget", text)


def block_of(preset: str) -> nn.Module:
    """A layer of the model of that name, without memory."""
    one = {"num_hidden_layers": 1, "first_k_dense_replace": 0}
    config = models.from_config({**presets.PRESETS[preset], **one})
    return models.empty_model(config, torch.bfloat16).model.layers[0]


@pytest.mark.parametrize("preset", PRESETS)
def test_presets_are_the_layers_that_transformers_builds(preset):
    """Of the sizes that tests/tools/test_plan.py holds to published numbers of parameters."""
    found = {name.rpartition(".")[2]: part for name, part in block_of(preset).named_modules()}
    sizes = {name: tuple(found[name].weight.shape) for name in PRESETS[preset]}
    assert sizes == PRESETS[preset]


@pytest.mark.parametrize("preset", shapes.EXPERT_PRESETS)
def test_presets_of_experts_are_those_that_transformers_builds(preset):
    experts = block_of(preset).mlp.experts
    for name, (e, n, k) in shapes.EXPERT_PRESETS[preset].items():
        stored = (e, k, n) if experts.is_transposed else (e, n, k)
        assert experts.get_parameter(name).shape == stored


def test_shapes_of_experts_have_four_sizes():
    found = parse_shapes("mixtral-8x7b,qwen3-30b-a3b-down_proj,4x8x16x3", sizes="MNKE")
    assert [(one.name, one.E, one.N, one.K, one.M) for one in found] == [
        ("mixtral-8x7b-gate_up_proj", 8, 28672, 4096, None),
        ("mixtral-8x7b-down_proj", 8, 4096, 14336, None),
        ("qwen3-30b-a3b-down_proj", 128, 2048, 768, None),
        ("4x8x16x3", 3, 8, 16, 4),
    ]
    for text in ("mixtral", "4x8x16", "0x8x8x8", "llama3-8b", "qwen3-30b-a3b-q_proj"):
        with pytest.raises(ValueError, match=r"--shapes: .* is not one of qwen3-30b-a3b"):
            parse_shapes(text, sizes="MNKE")


def test_combinations_that_make_sense_once():
    ops, shapes = ["lora_linear", "nf4_dequantize"], parse_shapes("8x64x128,16x64x128")
    found = cases.problems(ops, shapes, ["float32"], None, [4, 8], None, "cpu")
    assert [problem.name for problem in found] == [
        "lora_linear/8x64x128/M8/r4/float32/full",
        "lora_linear/8x64x128/M8/r8/float32/full",
        "nf4_dequantize/64x128/float32/forward",
        "lora_linear/16x64x128/M16/r4/float32/full",
        "lora_linear/16x64x128/M16/r8/float32/full",
    ]
    with pytest.raises(ValueError, match="--mode: nf4_dequantize has no backward"):
        cases.problems(ops[1:], shapes, ["float32"], ["backward"], [4], None, "cpu")


def test_counted_work_is_that_of_the_table_in_bench_readme():
    """4096x4096, r=16: the bytes and operations that bench/README.md lists."""

    def work(op: str, m: int | None, mode: str, dtype: str = "bfloat16") -> tuple[float, float]:
        problem = cases.Problem(op, "x", m, 4096, 4096, 16 if m else None, dtype, mode)
        traffic, flops = problem.work()
        return round(traffic / 1e6, 1), round(flops / 1e9, 2)

    assert work("nf4_dequantize", None, "forward") == (42.2, 0)
    assert work("nf4_dequantize", None, "forward", "float32") == (75.8, 0)
    assert work("nf4_lora_linear", 1, "forward") == (9.2, 0.03)
    assert work("nf4_lora_linear", 256, "no-grad") == (13.4, 8.66)
    assert work("nf4_lora_linear", 1024, "full") == (61.3, 69.52)
    grouped = cases.Problem("grouped_linear", "x", 8, 64, 128, 16, "bfloat16", "forward", 1000)
    hit = sum(size > 0 for size in grouped.group_sizes)
    assert sum(grouped.group_sizes) == 8 and len(grouped.group_sizes) == 1000 and 1 < hit <= 8
    bytes_of_one = 2 * 64 * 128 + 4 * 16 * (64 + 128)
    assert grouped.work()[0] == hit * bytes_of_one + 2 * 8 * (64 + 128)
    forward, backward, full = (work("lora_linear", 64, m) for m in ("forward", "backward", "full"))
    assert full == pytest.approx([sum(pair) for pair in zip(forward, backward, strict=True)], 1e-2)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("op", list(cases.OPS))
@pytest.mark.parametrize("size", [(1, 1, 1), (3, 33, 70), (130, 20, 64)])
def test_prepared_data_is_what_eager_torch_computes(op, size, dtype, tmp_path):
    """The oracle's rows, chunks and packed weights against the plain expression: an oracle that is
    off would show as an error of eager torch."""
    m, n, k = size
    kind = cases.OPS[op]
    mode = "full" if kind.rows else "forward"
    dtype = dtype if dtype in kind.dtypes else kind.dtypes[0]
    rows, rank = (m if kind.rows or kind.counts else None), (3 if kind.ranked else None)
    rank = rank and min(rank, n, k) if kind.counts else rank
    problem = cases.Problem(op, "x", rows, n, k, rank, dtype, mode, 5 if kind.grouped else None)
    path = tmp_path / "case"
    cpu = torch.device("cpu")
    eager = data.prepare(problem, 0, path, cpu)
    # A dozen roundings of the dtype at the very most: an oracle of another op is off by 0.1 or so.
    # What is rounded to 4 bits is off by that, too: its own bound.
    if op == "nf4_quantize":
        assert eager["rms"] < kind.peer_wrong
    else:
        assert eager["rms"] < 12 * FLOOR_RMS[getattr(torch, dtype)]
        assert eager["max"] < 12 * FLOOR_MAX[getattr(torch, dtype)]
    first = path.read_bytes()
    data.prepare(problem, 0, path, cpu)
    assert path.read_bytes() == first
    data.prepare(problem, 1, path, cpu)
    assert path.read_bytes() != first


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("op", ["lora_linear", "grouped_linear", "rosa_sddmm"])
def test_without_16_bit_products_the_bound_is_not_looser(op, dtype, monkeypatch):
    """Float32 products, rounded once, beside torch's own, whatever this machine has."""
    kind = cases.OPS[op]
    sizes = (33, 70, None if kind.counts else 3, dtype, "full" if kind.rows else "forward")
    problem = cases.Problem(op, "x", 64, *sizes, 5 if kind.grouped else None)
    tensors = data.inputs(problem, 0, torch.device("cpu"))
    oracle = tensors | data.oracle_of(problem, tensors)
    found = {}
    for has in (True, False):
        monkeypatch.setattr(base_layers, "has_products", lambda dtype, device, has=has: has)
        found[has] = data.eager_errors(problem, tensors, oracle)
    for key in ("rms", "max"):
        assert 0 < found[False][key] <= 1.001 * found[True][key]


def test_the_roof_of_16_bit_products_is_not_below_that_of_float32():
    roof = {"copy": 1e9, "bfloat16": 2e9, "float32": 8e9, "float64": 4e9}
    rates = {dtype: product_rate(dtype, roof) for dtype in ("bfloat16", "float32", "float64")}
    assert rates == {"bfloat16": 8e9, "float32": 8e9, "float64": 4e9}
    assert product_rate("bfloat16", roof | {"bfloat16": 9e9}) == 9e9
    assert product_rate("bfloat16", {"copy": 1e9}) is None
    assert floor_seconds((10**9, 16 * 10**9), "bfloat16", roof) == 2.0


def test_a_slow_peer_has_as_many_samples_as_fit():
    checked = Checked({})
    assert checked.allow("quick", 1.0, 10.0) and checked.few == {}
    assert not checked.allow("slow", 3.0, 10.0) and not checked.allow("slower", 11.0, 10.0)
    assert checked.few == {"slow": 3, "slower": 1}


def test_a_provider_imports_what_its_ops_need():
    needed = {name: one.imports(["nf4_dequantize"]) for name, one in providers.PROVIDERS.items()}
    assert needed[OURS] == needed["frozen"] == [] and needed["bitsandbytes"] == ["bitsandbytes"]
    peers = "peftkern.tools.bench.peers"
    assert providers.PROVIDERS[OURS].imports(["nf4_dequantize", "lora_linear"]) == [peers]
    assert providers.PROVIDERS["frozen"].imports(["lora_linear"]) == []


QUICKEST = "lora_linear", "no-grad"  # to compile: seconds
MODES = [
    (op, mode, (op, mode) == QUICKEST) for op, kind in cases.OPS.items() for mode in kind.modes
]


# Without those that need a GPU or a compiler; "without PEFT": what stands in where it is missing.
LEAST = {
    "nf4_lora_linear": {OURS, "without PEFT", "frozen", "peft", "bitsandbytes"},
    "lora_linear": {OURS, "without PEFT", "frozen", "peft"},
    "nf4_linear": {OURS, "frozen", "bitsandbytes"},
    "nf4_dequantize": {OURS, "bitsandbytes", "torch"},
    "nf4_quantize": {OURS, "bitsandbytes", "torch"},
    "grouped_linear": {OURS, "peft", "grouped_mm", "frozen"},
    "dora_linear": {OURS, "without PEFT", "frozen", "peft"},
    "nf4_dora_linear": {OURS, "without PEFT", "frozen", "bitsandbytes"},
    "rosa_forward": {OURS, "composed"},
    "rosa_sddmm": {OURS, "composed"},
    "low_rank_svd": {OURS, "composed"},
    "low_rank_svdvals": {OURS, "composed"},
    "adalora_update": {OURS, "without PEFT", "peft", "composed"},
    "adalora_orthogonality": {OURS, "peft"},
}


@pytest.mark.parametrize(
    ("op", "mode", "compiled"),
    [*MODES, pytest.param("lora_linear", "full", True, marks=pytest.mark.long)],
)
def test_every_provider_answers_every_mode_with_the_right_result(op, mode, compiled, tmp_path):
    """Also what stands in where PEFT is missing."""
    kind = cases.OPS[op]
    rows, rank = (12 if kind.rows or kind.counts else None), (3 if kind.ranked else None)
    sizes = (64, 128, 4, "float32", mode, 5) if kind.grouped else (64, 128, rank, "float32", mode)
    problem = cases.Problem(op, "x", rows, *sizes)
    cpu = torch.device("cpu")
    data.prepare(problem, 0, tmp_path / "case", cpu)
    tensors = data.load(tmp_path / "case", cpu)
    builds = {
        name: (one.build, one.adapted)
        for name, one in providers.PROVIDERS.items()
        if op in one.labels and name not in ("compile", "unsloth")
    }
    if kind.lora and not kind.grouped:
        builds["without PEFT"] = (providers._functional, True)
    if compiled:
        builds["compile"] = (providers.compiled, True)
    if op == "adalora_update":
        builds["without PEFT"] = (adalora.allocator, True)
    assert builds.keys() >= LEAST[op]
    for name, (build, adapted) in builds.items():
        layers = build(problem, tensors, 2)
        setup, call, collect = calls(problem, layers, tensors, 1)
        for _ in range(2 if op == "adalora_update" else 3):  # both copies; its state goes on
            found = data.compare(problem, collect(call(setup())), tensors, adapted)
            # Its weight repacked for inference has an absmax rounded to bfloat16.
            repacked = name == "bitsandbytes" and mode == "no-grad"
            if repacked and kind.dora:
                break  # the next test's
            rounded = repacked or op == "nf4_quantize"
            bound = kind.peer_wrong if rounded else 4 * FLOOR_RMS[torch.float32]
            assert found["rms"] < bound, name


@pytest.mark.parametrize("format", ["fp4", "mxfp4", "nvfp4", "int4"])
@pytest.mark.parametrize("op", ["nf4_lora_linear", "nf4_linear", "nf4_dequantize"])
def test_other_formats_are_right(format, op, tmp_path):
    """What every format has, against float64 of the values that its codes stand for."""
    mode = "forward" if op == "nf4_dequantize" else "full"
    (problem,) = cases.problems(
        [op], [Shape("x", 64, 256, 5)], ["float32"], [mode], [3], None, "cpu", format
    )
    assert problem.format == format and f"/{format}/" in problem.name
    cpu = torch.device("cpu")
    data.prepare(problem, 0, tmp_path / "case", cpu)
    tensors = data.load(tmp_path / "case", cpu)
    w = data.packed_weight(tensors)
    assert abs(w.nbytes - problem.weight_bytes) <= 1200  # two tables of FP4
    for name in (OURS, *(n for n in ("frozen", "peft") if op in providers.PROVIDERS[n].labels)):
        one = providers.PROVIDERS[name]
        layers = one.build(problem, tensors, 1)
        setup, call, collect = calls(problem, layers, tensors, 1)
        found = data.compare(problem, collect(call(setup())), tensors, one.adapted)
        assert found["rms"] < 4 * FLOOR_RMS[torch.float32], name
    names, _ = providers.select(["auto"], [op], "cpu", format)
    assert ("bitsandbytes" in names) == (format == "fp4")
    if format != "fp4":
        with pytest.raises(ValueError, match=f"--baselines: bitsandbytes: has no {format}"):
            providers.select(["bitsandbytes"], [op], "cpu", format)


@pytest.mark.parametrize("repacks", [False, True])
def test_dora_over_bitsandbytes_errs_in_inference_by_its_repacked_weight_alone(repacks):
    """On a CPU with AVX-512-BF16 bitsandbytes reorders the packed bytes of a layer in eval mode at
    its first call; PEFT then dequantizes them for DoRA's norms as if they were in the usual order.
    That is theirs: the same layers without repacking are right, and so are those in training."""
    problem = cases.Problem("nf4_dora_linear", "x", 12, 64, 128, 4, "float32", "no-grad")
    tensors = data.inputs(problem, 0, torch.device("cpu"))
    oracle = tensors | data.oracle_of(problem, tensors)
    layers = providers.bitsandbytes(problem, tensors, 1)
    base = layers[0].run.base_layer
    has_instructions, base.support_avx512bf16_for_cpu = base.support_avx512bf16_for_cpu, repacks
    if repacks and not has_instructions:
        pytest.skip("this CPU's bitsandbytes repacks nothing")
    before = dequantize_module_weight(base).clone()
    torch.testing.assert_close(before, tensors["weight"], check_dtype=False)
    setup, call, collect = calls(problem, layers, tensors, 1)
    found = data.compare(problem, collect(call(setup())), oracle)
    if not repacks:
        assert found["rms"] < 4 * FLOOR_RMS[torch.float32]
        return
    assert getattr(base.weight.quant_state, "packing_format_for_cpu", False)
    norms, wrong = (w.norm(dim=1) for w in (before, dequantize_module_weight(base)))
    assert (wrong - norms).norm() > 0.05 * norms.norm()
    assert found["rms"] > 0.05


def test_a_result_of_another_kind_is_not_compared(tmp_path):
    problem = cases.Problem("lora_linear", "x", 4, 8, 8, 2, "float32", "forward")
    data.prepare(problem, 0, tmp_path / "case", torch.device("cpu"))
    oracle = data.load(tmp_path / "case", torch.device("cpu"))
    right = oracle["y"].float()
    assert data.compare(problem, {"y": right}, oracle)["rms"] < 1e-6
    nan = right.clone()
    nan[1, 1] = float("nan")
    assert data.compare(problem, {"y": nan}, oracle)["rms"] != 0
    assert not data.compare(problem, {"y": nan}, oracle)["rms"] < 1
    for got, complaint in (
        ({}, "expected a tensor, got none"),
        ({"y": right.double()}, "expected torch.float32, got torch.float64"),
        ({"y": right[:2]}, "expected 4 rows, got 2"),
        ({"y": right[:, :4]}, r"expected shape \(4, 8\), got \(4, 4\)"),
    ):
        with pytest.raises(ValueError, match=complaint):
            data.compare(problem, got, oracle)


def record(ours: float | None, peft: float | None, cpu: str = "a", name: str = "case") -> dict:
    one = of.case(of.provider("peftkern", ours), of.provider("peft", peft))
    found = of.record(one | {"name": name, "against": "peft" if peft else None})
    found["environment"]["cpu"] = cpu
    return found


def test_compare_takes_ratios_and_times_only_on_the_same_machine():
    (change,), silent = compare.changes(record(1, 2), record(2, 4, cpu="b"))
    assert (change.by, change.before, change.after, change.slower) == ("ratio to peft", 2, 2, 0)
    assert silent == {}
    (change,), _ = compare.changes(record(1, 2), record(1.25, 2))
    assert change.slower == pytest.approx(0.25)
    (change,), _ = compare.changes(record(1, 2), record(1.1, None))
    assert change.by == "ms on the same machine"
    assert change.slower == pytest.approx(0.1)
    assert compare.changes(record(1, 2), record(1.1, None, cpu="b"))[0] == []
    assert compare.changes(record(1, 2), record(None, 2))[1] == {
        "case": "peftkern has no time in one of the two"
    }
    assert compare.changes(record(1, 2, name="x"), record(1, 2))[0] == []


KEYS = ["format", "cases", "name", "against", "providers", "environment", "median_ms", "peft"]


@given(
    st.recursive(
        st.none() | st.booleans() | st.floats() | st.text(max_size=5),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(KEYS), inner),
    )
)
def test_any_json_is_a_record_or_one_clear_line(tmp_path_factory, value):
    path = tmp_path_factory.getbasetemp() / "old.json"
    if isinstance(value, dict):
        value["format"] = FORMAT
    path.write_text(json.dumps(value))
    try:
        read = read_record(path)
    except ValueError as error:
        assert str(error).startswith(str(path)) and "\n" not in str(error)
    else:
        compare.changes(read, read)
