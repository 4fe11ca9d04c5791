"""Tile sizes of every Triton kernel: measured where a table knows the shape, counted elsewhere.

Counted tiles are those that spill nowhere and leave enough programs on a processor to hide memory,
by kind of tensor cores (`make aot` compiles them; bench/results/resources_*). `choose` is pure:
equal problems on equal devices get equal tiles, so results are bit-identical from run to run, and
nothing is tuned at a user's first call. `kernels/tuned/<arch>.json` holds what
`make tune` measured on that architecture, also which back end is the fastest for an op; one without
a table gets the counted tiles, and the back ends in dispatch's own order.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from peftkern.formats.json_files import read_json

TUNED = Path(__file__).parent / "tuned"
RANK_LEAST, RANK_MOST = 16, 64
COLUMNS_LEAST = 32  # of a tile of a 4-bit weight whose halves are multiplied: dot takes 16 at least
# Tensor cores of an architecture, which decide what a tile costs, and the bytes of shared memory
# that one of its programs may use.
_TENSOR_CORES = {
    "sm80": ("mma", 163 << 10),
    "sm86": ("mma", 99 << 10),
    "sm87": ("mma", 163 << 10),
    "sm89": ("mma", 99 << 10),
    "sm90": ("wgmma", 227 << 10),
    "sm100": ("tcgen05", 227 << 10),
    "sm103": ("tcgen05", 227 << 10),
    "sm120": ("mma", 99 << 10),
    "sm121": ("mma", 99 << 10),
}
NF4_FUSED_ROWS_MAX = 256  # rows beyond which a table cannot ask for the fused NF4 kernels either


@dataclass(frozen=True)
class TileConfig:
    """Tile sizes of one launch, splits of its reduction, and the compiler's options.

    A kernel without a dimension ignores its block. `splits` counts slabs of the reduction that
    different programs work on; their partial sums are added in one fixed order.
    """

    block_m: int = 16
    block_n: int = 64
    block_k: int = 64
    splits: int = 1
    num_warps: int = 4
    num_stages: int = 2

    def valid(self, kernel: str = "") -> bool:
        """Check that a kernel compiles with it: powers of two, and dot's least size.

        A kernel over NF4 multiplies half of block_k at once; the epilogue's columns are an axis of
        the grid, of which CUDA takes 65,535 programs.
        """
        blocks = (self.block_m, self.block_n, self.block_k)
        powers = (*blocks, self.num_warps)
        return (
            all(n > 0 and n & (n - 1) == 0 for n in powers)
            and min(blocks) >= 16
            and (kernel not in ("nf4_forward", "nf4_backward") or self.block_k >= 32)
            and (kernel != "epilogue" or self.block_n >= 64)
            and self.splits >= 1
            and 1 <= self.num_stages <= 8
            and self.num_warps <= 16
        )

    def launch(self) -> dict[str, int]:
        """Return the options of a Triton launch."""
        return {"num_warps": self.num_warps, "num_stages": self.num_stages}


@dataclass(frozen=True)
class Problem:
    """Sizes of a call of a kernel or op: y[M, N] from x[M, K], rank r, `bits` per activation."""

    kernel: str
    M: int
    N: int
    K: int
    r: int
    bits: int

    def key(self) -> str:
        """Return its name in the tables: rows in powers of two, ranks as tiles take them."""
        sizes = f"M{next_power(self.M)}/N{self.N}/K{self.K}/r{block_rank(self.r)}"
        return f"{self.kernel}/{sizes}/{self.bits}-bit"

    def class_key(self) -> str:
        """Return the same without the weight's shape, and with ranks as they are: for `nearest`."""
        rank = max(RANK_LEAST, next_power(self.r))
        return f"{self.kernel}/M{next_power(self.M)}/r{rank}/{self.bits}-bit"


def choose(
    problem: Problem,
    processors: int,
    tuned: Mapping[str, Any] | None = None,
    cores: str = "",
) -> TileConfig:
    """Choose the tiles for a problem on a device of so many multiprocessors.

    Args: tuned, the "configs" of a table: {problem.key(): fields of TileConfig}, or None;
    cores, as `tensor_cores` names them.
    Raises: KeyError for a kernel that is not known; ValueError for a table with an invalid entry.
    """
    entry = (tuned or {}).get(problem.key())
    if entry is None:
        return _COUNTED[problem.kernel](problem, processors, cores)
    config = TileConfig(**entry)
    if not config.valid(problem.kernel):
        raise ValueError(f"tuned config {problem.key()}: expected powers of two, got {entry}")
    return config


@functools.lru_cache(maxsize=4096)
def chosen(problem: Problem, arch: str, processors: int, cores: str) -> TileConfig:
    """Return `choose` with the table of the architecture, cached."""
    return choose(problem, processors, load(arch).get("configs"), cores)


def tensor_cores(arch: str) -> str:
    """Return the kind of tensor cores, whose counted tiles an architecture gets; "" for others."""
    return _TENSOR_CORES.get(arch, ("", 0))[0]


def shared_memory(arch: str) -> int:
    """Return the bytes of shared memory that one program may use on an architecture."""
    return _TENSOR_CORES.get(arch, ("", 64 << 10))[1]


@functools.lru_cache(maxsize=4096)
def nf4_fused_rows(arch: str, columns: int, processors: int, cores: str) -> int:
    """Return up to how many rows the fused NF4 kernels write that many columns on a GPU.

    By count, of instructions against dequantizing and cuBLAS: 128 rows. Beside the memory and the
    tensor cores of sm90 and sm100 decoding is slower: half as many. Where tiles of 64 columns
    leave processors idle, the splits that fill them cost partial sums: half again.
    """
    rows = 64 if cores in ("wgmma", "tcgen05") else 128
    counted = rows if ceil_div(columns, 64) >= processors else rows // 2
    return min(load(arch).get("nf4_fused_rows", counted), NF4_FUSED_ROWS_MAX)


@functools.lru_cache(maxsize=4096)
def fastest(problem: Problem, arch: str) -> str | None:
    """Return the back end that measured fastest for an op on an architecture; see `nearest`."""
    return nearest(problem, load(arch).get("back_ends", {}))


@functools.lru_cache(maxsize=4096)
def layer_of(problem: Problem, arch: str) -> str | None:
    """Return whose layer measured faster, "peftkern" or "PEFT"; see `nearest`."""
    return nearest(problem, load(arch).get("layers", {}))


def nearest(problem: Problem, measured: Mapping[str, Mapping[str, str]]) -> str | None:
    """Look a problem up in a table {problem.class_key(): {"NxK": answer}}; None if it is not there.

    A weight that is not in it goes by the nearest that is, as far as twice or half of N and of K:
    the least |log(N / N')| + |log(K / K')|, the first in the table if two have it.
    """
    best, least = None, math.inf
    for shape, answer in measured.get(problem.class_key(), {}).items():
        n, k = map(int, shape.split("x"))
        pairs = ((problem.N, n), (problem.K, k))
        apart = [abs(math.log2(max(ours, 1) / theirs)) for ours, theirs in pairs]
        if max(apart) <= 1 and sum(apart) < least:
            best, least = answer, sum(apart)
    return best


@functools.cache
def load(arch: str) -> dict[str, Any]:
    """Return the measured table of an architecture ("sm90"); empty if there is none."""
    path = TUNED / f"{arch}.json"
    return read_json(path) if path.exists() else {}


def as_entry(config: TileConfig) -> dict[str, int]:
    """Return what a table keeps of a configuration."""
    return asdict(config)


def next_power(n: int) -> int:
    return 1 << max(0, n - 1).bit_length()


def block_rank(r: int) -> int:
    """Return the ranks of a tile: dot multiplies at least 16, and more than 64 do not fit."""
    return min(max(RANK_LEAST, next_power(r)), RANK_MOST)


def ceil_div(a: int, b: int) -> int:
    return -(-a // b)


def slab(length: int, block: int, splits: int) -> int:
    """Return the elements that each of `splits` programs walks through, in whole blocks."""
    return ceil_div(ceil_div(length, block), splits) * block


def _fill(programs: int, wanted: int, most: int) -> int:
    """Return the splits with which about `wanted` programs run, and no slab is empty."""
    return max(1, min(wanted // max(programs, 1), most))


def _rows(M: int, most: int) -> int:
    return max(16, min(next_power(M), most))


# Tiles over many rows of 16-bit activations, by tensor cores and block of ranks: of what spills
# with no dtype of the factors, the fewest instructions for an element that leave a processor 8
# warps. The three products with a float32 factor take registers, so high ranks have small tiles.
# None for tcgen05: there three stages of dA alone (r = 256) abort Triton 3.6's pipeliner.
_FORWARD = {
    "mma": {
        16: TileConfig(64, 64, 64, 1, 4, 4),
        32: TileConfig(64, 64, 32, 1, 4, 3),
        64: TileConfig(32, 64, 32, 1, 4, 3),
    },
    "wgmma": dict.fromkeys((16, 32, 64), TileConfig(64, 64, 64, 1, 8, 3)),
}
_BACKWARD_SB = {
    "mma": {
        16: TileConfig(32, 128, 16, 1, 4, 4),
        32: TileConfig(32, 128, 16, 1, 4, 3),
        64: TileConfig(16, 128, 16, 1, 4, 3),
    },
    "wgmma": {
        16: TileConfig(32, 128, 16, 1, 4, 4),
        32: TileConfig(32, 128, 16, 1, 4, 4),
        64: TileConfig(64, 128, 16, 1, 8, 3),
    },
}
_BACKWARD_XA = {
    "mma": {
        16: TileConfig(32, 16, 64, 1, 4, 3),
        32: TileConfig(32, 16, 64, 1, 4, 3),
        64: TileConfig(32, 16, 32, 1, 4, 4),
    },
    "wgmma": {
        16: TileConfig(32, 16, 128, 1, 8, 3),
        32: TileConfig(32, 16, 64, 1, 4, 3),
        64: TileConfig(64, 16, 64, 1, 8, 3),
    },
}


def rows_of_group(R: int, groups: int) -> int:
    """Return the mean of groups that have rows, as far as the host can know: at most R have."""
    return ceil_div(R, max(1, min(groups, R)))


def grouped_tile(rows: int, bits: int, decoding: str, cores: str) -> TileConfig:
    """Choose the tiles of the products of groups of so many rows, in the mean.

    decoding: "" of dense weights, "rows" of blocks that end with rows of the weight, or "values".
    A tile of rows holds twice the mean: most groups are then one tile, and read their weight once.
    """
    if decoding == "values":
        return TileConfig(_rows(2 * rows, 64), 32, 32, 1, 4, 2)
    if bits == 32:
        return TileConfig(_rows(2 * rows, 64), 32 if decoding else 64, 32, 1, 8, 2)
    block_m = _rows(2 * rows, 128)
    if block_m <= 32:
        return TileConfig(block_m, 64, 64 if decoding or not cores else 128, 1, 4, 4)
    block_k = 32 if cores == "mma" and not decoding else 64
    return TileConfig(block_m, 128, block_k, 1, 4 if block_m == 64 and not decoding else 8, 3)


def _lora_forward(p: Problem, processors: int, cores: str) -> TileConfig:
    # Each program reads its rows of x once and both factors (from L2). Few rows: the columns of y
    # are dealt out to several programs, each of which computes S again, and as the loop over K is a
    # chain of latencies, its steps are long.
    known, light = p.bits == 16 and cores in _FORWARD, _light(p)
    block_k, many = 64 if light else 32, 32 * processors <= p.M
    if p.M <= 512:
        tile = TileConfig(16, 64, 2 * block_k, 1, 4, 4 if light else 3 if known else 2)
    elif known:
        few = TileConfig(32, 64, block_k, 1, 4, 4)
        tile = _FORWARD[cores][block_rank(p.r)] if many else few
    else:
        tile = TileConfig(64 if light and many else 32, 64, block_k, 1, 8, 3)
    splits = _fill(ceil_div(p.M, tile.block_m), processors, ceil_div(p.N, 128))
    return replace(tile, splits=splits)


def _lora_backward_sb(p: Problem, processors: int, cores: str) -> TileConfig:
    # One read of dy; partial dS for every column tile, partial dB for every slab of rows.
    if p.bits == 16 and cores in _BACKWARD_SB:
        tile = _BACKWARD_SB[cores][block_rank(p.r)]
    else:
        block_n = 128 if _light(p) else 64 if p.bits == 16 else 32
        stages = 1 if p.bits == 16 and not _light(p) else 2
        tile = TileConfig(64 if p.bits == 32 else 32, block_n, 16, 1, 8, stages)
    return _dealt(tile, p.M, ceil_div(p.N, tile.block_n), processors)


def _lora_backward_xa(p: Problem, processors: int, cores: str) -> TileConfig:
    # One read of x and one write of dx; partial dA for every slab of rows.
    if p.bits == 16 and cores in _BACKWARD_XA:
        tile = _BACKWARD_XA[cores][block_rank(p.r)]
    else:
        stages = 1 if p.bits == 16 and not _light(p) else 2
        tile = TileConfig(32, 16, 128 if _light(p) else 32, 1, 8, stages)
    return _dealt(tile, p.M, ceil_div(p.K, tile.block_k), processors)


def _dealt(tile: TileConfig, M: int, tiles: int, processors: int) -> TileConfig:
    """Return a backward tile with as many slabs of rows as give a processor about 16 warps."""
    block_m = _rows(M, tile.block_m)
    splits = _fill(tiles, 16 // tile.num_warps * processors, ceil_div(M, block_m))
    return replace(tile, block_m=block_m, splits=splits)


def _epilogue(p: Problem, processors: int, cores: str) -> TileConfig:
    block_m = _rows(p.M, 16 if p.M <= NF4_FUSED_ROWS_MAX else 32)
    return TileConfig(block_m, 64, 16, 1, 4 if block_m == 16 else 8, 2)


def _nf4_forward(p: Problem, processors: int, cores: str) -> TileConfig:
    # Bound by the packed weight up to about 50 rows: enough programs to keep every load port busy.
    block_m, block_n = (_rows(p.M, 64), 64) if p.bits == 16 else (_rows(p.M, 32), 32)
    programs = ceil_div(p.M, block_m) * ceil_div(p.N, block_n)
    splits = _fill(programs, 4 * processors, ceil_div(p.K, 256))
    # Every warp group decodes the whole tile of the weight, so of four warps there is one.
    return TileConfig(block_m, block_n, 64, splits, 4 if p.bits == 16 else 8, 3)


def _nf4_backward(p: Problem, processors: int, cores: str) -> TileConfig:
    block_m = _rows(p.M, 64)
    programs = ceil_div(p.M, block_m) * ceil_div(p.K, 64)
    splits = _fill(programs, 4 * processors, ceil_div(p.N, 256))
    return TileConfig(block_m, 64, 64, splits, 4 if p.bits == 16 else 8, 3)


def _light(p: Problem) -> bool:
    """Check that a tile of the rank and one of the activations leave registers for bigger tiles.

    The tiles of what is not light are the largest that spill nowhere (bench/results/resources_*).
    """
    return p.bits == 16 and block_rank(p.r) == 16


def _nf4_dequantize(p: Problem, processors: int, cores: str) -> TileConfig:
    # Bytes of a tile (block_n): four (two) for each of 256 threads become 16 bytes of 16-bit
    # (32-bit) values, so loads and stores are coalesced without an exchange between threads.
    return TileConfig(block_n=1024 if p.bits == 16 else 512, num_warps=8)


def _nf4_quantize(p: Problem, processors: int, cores: str) -> TileConfig:
    return TileConfig(block_n=4096, num_warps=4)  # values of a tile


def _dora_norm(p: Problem, processors: int, cores: str) -> TileConfig:
    # Every program reads all of lora_A, so it takes as many rows as leave few processors idle. A
    # processor with one program has what that one's stages hold to hide the latency of memory.
    light, most = _light(p), 32 if block_rank(p.r) == RANK_MOST else 64
    filled = (n for n in (64, 32) if 4 * ceil_div(p.N, n) >= 3 * processors)
    block_n = min(next(filled, 16), most)
    warps = 4 if block_n < (64 if light else 32) else 8
    return TileConfig(16, block_n, 128 if light else 64, 1, warps, 4 if light else 3)


_COUNTED: dict[str, Callable[[Problem, int, str], TileConfig]] = {
    "lora_forward": _lora_forward,
    "lora_backward_sb": _lora_backward_sb,
    "lora_backward_xa": _lora_backward_xa,
    "nf4_forward": _nf4_forward,
    "nf4_backward": _nf4_backward,
    "epilogue": _epilogue,
    "nf4_dequantize": _nf4_dequantize,
    "nf4_quantize": _nf4_quantize,
    "dora_norm": _dora_norm,
    "nf4_dora_norm": _dora_norm,
}
KERNELS = tuple(_COUNTED)
