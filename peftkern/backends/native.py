"""Calls into the C++ library `peftkern._cpu`: the only code that takes addresses of tensors.

Every function checks dtype, device, contiguity and size of what it is given (C++ checks the sizes
again), keeps the tensors alive over the call, and raises ValueError naming the argument.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Sequence
from types import ModuleType

import torch
from torch import Tensor

from peftkern.backends.device import device_info
from peftkern.formats.nf4 import BLOCKSIZES

DTYPE_CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
Pieces = tuple[Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None, int, int]


@functools.cache
def cpu_module() -> tuple[ModuleType | None, str | None]:
    """The native library and None, or None and the reason why it cannot be used."""
    try:
        from peftkern import _cpu
    except ImportError as error:
        return None, f"the native library peftkern._cpu is not usable ({error})"
    if _forked:
        _cpu.set_fork_child()
    return _cpu, None


_forked = False


def _after_fork_in_child() -> None:
    """OpenMP's threads, torch's among them, do not survive a fork: the child has to do without."""
    global _forked
    _forked = True
    if cpu_module.cache_info().currsize and cpu_module()[0] is not None:
        cpu_module()[0].set_fork_child()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork_in_child)


@functools.cache
def cpu_isas() -> tuple[str, ...]:
    """The instruction sets that are compiled in and that this machine has, weakest first."""
    module, _ = cpu_module()
    return () if module is None else tuple(module.isas())


def cpu_isa() -> str:
    """The instruction set that the next call uses: PEFTKERN_CPU_ISA, or the strongest.

    Raises: ValueError listing what this machine has if PEFTKERN_CPU_ISA names anything else.
    """
    isas = cpu_isas()
    forced = os.environ.get("PEFTKERN_CPU_ISA")
    if not forced:
        return isas[-1]
    if forced not in isas:
        raise ValueError(f"PEFTKERN_CPU_ISA: expected one of {list(isas)}, got {forced!r}")
    return forced


def describe() -> str:
    """One line on the native library for humans."""
    module, reason = cpu_module()
    if module is None:
        return str(reason)
    cpu = device_info("cpu")
    return f"cpu: {cpu.name}, {cpu_isa()} (of {', '.join(cpu_isas())}), {cpu.threads} threads"


def nf4_quantize(weight: Tensor, blocksize: int) -> tuple[Tensor, Tensor]:
    """Packed codes and float32 absmax of a contiguous weight of any shape."""
    _check_blocksize("blocksize", blocksize)
    numel = weight.numel()
    src = _address("weight", weight, weight.dtype, numel)
    packed = torch.empty((numel + 1) // 2, dtype=torch.uint8, device="cpu")
    absmax = torch.empty(-(-numel // blocksize), dtype=torch.float32, device="cpu")
    _module().nf4_quantize(
        cpu_isa(),
        torch.get_num_threads(),
        src,
        _dtype_code("weight", weight),
        numel,
        blocksize,
        packed.data_ptr(),
        packed.numel(),
        absmax.data_ptr(),
        absmax.numel(),
    )
    return packed, absmax


def nf4_quantize_absmax(
    absmax: Tensor, offset: Tensor, code: Tensor, blocksize: int
) -> tuple[Tensor, Tensor]:
    """The 8-bit form of `absmax - offset` in blocks, and the absmax of those blocks."""
    _check_blocksize("blocksize", blocksize)
    n = absmax.numel()
    q = torch.empty(n, dtype=torch.uint8, device="cpu")
    nested_absmax = torch.empty(-(-n // blocksize), dtype=torch.float32, device="cpu")
    _address("offset", offset, torch.float32, 1)
    _module().nf4_quantize_absmax(
        torch.get_num_threads(),
        _address("absmax", absmax, torch.float32, n),
        n,
        float(offset),
        _address("code", code, torch.float32, 256),
        blocksize,
        q.data_ptr(),
        nested_absmax.data_ptr(),
        nested_absmax.numel(),
    )
    return q, nested_absmax


def nf4_dequantize(pieces: Pieces, out: Tensor, fresh: bool) -> None:
    """Write the dense values of a weight of `out.numel()` elements to the contiguous `out`.

    fresh: `out` has just been allocated; a hint on how to write it.
    """
    numel = out.numel()
    address = _address("out", out, out.dtype, numel)
    dtype = _dtype_code("out", out)
    weight = _weight(pieces, numel)
    _module().nf4_dequantize(
        cpu_isa(), torch.get_num_threads(), weight, address, dtype, numel, fresh
    )


def lora_shrink(x: Tensor, a: Tensor, keep: Tensor | None = None, scale: float = 1.0) -> Tensor:
    """S[M, r] = scale * (x * keep)[M, K] @ a[r, K].T, float32; a float32."""
    (M, K), r = x.shape, a.shape[0]
    S = torch.empty((M, r), dtype=torch.float32, device="cpu")
    _module().lora_shrink(
        cpu_isa(),
        torch.get_num_threads(),
        M,
        K,
        r,
        _address("x", x, x.dtype, M * K),
        _dtype_code("x", x),
        _address("lora_A", a, torch.float32, r * K),
        _keep(keep, M * K),
        scale,
        S.data_ptr(),
    )
    return S


def lora_expand_(
    y: Tensor, s: Tensor, a: Tensor, scale: float = 1.0, keep: Tensor | None = None
) -> None:
    """y[M, K] += scale * keep * (s[M, r] @ a[r, K]); s and a float32."""
    (M, K), r = y.shape, a.shape[0]
    _module().lora_expand(
        cpu_isa(),
        torch.get_num_threads(),
        M,
        K,
        r,
        _address("s", s, torch.float32, M * r),
        _address("lora", a, torch.float32, r * K),
        _keep(keep, M * K),
        scale,
        _address("y", y, y.dtype, M * K),
        _dtype_code("y", y),
    )


def lora_outer(s: Tensor, x: Tensor, scale: float = 1.0, keep: Tensor | None = None) -> Tensor:
    """scale * s[M, r].T @ (x * keep)[M, K], float32 [r, K]; s float32."""
    (M, K), r = x.shape, s.shape[1]
    gradient = torch.empty((r, K), dtype=torch.float32, device="cpu")
    _module().lora_outer(
        cpu_isa(),
        torch.get_num_threads(),
        M,
        K,
        r,
        _address("s", s, torch.float32, M * r),
        _address("x", x, x.dtype, M * K),
        _dtype_code("x", x),
        _keep(keep, M * K),
        scale,
        gradient.data_ptr(),
    )
    return gradient


def dora_norm(weight: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """|weight[N, K] + b[N, r] @ a[r, K]| of each row, float32 [N]; a and b float32."""
    address = _address("weight", weight, weight.dtype, weight.numel())
    return _dora_norm(weight.shape, address, _dtype_code("weight", weight), a, b)


def nf4_dora_norm(
    pieces: Pieces, shape: Sequence[int], dtype: torch.dtype, a: Tensor, b: Tensor
) -> Tensor:
    """`dora_norm` of an NF4 weight of this shape, decoded to values of `dtype`."""
    weight = _weight(pieces, shape[0] * shape[1])
    return _dora_norm(shape, weight, DTYPE_CODES[dtype], a, b)


def _dora_norm(
    shape: Sequence[int], weight: int | tuple, dtype_code: int, a: Tensor, b: Tensor
) -> Tensor:
    (N, K), r = shape, a.shape[0]
    norm = torch.empty(N, dtype=torch.float32, device="cpu")
    _module().dora_norm(
        cpu_isa(),
        torch.get_num_threads(),
        N,
        K,
        r,
        weight,
        dtype_code,
        _address("lora_A", a, torch.float32, r * K),
        _address("lora_B", b, torch.float32, N * r),
        norm.data_ptr(),
    )
    return norm


def nf4_linear_forward(
    x: Tensor,
    pieces: Pieces,
    N: int,
    a: Tensor | None,
    b: Tensor | None,
    scaling: float,
    keep: Tensor | None,
    keep_scale: float,
    bias: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """y[M, N] = x[M, K] W.T + scaling * S b[N, r].T + bias[N]; y and S.

    S[M, r] = keep_scale * (x * keep) a[r, K].T; x float32 or bfloat16, the rest float32; a and b
    come together or not at all.
    """
    M, K = x.shape
    r = 0 if a is None else a.shape[0]
    y = torch.empty((M, N), dtype=x.dtype, device="cpu")
    S = torch.empty((M, r) if a is not None else 0, dtype=torch.float32, device="cpu")
    _module().nf4_lora_linear_forward(
        cpu_isa(),
        torch.get_num_threads(),
        M,
        N,
        K,
        r,
        _address("x", x, x.dtype, M * K),
        _activation_code("x", x),
        _weight(pieces, N * K),
        0 if a is None else _address("lora_A", a, torch.float32, r * K),
        _keep(keep, M * K),
        keep_scale,
        S.data_ptr(),
        scaling,
        0 if b is None else _address("lora_B", b, torch.float32, N * r),
        0 if bias is None else _address("bias", bias, torch.float32, N),
        y.data_ptr(),
    )
    return y, S


def nf4_linear_backward(
    dy: Tensor, pieces: Pieces, K: int, s: Tensor | None, a: Tensor | None
) -> Tensor:
    """dx[M, K] = dy[M, N] W + s[M, r] a[r, K]; dy float32 or bfloat16, s and a float32 or None."""
    M, N = dy.shape
    r = 0 if s is None else s.shape[1]
    dx = torch.empty((M, K), dtype=dy.dtype, device="cpu")
    _module().nf4_lora_linear_backward(
        cpu_isa(),
        torch.get_num_threads(),
        M,
        N,
        K,
        r,
        _address("dy", dy, dy.dtype, M * N),
        _activation_code("dy", dy),
        _weight(pieces, N * K),
        0 if s is None else _address("s", s, torch.float32, M * r),
        0 if a is None else _address("lora_A", a, torch.float32, r * K),
        dx.data_ptr(),
    )
    return dx


def low_rank_cores(
    lora_B: Sequence[Tensor],
    lora_A: Sequence[Tensor],
    r: int,
    scaling: Sequence[float],
    second_pass: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The r x r cores of pairs of rank r; see csrc/include/peftkern/low_rank_svd.h.

    Returns: cores [L, r, r], inverse [L, 2, r, r], scale [L], floor [L], float64; info int64 [L].
    """
    count = len(lora_B)
    factors = torch.tensor(scaling, dtype=torch.float64, device="cpu")
    cores, inverse = _float64(count, r, r), _float64(count, 2, r, r)
    scale, floor = _float64(count), _float64(count)
    info = torch.empty(count, dtype=torch.int64, device="cpu")
    _module().low_rank_cores(
        cpu_isa(),
        torch.get_num_threads(),
        _low_rank_pairs(lora_B, lora_A, r),
        r,
        _address("scaling", factors, torch.float64, count),
        second_pass,
        *(tensor.data_ptr() for tensor in (cores, inverse, scale, floor, info)),
    )
    return cores, inverse, scale, floor, info


def jacobi_svd(
    cores: Tensor, sweeps: int, vectors: bool
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor]:
    """Singular values [L, r], left and right vectors (columns) of float64 cores [L, r, r], info."""
    count, r, _ = cores.shape
    sigma = _float64(count, r)
    left, right = (_float64(count, r, r) if vectors else None for _ in range(2))
    info = torch.empty(count, dtype=torch.int64, device="cpu")
    _module().jacobi_svd(
        cpu_isa(),
        torch.get_num_threads(),
        count,
        r,
        sweeps,
        _address("cores", cores, torch.float64, count * r * r),
        sigma.data_ptr(),
        0 if left is None else left.data_ptr(),
        0 if right is None else right.data_ptr(),
        info.data_ptr(),
    )
    return sigma, left, right, info


def low_rank_rotate(
    lora_B: Sequence[Tensor],
    lora_A: Sequence[Tensor],
    r: int,
    inverse: Tensor,
    left: Tensor,
    right: Tensor,
    rank: Tensor,
    U: Tensor,
    U_offsets: Sequence[int],
    Vh: Tensor,
    Vh_offsets: Sequence[int],
) -> None:
    """U [m, k] and Vh [k, n] of every pair into flat float32 tensors, each at its offset.

    k = min(r, m, n); inverse from `low_rank_cores`; left, right [L, r, r] float64; rank int64.
    """
    count = len(lora_B)
    _module().low_rank_rotate(
        cpu_isa(),
        torch.get_num_threads(),
        _low_rank_pairs(lora_B, lora_A, r),
        r,
        _address("inverse", inverse, torch.float64, 2 * count * r * r),
        _address("left", left, torch.float64, count * r * r),
        _address("right", right, torch.float64, count * r * r),
        _address("rank", rank, torch.int64, count),
        _address("U", U, torch.float32, U.numel()),
        U.numel(),
        U_offsets,
        _address("Vh", Vh, torch.float32, Vh.numel()),
        Vh.numel(),
        Vh_offsets,
    )


def empty_float32(numel: int) -> Tensor:
    """A new float32 tensor whose pages are there, huge ones where the system grants them."""
    tensor = torch.empty(numel, dtype=torch.float32, device="cpu")
    _module().map_pages(tensor.data_ptr(), 4 * numel)
    return tensor


def _low_rank_pairs(
    lora_B: Sequence[Tensor], lora_A: Sequence[Tensor], r: int
) -> list[tuple[int, int, int, int, int, int]]:
    """(m, n, address and dtype of lora_B, address and dtype of lora_A) of every pair."""
    return [
        (
            B.shape[0],
            A.shape[1],
            _address("lora_B", B, B.dtype, B.shape[0] * r),
            _dtype_code("lora_B", B),
            _address("lora_A", A, A.dtype, r * A.shape[1]),
            _dtype_code("lora_A", A),
        )
        for B, A in zip(lora_B, lora_A, strict=True)
    ]


def address_table(
    tensors: Sequence[Tensor | None], device: torch.device, numbers: Sequence[int] = ()
) -> Tensor:
    """int64 on a device: the addresses of contiguous tensors there (0 for None), then `numbers`.

    It keeps nothing alive: the tensors have to outlive the launches that read it, in the order of
    their stream. The copy to a GPU does not wait: pinned memory is reused only after it.

    Raises: RuntimeError while a CUDA graph is captured, whose replays would read that memory later.
    """
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        raise RuntimeError("a table of addresses cannot be part of a CUDA graph")
    for tensor in tensors:
        if tensor is not None and (tensor.device != device or not tensor.is_contiguous()):
            raise ValueError(
                f"tensors: expected contiguous ones on {device}, got strides {tensor.stride()} on "
                f"{tensor.device}"
            )
    addresses = (0 if tensor is None else tensor.data_ptr() for tensor in tensors)
    table = torch.tensor([*addresses, *numbers], dtype=torch.int64, device="cpu")
    return table.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else table


def _float64(*shape: int) -> Tensor:
    return torch.empty(shape, dtype=torch.float64, device="cpu")


def _module() -> ModuleType:
    module, reason = cpu_module()
    if module is None:
        raise RuntimeError(reason)
    return module


def _address(name: str, tensor: Tensor, dtype: torch.dtype, numel: int) -> int:
    """The address of a CPU tensor that is contiguous and has this dtype and size."""
    if (
        tensor.dtype is not dtype
        or tensor.numel() != numel
        or not tensor.is_cpu
        or not tensor.is_contiguous()
    ):
        layout = "contiguous" if tensor.is_contiguous() else f"strides {tensor.stride()}"
        raise ValueError(
            f"{name}: expected {numel} contiguous {dtype} values on cpu, got "
            f"{tuple(tensor.shape)} {tensor.dtype} on {tensor.device}, {layout}"
        )
    return tensor.data_ptr()


def _check_blocksize(name: str, blocksize: int) -> None:
    if blocksize not in BLOCKSIZES:
        raise ValueError(f"{name}: expected one of {BLOCKSIZES}, got {blocksize}")


def _keep(keep: Tensor | None, numel: int) -> int:
    return 0 if keep is None else _address("keep", keep, torch.bool, numel)


def _dtype_code(name: str, tensor: Tensor) -> int:
    code = DTYPE_CODES.get(tensor.dtype)
    if code is None:
        raise ValueError(f"{name}: expected one of {list(DTYPE_CODES)}, got {tensor.dtype}")
    return code


def _activation_code(name: str, tensor: Tensor) -> int:
    if tensor.dtype is torch.bfloat16:
        return 1
    if tensor.dtype is torch.float32:
        return 0
    raise ValueError(f"{name}: expected float32 or bfloat16, got {tensor.dtype}")


def _weight(pieces: Pieces, numel: int) -> tuple[int | float | bool, ...]:
    """The description of an NF4 weight that every C++ function takes."""
    packed, absmax, nested_absmax, nested_code, nested_offset, blocksize, nested_blocksize = pieces
    _check_blocksize("blocksize", blocksize)
    packed_bytes = (numel + 1) // 2
    nblocks = -(-numel // blocksize)
    packed_at = _address("packed", packed, torch.uint8, packed_bytes)
    if nested_absmax is None:
        absmax_at = _address("absmax", absmax, torch.float32, nblocks)
        nested = (False, 0, 0, 0, 0.0, blocksize, 0)
    else:
        absmax_at = _address("absmax", absmax, torch.uint8, nblocks)
        _check_blocksize("nested_blocksize", nested_blocksize)
        nested_len = -(-nblocks // nested_blocksize)
        _address("nested_offset", nested_offset, torch.float32, 1)
        nested = (
            True,
            _address("nested_absmax", nested_absmax, torch.float32, nested_len),
            nested_len,
            _address("nested_code", nested_code, torch.float32, 256),
            float(nested_offset),
            blocksize,
            nested_blocksize,
        )
    return (packed_at, packed_bytes, absmax_at, nblocks, *nested, numel)


def adalora_importance_(
    exp_avg_ipt: Tensor,
    exp_avg_unc: Tensor,
    params: list[Tensor],
    grads: list[Tensor | None],
    beta1: float,
    beta2: float,
) -> Tensor:
    """Update both EMAs in place; the score of every triplet, float32 [sum of r].

    params: lora_E, lora_A, lora_B of every layer in turn, contiguous and of one dtype, as grads.
    """
    numel, count = exp_avg_ipt.numel(), sum(E.numel() for E in params[::3])
    scores = torch.empty(count, dtype=torch.float32, device="cpu")
    _module().adalora_importance(
        cpu_isa(),
        torch.get_num_threads(),
        _triplet_table(params, grads),
        _dtype_code("params", params[0]),
        _address("exp_avg_ipt", exp_avg_ipt, torch.float32, numel),
        _address("exp_avg_unc", exp_avg_unc, torch.float32, numel),
        numel,
        beta1,
        beta2,
        scores.data_ptr(),
        count,
    )
    return scores


def adalora_allocate_(
    scores: Tensor, lora_E: list[Tensor], budget: int, threshold_ties: bool
) -> Tensor:
    """Zero what is not among the `budget` best in lora_E (contiguous); the mask of the others."""
    count = scores.numel()
    dtype = lora_E[0].dtype
    table = []
    for E in lora_E:
        table += (E.numel(), 1, 1, _address("lora_E", E, dtype, E.numel()), 0, 0, 0, 0, 0)
    keep = torch.empty(count, dtype=torch.bool, device="cpu")
    _module().adalora_allocate(
        _address("scores", scores, torch.float32, count),
        count,
        budget,
        threshold_ties,
        table,
        _dtype_code("lora_E", lora_E[0]),
        keep.data_ptr(),
    )
    return keep


def adalora_gram(lora_A: list[Tensor], lora_B: list[Tensor]) -> tuple[Tensor, list[float]]:
    """A A^T - I and B^T B - I of every matrix, float32 and flat, and the sum of squares of each."""
    table, size = _gram_table(lora_A, lora_B)
    residual = torch.empty(size, dtype=torch.float32, device="cpu")
    norms = _module().adalora_gram(
        cpu_isa(),
        torch.get_num_threads(),
        table,
        len(lora_A),
        _dtype_code("lora_A", lora_A[0]),
        residual.data_ptr(),
        size,
    )
    return residual, norms


def adalora_gram_backward(
    residual: Tensor, scales: list[float], lora_A: list[Tensor], lora_B: list[Tensor]
) -> list[Tensor]:
    """scale * residual @ A of every lora_A, then scale * B @ residual of every lora_B."""
    grads = [torch.empty_like(m, memory_format=torch.contiguous_format) for m in lora_A + lora_B]
    table, size = _gram_table(lora_A, lora_B, grads)
    _module().adalora_gram_backward(
        cpu_isa(),
        torch.get_num_threads(),
        table,
        len(lora_A),
        _dtype_code("lora_A", lora_A[0]),
        _address("residual", residual, torch.float32, size),
        size,
        scales,
    )
    return grads


def rosa_sddmm(dy: Tensor, x: Tensor, crow: Tensor, col: Tensor) -> Tensor:
    """dy[T, N].T @ x[T, K] at the entries of a sparse [N, K] alone, float32 [nnz]."""
    T, N = dy.shape
    K = x.shape[1]
    values = torch.empty(col.numel(), dtype=torch.float32, device="cpu")
    _module().rosa_sddmm(
        cpu_isa(),
        torch.get_num_threads(),
        _sparse(crow, col, N, K),
        _address("dy", dy, x.dtype, T * N),
        _address("x", x, x.dtype, T * K),
        values.data_ptr(),
        T,
        _dtype_code("x", x),
    )
    return values


def rosa_spmm_(
    y: Tensor, x: Tensor, values: Tensor, crow: Tensor, col: Tensor, order: Tensor | None
) -> None:
    """y[T, N] += x[T, K] S.T, S [N, K] having values[order] at its entries; values float32."""
    T, N = y.shape
    K, nnz = x.shape[1], col.numel()
    _module().rosa_spmm(
        cpu_isa(),
        torch.get_num_threads(),
        _sparse(crow, col, N, K),
        _address("values", values, torch.float32, nnz),
        0 if order is None else _address("order", order, col.dtype, nnz),
        _address("x", x, y.dtype, T * K),
        _address("y", y, y.dtype, T * N),
        T,
        _dtype_code("y", y),
    )


def _sparse(crow: Tensor, col: Tensor, N: int, K: int) -> tuple[int, ...]:
    """The description of a sparse matrix that C++ takes: int32 or int64 indices."""
    if col.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"col: expected int32 or int64, got {col.dtype}")
    nnz = col.numel()
    return (
        _address("crow", crow, col.dtype, N + 1),
        _address("col", col, col.dtype, nnz),
        int(col.dtype is torch.int64),
        N,
        K,
        nnz,
    )


def _triplet_table(params: list[Tensor], grads: list[Tensor | None]) -> list[int]:
    """Per layer r, K, N and the addresses of E, A, B and their gradients; 0 is no gradient."""
    dtype, shapes, sizes = params[0].dtype, [], []
    for A, B in zip(params[1::3], params[2::3], strict=True):
        (r, K), N = A.shape, B.shape[0]
        shapes.append((r, K, N))
        sizes += (r, r * K, N * r)
    owners = _addresses("params", params, dtype, sizes)
    slopes = [0] * len(grads)
    present = [i for i, grad in enumerate(grads) if grad is not None]
    at = _addresses("grads", [grads[i] for i in present], dtype, [sizes[i] for i in present])
    for i, address in zip(present, at, strict=True):
        slopes[i] = address
    table = []
    for i, shape in enumerate(shapes):
        table += (*shape, *owners[3 * i : 3 * i + 3], *slopes[3 * i : 3 * i + 3])
    return table


def _gram_table(
    lora_A: list[Tensor], lora_B: list[Tensor], grads: list[Tensor] | None = None
) -> tuple[list[int], int]:
    """Per matrix r, length, and the addresses of it and its gradient; elements of all residuals."""
    shapes = [A.shape for A in lora_A] + [B.shape[::-1] for B in lora_B]
    sizes = [r * length for r, length in shapes]
    matrices, dtype = lora_A + lora_B, lora_A[0].dtype
    at = _addresses("lora_A, lora_B", matrices, dtype, sizes)
    grads_at = [0] * len(at) if grads is None else _addresses("grads", grads, dtype, sizes)
    table = []
    for (r, length), matrix, grad in zip(shapes, at, grads_at, strict=True):
        table += (r, length, matrix, grad)
    return table, sum(r * r for r, _ in shapes)


def _addresses(name: str, tensors: list[Tensor], dtype: torch.dtype, sizes: list[int]) -> list[int]:
    """`_address` of hundreds of tensors: each question is asked of all before the next."""
    if not (
        [tensor.numel() for tensor in tensors] == sizes
        and {tensor.dtype for tensor in tensors} <= {dtype}
        and {tensor.is_cpu for tensor in tensors} <= {True}
        and {tensor.is_contiguous() for tensor in tensors} <= {True}
    ):
        for i, (tensor, size) in enumerate(zip(tensors, sizes, strict=True)):
            _address(f"{name}[{i}]", tensor, dtype, size)
    return [tensor.data_ptr() for tensor in tensors]
