"""The experiments of bench_formulations.py, as far as a machine without a GPU can show them: dense
products in Triton, and tables that decode NF4."""

from __future__ import annotations

import json
import os
import subprocess

import pytest
import torch
from processes import run_code
from scripts import run_here
from tolerances import FLOOR_MAX

pytest.importorskip("triton")

import bench_formulations
import cuda_resources
import lut
import record_tables
import specs
import triton_gemm

from peftkern.tools.bench import machine, terminal

ROOT = machine.ROOT
CPU = torch.device("cpu")
TESTS = ROOT / "csrc" / "tests"
NVCC = cuda_resources.find_nvcc()
SMALL = triton_gemm.Tile(32, 64, 16, warps=4, stages=2)


@pytest.mark.skipif(torch.cuda.is_available(), reason="the interpreter is off beside a GPU")
@pytest.mark.parametrize("size", [(1, 8, 8), (32, 64, 16), (33, 136, 24), (300, 72, 40)])
@pytest.mark.parametrize("run", [triton_gemm.descriptors, triton_gemm.pointers])
def test_products_are_right_at_edges_and_across_groups(run, size):
    m, n, k = size
    generator = torch.Generator().manual_seed(0)
    x, w = (torch.randn(rows, k, generator=generator).bfloat16() for rows in (m, n))
    exact = x.double() @ w.double().T
    error = (run(x, w, SMALL).double() - exact).abs().max() / exact.abs().max()
    assert error.item() <= FLOOR_MAX[torch.bfloat16]


COMPILE = """
import sys
sys.path.append("bench")
import re, triton, triton_gemm as gemm
from peftkern.kernels.aot import TARGETS, _read_nvidia
from triton.compiler import ASTSource
for kernel in (gemm._descriptors_kernel, gemm._pointers_kernel):
    for tile in (gemm.WIDE, gemm.SQUARE):
        constants = {"PROGRAMS": 132, **tile.constants()}
        types = {name: "*bf16" if name.endswith("ptr") else "i32" for name in kernel.arg_names}
        types |= dict.fromkeys(constants, "constexpr")
        aligned = {(i,): [["tt.divisibility", 16]] for i, t in enumerate(types.values())
                   if t != "constexpr"}
        places = {(kernel.arg_names.index(name),): v for name, v in constants.items()}
        source = ASTSource(kernel, types, places, aligned)
        done = triton.compile(source, target=TARGETS["sm90"], options=tile.launch())
        used = _read_nvidia(done)
        words = ("wgmma.mma_async", "cp.async.bulk.tensor", "cp.async.cg")
        print(used.spills, used.shared, *(int(word in done.asm["ptx"]) for word in words))
"""


def test_products_compile_for_tensor_cores_and_the_tma_unit():
    """Without spills and within an sm_90's shared memory: no straw man beside cuBLAS."""
    said = run_code(COMPILE, TRITON_INTERPRET="0")
    found = [list(map(int, line.split())) for line in said.splitlines()]
    assert [row[2:] for row in found] == 2 * [[1, 1, 0]] + 2 * [[1, 0, 1]]
    assert all(spills == 0 and shared <= 227 << 10 for spills, shared, *_ in found)


@pytest.fixture(scope="module")
def emulated(tmp_path_factory) -> lut.Library:
    """bench/lut.cu compiled for a CPU, as the kernels of csrc/cuda are."""
    path = tmp_path_factory.mktemp("lut") / "lut.so"
    command = [os.environ.get("CXX", "g++"), "-std=c++17", "-O1", "-shared", "-fPIC"]
    command += ["-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas", "-DPEFTKERN_CUDA_EMULATED=1"]
    command += ["-include", str(TESTS / "cuda_emulation.h"), f"-I{cuda_resources.CUDA}"]
    command += [f"-I{ROOT / 'csrc' / 'include'}", "-x", "c++", str(lut.SOURCE)]
    command += [str(TESTS / "cuda_emulation.cpp"), "-o", str(path)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return lut.Library(path)


@pytest.mark.parametrize("name", lut.DECODERS)
def test_every_table_gives_the_codebooks_bits(name, emulated, monkeypatch):
    assert emulated.wrong(name, CPU) is None
    other = type(emulated._values)(*emulated._values)
    other[9] ^= 1
    monkeypatch.setattr(emulated, "_values", other)
    assert "differ from the codebook's" in emulated.wrong(name, CPU)


def test_an_unknown_table_is_an_error(emulated, monkeypatch):
    monkeypatch.setattr(lut, "DECODERS", (*lut.DECODERS, "more"))
    with pytest.raises(RuntimeError, match=r"more.*-1"):
        emulated.decode("more", 1, CPU)


@pytest.mark.skipif(NVCC is None, reason="nvcc, CUDA's compiler, is not installed")
def test_tables_compile_for_an_h200_without_spills(tmp_path):
    path = tmp_path / "lut.so"
    command = [*lut.command(NVCC, "sm_90", path), "-Xptxas=-v", "-Werror=all-warnings"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = cuda_resources.parse(done.stdout + done.stderr)
    assert len(found) == len(lut.DECODERS)
    assert all(used.spills == used.stack == 0 and used.registers <= 64 for used in found.values())
    assert lut.Library(path).threads == 1024


def test_without_a_gpu_or_nvcc_the_reason_is_recorded(tmp_path, monkeypatch):
    noted: dict = {}
    lut.ask(specs.Options(), None, lambda **facts: noted.update(facts))
    assert noted["said"] == "not measured" and "GPU" in noted["stopped"] and not noted["decoders"]
    line = terminal.answer({"name": "formulations/lut/bf16", **noted})
    assert line == f"formulations/lut/bf16: not measured; {noted['stopped']}"
    assert f"not measured: {noted['stopped']}" in record_tables.decoders_table([noted])
    monkeypatch.setattr(cuda_resources, "find_nvcc", lambda: None)
    with pytest.raises(RuntimeError, match="found no nvcc"):
        lut.compiled(tmp_path, torch.device("cuda"))


def test_a_wrong_table_has_no_rate_and_the_others_do(emulated, monkeypatch):
    """What `ask` makes of its library; the clock of a GPU stands still here."""
    noted: dict = {}
    wrong = type(emulated).wrong
    monkeypatch.setattr(lut, "compiled", lambda folder, device: emulated)
    monkeypatch.setattr(
        type(emulated),
        "wrong",
        lambda self, n, d: "on purpose" if n == "pairs" else wrong(self, n, d),
    )
    rate = {"weights_per_clock": 12.34, "packed_gb_s": 1234.5}
    monkeypatch.setattr(lut, "measured", lambda library, name, device: rate)
    with pytest.raises(RuntimeError, match="pairs: on purpose"):
        lut.ask(specs.Options(), None, lambda **facts: noted.update(facts))
    assert noted["said"].startswith("weights for each clock") and "shuffle 12.3" in noted["said"]
    table = record_tables.decoders_table([noted])
    assert "| permute | 12.3 | 1234 |" in table and "| pairs | WRONG |  |" in table


@pytest.mark.skipif(torch.cuda.is_available(), reason="the interpreter is off beside a GPU")
@pytest.mark.parametrize("only", ["product-M4096", "lut"])
def test_products_and_tables_go_through_the_bench(only, tmp_path):
    options = ["--device", "cpu", "--only", only, "--n", "16", "--k", "16", "--rows", "4"]
    options += ["--seconds", "0", "--rotate-mb", "0", "--out", tmp_path]
    status, out, error = run_here("bench/bench_formulations.py", *options)
    assert status == 0, error
    (path,) = tmp_path.glob("*-interpreter/formulations.json")
    record = json.loads(path.read_text())
    (table,) = record_tables.tables("formulations", record)
    if only == "lut":
        assert record["answers"][0]["said"] == "not measured" and "not measured" in out
        assert "not measured" in table
        return
    (case,) = record["cases"]
    assert all(row["wrong"] is None and row["median_ms"] for row in case["providers"].values())
    assert bench_formulations.CUBLAS in case["providers"]
    other = {**case, "providers": dict(list(case["providers"].items())[:2])}
    record["cases"] = [case, other, case]
    assert [len(group) for group in record_tables.alike(record["cases"])] == [2, 1]
    assert len(record_tables.tables("formulations", record)) == 2


def test_the_questions_of_the_issue_are_all_asked():
    """The products' sizes, and the tables, among the GPU's cases."""
    names = [spec.short_name for spec in bench_formulations.gpu_specs(CPU)]
    for size in ("M4096-4096x4096", "M8192-4096x4096", "M8192-4096x14336"):
        assert f"product-{size}/bf16" in names
    assert "lut/bf16" in names and len(set(names)) == len(names)
