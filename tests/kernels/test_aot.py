"""Kernels compiled for GPUs that are not here: what they use, and the assembly written by hand."""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch
from paths import ROOT
from processes import run_python

pytest.importorskip("triton")

import triton
from aot_cases import KNOWN_SPILLS

from peftkern.formats.table import FORMATS, NF4
from peftkern.kernels import primitives
from peftkern.kernels.aot import TARGETS, innermost_loops
from peftkern.kernels.configs import shared_memory

RESULTS = ROOT / "bench" / "results"
ARCHS = tuple(TARGETS)


# What the compiler says


def parse(lines: list[str]) -> dict[str, tuple[int, int, int]]:
    """Registers, spills and shared memory by launch, of those that were compiled."""
    rows = [line.split() for line in lines[2:]]
    return {name: tuple(map(int, numbers[:3])) for name, *numbers in rows if numbers != ["?"]}


def equal(new: str, committed: str) -> bool:
    """The lines of one launch; "?" stands for loops that were not read, or for all of it."""
    if not new.endswith(" ?"):
        return new == committed
    return committed.startswith(new[:-1]) and len(committed) > len(new[:-1])


@pytest.mark.parametrize(
    ("archs", "quick"),
    [
        (("sm90",), "first"),
        pytest.param(("sm90",), "ends", marks=pytest.mark.more),
        pytest.param(ARCHS, None, marks=pytest.mark.long),
    ],
)
def test_launches_compile_fit_and_use_what_is_committed(archs, quick, tmp_path):
    """One test, so that one process compiles for all architectures, and once; or for one of them
    the first launch of each kernel, or the first and the last."""
    only = ["--quick", quick, "--arch", *archs] if quick else []
    answer = run_python("bench/resources.py", *only, "--out", tmp_path)
    assert answer.returncode == 0, answer.stdout + answer.stderr  # every kernel has a launch, too
    names = [f"resources_{arch}.txt" for arch in archs]
    assert {path.name for path in tmp_path.glob("resources_*.txt")} == set(names)
    assert {path.name for path in RESULTS.glob("resources_*.txt")} >= set(names)
    for arch, name in zip(archs, names, strict=True):
        new, committed = (
            (folder / name).read_text(encoding="utf-8").splitlines()
            for folder in (tmp_path, RESULTS)
        )
        for launch, (registers, spills, shared) in parse(new).items():
            assert registers > 0 and 0 <= shared <= shared_memory(arch), (
                name,
                launch,
            )
            assert spills == KNOWN_SPILLS.get((arch, launch), 0), (name, launch)
        version = re.search(r"Triton ([^:]+):", committed[0])[1]
        if version == triton.__version__:
            changed = [line for line in zip(new, committed, strict=True) if not equal(*line)]
            assert not changed, f"{name}: run `make aot` and look at the difference"
            read = {line.split("/")[0] for line in new if not line.endswith(" ?")}
            assert read >= {launch.split("/")[0] for launch in parse(new)}
    if version != triton.__version__:
        pytest.skip(f"the report is of Triton {version}, installed is {triton.__version__}")


BROKEN_LAUNCHES = """
import os, sys
os.environ.pop("TRITON_INTERPRET", None)
sys.path.insert(0, "bench")
import resources, torch, triton
import triton.language as tl
from aot_cases import Case

@triton.jit
def _fill_kernel(x_ptr, TILE: tl.constexpr):
    tl.store(x_ptr + tl.arange(0, TILE), 1.0)

def case(name, x, tile):
    return Case(name, lambda: _fill_kernel[(1,)](x, TILE=tile))

x = torch.empty(16, device="meta")
resources.CASES = (case("right", x, 16), case("again", x, 16))
resources.CASES += (case("number", 1.5, 16), case("tile", x, 3))
resources.shared_memory = lambda arch: -1
sys.exit(resources.main(["--arch", "sm90", "--out", sys.argv[1]]))
"""


def test_launch_that_does_not_compile_or_fit_fails_the_run(tmp_path):
    """And so does a kernel that no case launches; equal launches are compiled once."""
    script = tmp_path / "broken.py"
    script.write_text(BROKEN_LAUNCHES, encoding="utf-8")
    answer = run_python(script, tmp_path)
    assert answer.returncode == 1, answer.stdout + answer.stderr
    _, *complaints = answer.stdout.splitlines()
    assert complaints[0] == "sm90 fill/right: 0 bytes of shared memory, at most -1"
    for complaint, name in zip(complaints[1:3], ("number", "tile"), strict=True):
        assert re.match(rf"sm90 fill/{name}: \w+Error: ", complaint)
    missing = {complaint.removeprefix("no case launches ") for complaint in complaints[3:]}
    assert {"_nf4_dequantize_kernel", "_lora_forward_kernel", "_nf4_backward_kernel"} <= missing


SASS = """
.L_x_0:
        /*0000*/                   MOV R1, R2 ;
.L_x_1:
        /*0010*/              @!P0 BRA `(.L_x_1) ;
.L_x_2:
        /*0020*/                   IADD3 R1, R1, 0x1, RZ ;
        /*0030*/                   BAR.SYNC.DEFER_BLOCKING 0x0 ;
        /*0040*/                   LDS R4, [R1] ;
        /*0050*/                   LDS R5, [R1+0x4] ;
        /*0060*/                   FADD R4, R4, R5 ;
        /*0070*/                   FADD R4, R4, R6 ;
        /*0080*/                   BAR.SYNC.DEFER_BLOCKING 0x0 ;
        /*0090*/              @P1 BRA `(.L_x_2) ;
        /*00a0*/              @P2 BRA `(.L_x_0) ;
        /*00b0*/                   EXIT ;
"""


def test_innermost_loops_of_sass():
    """The outer loop is not counted, and one of a single instruction only waits."""
    assert innermost_loops(SASS) == ((8, 2),)


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


@pytest.mark.parametrize(
    "row", {row.code: row for row in FORMATS}.values(), ids=lambda row: row.name
)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_permutations_give_every_value_high_then_low(dtype, row):
    words = every_pair()
    assert len(np.unique(words & np.uint64(0xFFFF))) == len(np.unique(words >> np.uint64(16)))
    out = evaluate(primitives._prmt_program(row.code, dtype), {"$4": words})
    rounded = torch.tensor(row.code).to(dtype).view(torch.int16).numpy().astype(np.uint16)
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
        for form, row in enumerate(FORMATS):
            assert compiled[form] == primitives._prmt_program(row.code, dtype)


def test_shuffles_give_every_float32_value_high_then_low():
    words = every_pair()
    table = np.array(NF4.code, dtype=np.float32).view(np.uint32).astype(np.uint64)
    address = np.zeros_like(words)
    program = primitives._shuffle_program()
    out = evaluate(program, {"$8": words, "$9": address}, table)
    wanted = table[nibbles(words).astype(np.int64)]
    for half in range(2):
        got = np.stack([out[f"${4 * half + byte}"] for byte in range(4)], axis=1)
        assert np.array_equal(got, wanted[:, :, half])


@pytest.mark.parametrize("change", [("0xd8", "0xca"), ("0x7351", "0x6240"), (", 4;", ", 3;")])
def test_wrong_permutation_is_found(change):
    program = primitives._prmt_program(NF4.code, torch.bfloat16)
    assert change[0] in program
    words = every_pair()
    right = evaluate(program, {"$4": words})
    wrong = evaluate(program.replace(*change), {"$4": words})
    assert any(not np.array_equal(right[f"${i}"], wrong[f"${i}"]) for i in range(4))
