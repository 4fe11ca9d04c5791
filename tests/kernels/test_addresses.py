"""Addresses beyond 2^31 elements, computed by the launchers and kernels over memory that is not.

Tensors are fake, so nothing is allocated; the interpreter runs the first and the last program of
each launch, and the first and the last step of each loop, where an int32 would have wrapped.
"""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from grids import thinned
from interpreted import INTERPRETED, outside
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from triton.runtime import interpreter
from triton.runtime.interpreter import TensorHandle

from peftkern.backends.schemas import by_name
from peftkern.formats.table import FORMATS, NUMBERS, fields
from peftkern.kernels import (
    dora,
    grouped_linear,
    grouped_products,
    launch,
    lora_linear,
    low_rank_update,
    nf4,
    nf4_lora_linear,
    rosa,
)

pytestmark = INTERPRETED

GRID_MOST = (2**31 - 1, 65535, 65535)  # programs of a CUDA launch
ROWS_MOST = 2**30 - 1
COLUMNS_MOST = -1  # stands for the most columns that `refusal` admits
CPU = torch.device("cpu")
SPANS: list[tuple[int, int]] = []  # bytes of the tensors of the launch that runs
ACCESSES: list[str] = []
NAMES: list[str] = []  # of the kernel's parameters that are those tensors
# What lies in a tensor of that name, from the numbers of its elements; zeros in all others.
CONTENTS: dict[str, Callable[[np.ndarray], np.ndarray]] = {}


@dataclass(frozen=True)
class FarPointer:
    """What a kernel takes for a tensor that lies at an address of our choice."""

    dtype: torch.dtype
    address: int

    def data_ptr(self) -> int:
        return self.address


def ends(*bounds) -> list[int]:
    """The first and the last step of a loop."""
    steps = range(*bounds)
    return [steps[0], steps[-1]] if len(steps) > 2 else list(steps)


def all_or_ends(*bounds) -> list[int] | range:
    """A loop in full, unless it is long."""
    return ends(*bounds) if len(range(*bounds)) > 64 else range(*bounds)


def contents(ptrs: np.ndarray, size: int, dtype: np.dtype) -> np.ndarray:
    """What a kernel finds at addresses, elements being of `size` bytes."""
    found = np.zeros(ptrs.shape, dtype)
    for name, content in CONTENTS.items():
        if name in NAMES:
            address = (NAMES.index(name) + 1) << 44
            mine = (ptrs.astype(np.int64) >> 44) == address >> 44
            found[mine] = content((ptrs[mine].astype(np.int64) - address) // size)
    return found


def run_ends(executor, *args, **kwargs) -> None:
    """Stands in for GridExecutor.__call__: corner programs only, whatever lies at an address."""
    grid = (*executor.grid, 1, 1)[:3]
    assert all(0 < n <= most for n, most in zip(grid, GRID_MOST, strict=True)), f"grid {grid}"
    accepted = inspect.getfullargspec(executor.fn).args
    kwargs = {k: v for k, v in kwargs.items() if k in accepted}
    SPANS.clear()
    NAMES.clear()
    arguments = {}
    for name, value in inspect.getcallargs(executor.fn, *args, **kwargs).items():
        if isinstance(value, Tensor):
            address = (len(SPANS) + 1) << 44
            extent = 1 + sum((n - 1) * s for n, s in zip(value.shape, value.stride(), strict=True))
            SPANS.append((address, address + extent * value.element_size()))
            value = FarPointer(value.dtype, address)
            NAMES.append(name)
        constant = name in executor.constexprs
        arguments[name] = value if constant else interpreter._implicit_cvt(value)
    builder = interpreter.interpreter_builder
    scope = interpreter._patch_lang(executor.fn)
    try:
        builder.set_grid_dim(*grid)
        for index in itertools.product(*({0, n - 1} for n in grid)):
            builder.set_grid_idx(*index)
            executor.fn(**arguments)
    finally:
        scope.restore()


def check(ptrs, mask, what: str) -> None:
    taken = np.broadcast_to(mask.data.astype(bool), ptrs.data.shape)
    wrong = outside(ptrs.data[taken], SPANS)
    assert not len(wrong), f"{what} of {len(wrong)} addresses outside of every tensor"
    ACCESSES.append(what)


@pytest.fixture(autouse=True)
def far_memory(monkeypatch):
    def load(self, ptrs, mask, *rest):
        check(ptrs, mask, "load")
        dtype = ptrs.get_element_ty()
        size = dtype.primitive_bitwidth // 8
        return TensorHandle(contents(ptrs.data, size, interpreter._get_np_dtype(dtype)), dtype)

    def store(self, ptrs, value, mask, *rest):
        check(ptrs, mask, "store")

    for form in range(len(FORMATS)):
        launch.code_table(CPU, form)  # remembered, so not to be a fake one
    ACCESSES.clear()
    CONTENTS.clear()
    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_masked_load", load)
    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_masked_store", store)
    monkeypatch.setattr(interpreter.GridExecutor, "__call__", run_ends)
    for module in (dora, grouped_products, low_rank_update, nf4, nf4_lora_linear):
        monkeypatch.setattr(module, "range", ends, raising=False)
    monkeypatch.setattr(rosa, "range", all_or_ends, raising=False)  # it bisects
    with FakeTensorMode():
        yield
    assert "load" in ACCESSES and "store" in ACCESSES


def fake(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.empty(shape, dtype=dtype)


def nf4_weight(N: int, K: int) -> tuple:
    blocks = N * K // 64
    packed = fake(N * K // 2, dtype=torch.uint8)
    absmax = fake(blocks, dtype=torch.uint8)
    nested = fake(-(-blocks // 256), dtype=torch.float32)
    code, offset = fake(256, dtype=torch.float32), fake(dtype=torch.float32)
    return [packed, absmax, nested, code, offset], [0, 64, 256, N, K]


def most_columns() -> int:
    """Bisected: a rank of 256 over one more column is refused."""
    admitted, refused = 1, 1 << 31
    x, A = fake(1, 1), fake(256, 1)
    while refused - admitted > 1:
        middle = (admitted + refused) // 2
        if low_rank_update.refusal(x, (1, middle), A, A, None) is None:
            admitted = middle
        else:
            refused = middle
    assert admitted > 1 << 20
    return admitted


def adapters(N: int, K: int, r: int) -> tuple[Tensor, Tensor]:
    return fake(r, K, dtype=torch.float32), fake(N, r, dtype=torch.float32)


@pytest.mark.parametrize("dropout", [False, True])
@pytest.mark.parametrize(
    "shape",
    [
        (ROWS_MOST, 70, 40, 5),
        (ROWS_MOST, 70, 40, 256),
        (3, COLUMNS_MOST, 70, 64),
        (3, COLUMNS_MOST, 70, 256),
        (3, 70, COLUMNS_MOST, 64),
        (3, 70, COLUMNS_MOST, 256),
        (600, COLUMNS_MOST, 70, 256),
    ],
    ids=str,
)
def test_lora_linear(shape, dropout):
    M, N, K, r = (most_columns() if n == COLUMNS_MOST else n for n in shape)
    x, dy, weight, bias = fake(M, K), fake(M, N), fake(N, K), fake(N)
    A, B = adapters(N, K, r)
    keep, p = (fake(1, dtype=torch.int64), 0.5) if dropout else (None, 0.0)
    forward = (x, weight, A, B, bias, 2.0, keep, p)
    assert lora_linear.refusal_forward(x, weight, A, B, keep) is None
    _, S = lora_linear.lora_linear_forward(*forward)
    backward = (dy, x, S, weight, A, B, 2.0, keep, p, [True] * 4)
    assert lora_linear.refusal_backward(dy, A, B, keep) is None
    lora_linear.lora_linear_backward(*backward)


@pytest.mark.parametrize(
    "shape",
    [
        (128, 1 << 21, 4096, 256),
        (128, 4096, 1 << 21, 256),
        (5, 1 << 20, 1 << 14, 16),
        (ROWS_MOST, 128, 64, 16),
    ],
    ids=str,
)
def test_nf4_lora_linear(shape):
    M, N, K, r = shape
    x, dy, bias = fake(M, K), fake(M, N), fake(N)
    A, B = adapters(N, K, r)
    keep = fake(1, dtype=torch.int64)
    weight = nf4_weight(N, K)
    forward = (x, *weight, A, B, bias, 2.0, keep, 0.5)
    assert nf4_lora_linear.refusal_forward(x, weight[1], A, B, keep) is None
    _, S = nf4_lora_linear.nf4_lora_linear_forward(*forward)
    backward = (dy, x, S, *weight, A, B, 2.0, keep, 0.5, [True] * 4)
    assert nf4_lora_linear.refusal_backward(dy, weight[1], A, B, keep) is None
    nf4_lora_linear.nf4_lora_linear_backward(*backward)


@pytest.mark.parametrize(("name", "blocksize"), [("nvfp4", 16), ("int4", 32)])
def test_formats_of_short_blocks(name, blocksize):
    N, K = 1 << 20, 1 << 14
    layout = [NUMBERS[name], blocksize, 0, N, K]
    tensors = [fake(field.length, dtype=field.dtype) for field in fields(layout)]
    forward = (fake(5, K), tensors, layout, None, None, None, 2.0, None, 0.0)
    nf4_lora_linear.nf4_lora_linear_forward(*forward)
    backward = (fake(5, N), None, None, tensors, layout, None, None, 2.0, None, 0.0)
    nf4_lora_linear.nf4_lora_linear_backward(*backward, [True, False, False, False])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_nf4_codec(dtype):
    shape = [(1 << 17) + 1, 1 << 16]
    nf4.nf4_dequantize(*nf4_weight(*shape), dtype)
    nf4.nf4_quantize(fake(*shape, dtype=dtype), 64)


@pytest.mark.parametrize("r", [16, 256])
@pytest.mark.parametrize("shape", [(COLUMNS_MOST, 1 << 13), (1 << 13, COLUMNS_MOST)], ids=str)
def test_dora_norm(shape, r):
    N, K = (most_columns() // 64 * 64 if n == COLUMNS_MOST else n for n in shape)
    A, B = adapters(N, K, r)
    for weight in (fake(N, K), fake(K, N).t()):
        assert dora.refusal_norm(weight, A, B) is None
        dora.dora_norm(weight, A, B, 2.0)
    packed = (*nf4_weight(N, K), torch.bfloat16, A, B, 2.0)
    assert dora.refusal_nf4_norm(*packed[1:-1]) is None
    dora.nf4_dora_norm(*packed)


GROUPED = [  # R, E, N, K and r; rows or columns beyond 2^31 in a weight, and 2^37 in the stack
    (ROWS_MOST, 3, 40, 64, 5),
    (40, 300, 1 << 13, 1 << 16, 16),
    (40, 300, 1 << 16, 1 << 13, 70),
    (40, 4096, 4096, 72, 16),
]


@pytest.mark.parametrize(
    ("shape", "transposed", "nf4"), thinned(GROUPED, [False, True], [False, True], diagonals=2)
)
def test_grouped_linear(shape, transposed, nf4):
    R, E, N, K, r = shape
    CONTENTS["offsets_ptr"] = lambda e: (e + 1) * (R - 1) // E  # a row of no group
    CONTENTS["rows_ptr"] = lambda row: row // 2
    x, rows = fake(R // 2 + 1, K), fake(R, dtype=torch.int32)
    offsets = fake(E, dtype=torch.int32)
    A, B = fake(E, r, K, dtype=torch.float32), fake(N, r, E, dtype=torch.float32).permute(2, 0, 1)
    rest = (transposed, A, B)
    matrix = (K, N) if transposed else (N, K)
    kind, weight = "", (fake(E, *matrix),)
    if nf4:
        tensors, layout = nf4_weight(E * matrix[0], matrix[1])
        kind, weight = "nf4_", (tensors, [*layout[:3], E, *matrix])
    forward = (x, rows, offsets, *weight, *rest, fake(E, N), 2.0)
    backward = (fake(R, N), offsets, x, rows, fake(R, r, dtype=torch.float32), *weight, *rest)
    backward += (2.0, [True] * 4)
    for way, args in (("forward", forward), ("backward", backward)):
        op = f"{kind}grouped_linear_{way}"
        assert by_name(op, getattr(grouped_linear, f"refusal_{kind}{way}"))(*args) is None
        getattr(grouped_linear, op)(*args)


@pytest.mark.parametrize(
    ("shape", "in_a_row"),
    [
        ((65_535 * 128, 70, 4096), 4096),  # the most rows of x
        ((65_535 * 128 - 5, 70, 4096), 4096),
        ((4096, 1 << 20, 1 << 13), 3),  # rows and columns of S beyond 2^31 in x^T, dy^T and y
        ((4096, 1 << 13, 1 << 20), 300),
        ((600, 1 << 20, 1 << 13), 4096),  # and 2^32 entries
        ((600, 40, 1 << 22), 1 << 22),  # in long rows
    ],
    ids=str,
)
def test_rosa(shape, in_a_row):
    (M, N, K), nnz = shape, shape[1] * in_a_row
    dtype = torch.int32 if nnz < 2**31 else torch.int64  # as SparseMask chooses
    CONTENTS["crow_ptr"] = lambda row: row * in_a_row
    CONTENTS["col_ptr"] = lambda entry: np.where(entry % 2, K - 1, 0)
    x, y, crow, col = fake(M, K), fake(M, N), fake(N + 1, dtype=dtype), fake(nnz, dtype=dtype)
    assert rosa.refusal_sddmm(y, x) is None
    rosa.rosa_sddmm(y, x, crow, col)
    before = ACCESSES.count("store")
    for order in (None, col):
        rosa.rosa_spmm_(y, x, fake(nnz, dtype=torch.float32), crow, col, order)
    assert ACCESSES.count("store") > before


def test_address_behind_a_tensor_is_found():
    x, A = fake(ROWS_MOST - 1, 40), fake(5, 40)
    dS = fake(ROWS_MOST, 5, dtype=torch.float32)  # a row more than x has
    with pytest.raises(AssertionError, match="load of 40 addresses outside of every tensor"):
        low_rank_update.gradients_xa(x, A, dS, None, 0.0, (True, True), x.dtype)
    low_rank_update.gradients_xa(fake(ROWS_MOST, 40), A, dS, None, 0.0, (True, True), x.dtype)
