"""The CUDA kernels through nvcc, without a GPU: what they use, and the module that holds them."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from paths import BENCH, ROOT

sys.path.append(str(BENCH))

import cuda_resources

NVCC = cuda_resources.find_nvcc()
needs_nvcc = pytest.mark.skipif(NVCC is None, reason="nvcc, CUDA's compiler, is not installed")


def run(*command: str | Path, **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*map(str, command)], cwd=ROOT, env=os.environ | env, capture_output=True, text=True
    )


def rows(report: str) -> dict[str, list[str]]:
    """Numbers by "sm_80/file/kernel"."""
    lines = (line.split() for line in report.splitlines()[2:])
    return {name: numbers for name, *numbers in lines}


# What the kernels use


# `make cuda` compiles for the others, too.
@pytest.fixture(scope="module", params=["90a", pytest.param("80", marks=pytest.mark.long)])
def report(request, tmp_path_factory) -> tuple[str, str]:
    """An architecture, and what the script says of it; it fails if anything spills."""
    path = tmp_path_factory.mktemp("cuda") / "report.txt"
    answer = run(sys.executable, "bench/cuda_resources.py", "--archs", request.param, "--out", path)
    assert answer.returncode == 0, answer.stdout + answer.stderr
    return request.param, path.read_text(encoding="utf-8")


@needs_nvcc
def test_no_kernel_spills_or_has_a_stack(report):
    arch, found = report[0], rows(report[1])
    files = {name.split("/")[1] for name in found if name.startswith(f"sm_{arch}/")}
    wanted = {path.stem for path in (ROOT / "csrc" / "cuda").glob("*.cu")}
    assert files == {stem for stem in wanted if arch == "90a" or not stem.endswith("_sm90a")}
    for name, (registers, spills, stack, _) in found.items():
        assert 0 < int(registers) <= 255 and spills == stack == "0", name


@needs_nvcc
def test_committed_report_is_of_these_kernels(report):
    (arch, text), committed = report, cuda_resources.REPORT.read_text(encoding="utf-8")
    known = {n: row for n, row in rows(committed).items() if n.startswith(f"sm_{arch}/")}
    assert known.keys() == rows(text).keys(), "run `make cuda` and look at the difference"
    if committed.splitlines()[0] == text.splitlines()[0]:  # the same compiler
        assert known == rows(text), "run `make cuda` and look at the difference"


def test_committed_report_covers_every_architecture():
    committed = rows(cuda_resources.REPORT.read_text(encoding="utf-8"))
    usual = {f"sm_{arch}" for arch in cuda_resources.USUAL}
    assert {name.split("/")[0] for name in committed} == usual
    text = (ROOT / "CMakeLists.txt").read_text(encoding="utf-8")
    assert tuple(re.search(r"CUDA_USUAL_ARCHS ([^)]*)\)", text)[1].split()) == cuda_resources.USUAL
    for name, (_, spills, stack, _) in committed.items():
        assert spills == stack == "0", name


# The report's script


PTXAS = """\
ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function '_Z1fPf' for 'sm_80'
ptxas info    : Function properties for _Z1fPf
    16 bytes stack frame, 8 bytes spill stores, 12 bytes spill loads
ptxas info    : Used 40 registers, used 1 barriers, 512 bytes smem, 364 bytes cmem[0]
ptxas info    : Function properties for _Z1gv
    24 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
"""


def test_numbers_are_read_from_ptxas():
    usage = cuda_resources.Usage
    assert cuda_resources.parse(PTXAS) == {
        "_Z1fPf": usage(40, 12, 16, 512),
        "_Z1gv": usage(0, 0, 24, 0),
    }
    with pytest.raises(ValueError, match="in a form that is not known"):
        cuda_resources.parse(PTXAS.replace("Used 40 registers", "Registers: 40"))


def test_names_are_short():
    for long, short in (
        (
            "void peftkern::(anonymous namespace)::f<peftkern::BF16, true>(float*, int)",
            "f<BF16,true>",
        ),
        ("void f<(peftkern::DType)1, 64>(void (*)(int))", "f<(DType)1,64>"),
        ("g", "g"),
    ):
        assert cuda_resources.short_name(long) == short


@pytest.fixture
def small(tmp_path, monkeypatch):
    """The script on one file of this content: its exit status, and the report or None."""
    monkeypatch.setattr(cuda_resources, "CUDA", tmp_path)
    monkeypatch.setattr(cuda_resources, "CACHE", tmp_path / "cache")

    def run_on(source: str) -> tuple[int, str | None]:
        (tmp_path / "small.cu").write_text(source)
        path = tmp_path / "report.txt"
        path.unlink(missing_ok=True)
        status = cuda_resources.main(["--archs", "80", "--out", str(path)])
        return status, path.read_text() if path.exists() else None

    return run_on


@needs_nvcc
def test_stack_and_errors_fail_the_run(small, capsys):
    good = "__global__ void f(float* p) { p[threadIdx.x] = 1; }"
    status, report = small(good)
    assert status == 0 and list(rows(report)) == ["sm_80/small/f"]
    status, report = small(
        "__global__ void f(float* p, int n) {"
        "  float v[64];"
        "  for (int i = 0; i < 64; ++i) v[i] = p[i];"
        "  for (int i = 0; i < 64; ++i) v[n * i & 63] += v[i];"
        "  p[0] = v[n & 63]; }"
    )
    assert status == 1 and rows(report)["sm_80/small/f"][2] == "256"
    assert "sm_80/small/f: spills 0 bytes, stack of 256 bytes" in capsys.readouterr().out
    status, report = small(good + " int x = wrong;")
    assert status == 1 and report is None
    assert "small.cu for sm_80: " in (said := capsys.readouterr().out)
    assert '"wrong" is undefined' in said


def test_missing_nvcc_is_one_line(monkeypatch, capsys):
    monkeypatch.setattr(cuda_resources, "find_nvcc", lambda: None)
    assert cuda_resources.main([]) == 2
    assert capsys.readouterr().err == "cuda_resources.py: error: found no nvcc\n"


# The module


LOAD = """
import importlib.util, sys
spec = importlib.util.spec_from_file_location("_cuda", sys.argv[1])
m = importlib.util.module_from_spec(spec)
spec.loader.exec_module(m)
print(*m.architectures(), m.emulated, m.device_count(), m.runtime_version(), m.driver_version())
for call in (lambda: m.nf4_quantize(0, 0, 0, -1, 64, 0, 0, 0, 0),
             lambda: m.nf4_quantize(0, 1, 0, 64, 64, 1, 32, 1, 1)):
    try:
        call()
    except (ValueError, RuntimeError) as error:
        print(type(error).__name__, error)
"""


@needs_nvcc
@pytest.mark.skipif(torch.cuda.is_available(), reason="is about a machine without a GPU")
def test_module_builds_without_a_warning_and_loads_without_a_driver():
    folder = ROOT / "build" / "cuda_test"
    cmake = shutil.which("cmake", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    ninja = shutil.which("ninja", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    options = ["PEFTKERN_CUDA=1", "PEFTKERN_CUDA_ARCHS=80", "PEFTKERN_WERROR=ON"]
    options += [f"CMAKE_MAKE_PROGRAM={ninja}", f"Python_EXECUTABLE={sys.executable}"]
    # The report above is of optimized kernels, and ptxas's warnings of those fail it.
    options += ["CMAKE_CUDA_FLAGS=-Xcicc=-O0 -Xptxas=-O0", "CMAKE_CXX_FLAGS_RELEASE=-O0"]
    for command in (
        [cmake, "-S", ROOT, "-B", folder, "-G", "Ninja", *(f"-D{option}" for option in options)],
        [cmake, "--build", folder, "--target", "_cuda"],
    ):
        answer = run(*command)
        assert answer.returncode == 0, answer.stdout + answer.stderr
    answer = run(sys.executable, "-c", LOAD, folder / "_cuda.so")
    assert answer.returncode == 0, answer.stdout + answer.stderr
    facts, refused, not_launched = answer.stdout.splitlines()
    assert re.fullmatch(r"sm_80 compute_80 False 0 1[2-9]\d{3} \d+", facts)
    assert refused.startswith("ValueError numel: got -1, expected")
    assert re.fullmatch(r"RuntimeError CUDA error \d+: .*", not_launched)
