"""Programs: the kernels of an op as dispatch runs them, each checked before it is relied on.

A program is an op on one back end for dtypes, weights, options and powers of two of rows. Its call
number 1 is compared with torch, and numbers 10, 100 and 1000. What raises, or errs, is demoted and
another candidate answers that very call. On a GPU the back ends that were right compete at
the second call. A program whose first launch ends the process is demoted by the next one.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import math
import sys
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from peftkern.backends import contest, correctness, trust
from peftkern.backends.counts import record_call, record_fallback
from peftkern.backends.device import BackendUnavailableError

PLAIN = ("torch", "reference")  # torch's own operations, which others are judged by
CONTESTED = {"cuda"}  # kinds of device where back ends compete; a CPU has one of kernels
# Arguments that an op writes to.
_MUTATED = {
    "adalora_importance_": (0, 1),
    "adalora_allocate_": (1,),
    "rosa_spmm_": (0,),
    "nf4_dequantize_out": (2,),
    "low_rank_svd_out": (4, 5, 6, 7, 8),
}
_REPLACED = {"nf4_dequantize_out", "low_rank_svd_out"}  # whatever those held before
_NEVER = sys.maxsize

Args = tuple[Any, ...]


class Program:
    """State of one program in this process."""

    __slots__ = ("approved", "calls", "demoted", "device", "due", "name")

    def __init__(self, name: str, device: torch.device) -> None:
        self.name, self.device = name, device
        self.calls, self.due = 0, trust.CHECKED_CALLS[0]
        verdict = trust.ledger(device).programs.get(name)
        self.approved = verdict == trust.RIGHT
        self.demoted = None if verdict in (None, trust.RIGHT) else verdict

    def next_check(self) -> None:
        """Put the next check at the next of CHECKED_CALLS."""
        self.due = next((n for n in trust.CHECKED_CALLS if n > self.calls), _NEVER)


class Standing:
    """State of an op's candidates for one key in this process.

    programs: {back end: program}. order: the candidates, the winner of a contest first; None where
    one is to decide.
    """

    __slots__ = ("calls", "order", "programs")

    def __init__(self) -> None:
        self.calls = itertools.count(1)
        self.order: list[Any] | None = None
        self.programs: dict[str, Program] = {}


_standings: dict[tuple, Standing] = {}
_forgiven: set[str] = set()  # demoted in this process alone: verdicts that they shape do not last


@trust.on_reset
def _forget() -> None:
    _standings.clear()
    _forgiven.clear()


def lasting() -> bool:
    """Return whether what is measured now holds for later processes, too."""
    return not _forgiven


def run(op: str, args: Args, device: torch.device, candidates: Callable[..., Any]) -> Any:
    """Run `op` on the first candidate that takes these arguments and is trusted with them.

    Args: candidates, which gives those of (op, args, device); not asked once an order is decided.
    Raises: what the first candidate raised if all did; BackendUnavailableError if there is none.
    """
    key, kind = key_of(op, args, device), device.type
    standing = _standings.get(key)
    if standing is None:
        standing = _standings.setdefault(key, Standing())
    order = standing.order or _ordered(standing, key, args, device, candidates(op, args, device))
    failed: list[tuple[Program, Exception]] = []
    for candidate in order:
        if candidate.device is not None and candidate.device != kind:
            continue
        reason = candidate.refusal(*args)
        if reason is not None:
            record_fallback(op, f"{candidate.name}: {reason}")
            continue
        if candidate.name in PLAIN:
            record_call(op, candidate.name)
            return _after(failed, device, candidate.run(*args))
        program = standing.programs.get(candidate.name)
        if program is None:
            program = _program(standing, key, candidate.name, device)
        reason = program.demoted or _unready(program, device)
        if reason is not None:
            record_fallback(op, f"{candidate.name}: {reason}")
            continue
        program.calls += 1
        record_call(op, candidate.name)
        try:
            if program.calls < program.due or trust.mode() == "off":
                result = candidate.run(*args)
            else:
                result = _checked(op, args, candidate, program, order)
        except Exception as error:
            if op in _MUTATED and program.calls > 1:
                raise  # what it has written so far cannot be taken back
            failed.append((program, error))
            continue
        return _after(failed, device, result)
    if failed:
        raise failed[0][1]
    raise BackendUnavailableError(f"no back end for {op}")


def demotion(op: str, args: Args, device: torch.device, backend: str) -> str | None:
    """Return why a back end's program for such a call is demoted, or None."""
    if backend in PLAIN or trust.mode() == "always":
        return None
    key = key_of(op, args, device)
    standing = _standings.setdefault(key, Standing())
    return _program(standing, key, backend, device).demoted


def key_of(op: str, args: Args, device: torch.device) -> tuple:
    """Return what an op's kernels are compiled and chosen for; rows in powers of two."""
    describe = _KEYS.get(op)
    return (op, device, *(_described(args) if describe is None else describe(*args)))


def _described(args: Iterable[Any]) -> list[Any]:
    key: list[Any] = []
    for arg in args:
        if isinstance(arg, Tensor):
            shape = arg.shape
            key += (arg.dtype, shape[-1] if shape else 0, arg.numel().bit_length())
        elif isinstance(arg, (list, tuple)):
            key += (len(arg), *_described(arg[:4]))
        else:
            key.append(arg != 0.0 if isinstance(arg, float) else arg)
    return key


def _forward_key(x: Tensor, shape: Any, A: Any, bias: Any, keep: Any) -> tuple:
    update = ("no adapter",) if A is None else (A.dtype, A.shape[0])
    options = ("bias" if bias is not None else "", "dropout" if keep is not None else "")
    return (x.dtype, x.numel().bit_length(), *shape, *update, *options)


def _backward_key(dy: Tensor, x: Any, shape: Any, A: Any, keep: Any, needs: list[bool]) -> tuple:
    update = ("no adapter",) if A is None else (A.dtype, A.shape[0])
    wanted = f"{needs[0]:d}{needs[1]:d}{needs[2]:d}{needs[3]:d}"
    dropout = "dropout" if keep is not None else ""
    return (dy.dtype, dy.numel().bit_length(), *shape, *update, dropout, wanted)


# Keys of the ops that a layer calls, without what cannot differ: host time counts.
_KEYS: dict[str, Callable[..., tuple]] = {
    "lora_linear_forward": lambda x, W, A, B, bias, s, keep, p: _forward_key(
        x, W.shape, A, bias, keep
    ),
    "lora_linear_backward": lambda dy, x, S, W, A, B, s, keep, p, needs: _backward_key(
        dy, x, (B.shape[0], A.shape[1]), A, keep, needs
    ),
    "nf4_lora_linear_forward": lambda x, w, layout, A, B, bias, s, keep, p: _forward_key(
        x, layout, A, bias, keep
    ),
    "nf4_lora_linear_backward": lambda dy, x, S, w, layout, A, B, s, keep, p, needs: _backward_key(
        dy, x, layout, A, keep, needs
    ),
    # The budget falls from mask to mask.
    "adalora_allocate_": lambda scores, lora_E, budget, ties: (*_described((scores, lora_E)), ties),
}


def _program(standing: Standing, key: tuple, backend: str, device: torch.device) -> Program:
    found = standing.programs.get(backend)
    if found is None:
        name = f"{key[0]} on {backend} for {_text(key[2:])}"
        found = standing.programs.setdefault(backend, Program(name, device))
    return found


def _text(described: tuple) -> str:
    """Write a key as the ledger keeps it."""
    return " ".join(str(part).removeprefix("torch.") for part in described if part != "")


def _unready(program: Program, device: torch.device) -> str | None:
    """Return why a program that was never right here cannot be checked now."""
    if program.approved:
        return None
    if trust.mode() == "off":
        return "unchecked on this machine (PEFTKERN_TRUST=off)"
    return "unchecked, and a graph is being captured" if capturing(device) else None


def capturing(device: torch.device) -> bool:
    """Return whether a CUDA graph is being captured, where nothing may wait for the device."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def _checked(
    op: str, args: Args, candidate: Any, program: Program, candidates: Iterable[Any]
) -> Any:
    """Run a program and compare its result; the plain result is the answer if it is wrong."""
    device = program.device
    if capturing(device):
        return candidate.run(*args)
    mutated = _MUTATED.get(op, ())
    small = sum(t.numel() for t in correctness.tensors(args)) <= correctness.WHOLE
    copies = args
    if mutated and small:
        copies = tuple(_copied(a) if i in mutated else a for i, a in enumerate(args))
    ledger = trust.ledger(device)
    first = program.calls == 1 and not program.approved
    with ledger.first_launch(program.name) if first else contextlib.nullcontext():
        try:
            got = candidate.run(*args)
            if device.type == "cuda":
                torch.cuda.synchronize(device)
        except Exception:
            _restore(args, copies, mutated)
            raise
    if not all(math.isfinite(a) for a in args if isinstance(a, float)):
        program.due = program.calls + 1  # of a result that is NaN nothing can be learned
        return got
    plain = functools.cache(lambda: _plain(op, copies, candidates))

    def whole(result: Any, of: Args) -> Any:
        return result if not mutated or op in _REPLACED else (result, *_at(of, mutated))

    try:
        reason = None
        if small or not mutated or op in _REPLACED:
            compared = lambda: whole(plain(), copies)  # noqa: E731
            reason = correctness.wrong(op, args, whole(got, args), compared)
    except Exception:  # of the comparison, say of memory: as good as not due
        program.due = 10 * program.calls
        return got
    program.next_check()
    if reason is None:
        program.approved = True
        ledger.approve(program.name)
        return got
    program.demoted = f"wrong at call {program.calls}: {reason}"
    ledger.demote(program.name, program.demoted)
    record_fallback(op, f"{candidate.name}: {program.demoted}")
    answer = plain()
    _restore(args, copies, mutated)
    return answer


def _plain(op: str, args: Args, candidates: Iterable[Any]) -> Any:
    """Run an op in torch's own operations."""
    for candidate in candidates:
        if candidate.name in PLAIN and candidate.refusal(*args) is None:
            return candidate.run(*args)
    raise BackendUnavailableError(f"no plain back end for {op}")


def _at(args: Args, indices: Iterable[int]) -> tuple[Tensor, ...]:
    return tuple(correctness.tensors(args[i] for i in indices))


def _copied(arg: Any) -> Any:
    return arg.clone() if isinstance(arg, Tensor) else [t.clone() for t in arg]


def _restore(args: Args, copies: Args, mutated: Iterable[int]) -> None:
    if copies is args:
        return
    for ours, kept in zip(_at(args, mutated), _at(copies, mutated), strict=True):
        ours.copy_(kept)


def _after(failed: list[tuple[Program, Exception]], device: torch.device, result: Any) -> Any:
    """Demote what raised where another candidate did not, and pass the result on."""
    for program, error in failed:
        text = f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0]}"
        program.demoted = f"raised at call {program.calls}: {text}"
        # Memory that was short once need not be short again.
        keep = not trust.out_of_memory(error)
        if not keep:
            _forgiven.add(program.name)
        trust.ledger(device).demote(program.name, program.demoted, keep=keep)
    return result


def _ordered(
    standing: Standing, key: tuple, args: Args, device: torch.device, candidates: Iterable[Any]
) -> Iterable[Any]:
    """Put the winner of a key's contest first; hold the contest at the second call."""
    if device.type not in CONTESTED:
        standing.order = candidates
        return candidates
    call, winner = next(standing.calls), None
    if call == 1:
        verdict = trust.ledger(device).adopt(f"{_text(key[2:])} {key[0]}")
        winner = None if verdict is None else verdict["side"]
    elif call == 2:
        winner = _contest(standing, key, args, device, candidates)
    if winner is None:
        return candidates
    standing.order = sorted(candidates, key=lambda candidate: candidate.name != winner)
    return standing.order


def _contest(
    standing: Standing, key: tuple, args: Args, device: torch.device, candidates: Iterable[Any]
) -> str | None:
    """Time the back ends that were right, torch's own operations first; None if none compete."""
    op = key[0]
    if op in _MUTATED or trust.mode() == "off" or capturing(device):
        return None
    fair: dict[str, Callable[[], Any]] = {}
    for candidate in sorted(candidates, key=lambda c: c.name != "torch"):
        if candidate.device not in (None, device.type) or candidate.name == "reference":
            continue
        if candidate.refusal(*args) is not None:
            continue
        if candidate.name not in PLAIN:
            program = _program(standing, key, candidate.name, device)
            if program.calls == 0:  # not asked so far: its first call is a check
                program.calls += 1
                with contextlib.suppress(Exception):
                    _checked(op, args, candidate, program, candidates)
            if program.demoted is not None or not program.approved:
                continue
        fair[candidate.name] = functools.partial(candidate.run, *args)
    if len(fair) < 2:
        return next(iter(fair), None)
    outcomes = contest.outcomes(fair, contest.clock_of(device), contest.BUDGET / 2)
    best = min(outcomes, key=lambda name: max(outcomes[name].ratios.values()))
    side = best if outcomes[best].not_slower else next(iter(fair))
    verdict = {"side": side, "ratios": {name: outcome.ratios for name, outcome in outcomes.items()}}
    keep = lasting() and outcomes[best].unanimous
    return trust.ledger(device).decide(f"{_text(key[2:])} {op}", verdict, keep=keep)["side"]
