"""Kernels compiled for GPUs that are not here: what they use, and the assembly written by hand."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from paths import ROOT

pytest.importorskip("triton")

import triton

from peftkern.formats.nf4 import NF4_CODE
from peftkern.kernels import (
    adalora,
    dora,
    lora_linear,
    low_rank_svd,
    nf4,
    nf4_lora_linear,
    primitives,
    rosa,
)
from peftkern.kernels.configs import SHARED_MEMORY

RESULTS = ROOT / "bench" / "results"
MODULES = (nf4, lora_linear, nf4_lora_linear, low_rank_svd, adalora, dora, rosa)
ARCHS = ("sm80", "sm90", "sm100", "gfx942")
NVIDIA = ("sm80", "sm90", "sm100")


def run_without_interpreter(*command: str | Path) -> subprocess.CompletedProcess[str]:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), environment.get("PYTHONPATH", "")])
    return subprocess.run(
        [sys.executable, *map(str, command)],
        env=environment,
        cwd=ROOT,
        capture_output=True,
        text=True,
    )


# What the compiler says


@pytest.fixture(scope="module")
def compiled(tmp_path_factory) -> Path:
    """A folder with the report of every architecture, from one run of the script."""
    folder = tmp_path_factory.mktemp("resources")
    answer = run_without_interpreter(ROOT / "bench" / "resources.py", "--out", folder)
    assert answer.returncode == 0, answer.stdout + answer.stderr
    return folder


def parse(path: Path) -> dict[str, tuple[int, int, int]]:
    """Registers, spills and shared memory by case."""
    rows = [line.split() for line in path.read_text(encoding="utf-8").splitlines()[2:]]
    return {name: tuple(map(int, numbers)) for name, *numbers in rows}


@pytest.mark.slow
@pytest.mark.parametrize("arch", ARCHS)
def test_every_case_compiles_and_fits(compiled, arch):
    rows = parse(compiled / f"resources_{arch}.txt")
    cases = [case for module in MODULES for case in module.AOT_CASES if arch in case.targets]
    assert list(rows) == [case.name for case in cases]
    for name, (registers, spills, shared) in rows.items():
        assert registers > 0 and 0 <= shared <= SHARED_MEMORY, name
        assert spills == 0 or arch not in NVIDIA, name


@pytest.mark.slow
@pytest.mark.parametrize("arch", ARCHS)
def test_committed_report_is_what_the_compiler_says(compiled, arch):
    committed = (RESULTS / f"resources_{arch}.txt").read_text(encoding="utf-8").splitlines()
    version = re.search(r"Triton ([^:]+):", committed[0])[1]
    if version != triton.__version__:
        pytest.skip(f"the report is of Triton {version}, installed is {triton.__version__}")
    new = (compiled / f"resources_{arch}.txt").read_text(encoding="utf-8").splitlines()
    assert new == committed, "run `make aot` and look at the difference"


def kernels_of(path: Path) -> set[str]:
    """Names of the functions that a file launches: jitted, and called like kernels."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    names = {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}
    return {name for name in names if re.fullmatch(r"\w+_kernel", name)}


def test_every_kernel_has_a_case():
    written = set().union(*(kernels_of(path) for path in (ROOT / "kernels").glob("*.py")))
    assert {"_nf4_dequantize_kernel", "_lora_forward_kernel", "_nf4_backward_kernel"} <= written
    cases = [case for module in MODULES for case in module.AOT_CASES]
    assert {case.kernel.__name__ for case in cases} == written
    names = [(case.name, arch) for case in cases for arch in case.targets]
    assert len(set(names)) == len(names)
    for case in cases:
        assert set(case.kernel.arg_names) == set(case.arguments), case.name
        assert case.config.valid(), case.name


def test_report_of_every_architecture_is_committed():
    assert {path.stem for path in RESULTS.glob("resources_*.txt")} == {
        f"resources_{arch}" for arch in ARCHS
    }


BROKEN_CASES = """
import dataclasses, sys
sys.path.insert(0, "bench")
import resources
from peftkern.kernels import nf4

good = nf4.AOT_CASES[0]
changed = [{}, {"packed_ptr": "fp32"}, {"ROWS": 3}]
nf4.AOT_CASES = tuple(
    dataclasses.replace(good, name=f"case-{i}", arguments={**good.arguments, **change})
    for i, change in enumerate(changed)
)
resources.STEMS = ("nf4",)
resources.SHARED_MEMORY = int(sys.argv[2])

class InProcess:
    def __init__(self, workers): pass
    def __enter__(self): return self
    def __exit__(self, *exception): pass
    map = staticmethod(map)

resources.ProcessPoolExecutor = InProcess
sys.exit(resources.main(["--arch", "sm90", "--out", sys.argv[1]]))
"""


def test_case_that_does_not_compile_fails_the_run(tmp_path):
    answer = run_without_interpreter("-c", BROKEN_CASES, tmp_path, SHARED_MEMORY)
    assert answer.returncode == 1, answer.stdout + answer.stderr
    complaints = [line for line in answer.stdout.splitlines() if line.startswith("sm90 case-")]
    assert [line.split(":")[0] for line in complaints] == ["sm90 case-1", "sm90 case-2"]
    assert all("Error" in line for line in complaints)


def test_shared_memory_beyond_the_limit_fails_the_run(tmp_path):
    answer = run_without_interpreter("-c", BROKEN_CASES, tmp_path, -1)
    assert answer.returncode == 1, answer.stdout + answer.stderr
    assert re.search(r"sm90 case-0: \d+ bytes of shared memory, at most -1", answer.stdout)


# The assembly written by hand, on a small evaluator of PTX: a register is an array, a lane each


def prmt(a: np.ndarray, b: np.ndarray, selector: np.ndarray) -> np.ndarray:
    """PTX ISA, prmt: four selectors of a byte of b:a, whose bit 3 asks for its sign instead."""
    source = (b << np.uint64(32)) | a
    result = np.zeros_like(a)
    for i in range(4):
        pick = (selector >> np.uint64(4 * i)) & np.uint64(15)
        byte = (source >> (8 * (pick & np.uint64(7)))) & np.uint64(255)
        sign = np.where(byte >> np.uint64(7), np.uint64(255), np.uint64(0))
        result |= np.where(pick >> np.uint64(3), sign, byte) << np.uint64(8 * i)
    return result


def lop3(a: np.ndarray, b: np.ndarray, c: np.ndarray, table: np.ndarray) -> np.ndarray:
    """PTX ISA, lop3: bit (a, b, c) of the table, for each bit."""
    result = np.zeros_like(a)
    for bit in range(32):
        index = sum(((v >> np.uint64(bit)) & np.uint64(1)) << np.uint64(2 - i)
                    for i, v in enumerate((a, b, c)))  # fmt: skip
        result |= ((table >> index) & np.uint64(1)) << np.uint64(bit)
    return result


def shuffle(value: np.ndarray, lane: np.ndarray, control: np.ndarray) -> np.ndarray:
    """PTX ISA, shfl.sync.idx over warps of 32: control is the segment's mask and the clamp."""
    own = np.arange(len(value)) % 32
    segment, clamp = (int(control[0]) >> 8) & 31, int(control[0]) & 31
    least = own & segment
    source = least | (lane.astype(np.int64) & 31 & ~segment)
    most = (own & segment) | (clamp & ~segment & 31)
    assert (source <= most).all()
    return value[np.arange(len(value)) // 32 * 32 + source]


def evaluate(program: str, inputs: dict[str, np.ndarray], table: np.ndarray | None = None):
    """The outputs of an inline program: {"$0": array of 32-bit words}."""
    lanes = len(next(iter(inputs.values())))
    registers = dict(inputs)
    registers["%laneid"] = np.arange(lanes, dtype=np.uint64) % 32

    def read(operand: str) -> np.ndarray:
        if re.fullmatch(r"0x[0-9a-f]+|\d+", operand):
            return np.full(lanes, int(operand, 0), dtype=np.uint64)
        return registers[operand.strip("[]")]

    operations = {
        "mov.b32": lambda a: a,
        "mov.u32": lambda a: a,
        "and.b32": lambda a, b: a & b,
        "shl.b32": lambda a, n: a << n,
        "shr.u32": lambda a, n: a >> n,
        "prmt.b32": prmt,
        "lop3.b32": lop3,
        "mad.wide.u32": lambda a, b, c: a * b + c,
        "ld.global.nc.b32": lambda address: table[address // 4],
        "shfl.sync.idx.b32": lambda value, lane, control, members: shuffle(value, lane, control),
    }
    wide = {"mad.wide.u32"}
    for statement in program.strip("{}\n").replace("\n", " ").split(";"):
        operation, _, rest = statement.strip().partition(" ")
        if not operation or operation == ".reg":
            continue
        target, *operands = (operand.strip() for operand in rest.split(","))
        result = operations[operation](*map(read, operands))
        registers[target] = result if operation in wide else result & np.uint64(0xFFFFFFFF)
    return {name: value for name, value in registers.items() if name.startswith("$")}


def every_pair() -> np.ndarray:
    """Words that hold each of the 65,536 pairs of bytes, at both ends of the register."""
    pairs = np.arange(65536, dtype=np.uint64)
    return pairs | (pairs * np.uint64(40503) + np.uint64(12345)) % np.uint64(65536) << np.uint64(16)


def nibbles(words: np.ndarray) -> np.ndarray:
    """[word, byte, (high, low)]"""
    octets = np.stack([words >> np.uint64(8 * i) & np.uint64(255) for i in range(4)], axis=1)
    return np.stack([octets >> np.uint64(4), octets & np.uint64(15)], axis=2)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_permutations_give_every_value_high_then_low(dtype):
    words = every_pair()
    assert len(np.unique(words & np.uint64(0xFFFF))) == len(np.unique(words >> np.uint64(16)))
    out = evaluate(primitives._prmt_program(dtype), {"$4": words})
    rounded = torch.tensor(NF4_CODE).to(dtype).view(torch.int16).numpy().astype(np.uint16)
    wanted = rounded[nibbles(words).astype(np.int64)]
    for half, first in ((0, "high"), (1, "low")):
        got = np.stack([out[f"${2 * half + i}"] for i in range(2)], axis=1)
        values = np.stack([got & np.uint64(0xFFFF), got >> np.uint64(16)], axis=2)
        assert np.array_equal(values.reshape(-1, 4), wanted[:, :, half]), first


def test_permutations_are_what_is_compiled():
    for dtype, compiled in (
        (torch.bfloat16, primitives.PRMT_BFLOAT16),
        (torch.float16, primitives.PRMT_FLOAT16),
    ):
        assert compiled.value == primitives._prmt_program(dtype)


def test_shuffles_give_every_float32_value_high_then_low():
    words = every_pair()
    table = np.array(NF4_CODE, dtype=np.float32).view(np.uint32).astype(np.uint64)
    address = np.zeros_like(words)
    program = primitives._shuffle_program()
    out = evaluate(program, {"$8": words, "$9": address}, table)
    wanted = table[nibbles(words).astype(np.int64)]
    for half in range(2):
        got = np.stack([out[f"${4 * half + byte}"] for byte in range(4)], axis=1)
        assert np.array_equal(got, wanted[:, :, half])


@pytest.mark.parametrize("change", [("0xd8", "0xca"), ("0x7351", "0x6240"), (", 4;", ", 3;")])
def test_wrong_permutation_is_found(change):
    program = primitives._prmt_program(torch.bfloat16)
    assert change[0] in program
    words = every_pair()
    right = evaluate(program, {"$4": words})
    wrong = evaluate(program.replace(*change), {"$4": words})
    assert any(not np.array_equal(right[f"${i}"], wrong[f"${i}"]) for i in range(4))
