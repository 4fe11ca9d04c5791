"""AdaLoRA's ops and functions: importance, allocation, orthogonality."""

from __future__ import annotations

import pytest
import torch
from grids import thinned
from hypothesis import given
from hypothesis import strategies as st
from nf4_weights import assert_same_bits, assert_same_every_time
from tolerances import GRADCHECK, assert_as_accurate_as_torch
from torch import Tensor

import peftkern
from peftkern.backends.programs import PLAIN
from peftkern.functional.adalora import adalora_allocate_, adalora_importance_, orthogonality_loss

F64, F32, F16, BF16 = torch.float64, torch.float32, torch.float16, torch.bfloat16
LAYERS = [  # r, K, N: ranks that differ, one, primes, above and below a vector, several tasks
    [(1, 1, 1)],
    [(12, 1024, 1024), (12, 64, 96)],
    [(3, 17, 13), (0, 5, 4), (16, 257, 33), (5, 96, 40)],
    [(33, 129, 1031), (17, 2049, 31)],
    [(64, 40, 600), (7, 5000, 2500)],
]
BETAS = {"beta1": 0.85, "beta2": 0.9}


def make_params(layers: list[tuple[int, int, int]], dtype: torch.dtype = F32) -> list[Tensor]:
    return [
        tensor.to(dtype)
        for r, K, N in layers
        for tensor in (torch.randn(r, 1), torch.randn(r, K), torch.randn(N, r))
    ]


def importance(params: list[Tensor], all_grads: list[list[Tensor | None]], dtype: torch.dtype):
    """EMAs and scores after one update per entry of `all_grads`."""
    numel = sum(p.numel() for p in params)
    ipt, unc = torch.zeros(numel, dtype=dtype), torch.zeros(numel, dtype=dtype)
    for grads in all_grads:
        scores = adalora_importance_(params, grads, ipt, unc, **BETAS)
    return ipt, unc, scores


@pytest.mark.parametrize(("layers", "dtype"), thinned(LAYERS, [F32, BF16, F16]))
def test_importance_against_float64(every_kernel: str, layers, dtype: torch.dtype) -> None:
    params = make_params(layers, dtype)
    all_grads = [[torch.randn_like(p) for p in params] for _ in range(3)]
    got = importance(params, all_grads, F32)
    with peftkern.use_backend("reference"):
        eager = importance(params, all_grads, F32)
        wide = [[g.double() for g in grads] for grads in all_grads]
        oracle = importance([p.double() for p in params], wide, F64)
    assert_as_accurate_as_torch(got, eager, oracle)
    assert torch.equal(got[0], eager[0]) and torch.equal(got[1], eager[1])  # bit for bit


def test_importance_misaligned_strided_and_absent_gradients(every_kernel: str) -> None:
    r, K, N = 5, 37, 21
    flat = torch.randn(1 + r + r * K + N * r)
    E, A, B = flat[1:].split([r, r * K, N * r])
    params = [E.view(r, 1), A.view(r, K), B.view(N, r)]
    grads = [None, torch.randn(K, r).t(), torch.randn(()).expand(N, r)]
    dense = [torch.zeros(r, 1), grads[1].contiguous(), grads[2].contiguous()]
    got = importance(params, [grads], F32)
    wanted = importance([p.clone() for p in params], [dense], F32)
    assert_same_bits(got, wanted)


def test_importance_does_not_depend_on_threads(every_kernel: str) -> None:
    params = make_params([(12, 3000, 4000), (7, 5000, 100), (4, 40, 40)])
    grads = [torch.randn_like(p) for p in params]
    threads = (1, 1) if every_kernel in PLAIN else (1, 2, 3, 8)
    assert_same_every_time(
        lambda: importance(params, [grads, grads], F32), len(threads), threads=threads
    )


def test_importance_and_loss_are_deterministic(backend: str) -> None:
    params = make_params([(12, 1024, 1024), (5, 77, 99)])
    grads = [torch.randn_like(p) for p in params]
    assert_same_every_time(
        lambda: (*importance(params, [grads], F32), orthogonality_loss(params[1::3], params[2::3]))
    )


def test_importance_nan_stays_with_its_triplet(every_kernel: str) -> None:
    layers = [(12, 64, 96), (3, 17, 13)]
    params = make_params(layers)
    grads = [torch.randn_like(p) for p in params]
    grads[2][50, 7] = float("nan")
    grads[4][1, 16] = float("inf")
    good = [torch.nan_to_num(g, 0.0, 0.0, 0.0) for g in grads]
    ipt, unc, scores = importance(params, [good, grads], F32)
    assert (~torch.isfinite(scores)).nonzero().flatten().tolist() == [7, 12 + 1]
    assert ipt.isfinite().all() and unc.isfinite().all()  # a bad step costs that step alone
    assert importance(params, [good, grads, good], F32)[2].isfinite().all()


@pytest.mark.parametrize("last", [BF16, F64])
def test_importance_of_several_dtypes(last) -> None:
    """lora_E in float32 beside matrices in bfloat16; float64 beside others is the reference's."""
    params = [*make_params([(3, 8, 9)]), *make_params([(0, 5, 7), (2, 8, 9), (4, 33, 65)], last)]
    params[6], grads = params[6].float(), [torch.randn_like(p) for p in params]
    grads[6], grads[1], grads[4] = torch.randn(2, 1), None, None
    peftkern.reset_stats()
    got = importance(params, [grads, grads], F32)
    server = "reference" if last is F64 else "cpu"
    assert peftkern.stats().calls == {("adalora_importance_", server): 2}
    wide = [p.float() for p in params]
    slopes = [None if g is None else g.float() for g in grads]
    wanted = importance(wide, [slopes, slopes], F32)
    torch.testing.assert_close(got, wanted)


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (lambda a: a["params"].pop(), "params, grads: expected"),
        (lambda a: a.update(params=[], grads=[]), "params, grads: expected"),
        (lambda a: a["params"].__setitem__(1, torch.zeros(4, 8)), "params of layer 0"),
        (lambda a: a["params"].__setitem__(2, torch.zeros(0, 3)), "params of layer 0"),
        (lambda a: a["grads"].__setitem__(0, torch.zeros(3)), r"grads\[0\]"),
        (lambda a: a["params"].__setitem__(0, torch.zeros(3, 1).int()), r"params\[0\]"),
        (lambda a: a.update(exp_avg_ipt=torch.zeros(7)), "exp_avg_ipt"),
        (lambda a: a.update(exp_avg_unc=torch.zeros(54).double()), "exp_avg_unc"),
        (lambda a: a.update(exp_avg_unc=torch.zeros(108)[::2]), "exp_avg_unc"),
        (lambda a: a.update(beta1=1.0), "beta1"),
        (lambda a: a.update(beta2=float("nan")), "beta2"),
    ],
)
def test_importance_names_a_wrong_argument(change, complaint: str) -> None:
    params = make_params([(3, 8, 9)])
    arguments = {
        "params": params,
        "grads": [torch.zeros_like(p) for p in params],
        "exp_avg_ipt": torch.zeros(54),
        "exp_avg_unc": torch.zeros(54),
    }
    change(arguments)
    with pytest.raises(ValueError, match=complaint):
        adalora_importance_(**arguments)


def brute_force(scores: list[float], budget: int, ties: str) -> list[bool]:
    """The masks by sorting Python numbers."""
    count = len(scores)
    if budget >= count:
        return [True] * count
    order = sorted(range(count), key=lambda i: (-scores[i], i))
    if ties == "peft" and any(scores):
        threshold = sorted(scores)[count - budget - 1]
        return [score > threshold for score in scores]
    return [i in order[:budget] for i in range(count)]


SCORES = st.lists(
    st.one_of(st.sampled_from([0.0, 0.25, 0.5]), st.floats(0, 10, width=32)),
    min_size=1,
    max_size=60,
)


@given(SCORES, st.integers(0, 70), st.sampled_from(["exact", "peft"]), st.data())
def test_allocate_against_brute_force(scores, budget: int, ties: str, data) -> None:
    cut = data.draw(st.integers(0, len(scores)))
    wanted = torch.tensor(brute_force(scores, budget, ties))
    for name in ("cpu", "reference"):
        lora_E = [torch.ones(cut, 1), torch.ones(len(scores) - cut, 1)]
        with peftkern.use_backend(name):
            mask = adalora_allocate_(torch.tensor(scores), lora_E, budget, ties=ties)
        assert torch.equal(mask, wanted)
        assert torch.equal(torch.cat(lora_E).flatten() != 0, wanted)


@pytest.mark.parametrize("dtype", [F64, F32, BF16, F16])
@pytest.mark.parametrize("ties", ["exact", "peft"])
def test_allocate_edge_cases(backend: str, ties: str, dtype: torch.dtype) -> None:
    if backend == "cpu" and dtype is F64:
        pytest.skip("the C++ back end takes float32 scores only")

    def run(scores: list[float], budget: int) -> list[bool]:
        lora_E = [torch.full((len(scores), 1), 3.0, dtype=dtype)]
        mask = adalora_allocate_(torch.tensor(scores), lora_E, budget, ties=ties)
        assert lora_E[0].flatten().tolist() == [3.0 * kept for kept in mask.tolist()]
        return mask.tolist()

    assert run([1.0, 2.0], 2) == run([1.0, 2.0], 5) == [True, True]
    assert run([1.0, 2.0], 0) == [False, False]
    assert run([0.0, 0.0, 0.0], 2) == [True, True, False]  # PEFT would prune all of them
    assert run([1.0, 1.0, 2.0], 2) == (
        [True, False, True] if ties == "exact" else [False, False, True]
    )
    nan = float("nan")
    assert run([1.0, nan, 3.0], 1) == ([False, True, False])
    assert run([], 3) == []


def test_allocate_tells_autograd() -> None:
    E = torch.ones(3, 1, requires_grad=True)
    loss = E.square().sum()
    adalora_allocate_(torch.tensor([1.0, 2.0, 3.0]), [E], 2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"ties": "random"}, "ties"),
        ({"budget": -1}, "budget"),
        ({"scores": torch.zeros(4)}, "scores"),
        ({"scores": torch.zeros(3).int()}, "scores"),
        ({"lora_E": [torch.zeros(6, 1)[::2]]}, r"lora_E\[0\]"),
    ],
)
def test_allocate_names_a_wrong_argument(change: dict, complaint: str) -> None:
    arguments = {"scores": torch.rand(3), "lora_E": [torch.ones(3, 1)], "budget": 1, **change}
    with pytest.raises(ValueError, match=complaint):
        adalora_allocate_(**arguments)


def peft_orthogonality(lora_A: list[Tensor], lora_B: list[Tensor], squared: bool = False) -> Tensor:
    """AdaLoraModel.forward's regulariser."""
    total = 0.0
    for p, gram in [(A, A @ A.T) for A in lora_A] + [(B, B.T @ B) for B in lora_B]:
        norm = torch.norm(gram - torch.eye(len(gram), dtype=p.dtype), p="fro")
        total = total + (norm**2 if squared else norm)
    return total / (len(lora_A) + len(lora_B))


def loss_and_gradients(function, params: list[Tensor], **options) -> tuple[Tensor, ...]:
    leaves = [p.detach().clone().requires_grad_() for p in params]
    loss = function(leaves[0::2], leaves[1::2], **options)
    return loss.detach(), *torch.autograd.grad(3 * loss, leaves)


@pytest.mark.parametrize(("layers", "squared"), thinned(LAYERS, [False, True]))
def test_orthogonality_against_peft_in_float64(every_kernel: str, layers, squared: bool) -> None:
    pairs = [t / max(t.shape) ** 0.5 for t in make_params(layers)]
    pairs = [t for i, t in enumerate(pairs) if i % 3]
    got = loss_and_gradients(orthogonality_loss, pairs, squared=squared)
    eager = loss_and_gradients(peft_orthogonality, pairs, squared=squared)
    oracle = loss_and_gradients(peft_orthogonality, [p.double() for p in pairs], squared=squared)
    assert_as_accurate_as_torch(got, eager, oracle)


@pytest.mark.parametrize("dtype", [BF16, F16])
def test_orthogonality_of_16_bit_matrices(every_kernel: str, dtype: torch.dtype) -> None:
    """Sums are float32: as near to float64 as float32 torch over the same values."""
    pairs = [(t / 8).to(dtype) for t in make_params([(12, 100, 70), (5, 33, 64)])]
    pairs = [t for i, t in enumerate(pairs) if i % 3]
    got = loss_and_gradients(orthogonality_loss, pairs)
    eager = loss_and_gradients(peft_orthogonality, [p.float() for p in pairs])
    oracle = loss_and_gradients(peft_orthogonality, [p.double() for p in pairs])
    assert got[0].dtype is F32
    assert_as_accurate_as_torch(got[0], eager[0], oracle[0])
    for g, e, o in zip(got[1:], eager[1:], oracle[1:], strict=True):
        assert_as_accurate_as_torch(g, e.to(dtype), o)


@pytest.mark.parametrize("squared", [False, True])
def test_orthogonality_gradcheck(squared: bool) -> None:
    pairs = [
        t.double().requires_grad_()
        for i, t in enumerate(make_params([(3, 7, 5), (2, 7, 6)]))
        if i % 3
    ]
    torch.autograd.gradcheck(
        lambda *p: orthogonality_loss(p[0::2], p[1::2], squared=squared), pairs, **GRADCHECK
    )


@pytest.mark.parametrize("squared", [False, True])
def test_orthogonality_of_an_orthonormal_basis(every_kernel: str, squared: bool) -> None:
    """The norm is zero: its gradient is taken as zero, not NaN."""
    basis = torch.eye(4, 9)
    loss, *grads = loss_and_gradients(orthogonality_loss, [basis, basis.T], squared=squared)
    assert loss == 0 and all(torch.equal(g, torch.zeros_like(g)) for g in grads)


def test_orthogonality_under_autocast_and_partial_gradients(backend: str) -> None:
    A, B = torch.randn(4, 30), torch.randn(20, 4)
    wanted = orthogonality_loss([A], [B])
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(orthogonality_loss([A], [B]), wanted)
    B.requires_grad_()
    orthogonality_loss([A], [B]).backward()
    assert A.grad is None and B.grad is not None


def test_orthogonality_compiles() -> None:
    pairs = [t.requires_grad_() for i, t in enumerate(make_params([(3, 7, 5), (2, 9, 6)])) if i % 3]

    def function(*p: Tensor) -> Tensor:
        return orthogonality_loss(p[0::2], p[1::2])

    torch._dynamo.reset()
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    wanted = torch.autograd.grad(function(*pairs), pairs)
    assert all(map(torch.equal, torch.autograd.grad(compiled(*pairs), pairs), wanted))


@pytest.mark.parametrize(
    ("lora_A", "lora_B", "complaint"),
    [
        ([], [torch.ones(2, 2)], "lora_A, lora_B"),
        ([torch.ones(2)], [torch.ones(2, 2)], r"lora_A\[0\]"),
        ([torch.ones(2, 2)], [torch.ones(2, 2).int()], r"lora_B\[0\]"),
    ],
)
def test_orthogonality_names_a_wrong_argument(lora_A, lora_B, complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        orthogonality_loss(lora_A, lora_B)
