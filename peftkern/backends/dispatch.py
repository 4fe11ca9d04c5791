"""Which back end serves which op: one table, asked inside the op at every call.

`_CANDIDATES` lists, per op, the implementations from the most to the least preferred. Each says in
words why it cannot take a call, or None when it can; the first that can runs. One that belongs to
another kind of device is passed over. What a kernel raises goes to the caller: an exception never
turns into a fallback.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import os
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch

from peftkern.backends import cpu, cuda, native, native_cuda, reference
from peftkern.backends.device import (
    BackendUnavailableError,
    arch,
    triton_interpreted,
    triton_missing,
)
from peftkern.kernels import configs


@dataclass(frozen=True)
class Candidate:
    """One implementation of an op; `supports` and `run` take the op's positional arguments.

    `device` is the torch device type it serves, None for every one.
    """

    name: str
    device: str | None
    supports: Callable[..., str | None]
    run: Callable[..., Any]


def _always(*args: Any) -> None:
    return None


def _cpu(op: str, supports: Callable[..., str | None]) -> Candidate:
    return Candidate("cpu", "cpu", supports, getattr(cpu, op))


def _triton(op: str, stem: str, supports: str) -> Candidate:
    """A candidate from `peftkern.kernels.<stem>`, which is imported when it is first asked."""

    @functools.cache
    def kernels() -> Any:
        return importlib.import_module(f"peftkern.kernels.{stem}")

    def supports_call(*args: Any) -> str | None:
        return triton_missing(_device(args)) or getattr(kernels(), supports)(*args)

    return Candidate("triton", "cuda", supports_call, lambda *args: getattr(kernels(), op)(*args))


def _cuda(op: str, supports: Callable[..., str | None]) -> Candidate:
    return Candidate("cuda", "cuda", supports, getattr(cuda, op))


def _reference(op: str) -> Candidate:
    return Candidate("reference", None, _always, getattr(reference, op))


# From the most to the least preferred where nothing was measured; of two for a GPU the older first.
# `_in_order` puts what was measured before it.
_CANDIDATES: dict[str, tuple[Candidate, ...]] = {
    op: (*candidates, _reference(op))
    for op, candidates in {
        "nf4_quantize": (
            _triton("nf4_quantize", "nf4", "refusal_quantize"),
            _cuda("nf4_quantize", cuda.supports_quantize),
            _cpu("nf4_quantize", cpu.supports_dense),
        ),
        "nf4_quantize_absmax": (_cpu("nf4_quantize_absmax", cpu.supports_device),),
        "nf4_dequantize": (
            _triton("nf4_dequantize", "nf4", "refusal_dequantize"),
            _cuda("nf4_dequantize", cuda.supports_dequantize),
            _cpu("nf4_dequantize", cpu.supports_dequantize),
        ),
        "nf4_dequantize_out": (
            _triton("nf4_dequantize_out", "nf4", "refusal_dequantize"),
            _cuda("nf4_dequantize_out", cuda.supports_dequantize),
            _cpu("nf4_dequantize_out", cpu.supports_dequantize),
        ),
        "lora_linear_forward": (
            _triton("lora_linear_forward", "lora_linear", "refusal_forward"),
            _cpu("lora_linear_forward", cpu.supports_dense),
        ),
        "lora_linear_backward": (
            _triton("lora_linear_backward", "lora_linear", "refusal_backward"),
            _cpu("lora_linear_backward", cpu.supports_dense),
        ),
        "nf4_lora_linear_forward": (
            _triton("nf4_lora_linear_forward", "nf4_lora_linear", "refusal_forward"),
            _cuda("nf4_lora_linear_forward", cuda.supports_nf4_forward),
            _cpu("nf4_lora_linear_forward", cpu.supports_nf4_forward),
        ),
        "nf4_lora_linear_backward": (
            _triton("nf4_lora_linear_backward", "nf4_lora_linear", "refusal_backward"),
            _cpu("nf4_lora_linear_backward", cpu.supports_nf4_backward),
        ),
        "dora_norm": (
            _triton("dora_norm", "dora", "refusal_norm"),
            _cpu("dora_norm", cpu.supports_dora_norm),
        ),
        "nf4_dora_norm": (
            _triton("nf4_dora_norm", "dora", "refusal_nf4_norm"),
            _cpu("nf4_dora_norm", cpu.supports_nf4_dora_norm),
        ),
        "low_rank_svd": (
            _triton("low_rank_svd", "low_rank_svd", "refusal"),
            _cuda("low_rank_svd", cuda.supports_low_rank_svd),
            _cpu("low_rank_svd", cpu.supports_low_rank_svd),
        ),
        "adalora_importance_": (
            _triton("adalora_importance_", "adalora", "refusal_importance"),
            _cpu("adalora_importance_", cpu.supports_adalora_importance),
        ),
        "adalora_allocate_": (
            _triton("adalora_allocate_", "adalora", "refusal_allocate"),
            _cpu("adalora_allocate_", cpu.supports_adalora_allocate),
        ),
        "adalora_orthogonality_forward": (
            _cpu("adalora_orthogonality_forward", cpu.supports_adalora_orthogonality_forward),
        ),
        "adalora_orthogonality_backward": (
            _cpu("adalora_orthogonality_backward", cpu.supports_adalora_orthogonality_backward),
        ),
        "rosa_sddmm": (
            _triton("rosa_sddmm", "rosa", "refusal"),
            _cpu("rosa_sddmm", cpu.supports_rosa),
        ),
        "rosa_spmm_": (
            _triton("rosa_spmm_", "rosa", "refusal"),
            _cpu("rosa_spmm_", cpu.supports_rosa),
        ),
    }.items()
}


def _rows(activations: torch.Tensor) -> int:
    return activations.numel() // max(1, activations.shape[-1])


def _bits(dtype: torch.dtype) -> int:
    return 8 * dtype.itemsize


# (M, N, K, r, bits of an element) of a call, for every op whose back ends `make tune` compares. A
# tensor that is only converted is one long row; of many pairs the first gives the shape.
_SIZES: dict[str, Callable[..., tuple[int, int, int, int, int]]] = {
    "nf4_quantize": lambda weight, *_: (1, weight.numel(), 1, 1, _bits(weight.dtype)),
    "nf4_dequantize": lambda packed, *rest: (1, 2 * packed.numel(), 1, 1, _bits(rest[-1])),
    "nf4_dequantize_out": lambda packed, *rest: (
        *(1, 2 * packed.numel(), 1, 1),
        _bits(rest[-1].dtype),
    ),
    "lora_linear_forward": lambda x, weight, lora_A, *_: (
        *(_rows(x), *weight.shape, lora_A.shape[0]),
        _bits(x.dtype),
    ),
    "lora_linear_backward": lambda dy, x, S, weight, lora_A, lora_B, *_: (
        *(_rows(dy), lora_B.shape[0], lora_A.shape[1], lora_A.shape[0]),
        _bits(dy.dtype),
    ),
    "nf4_lora_linear_forward": lambda x, *rest: (
        *(_rows(x), *rest[7], 1 if rest[8] is None else rest[8].shape[0]),
        _bits(x.dtype),
    ),
    "nf4_lora_linear_backward": lambda dy, *rest: (
        *(_rows(dy), *rest[9], 1 if rest[10] is None else rest[10].shape[0]),
        _bits(dy.dtype),
    ),
    "dora_norm": lambda weight, lora_A, *_: (
        1,
        *weight.shape,
        lora_A.shape[0],
        _bits(weight.dtype),
    ),
    "nf4_dora_norm": lambda packed, *rest: (1, *rest[6], len(rest[8]), _bits(rest[7])),
    "low_rank_svd": lambda lora_B, lora_A, *_: (
        *(len(lora_B), len(lora_B[0]), lora_A[0].shape[1], max(len(A) for A in lora_A)),
        _bits(lora_B[0].dtype),
    ),
}
MEASURABLE = tuple(_SIZES)
# Whether a GPU's back end is there in a form that takes tensors of a CPU.
_STAND_INS = {"triton": triton_interpreted, "cuda": native_cuda.emulated}
_BACKENDS = ("triton", "cuda", "cpu", "reference")

# Elements of x and y from which a dense layer is faster here than in PEFT on a CPU: below, the call
# costs more than the copies it saves (bench/bench_lora_linear.py). Integrations ask; ops do not.
DENSE_CPU_MINIMUM = 1 << 19

_override: ContextVar[str | None] = ContextVar("peftkern_backend", default=None)
_lock = threading.Lock()
_calls: Counter[tuple[str, str]] = Counter()
_fallbacks: Counter[tuple[str, str]] = Counter()


def call(op: str, *args: Any) -> Any:
    """Run `op` on the first candidate that takes these arguments."""
    forced = forced_backend()
    device = _device(args)
    for candidate in _in_order(op, args, device):
        if forced is None:
            if candidate.device is not None and candidate.device != device.type:
                continue
        elif candidate.name != forced:
            continue
        reason = _reason(candidate, args, forced)
        if reason is None:
            with _lock:
                _calls[op, candidate.name] += 1
            return candidate.run(*args)
        if forced is not None:
            raise BackendUnavailableError(f"back end {forced!r} cannot run {op}: {reason}")
        record_fallback(op, f"{candidate.name}: {reason}")
    raise BackendUnavailableError(
        f"no back end for {op}" if forced is None else f"{op} has no back end {forced!r}"
    )


def _in_order(op: str, args: tuple[Any, ...], device: torch.device) -> tuple[Candidate, ...]:
    """The candidates of an op; on a GPU the one first that `make tune` found the fastest."""
    if device.type != "cuda" or op not in _SIZES:
        return _CANDIDATES[op]
    return preferred(op, args, arch(device))


def preferred(op: str, args: tuple[Any, ...], arch: str) -> tuple[Candidate, ...]:
    """The candidates of an op as an architecture's table orders them."""
    fastest = configs.fastest(problem_of(op, args), arch)
    if fastest is None:
        return _CANDIDATES[op]
    return tuple(sorted(_CANDIDATES[op], key=lambda candidate: candidate.name != fastest))


def problem_of(op: str, args: tuple[Any, ...]) -> configs.Problem:
    """Under what an op's call stands in the tables."""
    return configs.Problem(op.removesuffix("_out"), *_SIZES[op](*args))


def is_slower(op: str, x: torch.Tensor, shape: tuple[int, ...], r: int, training: bool) -> bool:
    """Whether PEFT's own layer measured faster than ours, for integrations to ask.

    op: "lora_linear" or "nf4_lora_linear"; x [..., K], weight of `shape` [N, K], rank r; whether
    the layer is in training mode. No table is for a CPU, and a back end that was asked for is taken
    at its word.
    """
    if x.is_cpu or forced_backend() is not None:
        return False
    # The two passes of reentrant checkpointing, the first without gradients, have to be served
    # alike: their dropout is drawn in different ways.
    kind = "training" if training or torch.is_grad_enabled() else "inference"
    problem = configs.Problem(f"{op}/{kind}", _rows(x), *shape, r, _bits(x.dtype))
    return configs.layer_of(problem, arch(x.device)) == "PEFT"


def _reason(candidate: Candidate, args: tuple[Any, ...], forced: str | None) -> str | None:
    """Why a candidate cannot take a call. What stands in for a GPU runs on a CPU, if asked for."""
    device = _device(args)
    if candidate.device is not None and candidate.device != device.type:
        asked_for = candidate.name == forced and device.type == "cpu"
        if not (asked_for and _STAND_INS[candidate.name]()):
            return f"tensors are on {device}"
    return candidate.supports(*args)


def _device(args: tuple[Any, ...]) -> torch.device:
    """Where a call runs: every op begins with a tensor or a list of tensors."""
    first = args[0]
    return (first[0] if isinstance(first, (list, tuple)) else first).device


def unserved(device: torch.device) -> str | None:
    """Why no kernels of ours serve a kind of device, or None where some do."""
    if device.type == "cpu":
        return None
    return triton_missing(device) if device.type == "cuda" else f"no kernel for {device.type}"


def runs_on_cpu(x: torch.Tensor) -> bool:
    """Whether the ops of these activations run on a CPU's back ends, stand-ins of a GPU's aside."""
    if torch.compiler.is_compiling():  # what is forced is asked in the op
        return x.is_cpu
    return x.is_cpu and forced_backend() not in _STAND_INS


def serving(device: torch.device) -> tuple[str, str | None]:
    """What serves tensors of a kind of device, and why no kernels of ours do if none do."""
    forced = forced_backend()
    if forced is not None:
        return f"{forced}, as asked for", None
    if device.type == "cpu":
        module, reason = native.cpu_module()
        return ("plain PyTorch", reason) if module is None else (f"C++ ({native.cpu_isa()})", None)
    reason = unserved(device)
    return ("Triton", None) if reason is None else ("PEFT", reason)


def forced_backend() -> str | None:
    """The back end that `use_backend` or PEFTKERN_BACKEND asks for, or None.

    Raises: ValueError listing the back ends if there is none of that name.
    """
    name = _override.get()
    if name is None:
        name = os.environ.get("PEFTKERN_BACKEND") or None
    if name is not None and name not in _BACKENDS:
        raise ValueError(f"back end: expected one of {_BACKENDS}, got {name!r}")
    return name


@contextlib.contextmanager
def use_backend(name: str | None) -> Iterator[None]:
    """Run every op inside the `with` block on one back end; None gives the choice back.

    It belongs to the current context (thread, task). A backward pass obeys the block that surrounds
    `backward()`; on a GPU, whose gradients torch computes in a thread of its own, the block that
    surrounded the forward pass. An op that the back end cannot run raises BackendUnavailableError.

    Raises: ValueError listing the back ends if there is none of that name.
    """
    if name is not None and name not in _BACKENDS:
        raise ValueError(f"back end: expected one of {_BACKENDS}, got {name!r}")
    token = _override.set(name)
    try:
        yield
    finally:
        _override.reset(token)


@dataclass(frozen=True)
class Stats:
    """Calls since the last reset: per (op, back end), and per (op, reason) of a fallback."""

    calls: dict[tuple[str, str], int]
    fallbacks: dict[tuple[str, str], int]

    def as_dict(self) -> dict[str, list[dict[str, str | int]]]:
        """The same for JSON, a record for each count, sorted, so that a script parses no text.

        {"calls": [{"op": "nf4_lora_linear_forward", "backend": "cpu", "count": 14}, ...],
         "fallbacks": [{"op": "lora_linear", "reason": "small dense product", "count": 2}, ...]}
        """
        return {
            name: [
                {"op": op, key: value, "count": count}
                for (op, value), count in sorted(counts.items())
            ]
            for name, key, counts in (
                ("calls", "backend", self.calls),
                ("fallbacks", "reason", self.fallbacks),
            )
        }

    def __str__(self) -> str:
        if not self.calls and not self.fallbacks:
            return "peftkern: no calls"
        calls = [[op, name, str(count)] for (op, name), count in sorted(self.calls.items())]
        text = _table(["op", "back end", "calls"], calls)
        if self.fallbacks:
            rows = [[op, why, str(count)] for (op, why), count in sorted(self.fallbacks.items())]
            text += "\n\n" + _table(["op", "fell back because", "times"], rows)
        return text


def stats() -> Stats:
    """Which back end served which op how often, and why anything fell back."""
    with _lock:
        return Stats(dict(_calls), dict(_fallbacks))


def reset_stats() -> None:
    """Forget what `stats` has counted."""
    with _lock:
        _calls.clear()
        _fallbacks.clear()


def record_fallback(op: str, reason: str) -> None:
    """Count one call that did not take the fast way, with the reason in words."""
    if torch.compiler.is_compiling():
        return  # counting is no part of a compiled graph
    with _lock:
        _fallbacks[op, reason] += 1


@dataclass(frozen=True)
class Explanation:
    """What dispatch would do with one call: rows of (op, back end, verdict), and the machine."""

    rows: tuple[tuple[str, str, str], ...]
    machine: str

    def chosen(self, op: str) -> str | None:
        """The back end that would run `op`; None if none can."""
        return next((row[1] for row in self.rows if row[0] == op and row[2] == "chosen"), None)

    def as_dict(self) -> dict[str, Any]:
        """The same for JSON, with the candidates of an op from the first to the last asked.

        {"rows": [{"op": "nf4_quantize", "backend": "cpu", "verdict": "chosen"}, ...],
         "machine": "..."}
        """
        names = ("op", "backend", "verdict")
        rows = [dict(zip(names, row, strict=True)) for row in self.rows]
        return {"rows": rows, "machine": self.machine}

    def __str__(self) -> str:
        table = _table(["op", "back end", "verdict"], [list(row) for row in self.rows])
        return f"{table}\n{self.machine}"


def explain(calls: dict[str, tuple[Any, ...]]) -> Explanation:
    """Ask every candidate of each op about these arguments, without running anything."""
    rows = []
    forced = forced_backend()
    for op, args in calls.items():
        taken = False
        for candidate in _in_order(op, args, _device(args)):
            reason = _reason(candidate, args, forced)
            if forced is not None and candidate.name != forced:
                verdict = f"not asked: {forced!r} is forced"
            elif reason is not None:
                verdict = f"cannot: {reason}"
            else:
                verdict = "can" if taken else "chosen"
                taken = True
            rows.append((op, candidate.name, verdict))
    return Explanation(tuple(rows), native.describe())


def _table(header: list[str], rows: list[list[str]]) -> str:
    widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]
    lines = [header, ["-" * width for width in widths], *rows]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in lines
    )


def _new_lock_in_child() -> None:
    """A child forked while another thread held the lock would wait for ever."""
    global _lock
    _lock = threading.Lock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_new_lock_in_child)
