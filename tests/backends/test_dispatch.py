"""Which back end is asked, forced, counted and explained."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import pytest
import torch

import peftkern
from peftkern.backends import device, dispatch, ops
from peftkern.backends.cpu import module as native
from peftkern.backends.device import device_info
from peftkern.backends.programs import PLAIN
from peftkern.functional.dora import dora_linear
from peftkern.kernels import configs
from peftkern.tools.doctor.sample_calls import Sample

X64 = torch.zeros(2, 40, dtype=torch.float64)


@pytest.fixture(autouse=True)
def fresh_counters(monkeypatch):
    monkeypatch.delenv("PEFTKERN_BACKEND", raising=False)
    peftkern.reset_stats()
    yield
    peftkern.reset_stats()


@pytest.fixture
def w():
    weight = peftkern.quantize_nf4(torch.randn(20, 40))
    peftkern.reset_stats()
    return weight


@contextmanager
def unavailable(backend: str, reason: str) -> Iterator[None]:
    """A call on the forced back end is refused for this reason."""
    with (
        peftkern.use_backend(backend),
        pytest.raises(peftkern.BackendUnavailableError, match=reason),
    ):
        yield


def adapters() -> dict[str, torch.Tensor]:
    return {"lora_A": torch.randn(4, 40), "lora_B": torch.randn(20, 4)}


def test_every_op_has_candidates_and_a_last_resort():
    assert dispatch.CANDIDATES.keys() == ops.SCHEMAS.keys()
    for candidates in dispatch.CANDIDATES.values():
        assert candidates[-1].name == "reference"
        assert candidates[-1].refusal() is None


def test_native_serves_by_default(w):
    peftkern.nf4_linear(torch.zeros(2, 40), w)
    stats = peftkern.stats()
    assert stats.calls == {("nf4_lora_linear_forward", "cpu"): 1}
    assert stats.fallbacks == {}


def test_use_backend_nests_and_restores(w):
    x = torch.zeros(2, 40)
    with peftkern.use_backend("reference"):
        peftkern.nf4_linear(x, w)
        with peftkern.use_backend("cpu"):
            peftkern.nf4_linear(x, w)
        with peftkern.use_backend(None):
            peftkern.nf4_linear(x, w)
        peftkern.nf4_linear(x, w)
    with pytest.raises(RuntimeError, match="boom"), peftkern.use_backend("reference"):
        raise RuntimeError("boom")
    peftkern.nf4_linear(x, w)
    op = "nf4_lora_linear_forward"
    assert peftkern.stats().calls == {(op, "reference"): 2, (op, "cpu"): 3}


def test_backward_obeys_the_block_around_it(w):
    x = torch.zeros(2, 40, requires_grad=True)
    y = peftkern.nf4_linear(x, w)
    with peftkern.use_backend("reference"):
        y.sum().backward()
    calls = peftkern.stats().calls
    assert calls["nf4_lora_linear_forward", "cpu"] == 1
    assert calls["nf4_lora_linear_backward", "reference"] == 1


def test_use_backend_belongs_to_its_thread(w):
    with peftkern.use_backend("reference"), ThreadPoolExecutor(1) as pool:
        pool.submit(peftkern.nf4_linear, torch.zeros(2, 40), w).result()
    assert peftkern.stats().calls == {("nf4_lora_linear_forward", "cpu"): 1}


def test_environment_variable_and_its_precedence(w, monkeypatch):
    x = torch.zeros(2, 40)
    monkeypatch.setenv("PEFTKERN_BACKEND", "reference")
    peftkern.nf4_linear(x, w)
    with peftkern.use_backend("cpu"):
        peftkern.nf4_linear(x, w)
    monkeypatch.setenv("PEFTKERN_BACKEND", "")
    peftkern.nf4_linear(x, w)
    op = "nf4_lora_linear_forward"
    assert peftkern.stats().calls == {(op, "reference"): 1, (op, "cpu"): 2}


def test_forced_torch_is_the_reference_where_that_is_all_there_is():
    """Of families whose reference makes no large copies there is no second one."""
    weight = torch.randn(4, 64)
    with peftkern.use_backend("torch"):
        w = peftkern.quantize_nf4(weight, double_quant=False)
        peftkern.dequantize_nf4(w)
        explanation = peftkern.explain("nf4_quantize", weight, 64)
    calls = {("nf4_quantize", "reference"): 1, ("nf4_dequantize", "torch"): 1}
    assert peftkern.stats().calls == calls
    assert explanation.chosen("nf4_quantize") == "reference"


def test_kernels_are_asked_before_torch_and_that_before_the_reference():
    for op, candidates in dispatch.CANDIDATES.items():
        asked = [candidate.name for candidate in candidates]
        plain = [name for name in asked if name in PLAIN]
        assert asked[len(asked) - len(plain) :] == plain, op
        assert plain in (["reference"], ["torch", "reference"])
    for name in ("lora_linear", "nf4_lora_linear"):
        for way in ("forward", "backward"):
            assert "torch" in [c.name for c in dispatch.CANDIDATES[f"{name}_{way}"]]


def test_unknown_backend_lists_the_known(w, monkeypatch):
    with (
        pytest.raises(ValueError, match=r"'cpu', 'torch', 'reference'.*got 'cuda9'"),
        peftkern.use_backend("cuda9"),
    ):
        pass
    monkeypatch.setenv("PEFTKERN_BACKEND", "cuda9")
    with pytest.raises(ValueError, match=r"'cpu', 'torch', 'reference'.*got 'cuda9'"):
        peftkern.nf4_linear(torch.zeros(2, 40), w)


def test_forced_backend_never_falls_back(w):
    reason = "'cpu' cannot run nf4_lora_linear_forward: the dtype is torch.float64"
    with unavailable("cpu", reason):
        peftkern.nf4_linear(X64, w)


def test_fallback_is_counted_with_its_reason(w):
    assert peftkern.nf4_linear(X64, w).dtype is torch.float64
    peftkern.nf4_linear(X64, w)
    stats = peftkern.stats()
    served = ("nf4_lora_linear_forward", "nf4_dequantize")  # the first asks for the second
    assert stats.calls == {(op, "torch"): 2 for op in served}
    assert stats.fallbacks == {(op, "cpu: the dtype is torch.float64"): 2 for op in served}
    text = str(stats)
    assert "torch     2" in text and "2      cpu: the dtype is torch.float64" in text


def test_exception_of_a_candidate_is_not_a_fallback(w, monkeypatch):
    monkeypatch.setenv("PEFTKERN_CPU_ISA", "mmx")
    with (
        native.use_isa(None),
        pytest.raises(ValueError, match=r"PEFTKERN_CPU_ISA: expected one of .*got 'mmx'"),
    ):
        peftkern.nf4_linear(torch.zeros(2, 40), w)
    assert peftkern.stats().fallbacks == {}
    assert ("nf4_lora_linear_forward", "reference") not in peftkern.stats().calls


def test_integrations_record_their_own_fallbacks():
    dispatch.record_fallback("lora.Linear", "merged")
    dispatch.record_fallback("lora.Linear", "merged")
    assert peftkern.stats().fallbacks == {("lora.Linear", "merged"): 2}
    peftkern.reset_stats()
    assert str(peftkern.stats()) == "peftkern: no calls"


def test_stats_is_a_snapshot_and_counts_exactly_under_threads(w):
    empty = peftkern.stats()
    x = torch.zeros(1, 40)

    def many(_: int) -> None:
        for _ in range(200):
            peftkern.nf4_linear(x, w)

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(many, range(8)))
    assert empty.calls == {}
    assert peftkern.stats().calls == {("nf4_lora_linear_forward", "cpu"): 1600}


def test_stats_go_into_json_and_come_back():
    for x in (X64, X64, X64.float()):
        weight = torch.zeros(20, 40, dtype=x.dtype)
        peftkern.lora_linear(x, weight, **adapters(), scaling=1.0)
    dispatch.record_fallback("lora.Linear", "merged")
    stats = peftkern.stats()
    op, reason = "lora_linear_forward", "cpu: the dtype is torch.float64"
    assert json.loads(json.dumps(stats.as_dict())) == {
        "calls": [
            {"op": op, "backend": "cpu", "count": 1},
            {"op": op, "backend": "torch", "count": 2},
        ],
        "fallbacks": [
            {"op": "lora.Linear", "reason": "merged", "count": 1},
            {"op": op, "reason": reason, "count": 2},
        ],
    }
    peftkern.reset_stats()
    assert peftkern.stats().as_dict() == {"calls": [], "fallbacks": []}


def test_explanation_goes_into_json_and_comes_back(w):
    explanation = peftkern.explain("nf4_linear", X64.float(), w)
    told = json.loads(json.dumps(explanation.as_dict()))
    assert told.keys() == {"rows", "machine"} and told["machine"] == native.describe()
    assert [tuple(row.values()) for row in told["rows"]] == list(explanation.rows)
    assert {"op": "nf4_lora_linear_forward", "backend": "cpu", "verdict": "chosen"} in told["rows"]


def test_explain_says_what_happens_and_runs_nothing(w):
    explanation = peftkern.explain("nf4_lora_linear", X64, w, **adapters(), scaling=2.0)
    assert explanation.chosen("nf4_lora_linear_forward") == "torch"
    assert explanation.chosen("nf4_lora_linear_backward") == "torch"
    text = str(explanation)
    assert "cannot: the dtype is torch.float64" in text and "threads" in text
    assert peftkern.stats().calls == {} and peftkern.stats().fallbacks == {}
    served = peftkern.explain("nf4_lora_linear", X64.float(), w, **adapters(), scaling=2.0)
    assert served.chosen("nf4_lora_linear_forward") == "cpu"


def test_explain_under_a_forced_backend(w):
    with peftkern.use_backend("cpu"):
        explanation = peftkern.explain("nf4_linear", X64, w)
    assert explanation.chosen("nf4_lora_linear_forward") is None
    assert "not asked: 'cpu' is forced" in str(explanation)


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_explain_agrees_with_the_call_for_every_function(w, device):
    x, weight = torch.zeros(3, 2, 40, device=device), torch.zeros(20, 40, device=device)
    lora = {k: v.to(device) for k, v in adapters().items()} | {"scaling": 1.0}
    w = w.to(device)
    out = torch.empty(20, 40, device=device)
    calls = [
        ("lora_linear", (x, weight), lora),
        ("nf4_linear", (x, w), {}),
        ("nf4_lora_linear", (x, w), lora),
        ("quantize_nf4", (weight,), {"blocksize": 32}),
        ("quantize_nf4", (weight,), {"double_quant": False}),
        ("dequantize_nf4", (w,), {"dtype": torch.float16}),
        ("dequantize_nf4", (w,), {"out": out}),
    ]
    dora = {**lora, "magnitude": torch.ones(20, device=device)}
    calls += [("dora_linear", (x, weight), dora), ("dora_linear", (x, w), dora)]
    for name, args, kwargs in calls:
        explanation = peftkern.explain(name, *args, **kwargs)
        if device == "meta":
            assert "cannot: tensors are on meta" in str(explanation)
            continue
        peftkern.reset_stats()
        function = dora_linear if name == "dora_linear" else getattr(peftkern, name)
        function(*args, **kwargs)
        assert peftkern.stats().calls
        for op, backend in peftkern.stats().calls:
            assert explanation.chosen(op) == backend


def test_explain_takes_ops_and_refuses_unknown_names():
    assert peftkern.explain("nf4_quantize", X64, 64).chosen("nf4_quantize") == "reference"
    with pytest.raises(ValueError, match=r"op_name: expected one of .*lora_linear.*got 'lora'"):
        peftkern.explain("lora", X64)


def test_device_info_describes_and_never_raises():
    cpu = device_info()
    assert (cpu.type, cpu.threads, cpu.capability) == ("cpu", torch.get_num_threads(), None)
    assert cpu.name and cpu.name in native.describe()
    assert device_info("meta").type == "meta"


def test_meta_tensors_take_the_fakes(w):
    y = peftkern.nf4_linear(torch.zeros(3, 2, 40, device="meta"), w.to("meta"))
    assert y.is_meta and y.shape == (3, 2, 20)
    assert peftkern.stats().calls == {}


# Triton, which serves a GPU: asked first, and passed over on every other kind of device


@pytest.fixture
def no_triton(monkeypatch):
    """A machine on which Triton is not installed."""
    find_spec = importlib.util.find_spec
    device.triton_missing.cache_clear()
    monkeypatch.setattr(
        device.importlib.util,
        "find_spec",
        lambda name, *args: None if name == "triton" else find_spec(name, *args),
    )
    yield
    device.triton_missing.cache_clear()


def test_triton_is_passed_over_on_a_cpu_without_a_word(w, monkeypatch):
    for interpreted in ("0", "1"):
        monkeypatch.setenv("TRITON_INTERPRET", interpreted)
        peftkern.reset_stats()
        peftkern.nf4_linear(torch.zeros(2, 40), w)
        peftkern.dequantize_nf4(w)
        assert {backend for _, backend in peftkern.stats().calls} == {"cpu"}
        assert peftkern.stats().fallbacks == {}


def test_explain_says_why_triton_is_passed_over(w):
    explanation = peftkern.explain("nf4_lora_linear", torch.zeros(2, 40), w, **adapters())
    verdicts = {(op, backend): verdict for op, backend, verdict in explanation.rows}
    for op in ("nf4_lora_linear_forward", "nf4_lora_linear_backward"):
        assert verdicts[op, "triton"] == "cannot: tensors are on cpu"
        assert verdicts[op, "cpu"] == "chosen"


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs Triton")
def test_forced_triton_needs_the_interpreter_on_a_cpu(w, monkeypatch):
    x = torch.zeros(2, 40)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    reason = "'triton' cannot run nf4_lora_linear_forward: tensors are on cpu"
    with unavailable("triton", reason):
        peftkern.nf4_linear(x, w)
    assert peftkern.stats().calls == {}


def test_forced_triton_says_that_it_is_not_installed(w, no_triton, monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    reason = "'triton' cannot run nf4_lora_linear_forward: triton is not installed"
    with unavailable("triton", reason):
        peftkern.nf4_linear(torch.zeros(2, 40), w)
    assert dispatch.unserved(torch.device("cuda")) == "triton is not installed"


@pytest.mark.parametrize("name", ["gfx90a", "gfx942", "gfx950", "gfx1100", "gfx1201", "gfx908"])
def test_triton_serves_amd_where_its_kernels_do_not_spill(name, monkeypatch):
    monkeypatch.setattr(torch.version, "hip", "7.0")
    monkeypatch.setattr(device, "arch", lambda of: name)
    device.triton_missing.cache_clear()
    reason = device.triton_missing(torch.device("cuda"))
    device.triton_missing.cache_clear()
    if name in ("gfx90a", "gfx942", "gfx950"):
        assert reason is None
    else:
        assert reason == f"{name} is none of gfx90a, gfx942, gfx950, where no kernel spills"


def test_what_serves_no_device_of_a_kind():
    assert dispatch.unserved(torch.device("cpu")) is None
    assert dispatch.unserved(torch.device("xpu")) == "no kernel for xpu"


def test_forced_triton_lacks_an_op():
    absmax = torch.rand(300)
    with unavailable("triton", "has no back end 'triton'"):
        ops.nf4_quantize_absmax(absmax, absmax.mean(), torch.linspace(-1, 1, 256), 256)


@pytest.fixture
def tables(tmp_path, monkeypatch):
    """A folder of measured tables instead of the one that ships."""
    cached = (configs.load, configs.fastest, configs.layer_of)
    monkeypatch.setattr(configs, "TUNED", tmp_path)
    for function in cached:
        function.cache_clear()
    yield tmp_path
    for function in cached:
        function.cache_clear()


def names(candidates: tuple) -> list[str]:
    return [candidate.name for candidate in candidates]


def test_measured_back_end_is_asked_first(tables, monkeypatch):
    op = "nf4_lora_linear_forward"
    sample = Sample(8, 4096, 4096)
    monkeypatch.setattr(dispatch, "refusal_library", lambda: "it is not built")
    counted = names(dispatch.preferred(op, sample.arguments(op), "sm90"))
    assert counted == names(dispatch.CANDIDATES[op])
    table = {"nf4_lora_linear_forward/M8/r16/16-bit": {"4096x4096": "cuda"}}
    (tables / "sm90.json").write_text(json.dumps({"back_ends": table}))
    configs.load.cache_clear()
    configs.fastest.cache_clear()
    assert names(dispatch.preferred(op, sample.arguments(op), "sm90"))[0] == "cuda"
    assert sorted(counted) == sorted(names(dispatch.preferred(op, sample.arguments(op), "sm90")))
    assert names(dispatch.preferred(op, sample.arguments(op), "sm80")) == counted
    other = Sample(64, 4096, 4096).arguments(op)
    assert names(dispatch.preferred(op, other, "sm90")) == counted


@pytest.mark.parametrize("reason", [None, "it is not built"])
def test_cuda_is_asked_first_for_few_rows_where_it_is_built(reason, tables, monkeypatch):
    monkeypatch.setattr(dispatch, "refusal_library", lambda: reason)

    def first(M: int, op: str = "nf4_lora_linear_forward") -> str:
        arguments = Sample(M, 4096, 4096).arguments(op)
        return names(dispatch.preferred(op, arguments, "sm90"))[0]

    few = "triton" if reason else "cuda"
    assert [first(M) for M in (1, 32, 33, 512)] == [few, few, "triton", "triton"]
    assert first(1, "nf4_lora_linear_backward") == first(1, "lora_linear_forward") == "triton"
    table = {"nf4_lora_linear_forward/M1/r16/16-bit": {"4096x4096": "triton"}}
    (tables / "sm90.json").write_text(json.dumps({"back_ends": table}))
    configs.load.cache_clear()
    configs.fastest.cache_clear()
    assert first(1) == "triton"


@pytest.mark.parametrize("op", dispatch.MEASURABLE)
def test_sizes_of_a_call_are_those_of_its_arguments(op):
    """Whatever the op's schema calls them; a conversion is one long row."""
    problem = dispatch.problem_of(op, Sample(3, 96, 128, r=5).arguments(op))
    assert problem.kernel == op.removesuffix("_out")
    if op.startswith(("nf4_quantize", "nf4_dequantize")):
        expected = (1, 96 * 128, 1, 1, 16)
    elif op == "low_rank_svd":
        expected = (1, 96, 128, 5, 32)
    else:
        expected = (1 if op.endswith("dora_norm") else 3, 96, 128, 5, 16)
    found = (problem.M, problem.N, problem.K, problem.r, problem.bits)
    assert found == expected


def test_sizes_of_calls_without_adapters_and_without_columns():
    op = "nf4_lora_linear_forward"
    assert dispatch.problem_of(op, Sample(3, 96, 128, lora=False).arguments(op)).r == 1
    x, *rest = Sample(3, 96, 128).arguments("lora_linear_forward")
    assert dispatch.problem_of("lora_linear_forward", (x[:, :0], *rest)).M == 0


def test_layers_are_left_to_peft_where_it_measured_faster(tables, monkeypatch):
    """Reentrant checkpointing runs a layer in training without and with gradients: one answer."""
    monkeypatch.setattr(dispatch, "arch", lambda device: "sm90")  # of a device that is no CPU
    table = {"lora_linear/training/M8/r16/16-bit": {"64x64": "PEFT"}}
    (tables / "sm90.json").write_text(json.dumps({"layers": table}))
    x = torch.empty(2, 4, 64, dtype=torch.bfloat16, device="meta")

    def slower(training: bool, **changes) -> bool:
        call = {"op": "lora_linear", "x": x, "shape": (64, 64), "r": 16, **changes}
        return dispatch.is_slower(**call, training=training)

    assert slower(True) and slower(False)  # gradients are on
    with torch.no_grad():
        assert slower(True) and not slower(False)
    assert not slower(True, op="nf4_lora_linear") and not slower(True, r=64)
    assert not slower(True, shape=(64, 129)) and not slower(True, x=x[0])
    with peftkern.use_backend("triton"):
        assert not slower(True)
    monkeypatch.setattr(dispatch, "arch", lambda device: pytest.fail("a CPU has no table"))
    assert not slower(True, x=torch.zeros(8, 64, dtype=torch.bfloat16))


def test_call_and_explain_obey_the_table(tables, monkeypatch):
    """As on a GPU: the last resort comes first where it measured faster."""
    op, sample = "nf4_quantize", Sample(1, 32, 64)
    table = {"nf4_quantize/M1/r16/16-bit": {"2048x1": "reference"}}
    (tables / "sm90.json").write_text(json.dumps({"back_ends": table}))
    args = (torch.randn(32, 64, dtype=torch.bfloat16), 64)
    monkeypatch.setitem(dispatch.CANDIDATES, op, dispatch.preferred(op, args, "sm90"))
    assert dispatch.explain({op: sample.arguments(op)}).chosen(op) == "reference"
    dispatch.call(op, args)
    assert peftkern.stats().calls == {(op, "reference"): 1} and not peftkern.stats().fallbacks
