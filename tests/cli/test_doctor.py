"""`peftkern doctor` on healthy, bare and broken installations."""

from __future__ import annotations

import contextlib
import io
import json
import shutil
import subprocess
import sys
from collections import defaultdict
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from command_line import told
from paths import ROOT
from peft_models import K, lora_net, make_linear4bit, patched_copy
from processes import SITE, run_python_over, without
from waiting import wait_until

import peftkern
from peftkern.backends import counts, dispatch, ops
from peftkern.backends.cpu import module as native
from peftkern.cli import main
from peftkern.integrations import package_probes
from peftkern.integrations.packages import OPTIONAL, Answer, Version, accepted, importing, release
from peftkern.tools.doctor import doctor, findings, self_test
from peftkern.tools.doctor.doctor import diagnose

FIELDS = {  # of `peftkern doctor --json`, which reports of bugs quote
    "machine": [
        "peftkern",
        "folder",
        "python",
        "system",
        "cpu",
        "threads",
        "torch_cuda",
        "torch_hip",
        "gpus",
    ],
    "backends": ["cpu", "triton", "cuda"],
    "served": ["op", "device", "backend", "others"],
    "formats": ["format", "device", "backend"],
    "versions": ["name", "version", "accepted", "imports", "error"],
    "probes": ["package", "probe", "answer", "cause", "cure"],
    "tested": ["function", "dtype", "device", "backends", "share", "worst", "error", "ok"],
    "trust": ["mode", "folder", "forgettable", "crossovers", "crossovers_are", "devices"],
    "findings": ["id", "severity", "cause", "cure"],
}
PEERS = ("peft", "transformers", "bitsandbytes", "accelerate", "trl", "triton")


@pytest.fixture
def bare(tmp_path) -> Path:
    """A folder of packages with everything that is installed here but the peers."""
    return without(tmp_path / "site", *PEERS)


def examine(site: Path, *folders: Path, **environment: str) -> tuple[int, dict]:
    """Exit status and answer of a doctor that sees these folders of packages alone."""
    command = ("-m", "peftkern", "doctor", "--json")
    done = run_python_over(site, *command, folders=folders, **environment)
    assert done.stderr == ""
    return done.returncode, json.loads(done.stdout)


def add_package(site: Path, name: str, version: str, code: str | None = None) -> None:
    """A package of that code, or what an installer says of one that is there."""
    if code is not None:
        (site / name).mkdir()
        (site / name / "__init__.py").write_text(code)
    info = site / f"{name}-{version}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")


def wrong(answer: dict) -> list[str]:
    return [one["cause"] for one in answer["findings"] if one["severity"] == "wrong"]


@pytest.fixture(scope="module")
def diagnosis() -> doctor.Diagnosis:
    """Of this machine; a doctor in a process of its own is among the tests of other ones."""
    return diagnose()


@pytest.fixture(scope="module")
def here(diagnosis) -> subprocess.CompletedProcess:
    """What a doctor of this machine says."""
    said, error = io.StringIO(), io.StringIO()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(doctor, "diagnose", lambda: diagnosis)
        patch.setenv("COLUMNS", "80")
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(error):
            status = main(["doctor"])
    return subprocess.CompletedProcess("doctor", status, said.getvalue(), error.getvalue())


def test_this_machine_is_healthy(here):
    done = here
    assert done.returncode == 0, done.stdout
    lines = done.stdout.splitlines()
    assert lines[0] == f"peftkern {peftkern.__version__}: healthy" and done.stderr == ""
    assert len(lines) <= 30 and max(map(len, lines)) <= 80  # a screen
    said = " ".join(done.stdout.split())
    tests = len([result for result in self_test.run("cpu") if result.ok])
    assert f"{len(ops.SCHEMAS)} ops by cpu; {tests} of {tests} self-tests right" in said
    assert f"; {native.cpu_isa()}; " in said and f"peft {doctor.installed_version('peft')}" in said
    assert "tensors are on cpu" not in said
    assert "4-bit bases on cpu: nf4, fp4, mxfp4, nvfp4, int4 by cpu" in said


def test_details_are_told_when_asked(diagnosis, capfd, monkeypatch):
    """After the same screen, as wide; also where there is no finding, not even a note."""
    monkeypatch.setattr(doctor, "diagnose", lambda: replace(diagnosis, findings=[]))
    lines = told(capfd, "doctor", "--verbose").splitlines()
    assert lines[0] == f"peftkern {peftkern.__version__}: healthy"
    assert max(len(line) for line in lines if "/" not in line) <= 80
    titles = ("Machine", "Backends", "Who serves", "Packages", "Known", "Self-test", "Trust")
    assert all(any(line.startswith(title) for line in lines) for title in titles)
    peft = ["peft", doctor.installed_version("peft"), accepted("peft"), "yes"]
    assert peft in [line.split() for line in lines]
    assert [line.split()[-1] for line in lines if line.startswith("nf4_quantize ")] == ["cpu"]


def test_missing_peers_are_not_wrong(bare):
    status, answer = examine(bare)
    assert (status, answer["healthy"], wrong(answer)) == (0, True, [])
    assert answer["backends"]["triton"] == {"why": "triton is not installed", "version": None}
    versions = {v["name"]: v for v in answer["versions"]}
    assert versions.keys() == {"torch", *PEERS, *OPTIONAL}
    assert {versions[name]["version"] for name in PEERS} == {None}
    assert versions["peft"]["accepted"] == accepted("peft") != ""
    assert {row["op"] for row in answer["served"]} == set(ops.SCHEMAS)
    assert {row["backend"] for row in answer["served"] if row["device"] == "cpu"} == {"cpu"}
    on_cpu = {row["format"]: row["backend"] for row in answer["formats"] if row["device"] == "cpu"}
    assert on_cpu == dict.fromkeys(("nf4", "fp4", "mxfp4", "nvfp4", "int4"), "cpu")
    assert all(result["ok"] for result in answer["tested"])
    assert answer["trust"]["mode"] == "always" and answer["trust"]["crossovers"]["dense"] > 0
    assert answer["trust"]["devices"][0]["device"] == "cpu"
    assert answer["backends"]["cpu"]["in_use"] == native.cpu_isa()
    assert answer["probes"] == []
    for name, fields in FIELDS.items():
        value = answer[name] if isinstance(answer[name], dict) else (answer[name] or [None])[0]
        assert value is None or list(value) == fields, name
    assert answer.keys() == {"healthy", "tested_seconds", *FIELDS}


@pytest.mark.slow
def test_broken_and_old_peers_are_wrong_and_nothing_fails(bare, tmp_path):
    add_package(bare, "peft", "0.16.9", "")
    add_package(bare, "transformers", "9.0", "import no_such_module")
    add_package(bare, "accelerate", "2.0", "import os\nos._exit(7)")
    (bare / f"numpy-{doctor.installed_version('numpy')}.dist-info").unlink()
    add_package(bare, "numpy", "2.4.1")
    status, answer = examine(bare, TRITON_INTERPRET="1", PEFTKERN_BACKEND="reference")
    assert (status, answer["healthy"]) == (1, False)
    assert wrong(answer) == [
        "peft 0.16.9 is older than 0.17, the oldest that is supported",
        "transformers does not work: ModuleNotFoundError: No module named 'no_such_module'",
        "accelerate does not work: importing it ends Python with status 7",
        "TRITON_INTERPRET=1 with numpy 2.4.1: Triton's interpreter needs one before 2.4",
    ]
    assert all(finding["cure"] for finding in answer["findings"])
    assert {result["backends"] for result in answer["tested"]} == {"reference"}


def test_bitsandbytes_without_its_library_is_told(tmp_path, monkeypatch):
    libraries = shutil.ignore_patterns("libbitsandbytes_*")
    shutil.copytree(SITE / "bitsandbytes", tmp_path / "bitsandbytes", ignore=libraries)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("TORCHDYNAMO_DISABLE", "1")  # without its library it compiles what it does
    with importing(["bitsandbytes"]) as peers:
        error = peers(300.0)[0]["bitsandbytes"]
    assert error.startswith("its native library is not usable: ")
    version = Version("bitsandbytes", "0.50", ">=0.46", False, error)
    (finding,) = findings.version_findings(version)
    assert error in finding.cause and "force-reinstall" in finding.cure
    severity = "wrong" if torch.cuda.is_available() else "note"  # a CPU has slower ways
    assert finding.severity == severity


def _gradient(model: torch.nn.Module) -> torch.Tensor:
    x = torch.linspace(-1, 1, 4 * K).view(4, K).bfloat16().requires_grad_()
    model.train()(x).float().square().sum().backward()
    return x.grad.float()


def _error_after_an_evaluation(model: torch.nn.Module) -> float:
    """Of the gradient of the input, relative."""
    before = _gradient(model)
    with torch.no_grad():
        model.eval()(torch.ones(1, K, dtype=torch.bfloat16))
    return ((_gradient(model) - before).norm() / before.norm()).item()


def test_gradients_that_bitsandbytes_loses_after_an_evaluation_are_told(here):
    """And count as nothing wrong: patched models are right."""
    model = lora_net(make_linear4bit(torch.bfloat16, bias=False), adapter_dtype=torch.bfloat16)
    assert _error_after_an_evaluation(patched_copy(model)) == 0.0
    said, lost = " ".join(here.stdout.split()), _error_after_an_evaluation(model) > 0.5
    assert ("training after an evaluation goes wrong" in said) == lost
    assert ("peftkern.patch before the first evaluation" in said) == lost


def test_what_goes_wrong_with_experts_is_told(here):
    """Each defect that its probe finds in these versions, with its remedy, as a note."""
    said = " ".join(here.stdout.split())
    for name in ("peft", "transformers"):
        for _, answer, cause, cure in package_probes.answers(name):
            if answer == "present":
                assert f"note {name} {doctor.installed_version(name)} {cause}" in said
                assert f"do {cure}" in said


def test_missing_native_library_is_wrong(bare, tmp_path):
    source = tmp_path / "source"
    built = shutil.ignore_patterns("*.so", "__pycache__")
    shutil.copytree(ROOT / "peftkern", source / "peftkern", ignore=built)
    status, answer = examine(bare, source)
    assert status == 1
    assert "the native library peftkern._cpu is not usable" in answer["backends"]["cpu"]["why"]
    assert any("plain torch serves it" in what for what in wrong(answer))
    served = {name for r in answer["tested"] for name in r["backends"].split("+")}
    assert all(r["ok"] for r in answer["tested"]) and served == {"torch", "reference"}


@pytest.mark.parametrize(
    ("name", "value", "complaint", "tested"),
    [
        ("PEFTKERN_BACKEND", "gpu", "PEFTKERN_BACKEND: expected one of", False),
        pytest.param(
            *("PEFTKERN_BACKEND", "triton", "on cpu (triton: tensors are on cpu)", True),
            marks=pytest.mark.more,
        ),
    ],
)
def test_wrong_switches_are_wrong(bare, name, value, complaint, tested):
    status, answer = examine(bare, **{name: value})
    assert status == 1
    assert any(complaint in what for what in wrong(answer))
    assert bool(answer["tested"]) == tested
    assert not any("failed" in what for what in wrong(answer))


def test_instruction_set_that_is_not_here_is_wrong(monkeypatch):
    monkeypatch.setenv("PEFTKERN_CPU_ISA", "mmx")
    with native.use_isa(None):
        (finding,) = findings.environment_findings()
    assert finding.id == "switch"
    assert finding.cause.startswith("PEFTKERN_CPU_ISA: expected one of")


@pytest.mark.parametrize("told_by", ["the environment", "accelerate config"])
def test_fsdp_is_told_of_the_storage_it_shards(told_by, tmp_path, monkeypatch):
    monkeypatch.delenv("PEFTKERN_CPU_ISA", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("HF_HOME", "~")  # which accelerate expands
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "false")
    assert list(findings.environment_findings()) == []
    if told_by == "the environment":
        monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    else:
        (tmp_path / "accelerate").mkdir()
        told = "compute_environment: LOCAL_MACHINE\ndistributed_type: FSDP\n"
        (tmp_path / "accelerate" / "default_config.yaml").write_text(told)
    (finding,) = findings.environment_findings()
    assert (finding.id, finding.severity) == ("fsdp", "note")
    assert "bnb_4bit_quant_storage=torch.bfloat16" in finding.cure


def test_stale_or_weak_build_is_found():
    (finding,) = findings.build_findings({"why": None, "compiled_in": None})
    assert finding.severity == "wrong" and "older sources" in finding.cause
    found = findings.build_findings({"why": None, "compiled_in": ["scalar"]})
    assert [f.severity for f in found] == (["note"] if findings.machine_isas() else [])
    assert set(findings.machine_isas()) >= set(native.cpu_isas()) - {"scalar"}


@pytest.mark.parametrize(("pure", "found"), [("true", "pure"), ("false", "no_native")])
def test_native_code_that_was_not_wanted_is_no_fault(tmp_path, monkeypatch, pure, found):
    """The installed wheel tells it, as pip records it."""
    add_package(tmp_path, "peftkern", "0")
    told = f"Wheel-Version: 1.0\nRoot-Is-Purelib: {pure}\nTag: py3-none-any\n"
    (tmp_path / "peftkern-0.dist-info/WHEEL").write_text(told)
    monkeypatch.syspath_prepend(tmp_path)
    (finding,) = findings.build_findings({"why": "there is none", "compiled_in": None})
    assert (finding.id, finding.severity == "note") == (found, found == "pure")
    assert "plain torch serves" in finding.cause


def test_package_that_takes_too_long_is_given_up(tmp_path, monkeypatch):
    begun = tmp_path / "begun"
    (tmp_path / "quick_peer.py").write_text("print('[1, 2]')")
    (tmp_path / "slow_peer.py").write_text(
        f"import time\nopen({str(begun)!r}, 'w').close()\ntime.sleep(3600)"
    )
    monkeypatch.syspath_prepend(tmp_path)
    with importing(["quick_peer", "slow_peer", "third_peer"]) as peers:
        wait_until(begun.exists)
        answers = peers(0.1)
    slow = "importing it takes more than 0.1 s"
    assert answers == ({"quick_peer": "", "slow_peer": slow}, [])


def test_probe_that_takes_the_process_down_is_told(tmp_path, monkeypatch):
    """The package itself imports, and stays healthy; its later probes and packages are unknown."""
    (tmp_path / "peft.py").write_text(
        "import os\ndef prepare_model_for_kbit_training(*args, **options): os._exit(9)"
    )
    (tmp_path / "bitsandbytes.py").write_text("")
    monkeypatch.syspath_prepend(tmp_path)
    with importing(["peft", "transformers"]) as peers:
        errors, answers = peers(300.0)
    assert errors == {"peft": ""}
    ended = Answer("peft", "wide_experts", "unknown", "trying it ends Python with status 9", "")
    assert answers == [ended]
    (finding,) = findings.probe_findings(answers, {"peft": "0.99"})
    assert (finding.id, finding.severity) == ("untried", "note")
    assert finding.cause == f"peft 0.99: probe wide_experts tells nothing: {ended.cause}"


@pytest.fixture(scope="module")
def cases_of() -> dict[str, list]:
    """The self-test's cases by the ops that they call, each of which passes."""
    found = defaultdict(list)
    with pytest.MonkeyPatch.context() as patch:
        for case in self_test._CASES:
            patch.setattr(self_test, "_CASES", [case])
            counts.reset_stats()
            assert all(result.ok for result in self_test.run("cpu"))
            for op in {op for op, _ in counts.stats().calls}:
                found[op].append(case)
    return found


def test_self_test_reaches_every_op(cases_of):
    assert cases_of.keys() == set(ops.SCHEMAS)


@pytest.mark.parametrize("isa", native.cpu_isas())
def test_self_test_passes_on_every_instruction_set(isa):
    with native.use_isa(isa):
        assert [result for result in self_test.run("cpu") if not result.ok] == []


def _off(value):
    """A result that is slightly wrong: by less than a percent, or by one bit."""
    if isinstance(value, (tuple, list)):
        return type(value)(map(_off, value))
    if value.dtype is torch.bool:
        return ~value
    return value * 1.005 if value.is_floating_point() else value ^ 1


def native_candidate(op: str) -> dispatch.Candidate:
    return next(candidate for candidate in dispatch.CANDIDATES[op] if candidate.name == "cpu")


@pytest.mark.parametrize("op", sorted(ops.SCHEMAS))
def test_self_test_finds_a_kernel_that_is_slightly_wrong(op, cases_of, monkeypatch):
    """In one of those that call it."""
    right = native_candidate(op).run
    arguments = getattr(torch.ops.peftkern, op).default._schema.arguments

    def run_wrongly(*args):
        result = right(*args)
        if result is None:  # what writes to its arguments
            for value, argument in zip(args, arguments, strict=True):
                written = argument.alias_info is not None
                for tensor in (value if isinstance(value, list) else [value]) if written else ():
                    if tensor.is_floating_point():
                        tensor.mul_(1.005)
            return None
        return _off(result)

    monkeypatch.setattr(native_candidate(op), "run", run_wrongly)
    monkeypatch.setattr(self_test, "_CASES", cases_of[op])
    found = next((result for result in self_test.run("cpu") if not result.ok), None)
    assert found, op
    finding = next(findings.test_findings([found]))
    assert finding.severity == "wrong" and found.function in finding.cause


def test_self_test_tells_what_a_kernel_raises(cases_of, monkeypatch):
    def fail(*args):
        raise RuntimeError("broken\nkernel")

    monkeypatch.setattr(self_test, "_CASES", cases_of["low_rank_svd"])
    monkeypatch.setattr(native_candidate("low_rank_svd"), "run", fail)
    (result,) = [result for result in self_test.run("cpu") if not result.ok]
    assert (result.function, result.error) == ("low_rank_svd", "RuntimeError: broken kernel")


def test_compiler_and_headers_are_looked_for(tmp_path):
    headers, compiler = findings.compiler_findings(tmp_path, "no-such-compiler")
    assert (headers.severity, compiler.severity) == ("wrong", "wrong")
    assert "Python.h" in headers.cause and "no-such-compiler" in compiler.cause
    (tmp_path / "Python.h").touch()
    assert list(findings.compiler_findings(tmp_path, sys.executable)) == []


def test_versions_compare_by_their_numbers():
    assert release("2.13.0+cpu") == (2, 13, 0)
    assert release("0.9.2") < release("0.17") < release("0.17.0.dev1")
    old = Version("torch", "2.8", ">=2.10")
    assert [finding.id for finding in findings.version_findings(old)] == ["old"]
    assert list(findings.version_findings(replace(old, version="2.10.0"))) == []
    assert list(findings.version_findings(replace(old, accepted=None))) == []


def test_deepspeed_that_is_installed_is_told_of():
    (finding,) = findings.deepspeed_findings("0.19.8")
    assert finding.severity == "note" and "deepspeed 0.19.8 clips" in finding.cause
    assert list(findings.deepspeed_findings(None)) == []
