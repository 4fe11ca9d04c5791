"""Results of the SVD of low-rank updates in tensors that the caller gives."""

from __future__ import annotations

import math

import pytest
import torch
from linear_cases import F64
from low_rank_svd_cases import equal, of_layer, ragged
from torch import Tensor

from peftkern.backends.cpu import low_rank_svd as cpu
from peftkern.functional.low_rank_svd import LowRankSVD, low_rank_svd

B0, A0 = torch.ones(6, 2), torch.ones(2, 5)


def room(svd: LowRankSVD) -> LowRankSVD:
    """Memory for a result of these shapes, every value of which is wrong."""
    return LowRankSVD(
        *([torch.full_like(t, math.nan) for t in column] for column in svd[:3]),
        *(torch.full_like(t, 99) for t in svd[3:]),
    )


def into_out(
    Bs: list[Tensor],
    As: list[Tensor],
    scaling: float | list[float] = 1.0,
    wanted: LowRankSVD | None = None,
) -> None:
    svd = low_rank_svd(Bs, As, scaling) if wanted is None else wanted
    out = room(svd)
    places = [t.data_ptr() for column in out[:3] for t in column]
    assert low_rank_svd(Bs, As, scaling, out=out) is out
    assert [t.data_ptr() for column in out[:3] for t in column] == places
    for i in range(len(Bs)):
        for ours, theirs in zip(of_layer(out, i), of_layer(svd, i), strict=True):
            assert torch.equal(ours.nan_to_num(-3.0), theirs.nan_to_num(-3.0))


def test_out_gets_the_same_bits(every_kernel):
    into_out(*ragged())


@pytest.mark.parametrize("count", [1, 19])
@pytest.mark.parametrize("r", [16, 40])
def test_results_written_past_the_caches_have_the_same_bits(every_kernel, r, count, monkeypatch):
    """Whole lines of them, and beyond Jacobi's ranks, too; some of it is NaN."""
    Bs, As = [torch.randn(1040, r) for _ in range(count)], [torch.randn(r, 64 * r)] * count
    Bs[count // 2][3, 1] = math.nan
    monkeypatch.setattr(cpu, "STREAM_BYTES", 1 << 40)
    wanted = low_rank_svd(Bs, As)
    monkeypatch.setattr(cpu, "STREAM_BYTES", 0)
    into_out(Bs, As, wanted=wanted)


def test_out_of_a_single_pair(every_kernel):
    B, A = torch.randn(64, 16), torch.randn(16, 48)
    svd = low_rank_svd(B, A, 0.5)
    out = LowRankSVD(*(torch.full_like(t, 9) for t in svd))
    assert low_rank_svd(B, A, 0.5, out=out) is out
    assert equal(out, svd)
    assert equal(low_rank_svd(2 * B, A, 0.25, out=svd), low_rank_svd(2 * B, A, 0.25))


def test_out_of_an_earlier_call_and_of_no_pairs(every_kernel):
    Bs, As, scaling = ragged(7)
    out = low_rank_svd([-B for B in Bs], As, scaling)
    wanted = low_rank_svd(Bs, As, scaling)
    low_rank_svd(Bs, As, scaling, out=out)
    assert all(equal(of_layer(out, i), of_layer(wanted, i)) for i in range(7))
    none = low_rank_svd([], [])
    assert low_rank_svd([], [], out=none) is none


def test_out_of_float64_factors_and_of_no_rank():
    Bs, As = (
        [torch.randn(9, 3), torch.randn(4, 0)],
        [torch.randn(3, 8, dtype=F64), torch.ones(0, 5)],
    )
    into_out(Bs, As)
    into_out([B.float() for B in Bs], [A.float() for A in As])


def test_out_is_seen_by_autograd(every_kernel):
    B, A = torch.randn(20, 3), torch.randn(3, 10)
    out = low_rank_svd(B, A)
    x = torch.ones(20, 3, requires_grad=True)
    loss = (x * out.U).sum()
    low_rank_svd(B, A, out=out)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


MEMORY = torch.zeros(64)
OUT0 = LowRankSVD(
    *(torch.zeros(shape) for shape in ((6, 2), 2, (2, 5))),
    *(torch.zeros((), dtype=torch.int64) for _ in range(2)),
)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"U": torch.zeros(5, 2)}, r"out.U: expected \[6, 2\] torch.float32 on cpu, got .*5, 2"),
        ({"U": [torch.zeros(6, 2)]}, "out.U: expected a tensor, got"),
        ({"S": torch.zeros(2, dtype=F64)}, r"out.S: expected \[2\] torch.float32 .*float64"),
        ({"Vh": torch.zeros(2, 5, device="meta")}, "out.Vh: expected .* on cpu, got .*meta"),
        ({"Vh": torch.zeros(5, 2).T}, "out.Vh: expected a contiguous tensor, got"),
        ({"rank": torch.zeros(1, dtype=torch.int64)}, r"out.rank: expected \[\] torch.int64"),
        ({"info": torch.zeros(())}, r"out.info: expected \[\] torch.int64"),
        ({"U": torch.zeros(6, 2, requires_grad=True)}, "out.U: .*outside of autograd"),
        ({"U": B0}, r"out.U: expected memory of its own, got some that lora_B\[0\] has, too"),
        ({"info": OUT0.rank}, "out.rank: expected memory of its own, .*out.info has, too"),
        (
            {"U": MEMORY[:12].view(6, 2), "Vh": MEMORY[11:21].view(2, 5)},
            "out.U: expected memory of its own, got some that out.Vh has, too",
        ),
    ],
)
def test_an_out_that_does_not_fit_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        low_rank_svd(B0, A0, out=OUT0._replace(**changes))
    assert not any(tensor.any() for tensor in OUT0)


def test_lists_of_out_are_counted_and_named():
    out = room(low_rank_svd([B0, B0], [A0, A0]))
    for name, value, message in [
        ("U", out.U[:1], "out.U: expected 2 tensors, got 1"),
        ("S", out.S[0], "out.S: expected a list of tensors"),
        ("Vh", [out.Vh[0], out.Vh[0]], r"out.Vh\[0\]: .* that out.Vh\[1\] has, too"),
        ("Vh", [out.Vh[0], None], r"out.Vh\[1\]: expected a tensor, got None"),
        ("rank", out.rank[:1], r"out.rank: expected \[2\]"),
    ]:
        with pytest.raises(ValueError, match=message):
            low_rank_svd([B0, B0], [A0, A0], out=out._replace(**{name: value}))
    with pytest.raises(TypeError, match="out: expected a LowRankSVD, got a tuple"):
        low_rank_svd([B0, B0], [A0, A0], out=tuple(out))


def test_gaps_of_a_factor_count_as_its_memory():
    memory = torch.randn(4, 6)
    B, A = memory[:, ::5], torch.randn(2, 5)
    out = low_rank_svd(B, A)
    with pytest.raises(ValueError, match=r"out.S: .* that lora_B\[0\] has, too"):
        low_rank_svd(B, A, out=out._replace(S=memory[1, 1:3]))
    low_rank_svd(B.clone(), A, out=out._replace(S=memory[1, 1:3]))
