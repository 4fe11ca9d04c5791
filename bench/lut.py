"""Throughput of NF4 lookup tables (bench/lut.cu): weights per clock and SM for each kind of table,
from registers to registers."""

from __future__ import annotations

import ctypes
import statistics
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path

import cuda_resources
import torch
from torch import Tensor

from peftkern.formats.nf4 import NF4_CODE

SOURCE = Path(__file__).with_name("lut.cu")
DECODERS = ("permute", "shuffle", "shared", "pairs", "selects")  # in the order of lut_decode
FIRST, STEP = 2654435761, 0x9E3779B9  # kFirst, kStep
WEIGHTS = 16  # of two words, which a thread decodes in an iteration
CHECKED, TIMED = 3, 2048  # iterations
WARM_UP, CALLS = 10, 9


class Library:
    """bench/lut.cu, compiled; `path` is a shared library, which stays loaded."""

    def __init__(self, path: Path) -> None:
        self._library = ctypes.CDLL(str(path))
        integer, pointer = ctypes.c_int, ctypes.c_void_p
        self._library.lut_decode.argtypes = (integer, integer, pointer, integer, *3 * (pointer,))
        self.threads, self.blocks = (
            self._library.lut_threads(),
            self._library.lut_multiprocessors(),
        )
        bits = torch.tensor(NF4_CODE).to(torch.bfloat16).view(torch.int16).tolist()
        self._values = (ctypes.c_uint16 * 16)(*(value & 0xFFFF for value in bits))

    def decode(self, name: str, iterations: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """Return the XOR of each thread's values [threads, 4], int32; clocks of each block.

        Raises: RuntimeError if CUDA refuses the launch.
        """
        sums = torch.full((self.blocks * self.threads, 4), -1, dtype=torch.int32, device=device)
        clocks = torch.full((self.blocks,), -1, dtype=torch.int64, device=device)
        stream = torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else None
        status = self._library.lut_decode(
            DECODERS.index(name),
            self.blocks,
            self._values,
            iterations,
            sums.data_ptr(),
            clocks.data_ptr(),
            stream,
        )
        if status:
            raise RuntimeError(f"lut_decode({name}): CUDA error {status}")
        return sums, clocks

    def wrong(self, name: str, device: torch.device) -> str | None:
        """Describe the difference from the codebook's bits, or return None."""
        sums, _ = self.decode(name, CHECKED, device)
        bad = int((sums.cpu() != expected(len(sums), CHECKED)).sum())
        return f"{bad} of {sums.numel()} registers differ from the codebook's" if bad else None


def expected(threads: int, iterations: int) -> Tensor:
    """Compute the result of `Library.decode` from the codebook alone: [threads, 4], int32."""
    values = torch.tensor(NF4_CODE).to(torch.bfloat16).view(torch.int16).long() & 0xFFFF
    word = torch.arange(1, threads + 1) * FIRST & 0xFFFFFFFF
    sums = torch.zeros(threads, 4, dtype=torch.int64)
    for _ in range(2 * iterations):
        byte = word[:, None] >> torch.tensor([0, 8, 16, 24]) & 255
        sums ^= values[byte >> 4] | values[byte & 15] << 16
        word = word + STEP & 0xFFFFFFFF
    return (sums - (sums >> 31 << 32)).to(torch.int32)


def command(nvcc: str, architecture: str, path: Path) -> list[str]:
    flags = ["-std=c++17", "-O3", f"-arch={architecture}", "-shared", "-Xcompiler", "-fPIC"]
    return [nvcc, *flags, f"-I{cuda_resources.CUDA}", str(SOURCE), "-o", str(path)]


def compiled(folder: Path, device: torch.device) -> Library:
    """Compile for this GPU. Raises: RuntimeError naming what is missing or the compiler's error."""
    if device.type != "cuda":
        raise RuntimeError("clocks of a GPU are counted, and this is none")
    nvcc = cuda_resources.find_nvcc()
    if nvcc is None:
        raise RuntimeError("found no nvcc")
    major, minor = torch.cuda.get_device_capability(device)
    path = folder / "lut.so"
    try:
        done = subprocess.run(
            command(nvcc, f"sm_{major}{minor}", path), capture_output=True, text=True
        )
    except OSError as error:
        raise RuntimeError(f"nvcc: {error}") from None
    if done.returncode:
        lines = (done.stderr + done.stdout).strip().splitlines()
        said = [line for line in lines if "error" in line] or lines or ["no output"]
        raise RuntimeError(f"nvcc: {said[0]}")
    return Library(path)


def measured(library: Library, name: str, device: torch.device) -> dict[str, float]:
    """Return medians over blocks and calls: weights per clock and SM, by its own clock counter;
    gigabytes of packed weights per second of the whole GPU, launch included."""
    rates, seconds = [], []
    for call in range(WARM_UP + CALLS):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        _, clocks = library.decode(name, TIMED, device)
        end.record()
        torch.cuda.synchronize(device)
        if call >= WARM_UP:
            rates.append(library.threads * TIMED * WEIGHTS / clocks.median().item())
            seconds.append(start.elapsed_time(end) / 1e3)
    packed = library.blocks * library.threads * TIMED * WEIGHTS / 2
    return {
        "weights_per_clock": statistics.median(rates),
        "packed_gb_s": packed / statistics.median(seconds) / 1e9,
    }


def ask(options, seconds: float | None, note: Callable[..., None]) -> None:
    """Answer a `specs.Question`: the speed of each table, or the lack of nvcc or a GPU.

    Raises: RuntimeError at the end, if a table gave other bits than the codebook; it has no rate.
    """
    note(question="weights decoded for each clock and multiprocessor", decoders={})
    with tempfile.TemporaryDirectory() as folder:
        try:
            library = compiled(Path(folder), options.device)
        except RuntimeError as error:
            note(said="not measured", stopped=str(error))
            return
        found, wrong = {}, []
        for name in DECODERS:
            if why := library.wrong(name, options.device):
                wrong.append(f"{name}: {why}")
                found[name] = {"wrong": why}
            else:
                found[name] = measured(library, name, options.device)
            note(decoders=found)
    rates = [f"{n} {f['weights_per_clock']:.1f}" for n, f in found.items() if "wrong" not in f]
    note(said=f"weights for each clock and multiprocessor: {', '.join(rates)}")
    if wrong:
        raise RuntimeError("; ".join(wrong))
