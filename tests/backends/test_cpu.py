"""The C++ library: each instruction set, threads and fork."""

from __future__ import annotations

import itertools
import os
import threading
import time
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from block_weights import assert_same_values, every_pair_weight, numpy_values, random_weight_of
from grids import thinned
from linear_cases import (
    BF16,
    F16,
    F32,
    SHAPES,
    NF4Operands,
    check_accuracy,
    layouts,
    nf4_operands,
    operands,
    ours,
    peft_formula,
    trials,
    with_gradients,
)
from nf4_weights import assert_same_every_time
from processes import run_code
from tolerances import HANG_SECONDS

import peftkern
from peftkern.backends import device, pointers
from peftkern.backends.cpu import crossovers, nf4_lora_linear
from peftkern.backends.cpu import module as native

ISAS = native.cpu_isas()


@pytest.fixture(params=ISAS)
def isa(request) -> Iterator[str]:
    with native.use_isa(request.param):
        assert native.cpu_isa() == request.param
        yield request.param


@pytest.fixture(autouse=True)
def on_native_kernels():
    with peftkern.use_backend("cpu"):
        yield


def test_library_is_there():
    module, reason = native.cpu_module()
    assert module is not None, reason
    assert ISAS[0] == "scalar"
    assert set(ISAS) <= {"scalar", "avx2", "avx512", "avx512_bf16", "amx_bf16"}


def test_isa_follows_the_machine():
    with open("/proc/cpuinfo", encoding="utf-8") as file:
        flags = next(line for line in file if line.startswith("flags")).split()
    for name, flag in {"avx2": "avx2", "avx512": "avx512bw", "avx512_bf16": "avx512_bf16"}.items():
        assert (name in ISAS) == (flag in flags)


@pytest.mark.parametrize("dtype", [BF16, F16])
def test_dense_weights_where_torch_has_no_16_bit_products(isa, dtype, monkeypatch):
    """As on CPUs without AVX-512: dy @ weight is ours, whatever the strides of the weight."""
    monkeypatch.setitem(device._PRODUCTS, dtype, False)
    for shape in SHAPES:
        check_accuracy([operands(shape, dtype, F32) for _ in range(trials(shape))], ours)
    for weight in layouts(torch.randn(24, 40).to(dtype)).values():
        check_accuracy([operands((9, 24, 40, 4), dtype, F32, weight=weight.view(24, 40))], ours)
    for empty in ((0, 24, 40, 4), (3, 0, 40, 4), (3, 24, 0, 4)):
        o = operands(empty, dtype, F32)
        for mine, theirs in zip(
            with_gradients(o, ours).values(), with_gradients(o, peft_formula).values(), strict=True
        ):
            assert mine.shape == theirs.shape


def test_unknown_isa_lists_what_there_is(monkeypatch):
    for wrong in ("mmx", "AVX2", "scalar "):
        monkeypatch.setenv("PEFTKERN_CPU_ISA", wrong)
        error = rf"PEFTKERN_CPU_ISA: .*'scalar'.* got '{wrong}'"
        with native.use_isa(None), pytest.raises(ValueError, match=error):
            native.cpu_isa()
        with pytest.raises(ValueError, match=error), native.use_isa(wrong):
            pass
    monkeypatch.setenv("PEFTKERN_CPU_ISA", "")
    with native.use_isa(None):
        assert native.cpu_isa() == ISAS[-1]


@pytest.mark.parametrize(("M", "dtype"), thinned([1, 3, 16, 37, 300], [F32, BF16]))
def test_many_panels_on_each_isa(isa, M, dtype):
    """Sizes that no tile divides, over several panels of both dimensions, on two threads."""
    torch.set_num_threads(2)
    check_accuracy([nf4_operands((M, 523, 2110, 17), dtype, F32)], ours)
    aligned = {"blocksize": 128, "bias": False}
    check_accuracy([nf4_operands((M, 512, 1024, 16), dtype, F32, **aligned)], ours)


@pytest.fixture(params=["dot products", "panels", "both"])
def path(request, monkeypatch) -> str:
    """Both passes take this path, or forward one for 32 rows and the other for the rest."""
    rows = {"dot products": 1 << 20, "panels": 0, "both": 16}[request.param]
    monkeypatch.setattr(nf4_lora_linear, "few_rows", lambda name, isa, dtype: rows)
    return request.param


@pytest.mark.parametrize(
    ("M", "dtype", "weight"),
    thinned(
        [1, 2, 3, 4, 5, 6, 7, 8, 9, 23, 37],
        [F32, BF16],
        [(33, 4160, 64), (66, 192, 128), (1, 64, 4096)],
        diagonals=2,
    ),
)
def test_few_rows_on_each_isa(isa, path, M, dtype, weight):
    """Tiles of every number of rows; several passes over K, with a half of a group at the end."""
    N, K, blocksize = weight
    check_accuracy([nf4_operands((M, N, K, 17), dtype, F32, blocksize=blocksize)], ours)


@pytest.mark.parametrize(
    ("M", "dtype", "row", "weight"),
    thinned(
        [1, 2, 3, 4, 5, 6],
        [BF16, F32],
        [("mxfp4", 32), ("nvfp4", 16), ("int4", 32), ("int4", 64), ("nf4", 32)],
        [(35, 320), (66, 64)],
        diagonals=2,
    ),
)
def test_few_rows_of_other_formats_on_each_isa(isa, M, dtype, row, weight):
    """On the path that the table chooses: of AMX the passes change it between three and five."""
    (name, blocksize), (N, K) = row, weight

    def draw() -> NF4Operands:
        w = random_weight_of(name, (N, K), dtype, blocksize)
        dense = peftkern.dequantize_nf4(w, dtype)
        return NF4Operands(**vars(operands((M, N, K, 4), dtype, F32, weight=dense)), w=w)

    check_accuracy([draw() for _ in range(trials((M, N, K, 4)))], ours)


@pytest.mark.parametrize("tensor_scale", [3e38, -0.5, 1e-40])
def test_every_scale_of_nvfp4_beside_any_of_the_tensor(isa, tensor_scale):
    """Sixteen are decoded at once as float16, unless what that multiplies by overflows."""
    w = replace(every_pair_weight("nvfp4", F32), tensor_scale=torch.tensor([tensor_scale]))
    assert_same_values(peftkern.dequantize(w), numpy_values(w, F32))


@pytest.mark.parametrize("dtype", [F32, BF16])
def test_few_rows_are_deterministic(isa, path, dtype):
    """Twenty runs, and any number of threads: the same bits."""
    o = nf4_operands((11, 130, 1088, 8), dtype, F32)
    assert_same_every_time(lambda: [ours(o, o.x, o.lora_A, o.lora_B, o.bias)], threads=(1, 2, 3))


# Instructions for 128 weights and M rows of x in the compiled loops: about those for 1 to 8 rows of
# dot products, and what panels take for 16 or 32.
_DOTS = {
    "avx2": lambda m: 92 + 18 * m,
    "avx512": lambda m: 30 + 11 * m,
    "avx512_bf16": lambda m: 20 + 6 * m,
}
_PANELS = {
    "avx2": lambda M: (M > 0) * 130 + 448 * -(-M // 16),
    "avx512": lambda M: (M > 0) * 48 + 128 * -(-M // 32) + 144 * -(-M // 16),
    "avx512_bf16": lambda M: (M > 0) * 22 + 64 * -(-M // 32) + 72 * -(-M // 16),
}


def test_table_of_few_rows_is_in_the_order_of_codes():
    names = ("scalar", "avx2", "avx512", "avx512_bf16", "amx_bf16")
    for table in crossovers.FEW_ROWS.values():
        assert len(table) == len(names)
    assert all(names[code] == name for name, code in native.library().isas().items())


@pytest.mark.parametrize(
    ("isa", "dtype", "code"),
    [
        (1, F32, "avx2"),
        (1, BF16, "avx2"),
        (2, F32, "avx512"),
        (2, BF16, "avx512"),
        (3, F32, "avx512"),
        (3, BF16, "avx512_bf16"),
        (4, F32, "avx512"),
    ],
)
def test_choice_of_path_makes_no_cliff(isa, dtype, code):
    """By count, not by time: what is taken is near the cheaper path, a row more is a small step."""

    def dots(M: int) -> int:
        return M // 8 * _DOTS[code](8) + (_DOTS[code](M % 8) if M % 8 else 0)

    def cost(M: int) -> int:
        most, rest = crossovers.few_rows("few_rows", isa, dtype), M % 32
        few = M if most >= M else rest if rest <= most // 2 else 0
        return _PANELS[code](M - few) + dots(few)

    costs = [cost(M) for M in range(1, 129)]
    for M, instructions in enumerate(costs, 1):
        assert instructions <= 1.3 * min(dots(M), _PANELS[code](M)), M
    for M, (fewer, more) in enumerate(itertools.pairwise(costs), 1):
        assert fewer / 1.1 <= more <= 1.5 * fewer, M


@pytest.mark.parametrize("threads", [1, 2, 3, 7])
def test_thread_counts(threads):
    torch.set_num_threads(threads)
    check_accuracy([nf4_operands((65, 130, 200, 8), BF16, F32)], ours)
    check_accuracy([nf4_operands((1, 515, 200, 8), BF16, F32)], ours)


def test_eight_python_threads():
    """Calls of different shapes at once: no shared scratch, no lock held over a call."""
    cases = [nf4_operands((1 + 9 * i, 60 + i, 128, 4), BF16, F32) for i in range(8)]
    wanted = [with_gradients(o, ours) for o in cases]
    wrong: list[int] = []

    def work(i: int) -> None:
        with torch.no_grad():
            o = cases[i]
            for _ in range(30):
                y = ours(o, o.x, o.lora_A, o.lora_B, o.bias)
                if not torch.equal(y, wanted[i]["y"]):
                    wrong.append(i)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(HANG_SECONDS)
    assert not any(thread.is_alive() for thread in threads)
    assert wrong == []


def in_fork(function) -> None:
    """Run `function` in a forked child; fail if it fails there or hangs."""
    child = os.fork()
    if child == 0:
        try:
            function()
        except BaseException:
            os._exit(1)
        os._exit(0)
    deadline = time.monotonic() + HANG_SECONDS
    while time.monotonic() < deadline:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            assert os.waitstatus_to_exitcode(status) == 0
            return
        time.sleep(0.01)
    os.kill(child, 9)
    os.waitpid(child, 0)
    pytest.fail("the child hangs")


def test_fork_before_first_use():
    """torch's threads have run, the library has not: its first call is in the child."""
    code = (
        "import os, torch, peftkern\n"
        "from peftkern.backends.cpu import module as native\n"
        "torch.set_num_threads(2); torch.randn(1 << 22).sum()\n"
        "w = torch.zeros(1 << 20); packed = torch.zeros(1 << 19, dtype=torch.uint8)\n"
        "absmax = torch.zeros(1 << 14)\n"
        "pid = os.fork()\n"
        "if pid == 0:\n"
        "    isa, _ = native.isa_and_threads()\n"
        "    native.library().nf4_quantize(isa, 2, w.data_ptr(), 0, 1 << 20, 64,\n"
        "        packed.data_ptr(), 1 << 19, absmax.data_ptr(), 1 << 14)\n"
        "    os._exit(int(packed[0]) != 0x77)\n"
        "raise SystemExit(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))\n"
    )
    run_code(code)


def test_fork_after_use():
    """As in a DataLoader's worker: the parent has used its threads, the child has none of them.

    The child asks for two threads all the same; torch's own parallel loops would hang there, so
    it calls nothing of torch's.
    """
    M, N, K, R = 64, 512, 1024, 8  # enough for two threads' worth of tasks
    weight = peftkern.quantize_nf4(torch.randn(N, K))
    w = pointers.weight(weight.tensors, weight.layout)
    x, a, b = torch.randn(M, K), torch.randn(R, K), torch.randn(N, R)
    out, y, S = torch.zeros(N, K), torch.zeros(M, N), torch.zeros(M, R)
    x_at, a_at, b_at, S_at, y_at = (t.data_ptr() for t in (x, a, b, S, y))
    module = native.library()
    best = module.isas()[ISAS[-1]]
    calls = [
        lambda: module.nf4_dequantize(best, 2, w, out.data_ptr(), 0, N * K, False),
        lambda: module.lora_shrink(best, 2, M, K, R, x_at, 0, a_at, 0, 1.0, S_at),
        lambda: module.nf4_lora_linear_forward(
            best, 2, M, N, K, R, x_at, 0, w, a_at, 0, 1.0, S_at, 1.0, b_at, 0, y_at, 0
        ),
    ]
    for call in calls:
        call()
    torch.ones(1 << 20).sum()  # torch's threads, from the same pool
    wanted = [t.tolist() for t in (out, y, S)]
    for t in (out, y, S):
        t.fill_(-1.0)

    def child():
        for call in calls:
            call()
        assert [t.tolist() for t in (out, y, S)] == wanted
        peftkern.reset_stats()

    in_fork(child)
    for call in calls:  # and the parent still has its threads
        call()
    assert [t.tolist() for t in (out, y, S)] == wanted
