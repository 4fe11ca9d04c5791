"""What compute-sanitizer watches on a GPU: every CUDA kernel, over sizes that end anywhere.

Each tensor is an allocation of its own (PYTORCH_NO_CUDA_MEMORY_CACHING=1), so that a byte beyond
its end belongs to nobody. Results are compared with the reference's: a kernel that did nothing
would pass every check of memory.
"""

from __future__ import annotations

import torch
from cuda_cases import check
from gpu_cases import nf4_cases, same_bits
from tolerances import SVD_BOUNDS_64

import peftkern
from peftkern.backends import ops, reference
from peftkern.backends.cuda import low_rank_svd
from peftkern.backends.cuda.nf4_lora_linear import refusal_sm90a
from peftkern.formats.nf4 import BLOCKSIZES

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def check_nf4(numel: int, blocksize: int, dtype: torch.dtype, double_quant: bool) -> None:
    dense = (torch.randn(numel) * 0.05).to(dtype)
    with peftkern.use_backend("reference"):
        w = peftkern.quantize_nf4(dense, blocksize=blocksize, double_quant=double_quant)
        wanted = peftkern.dequantize_nf4(w)
    got = ops.nf4_quantize(dense.cuda(), blocksize)
    for a, b in zip(got, reference.nf4_quantize(dense, blocksize), strict=True):
        assert same_bits(a.cpu(), b)
    assert same_bits(peftkern.dequantize_nf4(w.to("cuda")).cpu(), wanted)


def check_jacobi(r: int, shared: int) -> None:
    """Both small kernels, with as much shared memory as other devices have."""
    cores = torch.randn(3, r, r, dtype=torch.float64)
    sigma, left, right, info = low_rank_svd.jacobi_svd(cores.cuda(), 20, True, shared)
    assert not info.any()
    product = (left * sigma[:, None]) @ right.mT
    assert (product.cpu() - cores).norm() <= SVD_BOUNDS_64[3] * cores.norm()
    grams = cores.mT @ cores
    root, _, norms = low_rank_svd.gram_roots(grams.cuda(), shared)
    root = root * norms[:, None]
    assert ((root.mT @ root).cpu() - grams).norm() <= SVD_BOUNDS_64[3] * grams.norm()


def main() -> None:
    torch.manual_seed(0)
    with peftkern.use_backend("cuda"):
        for blocksize in BLOCKSIZES:
            for dtype in DTYPES:
                for numel in (1, blocksize + 7, 9001):
                    check_nf4(numel, blocksize, dtype, double_quant=numel != 9001)
        for r, shared in ((1, 0), (3, 0), (16, 0), (17, 0), (33, 0), (64, 0), (65, 48 << 10)):
            check_jacobi(r, shared)
        check_jacobi(65, 8 << 10)
        if refusal_sm90a(torch.device("cuda")) is None:
            for shape in ((33, 140, 192, 5), (130, 57, 640, 16), (300, 140, 1088, 70)):
                for dtype in (torch.float16, torch.bfloat16):
                    check(nf4_cases(shape, dtype, torch.float32, device="cuda"))
        for M in (1, 8, 9, 32):
            for splits in (1, 2, 5):
                for dtype in (torch.float16, torch.bfloat16):
                    options = {"device": "cuda", "double_quant": splits % 2 == 0}
                    cases = nf4_cases((M, 77, 704, 9), dtype, torch.float32, **options)
                    check(cases, splits=splits)
    torch.cuda.synchronize()
    print("every kernel ran")


if __name__ == "__main__":
    main()
