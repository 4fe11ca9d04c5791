"""Programs are checked before they are relied on, and the ledger of verdicts loses nothing."""

from __future__ import annotations

import copy
import json
import multiprocessing
import os
import platform
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from op_cases import op_cases
from tolerances import HANG_SECONDS
from torch import Tensor

import peftkern
from peftkern.backends import (
    contest,
    correctness,
    dispatch,
    journal,
    ops,
    probe,
    programs,
    trust,
)

CPU = torch.device("cpu")
CASES = op_cases()


@pytest.fixture(autouse=True)
def nothing_counted(own_trust: None) -> None:
    peftkern.reset_stats()


def native(op: str) -> dispatch.Candidate:
    return next(candidate for candidate in dispatch.CANDIDATES[op] if candidate.name == "cpu")


def inject(
    monkeypatch: pytest.MonkeyPatch, op: str, change: Callable[[Any, tuple], Any]
) -> dispatch.Candidate:
    """Let the native kernel of an op return what `change` makes of (result, arguments)."""
    candidate = native(op)
    run = candidate.run
    monkeypatch.setitem(candidate.__dict__, "run", lambda *args: change(run(*args), args))
    return candidate


def changed(result: Any, args: tuple) -> Any:
    """Spoil the last value of the first result that has one, or of what the op has written to."""
    written = programs._at(args, programs._MUTATED.get(current[0], ()))
    results = list(correctness.tensors(result if isinstance(result, tuple) else (result,)))
    for tensor in (*written, *results):
        if tensor.numel():
            flat = tensor.view(-1)
            flat[-1] = ~flat[-1] if not tensor.is_floating_point() else flat[-1] + 1e3
            return result
    return result


current = [""]


def plain(op: str, args: tuple) -> tuple[Any, tuple]:
    args = copy.deepcopy(args)
    with peftkern.use_backend("reference"):
        return getattr(ops, op)(*args), args


def same(ours: Any, theirs: Any) -> None:
    for a, b in zip(correctness.tensors([ours]), correctness.tensors([theirs]), strict=True):
        torch.testing.assert_close(a, b, rtol=2e-2, atol=2e-2, equal_nan=True)


@pytest.mark.parametrize("op", CASES)
def test_right_programs_are_approved(op: str) -> None:
    for args in CASES[op]:
        getattr(ops, op)(*copy.deepcopy(args))
    verdicts = trust.ledger(CPU).programs
    assert verdicts and set(verdicts.values()) == {trust.RIGHT}
    assert {name for _, name in peftkern.stats().calls} == {"cpu"}


@pytest.mark.parametrize("op", CASES)
def test_wrong_programs_are_demoted_and_answered(op: str, monkeypatch: pytest.MonkeyPatch) -> None:
    current[0] = op
    inject(monkeypatch, op, changed)
    args = copy.deepcopy(CASES[op][0])
    right, written = plain(op, args)
    with pytest.warns(trust.Distrusted, match="wrong at call 1"):
        got = getattr(ops, op)(*args)
    same((got, args), (right, written))
    # What answered may have asked for another op, whose program was right.
    (why,) = [v for v in trust.ledger(CPU).programs.values() if v != trust.RIGHT]
    assert why.startswith("wrong at call 1")
    again = copy.deepcopy(CASES[op][0])
    same((getattr(ops, op)(*again), again), (right, written))
    assert any(why in reason for _, reason in peftkern.stats().fallbacks)
    if op != "nf4_quantize_absmax":  # of which the CPU's is the only kernel
        assert dispatch.explain({op: args}).chosen(op) in programs.PLAIN


@pytest.mark.parametrize("op", CASES)
def test_what_raises_is_answered(op: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also by an op that has written to its arguments before it raises."""
    current[0] = op

    def raising(result: Any, args: tuple) -> Any:
        changed(result, args)
        raise RuntimeError("first line\nsecond line")

    inject(monkeypatch, op, raising)
    args = copy.deepcopy(CASES[op][0])
    right, written = plain(op, args)
    with pytest.warns(trust.Distrusted, match="raised at call 1: RuntimeError: first line"):
        got = getattr(ops, op)(*args)
    same((got, args), (right, written))


def test_the_first_error_is_raised_where_nobody_answers() -> None:
    """A call that no back end takes is the caller's fault, and demotes nobody."""
    x = torch.randn(3, 5)
    with pytest.raises((RuntimeError, ValueError)):
        ops.lora_linear_forward(x, x, torch.randn(2, 7), torch.randn(3, 2), None, 1.0, None, 0.0)
    assert not any(v != trust.RIGHT for v in trust.ledger(CPU).programs.values())


@pytest.mark.parametrize("rows", [1, 2, 17, 300, 5000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("nf4", [False, True])
def test_one_wrong_row_is_found(rows: int, dtype: torch.dtype, nf4: bool) -> None:
    """The last row of y, one value of dA: sums over all rows are compared whole."""
    torch.manual_seed(rows)
    K, N, r = 70, 24, 4
    x, dy = torch.randn(rows, K, dtype=dtype), torch.randn(rows, N, dtype=dtype)
    A, B, S = torch.randn(r, K), torch.randn(N, r), torch.randn(rows, r)
    if nf4:
        w = peftkern.quantize_nf4(torch.randn(N, K))
        weight, family = (w.tensors, w.layout), "nf4_lora_linear"
    else:
        weight, family = (torch.randn(N, K, dtype=dtype),), "lora_linear"
    forward = (x, *weight, A, B, None, 2.0, None, 0.0)
    backward = (dy, x, S, *weight, A, B, 2.0, None, 0.0, [True] * 4)
    for op, args, index in (
        (f"{family}_forward", forward, 0),
        (f"{family}_backward", backward, 0),
        (f"{family}_backward", backward, 1),
    ):
        got = native(op).run(*args)
        with_torch = lambda op=op, args=args: plain(op, args)[0]  # noqa: E731
        assert correctness.wrong(op, args, got, with_torch) is None
        got[index].view(-1)[-1] += got[index].abs().max() + 1
        assert correctness.wrong(op, args, got, with_torch)


def test_calls_10_100_1000_are_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    judge = correctness.wrong
    monkeypatch.setattr(correctness, "wrong", lambda *a: seen.append(count) or judge(*a))
    x, w = torch.randn(3, 8), torch.randn(4, 8)
    for count in range(1, 1101):  # noqa: B007
        peftkern.lora_linear(x, w, torch.randn(2, 8), torch.randn(4, 2), scaling=1.0)
    assert seen == list(trust.CHECKED_CALLS)


def test_a_budget_that_falls_makes_no_new_program() -> None:
    """AdaLoRA draws a mask with another budget each time; each would be checked, and kept."""
    scores, lora_E = torch.rand(6), [torch.ones(2, 1), torch.ones(4, 1)]
    keys = {
        programs.key_of("adalora_allocate_", (scores, lora_E, budget, ties), scores.device)
        for budget in (2, 5)
        for ties in (False, True)
    }
    assert len(keys) == 2


def test_back_ends_compete_where_there_are_several(monkeypatch: pytest.MonkeyPatch) -> None:
    """At a key's second call, among those that were right; the winner comes first from then on."""
    op, args = "lora_linear_forward", CASES["lora_linear_forward"][0]
    monkeypatch.setattr(programs, "CONTESTED", {"cpu"})
    for winner, seconds in (("torch", 9.0), ("cpu", 0.1)):
        trust.forget()
        peftkern.reset_stats()

        def clock(call: Callable, seconds: float = seconds) -> dict[str, float]:
            call()
            return {"wall": seconds if call.func == native(op).run else 1.0}

        monkeypatch.setattr(contest, "clock_of", lambda device, clock=clock: clock)
        for _ in range(5):
            getattr(ops, op)(*args)
        (verdict,) = trust.ledger(CPU).classes.values()
        assert verdict["side"] == winner
        counts = peftkern.stats().calls
        assert counts[op, winner] >= 4
        trust.reset()  # as another process would
        peftkern.reset_stats()
        getattr(ops, op)(*args)
        assert set(peftkern.stats().calls) == {(op, winner)}


def _write(start: int) -> None:
    ledger = trust.Ledger(CPU)
    for n in range(start, start + 20):
        ledger.approve(f"program {n}")


def test_two_processes_lose_no_verdict(monkeypatch: pytest.MonkeyPatch) -> None:
    """However long a busy machine keeps one of them from its turn."""
    monkeypatch.setattr(trust, "LOCK_SECONDS", HANG_SECONDS)
    context = multiprocessing.get_context("fork")
    writers = [context.Process(target=_write, args=(100 * n,)) for n in range(3)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    assert len(trust.Ledger(CPU).programs) == 60


@pytest.mark.parametrize("damage", ["", "[", "[]", '{"programs": 1}', '{"programs": {}}', "\x00"])
def test_a_damaged_file_is_as_none(damage: str) -> None:
    ledger = trust.ledger(CPU)
    ledger.approve("a program")
    ledger.path.write_text(damage, encoding="utf-8")
    assert trust.Ledger(CPU).programs == {}
    trust.Ledger(CPU).approve("another")
    assert json.loads(ledger.path.read_text(encoding="utf-8"))["programs"] == {"another": "right"}


def ended_process() -> int:
    process = multiprocessing.get_context("fork").Process(target=int)
    process.start()
    process.join()
    return process.pid


def leave_mark(program: str, pid: int, said: str = "", host: str = "") -> Path:
    """What a process leaves behind that has ended in a first launch."""
    ledger = trust.ledger(CPU)
    folder = ledger.path.parent
    folder.mkdir(parents=True, exist_ok=True)
    mark = folder / f"{ledger._name}.first-launch-{pid}-{program}"
    started = journal._started(pid)
    mark.write_text(f"{host or platform.node()}\n{pid}\n{started}\n{program}\n{said}")
    return mark


def test_marks_of_others_are_left_alone() -> None:
    """Of a process that runs, and of another machine; those of crashed processes demote."""
    pid = ended_process()
    leave_mark("running", os.getpid(), "crash")
    leave_mark("elsewhere", pid, "crash", host="another.host")
    leave_mark("cut", pid).write_text("")
    gone = leave_mark("crashed", pid, "Fatal Python error: Segmentation fault\n\nStack ...")
    why = r"first launch \(Fatal Python error: Segmentation fault\)"
    with pytest.warns(trust.Distrusted, match=f"crashed is demoted: .*{why}"):
        programs_found = trust.Ledger(CPU).programs
    assert set(programs_found) == {"crashed"}
    assert not gone.exists() and len(list(gone.parent.glob("*.first-launch-*"))) == 3


def test_a_process_killed_from_outside_proves_nothing() -> None:
    """Nor do all ranks of one job; a second time does, unless the program has been well since."""
    first, second = ended_process(), ended_process()
    folder = trust.ledger(CPU).path.parent
    for killed in range(3):
        marks = [leave_mark("program", pid) for pid in (first, second)]
        if killed == 2:  # for the second time in a row
            with pytest.warns(trust.Distrusted, match="for the second time"):
                assert set(trust.Ledger(CPU).programs) == {"program"}
        else:
            assert trust.Ledger(CPU).programs == {}
        assert not any(mark.exists() for mark in marks)
        if killed == 0:
            with trust.ledger(CPU).first_launch("program"):
                assert len(list(journal.files(folder))) == 2  # its mark, and what is noted
            assert not list(journal.files(folder))
        time.sleep(0.02)  # a clock of files may tick that slowly
    assert not list(journal.files(folder))


def test_marks_that_cannot_be_noted_stay() -> None:
    mark = leave_mark("program", ended_process())
    with trust.use_mode("readonly"):
        assert trust.Ledger(CPU).programs == {}
    assert list(journal.files(mark.parent)) == [mark]


def test_a_context_that_is_lost_demotes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where the process goes on to raise for itself."""
    monkeypatch.setattr(trust, "_context_is_lost", lambda device: True)
    lost = pytest.warns(trust.Distrusted, match="ended the context of the device")
    with lost, pytest.raises(RuntimeError), trust.ledger(CPU).first_launch("program"):
        raise RuntimeError("an illegal memory access was encountered")
    assert set(trust.Ledger(CPU).programs) == {"program"}


def test_ranks_share_verdicts_by_fingerprint(monkeypatch: pytest.MonkeyPatch) -> None:
    """A rank on another model of GPU has its own."""
    store = torch.distributed.HashStore()
    group = torch.distributed.distributed_c10d
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(group, "_get_default_store", lambda: store)
    ranks = []
    for fingerprint in ("one model", "one model", "another"):
        ranks.append(trust.Ledger(CPU))
        ranks[-1].__dict__["_name"] = fingerprint
    ranks[0].decide("class", {"side": trust.OURS}, keep=False)
    assert ranks[1].decide("class", {"side": trust.PEER}, keep=False)["side"] == trust.OURS
    assert ranks[2].adopt("class") is None
    assert ranks[2].decide("class", {"side": trust.PEER}, keep=False)["side"] == trust.PEER


@pytest.mark.parametrize("case", range(2))
@pytest.mark.parametrize("scaling", [float("nan"), float("inf")])
def test_a_scaling_that_is_not_finite_proves_nothing(case: int, scaling: float) -> None:
    """The program is checked at the next call."""
    args = list(CASES["lora_linear_forward"][case])
    right, args[5] = args[5], scaling
    ops.lora_linear_forward(*args)
    assert trust.ledger(CPU).programs == {}
    args[5] = right
    ops.lora_linear_forward(*args)
    assert set(trust.ledger(CPU).programs.values()) == {trust.RIGHT}


def test_forget(tmp_path: Path) -> None:
    ledger = trust.ledger(CPU)
    ledger.approve("a program")
    leave_mark("program", os.getpid())
    ledger.path.with_suffix(".abc.tmp").touch()  # of a process that ended while it wrote
    ledger.path.with_name(f"{ledger._name}.ended-0").touch()
    assert len(trust.files()) == 1
    assert trust.forget() == 1 and not list(ledger.path.parent.iterdir())
    assert trust.ledger(CPU).programs == {}


def test_the_mode_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PEFTKERN_TRUST", "blindly")
    trust._mode_of_process.cache_clear()
    with pytest.raises(ValueError, match=r"PEFTKERN_TRUST: expected one of .*'auto'.*blindly"):
        trust._mode_of_process()
    with pytest.raises(ValueError, match="mode: expected one of"), trust.use_mode("blindly"):
        pass


def test_the_probe_runs_a_kernel() -> None:
    """In the interpreter here."""
    assert probe.attempt(CPU) is None


@pytest.mark.parametrize(
    ("error", "do"),
    [
        (RuntimeError("Failed to find C compiler. Please specify via CC"), "install gcc"),
        (FileNotFoundError(2, "No such file or directory: 'gcc'"), "install gcc"),
        (RuntimeError("fatal error: Python.h: No such file"), "python3-dev"),
        (AssertionError("libcuda.so cannot found!"), "ldconfig"),
        (PermissionError(13, "Permission denied", "/root/.triton"), "TRITON_CACHE_DIR"),
        (OSError(30, "Read-only file system", "/root/.triton"), "TRITON_CACHE_DIR"),
    ],
)
def test_the_probe_names_cause_and_cure(
    error: Exception, do: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run(*args: Any) -> Tensor:
        raise error

    monkeypatch.setattr("peftkern.kernels.nf4.nf4_dequantize", run)
    reason = probe.attempt(CPU)
    assert type(error).__name__ in reason and do in reason


def test_the_probe_finds_a_wrong_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("peftkern.kernels.nf4.nf4_dequantize", lambda *a: torch.zeros(4, 64))
    assert probe.attempt(CPU) == "the result of a test kernel is wrong"
