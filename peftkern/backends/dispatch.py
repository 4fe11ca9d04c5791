"""Dispatch: one table of the back ends of each op, asked inside the op at every call.

Candidates are asked from the most to the least preferred. Each has a `refusal`, None or the reason
against a call in words; the first without one that this machine trusts runs (`programs`). One that
belongs to another kind of device is passed over. What is forced runs as it is, and what it raises
goes to the caller.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import os
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch

from peftkern.backends import probe, programs, trust
from peftkern.backends.counts import record_call, record_fallback, table_text
from peftkern.backends.cpu import module as cpu
from peftkern.backends.cuda.module import emulated, refusal_library
from peftkern.backends.device import (
    BackendUnavailableError,
    arch,
    triton_interpreted,
    triton_missing,
)
from peftkern.backends.schemas import by_name, reads
from peftkern.kernels import configs

__all__ = ["Explanation", "use_backend"]
# Package and device type of a back end; None: every device.
_PACKAGES = {
    "triton": ("peftkern.kernels", "cuda"),
    "cuda": ("peftkern.backends.cuda", "cuda"),
    "cpu": ("peftkern.backends.cpu", "cpu"),
    "torch": ("peftkern.backends.torch", None),
    "reference": ("peftkern.backends.reference", None),
}
_BACKENDS = tuple(_PACKAGES)

# Family of each op, and its back ends from the most to the least preferred where nothing was
# measured; of two for a GPU the older first. `_in_order` puts what was measured before it.
_TABLE = {
    "nf4_quantize": ("nf4", "triton cuda cpu"),
    "nf4_quantize_absmax": ("nf4", "cpu"),
    "nf4_dequantize": ("nf4", "triton cuda cpu torch"),
    "nf4_dequantize_out": ("nf4", "triton cuda cpu torch"),
    "lora_linear_forward": ("lora_linear", "triton cpu torch"),
    "lora_linear_backward": ("lora_linear", "triton cpu torch"),
    "nf4_lora_linear_forward": ("nf4_lora_linear", "triton cuda cpu torch"),
    "nf4_lora_linear_backward": ("nf4_lora_linear", "triton cpu torch"),
    "route": ("route", "cpu"),
    "grouped_linear_forward": ("grouped_linear", "triton cpu torch"),
    "grouped_linear_backward": ("grouped_linear", "triton cpu torch"),
    "nf4_grouped_linear_forward": ("grouped_linear", "triton cpu torch"),
    "nf4_grouped_linear_backward": ("grouped_linear", "triton cpu torch"),
    "swiglu_forward": ("swiglu", "cpu"),
    "swiglu_backward": ("swiglu", "cpu"),
    "dora_norm": ("dora", "triton cpu"),
    "nf4_dora_norm": ("dora", "triton cpu torch"),
    "gram_product": ("gram_product", "cpu"),
    "nf4_gram_product": ("gram_product", "cpu"),
    "low_rank_svd": ("low_rank_svd", "triton cuda cpu"),
    "low_rank_svd_out": ("low_rank_svd", "cpu"),
    "adalora_importance_": ("adalora", "triton cpu"),
    "adalora_allocate_": ("adalora", "triton cpu"),
    "adalora_orthogonality_forward": ("adalora", "cpu"),
    "adalora_orthogonality_backward": ("adalora", "cpu"),
    "rosa_sddmm": ("rosa", "triton cpu"),
    "rosa_spmm_": ("rosa", "triton cpu"),
}


class Candidate:
    """One implementation of an op, a function of that name in `<package of the back end>.<family>`.

    `run` and `refusal` are called with the op's positional arguments; what is written as a refusal
    names those that it reads (`schemas.by_name`). It stands beside the op under
    the op's name without the family: `refusal_forward` for "lora_linear_forward". The module is
    imported when a candidate is first asked.
    """

    def __init__(self, op: str, name: str, family: str) -> None:
        self.op, self.name, self.family = op, name, family
        self.package, self.device = _PACKAGES[name]  # device None: every one

    @functools.cached_property
    def _module(self) -> Any:
        return importlib.import_module(f"{self.package}.{self.family}")

    @functools.cached_property
    def run(self) -> Callable[..., Any]:
        """Run the op."""
        return getattr(self._module, self.op)

    @functools.cached_property
    def refusal(self) -> Callable[..., str | None]:
        """Give the reason against a call, or None."""
        if self.name in programs.PLAIN:
            return _never
        suffix = self.op.replace(self.family, "").strip("_").replace("__", "_")
        function = getattr(self._module, f"refusal_{suffix}" if suffix else "refusal")
        if self.name != "triton":
            return by_name(self.op, function)
        pick = reads(self.op, function)  # without a function around it: each call costs host time
        return lambda *args: _triton_refusal(args) or function(*pick(args))


def _triton_refusal(args: tuple[Any, ...]) -> str | None:
    """Return why Triton's kernels do not run where a call is."""
    device = _device(args)
    return triton_missing(device) or probe.triton_failure(device)


def _never(*args: Any) -> None:
    return None


CANDIDATES = {
    op: tuple(Candidate(op, name, family) for name in (*names.split(), "reference"))
    for op, (family, names) in _TABLE.items()
}


def _rows(activations: torch.Tensor) -> int:
    return activations.numel() // max(1, activations.shape[-1])


def _bits(dtype: torch.dtype) -> int:
    return 8 * dtype.itemsize


def _linear_sizes(
    activations: torch.Tensor, shape: Any, lora_A: torch.Tensor | None
) -> tuple[int, ...]:
    r = 1 if lora_A is None else lora_A.shape[0]
    return (_rows(activations), *shape, r, _bits(activations.dtype))


# (M, N, K, r, bits of an element) of a call, for every op whose back ends `make tune` compares. A
# tensor that is only converted is one long row; of many pairs the first gives the shape.
_SIZES: dict[str, Callable[..., tuple[int, ...]]] = {
    "nf4_quantize": lambda weight: (1, weight.numel(), 1, 1, _bits(weight.dtype)),
    "nf4_dequantize": lambda w, dtype: (1, 2 * w[0].numel(), 1, 1, _bits(dtype)),
    "nf4_dequantize_out": lambda w, out: (1, 2 * w[0].numel(), 1, 1, _bits(out.dtype)),
    "lora_linear_forward": lambda x, weight, lora_A: _linear_sizes(x, weight.shape, lora_A),
    "lora_linear_backward": lambda dy, lora_A, lora_B: _linear_sizes(
        dy, (lora_B.shape[0], lora_A.shape[1]), lora_A
    ),
    "nf4_lora_linear_forward": lambda x, layout, lora_A: _linear_sizes(x, layout[3:], lora_A),
    "nf4_lora_linear_backward": lambda dy, layout, lora_A: _linear_sizes(dy, layout[3:], lora_A),
    "dora_norm": lambda weight, lora_A: (
        *(1, *weight.shape, lora_A.shape[0]),
        _bits(weight.dtype),
    ),
    "nf4_dora_norm": lambda layout, dtype, lora_A: (
        *(1, *layout[3:], lora_A.shape[0]),
        _bits(dtype),
    ),
    "low_rank_svd": lambda lora_B, lora_A: (
        *(len(lora_B), len(lora_B[0]), lora_A[0].shape[1], max(len(A) for A in lora_A)),
        _bits(lora_B[0].dtype),
    ),
}
_SIZES = {op: by_name(op, sizes) for op, sizes in _SIZES.items()}
MEASURABLE = tuple(_SIZES)
CUDA_ROWS = (
    32  # up to which the CUDA C++ kernel decodes a weight in a third of Triton's instructions
)
# Whether a GPU's back end is there in a form that takes tensors of a CPU.
_STAND_INS = {"triton": triton_interpreted, "cuda": emulated}

_override: ContextVar[str | None] = ContextVar("peftkern_backend", default=None)
# Where os.environ looks a name up. Of a variable that is not set os.environ.get makes two
# exceptions, which took a third of what a small layer's call costs (7 us of 20, EPYC 7003).
_VARIABLE = _KEY = "PEFTKERN_BACKEND"
_environment = os.environ
if hasattr(os.environ, "_data"):
    _environment, _KEY = os.environ._data, os.environ.encodekey(_VARIABLE)


def call(op: str, args: tuple[Any, ...]) -> Any:
    """Run `op` on the first candidate that takes these arguments and is trusted with them."""
    first = args[0]
    device = (first[0] if isinstance(first, (list, tuple)) else first).device
    forced = forced_backend()
    if forced is not None:
        return _call_forced(op, args, device, forced)
    if trust.mode() != "always":
        return programs.run(op, args, device, _in_order)
    for candidate in CANDIDATES[op] if device.type != "cuda" else _in_order(op, args, device):
        if candidate.device is not None and candidate.device != device.type:
            continue
        reason = candidate.refusal(*args)
        if reason is None:
            record_call(op, candidate.name)
            return candidate.run(*args)
        record_fallback(op, f"{candidate.name}: {reason}")
    raise BackendUnavailableError(f"no back end for {op}")


def _call_forced(op: str, args: tuple[Any, ...], device: torch.device, forced: str) -> Any:
    """Run `op` on the back end that is forced."""
    name = _meant(op, forced)
    for candidate in CANDIDATES[op]:
        if candidate.name != name:
            continue
        reason = _reason(candidate, args, device, forced)
        if reason is not None:
            raise BackendUnavailableError(f"back end {forced!r} cannot run {op}: {reason}")
        record_call(op, name)
        return candidate.run(*args)
    raise BackendUnavailableError(f"{op} has no back end {forced!r}")


def _meant(op: str, forced: str | None) -> str | None:
    """Return the candidate that is forced: "torch" is the reference where that is all there is."""
    if forced == "torch" and all(candidate.name != forced for candidate in CANDIDATES[op]):
        return "reference"
    return forced


def _in_order(op: str, args: tuple[Any, ...], device: torch.device) -> tuple[Candidate, ...]:
    """Return the candidates of an op, on a GPU first the one that `make tune` found the fastest."""
    if device.type != "cuda" or op not in _SIZES:
        return CANDIDATES[op]
    return preferred(op, args, arch(device))


def preferred(op: str, args: tuple[Any, ...], arch: str) -> tuple[Candidate, ...]:
    """Return the candidates of an op in the order of an architecture's table, or as counted."""
    problem = problem_of(op, args)
    fastest = configs.fastest(problem, arch)
    few = op == "nf4_lora_linear_forward" and problem.M <= CUDA_ROWS and problem.bits == 16
    if fastest is None and few and refusal_library() is None:
        fastest = "cuda"
    if fastest is None:
        return CANDIDATES[op]
    return tuple(sorted(CANDIDATES[op], key=lambda candidate: candidate.name != fastest))


def problem_of(op: str, args: tuple[Any, ...]) -> configs.Problem:
    """Return the key of an op's call in the tables."""
    return configs.Problem(op.removesuffix("_out"), *_SIZES[op](*args))


def is_slower(op: str, x: torch.Tensor, shape: tuple[int, ...], r: int, training: bool) -> bool:
    """Return True if PEFT's own layer measured faster than a patched one; for integrations.

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


def _reason(
    candidate: Candidate, args: tuple[Any, ...], device: torch.device, forced: str | None
) -> str | None:
    """Give the reason against a call. What stands in for a GPU runs on a CPU if it is forced."""
    if candidate.device is not None and candidate.device != device.type:
        stands_in = candidate.name == forced and device.type == "cpu"
        if not (stands_in and _STAND_INS[candidate.name]()):
            return f"tensors are on {device}"
    return candidate.refusal(*args)


def _device(args: tuple[Any, ...]) -> torch.device:
    """Return where a call runs: every op begins with a tensor or a list of tensors."""
    first = args[0]
    return (first[0] if isinstance(first, (list, tuple)) else first).device


def unserved(device: torch.device) -> str | None:
    """Return why no kernel serves a kind of device, or None where some do."""
    if device.type == "cpu":
        return None
    if device.type != "cuda":
        return f"no kernel for {device.type}"
    return triton_missing(device) or probe.triton_failure(device)


def runs_on_cpu(x: torch.Tensor) -> bool:
    """Return True if ops on these activations run on a CPU's back ends, not on stand-ins."""
    if torch.compiler.is_compiling():  # what is forced is asked in the op
        return x.is_cpu
    return x.is_cpu and forced_backend() not in _STAND_INS


def serving(device: torch.device) -> tuple[str, str | None]:
    """Return what serves tensors of a kind of device, and why no kernel does if none does."""
    forced = forced_backend()
    if forced is not None:
        return f"{forced}, as asked for", None
    if device.type == "cpu":
        module, reason = cpu.cpu_module()
        return ("plain PyTorch", reason) if module is None else (f"C++ ({cpu.cpu_isa()})", None)
    reason = unserved(device)
    return ("Triton", None) if reason is None else ("PEFT", reason)


def forced_backend() -> str | None:
    """Return the back end that `use_backend` or PEFTKERN_BACKEND forces, or None.

    Raises: ValueError listing the back ends if there is none of that name.
    """
    name = _override.get()
    if name is None:
        if _KEY not in _environment:
            return None
        name = os.environ.get(_VARIABLE) or None
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
class Explanation:
    """Verdicts of dispatch on one call: rows of (op, back end, verdict), and the machine."""

    rows: tuple[tuple[str, str, str], ...]
    machine: str

    def chosen(self, op: str) -> str | None:
        """Return the back end that would run `op`; None if none can."""
        return next((row[1] for row in self.rows if row[0] == op and row[2] == "chosen"), None)

    def as_dict(self) -> dict[str, Any]:
        """Return the same for JSON, with an op's candidates from the first to the last asked.

        {"rows": [{"op": "nf4_quantize", "backend": "cpu", "verdict": "chosen"}, ...],
         "machine": "..."}
        """
        names = ("op", "backend", "verdict")
        rows = [dict(zip(names, row, strict=True)) for row in self.rows]
        return {"rows": rows, "machine": self.machine}

    def __str__(self) -> str:
        table = table_text(["op", "back end", "verdict"], [list(row) for row in self.rows])
        return f"{table}\n{self.machine}"


def explain(calls: dict[str, tuple[Any, ...]]) -> Explanation:
    """Ask every candidate of each op about these arguments, without running anything."""
    rows = []
    forced = forced_backend()
    for op, args in calls.items():
        taken = False
        device, meant = _device(args), _meant(op, forced)
        for candidate in _in_order(op, args, device):
            reason = _reason(candidate, args, device, forced)
            if forced is None and reason is None:
                reason = programs.demotion(op, args, device, candidate.name)
            if forced is not None and candidate.name != meant:
                verdict = f"not asked: {forced!r} is forced"
            elif reason is not None:
                verdict = f"cannot: {reason}"
            else:
                verdict = "can" if taken else "chosen"
                taken = True
            rows.append((op, candidate.name, verdict))
    return Explanation(tuple(rows), cpu.describe())
