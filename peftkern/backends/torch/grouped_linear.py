"""Linear layer over groups of rows as torch's products, one group after the other.

A group is a linear layer with a low-rank update of its own. On a GPU the host reads the ends of the
groups, once a call. NF4 weights are decoded one at a time by the best back end for it.
"""

from __future__ import annotations

from functools import partial

from peftkern.backends import ops
from peftkern.backends.reference import grouped_linear as loop
from peftkern.backends.torch.lora_linear import lora_linear_backward, lora_linear_forward

_NF4 = {"dequantize": ops.nf4_dequantize}
grouped_linear_forward = partial(loop.grouped_linear_forward, linear=lora_linear_forward)
grouped_linear_backward = partial(loop.grouped_linear_backward, linear=lora_linear_backward)
nf4_grouped_linear_forward = partial(
    loop.nf4_grouped_linear_forward, linear=lora_linear_forward, **_NF4
)
nf4_grouped_linear_backward = partial(
    loop.nf4_grouped_linear_backward, linear=lora_linear_backward, **_NF4
)
