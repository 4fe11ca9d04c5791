"""The truncated SVD of weights against a dense SVD in float64."""

from __future__ import annotations

import math
import threading
import weakref
from collections.abc import Iterable

import pytest
import torch
from linear_cases import BF16, F16, F32, F64
from low_rank_svd_cases import orthonormal, power_law
from nf4_weights import assert_same_every_time
from tolerances import (
    BOUND_FAILED,
    BOUND_RTOL,
    SVD_ORTHOGONALITY,
    SVD_RECONSTRUCTION,
    TRUNCATED_EXCESS,
    TRUNCATED_NORM,
    TRUNCATED_ORDER,
    TRUNCATED_SIGMA,
)
from torch import Tensor

import peftkern
import peftkern.functional.truncated_svd as svd_module
from peftkern.functional.krylov import (
    FAILURE,
    PROBES,
    STEPS,
    Krylov,
    begin,
    extend,
    multiply,
    multiply_back,
    norm_bound,
    shortfall,
)
from peftkern.functional.nf4 import dequantize_nf4, quantize_nf4
from peftkern.functional.panels import Panels, Run, full_float32, parallel
from peftkern.functional.truncated_svd import FLOOR, TruncatedSVD, truncated_svd


def truth(svd: TruncatedSVD, W: Tensor) -> float:
    """The excess of the error over the least one, as `TruncatedSVD.excess` defines it."""
    W = W.double()
    least = torch.linalg.svdvals(W)[len(svd.S) :].norm()
    error = (W - (svd.U.double() * svd.S) @ svd.Vh.double()).norm()
    return float((error - least) / max(least, FLOOR * W.norm()))


def check(svd: TruncatedSVD, W: Tensor, rank: int, excess: float) -> None:
    k = min(rank, *W.shape)
    assert (svd.U.shape, svd.S.shape, svd.Vh.shape) == ((len(W), k), (k,), (k, W.shape[1]))
    assert {svd.U.dtype, svd.S.dtype, svd.Vh.dtype} == {F32}
    for basis in (svd.U.T, svd.Vh):
        assert (basis @ basis.T - torch.eye(k)).abs().max() <= SVD_ORTHOGONALITY
    assert (svd.S[:-1] >= svd.S[1:]).all()
    assert torch.isclose(svd.norm, W.double().norm(), rtol=TRUNCATED_NORM, atol=0.0)
    assert truth(svd, W) <= excess


@pytest.mark.parametrize("shape", [(600, 560), (530, 900), (1100, 520)])
@pytest.mark.parametrize("decay", [0.5, 1.0, 2.0])
def test_power_laws(shape, decay):
    W = power_law(*shape, decay)
    svd = truncated_svd(W, 8, tol=1e-5)
    check(svd, W, 8, TRUNCATED_EXCESS)
    sigma = torch.linalg.svdvals(W.double())[:8]
    assert ((svd.S - sigma).abs() <= TRUNCATED_SIGMA * sigma[0]).all()
    assert 2 <= int(svd.sweeps) <= 10


def test_gaussian():
    W = torch.randn(700, 640)
    tol = 1e-4
    check(truncated_svd(W, 8, tol=tol), W, 8, tol)


@pytest.mark.parametrize("shape", [(384, 384), (384, 1536), (1536, 384), (1, 9), (9, 1), (40, 7)])
def test_small_matrices_are_exact(shape):
    W = torch.randn(shape)
    svd = truncated_svd(W, 12, certify=True)
    whole = min(shape) <= 12  # the error is rounding
    check(svd, W, 12, TRUNCATED_EXCESS / (FLOOR if whole else 1))
    assert int(svd.sweeps) == 0 and svd.excess == 0.0
    assert svd.certificate <= (TRUNCATED_EXCESS / FLOOR if whole else 10 * TRUNCATED_EXCESS)


def test_a_rank_that_leaves_no_room_for_sweeps():
    W = torch.randn(600, 640)
    svd = truncated_svd(W, 200)
    check(svd, W, 200, TRUNCATED_EXCESS)
    assert int(svd.sweeps) == 0
    check(truncated_svd(W, 1000), W, 1000, math.inf)


@pytest.mark.parametrize("dtype", [BF16, F16])
def test_16_bits_are_widened(dtype):
    W = power_law(600, 640, 0.5).to(dtype)
    svd, wide = truncated_svd(W, 8, sweeps=5), truncated_svd(W.float(), 8, sweeps=5)
    assert all(torch.equal(*pair) for pair in zip(svd[:6], wide[:6], strict=True))


@pytest.mark.parametrize("blocksize", [64, 4096])
@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("shape", [(640, 576), (577, 601)])
def test_nf4_and_differences_equal_dense(blocksize, double_quant, shape):
    W = power_law(*shape, 0.5)
    w = quantize_nf4(W, blocksize=blocksize, double_quant=double_quant)
    decoded = dequantize_nf4(w, F32)
    for weight, minus, dense in (
        (w, None, decoded),
        (W, w, W - decoded),
        (w, W.bfloat16(), decoded - W.bfloat16().float()),
        (W.half(), W, W.half().float() - W),
    ):
        svd, same = (
            truncated_svd(weight, 8, minus=minus, sweeps=4),
            truncated_svd(dense, 8, sweeps=4),
        )
        # Panels of a block size that ends in no row have other heights: another order of sums.
        assert torch.allclose(svd.S, same.S, rtol=TRUNCATED_ORDER) and torch.allclose(
            svd.norm, same.norm
        )


def test_one_heavy_direction():
    """Outliers of 1e4 times the rest, whose square hides all else from a first product."""
    W = power_law(640, 600, 0.5)
    W[:, 3] += 1e4 * torch.randn(640) / 25
    svd = truncated_svd(W, 8, sweeps=8)
    sigma = torch.linalg.svdvals(W.double())[:8]
    assert ((svd.S - sigma).abs() <= TRUNCATED_SIGMA * sigma[0]).all()


@pytest.mark.parametrize("rank", [0, 1, 5])
def test_low_rank_matrices(rank):
    W = torch.randn(700, rank) @ torch.randn(rank, 600)
    svd = truncated_svd(W, 8, certify=True)
    error = (W - (svd.U * svd.S) @ svd.Vh).norm()
    assert error <= SVD_RECONSTRUCTION * W.norm() and int(svd.sweeps) <= 4
    assert truth(svd, W) <= svd.certificate if rank else svd.certificate == 0


@pytest.mark.parametrize("scale", [1e-25, 1e-12, 1e15, 1e30])
def test_scales(scale):
    W = power_law(640, 600, 0.5)
    svd, one = truncated_svd(W * scale, 8), truncated_svd(W, 8)
    assert torch.allclose(svd.S / scale, one.S, rtol=TRUNCATED_ORDER)
    assert torch.allclose(svd.norm / scale, one.norm)


def test_weights_that_are_subnormal():
    W = power_law(640, 600, 0.5) * 1e-42
    svd, large = truncated_svd(W, 8), truncated_svd((W.double() * 2.0**140).float(), 8)
    assert torch.allclose(svd.norm * 2.0**140, large.norm)
    assert torch.allclose(svd.Vh, large.Vh, atol=1e-3)
    assert torch.allclose(svd.S.double(), large.S.double() * 2.0**-140, rtol=0, atol=2e-45)


@pytest.mark.parametrize("seeds", [8, pytest.param(200, marks=pytest.mark.long)])
def test_the_certificate_is_never_below_the_truth(seeds):
    k = 530
    spectra = [torch.arange(1, k + 1, dtype=F64) ** -decay for decay in (0.3, 0.5, 1.0, 2.0)]
    spectra += [torch.linalg.svdvals(torch.randn(k, k, dtype=F64))]
    spectra += [torch.cat([spectra[4][:12], spectra[4][200:300].repeat(6)[: k - 12] / 3])]
    spectra += [torch.cat([1e3 * spectra[1][:1], spectra[1][1:]])]
    left, right = orthonormal(k + 50, k), orthonormal(k, k)
    for seed in range(seeds):
        sigma = spectra[seed % len(spectra)]
        W = ((left * sigma) @ right.T).float()
        svd = truncated_svd(W, 8, sweeps=2 + seed % 5, certify=True, seed=seed)
        error = (W.double() - (svd.U.double() * svd.S) @ svd.Vh.double()).norm()
        least = sigma.sort(descending=True)[0][8:].norm()
        excess = (error - least) / max(least, FLOOR * sigma.norm())
        assert excess <= svd.certificate, (seed, excess, svd.certificate)


def test_the_bound_on_a_norm_holds_and_is_that_of_the_literature_for_one_vector():
    """1.648 sqrt(n) exp(-sqrt(eps) (2 k - 1)), where atanh sqrt(eps) may stand for sqrt(eps)."""
    for n, k in ((300, 5), (4096, 10), (128_000, 16)):
        log = (
            math.log(1.648)
            + math.log(n) / 2
            - (2 * k - 1) * math.atanh(math.sqrt(shortfall(n, 1, k)))
        )
        assert math.exp(log) == pytest.approx(FAILURE, rel=BOUND_RTOL)
    n, steps, below = 300, 3, 0
    values = torch.rand(n, dtype=F64) * 0.9
    values[0] = 1.0
    for _ in range(300):
        x = torch.randn(n, 4, dtype=F64)
        space = torch.linalg.qr(torch.cat([x, values[:, None] * x, values[:, None] ** 2 * x], 1))[0]
        top = torch.linalg.eigvalsh(space.T @ (values[:, None] * space))[-1]
        below += int(top < 1 - shortfall(n, 4, steps))
    assert below <= BOUND_FAILED


@pytest.mark.parametrize("decay", [0.0, 0.3, 1.0])
def test_the_bound_on_a_norm_by_polynomials_holds_and_is_below_that_of_the_literature(decay):
    n, below = 300, 0
    values = torch.arange(1, n + 1, dtype=F64) ** -decay
    values[0] = 1.2
    panels = Panels(torch.diag(values.sqrt()).float(), None)
    for seed in range(30):
        space = Krylov(panels, PROBES, STEPS, seed)
        begin([space], map)
        multiply([space], True, map)
        for step in range(2, STEPS + 1):
            extend([space], map)
            multiply([space], True, map)
            ritz, bound = torch.linalg.eigvalsh(space.T)[-1].item(), norm_bound(space)
            assert ritz <= bound < ritz / (1 - shortfall(n, steps=step))
            below += int(bound < values[0])
    assert below <= BOUND_FAILED


def test_lists_equal_single_matrices():
    w = quantize_nf4(torch.randn(600, 640))
    weights = [power_law(640, 530, 0.5), w, torch.randn(30, 70), torch.randn(600, 640).half()]
    minus = [None, torch.randn(600, 640), None, w]
    svd = truncated_svd(weights, 8, minus=minus, certify=True)
    for i, (one, other) in enumerate(zip(weights, minus, strict=True)):
        alone = truncated_svd(one, 8, minus=other, certify=True)
        assert all(torch.equal(column[i], value) for column, value in zip(svd, alone, strict=True))
    assert truncated_svd([], 8)[:3] == ([], [], [])


def test_same_bits_in_every_run_and_another_seed():
    W = torch.randn(600, 640)
    svd, again, other = (truncated_svd(W, 8, seed=seed) for seed in (0, 0, 1))
    assert torch.equal(svd.Vh, again.Vh) and not torch.equal(svd.Vh, other.Vh)


def test_panels_of_wide_matrices_have_rows_enough():
    """Of fewer, the vectors that are multiplied with each would be most of what is moved."""
    wide, narrow = Panels(torch.empty(150, 65_536), None), Panels(torch.empty(300, 8192), None)
    assert [rows.stop for rows in wide.slices] == [64, 128, 150]
    assert [rows.stop for rows in narrow.slices] == [128, 256, 300]


@pytest.mark.parametrize("rank", [8, 40])
def test_bits_do_not_depend_on_threads(rank):
    """Panels of several heights, layers of one panel, small ones of both orientations."""
    w = quantize_nf4(torch.randn(1100, 2048))
    weights = [torch.randn(2048, 1030), w, torch.randn(530, 600), torch.randn(9, 300_000)]
    weights += [torch.randn(6000, 400), torch.randn(400, 6000)]

    def call() -> TruncatedSVD:
        before = torch.get_num_threads()
        svd = truncated_svd(weights, rank, sweeps=3, certify=True)
        assert torch.get_num_threads() == before
        return svd

    assert_same_every_time(call, 3, threads=(1, 2, 7))


def test_panels_are_joined_for_products_of_one_stored_weight(monkeypatch):
    """As many as 8 calls share out, whatever the threads; what has to be decoded is not joined."""
    monkeypatch.setattr("peftkern.functional.panels._ON_CPU", 1 << 14)
    monkeypatch.setattr("peftkern.functional.panels._LEAST", 1)
    W = torch.randn(1100, 576)
    w = quantize_nf4(W)
    for weight, minus, joined in (
        (W, None, 4),
        (w, None, 4),
        (quantize_nf4(W[:260]), None, 1),
        (W, w, 1),
    ):
        panels = Panels(weight, minus)
        assert len(panels.slices) > 8
        found = panels.product_slices
        assert {rows.stop - rows.start for rows in found[:-1]} == {joined * panels.rows}
        assert [i for rows in found for i in range(rows.start, rows.stop)] == [*range(panels.m)]

    def call() -> TruncatedSVD:
        return truncated_svd([w, W], 8, sweeps=3, certify=True)

    assert_same_every_time(call, 3, threads=(1, 2, 7))
    svd = TruncatedSVD(*(column[1] for column in call()))
    check(svd, W, 8, float(svd.certificate))


def test_inference_mode_and_a_forced_back_end_reach_all_threads():
    torch.set_num_threads(2)
    w = quantize_nf4(torch.randn(1100, 2048))
    svd = truncated_svd(w, 4)
    with torch.inference_mode():
        assert torch.equal(truncated_svd(w, 4).S, svd.S)
    peftkern.reset_stats()
    with peftkern.use_backend("reference"):
        again = truncated_svd(w, 4)
    assert torch.allclose(again.S, svd.S, rtol=TRUNCATED_ORDER)
    assert "reference" in str(peftkern.stats()) and "cpu" not in str(peftkern.stats())


def test_nothing_has_a_gradient_and_lower_precisions_do_not_reach_it():
    W = power_law(600, 640, 0.5).requires_grad_()
    svd = truncated_svd(W, 8)
    assert not svd.U.requires_grad
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(truncated_svd(W, 8).S, svd.S)
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("medium")
        assert torch.equal(truncated_svd(W, 8).S, svd.S)
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision(before)


def test_calls_that_overlap_leave_threads_and_precision_as_they_were():
    """The first to begin ends first; the other one is a new thread's."""
    precision = torch.get_float32_matmul_precision()
    begun, ended, seen = threading.Event(), threading.Event(), []
    x = torch.randn(256, 256)
    full = x @ x

    def second() -> None:
        with full_float32(), parallel(torch.device("cpu")) as run:
            begun.set()
            ended.wait(60)
            seen.append(torch.equal(x @ x, full))
            seen.extend(run(lambda _: torch.get_num_threads(), range(4)))
        seen.append(torch.get_num_threads())

    other, later = threading.Thread(target=second), []
    third = threading.Thread(target=lambda: later.append(torch.get_num_threads()))
    try:
        torch.set_num_threads(3)
        torch.set_float32_matmul_precision("medium")
        with full_float32(), parallel(torch.device("cpu")):
            other.start()
            assert begun.wait(60)
        assert torch.get_num_threads() == 3
        ended.set()
        other.join()
        third.start()
        third.join()
        assert torch.get_num_threads() == 3 and later == [3]
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        ended.set()
        torch.set_float32_matmul_precision(precision)
    assert seen == [True, 1, 1, 1, 1, 3]


def test_a_default_device_and_a_tol_that_is_an_integer():
    W = torch.randn(600, 640)
    svd = truncated_svd(W, 8, tol=1, certify=True)
    with torch.device("meta"):
        again = truncated_svd(W, 8, tol=1, certify=True)
    assert all(torch.equal(*pair) for pair in zip(svd, again, strict=True))


def test_results_and_buffers_of_panels_do_not_add_up(monkeypatch):
    """Gram matrices of many panels; a list of many layers."""
    monkeypatch.setattr("peftkern.functional.panels._ON_CPU", 4096)
    monkeypatch.setattr("peftkern.functional.panels._LEAST", 1)
    live, most, made = {}, [0], Panels.read

    def read(self: Panels, rows: slice, place: int = 0) -> Tensor:
        panel = made(self, rows, place)
        live.update({id(one): weakref.ref(one) for one in self._buffers.__dict__.values()})
        most[0] = max(most[0], alive(live.values()))
        return panel

    def alive(references: Iterable[weakref.ref]) -> int:
        return sum(reference() is not None for reference in references)

    grams = []

    def gram(layer: object, rows: slice) -> Tensor:
        part = own(layer, rows)
        grams.append(weakref.ref(part))
        held.append(alive(grams))
        return part

    own, held = svd_module._gram, []
    monkeypatch.setattr(Panels, "read", read)
    monkeypatch.setattr(svd_module, "_gram", gram)
    monkeypatch.setattr(svd_module, "_TOGETHER", 1)
    torch.set_num_threads(1)
    truncated_svd([torch.randn(1024, 64).bfloat16() for _ in range(6)], 4)
    assert most[0] <= 2 and len(held) == 6 * 16 and max(held) <= 2


DENSE = torch.ones(6, 5)


@pytest.mark.parametrize(
    ("args", "more", "message"),
    [
        (
            (3, 2),
            {},
            "weight: expected a tensor, an NF4Weight or BlockWeight, or a list of them, got 3",
        ),
        (([DENSE, 3], 2), {}, r"weight\[1\]: expected a dense tensor, got 3"),
        ((DENSE[0], 2), {}, r"weight: expected \[m, n\] without zeros, got \[5\]"),
        ((DENSE[:0], 2), {}, r"weight: expected \[m, n\] without zeros, got \[0, 5\]"),
        ((DENSE.double(), 2), {}, "weight: expected a tensor of one of"),
        ((DENSE, 0), {}, "rank: expected an integer of at least 1, got 0"),
        ((DENSE, 2.0), {}, "rank: expected an integer of at least 1, got 2.0"),
        ((DENSE, 2), {"oversample": -1}, "oversample: expected an integer of at least 0"),
        ((DENSE, 2), {"sweeps": 0}, "sweeps: expected an integer of at least 1, got 0"),
        ((DENSE, 2), {"tol": 0.0}, "tol: expected a positive number, got 0.0"),
        ((DENSE, 2), {"minus": DENSE.T}, r"minus: expected \[6, 5\] on cpu, got \[5, 6\]"),
        (([DENSE], 2), {"minus": [None, None]}, "minus: expected 1 as in weight, got 2"),
    ],
)
def test_bad_arguments(args, more, message):
    with pytest.raises(ValueError, match=message):
        truncated_svd(*args, **more)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("side", [30, 600])
def test_values_that_are_not_finite(bad, side):
    W = torch.randn(side, 640)
    W[3, 4] = bad
    with pytest.raises(ValueError, match=r"weight\[1\]: expected finite values, got NaN or Inf"):
        truncated_svd([torch.randn(9, 9), W], 2)


@pytest.mark.parametrize("tol", [1e-3, 1e-4, 1e-6])
@pytest.mark.parametrize("shelf", [0.0, 0.02, 0.05])
@pytest.mark.parametrize("decay", [0.5, 1.0, 2.0])
def test_the_estimate_is_not_below_the_truth(decay: float, shelf: float, tol: float) -> None:
    sigma = torch.arange(1, 561, dtype=F64) ** -decay + shelf
    W = ((orthonormal(600, 560) * sigma) @ orthonormal(560, 560).T).float()
    svd = truncated_svd(W, 8, tol=tol)
    assert truth(svd, W) <= svd.excess + TRUNCATED_EXCESS
    assert svd.excess < tol


def test_a_sweep_that_was_taken_for_the_last_one_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its second product was left out, and is made up for."""
    made_up = []

    def spy(spaces: list[Krylov], run: Run) -> None:
        made_up.extend(spaces)
        multiply_back(spaces, run)

    def note(layer: svd_module._Layer, kept: float) -> None:
        noted(layer, kept)
        layer.next = 0.0

    noted = svd_module._Layer.note
    monkeypatch.setattr(svd_module, "multiply_back", spy)
    monkeypatch.setattr(svd_module._Layer, "note", note)
    W = power_law(600, 560, 0.5)
    svd = truncated_svd(W, 8, tol=1e-5)
    assert len(made_up) == svd.sweeps - 2  # the first knows nothing of another, the last was last
    assert truth(svd, W) <= TRUNCATED_EXCESS
