"""Error bounds of correct results, for both tests and benchmarks.

The rule: an op's error against float64 is at most RATIO times the error of eager torch in the same
dtypes, plus a floor for the unavoidable rounding of the result: to the narrowest dtype that it has
been in. A product under autocast is rounded to bfloat16, whatever it is stored in afterwards.
"""

from __future__ import annotations

import torch
from torch import Tensor

RATIO = 1.5
# Relative root-mean-square and relative maximum (to the largest value) of a result that is right up
# to its last rounding; float32 includes the reduction's error, float64 is for the oracle.
FLOOR_RMS = {
    torch.float64: 1e-14,
    torch.float32: 1e-6,
    torch.float16: 2**-12,
    torch.bfloat16: 2**-9,
}
FLOOR_MAX = {
    torch.float64: 1e-13,
    torch.float32: 2e-6,
    torch.float16: 2**-11,
    torch.bfloat16: 2**-8,
}
# Relative RMS error from which a peer's result counts as wrong and its time means nothing.
PEER_WRONG = 0.03


def floors(*dtypes: torch.dtype) -> tuple[float, float]:
    """Return the floors of the RMS and of the largest error of what has been in these dtypes."""
    return max(FLOOR_RMS[dtype] for dtype in dtypes), max(FLOOR_MAX[dtype] for dtype in dtypes)


def errors(got: Tensor, oracle: Tensor) -> tuple[float, float]:
    """Return the relative RMS error, and the largest error over the oracle's largest value."""
    difference = got.detach().double() - oracle.detach().double()
    if difference.numel() == 0:
        return 0.0, 0.0
    scale = oracle.detach().double()
    rms = difference.square().mean().sqrt() / scale.square().mean().sqrt().clamp(min=1e-30)
    return rms.item(), (difference.abs().max() / scale.abs().max().clamp(min=1e-30)).item()
