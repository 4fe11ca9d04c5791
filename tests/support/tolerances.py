"""Every number that a test compares against: nowhere else, and never loosened for a machine.

The rule between right and wrong, and its bounds, ship with the benchmarks, which apply them on
every machine: peftkern/backends/tolerances.py.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from peftkern.backends.tolerances import FLOOR_MAX, FLOOR_RMS, RATIO, errors, floors  # noqa: F401

GRADCHECK = {"eps": 1e-6, "atol": 1e-5, "rtol": 1e-3}  # torch.autograd.gradcheck's own defaults
LOSS_CURVE_RTOL = 1e-3  # each step of a training, patched against unpatched
COMPACTED_RTOL = (
    1e-5  # losses after pruned triplets are dropped: other shapes, other reduction order
)
BF16_LOSS_RTOL = 2e-2  # each of the first steps in bfloat16, where one rounding more is a new path
AUTOCAST_RTOL = 2**-5  # of the largest value: a few roundings to bfloat16 in another order
LOGITS = {"rtol": 1e-4, "atol": 1e-5}  # of one model in float32 after another order of sums
EXPERTS_RTOL = 1e-5  # of the largest value: float32 experts against PEFT's fold, in another order
# What an adapter of a thousandth of bfloat16 weights adds, most of which PEFT's fold loses.
SMALL_ADAPTER_RTOL = 0.005
# Of the sum of all terms' magnitudes: any rounding of a sum, and no wrong term.
SUM_RTOL = {torch.float32: 2**-16, torch.bfloat16: 2**-7, torch.float16: 2**-9}
GOLDEN_RTOL = {torch.float32: 1e-5, torch.bfloat16: 2**-7}  # another machine's reduction order

DORA_NORM_RTOL = 2e-6  # of a row norm in float32, relative to the terms that may cancel
DORA_RMS_RATIO = 4  # times FLOOR_RMS: the same products in another order of roundings
# Of the lengths' gradient after dropout in 16 bits: a product rounded to bfloat16 in each term.
DORA_DROPPED_MAGNITUDE_RMS = 2**-8

NF4_MAX_HALF_GAP = 0.1519036  # of absmax: half of the widest gap of the table, -1.0 .. -0.6962
NF4_RANDOM_STD_RTOL = 0.03  # of weights drawn as packed bytes: absmax varies within 10%
NF4_TIE_RTOL = 1e-6  # how near a threshold x / absmax and x * (1 / absmax) may disagree
DYNAMIC_MAP_RTOL = 2**-22  # bitsandbytes takes what torch.linspace rounds on this processor
# bitsandbytes' CPU quantizer of absmax looks codes up in 65,536 bins: this share is off by one.
ABSMAX_CODE_MISMATCH = 0.005
ABSMAX_CODE_BIN = 2**-15  # the width of a bin in [-1, 1]: near 0 it holds several codes

# Of low_rank_svd in float32, against a dense float64 SVD; in the order of `svd_errors`.
SVD_SIGMA = 1e-6  # |sigma - oracle| / sigma_1
SVD_SIGMA_RELATIVE = 1e-4  # |sigma - oracle| / oracle down to SVD_SIGMA_FROM of sigma_1
SVD_SIGMA_FROM = 1e-5
SVD_ORTHOGONALITY = 1e-5  # largest entry of |U^T U - I| and |Vh Vh^T - I|
SVD_RECONSTRUCTION = 5e-6  # |scaling B A - U S Vh|_F, relative
SVD_BOUNDS = (SVD_SIGMA, SVD_SIGMA_RELATIVE, SVD_ORTHOGONALITY, SVD_RECONSTRUCTION)
SVD_BOUNDS_64 = (1e-13, 1e-9, 1e-13, 1e-13)  # float64 factors
SVD_BOUNDS_FAST = (SVD_SIGMA, SVD_SIGMA_RELATIVE, 1e-5, SVD_RECONSTRUCTION)  # kappa <= 1e5
SVD_STATS_RTOL = 1e-12  # of float64 statistics of given values

# Of truncated_svd, against a dense float64 SVD.
TRUNCATED_SIGMA = 2e-6  # |sigma - oracle| / sigma_1 where the sweeps have converged
TRUNCATED_EXCESS = 1e-6  # of the error over the least one, where they have, or it is exact
TRUNCATED_NORM = 1e-7  # |W|_F
TRUNCATED_ORDER = 1e-5  # of singular values after another order of sums
BOUND_RTOL = 0.05  # between two forms of the bound on a norm by random vectors
BOUND_FAILED = 2  # of 300 such bounds, of which 0.3 may fail on average

# Of the methods' closed forms and optimizers against a plain transcription, relative to the largest
# value; float32 is after some twenty steps of Adam, which divides by gradients that may be small.
METHODS_RTOL = {torch.float64: 1e-12, torch.float32: 1e-5}
METHODS_STEPS_RTOL = 1e-10  # float64, after steps that invert a Gram matrix each time
# PEFT's LoRA-FA rounds gradients to bfloat16, but not those in float64: a last bit that differs in
# float32 may there become one of bfloat16.
LORA_FA_PEFT_RTOL = {torch.float64: 1e-12, torch.float32: 2**-9}
DELTA_LORA_NEAREST_KEEPS = 0.5  # share of the updates that bf16 weights keep: less than this
DELTA_LORA_STOCHASTIC = 0.02  # how far from all of it stochastic rounding may be

ROSA_OVERLAP = 0.95  # of masks from streamed and from dense sums of gradients, a planted problem
PLAN_RTOL = 0.05  # of the bytes at a step's peak, counted against measured

FUZZ_EXAMPLES = 30
FUZZ_EXAMPLES_MORE = 100  # of `make test-more`
FUZZ_EXAMPLES_WIDE = 300  # of `make test-long`
FUZZ_EXAMPLES_LONG = 100_000
FUZZ_SVD_SHARE = 0.4  # of the examples: each one needs a dense SVD
FUZZ_MODEL_EXAMPLES = 60  # each one builds a model
DETERMINISM_RUNS = 20
HANG_SECONDS = 900  # until what a test waits for is given up: no measure of speed, however busy


def paired(first: Any, *others: Any) -> Iterable[tuple]:
    """What stands at the same place, or under the same name, in each of some results."""
    if isinstance(first, Mapping):
        return [(value, *(other[name] for other in others)) for name, value in first.items()]
    return zip(first, *others, strict=True)


def assert_as_accurate_as_torch(got: Any, eager: Any, oracle: Any, *bits: torch.dtype) -> None:
    """A tensor, or each of some, is as near to the float64 `oracle` as eager torch in its dtype.

    Args: bits, dtypes that both sides have rounded to on the way, beside that of the result.
    """
    if not isinstance(got, Tensor):
        for results in paired(got, eager, oracle):
            assert_as_accurate_as_torch(*results, *bits)
        return
    assert got.shape == oracle.shape, f"shape {tuple(got.shape)}, expected {tuple(oracle.shape)}"
    assert got.dtype == eager.dtype, f"dtype {got.dtype}, expected {eager.dtype}"
    assert torch.isfinite(got).all(), "not finite"
    got_rms, got_max = errors(got, oracle)
    eager_rms, eager_max = errors(eager, oracle)
    floor_rms, floor_max = floors(got.dtype, *bits)
    rms_bound, max_bound = RATIO * eager_rms + floor_rms, RATIO * eager_max + floor_max
    assert got_rms <= rms_bound, f"RMS error {got_rms:.3g} > {rms_bound:.3g}"
    assert got_max <= max_bound, f"largest error {got_max:.3g} > {max_bound:.3g}"
