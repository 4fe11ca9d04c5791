"""Forward of the linear layer over an NF4 weight with a low-rank update, in CUDA C++."""

from __future__ import annotations

import torch
from torch import Tensor

from peftkern.backends.cuda.module import (
    launching_on,
    library,
    refusal_device,
    refusal_library,
)
from peftkern.backends.decoded import refusal_format
from peftkern.backends.pointers import (
    DTYPE_CODES,
    address,
    begins_at,
    dtype_code,
    fresh,
    optional,
    weight,
)

_DTYPES = (torch.bfloat16, torch.float16)


def refusal_forward(
    x: Tensor,
    w: list[Tensor],
    layout: list[int],
    lora_A: Tensor | None,
    lora_B: Tensor | None,
    keep: Tensor | None,
) -> str | None:
    """Refuse calls that neither kernel takes: one is for few rows, another for more of them.

    By count the second beats dequantizing and cuBLAS up to somewhere between 235 and 436 rows;
    while that is not measured, dispatch prefers Triton.
    """
    if x.dtype not in _DTYPES:
        return f"the dtype is {x.dtype}"
    if reason := refusal_format("cuda", layout) or refusal_library():
        return reason
    module = library()
    _, blocksize, _, N, K = layout
    if not (0 < N <= module.LINEAR_SIZE and 0 < K <= module.LINEAR_SIZE):
        return f"the weight is {N} x {K}, not 1 to {module.LINEAR_SIZE} each"
    rows, unit = x.numel() // K, module.PREFILL_UNIT
    few = rows <= module.LINEAR_ROWS
    if rows > module.PREFILL_ROWS:
        return f"there are more than {module.PREFILL_ROWS} rows"
    if few and (blocksize < module.LINEAR_BLOCK or K % blocksize):
        return f"blocks of {blocksize} are below {module.LINEAR_BLOCK} or cross rows of {K}"
    if not few and (blocksize < unit or K % unit):
        return f"rows of {K} are not a multiple of {unit}, or blocks of {blocksize} below it"
    if not begins_at(w[0], 8):
        return "the packed weight does not begin at a multiple of 8 bytes"
    if lora_A is not None:
        most = module.LINEAR_RANK if few else module.PREFILL_RANK
        reason = _refusal_factors(lora_A, lora_B, most)
        if reason is not None:
            return reason
    if keep is not None:
        return "dropout is left to other back ends"
    return refusal_device(x.device) if few else refusal_sm90a(x.device)


def refusal_sm90a(device: torch.device) -> str | None:
    """Refuse devices for the kernels that are for compute capability 9.0 alone."""
    if reason := refusal_device(device):
        return reason
    module = library()
    if module.emulated:
        return None
    major, minor = torch.cuda.get_device_capability(device)
    if (major, minor) != (9, 0):
        rows = module.LINEAR_ROWS
        return f"more than {rows} rows need compute capability 9.0, not {major}.{minor}"
    if "sm_90a" not in module.architectures():
        return f"the kernels are built for {', '.join(module.architectures())}, not for sm_90a"
    return None


def _refusal_factors(lora_A: Tensor, lora_B: Tensor, most: int) -> str | None:
    """Refuse dtypes of the factors, and ranks above `most`."""
    for name, factor in (("lora_A", lora_A), ("lora_B", lora_B)):
        if factor.dtype not in DTYPE_CODES:
            return f"the dtype of {name} is {factor.dtype}"
    r = lora_A.shape[0]
    if not 1 <= r <= most:
        return f"the rank is {r}, not 1 to {most}"
    return None


def nf4_lora_linear_forward(
    x: Tensor,
    w: list[Tensor],
    layout: list[int],
    lora_A: Tensor | None,
    lora_B: Tensor | None,
    bias: Tensor | None,
    scaling: float,
    keep: Tensor | None,
    dropout_p: float,
) -> tuple[Tensor, Tensor]:
    N, K = layout[3:]
    rows = _aligned(x.reshape(x.numel() // K, K))
    y, S = launch(
        rows,
        w,
        layout,
        None if lora_A is None else _aligned(lora_A),
        None if lora_B is None else lora_B.contiguous(),
        None if bias is None else bias.contiguous(),
        scaling,
        prefill=len(rows) > library().LINEAR_ROWS,
    )
    S = x.new_empty(0, dtype=torch.float32) if S is None else S.view(*x.shape[:-1], S.shape[1])
    return y.view(*x.shape[:-1], N), S


def launch(
    x: Tensor,
    w: list[Tensor],
    layout: list[int],
    lora_A: Tensor | None,
    lora_B: Tensor | None,
    bias: Tensor | None,
    scaling: float,
    splits: int = 0,
    prefill: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Compute y [M, N] and S [M, r] of a contiguous x [M, K] of at most LINEAR_ROWS rows.

    With `prefill` the kernel of sm_90a runs, which takes up to PREFILL_ROWS. K is cut over
    `splits` groups of thread blocks (1 to 16); with 0 the library chooses.
    """
    (M, K), N, device, dtype = x.shape, layout[3], x.device, x.dtype
    if dtype not in _DTYPES:
        raise ValueError(f"x: expected one of {list(_DTYPES)}, got {dtype}")
    view = weight(w, layout, device)
    x_at = address("x", x, dtype, M * K, device)
    bias_at = optional("bias", bias, dtype, N, device)
    lora, S = (0, 0, 0, 0, 0, 0), None
    if lora_A is not None:
        r = lora_A.shape[0]
        S = torch.empty((M, r), dtype=torch.float32, device=device)
        lora = (
            address("lora_A", lora_A, lora_A.dtype, r * K, device),
            dtype_code("lora_A", lora_A),
            address("lora_B", lora_B, lora_B.dtype, N * r, device),
            dtype_code("lora_B", lora_B),
            fresh(S),
            r,
        )
    y = torch.empty((M, N), dtype=dtype, device=device)
    with launching_on(device) as stream:
        module = library()
        if prefill:
            size = module.nf4_lora_linear_sm90a_workspace(M, N, K, lora[-1], splits)
            run = module.nf4_lora_linear_sm90a_forward
        else:
            size = module.nf4_lora_linear_workspace(M, N, K, splits)
            run = module.nf4_lora_linear_forward
        workspace = torch.empty(size, dtype=torch.uint8, device=device)
        y_at, code = fresh(y), DTYPE_CODES[dtype]
        scratch = (fresh(workspace), size, splits)
        run(stream, view, M, N, K, x_at, code, y_at, bias_at, lora, scaling, *scratch)
    return y, S


def _aligned(tensor: Tensor) -> Tensor:
    """Return it contiguous and 16-byte aligned, as the kernels load it; copied if it is not."""
    tensor = tensor.contiguous()
    return tensor if begins_at(tensor, 16) else tensor.clone()
