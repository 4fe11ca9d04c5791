"""Dropout from a seed: textbook Philox, its published answers, and every back end's same mask."""

from __future__ import annotations

import math

import pytest
import torch
from linear_cases import BF16, F32, operands

import peftkern
from peftkern.backends import ops
from peftkern.backends.device import triton_interpreted
from peftkern.backends.dropout import keep_scale, keep_threshold, philox_keep
from peftkern.backends.programs import PLAIN

ROUNDS = 7
LOW = 0xFFFFFFFF
SEEDS = [0, 1, 0x1234_5678_9ABC_DEF0, 2**63 - 1, -1, -(2**63), 2**32, -(2**31)]
KNOWN_ANSWERS = [  # Random123's kat_vectors, philox4x32 in 10 rounds: counter, key, result
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((LOW,) * 4, (LOW,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


def philox(counter: tuple[int, ...], key: tuple[int, ...], rounds: int) -> tuple[int, ...]:
    """Salmon et al. 2011, section 3.3, on Python's integers."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(rounds):
        a, b = 0xD2511F53 * c0, 0xCD9E8D57 * c2
        c0, c1, c2, c3 = (b >> 32) ^ c1 ^ k0, b & LOW, (a >> 32) ^ c3 ^ k1, a & LOW
        k0, k1 = (k0 + 0x9E3779B9) & LOW, (k1 + 0xBB67AE85) & LOW
    return c0, c1, c2, c3


def textbook_keep(seed: int, rows: int, columns: int, threshold: int) -> torch.Tensor:
    key = (seed & LOW, seed >> 32 & LOW)
    mask = torch.empty(rows, columns, dtype=torch.bool)
    for row in range(rows):
        for column in range(columns):
            word = philox((column // 8, row, 0, 0), key, ROUNDS)[column % 8 // 2]
            mask[row, column] = (word >> 16 * (column % 2) & 0xFFFF) < threshold
    return mask


def seed_of(value: int) -> torch.Tensor:
    return torch.tensor([value], dtype=torch.int64)


@pytest.mark.parametrize(("counter", "key", "answer"), KNOWN_ANSWERS)
def test_textbook_gives_the_published_answers(counter, key, answer):
    assert philox(counter, key, 10) == answer


@pytest.mark.parametrize("seed", SEEDS, ids=hex)
def test_mask_is_the_textbooks(seed):
    for rows, columns, p in ((5, 37, 0.1), (1, 8, 0.5), (3, 1, 0.9)):
        got = philox_keep(seed_of(seed), rows, columns, p)
        assert got.shape == (rows, columns) and got.dtype is torch.bool
        assert torch.equal(got, textbook_keep(seed, rows, columns, keep_threshold(p)))


def test_mask_of_a_part_is_a_part_of_the_mask():
    """A row's and a column's draws depend on nothing but themselves."""
    whole = philox_keep(seed_of(3), 40, 100, 0.3)
    for rows, columns in ((40, 7), (1, 100), (13, 64)):
        assert torch.equal(philox_keep(seed_of(3), rows, columns, 0.3), whole[:rows, :columns])
    assert philox_keep(seed_of(3), 0, 5, 0.3).shape == (0, 5)


def test_seeds_rows_and_columns_draw_different_masks():
    one, two = (philox_keep(seed_of(s), 64, 512, 0.5) for s in (1, 2))
    assert not torch.equal(one, two)
    rows = {tuple(row.tolist()) for row in one}
    columns = {tuple(column.tolist()) for column in one.t()}
    assert len(rows) == 64 and len(columns) == 512


@pytest.mark.parametrize("p", [0.05, 0.1, 0.5, 0.9])
def test_share_that_is_kept(p):
    """Within six standard deviations of a binomial count, in all and in each of 8 positions."""
    keep = philox_keep(seed_of(11), 512, 1024, p)
    probability = keep_threshold(p) / 65536
    assert abs(probability - (1 - p)) <= 2**-17
    for part in (keep, *keep.view(512, -1, 8).unbind(-1)):
        n = part.numel()
        deviation = abs(part.sum().item() - n * probability)
        assert deviation < 6 * math.sqrt(n * probability * (1 - probability))


def test_thresholds_at_the_edges():
    assert keep_threshold(0.0) == 65536 and keep_threshold(1.0) == 0
    for p in (math.nextafter(0.0, 1.0), 1e-9, 2**-18):  # something has to go
        assert keep_threshold(p) == 65535
    for p in (math.nextafter(1.0, 0.0), 1 - 1e-9, 1 - 2**-18):  # something has to stay
        assert keep_threshold(p) == 1
    assert keep_threshold(0.5) == 32768
    assert philox_keep(seed_of(5), 9, 33, 0.0).all()
    assert not philox_keep(seed_of(5), 9, 33, 1.0).any()


def test_scale_of_what_is_kept():
    mask = torch.ones(1)
    assert keep_scale(None, 0.5) == 1.0 and keep_scale(mask, 1.0) == 1.0
    assert keep_scale(mask, 0.75) == 4.0


def run(o, keep, needs=(True, True, True, False)):
    y, S = ops.lora_linear_forward(o.x, o.weight, o.lora_A, o.lora_B, None, 1.5, keep, o.dropout_p)
    weights = (o.weight, o.lora_A, o.lora_B)
    return y, S, *ops.lora_linear_backward(o.dy, o.x, S, *weights, 1.5, keep, o.dropout_p, needs)


@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize("p", [0.1, 0.5, 1.0])
def test_back_end_given_a_seed_equals_one_given_the_mask(backend, dtype, p):
    o = operands((9, 20, 37, 4), dtype, F32, dropout_p=p)
    seed = seed_of(-77)
    mask = philox_keep(seed, 9, 37, p)
    for got, wanted in zip(run(o, seed), run(o, mask), strict=True):
        assert torch.equal(got, wanted)


@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize("nf4", [False, True])
def test_back_ends_given_a_seed_are_close_to_the_reference(nf4, dtype):
    o = operands((9, 20, 64, 4), dtype, F32, dropout_p=0.4)
    seed = seed_of(2**40 + 3)
    results = []
    for name in ("cpu", *PLAIN):
        with peftkern.use_backend(name):
            results.append(run(o, seed))
    for result in results[:-1]:
        torch.testing.assert_close(result, results[-1])


@pytest.mark.filterwarnings("ignore::DeprecationWarning:triton")
@pytest.mark.skipif(not triton_interpreted(), reason="tests/gpu compares what is compiled")
@pytest.mark.parametrize("seed", SEEDS[2:6], ids=hex)
def test_kernel_draws_the_same_at_every_tile(seed):
    """With A = identity, S is x where it is kept; the last tiles of both are odd."""
    M, K = 37, 150
    x, A, B = torch.ones(M, K), torch.eye(K), torch.zeros(1, K)
    for p in (2**-18, 1 - 2**-18) if seed < 0 else (0.1,):
        with peftkern.use_backend("triton"):
            options = (None, 1.0, seed_of(seed), p)
            _, S = ops.lora_linear_forward(x, x.new_ones(1, K), A, B, *options)
        assert torch.equal(S != 0, philox_keep(seed_of(seed), M, K, p))
        kept = S[S != 0]
        assert torch.equal(kept, torch.full_like(kept, 1 / (1 - p)))
