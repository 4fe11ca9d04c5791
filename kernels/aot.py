"""Ahead-of-time compilation of recorded launches, without a GPU.

`record` runs a launcher on tensors of the "meta" device, which have no memory: Triton's own launch
decides what to compile for a target, and a hook takes that down instead of compiling it.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import triton
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime import driver

from peftkern.kernels.launch import Traits, recorded_for

PROCESSORS = 132  # of an H200
TARGETS = {
    "sm80": GPUTarget("cuda", 80, 32),
    "sm90": GPUTarget("cuda", 90, 32),
    "sm100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}


@dataclass(frozen=True)
class Launch:
    """Compilation unit of one launch: a kernel with types, constants and hints; its options."""

    source: ASTSource
    options: dict[str, Any]

    @property
    def kernel(self) -> str:
        """Name of the kernel without its affixes: "lora_forward" of `_lora_forward_kernel`."""
        return self.source.fn.__name__.removeprefix("_").removesuffix("_kernel")

    @property
    def key(self) -> str:
        """Equal for launches that share one compiled kernel."""
        return f"{self.source.hash()} {self.options}"

    def constants(self) -> dict[str, Any]:
        """Compile-time constants by parameter."""
        names = self.source.fn.arg_names
        return {names[path[0]]: value for path, value in self.source.constants.items()}


@dataclass(frozen=True)
class Resources:
    """Registers of a thread, bytes of memory to which it spills, shared memory of a program.

    AMD's compiler spills scalar registers to lanes of vector registers first: no memory, no spill.
    On NVIDIA also, ahead: groups of copies from memory that a loop leaves in flight when it waits
    for one (None without such copies); loops: instructions and barriers of each innermost loop.
    """

    registers: int
    spills: int
    shared: int
    ahead: int | None = None
    loops: tuple[tuple[int, int], ...] | None = ()

    def __str__(self) -> str:
        ahead = "-" if self.ahead is None else self.ahead
        loops = "?"
        if self.loops is not None:
            loops = "+".join(f"{length}/{barriers}" for length, barriers in self.loops) or "-"
        return f"{self.registers:4d} {self.spills:6d} {self.shared:7d} {ahead:>6} {loops}"


class _Driver:
    """Stand-in for the driver of a GPU: what Triton asks of it before it compiles."""

    def __init__(self, arch: str) -> None:
        self.arch = arch

    def get_current_target(self) -> GPUTarget:
        return TARGETS[self.arch]

    def get_current_device(self) -> str:
        return self.arch  # under which a kernel remembers its target

    def get_current_stream(self, device: str) -> int:
        return 0


def record(call: Callable[[], object], arch: str) -> list[Launch]:
    """Return the launches of a call on "meta" tensors, with the counted tiles of an H200."""
    launches: list[Launch] = []

    def take_down(*, fn: Any, compile: dict[str, Any], **_: Any) -> bool:
        types, constants, (hints,) = (compile[k] for k in ("signature", "constants", "configs"))
        source = ASTSource(fn.jit_function, types, constants, hints)
        options = {k: compile[k] for k in ("num_warps", "num_stages", "enable_fp_fusion")}
        launches.append(Launch(source, options))
        return True  # so that Triton neither compiles nor launches

    gpu = Traits.of_gpu(arch, PROCESSORS, hip=TARGETS[arch].backend == "hip")
    driver.set_active(_Driver(arch))
    try:
        with recorded_for(replace(gpu, arch="recorded")), knobs.runtime.scope():
            knobs.runtime.jit_cache_hook = take_down
            call()
    finally:
        driver.set_active(None)
    return launches


def compile_launch(launch: Launch, arch: str, loops: bool = True) -> Resources:
    """Compile a recorded launch for its architecture, without a GPU; its loops unread if told.

    Raises: what Triton raises for a kernel that does not compile.
    """
    target = TARGETS[arch]
    compiled = triton.compile(launch.source, target=target, options=launch.options)
    return _read_amd(compiled) if target.backend == "hip" else _read_nvidia(compiled, loops)


def _read_nvidia(compiled: Any, loops: bool = True) -> Resources:
    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        wanted = [("cuobjdump", "--dump-resource-usage"), ("nvdisasm", "-c")][: 1 + loops]
        usage, *code = (
            subprocess.run(
                [str(tools / tool), option, file.name], capture_output=True, text=True, check=True
            ).stdout
            for tool, option in wanted
        )
    registers, stack, local = (
        int(re.search(rf"{what}:(\d+)", usage)[1]) for what in ("REG", "STACK", "LOCAL")
    )
    waits = re.findall(r"async_wait.*\bnum = (\d+)", compiled.asm["ttgir"])
    ahead = max(map(int, waits), default=None)
    shared = compiled.metadata.shared
    found = innermost_loops(*code) if loops else None
    return Resources(registers, stack + local, shared, ahead, found)


def innermost_loops(sass: str) -> tuple[tuple[int, int], ...]:
    """Return (instructions, barriers of the program) of each loop without another in it.

    A loop is what lies between a label and a branch back to it; one of fewer than eight
    instructions is a wait.
    """
    labels: dict[str, int] = {}
    code: list[str] = []
    for line in sass.splitlines():
        if label := re.match(r"(\.L_\w+):", line):
            labels[label[1]] = len(code)
        elif instruction := re.match(r"\s+/\*[0-9a-f]{4,}\*/\s+(.*);", line):
            code.append(instruction[1])
    spans = []
    for last, instruction in enumerate(code):
        target = re.search(r"\bBRA\b.*`\((\.L_\w+)\)", instruction)
        if target and labels[target[1]] < last - 6:
            spans.append((labels[target[1]], last))
    inner = [a for a in spans if not any(a != b and a[0] <= b[0] and b[1] <= a[1] for b in spans)]
    bodies = [code[first : last + 1] for first, last in inner]
    return tuple((len(body), sum("BAR.SYNC" in line for line in body)) for body in bodies)


def _read_amd(compiled: Any) -> Resources:
    text = compiled.asm["amdgcn"]
    registers, scratch = (
        int(re.search(rf"\.{what}:\s+(\d+)", text)[1])
        for what in ("vgpr_count", "private_segment_fixed_size")
    )
    return Resources(registers, scratch, compiled.metadata.shared)
