"""Self-test: every public function on small inputs of this machine, checked against float64.

The bound is that of the tests: an error is at most RATIO times that of plain torch in the same
dtypes plus a floor (peftkern/backends/tolerances.py); functions that only move bits are exact.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from peftkern import functional
from peftkern.backends import counts, dispatch, trust
from peftkern.backends.device import BackendUnavailableError
from peftkern.backends.tolerances import FLOOR_MAX, FLOOR_RMS, RATIO, errors
from peftkern.formats.nf4 import NF4Weight
from peftkern.functional import adalora as importance
from peftkern.functional import dora
from peftkern.functional.low_rank_svd import LowRankSVD, low_rank_svd
from peftkern.functional.rosa import SparseMask, rosa_linear
from peftkern.tools.doctor.sample_calls import DTYPES

N, K = 129, 192  # no multiples of a tile
_EXPERTS = 3
_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
Inputs = dict[str, Any]
Results = dict[str, Tensor]


@dataclass(frozen=True)
class Result:
    """Result of one function in one dtype on one device.

    share: the largest error of its results, as a share of the bound; worst: the name of that
    result. backends: those that served it. error: its exception; share is then infinite.
    """

    function: str
    dtype: str
    device: str
    backends: str
    share: float
    worst: str
    error: str | None = None

    @property
    def ok(self) -> bool:
        return self.share <= 1.0

    @property
    def unserved(self) -> bool:
        """True if the forced back end cannot run it, which is no wrong result."""
        return (self.error or "").startswith(BackendUnavailableError.__name__)


@dataclass(frozen=True)
class _Case:
    """A function, and the sizes of its inputs; rows and ranks decide which tiles a GPU takes."""

    function: str
    run: Callable[[Inputs], Results]
    dtypes: tuple[torch.dtype, ...] = (torch.float32,)
    exact: bool = False
    rows: int = 17
    rank: int = 8
    dropout_p: float = 0.0
    adapters: torch.dtype = torch.float32


def run(device: torch.device | str) -> Iterator[Result]:
    """Test every function on a device, one result at a time.

    Forward and all gradients, on the back end that dispatch chooses: about two seconds on a CPU,
    and on a GPU the time to compile its kernels at first. A CPU's kernels have no tiles that more
    rows would reach.
    """
    device = torch.device(device)
    for case in (case for case in _CASES if device.type != "cpu" or case.rows <= _ROWS_CPU):
        for dtype in case.dtypes:
            yield _result(case, dtype, device)


def _result(case: _Case, dtype: torch.dtype, device: torch.device) -> Result:
    inputs = _inputs(case, dtype, device)
    about = (case.function, _NAMES[dtype], str(device))
    before = counts.stats().calls
    try:
        with trust.use_mode("always"):  # the kernels themselves, and nothing in their place
            got = case.run(inputs)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
    except Exception as error:  # any exception of a broken kernel is the result
        text = f"{type(error).__name__}: {' '.join(str(error).split())}"
        return Result(*about, "", math.inf, "", text)
    calls = counts.stats().calls
    served = {name for (op, name), n in calls.items() if n > before.get((op, name), 0)}
    with dispatch.use_backend("reference"):
        plain = case.run(inputs)
        oracle = plain if case.exact else case.run({k: _wide(v) for k, v in inputs.items()})
    judge = _differing if case.exact else _share
    shares = {name: judge(got[name], plain[name], oracle[name]) for name in plain}
    worst = max(shares, key=lambda name: math.inf if math.isnan(shares[name]) else shares[name])
    return Result(*about, "+".join(sorted(served)), shares[worst], worst)


def _share(got: Tensor, plain: Tensor, oracle: Tensor) -> float:
    """Return the error of `got` as a share of the bound, the larger of RMS and maximum."""
    if got.shape != oracle.shape or got.dtype is not plain.dtype or not got.isfinite().all():
        return math.inf
    (rms, largest), (plain_rms, plain_largest) = errors(got, oracle), errors(plain, oracle)
    return max(
        rms / (RATIO * plain_rms + FLOOR_RMS[got.dtype]),
        largest / (RATIO * plain_largest + FLOOR_MAX[got.dtype]),
    )


def _differing(got: Tensor, plain: Tensor, oracle: Tensor) -> float:
    """Return 0 if all bits are equal, else infinity."""
    if got.shape != plain.shape or got.dtype is not plain.dtype:
        return math.inf
    if got.dtype is not torch.bool:
        got, plain = (t.contiguous().view(_INTEGERS[t.element_size()]) for t in (got, plain))
    return 0.0 if torch.equal(got, plain) else math.inf


def _inputs(case: _Case, dtype: torch.dtype, device: torch.device) -> Inputs:
    """Draw inputs on the CPU, so that they are the same on every device."""
    generator = torch.Generator().manual_seed(0)
    r = case.rank

    def draw(*shape: int, scale: float = 1.0, of: torch.dtype = torch.float32) -> Tensor:
        return (torch.randn(*shape, generator=generator) * scale).to(of).to(device)

    weight = draw(N, K, scale=K**-0.5)
    experts = draw(_EXPERTS, N, K, scale=K**-0.5)
    with dispatch.use_backend("reference"):
        w = functional.quantize_nf4(weight)
        w_experts = functional.quantize_nf4(experts, double_quant=False)
    return {
        "x": draw(case.rows, K, of=dtype),
        "dy": draw(case.rows, N, of=dtype),
        "weight": weight.to(dtype),
        "w": w,
        "bias": draw(N, of=dtype),
        "lora_A": draw(r, K, scale=K**-0.5, of=case.adapters),
        "lora_B": draw(N, r, scale=r**-0.5, of=case.adapters),
        "lora_E": draw(r, 1),
        "magnitude": 1.0 + draw(N, scale=0.1),
        "dropout_p": case.dropout_p,
        "experts": experts.to(dtype),
        "w_experts": w_experts,
        "experts_A": draw(_EXPERTS, r, K, scale=K**-0.5, of=case.adapters),
        "experts_B": draw(_EXPERTS, N, r, scale=r**-0.5, of=case.adapters),
        "experts_bias": draw(_EXPERTS, N, of=dtype),
    }


def _wide(value: Tensor | NF4Weight) -> Tensor | NF4Weight:
    return value.double() if isinstance(value, Tensor) else value


def _gradients(y: Tensor, dy: Tensor, **leaves: Tensor) -> Results:
    # The gradient of y is dy; given as an argument it would make torch import sympy.
    grads = torch.autograd.grad((y * dy).sum(), list(leaves.values()))
    named = {f"d{name}": grad for name, grad in zip(leaves, grads, strict=True)}
    return {"y": y.detach(), **named}


def _leaves(inputs: Inputs, *names: str) -> Results:
    return {name: inputs[name].detach().requires_grad_() for name in names}


def _rosa_linear(inputs: Inputs) -> Results:
    weight = inputs["weight"]
    rows = torch.arange(N, device=weight.device)
    mask = SparseMask.from_indices(rows, rows * 7 % K, weight.shape)
    leaves = _leaves(inputs, "x", "lora_A", "lora_B", "magnitude", "bias")
    values = leaves.pop("magnitude")
    y = rosa_linear(weight=weight, values=values, mask=mask, scaling=1.5, **leaves)
    return _gradients(y, inputs["dy"], values=values, **leaves)


def _experts(weight: str) -> Callable[[Inputs], Results]:
    """Of the rows the first is in group 0, none in 1, the last in no group at all."""

    def run(inputs: Inputs) -> Results:
        leaves = _leaves(inputs, "x", "experts_A", "experts_B", "experts_bias")
        x, lora_A, lora_B, bias = leaves.values()
        ends = torch.tensor([1, 1, len(x) - 1], dtype=torch.int32, device=x.device)
        how = {"scaling": 1.5, "bias": bias}
        y = functional.grouped_lora_linear(x, inputs[weight], ends, lora_A, lora_B, **how)
        return _gradients(y, inputs["dy"], **leaves)

    return run


def _route(inputs: Inputs) -> Results:
    weights = inputs["x"]
    index = torch.arange(weights.numel(), device=weights.device).view(weights.shape) * 7 % 11
    names = ("rows", "offsets", "inverse", "row_weights")
    return dict(zip(names, torch.ops.peftkern.route(index, weights, 9), strict=True))


def _swiglu(inputs: Inputs) -> Results:
    u, da = inputs["x"], inputs["dy"][:, : K // 2]
    w = u[:, 0].float()
    du, dw = torch.ops.peftkern.swiglu_backward(da, u, w, True, True)
    return {"y": torch.ops.peftkern.swiglu_forward(u, w), "dgate_up": du, "drow_weights": dw}


def _gram_product(inputs: Inputs) -> Results:
    ops, x, weight, w = torch.ops.peftkern, *(inputs[name] for name in ("x", "weight", "w"))
    found = (
        ops.gram_product(weight, x, True, True),
        ops.nf4_gram_product(w.tensors, w.layout, x, True, True),
    )
    names = [f"{name} of {kind}" for kind in ("dense", "NF4") for name in ("y", "z", "squares")]
    return dict(zip(names, (*found[0], *found[1]), strict=True))


def _quantize_nf4(inputs: Inputs) -> Results:
    w = functional.quantize_nf4(inputs["weight"])
    return {"packed": w.packed, "absmax": w.absmax, "nested_absmax": w.nested_absmax}


def _dequantize_nf4(inputs: Inputs) -> Results:
    w, dtype = inputs["w"], inputs["x"].dtype
    out = torch.empty(w.shape, dtype=dtype, device=w.device)
    return {
        "value": functional.dequantize_nf4(w, dtype),
        "out": functional.dequantize_nf4(w, out=out),
    }


def _low_rank_svd(inputs: Inputs) -> Results:
    args = (inputs["lora_B"], inputs["lora_A"], 1.5)
    svd = low_rank_svd(*args)
    out = low_rank_svd(*args, out=LowRankSVD(*map(torch.empty_like, svd)))
    return {"S": svd.S, "U S Vh": (svd.U * svd.S) @ svd.Vh, "out": (out.U * out.S) @ out.Vh}


def _importance(inputs: Inputs) -> Results:
    params = [inputs[name] for name in ("lora_E", "lora_A", "lora_B")]
    grads = [p.sin() for p in params]
    ipt, unc = (p.new_zeros(sum(p.numel() for p in params)) for p in params[:2])
    for _ in range(2):
        scores = importance.adalora_importance_(params, grads, ipt, unc)
    return {"scores": scores, "exp_avg_ipt": ipt, "exp_avg_unc": unc}


def _allocate(inputs: Inputs) -> Results:
    lora_E = inputs["lora_E"].clone()
    mask = importance.adalora_allocate_(
        inputs["lora_A"][:, 0].contiguous(), [lora_E], len(lora_E) // 2
    )
    return {"mask": mask, "lora_E": lora_E}


def _orthogonality(inputs: Inputs) -> Results:
    leaves = _leaves(inputs, "lora_A", "lora_B")
    loss = importance.orthogonality_loss([leaves["lora_A"]], [leaves["lora_B"]])
    return _gradients(loss, torch.ones_like(loss), **leaves)


_ROWS_CPU = 200
_16_AND_32 = (torch.float32, torch.bfloat16)
_LORA = ("x", "lora_A", "lora_B", "bias")
_DORA = (*_LORA, "magnitude")


def _linear(name: str, function: Callable[..., Tensor], *names: str, **fixed: str | float) -> _Case:
    """Case of a linear function, with the gradients of `names`; of `fixed`, text is a name.

    One seed, so that every back end draws the same dropout.
    """

    def run(inputs: Inputs) -> Results:
        leaves = _leaves(inputs, *names)
        others = {k: inputs[v] if isinstance(v, str) else v for k, v in fixed.items()}
        with torch.random.fork_rng():
            torch.manual_seed(0)
            y = function(**leaves, **others)
        return _gradients(y, inputs["dy"], **leaves)

    return _Case(name, run, _16_AND_32)


def _training() -> Iterator[_Case]:
    """Yield what training runs: in twelve cases every pair of rows, rank, dropout and adapters.

    Of rank, dropout and adapters every triple. By rows they are the fused NF4 kernel's, the least
    tiles, the middle ones, and the largest, which more rows than 32 for a processor get.
    """
    for i, rows in enumerate((17, 200, 700, 4300)):
        for j, rank in enumerate((8, 16, 64)):
            p, wide = 0.1 * ((i + j) % 2), (i in (1, 2)) == (j > 0)
            adapters = torch.float32 if wide else torch.bfloat16
            sizes = {"rows": rows, "rank": rank, "dropout_p": p, "adapters": adapters}
            for case in _LORA_CASES:
                name = f"{case.function}, M={rows} r={rank} p={p} {_NAMES[adapters]} adapters"
                yield replace(case, function=name, dtypes=(torch.bfloat16,), **sizes)


_SCALED = {"scaling": 1.5, "dropout_p": "dropout_p"}
_LORA_CASES = (
    _linear("lora_linear", functional.lora_linear, *_LORA, weight="weight", **_SCALED),
    _linear("nf4_lora_linear", functional.nf4_lora_linear, *_LORA, w="w", **_SCALED),
)
_CASES = (
    *_LORA_CASES,
    _linear("nf4_linear", functional.nf4_linear, "x", "bias", w="w"),
    _linear("dora_linear", dora.dora_linear, *_DORA, weight="weight", scaling=1.5),
    _linear("dora_linear, NF4", dora.dora_linear, *_DORA, weight="w", scaling=1.5),
    _Case("rosa_linear", _rosa_linear, _16_AND_32),
    _Case("grouped_lora_linear", _experts("experts"), _16_AND_32),
    _Case("grouped_lora_linear, NF4", _experts("w_experts"), _16_AND_32),
    _Case("route", _route, _16_AND_32, exact=True),
    _Case("swiglu", _swiglu, _16_AND_32),
    _Case("quantize_nf4", _quantize_nf4, _16_AND_32, exact=True),
    _Case("dequantize_nf4", _dequantize_nf4, _16_AND_32, exact=True),
    _Case("gram_product", _gram_product, _16_AND_32),
    _Case("low_rank_svd", _low_rank_svd),
    _Case("adalora_importance_", _importance),
    _Case("adalora_allocate_", _allocate, exact=True),
    _Case("orthogonality_loss", _orthogonality),
    *_training(),
)
