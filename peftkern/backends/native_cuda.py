"""Calls into the CUDA library `peftkern._cuda`: takes addresses of tensors, as `native` does.

Every function checks dtype, device, contiguity and size of what it is given (C++ checks the sizes
again), launches on the current stream of the tensors' device, and neither waits nor allocates but
through torch, so that a CUDA graph can record it. As in any op of torch, memory that is freed after
the launch is used again in the order of that stream.

The tests load the same kernels compiled for a CPU in place of `peftkern._cuda`; `emulated` says so.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from types import ModuleType

import torch
from torch import Tensor

from peftkern.formats.nf4 import BLOCKSIZES

DTYPE_CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}  # DType in nf4.h
JACOBI_RANK = 128  # kCudaJacobiRank in cuda_low_rank_svd.h
Pieces = tuple[Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None, int, int]


@functools.cache
def cuda_module() -> tuple[ModuleType | None, str | None]:
    """The CUDA library and None, or None and the reason why it cannot be used."""
    try:
        from peftkern import _cuda
    except ImportError as error:
        return None, f"the CUDA library peftkern._cuda is not usable ({error})"
    return _cuda, None


def emulated() -> bool:
    """Whether the kernels run on a CPU, and so take its tensors."""
    module, _ = cuda_module()
    return module is not None and module.emulated


def unserved(device: torch.device) -> str | None:
    """Why the library's kernels cannot run on a device, or None if they can."""
    module, reason = cuda_module()
    return reason if module is None else _unserved(module, device)


@functools.cache
def _unserved(module: ModuleType, device: torch.device) -> str | None:
    if module.emulated:
        return None if device.type == "cpu" else f"the kernels are a CPU's, not for {device}"
    if torch.version.hip is not None:
        return "the kernels are CUDA's, and this PyTorch is ROCm's"
    if module.device_count() == 0:
        driver = module.driver_version()
        return (
            f"the kernels are built with CUDA {version(module.runtime_version())}, which finds no "
            f"GPU: the driver {'is for CUDA ' + version(driver) if driver else 'is missing'}"
        )
    capability = torch.cuda.get_device_capability(device)
    if not covers(module.architectures(), capability):
        return (
            f"the kernels are built for {', '.join(module.architectures())}, not for "
            f"sm_{capability[0]}{capability[1]}"
        )
    return None


def unserved_sm90a(device: torch.device) -> str | None:
    """The same of the kernels that are for compute capability 9.0 alone."""
    if reason := unserved(device):
        return reason
    module = _module()
    if module.emulated:
        return None
    major, minor = torch.cuda.get_device_capability(device)
    if (major, minor) != (9, 0):
        return f"more than {LINEAR_ROWS} rows need compute capability 9.0, not {major}.{minor}"
    if "sm_90a" not in module.architectures():
        return f"the kernels are built for {', '.join(module.architectures())}, not for sm_90a"
    return None


def version(number: int) -> str:
    """13.0 of CUDA's 13000."""
    return f"{number // 1000}.{number % 1000 // 10}"


def covers(architectures: list[str], capability: tuple[int, int]) -> bool:
    """Whether code for these runs on a device of this capability.

    Real code ("sm_80") serves its capability and later ones of the same major number, "sm_90a" 9.0
    alone, and PTX ("compute_120") everything from there on.
    """
    for name in architectures:
        kind, _, number = name.partition("_")
        built = divmod(int(number.rstrip("a")), 10)
        if built == capability or (kind == "compute" and built <= capability):
            return True
        if not number.endswith("a") and built[0] == capability[0] and built <= capability:
            return True
    return False


def nf4_quantize(weight: Tensor, blocksize: int) -> tuple[Tensor, Tensor]:
    """Packed codes and float32 absmax of a contiguous weight of any shape."""
    _check_blocksize("blocksize", blocksize)
    device, numel = weight.device, weight.numel()
    src = _address("weight", weight, weight.dtype, numel, device)
    packed = torch.empty((numel + 1) // 2, dtype=torch.uint8, device=device)
    absmax = torch.empty(-(-numel // blocksize), dtype=torch.float32, device=device)
    with _launching_on(device) as stream:
        _module().nf4_quantize(
            stream,
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


def nf4_dequantize(pieces: Pieces, out: Tensor) -> None:
    """Write the dense values of a weight of `out.numel()` elements to the contiguous `out`."""
    numel = out.numel()
    address = _address("out", out, out.dtype, numel, out.device)
    dtype = _dtype_code("out", out)
    weight = _weight(pieces, numel, out.device)
    with _launching_on(out.device) as stream:
        _module().nf4_dequantize(stream, weight, address, dtype, numel)


def jacobi_svd(
    cores: Tensor, sweeps: int, vectors: bool, shared_limit: int = 0
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor]:
    """What `native.jacobi_svd` gives, of r x r matrices up to JACOBI_RANK that need not be finite.

    One that is not gives NaN and info -1. At most `shared_limit` bytes of shared memory for a
    matrix, 0: what the device has.
    """
    address = _square("cores", cores)
    device, (count, r, _) = cores.device, cores.shape
    sigma = torch.empty(count, r, dtype=torch.float64, device=device)
    left, right = (torch.empty_like(cores) if vectors else None for _ in range(2))
    info = torch.empty(count, dtype=torch.int64, device=device)
    if not cores.numel():
        return sigma, left, right, info.zero_()
    with _launching_on(device) as stream:
        workspace = _workspace(cores, vectors, shared_limit)
        _module().jacobi_svd(
            stream,
            count,
            r,
            sweeps,
            address,
            sigma.data_ptr(),
            0 if left is None else left.data_ptr(),
            0 if right is None else right.data_ptr(),
            info.data_ptr(),
            workspace.data_ptr(),
            workspace.numel(),
            shared_limit,
        )
    return sigma, left, right, info


def gram_roots(grams: Tensor, shared_limit: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Pivoted Cholesky decomposition of finite float64 Gram matrices [n, r, r] of Q root D.

    grams = D root^T root D with D = diag(norms), Q = factor @ inverse. Rows of root and columns of
    inverse are zero from the rank on.

    Returns: root and inverse [n, r, r], norms [n, r].
    """
    address = _square("grams", grams)
    device, (count, r, _) = grams.device, grams.shape
    roots, inverses = torch.empty_like(grams), torch.empty_like(grams)
    norms = torch.empty(count, r, dtype=torch.float64, device=device)
    with _launching_on(device) as stream:
        workspace = _workspace(grams, True, shared_limit)
        _module().gram_roots(
            stream,
            count,
            r,
            address,
            roots.data_ptr(),
            inverses.data_ptr(),
            norms.data_ptr(),
            workspace.data_ptr(),
            workspace.numel(),
            shared_limit,
        )
    return roots, inverses, norms


def _square(name: str, matrices: Tensor) -> int:
    """The address of contiguous float64 matrices [n, r, r] that Jacobi's kernels take."""
    shape = tuple(matrices.shape)
    if len(shape) != 3 or shape[1] != shape[2] or shape[1] > JACOBI_RANK:
        raise ValueError(f"{name}: expected [n, r, r] with r up to {JACOBI_RANK}, got {shape}")
    return _address(name, matrices, torch.float64, matrices.numel(), matrices.device)


def _workspace(matrices: Tensor, vectors: bool, shared_limit: int) -> Tensor:
    """What the shared memory of the current device cannot hold of these matrices."""
    count, r, _ = matrices.shape
    each = _module().jacobi_workspace(r, vectors, shared_limit)
    return torch.empty(count * each, dtype=torch.float64, device=matrices.device)


# Of nf4_lora_linear: cuda_nf4_lora_linear.h has the same.
LINEAR_DTYPES = (torch.bfloat16, torch.float16)
LINEAR_ROWS, LINEAR_RANK, LINEAR_BLOCK, LINEAR_SIZE = 32, 64, 64, 1 << 26
# Of its form for more rows: cuda_nf4_lora_linear_sm90a.h has the same.
PREFILL_ROWS, PREFILL_RANK, PREFILL_UNIT = 512, 256, 64


def nf4_lora_linear_forward(
    x: Tensor,
    pieces: Pieces,
    lora_A: Tensor | None,
    lora_B: Tensor | None,
    bias: Tensor | None,
    scaling: float,
    N: int,
    splits: int = 0,
    prefill: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """y [M, N] and S [M, r] of a contiguous x [M, K], at most 32 rows, over a weight [N, K].

    With `prefill` the kernel of sm_90a runs, which takes up to 512 rows.

    K is cut over `splits` groups of thread blocks (1 to 16); with 0 the library chooses.
    """
    (M, K), device, dtype = x.shape, x.device, x.dtype
    if dtype not in LINEAR_DTYPES:
        raise ValueError(f"x: expected one of {list(LINEAR_DTYPES)}, got {dtype}")
    weight = _weight(pieces, N * K, device)
    x_at = _address("x", x, dtype, M * K, device)
    bias_at = 0 if bias is None else _address("bias", bias, dtype, N, device)
    lora, S = (0, 0, 0, 0, 0, 0), None
    if lora_A is not None:
        r = lora_A.shape[0]
        S = torch.empty((M, r), dtype=torch.float32, device=device)
        lora = (
            _address("lora_A", lora_A, lora_A.dtype, r * K, device),
            _dtype_code("lora_A", lora_A),
            _address("lora_B", lora_B, lora_B.dtype, N * r, device),
            _dtype_code("lora_B", lora_B),
            S.data_ptr(),
            r,
        )
    y = torch.empty((M, N), dtype=dtype, device=device)
    with _launching_on(device) as stream:
        module = _module()
        if prefill:
            size = module.nf4_lora_linear_sm90a_workspace(M, N, K, lora[-1], splits)
            run = module.nf4_lora_linear_sm90a_forward
        else:
            size = module.nf4_lora_linear_workspace(M, N, K, splits)
            run = module.nf4_lora_linear_forward
        workspace = torch.empty(size, dtype=torch.uint8, device=device)
        run(
            stream,
            weight,
            M,
            N,
            K,
            x_at,
            DTYPE_CODES[dtype],
            y.data_ptr(),
            bias_at,
            lora,
            scaling,
            workspace.data_ptr(),
            size,
            splits,
        )
    return y, S


@contextlib.contextmanager
def _launching_on(device: torch.device) -> Iterator[int]:
    """Makes a device current; the address of its current stream."""
    wanted = "cpu" if emulated() else "cuda"
    if device.type != wanted:
        raise ValueError(f"tensors: expected them on a {wanted.upper()} device, got {device}")
    if wanted == "cpu":
        yield 0
        return
    with torch.cuda.device(device):
        yield torch.cuda.current_stream(device).cuda_stream


def _module() -> ModuleType:
    module, reason = cuda_module()
    if module is None:
        raise RuntimeError(reason)
    return module


def _address(
    name: str, tensor: Tensor, dtype: torch.dtype, numel: int, device: torch.device
) -> int:
    """The address of a contiguous tensor on this device that has this dtype and size."""
    if (
        tensor.dtype is not dtype
        or tensor.numel() != numel
        or tensor.device != device
        or not tensor.is_contiguous()
    ):
        layout = "contiguous" if tensor.is_contiguous() else f"strides {tensor.stride()}"
        raise ValueError(
            f"{name}: expected {numel} contiguous {dtype} values on {device}, got "
            f"{tuple(tensor.shape)} {tensor.dtype} on {tensor.device}, {layout}"
        )
    return tensor.data_ptr()


def begins_at(tensor: Tensor, multiple: int) -> bool:
    """Whether a tensor's memory begins at a multiple of so many bytes."""
    return tensor.data_ptr() % multiple == 0


def _check_blocksize(name: str, blocksize: int) -> None:
    if blocksize not in BLOCKSIZES:
        raise ValueError(f"{name}: expected one of {BLOCKSIZES}, got {blocksize}")


def _dtype_code(name: str, tensor: Tensor) -> int:
    code = DTYPE_CODES.get(tensor.dtype)
    if code is None:
        raise ValueError(f"{name}: expected one of {list(DTYPE_CODES)}, got {tensor.dtype}")
    return code


def _weight(pieces: Pieces, numel: int, device: torch.device) -> tuple[int | bool, ...]:
    """The description of an NF4 weight that every kernel takes; the offset stays on the device."""
    packed, absmax, nested_absmax, nested_code, nested_offset, blocksize, nested_blocksize = pieces
    _check_blocksize("blocksize", blocksize)
    packed_bytes = (numel + 1) // 2
    nblocks = -(-numel // blocksize)
    packed_at = _address("packed", packed, torch.uint8, packed_bytes, device)
    if nested_absmax is None:
        absmax_at = _address("absmax", absmax, torch.float32, nblocks, device)
        nested = (False, 0, 0, 0, 0, blocksize, 0)
    else:
        absmax_at = _address("absmax", absmax, torch.uint8, nblocks, device)
        _check_blocksize("nested_blocksize", nested_blocksize)
        nested_len = -(-nblocks // nested_blocksize)
        nested = (
            True,
            _address("nested_absmax", nested_absmax, torch.float32, nested_len, device),
            nested_len,
            _address("nested_code", nested_code, torch.float32, 256, device),
            _address("nested_offset", nested_offset, torch.float32, 1, device),
            blocksize,
            nested_blocksize,
        )
    return (packed_at, packed_bytes, absmax_at, nblocks, *nested, numel)
