"""Cases that are compiled where there is no GPU, and what the compiler says they use.

Every `kernels/<stem>.py` lists its launches in `AOT_CASES`, with the tiles that `choose` gives an
H200. `make aot` compiles each for every target below and writes registers, spills and shared memory
to `bench/results/resources_<arch>.txt`, so that a spill shows in a diff.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from peftkern.kernels.configs import Problem, TileConfig, choose

PROCESSORS = 132  # of an H200
TARGETS = {
    "sm80": GPUTarget("cuda", 80, 32),
    "sm90": GPUTarget("cuda", 90, 32),
    "sm100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
TYPES = {"float32": "fp32", "float16": "fp16", "bfloat16": "bf16"}
CUDA_ONLY = {"tf32x3": "ieee", True: False}  # what AMD's compiler gets for PRECISION and PTX


@dataclass(frozen=True)
class AotCase:
    """One launch: `arguments` maps each parameter to what Triton would specialise it on.

    "*bf16" is an aligned pointer, "i32" and "fp32" are numbers, "i32:16" one that 16 divides;
    anything else, None included, is a compile-time constant. `targets` have this launch.
    """

    name: str
    kernel: Any
    arguments: Mapping[str, Any]
    config: TileConfig
    fp_fusion: bool = True
    targets: tuple[str, ...] = tuple(TARGETS)


@dataclass(frozen=True)
class Resources:
    """What one compiled kernel uses; `spills` in bytes (AMD: in registers)."""

    registers: int
    spills: int
    shared: int

    def __str__(self) -> str:
        return f"{self.registers:4d} {self.spills:6d} {self.shared:7d}"


def tiles(kernel: str, M: int, N: int, K: int, r: int, bits: int) -> TileConfig:
    """The counted tiles of a problem on an H200."""
    return choose(Problem(kernel, M, N, K, r, bits), PROCESSORS)


def compile_case(case: AotCase, arch: str) -> Resources:
    """Compile a case for an architecture, without a GPU.

    Raises: what Triton raises for a kernel that does not compile.
    """
    target = TARGETS[arch]
    signature, constants, attributes = {}, {}, {}
    for index, name in enumerate(case.kernel.arg_names):
        value = case.arguments[name]
        if isinstance(value, str) and re.fullmatch(r"\*?[a-z]+\d+(:16)?", value):
            signature[name] = value.removesuffix(":16")
            if value.startswith("*") or value.endswith(":16"):
                attributes[(index,)] = [["tt.divisibility", 16]]
            continue
        if target.backend == "hip" and name in ("PRECISION", "PTX"):
            value = CUDA_ONLY.get(value, value)
        signature[name] = "constexpr"
        constants[(index,)] = value
    source = ASTSource(case.kernel, signature, constants, attributes)
    options = {**case.config.launch(), "enable_fp_fusion": case.fp_fusion}
    compiled = triton.compile(source, target=target, options=options)
    read = _read_amd if target.backend == "hip" else _read_nvidia
    return read(compiled)


def _read_nvidia(compiled: Any) -> Resources:
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        command = [str(tool), "--dump-resource-usage", file.name]
        usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    registers, stack, local = (
        int(re.search(rf"{what}:(\d+)", usage)[1]) for what in ("REG", "STACK", "LOCAL")
    )
    return Resources(registers, stack + local, compiled.metadata.shared)


def _read_amd(compiled: Any) -> Resources:
    text = compiled.asm["amdgcn"]
    vector, spilled, scalar_spilled = (
        int(re.search(rf"\.{what}:\s+(\d+)", text)[1])
        for what in ("vgpr_count", "vgpr_spill_count", "sgpr_spill_count")
    )
    return Resources(vector, spilled + scalar_spilled, compiled.metadata.shared)
