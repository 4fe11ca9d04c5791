"""Tiles: a pure choice that covers every problem, tables that are looked up and checked."""

from __future__ import annotations

import itertools
import json
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

pytest.importorskip("triton")

from peftkern.backends.dispatch import _BACKENDS, MEASURABLE
from peftkern.kernels import configs
from peftkern.kernels.configs import (
    KERNELS,
    NF4_FUSED_ROWS_MAX,
    Problem,
    TileConfig,
    as_entry,
    block_rank,
    ceil_div,
    choose,
    next_power,
    slab,
)

# The length that each kernel's `splits` cuts, and the block in whole numbers of which it does.
REDUCTIONS = {
    "lora_backward_sb": ("M", "block_m"),
    "lora_backward_xa": ("M", "block_m"),
    "nf4_forward": ("K", "block_k"),
    "nf4_backward": ("N", "block_n"),
}
SIZES = (1, 15, 16, 17, 63, 129, 512, 4096, 14336, 8388607)
RANKS = (1, 16, 17, 64, 65, 256)
PROCESSORS = (1, 4, 108, 132, 148)
CORES = ("", "mma", "wgmma", "tcgen05")

problems = st.builds(
    Problem,
    st.sampled_from(KERNELS),
    *(st.integers(1, 1 << 23) for _ in range(3)),
    st.integers(1, 256),
    st.sampled_from([16, 32]),
)


@pytest.fixture
def tables(tmp_path, monkeypatch):
    """A folder for measured tables, read anew."""
    monkeypatch.setattr(configs, "TUNED", tmp_path)
    caches = (configs.load, configs.chosen, configs.fastest, configs.layer_of)
    caches += (configs.nf4_fused_rows,)
    for cache in caches:
        cache.cache_clear()
    yield tmp_path
    for cache in caches:
        cache.cache_clear()


def assert_serves(problem: Problem, processors: int, cores: str = "") -> TileConfig:
    """The choice is one that compiles, and its slabs cover the reduction without an empty one."""
    config = choose(problem, processors, None, cores)
    assert config.valid(problem.kernel), (problem, config)
    assert config == choose(problem, processors, None, cores)
    if problem.kernel in REDUCTIONS:
        dimension, block = REDUCTIONS[problem.kernel]
        length = getattr(problem, dimension)
        step = slab(length, getattr(config, block), config.splits)
        slabs = ceil_div(length, step)
        assert step % getattr(config, block) == 0
        assert slabs <= config.splits
        assert (slabs - 1) * step < length <= slabs * step
    return config


@pytest.mark.parametrize("kernel", KERNELS)
def test_every_problem_of_a_grid_gets_tiles(kernel):
    for M, N, K in itertools.product(SIZES, repeat=3):
        for r, bits in itertools.product(RANKS, (16, 32)):
            assert_serves(Problem(kernel, M, N, K, r, bits), 132)
    for processors, M, r, cores in itertools.product(PROCESSORS, SIZES, RANKS, CORES):
        assert_serves(Problem(kernel, M, 4096, 4096, r, 16), processors, cores)


@given(problem=problems, processors=st.integers(1, 1000), cores=st.sampled_from(CORES))
def test_any_problem_gets_tiles(problem, processors, cores):
    assert_serves(problem, processors, cores)


def test_loops_over_16_bit_activations_are_prefetched():
    """With two stages a loop waits for the copy that it has just begun."""
    for cores, r, M in itertools.product(("mma", "wgmma"), RANKS, SIZES):
        for kernel in ("lora_forward", "lora_backward_sb", "lora_backward_xa", "nf4_forward"):
            assert choose(Problem(kernel, M, 4096, 4096, r, 16), 132, None, cores).num_stages >= 3


def test_tensor_cores_and_shared_memory_of_architectures():
    assert {configs.tensor_cores(arch) for arch in ("sm80", "sm86", "sm89", "sm120")} == {"mma"}
    assert (configs.tensor_cores("sm90"), configs.tensor_cores("sm100")) == ("wgmma", "tcgen05")
    assert {configs.tensor_cores(arch) for arch in ("gfx942", "interpreter", "sm999")} == {""}
    sizes = {"sm80": 163, "sm89": 99, "sm90": 227, "sm120": 99, "gfx942": 64}
    assert all(configs.shared_memory(arch) == size << 10 for arch, size in sizes.items())


def test_fused_rows_by_tiles_of_the_result_and_tensor_cores():
    """A result narrower than the processors is split more, and pays for partial sums."""
    rows = {
        (cores, n): configs.nf4_fused_rows("sm999", n, 132, cores)
        for cores in CORES
        for n in (64, 131 * 64, 131 * 64 + 1, 14336)
    }
    for cores in CORES:
        wide = 64 if cores in ("wgmma", "tcgen05") else 128
        narrow = [rows[cores, n] for n in (64, 131 * 64)]
        assert narrow == [wide // 2] * 2
        assert [rows[cores, n] for n in (131 * 64 + 1, 14336)] == [wide] * 2


@given(
    rows=st.integers(1, 1 << 30),
    bits=st.sampled_from([16, 32]),
    decoding=st.sampled_from(["", "rows", "values"]),
    cores=st.sampled_from(CORES),
)
def test_tiles_of_groups_compile_and_hold_most_groups(rows, bits, decoding, cores):
    config = configs.grouped_tile(rows, bits, decoding, cores)
    assert config.valid()
    assert config.block_m >= min(2 * rows, 64)


@given(length=st.integers(1, 2**31), block=st.sampled_from([16, 64, 128]), n=st.integers(1, 2000))
def test_slabs_cover_the_length_and_none_is_empty(length, block, n):
    step = slab(length, block, n)
    slabs = ceil_div(length, step)
    assert step % block == 0 and slabs <= n
    assert (slabs - 1) * step < length <= slabs * step


def test_fused_backward_columns_divide_a_row():
    """The grid of nf4_backward is K // block_k: blocks of a row are whole numbers of tiles."""
    for blocksize in (32, 64, 4096):
        config = choose(Problem("nf4_backward", 16, 4096, 4096, 1, 16), 132)
        assert blocksize % min(config.block_k, blocksize) == 0


def test_tiles_of_the_rank_cover_it():
    for r in range(1, 257):
        block = block_rank(r)
        assert block in (16, 32, 64)
        assert block >= r or block == 64
        assert next_power(r) >= r > next_power(r) // 2


@pytest.mark.parametrize(
    "change",
    [
        {"block_m": 0},
        {"block_m": 8},
        {"block_n": 96},
        {"block_k": -64},
        {"splits": 0},
        {"num_warps": 3},
        {"num_warps": 32},
        {"num_stages": 0},
        {"num_stages": 9},
    ],
    ids=str,
)
def test_tiles_that_do_not_compile_are_not_valid(change):
    assert TileConfig().valid()
    assert not TileConfig(**change).valid()
    problem = Problem("nf4_forward", 8, 4096, 4096, 16, 16)
    table = {problem.key(): as_entry(TileConfig(**change))}
    with pytest.raises(ValueError, match=rf"tuned config {problem.key()}: expected powers of two"):
        choose(problem, 132, table)


def test_unknown_kernel_and_unknown_field_raise():
    with pytest.raises(KeyError, match="no_such"):
        choose(Problem("no_such", 1, 1, 1, 1, 16), 132)
    problem = Problem("epilogue", 1, 64, 64, 16, 16)
    with pytest.raises(TypeError, match="block_x"):
        choose(problem, 132, {problem.key(): {"block_x": 16}})


def test_table_wins_for_its_key_alone():
    problem = Problem("lora_forward", 500, 4096, 4096, 16, 16)
    measured = TileConfig(32, 128, 32, 2, 8, 4)
    table = json.loads(json.dumps({problem.key(): as_entry(measured)}))
    assert choose(problem, 132, table) == measured
    same_key = Problem("lora_forward", 512, 4096, 4096, 16, 16)
    assert choose(same_key, 132, table) == measured
    for other in (
        Problem("lora_forward", 513, 4096, 4096, 16, 16),
        Problem("lora_forward", 500, 4096, 4097, 16, 16),
        Problem("lora_forward", 500, 4096, 4096, 17, 16),
        Problem("lora_forward", 500, 4096, 4096, 16, 32),
        Problem("epilogue", 500, 4096, 4096, 16, 16),
    ):
        assert choose(other, 132, table) == choose(other, 132)


def test_architecture_without_a_table_gets_counted_tiles(tables):
    problem = Problem("nf4_forward", 8, 4096, 4096, 16, 16)
    assert configs.load("sm999") == {}
    assert configs.chosen(problem, "sm999", 132, "mma") == choose(problem, 132, None, "mma")


def test_table_of_an_architecture_is_read(tables):
    problem = Problem("nf4_forward", 8, 4096, 4096, 16, 16)
    measured = TileConfig(16, 32, 128, 4, 4, 4)
    table = {"nf4_fused_rows": 10_000, "configs": {problem.key(): as_entry(measured)}}
    (tables / "sm90.json").write_text(json.dumps(table))
    assert configs.chosen(problem, "sm90", 132, "wgmma") == measured
    assert configs.chosen(problem, "sm80", 132, "mma") == choose(problem, 132, None, "mma")
    assert configs.nf4_fused_rows("sm90", 4096, 132, "wgmma") == NF4_FUSED_ROWS_MAX


def test_nearest_weight_answers_for_one_that_was_not_measured(tables):
    """As far as a factor of two in each direction, for the same op, rows, rank and bits alone."""
    op = "nf4_lora_linear_forward"
    asked = Problem(op, 7, 4096, 4096, 16, 16)
    answers = {"8192x4096": "cuda", "4096x4096": "triton", "1000x1000": "cuda"}
    table = {asked.class_key(): answers}
    (tables / "sm90.json").write_text(json.dumps({"back_ends": table}))
    for (n, k), answer in {
        (4096, 4096): "triton",
        (5000, 4096): "triton",
        (6000, 4096): "cuda",
        (16384, 4096): "cuda",
        (16385, 4096): None,
        (4096, 8193): None,
        (1500, 1000): "cuda",
        (0, 4096): None,
        (4096, 0): None,
    }.items():
        assert configs.fastest(Problem(op, 5, n, k, 9, 16), "sm90") == answer, (n, k)
    for other in (
        Problem(op, 9, 4096, 4096, 16, 16),
        Problem(op, 7, 4096, 4096, 17, 16),
        Problem(op, 7, 4096, 4096, 16, 32),
        Problem("nf4_lora_linear_backward", 7, 4096, 4096, 16, 16),
    ):
        assert configs.fastest(other, "sm90") is None
    assert configs.fastest(asked, "sm80") is None
    assert configs.layer_of(asked, "sm90") is None


def test_shipped_tables_are_valid():
    for path in sorted(configs.TUNED.glob("*.json")):
        table = json.loads(path.read_text(encoding="utf-8"))
        for key, entry in table.get("configs", {}).items():
            assert TileConfig(**entry).valid(key.split("/")[0]), (path.name, key)
            assert key.split("/")[0] in KERNELS, (path.name, key)
        assert 0 <= table.get("nf4_fused_rows", 0) <= NF4_FUSED_ROWS_MAX
        for section, answers in (("back_ends", _BACKENDS), ("layers", ("peftkern", "PEFT"))):
            for key, shapes in table.get(section, {}).items():
                assert set(shapes.values()) <= set(answers), (path.name, key)
                assert all(re.fullmatch(r"\d+x\d+", shape) for shape in shapes)
                assert key.split("/")[0] in (*MEASURABLE, "lora_linear", "nf4_lora_linear")
