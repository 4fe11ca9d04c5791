"""No method that starts from a weight makes it dense in float32."""

from __future__ import annotations

import torch
from peak_memory import growth
from torch import Tensor

from peftkern.methods.initialization.factors import olora, pissa, subtract_update_
from peftkern.methods.initialization.loftq import Storage, loftq, qpissa, relative_error


def start(weight: Tensor) -> None:
    subtract_update_(weight, *pissa([weight], 8, 1.0)[0][:2], 1.0)
    subtract_update_(weight, *olora(weight, 8)[:2], 1.0)
    for method, options in ((qpissa, {}), (loftq, {"steps": 1})):
        ((factors, base),) = method([weight], 8, 1.0, Storage(), **options)
        relative_error(weight, base, factors, 1.0)


def test_peak_is_below_a_dense_copy() -> None:
    torch.set_num_threads(1)  # each has buffers of its own, by chance at once
    start(torch.randn(640, 640).bfloat16())
    weight = torch.empty(4096, 4096, dtype=torch.bfloat16).normal_()
    # What is alive at once takes 40 MB of the 67; with a dense copy it would take more than that.
    assert growth(lambda: start(weight)) < 4 * weight.numel()
